"""The rule that chooses a kernel, and each kernel's numbers and programs.

Splash attention runs in Pallas' interpreter here; cuDNN's attention needs a GPU. Programs of both
are compiled for devices that are not here, where the compile-only packages are installed.
"""

import functools
import importlib.util
import re
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding
from model_cases import random_params, tiny

from mobilellm_jax.errors import UserError
from mobilellm_jax.model import attention_kernels
from mobilellm_jax.model.attention import KeyValue, causal_attention
from mobilellm_jax.model.attention_kernels import choose_attention
from mobilellm_jax.model.execution import REMAT_POLICIES, Execution
from mobilellm_jax.model.transformer import MobileLLM
from mobilellm_jax.training.sharding import MESH_AXES, on_mesh

# Largest difference to float64, as a share of the largest value.
RTOL = {"float32": 2e-6, "bfloat16": 1e-2}
LARGE_SCORES_RTOL = 2e-5  # fp32; a saved normaliser of order 100 has lost two digits
SAME_MATHS_ATOL = 2e-5  # two orders of the same fp32 operations, through a whole model
B, H = 2, 64


def device(platform, kind, capability=None):
    fields = {"platform": platform, "device_kind": kind}
    return SimpleNamespace(**fields | ({"compute_capability": capability} if capability else {}))


CPU = device("cpu", "cpu")
V4, V5E = device("tpu", "TPU v4"), device("tpu", "TPU v5 lite")
V5P, V6E = device("tpu", "TPU v5"), device("tpu", "TPU v6 lite")
T4, A100 = device("gpu", "Tesla T4", "7.5"), device("gpu", "NVIDIA A100-SXM4-80GB", "8.0")
H100, H200 = device("gpu", "NVIDIA H100 80GB HBM3", "9.0"), device("gpu", "NVIDIA H200", "9.0")
B200, AMD = device("gpu", "NVIDIA B200", "10.0"), device("gpu", "AMD Instinct MI300X", "gfx942")


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "num_tokens", "kind"),
    [
        *[(tpu, "bfloat16", 64, 2048, "splash") for tpu in (V4, V5E, V5P, V6E)],
        (V5E, "float32", 64, 2048, "splash"),
        (V5E, "float16", 64, 2048, "xla"),
        (V5E, "bfloat16", 64, 128, "splash"),
        (V5E, "bfloat16", 64, 640, "splash"),
        (V5E, "bfloat16", 64, 64, "xla"),
        (V5E, "bfloat16", 64, 2000, "xla"),
        (V5E, "bfloat16", 256, 2048, "splash"),
        (V5E, "bfloat16", 264, 2048, "xla"),
        (V5E, "bfloat16", 36, 2048, "xla"),
        *[(new, "bfloat16", 64, 2048, "cudnn") for new in (A100, H100, H200, B200)],
        *[(old, "bfloat16", 64, 2048, "xla") for old in (T4, AMD, CPU)],
        (H100, "float16", 64, 2048, "cudnn"),
        (H100, "float32", 64, 2048, "xla"),
        (H100, "bfloat16", 128, 2048, "cudnn"),
        (H100, "bfloat16", 136, 2048, "xla"),
        (H100, "bfloat16", 36, 2048, "xla"),
        (H100, "bfloat16", 64, 2000, "cudnn"),
        (H100, "bfloat16", 64, 2001, "xla"),
    ],
)
def test_auto_takes_the_kernel_of_the_device_where_it_runs(
    device, dtype, head_dim, num_tokens, kind
):
    shapes = {"config": tiny(head_dim=head_dim), "dtype": dtype, "num_tokens": num_tokens}
    assert choose_attention("auto", device, **shapes) == kind
    assert choose_attention("xla", device, **shapes) == "xla"
    for name in ("cudnn", "splash"):
        if name == kind:
            assert choose_attention(name, device, **shapes) == name
        else:
            with pytest.raises(UserError, match=rf"'{name}' needs .*Use 'auto'") as error:
                choose_attention(name, device, **shapes)
            values = f"here: {device.device_kind}, {dtype}, {head_dim}, {num_tokens}."
            assert values in str(error.value)


def exact(q, k, v, segments, d_out):
    """Output and gradients of causal attention in float64, scores written out."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    num_kv_heads, T = k.shape[1:3]
    q, d_out = (x.reshape(*x.shape[:2], num_kv_heads, -1, H) for x in (q, d_out))
    scores = np.einsum("btkgh,bksh->bkgts", q, k) / np.sqrt(H)
    visible = np.tri(T, dtype=bool)[None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    weights = np.where(visible[:, None, None], np.exp(scores - scores.max(-1, keepdims=True)), 0)
    weights = weights / weights.sum(-1, keepdims=True)
    d_weights = np.einsum("btkgh,bksh->bkgts", d_out, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) / np.sqrt(H)
    return (
        np.einsum("bkgts,bksh->btkgh", weights, v).reshape(*q.shape[:2], -1, H),
        np.einsum("bkgts,bksh->btkgh", d_scores, k).reshape(*q.shape[:2], -1, H),
        np.einsum("bkgts,btkgh->bksh", d_scores, q),
        np.einsum("bkgts,btkgh->bksh", weights, d_out),
    )


def arrays(dtype, T, num_heads, num_kv_heads, segmented):
    """Queries, keys, values, segment ids (lengths that fit no block), gradient of the output."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q, d_out = (draw(B, T, num_heads, H) for _ in range(2))
    k, v = (draw(B, num_kv_heads, T, H) for _ in range(2))
    starts = np.zeros((B, T), np.int32)
    starts[0, [7, 100]] = starts[1, [1, 77, 78]] = 1
    return q, k, v, starts.cumsum(axis=1, dtype=np.int32) if segmented else None, d_out


