"""Training on several data sets of unequal episodes, cached or encoded on the fly: what is read, from where, and from whom."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.stores import Cells, frames_of, make_store, write_tokenizer, write_worldgym
from tests.test_tokenizer import run_cli
from tests.test_world_model_training import MODEL, make_source
from workflow_src.common.config import load_stage, to_dict
from workflow_src.common.errors import UserError
from workflow_src.episodes import latents as cache
from workflow_src.episodes.clips import Choice
from workflow_src.episodes.store import EpisodeStore
from workflow_src.training import randomness, world_model
from workflow_src.training.datasets import open_held_out, open_training
from workflow_src.training.distributed import Processes
from workflow_src.training.held_out import choose_episodes, read_held_out
from workflow_src.world_model.artefact import Source, build_network, load_artefact, read_card
from workflow_src.world_model.tokenizer import load_tokenizer

torch.set_num_threads(1)
ALONE = Processes(0, 1, torch.device("cpu"))
SIZE = (16, 16)
TABLETOP, BRIDGE = [9, 3, 14, 9, 22], [12, 30, 7]  # frames of the episodes
MIXED = replace(MODEL, data="tabletop,bridge", convention="worldgym", training=replace(MODEL.training, steps=6,
                checkpoint_every=2, keep=9))  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two data sets with caches, and the command line's flags for both together."""
    root = tmp_path_factory.mktemp("data")
    tokenizer = write_tokenizer(root / "tokenizer")
    stores = {
        ("tabletop", "train"): make_store(root / "tabletop" / "train", frames_of(TABLETOP, 1, SIZE), seed=1).root,
        ("tabletop", "validation"): make_store(root / "tabletop" / "validation", frames_of([9, 6, 11], 2, SIZE)).root,
        ("bridge", "train"): write_worldgym(root / "bridge" / "train", BRIDGE, 3),
        ("bridge", "validation"): write_worldgym(root / "bridge" / "test", [8, 10], 4),
    }
    caches = {}
    for (name, split), path in stores.items():
        caches[name, split] = root / "latents" / name / split / "latents.json"
        cache.encode(EpisodeStore(path), load_tokenizer(tokenizer), caches[name, split], mirror=True)
    return {
        "tokenizer": tokenizer,
        "episodes": [stores["tabletop", "train"], stores["bridge", "train"]],
        "latents": [caches["tabletop", "train"], caches["bridge", "train"]],
        "validation": caches["tabletop", "validation"],
        "validation_episodes": stores["tabletop", "validation"],
        "caches": caches,
        "stores": stores,
    }


def on_the_fly(flags):
    return replace(MIXED, latents="on_the_fly"), flags | {"latents": []}


def choose(source, count=200, step=0) -> Choice:
    return source.clips.choose(randomness.uniform(0, step, range(count), 3))


def read(source, choice):
    return source.read(choice.episode, source.clips.frame_numbers(choice), choice.mirrored)


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_clips_of_a_mixture_show_their_own_frames_and_actions(data):
    source = make_source(MIXED, data)
    choice = choose(source)
    clean, first, actions = read(source, choice)
    assert clean.shape == (200, 4, 2, 2, 4) and first.shape == (200, 2, 2, 4) and actions.shape == (200, 4, 10)
    found = torch.cat([first[:, None], clean], 1) * source.std + source.mean
    frames = [[one.store.frames(i) for i in range(len(one.store))] for one in source.datasets]
    seen, pixels = set(), []
    for i in range(200):
        which, number = (int(value[i]) for value in source.clips.sources(choice.episode))
        store = source.datasets[which].store
        start, mirrored = int(choice.start[i]), bool(choice.mirrored[i])
        shown = frames[which][number][[0, *range(start, start + 4)]]
        pixels.append(shown[:, :, ::-1] if mirrored else shown)
        if which == 1:  # as published, one frame later; base frame of the WidowX: y points sideways
            led = np.pad(store.arrays(number)["actions"][:-1], ((1, 0), (0, 0)))[start : start + 4].copy()
            led[:, [1, 3, 5]] *= -1 if mirrored else 1
            np.testing.assert_allclose(actions[i], led, atol=1e-5)
        seen.add((which, mirrored))
    assert len(seen) == 4
    expected = load_tokenizer(data["tokenizer"]).encode(np.concatenate(pixels))
    np.testing.assert_allclose(found.flatten(0, 1), expected, atol=2e-2)


