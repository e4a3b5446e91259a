"""The data sets that are known by name: `config/datasets.yaml`, checked.

python -m workflow_src.episodes.registry              # a table of all of them
python -m workflow_src.episodes.registry my_sets.yaml # of a file of your own
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Literal

import yaml

from workflow_src import embodiments
from workflow_src.common.config import check_name, from_dict, to_dict
from workflow_src.common.errors import UserError, run_cli
from workflow_src.episodes.action_maps import ActionMap

REGISTRY = Path(__file__).resolve().parents[2] / "config" / "datasets.yaml"


@dataclass(frozen=True)
class Dataset:
    """One recorded data set as its authors publish it: an RLDS directory, or LeRobot's, or WorldGym's folders."""

    address: str = ""  # of its folder: http(s)://… or hf://datasets/owner/name@revision/…; empty: only copies of it
    files: dict[str, str] = field(
        default_factory=dict
    )  # path → sha256, of sets that do not list their files themselves
    version: str = ""
    splits: dict[str, int] = field(default_factory=dict)  # as they are → episodes; 0: not known
    hold_out: int = 0  # every n-th episode of `train` becomes `validation`; 0: there is another split
    image: str = ""  # path of the camera's feature within a step, like all that follow
    instruction: str = ""  # empty: the set has none
    more_instructions: tuple[str, ...] = ()
    unlabelled: bool = False  # episodes without an instruction are usual: left out, but no sign of damage
    action: ActionMap = field(default_factory=ActionMap)
    robot_state: str = ""  # stored as it is
    pose: str = ""  # the state's part that is the hand's position and rotation: then what was reached is stored, too
    pose_rotation: Literal["euler", "axis_angle"] = "euler"
    skip_first: int = 0  # steps at the beginning that hold no command
    control_hz: float = 0.0
    control_hz_source: str = ""
    embodiment: str = ""
    bytes: int = 0  # of all shards; 0: not known
    licence: str = ""  # `not stated` where its authors state none
    licence_source: str = ""

    def features(self) -> list[str]:
        """Paths of a step's features that are needed, images aside."""
        paths = {
            *self.action.features(),
            self.instruction,
            *self.more_instructions,
            self.robot_state,
            self.pose.partition("[")[0],
        }
        return sorted(paths - {""})

    def instructions(self) -> list[str]:
        """Paths of a step's texts, the main one first."""
        return [path for path in (self.instruction, *self.more_instructions) if path]

    def split_of(self, split: str, index: int) -> str:
        """The split that episode `index` of the recorded `split` is stored in."""
        held_out = self.hold_out and split == "train" and index % self.hold_out == self.hold_out - 1
        return "validation" if held_out else split

    def stored_splits(self) -> list[str]:
        """The splits of the converted set, train first."""
        names = {*self.splits, "validation"} if self.hold_out else set(self.splits)
        return sorted(names, key=lambda name: (name != "train", name))


NEEDED = ("version", "splits", "image", "control_hz", "embodiment", "licence", "licence_source")


def load_registry(path: str | Path = "") -> dict[str, Dataset]:
    """Name → data set: those of `config/datasets.yaml`, and with `path` those of that file besides or instead."""
    found = _load(REGISTRY)
    return {**found, **_load(Path(path))} if path else found


def lookup(name: str, path: str | Path = "") -> Dataset:
    """The data set of that name. Raises UserError with did-you-mean."""
    registry = load_registry(path)
    check_name("--dataset", name, registry)
    return registry[name]


@lru_cache(4)
def _load(path: Path) -> dict[str, Dataset]:
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of data sets") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(mapping, dict):
        raise UserError(f"{path}: holds no data sets; give name: {{address: …}}")
    found = {}
    for name, entry in mapping.items():
        try:
            found[str(name)] = from_dict(Dataset, entry, str(name))
            _check(str(name), found[str(name)])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return found


def _check(name: str, entry: Dataset) -> None:
    for key in NEEDED:
        if not getattr(entry, key):
            raise UserError(f"{name}.{key}: is missing")
    if not entry.action.translation or not entry.action.reason:
        raise UserError(f"{name}.action: says not what is recorded where (translation) and why it is read so (reason)")
    if bool(entry.action.gripper) != (entry.action.gripper_means != "none"):
        raise UserError(f"{name}.action.gripper: {entry.action.gripper!r} does not go with "
                        f"gripper_means {entry.action.gripper_means!r}; give both or neither")  # fmt: skip
    if (entry.action.gripper_check == "width") != bool(entry.action.gripper_width):
        raise UserError(f"{name}.action.gripper_width: goes with gripper_check width; give both or neither")
    check_name(f"{name}.embodiment", entry.embodiment, embodiments.EMBODIMENTS)
    if "train" not in entry.splits:
        raise UserError(f"{name}.splits: there is no train among {', '.join(entry.splits)}")
    others = set(entry.splits) & {"validation", "val", "test"}
    if bool(others) == bool(entry.hold_out) or entry.hold_out in (1,) or entry.hold_out < 0:
        raise UserError(f"{name}.hold_out: {entry.hold_out} beside the splits {', '.join(entry.splits)}; it must be 2 or "
                        "more where there is no validation, val or test, and 0 otherwise")  # fmt: skip
    for path in (*entry.action.features(), entry.pose):
        if path.startswith("/"):
            raise UserError(f"{name}: the path {path!r} begins with a slash; write observation/image")


def entry_dict(entry: Dataset) -> dict:
    """A data set as `config/datasets.yaml` would say it, without what is at its default."""
    plain, default = to_dict(entry), to_dict(Dataset())
    return {one.name: plain[one.name] for one in fields(entry) if plain[one.name] != default[one.name]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the registered data sets.")
    parser.add_argument("file", nargs="?", default="", help="a file of your own, besides config/datasets.yaml")
    print(f"{'name':<42} {'episodes':>9} {'GB':>7} {'Hz':>4}  {'robot':<16} {'splits':<18} licence")
    for name, entry in load_registry(parser.parse_args().file).items():
        known = all(entry.splits.values())
        episodes, size = (
            sum(entry.splits.values()) if known else "?",
            f"{entry.bytes / 1e9:.1f}" if entry.bytes else "?",
        )
        splits = ",".join(entry.stored_splits())
        print(
            f"{name:<42} {episodes:>9} {size:>7} {entry.control_hz:>4g}  {entry.embodiment:<16} {splits:<18} {entry.licence}"
        )


if __name__ == "__main__":
    run_cli(main)
