"""`mobilellm convert`: a checkpoint to a Hugging Face folder, or the other way round."""

import argparse
from pathlib import Path

from mobilellm_jax.conversion.huggingface.folder import (
    load_hf,
    load_hf_provenance,
    load_hf_tokenizer,
    save_hf,
)
from mobilellm_jax.conversion.huggingface.safetensors_io import DTYPES
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import SHARED_KV_KINDS, ModelConfig, count_params

# What of a checkpoint's metadata goes into the folder; all but the step come back from it.
_KEPT = ("step", "bos", "mask_documents")

_EPILOG = """\
examples:
  mobilellm convert --to hf --checkpoint runs/my_model --output my_model_hf --dtype bfloat16
  mobilellm convert --from hf --input my_model_hf --output runs/imported
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=["hf"], help="the format to write")
    direction.add_argument("--from", dest="source", choices=["hf"], help="the format to read")
    parser.add_argument("--checkpoint", help="with --to: a run's workdir, or one of its steps")
    parser.add_argument("--input", help="with --from: the folder to read")
    parser.add_argument(
        "--output", required=True, help="the folder to write; with --from: a new workdir"
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="with --to: of the weights (default: float32)"
    )
    parser.add_argument(
        "--shared_kv",
        choices=SHARED_KV_KINDS,
        help="with --from: what the repeated blocks of a layer-shared model attend to, where the "
        "folder does not say (default: own)",
    )


def main(args: argparse.Namespace) -> None:
    """Runs the verb; raises UserError for flags that do not go together and for bad folders."""
    # Orbax takes seconds to import; `--help` should not.
    from mobilellm_jax.training.checkpoint_files import load_checkpoint
    from mobilellm_jax.training.checkpoints import save_params

    if args.to == "hf":
        _check_flags(args, "--to", needed="checkpoint", foreign=("input", "shared_kv"))
        model = load_checkpoint(args.checkpoint)
        save_hf(
            args.output,
            model.config,
            model.params,
            tokenizer_model=model.tokenizer_model,
            dtype=args.dtype or "float32",
            provenance={k: model.metadata[k] for k in _KEPT if k in model.metadata},
        )
        _print_exported(Path(args.output), model.config)
    else:
        _check_flags(args, "--from", needed="input", foreign=("checkpoint", "dtype"))
        config, params = load_hf(args.input, shared_kv=args.shared_kv)
        tokenizer_model = load_hf_tokenizer(args.input)
        provenance = load_hf_provenance(args.input)
        metadata = {k: provenance[k] for k in _KEPT[1:] if k in provenance}
        save_params(args.output, config, params, tokenizer_model, metadata)
        print(f"Read {args.input}: {_describe(config)}.")
        print(f"Wrote a checkpoint to {args.output}", end="")
        print(" with its tokenizer." if tokenizer_model else "; there was no tokenizer.model.")


def _check_flags(
    args: argparse.Namespace, direction: str, *, needed: str, foreign: tuple[str, ...]
) -> None:
    if getattr(args, needed) is None:
        raise UserError(f"{direction} hf needs --{needed}")
    for flag in foreign:
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag} has no meaning with {direction} hf; leave it out")


def _describe(config: ModelConfig) -> str:
    text = f"{count_params(config):,} parameters, {config.num_layers} blocks"
    if config.num_repeats > 1:
        text += f", each run {config.num_repeats} times ({config.sharing}, {config.shared_kv})"
    return text + (", tied embeddings" if config.tie_embeddings else ", untied head")


def _print_exported(folder: Path, config: ModelConfig) -> None:
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"Wrote {folder}: {size / 1e6:,.1f} MB, {_describe(config)}.")
    if config.num_repeats > 1:
        print(
            f"It is a plain Llama of {config.depth} layers, so shared blocks are stored repeatedly."
        )
    print("Load it in transformers:")
    print("  from transformers import AutoModelForCausalLM, AutoTokenizer")
    print(f"  model = AutoModelForCausalLM.from_pretrained({str(folder)!r})", end="")
    has_tokenizer = (folder / "tokenizer.json").exists()
    print(f"; tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})" if has_tokenizer else "")
