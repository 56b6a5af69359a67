"""What a run shows of itself: rates, the record on disk, TensorBoard and the picture."""

import json
import logging
import math
import os
import re
import struct
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mobilellm_jax.machine import hardware
from mobilellm_jax.training import metrics
from mobilellm_jax.training.metrics import MetricsLog, plot_loss, read_metrics

REL = 1e-9  # of numbers computed in float64 from the fake clock
TOKENS_PER_STEP = 1000
FLOPS_PER_TOKEN = 2e6
PEAK = 1e11


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless told."""
    fake = SimpleNamespace(now=100.0)
    fake.monotonic = lambda: fake.now
    fake.time = lambda: 1_700_000_000.0 + fake.now
    monkeypatch.setattr(metrics, "time", fake)
    return fake


def open_log(workdir, resume_step=0, peak_flops_total=PEAK, **kwargs):
    return MetricsLog(
        workdir,
        resume_step=resume_step,
        total_steps=100,
        tokens_per_step=TOKENS_PER_STEP,
        flops_per_token=FLOPS_PER_TOKEN,
        peak_flops_total=peak_flops_total,
        **kwargs,
    )


def tensorboard_events(folder):
    """Events of all files in load order, by the framing of TFRecord (length, crc, data, crc)."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_throughput_leaves_out_the_compilation_and_the_pauses(tmp_path, clock):
    log = open_log(tmp_path)
    clock.now += 60  # the first step compiles
    log.log_train(1, {"train/loss": 9.0})
    clock.now += 5
    with log.paused():
        clock.now += 30
        log.log_eval(6, {"eval/loss": 8.0})
        with log.paused():
            clock.now += 30
    clock.now += 5
    log.log_train(11, {"train/loss": 7.0})
    clock.now += 40
    log.log_train(21, {"train/loss": 6.0})
    log.close()
    first, _, second, third = read_metrics(tmp_path)
    assert not any(name.startswith("throughput/") for name in first)
    assert second["throughput/step_seconds"] == pytest.approx(1.0, rel=REL)
    assert second["throughput/tokens_per_second"] == pytest.approx(TOKENS_PER_STEP, rel=REL)
    assert second["throughput/mfu"] == pytest.approx(1000 * FLOPS_PER_TOKEN / PEAK, rel=REL)
    assert third["throughput/step_seconds"] == pytest.approx(4.0, rel=REL)


def test_throughput_leaves_out_what_an_evaluation_draws(tmp_path, clock, monkeypatch):
    def draw(workdir):
        clock.now += 30

    monkeypatch.setattr(metrics, "plot_loss", draw)
    log = open_log(tmp_path)
    log.log_train(1, {"train/loss": 9.0})
    log.log_eval(1, {"eval/loss": 9.0})
    clock.now += 20
    log.log_train(11, {"train/loss": 8.0})
    log.close()
    assert read_metrics(tmp_path)[-1]["throughput/step_seconds"] == pytest.approx(2.0, rel=REL)


def test_the_curve_is_drawn_at_the_end_only_if_it_has_grown(tmp_path, monkeypatch):
    """Matplotlib takes seconds to import, which a run that a signal ends must not wait for."""
    drawn = []
    monkeypatch.setattr(metrics, "plot_loss", drawn.append)
    open_log(tmp_path).close()
    assert drawn == []
    log = open_log(tmp_path)
    log.log_train(1, {"train/loss": 9.0})
    log.log_eval(1, {"eval/loss": 9.0})
    log.close()
    assert drawn == [tmp_path]
    log = open_log(tmp_path)
    log.log_train(2, {"train/loss": 9.0})
    log.close()
    assert drawn == [tmp_path] * 2


