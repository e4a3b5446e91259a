"""Trials from elsewhere than the lab: photographs of any kind, public lists, stores of episodes, and suites that lack them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from tests.chain import MINI, run
from tests.loopback import serving
from tests.stores import frames_of, make_store
from workflow_src.common.config import load_stage
from workflow_src.common.errors import UserError
from workflow_src.episodes.store import write_table
from workflow_src.rollouts import suites
from workflow_src.rollouts.first_frames import CHECKSUMS, fetch_list, read_list
from workflow_src.rollouts.gather import gather
from workflow_src.rollouts.pictures import fit, read_picture
from workflow_src.rollouts.trials import load_trials
from workflow_src.workflow import checked

SIZE = 16


def gradient(height=6, width=12):
    """Brighter to the right; uint8 (H, W, 3)."""
    return np.broadcast_to(np.uint8(np.arange(width) * 20)[None, :, None], (height, width, 3))


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(image)).save(path, **options)
    return path


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_a_picture_taken_sideways_is_shown_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = save(tmp_path / "phone.png", gradient(), exif=exif)
    assert np.array_equal(read_picture(path), np.rot90(gradient(), -1))


def test_every_kind_of_picture_becomes_rgb_of_eight_bits(tmp_path):
    rgb = gradient()
    clear = np.concatenate([rgb, np.full((6, 12, 1), 255, np.uint8)], -1)
    clear[:, :6, 3] = 0
    seen = read_picture(save(tmp_path / "clear.png", clear))
    assert (seen[:, :6] == 255).all() and np.array_equal(seen[:, 6:], rgb[:, 6:])
    for name, pixels in (("grey", rgb[..., 0]), ("deep", rgb[..., 0].astype(np.uint16) * 257)):
        assert np.array_equal(read_picture(save(tmp_path / f"{name}.png", pixels)), rgb), name
    palette = Image.fromarray(np.ascontiguousarray(rgb)).quantize(16)
    palette.save(tmp_path / "palette.png")
    assert np.abs(read_picture(tmp_path / "palette.png").astype(int) - rgb).max() <= 8
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"text\.jpg is not a readable image"):
        read_picture(tmp_path / "text.jpg")


def test_nothing_is_squashed_that_was_not_meant_to_be():
    wide = np.full((6, 12, 3), 200, np.uint8)
    wide[:, :3] = wide[:, -3:] = 40  # what lies beyond the middle square
    assert np.array_equal(fit(wide, 4, "as_is"), wide)
    assert (fit(wide, 6, "crop") == 200).all()
    boxed = fit(wide, 12, "letterbox")
    assert (boxed[:3] == 0).all() and (boxed[9:] == 0).all() and np.array_equal(boxed[3:9], wide)
    stretched = fit(wide, 12, "stretch")
    assert stretched.shape == (12, 12, 3) and (stretched[:, 0] == 40).all() and (stretched[:, 6] == 200).all()
    tall = np.transpose(wide, (1, 0, 2))
    assert (fit(tall, 6, "crop") == 200).all() and (fit(tall, 12, "letterbox")[:, :3] == 0).all()


# ---- public lists ---------------------------------------------------------------------------------------------------


def jpeg(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (shade,) * 3).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.fixture
def published():
    """A server with a list of two first frames in WorldGym's format; its address is `list`."""
    with serving({"/0/im_0.jpg": jpeg(50), "/1/im_0.jpg": jpeg(150)}) as server:
        root = server.url.rpartition("/")[0]
        words = {"instruction": "place the carrot on plate", "subtasks": ["Pick up the carrot.", "Place it."]}
        entries = [{"im_0_path": f"{root}/{number}/im_0.jpg", **words} for number in range(2)]
        server.content["/list.json"] = json.dumps(entries).encode()
        server.list, server.etag = f"{root}/list.json", ""
        yield server


def asked(server):
    paths = [path for path, _ in server.seen]
    server.seen.clear()
    return paths