def test_encoded_on_the_fly_clips_are_the_same(data):
    cached, live = make_source(MIXED, data), make_source(*on_the_fly(data))
    assert live.live and not cached.live
    choice, same = choose(cached), choose(live)
    for name in ("episode", "start", "mirrored"):
        np.testing.assert_array_equal(getattr(choice, name), getattr(same, name))
    torch.testing.assert_close(live.mean, cached.mean, atol=2e-3, rtol=1e-2)  # few frames: all of them are sampled
    torch.testing.assert_close(live.std, cached.std, atol=2e-3, rtol=1e-2)
    for one, other in zip(read(live, choice), read(cached, choice)):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.01)
    numbers, turned = np.array([[3, 8, 2]]), np.array([True])
    for one, other in zip(live.datasets, cached.datasets):
        found = [each.latents.read(np.array([0]), numbers, turned) for each in (one, other)]
        assert found[0].dtype == found[1].dtype == np.float16
        np.testing.assert_allclose(*found, atol=1e-2)


def test_neither_prefetching_nor_threads_change_what_is_read(data, monkeypatch):
    config, flags = on_the_fly(data)
    source = make_source(config, flags)
    choice, later = choose(source, 30, step=4), choose(source, 30, step=5)
    plain = read(source, later)
    source.prefetch(later)
    read(source, choice)  # another step in between, as after a resume
    again = read(source, later)
    monkeypatch.setattr("workflow_src.training.datasets.THREADS", 1)
    alone = read(make_source(config, flags), later)
    for one, two, three in zip(plain, again, alone):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_decoding_that_fails_ahead_of_time_is_reported_by_the_step_that_needs_it(data, tmp_path):
    store = make_store(tmp_path / "x", frames_of([9, 9], size=SIZE))
    config = replace(MODEL, latents="on_the_fly")
    source = make_source(config, {"episodes": [store.root], "latents": [], "tokenizer": data["tokenizer"]})
    (store.root / "000000001.mp4").write_bytes(b"gone")
    broken = Choice(np.array([1]), np.array([2]), np.array([False]))
    source.prefetch(broken)
    read(source, Choice(np.array([0]), np.array([2]), np.array([False])))
    with pytest.raises(UserError, match=r"000000001\.mp4: damaged"):
        read(source, broken)


