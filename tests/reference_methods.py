"""The merge methods once more: naive, in float64, written from the papers, one entry at a time.

Slow on purpose, and apart from `drift_merge.maths.methods` in every line: whole tensors as lists
of numbers, sorted where a paper says "largest". `models` holds the mllm first, then the reasoners;
`base` is their ancestor. Random masks come from outside, as lists of 0 and 1.
"""

from collections.abc import Sequence
from math import acos, cos, exp, log, pi, sin, sqrt

Vector = Sequence[float]


def deltas(models: Sequence[Vector], base: Vector) -> list[list[float]]:
    """tau_i = theta_i - theta_b (task vectors, arXiv 2212.04089, section 2)."""
    return [[x - b for x, b in zip(model, base, strict=True)] for model in models]


def add(base: Vector, tau: Vector, scale: float = 1.0) -> list[float]:
    return [b + scale * x for b, x in zip(base, tau, strict=True)]


def weighted(vectors: Sequence[Vector], weights: Vector) -> list[float]:
    return [
        sum(w * x for w, x in zip(weights, column, strict=True))
        for column in zip(*vectors, strict=True)
    ]


def dot(one: Vector, other: Vector) -> float:
    return sum(x * y for x, y in zip(one, other, strict=True))


def norm(vector: Vector) -> float:
    return sqrt(dot(vector, vector))


def largest(values: Vector, count: int) -> set[int]:
    """Positions of the `count` largest magnitudes; equal ones by position."""
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    return set(order[:count])


def keep(values: Vector, positions: set[int]) -> list[float]:
    return [x if i in positions else 0.0 for i, x in enumerate(values)]


def sgn(x: float) -> int:
    return (x > 0) - (x < 0)


def elect_and_average(taus: Sequence[Vector], weights: Vector) -> list[float]:
    """TIES (arXiv 2306.01708, section 3): gamma = sgn(sum), mean over those that agree."""
    merged = []
    for column in zip(*taus, strict=True):
        values = [w * x for w, x in zip(weights, column, strict=True)]
        elected = sgn(sum(values))
        agreeing = [(v, w) for v, w in zip(values, weights, strict=True) if sgn(v) == elected]
        total = sum(w for _, w in agreeing)
        merged.append(sum(v for v, _ in agreeing) / total if elected and total else 0.0)
    return merged


def ties(models: Sequence[Vector], base: Vector, density: float, scale: float) -> list[float]:
    """Algorithm 1 of arXiv 2306.01708, trimming per tensor, without weights."""
    count = max(1, round(density * len(base)))
    taus = [keep(tau, largest(tau, count)) for tau in deltas(models, base)]
    return add(base, elect_and_average(taus, [1.0] * len(taus)), scale)


def breadcrumbs_taus(
    models: Sequence[Vector], base: Vector, density: float, gamma: float
) -> list[list[float]]:
    """Masks of arXiv 2312.06795, section 3: without outliers and without small entries."""
    numel = len(base)
    dropped = min(round(gamma * numel), numel - 1)
    count = min(max(1, round(density * numel)), numel - dropped)
    return [
        keep(tau, largest(tau, dropped + count) - largest(tau, dropped))
        for tau in deltas(models, base)
    ]


def dare_taus(
    models: Sequence[Vector], base: Vector, masks: Sequence[Vector], density: float
) -> list[list[float]]:
    """arXiv 2311.03099, section 3.2: drop with p = 1 - density, divide by 1 - p."""
    return [
        [m * x / density for m, x in zip(mask, tau, strict=True)]
        for mask, tau in zip(masks, deltas(models, base), strict=True)
    ]


def della_odds(row: Vector, density: float, epsilon: float) -> list[float]:
    """arXiv 2406.11617, section 3 (MagPrune): keep probability linear in the rank in the row."""
    if len(row) == 1:
        return [density]
    order = sorted(range(len(row)), key=lambda i: (abs(row[i]), -i))  # smallest first
    odds = [0.0] * len(row)
    for rank, position in enumerate(order):
        odds[position] = density - epsilon + 2 * epsilon * rank / (len(row) - 1)
    return odds


def sce(models: Sequence[Vector], base: Vector, density: float, scale: float) -> list[float]:
    """arXiv 2408.07990, SCE: select by variance, calculate eta, erase minority signs, add."""
    taus = deltas(models, base)
    spread = []
    for column in zip(*taus, strict=True):
        mean = sum(column) / len(column)
        spread.append(sum((x - mean) ** 2 for x in column) / len(column))
    if density < 1:
        selected = largest(spread, max(1, round(density * len(base))))
        taus = [keep(tau, selected) for tau in taus]
    squares = [dot(tau, tau) for tau in taus]
    total = sum(squares)
    etas = [s / total if total else 1 / len(taus) for s in squares]
    merged = []
    for column in zip(*taus, strict=True):
        elected = sgn(sum(column))
        merged.append(sum(e * x for e, x in zip(etas, column, strict=True) if sgn(x) == elected))
    return add(base, merged, scale)


