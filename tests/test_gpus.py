"""GPUs of one machine: what is visible, that no two jobs share one, and that nobody waits for ever. All GPUs are made up."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chain import ROOT, assert_nobody_left
from workflow_src.common import gpus
from workflow_src.common.errors import UserError
from workflow_src.common.sections import Config
from workflow_src.execution import limit_gpus, local_gpus, shell_prefix
from workflow_src.workflow import Workflow

FOUR = tuple(f"GPU-{letter}" for letter in "abcd")
LISTING = """\
GPU 0: NVIDIA H200 (UUID: GPU-11)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-22)
  MIG 3g.20gb     Device  0: (UUID: MIG-22-1)
  MIG 1g.5gb      Device  1: (UUID: MIG-22-2)
GPU 2: NVIDIA H200 (UUID: GPU-33)
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """An `nvidia-smi` that lists the devices above."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}END\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv(gpus.MASK, raising=False)


# ---- what is visible ------------------------------------------------------------------------------------------------


def test_a_listing_of_whole_and_split_gpus():
    assert [(gpu.id, gpu.name, gpu.index) for gpu in gpus.parse_listing(LISTING)] == [
        ("GPU-11", "NVIDIA H200", 0),
        ("MIG-22-1", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", 1),
        ("MIG-22-2", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", 1),
        ("GPU-33", "NVIDIA H200", 2),
    ]


@pytest.mark.parametrize(
    ("mask", "visible"),
    [
        (None, ["GPU-11", "MIG-22-1", "MIG-22-2", "GPU-33"]),
        ("2,0", ["GPU-33", "GPU-11"]),
        ("MIG-22-2", ["MIG-22-2"]),
        ("1", ["MIG-22-1"]),
        ("GPU-3", ["GPU-33"]),
        ("0,GPU-11", ["GPU-11"]),
        ("0,7,2", ["GPU-11"]),
        ("-1", []),
        ("", []),
    ],
)
def test_the_mask_is_read_as_cuda_reads_it(driver, monkeypatch, mask, visible):
    if mask is not None:
        monkeypatch.setenv(gpus.MASK, mask)
    assert gpus.visible_gpus() == visible


def test_without_a_driver_the_mask_is_believed(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for mask, visible in {"1,0": ["1", "0"], "MIG-x,GPU-y": ["MIG-x", "GPU-y"], "NoDevFiles": [], "-1": []}.items():
        monkeypatch.setenv(gpus.MASK, mask)
        assert gpus.visible_gpus() == visible
    monkeypatch.delenv(gpus.MASK)
    assert gpus.visible_gpus() == []


# ---- leases ---------------------------------------------------------------------------------------------------------


def job(folder: Path, name: str, pool, count: int, seconds: float) -> int:
    """A process that leases, notes when it had which devices, and ends without giving anything back. Returns its id."""
    if (pid := os.fork()) == 0:
        try:
            held = gpus.lease(count, pool, folder / "leases", poll=0.002)
            begin = time.monotonic()
            time.sleep(seconds)
            entry = {"name": name, "held": held, "begin": begin, "end": time.monotonic()}
            (folder / f"{name}.noted").write_text(json.dumps(entry))
            (folder / f"{name}.noted").replace(folder / f"{name}.job")  # whole, also where a test kills in between
        finally:
            os._exit(0)
    return pid


def finish(folder: Path, pids: list[int], seconds: float = 60) -> list[dict]:
    """What all jobs noted, by begin. Fails when one is still waiting after `seconds`."""
    end = time.monotonic() + seconds
    left = set(pids)
    while left:
        left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
        if time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{len(left)} jobs wait for ever")
        time.sleep(0.005)
    noted = [json.loads(file.read_text()) for file in folder.glob("*.job")]
    return sorted(noted, key=lambda entry: entry["begin"])


def assert_no_overlap(noted: list[dict]) -> None:
    for i, one in enumerate(noted):
        for other in noted[i + 1 :]:
            shared = set(one["held"]) & set(other["held"])
            assert not shared or other["begin"] >= one["end"], (shared, one, other)


jobs = st.lists(
    st.tuples(st.sets(st.sampled_from(FOUR), min_size=2), st.integers(1, 2), st.integers(0, 15), st.booleans()),
    min_size=2,
    max_size=9,
)


@settings(max_examples=15, deadline=None)
@given(jobs)
def test_no_two_jobs_share_a_device_and_all_get_theirs(several):
    """Mixed 1- and 2-GPU jobs with masks of their own; some are killed while they wait or work."""
    with tempfile.TemporaryDirectory() as name:
        folder, pids, killed = Path(name), [], 0
        for i, (pool, count, milliseconds, kill) in enumerate(several):
            pids.append(job(folder, f"job_{i}", sorted(pool), count, milliseconds / 1000))
            if kill:
                time.sleep(random.random() / 100)
                os.kill(pids[-1], signal.SIGKILL)
                killed += 1
        noted = finish(folder, pids)
        assert len(noted) >= len(several) - killed
        for entry in noted:
            pool, count, *_ = several[int(entry["name"].removeprefix("job_"))]
            assert len(set(entry["held"])) == count and set(entry["held"]) <= pool
        assert_no_overlap(noted)
        assert killed or not list((folder / "leases").glob("*.waiting"))


def waiting(folder: Path) -> int:
    return len(list((folder / "leases").glob("*.waiting")))


def until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def working(folder: Path, device: str) -> int:
    """A job that has `device` until it is killed."""
    pid = job(folder, "holder", [device], 1, 60)
    until(lambda: (folder / "leases" / f"{device}.gpu").exists() and not waiting(folder))
    return pid


def test_a_job_for_two_is_not_starved_by_jobs_for_one(tmp_path):
    """Whoever came later waits, even where a device is free; whoever can use none of those two does not."""
    folder, pool = tmp_path, FOUR[:2]
    holder = working(folder, pool[0])
    pids = [job(folder, "two", pool, 2, 0.01)]
    until(lambda: waiting(folder) == 1)
    pids += [job(folder, f"one_{i}", pool, 1, 0.01) for i in range(4)]
    until(lambda: waiting(folder) == 5)
    pids.append(job(folder, "elsewhere", FOUR[1:3], 1, 0.01))
    until((folder / "elsewhere.job").is_file)
    assert waiting(folder) == 5 and len(list(folder.glob("*.job"))) == 1
    os.kill(holder, signal.SIGKILL)
    noted = finish(folder, [holder, *pids])
    assert [entry["name"] for entry in noted[:2]] == ["elsewhere", "two"] and noted[0]["held"] == [FOUR[2]]
    assert_no_overlap(noted)


def test_a_killed_job_frees_its_devices_and_its_place_in_the_queue(tmp_path):
    holder = working(tmp_path, FOUR[0])
    waiter = job(tmp_path, "waiter", FOUR[:1], 1, 60)
    until(lambda: waiting(tmp_path) == 1)
    last = job(tmp_path, "last", FOUR[:1], 1, 0)
    until(lambda: waiting(tmp_path) == 2)
    for pid in (waiter, holder):
        os.kill(pid, signal.SIGKILL)
    assert [entry["name"] for entry in finish(tmp_path, [holder, waiter, last])] == ["last"]


@pytest.mark.parametrize(
    ("pool", "line"),
    [
        (["GPU-a"], "2 GPUs are asked for and 1 visible (GPU-a); ask for fewer"),
        (
            ["MIG-a", "MIG-b"],
            "2 GPUs are asked for, but a process can use only one instance of a split GPU (MIG); ask for 1",
        ),
    ],
)
def test_what_can_never_be_had_is_refused(tmp_path, pool, line):
    with pytest.raises(UserError) as caught:
        gpus.lease(2, pool, tmp_path)
    assert str(caught.value) == line


# ---- launcher -------------------------------------------------------------------------------------------------------

SHOW = "import os; print(os.getpid(), os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['OMP_NUM_THREADS'])"


def launch(tmp_path: Path, count: int, *command: str, **environment: str) -> tuple[int, subprocess.CompletedProcess]:
    inherited = {key: value for key, value in os.environ.items() if key not in (gpus.MASK, "SLURM_JOB_ID", gpus.POOL)}
    settings = {"REHEARSAL_LEASES": str(tmp_path / "leases"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "8"}
    process = subprocess.Popen(
        [sys.executable, "-m", "workflow_src.common.gpus", str(count), *(command or (sys.executable, "-c", SHOW))],
        env=inherited | settings | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, err = process.communicate(timeout=60)
    return process.pid, subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize(
    ("count", "environment", "shown"),
    [
        (2, {"REHEARSAL_GPUS": "GPU-a,GPU-b,GPU-c", "SLURM_JOB_ID": "1"}, "GPU-a,GPU-b 4"),  # local, in an allocation
        (1, {"CUDA_VISIBLE_DEVICES": "3,1"}, "3 8"),
        (0, {"CUDA_VISIBLE_DEVICES": "3,1"}, " 8"),  # asked for none: sees none
        (2, {"CUDA_VISIBLE_DEVICES": "3,1", "SLURM_JOB_ID": "1"}, "3,1 4"),  # a job of Slurm
        (1, {"PATH": ""}, "None 8"),  # no GPUs
    ],
)
def test_the_launcher_becomes_the_command_and_shows_it_its_devices(tmp_path, count, environment, shown):
    pid, done = launch(tmp_path, count, **environment)
    assert done.stdout == f"{pid} {shown}\n", done.stderr


def test_the_lease_lasts_as_long_as_the_command(tmp_path):
    code = f"from pathlib import Path; from workflow_src.common import gpus; p = Path({str(tmp_path / 'leases')!r})"
    code += "; print(gpus._lock(p / 'GPU-a.gpu', wait=False), gpus._lock(p / 'GPU-b.gpu', wait=False) is None)"
    _, done = launch(tmp_path, 1, sys.executable, "-c", code, REHEARSAL_GPUS="GPU-a,GPU-b")
    assert done.stdout == "None False\n", done.stderr
    handle = gpus._lock(tmp_path / "leases" / "GPU-a.gpu", wait=False)
    assert handle is not None
    os.close(handle)


def test_other_users_can_lock_what_a_strict_one_made(tmp_path):
    before = os.umask(0o077)
    try:
        held = gpus.lease(1, ["GPU-a"], tmp_path)
    finally:
        os.umask(before)
    assert held == ["GPU-a"]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.is_file()} == {0o644}


def test_a_command_that_cannot_be_run_is_one_line(tmp_path):
    _, done = launch(tmp_path, 1, "absent", REHEARSAL_GPUS="GPU-a")
    assert (done.returncode, done.stderr) == (2, "error: absent: cannot be run: No such file or directory\n")


# ---- in Snakemake ---------------------------------------------------------------------------------------------------


def snakemake_stub(nodes=None, main=True, **resources):
    stub = SimpleNamespace(nodes=nodes, is_main_process=main, global_resources=resources)
    stub.register_resource = resources.__setitem__
    return stub


@pytest.mark.parametrize(
    ("stub", "limit", "asked"),
    [
        (snakemake_stub(), 4, 2),
        (snakemake_stub(gpu=1), 1, 2),  # --resources gpu=1; Snakemake cuts the request
        (snakemake_stub(nodes=50), None, 2),  # --profile slurm: the login node's GPUs do not matter
        (snakemake_stub(main=False), None, 2),  # a job of Slurm
    ],
)
def test_the_limit_is_what_is_visible_unless_a_cluster_or_the_user_says_it(monkeypatch, stub, limit, asked):
    monkeypatch.setattr("workflow_src.execution.visible_gpus", lambda: list(FOUR))
    devices = local_gpus(stub)
    limit_gpus(stub, devices)
    assert stub.global_resources.get("gpu") == limit and Workflow(None, devices).gpus(2) == asked


def test_without_gpus_nothing_is_limited_or_launched(monkeypatch):
    monkeypatch.setattr("workflow_src.execution.visible_gpus", list)
    stub = snakemake_stub()
    limit_gpus(stub, local_gpus(stub))
    assert stub.global_resources == {} and Workflow(None, local_gpus(stub)).gpus(2) == 0
    script = shell_prefix([], Config(), ()).replace("{{", "{").replace("}}", "}") + "A=1 lease 0 printenv A"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n" and "common.gpus" not in script


SNAKEFILE = """
    import sys
    sys.path.insert(0, {root!r})
    from workflow_src.common.sections import Config
    from workflow_src.execution import limit_gpus, local_gpus, shell_prefix

    devices = local_gpus(workflow)
    limit_gpus(workflow, devices)
    shell.prefix(shell_prefix([], Config(), devices))

    rule all:
        input: expand("one_{{i}}.job", i=range(3)), expand("two_{{i}}.job", i=range(2)), expand("roll_{{i}}.job", i=range(2))

    rule one:
        output: "one_{{i}}.job"
        resources: gpu=1
        shell: "lease {{resources.gpu}} python work.py {{output}}"

    rule two:
        output: "two_{{i}}.job"
        resources: gpu=2
        shell: "lease {{resources.gpu}} python work.py {{output}} 2>&1 | cat"

    rule serve:
        output: service("endpoint_{{i}}.json")
        threads: 0
        resources: gpu=2
        shell:
            "exec python -m workflow_src.policies.serve --config stage.json --policy p --networks ."
            " --log serve_{{wildcards.i}}.log --endpoint-file {{output}} --gpus {{resources.gpu}}"

    rule roll:
        input: "endpoint_{{i}}.json"
        output: "roll_{{i}}.job"
        resources: gpu=0
        shell: "lease {{resources.gpu}} python work.py {{output}} {{input}}"
