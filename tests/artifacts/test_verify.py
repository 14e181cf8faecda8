"""`verify` finds every change, names what is wrong first, and knows its sources."""

import json
import shutil

import numpy as np
import pytest

from drift_merge.errors import DriftMergeError, RecipeError, VerificationError
from drift_merge.merges.manifest import open_merge
from drift_merge.merges.verify import verify_merge
from drift_merge.priors.manifest import open_prior
from drift_merge.priors.verify import verify_prior
from tests import checkpoints as c
from tests.artifacts.damage import data_start, edit_json, flip, rewrite
from tests.runs import run_linear, run_prior

NAMES = {"prior": "prior.json", "merge": "drift_merge.json", "compressed": "prior.json"}
PRIORS = ("prior", "based", "compressed")
LARGE = 10**6  # a sample of all tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A prior and a merge in several shards, with what they were made of."""
    directory = tmp_path_factory.mktemp("made")
    pair = c.make_pair(directory, mllm_sidecars=c.SIDECARS)
    run_prior(*pair, directory / "prior", max_shard_size="1KB")
    run_prior(*pair, directory / "compressed", max_shard_size="1KB", dtype="int8")
    run_linear(*pair, directory / "merge", max_shard_size="4KB")
    base = c.write_checkpoint(directory / "base", c.reasoner_tensors(seed=9), c.text_config())
    run_prior(*pair, directory / "based", base=base)
    other = c.write_checkpoint(directory / "other", c.reasoner_tensors(seed=5), c.text_config())
    run_linear([pair.reasoner, other], pair.mllm, directory / "two", 0.1, 0.2)
    return directory


@pytest.fixture(params=["prior", "merge", "compressed"])
def artifact(request, made, tmp_path):
    """A copy to damage."""
    shutil.copytree(made / request.param, tmp_path / request.param)
    return tmp_path / request.param


def verify(path, **values):
    if path.name in PRIORS:
        return verify_prior(open_prior(path), **values)
    return verify_merge(open_merge(path), **values)


def sources(made, path, **changes):
    values = {"reasoner": "reasoner", "mllm": "mllm"} | changes
    listed = {k: str(made / v) for k, v in values.items() if v}
    if path.name in ("merge", "two"):
        listed["reasoners"] = [listed.pop("reasoner")]
        if path.name == "two":
            listed["reasoners"].append(str(made / "other"))
    return listed


def manifest_of(path):
    return path / NAMES[path.name]


def test_a_fresh_output_passes(artifact):
    report = verify(artifact)
    tensors = c.read_tensors(artifact)
    assert report.num_tensors == sum(not name.endswith(":scale") for name in tensors)
    assert report.size_bytes == sum(len(t.data) for t in tensors.values())
    assert report.recomputed == ()


@pytest.mark.parametrize("name", ["prior", "merge", "compressed", "based", "two"])
def test_a_fresh_output_passes_against_its_sources(made, name):
    extra = {"base": "base"} if name == "based" else {}
    report = verify(made / name, **sources(made, made / name, **extra), sample=LARGE, seed=3)
    assert len(report.recomputed) == report.num_tensors


def test_the_sample_has_the_size_asked_for_and_follows_the_seed(made):
    one, same, other = (
        verify(made / "merge", **sources(made, made / "merge"), sample=3, seed=seed).recomputed
        for seed in (1, 1, 2)
    )
    assert len(one) == len(set(one)) == 3
    assert one == same != other