def test_mean_and_deviation_are_those_of_the_mixture(data):
    weights = {"bridge": 3.0, "tabletop": 1.0}
    flags = data | {"latents": data["latents"][::-1], "episodes": data["episodes"][::-1]}  # the heaviest comes first
    source = make_source(replace(MIXED, data=weights), flags)
    assert [one.name for one in source.datasets] == ["bridge", "tabletop"]
    bridge, tabletop = (one.latents for one in source.datasets)
    many = np.concatenate([np.repeat(np.concatenate(one.shards[:1]).reshape(-1, 4)[None], n, 0).reshape(-1, 4)
                           for one, n in ((bridge, 3 * tabletop.lengths.sum()), (tabletop, bridge.lengths.sum()))]
                          ).astype(np.float64)  # fmt: skip
    np.testing.assert_allclose(source.mean, many.mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(source.std, many.std(0), rtol=1e-3)
    alone = make_source(replace(MIXED, data="bridge"), {key: value[:1] if isinstance(value, list) else value
                                                        for key, value in flags.items()})  # fmt: skip
    np.testing.assert_array_equal(alone.mean, bridge.mean)  # to the last bit
    np.testing.assert_array_equal(alone.std, bridge.std)


def test_a_description_names_data_sets_and_files(data):
    source = make_source(MIXED, data)
    choice = Choice(np.array([1, 6]), np.array([0, 9]), np.array([True, False]))
    assert source.describe(choice) == {
        "dataset": ["tabletop", "bridge"], "episode": [1, 3], "start": [0, 9], "mirrored": [True, False],
    }  # fmt: skip


def test_a_loss_does_not_depend_on_how_a_mixed_batch_is_split(data):
    source = make_source(MIXED, data)
    loss = world_model.DiffusionForcing(card_of(MIXED, source), MIXED, source, seed=3)
    torch.manual_seed(0)
    network = build_network(loss.card)
    whole = loss(network, 4, np.arange(12))["loss"]
    parts = [loss(network, 4, np.arange(start, start + 3))["loss"] for start in (0, 3, 6, 9)]
    torch.testing.assert_close(whole, sum(parts) / 4)


# ---- what the artefact says ------------------------------------------------------------------------------------------


def card_of(config, source):
    stage = type("Stage", (), {"world_model": config})
    return world_model.make_card(stage, source)


def test_the_card_lists_every_data_set_and_the_rate_that_is_imagined(data):
    config = replace(MIXED, frame_skip={"bridge": 2}, clip_frames=3)
    source = make_source(config, data)
    card = card_of(config, source)
    shares = np.array([7 + 1 + 12 + 7 + 20, 8 + 26 + 3]) / (47 + 37)  # by clips of 3 and of 5 frames
    assert card.embodiment == "tabletop" and card.control_hz == 5.0
    assert card.sources == (
        Source("tabletop", "tabletop", 5.0, 1, round(shares[0], 6)), Source("bridge", "widowx", 5.0, 2, round(shares[1], 6))
    )  # fmt: skip
    assert (card.steps("tabletop"), card.steps("widowx"), card.steps("stranger")) == (1, 2, 1)
    half = replace(MIXED, frame_skip=2, clip_frames=3)
    assert card_of(half, make_source(half, data)).control_hz == 2.5


# ---- what is refused -------------------------------------------------------------------------------------------------


def single(tmp_path, frames, data, **arrays):
    """Flags of one new data set, encoded."""
    store = make_store(tmp_path / "new" / "train", frames, **arrays)
    cache.encode(store, load_tokenizer(data["tokenizer"]), tmp_path / "latents.json", mirror=True)
    return {"episodes": [store.root], "latents": [tmp_path / "latents.json"], "tokenizer": data["tokenizer"]}


def test_short_episodes_are_counted_in_one_line(data, capsys):
    make_source(replace(MIXED, clip_frames=10), data)
    assert capsys.readouterr().err.splitlines() == [
        "world model: tabletop: 3 of 5 episodes are too short for a clip of 10 frames and left out",
        "world model: bridge: 1 of 3 episodes are too short for a clip of 10 frames and left out",
    ]


@pytest.mark.parametrize("latents", ["cached", "on_the_fly"])
def test_unusable_data_is_named_before_the_first_step(data, tmp_path, latents):
    config = replace(MODEL, latents=latents)
    wrong = single(tmp_path, frames_of([6, 6], size=SIZE), data, actions=[np.zeros((5, 7)), np.zeros((5, 8))])
    nan = single(
        tmp_path / "nan", frames_of([6, 6], size=SIZE), data, actions=[np.zeros((5, 7)), np.full((5, 7), np.nan)]
    )
    for flags, message in (
        (wrong, r"000000001\.npz: actions of shape \(5, 8\) beside 6 frames"),
        (nan, r"000000001\.npz: actions\[0\] is not finite"),
    ):
        with pytest.raises(UserError, match=message):
            make_source(config, flags | ({} if latents == "cached" else {"latents": []}))
    live = {} if latents == "cached" else {"latents": []}
    with pytest.raises(UserError, match=r"clip_frames: 40 frames do not fit any of the 5 episodes of tabletop"):
        make_source(replace(MIXED, latents=latents, clip_frames=40), data | live)
    other = single(tmp_path / "other", frames_of([9], size=(24, 16)), data)
    both = {name: [data[name][0], other[name][0]] for name in ("episodes", "latents")} | live
    with pytest.raises(
        UserError, match=r"world_model\.data: frames of tabletop are 16x16 pixels, of bridge 24x16; resize"
    ):
        make_source(replace(MIXED, latents=latents), data | both)


def test_mixed_frame_sizes_within_a_store_are_named_on_the_fly(data, tmp_path):
    store = make_store(tmp_path, [*frames_of([5], size=SIZE), *frames_of([5], size=(24, 24))])
    flags = {"episodes": [store.root], "latents": [], "tokenizer": data["tokenizer"]}
    with pytest.raises(UserError, match=r"000000001\.mp4: frames of 24x24 pixels where .* 16x16"):
        make_source(replace(MODEL, latents="on_the_fly"), flags)


def test_caches_and_stores_that_do_not_belong_together_are_named(data, tmp_path):
    store = EpisodeStore(data["episodes"][1])
    foreign, plain = tmp_path / "foreign.json", tmp_path / "plain" / "latents.json"
    tokenizer = Cells()
    tokenizer.shape = lambda height, width: (2, 2, 4)
    tokenizer.encode = lambda images: np.zeros((len(images), 2, 2, 4), np.float32)
    cache.encode(store, tokenizer, foreign, mirror=True)
    cache.encode(store, load_tokenizer(data["tokenizer"]), plain, mirror=False)
    tabletop = data["latents"][0]
    for latents, message in (
        (data["latents"][::-1], r"latents\.json: was made from other episodes than"),
        ([tabletop, foreign], "the latents of tabletop and bridge come from two tokenizers"),
        ([tabletop, plain], "holds no mirrored latents, which world_model.mirror needs"),
        ([tabletop], r"world_model\.data: 2 data sets \(tabletop, bridge\), but 2 --episodes and 1 --latents"),
    ):
        with pytest.raises(UserError, match=message):
            make_source(MIXED, data | {"latents": latents})
    make_source(replace(MIXED, mirror=False), data | {"latents": [tabletop, plain]})


def test_what_only_the_lab_has_is_refused_for_others(data, tmp_path):
    with pytest.raises(UserError, match=r"contact_weight: .*tabletop/train has no object states; set it to 0"):
        make_source(replace(MIXED, contact_weight=1.0), data)
    for config in (MIXED, replace(MIXED, data="tabletop")):
        count = len(config.data.split(","))
        flags = data | {name: data[name][:count] for name in ("episodes", "latents")}
        with pytest.raises(
            UserError, match=r"own_frames\.share: own frames need one data set of equally long episodes"
        ):
            make_source(config, flags).equal_episodes()
    unknown = single(tmp_path, frames_of([6], size=SIZE), data, embodiment="widow")
    with pytest.raises(UserError, match=r"new/train: embodiment: 'widow' is unknown; did you mean 'widowx'"):
        make_source(MODEL, unknown)
    store = EpisodeStore(unknown["episodes"][0])
    store.table["embodiment"] = "widowx"
    twice = store.table.assign(control_hz=10.0)
    pd.concat([store.table, twice]).to_parquet(store.root / "episodes.parquet")
    with pytest.raises(
        UserError, match=r"embodiments \['widowx'\] at \[5\.0, 10\.0\] Hz cannot be mixed in one data set"
    ):
        make_source(replace(MODEL, latents="on_the_fly"), unknown | {"latents": []})


# ---- held-out replays ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("skip", "shown"), [(1, 9), (2, 5), (3, 3)])
def test_held_out_episodes_are_cut_to_the_length_that_half_of_them_have(data, skip, shown):
    config = replace(MIXED, frame_skip=skip)
    primary = open_training(config, data["episodes"], data["latents"], data["tokenizer"], ALONE)[0]
    held = open_held_out(primary, data["validation_episodes"], data["validation"], ALONE)
    episodes, frames = choose_episodes(held, 64)
    assert episodes.tolist() == [0, 2] and frames == shown  # of 9, 6 and 11 frames
    arrays, latents = read_held_out(held, config, 64)
    assert latents.shape == (2, shown, 2, 2, 4) and arrays.images.shape == (2, shown, *SIZE, 3)
    for row, episode in enumerate(episodes):
        np.testing.assert_array_equal(arrays.images[row], held.store.frames(episode)[: skip * shown : skip][:shown])
        recorded = held.store.arrays(episode)["actions"]
        for step in range(shown - 1):
            part = recorded[step * skip : (step + 1) * skip]
            np.testing.assert_allclose(arrays.actions[row, step], [*part[:, :6].sum(0), part[-1, 6]], atol=1e-6)
    assert choose_episodes(held, 1)[0].tolist() == [0]


# ---- the command line ------------------------------------------------------------------------------------------------


def train(monkeypatch, tmp_path, data, config, name="model"):
    """Train by the command line; the weights' path."""
    stage, out = tmp_path / "stage.json", tmp_path / name / "model.safetensors"
    stage.write_text(json.dumps({"seed": 0, "world_model": to_dict(config)}))
    live = config.latents == "on_the_fly"
    lists = {"episodes": data["episodes"], "latents": [] if live else data["latents"]}
    paths = {"validation": [] if live else [data["validation"]], "validation_episodes": [data["validation_episodes"]],
             "tokenizer": [data["tokenizer"]], "config": [stage], "out": [out], "state": [tmp_path / "state"]}  # fmt: skip
    words = [word for flag, values in (lists | paths).items()
             for word in (f"--{flag.replace('_', '-')}", *map(str, values))]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["world_model", *words])
    world_model.main()
    return out


