"""What people look at: the page of tables, and Snakemake's report with its landing page, in a real browser."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from tests.browser import chromium
from tests.chain import run
from workflow_src.analysis import table_page
from workflow_src.common.errors import UserError

CLICK = "[...document.querySelectorAll('a')].find(link => link.innerText.trim() === {!r}).click()"
COLUMN = "[...document.querySelectorAll('#table_rates tbody tr')].map(row => row.cells[{}]?.innerText)"


@pytest.fixture
def rates(tmp_path) -> tuple[Path, Path]:
    """A table and its caption."""
    (tmp_path / "rates.csv").write_text("policy,success\ngood,0.87654\n<b>bad</b>,0.1\nunknown,\n")
    (tmp_path / "rates.rst").write_text("``success`` is a share.\n")
    return tmp_path / "rates.csv", tmp_path / "rates.rst"


@pytest.mark.requires("chromium")
def test_tables_are_explained_sorted_and_searched(rates, tmp_path, monkeypatch):
    table, caption = map(str, rates)
    out = tmp_path / "tables.html"
    monkeypatch.setattr(sys, "argv", ["table_page", "--tables", table, "--captions", caption, "--out", str(out)])
    table_page.main()
    with chromium(tmp_path) as page:
        page.open(f"file://{out}")
        page.wait(f"({COLUMN.format(1)}).length === 3")
        assert page.value(COLUMN.format(1)) == ["0.877", "0.1", "–"]  # as in the file
        assert page.value(COLUMN.format(0)) == ["good", "<b>bad</b>", "unknown"]
        assert "success is a share." in page.value("document.body.innerText")
        page.value("document.querySelectorAll('.dt-column-order')[1].click()")
        page.wait(f"({COLUMN.format(1)}).join() === '–,0.1,0.877'")


def test_a_table_without_caption_or_content_is_named(rates, tmp_path):
    table, caption = rates
    with pytest.raises(UserError, match=r"--captions: none for rates; add a file rates\.rst"):
        table_page.page([table], [])
    table.write_text("")
    with pytest.raises(UserError, match=r"rates\.csv: No columns"):
        table_page.page([table], [caption])


@pytest.mark.requires("chromium")
def test_the_report_says_where_to_begin_and_shows_everything(finished, tmp_path):
    run(finished, "--report", str(tmp_path / "report.zip"))
    with zipfile.ZipFile(tmp_path / "report.zip") as archive:
        archive.extractall(tmp_path)
    with chromium(tmp_path) as page:
        page.open(f"file://{tmp_path / 'report' / 'report.html'}")
        page.wait("document.body.innerText.includes('Where to start')")
        assert "This run: seed 5, 3 policies." in page.value("document.body.innerText")
        page.value(CLICK.format("Ranking"))
        page.wait("document.body.innerText.includes('all tables, to sort and search')")
        shown = page.value("document.body.innerText")
        for result in (
            "policies, best first",
            "policies by task",
            "which policies differ",
            "checkpoints of a training",
        ):
            assert result in shown, result
    pages = [path.read_text() for path in (tmp_path / "report" / "data").rglob("*.html")]
    assert any("Rollouts, imagined beside real" in text and "data:video/mp4" in text for text in pages)
