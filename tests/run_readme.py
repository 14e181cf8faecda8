"""Run the code blocks of README and guides with the installed commands.

    python tests/run_readme.py README.md drift_merge/guides/*.md

Blocks fenced as ```sh and ```python are run, in order; each document in a directory of its own,
where `demo` holds what `drift-prior demo -o demo` leaves (the README makes it itself). What a block
prints must be the ```output block that follows it, if one does; a line `...` there stands for any
lines. A file name after the language (```yaml recipe.yaml) writes the block to that file. Others
(```console, ```text, ```yaml) are shown only: they need the network, a GPU or a trainer. A block
that fails, or a README without blocks, is an error. `tests/cli/test_guides.py` runs the same in
process.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

_BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_RUN = ("sh", "python")


class Block(NamedTuple):
    """A block that is run, or written to a file."""

    language: str  # sh or python; anything for a file
    code: str
    file: str | None = None  # it is written there, and not run
    output: str | None = None  # what it must print, `...` for any lines; None: anything


def blocks_of(text: str) -> list[Block]:
    """The blocks of a document that are run or written, in order."""
    found: list[Block] = []
    for language, file, code in _BLOCK.findall(text):
        if file:
            found.append(Block(language, code, file=file))
        elif language in _RUN:
            found.append(Block(language, code))
        elif language == "output":
            if not found or found[-1].file or found[-1].output is not None:
                raise SystemExit(f"an output block follows no block that is run:\n{code}")
            found[-1] = found[-1]._replace(output=code)
    return found


def check_output(block: Block, printed: str) -> None:
    """Compare what a block has printed with what its document shows.

    Raises:
        SystemExit: they differ.
    """
    if block.output is None:
        return
    lines = [
        r"(?:.*\n)*?" if line.strip() == "..." else re.escape(line) for line in _lines(block.output)
    ]
    if re.fullmatch("".join(lines), printed) is None:
        raise SystemExit(f"the document shows\n{block.output}\nbut the block printed\n{printed}")


def _lines(text: str) -> list[str]:
    return [f"{line}\n" for line in text.splitlines()]


def _run(block: Block, folder: Path) -> None:
    if block.file:
        (folder / block.file).write_text(block.code, encoding="utf-8")
        return
    command = ["bash", "-euo", "pipefail", "-c", block.code]
    if block.language == "python":
        command = [sys.executable, "-W", "error", "-c", block.code]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    check_output(block, done.stdout)


def main() -> None:
    total = 0
    with tempfile.TemporaryDirectory() as root:
        demo = Path(root, "demo")
        subprocess.run(["drift-prior", "demo", "-o", str(demo), "-q"], check=True)
        for path in map(Path, sys.argv[1:]):
            folder = Path(root, path.stem)
            folder.mkdir()
            blocks = blocks_of(path.read_text(encoding="utf-8"))
            if path.name == "README.md":
                assert blocks, "README.md has no block to run"
            else:
                shutil.copytree(demo, folder / "demo")
            for number, block in enumerate(blocks, start=1):
                title = f"{path.name}, block {number} of {len(blocks)} ({block.language})"
                print(f"--- {title}\n{block.code}", flush=True)
                _run(block, folder)
            total += len(blocks)
    print(f"{total} blocks ran")


if __name__ == "__main__":
    main()
