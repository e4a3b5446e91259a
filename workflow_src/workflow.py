"""What the Snakefile needs to know, as plain tested Python: checked configuration, stage files, targets, environments."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from workflow_src.buckets.addresses import in_bucket
from workflow_src.checks import (
    EXISTING,
    HUMAN,
    LEARNED,
    ROOT,
    check,
    gathered,
    prompt_file,
    python_of,
    recorded_sets,
    split_folder,
)
from workflow_src.common import config as configuration
from workflow_src.common.config import to_dict, write_stage
from workflow_src.common.errors import UserError
from workflow_src.common.files import write_if_changed
from workflow_src.common.progress import say
from workflow_src.common.sections import Config
from workflow_src.containers import image_of, outside_paths
from workflow_src.endings import end, nothing_to_fetch, nothing_to_judge_by, nothing_to_rank, nothing_to_record, or_end
from workflow_src.episodes.mixture import Mixture, read_mixture
from workflow_src.episodes.registry import Dataset, entry_dict
from workflow_src.episodes.sources import SPLITS, description
from workflow_src.rollouts.pictures import SUFFIXES
from workflow_src.rollouts.suites import LIST, left_out, origins, tasks_of
from workflow_src.stages import stages
from workflow_src.world_model.published import is_address

WORLDS = ("lab", "world_model")
CORRUPTIONS = ("as_recorded", "gripper_open", "offset", "frozen", "reversed", "shuffled")  # rollouts/corruptions.py


@dataclass(frozen=True)
class Workflow:
    """One checked configuration and everything the rules ask about it."""

    config: Config
    devices: tuple[str, ...] | None = None  # GPUs of this machine for its jobs; None: jobs run elsewhere, on a cluster
    contained: bool = False  # jobs run in images (--sdm apptainer)

    @property
    def results(self) -> str:
        return self.config.results

    def stage(self, name: str) -> str:
        """Path of a stage file."""
        return f"{self.results}/config/{name}.json"

    @property
    def episodes(self) -> str:
        """Folder of the lab's data set."""
        return f"{self.results}/episodes/{self.config.episodes.dataset}"

    @property
    def tokenizer(self) -> str:
        """The file that the tokenizer's folder gets last."""
        last = "config.json" if self.config.tokenizer.kind == "sd3" else "model.safetensors"
        return f"{self.results}/tokenizer/{last}"

    @property
    def checkpoint(self) -> str:
        """The published checkpoint: the file that is configured, or the one that is fetched from the configured address."""
        source = self.config.world_model.source.checkpoint
        return f"{self.results}/downloads/checkpoint.pt" if is_address(source) else source

    @property
    def mixture(self) -> Mixture:
        """The data sets that the world model is trained on."""
        return read_mixture(self.config.world_model.data, self.config.episodes.dataset)

    @cached_property
    def recorded(self) -> dict[str, Dataset]:
        """The registered data sets among them, and the one that is asked for, which are fetched and converted."""
        return recorded_sets(self.config)

    @property
    def asked(self) -> list[str]:
        """The registered data sets that `recorded_data` makes."""
        return [name for name in self.recorded if self.config.dataset in ("all", name)]

    @property
    def recorded_data(self) -> list[str] | Callable:
        """Their stores and a page of each; without any, what ends Snakemake when recorded data is asked for."""
        if not self.asked:
            return nothing_to_fetch
        sets = [(name, split) for name in self.asked for split in SPLITS]
        pages = [f"{self.results}/figures/episodes/{name}/{split}/contact_sheet.png" for name, split in sets]
        return [*(self.store(name, split) for name, split in sets), *pages]

    def source(self, dataset: str) -> str:
        """A registered data set as its authors publish it: folder of a copy that is here, or of the download, or address."""
        recorded, entry = self.config.episodes.recorded, self.recorded[dataset]
        fetched = f"{self.results}/downloads/{dataset}"
        streamed = recorded.stream and entry.address and not entry.files
        return recorded.copies.get(dataset, entry.address if streamed else fetched)

    def source_file(self, dataset: str) -> str | list[str]:
        """The file that stands for that folder among a rule's inputs; none where it is read from the network."""
        source = self.source(dataset)
        if dataset in self.config.episodes.recorded.copies:
            return str(description(source))
        return [] if "://" in source else f"{source}/download.json"

    def groups(self, dataset: str) -> list[str]:
        """Results of all shard groups of a registered data set."""
        count = self.config.episodes.recorded.groups
        return [f"{self.results}/episodes/{dataset}/groups/{i}-of-{count}.json" for i in range(1, count + 1)]

    def store(self, dataset: str, split: str) -> str:
        """What stands for a split of a data set among a rule's inputs: its table, or its folder where there is none."""
        if dataset == self.config.episodes.dataset:
            return f"{self.episodes}/{split}/episodes.parquet"
        if dataset in self.recorded:
            there = self.recorded[dataset].stored_splits()
            name = next(name for name in SPLITS.get(split, (split,)) if name in there)
            return f"{self.results}/episodes/{dataset}/{name}/episodes.parquet"
        if dataset in self.in_buckets:
            return f"{self.results}/episodes/{dataset}/{split}/episodes.parquet"
        return _table_of(split_folder(self.config, dataset, split))

    @property
    def in_buckets(self) -> dict[str, str]:
        """Name → address of the data sets that lie in buckets."""
        return {name: place.rstrip("/") for name, place in self.config.episodes.stores.items() if in_bucket(place)}

    @property
    def recording(self) -> str | Callable:
        """The stage file that recording starts from; without a lab, what ends Snakemake when recordings are asked for."""
        return nothing_to_record if self.config.lab.scene == "none" else self.stage("episodes")

    @property
    def gathered(self) -> bool:
        """Whether trials come from elsewhere than the lab."""
        return gathered(self.config)

    @cached_property
    def lists(self) -> dict[str, str]:
        """Task → address, of the public lists of first frames that trials are made of."""
        asked, there = tasks_of(self.config.trials.suites), origins(self.config.trials)
        listed = {there[task].shown for task in self.config.lab.tasks if task in there and there[task].kind == LIST}
        return {task: asked[task].list for task in sorted(listed)}

    @property
    def pictures(self) -> list[str]:
        """Somebody's own first frames and what is said beside them."""
        root = Path(self.config.trials.root)
        wanted = (*SUFFIXES, ".json")
        found = root.glob("*/*") if self.config.trials.root else ()
        return sorted(str(path) for path in found if path.suffix.lower() in wanted and path.name[0] != ".")

    @property
    def trial_sources(self) -> list[str]:
        """What else trials are made of: the tasks of the suites, and the store of episodes (its table, where it has one)."""
        store = self.config.trials.store
        return [
            *([self.stage("suites")] if self.config.trials.suites else []),
            *([_table_of(Path(store))] if store else []),
        ]

    @property
    def worlds(self) -> tuple[str, ...]:
        """The worlds that policies are rolled out in."""
        return WORLDS[1:] if self.config.lab.scene == "none" else WORLDS

    def seen_by_tokenizer(self, split: str) -> str:
        """The episodes that the tokenizer is trained on: the lab's, or without a lab the world model's first data set's."""
        none = self.config.lab.scene == "none"
        return self.store(self.mixture.names[0] if none else self.config.episodes.dataset, split)

    def caches(self, split: str, datasets: Iterable[str]) -> list[str]:
        """Latent caches of a split; none where latents are encoded on the fly."""
        cached = self.config.world_model.latents == "cached"
        return [f"{self.results}/latents/{dataset}/{split}/latents.json" for dataset in datasets if cached]

    def gpus(self, configured: int) -> int:
        """The GPUs that a job asks for: on a cluster as configured, on a machine with GPUs at least one, else none."""
        if self.devices is None:
            return configured
        return max(1, configured) if self.devices else 0

    def served(self, policy: str) -> bool:
        """Whether the workflow starts this policy's server itself."""
        return not self.config.policies[policy].endpoint

    def environment(self, policy: str) -> str | None:
        """Conda environment of a policy's server: a file beside the rules, or one that exists, by its name.

        None where an interpreter or the folder of an environment is configured.
        """
        return _environment(self.config.policies[policy].env)

    def image(self, policy: str = "") -> str | None:
        """Image of a policy's server, or of jobs without a policy; None where none are used."""
        return self._image(*((self.config.policies[policy].env, f"policies.{policy}.env") if policy else ("base",)))

    @property
    def reader_image(self) -> str | None:
        """Image of conversions, like `image`."""
        return self._image(self.config.episodes.recorded.tensorflow or "base", "episodes.recorded.tensorflow")

    def _image(self, *environment: str) -> str | None:
        return or_end(image_of, self.config, *environment) if self.contained else None

    @property
    def outside(self) -> list[str]:
        """What images are shown besides the working directory."""
        return or_end(outside_paths, self.config)

    def interpreter(self, policy: str) -> str:
        """What runs a policy's server: the environment's Python, or the configured one."""
        return _interpreter(self.config.policies[policy].env)

    @property
    def reader_environment(self) -> str | None:
        """Conda environment of conversions, like `environment`."""
        return _environment(self.config.episodes.recorded.tensorflow or "base")

    @property
    def reader(self) -> str:
        """The command that converts: its Python, its module, and by whom RLDS is read."""
        tensorflow = self.config.episodes.recorded.tensorflow
        module = "-m workflow_src.episodes.convert"
        return f"{_interpreter(tensorflow)} {module}{' --reader tensorflow' if tensorflow else ''}"

    def endpoint_arguments(self, policy: str) -> str:
        """How the doctor reaches a policy whose server is already running; empty: it serves the policy itself."""
        one = self.config.policies[policy]
        given = {"--endpoint": one.endpoint, "--token-env": one.token_env}
        plain = "--allow-plaintext " if one.allow_plaintext else ""
        return plain + "".join(f"{flag} {shlex.quote(value)} " for flag, value in given.items() if value)

    def network_files(self, policy: str) -> list[str]:
        """The trained files that a policy's server loads."""
        network = self.config.policies[policy].network
        return [f"{self.results}/policies/{network}/{network}.json"] if network else []

    def per_rollout(self, template: str, worlds: Iterable[str] = WORLDS) -> list[str] | Callable:
        """`template` filled for every (world, policy, shard); without policies, what ends Snakemake when it is asked for."""
        if not self.config.policies:
            return nothing_to_rank
        return [
            template.format(results=self.results, world=w, policy=p, shard=s)
            for w in worlds
            if w in self.worlds
            for p in self.config.policies
            for s in range(self.config.rollouts.shards)
        ]

    def judgements(self) -> list[str] | Callable:
        """The judgements of all configured judges, one file for each job that judges.

        Without a lab there is nothing that the learned ones could learn from: ranking by them ends Snakemake.
        """
        lab = self.config.lab.scene != "none"
        if not lab and self.config.judges.primary in LEARNED:
            return nothing_to_judge_by if self.config.policies else nothing_to_rank
        names = [
            *(["learned"] if lab else []),
            *self.config.judges.vlm,
            *([HUMAN] if self.config.judges.human.labels else []),
        ]
        return [f"{self.results}/judgements/{name}.parquet" for name in names]

    def probes(self) -> list[str]:
        """Every judge's verdicts on changed lab clips, one file for each job that makes them."""
        seeing = [name for name, vlm in self.config.judges.vlm.items() if "lab" in vlm.worlds]
        return [f"{self.results}/calibration/{name}.parquet" for name in ("learned", *seeing)]

    def prompt(self, judge: str) -> str:
        """The prompt file of a vision-language model."""
        return str(prompt_file(self.config.judges.vlm[judge]))

    def sources(self, *files: str) -> list[str]:
        """Source files of the analysis, which is cheap: standing among its inputs, an edit reruns it."""
        return [str(ROOT / "workflow_src" / "analysis" / file) for file in files]

    def write_stage_files(self) -> None:
        """Write `run_config.yaml` and every stage file; those that do not change keep their time stamps."""
        import yaml

        text = yaml.safe_dump(to_dict(self.config), sort_keys=False)
        write_if_changed(f"{self.results}/run_config.yaml", text)
        for name, entry in self.recorded.items():
            write_if_changed(self.stage(f"datasets/{name}"), json.dumps({name: entry_dict(entry)}, indent=1) + "\n")
        if self.config.trials.suites:
            # Not the files themselves: their comments and the order of their tasks decide nothing.
            tasks = {name: asdict(task) for name, task in sorted(tasks_of(self.config.trials.suites).items())}
            write_if_changed(self.stage("suites"), json.dumps(tasks, indent=1) + "\n")
        for name, sections in stages(self.config).items():
            write_stage(f"{self.results}/config", name, self.config, sections)


