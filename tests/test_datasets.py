"""The registered data sets: what their recorded actions mean, by hand-computed values, and the checks of the registry."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from workflow_src import embodiments
from workflow_src.common.errors import UserError
from workflow_src.episodes.action_maps import ActionMap, check_sign, displacements, metric, relative_closed
from workflow_src.episodes.registry import entry_dict, load_registry

REGISTRY = load_registry()
F = np.float32
WV = F([[0.01, -0.02, 0.03], [0.1, 0.2, -0.3], [0, 0, 0.5]])
RD = F([[0.1, 0.2, -0.3], [0, 0, 0.04], [-0.05, 0, 0]])
HOLD, CLOSE, OPEN = 0.0, 1.0, -1.0


def vectors(gripper=None, name="gripper_closedness_action", **more):
    arrays = {"action/world_vector": WV, "action/rotation_delta": RD, **more}
    return arrays if gripper is None else arrays | {f"action/{name}": np.asarray(gripper)}


def flat(gripper, key="action"):
    return {key: np.concatenate([WV, RD, F(gripper)[:, None]], 1)}


def expect(gripper, translation=1.0, rotation=1.0):
    return np.concatenate([WV * translation, RD * rotation, F(gripper)[:, None]], 1)


BASE = {"action/base_displacement_vector": F([[0.1, 0.2], [0, 0], [0.3, 0]]),
        "action/base_displacement_vertical_rotation": F([[1.5], [0], [-0.5]])}  # fmt: skip
SAMPLE = np.concatenate([WV * 35, RD * 5.6, F([[-1], [1], [-1]]), np.zeros((3, 3), F)], 1)  # WorldGym's units
GOLDEN = {
    "bridge_sample": ({"actions": SAMPLE}, expect([1, 0, 1])),
    # (recorded, expected metric actions)
    "rt_1": (
        vectors(F([[HOLD], [CLOSE], [HOLD]]), **BASE),
        np.concatenate([expect([1, 0, 0]), F([[0.1, 0.2, 1.5], [0, 0, 0], [0.3, 0, -0.5]])], 1),
    ),
    "bridge": (vectors([True, False, True], "open_gripper"), expect([1, 0, 1])),
    "bridge_v2": (flat([1, 0, 1]), expect([1, 0, 1])),
    # Relative actions, which are metres times 50 and radians times 20; never the absolute poses beside them.
    "taco_play": (
        flat([1, -1, 1], "action/rel_actions_world") | {"action/actions": np.full((3, 7), 9.0)},
        expect([1, 0, 1], 1 / 50, 1 / 20),
    ),
    "jaco_play": (
        {"action/world_vector": WV, "action/gripper_closedness_action": F([[HOLD], [OPEN], [HOLD]])},
        expect([0, 1, 1], rotation=0),
    ),
    "berkeley_cable_routing": (vectors(), expect([0, 0, 0])),
    "roboturk": (vectors(F([[0], [1], [0]])), expect([1, 0, 1])),
    "nyu_door_opening_surprising_effectiveness": (vectors(F([[CLOSE], [HOLD], [OPEN]])), expect([0, 0, 1])),
    # 0 is padding: the gripper stays what it was, and the episode is not lost.
    "viola": (vectors(F([CLOSE, HOLD, OPEN])), expect([0, 0, 1])),
    "berkeley_autolab_ur5": (vectors(F([HOLD, HOLD, CLOSE])), expect([1, 1, 0])),
    # open_gripper is True for open; taken for closedness, as OXE's example does, every grasp would be a release.
    "toto": (vectors([True, True, False], "open_gripper"), expect([1, 1, 0])),
} | {
    f"libero_{suite}": (flat([-1, 1, 1]), expect([1, 0, 0], 0.05, 0.5)) for suite in ("10", "goal", "object", "spatial")
}


@pytest.mark.parametrize("name", REGISTRY)
def test_recorded_actions_mean_what_their_authors_meant(name):
    recorded, expected = GOLDEN[name]
    actions = metric(recorded, REGISTRY[name].action)
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, expected, rtol=1e-6)
    # ... and the world model of every registered robot can be conditioned on them.
    embodiments.to_world_model(actions, REGISTRY[name].embodiment, "rehearsal")


def test_largest_recorded_steps_fill_the_range_of_the_world_model():
    """Recorded extremes by OXE's example: what they must become, in world-model units."""
    for name, translation, rotation, expected in [
        ("viola", 1.0, 0.4, (1.75, 1.4)),
        ("berkeley_autolab_ur5", 0.02, 0.07, (1.75, 1.4)),
        ("nyu_door_opening_surprising_effectiveness", 0.07, 0.07, (1.75, 1.4)),
        ("toto", 0.7, 0.5, (1.75, 0.5)),
        ("rt_1", 0.3, 0.2, (0.3, 0.2)),
        ("libero_10", 0.94 * 0.05, 0.375 * 0.5, (1.645, 1.05)),
    ]:
        step = np.float32([[translation] * 3 + [rotation] * 3 + [1]])
        units = embodiments.to_world_model(step, REGISTRY[name].embodiment, "rehearsal")[0]
        assert (units[0], units[3]) == pytest.approx(expected, rel=1e-5), name


