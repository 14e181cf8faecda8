"""The validated request: what is combined, over which modules, and how it is written.

Everything that changes the bytes of the output is here; how fast they are made (threads) and
where they go is not. Rules live here, so that command line, YAML and Python meet the same errors.
"""

import difflib
import math
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drift_merge.errors import RecipeError

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
SOURCE_DTYPE = "source"  # every tensor keeps the dtype it has in the mllm
PRIOR_MODULES = "attn,mlp"  # the published default of DRIFT
MERGE_MODULES = "attn,mlp,norm"
DEFAULT_WEIGHT = 0.1  # of the reasoner: the 0.9 / 0.1 of arXiv 2505.05464
DEFAULT_SHARD_SIZE = "5GB"

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
    weights: tuple[float, ...] = ()  # one per reasoner; () means the default for each
    modules: str = PRIOR_MODULES
    layers: str | None = None
    dtype: str = SOURCE_DTYPE  # of the output: a key of DTYPES, or "source"
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
        _one_of("--dtype", self.dtype, [*DTYPES, SOURCE_DTYPE])
        _one_of("--on-mismatch", self.on_mismatch, ["error", "skip"])
        parse_size(self.max_shard_size)
        for weight in self.weights:
            if not math.isfinite(weight):
                raise RecipeError(
                    f"--weight is {weight}; expected a finite number.",
                    remedy="The published setting is --weight 0.1.",
                )
        if self.weights and len(self.weights) not in (1, len(self.reasoners)):
            raise RecipeError(
                f"--weight is given {len(self.weights)} times for {len(self.reasoners)} reasoners.",
                remedy="Give it once for all, or once for each reasoner in their order.",
            )

    @property
    def resolved_weights(self) -> tuple[float, ...]:
        """One weight per reasoner: as given, repeated if one is given, else the default."""
        weights = self.weights or (DEFAULT_WEIGHT,)
        return weights * len(self.reasoners) if len(weights) == 1 else weights

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        return parse_size(self.max_shard_size)

    def parameters(self) -> dict[str, Any]:
        """The request as plain data for a manifest; sources are described there by themselves."""
        values = asdict(self)
        for name in ("reasoners", "mllm", "base", "method"):
            values.pop(name)
        values["weights"] = list(self.resolved_weights) if self.method != "prior" else []
        values["map_file"] = self.map_file.name if self.map_file else None
        return values


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


def _one_of(option: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        raise RecipeError(
            f"{option} is {value!r}; expected one of {', '.join(choices)}.",
            remedy=f"Choose one of them.{nearest(value, choices)}",
        )
