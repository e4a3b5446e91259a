"""Suites: tasks with instruction and rubric (`config/trials/<suite>.yaml`), and where their first frames come from.

A task's frames are, in this order of preference, pictures below `trials.root`, a public list of addresses, or stand-ins:
first frames of episodes in `trials.store` whose instruction matches. A task with none of them is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from workflow_src.common.config import check_name, from_dict
from workflow_src.common.errors import UserError
from workflow_src.rollouts.pictures import SUFFIXES

if TYPE_CHECKING:
    import pandas as pd

    from workflow_src.common.sections import Trials

FOLDER = Path(__file__).resolve().parents[2] / "config" / "trials"
PICTURES, LIST, STORE = "pictures", "list", "store"


@dataclass(frozen=True)
class Variant:
    """One instruction of a task."""

    instruction: str = ""
    like: str = ""  # regular expression over a store's instructions: episodes whose first frames may stand in


@dataclass(frozen=True)
class Task:
    """What policies are asked to do. `variants`: several instructions; a picture's name begins with the one it is for."""

    instruction: str = ""
    like: str = ""
    variants: dict[str, Variant] = field(default_factory=dict)
    partial_credit_criteria: str = ""
    list: str = ""  # address of a public list of first frames, which brings its own instructions
    frames_of: str = ""  # shows the pictures of this other task, with other words

    def asked(self) -> dict[str, Variant]:
        """Variants by how the names of their pictures begin; "" for all."""
        return self.variants or {"": Variant(self.instruction, self.like)}


@dataclass(frozen=True)
class Suite:
    """A file of tasks."""

    source: str = ""  # where the tasks are from
    tasks: dict[str, Task] = field(default_factory=dict)


def known_suites() -> list[str]:
    """Names of the suites that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def load_suite(name: str) -> Suite:
    """The suite of that name, or in the YAML file at that path. Raises `UserError`: file, key, value."""
    import yaml

    path = Path(name)
    if path.suffix != ".yaml":
        check_name("trials.suites", name, known_suites())
        path = FOLDER / f"{name}.yaml"
    try:
        suite = from_dict(Suite, yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"trials.suites: {name!r}: no such file") from None
    except (yaml.YAMLError, UserError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    for task, entry in suite.tasks.items():
        _check_task(f"{path}: tasks.{task}", task, entry, suite)
    return suite


def _check_task(path: str, name: str, task: Task, suite: Suite) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UserError(f"{path}: is not usable as a file name; use letters, digits, '_', '-' and '.'")
    if not task.list and not all(variant.instruction.strip() for variant in task.asked().values()):
        raise UserError(f"{path}.instruction: is empty; say what the robot is asked to do")
    for variant in task.asked().values():
        try:
            re.compile(variant.like)
        except re.error as error:
            raise UserError(f"{path}.like: {variant.like!r} is no regular expression ({error})") from None
    if task.frames_of:
        check_name(f"{path}.frames_of", task.frames_of, [other for other in suite.tasks if other != name])


def tasks_of(names: Iterable[str]) -> dict[str, Task]:
    """All tasks of the named suites. Raises `UserError` for a task that two of them have."""
    found: dict[str, Task] = {}
    for name in names:
        for task, entry in load_suite(name).tasks.items():
            if task in found:
                raise UserError(f"trials.suites: {name!r} has a task {task!r}, and so has another; rename one")
            found[task] = entry
    return found


# ---- where frames come from -----------------------------------------------------------------------------------------


def pictures(root: str, task: str) -> list[Path]:
    """The pictures of a task below `root`, by name."""
    folder = Path(root) / task
    if not root or not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")


class Origin(NamedTuple):
    """Where a task's first frames come from."""

    kind: str  # PICTURES, LIST or STORE
    shown: str  # the task they are of: itself, or the one whose frames it shows with other words


def origins(trials: Trials) -> dict[str, Origin]:
    """The origin of every task that first frames can be had of, sorted by task."""
    asked = tasks_of(trials.suites)
    kinds: dict[str, str] = {}
    if trials.root and Path(trials.root).is_dir():
        described = {path.parent.name for path in Path(trials.root).glob("*/*.json")}
        kinds = dict.fromkeys(described | {task for task in asked if pictures(trials.root, task)}, PICTURES)
    kinds |= {task: LIST for task, entry in asked.items() if entry.list and task not in kinds}
    if trials.store:
        matched = store_tasks(read_instructions(trials.store), asked)
        kinds |= {task: STORE for task in matched if task not in kinds}
    found = {task: Origin(kind, task) for task, kind in kinds.items()}
    for task, entry in asked.items():
        if task not in found and entry.frames_of in kinds:
            found[task] = Origin(kinds[entry.frames_of], entry.frames_of)
    return dict(sorted(found.items()))


def left_out(trials: Trials) -> dict[str, list[str]]:
    """Suite → its tasks without first frames."""
    there = origins(trials)
    return {
        name: missing
        for name in trials.suites
        if (missing := [task for task in load_suite(name).tasks if task not in there])
    }


@cache
def read_instructions(store: str) -> pd.DataFrame:
    """The table of an episode store (folder, or its `episodes.parquet`), its instructions stripped."""
    from workflow_src.episodes.store import EpisodeStore

    table = EpisodeStore(store).table.copy()
    for column in ("instruction", "task"):
        table[column] = table[column].astype("string").fillna("").astype(object).str.strip()
    return table


def store_tasks(table: pd.DataFrame, asked: dict[str, Task]) -> dict[str, dict[str, list[int]]]:
    """Task → variant → rows of the store whose first frames fit. Without suites, every instruction is a task."""
    if not asked:
        names = table["task"].where(table["task"] != "", table["instruction"].map(file_name))
        rows = names[(table["instruction"] != "") & (names != "")]
        return {str(task): {"": members.index.tolist()} for task, members in rows.groupby(rows)}
    found: dict[str, dict[str, list[int]]] = {}
    for task, entry in asked.items():
        for prefix, variant in entry.asked().items():
            if variant.like:
                fits = table["instruction"].str.contains(variant.like, case=False, regex=True)
                if fits.any():
                    found.setdefault(task, {})[prefix] = table.index[fits].tolist()
    return found


def drawn(members: dict[str, list[int]], per_task: int) -> dict[str, int]:
    """Variant → how many of a task's `members` in a store become trials: `per_task`, evenly, where there are so many."""
    return {
        prefix: min(len(members[prefix]), len(range(place, per_task, len(members))))
        for place, prefix in enumerate(sorted(members))
    }


@cache
def trial_counts(trials: Trials) -> dict[str, int | None]:
    """Task → how many trials it will have; None for a public list, which says so only when it is fetched."""
    members = store_tasks(read_instructions(trials.store), tasks_of(trials.suites)) if trials.store else {}
    found: dict[str, int | None] = {}
    for task, (kind, shown) in origins(trials).items():
        if kind == PICTURES:
            found[task] = len(pictures(trials.root, shown))
        else:
            found[task] = None if kind == LIST else sum(drawn(members[shown], trials.per_task).values())
    return found


def file_name(instruction: str) -> str:
    """An instruction as a name of files: "Put the Pot down!" → "put_the_pot_down"."""
    return re.sub(r"[^a-z0-9]+", "_", instruction.lower()).strip("_")[:80]
