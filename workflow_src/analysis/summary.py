"""The last lines of a run: ranking with intervals, agreement, accuracy of the judge, time per stage, where to look."""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from pathlib import Path

from workflow_src.common.errors import UserError, run_cli

# What a person would open, in this order; only what exists is shown.
PLACES = {
    "ranking": "tables/policy_ranking.csv",
    "agreement": "tables/agreement.csv",
    "figure": "figures/real_vs_imagined.png",
    "imagined rollouts": "figures/rollouts.gif",
    "contact sheet": "figures/contact_sheet.png",
    "failure optimism": "tables/failure_optimism.csv",
    "gallery": "gallery/index.html",
    "notebook": "notebooks/policy_ranking.html",
    "world model": "world_model",
}
BAR = 20
SCOPES = ("all policies", "trained policies", "policy x task cells")


def ranking_lines(rows: list[dict[str, str]]) -> list[str]:
    """A line per policy: rank, name, bar, imagined and real success with intervals."""
    real = any(row["success_real"] for row in rows)
    width = max(len("policy"), *(len(row["policy"]) for row in rows))
    head = f"  rank  {'policy':<{width}}  {'imagined success':<{BAR + 20}}"
    lines = [head + ("  real success         rank" if real else "")]
    for row in rows:
        bar = "█" * round(float(row["success_imagined"]) * BAR)
        line = f"  {row['rank_imagined']:>4}  {row['policy']:<{width}}  {bar:·<{BAR}} {_rate(row, 'imagined')}"
        lines.append(line + (f"  {_rate(row, 'real')}  {row['rank_real']:>4}" if row["success_real"] else ""))
    lines.append(f"  n = {rows[0]['n_imagined']} rollouts per policy; Wilson intervals; judge: {rows[0]['judge']}; "
                 f"corrected success: {rows[0]['corrected_note'] or 'see the table'}")  # fmt: skip
    return lines


def _rate(row: dict[str, str], side: str) -> str:
    value, low, high = (float(row[f"success_{side}{end}"]) for end in ("", "_low", "_high"))
    return f"{value:.2f}  [{low:.2f}, {high:.2f}]"


def agreement_lines(rows: list[dict[str, str]]) -> list[str]:
    """A line per scope with Pearson, Spearman, MMRV, MAE and bias."""
    lines = []
    for scope in SCOPES:
        found = {row["statistic"]: row for row in rows if row["scope"] == scope}
        if "pearson" not in found:
            continue
        n = found["pearson"]["n"]
        numbers = "  ".join([
            f"Pearson {_with_interval(found['pearson'])}", f"Spearman {_number(found['spearman'], 2)}",
            f"MMRV {_number(found['mmrv'], 3)}", f"MAE {_number(found['mae'], 2)}",
            f"bias {_number(found['bias'], 2, '+')}",
        ])  # fmt: skip
        lines.append(f"  {f'{n} {scope}':<24} {numbers}")
    single = {row["statistic"]: row for row in rows if row["scope"] == "trials"}
    if single:
        n, chance, kappa = single["agreement"]["n"], single["agreement_by_chance"], single["kappa"]
        lines.append(
            f"  {f'{n} single rollouts':<24} end alike {_with_interval(single['agreement'])}  "
            f"by chance {_number(chance, 2)}  kappa {_number(kappa, 2)}"
        )
    return lines or ["  no real results to compare with"]


def _number(row: dict[str, str], digits: int, sign: str = "") -> str:
    return f"{float(row['value']):{sign}.{digits}f}" if row["value"] else "undefined"


def _with_interval(row: dict[str, str]) -> str:
    interval = f" [{float(row['low']):.2f}, {float(row['high']):.2f}]" if row["low"] else ""
    return _number(row, 2) + interval


def judge_lines(rows: list[dict[str, str]]) -> list[str]:
    """A line per judge: accuracy, sensitivity and specificity on the ranked policies' lab videos."""
    lines = []
    for row in rows:
        if (row["policy"], row["task"]) == ("all", "all"):
            parts = [f"{name} {_share(row[name])}" for name in ("accuracy", "sensitivity", "specificity")]
            lines.append(f"  {row['judge']:<24} {'  '.join(parts)}  ({row['n_accuracy']} lab videos)")
    return lines or ["  no lab videos with known truth"]