@pytest.mark.parametrize("latents", ["cached", "on_the_fly"])
def test_a_mixture_is_trained_validated_and_resumed_bit_by_bit(data, tmp_path, monkeypatch, latents):
    config = replace(MIXED, latents=latents, frame_skip={"bridge": 2})
    out = train(monkeypatch, tmp_path, data, config)
    model = load_artefact(out.parent)
    assert [source.dataset for source in model.card.sources] == ["tabletop", "bridge"]
    rows = list(csv.DictReader((out.parent / "validation.csv").open()))
    assert [int(row["horizon"]) for row in rows] == list(range(1, 9))
    weights = out.read_bytes()
    for path in (tmp_path / "state").glob("step_*"):
        if int(path.stem.rpartition("_")[2]) > 2:  # as if killed soon after step 2
            path.unlink()
    out.unlink()
    assert train(monkeypatch, tmp_path, data, config).read_bytes() == weights


def test_data_sets_are_trained_on_by_name(data, tmp_path, monkeypatch):
    """What --dataset-dir and --subset-names find is what the long command line says, in the order of the names."""
    stage, out = tmp_path / "stage.json", tmp_path / "model" / "model.safetensors"
    config = replace(MIXED, data="", training=replace(MIXED.training, steps=1))
    stage.write_text(json.dumps({"seed": 0, "world_model": to_dict(config)}))
    folder = data["episodes"][0].parents[1]
    flags = {"config": stage, "tokenizer": data["tokenizer"], "out": out, "state": tmp_path / "state"}
    run_cli(monkeypatch, world_model, **flags, dataset_dir=folder, subset_names="bridge,tabletop")
    assert [source.dataset for source in read_card(out.parent).sources] == ["bridge", "tabletop"]
    with pytest.raises(UserError, match=r"data/violin' holds no episodes of the split train; expected"):
        world_model.find_subsets(Path("data"), "violin")
    with pytest.raises(SystemExit, match="2"):
        run_cli(monkeypatch, world_model, **flags, subset_names="bridge")


