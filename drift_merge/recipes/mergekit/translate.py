"""mergekit's YAML as a recipe of ours: the same formula (variant `mergekit`), or a refusal.

The mllm is `base_model`, or the only multimodal model among `models`. Where mergekit's
`base_model` is the origin of task vectors:

    base_model   merged models           ours
    a text LLM   the mllm and others     --base BASE; the mllm's own weight is --mllm-weight
    the mllm     text LLMs               --base MLLM --mllm-weight 0: tau_m = 0 takes no part
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drift_merge.errors import nearest
from drift_merge.maths.methods import METHODS
from drift_merge.recipes.mergekit.document import Document, read_document
from drift_merge.recipes.mergekit.parameters import Parameters
from drift_merge.recipes.mergekit.roles import (
    ROLES,
    Look,
    Roles,
    find_mllm,
    look_at,
    not_origin,
    our_name,
)
from drift_merge.recipes.yaml import Entries


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a method of mergekit is understood."""

    roles: str  # a key of ROLES
    each: Mapping[str, str] = field(default_factory=dict)  # per model: parameter -> our option
    once: Mapping[str, str] = field(default_factory=dict)  # for all: parameter -> our option
    weighted: bool = False
    unused: tuple[str, ...] = ("int8_mask",)  # without effect on the result


_ONCE = {"normalize": "normalize", "rescale": "rescale", "lambda": "scale"}


def _delta(*each: str, unused: tuple[str, ...] = ("int8_mask",)) -> _Kind:
    once = {name: option for name, option in _ONCE.items() if name not in unused}
    return _Kind("delta", {name: name for name in each}, once, weighted=True, unused=unused)


_KINDS = {
    "linear": _Kind("set", once={"normalize": "normalize"}, weighted=True),
    "slerp": _Kind("pair"),
    "nuslerp": _Kind(
        "nuslerp",
        once={"nuslerp_row_wise": "column_wise", "nuslerp_flatten": "flatten"},
        weighted=True,
    ),
    "task_arithmetic": _delta(unused=("int8_mask", "density", "rescale")),
    "ties": _delta("density"),
    "dare_ties": _delta("density"),
    "dare_linear": _delta("density"),
    "breadcrumbs": _delta("density", "gamma"),
    "breadcrumbs_ties": _delta("density", "gamma"),
    "della": _delta("density", "epsilon"),
    "della_linear": _delta("density", "epsilon"),
    "sce": _Kind("delta", once={"select_topk": "density"}),
    "model_stock": _Kind("delta", once={"filter_wise": "filter_wise"}),
    "multislerp": _Kind(
        "delta", once={"normalize_weights": "normalize", "eps": "eps"}, weighted=True
    ),
    "ram": _Kind("delta", once={"epsilon": "threshold"}),
    "ramplus_tl": _Kind(
        "delta",
        once={"epsilon": "threshold", "r": "boost", "alpha": "max_overlap"},
    ),
    "karcher": _Kind("set", once={"max_iter": "max_iter", "tol": "tol"}),
    "nearswap": _Kind("pair", once={"t": "t"}),
    "arcee_fusion": _Kind("pair"),
    "passthrough": _Kind("passthrough", each={"scale": "scale"}),
}


