"""The world-model network: published numbers, causality, and what each option promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import parity
from tests.worlds import FACTORISED, JOINT, make_network, random
from workflow_src.common import sections
from workflow_src.common.errors import UserError
from workflow_src.world_model import attention, kernels, rotary
from workflow_src.world_model.network import Previous, WorldModelNetwork

torch.set_num_threads(1)

VARIANTS = {
    "factorised": FACTORISED,
    "factorised pixel, relative bias": replace(FACTORISED, spatial_rope="pixel", temporal="relative_bias"),
    "joint": JOINT,
    "joint rotary": replace(FACTORISED, attention="joint"),
}


def inputs(frames: int = 4, batch: int = 2, size: int = 4, actions: int = 10):
    x, a = random(batch, frames, size, size, 3), random(batch, frames, actions, seed=1)
    return x, torch.linspace(900, 10, batch * frames).view(batch, frames), a


@pytest.mark.parametrize("name", parity.NAMES)
def test_reproduces_the_published_network(name):
    arrays, _, network = parity.load(name)
    frames = arrays["v"].shape[1]
    with torch.no_grad():
        v = network(arrays["x"][:, :frames], arrays["t"], arrays["actions"][:, :frames])
    assert parity.relative_error(v, arrays["v"]) <= parity.TOLERANCE


def test_default_configuration_has_the_published_size():
    with torch.device("meta"):
        network = WorldModelNetwork(sections.Network(), 32, 32, 20)
    assert sum(parameter.numel() for parameter in network.parameters()) == 607_928_384  # 607.93 M


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_future_does_not_change_the_past(config):
    network = make_network(config)
    x, levels, actions = inputs()
    first = x[:, 0] if config.first_frame else None
    with torch.no_grad():
        before = network(x, levels, actions, first=first)
        x[:, 3], levels[:, 3], actions[:, 3] = 5.0, 999.0, -3.0
        after = network(x, levels, actions, first=first)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3])


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_frame_listens_to_its_past_action_and_level(config):
    network = make_network(config)
    x, levels, actions = inputs()
    first = x[:, 0] if config.first_frame else None
    with torch.no_grad():
        before = network(x, levels, actions, first=first)[:, 3]
        for change in ("x", "levels", "actions"):
            given = {"x": x.clone(), "levels": levels.clone(), "actions": actions.clone()}
            given[change][:, 1] += 30
            after = network(given["x"], given["levels"], given["actions"], first=first)[:, 3]
            assert not torch.allclose(before, after, atol=1e-6), change


@pytest.mark.parametrize("config", [FACTORISED, replace(JOINT, depth=1)], ids=["factorised", "joint"])
def test_window_bounds_what_a_frame_sees(config):
    network = make_network(replace(config, depth=1, previous_frame=False), frames=3)
    x, levels, actions = inputs(frames=5)
    first = x[:, 0].clone() if config.first_frame else None
    with torch.no_grad():
        before = network(x, levels, actions, first=first)
        x[:, 0] += 1
        after = network(x, levels, actions, first=first)
    changed = [not torch.allclose(before[:, t], after[:, t]) for t in range(5)]
    assert changed == [True, True, True, False, False]


def test_fresh_network_with_previous_frame_predicts_persistence():
    network = WorldModelNetwork(JOINT, 4, 4, 6)
    x, _, actions = inputs()
    with torch.no_grad():
        out = network(x, torch.zeros(2, 4), actions, first=x[:, 0])
        follow = Previous(random(2, 4, 4, 3, seed=3), torch.zeros(2))
        followed = network(x, torch.zeros(2, 4), actions, first=x[:, 0], previous=follow)
    torch.testing.assert_close(out[:, 1:], x[:, :-1])
    torch.testing.assert_close(followed[:, 0], follow.frame)


def test_episode_start_is_not_the_dropped_action():
    network = make_network(JOINT)
    x, levels, actions = inputs()
    yes, no = torch.tensor([True, True]), torch.tensor([False, False])

    def run(start, dropped, actions=actions):
        with torch.no_grad():
            return network(x, levels, actions, start=start, dropped=dropped, first=x[:, 0])

    assert not torch.allclose(run(yes, no), run(no, no))
    assert not torch.allclose(run(yes, no), run(yes, yes))
    assert torch.equal(run(yes, yes), run(yes, yes, actions + 1)), "dropped actions must not leak"
    other = actions.clone()
    other[:, 0] += 1
    assert torch.equal(run(yes, no), run(yes, no, other)), "no action leads to the episode's first frame"


def test_dropping_is_per_clip():
    network = make_network(FACTORISED)
    x, levels, actions = inputs()
    with torch.no_grad():
        mixed = network(x, levels, actions, dropped=torch.tensor([False, True]))
        told, untold = network(x, levels, actions), network(x, levels, actions, dropped=torch.tensor([True, True]))
    torch.testing.assert_close(mixed, torch.stack([told[0], untold[1]]))


def test_first_frame_stays_in_view():
    network = make_network(JOINT)
    x, levels, actions = inputs()
    with torch.no_grad():
        a = network(x, levels, actions, first=x[:, 0])
        b = network(x, levels, actions, first=x[:, 0] + 1)
    assert not torch.allclose(a[:, 3], b[:, 3])
    with pytest.raises(UserError, match="first_frame"):
        network(x, levels, actions)


def test_what_a_caller_keeps_between_passes_is_what_the_network_would_make():
    """The first frame's tokens, levels common to all clips, matrices rounded once."""
    network = make_network(JOINT)
    x, levels, actions = inputs()
    levels[1] = levels[0]
    first = x[:, 0].clone()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = network(x, levels, actions, first=first)
        rounded = network.rounded(torch.bfloat16)
        tokens = rounded.embed_first(first)
        assert torch.equal(rounded(x, levels[:1], actions, first_tokens=tokens), whole)


