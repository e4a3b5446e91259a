"""Figures, contact sheet, gallery and notebook: they come out whole, show what the tables say, and play."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests import analysis_data as data
from workflow_src.analysis import comparisons, contact_sheet, figures, gallery, pairs, records, style, tables
from workflow_src.analysis.report import write_report
from workflow_src.analysis.study import open_study
from workflow_src.common.config import load_stage
from workflow_src.common.errors import UserError
from workflow_src.common.video import read_video

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with videos and tables: (folder, stage, files)."""
    folder = tmp_path_factory.mktemp("run")
    files = data.write_run(folder, data.judgements(per_task=3), videos=True)
    files["config"] = data.stage_file(folder)
    stage = load_stage(files["config"])
    study = open_study(stage, records.load_judgements(files["judgements"]))
    compared = tables.comparison_table(study)
    made = {"policy_ranking": comparisons.add_groups(tables.ranking(study), compared), "comparisons": compared,
            "per_task": tables.per_task(study), "agreement": tables.agreement_table(study),
            "prediction_powered": tables.prediction_powered_table(study), "variance": tables.variance_table(study),
            "judge": tables.judge_table(study.judgements, study.policies, study.tasks, 0.95)}  # fmt: skip
    for name, table in made.items():
        tables.write_csv(table, folder / "tables" / f"{name}.csv")
    return folder, stage, files


@pytest.fixture
def loaded(finished):
    """ranking, per_task, agreement as figures read them."""
    return [pd.read_csv(finished[0] / "tables" / f"{name}.csv") for name in ("policy_ranking", "per_task", "agreement")]


def call(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


# ---- figures --------------------------------------------------------------------------------------------------------


def test_figures_come_as_svg_and_png(finished, tmp_path, monkeypatch):
    folder, _, files = finished
    horizon = pd.DataFrame(
        {"horizon": [1, 2, 4], "psnr": [25.0, 24, 22], "ssim": [0.9, 0.88, 0.8], "psnr_frozen": 16.0}
    )
    horizon.to_csv(tmp_path / "validation.csv", index=False)
    names = {"ranking": "policy_ranking", "per-task": "per_task", "agreement": "agreement"}
    arguments = [part for flag, name in names.items() for part in (f"--{flag}", folder / "tables" / f"{name}.csv")]
    call(figures, monkeypatch, "--config", files["config"], *arguments, "--validation", tmp_path / "validation.csv",
         "--out-dir", tmp_path)  # fmt: skip
    for name in (*figures.RUN_FIGURES, "fidelity"):
        assert (tmp_path / f"{name}.svg").read_text().lstrip().startswith("<?xml")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 600


def test_scatter_names_every_policy_without_overlap(loaded):
    ranking, *_ = loaded
    figure = figures.scatter(*loaded)
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    names = set(ranking["policy"])
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts if text.get_text() in names]
    assert len(boxes) == len(names)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert figure.axes[0].bbox.x0 <= box.x0 and box.x1 <= figure.axes[0].bbox.x1


@pytest.mark.parametrize("side", ["real", "imagined"])
@pytest.mark.parametrize("name", figures.RUN_FIGURES)
def test_figures_without_one_side(loaded, name, side, tmp_path):
    ranking, per_task, agreement = loaded
    for table in (ranking, per_task):
        table[[column for column in table if f"_{side}" in column]] = np.nan
    style.save(figures.RUN_FIGURES[name](ranking, per_task, agreement.iloc[:0]), tmp_path, name)
    assert (tmp_path / f"{name}.png").stat().st_size > 0


def test_ranking_figure_shows_ranks_and_groups(loaded):
    ranking, *_ = loaded
    shown = [text.get_text() for text in figures.ranking_figure(*loaded).axes[0].texts]
    for column in ("rank_imagined", "rank_real", "group_imagined", "group_real"):
        expected = ranking[column].astype(str).tolist()
        assert any(shown[i : i + len(expected)] == expected for i in range(len(shown))), column


def test_cells_keep_their_intervals_while_they_are_few(loaded):
    """Each policy has one colour; where all are of one family, each its own."""
    ranking, per_task, agreement = loaded
    assert set(style.looks(ranking).values()) == {style.FAMILIES[name] for name in set(ranking["family"])}
    same = ranking.assign(family="trained")
    assert len({colour for colour, _ in style.looks(same).values()}) == len(ranking)
    lines = [len(figures.scatter(same, per_task, agreement).axes[0].collections)]
    many = pd.concat([per_task] * 4, ignore_index=True)
    lines.append(len(figures.scatter(same, many, agreement).axes[0].collections))
    assert lines[0] == lines[1] + 2 * len(ranking)  # upright and level intervals of the cells


