"""When something goes wrong: servers that misbehave, kills anywhere, damaged files, a full disk, changed shell text."""

from __future__ import annotations

import errno
import inspect
import os
import re
import subprocess
import sys
import textwrap

import pytest
import yaml

from tests.chain import (
    MINI,
    ROOT,
    assert_nobody_left,
    copy_of,
    copy_project,
    errors,
    rollouts,
    run,
)
from workflow_src.common.files import atomic_path, sha256_file
from workflow_src.execution import servers_at_once
from workflow_src.workflow import WORLDS

# A random walk that can be told to misbehave: `options` say how, `kills_…` only once.
ADAPTER = """
    import ctypes, os, signal, time
    from dataclasses import replace
    from pathlib import Path
    from workflow_src.policies import tabletop_random

    IGNORE = ctypes.c_void_p(1)

    class Awkward:
        def __init__(self, inner, options):
            self.inner, self.options, self.metadata, self.calls = inner, options, inner.metadata, 0

        def act(self, observation):
            self.calls += 1
            if self.calls == 6:  # four rollouts are finished and written, the others are on their way
                self.misbehave()
            return self.inner.act(observation)

        def misbehave(self):
            if self.options.get("dies"): os._exit(9)
            if self.options.get("hangs"): time.sleep(1000)
            if self.options.get("kills_server") and first("server"): os.kill(os.getpid(), signal.SIGKILL)
            if self.options.get("kills_rollout") and first("rollout"):
                for entry in Path("/proc").glob("[0-9]*"):
                    words = command(entry)
                    if "workflow_src.rollouts.run" in words and "kills_rollout" in words:
                        os.kill(int(entry.name), signal.SIGKILL)

    def command(entry):
        try:
            return (entry / "cmdline").read_text(errors="replace").split("\\0")
        except OSError:
            return []

    def first(name):
        try:
            Path(name + ".killed").touch(exist_ok=False)
            return True
        except FileExistsError:
            return False

    def load(policy, networks, lab, seed, batch):
        options = policy.options
        if options.get("stubborn"):  # as a framework may do it, in C
            libc = ctypes.CDLL(None)
            libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
            libc.signal(signal.SIGTERM, IGNORE)
        time.sleep(options.get("load_seconds", 0))
        if options.get("raises"): raise RuntimeError("weights are damaged")
        if options.get("exits"): os._exit(9)
        inner = tabletop_random.load(replace(policy, options={}), networks, lab, seed, batch)
        return Awkward(inner, options)
"""
LATENCY_WAIT = 5  # seconds that Snakemake waits for a file
POLICIES = {
    "late": {"load_seconds": LATENCY_WAIT + 1},
    "stubborn": {"stubborn": 1},
    "kills_server": {"kills_server": 1},
    "kills_rollout": {"kills_rollout": 1},
    "raises": {"raises": 1},
    "exits": {"exits": 1},
    "dies": {"dies": 1},
    "hangs": {"hangs": 1, "stubborn": 1},
    "loads_for_ever": {"load_seconds": 1000, "stubborn": 1},
}
FAILURES = {
    "raises": r"error: policy raises: its server ended while loading",
    "exits": r"error: policy exits: its server ended while loading",
    "dies": r"error: trials .*, step 1: policy dies: its server died",
    "hangs": r"error: trials .*, step 1: policy hangs: no answer within 4 s",
    "loads_for_ever": r"error: policy loads_for_ever: its server was not ready within 9 s \(last stage: loading",
}


def test_servers_that_misbehave_fail_alone(finished, tmp_path):
    """A run with `-k` of nine kinds of servers: it ends; good ones give their rollouts, bad ones a clear line each."""
    folder, project = copy_of(finished, tmp_path / "run"), copy_project(tmp_path / "project")
    (project / "workflow_src" / "policies" / "awkward.py").write_text(textwrap.dedent(ADAPTER))
    config = yaml.safe_load(MINI.read_text())
    config["policies"] = {name: {"adapter": "awkward", "options": options} for name, options in POLICIES.items()}
    config["rollouts"] |= {"step_timeout": 4, "server_deadline": 9}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    targets = [f"results/rollouts/lab/{policy}/shard_0/rollouts.parquet" for policy in POLICIES]
    # More cores than there are, so that all are served, and waited for, side by side.
    done = run(folder, "-k", *targets, check=False, config=tmp_path / "config.yaml", project=project, cores=40)

    assert_nobody_left(folder)
    assert done.returncode == 1
    for world in WORLDS:
        reference = rollouts(finished, "random", world)
        for policy in POLICIES:
            table = rollouts(folder, policy, world)
            assert (table is None) == (policy in FAILURES), policy
            # A retry after a kill continues; all are the same random walk.
            assert table is None or table.equals(reference), (policy, world)
    said = errors(done)
    for policy, line in FAILURES.items():
        # One for each attempt, where they differ in the trial they came to.
        mine = [error for error in said if f"policy {policy}:" in error]
        assert mine and all(re.match(line, error) for error in mine), (policy, said)
    # Policies that were killed once are named as well, and nobody else.
    named = {re.search(r"policy (\w+):", error)[1] for error in said}
    assert named == {*FAILURES, "kills_server"}
    assert not (folder / "results" / "endpoints").exists() or not any(
        (folder / "results" / "endpoints").rglob("*.json")
    )


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 8, 16, 64])
def test_snakemake_has_a_thread_for_every_server_it_starts(cores):
    """A server that waited for a thread would miss its deadline, and hang the run once it got one."""
    from snakemake.executors import local

    assert "workers = cores + 5" in inspect.getsource(local), "another pool: adapt servers_at_once"
    served = servers_at_once(cores)
    assert served >= min(cores, 2)
    # Server, rollouts and their group; and a thread for every job on the other cores, of which few run that late.
    assert 3 * served + min(cores - served, 3) <= cores + 5


