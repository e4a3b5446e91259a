"""Several votes on one rollout, and what they amount to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SCORES = (0.0, 0.5, 1.0)  # failure, partial credit, success


@dataclass(frozen=True)
class Decision:
    """What the votes say together. `success` is None where they do not decide."""

    success: bool | None
    partial: float | None  # median of the valid votes, 0…1; None where nothing was decided
    share: float | None  # of the valid votes, how many say success
    valid: int
    invalid: int
    tie: bool


def decide(votes: Sequence[float | None], asked: int) -> Decision:
    """The majority of `asked` votes; each vote is one of `SCORES`, or None for one that could not be read.

    Success and failure each need more than half of all votes that were *asked* for. So neither a tie, nor an unreadable
    answer, nor one that never came (`asked` exceeds the number of votes) can turn into either.
    """
    valid = [vote for vote in votes if vote is not None]
    yes = sum(vote == 1 for vote in valid)
    no = len(valid) - yes
    success = True if 2 * yes > asked else False if 2 * no > asked else None
    return Decision(
        success=success,
        partial=None if success is None else float(statistics.median(valid)),
        share=yes / len(valid) if valid else None,
        valid=len(valid),
        invalid=len(votes) - len(valid),
        tie=bool(valid) and yes == no,
    )
