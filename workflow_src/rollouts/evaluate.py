"""Evaluate one policy on a folder of first frames in a world model, in one command, as WorldGym's runners do.

Serves the policy, rolls it out, has a vision-language model judge the videos and prints success per task. What is finished is
not done again: the same command continues. Rankings of several policies are the workflow's business (`rehearse`).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workflow_src.common import sections
from workflow_src.common.addresses import check_address
from workflow_src.common.config import check_name, load_stage, write_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import copy_file, sha256_file
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import say
from workflow_src.policies.adapter import ADAPTERS
from workflow_src.policies.client import connect
from workflow_src.policies.hosting import ROOT, served
from workflow_src.rollouts.gather import gather
from workflow_src.rollouts.records import read_records
from workflow_src.rollouts.run import run, use_devices
from workflow_src.rollouts.trials import LISTING, load_trials

if TYPE_CHECKING:
    from workflow_src.analysis.study import Study

EXAMPLES = """examples:
  python -m workflow_src.rollouts.evaluate openvla --root-dir TASKS --checkpoint-path WM --model-name openvla-7b \\
      --save-video --video-out-dir videos
  rehearse-octo --root-dir TASKS --checkpoint-path results/world_model --model-name octo-small-1.5 --python ENV/bin/python
"""
ALIASES = {"rt1": "rt1x"}  # WorldGym's name → adapter
# Names that WorldGym's commands take → checkpoints. Anything else is a hub name or a folder.
MODELS = {
    "openvla-7b": "openvla/openvla-7b",
    "openvla-v01-7b": "openvla/openvla-v01-7b",
    "octo-base-1.5": "hf://rail-berkeley/octo-base-1.5",
    "octo-small-1.5": "hf://rail-berkeley/octo-small-1.5",
    "spatialvla-4b-224-pt": "IPEC-COMMUNITY/spatialvla-4b-224-pt",
}
JUDGE = "judge"  # its name among judges.vlm
PROMPT = ROOT / "config" / "prompts" / "success_1.yaml"


def arguments(family: str | None) -> argparse.Namespace:
    """Command-line arguments; `family` of a command that is for one family alone."""
    parser = argparse.ArgumentParser(
        prog=f"rehearse-{family}" if family else "python -m workflow_src.rollouts.evaluate",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if family is None:
        parser.add_argument("family", help=f"policy family: {', '.join(sorted({*ADAPTERS, *ALIASES}))}")
    add = parser.add_argument
    add("--root-dir", type=Path, required=True, help="folder of <task>/<name>.png + <name>.json")
    add("--checkpoint-path", type=Path, required=True, help="world model: its folder, or a published .pt file")
    add("--model-name", default="", help="policy's checkpoint: a known name, owner/name on the hub, or a folder")
    add("--python", default=sys.executable, help="interpreter of the policy's environment (default: this one)")
    add("--save-video", action="store_true", help="copy the videos to --video-out-dir, <task>/<name>.mp4")
    add("--video-out-dir", type=Path, default=Path("videos"))
    add("--rollout-length", type=int, default=40, help="environment steps, whatever the policy's chunk (default: 40)")
    add("--retries", type=int, default=1, help="rollouts per first frame, each with noise of its own (default: 1)")
    add("--batch", type=int, default=8, help="rollouts side by side; changes no result beyond rounding (default: 8)")
    add(
        "--fit",
        default="as_is",
        choices=["as_is", "letterbox", "crop", "stretch"],
        help="how frames get the model's size",
    )
    add("--seed", type=int, default=0)
    add("--revision", default="", help="commit of the policy's hub repository")
    add(
        "--statistics",
        default="",
        help="data set whose statistics un-normalise its actions (default: the embodiment's)",
    )
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16", "int8", "int4"])
    add("--device", default="", help="device of the policy (default: the GPU where there is one)")
    add("--offline", action="store_true", help="load the policy from disk alone")
    add("--file", action="append", default=[], metavar="NAME=PATH", help="further files of an adapter, e.g. rt1's code")
    add("--judge-model", default="gpt-4o", help="vision-language model; none: roll out only (default: gpt-4o)")
    add("--judge-url", default="https://api.openai.com/v1", help="its server; the key comes from OPENAI_API_KEY")
    add("--votes", type=int, default=5, help="times that each video is judged (default: 5)")
    add("--out", type=Path, help="folder for all results (default: results/evaluate/<family>/<model>)")
    return parser.parse_args()


def configure(options: argparse.Namespace, adapter: str, world_model: Path) -> sections.Config:
    """What a workflow's configuration would say of this evaluation."""
    from workflow_src.world_model.artefact import read_card

    card = read_card(world_model)
    if card.image[0] != card.image[1]:
        raise UserError(f"{world_model}: imagines {card.image[1]}x{card.image[0]} pixels; only squares are supported")
    for name in ("rollout_length", "retries", "batch", "votes"):
        if getattr(options, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')}: {getattr(options, name)} is impossible; it must be at least 1"
            )
    policy = sections.Policy(
        adapter=adapter, checkpoint=MODELS.get(options.model_name, options.model_name), revision=options.revision,
        statistics=options.statistics, dtype=options.dtype, device=options.device, offline=options.offline,
        files=dict(_pair(text) for text in options.file),
    )  # fmt: skip
    vlm = sections.Vlm(model=options.judge_model, base_url=options.judge_url, votes=options.votes)
    check_address("--judge-url", vlm.base_url)
    return sections.Config(
        seed=options.seed,
        lab=sections.Lab(
            scene="none", tasks=(), image_size=card.image[0], horizon=options.rollout_length, embodiment=card.embodiment
        ),
        policies={_name(options, adapter): policy},
        trials=sections.Trials(root=str(options.root_dir), fit=options.fit),
        rollouts=sections.Rollouts(repeats=options.retries, batch=options.batch),
        judges=sections.Judges(primary=JUDGE, vlm={JUDGE: vlm}),
    )


