"""One browser for each file of tests."""

from collections.abc import Iterator

import pytest

from tests.reports.browser.chrome import Chrome


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    with Chrome() as browser:
        yield browser
