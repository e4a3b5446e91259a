"""`--sdm apptainer`: every job in its environment's image, which sees what the job needs, and nothing is made anew for it.

There is no Apptainer here. A stand-in takes Snakemake's commands and runs them on this machine, with an image's PATH.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.chain import MINI, ROOT, assert_nobody_left, copy_of, errors, rollouts, run
from workflow_src.common.config import from_dict
from workflow_src.common.errors import UserError
from workflow_src.common.sections import Config
from workflow_src.containers import image_of, outside_paths
from workflow_src.execution import shell_prefix, show_in_images
from workflow_src.preflight import needs
from workflow_src.workflow import checked

# Like Apptainer it stays between Snakemake and the job, hands signals on, and lets the image decide where programs are.
APPTAINER = """#!{python}
import os, shlex, signal, subprocess, sys
words = sys.argv[1:]
with open("{calls}", "a") as calls:
    calls.write(shlex.join(words) + "\\n")
if words == ["--version"]:
    print("apptainer version 1.3.4")
elif words[0] == "pull":
    open(words[words.index("--name") + 1], "x").close()
else:
    shell = words.index("bash")
    image = os.path.basename(words[shell - 1])
    job = subprocess.Popen(words[shell:], env=os.environ | {{"PATH": "{inside}:/usr/bin:/bin", "IMAGE": image}})
    signal.signal(signal.SIGTERM, lambda *_: job.send_signal(signal.SIGTERM))
    sys.exit(job.wait())
