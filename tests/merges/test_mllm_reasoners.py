"""A reasoner may be another fine-tuning of the same MLLM, with a vision tower of its own.

Its names may be of another version: `model.layers`, `visual` against `model.language_model.layers`,
`model.visual`, which is how transformers 5 saves Qwen2.5-VL.
"""

import pytest
import torch

import drift_merge
from drift_merge.merges.verify import verify_merge
from drift_merge.priors.verify import verify_prior
from tests import checkpoints as c
from tests.runs import as_tensor, in_memory_linear, run_linear, run_prior


def renamed(name):
    """The name of a tensor of Qwen2.5-VL as transformers 5 saves it."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


@pytest.fixture(params=["same names", "other names"])
def mllms(request, tmp_path):
    """Two MLLMs on the disk; their vision towers differ as their language towers do."""
    own = c.mllm_tensors(seed=1)
    if request.param == "other names":
        own = {renamed(name): tensor for name, tensor in own.items()}
    files = {"tokenizer.json": c.tokenizer()}
    c.write_checkpoint(tmp_path / "reasoner", own, c.mllm_config(), sidecars=files)
    c.write_checkpoint(tmp_path / "mllm", c.mllm_tensors(seed=2), c.mllm_config(), sidecars=files)
    return c.Pair(tmp_path / "reasoner", tmp_path / "mllm")


def by_old_name(directory):
    tensors = c.read_tensors(directory)
    new = {renamed(name): name for name in c.mllm_tensors()}
    return {new.get(name, name): tensor for name, tensor in tensors.items()}


def test_both_vision_towers_are_outside_counted_and_no_reason_for_a_note(mllms):
    alignment = drift_merge.align(*mllms, modules="full")
    records = [record.status for record in alignment.records]
    tower, vision = len(c.text_shapes()), len(c.vision_shapes())
    assert (records.count("matched"), records.count("outside_tower")) == (tower, 2 * vision)
    assert len(records) == tower + 2 * vision
    assert alignment.findings == ()


def test_the_prior_is_the_difference_of_the_language_towers(mllms, tmp_path):
    prior = run_prior(*mllms, tmp_path / "prior", dtype="float32", modules="full").prior
    ours, theirs = by_old_name(mllms.reasoner), c.read_tensors(mllms.mllm)
    with drift_merge.open_deltas(prior) as deltas:
        assert len(deltas.shapes) == len(c.text_shapes())
        for name in deltas.shapes:
            stored = prior.tensors[name]["mllm"]
            expected = as_tensor(ours[stored]).float() - as_tensor(theirs[stored]).float()
            assert torch.equal(deltas.read(name).view(expected.shape), expected), name
    given = {"reasoner": str(mllms.reasoner), "mllm": str(mllms.mllm)}
    assert verify_prior(prior, **given, sample=99).recomputed


def test_a_merge_keeps_the_mllms_own_vision_tower(mllms, tmp_path):
    merge = run_linear(*mllms, tmp_path / "out", 0.25, modules="full").merge
    ours, theirs = by_old_name(mllms.reasoner), c.read_tensors(mllms.mllm)
    found = c.read_tensors(merge.path)
    assert found.keys() == theirs.keys()
    for name, tensor in found.items():
        if name.startswith("visual."):
            assert tensor == theirs[name] != ours[name], name
        else:
            assert tensor == in_memory_linear(theirs[name], [ours[name]], [0.25]), name
    given = {"reasoners": [str(mllms.reasoner)], "mllm": str(mllms.mllm)}
    assert verify_merge(merge, **given, sample=99).recomputed
