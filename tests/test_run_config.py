"""Run configs: files, overrides, and what is refused."""

import re
from pathlib import Path

import pytest

from mobilellm_jax import cli
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.training import run_config
from mobilellm_jax.training.run_config import (
    check_config,
    default_config,
    load_config,
    model_config,
)

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
        ("--config.optimizer.peek_lr=1", r"did you mean --config\.optimizer\.peak_lr\?"),
        ("--config.trian.num_steps=1", r"did you mean --config\.train\.num_steps\?"),
        ("--config.model.num_layer=3", r"did you mean --config\.model\.num_layers\?"),
        ("--config.num_layers=3", r"did you mean --config\.model\.num_layers\?"),
        ("--config.num_layer=3", r"did you mean --config\.model\.num_layers\?"),
        (
            "--config.every_steps=3",
            "mean --config.checkpoint.every_steps or --config.eval.every_steps or --config.log.ev",
        ),
        ("--config.optimizer.zzz=3", r"config.optimizer has optimizer.beta1, "),
        ("--config.zzz=3", "no key config.zzz; all keys are in"),
        ("--config.model=3", "config.model is a section; its keys are model.embed_dim, "),
        ("--config.seed.x=3", r"no key config.seed.x"),
        ("--config.data.mask_documents=yes", "'yes' is not true or false"),
        ("--config.data.mask_documents=None", "'None' is not true or false"),
        ("--config.train.num_steps=None", "'None' is not a whole number"),
        ("--config.train.num_steps=", "'' is not a whole number"),
        ("--config.train.num_steps=1e400", "'1e400' is not a whole number"),
        ("--config.train.num_steps=1e-3", "'1e-3' is not a whole number"),
        ("--config.optimizer.peak_lr=fast", "'fast' is not a number"),
        ("--config.train.num_steps=abc", "num_steps=abc: 'abc' is not a whole number"),
        ("--config.train.num_steps=1.5", "num_steps=1.5: '1.5' is not a whole number"),
        (
            "--config.train.num_steps=0",
            "train.num_steps = 0: use at least 1 and less than 21474836",
        ),
        ("--config.optimizer.beta1=2", "beta1 = 2.0: use at least 0 and less than 1"),
        ("--config.optimizer.clip_norm=0", "clip_norm = 0.0: use more than 0 and at most"),
        ("--config.optimizer.peak_lr=0", "peak_lr = 0.0: use more than 0 and at most"),
        ("--config.optimizer.beta2=1", "beta2 = 1.0: use at least 0 and less than 1"),
        ("--config.execution.dtype=fp8", "dtype = 'fp8': use one of auto, float32, bfloat16"),
        ("--config.model.vocab_size=99999999999", "vocab_size = 99999999999: use at least 1"),
        ("--config.model.num_heads=-3", "num_heads = -3: use at least 1"),
        ("--config.optimizer.decay_fraction=9", "decay_fraction = 9"),
        ("--config.seed=-1", "seed = -1"),
        ("--config.optimizer.peak_lr=nan", "peak_lr = nan"),
        ("--config.model.num_kv_heads=5", r"num_kv_heads = 5 does not divide .* \[1, 3, 9\]"),
        ("--config.model.sharing=twice", "sharing = 'twice': use one of"),
        ("--config.train.accumulation_steps=3", "accumulation_steps = 3 does not divide"),
        ("--config.mesh.gather=never", "mesh.gather = 'never': use one of step, layer"),
        ("--config.checkpoint.keep_last=0", "keep_last = 0: use at least 1"),
        ("--config.foo", "write --config.KEY=VALUE"),
    ],
)
def test_bad_overrides_are_refused_with_the_key(override, message):
    with pytest.raises(UserError, match=message):
        load_config(str(CONFIGS / "125m.py"), [override])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.num_steps=1e3", 1000),
        ("train.num_steps=2.0", 2),
        ("train.num_steps=1_000", 1000),
        ("log.every_steps=1e18", 10**18),
        ("optimizer.peak_lr=1", 1.0),
        ("data.mask_documents=TRUE", True),
        ("data.mask_documents=t", True),
        ("data.mask_documents=1", True),
        ("data.mask_documents=0", False),
        ("data.mask_documents=F", False),
        ("data.path=a=0.5,b=0.5", "a=0.5,b=0.5"),
        ("data.path=None", "None"),
        ("seed=3", 3),
    ],
)
def test_a_value_is_read_as_the_type_of_its_key(override, value):
    config = load_config(str(CONFIGS / "125m.py"), [f"--config.{override}"])
    key = override.partition("=")[0].split(".")
    found = config[key[0]] if len(key) == 1 else config[key[0]][key[1]]
    assert found == value and type(found) is type(value)


def test_of_a_key_that_is_given_twice_the_last_one_counts():
    config = load_config(str(CONFIGS / "125m.py"), ["--config.seed=1", "--config.seed=2"])
    assert config.seed == 2


