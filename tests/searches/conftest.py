"""A pair of a text LLM and an MLLM, small."""

import pytest

from tests import checkpoints as c


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return c.make_pair(tmp_path_factory.mktemp("pair"))
