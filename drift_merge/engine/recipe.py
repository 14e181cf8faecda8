"""The validated request: what is combined, over which modules, and how it is written.

Everything that changes the bytes of the output is here; how fast they are made (threads) and
where they go is not. Rules live here, so that command line, YAML and Python meet the same errors.
"""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from drift_merge.engine.weights import Weight, parse_weight
from drift_merge.errors import RecipeError
from drift_merge.maths.catalog import METHODS, Method
from drift_merge.storage.compressed import COMPRESSED

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
SOURCE_DTYPE = "source"  # every tensor keeps the dtype it has in the mllm
PRIOR_MODULES = "attn,mlp"  # the published default of DRIFT
MERGE_MODULES = "attn,mlp,norm"
PRIOR = "prior"  # the method of `drift-prior compute`; every other is in the catalog
KEPT_LAYERS = "0:6"  # layer-swap: layers up to k = 5 stay the mllm's (arXiv 2505.05464)
DEFAULT_SHARD_SIZE = "5GB"
DEFAULT_CACHE_SIZE = "20GB"  # --stream: some shards of the usual 5 GB in use, one on its way

LAYER_SWAP = "layer-swap"
TIES = "ties"
_SHARED = (
    *("modules", "layers", "dtype", "max_shard_size", "on_mismatch", "map_file"),
    "allow_nonfinite",
)
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{u}B": 1000**i for i, u in enumerate("KMGT", start=1)}
_UNITS |= {f"{u}IB": 1024**i for i, u in enumerate("KMGT", start=1)}


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
            from drift_merge.engine.method_rules import check_method

            check_method(self)

    def _check_dtype(self) -> None:
        compressed = list(COMPRESSED) if self.method == PRIOR else []
        one_of("--dtype", self.dtype, [*DTYPES, SOURCE_DTYPE, *compressed])
        if self.through is not None:
            one_of("--through", self.through, [*DTYPES, SOURCE_DTYPE])
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


def known_options(method: Method, variant: str) -> list[str]:
    """The options that a variant of a method takes beside the weights, sorted."""
    names = {*method.defaults[variant], *method.required.get(variant, ())}
    return sorted(names - {"weight", "mllm_weight"})


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


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" (1000-based), "512MiB" (1024-based) or "1000000"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = match[2].upper() if match else ""
    if match is None or unit not in _UNITS or float(match[1]) * _UNITS[unit] < 1:
        raise RecipeError(
            f"{text!r} is not a size.", remedy="Write a number and a unit, such as 5GB or 512MiB."
        )
    return int(float(match[1]) * _UNITS[unit])


def nearest(word: str, choices: Collection[str]) -> str:
    """The nearest of `choices` as ` Did you mean X?`, or nothing."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def one_of(option: str, value: str, choices: list[str]) -> None:
    """Raise RecipeError unless a value is one of the choices; the nearest is named."""
    if value not in choices:
        raise RecipeError(
            f"{option} is {value!r}; expected one of {', '.join(choices)}.",
            remedy=f"Choose one of them.{nearest(value, choices)}",
        )
