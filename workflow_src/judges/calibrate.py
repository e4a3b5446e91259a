"""Try judges on clips with known labels: as recorded, clipped, with swapped instructions, reversed, shuffled."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from workflow_src.common.config import Stage, check_name, load_stage
from workflow_src.common.errors import run_cli
from workflow_src.common.files import atomic_path
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import say
from workflow_src.judges.interface import Judgement
from workflow_src.judges.probes import KINDS, Probe, make_probes
from workflow_src.judges.score import make_judges
from workflow_src.judges.vlm import estimate, judge_parts, open_judge

EXAMPLES = """examples:
  python -m workflow_src.judges.calibrate --config results/config/judges.json --weights results/judge/model.safetensors \\
      --rollouts results/rollouts/lab/*/shard_*/rollouts.parquet --count 60 --out results/calibration/learned.parquet
  python -m workflow_src.judges.calibrate --config results/config/judges/gpt.json --vlm gpt \\
      --prompt config/prompts/success_1.yaml --cache results/state/judgements/gpt \\
      --rollouts results/rollouts/lab/*/shard_*/rollouts.parquet --count 60 --out results/calibration/gpt.parquet
"""


def judge_probes(stage: Stage, options: argparse.Namespace, probes: Sequence[Probe]) -> list[Judgement]:
    """What the judges of the command line say: every judge about all probes, in their order."""
    clips = [probe.clip for probe in probes]
    if options.weights:
        return [judgement for judge in make_judges(stage, options.weights) for judgement in judge.judge(clips)]
    with open_judge(options.vlm, stage.judges.vlm[options.vlm], options.prompt, options.cache) as judge:
        return judge_parts(judge, lambda: iter([clips]), len(clips))


def table_of(probes: Sequence[Probe], judgements: Sequence[Judgement]) -> pd.DataFrame:
    """One row per judge and probe: `label` is what the clip shows, `success_at_end` what the judge said of it."""
    rows = [
        {
            "judge": said.judge, "probe": probe.kind, "policy": said.policy, "task": probe.clip.task,
            "trial_id": said.trial_id, "repeat": said.repeat, "label": probe.label,
            "success_at_end": said.success_at_end, "score": said.score,
        }
        for said, probe in zip(judgements, list(probes) * (len(judgements) // len(probes)))
    ]  # fmt: skip
    return pd.DataFrame(rows).astype({"success_at_end": "boolean", "score": "Float64"})


def confusion(table: pd.DataFrame) -> str:
    """The confusion matrices as lines: judge, kind of probe, and how often which label met which verdict."""
    lines = [f"{'judge':<12} {'probe':<10} true+  missed  false+  true-  undecided"]
    for judge, own in table.groupby("judge", sort=False):
        for kind in KINDS:
            part = own[own["probe"] == kind]
            said, label = part["success_at_end"], part["label"]
            yes, no = said.fillna(False).astype(bool), (~said).fillna(False).astype(bool)
            counts = [(yes & label).sum(), (no & label).sum(), (yes & ~label).sum(), (no & ~label).sum()]
            cells = zip((*counts, said.isna().sum()), (5, 7, 7, 6, 10))
            lines.append(f"{judge:<12} {kind:<10} " + " ".join(f"{count:>{width}}" for count, width in cells))
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.judges.calibrate",
        description=__doc__.strip(),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="stage file with seed, lab, judges")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--weights", type=Path, help="model.safetensors of the learned judges")
    which.add_argument("--vlm", help="name of a vision-language model under judges.vlm in the configuration")
    parser.add_argument("--prompt", type=Path, help="with --vlm: prompt file")
    parser.add_argument("--cache", type=Path, help="with --vlm: folder that keeps answers from run to run")
    parser.add_argument("--rollouts", type=Path, nargs="+", required=True, help="rollouts.parquet files of the lab")
    parser.add_argument("--count", type=int, required=True, help="lab rollouts to make probes from")
    parser.add_argument("--out", type=Path, required=True, help="parquet to write, one row per judge and probe")
    parser.add_argument("--dry-run", action="store_true", help="with --vlm: print what asking would cost; ask nothing")
    options = parser.parse_args()
    if options.vlm and not (options.prompt and options.cache):
        parser.error("--vlm needs --prompt and --cache")
    if options.dry_run and not options.vlm:
        parser.error("--dry-run needs --vlm: the other judges cost nothing")
    die_with_parent()
    stage = load_stage(options.config)
    if options.vlm:
        check_name("--vlm", options.vlm, stage.judges.vlm)
    probes = make_probes(options.rollouts, stage.lab.scene, stage.lab.tasks, options.count, stage.seed)
    if options.dry_run:
        clips, settings = [probe.clip for probe in probes], stage.judges.vlm[options.vlm]
        print(estimate(options.vlm, settings, options.prompt, options.cache, lambda: iter([clips])))
        return
    table = table_of(probes, judge_probes(stage, options, probes))
    with atomic_path(options.out) as temporary:
        table.to_parquet(temporary, index=False)
    say(confusion(table))


if __name__ == "__main__":
    run_cli(main)