@pytest.mark.parametrize("kind", ["standard", "pixel"])
def test_rotation_turns_pairs_and_is_the_same_for_a_compiler(kind, monkeypatch):
    factors = rotary.factors(rotary.spatial_angles(3, 2, 8, kind))
    features = random(5, 6, 8)
    turned = rotary.rotate(features, factors)
    pairs = features.double().unflatten(-1, (-1, 2))
    expected = torch.view_as_complex(pairs) * torch.exp(1j * rotary.spatial_angles(3, 2, 8, kind))
    torch.testing.assert_close(turned, torch.view_as_real(expected).flatten(-2).float())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotary.rotate(features, factors), turned)


def test_temporal_rotation_depends_on_the_distance_alone_however_far_the_rollout():
    factors = rotary.factors(rotary.temporal_angles(20_003, 8))
    query, key = random(8), random(8, seed=1)
    near = rotary.rotate(query, factors[2]) @ rotary.rotate(key, factors[0])
    far = rotary.rotate(query, factors[20_002]) @ rotary.rotate(key, factors[20_000])
    torch.testing.assert_close(far, near, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_fused_attention_is_the_plain_one(config, monkeypatch):
    """What a GPU runs always, and a CPU from some length on."""
    network = make_network(config)
    x, levels, actions = inputs()

    def run():
        given = x.clone().requires_grad_()
        out = network(given, levels, actions, first=x[:, 0])
        return out.detach(), torch.autograd.grad(out.square().sum(), given)[0]

    plain, slope = run()
    monkeypatch.setattr(attention, "FUSED_FROM", 0)
    fused, fused_slope = run()
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused_slope, slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()))


def test_hand_written_gradients_are_the_automatic_ones(monkeypatch):
    network = make_network(JOINT)
    x, levels, actions = inputs()

    def gradients():
        network.zero_grad()
        network(x, levels, actions, first=x[:, 0]).square().sum().backward()
        return {
            name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None
        }

    by_hand = gradients()
    monkeypatch.setattr(kernels, "_by_hand", lambda x: False)
    automatic = gradients()
    assert by_hand.keys() == automatic.keys()
    for name, gradient in automatic.items():
        torch.testing.assert_close(
            by_hand[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=name
        )


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"patch": 3}, "patch"),
        ({"heads": 3}, "heads"),
        ({"action_dim": 7}, "action_dim"),
    ],
)
def test_impossible_configuration_is_one_line(change, names):
    with pytest.raises(UserError, match=names):
        WorldModelNetwork(replace(FACTORISED, **change), 4, 4, 6)
