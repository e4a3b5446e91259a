"""Mistakes that show while Snakemake builds its graph: each ends it with one line, before any job and any lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from workflow_src.common.errors import UserError
from workflow_src.common.progress import say


def or_end(function: Callable, *arguments: Any) -> Any:
    """What `function` returns; a mistake that it finds ends Snakemake."""
    try:
        return function(*arguments)
    except UserError as error:
        end(error)


def end(error: UserError) -> None:
    """Snakemake turns any exception into a traceback; a plain exit is the one line that was promised."""
    say(f"error: {error}")
    os._exit(2)


def nothing_to_rank(wildcards: Any) -> None:
    """The input of rules that need rollouts. Snakemake asks while it builds its graph, before any job and any lock."""
    end(UserError("policies: is empty, so there is nothing to roll out and to rank; name at least one policy"))


def nothing_to_judge_by(wildcards: Any) -> None:
    """The input of rules that need judgements, where only judges are configured that learn from a lab's episodes."""
    end(UserError(
        "judges.primary: the learned judges need a lab's episodes, and lab.scene is none; configure one of judges.vlm or "
        "human labels"
    ))  # fmt: skip


def nothing_to_record(wildcards: Any) -> None:
    """The input of the rule that records episodes."""
    end(UserError(
        "lab.scene: is none, so there is no lab to record episodes in, which a tokenizer, a world model or a judge would "
        "learn from; roll out (target `rollouts`), or choose a scene"
    ))  # fmt: skip


def nothing_to_publish(wildcards: Any) -> None:
    """The input of the rule that sends results to a bucket."""
    end(UserError("publish.to: is empty, so there is nowhere to send results to; write s3://bucket/folder"))


def nothing_to_fetch(wildcards: Any) -> None:
    """The input of the rule that fetches and converts registered data sets."""
    end(UserError(
        "world_model.data: names no registered data set besides those in episodes.stores, so there is nothing to fetch; "
        "name one there, or by --config dataset=NAME"
    ))  # fmt: skip
