"""Every merge method through real files: what is written is what the method gives in memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from drift_merge.engine import flushing, workspace
from drift_merge.maths.methods import METHODS
from drift_merge.merges.manifest import open_merge
from drift_merge.merges.verify import verify_merge
from tests import checkpoints as c
from tests.merges.suite import (
    CASES,
    KEEP_LAYERS,
    MERGED,
    Sources,
    in_memory,
    is_kept,
    name_of,
    recipe_of,
    run_merge,
    write_sources,
)

every = pytest.mark.parametrize("case", CASES, ids=name_of)


# A variant goes the ways of its method through plan and stream: pytest -m slow tries those too.
FIRST = {case.name: case for case in reversed(CASES)}.values()


each = pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c in FIRST else pytest.mark.slow, id=name_of(c)) for c in CASES],
)


# A resumed run goes one way for all that compute alike: those that look at nothing first, at each
# tensor, at the whole model, at singular directions, and that draw masks.
_KINDS = ("linear", "slerp", "ties", "tsv-m", "dare-ties")


resumed = pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            c, marks=[] if c in FIRST and c.name in _KINDS else pytest.mark.slow, id=name_of(c)
        )
        for c in CASES
    ],
)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The same values in other files and in another order."""
    return write_sources(tmp_path_factory.mktemp("sharded"), num_shards=(3, 1, 4, 2), order=-1)


@every
def test_the_stream_writes_what_the_method_gives_in_memory_bit_for_bit(
    case, sources, sharded, tmp_path, monkeypatch
):
    expected = in_memory(case, sources)
    assert expected != c.read_tensors(sources.mllm)
    runs = [(sources, 61, 1, "5GB"), (sharded, 157, 3, "3KB")]
    for number, (some, chunk, threads, shard) in enumerate(runs):
        monkeypatch.setattr(workspace, "CPU_CHUNK", chunk)
        out = tmp_path / str(number)
        run_merge(case, some, out, threads=threads, max_shard_size=shard)
        found = c.read_tensors(out)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name] == tensor, (name, chunk, threads)


