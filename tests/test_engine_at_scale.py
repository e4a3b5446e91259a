"""The engine beyond one small process: sharded weights, recomputed and compiled blocks, speed and curves."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule

from tests.test_engine import CONFIG, Killed, equal, killed_at, launch, model, train, weights
from workflow_src.common.errors import UserError
from workflow_src.training import blocks, checkpoint, sharding, telemetry
from workflow_src.training.engine import Engine

ADAMW = replace(CONFIG, optimizer="adamw", checkpoint_every=5)
torch.set_num_threads(1)

# One training whole, one sharded, and both ways of going on with the other's checkpoint. argv: folder.
SHARDED = """
import sys
from dataclasses import replace
from pathlib import Path
from safetensors.torch import save_file
from tests.test_engine_at_scale import ADAMW, Killed, killed_at, state_of, train
from workflow_src.training.distributed import join, leave

folder, sharded = Path(sys.argv[1]), replace(ADAMW, shard=True)
seen = []
results = {"whole": train(folder / "a", ADAMW)[0]}
results["sharded"] = train(folder / "b", sharded, hooks={8: lambda step, ema: seen.append(ema)})[0]
assert len(seen) == join().first and all(type(ema.head.weight).__name__ == "Parameter" for ema in seen)
for name, first, second in (("sharded_then_whole", sharded, ADAMW), ("whole_then_sharded", ADAMW, sharded)):
    try:
        train(folder / name, first, loss=killed_at(13))
    except Killed:
        results[name] = train(folder / name, second)[0]
for name, engine in results.items():
    state = state_of(engine)
    if join().first:
        save_file(state, folder / f"{name}.safetensors")
join().barrier()
leave()
"""


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Weights, average and optimiser state, whole."""
    parts = {"model": engine.model.state_dict(), "ema": engine.ema.state_dict(), "adamw": engine.optimizers.tensors()}
    tensors = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    return {name: value.clone() for name, value in sharding.gather(tensors, engine.processes).items()}


def test_sharded_training_equals_whole_training_and_continues_its_checkpoints(tmp_path):
    run = launch(tmp_path, SHARDED, 2, tmp_path)
    assert run.wait(120) == 0, run.stderr.read()
    alone = state_of(train(tmp_path / "alone", ADAMW)[0])
    for name in ("whole", "sharded", "sharded_then_whole", "whole_then_sharded"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4, msg=f"{name}: {key}")
    files = {name: checkpoint.load_newest(tmp_path / name, "d") for name in ("a", "b")}
    assert {k: v.shape for k, v in files["a"].tensors.items()} == {k: v.shape for k, v in files["b"].tensors.items()}


def test_what_cannot_be_sharded_is_refused_by_field(monkeypatch):
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"training.optimizer: muon .* use adamw"):
        sharding.check(replace(CONFIG, shard=True), cpu, prepares=False)
    with pytest.raises(UserError, match=r"training.shard: true, .*own_frames.share: set it to 0"):
        sharding.check(replace(ADAMW, shard=True), cpu, prepares=True)
    monkeypatch.delattr(FSDPModule, sharding.SUM_FIRST)
    with pytest.raises(UserError, match=r"training.shard: true, but torch \S+ cannot do it on CPUs"):
        sharding.check(replace(ADAMW, shard=True), cpu, prepares=False)
    for option in ("shard", "compile", "activation_checkpointing"):
        with pytest.raises(UserError, match=f"training.{option}: true, but Linear has no `blocks`"):
            blocks.blocks_of(nn.Linear(2, 2), option)


# ---- blocks ---------------------------------------------------------------------------------------------------------


def test_recomputed_activations_change_no_weight(tmp_path):
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(torch.is_grad_enabled())
            return super().forward(x)

    def counted() -> nn.Module:
        net = model()
        net.blocks[0].__class__ = Counted
        return net

    engines = []
    for recompute in (False, True):
        calls.clear()
        config = replace(CONFIG, steps=10, activation_checkpointing=recompute)
        engines.append(train(tmp_path / str(recompute), config, net=counted)[0])
        micro_batches = 10 * 3  # of 3, 3 and 2 samples
        assert len(calls) == 1 + micro_batches * (1 + recompute)  # one more counts FLOPs
    for one, two in zip(weights(engines[0]), weights(engines[1]), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x).tanh()


