"""Methods of directions and angles: a Gram matrix is measured, coefficients follow from it.

The merged vectors are v_0 = theta_m and v_i = theta_i, or with a base v_x = theta_x - theta_b.
Their inner products are folded as those of v_0 and the differences d_i = v_i - v_0: close
relatives have angles that float32 products of the vectors themselves would lose. The squares of
the v_i are summed too: next to a much longer v_0 they would be lost in those sums.

Shapes: N = merged models: the mllm first, then the reasoners.
"""

from collections.abc import Callable, Sequence
from math import acos, asin, cos, fsum, pi, sin, sqrt
from typing import NamedTuple

from torch import Tensor, dot

from drift_merge.maths.chunks import Chunk, MethodSettings, Read, blocks
from drift_merge.maths.methods.elementwise import add_deltas, combination
from drift_merge.maths.methods.taus import all_weights


class Gram(NamedTuple):
    """Inner products of N vectors, measured so that neither small angles nor lengths are lost."""

    basis: list[list[float]]  # N x N: of v_0, d_1, ..., d_{N-1}
    squares: list[float]  # N: of each v_i with itself
    direct: list[float]  # N: of v_0 with each v_i


# Float32 products do not tell an angle this close to pi from pi, and 1 / sin would make much of it.
OPPOSITE = pi - 0.004
# Between vectors of such different lengths the angle comes from their product: the difference,
# which keeps small angles exact, is hardly but the longer one.
LONGER = 4.0


def gram(read: Read) -> Gram | None:
    """Inner products over a whole tensor; float64 across blocks of fixed positions.

    None for a tensor without entries.
    """
    sums: list[list[float]] = []
    lengths = [(0.0, 0.0)]
    for block in blocks(read):
        first, *rest = vectors(block)
        found = [(float(dot(v, v)), float(dot(first, v))) for v in rest]
        lengths = lengths if sums else [(0.0, 0.0)] * len(found)
        lengths = [(a + c, b + d) for (a, b), (c, d) in zip(lengths, found, strict=True)]
        over = basis(block)
        sums = sums or [[0.0] * len(over) for _ in over]
        for i, one in enumerate(over):
            for j in range(i + 1):
                sums[i][j] += float(dot(one, over[j]))
    if not sums:
        return None
    whole = [[sums[max(i, j)][min(i, j)] for j in range(len(sums))] for i in range(len(sums))]
    square = whole[0][0]
    return Gram(whole, [square, *(a for a, _ in lengths)], [square, *(b for _, b in lengths)])


def vectors(chunk: Chunk) -> list[Tensor]:
    """v_0, v_1, ..., v_{N-1}; the chunk stays as it is."""
    models = [chunk.mllm, *chunk.reasoners]
    return models if chunk.base is None else [model - chunk.base for model in models]


def basis(chunk: Chunk) -> list[Tensor]:
    """v_0, d_1, ..., d_{N-1}, written over the chunk."""
    differences = [reasoner.sub_(chunk.mllm) for reasoner in chunk.reasoners]
    first = chunk.mllm if chunk.base is None else chunk.mllm.sub_(chunk.base)
    return [first, *differences]


def product(products: Gram, i: int, j: int) -> float:
    """The inner product of v_i and v_j."""
    if i == j:
        return products.squares[i]
    found = products.basis
    terms = [found[0][0]]
    terms += [found[0][i]] if i else []
    terms += [found[0][j]] if j else []
    terms += [found[i][j]] if i and j else []
    return fsum(terms)


def combined(chunk: Chunk, coefficients: Sequence[float]) -> Tensor:
    """sum(c_i v_i), plus the base if there is one."""
    own, *others = coefficients
    if chunk.base is None or abs(fsum(coefficients) - 1.0) <= 1e-12:
        return combination(chunk.mllm, chunk.reasoners, own, others)
    return add_deltas(chunk.mllm, chunk.reasoners, chunk.base, own, others)


