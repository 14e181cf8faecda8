"""The rows of the study: what is done to M before it is measured."""

from dataclasses import dataclass, field
from typing import Any

ALPHAS = (0.03, 0.1, 0.3, 1.0, 3.0)
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
    seeds: int = 10  # at most
    tuned_as: str = ""  # the row whose chosen value is taken over
    times: float = 1.0  # and multiplied with this
    knob: str = "weights"  # of a merge: what is chosen; another word is an option, "" is nothing
    knob_values: tuple[float, ...] = WEIGHTS
    alphas: tuple[float, ...] = ALPHAS

    @property
    def choices(self) -> tuple[float, ...]:
        """What is tried on validation: strengths of the prior, or weights of the merge."""
        if self.tuned_as or not self.knob:
            return ()
        if self.prior is not None:
            return self.alphas
        return self.knob_values if self.merge is not None or self.merge_after is not None else ()

    def value(self, chosen: dict[str, float]) -> float | None:
        """What it is run with, given what was chosen for each row."""
        found = chosen.get(self.tuned_as or self.name)
        return None if found is None else found * self.times


def _drift(name: str, rule: str, prior: str = "delta", **more: Any) -> Row:
    return Row(name, prior=prior, attach={"rule": rule}, **more)


def _merged(name: str, method: str, rest: dict[str, Any] | None = None, **more: Any) -> Row:
    return Row(name, merge={"method": method} | (rest or {}), is_trained=False, **more)


_WEIGHTED = (
    *("linear", "layer-swap", "nuslerp", "multislerp", "karcher", "task-arithmetic"),
    *("chat-vector", "consensus-ta", "ties", "breadcrumbs", "breadcrumbs-ties", "dare-linear"),
    *("dare-ties", "della", "della-linear", "star", "tsv-m", "iso-c", "iso-cts", "swudi", "aswudi"),
)  # but inject, which is linear's formula, and passthrough, which is R's tower
_ROUNDED = {"dtype": "bfloat16"}
DRIFT = "DRIFT adaptive_cosine"
ROWS: tuple[Row, ...] = (
    Row("M", is_trained=False),
    Row("SFT"),
    _drift(DRIFT, "adaptive_cosine"),
    _drift(f"{DRIFT}, random delta", "adaptive_cosine", "random:7", tuned_as=DRIFT),
    _drift(f"{DRIFT}, permuted delta", "adaptive_cosine", "permuted:7", tuned_as=DRIFT),
    _drift(f"{DRIFT}, random delta, own alpha", "adaptive_cosine", "random:7"),
    _drift("DRIFT gradnorm", "gradnorm"),
    _drift("DRIFT gradnorm, half alpha", "gradnorm", tuned_as="DRIFT gradnorm", times=0.5),
    _drift("DRIFT gradnorm, random delta", "gradnorm", "random:7", tuned_as="DRIFT gradnorm"),
    _drift("DRIFT absolute", "absolute"),
    _drift("DRIFT anchor", "anchor"),
    _drift("DRIFT sign", "sign"),
    _drift(f"{DRIFT}, delta = R - B", "adaptive_cosine", "delta_base"),
    _drift(f"{DRIFT}, rank 1", "adaptive_cosine", "rank1"),
    _drift(f"{DRIFT}, rank 16", "adaptive_cosine", "rank16"),
    Row("LoRA 16", lora=16),
    _drift("LoRA 16, DRIFT adaptive_cosine", "adaptive_cosine", lora=16),
    *(_merged(method, method) for method in _WEIGHTED),
    *(_merged(method, method, knob="scale") for method in ("sce", "ram", "ram-plus", "magmax")),
    _merged("slerp", "slerp", knob="t"),
    _merged("nearswap", "nearswap", knob="t", knob_values=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)),
    _merged("arcee-fusion", "arcee-fusion", knob=""),
    _merged("model-stock", "model-stock", knob=""),
    *(
        _merged(f"{method}, rank {rank}", method, {"options": {"rank": rank}})
        for method in ("linear", "chat-vector")
        for rank in (1, 16)
    ),
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
    *(Row(f"SFT, {n} examples", examples=n, seeds=5) for n in (100, 1000)),
    *(
        _drift(f"{DRIFT}, {n} examples", "adaptive_cosine", examples=n, seeds=5, tuned_as=DRIFT)
        for n in (100, 1000)
    ),
    *(
        Row(
            f"{DRIFT}, {m} only",
            prior="delta",
            seeds=5,
            tuned_as=DRIFT,
            attach={"rule": "adaptive_cosine", "modules": m},
        )
        for m in ("attn", "mlp")
    ),
)
# Around SmolLM2-135M, where a run takes minutes: the main rows alone.
_FEW: dict[str, Any] = {"examples": 200, "seeds": 5}
_FEW_WEIGHTS = (0.1, 0.3, 0.6, 1.0)
SMOLLM2: tuple[Row, ...] = (
    Row("M", is_trained=False),
    Row("SFT", **_FEW),
    _drift(DRIFT, "adaptive_cosine", alphas=(0.1, 0.3, 1.0), **_FEW),
    _drift(f"{DRIFT}, random delta", "adaptive_cosine", "random:7", tuned_as=DRIFT, **_FEW),
    _drift(f"{DRIFT}, permuted delta", "adaptive_cosine", "permuted:7", tuned_as=DRIFT, **_FEW),
    _merged("linear", "linear", knob_values=_FEW_WEIGHTS),
    _merged("chat-vector", "chat-vector", knob_values=_FEW_WEIGHTS),
    _merged("ties", "ties", knob_values=_FEW_WEIGHTS),
    Row("linear, then SFT", merge={"method": "linear"}, knob_values=(0.3, 1.0), **_FEW),
)
