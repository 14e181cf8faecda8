"""The singular directions of a prior, by module: how many, what the first one holds."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from drift_merge.priors.manifest import Prior, matrices_of
from drift_merge.priors.summary import ORDER
from drift_merge.storage import fingerprints


@dataclass(frozen=True, slots=True)
class ModuleSpectrum:
    """Of the matrices of one module of the tower."""

    module: str
    num_matrices: int
    stable_rank: float  # median of ||A||_F^2 / sigma_1^2, 1 for a matrix of one direction
    least_stable_rank: float
    first_share: float  # sum of sigma_1^2 over sum of ||A||_F^2, in [0, 1]


def spectra(prior: Prior) -> list[ModuleSpectrum]:
    """Find the first singular value of every matrix of a prior as it is stored.

    Reads all of it; memory: one tensor in float32. Matrices of zeros count in no median.

    Args:
        prior: opened; its shards are here.

    Raises:
        CheckpointError: a shard is missing or broken.
        RecipeError: an old manifest does not say where q, k and v lie.
    """
    # Here: they need torch; the workspace spends torch's warning of read-only maps.
    import drift_merge.engine.workspace  # noqa: F401
    from drift_merge.priors.deltas import open_deltas

    found: dict[str, list[tuple[float, float]]] = {}  # squares: of sigma_1, of the norm
    with open_deltas(prior) as deltas:
        for name, entry in prior.tensors.items():
            matrices = matrices_of(name, entry, prior)
            if matrices:
                rows = deltas.read(name).float()
                squares = found.setdefault(str(entry["module"]), [])
                squares += [_squares(rows, m, f"{name} {i}") for i, m in enumerate(matrices)]
        deltas.require_unchanged()
    return [_spectrum(module, found[module]) for module in ORDER if module in found]


def _squares(rows: Any, matrix: Any, key: str) -> tuple[float, float]:
    import torch

    from drift_merge.maths.spectra.leading import leading
    from drift_merge.maths.spectra.norms import frobenius

    parts = [rows[a:b, slice(*matrix.cols)] for a, b in matrix.rows]
    whole = torch.cat(parts).contiguous()
    first = leading(whole, 1, fingerprints.key_of("spectra", key)).values
    return float(first[0]) ** 2, frobenius(whole) ** 2


def _spectrum(module: str, squares: list[tuple[float, float]]) -> ModuleSpectrum:
    ranks = [norm / first for first, norm in squares if first > 0.0]
    total = sum(norm for _, norm in squares)
    return ModuleSpectrum(
        module,
        len(squares),
        median(ranks) if ranks else 0.0,
        min(ranks, default=0.0),
        sum(first for first, _ in squares) / total if total else 0.0,
    )
