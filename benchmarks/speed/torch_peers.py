"""PyTorch's side: transformers' Llama with the same weights, as its users would train and run it.

`torch` is eager, `torch.compile` compiles forward pass, loss and (through AOT autograd) backward
pass as one graph. Both use SDPA attention, the fused AdamW and clipping over all tensors at once.
bf16 is mixed precision as is usual: fp32 weights under `torch.autocast(bfloat16)`, no gradient
scaler. fp32 matrix products on a GPU may use TF32, as JAX's do, except where losses are compared.
Nothing is accumulated and nothing recomputed on this side: it has the whole batch at once.

`liger` is the stronger peer: Liger Kernel (github.com/linkedin/Liger-Kernel) replaces rotary
positions, RMSNorm, SwiGLU and head + loss of the same Llama by Triton kernels, among them a loss in
slices like ours. It was chosen because it runs this very model, so the weights and the loss can be
held against each other; torchtitan, litgpt and nanochat have models of their own. Triton needs a
GPU; `pip install liger-kernel` is pure Python, and where it is not installed the side is left out.
"""

import importlib.util
import time

import numpy as np

from benchmarks.speed.cases import OPTIMIZER, learning_rate, random_tokens, random_weights
from benchmarks.speed.measure import Workload, peak_resident_bytes
from mobilellm_jax.errors import UserError
from mobilellm_jax.huggingface.config import to_hf_config
from mobilellm_jax.huggingface.names import hf_arrays, hf_tensors
from mobilellm_jax.model.config import ModelConfig

TRAIN_PEERS = ("torch", "torch.compile", "liger")


def installed(name: str, platform: str) -> bool:
    """Whether that side can run here."""
    needed = ["torch", "transformers"] + ["liger_kernel"] * (name == "liger")
    on_platform = platform == "gpu" or name != "liger"
    return on_platform and all(importlib.util.find_spec(module) for module in needed)


def torch_device(platform: str):
    import torch

    if platform == "gpu" and not torch.cuda.is_available():
        raise UserError("jax has a GPU here and torch has none: install torch for CUDA")
    return torch.device("cuda" if platform == "gpu" else "cpu")


def llama(config: ModelConfig, device, dtype: str = "float32"):
    """transformers' Llama with the weights of `cases.random_weights`; shared blocks copied out."""
    import torch
    import transformers

    values = to_hf_config(config, "expanded", dtype, None, ())
    values.pop("architectures")
    described = transformers.LlamaConfig(**values)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(described, attn_implementation="sdpa")
    assert next(model.parameters()).dtype == getattr(torch, dtype)
    params = random_weights(config)
    names = [name for name, *_ in hf_tensors(config, config.visit_order)]
    arrays = hf_arrays(config, params, config.visit_order)
    weights = {
        # Copied: torch warns of arrays that it may not write to.
        name: torch.from_numpy(np.array(array))
        for name, array in zip(names, arrays, strict=True)
    }
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}  # tied
    return model


