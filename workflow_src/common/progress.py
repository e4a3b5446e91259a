"""Progress that a person can follow in a terminal and in a log file: lines, not control characters."""

from __future__ import annotations

import sys
import time


def say(text: str) -> None:
    """Write `text` as a line to stderr, in one piece.

    Jobs share a terminal and their output is not buffered: `print` would write the end of the line apart, and another
    job's line could come in between.
    """
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class Progress:
    """Prints `label  300/1700  18%  2.1 step/s  ETA 4:12  note` to stderr, at most once in `every` seconds.

    Snakemake runs several jobs into one terminal and into log files; whole lines survive both, a redrawn bar neither.
    """

    def __init__(self, total: int, label: str, unit: str = "step", every: float = 5.0):
        self.total, self.label, self.unit, self.every = total, label, unit, every
        self.count = self._start_count = 0
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def skip(self, count: int) -> None:
        """Count `count` units as finished earlier: they do not enter the rate."""
        self.count = self._start_count = count

    def update(self, n: int = 1, note: str = "") -> None:
        """Count `n` more finished units."""
        self.count += n
        now = time.monotonic()
        if now - self._last >= self.every:
            self._last = now
            self._print(now, note)

    def _print(self, now: float, note: str) -> None:
        rate = (self.count - self._start_count) / max(now - self._start, 1e-9)
        eta = clock((self.total - self.count) / rate) if rate > 0 else "?"
        parts = [f"{self.label:<16}", f"{self.count}/{self.total}", f"{100 * self.count // max(self.total, 1)}%",
                 f"{rate:.3g} {self.unit}/s", f"ETA {eta}", note]  # fmt: skip
        say("  ".join(part for part in parts if part))

    def __exit__(self, kind, *_: object) -> None:
        if kind is None:
            seconds = time.monotonic() - self._start
            say(f"{self.label:<16}  {self.count} {self.unit}s in {clock(seconds)}")


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
