"""A user's own merge method, written as one function, with everything that a built-in one has.

from drift_merge import merge_method

@merge_method(base="required", defaults={"weight": 1.0, "damping": 0.5})
def damped(chunk, state, settings):
    "base + damping * w (reasoner - base)"
    tau = chunk.reasoners[0].sub_(chunk.base)
    return chunk.base.add_(tau, alpha=settings.weights[0] * settings.numbers["damping"])

drift-merge run recipe.yaml --methods my_methods.py          # method: damped
drift_merge.merge(damped, ["reasoner"], "mllm", "out", base="base")
"""

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping

from drift_merge.errors import RecipeError, one_of
from drift_merge.maths.methods import METHODS
from drift_merge.maths.methods.options import OPTIONS, Option
from drift_merge.maths.methods.table import WEIGHTS, Combine, Measure, Method, Value


def merge_method(
    *,
    base: str = "none",
    defaults: Mapping[str, Value] | None = None,
    reasoners: tuple[int, int | None] = (1, None),
    name: str = "",
    summary: str = "",
    paper: str = "none: a user's own",
    measure: Measure | None = None,
    row_wise: bool = False,
    adds_to_mllm: bool = False,
) -> Callable[[Combine], Method]:
    """Make a merge method of a function `combine(chunk, state, settings) -> tensor`.

    Args:
        base: "none", "required" or "optional".
        defaults: its options and their defaults; "weight" and "mllm_weight" for those of models.
            Numbers come in `settings.numbers`, true or false in `settings.flags`, text in
            `settings.words`.
        reasoners: least and most number of reasoners; None: any.
        name: of the method; the function's with dashes.
        summary: what it does, in words; the first line of the docstring.
        paper: where it comes from.
        measure: `measure(read, settings) -> state`, where the whole tensor must be looked at first;
            `read()` walks over it, as often as it likes.
        row_wise: chunks must be whole rows.
        adds_to_mllm: with weight 0 the mllm's tensor is copied, byte for byte.

    Returns:
        A decorator that gives a `Method`: name it in a recipe, or hand it to `drift_merge.merge`.

    Raises:
        RecipeError: the name is taken, or an argument is not one of those above.

    The chunk's tensors are one-dimensional, of equal length, in float32 (float64 where an input
    is), and may be overwritten; so may the result be one of them.
    """
    values = dict(defaults or {})
    one_of("base", base, ["none", "required", "optional"])
    own = {n: _own_option(n, v) for n, v in values.items() if n not in (*OPTIONS, *WEIGHTS)}

    def decorate(combine: Combine) -> Method:
        title = name or getattr(combine, "__name__", "").replace("_", "-")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", title) or title in (*METHODS, "prior"):
            raise RecipeError(
                f"{title!r} cannot be the name of a merge method"
                f"{': there is one of that name' if title in METHODS else ''}.",
                remedy="Choose lower-case letters, digits and dashes: merge_method(name='my-way')",
            )
        lines = (inspect.getdoc(combine) or title).splitlines()
        return Method(
            name=title,
            summary=summary or lines[0].rstrip("."),
            formula=lines[0].rstrip("."),
            paper=paper,
            base=base,
            reasoners=reasoners,
            defaults={"paper": values},
            adds_to_mllm=adds_to_mllm,
            row_wise=row_wise,
            combined_by=combine,
            measured_by=measure or "",
            own_options=own,
            source=_text_of(combine, measure),
        )

    return decorate


def _own_option(name: str, default: Value) -> Option:
    kind = type(default) if isinstance(default, bool | str) else float
    return Option(name=name, kind=kind, help="Of a user's own method.")


def _text_of(*functions: object) -> str:
    """A fingerprint of the functions' text: another text must not resume what this one began."""
    text = ""
    for function in functions:
        if function is None:
            continue
        try:
            text += inspect.getsource(function)  # type: ignore[arg-type]
        except (OSError, TypeError) as error:
            raise RecipeError(
                f"the text of {getattr(function, '__name__', function)} cannot be read, so that an "
                "interrupted run could not tell whether it is still the same.",
                remedy="Define the method in a file or in a notebook's cell.",
            ) from error
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:32]}"
