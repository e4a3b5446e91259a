"""Which kind of recorded data a folder holds. The readers are imported when they are needed: the workflow only looks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workflow_src.common.errors import UserError
from workflow_src.common.fetch import shown

if TYPE_CHECKING:
    from workflow_src.episodes.lerobot import LeRobot
    from workflow_src.episodes.rlds import Rlds
    from workflow_src.episodes.worldgym import WorldGym

    Source = Rlds | LeRobot | WorldGym

SPLITS = {"train": ("train",), "validation": ("validation", "val", "test")}  # what data sets of others call them
RLDS_INFO, LEROBOT_INFO = "dataset_info.json", "meta/info.json"


def description(root: str | Path) -> Path:
    """The file that stands for the data set in the folder `root`. Raises UserError where there is none."""
    for name in (RLDS_INFO, LEROBOT_INFO):
        if (Path(root) / name).is_file():
            return Path(root) / name
    if videos := sorted(Path(root).glob("train/*.mp4")):
        return videos[0]
    raise UserError(f"{root}: holds neither {RLDS_INFO} (RLDS) nor {LEROBOT_INFO} (LeRobot) nor train/*.mp4 (WorldGym); "
                    "give the folder that does")  # fmt: skip


def find_split(root: Path, split: str) -> Path:
    """Folder of a split of the data set in `root`. Raises UserError where there are no episodes."""
    names = SPLITS.get(split, (split,))
    for name in names:
        folder = root / name
        if (folder / "episodes.parquet").is_file() or next(folder.glob("*.mp4"), None):
            return folder
    raise UserError(
        f"{str(root)!r} holds no episodes of the split {split}; expected episodes.parquet or mp4 + npz in "
        f"{' or '.join(names)}/"
    )


def open_source(source: str | Path, folder: str | Path = "", tensorflow: bool = False) -> Source:
    """Read access to the data set in a folder, or at an address, of which `folder` keeps what is being read.

    RLDS is read by our reader, or by TensorFlow's.
    """
    from workflow_src.episodes.lerobot import LeRobot
    from workflow_src.episodes.rlds import Rlds
    from workflow_src.episodes.stream import Streamed
    from workflow_src.episodes.tensorflow_reader import TensorflowRlds
    from workflow_src.episodes.worldgym import WorldGym

    if "://" in str(source):
        if tensorflow:
            raise UserError(
                f"--reader: tensorflow reads files, not {shown(str(source))}; fetch them first, or leave it out"
            )
        return Streamed(str(source).rstrip("/"), Path(folder))
    file = description(source)
    if file.name == RLDS_INFO:
        return TensorflowRlds(source) if tensorflow else Rlds(source)
    return WorldGym(source) if file.suffix == ".mp4" else LeRobot(source)
