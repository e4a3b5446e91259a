"""The training engine: exact resume, process count, damage, SIGTERM, and what it says when a loss goes bad."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from workflow_src.common.errors import UserError
from workflow_src.common.sections import Training
from workflow_src.training import checkpoint, randomness
from workflow_src.training.distributed import Processes
from workflow_src.training.engine import Engine
from workflow_src.training.optimizers import Optimizers, hidden_matrices, orthogonalise, schedule, share_work

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)

# A trainer as the stages are: a module that runs alone or under torchrun. argv: state, out, seconds per step.
TRAINER = """
import sys, time
from pathlib import Path
from safetensors.torch import save_file
from workflow_src.common.errors import run_cli
from tests.test_engine import CONFIG, model, loss
from workflow_src.training.engine import Engine

def main():
    state, out, delay = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    def slow(*arguments):
        time.sleep(delay)
        return loss(*arguments)
    engine = Engine(model(), slow, CONFIG, seed=0, state=state, digest="d", label="toy")
    ema = engine.run()
    if engine.processes.first:
        save_file({**engine.model.state_dict(), **{f"ema.{k}": v for k, v in ema.state_dict().items()}}, out)
    engine.write_metrics(out.with_suffix(".csv"))

run_cli(main)
"""
# Muon alone, on gradients that every process has; argv: folder for one file of weights per process.
MUON = """
import sys
from safetensors.torch import save_file
from tests.test_engine import muon_steps
from workflow_src.training.distributed import join

