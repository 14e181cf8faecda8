"""Every remedy that is a command is taken from stderr as it stands, and run.

A row provokes a refusal, says which text is pasted and what comes of it: the command works (0), or
it leads on (another code). Placeholders such as REASONER are replaced by the real arguments, as a
user would. Remedies that cannot be run here are listed with the reason; the last test counts all.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.harness import run
from tests.faults.remedies.provoked import Words, compute
from tests.faults.remedies.rows import MAP, ROWS


def remedy_of(stderr: str) -> str:
    """The remedy as it is printed, without its margin."""
    _, found, text = stderr.rpartition("\n\n  ")
    assert found, stderr
    return text.replace("\n  ", "\n").rstrip("\n")


def with_options(words: Words, options: Words) -> Words:
    """The same command with options added, each in the place of one of its name."""
    name = options[0]
    if name in words:
        at = words.index(name)
        words = words[:at] + words[at + len(options) :]
    return [*words, *options]


def replaced(text: str, tmp: Path, words: Words) -> str:
    """Real arguments for the placeholders."""
    real = {
        "REASONER": tmp / "reasoner",
        "MLLM": tmp / "mllm",
        "PRIOR": tmp / "p",
        "OUT": tmp / "o",
    }
    base = tmp / "base" if (tmp / "base").exists() else tmp / "reasoner"
    for word, path in {**real, "BASE": base}.items():
        text = re.sub(rf"\b{word}\b", str(path), text)
    return text.replace("...", f"{tmp / 'reasoner'} {tmp / 'mllm'} -o {tmp / 'o'}")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.file}: {row.says}")
def test_what_a_remedy_says_works_when_it_is_pasted(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = row.provoke(tmp_path)
    refused = run(*words)
    assert refused.code not in (0, 70), refused
    remedy = remedy_of(refused.stderr)
    found = re.search(row.pasted, remedy, re.DOTALL if row.pasted == MAP else 0)
    assert found, remedy
    pasted = found[0] if found.lastindex is None else found[1]
    if row.pasted == MAP:
        file = tmp_path / "map.yaml"
        file.write_text(pasted)
        assert run(*words, "--map", str(file)).code == row.code
        return
    text = replaced(pasted, tmp_path, words)
    if text.startswith("--"):
        result = run(*with_options(words, shlex.split(text)))
        assert result.code == row.code, result
        return
    if text.startswith("python "):
        subprocess.run([sys.executable, *shlex.split(text)[1:]], check=True, cwd=tmp_path)
    else:
        result = run(*shlex.split(text))
        assert result.code == row.code, result
    if row.then is not None and "inspect" not in words:
        assert run(*words).code == row.then


def test_the_warning_of_another_theta_names_modules_that_are_not_concerned(tmp_path):
    words = compute(tmp_path, reasoner_config={"rope_theta": 5.0})
    first = run(*words)
    pasted = re.search(r"--modules '[^']*'", first.stderr)
    assert "Warning [rope_theta]" in first.stderr
    assert pasted
    again = run(*words, *shlex.split(pasted[0]), "--overwrite")
    assert again.code == 0
    assert "Warning [rope_theta]" not in again.stderr
    tensors = json.loads((tmp_path / "out/prior.json").read_text())["tensors"]
    attention = {name.split(".")[3] for name in tensors if "self_attn" in name}
    assert attention == {"v_proj", "o_proj"}
