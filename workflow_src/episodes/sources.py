"""Which kind of recorded data a folder holds. The readers are imported when they are needed: the workflow only looks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workflow_src.common.errors import UserError

if TYPE_CHECKING:
    from workflow_src.episodes.lerobot import LeRobot
    from workflow_src.episodes.rlds import Rlds

    Source = Rlds | LeRobot

RLDS_INFO, LEROBOT_INFO = "dataset_info.json", "meta/info.json"


def description(root: str | Path) -> Path:
    """The file that describes the data set in the folder `root`. Raises UserError where there is none."""
    for name in (RLDS_INFO, LEROBOT_INFO):
        if (Path(root) / name).is_file():
            return Path(root) / name
    raise UserError(f"{root}: holds neither {RLDS_INFO} (RLDS) nor {LEROBOT_INFO} (LeRobot); give the folder that does")


def open_source(root: str | Path, tensorflow: bool = False) -> Source:
    """Read access to the data set in the folder `root`; RLDS by our reader, or by TensorFlow's."""
    from workflow_src.episodes.lerobot import LeRobot
    from workflow_src.episodes.rlds import Rlds
    from workflow_src.episodes.tensorflow_reader import TensorflowRlds

    if description(root).name != RLDS_INFO:
        return LeRobot(root)
    return TensorflowRlds(root) if tensorflow else Rlds(root)
