"""Gather trials from somebody's own pictures, public lists of first frames, and stores of episodes.

Pictures lie in `<trials.root>/<task>/`. What the robot is asked stands in a json beside each (WorldGym's layout), or in the
suite that has the task. See config/trials/README.md.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from workflow_src.common.config import Stage, load_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import say
from workflow_src.common.seeds import derive, rng
from workflow_src.rollouts import suites
from workflow_src.rollouts.first_frames import read_listing
from workflow_src.rollouts.pictures import fit, read_picture
from workflow_src.rollouts.suites import LIST, PICTURES, Task
from workflow_src.rollouts.trials import LISTING, Trial, odd_sizes, read_fields, save, write_listing

STAND_IN = "stand-in: "


class Gatherer:
    """Makes the trials of one stage. Mistakes are collected, so that all are reported at once."""

    def __init__(self, stage: Stage, listings: dict[str, Path]):
        self.trials, self.lab, self.seed, self.listings = stage.trials, stage.lab, stage.seed, listings
        self.asked = suites.tasks_of(self.trials.suites)
        self.problems: list[str] = []

    def all(self) -> Iterator[Trial]:
        """Every trial of every task that frames can be had of; without a lab, of the tasks in `lab.tasks` alone."""
        for task, (kind, shown) in suites.origins(self.trials).items():
            if self.lab.scene == "none" and self.lab.tasks and task not in self.lab.tasks:
                continue
            entry = self.asked.get(task)
            if kind == PICTURES:
                yield from self._own(task, shown, entry)
            elif kind == LIST:
                yield from self._listed(task, shown, entry)
            else:
                yield from self._stored(task, shown, entry)

    def _own(self, task: str, shown: str, entry: Task | None) -> Iterator[Trial]:
        folder = Path(self.trials.root) / shown
        stems = defaultdict(list)
        for path in suites.pictures(self.trials.root, shown):
            stems[path.stem].append(path)
        texts = {path.stem for path in folder.glob("*.json") if path.name[0] != "."}
        for stem in sorted(texts | stems.keys()):
            try:
                if len(stems[stem]) != 1:
                    many = " and ".join(path.name for path in stems[stem]) or f"{stem}.png"
                    raise UserError(
                        f"{folder / many} " + ("are two pictures of one name" if stems[stem] else "is missing")
                    )
                path = stems[stem][0]
                text = folder / f"{stem}.json"
                if stem not in texts and entry is None:
                    raise UserError(f"{text} is missing")
                # With words of its own, a task that shows another's pictures does not take theirs.
                fields = read_fields(text) if stem in texts and shown == task else {}
                if not fields:
                    fields = self._described(path, stem, entry)
                if shown != task:
                    fields["source"] = f"{STAND_IN}{shown}/{path.name}"
                yield self._trial(task, stem, read_picture(path), fields)
            except UserError as error:
                self.problems.append(str(error))

    def _described(self, path: Path, stem: str, entry: Task) -> dict[str, str]:
        """Instruction and rubric of a picture, as the suite has them."""
        fitting = [variant for prefix, variant in entry.asked().items() if stem.startswith(prefix)]
        if not fitting:
            raise UserError(
                f"{path}: its name must begin with one of {', '.join(entry.variants)}, to say what is asked"
            )
        return {"instruction": fitting[0].instruction, "partial_credit_criteria": entry.partial_credit_criteria or None}

    def _listed(self, task: str, shown: str, entry: Task) -> Iterator[Trial]:
        """First frames of a public list; its own instructions, unless another task's frames are shown."""
        listing = self.listings.get(shown)
        if listing is None:
            raise UserError(
                f"trials.suites: the first frames of {shown} were not fetched; give their listing by --frames"
            )
        for frame in read_listing(listing):
            path = listing.parent / frame["file"]
            fields = dict(frame)
            if shown != task:
                fields |= self._described(path, Path(frame["file"]).stem, entry)
                fields["source"] = f"{STAND_IN}{shown}, {frame['source']}"
            yield self._trial(task, path.stem, read_picture(path), fields)

    def _stored(self, task: str, shown: str, entry: Task | None) -> Iterator[Trial]:
        """`trials.per_task` first frames of episodes that fit, drawn evenly over the task's variants."""
        from workflow_src.episodes.store import EpisodeStore

        table, store = suites.read_instructions(self.trials.store), EpisodeStore(self.trials.store)
        members = suites.store_tasks(table, self.asked)[shown]
        name = Path(self.trials.store).name
        for prefix, count in suites.drawn(members, self.trials.per_task).items():
            rows = members[prefix]
            chosen = rng(self.seed, "store", task, prefix).permutation(len(rows))[:count]
            for row in sorted(rows[i] for i in chosen):
                index = int(table["index"][row])
                stem = f"{prefix}_{index:06d}".strip("_")
                fields = {"instruction": table["instruction"][row], "source": f"{name}, episode {index}"}
                if entry is not None:
                    fields |= self._described(Path(name, stem), stem, entry)
                    fields["source"] = STAND_IN + fields["source"]
                elif self.lab.scene != "none" and table["embodiment"][row] == self.lab.embodiment:
                    fields["initial_state"] = self._state(store, row)
                yield self._trial(task, stem, store.read(row, [0])[0], fields)

    @staticmethod
    def _state(store, row: int) -> list[float] | None:
        """What the lab's `reset` puts the scene into, where the store has it."""
        state = store.arrays(row).get("state")
        return None if state is None else [float(number) for number in state[0]]

    def _trial(self, task: str, stem: str, image, fields: dict) -> Trial:
        trial_id = f"{task}/{stem}"
        return Trial(
            trial_id=trial_id, task=fields.get("task") or task, instruction=fields["instruction"],
            image=fit(image, self.lab.image_size, self.trials.fit), initial_state=fields.get("initial_state"),
            seed=fields.get("seed", derive(0, "trial", trial_id)),
            partial_credit_criteria=fields.get("partial_credit_criteria"), source=fields.get("source"),
        )  # fmt: skip


