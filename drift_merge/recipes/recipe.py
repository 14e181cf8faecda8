"""The validated request: what is combined, over which modules, and how it is written.

Everything that changes the bytes of the output is here; how fast they are made (threads) and
where they go is not. Rules live here, so that command line, YAML and Python meet the same errors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from drift_merge.errors import RecipeError, nearest, one_of
from drift_merge.maths.methods import METHODS, Method
from drift_merge.maths.methods.table import WEIGHTS, Survey, Value
from drift_merge.recipes.directions import idle
from drift_merge.recipes.method_rules import check_method
from drift_merge.recipes.stored_rules import check_round, check_stored
from drift_merge.recipes.weights import Weight, parse_weight
from drift_merge.recipes.words import (
    DEFAULT_SHARD_SIZE,
    DTYPE_CODES,
    MERGE_MODULES,
    NEAREST,
    NORMS,
    PRIOR,
    PRIOR_DTYPE,
    PRIOR_MODULES,
    SOURCE_DTYPE,
    STOCHASTIC,
)
from drift_merge.storage.sizes import parse_size

# Options that older manifests hold beside `options`.
_ONCE_FIELDS = ("trim", "keep_layers", "transition", "seed")


def _row(help: str, **more: Any) -> dict[str, Any]:
    """What is to be known of a field that is an option.

    Keywords: `key`, `kind`, `metavar`, `choices`, `is_many` of `Option`; `only`: "prior" or
    "merge"; `of_prior`, `of_merge`: the default of that kind.
    """
    return {"help": help, **more}


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
    base: str | None = field(default=None, metadata=_row("Common ancestor of reasoner and mllm."))
    weights: tuple[str | float, ...] = field(
        default=(),
        metadata=_row(
            "Of the reasoners, one for all or one each: a number, attn=0.1,mlp=0.3, [0,0.5,1] over "
            "the layers, or re:REGEX=0.2.",
            key="weight",
            metavar="W",
            is_many=True,
            only="merge",
        ),
    )
    mllm_weight: str | float | None = field(
        default=None,
        metadata=_row("Of the mllm itself, written as --weight.", metavar="W", only="merge"),
    )
    variant: str | None = field(
        default=None, metadata=_row("Whose formula.", only="merge")
    )  # None: the paper's
    options: Mapping[str, Value] = field(default_factory=dict)  # of the method: density, ...
    modules: str = field(
        default=PRIOR_MODULES,
        metadata=_row(
            "attn, mlp, mixer, norm, embed, head, full, or re:REGEX on canonical names.",
            metavar="LIST",
            of_merge=MERGE_MODULES,
        ),
    )
    layers: str | None = field(
        default=None, metadata=_row("Such as 0:28 or 0,4:12; default all.", metavar="RANGES")
    )
    map_file: Path | None = field(
        default=None,
        metadata=_row("YAML of name patterns for unusual layouts.", key="map", kind=Path),
    )
    on_mismatch: str = field(
        default="error",
        metadata=_row(
            "skip: leave selected tensors without a partner as the mllm has them.",
            choices=("error", "skip"),
        ),
    )
    dtype: str = field(
        default=SOURCE_DTYPE,
        metadata=_row("Of the output; source keeps the mllm's.", of_prior=PRIOR_DTYPE),
    )  # a key of DTYPE_CODES, "source", or one of COMPRESSED
    through: str | None = field(
        default=None,
        metadata=_row(
            "Round delta to this dtype before it is compressed, as a prior of that dtype was.",
            choices=(*DTYPE_CODES, SOURCE_DTYPE),
            only="prior",
        ),
    )
    rank: int = field(
        default=0,
        metadata=_row(
            "Singular directions that are kept of each matrix, the leading ones; 0: all.",
            kind=int,
            metavar="K",
            only="prior",
        ),
    )
    norm: str = field(
        default=NORMS[0],
        metadata=_row(
            "Of the whole matrix, that the directions kept get.",
            choices=NORMS,
            only="prior",
        ),
    )
    round: str = field(
        default=NEAREST,
        metadata=_row(
            "To 16 bits: stochastic keeps, on average, what is too small for nearest.",
            choices=(NEAREST, STOCHASTIC),
            only="merge",
        ),
    )
    round_seed: int = field(
        default=0,
        metadata=_row("Of stochastic rounding.", kind=int, metavar="N", only="merge"),
    )
    max_shard_size: str = field(
        default=DEFAULT_SHARD_SIZE, metadata=_row("Of a shard.", metavar="SIZE")
    )
    allow_nonfinite: bool = field(
        default=False, metadata=_row("Accept NaN and Inf in what is computed.", kind=bool)
    )
    own_method: Method | None = None  # a user's own, in the place of the table's row

    def __post_init__(self) -> None:
        if not self.reasoners:
            raise RecipeError(
                "No reasoner is given.",
                remedy="Name the reasoner first and the mllm last: REASONER MLLM.",
            )
        if self.method == PRIOR and len(self.reasoners) != 1:
            raise RecipeError(
                f"expected one REASONER and one MLLM; got {len(self.reasoners) + 1} sources.",
                remedy="Compute one prior per reasoner; they can be combined in training.",
            )
        stored = (self.method, self.dtype, self.through, self.rank, self.norm)
        check_stored(*stored, allow_nonfinite=self.allow_nonfinite)
        check_round(self.method, self.round)
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
            one_of("--variant", method_variant(self), list(method_of(self).variants))
            check_method(
                method_of(self),
                method_variant(self),
                base=self.base,
                num_reasoners=len(self.reasoners),
                options=self.options,
                weights=self.parsed_weights,
                given=[name for name in WEIGHTS if is_given(self, name)],
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
        values.pop("own_method")
        values["map_file"] = self.map_file.name if self.map_file else None
        if self.method == PRIOR:
            through = {} if self.through is None else {"through": self.through}
            low = {"rank": self.rank, "norm": self.norm} if self.rank else {}
            return {key: values[key] for key in _SHARED} | through | low
        for name in ("through", "rank", "norm"):
            values.pop(name)
        values["weights"] = [parse_weight(weight).plain for weight in self.weights]
        if self.mllm_weight is not None:
            values["mllm_weight"] = self.parsed_mllm_weight.plain
        if self.round == NEAREST:  # as manifests were before there was a choice
            values = {k: v for k, v in values.items() if not k.startswith("round")}
        values["variant"] = method_variant(self)
        values["options"] = method_options(self)
        standard = method_of(self).defaults[values["variant"]]
        for name in (*WEIGHTS, *idle(values["options"], standard)):
            values["options"].pop(name, None)
        if self.own_method is not None:
            values["method_source"] = self.own_method.source
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
        own_method: Method | None = None,
    ) -> "Recipe":
        """The recipe of a manifest, for the same or other sources: the inverse of `parameters`."""
        left_out = ("map_file", "method_source")
        values = {key: value for key, value in parameters.items() if key not in left_out}
        values["weights"] = tuple(values.get("weights", ()))
        once = {name: values.pop(name) for name in _ONCE_FIELDS if name in values}
        taken = [] if method == PRIOR else (own_method or METHODS[method]).option_names()
        values["options"] = {k: v for k, v in once.items() if k in taken} | dict(
            values.get("options", {})
        )
        return cls(
            method=method,
            reasoners=tuple(reasoners),
            mllm=mllm,
            base=base,
            map_file=map_file,
            own_method=own_method,
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


def active_survey(recipe: Recipe) -> Survey | None:
    """The look at the whole model that the method takes first, if an option asks for one."""
    if recipe.method == PRIOR:
        return None
    options: dict[str, object] = dict(method_options(recipe))
    options["weight"] = recipe.parsed_weights[0].text
    found = (s for s in method_of(recipe).surveys if options.get(s.option) == s.value)
    return next(found, None)


def method_options(recipe: Recipe) -> dict[str, Value]:
    """Every option of the method: as given, else the default of its variant."""
    return {**method_of(recipe).defaults[method_variant(recipe)], **recipe.options}


def method_of(recipe: Recipe) -> Method:
    """The catalog's entry of a recipe's method.

    Raises:
        RecipeError: there is none; the nearest is named.
    """
    if recipe.own_method is not None:
        return recipe.own_method
    if recipe.method not in METHODS:
        raise RecipeError(
            f"there is no method {recipe.method!r}.{nearest(recipe.method, METHODS)}",
            remedy="See them all: drift-merge methods",
        )
    return METHODS[recipe.method]
