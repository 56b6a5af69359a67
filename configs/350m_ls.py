"""MobileLLM-350M-LS: the weights of 350m, each block run twice in a row.

The paper: mean of eight zero-shot tasks 52.1.

  mobilellm train --config configs/350m_ls.py --workdir runs/350m_ls --config.data.path=data/corpus
"""

from mobilellm_jax.training.run_config import default_config, on_platform

# FILE.py:PLATFORM takes these settings; what they need there is in docs/scaling.md. Layers are
# unrolled where the compiler does it in seconds.
_UNROLLED = {"execution.unroll_layers": True, "execution.remat": "none"}
PLATFORMS = {
    "v5e-256": {"mesh.data": 32, "mesh.fsdp": 8, "train.accumulation_steps": 2},
    "v5p-256": {"mesh.data": 32, "mesh.fsdp": 8},
    "h100-8": {"mesh.data": 1, "mesh.fsdp": 8, "train.accumulation_steps": 8, **_UNROLLED},
    "h100-64": {"mesh.data": 8, "mesh.fsdp": 8, **_UNROLLED},
}


def get_config(platform=""):
    config = default_config("350m_ls")
    config.train.num_steps = 480_000
    return on_platform(config, PLATFORMS, platform)