def _name(options: argparse.Namespace, adapter: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(options.model_name).name) or adapter


def _pair(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not name:
        raise UserError(f"--file: {text!r} is not of the form NAME=PATH")
    return name, path


def world_model_folder(checkpoint: Path, out: Path) -> Path:
    """The artefact at `checkpoint`: a folder, its `model.safetensors`, or a published file, which is imported once."""
    if checkpoint.is_dir() or checkpoint.suffix == ".safetensors":
        return checkpoint if checkpoint.is_dir() else checkpoint.parent
    if not checkpoint.is_file():
        raise UserError(f"--checkpoint-path: {checkpoint} is neither a world model's folder nor a published file")
    folder = out / f"world_model_{sha256_file(checkpoint)[:12]}"
    if not (folder / "model.safetensors").is_file():
        command = [sys.executable, "-m", "workflow_src.world_model.import_worldgym", checkpoint, "--out", folder]
        if code := subprocess.run(list(map(str, command)), env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode:
            sys.exit(code)  # it has said what is wrong
    return folder


def roll_out(config: sections.Config, options: argparse.Namespace, out: Path, world_model: Path) -> Path:
    """All rollouts in the world model; their table."""
    (name,) = config.policies
    stage = write_stage(
        out / "config", "policy", config, dict.fromkeys(("lab", "policies", "behaviour_cloning", "rollouts"))
    )
    table = out / "rollouts" / "rollouts.parquet"
    work = argparse.Namespace(
        policy=name, shard=0, shards=1, trials=out / "trials" / LISTING, world_model=world_model / "model.safetensors",
        lab_out=out / "rollouts" / "lab" / "rollouts.parquet", world_model_out=table,
    )  # fmt: skip
    settings = load_stage(stage)
    log = out / "server.log"
    with (
        served(Path(stage), name, out, out / "endpoint.json", log, options.python, gpus=1) as endpoint,
        connect(
            endpoint, config.rollouts.server_deadline, policy=name, step_timeout=config.rollouts.step_timeout
        ) as client,
    ):
        use_devices(client.devices)
        run(settings, work, client)
    return table


def copy_videos(table: Path, folder: Path) -> None:
    """`<folder>/<task>/<name>.mp4`, with `_r<repeat>` from the second rollout of a frame on."""
    rows = read_records(table)
    for row in rows.itertuples():
        repeat = f"_r{row.repeat}" if row.repeat else ""
        copy_file(row.video, folder / f"{row.trial_id}{repeat}.mp4")
    say(f"{folder}: {len(rows)} videos")


def judge(config: sections.Config, table: Path, out: Path) -> Study:
    """Judgements of all rollouts, ready for statistics."""
    from workflow_src.analysis import records
    from workflow_src.analysis.study import open_study
    from workflow_src.judges.interface import read_clips, write_judgements
    from workflow_src.judges.vlm import judge_parts, open_judge

    with open_judge(JUDGE, config.judges.vlm[JUDGE], PROMPT, out / "answers") as asked:
        write_judgements(
            out / "judgements.parquet", judge_parts(asked, lambda: iter([read_clips(table)]), len(read_records(table)))
        )
    judgements = records.load_judgements([out / "judgements.parquet"])
    stage = write_stage(
        out / "config", "analysis", config,
        {**dict.fromkeys(("policies", "judges", "trials", "analysis", "reality", "reality_names")),
         "lab": {"scene": "none", "tasks": sorted(judgements["task"].unique())}},
    )  # fmt: skip
    return open_study(load_stage(stage), judgements)


def report(study: Study) -> list[str]:
    """A line per task and one for all: rollouts, success, its standard error and Wilson interval.

    Rollouts of one first frame are clustered: they count as their effective number. In the last line each task counts alike.
    """
    from workflow_src.analysis.statistics import wilson
    from workflow_src.analysis.study import rates_of

    rates = rates_of(study.imagined)
    rate, size, n = rates.rate[0], rates.size[0], rates.n[0]
    rows = [*zip(study.tasks, n, rate, np.sqrt(rate * (1 - rate) / size), size)]
    error = np.sqrt((rate * (1 - rate) / size).sum()) / len(rate)
    rows.append(("all tasks", n.sum(), rate.mean(), error, rates.mean_size()[0]))
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'task':<{width}}  {'n':>4}  success  std.err.  {study.confidence:.0%} interval"]
    for name, count, mean, spread, effective in rows:
        low, high = wilson(mean, effective, study.confidence)
        lines.append(f"{name:<{width}}  {count:>4.0f}  {mean:>7.3f}  {spread:>8.3f}  [{low:.3f}, {high:.3f}]")
    if lost := int((~study.judgements["valid"]).sum()):
        lines.append(f"{lost} rollouts without a valid judgement are left out")
    return lines


def evaluate(family: str | None = None) -> None:
    """The command."""
    options = arguments(family)
    family = family or options.family
    check_name("family", family, {*ADAPTERS, *ALIASES})
    adapter = ALIASES.get(family, family)
    if shutil.which(options.python) is None:
        raise UserError(f"--python: {options.python!r} is no Python interpreter here; see envs/build.py")
    die_with_parent()
    out = options.out or Path("results") / "evaluate" / family / _name(options, adapter)
    asks = options.judge_model != "none"
    world_model = world_model_folder(options.checkpoint_path, out)
    config = configure(options, adapter, world_model)
    if asks:
        from workflow_src.judges.transport import find_key

        find_key(JUDGE, config.judges.vlm[JUDGE])  # now, not after hours of rollouts
    trials = write_stage(out / "config", "trials", config, dict.fromkeys(("lab", "trials")))
    gather(load_stage(trials), out / "trials", {})
    table = roll_out(config, options, out, world_model)
    if options.save_video:
        copy_videos(table, options.video_out_dir)
    if asks:
        print("\n".join(report(judge(config, table, out))))
    else:
        say(f"{table}: {len(load_trials(out / 'trials'))} first frames rolled out, nobody judged them")


def _command(family: str) -> Any:
    return lambda: run_cli(lambda: evaluate(family))


# The installed commands.
openvla, octo, spatialvla, rt1 = (_command(family) for family in ("openvla", "octo", "spatialvla", "rt1"))

if __name__ == "__main__":
    run_cli(evaluate)
