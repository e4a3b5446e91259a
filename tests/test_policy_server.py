"""A policy server's life, as a rollout and Snakemake see it: real processes on loopback."""

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from workflow_src.common import gpus
from workflow_src.common.errors import UserError
from workflow_src.common.process import alive
from workflow_src.policies import client, wire
from workflow_src.rollouts.loop import Item
from workflow_src.rollouts.records import Recorder, Source
from workflow_src.rollouts.run import record_world
from workflow_src.rollouts.trials import Trial

ROOT = Path(__file__).resolve().parents[1]
WAIT = 30  # seconds until a test gives up; nothing here takes that long

# A server whose policy misbehaves on request: `prompt` says how. Runs the real command with one more adapter.
FAKE = """
    import ctypes, os, sys, time
    from types import SimpleNamespace
    import numpy as np

    def load(policy, networks, lab, seed, batch):
        from workflow_src.policies.wire import Metadata
        time.sleep(policy.options.get("load_seconds", 0))
        if policy.options.get("load_fails"):
            raise RuntimeError("weights are damaged")
        batched = not policy.options.get("unbatched")
        return SimpleNamespace(metadata=Metadata(chunk=2, batched=batched, batch=batch, image_size=8), act=act)

    def act(observation):
        word, rows = observation.prompt[0], len(observation)
        actions = np.zeros((rows, 2, 7), np.float32)
        actions[:, :, 0] = observation.image.mean((1, 2, 3))[:, None]
        actions[:, :, 1] = observation.step[:, None]
        actions[:, :, 2] = observation.seed[:, None]
        if word == "nan": actions[-1, 1, 3] = np.nan
        if word == "shape": actions = actions[:, :, :6]
        if word == "raise": raise ValueError("no such object")
        if word == "die": os._exit(9)
        if word == "hang": time.sleep(1000)
        if word == "hold the interpreter": ctypes.PyDLL(None).sleep(1000)
        if word == "not finite base": return {"actions": actions, "base": np.full((rows, 2, 3), np.inf)}
        if word == "list": return {"actions": actions.tolist()}
        return {"actions": actions, "terminate": np.zeros((rows, 2), bool)}

    if __name__ == "__main__":
        from workflow_src.policies import adapter, serve
        adapter.ADAPTERS["fake"] = "fake"
        serve.main()
"""


class Running:
    """A server process and its files."""

    def __init__(self, folder, options=None, arguments=(), prefix=()):
        self.endpoint, self.log = folder / "run" / "endpoint.json", folder / "server.log"
        (folder / "fake.py").write_text(textwrap.dedent(FAKE))
        policies = {"p": {"adapter": "fake", "options": options or {}}}
        (folder / "stage.json").write_text(json.dumps({"seed": 0, "lab": {}, "policies": policies, "rollouts": {}}))
        files = {
            "--config": folder / "stage.json",
            "--networks": folder,
            "--endpoint-file": self.endpoint,
            "--log": self.log,
        }
        flags = [str(part) for pair in files.items() for part in pair]
        command = [*prefix, sys.executable, str(folder / "fake.py"), "--policy", "p", *flags, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "0"}
        self.process = subprocess.Popen(command, cwd=folder, env=environment)

    def content(self):
        until(self.endpoint.is_file)
        return json.loads(self.endpoint.read_text())

    def connect(self, **options):
        return client.connect(self.endpoint, WAIT, **options)


@pytest.fixture
def start(tmp_path):
    """Starts servers and leaves none behind."""
    started = []

    def begin(*arguments, **options):
        started.append(Running(tmp_path, *arguments, **options))
        return started[-1]

    yield begin
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait(WAIT)


