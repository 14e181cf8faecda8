"""What a handle says of a training run. Only here does anything wait for the device.

cosine        cos(g, delta)
bias_ratio    |alpha * c * delta| / |g|: the strength of the prior against the data
coefficient   alpha * c
distance      <theta - theta_0, delta> / |delta|^2: 0 at the start, 1 at the reasoner

arrived are the tensors that `until` did not pull at the last step. delta is what the rule uses of
it, except in distance.
"""

from collections.abc import Sequence
from dataclasses import asdict
from math import isnan, nan, sqrt
from typing import Any

from torch import Tensor

from drift_merge.training.inject.injector import Injector
from drift_merge.training.inject.pieces import DELTA_SQ, DOT, GRAD_SQ
from drift_merge.training.match.coverage import Coverage

FIGURES = ("cosine", "bias_ratio", "coefficient", "distance")


def make_report(
    injectors: Sequence[Injector],
    coverage: Coverage,
    start: Tensor | None,
    *,
    rule: str,
    control: str | None,
    steps: int,
    expected_distance: float | None,
) -> dict[str, Any]:
    """The report of the last step, as plain data.

    Args:
        injectors: at work; one, or one for each parameter.
        coverage: of the matching.
        start: theta_0 * delta of all slots; None before the first step where gradients are
            sharded.
        rule: its name.
        control: what stands in delta's place, if anything.
        steps: that were biased.
        expected_distance: of a step, see `training.strength`.
    """
    names = [name for injector in injectors for name in injector.slots.names]
    modules = [module for injector in injectors for module in injector.slots.modules]
    rows = _all_rows(injectors, start)
    by_module = {
        module: _figures([row for row, own in zip(rows, modules, strict=True) if own == module])
        for module in dict.fromkeys(modules)
    }
    pieces = [piece for injector in injectors for piece in injector.missing]
    missing = sorted({name for piece in pieces for name in piece.parameter_names})
    stopped = [flag for injector in injectors for flag in injector.arrived.tolist()]
    arrived = [name for name, flag in zip(names, stopped, strict=True) if flag]
    return {
        "rule": rule,
        "control": control,
        "steps": steps,
        "coverage": asdict(coverage) | {"text": coverage.text()},
        "missing_gradients": {"count": len(missing), "names": missing},
        "arrived": {"count": len(arrived), "names": arrived},
        "expected_distance": expected_distance,
        **_figures(rows),
        "modules": by_module,
        "tensors": {name: _figures([row]) for name, row in zip(names, rows, strict=True)},
    }


def flatten(report: dict[str, Any], alphas: dict[str, float]) -> dict[str, float]:
    """The figures that a trainer logs: `drift/cosine`, `drift/attn/cosine`, `drift/alpha`, ...

    Args:
        report: of `make_report`.
        alphas: strength of each module at the last step.
    """
    found: dict[str, float] = {}
    for prefix, figures in [("drift", report)] + [
        (f"drift/{module}", figures) for module, figures in report["modules"].items()
    ]:
        for key in FIGURES:
            if figures[key] is not None:
                found[f"{prefix}/{key}"] = figures[key]
    for module, alpha in alphas.items():
        found[f"drift/{module}/alpha"] = alpha
    found["drift/alpha"] = max(alphas.values(), key=abs)
    found["drift/arrived"] = float(report["arrived"]["count"])
    found["drift/missing_gradients"] = float(report["missing_gradients"]["count"])
    return found


Row = tuple[float, float, float, float, float, float]  # the fifth is NaN where it is not known


def _all_rows(injectors: Sequence[Injector], start: Tensor | None) -> list[Row]:
    rows: list[Row] = []
    for injector in injectors:
        begin, end = len(rows), len(rows) + len(injector.slots.names)
        rows += _rows(injector, None if start is None else start[begin:end])
    return rows


def _rows(injector: Injector, start: Tensor | None) -> list[Row]:
    """By slot: g*g, g*delta, delta*delta, alpha * c, distance's numerator and denominator."""
    slots = injector.slots
    delta_sq = slots.delta_sq + injector.sums[:, DELTA_SQ]
    columns = [injector.sums[:, GRAD_SQ], injector.sums[:, DOT], delta_sq, injector.strength]
    lists = [column.tolist() for column in columns]
    aim = slots.aim_sq.tolist()
    moved = [nan] * len(aim)
    if start is not None:
        moved = (injector.positions()[:, DOT] - start.to(injector.device)).tolist()
    return list(zip(*lists, moved, aim, strict=True))


def _figures(rows: Sequence[Row]) -> dict[str, float | None]:
    """The figures of some tensors together."""
    grad_sq, dot, delta_sq = (sum(column) for column in list(zip(*rows, strict=True))[:3])
    bias_sq = sum(row[3] ** 2 * row[2] for row in rows)
    moved = sum(row[4] for row in rows)
    return {
        "cosine": _ratio(dot, sqrt(grad_sq * delta_sq)),
        "bias_ratio": _ratio(sqrt(bias_sq), sqrt(grad_sq)),
        "coefficient": _ratio(sum(row[3] for row in rows), len(rows)),
        "distance": None if isnan(moved) else _ratio(moved, sum(row[5] for row in rows)),
    }


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
