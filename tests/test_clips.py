"""Training clips: every frame is reachable, actions stand beside the right frame, and mixtures are what they say."""

import hashlib

import numpy as np
import pytest

from workflow_src.common.errors import UserError
from workflow_src.embodiments import from_world_model
from workflow_src.episodes.actions import beside_frames, compose, compose_ahead, metric_actions
from workflow_src.episodes.clips import Choice, Clips, Starts, contact_weight
from workflow_src.episodes.mixture import Mixture, frame_skips, read_mixture
from workflow_src.episodes.store import EpisodeStore, write_episode, write_table
from workflow_src.training import randomness

ALONE = np.ones(1)


def clips(lengths, frames, skip=1, mirror=False) -> Clips:
    """Clips of a single data set."""
    return Clips([Starts("data", np.asarray(lengths), frames, skip)], ALONE, mirror)


def draw(clips: Clips, count: int, step: int = 0) -> Choice:
    return clips.choose(randomness.uniform(0, step, range(count), 3))


# ---- which frames ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "skip"), [(4, 1), (2, 1), (3, 2), (2, 4), (9, 1)])
@pytest.mark.parametrize("lengths", [[9] * 5, [9, 12, 30, 9, 17], [5, 2, 9, 1]])
def test_every_frame_is_reachable(lengths, frames, skip):
    choice = draw(made := clips(lengths, frames, skip), 6000)
    numbers = made.frame_numbers(choice)
    drawn = set(zip(choice.episode.repeat(frames).tolist(), numbers.ravel().tolist()))
    starts = [max(0, length - (frames - 1) * skip) for length in lengths]
    assert {e for e, _ in drawn} == {e for e, count in enumerate(starts) if count}
    for e, count in enumerate(starts):
        reached = {f for episode, f in drawn if episode == e}
        if count >= skip:
            assert reached == set(range(lengths[e]))
        else:  # an episode that one clip fills from end to end has no room for the frames that it leaves out
            assert reached == {start + skip * n for start in range(count) for n in range(frames)}
    assert np.all(np.diff(numbers, axis=1) == skip)


def test_openings_are_frequent_and_half_of_the_clips_are_mirrored():
    choice = draw(clips([9] * 5, 4, mirror=True), 4000)
    assert (choice.start == 0).mean() > 1.5 / 6
    assert 0.4 < choice.mirrored.mean() < 0.6
    assert not draw(clips([9] * 5, 4), 100).mirrored.any()


def test_a_clip_as_long_as_the_episode_starts_at_its_first_frame():
    assert not draw(clips([4, 4], 4), 50).start.any()


def test_clips_are_equally_likely_whatever_the_length_of_their_episode():
    choice = draw(clips([4, 23], 4), 8000)  # 1 and 20 clips
    began = choice.start > 0  # without those moved to the opening
    assert (choice.episode[began] == 1).all()
    counts = np.bincount(choice.start[began], minlength=20)[1:]
    assert counts.min() > 0.75 * counts.max()


def test_the_choice_is_what_it_was_when_all_episodes_had_one_length():
    """Reported results of the tabletop hang on it: computed before stores of unequal episodes were possible."""
    rng = np.random.default_rng(0)
    one = clips([9] * 7, 4, mirror=True)
    moved = np.concatenate([contact_weight(row, 3, 2.0) for row in rng.random((7, 8)) < 0.3])
    two = Clips([Starts("data", np.full(7, 9), 4)], ALONE, False, [moved])
    moved = np.concatenate([contact_weight(row, 4, 2.0) for row in rng.random((4000, 18)) < 0.2])
    three = Clips([Starts("data", np.full(4000, 19), 5)], ALONE, True, [moved])
    draws = randomness.uniform(0, 0, range(2000), 3)
    choices = one.choose(draws), two.choose(draws), three.choose(randomness.uniform(11, 3, range(4000), 3))
    assert choices[0].episode[:8].tolist() == [4, 6, 3, 4, 2, 5, 2, 4]
    assert choices[0].start[:8].tolist() == [4, 2, 2, 5, 5, 1, 4, 5]
    digests = [
        hashlib.sha256(np.stack([c.episode, c.start, c.mirrored]).astype("<i8").tobytes()).hexdigest()[:16]
        for c in choices
    ]
    assert digests == ["92541dbd08dd00ba", "6defb1645119767a", "7a8bdac1734ec032"]


