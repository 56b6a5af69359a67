"""Architecture configs: validation, orders, and counts against the paper's tables."""

import dataclasses
import json

import jax
import pytest
from model_cases import ALL_KINDS, tiny

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig, check_expressible, default_ffn_dim
from mobilellm_jax.model.costs import count_params, kv_cache_bytes_per_token, train_flops_per_token
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.model.transformer import abstract_params

# Paper, tables 9 and 10: preset -> parameters, fp16 KV bytes per token.
PUBLISHED = {
    "125m": (124_635_456, 23_040),
    "350m": (345_355_200, 40_960),
    "600m": (603_188_352, 61_440),
    "1b": (1_005_461_760, 69_120),
    "1.5b": (1_511_188_800, 69_120),
    "125m_ls": (124_635_456, 46_080),
    "350m_ls": (345_355_200, 81_920),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name):
    assert (count_params(PRESETS[name]), kv_cache_bytes_per_token(PRESETS[name])) == PUBLISHED[name]


def test_every_published_preset_exists():
    assert set(PRESETS) == set(PUBLISHED)


@pytest.mark.parametrize("config", [*PRESETS.values(), *ALL_KINDS.values()])
def test_counted_parameters_are_those_that_exist(config):
    leaves = jax.tree.leaves(abstract_params(config))
    assert sum(leaf.size for leaf in leaves) == count_params(config)


# Paper, tables 4 and 9: (layers, heads, kv heads, width, ffn, tied) -> millions of parameters.
@pytest.mark.parametrize(
    ("shape", "ffn", "tied", "millions"),
    [
        ((12, 12, 12, 768), "relu", False, 134.1),
        ((12, 12, 12, 768), "swiglu", False, 134.1),
        ((30, 8, 8, 512), "swiglu", False, 135.0),
        ((30, 8, 8, 512), "swiglu", True, 118.6),
        ((15, 20, 20, 1280), "swiglu", False, 386.7),
        ((32, 14, 14, 896), "swiglu", True, 351.6),
    ],
)
def test_ablation_models_are_expressed_by_config_alone(shape, ffn, tied, millions):
    layers, heads, kv_heads, width = shape
    ffn_dim = 4 * width if ffn == "relu" else 0
    config = ModelConfig(
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        embed_dim=width,
        ffn=ffn,
        ffn_dim=ffn_dim,
        tie_embeddings=tied,
    )
    assert abs(count_params(config) / 1e6 - millions) < 0.1  # the paper cuts or rounds


def test_ffn_width_rule_gives_the_released_widths():
    widths = {576: 1536, 960: 2560, 1152: 3072, 1280: 3584, 1600: 4352}
    assert {d: default_ffn_dim(d) for d in widths} == widths


@pytest.mark.parametrize(
    ("name", "gflop"), [("125m", 0.960), ("350m", 2.449), ("600m", 4.185), ("1b", 6.881)]
)
def test_flops_per_token_at_2048(name, gflop):
    assert round(train_flops_per_token(PRESETS[name], 2048).causal / 1e9, 3) == gflop


def test_flops_of_a_tiny_model_counted_by_hand():
    c = ModelConfig(
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        embed_dim=8,
        ffn_dim=16,
        head_dim=4,
        vocab_size=10,
    )
    # Per block: q and o 8*8 each, k and v 8*4 each, three matrices of 8*16; head 8*10.
    weights = 2 * (64 + 64 + 32 + 32 + 3 * 128) + 80
    flops = train_flops_per_token(c, seq_len=6)
    assert flops.matmul == 6 * weights
    assert flops.full - flops.matmul == 12 * 2 * 8 * 6
    assert flops.causal - flops.matmul == 6 * 2 * 8 * 6
    shared = dataclasses.replace(c, sharing="immediate", num_repeats=2)
    assert train_flops_per_token(shared, 6).matmul == 6 * (2 * (weights - 80) + 80)
    first = dataclasses.replace(shared, shared_kv="first_visit")
    assert train_flops_per_token(first, 6).matmul == 6 * (2 * (weights - 80) + 80 - 2 * 64)


def test_visit_orders_of_the_paper():
    assert tiny().visit_order == (0, 1, 2)
    assert tiny("immediate", 2).visit_order == (0, 0, 1, 1, 2, 2)
    assert tiny("repeat_all", 3).visit_order == (0, 1, 2) * 3
    assert tiny("reverse", 3).visit_order == (0, 1, 2, 2, 1, 0, 0, 1, 2)


