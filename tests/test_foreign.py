"""Servers of openpi's protocol that have never heard of this project: translated, refused where they do not fit, and openpi's
own client and packer in their own environment, in both directions."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from websockets.sync.server import serve

from envs.build import interpreter
from tests.chain import ROOT
from tests.test_policy_server import Running
from tests.test_rollouts import FakeWorld, rolled
from workflow_src.common.config import from_dict
from workflow_src.common.errors import UserError
from workflow_src.common.sections import Foreign, Policy
from workflow_src.embodiments import dead_reckon
from workflow_src.policies import foreign, images, wire
from workflow_src.policies.client import PolicyError, connect
from workflow_src.policies.foreign import Translator, refusals
from workflow_src.rollouts import run as running
from workflow_src.rollouts.loop import Item
from workflow_src.rollouts.records import Recorder, Source, read_records
from workflow_src.rollouts.trials import Trial

START = [0.3, 0.0, 0.1, 0.0, 0.0, 3.1, 1.0]
# As a server of a Franka might be configured: other names, order, units and gripper.
MAPPING = Foreign(
    cameras=("observation/image",), image_size=8, prompt="task", state="observation/state",
    state_layout=("closedness", "x", "yaw", "zero"), layout=("gripper", "x", "_", "yaw"), translation_unit=0.05,
    rotation_unit=0.5, gripper_open=-1.0, gripper_closed=1.0, control_rate=5.0,
)  # fmt: skip


def row(image=None, pose=START):
    return {
        "image": np.zeros((8, 8, 3), np.uint8) if image is None else image,
        "prompt": "lift",
        "pose": np.array(pose),
    }


# ---- translation ----------------------------------------------------------------------------------------------------


def test_an_observation_gets_the_servers_names():
    message = Translator(MAPPING, "r").observation(row(np.full((4, 16, 3), 200, np.uint8)))
    assert set(message) == {"observation/image", "task", "observation/state"} and message["task"] == "lift"
    seen = message["observation/image"]
    assert seen.shape == (8, 8, 3) and (seen[:3] == 0).all() and (seen[3:5] == 200).all() and (seen[5:] == 0).all()
    np.testing.assert_allclose(message["observation/state"], [0, 0.3, 3.1, 0], rtol=1e-6)
    blind = replace(MAPPING, state="", image_size=0)
    assert set(Translator(blind, "r").observation({"image": row()["image"], "prompt": "x"})) == {
        "observation/image",
        "task",
    }


def test_a_state_of_zeros_needs_no_pose():
    blind = replace(MAPPING, state_layout=("zero", "zero"))
    without = {"image": row()["image"], "prompt": "x"}
    assert Translator(blind, "r").observation(without)["observation/state"].tolist() == [0, 0]
    assert refusals(blind, [("lift/0", None)]) == [] and len(refusals(MAPPING, [("lift/0", None)])) == 1


def test_displacements_get_our_order_units_and_gripper():
    answer = {"actions": np.array([[-1.0, 0.2, 9.0, 0.1], [1.0, -0.2, 9.0, 0.0], [5.0, 0, 9.0, 0]])}
    actions = Translator(MAPPING, "r").actions(answer, None)
    assert actions.dtype == np.float32
    expected = [[0.01, 0, 0, 0, 0, 0.05, 1], [-0.01, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]
    np.testing.assert_allclose(actions, expected, atol=1e-7)
    one = Translator(MAPPING, "r").actions({"actions": np.array([-1, 1, 0, 0])}, None)
    assert one.shape == (1, 7) and one[0, 0] == np.float32(0.05)


def test_poses_become_displacements_the_short_way_round():
    absolute = replace(MAPPING, actions="absolute", translation_unit=1.0, rotation_unit=1.0)
    answer = {"actions": np.array([[-1, 0.32, 0, -3.1], [-1, 0.31, 0, -3.0]])}
    actions = Translator(absolute, "r").actions(answer, np.array(START))
    np.testing.assert_allclose(actions[:, 0], [0.02, -0.01], atol=1e-6)
    np.testing.assert_allclose(actions[:, 5], [2 * np.pi - 6.2, 0.1], atol=1e-6)
    assert (actions[:, 1:5] == 0).all()  # what the layout does not name stays where it is
    pose = np.array(START)
    for action in actions:
        pose = dead_reckon(pose, action)
    np.testing.assert_allclose(pose[[0, 5]], [0.31, -3.0], atol=1e-6)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"actions": np.zeros((2, 8))}, "wrong shape: 8 numbers per action, `layout` names 4"),
        ({"actions": np.zeros((1, 2, 4))}, r"not an array \(K, A\)"),
        ({"action": np.zeros((2, 4))}, r"not an array \(K, A\)"),
    ],
)
def test_other_answers_are_refused(answer, message):
    with pytest.raises(wire.WireError, match=message):
        Translator(MAPPING, "r").actions(answer, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": ["x", "yw"]}, r"p\.layout\[1\]: 'yw' is unknown; did you mean 'yaw'"),
        ({"layout": ["x", "x"]}, r"p\.layout: x, x names a number twice"),
        ({"state": "state", "state_layout": ["joint_1"]}, r"p\.state_layout\[0\]: 'joint_1' is unknown"),
        ({"state_layout": ["x"]}, r"p\.state: is empty, so state_layout says nothing"),
        ({"state": "state", "state_layout": []}, r"p\.state_layout: is empty; say what the numbers of state are: x, y"),
        ({"gripper_open": 0.0}, r"p\.gripper_open: 0 is gripper_closed as well"),
        ({"rotation_unit": 0.0}, r"p\.rotation_unit: 0 is not positive"),
    ],
)
def test_a_mapping_that_contradicts_itself_is_one_line(change, message):
    with pytest.raises(UserError, match=message):
        foreign.check("p", from_dict(Foreign, change))


def test_what_cannot_be_rolled_out_is_a_line_each():
    trials = [("lift/0", START), ("lift/1", None), ("lift/2", [0.0])]
    hopeless = replace(MAPPING, cameras=("wrist", "front"), actions="joint")
    lines = refusals(hopeless, trials)
    assert [line.split(";")[0] for line in lines] == [
        "it answers joint angles", "it looks through 2 cameras (wrist, front)",
        "it needs the robot's state, and 2 of 3 trials have no initial_state of 7 numbers (x, y, z, roll, pitch, yaw, "
        "opening), the first is lift/1",
    ]  # fmt: skip
    assert refusals(MAPPING, trials[:1]) == refusals(replace(MAPPING, state=""), trials) == []
    assert len(refusals(replace(MAPPING, state="", actions="absolute"), trials)) == 1


# ---- a server on loopback that speaks so -----------------------------------------------------------------------------


@pytest.fixture
def stranger():
    """An openpi-style server; `seen` holds what it was asked, `answer(observation)` is what it says."""

    class Stranger:
        seen: list = []  # noqa: RUF012
        answer = staticmethod(lambda observation: {"actions": np.array([[-1.0, 0.2, 0, 0], [1.0, 0.2, 0, 0]])})

    def talk(socket):
        socket.send(wire.pack({"env": "franka", "chunk": 99}))
        for message in socket:
            stranger.seen.append(wire.unpack(message))
            socket.send(wire.pack(stranger.answer(stranger.seen[-1])))

    stranger = Stranger()
    stranger.seen = []
    with serve(talk, "127.0.0.1", 0, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stranger.url = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        yield stranger
        server.shutdown()


def trial(index, state=START):
    image = np.full((16, 16, 3), index, np.uint8)
    return Trial(f"lift/{index}", "lift", "lift it", image, state, index)


def test_its_state_is_reckoned_from_the_first_frame_on_and_marked(stranger, tmp_path):
    with connect(stranger.url, 10, policy="p", translator=Translator(MAPPING, "r1")) as policy:
        assert policy.metadata.revision == "r1" and policy.metadata.extra["server"]["env"] == "franka"
        work = [Item(trial(index), 0) for index in range(2)]
        first, second = rolled(FakeWorld(2), policy, work)
    x, closed = (np.array([ask["observation/state"][i] for ask in stranger.seen[::2]]) for i in (1, 0))
    np.testing.assert_allclose(x, [0.3, 0.32, 0.34], atol=1e-6)  # two steps of 0.2 x 0.05 m a chunk
    assert closed.tolist() == [0, 1, 1]
    assert first.actions[:2, 6].tolist() == [1, 0] and np.array_equal(first.actions, second.actions)

    recorder = Recorder(tmp_path / "rollouts.parquet", Source("p", "world_model", 5.0, "d", "m", "dead_reckoned"), "k")
    recorder.write(first)
    recorder.finish(work[:1])
    assert read_records(tmp_path / "rollouts.parquet").robot_state.tolist() == ["dead_reckoned"]


def test_a_record_from_before_the_mark_is_read_as_without_state(stranger, tmp_path):
    recorder = Recorder(tmp_path / "rollouts.parquet", Source("p", "world_model", 5.0, "d", "m"), "k")
    recorder.finish([])
    pd.read_parquet(tmp_path / "rollouts.parquet").drop(columns="robot_state").to_parquet(tmp_path / "rollouts.parquet")
    assert read_records(tmp_path / "rollouts.parquet").robot_state.isna().all()


def test_its_wrong_answers_name_row_and_reason(stranger):
    stranger.answer = lambda observation: {"actions": np.full((2, 4), np.nan)}
    with connect(stranger.url, 10, policy="p", translator=Translator(MAPPING, "r")) as policy:
        work = [Item(trial(0), 0)]
        with pytest.raises(UserError, match=r"trial 'lift/0#0', step 0: policy p: `actions` is not finite"):
            rolled(FakeWorld(1), policy, work)
        stranger.answer = lambda observation: {"actions": np.zeros((2, 8))}
        with pytest.raises(PolicyError, match="policy p: wrong shape: 8 numbers per action"):
            policy.infer({"image": trial(0).image[None], "prompt": ["x"], "pose": np.array([START])})


def stage(folder, mapping, url, states):
    """A configuration with that server, and trials whose json has these states."""
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(mapping).items()}
    policy = {"endpoint": url, "revision": "r1", "foreign": fields}
    content = {"seed": 0, "lab": {"scene": "none", "embodiment": "widowx"}, "policies": {"p": policy}, "rollouts": {}}
    (folder / "stage.json").write_text(json.dumps(content))
    for index, state in enumerate(states):
        task = folder / "trials" / f"task_{index % 2}"
        task.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * index, 9, 9)).save(task / f"{index}.png")
        (task / f"{index}.json").write_text(json.dumps({"instruction": "do it" + "!" * index, "initial_state": state}))
    return folder / "stage.json"


def doctor(folder, config, url):
    command = [sys.executable, "-m", "workflow_src.policies.doctor", "p", "--config", config, "--endpoint", url, "--trials",
               folder / "trials", "--out", folder / "doctor.csv"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    rows = csv.DictReader((folder / "doctor.csv").read_text().splitlines())
    return done, {row["check"]: row for row in rows}


def test_the_doctor_refuses_before_anything_is_asked(stranger, tmp_path):
    mapping = replace(MAPPING, cameras=("wrist", "front"), actions="joint")
    config = stage(tmp_path, mapping, stranger.url, [START, None])
    done, rows = doctor(tmp_path, config, stranger.url)
    assert done.returncode == 2 and list(rows) == ["mapping"] and done.stdout.count("mapping           failed") == 3
    assert done.stderr.splitlines()[-1] == "error: policy p: 3 of 3 checks failed: mapping, mapping, mapping"
    assert stranger.seen == []


def test_the_doctor_examines_a_server_that_fits(stranger, tmp_path):
    def answer(observation):
        light, words = observation["observation/image"].mean() / 255, len(observation["task"])
        return {"actions": np.tile([light * 2 - 1, light / 5, 0, words / 900], (2, 1))}

    stranger.answer = answer
    config = stage(tmp_path, MAPPING, stranger.url, [START] * 6)
    done, rows = doctor(tmp_path, config, stranger.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["outcome"] for row in rows.values()} == {"passed", "not judged"} and rows["image"][
        "outcome"
    ] == "passed"
    assert stranger.seen[0]["observation/state"][1] == np.float32(0.3)


def test_rollouts_refuse_it_too(tmp_path, monkeypatch):
    policies = {"p": Policy(foreign=replace(MAPPING, actions="joint")), "ours": Policy()}
    settings = SimpleNamespace(
        policies=policies, rollouts=SimpleNamespace(repeats=1), lab=SimpleNamespace(scene="none")
    )
    monkeypatch.setattr(running, "load_trials", lambda path: [trial(0), trial(1, None)])
    client = SimpleNamespace(metadata=SimpleNamespace(extra={}))
    reasons = {"p": "it answers joint angles", "ours": "it needs the robot's state, and 1 of 2 trials have"}
    for name, reason in reasons.items():
        options = SimpleNamespace(policy=name, trials=None, shard=0, shards=1)
        with pytest.raises(UserError, match=f"policy {name}: {reason}"):
            running.run(settings, options, client)
        client.metadata.extra["needs_pose"] = True  # says our own server, whose configuration is elsewhere


# ---- openpi's own package, in its own environment ---------------------------------------------------------------------

# What openpi calls a policy server, with its packer.
THEIR_SERVER = """
    import numpy as np
    from openpi_client import msgpack_numpy
    from websockets.sync.server import serve

    def talk(socket):
        packer = msgpack_numpy.Packer()
        socket.send(packer.pack({"env": "bridge", "scale": np.float32(0.5)}))
        for message in socket:
            seen = msgpack_numpy.unpackb(message)
            image, state = seen["observation/image"], seen["observation/state"]
            if seen["task"] == "raise":
                socket.send("Traceback (most recent call last):\\nValueError: no such object")
                return socket.close(1011)
            chunk = np.stack([[-1, image[2, 3, 0] / 255, 0, state[1]]] * 3)
            socket.send(packer.pack({"actions": chunk, "server_timing": {"infer_ms": np.float64(1)}}))

    with serve(talk, "127.0.0.1", 0, compression=None, max_size=None) as server:
        print(server.socket.getsockname()[1], flush=True)
        server.serve_forever()