def test_clips_with_contact_are_drawn_more_often_and_the_others_still_reachable():
    moved = np.zeros((2, 8), bool)
    moved[1, 4:7] = True
    weights = [contact_weight(row, steps=3, weight=3.0) for row in moved]
    assert [weight.tolist() for weight in weights] == [[1] * 6, [1, 1, 2, 3, 4, 3]]
    assert contact_weight(moved[0], steps=9, weight=3.0).size == 0  # too short for a clip
    choice = draw(Clips([Starts("data", np.array([9, 9]), 4)], ALONE, False, [np.concatenate(weights)]), 6000)
    drawn = np.zeros((2, 6))
    np.add.at(drawn, (choice.episode, choice.start), 1)
    assert (drawn > 0).all()
    assert drawn[1, 4] / drawn[0, 4] == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize(
    ("lengths", "frames", "skip", "message"),
    [
        ([], 4, 1, "x: holds no episode"),
        ([9, 5, 9], 10, 1, r"clip_frames: 10 frames do not fit any of the 3 episodes of x, .* 9 frames; .* 2 to 9"),
        ([9, 5, 9], 1, 1, r"world_model\.clip_frames: 1 "),
        ([9, 5, 9], 5, 3, r"5 frames, every 3\. one, do not fit any .* choose 2 to 3"),
    ],
)  # fmt: skip
def test_impossible_clips_are_refused_before_training(lengths, frames, skip, message):
    with pytest.raises(UserError, match=message):
        Starts("x", np.array(lengths, int), frames, skip)


# ---- mixtures --------------------------------------------------------------------------------------------------------


def test_a_mixture_draws_each_data_set_by_its_share_and_reaches_all_of_each():
    starts = [
        Starts("a", np.array([6, 3, 9]), 4),
        Starts("b", np.array([20]), 4, skip=3),
        Starts("c", np.full(2, 5), 4),
    ]
    made = Clips(starts, np.array([0.5, 0.2, 0.3]), False)
    choice = draw(made, 20_000)
    source, number = made.sources(choice.episode)
    np.testing.assert_allclose(np.bincount(source) / 20_000, [0.5, 0.2, 0.3], atol=0.015)
    for which, (lengths, skip) in enumerate([((6, 3, 9), 1), ((20,), 3), ((5, 5), 1)]):
        mine = source == which
        frames = made.frame_numbers(choice)[mine]
        assert (np.diff(frames, axis=1) == skip).all()
        reached = set(zip(number[mine].repeat(4).tolist(), frames.ravel().tolist()))
        assert reached == {(e, f) for e, length in enumerate(lengths) for f in range(length) if length > 3 * skip}


def test_a_choice_is_a_function_of_seed_step_and_sample():
    made = Clips([Starts("a", np.array([6, 9]), 4), Starts("b", np.array([20, 7]), 4)], np.array([0.4, 0.6]), True)
    whole = made.choose(randomness.uniform(3, 8, range(64), 3))
    parts = [made.choose(randomness.uniform(3, 8, range(a, a + 16), 3)) for a in (48, 0, 32, 16)]
    for name in ("episode", "start", "mirrored"):
        pieces = [getattr(parts[p], name) for p in (1, 3, 2, 0)]
        np.testing.assert_array_equal(np.concatenate(pieces), getattr(whole, name))


def test_a_list_counts_clips_and_weights_count_themselves():
    listed = read_mixture("rt_1, bridge_v2", "lab")
    assert listed.names == ("rt_1", "bridge_v2")
    np.testing.assert_allclose(listed.shares([300, 100]), [0.75, 0.25])
    weighted = read_mixture({"bridge_v2": 1.0, "rt_1": 3.0}, "lab")
    assert weighted.names == ("rt_1", "bridge_v2")  # the heaviest is the primary one: order in a file means nothing
    np.testing.assert_allclose(weighted.shares([1, 1000]), [0.75, 0.25])
    assert read_mixture({"b": 1.0, "a": 1.0}, "lab").names == ("a", "b")
    assert read_mixture("", "lab") == read_mixture({}, "lab") == Mixture(("lab",), None)
    assert frame_skips(3, ["a", "b"]) == [3, 3] and frame_skips({"b": 2}, ["a", "b"]) == [1, 2]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: read_mixture("a,,b", "lab"), r"world_model\.data: 'a,,b' names nothing or the same twice"),
        (lambda: read_mixture("a,b,a", "lab"), "same twice"),
        (lambda: read_mixture({"a": 0.0}, "lab"), r"world_model\.data\.a: weight 0\.0 is not positive"),
        (lambda: read_mixture({"a": float("nan")}, "lab"), "weight nan is not positive"),
        (lambda: frame_skips({"rt1": 2}, ["rt_1"]), r"frame_skip: 'rt1' is unknown; did you mean 'rt_1'"),
        (lambda: frame_skips(0, ["a"]), r"world_model\.frame_skip: 0 for a is impossible"),
    ],
)
def test_wrong_mixtures_are_named(read, message):
    with pytest.raises(UserError, match=message):
        read()


# ---- actions ---------------------------------------------------------------------------------------------------------

TABLETOP = {"embodiment": "tabletop", "convention": "rehearsal"}


def some_actions(count: int) -> np.ndarray:
    """Metric actions float32 (count, 7) within the range of one control step."""
    rng = np.random.default_rng(count)
    moves = rng.uniform(-0.05, 0.05, (count, 6))
    return np.concatenate([moves, rng.integers(0, 2, (count, 1))], 1).astype(np.float32)


def units(actions: np.ndarray) -> np.ndarray:
    """In world-model units, written out: metres x 35, radians x 5.6, closedness from -1 to 1, no base."""
    scaled = actions * np.array([35, 35, 35, 5.6, 5.6, 5.6, -2], np.float32)
    scaled[..., 6] += 1
    return np.pad(scaled, ((0, 0), (0, 3)))


