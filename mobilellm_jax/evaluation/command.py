"""`mobilellm evaluate`."""

import argparse
import json
import math
import os
from pathlib import Path

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.atomic import check_can_write, write_file
from mobilellm_jax.storage.paths import path_flag
from mobilellm_jax.tables import number

_EPILOG = """\
examples:
  mobilellm evaluate --checkpoint runs/125m --data data/corpus
  mobilellm evaluate --checkpoint runs/125m --text wiki.test.raw --protocol official

loss and perplexity are those of all predicted tokens, as in training; text_loss, text_perplexity
and bits_per_byte leave out control tokens (BOS, EOS, ...), which stand for no text.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `evaluate`."""
    parser.epilog = _EPILOG
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        type=path_flag,
        help="a run's workdir, one of its steps, or a Hugging Face folder",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data", metavar="DIR", type=path_flag, help="a folder made by `mobilellm prepare`"
    )
    what.add_argument(
        "--text", metavar="FILE", type=path_flag, help="a text file, such as WikiText-2's test set"
    )
    add("--split", metavar="NAME", help="of --data (default: valid)")
    add(
        "--protocol",
        choices=["official"],
        help="of --text: chunks of 2048 tokens as in the official MobileLLM eval.py (default: "
        "official, the only one)",
    )
    add(
        "--chunk",
        type=int,
        metavar="N",
        help="of --text: tokens per chunk (default: 2048; others are not the official protocol)",
    )
    add("--max_chunks", type=int, metavar="N", help="of --text: only the first N chunks")
    add("--batch_size", type=int, metavar="N", help="of --data, in sequences (default: 8)")
    add("--max_records", type=int, metavar="N", help="of --data: only the first N records")
    add("--tokenizer", metavar="FILE", type=path_flag, help="for a folder without tokenizer.model")
    add("--output", metavar="FILE", type=path_flag, help="also write the figures as JSON")


def main(args: argparse.Namespace) -> None:
    """Prints the figures."""
    import jax

    from mobilellm_jax.checkpoints.loading import load_text_model
    from mobilellm_jax.data.dataset import Dataset
    from mobilellm_jax.evaluation import perplexity
    from mobilellm_jax.machine.compilation_cache import use_compilation_cache
    from mobilellm_jax.model.execution import Execution, execution_for

    foreign = (
        ("split", "batch_size", "max_records") if args.text else ("protocol", "chunk", "max_chunks")
    )
    for flag in foreign:
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag} has no meaning with --{'text' if args.text else 'data'}")
    for flag, least in (("batch_size", 1), ("max_records", 1), ("chunk", 2), ("max_chunks", 1)):
        if (value := getattr(args, flag)) is not None and value < least:
            raise UserError(f"--{flag} {value}: use {least} or more")
    if args.output is not None:
        check_can_write(Path(args.output))
    split = args.split or "valid"
    use_compilation_cache()
    model = load_text_model(args.checkpoint, args.tokenizer)

    def execution(num_tokens: int) -> Execution:
        return execution_for(jax.local_devices()[0], model.config, num_tokens)

    if args.text:
        chunk = args.chunk or perplexity.OFFICIAL_CHUNK
        what = f"{args.text}, {perplexity.protocol(chunk, args.max_chunks)}"
        result = perplexity.official_perplexity(
            model,
            perplexity.official_text(args.text),
            execution=execution(chunk - 1),
            chunk=chunk,
            max_chunks=args.max_chunks,
            progress=True,
        )
    else:
        what = f"{args.data}, {split} split"
        dataset = Dataset.open(args.data)
        result = perplexity.dataset_perplexity(
            model,
            dataset,
            split,
            batch_size=args.batch_size or 8,
            max_records=args.max_records,
            execution=execution(dataset.header.sequence_length),
        )
    figures = result.figures()
    if args.text:  # it has no control tokens
        figures = {name: value for name, value in figures.items() if "text" not in name}
    print(f"{args.checkpoint} on {what}:")
    for name, value in figures.items():
        print(f"  {name:<17}{f'{value:,}' if isinstance(value, int) else number(value)}")
    if args.output is not None:
        # JSON has no infinity; metrics.jsonl has null there, too.
        figures = {name: v if math.isfinite(v) else None for name, v in figures.items()}
        values = {"checkpoint": args.checkpoint, "on": what, **figures}
        try:
            output = Path(os.path.realpath(args.output))  # a link stays one
            write_file(output, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise UserError(f"{args.output}: cannot be written ({error.strerror})") from error