def residual() -> nn.Module:
    net = model()
    net.blocks = nn.Sequential(*(Block() for _ in range(4)))
    return net


def test_compiled_blocks_train_alike_and_leave_no_trace_in_names(tmp_path, monkeypatch):
    compiled = []

    def eager(function, **options):
        compiled.append(options)
        return torch._dynamo.optimize("eager", nopython=True)(function)

    monkeypatch.setattr(torch, "compile", eager)
    whole, _ = train(tmp_path / "whole", net=residual)
    with pytest.raises(Killed):
        train(tmp_path / "compiled", replace(CONFIG, compile=True), loss=killed_at(13), net=residual)
    both = replace(CONFIG, compile=True, activation_checkpointing=True)
    again, average = train(tmp_path / "compiled", both, net=residual)
    assert compiled == [{"dynamic": False}] * 8
    for one, two in zip(weights(whole), weights(again), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    assert average.state_dict().keys() == residual().state_dict().keys()
    names = checkpoint.load_newest(tmp_path / "compiled", "d").tensors.keys()
    assert names == checkpoint.load_newest(tmp_path / "whole", "d").tensors.keys()
    plain, _ = train(tmp_path / "compiled", net=residual)  # the checkpoint serves a run without either
    assert equal(plain, again)


# ---- speed and curves -----------------------------------------------------------------------------------------------


def test_flops_are_three_times_the_products_of_the_forward_pass():
    net = model()
    flops = telemetry.count_flops(net, lambda: net(torch.zeros(5, 8)))
    assert flops == 3 * 5 * 2 * (8 * 16 + 16 * 16 + 16 * 16 + 16)
    assert net.training


def test_speed_is_over_all_processes_and_unknown_without_a_peak():
    assert telemetry.Speed(frames=40, flops=3e9, peak=1e12).of(steps=10, seconds=2.0) == {
        "frames_per_second": 200.0, "mfu": 0.015,
    }  # fmt: skip
    row = telemetry.Speed(frames=40, flops=3e9, peak=None).of(steps=1, seconds=1.0)
    assert row["mfu"] is None and telemetry.speed_note(row) == "40 frames/s"
    assert telemetry.speed_note({"frames_per_second": 200.0, "mfu": 0.415}) == "200 frames/s  MFU 42%"
    assert telemetry.speed_note({"loss": 1.0}) == ""  # a history from before


def test_peaks_are_of_bf16_and_of_known_devices(monkeypatch):
    names = {"NVIDIA H200": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 80GB HBM3": 989e12,
             "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A10G": 70e12, "NVIDIA L4": 121e12, "Some GPU": None}  # fmt: skip
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert telemetry.peak_flops(torch.device("cuda"), "bf16") == peak
    assert telemetry.peak_flops(torch.device("cuda"), "fp32") is None
    assert telemetry.peak_flops(torch.device("cpu"), "fp32") > 1e8


def points(folder: Path) -> dict[str, list[int]]:
    """Steps by tag, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), purge_orphaned_data=True)
    reader.Reload()
    return {tag: [point.step for point in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_a_resumed_training_shows_every_point_once(tmp_path):
    events = tmp_path / "events"
    with pytest.raises(Killed):
        train(tmp_path / "state", loss=killed_at(13), events=events)
    assert points(events)["training/loss"] == list(range(1, 14))
    engine, _ = train(tmp_path / "state", events=events)  # from step 10
    engine.events.add(24, "validation", {"mse": 0.5})
    engine, _ = train(tmp_path / "state", events=events)  # nothing left to train
    engine.events.add(24, "validation", {"mse": 0.5})
    shown = points(events)
    assert shown["training/loss"] == shown["training/mfu"] == list(range(1, 25)) and shown["validation/mse"] == [24]
    assert "training/step" not in shown
    engine, _ = train(tmp_path / "other", replace(CONFIG, steps=3), events=events)  # another training, same folder
    assert points(events)["training/loss"] == [1, 2, 3]