def consensus_ta(
    models: Sequence[Vector], base: Vector, mask_lambda: float, agreement: int, scale: float
) -> list[float]:
    """arXiv 2405.07813: m_t = [|tau_t| >= lambda |tau_MTL - tau_t|], kept where enough agree."""
    taus = deltas(models, base)
    merged = []
    for column in zip(*taus, strict=True):
        total = sum(column)
        votes = sum(abs(x) >= mask_lambda * abs(total - x) for x in column)
        merged.append(total if votes >= agreement else 0.0)
    return add(base, merged, scale)


def slerp(one: Vector, other: Vector, t: float) -> list[float]:
    """Shoemake 1985: along the great arc between two directions; a line where there is none."""
    if not norm(one) or not norm(other):
        return weighted([one, other], [1 - t, t])
    omega = acos(max(-1.0, min(1.0, dot(one, other) / norm(one) / norm(other))))
    if omega < 1e-9 or omega > pi - 0.004:
        return weighted([one, other], [1 - t, t])
    return weighted([one, other], [sin((1 - t) * omega) / sin(omega), sin(t * omega) / sin(omega)])


def model_stock(models: Sequence[Vector], base: Vector) -> list[float]:
    """arXiv 2403.19522: t = N cos / (1 + (N - 1) cos), clamped to [0, 1]."""
    taus, count = deltas(models, base), len(models)
    cosines = []
    for i in range(count):
        for j in range(i):
            scale = norm(taus[i]) * norm(taus[j])
            cosines.append(dot(taus[i], taus[j]) / scale if scale else 0.0)
    mean = sum(cosines) / len(cosines)
    below = 1 + (count - 1) * mean
    t = min(1.0, max(0.0, count * mean / below)) if below else 0.0
    average = weighted(models, [1 / count] * count)
    return weighted([average, base], [t, 1 - t])


def multislerp(models: Sequence[Vector], weights: Vector) -> list[float]:
    """Goddard's multi-SLERP with its tangent step written out."""
    shares = [w / sum(weights) for w in weights]
    units = [[x / norm(model) for x in model] for model in models]
    mean = weighted(units, shares)
    mean = [x / norm(weighted(units, shares)) for x in mean]
    tangents = [
        [x - dot(unit, mean) * m for x, m in zip(unit, mean, strict=True)] for unit in units
    ]
    step = weighted(tangents, shares)
    length = norm(step)
    moved = [
        cos(length) * m + x * (sin(length) / length if length else 1.0)
        for m, x in zip(mean, step, strict=True)
    ]
    size = sum(s * norm(model) for s, model in zip(shares, models, strict=True))
    return [size * x for x in moved]


def karcher(models: Sequence[Vector], weights: Vector, steps: int = 200) -> list[float]:
    """The point of the sphere with the least weighted sum of squared angles, by descent."""
    shares = [w / sum(weights) for w in weights]
    units = [[x / norm(model) for x in model] for model in models]
    mean = weighted(units, shares)
    mean = [x / norm(weighted(units, shares)) for x in mean]
    for _ in range(steps):
        step = [0.0] * len(mean)
        for share, unit in zip(shares, units, strict=True):
            inner = max(-1.0, min(1.0, dot(mean, unit)))
            angle = acos(inner)
            factor = share * (angle / sin(angle) if angle > 1e-9 else 1.0)
            step = [s + factor * (u - inner * m) for s, u, m in zip(step, unit, mean, strict=True)]
        length = norm(step)
        if length < 1e-15:
            break
        mean = [cos(length) * m + sin(length) / length * s for m, s in zip(mean, step, strict=True)]
    size = sum(s * norm(model) for s, model in zip(shares, models, strict=True))
    return [size * x for x in mean]


def arcee_fusion(mllm: Sequence[Vector], reasoner: Sequence[Vector]) -> list[list[float]]:
    """Arcee Fusion on rows: |difference| KL(softmax reasoner || softmax mllm), Tukey's fence."""

    def softmax(row: Vector) -> list[float]:
        top = max(row)
        powers = [exp(x - top) for x in row]
        return [p / sum(powers) + 1e-8 for p in powers]

    importance = []
    for own, other in zip(mllm, reasoner, strict=True):
        pairs = list(zip(softmax(other), softmax(own), strict=True))
        divergence = sum(p * log(p / q) for p, q in pairs)
        importance.append(
            [max(0.0, abs(y - x) * divergence) for x, y in zip(own, other, strict=True)]
        )
    flat = sorted(x for row in importance for x in row)
    low, middle, high = (flat[int(q * (len(flat) - 1))] for q in (0.25, 0.5, 0.75))
    fence = middle + 1.5 * (high - low)
    return [
        [y if i >= fence else x for x, y, i in zip(own, other, row, strict=True)]
        for own, other, row in zip(mllm, reasoner, importance, strict=True)
    ]
