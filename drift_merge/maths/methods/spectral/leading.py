"""Sums of task vectors, each after a spectral step: its leading directions at its norm.

    theta = start + sum of c_i step(tau_i), tau_i = theta_i - base, or theta_i - mllm

Vectors, and tensors that hold no projection, are added as they are, with the same weights.
"""

from functools import partial, wraps

from torch import Tensor

from drift_merge.maths.chunks import Chunk, MethodSettings, Read
from drift_merge.maths.masks import mixed_key
from drift_merge.maths.methods import elementwise
from drift_merge.maths.methods.spectral.by_matrix import ByMatrix, Gather, tau, theta
from drift_merge.maths.methods.table import Combine
from drift_merge.maths.spectra.bands import parse_bands
from drift_merge.maths.spectra.steps import SpectralStep


def step_of(settings: MethodSettings) -> SpectralStep | None:
    """The step that the options ask for; None if they ask for none."""
    numbers, words = settings.numbers, settings.words
    norm = words.get("norm", "none")
    if numbers.get("eta"):
        return SpectralStep(eta=numbers["eta"], norm=norm)
    if numbers.get("rank"):
        return SpectralStep(rank=int(numbers["rank"]), norm=norm)
    if words.get("bands", "none") != "none":
        return SpectralStep(bands=parse_bands(words["bands"]))
    return None if settings.gates is None else SpectralStep(gates=settings.gates)


def measure(read: Read, settings: MethodSettings) -> ByMatrix | None:
    """What is added to each matrix, negated; None where nothing but the plain weights is asked."""
    step = step_of(settings)
    if step is None or not settings.matrices:
        return None
    return ByMatrix(read, settings, partial(_subtrahend, step=step, settings=settings))


def _subtrahend(
    gather: Gather, key: int, *, step: SpectralStep, settings: MethodSettings
) -> Tensor:
    """- sum of c_i step(tau_i) of one matrix; +0.0 where it is zero."""
    total: Tensor | None = None
    take = theta if settings.flags.get("is_delta") else tau
    for number, weight in enumerate(_coefficients(settings)[1], start=1):
        if weight == 0.0 and total is not None:
            continue
        changed = step.apply(gather(take(number)), mixed_key(key, number)).mul_(-weight)
        total = changed if total is None else total.add_(changed)
    assert total is not None
    return total.add_(0.0)  # -0.0 becomes +0.0: to subtract that leaves every number as it is


def _coefficients(settings: MethodSettings) -> tuple[float, tuple[float, ...]]:
    """Of the mllm's own task vector, and of the reasoners'."""
    scale, own = settings.numbers.get("scale", 1.0), 1.0
    if "normalize" in settings.flags:  # task arithmetic
        if settings.flags["normalize"]:
            total = settings.mllm_weight + sum(settings.weights)
            scale /= total if abs(total) >= 1e-8 else 1.0
        own = scale * settings.mllm_weight
    return own, tuple(scale * weight for weight in settings.weights)


def _with_step(plain: Combine) -> Combine:
    """A method that takes a spectral step where its options ask for one."""

    @wraps(plain)
    def combine(chunk: Chunk, state: ByMatrix | None, settings: MethodSettings) -> Tensor:
        if state is None:
            return plain(chunk, state, settings)
        own, _ = _coefficients(settings)
        subtrahend = state.entries(chunk)
        start = chunk.mllm
        if own != 1.0:  # base + c (mllm - base)
            assert chunk.base is not None
            start = elementwise.add_deltas(chunk.mllm, [], chunk.base, own, [])
        return start.sub_(subtrahend)

    return combine


linear = _with_step(elementwise.linear)
inject = _with_step(elementwise.inject)
chat_vector = _with_step(elementwise.chat_vector)
task_arithmetic = _with_step(elementwise.task_arithmetic)