def test_actions_stand_beside_the_frame_they_lead_to():
    actions = some_actions(5)
    led = beside_frames(actions, alignment="leads_to", **TABLETOP)
    assert led.shape == (6, 10) and not led[0].any()
    np.testing.assert_allclose(led[1:], units(actions), atol=1e-6)
    published = beside_frames(actions, alignment="worldgym_train", **TABLETOP)
    np.testing.assert_array_equal(published, np.roll(led, -1, axis=0))
    with pytest.raises(UserError, match="alignment"):
        beside_frames(actions, alignment="lead_to", **TABLETOP)


@pytest.mark.parametrize("skip", [2, 3, 7])
def test_skipped_frames_leave_their_motion_in_the_action(skip):
    actions = some_actions(10)
    led = beside_frames(actions, alignment="leads_to", skip=skip, **TABLETOP)
    ahead = beside_frames(actions, alignment="worldgym_train", skip=skip, **TABLETOP)
    for t in range(1, 11):
        before = actions[max(0, t - skip) : t]
        together = np.append(before[:, :6].sum(0), before[-1, 6])
        np.testing.assert_allclose(led[t], units(together[None])[0], atol=1e-5)
    for t in range(10):
        after = actions[t : t + skip]
        np.testing.assert_allclose(ahead[t], units(np.append(after[:, :6].sum(0), after[-1, 6])[None])[0], atol=1e-5)
    assert not led[0].any() and not ahead[10].any()


def test_a_composed_action_is_clipped_at_the_range_of_its_steps():
    actions = np.full((6, 7), 0.05, np.float32)
    led = beside_frames(actions, alignment="leads_to", skip=3, **TABLETOP)
    np.testing.assert_allclose(led[3:, 0], 3 * 1.75, rtol=1e-6)
    wild = beside_frames(10 * actions, alignment="leads_to", skip=3, **TABLETOP)
    np.testing.assert_allclose(wild[3:, 0], 3 * 1.75, rtol=1e-6)


def test_composing_one_action_changes_no_bit_and_keeps_the_base():
    actions = np.random.default_rng(0).normal(size=(8, 10)).astype(np.float32)
    np.testing.assert_array_equal(compose(actions, 1), actions)
    np.testing.assert_array_equal(compose_ahead(actions, 1), actions)
    two = compose(actions, 2)
    np.testing.assert_allclose(two[1:, 7:], actions[1:, 7:] + actions[:-1, 7:], rtol=1e-6)
    np.testing.assert_array_equal(two[:, 6], actions[:, 6])


def store_with(root, semantics="commanded", frames=4, **arrays) -> EpisodeStore:
    """A store of one episode."""
    sums = write_episode(root, 0, np.zeros((frames, 8, 8, 3), np.uint8), arrays, fps=5)
    write_table(root / "episodes.parquet", [
        {"index": 0, "frames": frames, "control_hz": 5.0, "embodiment": "widowx", "action_semantics": semantics, **sums}
    ])  # fmt: skip
    return EpisodeStore(root)


def read_actions(store, kind="commanded"):
    return metric_actions(store, 0, store.arrays(0), int(store.lengths[0]), kind)


def test_actions_of_worldgym_are_turned_into_metric_ones(tmp_path):
    published = np.zeros((4, 10), np.float32)
    published[:, 0], published[:, 4], published[:, 6] = 1.4, 0.56, -1
    read = read_actions(store_with(tmp_path, "worldgym", actions=published))
    np.testing.assert_allclose(read, [[0.04, 0, 0, 0, 0.1, 0, 1]] * 3, atol=1e-6)  # the last one leads nowhere
    np.testing.assert_array_equal(read, from_world_model(published[:3], "widowx", "worldgym"))


@pytest.mark.parametrize(
    ("semantics", "arrays", "kind", "message"),
    [
        ("commanded", {"actions": np.zeros((3, 8))}, "commanded", r"000000000\.npz: actions of shape \(3, 8\) beside 4 frames"),
        ("commanded", {"actions": np.zeros((4, 7))}, "commanded", r"shape \(4, 7\) beside 4 frames, not \(3, 7 or 10\)"),
        ("worldgym", {"actions": np.zeros((4, 7))}, "commanded", r"not \(3, 10\)"),
        ("commanded", {"actions": np.full((3, 7), np.nan)}, "commanded", r"000000000\.npz: actions\[0\] is not finite"),
        ("commanded", {"actions": np.zeros((3, 7))}, "reached", r"world_model\.actions: 'reached' is not in .*000000000\.npz"),
        ("commanded", {"state": np.zeros((4, 7))}, "commanded", r"000000000\.npz: holds no actions"),
    ],
)  # fmt: skip
def test_actions_that_cannot_be_used_are_named(tmp_path, semantics, arrays, kind, message):
    with pytest.raises(UserError, match=message) as error:
        read_actions(store_with(tmp_path, semantics, **arrays), kind)
    assert "\n" not in str(error.value)
