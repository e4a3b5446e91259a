"""SpatialVLA (arXiv 2501.15830) as its own WidowX evaluation runs it: a chunk of four actions at every step, ensembled.

It was trained on the bare lower-cased instruction. `statistics` names the data set for the processor too, which takes the
camera's intrinsics from it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from workflow_src.common import sections
from workflow_src.policies import images, pretrained
from workflow_src.policies.adapter import Observation
from workflow_src.policies.wire import Metadata

CHECKPOINT = "IPEC-COMMUNITY/spatialvla-4b-224-pt"
IMAGE, CHUNK = 224, 4
ENSEMBLE = -0.8  # of its evaluation: newer predictions count more


class SpatialVLA:
    """A loaded checkpoint. Its processor decodes one answer at a time."""

    def __init__(self, policy: sections.Policy, lab: sections.Lab):
        import torch
        import transformers

        self._where, self._torch, self._device = (
            pretrained.checkpoint(policy, CHECKPOINT),
            torch,
            pretrained.torch_device(policy),
        )
        settings, source = pretrained.number_format(policy, "bf16"), pretrained.hub(policy)
        self._processor = transformers.AutoProcessor.from_pretrained(self._where, trust_remote_code=True, **source)
        model = transformers.AutoModel.from_pretrained(self._where, trust_remote_code=True, **settings, **source)
        self._model = model.eval() if "quantization_config" in settings else model.to(self._device).eval()
        self._embodiment, self._gain = lab.embodiment, pretrained.options(policy)["commanded_gain"]
        self._key = pretrained.statistics_key(policy, lab.embodiment, self._processor.statistics)
        limits = self._processor.statistics[self._key]["action"]
        commit = getattr(self._model.config, "_commit_hash", None)
        self.metadata = Metadata(
            control_rate=pretrained.embodiments.get(lab.embodiment).control_hz, chunk=CHUNK, batched=True, batch=1,
            execution=policy.execution or "ensemble", ensemble=ENSEMBLE,
            revision=pretrained.revision(policy, self._where, commit),
            extra={"q01": list(limits["q01"]), "q99": list(limits["q99"])},
        )  # fmt: skip

    def act(self, observation: Observation) -> dict[str, np.ndarray]:
        answers = [self._chunk(*row) for row in zip(observation.image, observation.prompt)]
        return {"actions": pretrained.metric(np.stack(answers), self._embodiment, self._gain)}

    def _chunk(self, image: np.ndarray, instruction: str) -> np.ndarray:
        """(4, 7) in the data set's units, gripper 1 open."""
        from PIL import Image

        inputs = self._processor(
            images=[Image.fromarray(images.area(image, IMAGE))], text=instruction.lower(), unnorm_key=self._key,
            return_tensors="pt", do_normalize=False,
        )  # fmt: skip
        with self._torch.inference_mode():
            tokens = self._model.predict_action(inputs)
        return np.asarray(self._processor.decode_actions(tokens, unnorm_key=self._key)["actions"])


def load(policy: sections.Policy, networks: Path, lab: sections.Lab, seed: int, batch: int) -> SpatialVLA:
    """See `policies/adapter.py`. Greedy decoding draws nothing, so `seed` is not needed."""
    return SpatialVLA(policy, lab)