# Right after this file is there, this process gets SIGKILL. Each run continues the one before; each file depends on the
# one above, so no earlier run can have made it.
KILLS = [
    ("*/train/000000004.mp4", "snakemake"),
    ("*/state/tokenizer/step_000000003.json", "self"),
    ("*/latents/tabletop/train/latents.json", "snakemake"),  # a declared output, whole, of a job that did not finish
    ("*/state/world_model/step_000000003.json", "parent"),  # torchrun
    ("*/rollouts/world_model/*__r0.npz", "snakemake"),
]


def test_a_run_killed_again_and_again_ends_with_the_same_rollouts(finished, tmp_path):
    """`kill -9` of Snakemake, a trainer, torchrun while recording, training, rolling out; then the same command.

    One policy stands for all: what it did in the world model depends on every weight that came before.
    """
    folder, project = tmp_path / "run", copy_project(tmp_path / "project")
    folder.mkdir()
    config = yaml.safe_load(MINI.read_text())
    config["policies"] = {"random": config["policies"]["random"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = [
        sys.executable, "-m", "workflow_src.launch", "results/rollouts/lab/random/shard_0/rollouts.parquet",
        "--cores", "2", "--configfile", str(tmp_path / "config.yaml"),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(project)}
    for pattern, victim in KILLS:
        fault = {"KILL_AFTER": pattern, "KILL_WHOM": victim}
        done = subprocess.run(command, cwd=folder, env=environment | fault, capture_output=True, text=True, check=False)
        assert done.returncode == (128 + 9 if victim == "snakemake" else 1), (pattern, done.stderr[-3000:])
        assert "the same command continues" in done.stderr
        assert_nobody_left(folder)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "removing its lock" in done.stderr
    for world in WORLDS:
        assert rollouts(folder, "random", world).equals(rollouts(finished, "random", world)), world


def test_a_damaged_episode_is_named_and_recording_again_mends_it(finished, tmp_path):
    folder = copy_of(finished, tmp_path / "run", "tokenizer/model.safetensors", "state/tokenizer")
    store = folder / "results" / "episodes" / "tabletop" / "train"
    video = store / "000000003.mp4"
    content = bytearray(video.read_bytes())
    content[len(content) // 2] ^= 1
    video.write_bytes(content)
    done = run(folder, "results/tokenizer/model.safetensors", check=False)
    assert done.returncode == 1
    assert errors(done) == [
        "error: results/episodes/tabletop/train/000000003.mp4: damaged (its SHA-256 is not the one in "
        "episodes.parquet); delete episodes.parquet and record again"
    ]
    (store / "episodes.parquet").unlink()
    run(folder, "results/episodes/tabletop/train/episodes.parquet")
    assert sha256_file(video) == sha256_file(finished / video.relative_to(folder))


def test_a_truncated_checkpoint_is_skipped_and_changes_nothing(finished, tmp_path):
    import numpy as np
    from safetensors.numpy import load_file

    model = "results/world_model/model.safetensors"
    folder = copy_of(finished, tmp_path / "run", "world_model/model.safetensors")
    newest = max((folder / "results" / "state" / "world_model").glob("step_*.safetensors"))
    os.truncate(newest, newest.stat().st_size // 2)
    done = run(folder, model)
    assert re.search(rf"warning: \S*{newest.name} is damaged .*; trying an older checkpoint", done.stdout + done.stderr)
    resumed, uninterrupted = load_file(folder / model), load_file(finished / model)
    assert resumed.keys() == uninterrupted.keys()
    assert all(np.array_equal(resumed[name], uninterrupted[name]) for name in resumed)


# ---- a full disk ----------------------------------------------------------------------------------------------------


# Every kind of file that a stage writes, by what writes it.
WRITERS = """
    import os, sys
    from pathlib import Path
    import numpy as np
    from workflow_src.common import files, video
    from workflow_src.common.errors import run_cli

    def safetensors(path):
        from safetensors.numpy import save_file
        with files.atomic_path(path) as temporary:
            save_file({"weights": np.zeros(1 << 21, np.uint8)}, temporary)

    def parquet(path):
        import pandas as pd
        with files.atomic_path(path) as temporary:
            pd.DataFrame({"noise": np.random.default_rng(0).random(1 << 18)}).to_parquet(temporary)

    def npy(path):
        with files.atomic_path(path) as temporary:
            np.save(temporary, np.zeros(1 << 21, np.uint8))

    def npz(path):
        with files.atomic_path(path) as temporary:
            np.savez(temporary, noise=np.zeros(1 << 21, np.uint8))

    def mp4(path):
        video.write_video(path, np.random.default_rng(0).integers(0, 256, (40, 128, 128, 3), dtype=np.uint8), 5)

    def png(path):
        from PIL import Image
        with files.atomic_path(path) as temporary:
            Image.fromarray(np.random.default_rng(0).integers(0, 256, (999, 999, 3), dtype=np.uint8)).save(temporary)

    def json(path):
        files.write_json(path, ["x" * 100] * 20000)

    def mapped(path):
        files.create_array(path.with_suffix(".npy"), (1 << 20,), np.float16)[:] = 1

    for kind in sys.argv[1:]:  # each in a process of its own, which has imported everything
        print(kind, file=sys.stderr, flush=True)
        if not os.fork():
            run_cli(lambda: globals()[kind](Path("file." + kind)))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.wait()[1]), *(path.name for path in Path().iterdir()), file=sys.stderr)
        for path in Path().iterdir():
            path.unlink()
"""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EDQUOT, "quota"),
        OSError("1024 requested and 512 written"),  # numpy
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
    ],
    ids=str,
)
def test_a_full_disk_leaves_no_half_file_and_names_the_whole_one(tmp_path, error):
    target = tmp_path / "out.bin"
    with pytest.raises(OSError, match=re.escape(str(target))) as raised, atomic_path(target) as path:
        path.write_bytes(b"half")
        raise error
    assert raised.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


@pytest.mark.requires("mount")
def test_whatever_is_written_to_a_full_disk_says_so_in_one_line(small_disk):
    kinds = re.findall(r"def (\w+)\(path\)", WRITERS)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WRITERS), *kinds],
        cwd=small_disk, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = []
    for kind in kinds:
        # What is mapped has no other name while it grows; its journal says what of it is true.
        name, left = ("file.npy", " file.npy") if kind == "mapped" else (f"file.{kind}", "")
        said += [
            kind,
            f"error: no space left on the device that holds {name}: free some and start again; finished work is kept",
            f"2{left}",
        ]
    assert done.stderr.splitlines() == said