def test_every_number_and_every_choice_has_its_limits():
    """A new key is in one of the tables, unless any value of its type will do."""
    free = {"data.path", "data.mask_documents", "execution.unroll_layers", "model.tie_embeddings"}
    assert set(run_config.leaves(default_config())) == {
        *run_config._LIMITS,
        *run_config._CHOICES,
        *free,
    }


def test_missing_file_is_named():
    with pytest.raises(UserError, match="nowhere.py: no such file"):
        load_config("nowhere.py")


NUM_STEP = "there is no key num_step; did you mean config.train.num_steps"
HEAD = """from mobilellm_jax.training.run_config import default_config

def get_config():
    config = default_config()
"""
DEEP = """    return first()
def first():
    return second()
def second():
    return 1 / 0
"""


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (f"{HEAD}    raise SystemExit(0)", 5, "SystemExit: 0"),
        (f"{HEAD}    c = default_config('130m')", 5, "no preset '130m': use one of"),
        (f"{HEAD}    config.model.num_layers='3'", 5, "TypeError: Could not override .* 3 is of"),
        (f"{HEAD}    config.optimizer.lr = 1", 5, "there is no key lr; all keys are in"),
        (
            f"{HEAD}    config.train.num_step = 1",
            5,
            "there is no key num_step; did you mean config.train",
        ),
        (
            f"{HEAD}    config.train.update(num_step=1)",
            5,
            "there is no key num_step; did you mean config.train",
        ),
        (f"{HEAD}{DEEP}", 9, "ZeroDivisionError: division by zero"),
        (f"{HEAD}    return get_config()", 4, "RecursionError: maximum recursion"),
        (f"{HEAD}    syntax error", 5, "SyntaxError: invalid syntax"),
        (f"{HEAD}    raise ValueError('a\\nb ' + 'c' * 10**6)", 5, r"ValueError: a b \[...\]"),
        (f"import no_such_module\n{HEAD}", 1, "ModuleNotFoundError: No module named"),
        ("get_config = 1 +\n", 1, "SyntaxError: invalid syntax"),
        ("raise SystemExit", 1, "SystemExit"),
        ("def get_config(:\n", 1, "SyntaxError: "),
        ("x = 1\nassert x == 2", 2, "AssertionError"),
    ],
)
def test_an_error_in_a_config_file_names_the_line_and_the_reason(tmp_path, text, line, reason):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(str(path))
    message = str(caught.value)
    assert re.match(rf"{path}, line {line}: {reason}", message), message
    assert len(message) < len(str(path)) + 650
    assert message.splitlines()[1].strip() == text.splitlines()[line - 1].strip()


@pytest.mark.parametrize(
    ("text", "platform", "message"),
    [
        ("x = 1", "", r"mine.py: has no function get_config\(\)"),
        ("get_config = 1", "", r"mine.py: has no function get_config\(\)"),
        ("def get_config(platform): pass", "", "missing .*'platform'; give the argument as FILE:"),
        ("def get_config(): pass", ":h100", "too many positional arguments; leave :h100 out"),
        ("def get_config(): pass", "", r"get_config\(\) returned None, not a config; end it with"),
        ("def get_config(): return {}", "", r"get_config\(\) returned {}, not a config"),
        (f"{HEAD}    config.train.num_steps = None\n    return config", "", "is of type NoneType"),
        (f"{HEAD}    config.seed = True\n    return config", "", "seed = True is of type bool"),
        (
            f"{HEAD}    config.unlock()\n    config[3] = 3\n    return config",
            "",
            "mine.py: TypeError: '<' not",
        ),
    ],
)
def test_a_config_file_that_does_not_do_its_part_is_named(tmp_path, text, platform, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(f"{tmp_path / 'mine.py'}{platform}")


def test_ctrl_c_in_a_config_file_is_no_mistake_of_the_file(tmp_path):
    (tmp_path / "mine.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_config(str(tmp_path / "mine.py"))


def test_exit_0_in_a_config_file_ends_no_run_as_if_it_were_finished(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def get_config():\n    raise SystemExit(0)\n")
    arguments = ["plan", "--config", str(tmp_path / "mine.py"), "--topology", "h100:8"]
    assert cli.main(arguments) == 2
    assert "mine.py, line 2: SystemExit: 0" in capsys.readouterr().err


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
            "no key config.train.num_step; did you mean config.train.num_steps",
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


def test_the_width_of_a_head_follows_an_override_and_is_kept_as_a_number():
    config = load_config("configs/125m.py", ["--config.model.num_heads=18"])
    assert config.model.head_dim == model_config(config).head_dim == 32
    assert load_config("configs/125m.py").model.head_dim == 64
    overrides = ["--config.model.num_heads=18", "--config.model.head_dim=64"]
    assert load_config("configs/125m.py", overrides).model.head_dim == 64


@pytest.mark.parametrize("change", ["lose", "add"])
def test_a_config_of_python_with_other_keys_is_refused(change):
    config = default_config().unlock()
    if change == "lose":
        del config.train["num_steps"]
        message = r"config.train.num_steps is missing"
    else:
        config.train.num_step = 1
        message = r"no key config.train.num_step; did you mean config.train.num_steps"
    with pytest.raises(UserError, match=message):
        check_config(config)
