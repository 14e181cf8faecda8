"""`python -m drift_merge merge ...` is `drift-merge`, `python -m drift_merge prior ...` is
`drift-prior`, for torchrun; without such a word it is `drift-merge`.
"""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Start the program that the first word names."""
    word = sys.argv.pop(1) if sys.argv[1:2] in (["merge"], ["prior"]) else "merge"
    if word == "prior":
        from drift_merge.cli.prior import main as program
    else:
        from drift_merge.cli.merge import main as program
    program()


if __name__ == "__main__":
    main()