BIG = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A tensor of more than one block (2**17 entries) of the measured sums."""
    changes = {BIG: (8500, c.HIDDEN)}
    return write_sources(tmp_path_factory.mktemp("big"), layers=1, changes=changes)


@each
def test_tensors_of_several_blocks_and_chunks_are_the_same_however_they_are_cut(
    case, big, tmp_path, monkeypatch
):
    if case.name == "layer-swap":
        return  # one layer cannot be both kept and merged; linear is the same function
    expected = in_memory(case, big, selected=re.compile(re.escape(BIG)))
    for chunk, threads in ((5003, 2), (2**17, 1)):
        monkeypatch.setattr(workspace, "CPU_CHUNK", chunk)
        out = tmp_path / str(chunk)
        run_merge(case, big, out, threads=threads, modules="re:up_proj")
        assert c.read_tensors(out) == expected, chunk


SIZES = (*range(1, 12), 13, 19, 20, 31, 49, 50, 51, 99, 100, 64)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Tensors of 1 to 100 entries, flat and as one row, as one column; one source in float64."""
    shapes, layers = {}, len(SIZES) // 3
    for index, size in enumerate(SIZES[: 3 * layers]):
        shape = [(size,), (1, size), (size, 1)][(index + index // 3) % 3]
        at = f"model.layers.{index // 3}.mlp."
        shapes[f"{at}{('gate', 'up', 'down')[index % 3]}_proj.weight"] = shape
    dtypes = ("BF16", "F32", "BF16", "F64")
    directory = tmp_path_factory.mktemp("small")
    return write_sources(directory, layers=layers, changes=shapes, dtypes=dtypes)


@each
def test_tensors_of_1_to_100_entries_are_merged_as_in_memory(case, small, tmp_path):
    selected = re.compile(r"model\.layers\..*\.mlp\.(gate|up|down)_proj")
    made = run_merge(case, small, tmp_path / "out", modules="re:(gate|up|down)_proj")
    found = c.read_tensors(tmp_path / "out")
    assert found == in_memory(case, small, selected=selected)
    assert all(np.isfinite(tensor.values).all() for tensor in found.values())
    assert sum(made.merge.manifest["counts"].values()) == len(found)


@each
def test_a_model_merged_with_itself_is_itself_byte_for_byte(case, sources, tmp_path):
    itself = Sources((sources.mllm, sources.mllm), sources.mllm, sources.mllm)
    changes = {"weights": (0.5, 0.25)[: case.num_reasoners]}
    run_merge(case, itself, tmp_path / "out", **changes if case.weights else {})
    assert c.read_tensors(tmp_path / "out") == c.read_tensors(sources.mllm)
    for name, data in c.SIDECARS.items():
        assert (tmp_path / "out" / name).read_bytes() == data


@each
def test_the_manifest_says_what_was_merged_and_verify_computes_it_again(case, sources, tmp_path):
    made = run_merge(case, sources, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/drift_merge.json").read_text())
    method = METHODS[case.name]
    assert manifest == made.merge.manifest
    assert manifest["method"] == case.name
    assert manifest["formula"] == f"theta = {method.formula}"
    parameters = manifest["parameters"]
    assert parameters["variant"] == case.variant
    defaults = dict(method.defaults[case.variant])
    default = defaults.pop("weight", 1.0)
    mllm_weight = defaults.pop("mllm_weight", None)
    given = defaults | recipe_of(case, sources).options
    assert parameters["options"].items() <= given.items()
    unsaid = given.keys() - parameters["options"].keys()
    assert unsaid <= UNSAID
    assert all(given[name] == defaults[name] for name in unsaid)
    assert parameters["options"].get("seed", 0) == 0
    assert tuple(parameters["weights"]) == case.weights
    described = manifest["sources"]
    assert ("base" in described) == case.has_base
    assert [s["label"] for s in described["reasoners"]] == ["one", "two"][: case.num_reasoners]
    weights = list(case.weights) or [default] * case.num_reasoners
    assert [s["weight"] for s in described["reasoners"]] == weights
    merged = {name for name in c.read_tensors(sources.mllm) if MERGED.match(name)}
    expected = {name for name in merged if not is_kept(case, name)}
    entries = manifest["tensors"]
    assert {name for name, entry in entries.items() if entry["method"] == case.name} == expected
    for name in expected:
        entry = entries[name]
        assert entry["canonical"] == name.removeprefix("model.")
        assert entry["weights"] == weights
        assert entry.get("mllm_weight") == mllm_weight
        assert len(entry["fingerprint_reasoners"]) == case.num_reasoners
        assert ("fingerprint_base" in entry) == case.has_base
    report = verify_merge(
        open_merge(tmp_path / "out"),
        reasoners=[str(path) for path in sources.reasoners[: case.num_reasoners]],
        mllm=str(sources.mllm),
        base=str(sources.base) if case.has_base else None,
        sample=len(entries),
    )
    assert set(report.recomputed) == set(entries)


class Cut(Exception):
    """The power fails."""


@resumed
def test_a_resumed_run_writes_what_an_undisturbed_one_writes(case, sources, tmp_path, monkeypatch):
    run_merge(case, sources, tmp_path / "whole")
    monkeypatch.setattr(flushing, "FLUSH_BYTES", 600)
    written = []

    def fails_in_the_middle(size):
        written.append(size)
        if len(written) == 12:
            raise Cut

    with pytest.raises(Cut):
        run_merge(case, sources, tmp_path / "out", progress=fails_in_the_middle)
    made = run_merge(case, sources, tmp_path / "out", threads=2)
    assert 5 <= made.outcome.num_resumed <= 12
    assert c.read_files(tmp_path / "out") == c.read_files(tmp_path / "whole")


COMMANDS = """
import json, sys
from drift_merge.cli import entry
from drift_merge.cli.merge import group
for sys.argv in json.loads(sys.stdin.read()):
    try:
        entry.run(group, "drift-merge")
    except SystemExit as ended:
        assert not ended.code, sys.argv
"""


@pytest.mark.slow
def test_the_commands_write_the_same_files_whatever_the_hash_seed(sources, tmp_path):
    """One variant of each method: what a hash seed could shuffle, variants share."""
    calls = []
    for case in {case.name: case for case in CASES}.values():
        weights = tuple(map(str, case.weights))
        run_merge(case, sources, tmp_path / "here" / name_of(case), weights=weights)
        words = [case.name, *sources.arguments(case), "-o", tmp_path / "there" / name_of(case)]
        words += ["--variant", case.variant] if len(METHODS[case.name].variants) > 1 else []
        words += [word for weight in weights for word in ("--weight", weight)]
        words += [word for name, x in case.options.items() for word in (f"--{name}", x)]
        words += ["--keep-layers", KEEP_LAYERS] if case.name == "layer-swap" else []
        calls.append(["drift-merge", *map(str, words), "-q"])
    subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input=json.dumps(calls),
        text=True,
        stdout=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        check=True,
        timeout=120,
    )
    assert c.read_files(tmp_path / "there") == c.read_files(tmp_path / "here")


# Left alone they ask for nothing, and a manifest does not name them.
UNSAID = {"rank", "eta", "bands", "gates", "norm", "calibrate", "calibrate_alpha", "frank_decay"}
