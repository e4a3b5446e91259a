"""What a judge costs: estimated before, counted while it works, and never more than it may."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from workflow_src.common.errors import UserError
from workflow_src.common.sections import Vlm

MILLION = 1e6
CHARACTERS_PER_TOKEN = 4  # of English prose, for estimates


@dataclass(frozen=True)
class Size:
    """How large requests are; sizes add up."""

    requests: int = 0
    images: int = 0
    characters: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.requests + other.requests, self.images + other.images, self.characters + other.characters)

    def tokens(self, settings: Vlm) -> tuple[int, int]:
        """Estimated (input, output) tokens."""
        text = -(-self.characters // CHARACTERS_PER_TOKEN)
        return text + self.images * settings.image_tokens, self.requests * settings.answer_tokens

    def cost(self, settings: Vlm) -> float:
        """Estimated cost in the currency of the prices."""
        return cost(settings, *self.tokens(settings))


def cost(settings: Vlm, tokens_in: int, tokens_out: int) -> float:
    """What these tokens cost."""
    return (tokens_in * settings.price_input + tokens_out * settings.price_output) / MILLION


def billed(settings: Vlm, usage: Any, estimate: float) -> float:
    """What an answer cost: by the server's own count of tokens, or `estimate` where it gives none."""
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    return cost(settings, *counts) if all(isinstance(count, int) for count in counts) else estimate


class Budget:
    """Money that is spent and money that requests under way may cost, against a limit. Threads share it.

    `spent` starts with what earlier runs paid. A request reserves what it may cost before it is sent: its estimate, or the
    dearest answer seen so far. So the limit holds up to one answer's deviation from that, however many are under way.
    """

    def __init__(self, name: str, settings: Vlm, spent: float) -> None:
        self.name, self.settings, self.spent = name, settings, spent
        self._reserved, self._dearest, self._lock = 0.0, 0.0, threading.Lock()

    def reserve(self, estimate: float) -> float:
        """Set the cost of one request aside; give the amount back to `settle`. Raises `UserError` at the limit."""
        limit = self.settings.spend_limit
        with self._lock:
            amount = max(estimate, self._dearest)
            if limit and self.spent + self._reserved + amount > limit:
                raise UserError(
                    f"judges.vlm.{self.name}.spend_limit: {limit:g} is reached (spent {self.spent:.4g} so far, the next "
                    f"request about {amount:.2g}); raise it and start again: answers that were paid are kept"
                )
            self._reserved += amount
            return amount

    def settle(self, reserved: float, actual: float) -> None:
        """Replace a reservation by what the request really cost."""
        with self._lock:
            self._reserved -= reserved
            self.spent += actual
            self._dearest = max(self._dearest, actual)


def describe(name: str, settings: Vlm, size: Size, known: int, rollouts: int) -> str:
    """The dry-run estimate, as lines."""
    tokens_in, tokens_out = size.tokens(settings)
    money = (
        f"{size.cost(settings):.2f}" if settings.price_input or settings.price_output else "unknown (no prices given)"
    )
    limit = f"{settings.spend_limit:g}" if settings.spend_limit else "none"
    rows = {
        "model": f"{settings.model} at {settings.base_url}",
        "rollouts": f"{rollouts}, {settings.votes} votes each",
        "answers at hand": f"{known}, which cost nothing",
        "requests": size.requests,
        "images": size.images,
        "tokens": f"about {tokens_in} in, {tokens_out} out ({settings.image_tokens} per image)",
        "cost": f"about {money}; spend limit {limit}",
    }
    return "\n".join([f"judge {name}, estimate", *(f"  {key:<16}  {value}" for key, value in rows.items())])
