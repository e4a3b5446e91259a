"""Examines a policy end to end, over its wire, before anybody trusts a ranking with it.

Serves the named policy in this environment, or takes a server that is already running, asks it what only a sound one answers
alike, and prints a table. With a failed check the exit status is not 0.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from workflow_src import embodiments
from workflow_src.common.config import check_name, load, load_stage, write_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import atomic_path
from workflow_src.common.process import die_with_parent
from workflow_src.common.sections import Foreign, Policy
from workflow_src.common.seeds import rng
from workflow_src.policies.client import PolicyClient, PolicyError, connect
from workflow_src.policies.foreign import refusals, translator_of
from workflow_src.policies.hosting import served

EXAMPLES = """examples:
  python -m workflow_src.policies.doctor openvla --config config/worldgym.yaml --trials trials
  python -m workflow_src.policies.doctor --endpoint ws://127.0.0.1:8000 --embodiment widowx --image-size 256
"""
PROMPTS = ("put the carrot on the plate", "close the drawer")
FRAMES = 6  # looked at together
INSIDE = 0.8  # share of all numbers that must be plausible
SOUND = 1e-4  # m, rad: more of a difference is no rounding
NOTICED = 1e-6  # m, rad, parts of the gripper's way: no more of a difference is rounding


@dataclass(frozen=True)
class Finding:
    """Outcome of one check. `passed` is None where it could not be made or nothing is at stake."""

    check: str
    passed: bool | None
    said: str


@dataclass(frozen=True)
class Patient:
    """A served policy and what it is shown."""

    client: PolicyClient
    robot: embodiments.Embodiment
    frames: np.ndarray  # uint8 (N, H, W, 3)
    prompts: list[str]  # N instructions
    pose: tuple[float, ...] = (0, 0, 0, 0, 0, 0, 1)  # where the gripper is, for a policy that is told

    def ask(self, frames: np.ndarray, prompts: list[str], episode: Any = 0, step: int = 0, seed: Any = 1) -> np.ndarray:
        """Actions float32 (N, K, 7)."""
        rows = len(frames)
        numbers = {"episode": episode, "step": step, "seed": seed}
        observation = {name: np.broadcast_to(np.int64(value), rows).copy() for name, value in numbers.items()}
        if self.client.metadata.extra.get("needs_pose"):
            observation["pose"] = np.tile(np.array(self.pose, float), (rows, 1))
        return self.client.infer({"image": frames, "prompt": prompts, **observation})["actions"]

    def look(self, **numbers: Any) -> np.ndarray:
        """Actions at all frames, each an episode of its own."""
        return self.ask(self.frames, self.prompts, episode=np.arange(len(self.frames)), **numbers)


# ---- the checks: each says what it found, and whether that is sound --------------------------------------------------


def metadata(patient: Patient) -> tuple[bool | None, str]:
    """Units, rate, gripper and revision are what a rollout takes them for."""
    said, robot = patient.client.metadata, patient.robot
    wrong = [
        f"{name} is {found!r}, not {wanted}"
        for name, found, wanted, fits in (
            ("units", said.units, "metric", said.units == "metric"),
            ("gripper", said.gripper, "open_fraction", said.gripper == "open_fraction"),
            (
                "control_rate",
                said.control_rate,
                f"{robot.name}'s {robot.control_hz}",
                said.control_rate == robot.control_hz,
            ),
            ("revision", said.revision, "a name of what is served", bool(said.revision)),
            ("execution", said.execution, "first, all or ensemble", said.execution in ("first", "all", "ensemble")),
        )
        if not fits
    ]
    return not wrong, "; ".join(
        wrong
    ) or f"{said.control_rate:g} Hz, chunk {said.chunk}, {said.execution}, {said.revision}"


def answer(patient: Patient) -> tuple[bool | None, str]:
    """Shape and finiteness, which the client insists on."""
    actions = patient.look()
    return True, f"{actions.shape[1]} action(s) of {actions.shape[2]} finite numbers"


def image(patient: Patient) -> tuple[bool | None, str]:
    """A black and a white frame lead to different actions. transformers 4.50 makes OpenVLA ignore the image."""
    shape = (1, *patient.frames.shape[1:])
    black, white = (patient.ask(np.full(shape, value, np.uint8), patient.prompts[:1]) for value in (0, 255))
    if patient.client.metadata.extra.get("blind"):
        return bool(np.array_equal(black, white)), "says that it sees nothing"
    change = float(np.abs(black - white).max())
    return change > NOTICED, f"black and white frame differ by {change:.2g}"


def instruction(patient: Patient) -> tuple[bool | None, str]:
    """Two instructions at one frame lead to different actions."""
    said = patient.client.metadata.extra
    if said.get("blind") or said.get("deaf"):
        return None, "says that it hears nothing"
    different = list(dict.fromkeys(patient.prompts))
    if len(different) < 2:
        return None, "only one instruction is known here; give --trials of several tasks"
    rows = np.repeat(patient.frames[:1], len(different), 0)
    actions = patient.ask(rows, different)
    change = float(np.abs(actions - actions[:1]).max())
    return change > NOTICED, f"{len(different)} instructions differ by {change:.2g}"


def same_seed(patient: Patient) -> tuple[bool | None, str]:
    """The same question gets the same answer."""
    change = float(np.abs(patient.look(seed=3) - patient.look(seed=3)).max())
    return change == 0, f"asked twice: differs by {change:.2g}"


def other_seed(patient: Patient) -> tuple[bool | None, str]:
    """Another seed gets another answer from a policy that samples, the same one from any other."""
    change = float(np.abs(patient.look(seed=3) - patient.look(seed=4)).max())
    sampling = patient.client.metadata.extra.get("sampling")
    return (None if sampling is None else sampling == (change > 0)), f"another seed: differs by {change:.2g}"


def batch(patient: Patient) -> tuple[bool | None, str]:
    """A row's answer does not depend on its neighbours."""
    together, rows = patient.look(), range(len(patient.frames))
    alone = [patient.ask(patient.frames[row : row + 1], patient.prompts[row : row + 1], episode=row) for row in rows]
    change = float(np.abs(together - np.concatenate(alone)).max())
    return change < SOUND, f"alone and among {len(together)}: differs by {change:.2g}"