def angle(products: Gram) -> float | None:
    """The angle between v_0 and v_1 in [0, pi], exact for small ones too; None if one is 0."""
    along, step = products.basis[0][1], products.basis[1][1]
    one, other = (sqrt(square) for square in products.squares[:2])
    if one * other == 0.0:
        return None
    if max(one, other) > LONGER * min(one, other):
        return acos(max(-1.0, min(1.0, products.direct[1] / (one * other))))
    # |a/|a| - b/|b||^2 by the law of cosines; |a| - |b| from the difference, not from two roots.
    gap = (2.0 * along + step) / (one + other)
    chord = sqrt(max(step - gap * gap, 0.0) / (one * other))
    return 2.0 * asin(min(chord / 2.0, 1.0))


def angle_of(products: Gram, settings: MethodSettings) -> float | None:
    """`angle`; in variant `mergekit` pi / 2 where one of the two vectors is 0, and not both."""
    theta = angle(products)
    if theta is None and settings.variant == "mergekit" and sum(products.squares[:2]) > 0.0:
        return pi / 2.0
    return theta


def arc(t: float, theta: float | None, *, straight_above: float) -> tuple[float, float]:
    """sin((1-t) theta) / sin(theta) and sin(t theta) / sin(theta); 1-t and t on a straight line.

    The line is taken where |cos theta| is above `straight_above`, and where no arc is defined:
    at angles 0 and (within 0.004) pi, and for a zero vector (theta is None).
    """
    if theta is None or theta == 0.0 or abs(cos(theta)) > straight_above or theta > OPPOSITE:
        return 1.0 - t, t
    return sin((1.0 - t) * theta) / sin(theta), sin(t * theta) / sin(theta)


Solve = Callable[[Gram, MethodSettings], Sequence[float]]


def solved(solve: Solve) -> Callable[[Read, MethodSettings], list[float]]:
    """The `measure` of a method whose coefficients follow from the Gram matrix."""

    def measure(read: Read, settings: MethodSettings) -> list[float]:
        products = gram(read)
        return [] if products is None else list(solve(products, settings))

    return measure


def combine(chunk: Chunk, state: list[float], settings: MethodSettings) -> Tensor:
    """theta = sum(c_i v_i), plus the base if there is one, with the measured coefficients."""
    return combined(chunk, state)


def slerp(products: Gram, settings: MethodSettings) -> Sequence[float]:
    """theta = sin((1-t) Omega) / sin(Omega) theta_m + sin(t Omega) / sin(Omega) theta_1.

    Omega is the angle between the two whole tensors. Shoemake, "Animating rotation with
    quaternion curves", SIGGRAPH 1985, section 3.3, used on weights by mergekit and others; no
    paper defines it for them. In `paper` the arc is followed at every angle (its limit at 0 is
    the line); `mergekit` takes the line where |cos Omega| > 0.9995, and an angle of pi / 2 where
    one tensor is 0. The reasoner's weight multiplies t, so that t can differ between tensors.
    """
    theta = angle_of(products, settings)
    t = settings.weights[0] * settings.numbers["t"]
    return arc(t, theta, straight_above=settings.numbers["dot_threshold"])


def multislerp(products: Gram, settings: MethodSettings) -> Sequence[float]:
    """theta = A * m / |m|, m = sum(w_i v_i / |v_i|), A = sum(w_i |v_i|); with a base on tau.

    Goddard, "Multi-SLERP" (goddard.blog/posts/multislerp-wow-what-a-cool-idea, no paper): the
    tangent vectors at the weighted mean direction are averaged and mapped back to the sphere.
    Weighted by the same w they sum to 0, so that the result is the mean direction itself.
    Weights are divided by their sum (with `normalize`). Where m is 0: the weighted sum.
    """
    weights = _normalized(settings)
    count, eps = len(weights), settings.numbers["eps"]
    norms = [sqrt(max(product(products, i, i), 0.0)) for i in range(count)]
    units = [w / (n + eps) for w, n in zip(weights, norms, strict=True)]
    mean = _length(products, units)
    if mean <= eps:
        return weights
    average = fsum(w * n for w, n in zip(weights, norms, strict=True))
    return [average * u / mean for u in units]


