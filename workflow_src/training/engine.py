"""The one training loop: fixed global batch, EMA, checkpoints, exact resume, any number of processes.

    python -m workflow_src.training.<x> …                                        one process
    torchrun --standalone --nproc-per-node=N -m workflow_src.training.<x> …      N processes (gloo on CPU, NCCL on GPU)

Whatever a loss draws at random it draws through `training/randomness.py`, so a run that was killed at any step and
started again ends, with the same number of processes, in bitwise the same weights.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import functools
import inspect
import io
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from workflow_src.common.compute import autocast
from workflow_src.common.errors import UserError
from workflow_src.common.files import atomic_path, write_text
from workflow_src.common.progress import Progress
from workflow_src.common.sections import Training
from workflow_src.common.seeds import derive
from workflow_src.training import checkpoint, sharding
from workflow_src.training.blocks import wrap_blocks
from workflow_src.training.distributed import join
from workflow_src.training.optimizers import Optimizers
from workflow_src.training.telemetry import Events, Speed, count_flops, peak_flops, speed_note

Loss = Callable[[nn.Module, int, np.ndarray], dict[str, Tensor]]
Hook = Callable[[int, nn.Module], None]
ROWS = 400  # rows of metrics.csv aimed at, whatever the number of steps
STEPS_PER_READ = 20  # on a GPU metrics are read this rarely: each read waits for the device


class Engine:
    """Trains `model` (already initialised, equal on all processes) and returns its exponential moving average.

    `loss(model, step, samples)` gets int64 global sample indices of one micro-batch (numbers in 0..batch-1) and returns
    `{"loss": mean over these samples, name: other means…}`, always the same names. `hooks[s](s, ema)` runs on rank 0
    once `s` updates are done, before the checkpoint of that step. `prepare(step, ema)` runs on every process before update
    number `step`; what it makes must follow from its arguments or lie on disk. `describe(step, samples)` gives, JSON-able,
    what a batch consisted of; it is saved when the loss is no longer finite. `state` belongs to this training; checkpoints
    of another `digest` in it are ignored and removed. `frames`: in one sample, for the speed that is shown. `events`:
    folder of TensorBoard files. With `config.shard` and several processes `model` and `ema` are split; hooks and the
    caller of `run` get the average whole.
    """

    def __init__(self, model: nn.Module, loss: Loss, config: Training, *, seed: int, state: Path, digest: str,
                 label: str, hooks: Mapping[int, Hook] | None = None,
                 describe: Callable[[int, np.ndarray], object] | None = None, prepare: Hook | None = None,
                 frames: int = 1, events: Path | None = None):  # fmt: skip
        self.processes = join()
        self.config, self.seed, self.label = config, seed, label
        self.state, self.digest, self.frames = Path(state), digest, frames
        self.loss, self.hooks, self.describe, self.prepare = loss, dict(hooks or {}), describe, prepare
        self.events = Events(events if self.processes.first else None)
        self.samples = _share(config.batch, self.processes.rank, self.processes.size)
        self.sharded = config.shard and self.processes.size > 1
        self._place(model)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizers = Optimizers(self.model, config, self.processes)
        self.step, self.history = 0, []
        self._names: list[str] = []
        self._pending: list[Tensor] = []
        self._unlogged: list[list[float]] = []
        self._terminated = False  # this process got SIGTERM
        self._stop = False  # all processes know of it
        self._seconds, self._lr = 0.0, 0.0
        self._speed: Speed | None = None

    def _place(self, model: nn.Module) -> None:
        """Equal weights on all processes' devices, whole or in shards, and the average beside them."""
        if self.sharded:
            sharding.check(self.config, self.processes.device, self.prepare is not None)
        else:  # a model to be sharded goes to the device in pieces
            model.to(self.processes.device)
        self.model = model.train()
        self.processes.copy_from_first([tensor.detach() for tensor in (*model.parameters(), *model.buffers())])
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        wrap_blocks(self.model, self.config)
        if self.sharded:
            self._outline = sharding.outline(self.ema)
            sharding.shard(self.model, self.processes)
            sharding.shard(self.ema, self.processes)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> nn.Module:
        """Train to the last step, from the newest whole checkpoint where there is one; the EMA model, on every process.

        On SIGTERM: writes a checkpoint and leaves by `SystemExit(143)`.
        """
        self._resume()
        self._open_events()
        progress = Progress(self.config.steps, self.label, every=5.0 if self.processes.first else math.inf)
        progress.skip(self.step)
        with self._stop_on_sigterm(), progress if self.processes.first else contextlib.nullcontext():
            while self.step < self.config.steps:
                started = time.monotonic()
                if self.prepare is not None:
                    self.prepare(self.step, self.ema)
                self._speed = self._speed or self._measure()
                self._update()
                self._seconds += time.monotonic() - started
                if self._milestone(self.step):
                    self._log()
                progress.update(1, self._note())
                if self.step in self.hooks:
                    self._alone(functools.partial(self.hooks[self.step], self.step, self._whole_average()))
                due = self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps
                if due or self._stop:
                    self._save()
                if self._stop or (self._terminated and self.step == self.config.steps):
                    raise SystemExit(143)
        self.ema = self._whole_average()
        return self.ema

    def _update(self) -> None:
        totals = self._accumulate()
        if not self.sharded:
            self.processes.sum_all_([parameter.grad for parameter in self.parameters])
        norm = sharding.whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip, foreach=True))
        # The stop flag travels with the metrics: all processes leave at the same step.
        shared = norm.detach().float().reshape(1) / self.processes.size
        flag = torch.tensor([float(self._terminated)], device=shared.device)
        self._pending.append(torch.cat([totals, shared, flag]))
        # On a CPU reading costs nothing, so a bad loss is seen before it reaches the weights.
        if (
            self.processes.device.type == "cpu"
            or len(self._pending) >= STEPS_PER_READ
            or self._milestone(self.step + 1)
        ):
            self._read()
        self._lr = self.config.lr * self.optimizers.step(self.step)
        self._average()
        self.step += 1

    def _accumulate(self) -> Tensor:
        """Gradients of this process's share of the global batch; its part of the metrics' means."""
        for parameter in self.parameters:
            parameter.grad = None
        totals: Tensor | float = 0.0
        # Shards get the mean over processes instead of the sum.
        scale = self.processes.size if self.sharded else 1
        for samples in self._micro_batches():
            # For modules with randomness of their own (dropout); losses use `training/randomness.py`.
            torch.manual_seed(derive(self.seed, "torch", self.step, int(samples[0])))
            weight = len(samples) / self.config.batch
            with autocast(self.processes.device, self.config.precision):
                metrics = self.loss(self.model, self.step, samples)
            (metrics["loss"] * (weight * scale)).backward()
            self._names = list(metrics)
            totals = totals + weight * torch.stack([value.detach().float() for value in metrics.values()])
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return totals

    def _micro_batches(self) -> list[np.ndarray]:
        micro = self.config.micro_batch or len(self.samples)
        return [self.samples[start : start + micro] for start in range(0, len(self.samples), micro)]

    @torch.no_grad()
    def _average(self) -> None:
        # Early on the average is short, or it would still hold the random initial weights when training is brief.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        averages, weights = (sharding.local(one.parameters()) for one in (self.ema, self.model))
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for mean, buffer in zip(self.ema.buffers(), self.model.buffers()):
            mean.copy_(buffer)

    def _whole_average(self) -> nn.Module:
        """The average as an ordinary module. All processes take part."""
        return sharding.fill(self._outline, self.ema, self.processes.device) if self.sharded else self.ema

    # ---- metrics ----------------------------------------------------------------------------------------------------

    def _milestone(self, step: int) -> bool:
        every = max(1, self.config.steps // ROWS)
        saves = step % self.config.checkpoint_every == 0
        return step % every == 0 or saves or step == self.config.steps or step in self.hooks

    def _read(self) -> None:
        """Bring pending metrics to the host; stop where a loss or gradient is not finite."""
        rows = self.processes.sum_(torch.stack(self._pending)).tolist()
        first = self.step + 1 - len(rows)
        self._pending = []
        for step, row in enumerate(rows, first):
            values = dict(zip([*self._names, "gradient_norm"], row))
            if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
                self._complain(step, values)
            self._stop = self._stop or row[-1] > 0
            self._unlogged.append(row[:-1])

    def _complain(self, step: int, values: dict[str, float]) -> None:
        path = self.state / f"not_finite_step_{step:09d}.json"
        batch = np.arange(self.config.batch)
        report = {"step": step, "seed": self.seed, "metrics": {k: str(v) for k, v in values.items()},
                  "batch": self.describe(step, batch) if self.describe else batch.tolist()}  # fmt: skip
        if self.processes.first:
            write_text(path, json.dumps(report, indent=1))
        if inputs := self._inputs(step):
            with atomic_path(path.with_suffix(f".rank{self.processes.rank}.safetensors")) as temporary:
                save_file(inputs, temporary)
        raise UserError(
            f"{self.label}: loss {values['loss']} with gradient norm {values['gradient_norm']} at step {step} is not "
            f"finite; the batch is described in {path}{', its tensors lie beside it' if inputs else ''}; look at its data, "
            "or lower the learning rate"
        )

    def _inputs(self, step: int) -> dict[str, Tensor]:
        """What the network is given in this process's share of `step`, as `sample_<first of a micro-batch>.<argument>`.

        Empty for losses that call the network's parts instead.
        """
        seen: dict[str, Tensor] = {}
        order = inspect.signature(self.model.forward)
        for samples in self._micro_batches():

            def note(_: nn.Module, arguments: tuple, options: dict, first: int = int(samples[0])) -> None:
                for name, value in order.bind(*arguments, **options).arguments.items():
                    if isinstance(value, Tensor):
                        # A copy: two arguments may share memory, which the file format forbids.
                        seen[f"sample_{first}.{name}"] = torch.empty(value.shape, dtype=value.dtype).copy_(value)

            handle = self.model.register_forward_pre_hook(note, with_kwargs=True)
            with torch.no_grad(), autocast(self.processes.device, self.config.precision):
                self.loss(self.model, step, samples)
            handle.remove()
        return seen

    def _log(self) -> None:
        if not self._unlogged:
            return
        means = np.mean(self._unlogged, axis=0)
        row = {"step": self.step, **dict(zip([*self._names, "gradient_norm"], map(float, means)))}
        row |= {"lr": self._lr, "seconds": round(self._seconds, 3)}
        before = self.history[-1] if self.history else {"step": 0, "seconds": 0.0}
        row |= self._speed.of(self.step - before["step"], self._seconds - before["seconds"])
        self.history.append(row)
        self.events.add(self.step, "training", row)
        self._unlogged = []

    def _measure(self) -> Speed:
        """What a step computes and what the devices could, to tell how well they are used."""
        with autocast(self.processes.device, self.config.precision):
            flops = count_flops(self.model, lambda: self.loss(self.model, self.step, self.samples[:1]))
        if self.sharded:
            self.model.reshard()
        peak = peak_flops(self.processes.device, self.config.precision)
        batch = self.config.batch
        return Speed(batch * self.frames, batch * flops, None if peak is None else peak * self.processes.size)

    def _note(self) -> str:
        row = self.history[-1] if self.history else None
        return f"loss {row['loss']:.4f}  {speed_note(row)}" if row else ""

    def _open_events(self) -> None:
        # The last row is written again with what follows it after the training, should that be all that is left to do.
        begin = min(self.step + 1, self.config.steps) if self.step else 0
        self.events.open(begin)
        for row in self.history:
            if row["step"] >= begin:
                self.events.add(row["step"], "training", row)

    def write_metrics(self, path: str | Path) -> None:
        """Write the history as CSV on rank 0.

        Columns: step, loss, other metrics, gradient_norm, lr, seconds, frames_per_second, mfu (share of the devices' peak).
        """
        if not self.processes.first:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.history[-1]) if self.history else ["step", "loss"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_text(path, text.getvalue())

    # ---- state ------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self._log()
        parts = {"model": self.model.state_dict(), "ema": self.ema.state_dict(), "optimizer": self.optimizers.tensors()}
        tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
        content = checkpoint.Checkpoint(self.step, sharding.gather(tensors, self.processes), self.history)
        self._alone(lambda: checkpoint.save(self.state, self.digest, content, self.config.keep))

    def _resume(self) -> None:
        found = checkpoint.load_newest(self.state, self.digest)
        step = found.step if found else 0
        agreed = self.processes.sum_(
            torch.tensor([float(step)], dtype=torch.float64, device=self.processes.device)
        ).item()
        if agreed != step * self.processes.size:
            raise UserError(f"{self.state}: the processes see different checkpoints; put it on a shared file system")
        if found is None:
            return
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, value in found.tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = value
        sharding.load(self.model, parts["model"])
        sharding.load(self.ema, parts["ema"])
        self.optimizers.load(parts["optimizer"])
        self.step, self.history = found.step, found.history
        self._seconds = self.history[-1]["seconds"] if self.history else 0.0

    # ---- processes --------------------------------------------------------------------------------------------------

    def _alone(self, work: Callable[[], None]) -> None:
        """Do `work` on rank 0 while the others wait."""
        if self.processes.first:
            work()
        self.processes.barrier()

    @contextlib.contextmanager
    def _stop_on_sigterm(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(_signal: int, _frame: object) -> None:
            self._terminated = True

        before = signal.signal(signal.SIGTERM, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _share(batch: int, rank: int, size: int) -> np.ndarray:
    """Global sample indices of one process."""
    if batch % size:
        raise UserError(
            f"training.batch: {batch} cannot be split evenly over {size} processes; use a multiple of {size}"
        )
    return np.arange(rank * (batch // size), (rank + 1) * (batch // size), dtype=np.int64)
