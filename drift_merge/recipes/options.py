"""The options of recipes that are no method's own, from the fields of `Recipe`."""

from dataclasses import fields
from typing import Any

from drift_merge.maths.methods.options import Option
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import PRIOR


def recipe_options(method: str) -> dict[str, tuple[Option, Any]]:
    """The options of recipes that are no method's own: by field, with the default.

    Args:
        method: "prior", the name of a merge method, or "" for all of both.
    """
    found = {}
    for each in fields(Recipe):
        if "help" not in each.metadata:
            continue
        row = dict(each.metadata)
        is_prior = method == PRIOR
        only, defaults = row.pop("only", ""), (row.pop("of_merge", None), row.pop("of_prior", None))
        if method and only and (only == PRIOR) is not is_prior:
            continue
        option = Option(name=each.name, kind=row.pop("kind", str), **row)
        default = defaults[is_prior]
        found[each.name] = (option, each.default if default is None else default)
    return found