"""
THEIR_CLIENT = """
    import sys
    import numpy as np
    from openpi_client import image_tools
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    policy = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]), api_key=sys.argv[2])
    assert policy.get_server_metadata()["units"] == "metric" and policy.get_server_metadata()["chunk"] == 2
    image = np.full((8, 8, 3), 7, np.uint8)
    for step in range(2):
        actions = policy.infer({"image": image, "prompt": "go"})["actions"]
        assert actions.shape == (2, 7) and actions.dtype == np.float32 and actions[0, 0] == 7 and actions[0, 1] == step
    try:
        policy.infer({"image": image, "prompt": "raise"})
    except RuntimeError as problem:
        assert "ValueError: no such object" in str(problem)
    wide = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    np.save(sys.argv[3], image_tools.resize_with_pad(wide, 20, 20))
    print("understood", np.__version__)
"""


def their(code, *arguments, **options):
    command = [str(interpreter("openpi")), "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.requires("openpi")
def test_openpis_client_understands_our_server_and_resizes_as_we_do(tmp_path):
    server = Running(tmp_path)
    try:
        server.connect().close()
        content = server.content()
        said, problem = their(THEIR_CLIENT, content["port"], content["token"], tmp_path / "theirs.npy").communicate(
            timeout=60
        )
    finally:
        server.process.terminate()
        server.process.wait(10)
    assert said == "understood 1.26.4\n", problem
    wide = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    assert np.abs(images.pad(wide, 20).astype(int) - np.load(tmp_path / "theirs.npy")).max() <= 1


@pytest.mark.requires("openpi")
def test_our_client_understands_a_server_with_openpis_packer():
    server = their(THEIR_SERVER)
    try:
        url = f"ws://127.0.0.1:{server.stdout.readline().strip()}"
        with connect(url, 20, policy="theirs", translator=Translator(MAPPING, "r")) as policy:
            assert policy.metadata.extra["server"]["scale"] == np.float32(0.5)
            image = np.zeros((2, 8, 8, 3), np.uint8)
            image[1, 2, 3, 0] = 255
            asked = {"image": image, "prompt": ["go", "go"], "pose": np.array([START, START])}
            actions = policy.infer(asked)["actions"]
            np.testing.assert_allclose(actions[:, 0, 0], [0, 0.05], rtol=1e-6)
            np.testing.assert_allclose(actions[:, 2, 5], 0.15, rtol=1e-6)
            assert actions.shape == (2, 3, 7) and (actions[..., 6] == 1).all()
            with pytest.raises(PolicyError, match="policy theirs: its server failed: ValueError: no such object"):
                policy.infer({**asked, "prompt": ["raise", "go"]})
    finally:
        server.kill()
        server.communicate()
