"""How a search was made, as commands to paste."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drift_merge.maths.methods import METHODS
from drift_merge.recipes.yaml import write_mapping
from drift_merge.searches.results import RECIPE_FILE
from drift_merge.searches.selection import MINIMIZE
from drift_merge.searches.spaces import METHOD


def commands_of(path: Path, found: Mapping[str, Any]) -> list[list[str]]:
    """Labels and commands.

    Args:
        path: of the search's folder.
        found: the content of its `search.json`.
    """
    folder = path if path.is_dir() else path.parent
    rows = []
    if "metric_places" in found:  # by the command; else by a Python function
        recipe = f"cat > recipe.yaml <<'END'\n{write_mapping(found['base_recipe'])}END"
        label = "The recipe"
        if found["null"]:
            label = "The recipe, with the reasoners of random direction that the search has made"
        rows = [[label, recipe], ["Search again, where the program is", shlex.join(_search(found))]]
    if found["best"] is None:
        return rows
    again = ["drift-merge", "run", str(folder / RECIPE_FILE), "-o", "again/"]
    rows.append(["Make the best again", shlex.join(again)])
    if found["output"]:
        shown = ["drift-merge", "report", found["output"], "-o", "merge.html"]
        rows.append(["What the best changed", shlex.join(shown)])
    return rows


def _search(found: Mapping[str, Any]) -> list[str]:
    """The words of the search, with what was chosen for it written out."""
    words = ["drift-merge", "search", "recipe.yaml"]
    for dimension in found["space"]:
        words += ["--space", dimension["text"]]
    words += ["--evaluate", found["evaluate"]]
    for option, key in (("--metric", "metric_places"), ("--items", "item_places")):
        for place in found[key]:
            words += [option, place]
    for metric in found["metrics"]:
        words += ["--minimize", metric["name"]] if metric["goal"] == MINIMIZE else []
    words += ["--final", found["final_evaluate"]] if found["final_evaluate"] else []
    words += ["--rungs", ",".join(found["rung_limits"])] if found["rung_limits"] else []
    chosen = [d["parameters"][0]["choices"] for d in found["space"] if d["option"] == METHOD]
    if not set(chosen[0] if chosen else [found["base_recipe"].get(METHOD)]) <= set(METHODS):
        words += ["--methods", "METHODS.py"]  # where a method of one's own is, nobody has kept
    words += ["--sampler", found["sampler"], "--seed", str(found["seed"])]
    return [*words, "--trials", str(found["num_trials"]), "-o", "again/"]
