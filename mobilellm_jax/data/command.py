"""`mobilellm prepare`."""

import argparse
import codecs
import re
import time

from mobilellm_jax.data.prepare import prepare
from mobilellm_jax.storage.paths import path_flag

_EPILOG = """\
example: a tokenizer trained on the text itself, one file in twenty held out

  %(prog)s --input stories/ --valid_fraction 0.05 --vocab_size 4096 \\
      --sequence_length 512 --output data/stories

example: a text file of many documents, as TinyStories (a blank line between them: '\\n\\n')

  %(prog)s --input TinyStoriesV2-GPT4-train.txt --document_separator '<|endoftext|>' \\
      --valid_fraction 0.01 --vocab_size 4096 --output data/stories

example: an existing tokenizer, JSON lines that say themselves what is held out

  %(prog)s --input web.jsonl.zst books.parquet --split_field split \\
      --tokenizer tokenizer.model --output data/web
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `prepare`."""
    parser.description = "Turns text into a dataset of packed token records for training."
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILES",
        type=path_flag,
        help="text, JSON lines or Parquet files (also .gz .bz2 .xz .zst), directories, patterns, "
        "or hf:NAME[:CONFIG[:SPLIT]]",
    )
    add("--output", required=True, metavar="DIR", type=path_flag, help="folder of the dataset")
    add("--tokenizer", metavar="FILE", type=path_flag, help="SentencePiece tokenizer.model")
    add("--vocab_size", type=int, metavar="N", help="train a tokenizer of N pieces on the input")
    add("--sequence_length", type=int, default=2048, metavar="N", help="default: %(default)s")
    add(
        "--field",
        default="text",
        metavar="FIELD",
        help="key of the text in JSON lines (default: %(default)s)",
    )
    add("--split_field", metavar="FIELD", help="key that says train, valid or test")
    add(
        "--keep_test",
        action="store_true",
        help="hold out rows whose split is test, too (default: leave them out)",
    )
    add(
        "--document_separator",
        type=_unescaped,
        metavar="TEXT",
        help="what stands between the documents of plain-text files, in a line of its own or not; "
        "\\n, \\t and the like as in Python (default: a file is one document)",
    )
    add(
        "--skip_bad",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N bad rows of JSON lines, Parquet and hf: (default: none may be bad)",
    )
    add(
        "--valid_fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="hold out this fraction of the documents (of a text that is one document: its end)",
    )
    add(
        "--valid_input",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILES",
        type=path_flag,
        help="files to hold out",
    )
    boolean = argparse.BooleanOptionalAction
    add("--bos", action=boolean, default=True, help="BOS before each document")
    add("--eos", action=boolean, default=True, help="EOS after each document")
    add("--workers", type=int, metavar="N", help="processes (default: all cores)")


def main(args: argparse.Namespace) -> None:
    """Runs the verb and prints what came out."""
    start = time.monotonic()
    header = prepare(
        args.input,
        args.output,
        valid_inputs=args.valid_input,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        sequence_length=args.sequence_length,
        field=args.field,
        split_field=args.split_field,
        keep_test=args.keep_test,
        skip_bad=args.skip_bad,
        document_separator=args.document_separator,
        valid_fraction=args.valid_fraction,
        bos=args.bos,
        eos=args.eos,
        num_workers=args.workers,
    )
    print(f"{args.output}: {len(header.sources)} inputs, {time.monotonic() - start:.1f} s")
    for name, split in header.splits.items():
        print(
            f"  {name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens, "
            f"{split.num_records:,} records of {header.sequence_length}, "
            f"{split.num_bytes / split.num_tokens:.2f} bytes per token"
        )


def _unescaped(text: str) -> str:
    """A string with the escapes that a shell does not read, such as \\n."""
    escape = r"\\(?:[nrtf\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})"
    return re.sub(escape, lambda found: codecs.decode(found[0], "unicode_escape"), text)
