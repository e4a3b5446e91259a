"""Asking many questions at once, within the budget, and keeping every answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from workflow_src.common.errors import UserError
from workflow_src.common.sections import Vlm
from workflow_src.judges.budget import Budget, billed
from workflow_src.judges.cache import AnswerCache
from workflow_src.judges.questions import Question
from workflow_src.judges.transport import Endpoint, NoAnswer

GIVE_UP = 10  # requests in a row without an answer


def answer_of(reply: dict[str, Any], settings: Vlm, estimate: float) -> dict[str, Any]:
    """A chat completion as the cache keeps it; `estimate` is its cost should the server not count tokens."""
    choice = reply["choices"][0]
    message = choice.get("message") if isinstance(choice, dict) else None
    text = message.get("content") if isinstance(message, dict) else None
    usage = reply.get("usage")
    return {
        "text": text if isinstance(text, str) else None,
        "usage": usage if isinstance(usage, dict) else None,
        "model": reply["model"] if isinstance(reply.get("model"), str) else None,
        "cost": billed(settings, usage, estimate),
    }


class Asker:
    """Sends questions as single requests, several at once."""

    def __init__(self, endpoint: Endpoint, cache: AnswerCache, budget: Budget) -> None:
        self.endpoint, self.cache, self.budget = endpoint, cache, budget
        self._failed_in_a_row = 0

    def ask(self, questions: Sequence[Question], done: Callable[[], None]) -> dict[str, str]:
        """Put the answers into the cache and return key → reason for those that got none; `done` is called for each.

        Raises `UserError` when going on is pointless: key, model or money, or many requests in a row without answer.
        Requests under way then still end, and their answers are kept.
        """
        failures: dict[str, str] = {}
        with ThreadPoolExecutor(self.endpoint.settings.concurrency) as pool:
            waiting = {pool.submit(self._ask, question): question for question in questions}
            try:
                for future in as_completed(waiting):
                    if reason := future.result():
                        failures[waiting[future].key] = reason
                    self._count(reason)
                    done()
            except BaseException:
                self.endpoint.stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        return failures

    def _count(self, reason: str | None) -> None:
        self._failed_in_a_row = self._failed_in_a_row + 1 if reason else 0
        if self._failed_in_a_row >= GIVE_UP:
            settings = self.endpoint.settings
            raise UserError(
                f"judges.vlm.{self.endpoint.name}: {GIVE_UP} requests in a row got no answer from {settings.base_url}, the "
                f"last: {reason}; mend that and start again: answers so far are kept"
            )

    def _ask(self, question: Question) -> str | None:
        """Why there is no answer, or None."""
        estimate = question.size.cost(question.settings)
        reserved, actual = self.budget.reserve(estimate), 0.0
        try:
            reply, lost = self.endpoint.ask(question.body())
            answer = answer_of(reply, question.settings, estimate)
            self.cache.put(question.key, answer)
            # What may have been charged counts as spent.
            actual = answer["cost"] + lost * reserved
        except NoAnswer as problem:
            actual = problem.lost * reserved
            return str(problem)
        finally:
            self.budget.settle(reserved, actual)
        return None