@pytest.mark.requires("mount")
def test_a_run_on_a_full_disk_stops_with_one_line_and_continues_once_there_is_space(finished, small_disk):
    target = "results/episodes/tabletop/train/episodes.parquet"
    run(small_disk, "results/episodes/tabletop/validation/episodes.parquet")
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk)
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - 60_000))
    done = run(small_disk, target, check=False)
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: no space left on the device that holds \S+: free some and start again; finished work is kept",
        "\n".join(errors(done)),
    )
    assert not (small_disk / target).exists()
    ballast.unlink()
    run(small_disk, target)
    for index in range(10):
        name = f"results/episodes/tabletop/train/{index:09d}.mp4"
        assert sha256_file(small_disk / name) == sha256_file(finished / name)


# ---- what reruns expensive work -------------------------------------------------------------------------------------

EXPENSIVE = (
    "record_episodes", "train_tokenizer", "cache_latents", "train_world_model", "train_policy_network", "train_judge",
    "roll_out", "serve_policy",
)  # fmt: skip
GOLDEN = ROOT / "tests" / "golden" / "shell_text.txt"


def test_shell_text_of_expensive_rules_is_as_it_was(tmp_path, monkeypatch):
    """Snakemake reruns a rule, and all that depends on it, when one character of its shell text changes.

    If that is meant, write the text this test prints into tests/golden/shell_text.txt.
    """
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what is printed counts GPUs; what triggers a rerun does not
    printed = run(tmp_path, "--dry-run", "--printshellcmds", "results/tables/policy_ranking.csv").stdout
    jobs = re.findall(r"rule (\w+):\n(?:(?!Shell command).*\n)*?Shell command: (.*)", printed)
    text = {}
    for rule, shell in sorted(jobs):
        text.setdefault(rule, shell)  # of a rule's jobs the first by its text
    found = "".join(f"{rule}: {text[rule]}\n" for rule in EXPENSIVE)
    assert found == GOLDEN.read_text(), found
