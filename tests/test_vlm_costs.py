"""The vision-language judge and its owner's money: keys, answers that are kept, spend limits, batches, the command line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pandas as pd
import pytest

from tests.chain import ROOT
from tests.test_judges import write_rollouts
from tests.vlm_judge import COST, PROMPT, answering, ask, clip, no_key, settings  # noqa: F401  (two are fixtures)
from tests.vlm_server import completion
from workflow_src.common.config import write_stage
from workflow_src.common.errors import UserError
from workflow_src.common.sections import Config, Judges, Vlm
from workflow_src.judges import asking, vlm
from workflow_src.judges.cache import AnswerCache
from workflow_src.judges.prompts import load_prompt, read_answer
from workflow_src.judges.questions import questions
from workflow_src.judges.transport import find_key
from workflow_src.judges.vlm import judge_parts, open_judge

# ---- keys and money -------------------------------------------------------------------------------------------------


def test_no_key_is_said_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"key_env: environment variable MY_KEY is not set; export the key for https://a/v1"
    ):
        find_key("gpt", Vlm(base_url="https://a/v1", key_env="MY_KEY"))
    with pytest.raises(UserError, match="is not set"), open_judge("gpt", settings(), PROMPT, tmp_path / "cache"):
        pass
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("MY_KEY", "sk-1")
    assert find_key("gpt", Vlm(base_url="https://a/v1", key_env="MY_KEY")) == "sk-1"
    assert find_key("gpt", Vlm(base_url="http://127.0.0.1:9/v1"))


def test_the_key_goes_to_the_server_and_nowhere_else(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    server.key = "sk-secret-1"
    assert ask(server, tmp_path, [clip()])[0].success_at_end is True
    assert server.seen[0][1]["authorization"] == "Bearer sk-secret-1"
    server.faults = [(400, {"x": "y"}), {"error": "your key sk-secret-1 is tired"}] * 2
    judged = ask(server, tmp_path, [clip(), clip(7), clip(8)], retries=0, concurrency=1)
    texts = [judged[1].error, judged[2].error]
    assert "your key *** is tired" in texts[1]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-2")
    with pytest.raises(UserError) as refused:
        ask(server, tmp_path, [clip(9)])
    texts += [str(refused.value), *capfd.readouterr(), *(file.read_text() for file in tmp_path.rglob("*.jsonl"))]
    assert not any("sk-secret" in text for text in texts)


def test_nothing_is_paid_twice(server, tmp_path):
    clips = [clip(i, success=i % 2 == 0) for i in range(4)]
    first = ask(server, tmp_path, clips, votes=3)
    assert len(server.bodies) == 12
    assert ask(server, tmp_path, clips, votes=3) == first and len(server.bodies) == 12
    ask(server, tmp_path, clips, votes=4)  # one more vote is one more request
    assert len(server.bodies) == 16
    # Where the server is, and how patient we are, does not matter; what decides the answer does.
    ask(server, tmp_path, clips, votes=3, timeout=3, concurrency=1, spend_limit=9.0)
    assert len(server.bodies) == 16
    for change in (
        {"model": "other"},
        {"frames": 1},
        {"parameters": {"temperature": 0.0}},
        {"side": 99},
        {"detail": "low"},
    ):
        before = len(server.bodies)
        ask(server, tmp_path, clips[:1], **change)
        assert len(server.bodies) == before + 1, change
    keys = [q.key for one in clips for q in questions(one, settings(), load_prompt(PROMPT))]
    assert len(set(keys)) == len(keys)


def test_unreadable_answers_are_kept_too(server, tmp_path):
    server.answer = lambda body: "I cannot say."
    ask(server, tmp_path, [clip()])
    (again,) = ask(server, tmp_path, [clip()])
    assert again.invalid == 1 and len(server.bodies) == 1


def test_the_spend_limit_stops_and_a_raised_one_goes_on(server, tmp_path):
    clips = [clip(i) for i in range(10)]
    with pytest.raises(UserError, match=r"judges\.vlm\.gpt\.spend_limit: 0\.03 is reached \(spent 0\.0.*raise it"):
        ask(server, tmp_path, clips, spend_limit=0.03)
    paid = len(server.bodies)
    assert paid >= 1 and paid * COST <= 0.03
    with pytest.raises(UserError, match="is reached"):  # the limit is over all runs
        ask(server, tmp_path, clips, spend_limit=0.03)
    assert len(server.bodies) * COST <= 0.03
    judged = ask(server, tmp_path, clips, spend_limit=0.0)
    assert all(one.success_at_end for one in judged) and len(server.bodies) == 10


def test_what_may_have_been_charged_counts(server, tmp_path):
    server.faults = ["damaged"]
    with open_judge("gpt", settings(base_url=server.url), PROMPT, tmp_path) as judge:
        judge.asker.endpoint.pause = 0.001
        judge.judge([clip()])
        assert judge.asker.budget.spent > 1.5 * COST


def test_a_killed_job_keeps_what_it_paid(server, tmp_path):
    with AnswerCache(tmp_path / "cache") as cache:
        cache.put("k", {"text": "Score: 1", "usage": None, "model": None, "cost": 0.25})
        with pytest.raises(UserError, match="another process asks with this cache"), AnswerCache(tmp_path / "cache"):
            pass
    with open(tmp_path / "cache" / "answers.jsonl", "a") as handle:
        handle.write('{"item": "half a li')
    with AnswerCache(tmp_path / "cache") as cache:
        assert cache.get("k")["text"] == "Score: 1" and cache.spent() == 0.25


# ---- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_gives_the_judgements_that_single_requests_give(server, tmp_path):
    clips = [clip(i, success=i % 2 == 0) for i in range(5)]
    single = ask(server, tmp_path / "single", clips, votes=2)
    server.batch_statuses = ["validating", "in_progress", "finalizing"]
    batched = ask(server, tmp_path / "batch", [*clips, clips[0]], one_by_one=True, votes=2, mode="batch")
    assert batched[:5] == single and len(server.batches) == 1
    (batch,) = server.batches.values()
    lines = [json.loads(line) for line in server.files[batch["input_file_id"]].splitlines()]
    assert len(lines) == len({line["custom_id"] for line in lines}) == 10
    assert all(line["url"] == "/v1/chat/completions" and len(line["custom_id"]) <= 64 for line in lines)
    ask(server, tmp_path / "batch", clips, votes=2, mode="batch")
    assert len(server.batches) == 1 and not list((tmp_path / "batch").glob("batch_*.jsonl"))


def test_a_stopped_batch_job_finds_its_batch_again(server, tmp_path):
    clips = [clip(i) for i in range(3)]

    def killed(*_):
        raise KeyboardInterrupt

    made = settings(base_url=server.url, mode="batch")
    for forget in (False, True):
        folder = tmp_path / f"{forget}"
        server.batches.clear()
        with pytest.raises(KeyboardInterrupt), open_judge("gpt", made, PROMPT, folder) as judge:
            judge.asker._wait = killed
            judge_parts(judge, lambda: iter([clips]), 3)
        if forget:  # killed before the id was noted
            (folder / "batches.json").unlink()
        assert all(one.success_at_end for one in ask(server, folder, clips, mode="batch"))
        assert len(server.batches) == 1


def test_what_a_batch_leaves_out_is_an_error_row_and_asked_again(server, tmp_path):
    server.batch_refuses = (1,)
    clips = [clip(i) for i in range(3)]
    judged = ask(server, tmp_path, clips, mode="batch")
    assert [one.success_at_end for one in judged] == [True, None, True] and "image refused" in judged[1].error
    server.batch_refuses = ()
    assert ask(server, tmp_path, clips, mode="batch")[1].success_at_end is True
    assert len(server.bodies) == 3


def test_a_dead_batch_is_one_line_and_its_answers_are_kept(server, tmp_path):
    server.batch_end = "expired"
    with pytest.raises(UserError, match=r"batch batch_0 expired \(no reason given\); start again"):
        ask(server, tmp_path, [clip()], mode="batch")
    server.batch_end = "completed"
    assert ask(server, tmp_path, [clip()], mode="batch")[0].success_at_end is True and len(server.batches) == 1
    with pytest.raises(UserError, match=r"spend_limit: 0\.001 is reached"):
        ask(server, tmp_path / "new", [clip()], mode="batch", spend_limit=0.001)


# ---- command line ---------------------------------------------------------------------------------------------------


def arguments(tmp_path, server, *more, **fields):
    """The command's arguments: two rollouts, two votes each."""
    table = tmp_path / "lab" / "p" / "shard_0" / "rollouts.parquet"
    if not table.is_file():
        write_rollouts(tmp_path, "lab", True)
    made = dataclasses.replace(settings(base_url=server.url), votes=2, frames=1, **fields)
    config = Config(judges=Judges(vlm={"gpt": made}))
    stage = write_stage(tmp_path, "gpt", config, {"judges": {"vlm": {"gpt": dataclasses.asdict(made)}}})
    return [
        "--config", stage, "--judge", "gpt", "--prompt", str(PROMPT), "--rollouts", str(table),
        "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "gpt.parquet"), *more,
    ]  # fmt: skip


