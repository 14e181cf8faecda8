"""Every multimodal architecture of transformers, small: pytest -m families (see README.md here)."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.families
transformers = pytest.importorskip("transformers", minversion="5.24")

from tests.families.build import architectures  # noqa: E402
from tests.families.check import check  # noqa: E402
from tests.families.remaining import REMAINING, SKIPPED  # noqa: E402


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(architectures()))
def test_architecture(kind: str, tmp_path: Path) -> None:
    row = check(kind, tmp_path / "case")
    if row.skipped:
        assert kind in SKIPPED, row.skipped
        pytest.skip(row.skipped)
    wrong = {column for column, said in row.columns.items() if said != "right"}
    assert wrong == set(REMAINING.get(kind, {})), row.columns
