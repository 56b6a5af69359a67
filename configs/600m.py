"""MobileLLM-600M: 40 blocks of width 1152, 603,188,352 parameters.

The paper: ~8 days on 32 A100-80G for 1T tokens; mean of eight zero-shot tasks 54.3.

  mobilellm train --config configs/600m.py --workdir runs/600m --config.data.path=data/corpus
"""

from mobilellm_jax.training.run_config import default_config


def get_config():
    config = default_config("600m")
    config.train.num_steps = 480_000
    return config
