"""`mobilellm generate`."""

import argparse
from pathlib import Path

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.paths import is_utf8, path_flag

_EPILOG = """\
examples:
  mobilellm generate --checkpoint runs/125m --prompt "The capital of France is" --temperature 0
  mobilellm generate --checkpoint runs/125m --prompt "Once" --prompt "Twice" --top_p 0.9 --seed 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `generate`."""
    parser.epilog = _EPILOG
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        type=path_flag,
        help="a run's workdir, one of its steps, or a Hugging Face folder",
    )
    add("--prompt", action="append", metavar="TEXT", help="give it again for several at once")
    add(
        "--prompt_file",
        metavar="FILE",
        type=path_flag,
        help="one prompt: the text of this file, without its last line end",
    )
    add("--max_tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    add("--top_k", type=int, default=0, metavar="K", help="default: all tokens")
    add("--top_p", type=float, default=1.0, metavar="P", help="default: all tokens")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--tokenizer", metavar="FILE", type=path_flag, help="for a folder without tokenizer.model")


def main(args: argparse.Namespace) -> None:
    """Prints each prompt with its continuation; a single one as it comes."""
    from mobilellm_jax.checkpoints.loading import load_text_model
    from mobilellm_jax.inference.generate import encode_prompts, generate
    from mobilellm_jax.inference.sampling import Sampling
    from mobilellm_jax.machine.compilation_cache import use_compilation_cache

    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: use 0 to {2**32 - 1}")
    if args.max_tokens < 1:
        raise UserError(f"--max_tokens {args.max_tokens}: use 1 or more")
    prompts = list(args.prompt or [])
    for prompt in prompts:
        if not is_utf8(prompt):
            raise UserError(
                f"--prompt {prompt!a:.80} is not UTF-8; use --prompt_file with a file in UTF-8"
            )
    if args.prompt_file:
        try:
            # Line ends of Windows are read as "\n".
            text = Path(args.prompt_file).read_text(encoding="utf-8-sig")
            prompts.append(text.removesuffix("\n"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{args.prompt_file}: cannot be read as text ({error})") from error
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT or --prompt_file FILE")
    use_compilation_cache()
    model = load_text_model(args.checkpoint, args.tokenizer)
    encode_prompts(model, prompts)  # a prompt that is refused is not printed
    single = len(prompts) == 1
    if single:
        print(prompts[0], end="", flush=True)
    texts = generate(
        model,
        prompts,
        max_tokens=args.max_tokens,
        sampling=sampling,
        seed=args.seed,
        on_text=(lambda _, piece: print(piece, end="", flush=True)) if single else lambda *_: None,
    )
    if single:
        print()
    else:
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1):
            print(f"--- {number}\n{prompt}{text}")
