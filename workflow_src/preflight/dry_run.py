"""What Snakemake would do, and why, in its own words: a dry run, read."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from workflow_src.checks import ROOT
from workflow_src.common.errors import UserError

FIELDS = (
    "input", "output", "log", "jobid", "benchmark", "reason", "wildcards", "priority", "threads", "resources", "group",
    "conda-env", "shadow",
)  # fmt: skip
HEAD = re.compile(r"( *)(?:local)?(?:rule|checkpoint) (\w+):")
SERVICE = " (service)"
FOLLOWS = "Input files updated by another job"


@dataclass(frozen=True)
class Job:
    """One job of a dry run."""

    rule: str
    reason: str = ""
    wildcards: dict[str, str] = field(default_factory=dict)
    input: tuple[str, ...] = ()
    output: tuple[str, ...] = ()
    service: bool = False
    benchmark: str = ""
    priority: int = 0
    threads: int = 1
    gpus: int = 0  # of a job with a service: those of both

    @property
    def causes(self) -> list[str]:
        """Snakemake's reasons without the files; that an input is made anew comes last, being the weakest."""
        found = [part.partition(":")[0].strip() for part in self.reason.split("; ")]
        return sorted(filter(None, found), key=FOLLOWS.__eq__)


def dry_run(arguments: Sequence[str], targets: Sequence[str]) -> list[Job]:
    """The jobs that Snakemake would run with these `arguments`, from first to last.

    Never with --use-conda, because even a dry run would need conda then. Raises UserError with what Snakemake says where
    it finds no way to the targets.
    """
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--dry-run", "--nocolor"]
    command += ["--rerun-incomplete", *arguments, "--", *targets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(_complaint(done.stdout + done.stderr))
    return in_order(parse(done.stdout))


def parse(text: str) -> list[Job]:
    """The jobs in the output of `snakemake --dry-run`, in its order; a rule without files of its own is none."""
    jobs: list[dict[str, str]] = []
    indent, last, group = "", "", 0
    for line in text.splitlines():
        group += "Group job" in line  # its jobs follow, indented
        if head := HEAD.fullmatch(line):
            indent, last = head[1], "rule"
            jobs.append({"rule": head[2], "group": str(group) if indent else ""})
        elif last and line.startswith(f"{indent}    "):
            name, colon, value = line.strip().partition(": ")
            if colon and name in FIELDS:
                jobs[-1][name], last = value, name
            else:  # a reason may go on over several lines
                jobs[-1][last] += f" {line.strip()}"
        else:
            last = ""
    return _as_grouped([(_job(values), values["group"]) for values in jobs if "output" in values])


def _job(values: dict[str, str]) -> Job:
    resources, wildcards = (
        dict(part.split("=", 1) for part in values.get(name, "").split(", ") if "=" in part)
        for name in ("resources", "wildcards")
    )
    gpus = resources.get("gpu", "0")
    return Job(
        rule=values["rule"],
        reason=values.get("reason", ""),
        wildcards=wildcards,
        input=tuple(values.get("input", "").split(", ")),
        output=tuple(file.removesuffix(SERVICE) for file in values["output"].split(", ")),
        service=SERVICE in values["output"],
        benchmark=values.get("benchmark", ""),
        priority=int(values.get("priority", 0)),
        threads=int(values.get("threads", 1)),
        gpus=int(gpus) if gpus.isdigit() else 0,
    )


def _as_grouped(jobs: list[tuple[Job, str]]) -> list[Job]:
    """A service lasts as long as the jobs of its group, so these hold its GPUs."""
    return [
        job if not group else replace(job, gpus=0 if job.service else sum(j.gpus for j, same in jobs if same == group))
        for job, group in jobs
    ]


def prerequisites(jobs: Sequence[Job]) -> list[set[int]]:
    """For each job the places in `jobs` of those that make its inputs."""
    maker = {file: i for i, job in enumerate(jobs) for file in job.output}
    return [{maker[file] for file in job.input if file in maker} for job in jobs]


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """The jobs from first to last: by how many follow upon each other, then by rule and output."""
    before = prerequisites(jobs)

    @cache
    def depth(i: int) -> int:
        return 1 + max(map(depth, before[i]), default=0)

    return [jobs[i] for i in sorted(range(len(jobs)), key=lambda i: (depth(i), jobs[i].rule, jobs[i].output))]


def _complaint(text: str) -> str:
    """One line of what Snakemake said before it gave up."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if ours := [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]:
        return ours[-1]
    if missing := [i for i, line in enumerate(lines) if line.startswith("Missing input files for rule")]:
        rule = lines[missing[0]].removeprefix("Missing input files for rule ").rstrip(":")
        after = lines[missing[0] + 1 :]
        files = after[after.index("affected files:") + 1 :] if "affected files:" in after else after
        return f"rule {rule}: no rule makes its input {', '.join(files)}; put it there or change the configuration"
    at = max((i for i, line in enumerate(lines) if re.search(r"(Exception|Error)\b", line)), default=len(lines) - 1)
    return f"Snakemake: {' '.join(lines[at : at + 2])}"
