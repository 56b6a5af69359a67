"""What one sees of a run: progress lines, `metrics.jsonl`, TensorBoard events and `loss.png`.

`metrics.jsonl` is the record, one JSON object per line with `step`, `time` (Unix seconds) and
values under the names `train/*`, `eval/*`, `throughput/*` and `progress/*`; everything else can be
drawn from it again. A value that is not finite is written as null (JSON has no NaN).
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, SupportsFloat

import numpy as np
from absl import logging

from mobilellm_jax.storage.atomic import write_file
from mobilellm_jax.storage.paths import local_path
from mobilellm_jax.tables import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"
TENSORBOARD_DIR = "tensorboard"


class MetricsLog:
    """Records and shows the metrics of one run of training.

    The clock of `throughput/*` starts at `start_clock`, or else at the first `log_train`, so that
    the compilation of the step never counts. Dispatch is asynchronous: call `log_train` with values
    that are on the host already (that wait is what makes the clock true), before `paused` work of
    the same step; the rate is the mean over all steps since the last call.

    Args:
      workdir: folder of the run, created if absent.
      resume_step: last finished step of the checkpoint that the run goes on from: what was logged
        after it is dropped. 0 starts a new record.
      total_steps: steps of the whole run.
      tokens_per_step: tokens of one global batch.
      flops_per_token: training FLOPs per token (`train_flops_per_token(...).causal`).
      peak_flops_total: FLOP/s of all devices of the run together; None where no figure is
        published: then there is no `throughput/mfu`.
      tokens_per_epoch: tokens of one pass over the data, where known: adds `progress/epoch`.
      enabled: False on all processes but the first: then nothing is written or printed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        resume_step: int,
        total_steps: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops_total: float | None,
        tokens_per_epoch: int | None = None,
        enabled: bool = True,
    ):
        self._workdir = local_path(workdir)
        self._total_steps = total_steps
        self._tokens_per_step = tokens_per_step
        self._mfu_per_rate = flops_per_token / peak_flops_total if peak_flops_total else None
        self._tokens_per_epoch = tokens_per_epoch
        self._enabled = enabled
        self._created = time.monotonic()
        self._first_clocked: tuple[int, float] | None = None  # step and time, pauses included
        self._interval_start: tuple[int, float] | None = None  # step and time
        self._paused_seconds = 0.0  # of this interval
        self._pause_depth = 0
        self._is_drawn = True  # all that is written
        if enabled:
            self._workdir.mkdir(parents=True, exist_ok=True)
            _drop_after(self._workdir / METRICS_FILE, resume_step)
            self._file = (self._workdir / METRICS_FILE).open("a", buffering=1, encoding="utf-8")
            self._tensorboard = _open_tensorboard(self._workdir / TENSORBOARD_DIR, resume_step)

    def start_clock(self, step: int) -> None:
        """Says that `step` has finished just now and that nothing is left to compile."""
        now = time.monotonic()
        self._first_clocked = self._first_clocked or (step, now)
        self._interval_start = (step, now)
        self._paused_seconds = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps what is done inside (evaluation, checkpoints) out of the throughput."""
        start = time.monotonic()
        self._pause_depth += 1
        try:
            yield
        finally:
            self._pause_depth -= 1
            if self._pause_depth == 0:
                self._paused_seconds += time.monotonic() - start

    def log_train(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Records `values` (`train/loss`, `train/learning_rate`, `train/grad_norm`) of `step`.

        Adds `throughput/step_seconds`, `throughput/tokens_per_second` and, on devices with a
        published peak, `throughput/mfu` (the share of it, 0 to 1) from the second call on, or from
        the first after `start_clock`. A share of more than 1 is left out: the peak is not that of
        the device then.
        """
        record = {name: float(value) for name, value in values.items()}
        if self._interval_start is not None and step > self._interval_start[0]:
            start_step, start = self._interval_start
            seconds = time.monotonic() - start - self._paused_seconds
            step_seconds = seconds / (step - start_step)
            rate = self._tokens_per_step / step_seconds
            record["throughput/step_seconds"] = step_seconds
            record["throughput/tokens_per_second"] = rate
            if self._mfu_per_rate and (share := rate * self._mfu_per_rate) <= 1:
                record["throughput/mfu"] = share
        self.start_clock(step)
        self._write(step, record)
        self._print("step", step, [*_train_parts(record), self._times(step)])

    def log_eval(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Records `values` (`eval/loss`, ...) of `step` and draws `loss.png` anew."""
        record = {name: float(value) for name, value in values.items()}
        with self.paused():
            self._write(step, record)
            parts = [f"{name.removeprefix('eval/')} {number(v)}" for name, v in record.items()]
            self._print("eval", step, parts)
            self._draw()

    def close(self) -> None:
        """Closes the files and draws in `loss.png` what is not in it yet."""
        if self._enabled:
            self._file.close()
            self._tensorboard.close()
        self._draw()

    def _draw(self) -> None:
        if self._enabled and not self._is_drawn:
            plot_loss(self._workdir)
            self._is_drawn = True

    def _write(self, step: int, record: dict[str, float]) -> None:
        tokens = step * self._tokens_per_step
        record = record | {"progress/tokens": tokens}
        if self._tokens_per_epoch is not None:
            record["progress/epoch"] = tokens / self._tokens_per_epoch
        if not self._enabled:
            return
        self._is_drawn = False
        now = time.time()
        line = {name: v if math.isfinite(v) else None for name, v in record.items()}
        self._file.write(json.dumps({"step": step, "time": now, **line}, allow_nan=False) + "\n")
        for name, value in record.items():
            self._tensorboard.add_scalar(name, value, step, walltime=now)

    def _times(self, step: int) -> str:
        elapsed = time.monotonic() - self._created
        first_step, first_time = self._first_clocked
        if step == first_step:
            return f"{_clock(elapsed)} elapsed"
        step_seconds = (time.monotonic() - first_time) / (step - first_step)
        left = (self._total_steps - step) * step_seconds
        return f"{_clock(elapsed)} elapsed, {_clock(left)} left"

    def _print(self, kind: str, step: int, parts: list[str]) -> None:
        if not self._enabled:
            return
        total = f"{self._total_steps:,}"
        percent = f"{step / self._total_steps:6.1%}"
        line = " | ".join([f"{kind} {step:>{len(total)},}/{total} {percent}", *parts])
        print(line, file=sys.stdout, flush=True)


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """All records of a run in the order they were written; `[]` where there are none.

    Values that were not finite come back as NaN. A line torn by a kill is left out.
    """
    path = local_path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        if (record := _parse(line)) is not None:
            records.append({k: math.nan if v is None else v for k, v in record.items()})
    return records


def plot_loss(workdir: str | os.PathLike) -> None:
    """Draws `loss.png` in `workdir` from its `metrics.jsonl`; a failure is a warning only."""
    path = local_path(workdir) / PLOT_FILE
    part = path.with_name(PLOT_FILE + ".part")
    try:
        figure = _draw(read_metrics(workdir), title=Path(workdir).resolve().name)
        figure.savefig(part, format="png", dpi=150)
        os.replace(part, path)
    except Exception as error:  # a picture must never end a run
        logging.warning("could not draw %s: %s: %s", path, type(error).__name__, error)


def _parse(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if whole else None


def _drop_after(path: Path, step: int) -> None:
    """Keeps the whole lines of `path` up to `step` (none if 0), replacing the file atomically."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n") if step > 0 else []
    kept = [x for x in lines if (record := _parse(x)) is not None and record["step"] <= step]
    write_file(path, b"".join(line + b"\n" for line in kept))


