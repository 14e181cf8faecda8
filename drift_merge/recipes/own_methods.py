"""A user's own merge methods, from a Python file that he names himself: `--methods FILE`."""

import runpy
from pathlib import Path

from drift_merge.errors import RecipeError
from drift_merge.maths.methods import Method


def load_methods(file: Path | None) -> dict[str, Method]:
    """Run a file and collect what `merge_method` made in it, by the names of the methods.

    Raises:
        RecipeError: the file is not there, fails, or makes no method.
    """
    if file is None:
        return {}
    if not file.is_file():
        raise RecipeError(f"--methods {file}: there is no such file.", remedy="Name a Python file.")
    try:
        found = runpy.run_path(str(file))
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"--methods {file} fails: {type(error).__name__}: {error}.",
            remedy=f"See the traceback with: python {file}",
        ) from error
    methods = {value.name: value for value in found.values() if isinstance(value, Method)}
    if not methods:
        raise RecipeError(
            f"--methods {file} makes no merge method.",
            remedy="Decorate a function: @drift_merge.merge_method(base='required'); see: "
            "drift-merge guide adding-a-method",
        )
    return methods