def test_a_list_is_fetched_retried_and_remembered(published, tmp_path):
    out = tmp_path / "carrot" / "frames.json"
    published.faults = [None, 503, 610]  # busy, then cut after so many bytes
    assert len(published.content["/0/im_0.jpg"]) > 610
    frames = fetch_list(published.list, out, pause=0)
    assert asked(published) == ["/list.json", "/0/im_0.jpg", "/0/im_0.jpg", "/0/im_0.jpg", "/1/im_0.jpg"]
    assert (
        json.loads(out.read_text())["frames"] == frames and len((out.parent / CHECKSUMS).read_text().splitlines()) == 4
    )
    assert [frame["partial_credit_criteria"] for frame in frames] == ["Pick up the carrot."] * 2
    assert frames[1]["source"].endswith("/1/im_0.jpg") and frames[1]["file"] == "0001.jpg"
    out.unlink()  # as Snakemake does before a second attempt
    (out.parent / "0001.jpg").unlink()
    assert fetch_list(published.list, out, pause=0) == frames and asked(published) == ["/1/im_0.jpg"]


def test_what_comes_later_must_be_what_came_first(published, tmp_path):
    out = tmp_path / "carrot" / "frames.json"
    fetch_list(published.list, out, pause=0)
    (out.parent / "0000.jpg").unlink()
    published.content["/0/im_0.jpg"] = jpeg(51)
    with pytest.raises(UserError, match=r"/0/im_0\.jpg: sha256 is \w+, not \w+: another file"):
        fetch_list(published.list, out, pause=0)


def test_a_page_in_place_of_an_image_is_refused(published, tmp_path):
    published.content["/1/im_0.jpg"] = b"<html>moved</html>"
    with pytest.raises(UserError, match=r"0001\.jpg is not a readable image"):
        fetch_list(published.list, tmp_path / "frames.json", pause=0)
    assert not (tmp_path / "frames.json").exists()
    published.content["/1/im_0.jpg"] = jpeg(150)  # and is not what later ones are held against
    assert len(fetch_list(published.list, tmp_path / "frames.json", pause=0)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<html>", "not valid JSON"),
        ("{}", "holds no list of first frames"),
        ('[{"instruction": "lift"}]', "entry 0 has no im_0_path"),
        (
            '[{"im_0_path": "http://x/y", "instruction": "lift", "subtasks": "all"}]',
            "subtasks is 'all', not a list of texts",
        ),
    ],
)
def test_a_broken_list_is_one_line(tmp_path, content, message):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_list(tmp_path / "list.json")


# ---- suites ---------------------------------------------------------------------------------------------------------

SUITE = {
    "source": "us",
    "tasks": {
        "carrot": {"instruction": "put carrot on plate", "like": "carrot", "partial_credit_criteria": "holds it"},
        "two_cups": {"variants": {"blue": {"instruction": "lift blue cup", "like": "blue"},
                                  "pink": {"instruction": "lift pink cup"}}},
        "other_words": {"instruction": "leave the carrot", "frames_of": "carrot"},
        "from_a_list": {"list": "http://127.0.0.1:9/list.json"},
        "words_for_the_list": {"instruction": "eat it", "frames_of": "from_a_list"},
        "nothing": {"instruction": "fly"},
    },
}  # fmt: skip


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(SUITE, sort_keys=False))
    return str(path)


def store_of(root, *instructions):
    """A store with one short episode per instruction."""
    store = make_store(root, frames_of([2] * len(instructions)), embodiment="widowx")
    rows = store.table.assign(instruction=list(instructions)).to_dict("records")
    write_table(root / "episodes.parquet", rows)
    return root


def gathered(tmp_path, listings=None, lab=None, **trials):
    (tmp_path / "stage.json").write_text(json.dumps(
        {"seed": 1, "trials": trials, "lab": {"scene": "none", "tasks": [], "image_size": SIZE, **(lab or {})}}
    ))  # fmt: skip
    out = tmp_path / "trials"
    gather(load_stage(tmp_path / "stage.json"), out, listings or {})
    return {trial.trial_id: trial for trial in load_trials(out)}


