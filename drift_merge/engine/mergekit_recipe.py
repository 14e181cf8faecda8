"""mergekit's YAML as a recipe of ours: the same formula (variant `mergekit`), or a refusal.

The mllm is `base_model`, or the only multimodal model among `models`. Where mergekit's
`base_model` is the origin of task vectors:

    base_model   merged models           ours
    a text LLM   the mllm and others     --base BASE; the mllm's own weight is --mllm-weight
    the mllm     text LLMs               --base MLLM --mllm-weight 0: tau_m = 0 takes no part
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Look = Callable[[str], bool]  # is this source multimodal?


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a method of mergekit is understood."""

    roles: str  # a key of _ROLES
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
    "karcher": _Kind("set", once={"max_iter": "max_iter", "tol": "tol"}),
    "nearswap": _Kind("pair", once={"t": "t"}),
    "arcee_fusion": _Kind("pair"),
    "passthrough": _Kind("passthrough", each={"scale": "scale"}),
}
