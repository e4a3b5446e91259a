"""Write docker/*.Dockerfile from pyproject.toml, constraints.txt and envs/make_environments.py. Run after changing those.

    python cloud/images.py
    docker build -t rehearsal -f docker/base.Dockerfile .              # the workflow and everything but the policies
    docker build -t rehearsal-openvla -f docker/openvla.Dockerfile .   # the server of a policy

Pins stand in layers of their own, below the project's code: an edit of code builds no environment anew.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from envs.make_environments import ENVIRONMENTS, pins, requirements  # noqa: E402
from workflow_src.common.files import write_if_changed  # noqa: E402

PROJECT = "/opt/rehearsal"
WORKFLOW = (
    "Snakefile", "rules", "config", "envs", "notebooks", "profiles", "slurm", "benchmarks/throughput.yaml", "workflow_src",
)  # fmt: skip
SERVER = ("workflow_src/__init__.py", "workflow_src/embodiments.py", "workflow_src/common", "workflow_src/policies")
EXTRAS = ("buckets", "published")  # of pyproject.toml, in the base image
HERE = ("base", "tabletop")  # environments of the base image: it serves the tabletop's policies itself
# Debian's packages of compilers: for torch.compile (`training.compile`), and for evdev, which lerobot gets as source.
COMPILERS = {"base": ("g++",), "lerobot": ("gcc", "libc6-dev")}


def policy_environments() -> list[str]:
    """The environments with images of their own: those that hold what a policy's server needs."""
    serving = [name for name in ENVIRONMENTS if any(one.startswith("websockets==") for one in requirements(name))]
    return [name for name in serving if name not in HERE]


def workflow_requirements() -> list[str]:
    """The project's dependencies, each at the version of constraints.txt; what they need in turn, pip takes from there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(one for extra in EXTRAS for one in project["optional-dependencies"][extra])]
    versions, found = pins(), []
    for one in asked:
        name, extras = re.match(r"([\w.-]+)(\[[\w,]+\])?", one).groups(default="")
        found.append(f"{name}{extras}=={versions[name.lower()]}")
    return sorted(found, key=str.lower)


def system(name: str) -> list[str]:
    """The line that installs Debian's packages which an environment needs; none, if none."""
    packages = [*COMPILERS.get(name, ()), *(["git"] if any("git+" in one for one in requirements(name)) else [])]
    install = f"apt-get install --yes --no-install-recommends {' '.join(packages)}"
    return [f"RUN apt-get update && {install} && rm -rf /var/lib/apt/lists/*"] if packages else []


def install(requirements: list[str], options: str = "") -> list[str]:
    """Lines of a Dockerfile that install pinned packages."""
    return [
        f"RUN python -m pip install --no-cache-dir --disable-pip-version-check{options} \\",
        *(f"    '{one}' \\" for one in requirements[:-1]),
        f"    '{requirements[-1]}'",
    ]


# Also `docker run --user $(id -u)`, which lets results belong to whom they should, needs a home and a place to work.
USER = "RUN useradd --uid 1000 --create-home rehearsal && chmod 1777 /home/rehearsal && install -d -m 1777 /work"


def run(module: str) -> list[str]:
    """The end of every Dockerfile: nobody in particular runs `module`, in a folder that is mounted."""
    return [
        f"ENV PYTHONPATH={PROJECT} PYTHONUNBUFFERED=1 HOME=/home/rehearsal USER=rehearsal",
        "USER 1000",
        "WORKDIR /work",
        f'ENTRYPOINT ["python", "-m", "{module}"]',
    ]


def copies(paths: tuple[str, ...]) -> list[str]:
    """Lines that copy parts of the project to where they are in it."""
    return [f"COPY {path} {PROJECT}/{path}" for path in paths]


def base() -> list[str]:
    """The image of the workflow: its arguments are those of `rehearse`."""
    return [
        "FROM python:3.11-slim",
        *system("base"),
        f"COPY constraints.txt {PROJECT}/constraints.txt",
        *install(workflow_requirements(), f" -c {PROJECT}/constraints.txt"),
        USER,
        *copies(WORKFLOW),
        *run("workflow_src.launch"),
    ]


def policy(name: str) -> list[str]:
    """The image of a policy's environment: its arguments are those of the server."""
    return [
        f"FROM python:{ENVIRONMENTS[name].python}-slim",
        *system(name),
        *install(requirements(name)),
        USER,
        *copies(SERVER),
        *run("workflow_src.policies.serve"),
    ]


def dockerfiles() -> dict[str, str]:
    """Name → content of every Dockerfile."""
    parts = {"base": base(), **{name: policy(name) for name in policy_environments()}}
    return {
        name: "\n".join([f"# {ENVIRONMENTS[name].purpose}", "# Written by cloud/images.py.", *lines]) + "\n"
        for name, lines in parts.items()
    }


if __name__ == "__main__":
    for image, content in dockerfiles().items():
        write_if_changed(ROOT / "docker" / f"{image}.Dockerfile", content)
