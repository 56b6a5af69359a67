"""The progress bar of `prepare`."""

import time

import tqdm

from mobilellm_jax.data.sources import Source


class ProgressBar:
    """Bytes of the inputs read so far, with tokens per second, on standard error."""

    def __init__(self, sources: list[Source], enabled: bool):
        sizes = [source.size for source in sources]
        self._sources = sources
        self._bar = tqdm.tqdm(
            desc="prepare",
            total=None if None in sizes else sum(sizes),
            unit="B",
            unit_scale=True,
            disable=not enabled,
            dynamic_ncols=True,
        )
        self._num_tokens = 0
        self._start = self._shown = time.monotonic()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._show(time.monotonic())
        self._bar.close()

    def update(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens
        now = time.monotonic()
        if now - self._shown >= 0.2:
            self._show(now)

    def _show(self, now: float) -> None:
        self._shown = now
        rate = tqdm.tqdm.format_sizeof(self._num_tokens / max(now - self._start, 1e-9))
        self._bar.set_postfix_str(f"{rate} tokens/s", refresh=False)
        self._bar.update(sum(source.bytes_read for source in self._sources) - self._bar.n)