def test_a_suite_says_what_pictures_are_for(tmp_path, suite):
    root = tmp_path / "pictures"
    save(root / "carrot" / "a.JPG", gradient())
    for name in ("blue_1", "pink_1"):
        save(root / "two_cups" / f"{name}.png", gradient(12, 6))
    save(root / "mine" / "x.v2.png", gradient())
    (root / "mine" / "x.v2.json").write_text('{"instruction": "wave", "initial_state": [1, 2]}')
    frames = tmp_path / "from_a_list" / "frames.json"
    save(frames.with_name("0000.png"), gradient())
    frames.write_text(json.dumps({"frames": [{"file": "0000.png", "instruction": "as listed", "source": "web"}]}))
    found = gathered(tmp_path, {"from_a_list": frames}, root=str(root), suites=[suite], fit="crop")
    words = {name: trial.instruction for name, trial in found.items()}
    assert words == {
        "carrot/a": "put carrot on plate", "two_cups/blue_1": "lift blue cup", "two_cups/pink_1": "lift pink cup",
        "other_words/a": "leave the carrot", "mine/x.v2": "wave", "from_a_list/0000": "as listed",
        "words_for_the_list/0000": "eat it",
    }  # fmt: skip
    assert all(trial.image.shape == (SIZE, SIZE, 3) for trial in found.values())
    assert found["carrot/a"].partial_credit_criteria == "holds it" and found["mine/x.v2"].initial_state == [1, 2]
    assert found["other_words/a"].source == "stand-in: carrot/a.JPG"
    assert found["words_for_the_list/0000"].source == "stand-in: from_a_list, web"


def test_suites_without_frames_are_left_out_and_named(tmp_path, suite):
    trials = load_stage_trials(suites=[suite])
    assert suites.left_out(trials) == {suite: ["carrot", "two_cups", "other_words", "nothing"]}
    mapping = {"lab": {"scene": "none", "tasks": [], "embodiment": "widowx"}, "trials": {"suites": [suite]}}
    flow = checked(mapping)
    assert flow.config.lab.tasks == ("from_a_list", "words_for_the_list")
    assert flow.lists == {"from_a_list": "http://127.0.0.1:9/list.json"}


def load_stage_trials(**fields):
    from workflow_src.common.config import from_dict
    from workflow_src.common.sections import Trials

    return from_dict(Trials, fields)


def test_a_changed_suite_is_gathered_again(tmp_path, suite):
    """What it says, not how: comments and the order of its tasks rerun nothing."""
    save(tmp_path / "pictures" / "carrot" / "a.png", gradient(SIZE, SIZE))
    mapping = yaml.safe_load(MINI.read_text()) | {"lab": {"scene": "none", "tasks": ["carrot"], "image_size": SIZE}}
    mapping |= {"trials": {"root": str(tmp_path / "pictures"), "suites": [suite]}, "policies": {}}
    mapping["world_model"] |= {"own_frames": {"share": 0.0}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(mapping))

    def gather_trials():
        run(tmp_path / "run", "results/trials/trials.json", config=tmp_path / "config.yaml")
        (trial,) = load_trials(tmp_path / "run" / "results" / "trials")
        return trial.instruction, (tmp_path / "run" / "results" / "trials" / "trials.json").stat().st_mtime_ns

    first, made = gather_trials()
    tasks = dict(reversed(SUITE["tasks"].items()))
    Path(suite).write_text("# ours\n" + yaml.safe_dump(SUITE | {"tasks": tasks}, sort_keys=False))
    assert gather_trials() == (first, made) and first == "put carrot on plate"
    tasks["carrot"] = {"instruction": "eat the carrot"}
    Path(suite).write_text(yaml.safe_dump(SUITE | {"tasks": tasks}, sort_keys=False))
    assert gather_trials()[0] == "eat the carrot"


def test_trials_depend_on_the_table_of_their_store(tmp_path):
    store = store_of(tmp_path / "s", "lift it")
    lab = {"scene": "none", "tasks": [], "embodiment": "widowx"}
    for given in (store, store / "episodes.parquet"):
        flow = checked({"lab": lab, "trials": {"store": str(given)}})
        assert flow.trial_sources == [str(store / "episodes.parquet")]


def test_episodes_stand_in_and_say_so(tmp_path, suite):
    store = store_of(tmp_path / "bridge", *["put the carrot away"] * 4, "lift the blue cup", "open it")
    found = gathered(
        tmp_path, store=str(store), suites=[suite], per_task=3, lab={"tasks": ["carrot", "two_cups", "other_words"]}
    )
    assert [name.partition("/")[0] for name in found] == ["carrot"] * 3 + ["other_words"] * 3 + ["two_cups"]
    counts = suites.trial_counts(load_stage_trials(store=str(store), suites=(suite,), per_task=3))
    assert counts == {"carrot": 3, "other_words": 3, "two_cups": 1, "from_a_list": None, "words_for_the_list": None}
    assert found["two_cups/blue_000004"].source == "stand-in: bridge, episode 4"
    assert {trial.instruction for trial in found.values()} == {
        "put carrot on plate",
        "leave the carrot",
        "lift blue cup",
    }


