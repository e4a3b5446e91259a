"""Generation: the published numbers, and the cached sampler against the naive one."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import parity
from tests.worlds import FACTORISED, FLOW, JOINT, make_network, random
from workflow_src.common import sections
from workflow_src.common.errors import UserError
from workflow_src.world_model.diffusion import Objective
from workflow_src.world_model.sampler import make_sampler, pyramid

torch.set_num_threads(1)

FRAMES = 9  # generated after the first one, in windows of 6: the window slides


def generate(network, objective, config, batch=1, frames=FRAMES, context=1):
    """Generate `frames` frames in chunks of `config.horizon`, (batch, frames, h, w, C)."""
    return roll_out(make_sampler(network, Objective(objective), config), batch, frames, context)


def roll_out(sampler, batch=1, frames=FRAMES, context=1):
    """See `generate`."""
    network, config = sampler.network, sampler.config
    size, channels = network.height, network.config.in_channels
    shape = batch, context + frames, size, size, channels
    noise, seen, actions = random(*shape), random(*shape, seed=1), random(batch, context + frames, 10, seed=2)
    sampler.reset(seen[:, :context], actions[:, :context], context_noise=noise[:, :context])
    out = []
    for start in range(context, context + frames, config.horizon):
        chunk = slice(start, min(start + config.horizon, context + frames))
        out.append(sampler.generate(actions[:, chunk], noise[:, chunk], context_noise=seen[:, chunk]))
    return torch.cat(out, 1)


@pytest.mark.parametrize("cached", [False, True], ids=["naive", "cached"])
@pytest.mark.parametrize("name", parity.NAMES)
def test_generation_is_the_published_one(name, cached):
    arrays, meta, network = parity.load(name)
    config = sections.Sampler(
        steps=meta["sampling_timesteps"], window=meta["max_frames"], horizon=meta["horizon"], guidance=meta["cfg"],
        cached=cached,
    )  # fmt: skip
    given, frames = meta["n_context"], arrays["generated"]
    sampler = make_sampler(network, Objective(sections.Objective()), config)
    sampler.reset(frames[:, :given], arrays["actions"][:, :given])
    for start in range(given, meta["n_frames"], meta["horizon"]):
        chunk = slice(start, start + meta["horizon"])
        noise = arrays["noise"][:, start - given : start - given + meta["horizon"]]
        made = sampler.generate(arrays["actions"][:, chunk], noise)
        for frame in range(made.shape[1]):
            assert parity.relative_error(made[:, frame], frames[:, start + frame]) <= parity.TOLERANCE


def worst_frame(actual, expected):
    """Largest relative error of any frame of any trial."""
    return float(((actual - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)).max())


CASES = list(
    itertools.product(
        [("published", FACTORISED, sections.Objective()), ("tabletop", JOINT, FLOW)],
        ["exact", "streaming"],
        [1, 4],  # horizon
        [1.0, 3.0],  # guidance
        [1, 5],  # batch
    )
)


@pytest.mark.parametrize(
    ("kind", "mode", "horizon", "guidance", "batch"), CASES, ids=["-".join(map(str, (c[0][0], *c[1:]))) for c in CASES]
)
def test_cached_equals_naive(kind, mode, horizon, guidance, batch):
    _, config, objective = kind
    network = make_network(config)
    options = sections.Sampler(steps=3, window=6, horizon=horizon, guidance=guidance, mode=mode, cached=False)
    naive = generate(network, objective, options, batch)
    cached = generate(network, objective, replace(options, cached=True), batch)
    assert 0.1 < float(naive.std()) < 30, "a rollout that vanishes or explodes compares nothing"
    assert worst_frame(cached, naive) <= 1e-4


@pytest.mark.parametrize("mode", ["exact", "streaming"])
@pytest.mark.parametrize(
    "change",
    [{"temporal": "relative_bias", "previous_frame": True}, {"attention": "joint", "first_frame": True}],
    ids=["factorised with previous frame", "joint rotary with first frame"],
)
def test_cached_equals_naive_for_mixed_options_and_two_context_frames(mode, change):
    network = make_network(replace(FACTORISED, **change))
    options = sections.Sampler(steps=3, window=6, horizon=3, guidance=2.0, mode=mode, cached=False)
    naive = generate(network, sections.Objective(prediction="x0"), options, context=2, frames=10)
    cached = generate(network, sections.Objective(prediction="x0"), replace(options, cached=True), context=2, frames=10)
    assert worst_frame(cached, naive) <= 1e-4


def test_exact_and_streaming_agree_until_the_window_slides():
    network = make_network(JOINT)
    exact = generate(network, FLOW, sections.Sampler(steps=3, window=6, mode="exact"))
    streaming = generate(network, FLOW, sections.Sampler(steps=3, window=6, mode="streaming"))
    torch.testing.assert_close(exact[:, :5], streaming[:, :5], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(exact[:, 6:], streaming[:, 6:], rtol=1e-3)


def count_frames(network, options, frames):
    """Network evaluations of single frames, by generated frame."""
    counts = []
    handle = network.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[0] * args[0].shape[1]))
    generate(network, sections.Objective(), options, frames=frames)
    handle.remove()
    return sum(counts)


def test_cached_work_per_frame():
    """Guided, 10 steps, window 20: 400 evaluations of a frame when everything is recomputed, 58 exact, 22 streaming."""
    network = make_network(replace(FACTORISED, width=8, depth=1), frames=20)
    options = sections.Sampler(steps=10, window=20, guidance=3.0)
    later = {}
    for name, change in {"naive": {"cached": False}, "exact": {}, "streaming": {"mode": "streaming"}}.items():
        chosen = replace(options, **change)
        later[name] = count_frames(network, chosen, 22) - count_frames(network, chosen, 21)
    assert later == {"naive": 400, "exact": 58, "streaming": 22}


def test_pyramid_starts_each_frame_one_step_after_the_one_before():
    assert pyramid(2, 3) == [[2, 2, 2], [1, 2, 2], [0, 1, 2], [0, 0, 1], [0, 0, 0]]


def test_a_ring_that_goes_round_many_times_loses_nothing():
    network = make_network(FACTORISED)
    options = sections.Sampler(steps=2, window=4, horizon=2, mode="streaming", cached=False)
    naive = generate(network, sections.Objective(), options, frames=41)
    cached = generate(network, sections.Objective(), replace(options, cached=True), frames=41)
    assert worst_frame(cached, naive) <= 1e-4


@pytest.mark.parametrize("mode", ["exact", "streaming"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
@pytest.mark.parametrize(("config", "objective"), [(FACTORISED, sections.Objective()), (JOINT, FLOW)])
def test_cached_equals_naive_in_low_precision(config, objective, dtype, tolerance, mode):
    """As far as the precision goes: after nine frames float32 is 0.06 and 0.01 away from both."""
    network = make_network(config)
    options = sections.Sampler(steps=3, window=6, horizon=2, guidance=2.0, mode=mode)
    fine = generate(network, objective, options, 2)
    with torch.autocast("cpu", dtype):
        cached = generate(network, objective, options, 2)
        naive = generate(network, objective, replace(options, cached=False), 2)
    assert 1e-5 < worst_frame(cached, fine) < tolerance
    assert worst_frame(cached, naive) < tolerance


@pytest.mark.parametrize("mode", ["exact", "streaming"])
@pytest.mark.parametrize("horizon", [1, 3])
def test_trials_of_a_batch_do_not_touch_each_other(mode, horizon):
    network, objective = make_network(JOINT), Objective(FLOW)
    options = sections.Sampler(steps=3, window=6, guidance=2.0, mode=mode, horizon=horizon)
    frames, noise, actions = random(5, 1, 4, 4, 3), random(5, horizon, 4, 4, 3, seed=1), random(5, horizon, 10, seed=2)

    def run(rows, noise=noise):
        sampler = make_sampler(network, objective, options)
        sampler.reset(frames[rows], actions[rows, :1], context_noise=noise[rows, :1])
        return torch.cat([sampler.generate(actions[rows], noise[rows], context_noise=noise[rows]) for _ in range(7)], 1)

    together = run([0, 1, 2, 3, 4])
    assert torch.equal(together, run([0, 1, 2, 3, 4]))
    assert torch.equal(together[[1, 0, 1, 2, 1]], run([1, 0, 1, 2, 1])), "same batch shape: the same to the last bit"
    torch.testing.assert_close(together[3:4], run([3]), rtol=1e-3, atol=1e-4)
    broken = noise.clone()
    broken[2] = torch.nan
    beside = run([0, 1, 2, 3, 4], broken)
    assert beside[2].isnan().all()
    assert torch.equal(beside[[0, 1, 3, 4]], together[[0, 1, 3, 4]]), "not even by a trial that broke down"


@pytest.mark.parametrize("mode", ["exact", "streaming"])
def test_a_sampler_remembers_nothing_of_earlier_trials(mode):
    network, options = make_network(JOINT), sections.Sampler(steps=2, window=6, guidance=2.0, mode=mode)
    fresh = generate(network, FLOW, options, batch=2)
    sampler = make_sampler(network, Objective(FLOW), options)
    roll_out(sampler, batch=3, frames=4)
    roll_out(sampler, batch=2, context=2)
    assert torch.equal(roll_out(sampler, batch=2), fresh)


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that `torch.compile` captured; they run as they are, since building machine code takes too long."""
    found, real = [], torch.compile

    def keep(graph, inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, *, mode, **options: real(function, backend=keep, **options))
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("config", "objective", "mode", "shapes"),
    [
        (FACTORISED, sections.Objective(), "streaming", 2),  # with the frame before, and alone
        (FACTORISED, sections.Objective(), "exact", 3),  # and the whole window
        (JOINT, FLOW, "streaming", 2),
    ],
    ids=["factorised streaming", "factorised exact", "joint streaming"],
)
def test_compiled_is_the_same_and_has_one_graph_per_shape(graphs, config, objective, mode, shapes):
    network = make_network(replace(config, depth=1))
    options = sections.Sampler(steps=3, window=6, guidance=2.0, mode=mode)
    plain = generate(network, objective, options, 2)
    sampler = make_sampler(network, Objective(objective), replace(options, compile=True))
    sampler.reset(torch.full((2, 1, 4, 4, 3), torch.nan), random(2, 1, 10), context_noise=random(2, 1, 4, 4, 3))
    sampler.generate(random(2, 1, 10), random(2, 1, 4, 4, 3), context_noise=random(2, 1, 4, 4, 3))
    assert worst_frame(roll_out(sampler, 2), plain) <= 1e-4, "also after trials that broke down"
    assert len(graphs) == shapes, "whatever the length of the rollout"
    assert torch.equal(roll_out(sampler, 2), roll_out(sampler, 2))
    assert len(graphs) == shapes, "nothing is compiled again"


