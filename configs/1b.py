"""MobileLLM-1B: 54 blocks of width 1280, 1,005,461,760 parameters.

The paper: ~12 days on 32 A100-80G for 1T tokens; mean of eight zero-shot tasks 57.3.

  mobilellm train --config configs/1b.py --workdir runs/1b --config.data.path=data/corpus
"""

from mobilellm_jax.training.run_config import default_config


def get_config():
    config = default_config("1b")
    config.train.num_steps = 480_000
    return config