save_file(muon_steps(join()), f"{sys.argv[1]}/{join().rank}.safetensors")
"""
CONFIG = Training(steps=24, batch=8, micro_batch=3, optimizer="muon", checkpoint_every=5, warmup=3, precision="fp32")


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("stem", nn.Linear(8, 16))
    net.add_module("blocks", nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh()))
    net.add_module("head", nn.Linear(16, 1))
    return net


def loss(net: nn.Module, step: int, samples: np.ndarray) -> dict[str, torch.Tensor]:
    x = torch.from_numpy(randomness.normal(0, step, samples, (8,)))
    error = (net(x)[:, 0] - x.sum(1).sin()).square()
    return {"loss": error.mean(), "largest": error.max()}


def train(state: Path, config: Training = CONFIG, **options) -> tuple[Engine, nn.Module]:
    engine = Engine(model(), options.pop("loss", loss), config, seed=0, state=state, digest="d", label="toy", **options)
    return engine, engine.run()


def weights(engine: Engine) -> list[np.ndarray]:
    return [value.detach().numpy().copy() for value in (*engine.model.parameters(), *engine.ema.parameters())]


def equal(one: Engine, two: Engine) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


class Killed(Exception):
    pass


def killed_at(step: int):
    def fatal(net, now, samples):
        if now == step:
            raise Killed
        return loss(net, now, samples)

    return fatal


@pytest.mark.parametrize("step", [0, 4, 5, 13, 23])
def test_resume_after_a_kill_gives_the_same_weights(tmp_path, step):
    whole, _ = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", loss=killed_at(step))
    again, _ = train(tmp_path / "killed")
    assert equal(whole, again)
    assert [row["loss"] for row in again.history] == [row["loss"] for row in whole.history]


def test_a_finished_training_is_not_trained_again(tmp_path):
    whole, _ = train(tmp_path)
    again, _ = train(tmp_path, loss=killed_at(0))
    assert equal(whole, again)


def test_another_recipe_starts_anew(tmp_path):
    train(tmp_path)
    engine = Engine(model(), killed_at(0), CONFIG, seed=0, state=tmp_path, digest="other", label="toy")
    with pytest.raises(Killed):
        engine.run()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "record", "missing"])
def test_a_damaged_checkpoint_is_skipped_by_name(tmp_path, capsys, damage):
    whole, _ = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "hurt", loss=killed_at(17))
    newest = tmp_path / "hurt" / "step_000000015.safetensors"
    content = newest.read_bytes()
    if damage == "truncated":
        newest.write_bytes(content[:-40])
    elif damage == "flipped":
        newest.write_bytes(content[:-40] + bytes(40))
    elif damage == "missing":
        newest.unlink()
    else:
        newest.with_suffix(".json").write_text('{"step": 15')
    again, _ = train(tmp_path / "hurt")
    assert "step_000000015" in capsys.readouterr().err
    assert equal(whole, again)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    train(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_000000020.json", "step_000000020.safetensors", "step_000000024.json", "step_000000024.safetensors",
    ]  # fmt: skip


def test_micro_batches_change_nothing_but_rounding(tmp_path):
    whole, _ = train(tmp_path / "a", Training(**{**CONFIG.__dict__, "micro_batch": 0}))
    parts, _ = train(tmp_path / "b", Training(**{**CONFIG.__dict__, "micro_batch": 1}))
    for one, two in zip(weights(whole), weights(parts), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


def test_hooks_see_the_average_at_their_step_and_training_learns(tmp_path):
    seen = {}
    hooks = {
        step: lambda now, ema: seen.update({now: float(sum(p.abs().sum() for p in ema.parameters()))})
        for step in (3, 24)
    }
    config = Training(**{**CONFIG.__dict__, "steps": 300, "checkpoint_every": 100, "lr": 1e-2})
    engine, ema = train(tmp_path, config, hooks=hooks)
    assert sorted(seen) == [3, 24] and seen[3] != seen[24]
    assert not ema.training and engine.history[-1]["loss"] < 0.6 * engine.history[0]["loss"]
    engine.write_metrics(tmp_path / "metrics.csv")
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header.split(",") == ["step", "loss", "largest", "gradient_norm", "lr", "seconds"]
    assert rows[-1].startswith("300,")


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_hurt(tmp_path):
    def bad(net, step, samples):
        result = loss(net, step, samples)
        return {**result, "loss": result["loss"] * (float("nan") if step == 7 else 1.0)}

    with pytest.raises(UserError, match=r"toy: loss nan .* at step 7 .*not_finite_step_000000007.json"):
        train(tmp_path, loss=bad, describe=lambda step, samples: {"episode": [int(s) * 10 for s in samples]})
    report = json.loads((tmp_path / "not_finite_step_000000007.json").read_text())
    assert report["step"] == 7 and report["batch"]["episode"] == [0, 10, 20, 30, 40, 50, 60, 70]
    kept = checkpoint.load_newest(tmp_path, "d")
    assert kept.step == 5 and all(bool(torch.isfinite(value).all()) for value in kept.tensors.values())


def test_a_batch_that_cannot_be_shared_is_refused():
    from workflow_src.training.engine import _share

    with pytest.raises(UserError, match="8 cannot be split evenly over 3"):
        _share(8, 0, 3)


# ---- real processes ----------------------------------------------------------------------------


def start(tmp_path: Path, name: str, processes: int, delay: float) -> subprocess.Popen:
    return launch(tmp_path, TRAINER, processes, tmp_path / name, tmp_path / f"{name}.safetensors", delay)


def launch(tmp_path: Path, content: str, processes: int, *arguments: object) -> subprocess.Popen:
    script = tmp_path / "trainer.py"
    script.write_text(content)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, str(script), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def same_file(one: Path, two: Path) -> bool:
    a, b = load_file(one), load_file(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_sigterm_leaves_a_checkpoint_and_resume_is_exact(tmp_path):
    run = start(tmp_path, "stopped", 1, 0.05)
    wait_for(lambda: list((tmp_path / "stopped").glob("step_*.json")))
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143
    assert not (tmp_path / "stopped.safetensors").exists()
    assert checkpoint.load_newest(tmp_path / "stopped", "d").step < CONFIG.steps
    again, _ = train(tmp_path / "stopped")
    whole, _ = train(tmp_path / "whole")
    assert equal(whole, again)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="process tables are read from /proc")
def test_two_processes_die_with_their_launcher_resume_exactly_and_train_as_one(tmp_path):
    launcher = start(tmp_path, "killed", 2, 0.3)
    wait_for(lambda: list((tmp_path / "killed").glob("step_*.json")))
    workers = _children(launcher.pid)
    assert len(workers) >= 2
    launcher.kill()
    launcher.wait(10)
    wait_for(lambda: not any(_alive(pid) for pid in workers), 15)
    for name in ("killed", "whole"):
        assert start(tmp_path, name, 2, 0).wait(60) == 0
    assert same_file(tmp_path / "killed.safetensors", tmp_path / "whole.safetensors")
    curve = np.genfromtxt(tmp_path / "whole.csv", delimiter=",", names=True)
    single, _ = train(tmp_path / "single")
    np.testing.assert_allclose(curve["loss"], [row["loss"] for row in single.history], atol=1e-3)


def muon_steps(processes: Processes) -> dict[str, torch.Tensor]:
    """State after three updates of matrices of several shapes by gradients that depend on the step alone."""
    state = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        shapes = [(48, 16), (16, 16), (64, 16), (16, 64)] * 3 + [(8, 4, 3, 3)]
        net = nn.Module()
        net.blocks = nn.ParameterList(torch.randn(shape) for shape in shapes)
        optimizers = Optimizers(net, replace(CONFIG, precision=precision), processes)
        for step in range(3):
            for parameter in net.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizers.step(step)
        tensors = {**net.state_dict(), **optimizers.tensors()}
        state |= {f"{precision}.{name}": value.detach() for name, value in tensors.items()}
    return state


def test_processes_that_share_muons_work_get_bitwise_the_weights_of_one(tmp_path):
    alone = muon_steps(Processes(0, 1, torch.device("cpu")))
    assert launch(tmp_path, MUON, 3, tmp_path).wait(60) == 0
    for rank in range(3):
        shared = load_file(tmp_path / f"{rank}.safetensors")
        assert shared.keys() == alone.keys() and all(torch.equal(shared[name], alone[name]) for name in alone)


def test_muons_work_is_shared_by_its_cost():
    assert share_work([(16, 16)] * 3, 1) == [0, 0, 0]
    assert share_work([(16, 16), (64, 16), (16, 16), (16, 16), (16, 16)], 2) == [1, 0, 1, 1, 1]
    assert share_work([(16, 16)], 2) == [0]


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    from workflow_src.common.process import alive

    return alive(pid)


# ---- parts ----------------------------------------------------------------------------


def test_randomness_depends_on_the_sample_alone():
    whole = randomness.normal(3, 5, [0, 1, 2, 3], (2, 2))
    np.testing.assert_array_equal(whole[2:], randomness.normal(3, 5, [2, 3], (2, 2)))
    for other in (randomness.normal(4, 5, [2], (2, 2)), randomness.normal(3, 6, [2], (2, 2)),
                  randomness.normal(3, 5, [2], (2, 2), stream="x")):  # fmt: skip
        assert not np.array_equal(whole[2:3], other)
    many = randomness.normal(0, 0, range(2000), (8,))
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03
    assert set(randomness.integers(0, 0, range(200), 3)) == {0, 1, 2}


def test_schedule_warms_up_and_decays_to_zero():
    config = Training(steps=100, warmup=10, decay=0.4)
    factors = [schedule(step, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9:60] == [1.0] * 51 and factors[99] == pytest.approx(1 / 40)
    assert schedule(99, Training(steps=100, warmup=0, decay=0.0)) == 1.0
    cosine = [schedule(step, replace(config, decay_shape="cosine")) for step in range(100)]
    assert cosine[:61] == factors[:61] and cosine[80] == pytest.approx(0.5)  # half way down the last 40 steps
    assert (
        cosine[70] > factors[70]
        and cosine[95] < factors[95]
        and cosine == sorted(cosine[:10]) + sorted(cosine[10:])[::-1]
    )


@pytest.mark.parametrize("shape", [(3, 8, 32), (3, 32, 8), (1, 16, 16)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    values = torch.linalg.svdvals(
        orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.float32)
    )
    assert float(values.min()) > 0.3 and float(values.max()) < 1.3


def test_muon_takes_the_matrices_between_embedding_and_head():
    assert hidden_matrices(model()) == ["blocks.0.weight", "blocks.2.weight"]
