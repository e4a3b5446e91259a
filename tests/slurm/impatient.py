"""Snakemake that looks after its jobs every half second. On a cluster the executor waits ten seconds longer after each look."""

from __future__ import annotations

import asyncio

from snakemake import cli
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor


async def wait(_: RemoteExecutor) -> None:
    await asyncio.sleep(0.5)


if __name__ == "__main__":
    RemoteExecutor.sleep = wait
    cli.main()
