"""The tables of results; their columns are named once, for the screen and the page alike."""

import dataclasses
from collections.abc import Callable, Sequence

from mobilellm_jax.tables import table


def case(result: dict, *, brief: bool = False) -> str:
    """What was measured, in words: "125m, 2 x 512, float32, remat dots"."""
    settings = result["settings"]
    words = [] if brief else [result["preset"]]
    if "prompt_length" in settings:
        size = f"{settings['prompt_length']}+{settings['num_tokens']}"
        words.append(f"{settings['batch_size']}x{size}" if brief else
                     f"{settings['batch_size']} x ({size.replace('+', ' + ')})")  # fmt: skip
    elif "batch_size" in settings:
        size = (settings["batch_size"], settings["sequence_length"])
        words.append(("{}x{}" if brief else "{} x {}").format(*size))
    execution = settings.get("execution", {})
    for name, value in execution.items():
        if name == "dtype" or (name == "attention" and result["what"] != "attention"):
            words.append(value)
        elif value is True:
            words.append(name.removesuffix("_layers") + "ed" * name.startswith("unroll"))
        elif value not in (False, "none", "auto", 1) and name != "attention":
            words.append(f"{name} {value}")
    if settings.get("compile_only"):
        words.append("compiled only")
    if settings.get("accumulation_steps", 1) > 1:
        words.append(f"{settings['accumulation_steps']} parts")
    return ", ".join(words)


@dataclasses.dataclass(frozen=True)
class _Column:
    title: str
    value: Callable[[dict, dict], str]  # (result, side) -> "" where there is none
    absolute: bool = False  # a time or a rate: meaningless outside of the machine it is from


def _seconds(side: dict) -> float | None:
    return side["seconds"]["median"] if "seconds" in side else None


def _speed_of(reference: str) -> _Column:
    def value(result, side):
        theirs, ours = (_seconds(s) for s in (result["sides"].get(reference, {}), side))
        return f"{theirs / ours:.2f}" if theirs and ours else ""

    return _Column(f"speed, of {reference}", value)


def _rate_of(reference: str) -> _Column:
    def value(result, side):
        key = "tokens_per_second"
        theirs, ours = (s.get(key) for s in (result["sides"].get(reference, {}), side))
        return f"{ours / theirs:.2f}" if theirs and ours else ""

    return _Column(f"tokens/s, of {reference}", value)


def _time_of(reference: str) -> _Column:
    def value(result, side):
        theirs, ours = (_seconds(s) for s in (result["sides"].get(reference, {}), side))
        return f"{ours / theirs:.2f}" if theirs and ours else ""

    return _Column(f"time, of {reference}", value)


def _spread(_: dict, side: dict) -> str:
    if "seconds" not in side:
        return ""
    low, high = side["seconds"]["quartiles"]
    return f"{(high - low) / side['seconds']['median']:.1%}"


def _number(key: str, form: str, scale: float = 1.0) -> Callable[[dict, dict], str]:
    def value(_, side):
        return form.format(side[key] / scale) if key in side else ""

    return value


def _mfu(_: dict, side: dict) -> str:
    counts = side.get("mfu", {})
    return " / ".join(f"{counts[name]:.1%}" for name in ("matmul", "causal", "full") if counts)


def _errors(_: dict, side: dict) -> str:
    return " ".join(f"{name} {value:.0e}" for name, value in side.get("errors", {}).items())


def _milliseconds(_: dict, side: dict) -> str:
    return f"{1e3 * side['seconds']['median']:,.1f}" if "seconds" in side else ""


def _parts(_: dict, side: dict) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in side.get("parts", {}).items())


_SPREAD = _Column("spread", _spread)
_MEMORY = _Column("peak memory, GB", _number("peak_bytes", "{:.2f}", 1e9), absolute=True)
_TIME = _Column("ms", _milliseconds, absolute=True)
_RATE = _Column("tokens/s", _number("tokens_per_second", "{:,.0f}"), absolute=True)
_WHY = _Column("failed", lambda _, side: side.get("error", ""))


def _memory_of(reference: str) -> _Column:
    def value(result, side):
        theirs, ours = (s.get("peak_bytes") for s in (result["sides"].get(reference, {}), side))
        return f"{ours / theirs:.2f}" if theirs and ours else ""

    return _Column(f"memory, of {reference}", value)


