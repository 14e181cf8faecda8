"""The methods on singular directions once more: in float64, whole, written from the papers.

Apart from `drift_merge` in every line. Task vectors are matrices (m, n), the mllm's first.
"""

from collections.abc import Sequence
from math import ceil, exp

import torch
from torch import Tensor

Matrices = Sequence[Tensor]


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of a float64 copy."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u, s, vt.T


def leading(delta: Tensor, rank: int, norm: str) -> Tensor:
    """N_k(Delta) (Selective-RL, a preprint): the leading k directions at the norm of all."""
    _, s, _ = parts = svd(delta)
    kept = directions(parts, [1.0] * rank)
    sizes = {"frobenius": lambda x: float((x**2).sum() ** 0.5), "nuclear": lambda x: float(x.sum())}
    if norm == "none" or not s[:rank].any():
        return kept
    return kept * sizes[norm](s) / sizes[norm](s[:rank])


def directions(parts: tuple[Tensor, Tensor, Tensor], factors: Sequence[float]) -> Tensor:
    """sum factor_i sigma_i u_i v_i^T, one direction after the other."""
    u, s, v = parts
    total = torch.zeros(u.shape[0], v.shape[0], dtype=torch.float64)
    for i, factor in enumerate(factors[: len(s)]):
        total += factor * s[i] * torch.outer(u[:, i], v[:, i])
    return total


def star_rank(delta: Tensor, eta: float) -> int:
    """The fewest directions whose values sum to eta percent (STAR, arXiv 2502.10339)."""
    _, s, _ = svd(delta)
    rank = 1
    while s[:rank].sum() < s.sum() * eta / 100:
        rank += 1
    return rank


def star(taus: Matrices, eta: float) -> Tensor:
    """The mean of the truncated and rescaled task vectors."""
    return sum(leading(t, star_rank(t, eta), "nuclear") for t in taus) / len(taus)  # type: ignore[return-value]


def polar(matrix: Tensor) -> Tensor:
    """X (X^T X)^(-1/2): the nearest orthonormal columns, by the inverse square root."""
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    return matrix @ (vectors * values.rsqrt()) @ vectors.T


def tsv_m(taus: Matrices) -> Tensor:
    """TSV-Merge (arXiv 2412.00081, algorithm 1)."""
    rank = min(taus[0].shape) // len(taus)
    parts = [svd(tau) for tau in taus]
    u, v = (torch.cat([p[i][:, :rank] for p in parts], 1) for i in (0, 2))
    s = torch.cat([p[1][:rank] for p in parts])
    return polar(u) @ torch.diag(s) @ polar(v).T


def iso_c(taus: Matrices) -> Tensor:
    """Iso-C (arXiv 2502.04959, section 4.1)."""
    u, s, v = svd(sum(taus))  # type: ignore[arg-type]
    return s.mean() * (u @ v.T)


def iso_cts(taus: Matrices, common: float) -> Tensor:
    """Iso-CTS (arXiv 2502.04959, section 4.2)."""
    u, s, v = svd(sum(taus))  # type: ignore[arg-type]
    own = round((len(s) - int(len(s) * common)) / len(taus))
    k = len(s) - own * len(taus)
    us, ss, vs = [u[:, :k]], [s[:k]], [v[:, :k]]
    for tau in taus:
        mine = svd(tau.double() - u[:, :k] @ u[:, :k].T @ tau.double())
        for found, new in zip((us, ss, vs), mine, strict=True):
            found.append(new[..., :own])
    return torch.cat(ss).mean() * polar(torch.cat(us, 1)) @ polar(torch.cat(vs, 1)).T


def swudi(taus: Matrices, time: float, share: float) -> Tensor:
    """The flow of WUDI's objective on the largest directions (MLLMerging, May 2026)."""
    c, d = _gram(taus)
    values, vectors = torch.linalg.eigh(c)
    kept = ceil(share * len(values))
    f = torch.tensor([1.0 - exp(-time * max(x, 1e-8)) for x in values.tolist()]).double()
    f[: len(values) - kept] = 0.0
    return _solved(taus, d, values, vectors, f)


