"""The same sources for all methods."""

import pytest

from tests.merges.suite import write_sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))
