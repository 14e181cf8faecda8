"""Run the tool's commands, and this directory's scripts, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run(tool: str, *arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `drift-prior` or `drift-merge` as a user would and check the exit code."""
    script = Path(sys.executable).with_name(tool)
    module = f"drift_merge.cli.{tool.removeprefix('drift-')}"
    from_source = (sys.executable, "-c", f"from {module} import main; main()")
    start = (script,) if script.exists() else from_source
    result = subprocess.run(
        [str(part) for part in (*start, *arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
    )
    print(f"$ {tool} {' '.join(map(str, arguments))}\n{result.stdout}{result.stderr}")
    assert result.returncode == expect, result.stderr
    return result


def run_here(script: str, *arguments: object) -> str:
    """Run a script of this directory; return what it printed."""
    command = [sys.executable, HERE / script, *arguments]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def answers(model: Path, *arguments: object) -> dict[str, str]:
    """Load `model` in transformers, require that every key fits, and return its answers."""
    result = json.loads(run_here("try_model.py", model, *arguments).splitlines()[-1])
    assert set(result["misfits"].values()) == {0}, result["misfits"]
    return result["answers"]


def align(*sources: Path) -> dict[str, Any]:
    """Return what `drift-prior align --json` says of two sources that align."""
    return json.loads(run("drift-prior", "align", *sources, "--json").stdout)
