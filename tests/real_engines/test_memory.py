"""Delta stays in the page cache, once for all ranks: no rank has a copy of its own."""

import pytest

from tests.real_engines import toy

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]

SIZES = toy.Sizes(1024, 8192)  # 54 million elements: 109 MB of delta in bfloat16
# Chunks in float32 (8 MB) and what the allocator keeps; on a busy machine 26 MB have been seen. A
# rank's half of delta, in bfloat16, is 54 MB.
LIMIT = 36 * 10**6


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
        assert rank["elements"] > 1.4 * LIMIT
        assert rank["added"] < LIMIT
