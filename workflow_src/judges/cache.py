"""Answers that were paid for, kept on disk: asked again, a question costs nothing and gets the same answer."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path
from typing import Any

from workflow_src.common.errors import UserError
from workflow_src.common.files import Journal

FORMAT = "rehearsal-answers-1"


class AnswerCache:
    """Answers by question key, in `<folder>/answers.jsonl`, on disk as soon as they come. One process at a time.

    An answer is `{"text": str | None, "usage": dict | None, "model": str | None, "cost": float}`. Unreadable answers are
    kept like the others: asking until the answer suits would bias the judge.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __enter__(self) -> AnswerCache:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held = open(self.folder / "lock", "w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._held.close()
            raise UserError(f"{self.folder}: another process asks with this cache; wait for it") from None
        self._journal, self._lock = Journal(self.folder / "answers.jsonl", FORMAT), threading.Lock()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def get(self, key: str) -> dict[str, Any] | None:
        return self._journal.done.get(key)

    def put(self, key: str, answer: dict[str, Any]) -> None:
        with self._lock:
            self._journal.record(key, **answer)

    def spent(self) -> float:
        """What all answers together cost."""
        return sum(answer["cost"] for answer in self._journal.done.values())
