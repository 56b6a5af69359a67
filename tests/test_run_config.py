"""Run configs: files, overrides, and what is refused."""

from pathlib import Path

import pytest

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.training.run_config import load_config, model_config

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_every_shipped_config_loads(path):
    config = load_config(str(path))
    if path.stem in PRESETS:
        assert model_config(config) == PRESETS[path.stem]


def test_every_preset_has_a_config():
    assert set(PRESETS) <= {path.stem for path in CONFIGS.glob("*.py")}


def test_overrides_change_values_and_keep_their_types():
    config = load_config(
        str(CONFIGS / "125m.py"),
        ["--config.optimizer.peak_lr=1", "--config.data.mask_documents=true"],
    )
    assert config.optimizer.peak_lr == 1.0 and type(config.optimizer.peak_lr) is float
    assert config.data.mask_documents is True


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optimizer.peek_lr=1", 'Did you mean "peak_lr"'),
        ("--config.trian.num_steps=1", 'Did you mean "train"'),
        ("--config.train.num_steps=abc", "num_steps=abc: invalid literal"),
        ("--config.train.num_steps=1.5", "num_steps=1.5: invalid literal"),
        ("--config.train.num_steps=0", "train.num_steps = 0: use at least 1"),
        ("--config.optimizer.beta1=2", "beta1 = 2.0: use at least 0 and at most 1"),
        ("--config.optimizer.clip_norm=0", "clip_norm = 0"),
        ("--config.optimizer.decay_fraction=9", "decay_fraction = 9"),
        ("--config.seed=-1", "seed = -1"),
        ("--config.optimizer.peak_lr=nan", "peak_lr = nan"),
        ("--config.model.num_kv_heads=5", r"num_kv_heads = 5 does not divide .* \[1, 3, 9\]"),
        ("--config.model.sharing=twice", "sharing = 'twice': use one of"),
        ("--config.train.accumulation_steps=3", "accumulation_steps = 3 does not divide"),
        ("--config.mesh.gather=never", "mesh.gather = 'never': use 'step' or 'layer'"),
        ("--config.checkpoint.keep_last=0", "keep_last = 0: use at least 1"),
        ("--config.foo", "write --config.KEY=VALUE"),
    ],
)
def test_bad_overrides_are_refused_with_the_key(override, message):
    with pytest.raises(UserError, match=message):
        load_config(str(CONFIGS / "125m.py"), [override])


def test_missing_file_is_named():
    with pytest.raises(UserError, match="nowhere.py: no such file"):
        load_config("nowhere.py")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    config.optimizer.learning_rate = 1.0", "learning_rate"),
        ("    config.train.num_steps = 'many'", "num_steps|str"),
        ("    return None", "get_config"),
        ("    syntax error", "invalid syntax"),
        ("    config.train.num_steps = stesp", "NameError: name 'stesp'"),
        ("    import no_such_module", "ModuleNotFoundError"),
        ("    default_config('126m')", "no preset '126m': use one of 125m, 350m"),
        (
            "    config.unlock(); config.train.num_step = 3",
            "unknown key config.train.num_step; did you mean config.train.num_steps",
        ),
        ("    config.unlock(); del config.data.path", "config.data.path is missing"),
    ],
)
def test_mistakes_in_a_config_file_name_the_file(tmp_path, body, message):
    path = tmp_path / "mine.py"
    path.write_text(
        "from mobilellm_jax.training.run_config import default_config\n"
        f"def get_config():\n    config = default_config()\n{body}\n    return config\n"
    )
    with pytest.raises(UserError, match=rf"(?s)mine\.py.*({message})"):
        load_config(str(path))