def test_first_visit_needs_one_cache_slot_per_block():
    own, first = tiny("immediate", 3), tiny("immediate", 3, "first_visit")
    assert kv_cache_bytes_per_token(own) == 3 * kv_cache_bytes_per_token(first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, r"num_kv_heads = 3 does not divide .* 4: use one of \[1, 2, 4\]"),
        ({"ffn": "gelu"}, "ffn = 'gelu': use one of swiglu, relu"),
        ({"sharing": "imediate", "num_repeats": 2}, "sharing = 'imediate'"),
        ({"sharing": "immediate"}, "with model.num_repeats = 1"),
        ({"num_repeats": 2}, "sharing = 'none' with model.num_repeats = 2"),
        ({"shared_kv": "first_visit"}, "needs layer sharing"),
        ({"num_layers": 0}, "num_layers = 0: use a positive"),
        ({"vocab_size": -5}, "vocab_size = -5"),
        ({"norm_eps": float("nan")}, "norm_eps = nan"),
        ({"rope_theta": float("inf")}, "rope_theta = inf"),
        ({"head_dim": 7}, "head_dim = 7 is odd"),
        ({"num_layers": 2.5}, "num_layers = 2.5 is of type float"),
        ({"num_layers": True}, "num_layers = True is of type bool"),
        ({"tie_embeddings": "yes"}, "tie_embeddings = 'yes' is of type str"),
    ],
)
def test_bad_values_are_refused_with_field_value_and_mend(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**changes)


def test_head_dim_0_is_the_width_divided_among_the_heads():
    config = ModelConfig(num_layers=1, num_heads=6, num_kv_heads=2, embed_dim=96, head_dim=0)
    assert config.head_dim == 16 == config.to_dict()["head_dim"]
    for changes, message in (
        (
            {"num_heads": 10},
            r"head_dim = 0 takes .*96 is not a multiple of 10.* set model.head_dim",
        ),
        ({"num_heads": 32}, "head_dim = 3 is odd"),
        ({"num_heads": 0}, "num_heads = 0: use a positive number"),
        ({"embed_dim": 0}, "embed_dim = 0: use a positive number"),
        ({"head_dim": -8}, "head_dim = -8: use a positive number"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(config, **{"head_dim": 0} | changes)


def test_a_whole_number_is_taken_for_a_real_one():
    theta = tiny(rope_theta=500_000).rope_theta
    assert theta == 500_000 and type(theta) is float


@pytest.mark.parametrize("config", ALL_KINDS.values(), ids=ALL_KINDS)
def test_config_survives_json(config):
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_and_missing_keys_are_named():
    with pytest.raises(UserError, match="'num_layer'; did you mean 'num_layers'"):
        ModelConfig.from_dict({"num_layer": 3})
    with pytest.raises(UserError, match="lacks num_heads, num_kv_heads, embed_dim"):
        ModelConfig.from_dict({"num_layers": 3})


def test_a_property_that_a_format_does_not_name_is_refused_unless_it_is_off():
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    config = tiny("immediate", 2, ffn="relu")
    check_expressible(config, names, "this", "take that")
    check_expressible(tiny(), names - {"ffn", "sharing", "num_repeats"}, "this", "take that")
    with pytest.raises(UserError) as error:
        check_expressible(config, names - {"ffn"}, "this", "take that")
    assert str(error.value) == (
        "model.ffn = 'relu' cannot be expressed by this; take that, or train with model.ffn "
        "'swiglu'"
    )


@pytest.mark.parametrize(
    ("sharing", "repeats", "shared_kv", "expected"),
    [
        # (block, cache slot, repeat, projects keys and values) of each visit.
        ("none", 1, "own", [(0, 0, 0, True), (1, 1, 0, True), (2, 2, 0, True)]),
        ("immediate", 2, "own", [(b, 2 * b + r, r, True) for b in range(3) for r in range(2)]),
        ("immediate", 2, "first_visit", [(b, b, r, r == 0) for b in range(3) for r in range(2)]),
        ("repeat_all", 2, "own", [(b, 3 * r + b, r, True) for r in range(2) for b in range(3)]),
        (
            "reverse",
            2,
            "first_visit",
            [(0, 0, 0, True), (1, 1, 0, True), (2, 2, 0, True)]
            + [(2, 2, 1, False), (1, 1, 1, False), (0, 0, 1, False)],
        ),
    ],
)
def test_visits_say_who_projects_keys_and_values_and_where_they_are(
    sharing, repeats, shared_kv, expected
):
    config = tiny(sharing, repeats, shared_kv)
    found = [(v.block, v.cache_slot, v.repeat, v.projects_kv) for v in config.visits]
    assert found == expected
    assert config.num_cache_slots == sum(projects for *_, projects in expected)
