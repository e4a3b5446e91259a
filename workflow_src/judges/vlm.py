"""Ask a vision-language model behind any OpenAI-compatible server whether rollouts succeeded, or what asking would cost."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from workflow_src.common.config import check_name, load_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import Progress, say
from workflow_src.common.sections import Vlm
from workflow_src.judges.asking import Asker
from workflow_src.judges.batches import Batcher
from workflow_src.judges.budget import Budget, Size, describe
from workflow_src.judges.cache import AnswerCache
from workflow_src.judges.interface import Clip, Judgement, opinion, read_clips, write_judgements
from workflow_src.judges.prompts import Prompt, load_prompt, read_answer
from workflow_src.judges.questions import Question, questions
from workflow_src.judges.transport import Endpoint, find_key
from workflow_src.judges.votes import decide
from workflow_src.rollouts.records import read_records

EXAMPLES = """examples:
  python -m workflow_src.judges.vlm --config results/config/judges/gpt.json --judge gpt --dry-run \\
      --prompt config/prompts/success_1.yaml --rollouts results/rollouts/*/*/shard_*/rollouts.parquet \\
      --cache results/state/judgements/gpt --out results/judgements/gpt.parquet
"""


class VlmJudge:
    """Votes of a vision-language model on the last frame's state; it says nothing of success on the way."""

    def __init__(self, name: str, settings: Vlm, prompt: Prompt, cache: AnswerCache, asker: Asker | Batcher) -> None:
        self.name, self.settings, self.prompt, self.cache, self.asker = name, settings, prompt, cache, asker

    def judge(self, clips: Sequence[Clip], done: Callable[[], None] = lambda: None) -> list[Judgement]:
        """One judgement per clip, in the same order; what the cache holds is not asked again. `done`: called per vote."""
        asked = [questions(clip, self.settings, self.prompt) for clip in clips]
        missing = unanswered([question for some in asked for question in some], self.cache)
        for _ in range(sum(map(len, asked)) - len(missing)):
            done()
        failures = self.asker.ask(missing, done) if missing else {}
        return [self._judge(clip, some, failures) for clip, some in zip(clips, asked)]

    def _judge(self, clip: Clip, asked: Sequence[Question], failures: dict[str, str]) -> Judgement:
        answers = [answer for question in asked if (answer := self.cache.get(question.key)) is not None]
        reasons = [failures[question.key] for question in asked if question.key in failures]
        read = [read_answer(answer["text"], asked[0].scores) for answer in answers]
        decision = decide([score for score, _ in read], len(asked))
        error = None
        if decision.success is None and reasons:
            error = f"{len(reasons)} of {len(asked)} requests got no answer: {reasons[0]}"
        return opinion(
            self.name, clip, success_at_end=decision.success, success_ever=None,
            partial=decision.partial if clip.partial_credit_criteria is not None else None,
            score=decision.share, votes=decision.valid, invalid=decision.invalid, tie=decision.tie, failed=len(reasons),
            error=error, rationale=_rationale(read, decision.success), cost=sum(answer["cost"] for answer in answers),
            model=next((answer["model"] for answer in answers if answer["model"]), None), prompt=self.prompt.version,
        )  # fmt: skip


def unanswered(asked: Sequence[Question], cache: AnswerCache) -> list[Question]:
    """The questions that `cache` has no answer to, each once: alike clips are asked about once."""
    return list({question.key: question for question in asked if cache.get(question.key) is None}.values())


def _rationale(read: Sequence[tuple[float | None, str]], success: bool | None) -> str | None:
    """What the first vote says that agrees with the decision; without one, the first vote."""
    agreeing = [text for score, text in read if score is not None and success is not None and (score == 1) == success]
    return next(iter(agreeing or [text for _, text in read]), None)


# ---- from rollouts to judgements ------------------------------------------------------------------------------------

Parts = Callable[[], Iterator[list[Clip]]]  # the clips, in portions that fit into memory; may be read twice


@contextlib.contextmanager
def open_judge(name: str, settings: Vlm, prompt: Path, cache: Path) -> Iterator[VlmJudge]:
    """A judge with its server and its cache. Raises `UserError` without a key, before anything else is done."""
    find_key(name, settings)
    with AnswerCache(cache) as answers:
        endpoint, budget = Endpoint(name, settings), Budget(name, settings, answers.spent())
        asker = (Batcher if settings.mode == "batch" else Asker)(endpoint, answers, budget)
        yield VlmJudge(name, settings, load_prompt(prompt), answers, asker)


def judge_parts(judge: VlmJudge, parts: Parts, rollouts: int) -> list[Judgement]:
    """Judgements of all clips. Raises `UserError` when not one request was answered."""
    if isinstance(judge.asker, Batcher):
        judge.asker.collect()
        for clips in parts():
            every = [question for clip in clips for question in questions(clip, judge.settings, judge.prompt)]
            judge.asker.add(unanswered(every, judge.cache))
        judge.asker.run()
    with Progress(rollouts * judge.settings.votes, f"asking {judge.name}", "answer") as progress:
        found = [judgement for clips in parts() for judgement in judge.judge(clips, progress.update)]
    silent = [judgement for judgement in found if judgement.failed]
    if silent and not any(judgement.votes + judgement.invalid for judgement in found):
        raise UserError(f"judges.vlm.{judge.name}: no request was answered; the first: {silent[0].error}")
    if silent:
        requests = sum(judgement.failed for judgement in silent)
        say(
            f"{judge.name}: {requests} requests about {len(silent)} rollouts got no answer; delete the output and start "
            "again to ask only for these"
        )
    undecided = sum(judgement.success_at_end is None for judgement in found)
    spent = sum(judgement.cost for judgement in found)
    say(f"{judge.name}: {len(found)} rollouts, {undecided} undecided, their answers cost {spent:.4g}")
    return found


def estimate(name: str, settings: Vlm, prompt: Path, cache: Path, parts: Parts) -> str:
    """What judging would cost, given the answers at hand; asks nobody and needs no key."""
    text, size, known, rollouts = load_prompt(prompt), Size(), 0, 0
    with AnswerCache(cache) as answers:
        for clips in parts():
            every = [question for clip in clips for question in questions(clip, settings, text)]
            missing = unanswered(every, answers)
            size = sum((question.size for question in missing), size)
            known, rollouts = known + len(every) - len(missing), rollouts + len(clips)
    return describe(name, settings, size, known, rollouts)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.judges.vlm",
        description=__doc__.strip(),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="stage file with seed, judges")
    parser.add_argument("--judge", required=True, help="name under judges.vlm in the configuration")
    parser.add_argument("--prompt", type=Path, required=True, help="prompt file")
    parser.add_argument("--rollouts", type=Path, nargs="+", required=True, help="rollouts.parquet files")
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps answers from run to run")
    parser.add_argument("--out", type=Path, required=True, help="parquet to write, one row per rollout")
    parser.add_argument("--dry-run", action="store_true", help="print requests, images, tokens and cost; ask nothing")
    options = parser.parse_args()
    die_with_parent()
    stage = load_stage(options.config)
    check_name("--judge", options.judge, stage.judges.vlm)
    settings = stage.judges.vlm[options.judge]

    def parts() -> Iterator[list[Clip]]:
        return map(read_clips, options.rollouts)

    if options.dry_run:
        print(estimate(options.judge, settings, options.prompt, options.cache, parts))
        return
    with open_judge(options.judge, settings, options.prompt, options.cache) as judge:
        rollouts = sum(len(read_records(table)) for table in options.rollouts)
        write_judgements(options.out, judge_parts(judge, parts, rollouts))


if __name__ == "__main__":
    run_cli(main)
