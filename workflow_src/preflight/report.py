"""The preflight on one screen, or as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from textwrap import shorten
from typing import Any

from workflow_src.common.progress import clock
from workflow_src.preflight.costs import Cost
from workflow_src.preflight.dry_run import Job
from workflow_src.preflight.needs import Need

REASON = 120  # characters of one, at most
READY, INCOMPLETE, REFUSED = 0, 1, 3  # exit codes; 2 is that of a mistake in configuration or command


@dataclass(frozen=True)
class Stage:
    """All jobs of one rule."""

    rule: str
    jobs: int
    why: str  # Snakemake's reason, the strongest among the jobs'
    # Summed over the jobs; None: not known of all.
    seconds: float | None
    gpu_hours: float | None
    bytes: float | None
    money: float | None


@dataclass(frozen=True)
class Preflight:
    """What a run would do, cost and lack."""

    target: str
    cores: int
    stages: list[Stage]
    wall: float  # seconds, side by side
    measured_here: int  # jobs of earlier runs that the estimates build on
    needs: list[Need]
    retrained: list[Job]
    allowed: bool  # to train again

    @property
    def code(self) -> int:
        """The exit code."""
        if self.retrained and not self.allowed:
            return REFUSED
        return READY if all(need.there for need in self.needs) else INCOMPLETE

    def as_json(self) -> dict[str, Any]:
        """Everything, for scripts."""
        stages = [asdict(stage) for stage in self.stages]
        again = [{"output": job.output[0], "reason": job.reason} for job in self.retrained]
        return {
            "target": self.target, "exit_code": self.code, "cores": self.cores, "wall_seconds": self.wall, "stages": stages,
            "needs": [asdict(need) for need in self.needs], "retrained": again,
        }  # fmt: skip

    def text(self) -> str:
        """A screen full."""
        if not self.stages:
            return f"preflight of {self.target}: nothing to be done"
        lines = [f"preflight of {self.target}", *_table(self.stages)]
        unknown = [stage.rule for stage in self.stages if stage.seconds is None]
        lines.append(
            f"{'at least ' if unknown else 'about '}{clock(self.wall)} on {self.cores} cores, by throughputs "
            + (f"of {self.measured_here} earlier jobs here and of benchmarks/throughput.yaml" if self.measured_here
               else "of benchmarks/throughput.yaml, measured elsewhere")
        )  # fmt: skip
        lines += [f"time not known: {', '.join(unknown)}"] if unknown else []
        lines += [f"  {'ok     ' if need.there else 'MISSING'}  {need.text}" for need in self.needs]
        for job in self.retrained:
            mark, reason = "again  " if self.allowed else "REFUSED", shorten(job.reason, REASON, placeholder=" …")
            lines.append(f"  {mark}  {job.output[0]} would be trained anew: {reason}")
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        missing = sum(not need.there for need in self.needs)
        if self.code == REFUSED:
            return (
                f"refused: {len(self.retrained)} trained model(s) would be thrown away; undo the change, "
                "or allow it: --allow-retraining"
            )
        return "ready" if self.code == READY else f"not ready: {missing} thing(s) missing"


def stages(jobs: Sequence[Job], costs: Sequence[Cost]) -> list[Stage]:
    """One row per rule, in the order of its jobs. A policy's server is part of its rollouts."""
    rows = []
    for rule in dict.fromkeys(job.rule for job in jobs if not job.service):
        own = [(job, cost) for job, cost in zip(jobs, costs) if job.rule == rule]
        causes = [cause for job, _ in own for cause in job.causes[:1]]
        rows.append(Stage(
            rule, len(own), max(set(causes), key=causes.count) if causes else "",
            _sum(cost.seconds for _, cost in own),
            _sum(None if cost.seconds is None else cost.seconds * job.gpus / 3600 for job, cost in own if job.gpus),
            _sum(cost.bytes for _, cost in own), _sum(cost.money for _, cost in own),
        ))  # fmt: skip
    return rows


def _sum(values: Iterable[float | None]) -> float | None:
    """None if one of them is."""
    found = list(values)
    return None if None in found else sum(found)


def known(values: Iterable[float | None]) -> float:
    """The sum of those that are known."""
    return sum(value for value in values if value is not None)


def _table(rows: Sequence[Stage]) -> list[str]:
    """Aligned columns; those of GPU hours and money only where there are any."""
    shown = {
        "GPU h": any(row.gpu_hours != 0 for row in rows),
        "API cost": any(row.money != 0 for row in rows),
    }
    heads = ["stage", "jobs", "time", "disk", *(name for name, some in shown.items() if some), "why"]
    total = Stage(
        "all", sum(row.jobs for row in rows), "", known(row.seconds for row in rows),
        known(row.gpu_hours for row in rows), known(row.bytes for row in rows), known(row.money for row in rows),
    )  # fmt: skip
    cells = [heads]
    for row in [*rows, total]:
        counts = [_or_unknown(row.seconds, clock), _or_unknown(row.bytes, _size)]
        counts += [_or_unknown(row.gpu_hours, "{:.2f}".format)] if shown["GPU h"] else []
        counts += [_or_unknown(row.money, "{:.2f}".format)] if shown["API cost"] else []
        cells.append([row.rule, str(row.jobs), *counts, row.why])
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    last = len(heads) - 1
    return [
        "  ".join(
            text.ljust(width) if i in (0, last) else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    ]


def _or_unknown(value: float | None, written: Callable[[float], str]) -> str:
    return "?" if value is None else written(value)


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return "-"
