"""What comes beside the trials: the unmerged MLLM, the default recipe, and the winner, measured."""

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from drift_merge.engine.job import RunOptions
from drift_merge.errors import DriftMergeError, EvaluationError
from drift_merge.evaluation.command import ALL
from drift_merge.merges.make import make_merge
from drift_merge.merges.manifest import MANIFEST, open_merge
from drift_merge.recipes.files import absolute
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.values import to_values
from drift_merge.recipes.yaml import write_mapping
from drift_merge.searches.request import FINAL, VALIDATION, Search
from drift_merge.searches.results import (
    KIND,
    RECIPE_FILE,
    RESULT,
    SCHEMA,
    as_data,
    comparisons,
    describe_trials,
    importance,
    items_of,
)
from drift_merge.searches.selection import choose
from drift_merge.searches.study import Study
from drift_merge.searches.targets import Sources, Targets
from drift_merge.storage.copying import write_file
from drift_merge.storage.manifests import describe_tool, to_json

MLLM, DEFAULT, BEST = "mllm", "default", "best"
OUTPUT = "output"  # the note on the best merge that was made, or is being made
_SHOWN = {MLLM: "the unmerged MLLM", DEFAULT: "the default recipe", BEST: "the best merge"}


class Finish:
    """What a search measures once, and its result."""

    def __init__(
        self,
        search: Search,
        study: Study,
        targets: Targets,
        sources: Sources,
        options: RunOptions,
    ) -> None:
        self._search, self._study, self._targets = search, study, targets
        self._sources, self._options = sources, options

    def measured(self, role: str, split: str, number: int = -1) -> dict[str, Any] | None:
        """An evaluation that is made once for a study.

        Args:
            role: MLLM, DEFAULT or BEST.
            split: VALIDATION or FINAL.
            number: of the trial that is the best.

        Returns:
            Values and items, or an error; None where there is nothing to evaluate.

        Raises:
            DriftMergeError: the unmerged MLLM cannot be evaluated: nothing else could be.
        """
        search = self._search
        has_none = role == DEFAULT and search.recipe is None
        if has_none or (split == FINAL and search.final is None):
            return None
        key = f"{split} {role}" + (f" {number}" if role == BEST else "")
        if key in self._study.notes:
            kept: dict[str, Any] = self._study.notes[key]
            return kept
        search.say(f"Evaluating {_SHOWN[role]}" + (" with --final" if split == FINAL else ""))
        limit = search.settings.rungs[-1] if split == VALIDATION and search.settings.rungs else ALL
        started = time.monotonic()
        try:
            with self._target(role, number) as target:
                scores = search.scores(split, target, limit, f"{split}-{role}")
            result = as_data(scores, time.monotonic() - started)
        except Exception as error:
            if role == MLLM:
                raise
            return {"error": told(error)}  # not kept: the next run tries again
        self._study.keep(key, result)
        return result

    @contextmanager
    def _target(self, role: str, number: int) -> Iterator[Any]:
        search = self._search
        lowest = search.space.recipe(search.space.corners()[0])
        if role == BEST and search.out is not None:
            yield search.out
        elif role == MLLM:
            with self._targets.unmerged(search.recipe or lowest) as target:
                yield target
        else:
            recipe = search.recipe if role == DEFAULT else self._recipe_of(number)
            with self._targets.made(recipe or lowest, role) as target:
                yield target

    def _recipe_of(self, number: int) -> Recipe:
        trial = next(t for t in self._study.trials() if t.number == number)
        return self._search.space.recipe(trial.params)

    def finish(self) -> dict[str, Any]:
        """Choose the winner, make it whole, measure it, and write `search.json`.

        Raises:
            EvaluationError: no trial has ended with values; `search.json` says what became of each.
        """
        search, study = self._search, self._study
        trials = describe_trials(study, search.metrics)
        ended = {t.number: t.values for t in study.trials() if t.state.name == "COMPLETE"}
        if not ended:
            self._write(trials, None, [], {MLLM: self.measured(MLLM, VALIDATION) or {}}, {})
            raise _nothing_ended(trials, search.folder if search.out else None)
        best, front = choose(ended, search.settings.goals)
        self._make(best)
        winner = next(t for t in study.trials() if t.number == best)
        validation = {role: self.measured(role, VALIDATION) or {} for role in (MLLM, DEFAULT)}
        values = dict(zip(search.metrics, winner.values, strict=True))
        validation[BEST] = {"values": values, "items": items_of(winner)}
        final = {r: self.measured(r, FINAL, best) or {} for r in (MLLM, DEFAULT, BEST)}
        return self._write(trials, best, front, validation, final)

    def _write(
        self,
        trials: list[dict[str, Any]],
        best: int | None,
        front: list[int],
        validation: dict[str, dict[str, Any]],
        final: dict[str, dict[str, Any]],
    ) -> dict[str, Any]:
        """The result, with the recipe of the best beside it; without one nothing was made."""
        search, study = self._search, self._study
        recipe = None if best is None else absolute(to_values(self._recipe_of(best)))
        found = {
            **self._described(),
            "trials": trials,
            "num_interrupted": study.num_left(),
            "best": best,
            "front": front,
            "recipe": recipe,
            "output": None if search.out is None or best is None else str(search.out),
            VALIDATION: {role: _without_items(found) for role, found in validation.items()},
            FINAL: {role: _without_items(found) for role, found in final.items() if found},
            "comparisons": comparisons(validation, search.metrics, VALIDATION)
            + comparisons(final, search.metrics, FINAL),
            "importance": importance(study, search.metrics),
        }
        if recipe is not None:
            write_file(search.folder / RECIPE_FILE, write_mapping(recipe).encode())
        write_file(search.folder / RESULT, to_json(found))
        return found

    def _described(self) -> dict[str, Any]:
        search, settings = self._search, self._search.settings
        goals = zip(search.metrics, settings.goals, strict=True)
        dimensions = [
            {
                "option": d.option,
                "method": d.method or None,
                "text": d.text,
                "parameters": [p.as_data() for p in d.parameters],
            }
            for d in search.space.dimensions
        ]
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "tool": describe_tool(),
            "study": settings.name,
            "base_recipe": absolute(dict(search.space.base)),
            "space": dimensions,
            "metrics": [{"name": name, "goal": goal} for name, goal in goals],
            "sampler": self._study.sampler,
            "seed": settings.seed,
            "num_trials": self._study.size,
            "rung_limits": list(settings.rungs),
            **search.described,
        }

    def _make(self, number: int) -> None:
        """The best merge at its final place, in the place of that of an earlier end."""
        out = self._search.out
        if out is None:
            return
        recipe = self._recipe_of(number)
        prepared, plan = self._sources.plan(recipe)
        made = {"trial": number, "plan": plan.fingerprint()}
        if self._study.notes.get(OUTPUT) == {**made, "done": True} and (out / MANIFEST).is_file():
            return
        overwrite = self._search.overwrite or (OUTPUT in self._study.notes and _is_merge(out))
        self._search.say(f"Making the merge of trial {number} in {out}")
        self._study.keep(OUTPUT, {**made, "done": False})
        make_merge(prepared, plan, out, replace(self._options, overwrite=overwrite))
        self._study.keep(OUTPUT, {**made, "done": True})


def told(error: Exception) -> dict[str, str]:
    """An error as a study keeps it."""
    if isinstance(error, DriftMergeError):
        return {"kind": error.kind, "message": error.message, "remedy": error.remedy}
    return {"kind": type(error).__name__, "message": str(error), "remedy": ""}


def _is_merge(out: Path) -> bool:
    try:
        open_merge(out)
    except DriftMergeError:
        return False
    return True


def _without_items(found: dict[str, Any]) -> dict[str, Any]:
    counts = {name: len(items) for name, items in found.get("items", {}).items() if items}
    rest = {name: value for name, value in found.items() if name != "items"}
    return {**rest, "num_items": counts} if counts else rest


def _nothing_ended(trials: list[dict[str, Any]], folder: Path | None) -> EvaluationError:
    page = f" See all errors: {shlex.join(['drift-merge', 'report', str(folder)])}"
    errors = [t["error"]["message"] for t in trials if t["error"]]
    return EvaluationError(
        f"none of {len(trials)} trials has ended with a score. The first error: "
        f"{errors[0] if errors else 'none was recorded'}",
        remedy="Mend the command of --evaluate, and search again in another directory."
        + (page if folder else ""),
    )
