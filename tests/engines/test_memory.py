"""Delta stays in the page cache, once for all ranks: no rank has a copy of its own."""

import pytest

from tests.engines import toy

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

SIZES = toy.Sizes(1024, 8192)  # 54 million elements: 109 MB of delta in bfloat16
LARGEST = SIZES.hidden * SIZES.intermediate  # elements of a tensor
BUFFERS = 2**18 * 4 * 8  # chunks in float32, a few of them for each of a few threads
SLACK = 2**24  # of the allocator and of what Python notes down


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return toy.make_prior(tmp_path_factory.mktemp("large"), SIZES)


@pytest.mark.parametrize(
    "settings",
    [{"engine": "ddp"}, {"engine": "fsdp"}, {"engine": "deepspeed", "stage": 2},
     {"engine": "deepspeed", "stage": 3}],
    ids=["ddp", "fsdp2", "zero2", "zero3"],
)  # fmt: skip
def test_a_step_adds_buffers_to_a_ranks_memory_but_no_delta(large, run_once, settings):
    for rank in run_once("memory", source=str(large), **settings):
        delta_bytes = 2 * rank["elements"]
        assert delta_bytes > 4 * (BUFFERS + SLACK) / 2  # else this would show nothing
        assert rank["added"] < BUFFERS + SLACK
