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

# A trainer as the stages are: a module that runs alone or under torchrun. argv: state, out, seconds per step, and the step at
# which process 1 dies unless it was restarted (-1: the configuration is wrong).
TRAINER = """
import os, signal, sys, time
from pathlib import Path
from safetensors.torch import save_file
from workflow_src.common.errors import UserError
from workflow_src.training.distributed import join, leave, run_training
from workflow_src.training.engine import Engine
from tests.test_engine import CONFIG, model, loss

def main():
    state, out, delay, fatal = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    def slow(net, step, samples):
        time.sleep(delay)
        if fatal < 0:
            raise UserError("training.batch: no good")
        if step == fatal and join().rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(net, step, samples)
    engine = Engine(model(), slow, CONFIG, seed=0, state=state, digest="d", label="toy")
    ema = engine.run()
    if engine.processes.first:
        save_file({**engine.model.state_dict(), **{f"ema.{k}": v for k, v in ema.state_dict().items()}}, out)
    engine.write_metrics(out.with_suffix(".csv"))
    leave()

run_training(main)
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
    net, function = options.pop("net", model)(), options.pop("loss", loss)
    engine = Engine(net, function, config, seed=0, state=state, digest="d", label="toy", **options)
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
    assert header.split(",") == [
        "step", "loss", "largest", "gradient_norm", "lr", "seconds", "frames_per_second", "mfu",
    ]  # fmt: skip
    assert rows[-1].startswith("300,")


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_hurt(tmp_path):
    def bad(net, step, samples):
        result = loss(net, step, samples)
        return {**result, "loss": result["loss"] * (float("nan") if step == 7 else 1.0)}

    with pytest.raises(UserError, match=r"toy: loss nan .* at step 7 .*not_finite_step_000000007.json"):
        train(tmp_path, loss=bad, describe=lambda step, samples: {"episode": [int(s) * 10 for s in samples]})
    report = json.loads((tmp_path / "not_finite_step_000000007.json").read_text())
    assert report["step"] == 7 and report["batch"]["episode"] == [0, 10, 20, 30, 40, 50, 60, 70]
    shown = load_file(tmp_path / "not_finite_step_000000007.rank0.safetensors")
    assert sorted(shown) == ["sample_0.input", "sample_3.input", "sample_6.input"]
    np.testing.assert_array_equal(shown["sample_6.input"], randomness.normal(0, 7, [6, 7], (8,)))
    kept = checkpoint.load_newest(tmp_path, "d")
    assert kept.step == 5 and all(bool(torch.isfinite(value).all()) for value in kept.tensors.values())


def test_a_batch_that_cannot_be_shared_is_refused():
    from workflow_src.training.engine import _share

    with pytest.raises(UserError, match="8 cannot be split evenly over 3"):
        _share(8, 0, 3)


# ---- real processes ----------------------------------------------------------------------------


def start(
    tmp_path: Path, name: str, processes: int, delay: float = 0, fatal: int = 1000, restarts: int = 0
) -> subprocess.Popen:
    out = tmp_path / f"{name}.safetensors"
    return launch(tmp_path, TRAINER, processes, tmp_path / name, out, delay, fatal, restarts=restarts)


def launch(tmp_path: Path, content: str, processes: int, *arguments: object, restarts: int = 0) -> subprocess.Popen:
    script = tmp_path / "trainer.py"
    script.write_text(content)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        launcher += [f"--max-restarts={restarts}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # fmt: skip
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


needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="process tables are read from /proc")


@needs_proc
def test_two_processes_die_with_their_launcher_resume_or_restart_exactly_and_train_as_one(tmp_path):
    launcher = start(tmp_path, "killed", 2, 0.3)
    wait_for(lambda: list((tmp_path / "killed").glob("step_*.json")))
    workers = _children(launcher.pid)
    assert len(workers) >= 2
    launcher.kill()
    launcher.wait(10)
    wait_for(lambda: not any(_alive(pid) for pid in workers), 15)
    for name, options in {"killed": {}, "whole": {}, "restarted": {"fatal": 13, "restarts": 1}}.items():
        assert start(tmp_path, name, 2, **options).wait(120) == 0
    assert same_file(tmp_path / "killed.safetensors", tmp_path / "whole.safetensors")
    assert same_file(tmp_path / "restarted.safetensors", tmp_path / "whole.safetensors")
    curve = np.genfromtxt(tmp_path / "whole.csv", delimiter=",", names=True)
    single, _ = train(tmp_path / "single")
    np.testing.assert_allclose(curve["loss"], [row["loss"] for row in single.history], atol=1e-3)


@needs_proc
def test_a_mistake_is_not_tried_again(tmp_path):
    run = start(tmp_path, "wrong", 2, fatal=-1, restarts=3)
    said = run.communicate(timeout=60)[1]
    assert run.returncode != 0
    assert 1 <= said.count("error: training.batch: no good") <= 2  # at most once per process


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
