"""What a linear merge leaves on the disk: a complete checkpoint in the mllm's image."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from drift_merge.errors import AlignmentError, CheckpointError
from drift_merge.merges.verify import verify_merge
from drift_merge.storage.headers import tensor_bytes
from drift_merge.storage.shards import lay_out
from drift_merge.storage.sizes import parse_size
from tests import checkpoints as c
from tests.runs import CODES, as_tensor, in_memory_linear, run_linear
from tests.strategies import quick

MERGED = re.compile(r"model\.(layers\.|norm\.)")
SIDECARS = c.SIDECARS | {
    "README.md": b"# The card of the mllm\n",
    "drift_merge.json": b'{"kind": "of an earlier merge"}',
    "tokenizer.json": c.tokenizer(),
    "video_preprocessor_config.json": b"{}",
    "processor_config.json": b"\xef\xbb\xbf{}",
    "assets/deep/er/logo.png": bytes(range(256)),
}
NOT_COPIED = {"README.md", "drift_merge.json"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pair")
    return c.make_pair(
        directory,
        mllm={"visual.counter": c.store([3, 4], "I64"), "visual.scale": c.store([0.1, 3.0], "F32")},
        mllm_sidecars=SIDECARS,
    )


def read_config(directory: Path):
    return json.loads((directory / "config.json").read_bytes())


def test_weight_zero_gives_every_tensor_and_sidecar_of_the_mllm_byte_for_byte(pair, tmp_path):
    run_linear(*pair, tmp_path / "out", 0.0)
    assert c.read_tensors(tmp_path / "out") == c.read_tensors(pair.mllm)
    for name, data in c.read_files(pair.mllm).items():
        if not name.endswith(".safetensors") and name not in NOT_COPIED:
            assert (tmp_path / "out" / name).read_bytes() == data, name


def test_weight_zero_reads_nothing_of_a_damaged_reasoner(tmp_path):
    bad = c.store([float("nan")] * c.HIDDEN)
    pair = c.make_pair(tmp_path, reasoner={"model.norm.weight": bad})
    run_linear(*pair, tmp_path / "out", 0.0)
    assert c.read_tensors(tmp_path / "out") == c.read_tensors(pair.mllm)


def test_weight_one_gives_the_reasoner_bit_for_bit_in_the_tower(pair, tmp_path):
    run_linear(*pair, tmp_path / "out", 1.0)
    reasoner, mllm = c.read_tensors(pair.reasoner), c.read_tensors(pair.mllm)
    expected = {n: reasoner[n] if MERGED.match(n) else t for n, t in mllm.items()}
    assert c.read_tensors(tmp_path / "out") == expected


def test_a_model_merged_with_itself_is_itself(pair, tmp_path):
    run_linear(pair.mllm, pair.mllm, tmp_path / "out", 0.7)
    assert c.read_tensors(tmp_path / "out") == c.read_tensors(pair.mllm)


def test_the_default_weight_is_the_published_tenth(pair, tmp_path):
    run_linear(*pair, tmp_path / "default")
    run_linear(*pair, tmp_path / "tenth", 0.1)
    assert c.read_tensors(tmp_path / "default") == c.read_tensors(tmp_path / "tenth")


def test_several_reasoners_take_their_own_weights_in_order(tmp_path):
    pair = c.make_pair(tmp_path)
    other = c.write_checkpoint(tmp_path / "other", c.reasoner_tensors(seed=5), c.text_config())
    run_linear([pair.reasoner, other], pair.mllm, tmp_path / "out", 0.25, 0.5)
    one, two, mllm = map(c.read_tensors, (pair.reasoner, other, pair.mllm))
    for name, tensor in c.read_tensors(tmp_path / "out").items():
        merged = MERGED.match(name)
        expected = (
            in_memory_linear(mllm[name], [one[name], two[name]], [0.25, 0.5])
            if merged
            else mllm[name]
        )
        assert tensor == expected, name


def test_one_weight_serves_all_reasoners(tmp_path):
    pair = c.make_pair(tmp_path)
    other = c.write_checkpoint(tmp_path / "other", c.reasoner_tensors(seed=5), c.text_config())
    run_linear([pair.reasoner, other], pair.mllm, tmp_path / "one", 0.25)
    run_linear([pair.reasoner, other], pair.mllm, tmp_path / "two", 0.25, 0.25)
    assert c.read_tensors(tmp_path / "one") == c.read_tensors(tmp_path / "two")


@pytest.mark.parametrize(
    ("dtype", "code"), [("float16", "F16"), ("float32", "F32"), ("bfloat16", "BF16")]
)
def test_another_dtype_casts_floating_tensors_alone(pair, tmp_path, dtype, code):
    run_linear(*pair, tmp_path / "out", 0.3, dtype=dtype)
    reasoner, mllm = c.read_tensors(pair.reasoner), c.read_tensors(pair.mllm)
    for name, tensor in c.read_tensors(tmp_path / "out").items():
        if mllm[name].dtype == "I64":
            expected = mllm[name]
        elif MERGED.match(name):
            expected = in_memory_linear(mllm[name], [reasoner[name]], [0.3], code)
        else:
            expected = in_memory_linear(mllm[name], [], [], code)
        assert tensor == expected, name


def test_another_dtype_changes_the_dtype_entries_of_the_config_and_not_a_byte_beside(tmp_path):
    config = (
        '{ "torch_dtype" : "bfloat16",\n\t"name": "caf\\u00e9 \u00e9",  "big": 1.0E+2,\n'
        ' "text_config": {"dtype":"bfloat16", "hidden_size": 16},\n'
        ' "other": {"torch_dtype": null}, "note": "say \\"dtype\\": \\"x\\"", "dtypes": "none"}'
    )
    pair = c.make_pair(tmp_path)
    (pair.mllm / "config.json").write_text(config, encoding="utf-8")
    run_linear(*pair, tmp_path / "out", dtype="float32")
    expected = config.replace('"torch_dtype" : "bfloat16"', '"torch_dtype" : "float32"')
    expected = expected.replace('"dtype":"bfloat16"', '"dtype":"float32"')
    assert (tmp_path / "out/config.json").read_text(encoding="utf-8") == expected


def test_the_source_dtype_keeps_the_dtype_of_every_tensor(pair, tmp_path):
    run_linear(*pair, tmp_path / "out", 0.3)
    found = {n: t.dtype for n, t in c.read_tensors(tmp_path / "out").items()}
    assert found == {n: t.dtype for n, t in c.read_tensors(pair.mllm).items()}


@pytest.mark.parametrize("size", ["5GB", "3KB"])
def test_safetensors_and_its_index_agree_about_the_output(pair, tmp_path, size):
    out = tmp_path / "out"
    run_linear(*pair, out, 0.3, max_shard_size=size)
    ours = c.read_tensors(out)
    files = sorted(out.glob("*.safetensors"))
    if size == "5GB":
        assert [f.name for f in files] == ["model.safetensors"]
        assert not (out / "model.safetensors.index.json").exists()
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {n: f.name for f in files for n in load_file(f)}
        assert index["metadata"]["total_size"] == sum(len(t.data) for t in ours.values())
    loaded = {}
    for file in files:
        loaded |= load_file(file)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert sorted(loaded) == sorted(ours)
    for name, tensor in loaded.items():
        assert CODES[tensor.dtype] == ours[name].dtype
        assert tensor.equal(as_tensor(ours[name])), name


def test_a_tied_mllm_and_a_reasoner_with_a_head_give_a_tied_output(tmp_path):
    pair = c.make_pair(
        tmp_path, mllm={"lm_head.weight": None}, mllm_config_changes={"tie_word_embeddings": True}
    )
    run_linear(*pair, tmp_path / "out", 0.3)
    assert "lm_head.weight" not in c.read_tensors(tmp_path / "out")
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is True


def test_card_and_manifest_are_of_the_merge_not_of_the_mllm(pair, tmp_path):
    made = run_linear(*pair, tmp_path / "out", 0.3)
    card = (tmp_path / "out/README.md").read_text()
    assert "mllm" in card
    assert "0.7" in card
    assert "The card of the mllm" not in card
    manifest = json.loads((tmp_path / "out/drift_merge.json").read_text())
    assert manifest == made.merge.manifest
    assert manifest["kind"] == "drift-merge"
    assert manifest["parameters"]["weights"] == [0.3]
    assert manifest["counts"] == {"copy": len(c.vision_shapes()) + 4, "linear": 2 * 12 + 1}
    assert set(manifest["sidecars"]) == {*SIDECARS, "config.json"} - NOT_COPIED
    assert list(manifest["tensors"]) == list(dict.fromkeys(manifest["tensors"]))
    entry = manifest["tensors"]["model.layers.1.mlp.up_proj.weight"]
    assert entry["method"] == "linear"
    assert entry["weights"] == [0.3]
    assert entry["canonical"] == "layers.1.mlp.up_proj.weight"
    copied = manifest["tensors"]["visual.counter"]
    assert copied["fingerprint"] == copied["fingerprint_mllm"]


def test_sidecars_of_the_reasoner_do_not_come_along(tmp_path):
    pair = c.make_pair(tmp_path, reasoner_sidecars={"reasoner_only.txt": b"x"})
    run_linear(*pair, tmp_path / "out")
    assert not (tmp_path / "out/reasoner_only.txt").exists()


def test_skipping_a_mismatch_leaves_that_tensor_as_the_mllm_has_it(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    pair = c.make_pair(tmp_path, reasoner={name: c.store([[1.0, 2.0]])})
    with pytest.raises(AlignmentError, match="1 of"):
        run_linear(*pair, tmp_path / "out", 0.3)
    made = run_linear(*pair, tmp_path / "out", 0.3, on_mismatch="skip")
    assert c.read_tensors(tmp_path / "out")[name] == c.read_tensors(pair.mllm)[name]
    assert made.merge.tensors[name]["method"] == "copy"
    coverage = made.merge.manifest["coverage"][0]
    assert coverage["selected"] - coverage["matched"] == 1


ENTRY = st.tuples(
    st.sampled_from(("BF16", "F32", "I64", "F64")),
    st.lists(st.integers(0, 6), max_size=3).map(tuple),
)


@given(st.lists(ENTRY, min_size=1, max_size=12), st.integers(1, 600), st.randoms())
@quick
def test_shards_hold_every_tensor_once_within_the_limit_and_none_is_empty(entries, limit, order):
    named = [(f"layers.{i}.x", dtype, shape) for i, (dtype, shape) in enumerate(entries)]
    layout = lay_out(named, stem="model", max_shard_bytes=limit, metadata={"format": "pt"})
    by_shard = {shard.file: [] for shard in layout.shards}
    for info in layout.tensors.values():
        by_shard[info.shard].append(info)
    assert set(layout.tensors) == {name for name, _, _ in named}
    for shard in layout.shards:
        infos = by_shard[shard.file]
        data = sum(info.size_bytes for info in infos)
        assert infos
        with_data = [info for info in infos if info.size_bytes]
        assert data <= limit or len(with_data) == 1
        assert shard.file_bytes == len(shard.header) + data
        at = len(shard.header)
        for info in sorted(infos, key=lambda i: (i.start, i.size_bytes)):
            assert info.start == at
            at += info.size_bytes
    assert sum(i.size_bytes for i in layout.tensors.values()) == sum(
        tensor_bytes(dtype, shape) for _, dtype, shape in named
    )
    shuffled = list(named)
    order.shuffle(shuffled)
    again = lay_out(shuffled, stem="model", max_shard_bytes=limit, metadata={"format": "pt"})
    assert again == layout


@pytest.mark.parametrize("size", ["1B", "700B", "2KB", "4KiB"])
def test_written_shards_have_the_predicted_size(pair, tmp_path, size):
    made = run_linear(*pair, tmp_path / "out", max_shard_size=size)
    shards = made.merge.manifest["shards"]
    assert [p.name for p in sorted((tmp_path / "out").glob("*.safetensors"))] == shards
    for file in shards:
        tensors = c.read_shard(tmp_path / "out" / file)
        data = sum(len(t.data) for t in tensors.values())
        assert data <= parse_size(size) or len(tensors) == 1
        raw = (tmp_path / "out" / file).read_bytes()
        assert len(raw) == 8 + int.from_bytes(raw[:8], "little") + data


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["reasoner", "mllm"])
def test_nonfinite_inputs_are_named_counted_and_refused_unless_allowed(tmp_path, bad, side):
    name = "model.layers.0.mlp.up_proj.weight"
    pair = c.make_pair(tmp_path)
    directory = getattr(pair, side)
    tensors = c.read_tensors(directory)
    values = tensors[name].values.copy()
    values.flat[:3] = bad
    c.write_shard(directory / "model.safetensors", tensors | {name: c.store(values)})
    with pytest.raises(CheckpointError, match=f"{side}: {re.escape(name)}: 3 values"):
        run_linear(*pair, tmp_path / "out", 0.3)
    assert not (tmp_path / "out").exists()
    made = run_linear(*pair, tmp_path / "out", 0.3, allow_nonfinite=True)
    assert made.merge.tensors[name]["nonfinite"] == {f"{side}: {name}": 3}
    assert verify_merge(made.merge).num_tensors == len(made.merge.tensors)