def test_relative_gripper_keeps_its_state():
    """Before the first command the gripper is where that command moves it from; small numbers are noise."""
    assert relative_closed(np.array([0, 0.05, 1, 0, 0, -1, 0.0])).tolist() == [1, 1, 0, 0, 0, 1, 1]
    assert relative_closed(np.array([0, -1, 0])).tolist() == [0, 1, 1]
    assert relative_closed(np.zeros(3)).tolist() == [1, 1, 1]


def test_the_data_decides_about_a_doubtful_sign():
    taco, roboturk = REGISTRY["taco_play"].action, REGISTRY["roboturk"].action
    command = np.repeat(F([1, -1, 1, -1]), 15)
    recorded = flat(np.ones(3), "action/rel_actions_world")["action/rel_actions_world"][:1].repeat(60, 0)
    recorded[:, 6] = command
    for sign, flip in ((1, False), (-1, True)):
        width = 0.04 + 0.04 * sign * np.concatenate([[1] * 3, command[:-3]])
        robot_obs = np.pad(width[:, None], ((0, 0), (6, 8)))
        arrays = {"action/rel_actions_world": recorded, "observation/robot_obs": robot_obs}
        assert check_sign(taco, [arrays])[0] is flip
    assert metric(arrays, taco, flip=True)[:, 6].tolist() == (command < 0).tolist()
    starts = [vectors(F([[value], [0], [0]])) for value in (1, 1, 1, 0) * 5]
    flipped, evidence = check_sign(roboturk, starts)
    assert flipped and evidence == "flipped: 25% of the episodes start with an open gripper, 20 episodes"
    undecided = "undecided, as documented: {} of the episodes start with an open gripper, {} episodes"
    assert check_sign(roboturk, (starts[:1] + starts[3:4]) * 20) == (False, undecided.format("50%", 40))
    assert check_sign(roboturk, starts[:4]) == (False, undecided.format("25%", 4)), "too few to tell"
    assert check_sign(REGISTRY["toto"].action, []) == (False, "as documented")


def test_reached_motion():
    poses = np.array([[0, 0, 0, 0, 0, 3.1], [0.01, 0, 0, 0, 0, -3.1]])
    np.testing.assert_allclose(displacements(poses, "euler"), [[0.01, 0, 0, 0, 0, 2 * np.pi - 6.2]], atol=1e-9)
    # A quarter turn about z, then 0.1 rad about the base's x: Euler differences would not say that.
    from scipy.spatial.transform import Rotation

    first = Rotation.from_euler("z", 90, degrees=True)
    second = Rotation.from_euler("x", 0.1) * first
    poses = np.concatenate([np.zeros((2, 3)), [first.as_rotvec(), second.as_rotvec()]], 1)
    np.testing.assert_allclose(displacements(poses, "axis_angle"), [[0, 0, 0, 0.1, 0, 0]], atol=1e-9)


def test_what_is_not_finite_is_named():
    recorded = vectors([True] * 3, "open_gripper")
    recorded["action/world_vector"] = WV.copy()
    recorded["action/world_vector"][1, 2] = np.nan
    with pytest.raises(ValueError, match=r"action/world_vector\[1\] is not finite"):
        metric(recorded, REGISTRY["bridge"].action)
    with pytest.raises(ValueError, match="has no action/rotation_delta"):
        metric({"action/world_vector": WV}, REGISTRY["bridge"].action)
    with pytest.raises(ValueError, match=r"shape \(3, 2\)"):
        metric({"a": WV[:, :2]}, ActionMap(translation="a"))


def test_robots_of_unknown_axes_are_not_mirrored():
    with pytest.raises(UserError, match=r"world_model.mirror: how a mirrored ur5_autolab .* set it to false"):
        embodiments.mirror_actions(np.zeros((1, 7)), "ur5_autolab")


def test_held_out_episodes_are_every_nth():
    libero, viola = REGISTRY["libero_10"], REGISTRY["viola"]
    assert [i for i in range(100) if libero.split_of("train", i) == "validation"] == [19, 39, 59, 79, 99]
    assert {viola.split_of("train", i) for i in range(100)} == {"train"} and viola.split_of("test", 3) == "test"
    assert (libero.stored_splits(), viola.stored_splits()) == (["train", "validation"], ["train", "test"])


def test_own_data_sets_stand_beside_the_registered_ones(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"mine": entry_dict(REGISTRY["viola"])}))
    assert load_registry(path)["mine"] == REGISTRY["viola"]
    assert set(load_registry(path)) == {*REGISTRY, "mine"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imag": "x"}, r"mine.imag: unknown key; did you mean 'image'\?"),
        ({"embodiment": "ur55_autolab"}, r"mine.embodiment: 'ur55_autolab' is unknown; did you mean 'ur5_autolab'\?"),
        ({"licence": ""}, r"mine.licence: is missing"),
        ({"splits": {"train": 3}}, r"mine.hold_out: 0 beside the splits train; it must be 2 or more"),
        ({"action": {"translation": "a", "reason": "b", "gripper": "c"}}, r"mine.action.gripper: 'c' does not go with"),
        ({"action": {"translation": "a[0-3]", "reason": "b"}}, r"'a\[0-3\]' is not a feature's path"),
    ],
)
def test_mistakes_in_the_registry_are_named(tmp_path, change, message):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"mine": entry_dict(REGISTRY["viola"]) | change}))
    with pytest.raises(UserError, match=message):
        load_registry(path)
