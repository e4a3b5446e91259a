"""The prompt file: what a vision-language model is asked, and how its answer is read."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from workflow_src.common.errors import UserError
from workflow_src.common.files import sha256_file

# Part of a prompt file → the placeholders it may hold.
PARTS = {
    "question": {"count", "instruction", "rubric"},
    "rubric_binary": set(),
    "rubric_partial": {"criterion"},
    "frame": {"number", "count", "step", "steps"},
}
BINARY, PARTIAL = (0.0, 1.0), (0.0, 0.5, 1.0)
RATIONALE = 600  # characters kept

# A line that holds a score and nothing else: "Score: 1", "**Final score:** 0.5", but neither "Score: 10/10" nor "Score: -1".
LINE = re.compile(
    r"""^[\s*_#>"'-]*(?:final\s+)?score[\s*_"']*[:=][\s*_"']*(\d+(?:\.\d+)?)[\s*_"'.,]*$""",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Prompt:
    """One version of the question."""

    version: str  # "<name> sha256:<12 digits>", as judgements carry it
    question: string.Template
    rubric_binary: string.Template
    rubric_partial: string.Template
    frame: string.Template

    def text(self, instruction: str, criterion: str | None, count: int) -> str:
        """The question about `count` frames. Both texts of the trial are quoted: they are data, never instructions."""
        if criterion is None:
            rubric = self.rubric_binary.substitute()
        else:
            rubric = self.rubric_partial.substitute(criterion=_quoted(criterion))
        return self.question.substitute(count=count, instruction=_quoted(instruction), rubric=rubric.strip()).strip()

    def captions(self, steps: Sequence[int], last: int) -> list[str]:
        """A line above each frame: its place in the order, and after which of `last` steps it was taken."""
        return [
            self.frame.substitute(number=i + 1, count=len(steps), step=step, steps=last).strip()
            for i, step in enumerate(steps)
        ]


def _quoted(text: str) -> str:
    # JSON leaves no way out of the quotation marks and no line break.
    return json.dumps(text, ensure_ascii=False)


def load_prompt(path: str | Path) -> Prompt:
    """Read a prompt file. Raises `UserError` for a missing or unknown part or placeholder."""
    path = Path(path)
    try:
        parts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable prompt file ({' '.join(str(error).split())})") from None
    if not isinstance(parts, dict) or set(parts) != set(PARTS) or not all(isinstance(t, str) for t in parts.values()):
        raise UserError(f"{path}: must hold the texts {', '.join(PARTS)} and nothing else")
    templates = {name: string.Template(text) for name, text in parts.items()}
    for name, template in templates.items():
        if not template.is_valid() or set(template.get_identifiers()) != PARTS[name]:
            needed = ", ".join(f"${word}" for word in sorted(PARTS[name])) or "none"
            raise UserError(f"{path}: {name} must hold these placeholders: {needed} (write $$ for a dollar sign)")
    return Prompt(f"{path.stem} sha256:{sha256_file(path)[:12]}", **templates)


# ---- answers --------------------------------------------------------------------------------------------------------


def allowed_scores(criterion: str | None) -> tuple[float, ...]:
    """Partial credit can only be given where the trial says for what."""
    return BINARY if criterion is None else PARTIAL


def response_format(scores: Sequence[float]) -> dict[str, Any]:
    """The JSON schema of an answer, as chat completions take it. Reasoning comes first: the score should follow from it."""
    numbers = [int(score) if score == int(score) else score for score in scores]
    properties = {"reasoning": {"type": "string"}, "score": {"type": "number", "enum": numbers}}
    schema = {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip
    return {"type": "json_schema", "json_schema": {"name": "judgement", "strict": True, "schema": schema}}


def read_answer(text: str | None, scores: Sequence[float]) -> tuple[float | None, str]:
    """Score and rationale of an answer; the score is None unless it is exactly one of `scores`.

    Reads the JSON object (the last one, should the model have thought aloud before), else the last line that is nothing
    but a score.
    """
    text = text or ""
    answer = _last_object(text)
    if answer is not None:
        value = answer.get("score")
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
        return number if number in scores else None, str(answer.get("reasoning", ""))[:RATIONALE]
    lines = LINE.findall(text)
    number = float(lines[-1]) if lines else None
    return number if number in scores else None, text.strip()[:RATIONALE]


def _last_object(text: str) -> dict[str, Any] | None:
    """The last JSON object in `text` that says anything of a score; the whole text first, whatever is in its strings."""
    decoder, whole = json.JSONDecoder(), text.strip()
    for start in (0, *reversed([match.start() for match in re.finditer(r"\{", whole)])):
        try:
            found, end = decoder.raw_decode(whole[start:])
        except ValueError:
            continue
        if isinstance(found, dict) and "score" in found and (start or end == len(whole)):
            return found
    return None
