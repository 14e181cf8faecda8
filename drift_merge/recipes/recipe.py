"""The validated request: what is combined, over which modules, and how it is written.

Everything that changes the bytes of the output is here; how fast they are made (threads) and
where they go is not. Rules live here, so that command line, YAML and Python meet the same errors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from drift_merge.errors import RecipeError, nearest, one_of
from drift_merge.maths.methods import METHODS, Method
from drift_merge.maths.methods.table import known_options
from drift_merge.recipes.weights import Weight, parse_weight
from drift_merge.recipes.words import (
    DEFAULT_SHARD_SIZE,
    DTYPE_CODES,
    KEPT_LAYERS,
    LAYER_SWAP,
    PRIOR,
    PRIOR_MODULES,
    SOURCE_DTYPE,
    TIES,
)
from drift_merge.storage.compressed import COMPRESSED
from drift_merge.storage.sizes import parse_size

Rule = tuple[Callable[[float], bool], str]

_NOT_NEGATIVE: Rule = (lambda x: x >= 0, "0 or more")

RANGES: dict[str, Rule] = {
    "density": (lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "gamma": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "epsilon": _NOT_NEGATIVE,
    "eps": _NOT_NEGATIVE,
    "tol": _NOT_NEGATIVE,
    "max_iter": (lambda x: x >= 1 and x == int(x), "a whole number, 1 or more"),
}


_SHARED = (
    *("modules", "layers", "dtype", "max_shard_size", "on_mismatch", "map_file"),
    "allow_nonfinite",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One request. `method` is "prior" or the name of a merge method.

    Raises:
        RecipeError: on construction, naming the option, what it got and what it accepts.
    """

    method: str
    reasoners: tuple[str, ...]  # sources as written; exactly one for a prior
    mllm: str
    base: str | None = None  # common ancestor; with it, delta = reasoner - base
    weights: tuple[str | float, ...] = ()  # one per reasoner, see `weights`; (): the default
    mllm_weight: str | float | None = None  # of the mllm's own task vector; None: the default
    variant: str | None = None  # whose formula, where implementations differ; None: the paper's
    options: Mapping[str, float | bool] = field(default_factory=dict)  # of the method: density, ...
    trim: str = "tensor"  # ties: one threshold per tensor, or "global": one per task vector
    keep_layers: str = KEPT_LAYERS  # layer-swap: these layers stay the mllm's
    transition: int = 0  # layer-swap: this many layers beside the kept ones get half the weight
    seed: int = 0  # of random masks
    modules: str = PRIOR_MODULES
    layers: str | None = None
    dtype: str = SOURCE_DTYPE  # of the output: a key of DTYPES, "source", or one of COMPRESSED
    through: str | None = None  # a compressed prior: delta is rounded to this dtype before
    max_shard_size: str = DEFAULT_SHARD_SIZE
    on_mismatch: str = "error"  # "error" or "skip"
    map_file: Path | None = None  # YAML of name patterns
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        if not self.reasoners:
            raise RecipeError(
                "No reasoner is given.",
                remedy="Name the reasoner first and the mllm last: REASONER MLLM.",
            )
        self._check_dtype()
        one_of("--on-mismatch", self.on_mismatch, ["error", "skip"])
        parse_size(self.max_shard_size)
        # One form for one meaning: "0.10" on the command line is 0.1 in a file.
        object.__setattr__(self, "weights", tuple(parse_weight(w).plain for w in self.weights))
        if self.mllm_weight is not None:
            own = parse_weight(self.mllm_weight, option="--mllm-weight").plain
            object.__setattr__(self, "mllm_weight", own)
        if self.weights and len(self.weights) not in (1, len(self.reasoners)):
            raise RecipeError(
                f"--weight is given {len(self.weights)} times for {len(self.reasoners)} reasoners.",
                remedy="Give it once for all, or once for each reasoner in their order.",
            )
        if self.method != PRIOR:
            from drift_merge.recipes.recipe import check_method

            check_method(self)

    def _check_dtype(self) -> None:
        compressed = list(COMPRESSED) if self.method == PRIOR else []
        one_of("--dtype", self.dtype, [*DTYPE_CODES, SOURCE_DTYPE, *compressed])
        if self.through is not None:
            one_of("--through", self.through, [*DTYPE_CODES, SOURCE_DTYPE])
        if self.through is not None and self.dtype not in COMPRESSED:
            raise RecipeError(
                f"--through is {self.through}, but --dtype {self.dtype} is not compressed.",
                remedy=f"Leave it out, or compress: --dtype {' or '.join(COMPRESSED)}",
            )
        if self.dtype in COMPRESSED and self.allow_nonfinite:
            raise RecipeError(
                f"--dtype {self.dtype} cannot hold NaN or Inf, which --allow-nonfinite allows.",
                remedy="Leave one of them out.",
            )

    @property
    def parsed_weights(self) -> tuple[Weight, ...]:
        """One weight per reasoner: as given, repeated if one is given, else the default."""
        given = self.weights or (float(method_options(self).get("weight", 1.0)),)
        weights = tuple(parse_weight(weight) for weight in given)
        return weights * len(self.reasoners) if len(weights) == 1 else weights

    @property
    def parsed_mllm_weight(self) -> Weight:
        """The weight of the mllm's own task vector."""
        given = self.mllm_weight
        if given is None:
            given = float(method_options(self).get("mllm_weight", 1.0))
        return parse_weight(given, option="--mllm-weight")

    @property
    def computes(self) -> bool:
        """Whether anything is computed at all; a linear merge of weight 0 only copies."""
        if self.method != "linear":
            return True
        return any(term.values != (0.0,) for weight in self.parsed_weights for term in weight.terms)

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        return parse_size(self.max_shard_size)

    def parameters(self) -> dict[str, Any]:
        """The request as plain data for a manifest; sources are described there by themselves."""
        values = asdict(self)
        for name in ("reasoners", "mllm", "base", "method"):
            values.pop(name)
        values["map_file"] = self.map_file.name if self.map_file else None
        if self.method == PRIOR:
            through = {} if self.through is None else {"through": self.through}
            return {key: values[key] for key in _SHARED} | through
        values.pop("through")
        values["weights"] = [parse_weight(weight).plain for weight in self.weights]
        if self.mllm_weight is not None:
            values["mllm_weight"] = self.parsed_mllm_weight.plain
        values["variant"] = method_variant(self)
        values["options"] = method_options(self)
        for name in ("weight", "mllm_weight"):
            values["options"].pop(name, None)
        if self.method != TIES:
            values.pop("trim")
        if self.method != LAYER_SWAP:
            for name in ("keep_layers", "transition"):
                values.pop(name)
        return values

    @classmethod
    def from_parameters(
        cls,
        method: str,
        parameters: Mapping[str, Any],
        *,
        reasoners: Sequence[str],
        mllm: str,
        base: str | None = None,
        map_file: Path | None = None,
    ) -> "Recipe":
        """The recipe of a manifest, for the same or other sources: the inverse of `parameters`."""
        values = {key: value for key, value in parameters.items() if key != "map_file"}
        values["weights"] = tuple(values.get("weights", ()))
        return cls(
            method=method,
            reasoners=tuple(reasoners),
            mllm=mllm,
            base=base,
            map_file=map_file,
            **values,
        )