def _table_of(store: Path) -> str:
    """A store's table, or what was given where it is that already or has none."""
    table = store / "episodes.parquet"
    return str(table if table.is_file() else store)


def _environment(name: str) -> str | None:
    if "/" in name:
        return None
    return name.removeprefix(EXISTING) if name.startswith(EXISTING) else f"../envs/{name}.yaml"


def _interpreter(name: str) -> str:
    return shlex.quote(str(python_of(name))) if "/" in name else "python"


def checked(mapping: dict[str, Any], devices: tuple[str, ...] | None = None, contained: bool = False) -> Workflow:
    """Build and cross-check the configuration that Snakemake merged. Raises `UserError` before any job starts."""
    return Workflow(check(configuration.from_dict(Config, mapping)), devices, contained)


# ---- Snakefile helpers ----------------------------------------------------------------------------------------------


def open_workflow(mapping: dict[str, Any], devices: tuple[str, ...] | None = None, contained: bool = False) -> Workflow:
    """`checked`, for the Snakefile: a mistake ends Snakemake with one line and no traceback."""
    try:
        workflow = checked(json.loads(json.dumps(mapping)), devices, contained)
        workflow.write_stage_files()
        _say_what_is_left_out(workflow.config)
        return workflow
    except UserError as error:
        end(error)


def _say_what_is_left_out(config: Config) -> None:
    """Tasks of suites that nobody has first frames of; once, not in the Snakemake that a job may run."""
    if "REHEARSAL_PARENT" not in os.environ:
        for suite, tasks in left_out(config.trials).items():
            where = f"put pictures into {config.trials.root or '<trials.root>'}/<task>/"
            say(f"trials: suite {suite}: no first frames, left out: {', '.join(tasks)}; {where}")


def require_keys(workflow: Workflow, jobs: Iterable[Any]) -> None:
    """End a run before its first job when one of its `jobs` will ask a server whose key is missing."""
    from workflow_src.judges.transport import find_key

    for name in sorted({job.wildcards.vlm for job in jobs if hasattr(job.wildcards, "vlm")}):
        try:
            find_key(name, workflow.config.judges.vlm[name])
        except UserError as error:
            say(f"error: {error}")
            sys.exit(2)


def any_of(names: Any) -> str:
    """A wildcard constraint that admits exactly `names`."""
    return "|".join(re.escape(str(name)) for name in names)
