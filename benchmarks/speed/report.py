"""`report`: docs/performance.md and its picture, from the results in docs/performance/*.json.

Times, rates and sizes are shown for GPUs and TPUs only; of a CPU, which nobody else has as it was,
only ratios of one run.
"""

import argparse
import json
from pathlib import Path

from benchmarks.speed.columns import compiled_tpu_table, compiled_traffic_table, result_table
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.atomic import write_file

ROOT = Path(__file__).parents[2]
PICTURE = "training_speed.png"

_HEADER = """\
# Performance

Made by `python -m benchmarks.speed report` from the results in [docs/performance](performance),
each of which holds its command, hardware, versions and all samples. How things are timed is said in
`benchmarks/speed/measure.py`, what PyTorch's side does in `benchmarks/speed/torch_peers.py`: the
same weights and the same tokens, every side in a process of its own. "spread" is the distance of
the quartiles over the median. MFU is given by three counts of FLOPs per token (`model/config.py`):
weights alone (6N), with the causal half of attention (the headline), with all of it.

Where a step's time goes on a CPU, and what of it is XLA's: [cpu_step.md](cpu_step.md). What moves
between chips: [scaling.md](scaling.md). No GPU or TPU has run anything yet where no table says so;
`python -m benchmarks.speed gpu` fills them in.
"""
_TITLES = {
    "train": "Training steps",
    "losses": "Losses of the same steps",
    "techniques": "Techniques, one at a time",
    "products": "Matrix products by themselves",
    "attention": "Attention, forward and backward",
    "loss": "Cross-entropy in slices against all logits",
    "decode": "Decoding",
    "prefill": "Prompts",
    "load": "The loader",
    "checkpoint": "Checkpoints",
    "compile": "Start-up",
}


