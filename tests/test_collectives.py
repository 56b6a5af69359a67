"""Collectives: every notation of XLA's compilers, compiled programs, and the theory of a step."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from model_cases import tiny

from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.planning.collectives import (
    Collective,
    collectives,
    expected_collectives,
    traffic,
    traffic_by_axes,
)

AXES = ("data", "fsdp", "tensor")
TRAFFIC_RTOL = 1e-6


def mesh_of(devices, shape):
    return Mesh(np.array(devices).reshape(shape), AXES)


def module(body, before=""):
    return f"HloModule jit_step\n\n{before}\nENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"


def read(line, mesh):
    (found,) = collectives(module("  " + line), mesh)
    return found


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("replica_groups={}", AXES),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "fsdp")),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", ("data", "fsdp")),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ("fsdp",)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}", ("tensor",)),
        ("source_target_pairs={{0,4},{4,0},{1,5},{5,1},{2,6},{6,2},{3,7},{7,3}}", ("data",)),
    ],
)
def test_groups_in_every_notation_are_mapped_to_axes(groups, axes, devices):
    operation = "collective-permute" if "pairs" in groups else "all-reduce"
    line = f"%x.1 = bf16[6,2]{{1,0}} {operation}(%p), channel_id=1, {groups}, to_apply=%add"
    found = read(line, mesh_of(devices, (2, 2, 2)))
    assert (found.axes, found.group_size) == (axes, 2 ** len(axes))
    assert (found.operation, found.dtype, found.bytes) == (operation, "bf16", 24)


ALL = "replica_groups=[1,8]<=[8]"
FORMS = {
    "TPU all-reduce of a tuple": (
        f"%r = (bf16[576,192]{{0,1:T(8,128)(2,1)S(1)}}, /*index=1*/f32[8]{{0}}) "
        f"all-reduce(%a, %b), {ALL}, to_apply=%add",
        ("all-reduce", "bf16", 576 * 192 * 2 + 32),
    ),
    "all-gather": (f"%r = bf16[16,8] all-gather(%a), {ALL}", ("all-gather", "bf16", 256)),
    "reduce-scatter": (f"%r = f32[2] reduce-scatter(%a), {ALL}", ("reduce-scatter", "f32", 64)),
    "GPU all-reduce-start": (
        f"%r = bf16[3538944]{{0}} all-reduce-start(%a), {ALL}, to_apply=%add",
        ("all-reduce", "bf16", 7077888),
    ),
    "GPU all-gather-start of a tuple": (
        "%r = ((bf16[30,72]{1,0}, bf16[2]{0}), (bf16[30,576]{1,0}, bf16[16]{0})) "
        f"all-gather-start(%a, %b), {ALL}",
        ("all-gather", "bf16", 30 * 576 * 2 + 32),
    ),
    "GPU reduce-scatter-start": (
        f"%r = ((f32[576,32]{{1,0}}), f32[72,32]{{1,0}}) reduce-scatter-start(%a), {ALL}",
        ("reduce-scatter", "f32", 576 * 32 * 4),
    ),
    "GPU all-to-all-start": (
        f"%r = ((bf16[2,8]{{1,0}}), bf16[2,8]{{1,0}}) all-to-all-start(%a), {ALL}",
        ("all-to-all", "bf16", 32),
    ),
    "TPU collective-permute-start": (
        "%r = (bf16[36,4]{1,0}, bf16[36,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) "
        "collective-permute-start(%a), source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},"
        "{6,7},{7,0}}",
        ("collective-permute", "bf16", 288),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_those_of_the_whole_tensor_and_ends_are_not_counted(form, devices):
    line, expected = FORMS[form]
    text = module(f"  {line}\n  %d = f32[4] all-reduce-done(%r)\n  %e = f32[4] all-gather-done(%r)")
    (found,) = collectives(text, mesh_of(devices, (8, 1, 1)))
    assert (found.operation, found.dtype, found.bytes) == expected


# As libtpu prints them: loops without a trip count, a reduce-scatter as a fusion, and one
# all-gather in the fusions that start it, advance it in a later loop, and end it.
TPU_FUSIONS = """
%all-reduce-scatter.1.clone (x: bf16[64]) -> bf16[8] {
  %x = bf16[64] parameter(0)
  %r = bf16[64] all-reduce(%x), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %s = bf16[8] dynamic-slice(%r, %i), dynamic_slice_sizes={8}
}

%start (x: bf16[8]) -> bf16[64] {
  ROOT %g = bf16[64] all-gather(%x), channel_id=2, replica_groups=mesh['a'=8] {'a'}
}

%advance (x: bf16[8]) -> bf16[64] {
  ROOT %g = bf16[64] all-gather(%x), channel_id=2, replica_groups=mesh['a'=8] {'a'}
}

