import pytest

from drift_merge.errors import RecipeError
from drift_merge.storage.ranks.environment import Place, own_device, place_in
from drift_merge.storage.ranks.failures import Failure

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
}


def test_the_place_is_torchruns_and_a_schedulers_variables_alone_mean_nothing() -> None:
    assert place_in(TORCHRUN) == Place(5, 8, 1, 4)
    assert place_in({k: v for k, v in TORCHRUN.items() if "ELASTIC" not in k}) == Place()


@pytest.mark.parametrize(
    "wrong", [{"RANK": "8"}, {"RANK": "x"}, {"LOCAL_RANK": "4"}, {"WORLD_SIZE": "3"}]
)
def test_variables_that_contradict_each_other_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="contradict"):
        place_in(TORCHRUN | wrong)


def test_cuda_is_one_gpu_a_rank() -> None:
    place = place_in(TORCHRUN)
    assert own_device("cuda", place) == "cuda:1"
    assert own_device("cuda:3", place) == "cuda:3"
    assert own_device("cpu", place) == "cpu"
    assert own_device("cuda", Place()) == "cuda"


def test_a_failure_says_on_other_ranks_whose_it_was() -> None:
    failure = Failure.of(RecipeError("no.", remedy="yes"), 2, "node7")
    own, other = failure.error(at=2), failure.error(at=0)
    assert isinstance(own, RecipeError)
    assert isinstance(other, RecipeError)
    assert (own.message, own.remedy) == ("no.", "yes")
    assert other.message == "On rank 2 (node7): no."
    assert isinstance(Failure.of(KeyboardInterrupt(), 1, "x").error(at=0), KeyboardInterrupt)
