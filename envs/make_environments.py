"""Write envs/*.yaml from constraints.txt, the one source of truth for versions. Run after changing either."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from workflow_src.common.files import write_if_changed  # noqa: E402

ENVIRONMENTS = {
    "base": (
        "Everything but the policies: simulator, training, judging, analysis.",
        ["av", "diffusers", "einops", "google-crc32c", "gymnasium", "imageio", "ipykernel", "msgpack", "mujoco", "nbconvert",
         "numpy", "openai", "pandas", "papermill", "pillow", "pyarrow", "PyYAML", "requests", "safetensors", "scipy",
         "seaborn", "tensorboard", "tensorflow-datasets", "torch", "websockets"],
    ),
    "tabletop": (
        "The tabletop's own policies: behaviour cloning, scripted, random.",
        ["msgpack", "numpy", "pillow", "PyYAML", "safetensors", "torch", "websockets"],
    ),
}  # fmt: skip


def pins() -> dict[str, str]:
    """Package (lower case) → version, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines) if version}


def text(name: str) -> str:
    """Content of one environment file."""
    purpose, packages = ENVIRONMENTS[name]
    versions = pins()
    lines = [
        f"# {purpose}",
        "# Written by envs/make_environments.py from constraints.txt; edit those.",
        "channels: [conda-forge, nodefaults]",
        "dependencies:",
        "  - python=3.11",
        "  - pip",
        "  - pip:",
        *(f"      - {package}=={versions[package.lower()]}" for package in packages),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for environment in ENVIRONMENTS:
        write_if_changed(ROOT / "envs" / f"{environment}.yaml", text(environment))
