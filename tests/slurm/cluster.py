"""A real Slurm for tests: munge, slurmctld and slurmd of this machine alone, everything under one folder.

Own key, sockets, ports and state, so that nothing of a cluster this machine may belong to is read or touched. As root:
Slurm starts every job as its user. GPUs are files that only Slurm takes for devices.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue", "scontrol", "sinfo")
DAEMONS = os.environ["PATH"] + ":/usr/sbin:/sbin"  # where Debian puts them, which may not be on a user's path
PATIENCE = 30.0  # seconds for a daemon to come up or to leave

CONFIGURATION = """
    ClusterName=rehearsal
    SlurmctldHost={host}(127.0.0.1)
    AuthType=auth/munge
    CryptoType=crypto/munge
    AuthInfo=socket={folder}/munge/socket
    SlurmUser=root
    SlurmdUser=root
    SlurmctldPort={controller}
    SlurmdPort={node}
    StateSaveLocation={folder}/state
    SlurmdSpoolDir={folder}/spool
    SlurmctldPidFile={folder}/slurmctld.pid
    SlurmdPidFile={folder}/slurmd.pid
    SlurmctldLogFile={folder}/slurmctld.log
    SlurmdLogFile={folder}/slurmd.log
    ProctrackType=proctrack/linuxproc
    TaskPlugin=task/none
    JobAcctGatherType=jobacct_gather/none
    AccountingStorageType=accounting_storage/none
    MpiDefault=none
    SelectType=select/cons_tres
    SelectTypeParameters=CR_Core_Memory
    SchedulerParameters=batch_sched_delay=0,sched_interval=2
    SlurmdParameters=config_overrides
    ReturnToService=2
    KillWait=20
    MinJobAge=300
    GresTypes=gpu
    NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
    PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def installed() -> bool:
    """Whether this machine can run one: Debian's packages slurm-wlm and munge, and root."""
    return os.geteuid() == 0 and all(shutil.which(name, path=DAEMONS) for name in NEEDED)


class Cluster:
    """A running cluster of one node. `environment` is what its users' processes need."""

    def __init__(self, folder: Path, cpus: int, gpus: int, memory: int):
        self.folder = folder
        self._daemons: list[subprocess.Popen] = []
        host = socket.gethostname().partition(".")[0]
        controller, node = _free_ports(2)
        for name in ("munge", "state", "spool", "bin"):
            (folder / name).mkdir(mode=0o700)
        for index in range(gpus):
            (folder / f"nvidia{index}").symlink_to("/dev/null")  # has to be a device
        text = CONFIGURATION.format(folder=folder, host=host, controller=controller, node=node, cpus=cpus,
                                    memory=memory, gpus=gpus)  # fmt: skip
        (folder / "slurm.conf").write_text(textwrap.dedent(text))
        (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File={folder}/nvidia[0-{gpus - 1}]\n")
        # The executor drops SLURM_CONF from what jobs see.
        for name in ("srun", "scancel"):
            command = folder / "bin" / name
            command.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which(name)} "$@"\n')
            command.chmod(0o755)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.environment = clean | {
            "SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{folder}/bin:{os.environ['PATH']}"
        }  # fmt: skip

    def start(self) -> None:
        """Start the daemons, each once the one before is there, and wait until the node takes jobs."""
        key = self.folder / "munge" / "key"
        key.touch(mode=0o400)
        key.write_bytes(os.urandom(1024))
        munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", *(f"--{flag}={self.folder}/munge/{name}" for flag, name in munge.items()))
        _wait((self.folder / "munge" / "socket").exists, "munged")
        self._daemon("slurmctld", "-D", "-i", "-f", f"{self.folder}/slurm.conf")
        self._daemon("slurmd", "-D", "-f", f"{self.folder}/slurm.conf")
        _wait(lambda: self.ask("sinfo", "--noheader", "--format=%T") == "idle", f"slurmd, see {self.folder}/*.log")

    def stop(self) -> None:
        """End all jobs, then the daemons that were started here, by their process ids."""
        if len(self._daemons) == 3:
            self.ask("scancel", "--full", "--user=root")
            with contextlib.suppress(TimeoutError):
                _wait(lambda: self.ask("squeue", "--noheader") == "", "the jobs' end")
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, *command: str) -> str:
        """What a Slurm command prints; empty when it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    def _daemon(self, name: str, *arguments: str) -> None:
        foreground = ["--foreground", "--force"] if name == "munged" else []
        with open(self.folder / f"{name}.out", "wb") as output:
            self._daemons.append(subprocess.Popen(
                [shutil.which(name, path=DAEMONS), *foreground, *arguments],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            ))  # fmt: skip


@contextlib.contextmanager
def running(folder: Path, *, cpus: int = 8, gpus: int = 4, memory: int = 1 << 17) -> Iterator[Cluster]:
    """A cluster that ends with the block. `memory` in MB, `cpus` and `gpus` are what Slurm believes to have."""
    cluster = Cluster(folder, cpus, gpus, memory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def _wait(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not there within {PATIENCE:g} s")
        time.sleep(0.1)
