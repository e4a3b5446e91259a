"""The lab: physics that grasps by friction, honest predicates, an expert that succeeds, whatever the workers."""

import os
import signal
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest

from workflow_src.common.errors import UserError
from workflow_src.common.process import alive
from workflow_src.common.seeds import rng
from workflow_src.embodiments import mirror_actions
from workflow_src.tabletop import expert
from workflow_src.tabletop.render import Renderer
from workflow_src.tabletop.scene import mirror_state, sample_state, state_layout, state_size
from workflow_src.tabletop.simulator import Simulator
from workflow_src.tabletop.tasks import TASKS, tasks_of

ENV = "workflow_src.tabletop.env:Tabletop-v0"
LAB_TASKS = ("put_on_plate", "lift", "push_left")
OPEN, CLOSED = 1.0, 0.0


def around_block(offset=(0.0, 0.0)) -> np.ndarray:
    """The open gripper down at the red block, which lies in the middle; the plate far away."""
    state = np.zeros(state_size("one_block"), np.float32)
    layout = state_layout("one_block")
    state[layout["gripper"]] = [offset[0], offset[1], 0.01]
    state[layout["opening"]] = 1
    state[layout["red_block"]] = [0, 0, 0.025]
    state[layout["red_block_quaternion"]] = [1, 0, 0, 0]
    state[layout["plate"]] = [0.11, 0.05, 0]
    return state


def act(simulator: Simulator, *actions) -> np.ndarray:
    for dx, dy, dz, opening in actions:
        simulator.step(np.array([dx, dy, dz, 0, 0, 0, opening]))
    return simulator.state()


def run_expert(scene: str, task: str, seed: int, horizon: int) -> tuple[bool, float]:
    description, simulator = TASKS[task], Simulator(scene)
    start = sample_state(scene, rng(seed, "test"), lambda state: description.accepts(state, scene))
    simulator.reset(start)
    for _ in range(horizon):
        simulator.step(expert.actions(simulator.state()[None], task, scene)[0])
    end = simulator.state()
    return bool(description.success(end, start, scene)), float(description.partial(end, start, scene))


def make(num_envs=3, **options) -> gymnasium.vector.VectorEnv:
    return gymnasium.make_vec(ENV, num_envs=num_envs, image_size=16, supersample=1, **options)


def trials(count: int) -> list[dict]:
    return [{"task": LAB_TASKS[i % 3], "seed": i} for i in range(count)]


def roll(env, chosen: list[dict], steps: int = 4) -> dict[str, np.ndarray]:
    """Images and states of a rollout of expert actions, each of shape (N, steps + 1, ...)."""
    observation, info = env.reset(options={"trials": chosen})
    seen = [(observation["image"], info["state"])]
    for _ in range(steps):
        actions = env.unwrapped.expert_actions(info["state"], [trial["task"] for trial in chosen])
        observation, _, _, _, info = env.step(actions)
        seen.append((observation["image"], info["state"]))
    return {"image": np.stack([s[0] for s in seen], 1), "state": np.stack([s[1] for s in seen], 1)}


# ---- physics ---------------------------------------------------------------------------------------------------------


def test_friction_lifts_the_block_and_opening_drops_it():
    simulator = Simulator("one_block")
    simulator.reset(around_block())
    held = act(simulator, (0, 0, 0, CLOSED), (0, 0, 0, CLOSED), *[(0, 0, 0.05, CLOSED)] * 2)
    assert held[6] > 0.1
    assert 0.5 < held[3] < 0.66  # the fingers are as far apart as the block is wide
    # Held for two seconds, it does not creep out.
    later = act(simulator, *[(0, 0, 0, CLOSED)] * 10)
    assert abs(later[6] - held[6]) < 0.004
    assert act(simulator, *[(0, 0, 0, OPEN)] * 3)[6] < 0.03


@pytest.mark.parametrize("grip", [CLOSED, 0.75])
def test_a_miss_and_a_half_closed_gripper_lift_nothing(grip):
    simulator = Simulator("one_block")
    # Closed beside the block, or around it but wider than it.
    simulator.reset(around_block(offset=(0.085, 0) if grip == CLOSED else (0, 0)))
    state = act(simulator, (0, 0, 0, grip), (0, 0, 0, grip), *[(0, 0, 0.05, grip)] * 3)
    assert state[2] > 0.1 and state[6] < 0.03


