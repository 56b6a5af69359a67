"""A whole training step and greedy decoding against transformers' Llama, same weights, same run.

    python benchmarks/against_torch.py train --preset 125m --batch_size 2 --sequence_length 512
    python benchmarks/against_torch.py decode --preset 125m --tokens 64

fp32 on the CPU: SDPA attention and fused AdamW on torch's side, eager or compiled. Each side has a
process of its own (their thread pools hinder each other in one) and they take turns of three runs
each, so that a machine that slows down slows both. Prints the median of each and their ratio.
Nothing else may run on the machine. Needs the extra `test`.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from mobilellm_jax.conversion.huggingface.folder import save_hf
from mobilellm_jax.inference.generate import generate_tokens
from mobilellm_jax.inference.sampling import Sampling
from mobilellm_jax.model.presets import PRESETS
from mobilellm_jax.model.transformer import Execution, init_params
from mobilellm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from mobilellm_jax.training.run_config import default_config
from mobilellm_jax.training.step import TrainState, make_train_step

_RUNS_PER_TURN = 3


def torch_model(config, params):
    """Our weights in transformers, through the folder that `convert` writes."""
    with tempfile.TemporaryDirectory() as folder:
        save_hf(Path(folder) / "model", config, params)
        return transformers.LlamaForCausalLM.from_pretrained(
            Path(folder) / "model", attn_implementation="sdpa", dtype=torch.float32
        )


def jax_train_step(config, params, settings, tokens):
    optimizer = make_optimizer(settings.optimizer, settings.train.num_steps)
    schedule = learning_rate_schedule(settings.optimizer, settings.train.num_steps)
    step = jax.jit(make_train_step(config, Execution(), optimizer, schedule), donate_argnums=0)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    ones = np.ones((tokens.shape[0], tokens.shape[1] - 1))
    batch = {
        "inputs": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "loss_weights": jnp.asarray(ones, jnp.float32),
        "segment_ids": jnp.asarray(ones, jnp.int32),
    }

    def run():
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return run


def torch_train_step(model, settings, tokens, compiled):
    model.train()
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    others = [p for n, p in model.named_parameters() if "norm" in n]
    s = settings.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": s.weight_decay}, {"params": others}],
        lr=s.peak_lr / s.warmup_steps,
        betas=(s.beta1, s.beta2),
        eps=s.epsilon,
        weight_decay=0.0,
        fused=True,
    )
    inputs = torch.from_numpy(tokens[:, :-1].astype(np.int64))
    targets = torch.from_numpy(tokens[:, 1:].astype(np.int64))

    def loss_of(inputs, targets):
        logits = model(inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    if compiled:
        loss_of = torch.compile(loss_of)

    def run():
        loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return run


def train_side(name, args):
    config, settings = PRESETS[args.preset], default_config(args.preset)
    params = init_params(config, jax.random.key(0))
    shape = (args.batch_size, args.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
    if name == "jax":
        return jax_train_step(config, params, settings, tokens)
    model = torch_model(config, params)
    return torch_train_step(model, settings, tokens, compiled=name == "torch.compile")


def decode_side(name, args):
    config = PRESETS[args.preset]
    params = init_params(config, jax.random.key(0))
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, args.prompt_length).tolist()

    def run_jax():
        stream = generate_tokens(
            config, params, [prompt], max_tokens=args.tokens, sampling=Sampling(temperature=0)
        )
        return [int(token[0]) for token in stream]

    if name == "jax":
        return run_jax
    model = torch_model(config, params).eval()

    @torch.no_grad()
    def run_torch():
        ids = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=args.tokens,
            min_new_tokens=args.tokens,
            do_sample=False,
        )
        return ids[0, len(prompt) :].tolist()

    return run_torch


def serve(make_side, name, args, connection):
    """In a child process: a turn of timed runs for each message, until it says to end."""
    run = make_side(name, args)
    first = run()
    while connection.recv():
        seconds = []
        for _ in range(_RUNS_PER_TURN):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        connection.send((seconds, first))


def take_turns(make_side, names, args):
    """Median seconds of each side, and the result of its first run, which is not timed."""
    context = multiprocessing.get_context("spawn")
    pipes, first, seconds = {}, {}, {name: [] for name in names}
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(make_side, name, args, theirs), daemon=True).start()
    for _ in range(args.rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            elapsed, first[name] = pipe.recv()
            seconds[name] += elapsed
    for pipe in pipes.values():
        pipe.send(False)
    return {name: statistics.median(values) for name, values in seconds.items()}, first


def train(args):
    names = ["torch", *(["torch.compile"] if args.compile else []), "jax"]
    medians, losses = take_turns(train_side, names, args)
    num_tokens = args.batch_size * args.sequence_length
    print(f"training step, {args.preset}, {args.batch_size} x {args.sequence_length}, fp32")
    for name, seconds in medians.items():
        print(
            f"  {name:14s}{num_tokens / seconds:8.0f} tok/s  {medians['torch'] / seconds:.2f} of "
            f"torch  (first loss {losses[name]:.5f})"
        )


def decode(args):
    medians, outputs = take_turns(decode_side, ["torch", "jax"], args)
    print(f"greedy decoding, {args.preset}, {args.prompt_length} + {args.tokens} tokens, fp32")
    for name, seconds in medians.items():
        print(
            f"  {name:14s}{args.tokens / seconds:8.1f} tok/s  "
            f"{medians['torch'] / seconds:.2f} of torch"
        )
    print(f"  same tokens: {outputs['jax'] == outputs['torch']}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["train", "decode"])
    parser.add_argument("--preset", default="125m", choices=PRESETS)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--sequence_length", type=int, default=512)
    parser.add_argument("--compile", action="store_true", help="torch.compile as a third side")
    parser.add_argument("--prompt_length", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(
        f"jax {jax.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {torch.get_num_threads()} threads"
    )
    {"train": train, "decode": decode}[args.what](args)


if __name__ == "__main__":
    main()