"""
PYTHON = """#!/bin/sh
echo "$IMAGE $2" >> {used}
exec {python} "$@"
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with Apptainer. `calls`: how it was called; `used`: "IMAGE MODULE" of every Python in an image."""
    places = {name: tmp_path / name for name in ("calls", "used", "inside", "outside")}
    for folder, name, text in (("outside", "apptainer", APPTAINER), ("inside", "python", PYTHON)):
        places[folder].mkdir()
        program = places[folder] / name
        program.write_text(text.format(python=sys.executable, **places))
        program.chmod(0o755)
    for name in ("calls", "used"):
        places[name].touch()
    (tmp_path / "base.sif").touch()
    monkeypatch.setenv("PATH", f"{places['outside']}:{os.environ['PATH']}")
    return SimpleNamespace(
        **{name: (lambda path=places[name]: path.read_text().splitlines()) for name in ("calls", "used")}
    )


def with_images(folder: Path, **images: str) -> Path:
    """The miniature configuration, its random policy in the environment rt1x, with these images."""
    config = yaml.safe_load(MINI.read_text()) | {"images": images}
    config["policies"]["random"]["env"] = "rt1x"
    path = folder / "images.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def test_every_job_runs_in_its_image(finished, tmp_path, machine):
    folder = copy_of(finished, tmp_path / "contained", "trials", "rollouts")
    target = "results/rollouts/lab/random/shard_0/rollouts.parquet"
    base = str(tmp_path / "base.sif")
    config = with_images(tmp_path, base=base, rt1x="docker://lab/rt1x:1")
    run(folder, target, "--sdm", "apptainer", "--apptainer-args=--nv", config=config)

    pull, *jobs = [shlex.split(line) for line in machine.calls() if line != "--version"]
    assert pull[:2] == ["pull", "--name"] and pull[-1] == "docker://lab/rt1x:1"
    assert {tuple(job[:6]) for job in jobs} == {("exec", "--home", str(folder), "--nv", f"--bind={ROOT}", "--bind")}
    # What was trained outside is not trained again; and every Python of a job is the one of its image.
    assert len(jobs) == 3 and set(machine.used()) == {
        f"{pull[2]} workflow_src.policies.serve", "base.sif workflow_src.rollouts.trials", "base.sif workflow_src.rollouts.run",
    }  # fmt: skip
    assert rollouts(folder, "random", "lab").equals(rollouts(finished, "random", "lab"))
    assert_nobody_left(folder)

    (tmp_path / "newer.sif").touch()
    newer = with_images(tmp_path, base=str(tmp_path / "newer.sif"), rt1x="docker://lab/rt1x:1")
    for more in (["--sdm", "apptainer"], []):
        done = run(folder, target, "--dry-run", *more, config=newer)
        assert "Nothing to be done" in done.stdout + done.stderr


def test_an_environment_without_image_ends_the_run_before_it_begins(tmp_path, machine):
    config = with_images(tmp_path, base=str(tmp_path / "base.sif"))
    done = run(tmp_path / "run", "--sdm", "apptainer", check=False, config=config)
    assert done.returncode == 2 and "Traceback" not in done.stderr and machine.calls() == []
    assert errors(done) == [
        "error: images.rt1x: is missing, and with --sdm apptainer policies.random.env names that environment; "
        "write docker://… or a .sif file"
    ]


@pytest.mark.parametrize(("images", "env", "message"), [
    ({}, "base", "images.base: is missing, and with --sdm apptainer most jobs run in it"),
    ({"base": "docker://base"}, "tabletop", "docker://base"),  # with all that the tabletop's policies need
    ({"base": "docker://base", "tabletop": "oras://small"}, "tabletop", "oras://small"),
    ({"base": "absent.sif"}, "base", "images.base: 'absent.sif' is not there; build it"),
    ({"conda:vla": "docker://vla"}, "conda:vla", "docker://vla"),
    ({"base": "docker://base"}, "/opt/vla", "policies.p.env: '/opt/vla' is of this machine, and in no image"),
])  # fmt: skip
def test_the_image_of_an_environment(images, env, message):
    config = Config(images=images)
    if "://" in message:
        assert image_of(config, env, "policies.p.env") == message
        return
    with pytest.raises(UserError) as mistake:
        image_of(config, env, "" if env == "base" else "policies.p.env")
    assert str(mistake.value).startswith(message)


@pytest.mark.parametrize(("images", "message"), [
    ({"opnvla": "docker://x"}, "images: 'opnvla' is unknown; did you mean 'openvla'?"),
    ({"base": "docker pull x"}, "images.base: 'docker pull x' is no image"),
])  # fmt: skip
def test_mistakes_in_the_section(images, message):
    with pytest.raises(UserError) as mistake:
        checked({"images": images})
    assert str(mistake.value).startswith(message)


def test_images_see_what_the_configuration_names(tmp_path, monkeypatch):
    for name in ("disk/results", "data/bridge", "hub", "run"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    Path("results").symlink_to(tmp_path / "disk" / "results")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("CACHES", str(tmp_path / "data"))
    named = {
        "episodes": {"stores": {"bridge": str(tmp_path / "data" / "bridge")}, "recorded": {"copies": {"rt_1": "/absent/rt_1"}}},
        "local_cache": "$CACHES/not/yet/made", "images": {"base": str(tmp_path / "base.sif")},
        "world_model": {"source": {"checkpoint": "hf://owner/name@0/model.pt"}},
    }  # fmt: skip
    paths = outside_paths(from_dict(Config, named))
    assert paths == sorted([str(ROOT), *(str(tmp_path / name) for name in ("data", "disk/results", "hub"))])

    workflow = SimpleNamespace(deployment_settings=SimpleNamespace(apptainer_args="--nv --bind=/data"))
    for _ in range(2):  # in a cluster's job once more, with what was given to it
        show_in_images(workflow, ["/data", "/a b"])
    assert shlex.split(workflow.deployment_settings.apptainer_args) == ["--nv", "--bind=/data", "--bind=/a b"]
    # What is absent is no reason to show a folder of this machine's system.
    assert outside_paths(from_dict(Config, {"trials": {"root": "/usr/share/absent/frames"}})) == outside_paths(Config())
    (tmp_path / "a:b").mkdir()
    with pytest.raises(UserError, match=r"trials\.root: .*a:b' has a ':' or ',' in it"):
        outside_paths(from_dict(Config, {"trials": {"root": str(tmp_path / "a:b")}}))
    with pytest.raises(UserError, match="local_cache: '~/cache' is another place in an image"):
        outside_paths(Config(local_cache="~/cache"))


def test_jobs_watch_snakemake_through_what_runs_their_image():
    """The shell's parent is Apptainer, which outlives a killed Snakemake; and the image's own PATH stays as it is."""
    shell = shell_prefix(["apptainer"], Config()).format() + 'echo "$REHEARSAL_PARENT $PATH $PYTHONPATH"'
    between = ["sh", "-c", f"bash -c {shlex.quote(shell)}; true"]
    done = subprocess.run(between, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(os.getpid()), "/usr/bin:/bin", str(ROOT)]


def test_the_preflight_names_missing_images(tmp_path, monkeypatch):
    config = from_dict(Config, {"policies": {"p": {"env": "octo"}, "q": {}}, "images": {"base": "docker://base"}})
    monkeypatch.setenv("PATH", str(tmp_path))
    apptainer, base, octo = needs._environments(config, {"roll_out"}, ["p", "q"], ["apptainer"])
    assert not apptainer.there and apptainer.text.startswith("apptainer: is not on PATH")
    assert base == needs.Need(True, "image of environment base: docker://base")
    assert not octo.there and octo.text.startswith("images.octo: is missing")


def test_images_are_in_no_stage_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = yaml.safe_load(MINI.read_text())
    stages = []
    for images in ({}, {"base": "docker://base"}):
        checked(plain | {"images": images}).write_stage_files()
        stages.append({path: path.read_text() for path in Path("results/config").rglob("*.json")})
    assert stages[0] == stages[1] and len(stages[0]) > 5
