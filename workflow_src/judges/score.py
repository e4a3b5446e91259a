"""Judge rollouts: learned classifier and state read-out on every one, the simulator's truth where there is one."""

from __future__ import annotations

import argparse
from pathlib import Path

from workflow_src.common.config import Stage, load_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import Progress
from workflow_src.judges.interface import Clip, Judge, Judgement, read_clips, write_judgements
from workflow_src.judges.truth import TruthJudge


def make_judges(stage: Stage, weights: Path) -> list[Judge]:
    """The judges that read videos. Raises `UserError` when the artefact was made for another lab."""
    from workflow_src.common.compute import configure_torch
    from workflow_src.judges.classifier import ClassifierJudge
    from workflow_src.judges.network import load_judge
    from workflow_src.judges.state import StateJudge

    device = configure_torch()
    networks, config = load_judge(weights)
    if config["scene"] != stage.lab.scene or not set(stage.lab.tasks) <= set(config["tasks"]):
        raise UserError(
            f"{weights}: was trained on scene {config['scene']!r} and tasks {', '.join(config['tasks'])}, but the "
            f"configuration has {stage.lab.scene!r} and {', '.join(stage.lab.tasks)}; train the judge anew"
        )
    networks.to(device)
    return [
        ClassifierJudge(networks, config, stage.judges.batch),
        StateJudge(networks, config, stage.judges.batch),
    ]


def judge(clips: list[Clip], judges: list[Judge]) -> list[Judgement]:
    """What `judges` say about all clips, after the truth about those that have one."""
    judgements = TruthJudge().judge([clip for clip in clips if clip.truth is not None])
    for one in judges:
        judgements += one.judge(clips)
    return judgements


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.judges.score",
        description=__doc__.strip(),
        epilog="examples:\n  python -m workflow_src.judges.score --config results/config/judges.json \\\n"
        "      --judge results/judge/model.safetensors --rollouts results/rollouts/*/*/shard_*/rollouts.parquet \\\n"
        "      --out results/judgements/learned.parquet",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="stage file with seed, lab, judges")
    parser.add_argument("--judge", type=Path, required=True, help="model.safetensors of the judge")
    parser.add_argument("--rollouts", type=Path, nargs="+", required=True, help="rollouts.parquet files")
    parser.add_argument("--out", type=Path, required=True, help="parquet to write, one row per rollout and judge")
    options = parser.parse_args()
    die_with_parent()
    judges = make_judges(load_stage(options.config), options.judge)
    judgements: list[Judgement] = []
    with Progress(len(options.rollouts), "judging", "record") as progress:
        for table in options.rollouts:
            judgements += judge(read_clips(table), judges)
            progress.update()
    write_judgements(options.out, judgements)


if __name__ == "__main__":
    run_cli(main)
