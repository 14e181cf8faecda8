"""Merging whole tensors in memory, through the same two phases as the stream."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from drift_merge.maths.chunks import MethodSettings, in_memory
from drift_merge.maths.methods import METHODS
from drift_merge.maths.methods.spectral import calibration
from drift_merge.maths.spectra.matrices import whole

SPECIAL = ("weight", "mllm_weight")


def settings_for(
    name: str,
    shape: Sequence[int],
    *,
    variant: str = "paper",
    weights: Sequence[float] | None = None,
    mllm_weight: float | None = None,
    reasoners: int = 1,
    key: int = 1234,
    gates: Tensor | None = None,
    **options: Any,
) -> MethodSettings:
    """Defaults of a method, overridden by what is given; unknown options are an error."""
    method = METHODS[name]
    values = dict(method.defaults[variant])
    known = {*values, *method.required.get(variant, ())}
    assert set(options) <= known, (name, variant, options)
    values |= options
    default = (values.get("weight", 1.0),) * reasoners
    return MethodSettings(
        weights=tuple(weights) if weights is not None else default,
        mllm_weight=values.get("mllm_weight", 1.0) if mllm_weight is None else mllm_weight,
        variant=variant,
        numbers={k: float(v) for k, v in values.items() if not isinstance(v, bool | str)},
        flags={k: v for k, v in values.items() if isinstance(v, bool)},
        words={k: v for k, v in values.items() if isinstance(v, str)},
        key=key,
        shape=tuple(shape),
        is_weighted=weights is not None,
        matrices=whole(shape),
        gates=gates,
    )


def merge_with(
    settings: MethodSettings,
    name: str,
    mllm: Tensor,
    reasoners: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    chunk_elements: int | None = None,
) -> Tensor:
    """The merged tensor in the compute dtype, in the shape of the mllm; inputs stay as they are."""
    method = METHODS[name]
    read = in_memory(mllm, reasoners, base, chunk_elements or max(mllm.numel(), 1))
    state = method.measure(read, settings) if method.measure else None
    combine = method.combine
    if calibration.is_asked(settings):
        state, combine = calibration.calibrated(read, settings, method, state)
    parts = [combine(chunk, state, settings).clone() for chunk in read()]
    return torch.cat(parts).reshape(mllm.shape) if parts else mllm.float().clone()


def merge(
    name: str,
    mllm: Tensor,
    reasoners: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    chunk_elements: int | None = None,
    **options: Any,
) -> Tensor:
    """`merge_with` the defaults of a method, overridden by options."""
    if METHODS[name].base == "none":
        base = None
    settings = settings_for(name, mllm.shape, reasoners=len(reasoners), **options)
    return merge_with(settings, name, mllm, reasoners, base, chunk_elements=chunk_elements)
