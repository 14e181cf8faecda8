"""A compressed prior is an artifact like any other."""

import json
from pathlib import Path

import pytest

from tests.checkpoints import read_files
from tests.faults.harness import run
from tests.hub.places import REPO, files_at


@pytest.mark.parametrize("stored", [("--dtype", "int8"), ("--rank", "2")])
def test_a_compressed_prior_is_pushed_pulled_verified_and_applied(stored, hub, built, tmp_path):
    small = tmp_path / "small"
    done = run("drift-prior", "compress", str(built.prior), *stored, "-o", str(small))
    assert done.code == 0, done
    assert run("drift-prior", "push", str(small), REPO).code == 0
    assert str(built.folder) not in files_at(hub)["prior.json"].decode()
    assert run("drift-prior", "pull", REPO, "-o", "here").code == 0
    assert run("drift-prior", "verify", "here").code == 0
    here, there = read_files(Path("here")), read_files(small)
    shards = [name for name in there if name.endswith(".safetensors")]
    assert shards
    assert all(here[name] == there[name] for name in shards)
    mllm = built.pair.arguments[1]
    for place, out in ((REPO, "a"), (str(small), "b")):
        assert run("drift-prior", "apply", place, mllm, "-o", out).code == 0
    a, b = (read_files(Path(name)) for name in "ab")
    assert {n for n in a if a[n] != b[n]} == {"drift_merge.json", "README.md"}


def test_a_prior_on_the_hub_is_compressed_and_its_source_is_named(hub, built):
    assert run("drift-prior", "push", str(built.prior), REPO).code == 0
    done = run("drift-prior", "compress", REPO, "--dtype", "int8", "-o", "small")
    assert done.code == 0, done
    assert run("drift-prior", "push", "small", "org/small").code == 0
    manifest = json.loads(files_at(hub, "org/small")["prior.json"])
    assert manifest["kind"] == "drift-prior"
