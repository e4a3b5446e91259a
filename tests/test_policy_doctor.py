"""The doctor lets sound policies pass and finds out what is wrong with twelve unsound ones, over the real wire."""

from __future__ import annotations

import csv
import socket
import subprocess
import sys
import threading
from collections import defaultdict

import numpy as np
import pytest

from tests.chain import ROOT
from workflow_src import embodiments
from workflow_src.common.seeds import rng
from workflow_src.policies import doctor
from workflow_src.policies.client import connect
from workflow_src.policies.server import PolicyServer
from workflow_src.policies.wire import Metadata


class Sound:
    """A policy in good health: its actions follow the image, the words, the seed and the image before."""

    metadata = Metadata(
        name="p", control_rate=5.0, chunk=2, batched=True, batch=4, revision="r", history=2, extra={"sampling": True}
    )

    def __init__(self):
        self.seen = defaultdict(float)

    def act(self, observation):
        rows = [self.row(observation, row) for row in range(len(observation))]
        return {"actions": np.stack(rows).astype(np.float32)}

    def row(self, observation, row):
        seen, episode, step = self.see(observation, row), int(observation.episode[row]), int(observation.step[row])
        before = self.seen[episode] if step else seen
        self.seen[episode] = seen
        actions = 0.01 * rng(self.seed(observation, row), step).uniform(-1, 1, (2, 7))
        actions[:, 0] += 0.01 * seen + 0.002 * before
        actions[:, 1] += 0.001 * len(self.heard(observation, row))
        actions[:, 6] = self.opening(seen)
        return actions

    def see(self, observation, row):
        return observation.image[row].mean() / 255

    def heard(self, observation, row):
        return observation.prompt[row]

    def seed(self, observation, row):
        return int(observation.seed[row])

    def opening(self, seen):
        return seen


class Blind(Sound):
    finds = ("image",)

    def see(self, observation, row):
        return 0.5


class Collapsed(Sound):
    """Sees no more than rounding, as a network may whose training has collapsed."""

    finds = ("image",)

    def see(self, observation, row):
        return 0.5 + 1e-7 * super().see(observation, row)


class Deaf(Sound):
    finds = ("instruction",)

    def heard(self, observation, row):
        return ""


class Unseeded(Sound):
    finds = ("same_seed", "batch", "episodes")

    def seed(self, observation, row):
        return int(np.random.default_rng().integers(1 << 30))


class OneNoise(Sound):
    """Draws from a fixed key, as a runner with PRNGKey(0) does."""

    finds = ("other_seed",)

    def seed(self, observation, row):
        return 0


class Scaled(Sound):
    """Answers in a world model's units."""

    finds = ("range_of_actions",)

    def act(self, observation):
        reply = super().act(observation)
        reply["actions"][..., :6] *= 35
        return reply


class PlusMinusGripper(Sound):
    finds = ("gripper",)

    def opening(self, seen):
        return 1 - 4 * seen


class Forgetful(Sound):
    """Keeps one history for all episodes."""

    finds = ("episodes",)

    def row(self, observation, row):
        observation.episode[row] = 0
        return super().row(observation, row)


class Haunted(Sound):
    """Begins an episode with what it remembers of an earlier one of that number."""

    finds = ("episodes",)

    def row(self, observation, row):
        self.seen.setdefault(int(observation.episode[row]), self.see(observation, row))
        observation.step[row] += 1
        return super().row(observation, row)


class BatchNormalised(Sound):
    finds = ("batch",)

    def see(self, observation, row):
        return (observation.image[row].mean() / max(observation.image.mean(), 1)) / 4


class Nameless(Sound):
    finds = ("metadata",)
    metadata = Metadata(name="p", control_rate=20.0, chunk=2, batched=True, batch=4, extra={"sampling": True})


class NotANumber(Sound):
    finds = ("answer",)

    def opening(self, seen):
        return np.nan


class JointSpace(Sound):
    finds = ("answer",)

    def act(self, observation):
        return {"actions": np.zeros((len(observation), 2, 8), np.float32)}


BROKEN = (
    Blind,
    Collapsed,
    Deaf,
    Unseeded,
    OneNoise,
    Scaled,
    PlusMinusGripper,
    Forgetful,
    Haunted,
    BatchNormalised,
    Nameless,
    NotANumber,
    JointSpace,
)


