"""One request to an OpenAI-compatible server, until it is answered or there is no point in asking.

Retries are our own, because the package's do not do: it gives up on a `Retry-After` above two minutes, never asks again after
a body that cannot be read, and lets every thread run into a rate limit that one has met.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from workflow_src.common.addresses import is_loopback
from workflow_src.common.errors import UserError
from workflow_src.common.sections import Vlm

T = TypeVar("T")
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
NO_MONEY = "insufficient_quota"  # a 429 that no waiting mends
LONGEST_PAUSE = 60.0  # seconds between two tries of our own choosing
LONGEST_WAIT = 900.0  # seconds that a server may ask us to wait
NO_KEY = "no-key"  # what servers without keys are sent: the package insists on one
WORDS = 200  # characters of a server's message that are shown


class NoAnswer(Exception):
    """This request gets no answer; the message says why. `lost` tries may have been charged for all the same."""

    def __init__(self, reason: str, lost: int = 0) -> None:
        super().__init__(reason)
        self.lost = lost


class Stopped(Exception):
    """Another thread has found a reason to stop."""


class _Passing(Exception):
    """A failure that another try may mend, after `wait` seconds if the server named a time."""

    def __init__(self, reason: str, charged: bool = False, wait: float | None = None) -> None:
        super().__init__(reason)
        self.charged, self.wait = charged, wait


def find_key(name: str, settings: Vlm) -> str:
    """The server's key from the environment. Raises `UserError` when there is none and the server is not on loopback."""
    key = os.environ.get(settings.key_env, "").strip()
    if key or _loopback(settings):
        return key or NO_KEY
    raise UserError(
        f"judges.vlm.{name}.key_env: environment variable {settings.key_env} is not set; export the key for "
        f"{settings.base_url}, or name another variable"
    )


def _loopback(settings: Vlm) -> bool:
    return is_loopback(urlsplit(settings.base_url).hostname or "")


class Endpoint:
    """A server and how to talk to it. Threads share it; setting `stop` ends all waiting."""

    def __init__(self, name: str, settings: Vlm, pause: float = 1.0) -> None:
        self._key = find_key(name, settings)
        from openai import DefaultHttpxClient, OpenAI

        self.name, self.settings, self.pause = name, settings, pause
        # A proxy is for other machines.
        direct = DefaultHttpxClient(trust_env=False) if _loopback(settings) else None
        self.client = OpenAI(
            api_key=self._key, base_url=settings.base_url, timeout=settings.timeout, max_retries=0, http_client=direct
        )
        self.stop = threading.Event()
        self._not_before, self._lock = 0.0, threading.Lock()

    def ask(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The JSON of the reply to a chat completion request, with at least one choice; else as `call`."""
        return self.call(lambda: self._complete(body))

    def call(self, send: Callable[[], T]) -> tuple[T, int]:
        """What `send` returns, and how many failed tries before it may have been charged for.

        Sent again after rate limits, server errors, timeouts and unreadable replies. Raises `NoAnswer` when this request is
        refused or has failed too often, `UserError` when every request would be (key, model, money), `Stopped` once `stop`
        is set.
        """
        failed = lost = 0
        while True:
            self._sleep_until(self._not_before)
            try:
                return self._once(send), lost
            except _Passing as problem:
                failed, lost = failed + 1, lost + problem.charged
                if failed > self.settings.retries:
                    raise NoAnswer(f"{problem}, {failed} times", lost) from None
                self._back_off(failed, problem.wait)

    def _once(self, send: Callable[[], T]) -> T:
        import openai

        try:
            return send()
        except openai.APITimeoutError:
            raise _Passing(f"no sign of life within {self.settings.timeout} s", charged=True) from None
        except openai.APIConnectionError as error:
            cause = type(error.__cause__).__name__
            raise _Passing(f"connection failed ({cause})", charged=cause != "ConnectError") from None
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except ValueError:
            raise _Passing("the reply is not JSON", charged=True) from None

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        # The raw text: the package's own parser lets malformed replies through as objects without content.
        reply = json.loads(self.client.chat.completions.with_raw_response.create(**body).text)
        if not (isinstance(reply, dict) and isinstance(reply.get("choices"), list) and reply["choices"]):
            # Some gateways report an error with status 200.
            raise _Passing(f"the reply holds no choice: {self.clean(reply)}")
        return reply

    def _refusal(self, error: Any) -> Exception:
        """What an `openai.APIStatusError` means for this request, or for all of them."""
        body = error.body if isinstance(error.body, dict) else {}
        status, said = error.status_code, self.clean(body.get("message") or error.message)
        where = f"judges.vlm.{self.name}: {self.settings.base_url} answered {status}"
        if status in (401, 403):
            return UserError(f"{where}; check the key in the environment variable {self.settings.key_env}")
        if status == 404:
            return UserError(f"{where}; check base_url and model {self.settings.model!r}: {said}")
        if error.code == NO_MONEY:
            return UserError(f"{where}: the account has no money left ({NO_MONEY}); answers so far are kept")
        if status not in TRANSIENT:
            return NoAnswer(f"refused with {status}: {said}")
        wait = retry_after(error.response.headers)
        if wait is not None and wait > LONGEST_WAIT:
            return UserError(f"{where} and asks to wait {wait:.0f} s; start again then: answers so far are kept")
        return _Passing(f"status {status}: {said}", wait=wait)

    def clean(self, said: Any) -> str:
        """A server's words in one short line, without the key should it repeat it."""
        text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False, default=str)
        return " ".join(text.replace(self._key, "***").split())[:WORDS]

    def _back_off(self, failed: int, wait: float | None) -> None:
        if wait is not None:
            # The server's rate limit is for all of us.
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + wait)
            return
        pause = min(self.pause * 2 ** (failed - 1), LONGEST_PAUSE)
        # Spread, so that requests that failed together do not come back together.
        self._sleep_until(time.monotonic() + pause * random.uniform(0.5, 1.0))

    def _sleep_until(self, moment: float) -> None:
        if self.stop.wait(max(0.0, moment - time.monotonic())):
            raise Stopped


def retry_after(headers: Any) -> float | None:
    """Seconds that a reply asks to wait: `retry-after-ms`, or `Retry-After` in seconds or as a date. None: no word of it."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    try:
        date = email.utils.parsedate_to_datetime(headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return max(0.0, date.timestamp() - time.time())
