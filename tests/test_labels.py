"""Labels by people: how clips are drawn, the page in a real browser, and what its CSV becomes."""

from __future__ import annotations

import json
import re
import sys
import time

import numpy as np
import pandas as pd
import pytest

from tests.browser import chromium
from workflow_src.common.errors import UserError
from workflow_src.common.seeds import rng
from workflow_src.common.video import read_video
from workflow_src.judges import label
from workflow_src.judges.human import check_rollouts, judgements_of, read_labels
from workflow_src.judges.interface import opinion, read_clips, write_judgements
from workflow_src.rollouts.loop import Item, Rollout
from workflow_src.rollouts.records import Recorder, Source
from workflow_src.rollouts.trials import Trial

SIZE, STEPS = 24, 6


def write_rollouts(folder, world, policy, trials):
    """Rollouts of one policy: noise that gets brighter. Criteria on every second trial."""
    table = folder / world / policy / "shard_0" / "rollouts.parquet"
    recorder = Recorder(table, Source(policy, world, 5.0, "x", None), "key")
    items = []
    for i in range(trials):
        frames = rng(i, world, policy).integers(0, 100, (STEPS + 1, SIZE, SIZE, 3), np.uint8)
        frames += np.arange(STEPS + 1, dtype=np.uint8)[:, None, None, None] * 20
        trial = Trial(
            f"lift/{i:03d}", "lift", f"lift block {i}", frames[0], None, i, "it was touched" if i % 2 else None
        )
        truth = {"success": np.arange(STEPS + 1) == STEPS, "partial": None} if world == "lab" else {}
        actions = np.zeros((STEPS, 7), np.float32)
        items.append(Item(trial, 0))
        recorder.write(Rollout(items[-1], frames, actions, STEPS, False, 0.1, None, truth.get("success"), None))
    recorder.finish(items)
    return table


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two policies in two worlds, judged: (rollout tables, judgements). The weak policy succeeds once in ten."""
    folder = tmp_path_factory.mktemp("run")
    tables = [
        write_rollouts(folder, world, policy, 20) for world in ("lab", "world_model") for policy in ("good", "weak")
    ]
    judged = []
    for table in tables:
        for i, clip in enumerate(read_clips(table)):
            success = i % 10 > 0 if clip.policy == "good" else i % 10 == 0
            undecided = clip.world == "world_model" and i == 19
            judged.append(opinion("classifier", clip, success_at_end=None if undecided else success, success_ever=None))
    write_judgements(folder / "learned.parquet", judged)
    return tables, [folder / "learned.parquet"]


def make_page(run, out, monkeypatch, *more):
    tables, judgements = run
    arguments = ["--rollouts", *tables, "--judgements", *judgements, "--judge", "classifier", "--out", out, *more]
    monkeypatch.setattr(sys, "argv", ["label", *map(str, arguments)])
    monkeypatch.setattr(label, "die_with_parent", lambda: None)
    label.main()
    return pd.read_csv(out / "sample.csv", dtype={"clip": str})


# ---- drawing --------------------------------------------------------------------------------------------------------


def test_strata_give_alike_and_no_more_than_they_have():
    assert label.allocate({"a": 50, "b": 50, "c": 3}, 23) == {"a": 10, "b": 10, "c": 3}
    assert label.allocate({"a": 5, "b": 2}, 100) == {"a": 5, "b": 2}
    assert label.allocate({"a": 9, "b": 9, "c": 9}, 2) == {"a": 1, "b": 1, "c": 0}
    for count in range(40):
        given = label.allocate({"a": 11, "b": 1, "c": 20}, count)
        assert sum(given.values()) == min(count, 32) and max(given["a"], given["c"]) >= given["b"]


def test_weights_undo_the_uneven_shares(run, tmp_path, monkeypatch):
    sample = make_page(run, tmp_path, monkeypatch, "--count", "10", "--lab-count", "2")
    generated = sample[sample["world"] == "world_model"]
    assert len(generated) == 10 and len(sample) == 12
    counts = generated.groupby("stratum")["clip"].count().to_dict()
    assert counts == {"world_model/good/failure": 2, "world_model/good/success": 3, "world_model/weak/failure": 3,
                      "world_model/weak/success": 2}  # fmt: skip
    assert generated["weight"].sum() == pytest.approx(38)  # all rollouts that were decided: two were not
    assert np.allclose(generated["weight"], generated["stratum_size"] / generated["drawn"])
    again = make_page(run, tmp_path, monkeypatch, "--count", "10", "--lab-count", "2")
    pd.testing.assert_frame_equal(sample, again)
    with pytest.raises(UserError, match=r"sample\.csv: is another sample, and labels of its page need it"):
        make_page(run, tmp_path, monkeypatch, "--count", "10", "--lab-count", "2", "--seed", "1")
    with pytest.raises(
        UserError, match=r"--count: 3 clips are too few for 4 strata \(policy × verdict\); give at least 4"
    ):
        make_page(run, tmp_path / "few", monkeypatch, "--count", "3")


def test_the_page_tells_nothing_of_policy_and_world(run, tmp_path, monkeypatch):
    sample = make_page(run, tmp_path, monkeypatch, "--count", "8", "--lab-count", "8")
    page = tmp_path / "page"
    text = (page / "index.html").read_text()
    for word in ("world_model", "good", "weak", "success/", "lift/0", "classifier", "sha256"):
        assert word not in text
    names = {path.name for path in page.iterdir()}
    assert names == {f"{clip}.mp4" for clip in sample["clip"]} | {"index.html"}
    assert all(re.fullmatch(r"[0-9a-f]{6}-\d{4}\.mp4", name) for name in names - {"index.html"})
    worlds = sample.sort_values("clip")["world"].tolist()
    assert worlds != sorted(worlds) and worlds != sorted(worlds, reverse=True)  # shuffled
    for row in sample.itertuples():
        content = (page / f"{row.clip}.mp4").read_bytes()
        assert row.policy.encode() not in content and row.world.encode() not in content
    assert read_video(page / f"{sample['clip'][0]}.mp4").shape == (STEPS + 1, 336, 336, 3)
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S).group(1))
    assert len(data["clips"]) == 16 and set(data["clips"][0]) == {"clip", "instruction", "criterion"}


# ---- in the browser -------------------------------------------------------------------------------------------------


@pytest.mark.requires("chromium")
def test_a_person_labels_reloads_and_saves(run, tmp_path, monkeypatch):
    sample = make_page(run, tmp_path, monkeypatch, "--count", "5", "--lab-count", "2").sort_values("clip")
    graded = [int(trial[-3:]) % 2 == 1 for trial in sample["trial_id"]]
    chosen = "[...document.querySelectorAll('.chosen')].map(button => button.dataset.label)"
    at = f"({{place: at('place').textContent, count: at('count').textContent, chosen: {chosen}}})"
    with chromium(tmp_path) as page:
        page.open(f"file://{tmp_path}/page/index.html")
        page.wait("video.currentTime > 0 && video.videoWidth === 336")
        assert page.value(at) == {"place": "clip 1 of 7", "count": "0 labelled", "chosen": []}
        assert page.value("at('instruction').textContent") == f"lift block {int(sample['trial_id'].iloc[0][-3:])}"
        page.value("name.focus()")
        page.press("1", "h")  # into the name, not to the clip
        page.value("name.value = 'Anna \"A\"'; name.dispatchEvent(new Event('input')); name.blur()")
        page.press("1", "0", "s")
        assert page.value(at)["count"] == "3 labelled" and page.value(at)["place"] == "clip 4 of 7"
        page.press("ArrowLeft", "b")
        assert page.value(at) == {"place": "clip 2 of 7", "count": "3 labelled", "chosen": ["0"]}
        page.press("1", "x")  # changes the second clip's label; x means nothing
        # Chromium hands what a page keeps to the process of the next one in its own time.
        end = time.monotonic() + 20
        while page.open(f"file://{tmp_path}/page/index.html?again") or page.value(at)["count"] == "0 labelled":
            assert time.monotonic() < end, "nothing was kept"
            time.sleep(0.5)
        assert page.value(at) == {"place": "clip 4 of 7", "count": "3 labelled", "chosen": []}
        assert page.value("name.value") == 'Anna "A"'
        for i in range(3, 7):
            assert page.value("document.querySelector('[data-label=\"0.5\"]').disabled") is not graded[i]
            page.press("h")  # does nothing where there is no partial credit
            page.press("0") if not graded[i] else None
        page.value("document.querySelector('[data-label=\"1\"]').click()")  # the last clip stays, and can be changed
        assert page.value(at) == {"place": "clip 7 of 7", "count": "all labelled: save labels.csv", "chosen": ["1"]}
        assert page.value("at('problem').hidden")
        page.screenshot(tmp_path / "page.png")
        page.value("at('save').click()")
        wait_for_file(tmp_path / "labels.csv")
    saved = pd.read_csv(tmp_path / "labels.csv", dtype=str)
    expected = ["1", "1", "skip", *("0.5" if partial else "0" for partial in graded[3:6]), "1"]
    assert saved["clip"].tolist() == sample["clip"].tolist() and saved["label"].tolist() == expected
    assert (saved["labeller"] == 'Anna "A"').all() and saved["seconds"].astype(float).between(0, 60).all()
    judged = judgements_of(read_labels([tmp_path / "labels.csv"], tmp_path / "sample.csv"))
    assert len(judged) == 7 and sum(one.success_at_end is None for one in judged) == 1


def wait_for_file(path):
    end = time.monotonic() + 20
    while not path.is_file():
        assert time.monotonic() < end, f"{path} was not saved"
        time.sleep(0.05)


@pytest.mark.requires("chromium")
def test_a_video_that_is_missing_is_said(run, tmp_path, monkeypatch):
    sample = make_page(run, tmp_path, monkeypatch, "--count", "4", "--lab-count", "0")
    first = sorted(sample["clip"])[0]
    (tmp_path / "page" / f"{first}.mp4").unlink()
    with chromium(tmp_path) as page:
        page.open(f"file://{tmp_path}/page/index.html")
        page.wait("!at('problem').hidden")
        assert page.value("at('problem').textContent").startswith(f"{first}.mp4 cannot be played")
        page.press("s")
        page.wait("at('problem').hidden && video.currentTime > 0")


# ---- labels to judgements -------------------------------------------------------------------------------------------


def write_csv(path, rows, columns):
    pd.DataFrame(rows, columns=columns.split(",")).to_csv(path, index=False)
    return path


def test_labels_of_several_people_are_votes_and_skips_move_their_weight(run, tmp_path, monkeypatch):
    sample = make_page(run, tmp_path, monkeypatch, "--count", "12", "--lab-count", "0")
    clips = {name: part["clip"].tolist() for name, part in sample.groupby("stratum")}
    first, second, third = clips["world_model/weak/failure"][:3]
    anna = [(clip, "0", "anna") for clip in sample["clip"] if clip != third] + [(third, "skip", "anna")]
    ben = [(first, "1", "ben"), (second, "0.5", "ben")]
    files = [write_csv(tmp_path / f"{i}.csv", rows, "clip,label,labeller") for i, rows in enumerate((anna, ben))]
    labels = read_labels(files, tmp_path / "sample.csv")
    check_rollouts(labels, run[0])
    judged = {(one.policy, one.trial_id): one for one in judgements_of(labels)}
    row = sample.set_index("clip")
    tied, agreed, skipped = (
        judged[row.loc[clip, "policy"], row.loc[clip, "trial_id"]] for clip in (first, second, third)
    )
    assert (tied.success_at_end, tied.tie, tied.votes) == (None, True, 2) and tied.weight is None
    assert (agreed.success_at_end, agreed.partial, agreed.votes) == (False, 0.25, 2)
    assert (skipped.success_at_end, skipped.votes, skipped.invalid) == (None, 0, 1)
    # What the undecided ones stood for, the stratum's other clips stand for now.
    weights = [one.weight for one in judged.values() if one.weight is not None]
    assert sum(weights) == pytest.approx(38) and all(one.world == "world_model" for one in judged.values())


def test_anybodys_own_labels(run, tmp_path):
    own = write_csv(tmp_path / "own.csv", [("lab", "good", "lift/000", 0, "1"), ("lab", "weak", "lift/003", 0, "½")],
                    "world,policy,trial_id,repeat,label")  # fmt: skip
    labels = read_labels([own], None)
    check_rollouts(labels, run[0])
    judged = judgements_of(labels)
    assert [(one.policy, one.success_at_end, one.partial, one.weight) for one in judged] == [
        ("good", True, 1.0, None), ("weak", False, 0.5, None),
    ]  # fmt: skip
    write_judgements(tmp_path / "human.parquet", judged)
    assert pd.read_parquet(tmp_path / "human.parquet")["weight"].isna().all()


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            [("lab", "good", "lift/000", 0, "2")],
            "world,policy,trial_id,repeat,label",
            "label '2' is unknown; allowed: 0, 0.5",
        ),
        ([("lab", "good", "lift/000", 0)], "world,policy,trial_id,repeat", "has no column label"),
        (
            [("lab", "good", "lift/900", 0, "1")],
            "world,policy,trial_id,repeat,label",
            "1 are about no rollout of this run",
        ),
        ([("lab", "good", "lift/000", 0, "1")] * 2, "world,policy,trial_id,repeat,label", "has two labels by 'nobody'"),
        (
            [("lab", "good", "lift/000", 0, "1", "0" * 64)],
            "world,policy,trial_id,repeat,label,sha256",
            "made anew since",
        ),
    ],
)
def test_labels_that_fit_nothing_are_one_line(run, tmp_path, rows, columns, message):
    with pytest.raises(UserError, match=message) as refused:
        check_rollouts(read_labels([write_csv(tmp_path / "own.csv", rows, columns)], None), run[0])
    assert "\n" not in str(refused.value)


def test_labels_of_another_page_are_refused(run, tmp_path, monkeypatch):
    make_page(run, tmp_path, monkeypatch, "--count", "4", "--lab-count", "0")
    other = write_csv(tmp_path / "labels.csv", [("abcdef-0001", "1", "anna")], "clip,label,labeller")
    with pytest.raises(UserError, match=r"sample\.csv: has no clip 'abcdef-0001'; these labels belong to another"):
        read_labels([other], tmp_path / "sample.csv")
