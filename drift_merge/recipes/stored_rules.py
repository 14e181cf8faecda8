"""What a recipe may say of how its output is stored: dtype, compression, rank."""

from drift_merge.errors import RecipeError, one_of
from drift_merge.recipes.words import DTYPE_CODES, NEAREST, NORMS, PRIOR, SOURCE_DTYPE, STOCHASTIC
from drift_merge.storage.forms.compressed import COMPRESSED


def check_stored(
    method: str, dtype: str, through: str | None, rank: int, norm: str, *, allow_nonfinite: bool
) -> None:
    """Refuse what cannot be, or would be of no effect; the arguments are fields of `Recipe`.

    Raises:
        RecipeError: naming the option, what it got and what it accepts.
    """
    compressed = list(COMPRESSED) if method == PRIOR else []
    one_of("--dtype", dtype, [*DTYPE_CODES, SOURCE_DTYPE, *compressed])
    one_of("--norm", norm, list(NORMS))
    if through is not None:
        one_of("--through", through, [*DTYPE_CODES, SOURCE_DTYPE])
        if dtype not in COMPRESSED and not rank:
            raise RecipeError(
                f"--through is {through}, but --dtype {dtype} is not compressed.",
                remedy=f"Leave it out, or compress: --dtype {' or '.join(COMPRESSED)}, or --rank K",
            )
    if dtype in COMPRESSED and allow_nonfinite:
        raise RecipeError(
            f"--dtype {dtype} cannot hold NaN or Inf, which --allow-nonfinite allows.",
            remedy="Leave one of them out.",
        )
    _check_factors(method, rank, norm)
    if rank and (dtype in COMPRESSED or allow_nonfinite):
        other = "--allow-nonfinite" if allow_nonfinite else f"--dtype {dtype}"
        raise RecipeError(
            f"--rank {rank} stores factors, which do not go with {other}.",
            remedy="Leave one of them out; factors are bfloat16 by default.",
        )


def _check_factors(method: str, rank: int, norm: str) -> None:
    """Refuse a rank or a norm that would be of no effect."""
    if method != PRIOR and (rank or norm != NORMS[0]):
        raise RecipeError(
            f"rank={rank}, norm={norm!r} are of a prior that is computed; {method} takes them among"
            " the options of a method.",
            remedy=f'In Python: options={{"rank": {rank or 1}, "norm": "{norm}"}}',
        )
    if rank < 0:
        raise RecipeError(
            f"--rank is {rank}; expected 1 or more.", remedy="To keep all of delta, leave it out."
        )
    if norm != NORMS[0] and not rank:
        raise RecipeError(
            f"--norm {norm} has no effect: it is for the directions that --rank keeps.",
            remedy="Add --rank 16, or leave --norm out.",
        )


def check_round(method: str, round: str) -> None:
    """Refuse a rounding that there is not, or that is not for priors.

    Raises:
        RecipeError: naming what it got and what it accepts.
    """
    one_of("--round", round, [NEAREST, STOCHASTIC])
    if method == PRIOR and round != NEAREST:
        raise RecipeError(
            f"--round {round} is for merges; a prior is rounded to nearest.",
            remedy="Leave --round out. To keep all of delta, add: --dtype float32",
        )
