"""Units: what a policy means in metres reaches the network in its own units, and back."""

import numpy as np
import pytest

from workflow_src import embodiments
from workflow_src.common.errors import UserError

ACTIONS = np.array([[0.01, -0.02, 0.05, 0.1, -0.25, 0.2, 1.0], [-0.05, 0.0, 0.03, 0.0, 0.0, 0.0, 0.0]], np.float32)


def test_bridge_scaling_as_published():
    converted = embodiments.to_world_model(ACTIONS, "widowx", "worldgym")
    assert converted.dtype == np.float32 and converted.shape == (2, 10)
    np.testing.assert_allclose(converted[0], [0.35, -0.7, 1.74, 0.56, -1.39, 1.12, -1, 0, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(converted[1], [-1.74, 0, 1.05, 0, 0, 0, 1, 0, 0, 0], rtol=1e-5)


def test_libero_and_droid_scaling():
    """LIBERO's own unit is the controller's full deflection: 0.05 m and 0.5 rad; DROID is as the WidowX, ungripped."""
    libero = embodiments.to_world_model(ACTIONS[0], "libero", "worldgym")
    np.testing.assert_allclose(libero, [0.2, -0.4, 1.0, 0.2, -0.5, 0.4, -1, 0, 0, 0], rtol=1e-6)
    turned = embodiments.to_world_model([0, 0, 0, 0.5, 0, 0, 0.5], "libero", "rehearsal")
    assert turned[[3, 6]].tolist() == pytest.approx([2.8, 1])  # half open counts as closed
    droid = embodiments.to_world_model([0.01, 0, -0.05, 0, 0.25, 0, 0.25], "droid", "rehearsal")
    assert droid.tolist() == pytest.approx([0.35, 0, -1.75, 0, 1.4, 0, 0.5, 0, 0, 0])
    with pytest.raises(UserError, match="'worldgym' is unknown for droid"):
        embodiments.scale("droid", "worldgym")


def test_rt1_is_unscaled_its_gripper_relative_and_its_base_live():
    opening = np.float32([1, 0, 0, 1, 1, 0])
    actions = np.zeros((6, 10), np.float32)
    actions[:, 0], actions[:, 4], actions[:, 6], actions[:, 7:] = 0.13, -0.4, opening, [0.5, -0.25, 1.5]
    converted = embodiments.to_world_model(actions, "google_robot", "worldgym")
    np.testing.assert_allclose(converted[0], [0.13, 0, 0, 0, -0.4, 0, 0, 0.5, -0.25, 1.5])
    assert converted[:, 6].tolist() == [0, 1, 0, -1, 0, 1]  # nothing, closes, nothing, opens, nothing, closes
    np.testing.assert_array_equal(embodiments.from_world_model(converted, "google_robot", "worldgym"), actions)
    # Rows of a batch that went on from a closed gripper; a lone action.
    rows = embodiments.to_world_model(
        np.stack([actions[1:2]] * 2), "google_robot", "worldgym", before=np.float32([0, 1])
    )
    assert rows[:, 0, 6].tolist() == [0, 1]
    assert embodiments.to_world_model(actions[0], "google_robot", "worldgym", before=0.0)[6] == -1
    assert embodiments.from_world_model(converted[1], "google_robot", "worldgym")[6] == 0


def test_a_relative_gripper_is_followed_beyond_half_of_its_range():
    assert embodiments.follow_gripper(np.array([0.4, 0.6, 0.0, -0.5, -0.51]), 1.0).tolist() == [1, 0, 0, 0, 1]
    assert embodiments.follow_gripper(np.array([[0.0], [0.0]]), np.array([0.0, 1.0])).tolist() == [[0], [1]]


def test_mirroring_turns_the_base_about():
    action = np.float32([0.1, 0.2, 0, 0, 0, 0, 1, 0.3, 0.4, 0.5])
    np.testing.assert_array_equal(
        embodiments.mirror_actions(action, "google_robot"), np.float32([0.1, -0.2, 0, 0, 0, 0, 1, 0.3, -0.4, -0.5])
    )


@pytest.mark.parametrize("embodiment", ["widowx", "tabletop"])
def test_full_range_survives_the_round_trip(embodiment):
    there = embodiments.to_world_model(ACTIONS, embodiment, "rehearsal")
    np.testing.assert_allclose(embodiments.from_world_model(there, embodiment, "rehearsal"), ACTIONS, atol=1e-7)


def test_gripper_is_continuous_on_the_tabletop_and_binary_on_the_widowx():
    action = np.array([0, 0, 0, 0, 0, 0, 0.75])
    assert embodiments.to_world_model(action, "tabletop", "rehearsal")[6] == pytest.approx(-0.5)
    assert embodiments.to_world_model(action, "widowx", "worldgym")[6] == -1


def test_steps_beyond_the_range_are_clipped():
    far = np.array([1, -1, 0, 9, -9, 0, 3], float)
    assert embodiments.to_world_model(far, "tabletop", "rehearsal")[:7].tolist() == pytest.approx(
        [1.75, -1.75, 0, 1.4, -1.4, 0, -1]
    )


def test_an_action_over_several_steps_may_be_that_many_times_as_large():
    far = np.array([0.1, -1, 0, 0.5, -9, 0, 3], float)
    assert embodiments.to_world_model(far, "tabletop", "rehearsal", steps=3)[:7].tolist() == pytest.approx(
        [3.5, -5.25, 0, 2.8, -4.2, 0, -1]
    )


def test_base_motion_on_a_fixed_base_is_refused():
    still = np.concatenate([ACTIONS[0], np.zeros(3)])
    assert embodiments.to_world_model(still, "widowx", "worldgym").shape == (10,)
    moving = np.concatenate([ACTIONS[0], [0, 0.1, 0]])
    with pytest.raises(UserError, match="fixed base"):
        embodiments.to_world_model(moving, "widowx", "worldgym")
    with pytest.raises(UserError, match="fixed base"):
        embodiments.from_world_model(moving, "tabletop", "rehearsal")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: embodiments.get("widow_x"), "did you mean 'widowx'"),
        (lambda: embodiments.to_world_model(ACTIONS, "widowx", "rehersal"), "did you mean 'rehearsal'"),
        (lambda: embodiments.to_world_model(ACTIONS[:, :6], "widowx", "worldgym"), "7 or 10"),
        (lambda: embodiments.to_world_model(ACTIONS * np.nan, "widowx", "worldgym"), "NaN"),
        (lambda: embodiments.mirror_actions(ACTIONS[:, :6]), "width 6"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_mirroring_commutes_with_units_and_is_its_own_inverse():
    mirrored = embodiments.mirror_actions(ACTIONS)
    np.testing.assert_array_equal(mirrored[0], np.float32([-0.01, -0.02, 0.05, 0.1, 0.25, -0.2, 1.0]))
    np.testing.assert_array_equal(embodiments.mirror_actions(mirrored), ACTIONS)
    np.testing.assert_array_equal(
        embodiments.to_world_model(mirrored, "tabletop", "rehearsal"),
        embodiments.mirror_actions(embodiments.to_world_model(ACTIONS, "tabletop", "rehearsal")),
    )
    # The WidowX's y axis points sideways.
    assert embodiments.mirror_actions(ACTIONS, "widowx")[0].tolist() == pytest.approx(
        [0.01, 0.02, 0.05, -0.1, -0.25, -0.2, 1]
    )


def rotation(rpy):
    (cr, cp, cy), (sr, sp, sy) = np.cos(rpy), np.sin(rpy)
    x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return z @ y @ x


@pytest.mark.parametrize(("embodiment", "axis"), [("tabletop", 0), ("widowx", 1)])
def test_mirrored_rotation_is_the_rotation_seen_in_the_mirror(embodiment, axis):
    mirror = np.eye(3)
    mirror[axis, axis] = -1
    action = np.array([0, 0, 0, 0.3, -0.5, 0.7, 0])
    flipped = embodiments.mirror_actions(action, embodiment)
    np.testing.assert_allclose(rotation(flipped[3:6]), mirror @ rotation(action[3:6]) @ mirror, atol=1e-12)