def test_artefacts_from_before_mixtures_stay_loadable(data, tmp_path, monkeypatch):
    out = train(monkeypatch, tmp_path, data, replace(MIXED, training=replace(MIXED.training, steps=1)))
    card = out.parent / "config.json"
    content = json.loads(card.read_text())
    del content["sources"]
    card.write_text(json.dumps(content))
    assert read_card(out.parent).sources == () and read_card(out.parent).steps("tabletop") == 1


def test_a_validation_split_that_cannot_be_replayed_is_named_before_training(data, tmp_path, monkeypatch):
    short = make_store(tmp_path / "short", frames_of([1, 1, 5], size=SIZE))
    out = tmp_path / "short.json"
    cache.encode(short, load_tokenizer(data["tokenizer"]), out, mirror=False)
    with pytest.raises(UserError, match=r"short: half of the episodes have 1 frames or fewer; too short to replay"):
        train(monkeypatch, tmp_path, data | {"validation": out, "validation_episodes": short.root}, MIXED)
    assert not (tmp_path / "state").exists()


def test_the_command_line_of_the_cache_reads_mirror_from_its_stage(data, tmp_path, monkeypatch):
    stage = tmp_path / "latents.json"
    stage.write_text(json.dumps({"seed": 0, "world_model": {"mirror": False}}))
    assert load_stage(stage).world_model.mirror is False
    out = tmp_path / "out" / "latents.json"
    run_cli(monkeypatch, cache, config=stage, episodes=data["episodes"][1], tokenizer=data["tokenizer"], out=out)
    assert not cache.load_latents(out).mirrored and cache.load_latents(out).lengths.tolist() == BRIDGE