def test_pushing_moves_the_block_by_contact_only():
    simulator = Simulator("one_block")
    state = around_block(offset=(0.08, 0))
    state[3] = 0
    simulator.reset(state)
    assert act(simulator, (-0.03, 0, 0, CLOSED))[4] == pytest.approx(0, abs=1e-3)
    assert act(simulator, *[(-0.05, 0, 0, CLOSED)] * 2)[4] < -0.05


def test_a_hand_pressed_onto_a_block_rises_at_once():
    simulator = Simulator("one_block")
    state = around_block()
    state[2:4] = 0.06, 0
    simulator.reset(state)
    pressed = act(simulator, *[(0, 0, -0.05, CLOSED)] * 6)[2]
    assert act(simulator, (0, 0, 0.03, CLOSED))[2] > pressed + 0.015


# ---- tasks and expert ------------------------------------------------------------------------------------------------


def test_predicates_know_success_from_near_success():
    start = around_block()
    layout = state_layout("one_block")
    state = np.stack([start] * 4)
    state[:, layout["red_block"]] = [[0.11, 0.05, 0.025], [0.11, 0.05, 0.025], [0, 0, 0.09], [-0.07, 0, 0.025]]
    state[:, layout["gripper"]] = [[0.11, 0.05, 0.01], [0.11, 0.05, 0.1], [0, 0, 0.07], [-0.02, 0, 0.01]]
    state[:, layout["opening"]] = [[0.6], [1.0], [0.6], [0.0]]
    results = {name: TASKS[name].success(state, start, "one_block").tolist() for name in LAB_TASKS}
    assert results["put_on_plate"] == [False, True, False, False]  # still held is not yet put
    assert results["lift"] == [False, False, True, False]
    assert results["push_left"] == [False, False, False, True]
    partial = TASKS["put_on_plate"].partial(state, start, "one_block")
    assert partial.tolist() == [0.5, 1.0, 0.5, 0.25]


@pytest.mark.parametrize("task", tasks_of("one_block"))
def test_expert_succeeds_with_one_block(task):
    assert all(run_expert("one_block", task, seed, 18) == (True, 1.0) for seed in range(5))


@pytest.mark.parametrize("task", tasks_of("two_blocks"))
def test_expert_succeeds_with_two_blocks(task):
    assert all(run_expert("two_blocks", task, seed, 24) == (True, 1.0) for seed in range(2))


def test_expert_is_a_function_of_the_state_alone():
    states = np.stack([sample_state("one_block", rng(i, "test")) for i in range(6)])
    together = expert.all_actions(states, LAB_TASKS, "one_block")
    assert together.shape == (6, 3, 7) and together.dtype == np.float32
    alone = np.concatenate([expert.all_actions(state[None], LAB_TASKS, "one_block") for state in states[::-1]])
    np.testing.assert_array_equal(together, alone[::-1])


def test_expert_of_the_mirrored_state_acts_mirrored():
    states = np.stack([sample_state("one_block", rng(i, "test")) for i in range(20)])
    mirrored = mirror_state(states, "one_block")
    for task, other in {"put_on_plate": "put_on_plate", "lift": "lift", "push_left": "push_right"}.items():
        np.testing.assert_allclose(
            expert.actions(mirrored, other, "one_block"),
            mirror_actions(expert.actions(states, task, "one_block")),
            atol=1e-7,
        )


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", ["one_block", "two_blocks"])
def test_images_of_mirrored_states_are_mirrored_images(scene):
    renderer, simulator = Renderer(scene, 32, 2), Simulator(scene)
    for i in range(5):
        state = sample_state(scene, rng(i, "test"))
        images = []
        for version in (state, mirror_state(state, scene)):
            simulator.reset(version)
            images.append(renderer.render(simulator.data).astype(int))
        assert np.abs(images[0][:, ::-1] - images[1]).max() <= 8
        assert (images[0][:, ::-1] != images[1]).mean() < 0.005