def test_a_step_that_is_logged_twice_has_no_throughput(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(metrics, "plot_loss", lambda workdir: None)
    log = open_log(tmp_path)
    for _ in range(2):
        clock.now += 1
        log.log_train(5, {"train/loss": 9.0})
    log.close()
    assert all("throughput/mfu" not in record for record in read_metrics(tmp_path))


def test_a_clock_started_by_hand_measures_the_first_interval(tmp_path, clock):
    log = open_log(tmp_path, resume_step=50)
    log.start_clock(50)
    clock.now += 20
    log.log_train(60, {"train/loss": 5.0})
    log.close()
    assert read_metrics(tmp_path)[0]["throughput/step_seconds"] == pytest.approx(2.0, rel=REL)


def test_every_line_is_strict_json_on_disk_before_the_next_step(tmp_path, clock):
    log = open_log(tmp_path, tokens_per_epoch=5000)
    log.log_train(10, {"train/loss": math.nan, "train/grad_norm": math.inf})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    text = (tmp_path / "metrics.jsonl").read_text()  # the log is still open
    assert text.endswith("}\n")
    record = json.loads(text, parse_constant=refuse)
    assert record == {
        "step": 10,
        "time": 1_700_000_100.0,
        "train/loss": None,
        "train/grad_norm": None,
        "progress/tokens": 10 * TOKENS_PER_STEP,
        "progress/epoch": 2.0,
    }
    assert math.isnan(read_metrics(tmp_path)[0]["train/loss"])
    log.close()


def test_a_resumed_run_drops_what_came_after_its_checkpoint_and_a_torn_line(tmp_path, clock):
    log = open_log(tmp_path)
    for step in (10, 20, 30, 40):
        clock.now += 1
        log.log_train(step, {"train/loss": 1.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "train/lo')  # kill -9 in the middle of a write
    assert [r["step"] for r in read_metrics(tmp_path)] == [10, 20, 30, 40]
    log = open_log(tmp_path, resume_step=20)
    log.log_train(30, {"train/loss": 2.0})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30]
    assert json.loads(lines[-1])["train/loss"] == 2.0
    assert not list(tmp_path.glob("*.part"))


def test_a_shortened_record_is_on_the_disk_whole_before_it_replaces_the_old(
    tmp_path, clock, monkeypatch
):
    lines = "".join(f'{{"step": {step}, "progress/tokens": 1}}\n' for step in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(lines)
    synced = []

    def fsync(descriptor, original=os.fsync):
        old = (tmp_path / "metrics.jsonl").stat().st_size
        synced.append((os.fstat(descriptor).st_size, old))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    open_log(tmp_path, resume_step=2).close()
    assert synced[0] == (len(lines) // 3 * 2, len(lines))  # TensorBoard's own follow


def test_a_whole_last_line_without_its_newline_is_kept_apart_from_the_next(tmp_path, clock):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "time": 1.0, "progress/tokens": 10}')
    log = open_log(tmp_path, resume_step=10)
    log.log_train(20, {"train/loss": 2.0})
    log.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [10, 20]


def test_a_new_run_starts_a_new_record(tmp_path, clock):
    for _ in range(2):
        log = open_log(tmp_path)
        log.log_eval(0, {"eval/loss": 10.0})
        log.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [0]
    assert read_metrics(tmp_path / "absent") == []


def test_tensorboard_gets_every_value_and_a_resumed_run_purges(tmp_path, clock):
    log = open_log(tmp_path)
    log.log_train(10, {"train/loss": 3.0, "train/learning_rate": 0.5})
    log.close()
    log = open_log(tmp_path, resume_step=10)
    log.log_eval(20, {"eval/loss": 2.0})
    log.close()
    events = tensorboard_events(tmp_path / "tensorboard")
    scalars = {(v.tag, e.step): v.simple_value for e in events for v in e.summary.value}
    assert scalars == {
        ("train/loss", 10): 3.0,
        ("train/learning_rate", 10): 0.5,
        ("progress/tokens", 10): 10 * TOKENS_PER_STEP,
        ("eval/loss", 20): 2.0,
        ("progress/tokens", 20): 20 * TOKENS_PER_STEP,
    }
    starts = [e.step for e in events if e.HasField("session_log")]
    assert starts == [0, 11]  # TensorBoard hides older events from these steps on


def test_progress_lines_are_readable(tmp_path, clock, capsys):
    log = open_log(tmp_path)
    values = {"train/loss": 3.14159, "train/learning_rate": 2e-3, "train/grad_norm": 0.456}
    log.log_train(1, values)
    clock.now += 90
    log.log_train(10, values)
    log.log_eval(10, {"eval/loss": 3.0, "eval/perplexity": math.exp(3)})
    log.close()
    assert capsys.readouterr().out.splitlines() == [
        "step   1/100   1.0% | loss 3.1416 | lr 2.00e-03 | grad 0.46 | 0:00:00 elapsed",
        "step  10/100  10.0% | loss 3.1416 | lr 2.00e-03 | grad 0.46 | 100 tok/s | MFU 0.2% | "
        "0:01:30 elapsed, 0:15:00 left",
        "eval  10/100  10.0% | loss 3.0000 | perplexity 20.0855",
    ]


def test_large_figures_are_shown_with_an_exponent(tmp_path, clock, capsys):
    log = open_log(tmp_path)
    log.log_train(1, {"train/loss": 276.5, "train/grad_norm": 1.25e30})
    log.log_eval(1, {"eval/loss": 276.5, "eval/perplexity": math.exp(276.5)})
    log.log_eval(1, {"eval/loss": 2e7, "eval/perplexity": math.inf})
    log.close()
    lines = [line.split(" | ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "loss 276.5000 | grad 1.25e+30 | 0:00:00 elapsed",
        "loss 276.5000 | perplexity 1.209e+120",
        "loss 2.000e+07 | perplexity inf",
    ]


@pytest.mark.parametrize(
    "value, text",
    [(0.5, "0.5"), (950, "950"), (412_300, "412k"), (3_170_000, "3.17M"), (999_900, "1M")],
)
def test_rates_are_humanised(value, text):
    assert metrics._humanise(value) == text


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00:00"), (59.7, "0:01:00"), (3725, "1:02:05"), (90_061, "1d 1:01:01")]
)
def test_durations_are_humanised(seconds, text):
    assert metrics._clock(seconds) == text


def test_smoothing_is_the_mean_of_what_there_is():
    values = np.arange(80.0)  # a window of 5
    smooth = metrics._smooth(values)
    np.testing.assert_allclose(smooth[2:-2], values[2:-2], rtol=REL)
    np.testing.assert_allclose(smooth[[0, 1, -2, -1]], [1, 1.5, 77.5, 78], rtol=REL)
    np.testing.assert_array_equal(metrics._smooth(values[:39]), values[:39])


def test_a_process_that_is_not_the_first_writes_and_prints_nothing(tmp_path, clock, capsys):
    log = open_log(tmp_path / "run", enabled=False)
    log.log_train(1, {"train/loss": 3.0})
    log.log_eval(1, {"eval/loss": 3.0})
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_a_picture_is_drawn_from_any_record(tmp_path, clock):
    evals_only = [(0, "eval/loss", 10.0)]
    one_step = [(1, "train/loss", 10.0)]
    with_nan = [(i, "train/loss", math.nan if i == 7 else 10 / (1 + i)) for i in range(300)]
    for number, points in enumerate([[], evals_only, one_step, with_nan]):
        folder = tmp_path / str(number)
        log = open_log(folder)
        for step, name, value in points:
            clock.now += 1
            (log.log_eval if name == "eval/loss" else log.log_train)(step, {name: value})
        log.close()
        plot_loss(folder)
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert not list(folder.glob("*.part"))


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.0}\n')  # no tokens
    with caplog.at_level(logging.WARNING):
        plot_loss(tmp_path)
    assert "could not draw" in caplog.text
    assert not (tmp_path / "loss.png").exists()


def test_logging_loads_no_torch(tmp_path):
    pytest.importorskip("torch", reason="without torch nothing can load it")
    program = (
        "import sys; from mobilellm_jax.training.metrics import MetricsLog\n"
        f"log = MetricsLog({str(tmp_path)!r}, resume_step=0, total_steps=1, tokens_per_step=1,"
        " flops_per_token=1, peak_flops_total=1)\n"
        "log.log_train(1, {'train/loss': 1.0}); log.log_eval(1, {'eval/loss': 1.0}); log.close()\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "kind, dtype, value",
    [
        ("TPU v4", "bfloat16", 275e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5", "bfloat16", 459e12),
        ("TPU v6 lite", "bfloat16", 918e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "float32", 494e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165e12),
    ],
)
def test_known_devices_have_published_peaks(kind, dtype, value):
    device = SimpleNamespace(device_kind=kind, platform="?")
    assert hardware.peak_flops(device, dtype) == value


@pytest.mark.parametrize(
    "kind",
    ["cpu", "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H200 NVL", "TPU v7x"],
)
def test_what_the_table_lacks_has_no_peak(kind):
    assert hardware.peak_flops(SimpleNamespace(device_kind=kind), "bfloat16") is None
    assert hardware.peak_flops(jax.devices("cpu")[0], "float32") is None


@pytest.mark.parametrize("peak", [None, PEAK / 100])
def test_no_share_of_more_than_the_peak_is_shown(tmp_path, clock, capsys, peak):
    """Without a peak, and with one that is far below what the device has just done."""
    log = open_log(tmp_path, peak_flops_total=peak)
    log.log_train(1, {"train/loss": 3.0})
    clock.now += 1
    log.log_train(2, {"train/loss": 3.0})  # 200% of the smaller peak
    clock.now += 4
    log.log_train(3, {"train/loss": 3.0})  # 50%
    log.close()
    shown = re.findall(r"MFU ([\d.]+)%", capsys.readouterr().out)
    assert [float(value) for value in shown] == ([] if peak is None else [50.0])
    records = read_metrics(tmp_path)
    assert [r.get("throughput/mfu") for r in records] == [None, None, peak and 0.5]
    assert [r.get("throughput/tokens_per_second") for r in records] == [None, 1000.0, 250.0]
    events = tensorboard_events(tmp_path / "tensorboard")
    drawn = [v.simple_value for e in events for v in e.summary.value if v.tag.endswith("mfu")]
    assert drawn == ([] if peak is None else [0.5])