def episodes(patient: Patient) -> tuple[bool | None, str]:
    """What is remembered of one episode stays out of the others, and out of a later one of the same number."""
    first, second = patient.frames[:1], patient.frames[1:2]
    prompts = patient.prompts[:1]

    def two_steps(episode: int, between: Callable[[], Any] = lambda: None) -> np.ndarray:
        begun = patient.ask(first, prompts, episode, 0)
        between()
        return np.concatenate([begun, patient.ask(second, prompts, episode, 1)])

    undisturbed = two_steps(1000)
    disturbed = two_steps(1001, lambda: two_steps(1002))
    change = float(np.abs(undisturbed - disturbed).max() + np.abs(undisturbed - two_steps(1002)).max())
    return change < SOUND, f"beside another episode: differs by {change:.2g}"


def range_of_actions(patient: Patient) -> tuple[bool | None, str]:
    """Displacements are of a plausible size: within the training data's 1st to 99th percentile, widened by a quarter of it
    to either side, or twice the robot's largest step."""
    moves, robot, extra = patient.look()[..., :6].reshape(-1, 6), patient.robot, patient.client.metadata.extra
    high = 2 * np.array([robot.max_translation] * 3 + [robot.max_rotation] * 3)
    low, source = -high, f"twice {robot.name}'s largest step"
    if len(extra.get("q01", [])) >= 6 and len(extra.get("q99", [])) >= 6:
        known = (embodiments.from_recorded([*extra[name][:6], 0], robot.name)[:6] for name in ("q01", "q99"))
        low, high = known
        low, high, source = low - (high - low) / 4, high + (high - low) / 4, "the training data's range"
    share = float(((moves >= low) & (moves <= high)).mean())
    size = np.abs(moves).max(0)
    said = f"{share:.0%} within {source}; largest {size[:3].max() * 1000:.3g} mm, {size[3:].max():.3g} rad"
    return share >= INSIDE, said


