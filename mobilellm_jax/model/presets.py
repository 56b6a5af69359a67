"""The released sizes (paper, tables 9 and 10) by name."""

import dataclasses

from mobilellm_jax.model.config import ModelConfig


def _preset(num_layers: int, num_heads: int, num_kv_heads: int) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        embed_dim=64 * num_heads,
        head_dim=0,
    )


def _run_twice(config: ModelConfig) -> ModelConfig:
    """The layer-shared form: each block visited twice in a row, same weights (section 2.3)."""
    return dataclasses.replace(config, sharing="immediate", num_repeats=2)


PRESETS: dict[str, ModelConfig] = {
    "125m": _preset(30, 9, 3),
    "350m": _preset(32, 15, 5),
    "600m": _preset(40, 18, 6),
    "1b": _preset(54, 20, 5),
    "1.5b": _preset(54, 25, 5),
}
PRESETS["125m_ls"] = _run_twice(PRESETS["125m"])
PRESETS["350m_ls"] = _run_twice(PRESETS["350m"])