def karcher(products: Gram, settings: MethodSettings) -> Sequence[float]:
    """theta = A * mu, mu the Karcher mean of the directions v_i / |v_i|, A = sum(a_i |v_i|).

    mu minimizes sum(a_i angle(mu, v_i)^2); a_i are the weights divided by their sum. Fixed-point
    iteration in the tangent space, at most `max_iter` steps, until a step is below `tol`.
    Karcher, "Riemannian center of mass and mollifier smoothing", 1977, section 1; on weights as in
    mergekit (uniform there). Vectors of length 0 have no direction; their weight in A remains.
    """
    weights = _normalized(settings)
    norms = [sqrt(max(product(products, i, i), 0.0)) for i in range(len(weights))]
    valid = [norm > 0.0 for norm in norms]
    total = fsum(w for w, ok in zip(weights, valid, strict=True) if ok)
    if total == 0.0:
        return weights
    shares = [w / total if ok else 0.0 for w, ok in zip(weights, valid, strict=True)]
    directions = [1.0 / n if ok else 0.0 for n, ok in zip(norms, valid, strict=True)]
    mean = _karcher_mean(products, shares, directions, settings)
    average = fsum(w * n for w, n in zip(weights, norms, strict=True))
    return [average * c for c in mean]


def _karcher_mean(
    products: Gram, shares: Sequence[float], directions: Sequence[float], settings: MethodSettings
) -> list[float]:
    """Coefficients of the Karcher mean over v_i; `directions` holds 1 / |v_i|, 0 if undefined."""
    tol, indices = settings.numbers["tol"], range(len(shares))
    mean = [a * u for a, u in zip(shares, directions, strict=True)]
    length = _length(products, mean)
    if length < tol:
        first = next(i for i in indices if directions[i])
        mean = [directions[i] if i == first else 0.0 for i in indices]
    else:
        mean = [c / length for c in mean]
    for _ in range(int(settings.numbers["max_iter"])):
        tangent = [0.0 for _ in indices]
        for i in indices:
            inner = fsum(mean[j] * product(products, i, j) for j in indices) * directions[i]
            inner = min(1.0, max(-1.0, inner))
            theta = acos(inner)
            if not directions[i] or theta < tol:
                continue
            factor = shares[i] * (theta / sin(theta) if sin(theta) else 1.0)
            tangent = [x - factor * inner * c for x, c in zip(tangent, mean, strict=True)]
            tangent[i] += factor * directions[i]
        step = _length(products, tangent)
        if step < tol:
            break
        mean = [cos(step) * c + sin(step) / step * x for c, x in zip(mean, tangent, strict=True)]
        length = _length(products, mean)
        mean = [c / length for c in mean] if length > tol else mean
    return mean


def _length(products: Gram, coefficients: Sequence[float]) -> float:
    """|sum(c_i v_i)|, from |sum(c_i) v_0 + sum(c_i d_i)|: exact where the c_i cancel."""
    over_basis = [fsum(coefficients), *coefficients[1:]]
    rows = zip(over_basis, products.basis, strict=True)
    square = fsum(a * b * x for a, row in rows for b, x in zip(over_basis, row, strict=True))
    return sqrt(max(square, 0.0))


def _normalized(settings: MethodSettings) -> list[float]:
    weights = all_weights(settings)
    total = fsum(weights) if settings.flags["normalize"] else 1.0
    return [w / total for w in weights]


measure_slerp = solved(slerp)
measure_multislerp = solved(multislerp)
measure_karcher = solved(karcher)
