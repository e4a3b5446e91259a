"""One process, or several under `torchrun`: who am I, where do I compute, and how do we meet.

The number of processes changes the speed and nothing else: the engine splits a fixed global batch over them.
"""

from __future__ import annotations

import datetime
import functools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from workflow_src.common.compute import configure_torch
from workflow_src.common.errors import run_cli
from workflow_src.common.process import die_with_parent

BUCKET = 1 << 25  # numbers per reduction: large enough for bandwidth, small beside the gradients themselves
GRACE = 3.0  # seconds between the death of the parent and the hard exit: time for a checkpoint


@dataclass(frozen=True)
class Processes:
    """This process's place among `size` processes, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process. Work of rank 0 alone (hooks, checkpoints, validation) stands before one of these."""
        if self.size > 1:
            dist.barrier()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_all_(self, tensors: list[torch.Tensor]) -> None:
        """Sum a list of equally typed tensors over processes, in place and in few reductions."""
        bucket, numbers = [], 0
        for tensor in tensors if self.size > 1 else []:
            bucket.append(tensor)
            numbers += tensor.numel()
            if numbers >= BUCKET:
                self._reduce(bucket)
                bucket, numbers = [], 0
        if bucket:
            self._reduce(bucket)

    def _reduce(self, bucket: list[torch.Tensor]) -> None:
        flat = self.sum_(torch.cat([tensor.flatten() for tensor in bucket]))
        pieces = flat.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [piece.view_as(tensor) for piece, tensor in zip(pieces, bucket)])

    def copy_from_first(self, tensors: list[torch.Tensor]) -> None:
        """Give every process rank 0's values."""
        for tensor in tensors if self.size > 1 else []:
            there = tensor.to(self.device)
            dist.broadcast(there, 0)
            tensor.copy_(there)

    def exchange(self, tensors: list[torch.Tensor], owners: list[int], dtype: torch.dtype) -> None:
        """Give every process the owner's values of each tensor, in place, in one collective.

        `owners`: a rank for each tensor, the same list everywhere. The values travel as `dtype`, which must hold them.
        """
        if self.size == 1:
            return
        held = [[tensor for tensor, owner in zip(tensors, owners) if owner == rank] for rank in range(self.size)]
        lengths = [sum(tensor.numel() for tensor in part) for part in held]
        own = torch.zeros(max(lengths), dtype=dtype, device=self.device)
        if held[self.rank]:
            torch.cat([tensor.flatten() for tensor in held[self.rank]], out=own[: lengths[self.rank]])
        every = torch.empty(self.size, len(own), dtype=dtype, device=self.device)
        # As bytes: not every version of gloo knows bfloat16.
        dist.all_gather([row.view(torch.uint8) for row in every], own.view(torch.uint8))
        for rank, (part, row) in enumerate(zip(held, every)):
            if rank != self.rank and part:
                pieces = row[: lengths[rank]].split([tensor.numel() for tensor in part])
                torch._foreach_copy_(part, [piece.view_as(tensor) for piece, tensor in zip(pieces, part)])


@functools.cache
def join() -> Processes:
    """Join the process group that `torchrun` describes in the environment; alone without it. Idempotent.

    Uses NCCL on GPUs and gloo on CPUs. `REHEARSAL_GROUP_TIMEOUT` (seconds, default 1800) bounds the wait for a process
    that no longer answers; then, and when another process is lost, this one ends with an error. From here on it dies with
    its launcher.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    die_with_parent(_launcher(), on_death=_last_words)
    device = configure_torch()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
        # Two full thread pools on the same cores run many times slower than one.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // local)))
        timeout = datetime.timedelta(seconds=float(os.environ.get("REHEARSAL_GROUP_TIMEOUT", "1800")))
        if not dist.is_initialized() and device.type == "cuda":
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # end the process, do not wait for ever
            dist.init_process_group("nccl", timeout=timeout, device_id=device)
        elif not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timeout)
    return Processes(rank, size, device)


def _last_words() -> None:
    """The parent died: ask the engine for a checkpoint, and wait a moment for it."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)


def run_training(main: Callable[[], None]) -> None:
    """`run_cli` for trainings: a mistake (exit code 2) stops `torchrun` as well, for a restart would only repeat it."""
    try:
        run_cli(main)
    except SystemExit as leaving:
        if leaving.code == 2 and "TORCHELASTIC_RUN_ID" in os.environ:
            os.kill(os.getppid(), signal.SIGTERM)
        raise


def leave() -> None:
    """Close the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    join.cache_clear()


def _launcher() -> int | None:
    """The process that wants this training: the first ancestor that is neither `torchrun` nor a `sh -c`.

    Those two outlive their own parent, so watching them alone would leave orphans after `kill -9` of Snakemake.
    """
    pid = os.getppid()
    while pid > 1:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        shell = os.path.basename(words[0]) in ("sh", "bash", "dash") and any(
            w.startswith("-") and "c" in w for w in words[1:2]
        )
        if not shell and not any("torchrun" in word or "torch.distributed.run" in word for word in words):
            return pid
        pid = int(status.rpartition(")")[2].split()[1])
    return None