def gripper(patient: Patient) -> tuple[bool | None, str]:
    """The seventh number is an opening from 0 to 1."""
    opening = patient.look()[..., 6]
    return bool(
        (opening >= 0).all() and (opening <= 1).all()
    ), f"opening from {opening.min():.2f} to {opening.max():.2f}"


def conversion(patient: Patient) -> tuple[bool | None, str]:
    """On the way into the world model nothing drifts and nothing is scaled: zero stays zero, and the gain is 1."""
    robot, worst = patient.robot, 0.0
    probe = np.zeros((7, 7), np.float32)
    probe[:, 6] = 1
    probe[range(6), range(6)] = [robot.max_translation / 2] * 3 + [robot.max_rotation / 2] * 3
    for name, convention in embodiments.SCALES:
        if name == robot.name:
            units = embodiments.to_world_model(probe, name, convention)
            worst = max(worst, float(np.abs(units[6, :6]).max()))
            back = embodiments.from_world_model(units, name, convention)[:, :7]
            worst = max(worst, float(np.abs(back[range(6), range(6)] / probe[range(6), range(6)] - 1).max()))
    return worst < SOUND, f"largest drift or error of the gain: {worst:.1g}"


def speed(patient: Patient) -> tuple[bool | None, str]:
    """Said, not judged."""
    began = time.perf_counter()
    patient.look()
    return None, f"{time.perf_counter() - began:.3f} s for {len(patient.frames)} rows"


CHECKS = (
    metadata, answer, image, instruction, same_seed, other_seed, batch, episodes, range_of_actions, gripper, conversion,
    speed,
)  # fmt: skip
REPEATED = (same_seed, other_seed, batch, episodes)  # these compare answers to one question


def examine(patient: Patient) -> Iterator[Finding]:
    """All findings, as they are made. An answer that is none fails its check; a dead server ends the examination."""
    said = patient.client.metadata.extra
    noisy = said.get("sampling") and said.get("seeded") is False
    for check in CHECKS:
        if noisy and check in REPEATED:
            yield Finding(check.__name__, None, "draws noise that cannot be seeded")
            continue
        try:
            passed, said = check(patient)
        except PolicyError as problem:
            yield Finding(check.__name__, False, str(problem).splitlines()[0])
            return
        yield Finding(check.__name__, passed, said)


# ---- what is shown --------------------------------------------------------------------------------------------------


def known_states(trials: Path | None) -> list[tuple[str, list[float] | None]]:
    """Name and `initial_state` of every trial; none where noise is shown."""
    root = trials and (trials.parent if trials.suffix == ".json" else trials)
    return [
        (f"{path.parent.name}/{path.stem}", json.loads(path.read_text(encoding="utf-8")).get("initial_state"))
        for path in (sorted(root.glob("*/*.json")) if root else [])
    ]


def fixtures(trials: Path | None, size: int) -> tuple[np.ndarray, list[str]]:
    """FRAMES frames with instructions: first frames of as many tasks as there are, or noise of `size` pixels."""
    if trials is None:
        noise = rng(0, "doctor").integers(0, 256, (FRAMES, size, size, 3), np.uint8)
        return noise, [PROMPTS[row % len(PROMPTS)] for row in range(FRAMES)]
    root = trials.parent if trials.suffix == ".json" else trials
    # One of each task in turn: names begin with the task.
    found = sorted(root.glob("*/*.png"), key=lambda path: (path.stem, path.parent.name))[:FRAMES]
    if len(found) < 2:
        raise UserError(f"{root}: holds fewer than two trials (<task>/<name>.png + .json)")
    frames = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in found])
    prompts = [json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["instruction"] for path in found]
    return frames, prompts


