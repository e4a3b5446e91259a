"""The structure that DESIGN promises: who may import whom, thin packages, pinned environments, no stray output."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest
import yaml

from envs.make_environments import ENVIRONMENTS, pins, text
from workflow_src.workflow import ROOT

PACKAGE = ROOT / "workflow_src"

# Room → rooms it may import (besides itself). `common` and `embodiments` lie below everything; `training` may import all.
MAY_IMPORT = {
    "common": set(),
    "embodiments": {"common"},
    "tabletop": {"common", "embodiments"},
    "episodes": {"common", "embodiments", "world_model"},  # world_model: the tokenizer of the latent cache
    "buckets": {"common", "episodes"},
    "world_model": {"common", "embodiments"},
    "policies": {"common", "embodiments"},
    "rollouts": {"common", "embodiments", "policies", "episodes"},
    "judges": {"common", "episodes", "rollouts", "tabletop"},
    "analysis": {"common", "rollouts"},
}
HEAVY = {"tensorflow", "jax", "transformers", "diffusers", "mujoco", "openai"}


def imports(path):
    """(module, whether it is at the top level) for every import of a source file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in top


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if room_of(path) in MAY_IMPORT]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_what_they_may(path):
    room = room_of(path)
    allowed = MAY_IMPORT[room] | {room}
    if path.name == "tabletop_scripted.py":
        allowed |= {"tabletop"}  # the scripted policy is the expert behind a state estimate
    if path.name == "evaluate.py":
        allowed |= {"world_model", "judges", "analysis"}  # one command for the whole way
    for module, _ in imports(path):
        if module.startswith("workflow_src."):
            assert module.split(".")[1] in allowed, f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_package_files_import_nothing(path):
    assert list(imports(path)) == []


def test_heavy_frameworks_have_one_door_each():
    """Only the simulator's own modules import MuJoCo at their top; no room imports the others there."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for module, at_top in imports(path):
            if at_top and module.split(".")[0] in HEAVY:
                assert room_of(path) == "tabletop", f"{path.relative_to(ROOT)} imports {module} at its top"


def test_common_and_policies_import_without_torch():
    """Policy environments bring their own frameworks; what they import of ours must not ask for another."""
    code = (
        "import sys, importlib\n"
        "for name in ['torch', 'pandas', 'mujoco', 'gymnasium', 'snakemake', 'av']: sys.modules[name] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    rooms = ("common", "policies")
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in rooms
        for path in sorted((PACKAGE / room).glob("*.py"))
        if path.stem != "__init__"
    ]
    subprocess.run([sys.executable, "-c", code, "workflow_src.embodiments", *modules], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment_files_follow_the_constraints(name):
    path = ROOT / "envs" / f"{name}.yaml"
    assert path.read_text() == text(name), "run: python envs/make_environments.py"
    environment = yaml.safe_load(path.read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    ours = [pin for pin in pip if pin not in ENVIRONMENTS[name].pins]
    for pin in ours:
        package, _, version = pin.partition("==")
        assert pins()[package.lower()] == version


def test_the_base_environment_has_what_its_stages_import():
    """All but what runs in environments of their own: Snakemake's own process, policies' frameworks, TensorFlow's reader."""
    elsewhere = {"snakemake", *("tensorflow", "transformers", "octo", "jax", "lerobot", "openpi_client")}
    provided = {package.lower() for package in ENVIRONMENTS["base"].packages}
    of = packages_distributions()
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "policies" or path.stem == "tensorflow_reader":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - elsewhere:
                if name in ("workflow_src", "envs"):
                    continue
                assert {package.lower() for package in of.get(name, [name])} & provided, f"{path}: {name}"


def package_of(pin):
    return re.match(r"[\w.-]+", pin).group().lower()


@pytest.mark.parametrize("path", sorted((ROOT / "envs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_environment_is_pinned_and_holds_what_its_servers_need(path):
    assert path.stem in ENVIRONMENTS, "write it by envs/make_environments.py"
    python, _, entry = yaml.safe_load(path.read_text())["dependencies"]
    assert python in ("python=3.10", "python=3.11")
    exact = re.compile(r"[\w.-]+(\[[\w,]+\])?==\d[\w.]*|[\w.-]+ @ git\+https://\S+@[0-9a-f]{40}")
    assert [pin for pin in entry["pip"] if not exact.fullmatch(pin)] == []
    names = [package_of(pin) for pin in entry["pip"]]
    assert len(names) == len(set(names)) and "snakemake" not in names
    if path.stem == "tfds":  # which serves no policy
        return
    assert {"msgpack", "numpy", "pillow", "pyyaml", "websockets"} <= set(names)
    assert ("torch" in names) == (path.stem not in ("octo", "rt1x")), "a policy in JAX needs no torch"


def test_locks_agree_with_their_environments():
    """A lock may hold a torch for CPUs and newer pure-Python packages, but the policy's own code is that of the file."""
    for lock in (ROOT / "envs").glob("*.lock"):
        locked = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in locked)
        if lock.stem not in ENVIRONMENTS:
            continue  # of a test alone
        own = {package_of(pin): pin.partition("==")[2] for pin in ENVIRONMENTS[lock.stem].pins}
        found = {package_of(line): line.partition("==")[2] for line in locked}
        name = {"tfds": "tensorflow-cpu", "openvla": "transformers"}.get(lock.stem, lock.stem)
        assert set(own) - {"bitsandbytes"} <= set(found) and found[name] == own[name]  # which needs a GPU


ROOMS_OF_POLICIES = ("common", "policies")


@pytest.mark.parametrize(
    "path",
    [PACKAGE / "embodiments.py", *(p for room in ROOMS_OF_POLICIES for p in sorted((PACKAGE / room).rglob("*.py")))],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_what_policy_environments_import_is_python_3_10(path):
    ast.parse(path.read_text(), feature_version=(3, 10))
    assert "tomllib" not in [module for module, _ in imports(path)]  # from 3.11 on


def test_notebooks_hold_no_output():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None, path.name