def translate(
    root: Entries, file: Path, find: Callable[[str], str], *, look: Look = look_at
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The options of ours that compute what mergekit would.

    Args:
        root: the file, with a `merge_method`.
        file: for messages.
        find: where a source is that the file names.
        look: opens a source.

    Returns:
        Values by long option name, and notes for the user.

    Raises:
        RecipeError: a key that is not supported, with its line and what to write instead.
        SourceError, CheckpointError: a source cannot be opened.
    """
    reader = Parameters(file)
    document = read_document(root, reader, find)
    kind = _KINDS.get(document.method)
    if kind is None:
        raise document.refuse(
            "merge_method",
            f"{document.method!r} is not one that we have.{nearest(document.method, _KINDS)}",
            f"Those are: {', '.join(_KINDS)}.",
        )
    known = [*kind.each, *kind.once, *kind.unused, *(["weight"] if kind.weighted else [])]
    known += ["t"] if document.method == "slerp" else []
    for model in document.models:
        reader.check_names(document.models[model], known, document.method)
    roles = ROLES[kind.roles](document, find_mllm(document, look))
    ours = our_name(document.method)
    values: dict[str, Any] = {"method": ours, "mllm": roles.mllm, "modules": "full"}
    values["reasoner"] = roles.reasoners[0] if len(roles.reasoners) == 1 else roles.reasoners
    values |= {"base": roles.base} if roles.base else {}
    if "mergekit" in METHODS[ours].variants:
        values["variant"] = "mergekit"
    values |= _weights(document, kind, roles) | _options(document, kind, ours)
    values |= _slerp(document, roles) if document.method == "slerp" else {}
    if roles.is_origin and document.method == "sce" and values.get("density", 1.0) != 1.0:
        raise not_origin(document, "its variance would count the mllm too")
    values |= _output(document, roles)
    return values, (_describe(document, roles),)


def _weights(document: Document, kind: _Kind, roles: Roles) -> dict[str, Any]:
    """`weight` and `mllm-weight`; 0 for an mllm that is the origin of the task vectors."""
    values: dict[str, Any] = {}
    if kind.weighted:
        found = [
            document.reader.weight("weight", document.settings(model), of=model)
            for model in roles.reasoners
        ]
        values["weight"] = found[0] if len(found) == 1 else found
    if roles.is_origin:
        return values | ({"mllm-weight": 0.0} if kind.weighted else {})
    if kind.weighted:
        scopes = document.settings(roles.mllm)
        values["mllm-weight"] = document.reader.weight("weight", scopes, of=roles.mllm)
    return values


def _slerp(document: Document, roles: Roles) -> dict[str, Any]:
    """`t` from the mllm; where it varies between tensors, as a weight of t = 1."""
    forward = document.base == roles.mllm
    change = (lambda t: t) if forward else (lambda t: 1.0 - t)
    t = document.reader.weight("t", document.scopes, of="slerp", change=change)
    return {"t": t} if isinstance(t, float) else {"t": 1.0, "weight": t}


def _options(document: Document, kind: _Kind, ours: str) -> dict[str, Any]:
    """The options of the method that the file gives."""
    method = METHODS[ours]
    variant = "mergekit" if "mergekit" in method.variants else method.variants[0]
    known, defaults = method.option_names(variant), method.defaults[variant]
    values: dict[str, Any] = {}
    for parameter, option in kind.once.items():
        if not document.reader.cases(parameter, document.scopes):
            continue
        default = defaults.get(option, False if option == "rescale" else 1.0)
        assert not isinstance(default, str)  # mergekit has none of those
        value = document.reader.one(parameter, document.scopes, default)
        if option in known:
            values[option.replace("_", "-")] = value
        elif value is not default:
            raise document.reader.refuse(
                document.reader.cases(parameter, document.scopes)[0].line,
                parameter,
                f"{ours} does not have it here",
                "Take it out, or choose one of the dare or della methods.",
            )
    models = {model: document.settings(model) for model in document.merged}
    for parameter, option in kind.each.items():
        default = float(defaults[option])
        value = document.reader.shared(parameter, models, default)
        values |= {option: value} if value != default else {}
    return values


def _output(document: Document, roles: Roles) -> dict[str, Any]:
    """dtype: mergekit's is of the arithmetic, and of the output unless out_dtype says it."""
    root = document.root
    for key in ("tokenizer_source", "tokenizer"):
        value = root.get(key)
        source = value.get("source") if isinstance(value, Entries) else value
        extra = isinstance(value, Entries) and set(value) != {"source"}
        is_own = document.base == roles.mllm and source in ("base", root.get("base_model"))
        if value is not None and (extra or not is_own):
            raise document.refuse(
                key,
                "the output keeps the MLLM's tokenizer; embeddings are matched by token",
                "Take the key out.",
            )
    dtype = root.get("out_dtype") or root.get("dtype")
    return {"dtype": str(dtype).removeprefix("torch.")} if dtype else {}


def _describe(document: Document, roles: Roles) -> str:
    base = f", base {roles.base}" if roles.base else ""
    return (
        f"Read as mergekit's {document.method}: mllm {roles.mllm}, reasoner "
        f"{', '.join(roles.reasoners)}{base}; arithmetic in float32."
    )
