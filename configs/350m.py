"""MobileLLM-350M: 32 blocks of width 960, 345,355,200 parameters.

The paper: ~6 days on 32 A100-80G for 1T tokens; mean of eight zero-shot tasks 51.3.

  mobilellm train --config configs/350m.py --workdir runs/350m --config.data.path=data/corpus
"""

from mobilellm_jax.training.run_config import default_config


def get_config():
    config = default_config("350m")
    config.train.num_steps = 480_000
    return config