def until(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def observation(word="go", rows=3):
    images = np.arange(rows, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    numbers = np.arange(rows)
    return {"image": images, "prompt": [word] * rows, "episode": numbers, "step": numbers + 10, "seed": numbers + 20}


def health(server):
    content = server.content()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{content['port']}/healthz", timeout=WAIT) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as answer:
        return answer.code, answer.read().decode()


def test_life_of_a_server(start):
    """Endpoint file before loading, 503 with a stage, 200, batches in order, then SIGTERM leaves nothing behind."""
    server = start({"load_seconds": 2.0})
    content = server.content()
    assert stat.S_IMODE(server.endpoint.stat().st_mode) == 0o600
    assert content["pid"] == server.process.pid and content["policy"] == "p" and content["devices"] == []
    status, stage = health(server)
    assert status == 503 and stage.strip()

    with server.connect() as policy:
        assert health(server)[0] == 200
        assert policy.metadata.name == "p" and policy.metadata.batch == 51 and len(policy.metadata_digest) == 16
        reply = policy.infer(observation())
        assert reply["actions"].shape == (3, 2, 7) and reply["actions"].dtype == np.float32
        np.testing.assert_array_equal(reply["actions"][:, 0, :3], [[0, 10, 20], [1, 11, 21], [2, 12, 22]])
        assert reply["terminate"].dtype == bool and reply["terminate"].shape == (3, 2)

    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(lifecycle_limit()) == 143
    assert not server.endpoint.exists()


def lifecycle_limit():
    return 6.0  # a server has five seconds; one for a busy machine


def test_token_is_needed(start):
    server = start()
    with pytest.raises(UserError, match="policy p: its server refused the token"):
        server.connect(token="wrong")
    url = f"ws://127.0.0.1:{server.content()['port']}"
    with pytest.raises(UserError, match="refused the token"):
        client.connect(url, WAIT)
    client.connect(url, WAIT, server.content()["token"]).close()


@pytest.mark.parametrize("word", ["hang", "hold the interpreter"])
def test_stuck_policy_does_not_survive_sigterm(start, word):
    server = start()
    with server.connect(step_timeout=1.0) as policy:
        with pytest.raises(UserError, match=r"policy p: no answer within 1 s"):
            policy.infer(observation(word))
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(lifecycle_limit())


def test_stopped_server_is_a_timeout_even_for_large_images(start):
    server = start()
    with server.connect(step_timeout=1.0) as policy:
        os.kill(server.process.pid, signal.SIGSTOP)
        large = observation(rows=2)
        large["image"] = np.zeros((2, 2000, 2000, 3), np.uint8)
        with pytest.raises(UserError, match="no answer within 1 s"):
            policy.infer(large)
        os.kill(server.process.pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("word", "line", "row"),
    [
        ("nan", "policy p: `actions` is not finite", 2),
        ("not finite base", "policy p: `base` is not finite", 0),
        ("shape", r"policy p: wrong shape: `actions` is \(3, 2, 6\), expected \(3, 2, 7\)", None),
        ("list", "policy p: malformed answer: `actions`", None),
        ("raise", "policy p: its server failed: ValueError: no such object", None),
        ("die", "policy p: its server died", None),
    ],
)
def test_bad_answers_are_one_line(start, word, line, row):
    server = start()
    with server.connect() as policy:
        policy.infer(observation())
        with pytest.raises(client.PolicyError, match=line) as problem:
            policy.infer(observation(word))
        assert problem.value.row == row


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("die", "its server died"),
        ("hang", "no answer within 1 s"),
        ("nan", "`actions` is not finite"),
        ("shape", "wrong shape: `actions` is"),
    ],
)
def test_a_server_that_fails_mid_rollout_names_trial_and_step_and_leaves_what_is_finished(start, tmp_path, word, line):
    """Two trials side by side are finished; then, in the third, the server fails at its first step."""
    trials = [Trial(f"lift/{i}", "lift", text, np.full((8, 8, 3), i, np.uint8), None, i)
              for i, text in enumerate(["go", "go", word, "go"])]  # fmt: skip
    work = [Item(trial, 0) for trial in trials]

    def make():
        return Recorder(tmp_path / "records" / "rollouts.parquet", Source("p", "world_model", 5.0, "d", "m"), "key")

    server = start()
    with server.connect(step_timeout=1.0) as policy, pytest.raises(UserError) as problem:
        record_world(lambda: Still(2), policy, work, 2, make())
    assert re.match(rf"trials? 'lift/[23]#0'.*, step 0: policy p: {line}", str(problem.value))
    assert [item.name for item in make().missing(work)] == ["lift/2#0", "lift/3#0"]


class Still:
    """A world in which nothing moves."""

    def __init__(self, places):
        self.num_envs, self.single_action_space = places, SimpleNamespace(shape=(7,))

    def reset(self, *, seed, options):
        self.image = np.stack([trial["image"] for trial in options["trials"]])
        return {"image": self.image}, {}

    def step(self, actions):
        nobody = np.zeros(self.num_envs, bool)
        return {"image": self.image}, nobody, nobody, nobody, {}

    def close(self):
        pass