def test_estimate_then_judgements_then_an_estimate_of_nothing(server, tmp_path, monkeypatch, capsys):
    def run(*more, **fields):
        monkeypatch.setattr(sys, "argv", ["vlm", *arguments(tmp_path, server, *more, **fields)])
        monkeypatch.setattr(vlm, "die_with_parent", lambda: None)
        vlm.main()
        return capsys.readouterr().out

    dry = run("--dry-run", image_tokens=1000, answer_tokens=50, spend_limit=5.0)
    lines = {line[:18].strip(): line[18:].strip() for line in dry.splitlines()[1:]}
    assert lines["requests"] == "4" and lines["images"] == "12" and lines["rollouts"] == "2, 2 votes each"
    tokens = int(lines["tokens"].split()[1])
    assert 12_000 < tokens < 15_000 and "200 out" in lines["tokens"]
    assert lines["cost"] == f"about {(tokens * 2 + 200 * 8) / 1e6:.2f}; spend limit 5"
    assert server.seen == [] and not (tmp_path / "gpt.parquet").exists()
    run()
    rows = pd.read_parquet(tmp_path / "gpt.parquet")
    assert len(rows) == 2 and (rows["judge"] == "gpt").all() and (rows["votes"] == 2).all() and len(server.bodies) == 4
    assert rows["cost"].sum() == pytest.approx(4 * COST) and rows["success_at_end"].notna().all()
    again = run("--dry-run")
    assert "answers at hand   4" in again and "requests          0" in again


def test_a_missing_key_is_one_line(server, tmp_path):
    command = arguments(tmp_path, server, base_url="https://host.invalid/v1")
    done = subprocess.run(
        [sys.executable, "-m", "workflow_src.judges.vlm", *command],
        capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: judges.vlm.gpt.key_env: environment variable OPENAI_API_KEY is not set")


def test_completions_in_other_shapes():
    """Content in parts, refusals without content, usage that is missing: kept as unreadable, never as a crash."""
    for reply in (
        completion(None),
        completion([{"type": "text", "text": "Score: 1"}]),
        {"choices": [{}]},
        {"choices": [1]},
    ):
        answer = asking.answer_of(reply, settings(), 0.5)
        assert answer["text"] is None and read_answer(answer["text"], (0.0, 1.0))[0] is None
    assert asking.answer_of({"choices": [{}]}, settings(), 0.5)["cost"] == 0.5