class OnDevice(TorchDispatchMode):
    """Fails on any operation that touches a tensor outside the device `meta`, which also has no numbers to wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        touched = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
        assert touched <= {"meta"}, f"{function} touches {touched}"
        return out


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("config", "objective", "mode"),
    [
        (FACTORISED, sections.Objective(), "exact"),
        (FACTORISED, sections.Objective(), "streaming"),
        (JOINT, FLOW, "streaming"),
    ],
    ids=["factorised exact", "factorised streaming", "joint streaming"],
)
def test_nothing_goes_to_the_device_or_comes_from_it(config, objective, mode, static, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    network = make_network(replace(config, depth=1)).to("meta")
    options = sections.Sampler(steps=3, window=4, horizon=2, guidance=2.0, mode=mode, compile=static)
    sampler = make_sampler(network, Objective(objective), options)
    frames, actions = torch.empty(2, 2, 4, 4, 3, device="meta"), torch.empty(2, 2, 10, device="meta")
    sampler.reset(frames[:, :1], actions[:, :1], context_noise=frames[:, :1])
    sampler.generate(actions, frames, context_noise=frames)
    with OnDevice():
        for _ in range(6):
            assert sampler.generate(actions, frames, context_noise=frames).shape == frames.shape


def test_context_noise_is_needed_on_the_flow_schedule():
    sampler = make_sampler(make_network(JOINT), Objective(FLOW), sections.Sampler(window=6))
    with pytest.raises(ValueError, match="context_noise"):
        sampler.reset(random(1, 1, 4, 4, 3), random(1, 1, 10))


@pytest.mark.parametrize(
    ("options", "names"),
    [({"window": 7}, "window"), ({"window": 6, "horizon": 6}, "horizon"), ({"window": 6, "horizon": 0}, "horizon")],
)
def test_impossible_settings_are_one_line(options, names):
    with pytest.raises(UserError, match=names):
        make_sampler(make_network(FACTORISED), Objective(sections.Objective()), sections.Sampler(**options))


def test_recomputing_is_not_compiled():
    with pytest.raises(UserError, match="compile: true goes with `cached: true`"):
        options = sections.Sampler(window=6, cached=False, compile=True)
        make_sampler(make_network(FACTORISED), Objective(sections.Objective()), options)


def test_too_much_context_is_one_line():
    sampler = make_sampler(make_network(FACTORISED), Objective(sections.Objective()), sections.Sampler(window=3))
    with pytest.raises(UserError, match="do not fit"):
        sampler.reset(random(1, 3, 4, 4, 3), random(1, 3, 10))
    sampler.reset(random(1, 1, 4, 4, 3), random(1, 1, 10))
    with pytest.raises(UserError, match="horizon"):
        sampler.generate(random(1, 2, 10), random(1, 2, 4, 4, 3))
