"""What jobs would cost: seconds, bytes, money. From recorded throughputs, those of this folder's runs before others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from workflow_src.analysis.summary import benchmark_seconds
from workflow_src.checks import ROOT, gathered, recorded_sets
from workflow_src.common.files import write_json
from workflow_src.common.sections import Config
from workflow_src.judges.budget import Size
from workflow_src.preflight.dry_run import Job, prerequisites
from workflow_src.rollouts.suites import trial_counts

TABLE = ROOT / "benchmarks" / "throughput.yaml"
FLOP_PER_UNIT = 6e6  # of a training step, per token and million weights
PROBE_KINDS = 4  # clips that calibration makes of each lab rollout (judges/probes.py)
PROMPT_CHARACTERS = 2000  # of a vision-language model's prompt, about
NOT_KNOWN = math.nan  # amount of work; whatever is computed from it is not known either
Estimate = Callable[[Config, dict[str, str]], float]


# ---- units of work --------------------------------------------------------------------------------------------------


def _pixels(config: Config) -> float:
    return (config.lab.image_size / 48) ** 2


def _frames(config: Config, of: dict[str, str]) -> float:
    """Frames of a split of the lab's data set. Of others the registry tells episodes at most, but not how long they are."""
    split = config.episodes.splits.get(of["split"])
    if split is None or of.get("dataset", config.episodes.dataset) != config.episodes.dataset:
        return NOT_KNOWN
    return split.episodes * (config.lab.horizon + 1)


def _images(config: Config, training: Any, width: int) -> float:
    return training.steps * training.batch * (width / 32) ** 2 * _pixels(config)


def megaweights(config: Config) -> float:
    """Millions of weights in the world model's blocks."""
    network = config.world_model.network
    layers = 16 if network.attention == "factorised" else 12
    return layers * network.depth * network.width**2 / 1e6


def tokens(config: Config) -> float:
    """Tokens of a frame."""
    return (config.lab.image_size / config.tokenizer.downsample / config.world_model.network.patch) ** 2


def _world_model(config: Config, _: dict[str, str]) -> float:
    model = config.world_model
    frames = model.training.steps * model.training.batch * model.clip_frames
    return frames * tokens(config) * megaweights(config)


def _imagined(config: Config) -> float:
    """Units of the world model's network for one generated frame."""
    sampler = config.world_model.sampler
    forwards = 1 + sampler.steps * (1 if sampler.guidance == 1 else 2)
    forwards *= 1 if sampler.mode == "streaming" else 2
    return forwards * tokens(config) * megaweights(config)


def rollouts(config: Config) -> float:
    """Rollouts of one policy in one world, as many as `rollouts/gather.py` makes trials; or NOT_KNOWN."""
    counts: list[int | None] = [config.trials.per_task] * len(config.lab.tasks)
    if gathered(config):
        every = config.lab.scene != "none" or not config.lab.tasks
        counts = [n for task, n in trial_counts(config.trials).items() if every or task in config.lab.tasks]
    return sum(NOT_KNOWN if count is None else count for count in counts) * config.rollouts.repeats


def _worlds(config: Config) -> int:
    return 1 if config.lab.scene == "none" else 2


def _steps(config: Config, _: dict[str, str]) -> float:
    return rollouts(config) * config.lab.horizon * _worlds(config) / config.rollouts.shards


UNITS: dict[str, Estimate] = {
    "record_episodes": lambda config, of: _frames(config, of) * _pixels(config),
    "train_tokenizer": lambda config, _: _images(config, config.tokenizer.training, config.tokenizer.width),
    "cache_latents": lambda config, of: _frames(config, of) * (1 + config.world_model.mirror)
    * _pixels(config) * config.tokenizer.channels / 16,
    "train_policy_network": lambda config, of: _images(
        config, config.behaviour_cloning[of["network"]].training, config.behaviour_cloning[of["network"]].width
    ),
    "train_judge": lambda config, _: _images(config, config.judges.training, config.judges.width),
    "train_world_model": _world_model,
    "roll_out": _steps,
    "judge_rollouts": lambda config, _: rollouts(config) * _worlds(config) * len(config.policies)
    * (config.lab.horizon + 1) * _pixels(config),
}  # fmt: skip


def units(config: Config, rule: str, wildcards: dict[str, str]) -> float | None:
    """How much work a job is, in its rule's own unit; None where that is not known before it runs."""
    work = UNITS[rule](config, wildcards) if rule in UNITS else 0.0
    return None if math.isnan(work) else work


# ---- what earlier runs here took ------------------------------------------------------------------------------------


def _notes(results: str | Path) -> Path:
    return Path(results) / "state" / "work.json"


def note_work(config: Config, jobs: Iterable[Any]) -> None:
    """Write down how much work Snakemake's `jobs` are that begin now, so that their benchmarks tell a throughput."""
    file = _notes(config.results)
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for job in jobs:
        if job.benchmark:
            gpus = int(job.resources.get("gpu") or 0)
            work = units(config, job.rule.name, dict(job.wildcards.items()))
            known.pop(str(job.benchmark), None)  # of a run before, whose benchmark is overwritten
            if work is not None:
                known[str(job.benchmark)] = {"rule": job.rule.name, "units": work, "gpus": gpus}
    write_json(file, known)