def is_given(recipe: Recipe, name: str) -> bool:
    """Whether the user gave an option, a weight or the mllm's weight."""
    if name == "weight":
        return bool(recipe.weights)
    if name == "mllm_weight":
        return recipe.mllm_weight is not None
    return name in recipe.options


def method_variant(recipe: Recipe) -> str:
    """The variant of the method: as given, else the paper's."""
    return recipe.variant or method_of(recipe).variants[0]


def method_options(recipe: Recipe) -> dict[str, float | bool]:
    """Every option of the method: as given, else the default of its variant."""
    return {**method_of(recipe).defaults[method_variant(recipe)], **recipe.options}


def method_of(recipe: Recipe) -> Method:
    """The catalog's entry of a recipe's method.

    Raises:
        RecipeError: there is none; the nearest is named.
    """
    if recipe.method not in METHODS:
        raise RecipeError(
            f"there is no method {recipe.method!r}.{nearest(recipe.method, METHODS)}",
            remedy="See them all: drift-merge methods",
        )
    return METHODS[recipe.method]


def check_method(recipe: Recipe) -> None:
    """Check a recipe against the catalog: method, variant, base, number of reasoners, options.

    Raises:
        RecipeError: naming what is wrong and what the method accepts.
    """
    method = method_of(recipe)
    variant = method_variant(recipe)
    one_of("--variant", variant, list(method.variants))
    if method.base == "required" and recipe.base is None:
        raise RecipeError(
            f"{method.name} needs a base: {method.formula}.",
            remedy="Name the common ancestor of reasoner and mllm: --base BASE",
        )
    if method.base == "none" and recipe.base is not None:
        raise RecipeError(
            f"{method.name} takes no base: {method.formula}.",
            remedy="Leave --base out, or choose a method on task vectors: drift-merge methods",
        )
    least, most = method.reasoners
    found = len(recipe.reasoners)
    if found < least or (most is not None and found > most):
        wanted = f"{least}" if most == least else f"{least} or more" if most is None else f"{most}"
        raise RecipeError(
            f"{method.name} takes {wanted} reasoner(s); got {found}.",
            remedy="See what each method takes: drift-merge methods",
        )
    _check_weights(recipe, method, variant)
    known = known_options(method, variant)
    for name in recipe.options:
        if name not in known:
            raise RecipeError(
                f"{method.name} has no option {name!r} in its variant {variant}."
                f"{nearest(name, known)}",
                remedy=f"Its options: {', '.join(known) or 'none'}.",
            )
    for name, value in recipe.options.items():
        _check_value(name, value, method.defaults[variant].get(name, 0.0))
    _check_whole_model(recipe)
    missing = [name for name in method.required.get(variant, ()) if not is_given(recipe, name)]
    if missing:
        flag = missing[0].replace("_", "-")
        raise RecipeError(
            f"{method.name} in its variant {variant} needs {', '.join(missing)}.",
            remedy=f"Give it: --{flag} NUMBER",
        )


