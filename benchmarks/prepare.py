"""How close `prepare` comes to bare SentencePiece on the same cores; whether its memory is flat.

    python benchmarks/prepare.py --input books.jsonl.xz --tokenizer tokenizer.model --workers 2

The text is first written as plain JSON lines. Each repeat then measures, in turn, (a) SentencePiece
alone, in as many processes as there are workers, each with its share of the text already in memory,
and (b) the whole of prepare: starting the workers, reading, encoding, packing, writing and syncing.
Target: ratio of (b) to (a) at least 0.8, and the same peak memory for one and four times the text.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from mobilellm_jax.data.prepare import prepare
from mobilellm_jax.data.sources import iter_documents
from mobilellm_jax.tokenizers.sentencepiece import SentencePieceTokenizer

SEQUENCE_LENGTH = 2048


def write_lines(inputs: list[str], path: Path, max_bytes: int) -> int:
    """Up to ``max_bytes`` of text as JSON lines; returns the bytes of text."""
    num_bytes = 0
    with open(path, "w", encoding="utf-8") as file:
        for document in iter_documents(inputs):
            num_bytes += len(document.text.encode())
            file.write(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")
            if num_bytes >= max_bytes:
                break
    return num_bytes


def encode_share(path, tokenizer, number, num_workers, barrier, seconds) -> None:
    """One process of bare SentencePiece: every num_workers-th document."""
    texts = [document.text for document in iter_documents([path])][number::num_workers]
    tokenizer = SentencePieceTokenizer.load(tokenizer)
    barrier.wait()
    start = time.perf_counter()
    for text in texts:
        tokenizer.encode(text)
    seconds.put(time.perf_counter() - start)


def time_sentencepiece(path: Path, tokenizer: str, num_workers: int) -> float:
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(num_workers), context.Queue()
    processes = [
        context.Process(
            target=encode_share, args=(path, tokenizer, number, num_workers, barrier, seconds)
        )
        for number in range(num_workers)
    ]
    for process in processes:
        process.start()
    slowest = max(seconds.get() for _ in processes)
    for process in processes:
        process.join()
    return slowest


def run_prepare(path: Path, folder: Path, tokenizer: str, num_workers: int) -> float:
    start = time.perf_counter()
    prepare(
        [path],
        folder,
        tokenizer=tokenizer,
        sequence_length=SEQUENCE_LENGTH,
        num_workers=num_workers,
        progress=False,
    )
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds


def resident_peak(pid: int | str = "self") -> int:
    """Most MiB that a process had resident; 0 if it is gone. `ru_maxrss` would be no less than
    that of the process which started it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:")), 0)


def report_memory(path, folder, tokenizer, num_workers, result) -> None:
    done, workers = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.02):
            peaks = [resident_peak(child.pid) for child in multiprocessing.active_children()]
            workers.append(max(peaks, default=0))

    watching = threading.Thread(target=watch)
    watching.start()
    run_prepare(path, folder, tokenizer, num_workers)
    done.set()
    watching.join()
    result.put([resident_peak(), max(workers)])


def peak_memory(*arguments) -> list[int]:
    """MiB of the parent and of its largest worker, measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=report_memory, args=(*arguments, result))
    process.start()
    process.join()
    return result.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=40, help="of text to measure with")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, quarter = folder / "whole.jsonl", folder / "quarter.jsonl"
        num_bytes = write_lines(args.input, whole, args.megabytes * 10**6)
        write_lines([whole], quarter, num_bytes // 4)
        ratios = []
        print(f"{num_bytes / 1e6:.1f} MB of text, {args.workers} workers, {sys.version.split()[0]}")
        for _ in range(args.repeats):
            alone = time_sentencepiece(whole, args.tokenizer, args.workers)
            full = run_prepare(whole, folder / "out", args.tokenizer, args.workers)
            ratios.append(alone / full)
            print(
                f"SentencePiece {num_bytes / alone / 1e6:.2f} MB/s, "
                f"prepare {num_bytes / full / 1e6:.2f} MB/s, ratio {alone / full:.3f}"
            )
        print(f"median ratio {statistics.median(ratios):.3f} (target 0.8)")
        for path in (quarter, whole):
            memory = peak_memory(path, folder / "out", args.tokenizer, args.workers)
            size = path.stat().st_size / 1e6
            print(f"{size:.1f} MB: peak {memory[0]} MiB in the parent, {memory[1]} in a worker")


if __name__ == "__main__":
    main()
