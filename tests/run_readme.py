"""Run the README's own code blocks, in order, in an empty directory.

    python tests/run_readme.py README.md

Blocks fenced as ```sh and ```python are run; ```console and ```text are shown only (they need
the network or a GPU, or show output). A block that fails, or a README without blocks, is an error.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def main() -> None:
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    blocks = _BLOCK.findall(text)
    if not blocks:
        raise SystemExit(f"{sys.argv[1]} has no block to run")
    with tempfile.TemporaryDirectory() as folder:
        for number, (language, code) in enumerate(blocks, start=1):
            print(f"--- block {number} of {len(blocks)} ({language})\n{code}", flush=True)
            command = ["bash", "-euo", "pipefail", "-c", code]
            if language == "python":
                command = [sys.executable, "-W", "error", "-c", code]
            subprocess.run(command, cwd=folder, check=True)
    print(f"{len(blocks)} blocks of the README ran")


if __name__ == "__main__":
    main()
