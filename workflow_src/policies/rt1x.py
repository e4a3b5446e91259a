"""RT-1-X (arXiv 2310.08864), the JAX release: 15 images, zeros before the first, and one action of 11 tokens.

`files` names `code`, the folder `models` of github.com/google-deepmind/open_x_embodiment, which is no package, and
`embeddings`, an npz of instruction → 512 numbers of the Universal Sentence Encoder (large/5). An instruction that is not in
it asks TensorFlow Hub, which only then has to be installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from workflow_src import embodiments
from workflow_src.common import sections
from workflow_src.common.errors import UserError
from workflow_src.policies import images, pretrained
from workflow_src.policies.adapter import Observation, in_batches
from workflow_src.policies.wire import Metadata, WireError

IMAGE, HISTORY, WORDS = 300, 15, 512
ROWS = 16  # at once: each is 15 images through an EfficientNet
ENCODER = "https://tfhub.dev/google/universal-sentence-encoder-large/5"
SHAPE = {
    "num_image_tokens": 81, "num_action_tokens": 11, "layer_size": 256, "vocab_size": 512, "use_token_learner": True,
    "world_vector_range": (-2.0, 2.0),
}  # fmt: skip


class RT1X:
    """The restored network. The most likely tokens are taken, nothing is drawn."""

    def __init__(self, policy: sections.Policy, lab: sections.Lab, batch: int):
        pretrained.refuse_other_dtypes(policy)
        code = Path(policy.files.get("code", "")).expanduser()
        if not (code / "rt1.py").is_file():
            raise UserError(f"adapter {policy.adapter}: files.code: {str(code)!r} holds no rt1.py; see envs/rt1x.yaml")
        sys.path.insert(0, str(code.absolute()))
        import jax
        import rt1
        from flax.training import checkpoints

        where = pretrained.checkpoint(policy, "")
        state = checkpoints.restore_checkpoint(where, None)
        if not state or "params" not in state:
            raise UserError(
                f"adapter {policy.adapter}: checkpoint {where!r} holds no RT-1-X state; name the inner folder"
            )
        model, variables = rt1.RT1(**SHAPE), {"params": state["params"], "batch_stats": state["batch_stats"]}

        def tokens(image: np.ndarray, words: np.ndarray) -> dict[str, np.ndarray]:
            seen = {"image": image, "natural_language_embedding": words}
            previous = np.zeros((len(image), HISTORY, SHAPE["num_action_tokens"]), np.float32)
            logits = model.apply(
                variables, seen, act=None, act_tokens=previous, train=False, rngs={"random": jax.random.PRNGKey(0)}
            )
            last = logits.reshape(len(image), HISTORY, SHAPE["num_image_tokens"] + SHAPE["num_action_tokens"], -1)[
                :, -1
            ]
            chosen = last[:, SHAPE["num_image_tokens"] - 1 : -1].argmax(-1)  # each token is foretold one place before
            return rt1.detokenize_action(chosen, SHAPE["vocab_size"], SHAPE["world_vector_range"])

        self._tokens, self._rows, self._robot = jax.jit(tokens), min(batch, ROWS), embodiments.get(lab.embodiment)
        self._words = _Words(policy.files.get("embeddings", ""))
        self._gain = pretrained.options(policy)["commanded_gain"]
        self._images, self._opening = pretrained.Memory(HISTORY - 1), pretrained.Memory(1)
        self.metadata = Metadata(
            control_rate=self._robot.control_hz, chunk=1, history=HISTORY, batched=True, batch=self._rows,
            revision=pretrained.revision(policy, where),
        )  # fmt: skip

    def act(self, observation: Observation) -> dict[str, np.ndarray]:
        windows = self._windows(observation)
        words = np.stack([self._words(prompt) for prompt in observation.prompt])

        def run(rows: np.ndarray) -> tuple[np.ndarray, ...]:
            image = np.zeros((len(rows), HISTORY, IMAGE, IMAGE, 3), np.float32)
            spoken = np.zeros((len(rows), HISTORY, WORDS), np.float32)
            for place, row in enumerate(rows):
                window = windows[row]
                image[place, -len(window) :] = np.stack([images.bilinear(frame, IMAGE) for frame in window]) / 255.0
                spoken[place, -len(window) :] = words[row]
            answer = self._tokens(image, spoken)
            names = ("world_vector", "rotation_delta", "gripper_closedness_action", "base_displacement_vector",
                     "base_displacement_vertical_rotation", "terminate_episode")  # fmt: skip
            return tuple(np.asarray(answer[name], np.float32) for name in names)

        translation, rotation, closing, base, turn, mode = in_batches(len(observation), self._rows, run)
        actions = np.concatenate([self._metric(translation, rotation), self._openings(observation, closing)], -1)
        reply = {"actions": actions[:, None], "terminate": mode[:, None, 0] > 0.5}
        if self._robot.base:
            reply["base"] = np.concatenate([base, turn], -1)[:, None]
        return reply

    def _windows(self, observation: Observation) -> list[list[np.ndarray]]:
        """The images that each row has seen so far, at most 15, oldest first, as they came."""
        windows = []
        for image, episode, step in zip(observation.image, observation.episode.tolist(), observation.step.tolist()):
            windows.append([*self._images.before(episode, step), image])
            self._images.add(episode, step, image)
        return windows

    def _metric(self, translation: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        """(N, 6) in metres and radians. Of Bridge the network speaks the units that it was trained on (±1.75, ±1.4)."""
        units = embodiments.scale(self._robot.name, "rehearsal")
        far, wide = units.translation_clip, units.rotation_clip
        moved = [np.clip(translation, -far, far) / units.translation, np.clip(rotation, -wide, wide) / units.rotation]
        return self._gain * np.concatenate(moved, -1)

    def _openings(self, observation: Observation, closing: np.ndarray) -> np.ndarray:
        """Opening (N, 1) that the command -1 (open) to 1 (close) leaves; a relative one keeps what it does not change."""
        if self._robot.gripper == "absolute":
            return np.clip((1 - closing) / 2, 0, 1)
        openings = []
        for command, episode, step in zip(closing, observation.episode.tolist(), observation.step.tolist()):
            before = self._opening.before(episode, step) or [1.0]
            openings.append(embodiments.follow_gripper(command, before[-1]))
            self._opening.add(episode, step, float(openings[-1][0]))
        return np.stack(openings)


class _Words:
    """Sentence embeddings float32 (512,), looked up where they are known."""

    def __init__(self, table: str):
        self._known: dict[str, np.ndarray] = {}
        self._encoder = None
        if table:
            with np.load(table, allow_pickle=False) as content:
                self._known = {name: np.asarray(content[name], np.float32) for name in content.files}
        if odd := [name for name, value in self._known.items() if value.shape != (WORDS,)]:
            raise UserError(f"{table}: {odd[0]!r} has shape {self._known[odd[0]].shape}, not ({WORDS},)")

    def __call__(self, instruction: str) -> np.ndarray:
        if instruction not in self._known:
            self._known[instruction] = self._encode(instruction)
        return self._known[instruction]

    def _encode(self, instruction: str) -> np.ndarray:
        try:
            import tensorflow_hub
        except ImportError:
            raise WireError(
                f"the instruction {instruction!r} is not among files.embeddings and tensorflow_hub is not installed; "
                "add its embedding, or install tensorflow-cpu and tensorflow-hub"
            ) from None
        self._encoder = self._encoder or tensorflow_hub.load(ENCODER)
        return np.asarray(self._encoder([instruction]), np.float32)[0]


def load(policy: sections.Policy, networks: Path, lab: sections.Lab, seed: int, batch: int) -> RT1X:
    """See `policies/adapter.py`. The most likely action is taken, so `seed` is not needed."""
    return RT1X(policy, lab, batch)