@contextlib.contextmanager
def serving(options: argparse.Namespace) -> Iterator[Path]:
    """Endpoint file of the policy `options.policy`, served by this very Python as long as the context lasts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, log = stage_file(options, folder), options.log or folder / "log"
        with served(config, options.policy, options.networks, folder / "endpoint.json", log) as endpoint:
            yield endpoint


def stage_file(options: argparse.Namespace, folder: Path) -> Path:
    """What the server reads: the given stage file, or one made of the given YAML configuration."""
    if options.config.suffix == ".json":
        return options.config
    config = load(options.config)
    check_name("policies", options.policy, config.policies)
    sections = dict.fromkeys(("lab", "policies", "behaviour_cloning", "rollouts"))
    return Path(write_stage(folder, "doctor", config, sections))


# ---- the program ----------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.policies.doctor",
        description=__doc__.split("\n", 1)[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("policy", nargs="?", default="", help="name of the policy in --config")
    parser.add_argument("--endpoint", help="instead: endpoint file or ws:// address of a running server")
    parser.add_argument("--config", type=Path, help="configuration (.yaml) or stage file (.json)")
    parser.add_argument("--networks", type=Path, default=Path("results/policies"), help="folder of trained networks")
    parser.add_argument("--trials", type=Path, help="folder of trials whose first frames are shown (default: noise)")
    parser.add_argument("--embodiment", help="robot whose actions it speaks (default: the configuration's)")
    parser.add_argument("--image-size", type=int, help="pixels of the noise (default: the configuration's)")
    parser.add_argument("--token-env", default="", help="environment variable that holds the server's token")
    parser.add_argument("--allow-plaintext", action="store_true", help="permit ws:// to another machine")
    parser.add_argument("--deadline", type=float, default=900, help="seconds the server may take to load")
    parser.add_argument("--log", type=Path, help="output of the server")
    parser.add_argument("--out", type=Path, help="table to write, CSV")
    options = parser.parse_args()
    if not options.endpoint and not (options.policy and options.config):
        parser.error("give the name of a policy with --config, or --endpoint")
    return options


def mapping(foreign: Foreign, states: list[tuple[str, list[float] | None]], told: bool | None = False) -> list[Finding]:
    """Why the policy cannot be rolled out at all, shown; see `foreign.refusals`."""
    findings = [Finding("mapping", False, line) for line in refusals(foreign, states, told)]
    for finding in findings:
        show(finding)
    return findings


def write_table(path: Path, findings: list[Finding]) -> None:
    """A row per check: check, outcome (passed, failed, not judged), finding."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["check", "outcome", "finding"])
        writer.writerows([one.check, outcome(one), one.said] for one in findings)


def show(finding: Finding) -> None:
    print(f"{finding.check.replace('_', ' '):18}{outcome(finding):12}{finding.said}", flush=True)


def outcome(finding: Finding) -> str:
    return {True: "passed", False: "failed", None: "not judged"}[finding.passed]


def main() -> None:
    """Entry point."""
    options = arguments()
    die_with_parent()
    known = (load_stage if options.config.suffix == ".json" else load)(options.config) if options.config else None
    robot = embodiments.get(options.embodiment or (known.lab.embodiment if known else "widowx"))
    frames, prompts = fixtures(options.trials, options.image_size or (known.lab.image_size if known else 256))
    policy = known.policies.get(options.policy, Policy()) if known else Policy()
    states = known_states(options.trials)
    findings = mapping(policy.foreign, states)
    if not findings:
        with contextlib.ExitStack() as stack:
            endpoint = options.endpoint or stack.enter_context(serving(options))
            token = os.environ.get(options.token_env) if options.token_env else None
            client = stack.enter_context(connect(
                endpoint, options.deadline, token, policy=options.policy, allow_plaintext=options.allow_plaintext,
                translator=translator_of(policy),
            ))  # fmt: skip
            needs_pose = client.metadata.extra.get("needs_pose")
            if not (findings := mapping(policy.foreign, states, needs_pose)):
                pose = {"pose": tuple(states[0][1])} if states and needs_pose else {}
                for finding in examine(Patient(client, robot, frames, prompts, **pose)):
                    findings.append(finding)
                    show(finding)
    if options.out:
        write_table(options.out, findings)
    if failed := [finding.check for finding in findings if finding.passed is False]:
        name = options.policy or options.endpoint
        raise UserError(f"policy {name}: {len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")


if __name__ == "__main__":
    run_cli(main)