def _share(text: str) -> str:
    return f"{float(text):.3f}" if text else "undefined"


# ---- time -----------------------------------------------------------------------------------------------------------


def stage_seconds(folder: Path) -> dict[str, tuple[float, int]]:
    """Rule → (seconds summed over its jobs, number of jobs), from Snakemake's benchmark files, oldest first."""
    files = sorted((f for f in folder.rglob("*") if f.suffix in (".jsonl", ".tsv")), key=lambda f: f.stat().st_mtime)
    stages: dict[str, tuple[float, int]] = {}
    for file in files:
        seconds = benchmark_seconds(file)
        if not math.isnan(seconds):
            rule = file.relative_to(folder).parts[0].removesuffix(file.suffix)
            total, jobs = stages.get(rule, (0.0, 0))
            stages[rule] = (total + seconds, jobs + 1)
    return stages


def benchmark_seconds(file: Path) -> float:
    """Wall seconds of the last repetition in a benchmark file; NaN for one that was cut off."""
    text = file.read_text(encoding="utf-8").strip()
    try:
        if file.suffix == ".jsonl":
            return float(json.loads(text.splitlines()[-1])["s"])
        return float(list(csv.DictReader(text.splitlines(), delimiter="\t"))[-1]["s"])
    except (IndexError, KeyError, TypeError, ValueError):
        return math.nan


def time_lines(stages: dict[str, tuple[float, int]], seconds: float | None) -> list[str]:
    """A line per stage, their sum, and the wall time where known (less than the sum where jobs ran side by side)."""
    lines = [f"  {rule:<24} {seconds:8.1f} s" + (f"  ({jobs} jobs)" if jobs > 1 else "")
             for rule, (seconds, jobs) in stages.items()]  # fmt: skip
    if not lines:
        return ["  no benchmark files"]
    lines.append(f"  {'sum of all jobs':<24} {sum(spent for spent, _ in stages.values()):8.1f} s")
    return lines if seconds is None else [*lines, f"  {'this run, wall time':<24} {seconds:8.1f} s"]


# ---- putting it together --------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, str]]:
    """A CSV as dictionaries of text. Raises `UserError` when it is not there."""
    try:
        with open(path, newline="", encoding="utf-8") as handle:
            return list(csv.DictReader(handle))
    except FileNotFoundError:
        raise UserError(f"{path}: no such table; run `make ranking`") from None


def summary(results: Path, seconds: float | None = None) -> str:
    """The whole text; `seconds` is the wall time of the run that just ended."""
    tables = results / "tables"
    ranking = read_rows(tables / "policy_ranking.csv")
    if not ranking:
        raise UserError(f"{tables / 'policy_ranking.csv'}: holds no policy; delete it and run again")
    places = [(name, place) for name, place in PLACES.items() if (results / place).exists()]
    parts = [
        ("Policy ranking", ranking_lines(ranking)),
        ("Agreement with reality", agreement_lines(read_rows(tables / "agreement.csv"))),
        ("Judges on lab videos", judge_lines(read_rows(tables / "judge.csv"))),
        ("Time per stage", time_lines(stage_seconds(results / "benchmarks"), seconds)),
        ("Where to look", [f"  {name:<24} {results / place}" for name, place in places]),
    ]  # fmt: skip
    return "\n\n".join("\n".join([title, *lines]) for title, lines in parts)


def print_summary(results: Path, seconds: float | None = None) -> None:
    """Print the summary of the run in `results`. A terminal that cannot show the bars still gets the numbers."""
    coding = sys.stdout.encoding or "utf-8"
    print("\n" + summary(results, seconds).encode(coding, "replace").decode(coding))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Print the summary of a finished run.",
        epilog="example:\n  python -m workflow_src.analysis.summary --results results",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="results folder (default: %(default)s)")
    print_summary(parser.parse_args().results)


if __name__ == "__main__":
    run_cli(main)