def add_arguments(parser: argparse.ArgumentParser, _: str) -> None:
    parser.add_argument(
        "--results", default=str(ROOT / "docs" / "performance"), metavar="DIR",
        help="of JSON files; the page is written beside it as DIR.md (default: docs/performance)",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Writes the page, and the picture if there are results of `train`."""
    folder = Path(args.results)
    found = read_results(folder)
    drawn = draw(found, folder / PICTURE)
    page = folder.with_suffix(".md")
    text = page_text(found, f"{folder.name}/{PICTURE}" if drawn else None)
    compiled = sorted((folder / "compiled").glob("*.json"))
    for path in compiled:
        if not path.name.startswith("tpu-"):
            text += compiled_text(json.loads(path.read_text()))
    tpu = [json.loads(path.read_text()) for path in compiled if path.name.startswith("tpu-")]
    if tpu:
        text += tpu_text(tpu)
    write_file(page, text.encode())
    print(page)
    return 0


def compiled_text(values: dict) -> str:
    """The section of one preset compiled by `benchmarks/compiled_traffic.py`."""
    preset, size = (
        values["preset"],
        f"{values['rows']} x {values['sequence_length']} tokens on each of {values['topology']}",
    )
    return (
        f"\n## {preset} for an H100, ahead of time\n\nNot measured: read off the "
        f"compiled step, {size}, jax {values['jax']}. KB per token, by\n"
        f"`python -m benchmarks.compiled_traffic --preset {preset}`.\n\n"
        f"{compiled_traffic_table(values)}\n"
    )


def tpu_text(found: list[dict]) -> str:
    """The section of presets compiled by `benchmarks/compiled_tpu.py`."""
    parts = [
        "\n## TPUs, ahead of time\n\nNot measured: read off compiled steps, data parallel. KB per "
        'token; "kept" are the stacks over layers\nthat the backward pass reads, "padding" what '
        "tiles of 8 x 128 values add to them. By `python -m benchmarks.compiled_tpu`.\n"
    ]
    for values in found:
        size = f"{values['rows']} x {values['sequence_length']} tokens on a chip"
        title = f"{values['preset']}, {size}, jax {values['jax']}"
        parts.append(f"\n{title}:\n\n{compiled_tpu_table(values)}\n")
    return "".join(parts)


def read_results(folder: Path) -> list[dict]:
    """All results of a folder's files, each of which holds one or a list."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            for result in content if isinstance(content, list) else [content]:
                assert {"what", "hardware", "sides", "settings"} <= result.keys()
                found.append(result)
        except (ValueError, AssertionError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: not a result of `python -m benchmarks.speed`") from error
    if not found:
        raise UserError(f"{folder}: no results (*.json); copy some of runs/speed there")
    return found


def _machine(result: dict) -> str:
    hardware = result["hardware"]
    if _is_cpu(result):
        return f"{hardware['cpu']}, {hardware['cores']} cores"
    return hardware["device_kind"]


def _tokens_per_step(result: dict) -> int:
    settings = result["settings"]
    return settings.get("batch_size", 0) * settings.get("sequence_length", 0)


def _is_cpu(result: dict) -> bool:
    return result["hardware"]["platform"] == "cpu"


def page_text(found: list[dict], picture: str | None) -> str:
    """The page."""
    parts = [_HEADER]
    if picture:
        parts.append(f"![speed of training against tokens per step]({picture})\n")
    machines = dict.fromkeys(map(_machine, sorted(found, key=_is_cpu)))
    for machine in machines:
        here = [result for result in found if _machine(result) == machine]
        parts.append(f"## {machine}\n")
        parts.append(_facts(here))
        for what, title in _TITLES.items():
            of_what = [result for result in here if result["what"] == what]
            if not of_what:
                continue
            of_what.sort(key=_tokens_per_step)
            text = result_table(of_what, absolute=not _is_cpu(here[0]))
            parts.append(f"### {title}\n\n{text}\n")
        commands = dict.fromkeys(result["command"] for result in here)
        parts.append("Commands:\n\n```sh\n" + "\n".join(commands) + "\n```\n")
    return "\n".join(parts)


def _facts(here: list[dict]) -> str:
    dates = sorted(result["date"][:10] for result in here)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    versions = {}
    for result in here:
        for name, version in result["versions"].items():
            versions.setdefault(name, dict.fromkeys([]))[version] = None
    listed = ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())
    peaks = {
        side["peak_flops_source"]: side["peak_flops"]
        for result in here
        for side in result["sides"].values()
        if "peak_flops" in side and not _is_cpu(result)
    }
    text = "".join(f" Peak for MFU: {v / 1e12:.0f} TFLOP/s, {k}." for k, v in peaks.items())
    if _is_cpu(here[0]):
        text = " Peak for MFU: a large fp32 matrix product by XLA in the same process."
    return f"{when}; {listed}.{text}\n"


def draw(found: list[dict], path: Path) -> bool:
    """Speed of training against tokens per step, with each model's ceiling; False without any.

    The ceiling is what the device's peak allows, by the causal count of FLOPs. Of a CPU the speed
    is shown as a share of it, as tokens per second say nothing without the machine.
    """
    panels: dict[str, dict[str, list]] = {}
    ceilings: dict[str, float] = {}
    for result in found:
        if result["what"] != "train":
            continue
        settings = result["settings"]
        size = _tokens_per_step(result)
        panel = f"{result['preset']}, {_machine(result)}"
        for name, side in result["sides"].items():
            if "mfu" not in side:
                continue
            if _is_cpu(result):
                speed, ceilings[panel] = side["mfu"]["causal"], 1.0
            else:
                speed = side["tokens_per_second"]
                ceilings[panel] = speed / side["mfu"]["causal"]
            form = _form(settings["execution"]) if name == "jax" else name
            panels.setdefault(panel, {}).setdefault(form, []).append((size, speed))
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for axis, (panel, forms) in zip(axes[0], sorted(panels.items()), strict=True):
        for form, points in sorted(forms.items()):
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=form)
        axis.axhline(ceilings[panel], color="black", linestyle="--", label="ceiling, causal")
        unit = "share of the ceiling" if ceilings[panel] == 1 else "tokens per second"
        axis.set(title=panel, xlabel="tokens per step", ylabel=unit, ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _form(execution: dict) -> str:
    words = ["jax", "unrolled" if execution["unroll_layers"] else "scanned"]
    return ", ".join(words + [f"remat {execution['remat']}"] * (execution["remat"] != "none"))