def check(attend, dtype, T, num_heads, num_kv_heads, segmented):
    compare(attend, *arrays(dtype, T, num_heads, num_kv_heads, segmented), RTOL[dtype])


def compare(attend, q, k, v, segments, d_out, rtol):
    @jax.jit
    def run(q, k, v, segments, d_out):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
        return out, *vjp(d_out)

    results = run(q, k, v, segments, d_out)
    for result, expected in zip(results, exact(q, k, v, segments, d_out), strict=True):
        assert result.dtype == q.dtype
        atol = rtol * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=0, atol=atol)


@pytest.fixture
def splash(monkeypatch):
    """Splash attention on this CPU."""
    make = attention_kernels.make_splash_mha_single_device
    interpreted = functools.partial(make, interpret=True)
    monkeypatch.setattr(attention_kernels, "make_splash_mha_single_device", interpreted)
    return attention_kernels.splash_attention


@pytest.fixture
def mesh(devices):
    """Rows on two, heads on two devices."""
    return Mesh(np.array(devices[:4]).reshape(2, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


cases = pytest.mark.parametrize(
    ("dtype", "T", "num_heads", "num_kv_heads", "segmented"),
    [
        ("float32", 256, 6, 2, True),
        ("float32", 128, 3, 1, False),
        ("float32", 640, 2, 2, True),
        ("bfloat16", 256, 6, 2, True),
        ("bfloat16", 128, 3, 1, False),
    ],
)


@cases
def test_splash_equals_float64(splash, dtype, T, num_heads, num_kv_heads, segmented):
    check(splash, dtype, T, num_heads, num_kv_heads, segmented)


@pytest.mark.parametrize("segmented", [True, False])
def test_splash_on_a_mesh_equals_float64(splash, mesh, segmented):
    with on_mesh(mesh):
        check(splash, "float32", 256, 6, 2, segmented)


def test_splash_on_a_mesh_moves_nothing_between_devices(splash, mesh):
    q, k, v, segments, _ = arrays("float32", 128, 6, 2, True)

    def loss(*args):
        return splash(*args).sum()

    with on_mesh(mesh):
        rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
        heads = jax.sharding.NamedSharding(mesh, jax.P("data", "tensor"))
        q_heads = jax.sharding.NamedSharding(mesh, jax.P("data", None, "tensor"))
        gradient = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=(q_heads, heads, heads, rows))
        program = gradient.lower(q, k, v, segments).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program


@pytest.fixture
def gpu():
    """The GPU of this machine: these tests want `jax_platforms` with cuda in it."""
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("no GPU among the platforms of these tests: cuDNN's attention cannot be run")
    choose_attention("cudnn", device, tiny(head_dim=H), dtype="bfloat16", num_tokens=128)
    with jax.default_device(device):
        yield device


@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (3, 1), (2, 2)])
def test_cudnn_equals_float64(gpu, num_heads, num_kv_heads, segmented):
    attend = attention_kernels.cudnn_attention
    check(attend, "bfloat16", 256, num_heads, num_kv_heads, segmented)
    check(attend, "bfloat16", 190, num_heads, num_kv_heads, segmented)


@pytest.mark.parametrize("segmented", [True, False])
def test_what_cudnn_is_asked_for_equals_float64(segmented, monkeypatch):
    """Its layout, scale and mask: the same call with the products left to XLA."""
    ask = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *qkv, implementation, **options: ask(*qkv, implementation="xla", **options),
    )
    check(attention_kernels.cudnn_attention, "float32", 128, 6, 2, segmented)


def test_the_forward_pass_of_cudnn_is_kept_under_the_name_that_jax_gives_it():
    kept = attention_kernels.attention_saveable
    assert kept(fused_attention_stablehlo._dot_product_attention_fwd_p_wrapper)
    assert not kept(jax.lax.dot_general_p)


def xla_attention(q, k, v, segments):
    return causal_attention(q, KeyValue(k, v), segment_ids_BT=segments, kind="xla")


@cases
def test_xla_equals_float64(dtype, T, num_heads, num_kv_heads, segmented):
    """The fallback, to the same claim."""

    check(xla_attention, dtype, T, num_heads, num_kv_heads, segmented)


