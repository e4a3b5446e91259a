"""Write envs/*.yaml: ours from constraints.txt, the policies' from the table below. Run after changing either.

These two are the only places where versions stand. Policy environments follow the requirements of the policy's own project
and hold neither Snakemake nor, unless the policy needs it, torch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from workflow_src.common.files import write_if_changed  # noqa: E402


@dataclass(frozen=True)
class Environment:
    """One file. `packages` are pinned by constraints.txt; `pins` stand here, for a Python or a project of its own."""

    purpose: str
    packages: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()
    python: str = "3.11"


# What `workflow_src.policies` and `.common` themselves need, at versions that run on Python 3.10 with numpy 1.
WIRE = ("msgpack==1.1.0", "PyYAML==6.0.2", "websockets==15.0.1")

ENVIRONMENTS = {
    "base": Environment(
        "Everything but the policies: simulator, training, judging, analysis.",
        ("av", "diffusers", "docutils", "einops", "google-crc32c", "gymnasium", "imageio", "ipykernel", "itables",
         "matplotlib", "msgpack", "mujoco", "nbconvert", "numpy", "openai", "pandas", "papermill", "pillow", "pyarrow",
         "PyYAML", "requests", "safetensors", "scipy", "seaborn", "tensorboard", "tensorflow-datasets", "torch", "websockets"),
    ),
    "tfds": Environment(
        "TensorFlow's own reader of RLDS sets, for episodes.recorded.tensorflow; the converter with it.",
        ("av", "google-crc32c", "numpy", "pandas", "pillow", "pyarrow", "PyYAML", "scipy", "tensorflow-datasets"),
        pins=("tensorflow-cpu==2.21.0",),
    ),
    "tabletop": Environment(
        "The tabletop's own policies: behaviour cloning, scripted, random.",
        ("msgpack", "numpy", "pillow", "PyYAML", "safetensors", "torch", "websockets"),
    ),
    "openvla": Environment(
        "OpenVLA, from its requirements-min.txt. transformers 4.50 and later ignore the image (openvla#346).",
        pins=("accelerate==0.30.1", "bitsandbytes==0.43.1", "numpy==1.26.4", "pillow==11.0.0", "sentencepiece==0.1.99",
              "timm==0.9.10", "tokenizers==0.19.1", "torch==2.2.0", "torchvision==0.17.0", "transformers==4.40.1", *WIRE),
        python="3.10",
    ),
    "spatialvla": Environment(
        "SpatialVLA, from its requirements.txt. transformers 4.51 lacks what its code imports (SpatialVLA#40).",
        pins=("accelerate==1.0.1", "bitsandbytes==0.45.0", "einops==0.8.0", "numpy==1.26.4", "pillow==11.0.0", "scipy==1.14.1",
              "sentencepiece==0.2.0", "tokenizers==0.21.0", "torch==2.5.1", "torchvision==0.20.1", "transformers==4.47.0",
              *WIRE),
        python="3.10",
    ),
    "octo": Environment(
        "Octo 1.5, from its requirements.txt, with what that leaves open pinned: jaxlib (octo#125), scipy (octo#71).",
        pins=("chex==0.1.85", "distrax==0.1.5", "einops==0.6.1",
              "dlimp @ git+https://github.com/kvablack/dlimp@5edaa4691567873d495633f2708982b42edf1972",
              "flax==0.7.5", "gym==0.26.2", "huggingface-hub==0.17.3", "jax==0.4.20", "jaxlib==0.4.20", "ml-collections==0.1.1",
              "ml-dtypes==0.2.0", "numpy==1.24.3",
              "octo @ git+https://github.com/octo-models/octo@241fb3514b7c40957a86d869fecb7c7fc353f540",
              "optax==0.1.5", "orbax-checkpoint==0.4.4", "pillow==11.0.0", "scipy==1.11.4", "tensorflow==2.15.0",
              "tensorflow-datasets==4.9.2", "tensorflow-graphics==2021.12.3", "tensorflow-hub==0.16.1",
              "tensorflow-probability==0.23.0", "tensorflow-text==2.15.0", "transformers==4.34.1", *WIRE),
        python="3.10",
    ),
    "rt1x": Environment(
        "RT-1-X in JAX. Its code is no package: clone github.com/google-deepmind/open_x_embodiment and name its folder models.",
        pins=("absl-py==2.1.0", "flax==0.8.5", "jax==0.4.30", "jaxlib==0.4.30", "numpy==1.26.4", "orbax-checkpoint==0.5.23",
              "pillow==11.0.0", "scipy==1.12.0", *WIRE),
        python="3.10",
    ),
    "lerobot": Environment(
        "LeRobot 0.4.4, the last release for Python 3.11: ACT, Diffusion Policy, SmolVLA; pi0 needs a fork of transformers.",
        pins=("diffusers==0.35.2", "lerobot[smolvla]==0.4.4", "msgpack==1.1.0", "numpy==2.2.6", "pillow==11.0.0",
              "PyYAML==6.0.2", "torch==2.10.0", "torchvision==0.25.0", "websockets==15.0.1"),
    ),
}  # fmt: skip


def pins() -> dict[str, str]:
    """Package (lower case) → version, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines) if version}


def requirements(name: str) -> list[str]:
    """What pip installs into one environment."""
    environment, versions = ENVIRONMENTS[name], pins()
    return [*(f"{package}=={versions[package.lower()]}" for package in environment.packages), *environment.pins]


def text(name: str) -> str:
    """Content of one environment file."""
    environment = ENVIRONMENTS[name]
    sources = " from constraints.txt; edit those." if environment.packages else "; edit that."
    lines = [
        f"# {environment.purpose}",
        f"# Written by envs/make_environments.py{sources}",
        "channels: [conda-forge, nodefaults]",
        "dependencies:",
        f"  - python={environment.python}",
        "  - pip",
        "  - pip:",
        *(f"      - {pin}" for pin in requirements(name)),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for environment in ENVIRONMENTS:
        write_if_changed(ROOT / "envs" / f"{environment}.yaml", text(environment))
