"""A rank or a norm that would be of no effect is refused, never passed over."""

from dataclasses import replace

import pytest

from drift_merge.errors import RecipeError
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import PRIOR

PLAIN = Recipe(method=PRIOR, reasoners=("r",), mllm="m")


@pytest.mark.parametrize("changes", [{"rank": 2}, {"rank": 2, "norm": "nuclear"}])
def test_a_prior_takes_a_rank_and_its_norm(changes):
    assert replace(PLAIN, **changes).rank == 2


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"norm": "nuclear"}, "Add --rank"),
        ({"rank": -1}, "leave it out"),
        ({"method": "linear", "rank": 1}, 'options={"rank": 1'),
        ({"method": "linear", "norm": "none"}, 'options={"rank": 1, "norm": "none"}'),
    ],
)
def test_what_has_no_effect_is_refused_with_what_has(changes, remedy):
    with pytest.raises(RecipeError) as caught:
        replace(PLAIN, **changes)
    assert remedy in caught.value.remedy