def synchronize(device):
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device) -> int:
    """See the description of `measure`."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def _optimizer(model):
    import torch

    decayed = [p for name, p in model.named_parameters() if "norm" not in name]
    others = [p for name, p in model.named_parameters() if "norm" in name]
    o = OPTIMIZER
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": o.weight_decay}, {"params": others}],
        betas=(o.beta1, o.beta2),
        eps=o.epsilon,
        weight_decay=0.0,
        fused=True,
    )


def build_train(settings: dict) -> Workload:
    """Whole training steps of the side `settings["peer"]`."""
    import torch

    peer, device = settings["peer"], torch_device(settings["platform"])
    if peer == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    exact = settings["exact_matmuls"]
    torch.set_float32_matmul_precision("highest" if exact else "high")
    config = ModelConfig.from_dict(settings["model"])
    model = llama(config, device).train()
    optimizer = _optimizer(model)
    mixed = settings["execution"]["dtype"] == "bfloat16"

    def loss_of(inputs, targets):
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            if peer == "liger":
                return model(inputs, shift_labels=targets, use_cache=False).loss
            logits = model(inputs, use_cache=False).logits
            # .float() as in transformers' own loss.
            return torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten()
            )

    if peer == "torch.compile":
        loss_of = torch.compile(loss_of)
    shape = (settings["batch_size"], settings["sequence_length"] + 1)

    def prepare(first, count):
        batches = []
        for step in range(first, first + count):
            tokens = random_tokens(config.vocab_size, shape, step).astype(np.int64)
            inputs, targets = (torch.from_numpy(t.copy()) for t in (tokens[:, :-1], tokens[:, 1:]))
            batches.append((step, inputs.to(device), targets.to(device)))
        synchronize(device)
        return batches

    def run(batches):
        losses = []
        for step, inputs, targets in batches:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            loss = loss_of(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        synchronize(device)
        return [float(loss) for loss in losses]

    return Workload(prepare, run, lambda: {"peak_bytes": peak_bytes(device)})


def build_generate(settings: dict) -> Workload:
    """Greedy `generate` with transformers' default cache; `torch.compile` is its static cache."""
    import torch

    device = torch_device(settings["platform"])
    torch.set_float32_matmul_precision("high")
    config = ModelConfig.from_dict(settings["model"])
    dtype = settings["execution"]["dtype"]
    model = llama(config, device, dtype).eval()
    options = {"cache_implementation": "static"} if settings["peer"] == "torch.compile" else {}
    shape = (settings["batch_size"], settings["prompt_length"])

    @torch.no_grad()
    def continued(prompts, num_tokens):
        ids = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        return ids[:, shape[1] :].tolist()  # to the host: it is finished then

    def prepare(first, count):
        return [
            torch.from_numpy(random_tokens(config.vocab_size, shape, i).astype(np.int64)).to(device)
            for i in range(first, first + count)
        ]

    def run(prompts):
        return [continued(p, settings["num_tokens"]) for p in prompts]

    def facts():
        used = peak_bytes(device)
        return {"peak_bytes": used} | first_token_seconds(lambda p: continued(p, 1), prepare)

    return Workload(prepare, run, facts)


def first_token_seconds(generate_one, prepare) -> dict:
    """What a generation of one token takes: the prompt's part of a longer one."""
    seconds = []
    for number in range(6):
        (prompt,) = prepare(1000 + number, 1)
        start = time.perf_counter()
        generate_one(prompt)
        seconds.append(time.perf_counter() - start)
    return {"first_token_seconds": sorted(seconds[1:])[2]}


def build_attention(settings: dict) -> Workload:
    """Forward and backward pass of `scaled_dot_product_attention`, causal, grouped heads."""
    import torch

    device = torch_device(settings["platform"])
    torch.set_float32_matmul_precision("high")
    dtype = getattr(torch, settings["execution"]["dtype"])
    config = ModelConfig.from_dict(settings["model"])
    rows, length = settings["batch_size"], settings["sequence_length"]

    def normal(heads, generator):
        shape = (rows, heads, length, config.head_dim)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def prepare(first, count):
        calls = []
        for i in range(first, first + count):
            generator = torch.Generator(device).manual_seed(i)
            q, d_out = (normal(config.num_heads, generator) for _ in range(2))
            k, v = (normal(config.num_kv_heads, generator) for _ in range(2))
            calls.append(([x.requires_grad_() for x in (q, k, v)], d_out))
        synchronize(device)
        return calls

    def run(calls):
        for qkv, d_out in calls:
            out = torch.nn.functional.scaled_dot_product_attention(
                *qkv, is_causal=True, enable_gqa=config.num_heads != config.num_kv_heads
            )
            torch.autograd.grad(out, qkv, d_out)
        synchronize(device)
        return [None] * len(calls)

    return Workload(prepare, run, lambda: {"peak_bytes": peak_bytes(device)})
