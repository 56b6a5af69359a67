"""`python -m mobilellm_jax VERB`, the same as `mobilellm VERB`."""

import sys

from mobilellm_jax.cli import main

sys.exit(main())