def _open_tensorboard(folder: Path, resume_step: int):
    # tensorboardX imports torch wherever that is installed; hidden, it does without.
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter(
        str(folder),
        purge_step=resume_step + 1 if resume_step else 0,
        flush_secs=10,
        filename_suffix=f".{resume_step:09d}",  # two starts within a second keep their own files
    )


def _train_parts(record: Mapping[str, float]) -> list[str]:
    formats = {
        "train/loss": lambda v: f"loss {number(v)}",
        "train/learning_rate": lambda v: f"lr {v:.2e}",
        "train/grad_norm": lambda v: f"grad {v:.2f}" if v < 1e6 else f"grad {v:.2e}",
        "throughput/tokens_per_second": lambda v: f"{_humanise(v)} tok/s",
        "throughput/mfu": lambda v: f"MFU {v:.1%}",
    }
    return [text(record[name]) for name, text in formats.items() if name in record]


def _humanise(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:  # three digits: 999,900 is 1M
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02d}:{seconds:02d}"


def _draw(records: list[dict[str, float]], *, title: str) -> "Figure":
    """Loss over tokens (steps on the upper axis), with the learning rate below."""
    from matplotlib.figure import Figure  # without pyplot: no global state, always the Agg canvas

    figure = Figure(figsize=(9, 6), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    tokens, train = _series(records, "train/loss")
    eval_tokens, evals = _series(records, "eval/loss")
    last = max([1.0, *tokens, *eval_tokens])
    units = ((1e9, "billion tokens"), (1e6, "million tokens"), (1, "tokens"))
    scale, unit = next(unit for unit in units if last >= unit[0])
    if len(train):
        smooth = _smooth(train)
        loss.plot(tokens / scale, train, color="tab:blue", alpha=0.25, linewidth=0.8)
        label = f"train, smoothed: {smooth[-1]:.3f}"
        loss.plot(tokens / scale, smooth, color="tab:blue", linewidth=1.8, label=label)
    if len(evals):
        label = f"eval: {evals[-1]:.3f}"
        loss.plot(eval_tokens / scale, evals, "o", color="tab:red", markersize=4, label=label)
    # The fall of the first fiftieth would flatten all the rest: it may leave the picture.
    shown = np.concatenate([train[tokens > last / 50], evals[eval_tokens > last / 50]])
    if len(shown):
        margin = 0.05 * np.ptp(shown) + 0.02
        loss.set_ylim(np.min(shown) - margin, np.quantile(shown, 0.995) + margin)
    rate_tokens, rates = _series(records, "train/learning_rate")
    rate.plot(rate_tokens / scale, rates, color="tab:green")
    rate.set(ylabel="learning rate", xlabel=unit, ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    loss.set(ylabel="loss (nats per token)", xlim=(0, 1.01 * last / scale))
    loss.set_title(title, loc="left", fontweight="bold")
    if loss.get_legend_handles_labels()[0]:
        loss.legend(frameon=False)
    per_step = next((r["progress/tokens"] / r["step"] for r in records if r["step"]), 1.0) / scale
    steps = loss.secondary_xaxis("top", functions=(lambda x: x / per_step, lambda x: x * per_step))
    steps.set_xlabel("steps", loc="right")
    steps.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (loss, rate):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _series(records: list[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and finite values of `name`, in order."""
    found = [r for r in records if math.isfinite(r.get(name, math.nan))]
    points = [(r["progress/tokens"], r[name]) for r in found]
    tokens, values = np.array(points, np.float64).reshape(-1, 2).T
    return tokens, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the run, over what there is at the ends."""
    window = np.ones(1 + 2 * (len(values) // 40))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
