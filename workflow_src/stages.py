"""What each stage depends on: a change elsewhere in the configuration reruns nothing of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from workflow_src.common.config import to_dict
from workflow_src.common.sections import Config

LEARNED_FIELDS = ("batch", "width", "latent_noise", "training")  # of `judges`: what the learned ones depend on
ANALYSIS = "lab", "policies", "behaviour_cloning", "judges", "trials", "analysis", "reality", "reality_names"


def stages(config: Config) -> dict[str, dict[str, Any]]:
    """Stage → the sections it depends on (None: all of the section). Knobs that change no result are left at defaults."""
    lab = to_dict(replace(config.lab, workers=2))
    rollouts = to_dict(replace(config.rollouts, shards=1, server_deadline=900, step_timeout=120))
    data = config.world_model.data or config.episodes.dataset
    world_model = to_dict(replace(config.world_model, processes=1, data=data))
    episodes = to_dict(replace(config.episodes, stores={}))
    del episodes["recorded"]  # the lab's episodes do not depend on it
    plain = to_dict(config)
    found: dict[str, dict[str, Any]] = {
        "episodes": {"lab": lab, "episodes": episodes},
        "tokenizer": {"lab": lab, "tokenizer": None},
        "latents": {"tokenizer": None, "world_model": {"mirror": config.world_model.mirror}},
        "world_model": {"lab": lab, "tokenizer": None, "world_model": world_model},
        "judges": {"lab": lab, "judges": {name: plain["judges"][name] for name in LEARNED_FIELDS}},
        "trials": {"lab": lab, "trials": None},
        "corruptions": {"lab": lab, "rollouts": rollouts},
        "analysis": dict.fromkeys(ANALYSIS),
    }
    if config.world_model.source.checkpoint:
        # What an import depends on, of a world model that others have trained.
        found["world_model"] = {
            "lab": {name: lab[name] for name in ("image_size", "embodiment")},
            "world_model": {name: world_model[name] for name in ("source", "network", "sampler")},
        }
    for name, vlm in plain["judges"]["vlm"].items():
        found[f"judges/{name}"] = {"lab": lab, "judges": {"vlm": {name: vlm}}}
    for name, network in plain["behaviour_cloning"].items():
        found[f"behaviour_cloning/{name}"] = {"lab": lab, "behaviour_cloning": {name: network}}
    for name, policy in plain["policies"].items():
        network = policy["network"]
        needed = {network: plain["behaviour_cloning"][network]} if network else {}
        found[f"policies/{name}"] = {
            "lab": lab, "policies": {name: policy}, "behaviour_cloning": needed, "rollouts": rollouts,
        }  # fmt: skip
    return found