def test_trials_of_a_store_are_its_first_frames_stratified_by_task(tmp_path):
    store = store_of(tmp_path / "s", *["Put it down!"] * 5, "", "lift it", "lift it")
    found = gathered(tmp_path, store=str(store), per_task=2)
    assert [name.partition("/")[0] for name in found] == ["lift_it"] * 2 + ["put_it_down"] * 2
    counts = suites.trial_counts(load_stage_trials(store=str(store), per_task=2))
    assert counts == {"lift_it": 2, "put_it_down": 2}
    assert found["lift_it/000006"].source == "s, episode 6" and found["lift_it/000006"].instruction == "lift it"
    from workflow_src.episodes.store import EpisodeStore

    assert np.array_equal(found["lift_it/000006"].image, EpisodeStore(store).frames(6)[0])


def test_all_that_is_wrong_is_said_at_once(tmp_path, suite):
    root = tmp_path / "pictures"
    save(root / "two_cups" / "green.png", gradient())
    save(root / "carrot" / "a.png", gradient())
    save(root / "carrot" / "a.jpg", gradient())
    (root / "carrot" / "b.json").write_text('{"instruction": "x"}')
    save(root / "mine" / "x.png", gradient())
    (root / "mine" / "y.json").write_text('{"instruction": "x"}')
    with pytest.raises(UserError) as caught:
        gathered(tmp_path, root=str(root), suites=[suite], fit="crop", lab={"tasks": ["carrot", "two_cups", "mine"]})
    message = str(caught.value)
    for part in ("5 broken", "green.png: its name must begin with one of blue, pink", "a.jpg and a.png are two pictures",
                 "b.png is missing", "x.json is missing", "y.png is missing"):  # fmt: skip
        assert part in message, message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"carrot": {"instruction": ""}}, r"tasks\.carrot\.instruction: is empty"),
        ({"carrot": {"instruction": "x", "like": "("}}, r"tasks\.carrot\.like: '\(' is no regular expression"),
        ({"a b": {"instruction": "x"}}, r"tasks\.a b: is not usable as a file name"),
        ({"carrot": {"instruction": "x", "frames_of": "carot"}}, r"frames_of: 'carot' is unknown"),
        ({"carrot": {"instuction": "x"}}, r"tasks\.carrot\.instuction: unknown key; did you mean 'instruction'"),
    ],
)
def test_a_mistake_in_a_suite_is_one_line(tmp_path, change, message):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"tasks": change}))
    with pytest.raises(UserError, match=message):
        suites.load_suite(str(tmp_path / "own.yaml"))


def test_suites_are_known_by_name_and_may_not_overlap(suite):
    with pytest.raises(UserError, match=r"trials\.suites: 'bridge17' is unknown; did you mean 'bridge_17'"):
        suites.load_suite("bridge17")
    with pytest.raises(UserError, match="has a task 'carrot', and so has another"):
        suites.tasks_of([suite, suite])


def test_the_papers_suites_are_whole():
    tasks = suites.load_suite("bridge_17").tasks
    assert len(tasks) == 17 and all(variant.like for task in tasks.values() for variant in task.asked().values())
    assert sum(bool(task.partial_credit_criteria) for task in tasks.values()) == 8
    config = yaml.safe_load((suites.FOLDER.parent / "worldgym.yaml").read_text())
    published = pd.read_csv(suites.FOLDER.parent / "published" / "openvla_bridge.csv")
    assert {config["reality_names"].get(name) for name in published["task"]} == set(tasks)
    assert set(config["reality_names"].values()) - set(tasks) <= set(config["policies"])
    assert len(suites.load_suite("ood_language").tasks) == 4 and Path(suites.FOLDER / "README.md").is_file()
    assert all(task.list.endswith(f"/{name}.json") for name, task in suites.load_suite("bridge_public").tasks.items())