def _check_whole_model(recipe: Recipe) -> None:
    """Options that make a method look at the whole model first."""
    one_of("--trim", recipe.trim, ["tensor", "global"])
    if recipe.trim == "global" and recipe.method != TIES:
        raise RecipeError(
            f"{recipe.method} trims per tensor only.", remedy="Leave --trim out, or choose ties."
        )
    frank = [weight.is_frank for weight in recipe.parsed_weights]
    if any(frank) and (recipe.method != "task-arithmetic" or not all(frank)):
        raise RecipeError(
            "--weight frank is for task-arithmetic, once for all reasoners.",
            remedy="Write: drift-merge task-arithmetic ... --base BASE --weight frank",
        )


def _check_weights(recipe: Recipe, method: Method, variant: str) -> None:
    """Refuse weights that the method would not use."""
    taken = {*method.defaults[variant], *method.required.get(variant, ())}
    given = (("weight", bool(recipe.weights)), ("mllm_weight", recipe.mllm_weight is not None))
    for name, is_set in given:
        if is_set and name not in taken:
            raise RecipeError(
                f"{method.name} has no {name.replace('_', '-')} in its variant {variant}.",
                remedy="Leave it out; see what each method takes: drift-merge methods",
            )


def _check_value(name: str, value: float | bool, default: float | bool) -> None:
    """Refuse an option of another kind or out of its range."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise _wrong(name, value, "true or false")
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(name, value, "a finite number")
    holds, expected = RANGES.get(name, (lambda _: True, ""))
    if not holds(value):
        raise _wrong(name, value, expected)


def _wrong(name: str, value: object, expected: str) -> RecipeError:
    return RecipeError(
        f"{name} is {value!r}; expected {expected}.",
        remedy=f"Give --{name.replace('_', '-')} such a value, or leave it out for the default.",
    )
