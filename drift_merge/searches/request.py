"""Everything that one search is made of, as plain data and two functions that evaluate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_merge.errors import EvaluationError
from drift_merge.evaluation.scores import Scores
from drift_merge.recipes.recipe import Recipe
from drift_merge.searches.spaces import Space
from drift_merge.searches.study import StudySettings
from drift_merge.storage.outputs.existing import Overwrite

Evaluate = Callable[[Any, str, str], Scores]  # model, limit, label
VALIDATION, FINAL = "validation", "final"


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Everything that one search is made of."""

    space: Space
    recipe: Recipe | None  # the default, as the file has it; None: it is not whole by itself
    metrics: tuple[str, ...]
    settings: StudySettings
    evaluate: Evaluate
    final: Evaluate | None
    described: Mapping[str, Any]  # how it evaluates, for `search.json` and to tell studies apart
    folder: Path  # for `search.json`, logs and locks
    out: Path | None  # the best merge; None: it is not made
    overwrite: Overwrite
    say: Callable[[str], None]  # a line on how it goes

    def scores(self, split: str, target: Any, limit: str, label: str) -> Scores:
        """Evaluate a model.

        Raises:
            EvaluationError: it fails, or a metric is missing.
        """
        evaluate = self.evaluate if split == VALIDATION else self.final
        assert evaluate is not None
        found = evaluate(target, limit, label)
        missing = [metric for metric in self.metrics if metric not in found.values]
        if missing:
            raise EvaluationError(
                f"the evaluation gave no {missing[0]}; it gave {', '.join(found.values)}.",
                remedy="Return a number for each metric.",
            )
        return found