"""
WORK = """
    import json, os, sys, time
    if len(sys.argv) > 2:
        from workflow_src.policies.client import connect
        from workflow_src.rollouts.run import use_devices
        client = connect(sys.argv[2])
        use_devices(client.devices)
    held = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    begin = time.monotonic()
    time.sleep(0.4)
    devices = held if len(sys.argv) == 2 else client.devices
    entry = {"name": sys.argv[1], "held": devices, "own": held, "begin": begin, "end": time.monotonic()}
    open(sys.argv[1], "w").write(json.dumps(entry))
"""


def test_snakemake_gives_every_job_devices_of_its_own(tmp_path):
    """Four GPUs, jobs for one and for two, and served groups: side by side, and never two on one device."""
    (tmp_path / "Snakefile").write_text(textwrap.dedent(SNAKEFILE.format(root=str(ROOT))))
    (tmp_path / "work.py").write_text(textwrap.dedent(WORK))
    stage = {"seed": 0, "lab": {}, "policies": {"p": {"adapter": "tabletop_random"}}, "rollouts": {}}
    (tmp_path / "stage.json").write_text(json.dumps(stage))
    environment = os.environ | {gpus.MASK: ",".join(FOUR), "REHEARSAL_LEASES": str(tmp_path / "leases")}
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "8"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    noted = finish(tmp_path, [])
    assert len(noted) == 7 and {device for entry in noted for device in entry["held"]} == set(FOUR)
    for entry in noted:
        rolled = entry["name"].startswith("roll")
        assert len(entry["held"]) == (1 if entry["name"].startswith("one") else 2)
        # Of a group with two devices the world model has the last one to itself.
        assert entry["own"] == (entry["held"][-1:] if rolled else entry["held"])
    assert_no_overlap(noted)
    assert any(two["begin"] < one["end"] for one, two in pairwise(noted)), "one after the other"
    assert_nobody_left(tmp_path)
