"""OpenVLA (arXiv 2406.09246) as its own Bridge evaluation runs it: one greedy action a step, bfloat16.

The image goes through a JPEG and a Lanczos resize to 224 pixels, as the training images did. Runs with transformers
4.40.1; from 4.50 on, the checkpoint's code ignores the image without a word, so that is refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from workflow_src.common import sections
from workflow_src.common.errors import UserError
from workflow_src.policies import images, pretrained
from workflow_src.policies.adapter import Observation
from workflow_src.policies.wire import Metadata

CHECKPOINT = "openvla/openvla-7b"
IMAGE = 224
# The first release was trained on Vicuna's conversations.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def prompt(instruction: str, checkpoint: str) -> str:
    """The words the model was trained to answer with an action."""
    question = f"What action should the robot take to {instruction.lower()}?"
    return f"{SYSTEM} USER: {question} ASSISTANT:" if "openvla-v01" in checkpoint else f"In: {question}\nOut:"


class OpenVLA:
    """A loaded checkpoint. The stack generates for one image at a time."""

    def __init__(self, policy: sections.Policy, lab: sections.Lab):
        torch = pretrained.import_torch()
        import transformers

        if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 50):
            raise UserError(
                f"transformers {transformers.__version__} makes OpenVLA ignore the image; install 4.40.1 (envs/openvla.yaml)"
            )
        self._where, self._device = pretrained.checkpoint(policy, CHECKPOINT), pretrained.torch_device(policy)
        self._torch = torch
        settings, source = pretrained.number_format(policy, "bf16"), pretrained.hub(policy)
        self._processor = transformers.AutoProcessor.from_pretrained(self._where, trust_remote_code=True, **source)
        model = transformers.AutoModelForVision2Seq.from_pretrained(
            self._where, trust_remote_code=True, low_cpu_mem_usage=True, **settings, **source
        )
        # Quantised weights are where they belong already.
        self._model = model.eval() if "quantization_config" in settings else model.to(self._device).eval()
        self._dtype, self._embodiment = settings["torch_dtype"], lab.embodiment
        self._key = pretrained.statistics_key(policy, lab.embodiment, self._model.norm_stats)
        self._gain = pretrained.options(policy)["commanded_gain"]
        limits = self._model.norm_stats[self._key]["action"]
        commit = getattr(self._model.config, "_commit_hash", None)
        self.metadata = Metadata(
            control_rate=pretrained.embodiments.get(lab.embodiment).control_hz, chunk=1, batched=True, batch=1,
            revision=pretrained.revision(policy, self._where, commit),
            extra={"q01": list(limits["q01"]), "q99": list(limits["q99"])},
        )  # fmt: skip

    def act(self, observation: Observation) -> dict[str, np.ndarray]:
        answers = [self._action(*row) for row in zip(observation.image, observation.prompt)]
        return {"actions": pretrained.metric(np.stack(answers)[:, None], self._embodiment, self._gain)}

    def _action(self, image: np.ndarray, instruction: str) -> np.ndarray:
        """(7,) in the data set's units, gripper 1 open."""
        from PIL import Image

        seen = Image.fromarray(images.lanczos(images.jpeg(image), IMAGE))
        inputs = self._processor(prompt(instruction, self._where), seen).to(self._device, dtype=self._dtype)
        with self._torch.inference_mode():
            return np.asarray(self._model.predict_action(**inputs, unnorm_key=self._key, do_sample=False))


def load(policy: sections.Policy, networks: Path, lab: sections.Lab, seed: int, batch: int) -> OpenVLA:
    """See `policies/adapter.py`. Greedy decoding draws nothing, so `seed` is not needed."""
    return OpenVLA(policy, lab)
