"""The questions that a vision-language model is asked about one rollout: one per vote, each with a key of its own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from workflow_src.common.sections import Vlm
from workflow_src.judges.budget import Size
from workflow_src.judges.frames import QUALITY, data_url, fingerprint, shown
from workflow_src.judges.interface import Clip
from workflow_src.judges.prompts import Prompt, allowed_scores, response_format


@dataclass(frozen=True)
class Question:
    """One request. `key` identifies everything that decides the answer: model, prompt, frames, parameters, vote."""

    key: str
    settings: Vlm
    texts: tuple[str, ...]  # the question, then a caption per frame
    frames: np.ndarray  # uint8 (N, H, W, 3)
    scores: tuple[float, ...]
    vote: int

    @property
    def size(self) -> Size:
        return Size(1, len(self.frames), sum(map(len, self.texts)))

    def body(self) -> dict[str, Any]:
        """The request as `POST …/chat/completions` takes it: text first, then every frame under its caption."""
        content: list[dict[str, Any]] = [{"type": "text", "text": self.texts[0]}]
        detail = {"detail": self.settings.detail} if self.settings.detail else {}
        for caption, frame in zip(self.texts[1:], self.frames):
            url = data_url(frame, self.settings.side)
            content += [{"type": "text", "text": caption}, {"type": "image_url", "image_url": {"url": url, **detail}}]
        body = {"model": self.settings.model, "messages": [{"role": "user", "content": content}]}
        return body | sampling(self.settings, self.vote) | self._format()

    def _format(self) -> dict[str, Any]:
        return {"response_format": response_format(self.scores)} if self.settings.structured else {}


def sampling(settings: Vlm, vote: int) -> dict[str, Any]:
    """The configured parameters and no others: reasoning models refuse most. Votes under one seed would be one vote."""
    values = {name: int(value) if value == int(value) else value for name, value in settings.parameters.items()}
    return values | ({"seed": int(values["seed"]) + vote} if "seed" in values else {})


def questions(clip: Clip, settings: Vlm, prompt: Prompt) -> list[Question]:
    """One question per vote about `clip`."""
    steps = shown(len(clip.frames), settings.frames)
    frames, criterion = clip.frames[steps], clip.partial_credit_criteria
    texts = (prompt.text(clip.instruction, criterion, len(steps)), *prompt.captions(steps, len(clip.frames) - 1))
    scores = allowed_scores(criterion)
    common = {
        "model": settings.model, "texts": texts, "frames": fingerprint(frames), "side": settings.side, "quality": QUALITY,
        "detail": settings.detail, "scores": scores if settings.structured else None,
    }  # fmt: skip
    return [
        Question(
            _key(common | {"vote": vote, "sampling": sampling(settings, vote)}), settings, texts, frames, scores, vote
        )
        for vote in range(settings.votes)
    ]


def _key(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
