"""MobileLLM-1.5B: 54 blocks of width 1600, 1,511,188,800 parameters.

The paper: ~18 days on 32 A100-80G for 1T tokens; mean of eight zero-shot tasks 59.4.

  mobilellm train --config configs/1.5b.py --workdir runs/1.5b --config.data.path=data/corpus
"""

from mobilellm_jax.training.run_config import default_config, on_platform

# FILE.py:PLATFORM takes these settings; what they need there is in docs/scaling.md. Layers are
# unrolled where the compiler does it in seconds.
_UNROLLED = {"execution.unroll_layers": True, "execution.remat": "none"}
PLATFORMS = {
    "v5e-256": {"mesh.data": 16, "mesh.fsdp": 16, "train.accumulation_steps": 2},
    "v5p-256": {"mesh.data": 32, "mesh.fsdp": 8},
    "h100-8": {"mesh.data": 1, "mesh.fsdp": 8, "train.accumulation_steps": 16, **_UNROLLED},
    "h100-64": {"mesh.data": 8, "mesh.fsdp": 8, "train.accumulation_steps": 2, **_UNROLLED},
}


def get_config(platform=""):
    config = default_config("1.5b")
    config.train.num_steps = 480_000
    return on_platform(config, PLATFORMS, platform)