def test_xla_equals_float64_at_a_length_that_no_block_divides():
    check(xla_attention, "float32", 300, 2, 1, True)


def test_xla_equals_float64_where_exp_of_a_score_overflows():
    """Whole numbers, so that large scores have no rounding."""
    rng = np.random.default_rng(0)
    q, k = (
        jnp.asarray(rng.integers(-3, 4, shape), jnp.float32)
        for shape in ((B, 128, 2, H), (B, 1, 128, H))
    )
    _, _, v, segments, d_out = arrays("float32", 128, 2, 1, True)
    scores = np.einsum("btnh,bsh->bnts", q, k[:, 0])
    assert scores.max() > 89  # the largest x with a finite exp(x) in fp32 is 88.7
    compare(xla_attention, q * H**0.5, k, v, segments, d_out, LARGE_SCORES_RTOL)


# Splash: forward, gradient of queries, gradient of keys and values.
KERNEL_CALLS = {"splash": ["tpu_custom_call"] * 3, "cudnn": ["__cudnn$fmha"] * 2, "xla": []}
MODEL = tiny(num_layers=2, max_seq_len=128)
TOKENS = np.random.default_rng(0).integers(0, 53, (2, 128))
SEGMENTS = np.sort(np.random.default_rng(1).integers(0, 3, (2, 128)))


def loss(params, execution):
    logits = MobileLLM(MODEL, execution).apply({"params": params}, TOKENS, SEGMENTS)
    return jax.nn.logsumexp(logits, axis=-1).mean()


@pytest.mark.parametrize(
    "remat",
    [pytest.param(r, marks=() if r == "dots" else pytest.mark.slow) for r in REMAT_POLICIES],
)
def test_a_model_with_splash_on_a_mesh_equals_the_one_with_xla(splash, mesh, remat):
    params = random_params(MODEL)
    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = run(params, Execution(attention="xla"))
    with on_mesh(mesh):
        actual = run(params, Execution(attention="splash", remat=remat))
    chex.assert_trees_all_close(actual, expected, atol=SAME_MATHS_ATOL, rtol=SAME_MATHS_ATOL)


@pytest.mark.parametrize(
    ("remat", "recomputed"), [("none", 0), ("dots", 0), ("attention", 0), ("full", 1)]
)
def test_only_full_remat_runs_the_forward_kernel_again(mesh, remat, recomputed):
    with on_mesh(mesh):
        gradient = jax.jit(jax.grad(loss), static_argnums=1).trace(
            random_params(MODEL), Execution(attention="splash", remat=remat)
        )
        program = gradient.lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("tpu_custom_call") == len(KERNEL_CALLS["splash"]) + recomputed


@pytest.mark.parametrize(("kind", "num_tokens"), [("cudnn", 128), ("splash", 127)])
def test_a_kernel_is_refused_operands_that_it_does_not_take(kind, num_tokens):
    model = MobileLLM(MODEL, Execution(attention=kind))
    with pytest.raises(UserError, match=f"'{kind}' needs .*float32, 8, {num_tokens}. Use 'auto'"):
        model.apply({"params": random_params(MODEL)}, TOKENS[:, :num_tokens])


GPU_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 85045870592 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
ABSENT = {  # platform: package that compiles for it, arguments of the topology
    "tpu": ("libtpu", {"topology_name": "v5e:2x2"}),
    "cuda": (
        "jax_cuda13_plugin",
        {"topology_name": "h100", "target_config": GPU_TARGET, "topology": "1x1x1"},
    ),
}


@pytest.fixture(params=ABSENT)
def absent_device(request, monkeypatch):
    """A device that programs can be compiled for, but not run on."""
    package, topology = ABSENT[request.param]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: nothing can be compiled for {request.param}")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform=request.param, **topology).devices[0]


@pytest.mark.slow
@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_chosen_for_absent_hardware_is_in_its_program(absent_device, dtype, segmented):
    """Forward once and backward, although remat recomputes everything else."""
    kind = choose_attention("auto", absent_device, tiny(head_dim=H), dtype=dtype, num_tokens=2048)
    assert (kind == "xla") == (absent_device.platform == "gpu" and dtype == "float32")
    sharding = SingleDeviceSharding(absent_device)
    *qkv, segments, _ = (
        None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x in arrays(dtype, 2048, 9, 3, segmented)
    )

    @functools.partial(jax.checkpoint, policy=REMAT_POLICIES["attention"])
    def layer(q, k, v, segments):
        out = causal_attention(jnp.sin(q), KeyValue(k, v), segment_ids_BT=segments, kind=kind)
        return jnp.sin(out).astype(jnp.float32).sum()

    with jax.set_mesh(Mesh(np.array([absent_device]).reshape(1, 1, 1), MESH_AXES)):
        gradient = jax.jit(jax.grad(layer, (0, 1, 2))).lower(*qkv, segments)
    program = gradient.compile().as_text()
    calls = re.findall(r'custom_call_target="(tpu_custom_call|__cudnn\$fmha)', program)
    assert calls == KERNEL_CALLS[kind]