def gather(stage: Stage, root: Path, listings: dict[str, Path]) -> int:
    """Write all trials of `stage` and their listing into `root`; how many. Raises `UserError` with every broken one."""
    if stage.trials.root and not Path(stage.trials.root).is_dir() and not (stage.trials.suites or stage.trials.store):
        raise UserError(f"{stage.trials.root}: no such folder of trials")
    maker, entries, sizes = Gatherer(stage, listings), [], []
    for trial in maker.all():
        entries.append(save(trial, root))
        sizes.append((trial.trial_id, trial.image.shape[:2]))
    where = Path(stage.trials.root or stage.trials.store or root)
    problems = maker.problems + odd_sizes(where, sizes)
    if problems:
        raise UserError(f"{where}: {len(problems)} broken trial(s): " + "; ".join(problems))
    if not entries:
        raise UserError(f"{where}: holds no trial; expected <task>/<name>.png with <task>/<name>.json")
    write_listing(entries, root / LISTING)
    return len(entries)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.rollouts.gather",
        description="Gather trials from pictures, public lists of first frames and episode stores.",
        epilog="examples:\n  python -m workflow_src.rollouts.gather --config results/config/trials.json \\\n"
        "      --frames results/downloads/first_frames/put_carrot_on_plate/frames.json --out results/trials/trials.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="stage file with seed, lab, trials")
    parser.add_argument(
        "--frames", type=Path, nargs="*", default=[], help="listings of fetched frames, <task>/frames.json"
    )
    parser.add_argument("--out", type=Path, required=True, help=f"listing to write, {LISTING}; the pairs go beside it")
    options = parser.parse_args()
    die_with_parent()
    if options.out.name != LISTING:
        raise UserError(f"--out: {options.out} is not called {LISTING}")
    # An old listing must not vouch for new files while they are being written.
    options.out.unlink(missing_ok=True)
    count = gather(load_stage(options.config), options.out.parent, {path.parent.name: path for path in options.frames})
    say(f"{options.out}: {count} trials")


if __name__ == "__main__":
    run_cli(main)
