"""The rows of the study: what is done to M before it is measured."""

from dataclasses import dataclass, field
from typing import Any

ALPHAS = (0.03, 0.1, 0.3, 1.0, 3.0)
RATES = (1e-4, 3e-4, 1e-3)  # of SFT
WEIGHTS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
TUNING_SEEDS = (1000, 1001)


@dataclass(frozen=True, slots=True)
class Row:
    """One way to use the reasoner. What is None is not done; a tuple is chosen on validation."""

    name: str
    merge: dict[str, Any] | None = None  # of drift_merge.merge, before any training
    merge_after: dict[str, Any] | None = None  # likewise, after it
    is_trained: bool = True
    prior: str | None = None  # a folder of priors/, or a control "random:7"
    attach: dict[str, Any] = field(default_factory=dict)
    lora: int = 0
    examples: int = 300
    tuned_as: str = ""  # the row whose chosen value is taken over

    @property
    def choices(self) -> tuple[float, ...]:
        """What is tried on validation: strengths of the prior, or weights of the merge."""
        if self.tuned_as:
            return ()
        if self.prior is not None:
            return ALPHAS
        return WEIGHTS if self.merge is not None or self.merge_after is not None else ()


def _drift(name: str, rule: str, prior: str = "delta", **more: Any) -> Row:
    return Row(name, prior=prior, attach={"rule": rule}, **more)


def _merged(name: str, method: str, rest: dict[str, Any] | None = None, **more: Any) -> Row:
    return Row(name, merge={"method": method} | (rest or {}), is_trained=False, **more)


_SPARSE = {"options": {"density": 0.2}}
_ROUNDED = {"dtype": "bfloat16"}
_DRIFT = "DRIFT adaptive_cosine"
ROWS: tuple[Row, ...] = (
    Row("M", is_trained=False),
    Row("SFT"),
    _drift(_DRIFT, "adaptive_cosine"),
    _drift(f"{_DRIFT}, random delta", "adaptive_cosine", "random:7", tuned_as=_DRIFT),
    _drift(f"{_DRIFT}, permuted delta", "adaptive_cosine", "permuted:7", tuned_as=_DRIFT),
    _drift(f"{_DRIFT}, random delta, own alpha", "adaptive_cosine", "random:7"),
    _drift("DRIFT gradnorm", "gradnorm"),
    _drift("DRIFT gradnorm, random delta", "gradnorm", "random:7", tuned_as="DRIFT gradnorm"),
    _drift("DRIFT absolute", "absolute"),
    _drift("DRIFT anchor", "anchor"),
    _drift("DRIFT sign", "sign"),
    _drift(f"{_DRIFT}, delta = R - B", "adaptive_cosine", "delta_base"),
    _drift(f"{_DRIFT}, rank 1", "adaptive_cosine", "rank1"),
    _drift(f"{_DRIFT}, rank 16", "adaptive_cosine", "rank16"),
    Row("LoRA 16", lora=16),
    _drift("LoRA 16, DRIFT adaptive_cosine", "adaptive_cosine", lora=16),
    _merged("linear", "linear"),
    _merged("task-arithmetic", "task-arithmetic"),
    _merged("ties", "ties", _SPARSE),
    _merged("dare-ties", "dare-ties", _SPARSE),
    _merged("chat-vector, rank 1", "chat-vector", {"options": {"rank": 1}}),
    Row("linear, then SFT", merge={"method": "linear"}),
    Row("SFT, then linear", merge_after={"method": "linear"}),
    _merged("linear in bfloat16, nearest", "linear", _ROUNDED, tuned_as="linear"),
    _merged(
        "linear in bfloat16, stochastic",
        "linear",
        _ROUNDED | {"round": "stochastic"},
        tuned_as="linear",
    ),
)
# Beside the table: how much data, which modules.
SWEEPS: tuple[Row, ...] = (
    *(Row(f"SFT, {n} examples", examples=n) for n in (100, 1000)),
    *(
        _drift(f"{_DRIFT}, {n} examples", "adaptive_cosine", examples=n, tuned_as=_DRIFT)
        for n in (100, 1000)
    ),
    *(
        Row(
            f"{_DRIFT}, {m} only",
            prior="delta",
            tuned_as=_DRIFT,
            attach={"rule": "adaptive_cosine", "modules": m},
        )
        for m in ("attn", "mlp")
    ),
)