def test_reliability_is_the_mean_real_success_of_cells_with_like_imagined_success(loaded):
    ranking, per_task, agreement = loaded
    table = per_task.iloc[:6].assign(
        success_imagined=[0.1, 0.1, 0.5, 0.5, 1.0, 0.9], success_real=[0, 0.2, 0.3, 0.5, 1, 1]
    )
    axes = figures.reliability(ranking, table, agreement).axes[0]
    (curve,) = [line for line in axes.lines if line.get_marker() == "o"]
    drawn = np.array(curve.get_data()).T
    np.testing.assert_allclose(drawn[~np.isnan(drawn[:, 0])], [(0.1, 0.1), (0.5, 0.4), (0.95, 1.0)])
    assert [text.get_text() for text in axes.texts] == ["2", "2", "2"]


def test_same_tables_same_bytes(loaded, tmp_path):
    for folder in ("a", "b"):
        style.save(figures.ranking_figure(*loaded), tmp_path / folder, "ranking")
    for suffix in ("svg", "png"):
        assert (tmp_path / f"a/ranking.{suffix}").read_bytes() == (tmp_path / f"b/ranking.{suffix}").read_bytes()


def test_a_table_that_lacks_columns_is_named(tmp_path):
    (tmp_path / "ranking.csv").write_text("policy\nlate\n")
    with pytest.raises(UserError, match=r"ranking\.csv: has no column family"):
        style.read_table(tmp_path / "ranking.csv", ["policy", "family"])


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_pairs_join_both_worlds(finished):
    _, stage, files = finished
    found = pairs.load_pairs(stage, files["rollouts"], files["judgements"])
    assert len(found) == len(data.POLICIES) * len(data.TASKS) * 3
    truth = records.load_judgements(files["judgements"]).query("judge == 'truth'").set_index(["policy", "trial_id"])
    for pair in found:
        assert pair.real == bool(truth.loc[(pair.policy, pair.trial_id), "success_at_end"])
        assert "/world_model/" in pair.imagined_video and "/lab/" in pair.real_video
    frames = found[0].frames(48)
    assert frames.shape == (4, 48, 48 * 2 + pairs.GAP, 3) and frames.dtype == np.uint8
    left, right = frames[:, 2:5, :40].mean(), frames[:, 2:5, -40:].mean()
    assert left == pytest.approx(120, abs=3) and right == pytest.approx(200, abs=3)  # imagined left, real right


def test_a_shorter_rollout_holds_its_last_frame(finished, tmp_path):
    _, stage, files = finished
    pair = pairs.load_pairs(stage, files["rollouts"], files["judgements"])[0]
    short = tmp_path / "short.mp4"
    gallery.write_video(short, read_video(pair.real_video)[:2], 5)
    frames = pairs.Pair(**{**pair.__dict__, "real_video": str(short)}).frames(16)
    assert len(frames) == 4 and (frames[3, :, -16:] == frames[1, :, -16:]).all()


def test_spread_shows_rare_outcomes(finished):
    _, stage, files = finished
    found = pairs.load_pairs(stage, files["rollouts"], files["judgements"])
    for policy in data.POLICIES:
        mine = [pair for pair in found if pair.policy == policy]
        groups = {(pair.outcome, pair.task) for pair in mine}
        assert {(p.outcome, p.task) for p in pairs.spread(mine, len(groups))} == groups
        assert len(pairs.spread(mine, 2)) == 2 and pairs.spread(mine, 99) == mine


# ---- contact sheet and gallery --------------------------------------------------------------------------------------


def test_contact_sheet_and_gifs(finished, tmp_path, monkeypatch):
    _, stage, files = finished
    (tmp_path / "rollout_gone_success.gif").touch()
    call(contact_sheet, monkeypatch, "--config", files["config"], "--rollouts", *files["rollouts"], "--judgements",
         *files["judgements"], "--out-dir", tmp_path)  # fmt: skip
    with Image.open(tmp_path / "rollouts.gif") as image:
        assert image.n_frames == 4 and image.info["duration"] == 200 and image.info["loop"] == 0
    assert Image.open(tmp_path / "contact_sheet.png").width > 600
    chosen = contact_sheet.choose(pairs.load_pairs(stage, files["rollouts"], files["judgements"]))
    assert {f"rollout_{policy}_{kind}.gif" for policy, kind, pair in chosen if pair} == {
        path.name for path in tmp_path.glob("rollout_*.gif")
    }
    for policy, kind, pair in chosen:
        assert pair is None or (pair.policy == policy and pair.outcome in contact_sheet.KINDS[kind])


