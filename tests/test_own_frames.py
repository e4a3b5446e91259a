"""Training on the model's own rollouts: what is shown, what is learned from, and that killed trainings continue exactly."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.test_tokenizer import run_cli
from tests.test_world_model_training import MODEL, make_loss, prepared  # noqa: F401 (a fixture)
from workflow_src.common import sections
from workflow_src.common.config import to_dict
from workflow_src.common.errors import UserError
from workflow_src.training import own_frames, world_model
from workflow_src.training.distributed import Processes
from workflow_src.world_model.artefact import build_network
from workflow_src.world_model.diffusion import Objective
from workflow_src.world_model.sampler import make_sampler

OWN = sections.OwnFrames(share=0.5, begin=0.25, every=10, horizon=4)
BEGIN = 10  # a quarter of 40 steps


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(own_frames, "BLOCK", 7)  # does not divide the 24 episodes


@pytest.fixture
def network(prepared):  # noqa: F811
    torch.manual_seed(0)
    network = build_network(make_loss(prepared).card).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # away from the identity it starts as
    return network


def make_own(prepared, tmp_path, processes=None, **changes):  # noqa: F811
    loss = make_loss(prepared, own_frames=replace(OWN, **changes))
    loss.show_own_frames(tmp_path, "identity")
    if processes is not None:
        loss.own.processes = processes
    return loss


def test_a_share_of_the_clips_shows_own_rollouts_of_the_same_frames(prepared, network, tmp_path):  # noqa: F811
    loss = make_own(prepared, tmp_path)
    samples = np.arange(400)
    loss.prepare(BEGIN - 1, network)
    assert loss.choose(BEGIN - 1, samples).own is None
    assert set(loss.describe(BEGIN - 1, samples)) == {"dataset", "episode", "start", "mirrored"}
    loss.prepare(BEGIN, network)
    choice = loss.choose(BEGIN, samples)
    own = choice.own >= 0
    assert 0.4 < own.mean() < 0.6
    assert set(choice.own[own]) == {0, 1}  # clips of 4 frames in rollouts of 5
    without = make_loss(prepared).choose(BEGIN, samples)
    np.testing.assert_array_equal(choice.episode, without.episode)
    np.testing.assert_array_equal(choice.start[~own], without.start[~own])
    clean, _, _ = loss.source.read(choice.episode, loss.source.clips.frame_numbers(choice), choice.mirrored)
    shown = loss.own.shown(choice, clean)
    assert torch.equal(shown[~own], clean[~own])
    # A rollout begins with the recorded frame it begins at, of the same episode and side.
    begins = choice.own == 0
    torch.testing.assert_close(shown[begins][:, 0], clean[begins][:, 0], atol=2e-3, rtol=2e-3)
    assert (shown[own][:, 1:] - clean[own][:, 1:]).abs().mean() > 0.05
    description = loss.describe(BEGIN, samples)
    assert description["own"] == choice.own.tolist()


def test_rollouts_are_those_of_the_sampler(prepared, network, tmp_path):  # noqa: F811
    loss = make_own(prepared, tmp_path)
    loss.prepare(20, network)
    seen = {}
    for block in range(4):
        episode = np.array([block * 7])
        (start, mirrored) = (values[block] for values in loss.own._blocks(20))
        opening = max(0, start - 2)
        numbers = np.arange(opening, start + 5)[None]
        clean, first, actions = loss.source.read(episode, numbers, np.array([mirrored]))
        noise, context = (
            torch.from_numpy(
                world_model.randomness.normal(3, 20, episode, tuple(clean.shape[1:]), f"own frames, {name}")
            )
            for name in ("noise", "context")
        )
        sampler = make_sampler(network, Objective(loss.card.objective), replace(loss.card.sampler, cached=False))
        count = start + 1 - opening
        sampler.reset(
            clean[:, :count], actions[:, :count], context_noise=context[:, :count], opens=opening == 0, first=first
        )
        for n in range(count, clean.shape[1]):
            frame = sampler.generate(actions[:, n : n + 1], noise[:, n : n + 1], context_noise=context[:, n : n + 1])
            rolled = torch.from_numpy(loss.own.rolled[episode, n - count + 1].astype(np.float32))
            torch.testing.assert_close(rolled, frame[:, 0], atol=5e-3, rtol=5e-3)
        seen[int(start)] = mirrored
    assert len(seen) > 1 and not any(torch.isnan(torch.from_numpy(np.asarray(loss.own.rolled, np.float32))).flatten())


def test_what_is_learned_is_the_recording_and_shown_frames_are_not(prepared):  # noqa: F811
    objective = Objective(MODEL.objective)
    generator = torch.Generator().manual_seed(0)
    clean, own, noise = (torch.randn(2, 4, 6, 6, 4, generator=generator) for _ in range(3))
    levels = torch.tensor([[0.05, 0.9, 0.1, 1.0]]).expand(2, -1)
    own[1] = clean[1]  # a clip of recorded frames only
    inputs = []

    def network(x, *_, **__):
        inputs.append(x)
        return torch.zeros_like(x)

    losses = objective.training_loss(network, clean, torch.zeros(2, 4, 10), noise=noise, levels=levels, shown=own)
    visible = torch.where((levels < 0.12)[..., None, None, None], own, clean)
    torch.testing.assert_close(inputs[0], objective.add_noise(visible, noise, levels))
    error = clean.square().mean((2, 3, 4)) * objective.weight(levels)
    torch.testing.assert_close(losses, torch.stack([error[0, [1, 3]].sum() / 4, error[1].mean()]))


def test_rollouts_of_other_trainings_and_old_ones_go(prepared, network, tmp_path):  # noqa: F811
    loss = make_own(prepared, tmp_path, every=20)
    (tmp_path / "own_frames_another_000000010.npy").touch()
    (tmp_path / "own_frames_identity_000000010.part").touch()
    for step in (10, 30, 50, 70, 90):  # checkpoints every 20 steps, two of which are kept
        loss.prepare(step, network)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"own_frames_identity_{step:09d}.npy" for step in (30, 50, 70, 90)
    ]


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_make_the_same_rollouts(prepared, network, tmp_path, size):  # noqa: F811
    alone = make_own(prepared, tmp_path / "alone")
    alone.prepare(BEGIN, network)
    barrier = threading.Barrier(size)

    class Thread(Processes):
        def barrier(self):
            barrier.wait(timeout=60)

    losses = [make_own(prepared, tmp_path / "shared", Thread(rank, size, torch.device("cpu"))) for rank in range(size)]
    threads = [threading.Thread(target=loss.prepare, args=(BEGIN, network)) for loss in losses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for loss in losses:
        np.testing.assert_array_equal(loss.own.rolled, alone.own.rolled)
    assert len(list((tmp_path / "shared").iterdir())) == 1  # nothing half-written is left


def test_a_killed_training_continues_between_refreshes_bit_by_bit(prepared, tmp_path, monkeypatch):  # noqa: F811
    _, flags = prepared
    training = replace(MODEL.training, checkpoint_every=5, keep=100)
    model = replace(MODEL, own_frames=OWN, training=training)
    flags = flags | {"config": tmp_path / "stage.json"}
    flags["config"].write_text(json.dumps({"seed": 0, "world_model": to_dict(model)}))
    out, state = tmp_path / "model" / "model.safetensors", tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setattr(own_frames.OwnFrames, "clear", lambda self: None)
        run_cli(patch, world_model, **flags, out=out, state=state)
    weights = out.read_bytes()
    rollouts = sorted(state.glob("own_frames_*.npy"))
    assert [int(path.stem.rpartition("_")[2]) for path in rollouts] == [10, 20, 30]
    # As if killed at step 25: the rollouts of step 20 are needed again, those of step 30 are not there yet.
    for path in state.iterdir():
        number = path.stem.rpartition("_")[2]
        if number.isdigit() and int(number) > 25:
            path.unlink()
    out.unlink()
    run_cli(monkeypatch, world_model, **flags, out=out, state=state)
    assert out.read_bytes() == weights
    assert not list(state.glob("own_frames_*"))  # a finished training needs them no longer


def test_missing_or_damaged_rollouts_are_one_line(prepared, network, tmp_path):  # noqa: F811
    loss = make_own(prepared, tmp_path)
    with pytest.raises(UserError, match=r"own_frames_identity_000000020.npy: missing or damaged .*; delete"):
        loss.prepare(23, network)
    loss.prepare(20, network)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:200])
    again = make_own(prepared, tmp_path)
    with pytest.raises(UserError, match="missing or damaged"):
        again.prepare(23, network)