%condition (t: (u32[], bf16[64])) -> pred[] {
  %bound = u32[]{:T(128)} constant(8)
  %i = u32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%body (t: (u32[], bf16[64])) -> (u32[], bf16[64]) {
  %two = u32[] constant(2)
  %i = u32[] get-tuple-element(%t), index=0
  %next = u32[] add(%i, %two)
  %f = bf16[8] fusion(%t), kind=kCustom, calls=%all-reduce-scatter.1.clone
  %a = bf16[64] fusion(%t), kind=kOutput, calls=%advance
  ROOT %out = (u32[], bf16[64]) tuple(%next, %a)
}
"""
TPU_ENTRY = """
  %zero = u32[] constant(0)
  %copy.1 = u32[] copy(%zero)
  %async-collective-start = bf16[64] fusion(%p), kind=kCustom, calls=%start
  %init = (u32[], bf16[64]) tuple(%copy.1, %async-collective-start)
  %loop = (u32[], bf16[64]) while(%init), condition=%condition, body=%body
  ROOT %async-collective-done = bf16[64] fusion(%loop), kind=kCustom, calls=%advance
"""


def test_tpu_fusions_and_loops_without_trip_count(devices):
    gathered, scattered = collectives(
        module(TPU_ENTRY, before=TPU_FUSIONS), mesh_of(devices, (1, 8, 1))
    )
    assert gathered == Collective("all-gather", "bf16", 128, ("fsdp",), 8, 1)
    assert scattered == Collective("reduce-scatter", "bf16", 128, ("fsdp",), 8, 4)


def test_traffic_is_that_of_a_ring():
    def sent(operation):
        return traffic(Collective(operation, "f32", 800, ("data",), 8, count=3))

    assert sent("all-gather") == sent("reduce-scatter") == sent("all-to-all") == 3 * 700
    assert sent("all-reduce") == 3 * 1400
    assert sent("collective-permute") == 3 * 800


def compiled(function, mesh, *specs):
    """The text of a function of arrays `[8, 16]` and `[16, 24]`, in fp32, on 8 devices."""
    shapes = ((8, 16), (16, 24))
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=False)
    ]
    replicated = NamedSharding(mesh, P())
    return jax.jit(function, out_shardings=replicated).lower(*arguments).compile().as_text()


def test_a_sum_over_rows_is_one_all_reduce_over_the_axis_that_splits_them(devices):
    # Not in the order of their ids: HLO counts devices as the mesh does.
    mesh = mesh_of(np.roll(devices, 3)[::-1], (2, 4, 1))
    (found,) = collectives(compiled(lambda x: x.sum(axis=0), mesh, P("fsdp")), mesh)
    assert (found.operation, found.dtype, found.bytes) == ("all-reduce", "f32", 16 * 4)
    assert (found.axes, found.group_size, found.count) == (("fsdp",), 4, 1)


def test_loops_within_loops_multiply(devices):
    def step(x, w):
        def inner(w, _):
            return w + x.T @ (x @ w), None

        def outer(w, _):
            return lax.scan(inner, w * 2, length=5)

        return lax.scan(outer, w, length=3)[0]

    mesh = mesh_of(devices, (4, 1, 2))
    found = collectives(compiled(step, mesh, P("data"), P()), mesh)
    assert [(c.operation, c.axes, c.count, c.bytes) for c in found] == [
        ("all-reduce", ("data",), 15, 16 * 24 * 4)
    ]


def test_a_gathered_weight_is_an_all_gather_of_its_whole(devices):
    mesh = mesh_of(devices, (2, 4, 1))

    def step(x, w):
        return x @ lax.with_sharding_constraint(w, NamedSharding(mesh, P()))

    found = collectives(compiled(step, mesh, P(("data", "fsdp")), P("fsdp")), mesh)
    weights = [c for c in found if c.axes == ("fsdp",)]
    assert [(c.operation, c.bytes, c.count) for c in weights] == [("all-gather", 16 * 24 * 4, 1)]


def total(model, mesh_shape, **settings):
    settings = {"compute_dtype": "bfloat16", "gather": "step"} | settings
    return traffic_by_axes(expected_collectives(model, mesh_shape, **settings))


def test_theory_of_data_parallel_125m_is_the_known_figure():
    """30 x 7.08 MB in bf16, 73.7 MB of embedding and 0.14 MB of norms in fp32, all-reduced."""
    known = 2 * 15 / 16 * (30 * 7_077_888 + 73_728_000 + 61 * 576 * 4)
    chex.assert_trees_all_close(
        total(PRESETS["125m"], {"data": 16}), {("data",): known}, rtol=TRAFFIC_RTOL
    )


def test_theory_of_fsdp_gathers_by_step_or_by_sweep():
    model = PRESETS["125m"]
    blocks, tables, norms = 30 * 7_077_888, 32_000 * 576, 61 * 576 * 4
    once = 7 / 8 * (2 * blocks + 6 * tables + 2 * norms)
    more = 7 / 8 * blocks
    mesh = {"data": 1, "fsdp": 8, "tensor": 1}
    expected = [once, once + more, once + 2 * more]
    twice = dataclasses.replace(model, sharing="repeat_all", num_repeats=2)
    found = [
        total(model, mesh)[("fsdp",)],
        total(model, mesh, gather="layer")[("fsdp",)],
        total(PRESETS["125m_ls"], mesh, gather="layer")[("fsdp",)],
    ]
    chex.assert_trees_all_close(found, expected, rtol=TRAFFIC_RTOL)
    in_sweeps = total(twice, mesh, gather="layer")[("fsdp",)]
    chex.assert_trees_all_close(in_sweeps, once + 4 * more, rtol=TRAFFIC_RTOL)


def test_theory_reduces_after_every_microbatch_and_gathers_once():
    model, mesh = tiny(), {"data": 2, "fsdp": 4}
    one, three = (
        expected_collectives(
            model, mesh, compute_dtype="float32", gather="step", accumulation_steps=n
        )
        for n in (1, 3)
    )
    for before, after in zip(one, three, strict=True):
        factor = 1 if before.operation == "all-gather" else 3
        assert after == dataclasses.replace(before, count=factor * before.count)


def test_theory_of_tensor_parallel_sums_activations_in_every_visit():
    model = PRESETS["600m"]
    activation = 4096 * 1152 * 2
    sums = {"none": 4 * 40 + 2, "full": 5 * 40 + 2}
    for remat, count in sums.items():
        found = total(model, {"tensor": 2}, remat=remat, tokens=4096)
        expected = count * activation + 3 * 4096 * 4
        chex.assert_trees_all_close(found, {("tensor",): expected}, rtol=TRAFFIC_RTOL)
