"""MobileLLM-1.5B: 54 blocks of width 1600, 1,511,188,800 parameters.

The paper: ~18 days on 32 A100-80G for 1T tokens; mean of eight zero-shot tasks 59.4.

  mobilellm train --config configs/1.5b.py --workdir runs/1.5b --config.data.path=data/corpus
"""

from mobilellm_jax.training.run_config import default_config


def get_config():
    config = default_config("1.5b")
    config.train.num_steps = 480_000
    return config
