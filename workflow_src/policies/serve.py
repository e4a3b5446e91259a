"""Serves one policy to rollouts over a websocket, from its own environment.

The endpoint file is written within a second, before any framework is imported: Snakemake waits only seconds for it,
while weights may take minutes. `/healthz` answers 503 and the stage of loading until the policy is ready.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

from workflow_src.common import gpus
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.process import die_with_parent, start_watchdog_on_sigterm
from workflow_src.common.progress import say
from workflow_src.policies import lifecycle

EXAMPLES = """examples:
  python -m workflow_src.policies.serve openvla --checkpoint openvla/openvla-7b --port 8000     # by hand; it prints its token
  python -m workflow_src.policies.serve --config results/config/policies.json --policy bc@1500 \\
      --networks results/policies --endpoint-file /tmp/endpoint.json --log /tmp/server.log
  curl http://127.0.0.1:$PORT/healthz
"""


def arguments() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.policies.serve",
        description=__doc__.split("\n", 1)[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name", nargs="?", default="", help="policy family (adapter) to serve by hand, without --config"
    )
    parser.add_argument("--checkpoint", default="", help="by hand: its checkpoint, a folder or a name on the hub")
    parser.add_argument("--revision", default="", help="by hand: commit of the hub repository")
    parser.add_argument("--statistics", default="", help="by hand: data set whose statistics un-normalise its actions")
    parser.add_argument(
        "--embodiment", default="widowx", help="by hand: robot whose actions it speaks (default: widowx)"
    )
    parser.add_argument("--config", type=Path, help="stage file with seed, lab, policies, rollouts")
    parser.add_argument("--policy", default="", help="name of the policy in the configuration")
    parser.add_argument("--networks", type=Path, default=Path("results/policies"), help="folder of trained networks")
    parser.add_argument(
        "--endpoint-file",
        type=Path,
        help="gets host, port, token, pid; removing it ends the server (by hand: a new file)",
    )
    parser.add_argument("--log", type=Path, help="output of this server and its framework (by hand: the terminal)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: any free one)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the policy's framework")
    parser.add_argument("--gpus", type=int, help="GPUs to lease for policy and world model (default: all visible ones)")
    parser.add_argument("--parent", type=int, help="end when this process ends (default: the parent)")
    parser.add_argument(
        "--connect-deadline",
        type=float,
        help="end when nobody connects for so many seconds (default: 900; by hand: never)",
    )
    parser.add_argument(
        "--idle-limit", type=float, help="end after so many seconds without a request (default: 3600; by hand: never)"
    )
    options = parser.parse_args()
    if bool(options.name) == bool(options.config) or bool(options.config) != bool(options.policy):
        parser.error("give the name of a policy family, or --config with --policy")
    if options.config and not (options.endpoint_file and options.log):
        parser.error("--config needs --endpoint-file and --log")
    for limit, seconds in (("connect_deadline", 900.0), ("idle_limit", 3600.0)):
        if getattr(options, limit) is None:
            setattr(options, limit, float("inf") if options.name else seconds)
    if options.name:
        options.policy = options.name
        options.endpoint_file = options.endpoint_file or Path(tempfile.mkdtemp(prefix="rehearsal-")) / "endpoint.json"
    return options


def load(options: argparse.Namespace):
    """Reads the configuration and loads the policy. Everything heavy is imported from here on."""
    from dataclasses import replace

    from workflow_src.common.config import check_name, load_stage
    from workflow_src.policies import adapter

    stage = load_stage(options.config) if options.config else by_hand(options)
    check_name("policies", options.policy, stage.policies)
    policy = stage.policies[options.policy]
    loaded = adapter.load(options.policy, policy, options.networks, stage.lab, stage.seed, stage.rollouts.batch)
    loaded.metadata = replace(loaded.metadata, name=options.policy)
    say(f"policy {options.policy} is ready: revision {loaded.metadata.revision}")
    return loaded


def by_hand(options: argparse.Namespace):
    """What a stage file would say of the policy that the command line describes."""
    from workflow_src.common.sections import Config, Lab, Policy

    policy = Policy(
        adapter=options.name, checkpoint=options.checkpoint, revision=options.revision, statistics=options.statistics
    )
    lab = Lab(scene="none", tasks=(), image_size=256, embodiment=options.embodiment)
    return Config(lab=lab, policies={options.name: policy})


def infer(server, options: argparse.Namespace, endpoint: lifecycle.Endpoint, outcome: list[int]) -> None:
    """Body of the inference thread. Leaves an exit code in `outcome` when loading fails."""

    def loaded():
        if options.gpus is not None:
            # Only now: the endpoint file may not wait for a GPU.
            server.stage = lifecycle.WAITING_FOR_GPU
            endpoint.grant(options.endpoint_file, gpus.take(options.gpus))
        server.stage = f"loading policy {options.policy}"
        return load(options)

    server.stage = f"loading policy {options.policy}"
    try:
        run_cli(lambda: server.run(loaded))
    except SystemExit as left:
        outcome.append(left.code if isinstance(left.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        outcome.append(1)


def wait(server, options: argparse.Namespace, worker: threading.Thread) -> str:
    """Returns, with the reason, when the server has to end."""
    while True:
        worker.join(0.5)
        idle = time.monotonic() - server.last_activity
        if not worker.is_alive():
            return "loading failed"
        if server.adapter is None:
            continue
        if not server.ever_connected and idle > options.connect_deadline:
            return f"nobody connected within {options.connect_deadline:g} s"
        if server.ever_connected and idle > options.idle_limit:
            return f"idle for {options.idle_limit:g} s"


def main() -> None:
    """Entry point."""
    options = arguments()
    if options.threads < 1:
        raise UserError(f"--threads: {options.threads} is not positive")
    # Snakemake exports 0 for services, which OpenMP reads as "all cores".
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    watched = (os.getppid(), options.parent or int(os.environ.get("REHEARSAL_PARENT") or 0))
    lifecycle.start_guardian(options.endpoint_file, filter(None, watched))
    if options.log:
        lifecycle.redirect_output(options.log)
    listener, endpoint = lifecycle.bind(options.host, options.port, options.policy, options.log)

    def clean() -> None:
        endpoint.remove(options.endpoint_file)

    start_watchdog_on_sigterm(lifecycle.GRACE, lambda: lifecycle.end(143, clean))
    signal.signal(signal.SIGINT, lambda *_: lifecycle.end(130, clean))
    endpoint.write(options.endpoint_file)
    if options.name:
        say(f"ws://{endpoint.host}:{endpoint.port}, token {endpoint.token}; endpoint file: {options.endpoint_file}")
    die_with_parent(options.parent, on_death=lambda: lifecycle.end(143, clean))

    from workflow_src.policies.server import PolicyServer

    server = PolicyServer(listener, endpoint.token)
    outcome: list[int] = []
    worker = threading.Thread(target=infer, args=(server, options, endpoint, outcome), name="inference", daemon=True)
    worker.start()
    say(f"ending: {wait(server, options, worker)}")
    # After a failure the endpoint file stays: it leads the client to this log.
    lifecycle.end(outcome[0] if outcome else 0, (lambda: None) if outcome else clean)


if __name__ == "__main__":
    run_cli(main)
