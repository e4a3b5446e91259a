"""Dockerfiles: the pins of envs/ and constraints.txt, nobody's rights, no secrets, and all that the code they copy needs.

Building takes gigabytes and minutes, so it is done by hand. What can be known without is checked.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from cloud.images import dockerfiles, workflow_requirements
from workflow_src.policies import serve
from workflow_src.workflow import ROOT

IMAGES = sorted(path.stem for path in (ROOT / "docker").glob("*.Dockerfile"))


def instructions(image: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined."""
    text = (ROOT / "docker" / f"{image}.Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


def installed(image: str) -> list[str]:
    """What pip is told to install."""
    (line,) = [rest for name, rest in instructions(image) if name == "RUN" and "pip install" in rest]
    return [word for word in shlex.split(line) if "==" in word or " @ " in word]


def test_files_are_as_generated():
    assert set(IMAGES) == {"base", "lerobot", "octo", "openvla", "rt1x", "spatialvla"}
    for image, text in dockerfiles().items():
        assert (ROOT / "docker" / f"{image}.Dockerfile").read_text() == text, "run: python cloud/images.py"


@pytest.mark.parametrize("image", IMAGES)
def test_pins_are_those_of_the_environment(image):
    python, _, entry = yaml.safe_load((ROOT / "envs" / f"{image}.yaml").read_text())["dependencies"]
    assert ("FROM", f"python:{python.partition('=')[2]}-slim") == instructions(image)[0]
    if image == "base":  # with Snakemake besides
        assert set(entry["pip"]) <= set(installed(image)) and "snakemake[reports]==9.27.1" in installed(image)
    else:
        assert entry["pip"] == installed(image)


def test_the_workflows_pins_are_those_of_the_constraints():
    constraints = {line.lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {re.sub(r"\[.*\]", "", one).lower() for one in workflow_requirements()} <= constraints


@pytest.mark.parametrize("image", IMAGES)
def test_nobody_in_particular_and_no_secrets(image):
    steps = instructions(image)
    names = [name for name, _ in steps]
    assert names[-4:] == ["ENV", "USER", "WORKDIR", "ENTRYPOINT"] and dict(steps)["USER"] == "1000"
    assert "ARG" not in names and "ADD" not in names
    variables = {pair.partition("=")[0] for pair in dict(steps)["ENV"].split()}
    assert variables == {"PYTHONPATH", "PYTHONUNBUFFERED", "HOME", "USER"}  # keys come from whoever runs it
    code = names.index("COPY", 3)  # constraints.txt comes before, for pip
    assert all(name != "RUN" for name in names[code:]), "an edit of code would build the environment anew"


@pytest.mark.parametrize(
    ("image", "packages"), [("base", {"g++"}), ("lerobot", {"gcc", "libc6-dev"}), ("octo", {"git"})]
)
def test_what_pip_and_torch_compile_need_is_there_before_them(image, packages):
    """The slim images have no compiler: evdev, which lerobot asks for, has no wheels, and torch.compile compiles C++."""
    system, pip = [rest for name, rest in instructions(image) if name == "RUN"][:2]
    assert system.startswith("apt-get update && apt-get install") and packages <= set(system.split())
    assert "pip install" in pip


def test_only_what_is_named_enters_an_image():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {rest.split()[0] for image in IMAGES for name, rest in instructions(image) if name == "COPY"}
    assert {path if path in allowed else path.split("/")[0] for path in copied} == allowed
    assert any(fnmatch.fnmatch("config/.env", line) for line in lines[1:])


@pytest.mark.parametrize("image", ["base", "octo"])
def test_the_code_that_is_copied_suffices(image, tmp_path):
    """Of the base image for a preflight, which makes a dry run, of a policy's for its server."""
    project = tmp_path / "project"
    for name, rest in instructions(image):
        if name == "COPY":
            source, target = rest.split()
            target = project / target.removeprefix("/opt/rehearsal/")
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, target)
    _, module, *_ = [word for word in re.findall(r'"([^"]+)"', dict(instructions(image))["ENTRYPOINT"]) if word != "-m"]
    arguments = ["preflight"] if image == "base" else ["--help"]
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=work, env={"PYTHONPATH": str(project), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_documented_container_of_a_policy_waits_for_its_run(monkeypatch):
    """However long: with --config, a server otherwise ends by itself when nobody comes."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^docker run .* rehearsal-openvla (.*)$", text, re.M)
    monkeypatch.setattr(sys, "argv", ["serve", *shlex.split(line)])
    options = serve.arguments()
    assert options.policy == "openvla" and options.connect_deadline == options.idle_limit == float("inf")


def test_the_kubernetes_job_fits_the_image():
    claim, job = yaml.safe_load_all((ROOT / "cloud" / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    image = dict(instructions("base"))
    assert pod["securityContext"]["runAsNonRoot"] and str(pod["securityContext"]["runAsUser"]) == image["USER"]
    places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    claims = {one["name"]: one["persistentVolumeClaim"] for one in pod["volumes"] if "persistentVolumeClaim" in one}
    assert claims[places[image["WORKDIR"]]]["claimName"] == claim["metadata"]["name"]
    assert [one["secretRef"]["optional"] for one in container["envFrom"]] == [True] and "env" not in container
    configfile = container["args"][container["args"].index("--configfile") + 1]
    assert (ROOT / configfile.removeprefix("/opt/rehearsal/")).is_file() and configfile.startswith("/opt/rehearsal/")
