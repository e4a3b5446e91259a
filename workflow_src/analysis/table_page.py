"""One page with the result tables: sorted by a click on a column, searched, and explained by the report's own captions."""

from __future__ import annotations

import argparse
import html
from pathlib import Path
from string import Template

import pandas as pd
from docutils.core import publish_parts
from itables import JavascriptFunction, to_html_datatable
from itables.javascript import generate_init_offline_itables_html
from itables.utils import find_package_file

from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import write_text

EXAMPLES = """examples:
  python -m workflow_src.analysis.table_page --tables results/tables/*.csv --captions config/report/*.rst --out tables.html
"""
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Rehearsal: tables</title>
<style>
  :root { color-scheme: light dark; }
  body { margin: 0 auto; max-width: 1320px; padding: 20px; font: 15px/1.45 system-ui, sans-serif; }
  section { padding-top: 10px; overflow-x: auto; }
  section > div > p { max-width: 90ch; }
  .literal { font-family: ui-monospace, monospace; font-size: 0.92em; }
  table { font-variant-numeric: tabular-nums; }
</style>
$library
</head>
<body>
<h1>Tables</h1>
<p>$links</p>
$sections
</body>
</html>
""")
DASH = """function (value, use) {
  return use === "display" && ["", "<NA>", "NaN", null].includes(value) ? "–" : value;
}"""
ROWS = 25  # shown at a time
DIGITS = 3  # after the point: more than the rollouts can tell apart


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", type=Path, nargs="+", required=True, help="CSV files, in the order of the page")
    parser.add_argument("--captions", type=Path, nargs="+", required=True, help="<name of a table>.rst, of every table")
    parser.add_argument("--out", type=Path, required=True, help="HTML page to write; it needs no network")
    options = parser.parse_args()
    write_text(options.out, page(options.tables, options.captions))


def page(tables: list[Path], captions: list[Path]) -> str:
    """The page as HTML. Raise UserError for a table that is missing or empty of columns."""
    names = [table.stem for table in tables]
    texts = {caption.stem: caption for caption in captions}
    if silent := [name for name in names if name not in texts]:
        raise UserError(f"--captions: none for {', '.join(silent)}; add a file {silent[0]}.rst")
    return PAGE.substitute(
        library=generate_init_offline_itables_html(find_package_file("html", "dt_bundle.js")),
        links=" · ".join(f'<a href="#{name}">{_title(name)}</a>' for name in names),
        sections="\n".join(_section(table, texts[table.stem]) for table in tables),
    )


def _section(path: Path, caption: Path) -> str:
    try:
        table = pd.read_csv(path).convert_dtypes()
    except (OSError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path}: {error}") from None
    text = publish_parts(caption.read_text(encoding="utf-8"), writer="html5")["body"]
    shown = to_html_datatable(
        table.round(DIGITS), connected=False, showIndex=False, pageLength=ROWS, allow_html=False, order=[],
        table_id=f"table_{path.stem}", classes="display compact nowrap", style="float:left", maxBytes=0,
        columnDefs=[{"targets": "_all", "render": JavascriptFunction(DASH)}],
    )  # fmt: skip
    return f'<section id="{path.stem}"><h2>{_title(path.stem)}</h2><div>{text}</div>{shown}</section>'


def _title(name: str) -> str:
    return html.escape(name.replace("_", " ").capitalize())


if __name__ == "__main__":
    run_cli(main)
