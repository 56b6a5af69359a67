"""MobileLLM-125M-LS: the weights of 125m, each block run twice in a row.

The paper: mean of eight zero-shot tasks 47.0.

  mobilellm train --config configs/125m_ls.py --workdir runs/125m_ls --config.data.path=data/corpus
"""

from mobilellm_jax.training.run_config import default_config


def get_config():
    config = default_config("125m_ls")
    config.train.num_steps = 480_000
    return config