def test_gallery_carries_playable_media(finished, tmp_path, monkeypatch):
    _, _, files = finished
    monkeypatch.setattr(gallery, "BUDGET", 12)
    out = tmp_path / "gallery" / "index.html"
    call(gallery, monkeypatch, "--config", files["config"], "--rollouts", *files["rollouts"], "--judgements",
         *files["judgements"], "--out", out)  # fmt: skip
    text = out.read_text()
    assert not re.search(r"""(src|href)=["']?http""", text)  # works offline
    shown = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S).group(1))
    assert len(shown["cards"]) == 12 and set(shown["policy"]) == set(data.POLICIES)
    card = shown["cards"][0]
    video = tmp_path / "copy.mp4"
    video.write_bytes(b64decode(card["video"].split(",", 1)[1]))
    assert read_video(video).shape == (4 + gallery.HOLD, card["height"], card["width"], 3)
    poster = Image.open(io.BytesIO(b64decode(card["poster"].split(",", 1)[1])))
    assert poster.size == (card["width"], card["height"])
    import av

    with av.open(str(video)) as container:
        assert container.streams.video[0].pix_fmt == "yuv420p"  # what browsers play


@pytest.mark.requires("chromium")
def test_gallery_plays_and_filters_in_a_browser(finished, tmp_path, monkeypatch):
    _, stage, files = finished
    monkeypatch.setattr(gallery, "BUDGET", 12)
    # Headless time runs ahead of the video decoder, so the probe asks again and keeps the machine busy in between.
    probe = """<script>
      let asked = 0;
      const ask = () => {
        const videos = [...document.querySelectorAll("figure:not([hidden]) video")];
        const state = {shown: videos.length, playing: videos.filter(v => !v.paused && v.readyState > 1).length,
          broken: videos.filter(v => v.error).length, policies: [...new Set(videos.map(v => v.card.policy))]};
        document.title = JSON.stringify(state);
        for (let i = 0, x = 1; i < 3e7; i++) x = x * 1.000001 % 7;
        if (state.playing < state.shown && asked++ < 200) setTimeout(ask, 50);
      };
      setTimeout(ask, 1000)</script></body>"""
    text = gallery.page(pairs.load_pairs(stage, files["rollouts"], files["judgements"]))
    (tmp_path / "probe.html").write_text(text.replace("</body>", probe))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,900", "--virtual-time-budget=20000",
               "--dump-dom", f"file://{tmp_path / 'probe.html'}#policy=late"]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    state = json.loads(re.search(r"<title>(.*?)</title>", page, re.S).group(1))
    assert state == {"shown": 2, "playing": 2, "broken": 0, "policies": ["late"]}


# ---- notebook -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_is_stripped_and_names_its_kernel(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert code[0].metadata.tags == ["parameters"]


def execute(name: str, tables: Path) -> dict:
    """The names that a notebook leaves behind, and what it displayed under "displayed"."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    names = {"tables": str(tables), "displayed": []}
    names["display"] = names["displayed"].append
    for source in code[1:]:
        exec(compile(source.replace("%matplotlib inline", ""), "notebook", "exec"), names)
    return names


@pytest.mark.parametrize("name", ["worldgym", "openvla_google"])
def test_report_notebook_runs_on_the_tables_alone(name, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw_all", lambda *arguments: None)
    write_report(ROOT / "config" / "published" / f"{name}.csv", tmp_path, 0.95, 0)
    names = execute("agreement", tmp_path)
    first, second = names["displayed"]
    assert first.index.name.endswith("all policies") and second.index.name.endswith("policy x task cells")
    if name == "worldgym":
        assert second.loc["pearson", "observed"].startswith("0.785") and len(names["hidden"].dropna()) > 5


def test_notebook_runs_on_the_tables_alone(finished, monkeypatch):
    folder, _, _ = finished
    monkeypatch.chdir(folder)
    names = execute("policy_ranking", folder / "tables")
    assert set(names["references"]) <= set(names["agreement"]["statistic"])
    assert len(names["shown"]) == len(data.POLICIES)
