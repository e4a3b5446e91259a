"""Asking through the provider's Batch API: one upload, answers within a day, at a lower price.

A batch is remembered on disk before anybody waits for it, and looked for at the provider before it is created: a killed job
finds its batch again, and no question is paid for twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from workflow_src.common.errors import UserError
from workflow_src.common.files import write_json
from workflow_src.common.progress import say
from workflow_src.judges.asking import answer_of
from workflow_src.judges.budget import Budget, Size
from workflow_src.judges.cache import AnswerCache
from workflow_src.judges.questions import Question
from workflow_src.judges.transport import Endpoint, NoAnswer, Stopped

URL = "/v1/chat/completions"
MOST_REQUESTS, MOST_BYTES = 50_000, 180_000_000  # per file; OpenAI takes 50,000 and 200 MB
DEAD = {"failed", "expired", "cancelled"}
NEWLINE = b"\n"
ENDED = DEAD | {"completed"}
LABEL = "rehearsal"  # key of a batch's metadata under which its content's digest stands


class Batcher:
    """Sends questions as batches. `add` them all, then `run`; `ask` afterwards says why some have no answer."""

    def __init__(self, endpoint: Endpoint, cache: AnswerCache, budget: Budget, poll: float = 60.0) -> None:
        self.endpoint, self.cache, self.budget, self.poll = endpoint, cache, budget, poll
        self._state = cache.folder / "batches.json"
        # Batch id → what an answer is expected to cost.
        self._open: dict[str, float] = json.loads(self._state.read_text("utf-8")) if self._state.is_file() else {}
        self._failures: dict[str, str] = {}
        self._files: list[Path] = []
        self._added: set[str] = set()
        self._size, self._bytes, self._lines = Size(), 0, 0

    def ask(self, questions: Sequence[Question], done: Callable[[], None]) -> dict[str, str]:
        """Reasons for the questions that no batch has answered."""
        for _ in questions:
            done()
        return {question.key: self._failures.get(question.key, "not answered by its batch") for question in questions}

    def collect(self) -> None:
        """Wait for the batches of earlier runs and keep their answers."""
        for identity in list(self._open):
            self._wait(identity)

    def add(self, questions: Sequence[Question]) -> None:
        """Write questions to the files that `run` uploads, each once: a batch must not hold an id twice."""
        for question in questions:
            if question.key in self._added:
                continue
            self._added.add(question.key)
            request = {"custom_id": question.key, "method": "POST", "url": URL, "body": question.body()}
            line = json.dumps(request) + "\n"
            if not self._files or self._lines == MOST_REQUESTS or self._bytes + len(line) > MOST_BYTES:
                self._files.append(self.cache.folder / f"batch_{len(self._files)}.jsonl")
                self._files[-1].unlink(missing_ok=True)
                self._bytes = self._lines = 0
            with open(self._files[-1], "a", encoding="utf-8") as handle:
                handle.write(line)
            self._size, self._bytes, self._lines = self._size + question.size, self._bytes + len(line), self._lines + 1

    def run(self) -> None:
        """Upload what was added, wait for the answers and keep them. Raises `UserError` beyond the spend limit."""
        if not self._files:
            return
        total = self._size.cost(self.endpoint.settings)
        reserved, before = self.budget.reserve(total), self.cache.spent()
        try:
            for file in self._files:
                self._submit(file, total / self._size.requests)
                file.unlink()
            self.collect()
        finally:
            self.budget.settle(reserved, self.cache.spent() - before)

    def _submit(self, file: Path, each: float) -> None:
        content = file.read_bytes()
        label = hashlib.sha256(content).hexdigest()
        client = self.endpoint.client

        def create() -> Any:
            # A creation whose reply was lost has happened all the same.
            for batch in client.batches.list(limit=100).data:
                if (batch.metadata or {}).get(LABEL) == label and batch.status not in DEAD:
                    return batch
            uploaded = client.files.create(file=(file.name, content), purpose="batch")
            return client.batches.create(
                input_file_id=uploaded.id, endpoint=URL, completion_window="24h", metadata={LABEL: label}
            )

        batch = self._call(create)
        self._open[batch.id] = each
        write_json(self._state, self._open)
        say(f"batch {batch.id}: {content.count(NEWLINE)} requests, up to 24 h; a stopped job finds it again")

    def _wait(self, identity: str) -> None:
        client = self.endpoint.client
        while (batch := self._call(lambda: client.batches.retrieve(identity))).status not in ENDED:
            counts = batch.request_counts
            say(f"batch {identity}: {batch.status}" + (f", {counts.completed} of {counts.total}" if counts else ""))
            if self.endpoint.stop.wait(self.poll):
                raise Stopped
        for file in (batch.output_file_id, batch.error_file_id):
            if file:
                self._keep(self._call(lambda file=file: client.files.content(file).text), self._open[identity])
        del self._open[identity]
        write_json(self._state, self._open)
        if batch.status in DEAD:
            raise UserError(
                f"judges.vlm.{self.endpoint.name}: batch {identity} {batch.status} ({self._why(batch)}); start again: what it "
                "has answered is kept"
            )

    def _why(self, batch: Any) -> str:
        errors = batch.errors.data if batch.errors and batch.errors.data else []
        return self.endpoint.clean(errors[0].message) if errors else "no reason given"

    def _keep(self, text: str, each: float) -> None:
        for key, reply, reason in _results(text):
            if reply is not None:
                self.cache.put(key, answer_of(reply, self.endpoint.settings, each))
            else:
                self._failures[key] = self.endpoint.clean(reason)

    def _call(self, send: Callable[[], Any]) -> Any:
        try:
            return self.endpoint.call(send)[0]
        except NoAnswer as problem:
            raise UserError(
                f"judges.vlm.{self.endpoint.name}: the Batch API at {self.endpoint.settings.base_url}: {problem}; start again "
                "later, or set mode: requests"
            ) from None


def _results(text: str) -> Iterator[tuple[str, dict[str, Any] | None, Any]]:
    """(key, chat completion or None, reason) of every line of a batch's output."""
    for line in filter(None, text.split("\n")):
        entry = json.loads(line)
        response = entry.get("response") or {}
        reply = response.get("body")
        good = response.get("status_code") == 200 and isinstance(reply, dict) and reply.get("choices")
        yield entry["custom_id"], reply if good else None, entry.get("error") or reply
