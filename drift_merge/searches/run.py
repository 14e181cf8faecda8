"""The search itself: trials until there are enough, then the winner, made whole and compared.

Any number of processes may run it on one study. What one of them has found is kept in the study,
so that a rerun, after a kill too, does only what is missing.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

from drift_merge.engine.job import RunOptions, check_plan
from drift_merge.errors import RecipeError
from drift_merge.evaluation.command import ALL
from drift_merge.evaluation.scores import Scores
from drift_merge.plans.plan import Plan
from drift_merge.recipes.values import to_values
from drift_merge.searches.finish import DEFAULT, MLLM, OUTPUT, Finish, told
from drift_merge.searches.request import VALIDATION, Search
from drift_merge.searches.study import ERROR, ITEMS, RECIPE, SECONDS, Draw, Failed, Study
from drift_merge.searches.targets import Sources, Targets
from drift_merge.searches.workers import Workers
from drift_merge.storage import fingerprints

_SOURCES = ("reasoner", "mllm", "base")  # told apart by what is in them


def run_search(
    search: Search, targets: Targets, sources: Sources, workers: Workers, options: RunOptions
) -> dict[str, Any]:
    """Run a search to its end, alone or with others.

    Args:
        search: what is asked for.
        targets: where its models come from.
        sources: of its recipes.
        workers: this process, entered.
        options: of the engine.

    Returns:
        The content of `search.json`.

    Raises:
        EvaluationError: the unmerged MLLM cannot be evaluated, or no trial could.
        RecipeError: the study is of another search.
    """
    study = Study(search.settings, search.space, workers)
    _require_the_same(study, search, sources)
    if search.out is not None and OUTPUT not in study.notes:
        check_plan(_first_plan(search, sources), search.out, overwrite=search.overwrite)
    finish = Finish(search, study, targets, sources, options)
    with workers.trying("reference") as is_mine:
        if is_mine:
            finish.measured(MLLM, VALIDATION)
            finish.measured(DEFAULT, VALIDATION)
    study.run(_Trials(search, study, targets).trial)
    with workers.finishing():
        return finish.finish()


def _first_plan(search: Search, sources: Sources) -> Plan:
    return sources.plan(search.space.recipe(search.space.corners()[0]))[1]


def _require_the_same(study: Study, search: Search, sources: Sources) -> None:
    """Refuse to go on with a study of another recipe, space or evaluation."""
    found = _first_plan(search, sources).sources
    is_local = not (search.settings.storage or "").partition("://")[0].startswith(("post", "my"))
    mark = fingerprints.of_files if is_local else fingerprints.of_layout
    parts = {
        "space": [d.text for d in search.space.dimensions],
        "recipe": {k: v for k, v in search.space.base.items() if k not in _SOURCES},
        "sources": [mark(checkpoint) for checkpoint in found],
        "metrics": [list(search.metrics), list(search.settings.goals)],
        "rungs": list(search.settings.rungs),
        "sampler": study.sampler,
        **search.described,
    }
    kept = study.notes.get("search")
    if kept is None:
        study.keep("search", parts)
        return
    other = [name for name in parts if json.loads(json.dumps(parts[name])) != kept.get(name)]
    if other:
        raise RecipeError(
            f"the study {search.settings.name} in {search.folder} was begun with another "
            f"{' and '.join(other)}.",
            remedy=f"Repeat its command to go on, choose another directory with -o, or discard it: "
            f"rm -r {search.folder}",
        )


class _Trials:
    """Makes and evaluates one trial after the other."""

    def __init__(self, search: Search, study: Study, targets: Targets) -> None:
        self._search, self._study, self._targets = search, study, targets

    def trial(self, draw: Draw) -> Sequence[float]:
        """Make, evaluate and remove one model; record what became of it."""
        search, started = self._search, time.monotonic()
        seconds: dict[str, float] = {}
        try:
            recipe = search.space.recipe(draw.values)
            draw.record(RECIPE, to_values(recipe))
            with self._targets.made(recipe, f"trial-{draw.number}") as target:
                seconds["merge"] = round(time.monotonic() - started, 3)
                scores = self._by_rungs(draw, target)
        except Exception as error:
            if type(error).__name__ == "TrialPruned":
                self._say(draw, "pruned")
                raise
            found = told(error)
            draw.record(ERROR, found)
            self._say(draw, f"failed: {(found['message'] or found['kind']).splitlines()[0]}")
            raise Failed from error
        finally:
            total = time.monotonic() - started
            seconds["evaluate"] = round(total - seconds.get("merge", total), 3)
            draw.record(SECONDS, seconds)
        if scores.items:
            draw.record(ITEMS, json.dumps(scores.items, separators=(",", ":")))
        values = [scores.values[metric] for metric in search.metrics]
        shown = zip(search.metrics, values, strict=True)
        self._say(draw, ", ".join(f"{name} {value:g}" for name, value in shown))
        return values

    def _by_rungs(self, draw: Draw, target: Any) -> Scores:
        rungs = self._search.settings.rungs or (ALL,)
        for rung, limit in enumerate(rungs):
            scores = self._search.scores(VALIDATION, target, limit, f"trial-{draw.number}")
            value = scores.values[self._search.metrics[0]]
            is_last = rung == len(rungs) - 1
            if not is_last and draw.is_hopeless(rung, value):
                draw.prune()
            if is_last and self._search.settings.rungs:
                draw.report(rung, value)
        return scores

    def _say(self, draw: Draw, what: str) -> None:
        shown = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in draw.values.items()
        )
        number = len([t for t in self._study.trials() if t.number <= draw.number])
        self._search.say(f"Trial {draw.number} ({number} of {self._study.size}): {shown}: {what}")
