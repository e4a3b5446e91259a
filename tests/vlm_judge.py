"""A vision-language judge that asks a server of the tests: settings, clips, and fixtures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.chain import ROOT
from tests.vlm_server import USAGE, VlmServer
from workflow_src.common.sections import Vlm
from workflow_src.judges.interface import Clip
from workflow_src.judges.vlm import judge_parts, open_judge

PROMPT = ROOT / "config" / "prompts" / "success_1.yaml"
COST = (USAGE["prompt_tokens"] * 2 + USAGE["completion_tokens"] * 8) / 1e6  # of an answer at the prices below


def settings(**fields) -> Vlm:
    return Vlm(model="stub", votes=1, timeout=1, retries=2, concurrency=2, price_input=2.0, price_output=8.0, **fields)


def clip(number=0, success=True, frames=19, criterion=None, instruction="lift the red block"):
    images = np.full((frames, 12, 16, 3), 60, np.uint8)
    images[0, 0, 0] = number  # clips differ
    images[-1] = 220 if success else 30
    return Clip(f"lift/{number:03d}", "p", "lab", 0, "lift", instruction, criterion, images, None)


@pytest.fixture(name="server")
def answering():
    with VlmServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask(server, folder, clips, one_by_one=False, **fields):
    """Judgements of clips, without pauses between tries."""
    made = dataclasses.replace(settings(base_url=server.url), **fields)
    with open_judge("gpt", made, PROMPT, folder) as judge:
        judge.asker.endpoint.pause = 0.001
        judge.asker.poll = 0.01
        parts = [[one] for one in clips] if one_by_one else [list(clips)]
        return judge_parts(judge, lambda: iter(parts), len(clips))