@pytest.mark.parametrize("scene", ["one_block", "two_blocks"])
def test_casting_only_what_moved_gives_the_full_image(scene):
    renderer, simulator = Renderer(scene, 32, 2), Simulator(scene)
    for i in range(3):
        simulator.reset(sample_state(scene, rng(i, "test")))
        for _ in range(6):
            simulator.step(expert.actions(simulator.state()[None], "put_on_plate", scene)[0])
            np.testing.assert_array_equal(renderer.render(simulator.data), renderer.render(simulator.data, full=True))


def test_one_sees_the_block_the_plate_the_gripper_and_its_shadow():
    renderer, simulator = Renderer("one_block", 48, 2), Simulator("one_block")
    state = around_block(offset=(-0.07, 0))
    state[2] = 0.1
    simulator.reset(state)
    image = renderer.render(simulator.data).astype(int)
    red, green, blue = np.moveaxis(image, -1, 0)
    assert 20 < ((red > 2 * green) & (red > 2 * blue)).sum() < 150
    assert 40 < ((green > 1.4 * red) & (green > 1.2 * blue)).sum() < 250
    assert 10 < ((red > 1.8 * blue) & (green > 1.4 * blue) & (red > 80)).sum() < 100  # yellow fingers
    greyish = (image.max(-1) - image.min(-1) < 25) & (image.mean(-1) > 85) & (image.mean(-1) < 130)
    assert greyish.sum() > 10  # the shadow


# ---- environment -----------------------------------------------------------------------------------------------------


def test_api_of_the_vector_environment():
    env = make(expert=True, horizon=2)
    observation, info = env.reset(seed=[3, 4, 5], options={"trials": trials(3)})
    assert env.observation_space.contains(observation) and observation["image"].shape == (3, 16, 16, 3)
    assert info["state"].shape == (3, 14) and info["expert"].shape == (3, 3, 7)
    assert info["success"].dtype == bool and not info["success"].any() and info["partial"].dtype == np.float32
    for expected in (False, True):
        _, reward, terminated, truncated, info = env.step(info["expert"][:, 0])
        assert reward.shape == (3,) and not terminated.any() and (truncated == expected).all()
    env.close()


def test_a_recorded_first_state_resets_to_itself_bitwise():
    env = make()
    first = roll(env, trials(3))
    again = roll(
        env, [{"task": t["task"], "initial_state": s.tolist()} for t, s in zip(trials(3), first["state"][:, 0])]
    )
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    env.close()


def test_results_do_not_depend_on_workers_or_batch():
    reference = make(5, workers=1)
    expected = roll(reference, trials(5))
    reference.close()
    spread = make(5, workers=2)
    results = roll(spread, trials(5))
    again = roll(spread, trials(5))
    spread.close()
    alone = make(1, workers=0)
    single = roll(alone, trials(5)[3:4])
    alone.close()
    for name in expected:
        np.testing.assert_array_equal(results[name], expected[name])
        np.testing.assert_array_equal(again[name], expected[name])
        np.testing.assert_array_equal(single[name][0], expected[name][3])


def test_seeded_reset_without_trials_draws_the_same_tasks_and_states():
    env = make()
    first, second, other = (env.reset(seed=seed)[1]["state"] for seed in (7, 7, 8))
    env.close()
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(scene="one_blok"), "one_block"),
        (lambda: make(tasks=("lift", "put_on_plat")), "did you mean 'put_on_plate'"),
        (lambda: make(horizon=0), "horizon 0"),
        (lambda: make().reset(options={"trials": trials(2)}), "2 trials for 3"),
        (lambda: make().reset(options={"trials": [{"task": "lift", "initial_state": [0.0]}] * 3}), "14 finite numbers"),
        (lambda: make().step(np.zeros((2, 7))), "must be finite"),
        (lambda: make().step(np.full((3, 7), np.nan)), "must be finite"),
    ],
)
def test_wrong_use_is_one_clear_line(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_killed_worker_is_noticed():
    env = make(2, workers=2)
    env.reset(options={"trials": trials(2)})
    os.kill(env.unwrapped._fleet._workers[0][0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="simulation worker"):
        env.step(np.zeros((2, 7), np.float32))
    env.close()


def test_workers_die_with_a_killed_parent():
    code = (
        f"import gymnasium, time; env = gymnasium.make_vec('{ENV}', num_envs=2, image_size=8, workers=2);"
        "print(*[w[0].pid for w in env.unwrapped._fleet._workers], flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)