_COLUMNS = {
    "train": [
        _RATE, _speed_of("torch"), _speed_of("torch.compile"),
        _Column("MFU: 6N / causal / full", _mfu), _MEMORY, _memory_of("torch"), _SPREAD,
        _Column("compile, s", _number("compile_seconds", "{:.1f}"), absolute=True),
    ],
    "losses": [
        _Column(
            "largest relative difference to jax",
            _number("largest_relative_difference", "{:.1e}"),
        )
    ],
    "techniques": [
        _RATE,
        _Column("time, of the step as shipped", _number("time_of_shipped", "{:.2f}")),
        _Column("memory, of the step as shipped", _number("memory_of_shipped", "{:.2f}")), _SPREAD,
    ],
    "products": [
        _Column("TFLOP/s", _number("flops_per_second", "{:.2f}", 1e12), absolute=True),
        _Column("speed, of torch", _number("speed_of_torch", "{:.2f}")), _SPREAD,
    ],
    "attention": [
        _TIME, _speed_of("torch"), _MEMORY, _SPREAD, _Column("error against fp32", _errors),
    ],
    "loss": [_TIME, _time_of("whole"), _MEMORY, _SPREAD],
    "decode": [
        _RATE,
        _rate_of("torch"), _speed_of("torch"), _speed_of("torch.compile"),
        _Column("same tokens as torch", _number("same_tokens", "{:.1%}")),
        _Column("of copy bandwidth", _number("of_copy_bandwidth", "{:.2f}")),
        _Column("of read bandwidth", _number("of_read_bandwidth", "{:.2f}")), _SPREAD,
    ],
    "prefill": [_RATE, _speed_of("torch"), _speed_of("torch.compile"), _MEMORY, _SPREAD],
    "load": [_RATE, _speed_of("fixed batch"), _SPREAD],
    "checkpoint": [_TIME, _time_of("step"), _SPREAD],
    "compile": [_TIME, _time_of("cold"), _SPREAD, _Column("of which, s", _parts, absolute=True)],
}  # fmt: skip


def result_table(results: Sequence[dict], *, absolute: bool) -> str:
    """One table of results of the same WHAT, a row per side; columns without any value left out.

    Args:
      absolute: with times, rates and sizes, which say nothing without the machine.
    """
    columns = [*_COLUMNS[results[0]["what"]], _WHY]
    columns = [column for column in columns if absolute or not column.absolute]
    header, rows = ["what", "side", *(column.title for column in columns)], []
    for result in results:
        what = case(result)
        for name, side in result["sides"].items():
            rows.append([what, name, *(column.value(result, side) for column in columns)])
            what = ""  # once is enough
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return table([header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def tables_by_what(found: Sequence[dict], *, absolute: bool) -> list[str]:
    """A table for each WHAT of the results, in the order of their first ones."""
    return [
        f"{what}\n\n" + result_table([r for r in found if r["what"] == what], absolute=absolute)
        for what in dict.fromkeys(result["what"] for result in found)
    ]


def compiled_traffic_table(values: dict) -> str:
    """What `benchmarks/compiled_traffic.py` wrote: a row for each way to execute a step."""
    columns = ("temporaries", "other", "matmul", "attention")
    rows = [
        (name, *(f"{result[column] / 1e3:,.0f}" for column in columns))
        for name, result in values["bytes_per_token"].items()
    ]
    return table(
        ("execution", "kept", "moved by elementwise kernels", "by matmuls", "by attention"), rows
    )


def compiled_tpu_table(values: dict) -> str:
    """What `benchmarks/compiled_tpu.py` wrote: a row for each slice and way to execute a step."""
    rows = []
    for name, found in values["steps"].items():
        runs = found["splash_kernels"]
        rows.append(
            (
                name,
                f"{found['temporaries_per_token'] / 1e3:,.0f}",
                f"{found['kept_per_token'] / 1e3:,.0f}",
                f"{found['kept_padding']:.1%}",
                f"{found['state_padding']:.1%}",
                f"{found['donated']:.1%}",
                " + ".join(map(str, runs.values())),
            )
        )
    header = (
        "step", "temporaries", "of these kept", "padding of these", "padding of the state",
        "state donated", "runs of Splash: forward + dq + dk, dv",
    )  # fmt: skip
    return table(header, rows)