def findings_of(policy, **options):
    listener = socket.create_server(("127.0.0.1", 0))
    server = PolicyServer(listener, "token")
    threading.Thread(target=server.run, args=(lambda: policy,), daemon=True).start()
    frames, prompts = doctor.fixtures(None, 16)
    frames = np.uint8(frames * np.linspace(0.2, 0.9, len(frames))[:, None, None, None])
    with connect(f"ws://127.0.0.1:{listener.getsockname()[1]}", 10, "token", policy="p") as client:
        patient = doctor.Patient(client, embodiments.get(options.get("embodiment", "widowx")), frames, prompts)
        return {finding.check: finding for finding in doctor.examine(patient)}


def test_a_sound_policy_passes_all_checks():
    findings = findings_of(Sound())
    assert list(findings) == [check.__name__ for check in doctor.CHECKS]
    assert {name: finding.passed for name, finding in findings.items() if not finding.passed} == {"speed": None}


@pytest.mark.parametrize("policy", BROKEN, ids=lambda policy: policy.__name__)
def test_a_broken_policy_is_found_out(policy):
    failed = tuple(name for name, finding in findings_of(policy()).items() if finding.passed is False)
    assert failed == policy.finds


def test_published_quantiles_are_taken_where_they_are_known():
    class Known(Sound):
        metadata = Metadata(
            name="p", control_rate=5.0, chunk=2, batched=True, batch=4, revision="r", history=2,
            extra={"sampling": True, "q01": [-0.02] * 6 + [0], "q99": [0.03] * 6 + [1]},
        )  # fmt: skip

    assert "100% within the training data's range" in findings_of(Known())["range_of_actions"].said
    # In LIBERO's units 0.03 is 1.5 mm and 0.015 rad.
    assert findings_of(Known(), embodiment="libero")["range_of_actions"].passed is False


def test_who_says_that_it_is_blind_may_be():
    class Walker(Blind):
        metadata = Metadata(
            name="p", control_rate=5.0, chunk=2, batched=True, batch=4, revision="r", extra={"blind": True}
        )

    findings = findings_of(Walker())
    assert (findings["image"].passed, findings["instruction"].passed) == (True, None)
    assert findings["other_seed"].passed is None  # it does not say whether it samples


def test_who_says_that_it_is_deaf_may_be():
    class OneTask(Deaf):
        metadata = Metadata(
            name="p",
            control_rate=5.0,
            chunk=2,
            batched=True,
            batch=4,
            revision="r",
            extra={"deaf": True, "sampling": True},
        )

    findings = findings_of(OneTask())
    assert findings["instruction"].passed is None and findings["image"].passed is True


def run(*arguments, cwd):
    command = [sys.executable, "-m", "workflow_src.policies.doctor", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)


def test_command_serves_the_policy_and_writes_the_table(tmp_path):
    (tmp_path / "c.yaml").write_text("policies: {walk: {adapter: tabletop_random}}")
    done = run("walk", "--config", "c.yaml", "--out", "doctor.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["check"]: row for row in csv.DictReader((tmp_path / "doctor.csv").read_text().splitlines())}
    assert list(rows) == [check.__name__ for check in doctor.CHECKS]
    assert rows["same_seed"]["outcome"] == "passed" and "differs by" in rows["other_seed"]["finding"]
    assert "gripper           passed" in done.stdout


def test_command_says_in_one_line_what_failed(tmp_path):
    (tmp_path / "c.yaml").write_text("lab: {embodiment: droid}\npolicies: {walk: {adapter: tabletop_random}}")
    done = run("walk", "--config", "c.yaml", "--embodiment", "libero", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: policy walk: 1 of 12 checks failed: metadata"
    assert "control_rate is 15.0, not libero's 20.0" in done.stdout
    done = run("bc", "--config", "c.yaml", cwd=tmp_path)
    assert "error: policies: 'bc' is unknown" in done.stderr and done.returncode == 2


def test_fixtures_are_first_frames_of_several_tasks(tmp_path):
    from PIL import Image

    for task in ("lift", "push"):
        for index in range(4):
            (tmp_path / task).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / task / f"{index}.png")
            (tmp_path / task / f"{index}.json").write_text(f'{{"instruction": "{task} it"}}')
    frames, prompts = doctor.fixtures(tmp_path / "trials.json", 99)
    assert prompts == ["lift it", "push it"] * 3 and frames.shape == (6, 8, 8, 3) and frames[2, 0, 0, 0] == 1
