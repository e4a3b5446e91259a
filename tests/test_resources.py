"""What jobs ask for, how they share it, and how they end: nothing of it is part of a result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.chain import MINI
from workflow_src import resources
from workflow_src.common.config import from_dict
from workflow_src.common.errors import UserError
from workflow_src.common.sections import Config
from workflow_src.execution import limit_servers, rollout_retries, shell_prefix
from workflow_src.policies import lifecycle
from workflow_src.rollouts.run import use_devices
from workflow_src.workflow import checked


@pytest.mark.parametrize(
    ("granted", "policy", "world_model"),
    [("", "", ""), ("3", "3", "3"), ("MIG-a,MIG-b", "MIG-a", "MIG-b"), ("0,1,2", "0,1", "2")],
)  # fmt: skip
def test_of_several_gpus_the_last_is_the_world_models(tmp_path, monkeypatch, granted, policy, world_model):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", granted)
    listener, endpoint = lifecycle.bind("127.0.0.1", 0, "p", tmp_path / "log")
    listener.close()
    endpoint.grant(tmp_path / "endpoint.json", endpoint.devices)
    assert json.loads((tmp_path / "endpoint.json").read_text())["devices"] == endpoint.devices
    assert os.environ["CUDA_VISIBLE_DEVICES"] == policy
    use_devices(endpoint.devices)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == world_model


def test_servers_are_limited_on_one_machine_and_not_on_a_cluster():
    """What Snakemake shows the Snakefile: alone on a machine, handing jobs to a cluster, and inside such a job."""
    for main, nodes, limit, retries in ((True, None, 2, 1), (True, 50, None, 5), (False, 1, 2, 1)):
        limits = {}
        workflow = SimpleNamespace(
            is_main_process=main, nodes=nodes, global_resources={}, register_resource=limits.__setitem__,
            resource_settings=SimpleNamespace(cores=2),
        )  # fmt: skip
        limit_servers(workflow)
        assert limits.get("servers") == limit and rollout_retries(workflow) == retries


def test_the_way_there_is_no_part_of_a_result_and_travels_in_the_environment(tmp_path, monkeypatch):
    plain = yaml.safe_load(MINI.read_text())
    way = {
        "gpus": {"world_model": 4},
        "local_cache": "$SLURM_TMPDIR/{x}",
        "distributed": {"timeout": 60, "infiniband": False},
    }
    stages = []
    for name, settings in (("plain", {}), ("way", way)):
        (tmp_path / name).mkdir()
        with contextlib.chdir(tmp_path / name):
            flow = checked(plain | settings)
            flow.write_stage_files()
            stages.append({path.name: path.read_text() for path in Path("results/config").rglob("*.json")})
    assert stages[0] == stages[1] and "world_model.json" in stages[0]

    monkeypatch.setenv("NCCL_DEBUG", "INFO")  # the user's own
    monkeypatch.delenv("REHEARSAL_GROUP_TIMEOUT", raising=False)
    prefix = shell_prefix((), flow.config).format()  # as Snakemake does
    names = ("REHEARSAL_GROUP_TIMEOUT", "NCCL_IB_DISABLE", "NCCL_DEBUG", "REHEARSAL_LOCAL_CACHE")
    show = "; ".join(f'echo "${name}"' for name in names)
    done = subprocess.run(["bash", "-c", prefix + show], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["60", "1", "INFO", "$SLURM_TMPDIR/{x}"]


def test_a_signal_to_all_processes_of_a_job_lets_it_end_in_its_own_words():
    """Shell and `tee` outlive the SIGTERM that Slurm sends to everybody, and what stops cleanly is heard."""
    job = "import signal, time; signal.signal(15, lambda *_: (time.sleep(0.5), print('checkpoint'), exit(143)))"
    shell = (
        f'{shell_prefix((), Config()).format()} python -c "{job}; print(1, flush=True); time.sleep(60)" | tee /dev/null'
    )
    run = subprocess.Popen(["bash", "-c", shell], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stdout.readline() == "1\n"
    os.killpg(run.pid, signal.SIGTERM)
    assert run.communicate(timeout=30)[0] == "checkpoint\n" and run.returncode == 143


def test_attempts_ask_for_more_up_to_a_day():
    assert [resources.growing(600, resources.DAY)(None, attempt) for attempt in (1, 2, 3)] == [600, 1200, 1440]
    assert [resources.minutes(4000)(None, attempt) for attempt in (1, 2)] == [140, 280]
    # The paper's network on eight processes: each reads a checkpoint of four copies beside its own state.
    paper = from_dict(Config, {"gpus": {"world_model": 8}})
    assert resources.training_memory(paper)(None, 1) == 8000 + 8 * 2 * 16 * 36 * 16 * 1024**2 // 10**6
    assert resources.training_cores(paper) == 32


@pytest.mark.parametrize(("asked", "counts", "imagining"), [
    (0, (0, 0), 0), (2, (2, 2), 1), ({"random": 0}, (1, 0), 1), ({"random": 0, "bc_6": 0, "bc_3": 0}, (0, 0), 0),
])  # fmt: skip
def test_gpus_of_policies_by_name_or_for_all(asked, counts, imagining):
    mapping = yaml.safe_load(MINI.read_text()) | {"gpus": {"rollouts": asked}}
    cluster = checked(mapping, devices=None)
    assert tuple(resources.gpus_of_policy(cluster.config, name) for name in ("bc_3", "random")) == counts
    assert resources.imagining_gpus(cluster) == imagining
    # With a server of its own a policy leaves its GPUs to it; one that runs elsewhere needs one for the world model.
    job = SimpleNamespace(policy="bc_3")
    mapping["policies"]["bc_3"] |= {"endpoint": "ws://127.0.0.1:1", "revision": "a"}
    there = checked(mapping, devices=None)
    assert resources.rollout_gpus(cluster)(job) == 0 and resources.server_gpus(cluster)(job) == counts[0]
    assert resources.rollout_gpus(there)(job) == min(1, counts[0])


def test_a_machine_gives_every_job_one_of_its_gpus_or_none():
    for devices, configured, expected in (
        ((), 8, 0),
        (("0", "1"), 0, 1),
        (("0", "1"), 2, 2),
        (None, 0, 0),
        (None, 8, 8),
    ):
        mapping = yaml.safe_load(MINI.read_text()) | {"gpus": {"world_model": configured}}
        assert checked(mapping, devices=devices).gpus(configured) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": {"world_model": -1}}, r"gpus\.world_model: -1 is impossible; it must be at least 0"),
        ({"gpus": {"rollouts": {"bc_7": 1}}}, r"gpus\.rollouts: 'bc_7' is unknown; did you mean 'bc_"),
        ({"gpus": {"rollouts": {"bc_6": -1}}}, r"gpus\.rollouts\.bc_6: -1 is impossible"),
        ({"distributed": {"debug": "all"}}, r"distributed\.debug: 'all' is not allowed"),
        ({"distributed": {"timeout": 0}}, r"distributed\.timeout: 0 is impossible"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        checked(yaml.safe_load(MINI.read_text()) | settings)