def recorded(results: str | Path, table: dict[str, Any]) -> dict[tuple[str, bool], tuple[float, int]]:
    """(Rule, on GPUs) → (how many times longer than in the table its jobs took here, number of them)."""
    file = _notes(results)
    sums: dict[tuple[str, bool], list[float]] = {}
    for benchmark, note in (json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}).items():
        entry = table["rules"].get(note["rule"])
        if entry is None or not Path(benchmark).is_file():
            continue
        expected = entry["start"] + entry.get("rate", 0.0) * note["units"]
        taken = benchmark_seconds(Path(benchmark))
        if taken == taken and expected:  # not cut off
            total = sums.setdefault((note["rule"], note["gpus"] > 0), [0.0, 0.0, 0])
            sums[note["rule"], note["gpus"] > 0] = [total[0] + taken, total[1] + expected, total[2] + 1]
    return {key: (taken / expected, int(count)) for key, (taken, expected, count) in sums.items()}


# ---- estimates ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of one job. None: not known, because its rule has never been measured or how much work it is cannot be told."""

    seconds: float | None
    bytes: float | None = 0.0
    money: float | None = 0.0


class Estimator:
    """Costs of jobs of one configuration, on `cores` cores."""

    def __init__(self, config: Config, cores: int):
        self.config, self.cores = config, cores
        self.table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
        self.here = recorded(config.results, self.table)

    def cost(self, job: Job) -> Cost:
        """What `job` costs."""
        if job.service:
            return Cost(0.0)  # it is part of what it serves
        entry = self.table["rules"].get(job.rule)
        money = self._money(job)
        if entry is None:
            fetched: float | None = None if job.rule == "fetch_store" else 0.0
            if job.rule == "download_dataset":
                fetched = recorded_sets(self.config)[job.wildcards["dataset"]].bytes or None
            return Cost(None, fetched, money)
        work = units(self.config, job.rule, job.wildcards)
        if work is None:
            return Cost(None, None if "bytes" in entry else 0.0, money)
        seconds = entry["start"] + entry.get("rate", 0.0) * work
        if (job.rule, job.gpus > 0) in self.here:
            seconds *= self.here[job.rule, job.gpus > 0][0]
        elif job.rule == "train_world_model":
            seconds = entry["start"] + self._network(work, job)
        elif job.rule == "roll_out":
            frames = work / _worlds(self.config)
            forward = self.table["forward"] * self._network(frames * _imagined(self.config), job)
            seconds += forward + self._answers(job.wildcards["policy"]) * frames * _worlds(self.config)
        return Cost(seconds, self._bytes(job, entry, work), money)

    def _network(self, work: float, job: Job) -> float:
        """Seconds of training on `work` units of the world model's network."""
        if job.gpus:
            return work * FLOP_PER_UNIT / (self.table["gpu"] * job.gpus)
        processes = max(1, min(self.config.world_model.processes if job.rule == "train_world_model" else 1, self.cores))
        speed = 1 if processes == 1 else self.table["processes"] * processes
        return work * self.table["rules"]["train_world_model"]["rate"] / speed

    def _answers(self, policy: str) -> float:
        """Seconds of a published policy for one step of one rollout."""
        return self.table["policies"].get(self.config.policies[policy].adapter, {}).get("seconds", 0.0)

    def _bytes(self, job: Job, entry: dict[str, float], work: float) -> float:
        model = self.config.world_model
        if job.rule == "train_world_model":  # weights, their average and two moments in each checkpoint, and the result
            return megaweights(self.config) * 1e6 * 4 * (4 * model.training.keep + 1)
        return entry.get("bytes", 0.0) * work

    def _money(self, job: Job) -> float | None:
        if job.rule not in ("ask_vlm", "calibrate_vlm"):
            return 0.0
        settings = self.config.judges.vlm[job.wildcards["vlm"]]
        clips = rollouts(self.config) * len(self.config.policies) * len(settings.worlds)
        if job.rule == "calibrate_vlm":
            clips = self.config.judges.probes * PROBE_KINDS
        size = Size(1, settings.frames + 2, PROMPT_CHARACTERS)
        price = settings.votes * size.cost(settings)
        if not price:
            return 0.0
        return None if math.isnan(clips) else clips * price


def wall_seconds(jobs: Sequence[Job], seconds: Sequence[float], cores: int | None, gpus: int) -> float:
    """How long the jobs take side by side on `cores` cores and `gpus` GPUs; `cores` None: as many as they want.

    Jobs start when their inputs are there, those that more work waits for first. The servers of policies need no core.
    """
    needs = prerequisites(jobs)
    after: dict[int, list[int]] = {}
    for i, before in enumerate(needs):
        for j in before:
            after.setdefault(j, []).append(i)

    @cache
    def remaining(i: int) -> float:
        return seconds[i] + max(map(remaining, after.get(i, ())), default=0.0)

    waiting = sorted(range(len(jobs)), key=lambda i: (-jobs[i].priority, -remaining(i)))
    running: dict[int, float] = {}
    done: set[int] = set()
    now = 0.0
    while waiting or running:
        for i in list(waiting):
            free = float("inf") if cores is None else cores - sum(_cores(jobs[j], cores) for j in running)
            left = gpus - sum(min(jobs[j].gpus, gpus) for j in running)
            if needs[i] <= done and _cores(jobs[i], cores) <= free and min(jobs[i].gpus, gpus) <= left:
                running[i] = now + seconds[i]
                waiting.remove(i)
        now = min(running.values())
        for i in [i for i, end in running.items() if end <= now]:
            done.add(i)
            del running[i]
    return now


def _cores(job: Job, cores: int | None) -> int:
    return job.threads if cores is None else min(job.threads, cores)