def test_a_policy_is_served_by_hand(tmp_path):
    """A name is enough: the address, a token and the endpoint file are printed, and the doctor can be sent there."""
    command = [
        sys.executable,
        "-m",
        "workflow_src.policies.serve",
        "tabletop_random",
        "--endpoint-file",
        tmp_path / "e.json",
    ]
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        line = server.stderr.readline()
        assert re.fullmatch(r"ws://127\.0\.0\.1:\d+, token \w{32}; endpoint file: .*e\.json\n", line)
        with client.connect(tmp_path / "e.json", WAIT) as policy:
            assert policy.metadata.control_rate == 5.0 and policy.metadata.name == "tabletop_random"
        server.terminate()
        server.stderr.read()
    done = subprocess.run([*map(str, command[:3])], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "give the name of a policy family, or --config with --policy" in done.stderr


def test_row_by_row_for_servers_without_batches(start):
    server = start({"unbatched": 1})
    with server.connect() as policy:
        reply = policy.infer(observation())
        np.testing.assert_array_equal(reply["actions"][:, 0, :3], [[0, 10, 20], [1, 11, 21], [2, 12, 22]])
    with server.connect() as policy, pytest.raises(UserError, match="policy p: its server failed: ValueError"):
        policy.infer(observation("raise"))


def test_malformed_observation_is_refused_and_the_server_lives_on(start):
    server = start()
    for change, line in [
        ({"image": np.zeros((3, 9, 9, 3), np.uint8)}, "9x9; this policy sees 8x8"),
        ({"image": np.zeros((3, 8, 8, 3), np.float32)}, "observation.image must be uint8"),
        ({"prompt": ["go"]}, "observation.prompt must be 3 instruction"),
        ({"step": np.zeros(2, int)}, "observation.step must be 3 integer"),
    ]:
        with server.connect() as policy, pytest.raises(UserError, match=line):
            policy.infer({**observation(), **change})
    with server.connect() as policy:
        policy.infer(observation())


def test_server_that_dies_while_loading_shows_its_log_at_once(start):
    server = start({"load_fails": 1, "load_seconds": 0.5})
    with pytest.raises(
        UserError, match=r"(?s)policy p: its server ended while loading.*RuntimeError: weights are damaged"
    ):
        server.connect()
    assert server.process.wait(WAIT) == 1


def test_unknown_policy_and_slow_loading_are_clear(start):
    server = start(arguments=["--policy", "q"])
    with pytest.raises(UserError, match=r"(?s)ended while loading.*error: policies: 'q' is unknown"):
        server.connect()


def test_loading_beyond_the_deadline(start):
    server = start({"load_seconds": 60})
    with pytest.raises(UserError, match=r"was not ready within 0.5 s \(last stage: loading policy p\)"):
        client.connect(server.endpoint, 0.5)


def test_waiting_for_a_gpu_is_no_delay_of_the_servers(start, tmp_path, monkeypatch):
    """Others may have the GPUs for hours; the deadline begins with the loading."""
    monkeypatch.setenv("REHEARSAL_GPUS", "GPU-a")
    monkeypatch.setenv("REHEARSAL_LEASES", str(tmp_path / "leases"))
    (tmp_path / "leases").mkdir()
    handle = gpus._lock(tmp_path / "leases" / "GPU-a.gpu")
    server = start(arguments=["--gpus", "1"])
    until(lambda: health(server) == (503, "waiting for a GPU\n"))
    timer = threading.Timer(3, os.close, [handle])
    timer.start()
    with client.connect(server.endpoint, 2) as connection:
        assert connection.devices == ["GPU-a"]
    timer.join()


def test_server_ends_with_its_parent(start, tmp_path):
    """`kill -9` of what started it, here a shell in between."""
    server = start({"load_seconds": 60}, prefix=["sh", "-c", '"$@" & wait', "sh"])
    pid = server.content()["pid"]
    assert pid != server.process.pid
    server.process.kill()
    until(lambda: not alive(pid))
    until(lambda: not server.endpoint.exists())


def test_server_ends_when_nobody_comes_or_stays(start):
    server = start(arguments=["--connect-deadline", "0.2"])
    assert server.process.wait(WAIT) == 0 and "nobody connected" in server.log.read_text()
    assert not server.endpoint.exists()
    server = start(arguments=["--idle-limit", "0.5"])
    with contextlib.closing(server.connect()):
        assert server.process.wait(WAIT) == 0 and "idle" in server.log.read_text()


def test_foreign_openpi_client_needs_no_batch_and_no_identity(start):
    """One image, one prompt; the answer has no batch dimension either, and steps are counted."""
    from websockets.sync.client import connect

    server = start()
    server.connect().close()
    content = server.content()
    header = {"Authorization": f"Api-Key {content['token']}"}
    with connect(f"ws://127.0.0.1:{content['port']}", additional_headers=header, compression=None) as socket:
        assert wire.unpack(socket.recv())["units"] == "metric"
        for step in range(2):
            socket.send(wire.pack({"image": np.zeros((8, 8, 3), np.uint8), "prompt": "go"}))
            actions = wire.unpack(socket.recv())["actions"]
            assert actions.shape == (2, 7) and actions[0, 1] == step
        socket.send("text")
        assert "refused: expected a binary message" in socket.recv()


def test_endpoints_that_cannot_work(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "FILE_DEADLINE", 0.0)
    with pytest.raises(UserError, match=r"policy p: endpoint file .* is not there"):
        client.connect(tmp_path / "none.json", policy="p")
    (tmp_path / "half.json").write_text('{"host": "127.')
    with pytest.raises(UserError, match="is not readable"):
        client.connect(tmp_path / "half.json", policy="p")
    with pytest.raises(UserError, match="use wss:// or set allow_plaintext"):
        client.connect("ws://192.0.2.1:8000", policy="p")