def test_one_flipped_bit_of_any_tensor_is_found_and_the_tensor_named(artifact):
    for shard in sorted(artifact.glob("*.safetensors")):
        tensors, at = c.read_shard(shard), data_start(shard)
        for name, tensor in tensors.items():
            flip(shard, at + len(tensor.data) // 2)
            with pytest.raises(VerificationError, match=rf"^{name} in .*{shard.name} differs"):
                verify(artifact)
            flip(shard, at + len(tensor.data) // 2)
            at += len(tensor.data)
    verify(artifact)


def test_of_several_damaged_tensors_the_first_in_file_order_is_named_with_a_count(artifact):
    shards = sorted(artifact.glob("*.safetensors"))
    for shard in shards[1:4]:
        flip(shard, -1)
    name = list(c.read_shard(shards[1]))[-1]
    with pytest.raises(VerificationError, match=rf"^{name} in .* 2 more tensors differ too"):
        verify(artifact)


def test_one_flipped_bit_anywhere_in_a_header_is_found(artifact):
    shard = sorted(artifact.glob("*.safetensors"))[0]
    # Not the metadata: whatever a loader uses is behind it, and the padding means nothing.
    raw = shard.read_bytes()
    begin, end = raw.index(b"}", 20) + 1, raw.rindex(b"}", 0, data_start(shard))
    for at in [*range(8), *range(begin, end, 7)]:
        flip(shard, at)
        with pytest.raises(VerificationError):
            verify(artifact)
        flip(shard, at)


def test_one_flipped_bit_of_every_file_beside_the_shards_is_found_but_the_card_may_be_edited(
    artifact,
):
    beside = [p for p in artifact.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    assert len(beside) >= 3
    for path in beside:
        flip(path, path.stat().st_size // 2)
        if path.name == "README.md":
            verify(artifact)
        else:
            with pytest.raises(DriftMergeError, match=path.name) as caught:
                verify(artifact)
            # A manifest that is not even JSON any more is corrupt (5), not different (1).
            allowed = {1, 5} if path == manifest_of(artifact) else {1}
            assert caught.value.exit_code in allowed
        flip(path, path.stat().st_size // 2)


def test_any_changed_entry_of_the_manifest_is_found(artifact):
    file = manifest_of(artifact)
    original = file.read_text()
    name = next(iter(c.read_tensors(artifact)))
    for change in (
        lambda m: m["tensors"][name].update(fingerprint_mllm="xxh3:0"),
        lambda m: m["tensors"][name].update(dtype="F32"),
        lambda m: m["tensors"].pop(name),
        lambda m: m["shards"].pop(),
        lambda m: m["parameters"].update(modules="mlp"),
        lambda m: m["sources"]["mllm"].update(revision="0" * 40),
        lambda m: m["index"].clear(),
        lambda m: m.pop("seal"),
    ):
        edit_json(file, change)
        with pytest.raises(VerificationError, match=rf"{file.name} was changed"):
            verify(artifact)
        file.write_text(original)
    verify(artifact)


def test_a_manifest_that_is_only_written_in_another_form_still_passes(artifact):
    file = manifest_of(artifact)
    file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True, indent=4))
    verify(artifact)


@pytest.mark.parametrize("what", ["shard", "index", "config.json", "remote/modeling_tiny.py"])
def test_a_missing_file_is_named(artifact, what):
    if what == "shard":
        path = sorted(artifact.glob("*.safetensors"))[2]
    elif what == "index":
        path = next(artifact.glob("*.index.json"))
    else:
        path = artifact / what
        if not path.exists():
            return  # a prior has no sidecars
    path.unlink()
    with pytest.raises(VerificationError, match=f"{path.name} is missing"):
        verify(artifact)


def test_a_truncated_shard_is_named(artifact):
    shard = sorted(artifact.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(VerificationError, match=f"{shard.name} is truncated"):
        verify(artifact)


def test_an_extra_tensor_in_a_shard_is_named(artifact):
    shard = sorted(artifact.glob("*.safetensors"))[0]
    rewrite(shard, lambda tensors: tensors.update(stowaway=c.store([1.0])))
    with pytest.raises(VerificationError, match="stowaway is not in the manifest"):
        verify(artifact)


def test_a_tensor_missing_from_its_shard_is_named(artifact):
    shard = sorted(artifact.glob("*.safetensors"))[-1]
    name = next(iter(c.read_shard(shard)))
    rewrite(shard, lambda tensors: tensors.pop(name))
    with pytest.raises(VerificationError, match=f"{name} is missing"):
        verify(artifact)


def test_a_tensor_in_another_dtype_or_shape_is_named(artifact):
    shard = sorted(artifact.glob("*.safetensors"))[1]
    name, tensor = next(iter(c.read_shard(shard).items()))
    for other in (c.store(tensor.values, "F16"), c.store(tensor.values.reshape(-1, 1))):
        rewrite(shard, lambda tensors, other=other: tensors.update({name: other}))
        with pytest.raises(VerificationError, match=f"{name} in {shard.name} is"):
            verify(artifact)


@pytest.mark.parametrize("name", ["prior", "merge", "based", "two"])
@pytest.mark.parametrize("role", ["reasoner", "mllm", "base"])
def test_a_source_that_is_not_the_one_used_is_named_by_its_role(made, tmp_path, name, role):
    if role == "base" and name != "based":
        return
    given = {"base": "base"} if name == "based" else {}
    wrong = c.make_pair(tmp_path)
    tensors = c.read_tensors(wrong.mllm if role == "mllm" else made / role)
    target = "model.layers.1.mlp.down_proj.weight"
    values = tensors[target].values.copy()
    values[-1, -1] += np.float32(0.5)
    directory = wrong.mllm if role == "mllm" else wrong.reasoner
    c.write_shard(directory / "model.safetensors", tensors | {target: c.store(values)})
    given |= {role: directory}
    with pytest.raises(VerificationError, match=rf"down_proj\.weight: the {role}s? given"):
        verify(made / name, **sources(made, made / name, **given), sample=LARGE, seed=0)


def test_sources_with_other_tensors_are_refused(made, tmp_path):
    bigger = c.make_pair(tmp_path, layers=3)
    given = {"reasoner": bigger.reasoner, "mllm": bigger.mllm}
    for name in ("prior", "merge"):
        with pytest.raises(VerificationError, match="on one side only"):
            verify(made / name, **sources(made, made / name, **given))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("prior", {"reasoner": ""}),
        ("prior", {"mllm": ""}),
        ("prior", {"base": "base"}),
        ("based", {}),
        ("based", {"reasoner": "", "mllm": "", "base": "base"}),
        ("merge", {"mllm": ""}),
        ("two", {"mllm": ""}),
    ],
)
def test_half_of_the_sources_is_a_usage_error_that_says_what_is_needed(made, name, given):
    values = sources(made, made / name, **given) if name != "two" else {"mllm": str(made / "mllm")}
    with pytest.raises(RecipeError, match="needed"):
        verify(made / name, **values)


def test_a_value_made_nonfinite_behind_a_matching_fingerprint_is_found(artifact):
    from drift_merge.storage import fingerprints
    from drift_merge.storage.manifests import seal

    shard = sorted(artifact.glob("*.safetensors"))[0]
    name, tensor = next(iter(c.read_shard(shard).items()))
    values = tensor.values.copy()
    values.flat[0] = np.inf
    forged = c.store(values, tensor.dtype)
    raw = shard.read_bytes()
    at = data_start(shard)
    shard.write_bytes(raw[:at] + forged.data + raw[at + len(forged.data) :])
    file = manifest_of(artifact)
    manifest = json.loads(file.read_text())
    del manifest["seal"]
    key = "fingerprint_delta" if artifact.name == "prior" else "fingerprint"
    entry = name.removesuffix(":scale")
    key = key if entry == name else "fingerprint_scale"
    manifest["tensors"][entry][key] = fingerprints.of_bytes(forged.data)
    file.write_text(json.dumps(seal(manifest)))
    with pytest.raises(VerificationError, match=f"{name} holds 1 NaN or Inf"):
        verify(artifact)
