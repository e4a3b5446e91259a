"""The lab's own predicate, passed on as a judgement. Rollouts of a world without truth get none."""

from __future__ import annotations

from collections.abc import Sequence

from workflow_src.judges.interface import Clip, Judgement, opinion


class TruthJudge:
    """Reads what the simulator recorded."""

    name = "truth"

    def judge(self, clips: Sequence[Clip]) -> list[Judgement]:
        """One judgement per clip; every clip must carry truth."""
        return [
            opinion(
                self.name,
                clip,
                success_at_end=clip.truth.success_at_end,
                success_ever=clip.truth.success_ever,
                partial=clip.truth.partial,
                score=float(clip.truth.success_at_end),
            )
            for clip in clips
        ]