def aswudi(taus: Matrices) -> Tensor:
    """The minimum itself on (sum sqrt l)^2 / sum l directions."""
    c, d = _gram(taus)
    values, vectors = torch.linalg.eigh(c)
    clamped = values.clamp(min=1e-8)
    kept = ceil(float(clamped.sqrt().sum() ** 2 / clamped.sum()))
    f = torch.ones_like(values)
    f[: max(0, len(values) - kept)] = 0.0
    return _solved(taus, d, values, vectors, f)


def wudi_objective(merged: Tensor, taus: Matrices) -> float:
    """sum ||(tau - tau_i) tau_i^T||^2 / ||tau_i||^2 (arXiv 2503.08099, equation 8)."""
    found = [((merged - t) @ t.T).square().sum() / t.square().sum() for t in taus]
    return float(sum(found))


def _gram(taus: Matrices) -> tuple[Tensor, Tensor]:
    wide = [tau.double() for tau in taus if tau.any()]
    c = sum(t.T @ t / t.square().sum() for t in wide)
    d = sum(t @ t.T @ t / t.square().sum() for t in wide)
    return c, d  # type: ignore[return-value]


def _solved(taus: Matrices, d: Tensor, values: Tensor, vectors: Tensor, f: Tensor) -> Tensor:
    start = sum(tau.double() for tau in taus)
    through = vectors @ torch.diag(f) @ vectors.T
    inverse = vectors @ torch.diag(f / values.clamp(min=1e-8)) @ vectors.T
    return start - start @ through + d @ inverse  # type: ignore[return-value]


def svc(merged: Tensor, taus: Matrices, alpha: float) -> Tensor:
    """Singular value calibration (arXiv 2602.05536, equations 4 and 8), direction by direction."""
    u, s, v = svd(merged)
    total = torch.zeros_like(merged.double())
    for r in range(len(s)):
        response = u[:, r] @ merged.double()
        shares = []
        for tau in taus:
            own = u[:, r] @ tau.double()
            if own.norm() > 1e-12 * tau.norm():
                shares.append(max(alpha, float(response @ own / (own @ own))))
        gamma = len(shares) / sum(shares) if shares else 1.0
        total += gamma * s[r] * torch.outer(u[:, r], v[:, r])
    return total


def ram(taus: Sequence[Sequence[float]], threshold: float, factors: Sequence[float]) -> list[float]:
    """RAM and RAM+ (arXiv 2601.13572), entry by entry."""
    merged = []
    for column in zip(*taus, strict=True):
        changed = [(t, f) for t, f in zip(column, factors, strict=True) if abs(t) > threshold]
        if len(changed) == 1:
            merged.append(changed[0][0] * changed[0][1])
        else:
            merged.append(sum(t for t, _ in changed) / max(1, len(changed)))
    return merged


def ram_plus_factors(
    taus: Sequence[Sequence[float]], threshold: float, boost: float, most: float
) -> list[float]:
    """1 + r clip(shared / unique, 0, alpha) of each model."""
    shared, unique = [0] * len(taus), [0] * len(taus)
    for column in zip(*taus, strict=True):
        changed = [i for i, t in enumerate(column) if abs(t) > threshold]
        for i in changed:
            (unique if len(changed) == 1 else shared)[i] += 1
    return [
        1 + boost * min(s / max(u, threshold), most) for s, u in zip(shared, unique, strict=True)
    ]


def magmax(taus: Sequence[Sequence[float]]) -> list[float]:
    """MagMax (arXiv 2407.06322): of equal magnitudes the later one."""
    merged = []
    for column in zip(*taus, strict=True):
        best = column[0]
        for value in column[1:]:
            best = value if abs(value) >= abs(best) else best
        merged.append(best)
    return merged


def frank(squared: Sequence[Sequence[float]], decay: float) -> list[list[float]]:
    """FRANK's weights (arXiv 2505.16151, equations 15 and 16): of every layer, the mllm first."""
    total = sum(exp(-decay * j) for j in range(1, len(squared) + 1))
    found = []
    for number, norms in enumerate(squared, start=1):
        own = exp(-decay * number) / total
        parts = [own * norms[0], *((1 - own) * norm for norm in norms[1:])]
        found.append([part / sum(parts) for part in parts])
    return found
