"""MobileLLM-125M: 30 blocks of width 576, 124,635,456 parameters.

The paper: ~3 days on 32 A100-80G for 1T tokens; mean of eight zero-shot tasks 46.3.

  mobilellm train --config configs/125m.py --workdir runs/125m --config.data.path=data/corpus
"""

from mobilellm_jax.training.run_config import default_config


def get_config():
    config = default_config("125m")
    config.train.num_steps = 480_000
    return config
