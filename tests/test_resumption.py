"""A run that goes on with another config says so."""

import json
import math

import pytest

from mobilellm_jax.training.resumption import changes, rate_jump
from mobilellm_jax.training.run_config import default_config


def config_of(**optimizer):
    config = default_config()
    config.train.num_steps = optimizer.pop("num_steps", 100)
    config.optimizer.update(**{"peak_lr": 1e-2, "warmup_steps": 10} | optimizer)
    return config


def metadata_of(config):
    return {"run": json.loads(config.to_json_best_effort())}


def cosine(update, peak=1e-2, warmup=10, steps=100):
    """The rate of update 0, 1, ..., from the peak to a tenth of it, worked out by hand."""
    if update < warmup:
        return peak * update / warmup
    share = min(1, (update - warmup) / (steps - warmup))
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)


def test_every_key_that_has_changed_is_a_line():
    now = config_of(peak_lr=5e-3, schedule="wsd")
    now.data.path = "elsewhere"
    assert changes(metadata_of(config_of()), now) == [
        "config.data.path:  -> elsewhere",
        "config.optimizer.peak_lr: 0.01 -> 0.005",
        "config.optimizer.schedule: cosine -> wsd",
    ]
    assert changes(metadata_of(now), now) == []


def test_a_checkpoint_without_a_config_or_without_a_new_key_loads_silently():
    assert changes({}, config_of()) == [] and rate_jump({}, config_of(), 5) is None
    old = metadata_of(config_of())
    del old["run"]["mesh"], old["run"]["optimizer"]["clip_norm"]
    assert changes(old, config_of()) == []
    assert changes(old, config_of(clip_norm=0.5)) == ["config.optimizer.clip_norm: 1.0 -> 0.5"]


def test_an_ended_cosine_run_that_is_extended_jumps():
    longer = config_of(num_steps=200)
    text = rate_jump(metadata_of(config_of()), longer, 100)
    before, after = cosine(99), cosine(100, steps=200)
    assert after > 4 * before
    assert f"from {before:.3g} at step 100 to {after:.3g} at step 101" in text
    assert f"{after / before:.1f} times" in text and "schedule=wsd" in text


@pytest.mark.parametrize("step", [1, 2, 5, 9, 10, 50, 99])
def test_a_run_that_goes_on_as_it_was_does_not_jump(step):
    """Not even in the warm-up, whose second step has twice the rate of the first."""
    assert rate_jump(metadata_of(config_of()), config_of(), step) is None


@pytest.mark.parametrize(("factor", "jumps"), [(1.4, False), (1.6, True)])
def test_half_as_much_again_is_a_jump(factor, jumps):
    now = config_of(peak_lr=1e-2 * factor, schedule="wsd")
    saved = metadata_of(config_of(schedule="wsd"))
    assert (rate_jump(saved, now, 50) is not None) == jumps


def test_a_jump_from_no_rate_at_all_is_said_too():
    now = config_of(warmup_steps=0)
    assert "from 0 at step 1 to 0.01" in rate_jump(metadata_of(config_of()), now, 1)


def test_wsd_is_extended_without_a_jump():
    saved = metadata_of(config_of(schedule="wsd"))
    assert rate_jump(saved, config_of(schedule="wsd", num_steps=200), 80) is None
