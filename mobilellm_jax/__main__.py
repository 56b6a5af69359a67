"""`mobilellm VERB`, the same as `python -m mobilellm_jax VERB`."""

import sys

from mobilellm_jax import interrupts


def main() -> int:
    """The command line, with signals answered from its first line on."""
    interrupts.take_over()
    from mobilellm_jax import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
