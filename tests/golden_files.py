"""Golden files: what the project has promised to write or print, byte for byte.

After a change that is meant to change them, write them anew and read the difference:

    REGENERATE_GOLDEN=1 python -m pytest tests/priors tests/cli && git diff tests/golden
"""

import os
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
REGENERATE = "REGENERATE_GOLDEN"


def compare_with_golden(name: str, found: str) -> None:
    """Assert that `found` is the golden file of this name; with the variable set, write it."""
    path = GOLDEN / name
    if os.environ.get(REGENERATE) == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found, encoding="utf-8")
    assert path.is_file(), f"{path} does not exist; see {__name__} for how to write it"
    assert found == path.read_text(encoding="utf-8")
