"""Schedules, prediction types, steps and losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import parity
from tests.worlds import FLOW, JOINT, make_network, random
from workflow_src.common import sections
from workflow_src.world_model.diffusion import Objective, sigmoid_alphas_cumprod

torch.set_num_threads(1)

SIGMOID = sections.Objective()
ALL = [
    sections.Objective(schedule=schedule, prediction=prediction)
    for schedule in ("sigmoid", "flow")
    for prediction in ("v", "x0", "flow")
]


def levels_of(objective: Objective) -> torch.Tensor:
    """Levels (2, 3) that avoid pure noise, from which an x0 prediction says nothing about itself."""
    fractions = torch.tensor([[0.05, 0.5, 0.9], [0.3, 0.7, 0.02]])
    return (fractions * 1000).long() if objective.discrete else fractions


def test_sigmoid_schedule_is_the_published_one():
    published = parity.load("sliding_window")[0]["alphas_cumprod"]
    torch.testing.assert_close(sigmoid_alphas_cumprod(), published, rtol=1e-4, atol=0)


@pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.schedule}-{c.prediction}")
def test_the_target_implies_the_clean_frame_and_the_noise(config):
    objective = Objective(config)
    clean, noise, levels = random(2, 3, 4, 4, 3), random(2, 3, 4, 4, 3, seed=1), levels_of(objective)
    noisy = objective.add_noise(clean, noise, levels)
    found, found_noise = objective.estimate(objective.target(clean, noise, levels), noisy, levels)
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_noise, noise, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.schedule}-{c.prediction}")
def test_denoising_with_a_perfect_network_arrives_at_the_clean_frame(config):
    objective = Objective(config)
    clean, noise = random(1, 2, 4, 4, 3), random(1, 2, 4, 4, 3, seed=1)
    grid = objective.grid(4)
    start = torch.tensor([[grid[3], grid[2]]])
    x, levels = objective.add_noise(clean, noise, start), start
    for below in ([2, 1], [1, 0], [0, 0]):
        below = torch.tensor([[grid[index] for index in below]])
        x = objective.step(objective.target(clean, noise, levels), x, levels, below)
        torch.testing.assert_close(x, objective.add_noise(clean, noise, below), rtol=1e-3, atol=1e-3)
        levels = below
    torch.testing.assert_close(x, clean, rtol=1e-3, atol=1e-3)


def test_step_on_the_flow_schedule_is_an_euler_step():
    objective = Objective(sections.Objective(schedule="flow", prediction="flow"))
    x, velocity = random(1, 1, 4, 4, 3), random(1, 1, 4, 4, 3, seed=1)
    moved = objective.step(velocity, x, torch.tensor([[0.8]]), torch.tensor([[0.5]]))
    torch.testing.assert_close(moved, x - 0.3 * velocity)


@pytest.mark.parametrize("name", parity.NAMES)
def test_ddim_step_is_the_published_one(name):
    arrays, meta, network = parity.load(name)
    objective = Objective(SIGMOID)
    grid = torch.tensor(objective.grid(meta["sampling_timesteps"]))
    context = arrays["ddim_t_idx"] == 0
    level = objective.context_level(15 / 1000)
    levels = torch.where(context, level, grid[arrays["ddim_t_idx"]])
    next_levels = torch.where(context, level, grid[arrays["ddim_t_next_idx"]])
    frames = levels.shape[1]
    x, actions = arrays["x"][:, :frames], arrays["actions"][:, :frames]
    with torch.no_grad():
        told = network(x, levels.float(), actions)
        untold = network(x, levels.float(), actions, dropped=torch.ones(len(x), dtype=torch.bool))
    out = objective.step(torch.lerp(untold, told, meta["cfg"]), x, levels, next_levels)
    assert parity.relative_error(out, arrays["ddim_out"]) <= parity.TOLERANCE


def test_levels_cover_the_schedule_and_mark_context():
    uniforms = torch.rand(4000, 4, 2, generator=torch.Generator().manual_seed(0))
    discrete = Objective(SIGMOID).sample_levels(uniforms)
    assert discrete.min() == 0 and discrete.max() == 999 and abs(float(discrete.float().mean()) - 499.5) < 10
    levels = Objective(FLOW).sample_levels(uniforms)
    assert levels.min() >= 0 and levels.max() <= 1
    context = (levels <= FLOW.context_noise).float().mean(0)
    assert context[0] > 0.8 and all(abs(float(share) - 0.39) < 0.04 for share in context[1:])
    assert torch.equal(levels[:7], Objective(FLOW).sample_levels(uniforms[:7])), "a function of the sample alone"


def test_alternating_context_keeps_the_share_and_puts_noise_behind_clean_frames():
    uniforms = torch.rand(4000, 5, 2, generator=torch.Generator().manual_seed(0))
    independent = replace(FLOW, context_probability=0.5)
    shares, matched = [], []
    for config in (independent, replace(independent, context_pattern="alternating")):
        context = Objective(config).sample_levels(uniforms) <= config.context_noise
        shares.append(context[:, 1:].float().mean(0))
        matched.append(float((context[:, 1:-1] & ~context[:, 2:]).float().mean()))
    torch.testing.assert_close(shares[0], shares[1], atol=0.04, rtol=0)
    assert matched[0] < 0.3 and matched[1] > 0.4


def test_loss_of_a_clip_depends_on_that_clip_alone_and_is_zero_for_a_perfect_network():
    objective, network = Objective(FLOW), make_network(JOINT)
    latents, actions = random(3, 4, 4, 4, 3), random(3, 4, 10, seed=1)
    given = {
        "noise": random(3, 4, 4, 4, 3, seed=2), "levels": objective.sample_levels(torch.rand(3, 4, 2)),
        "start": torch.tensor([True, False, True]), "dropped": torch.tensor([False, True, False]),
        "first": latents[:, 0],
    }  # fmt: skip
    losses = objective.training_loss(network, latents, actions, **given)
    assert losses.shape == (3,) and losses.dtype == torch.float32
    alone = objective.training_loss(network, latents[1:2], actions[1:2], **{k: v[1:2] for k, v in given.items()})
    torch.testing.assert_close(losses[1:2], alone, rtol=1e-4, atol=1e-5)
    perfect = objective.training_loss(lambda *_, **__: latents, latents, actions, **given)
    assert torch.equal(perfect, torch.zeros(3))


def test_little_noise_counts_more_for_clean_predictions():
    weight = Objective(FLOW).weight(torch.tensor([[0.0, 0.8]]))
    torch.testing.assert_close(weight, torch.tensor([[5.0, 1.0]]))
    assert torch.equal(Objective(SIGMOID).weight(torch.tensor([[0, 800]])), torch.ones(1, 2))
