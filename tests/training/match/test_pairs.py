"""Which tensor in memory is which of the prior: buffers, maps, two towers, values; no guesses."""

import re

import pytest
import torch
from torch import nn

import drift_merge
from drift_merge.errors import AlignmentError
from drift_merge.training.match.matching import match
from tests import checkpoints as c
from tests.training.match.towers import OTHER, TOWER, biases, renamed, shapes_of
from tests.training.toys import holder, memory_tensors

# Buffers.


def with_buffer(model, leaf, *, is_stored=True):
    mlp = model.model.language_model.layers[0].mlp
    mlp.register_buffer(leaf, torch.zeros(c.INTERMEDIATE), persistent=is_stored)
    return model


def test_a_buffer_that_the_prior_holds_is_matched_counted_and_never_trained(toy):
    model = with_buffer(toy.model(), "scale")
    shapes = shapes_of(toy) | {"layers.0.mlp.scale": (c.INTERMEDIATE,)}
    coverage = match(model, shapes).coverage
    assert coverage.buffers == (f"{TOWER}layers.0.mlp.scale",)
    assert (coverage.matched, coverage.selected, coverage.units) == (21, 21, 20)
    assert "1 buffers, never trained" in coverage.text()


def test_a_buffer_that_the_prior_lacks_is_named_and_no_error(toy):
    handle = drift_merge.attach(with_buffer(toy.model(), "scale"), toy.prior)
    assert handle.report()["coverage"]["buffers"] == (f"{TOWER}layers.0.mlp.scale",)
    assert handle.coverage.selected == handle.coverage.matched == 20


def test_a_buffer_that_no_checkpoint_stores_is_none_of_ours(toy):
    coverage = match(with_buffer(toy.model(), "scale", is_stored=False), shapes_of(toy)).coverage
    assert coverage.buffers == ()


def test_a_prior_of_buffers_alone_is_refused(toy):
    model = with_buffer(toy.model(), "scale")
    with pytest.raises(AlignmentError, match=r"1 matched parameters are buffers"):
        match(model, {"layers.0.mlp.scale": (c.INTERMEDIATE,)}, modules="re:scale")


# Two towers, and a model inside a model.


def two_towers(toy, *, is_first):
    """The weights of the prior in one tower, others in the one beside it."""
    tensors = {n: t for n, t in memory_tensors(toy.pair.mllm).items() if n.startswith(TOWER)}
    other = {n: t + 1 for n, t in tensors.items()}
    one, two = (tensors, other) if is_first else (other, tensors)
    return holder(renamed(one, (TOWER, "model.encoder.")) | renamed(two, (TOWER, "model.decoder.")))


@pytest.mark.parametrize("is_first", [True, False])
def test_of_two_towers_the_one_with_the_values_of_the_prior_is_biased(toy, is_first):
    model = two_towers(toy, is_first=is_first)
    found = biases(drift_merge.attach(model, toy.prior, rule="absolute", alpha=1.0), model)
    prefix = "model.encoder." if is_first else "model.decoder."
    assert len(found) == 20
    for name, bias in found.items():
        assert torch.allclose(bias, toy.deltas()[name.removeprefix(prefix)])


def remedy_call(text, model, prior, **options):
    """Run the `attach(..., ...)` that a remedy prints, as it is printed."""
    (call,) = re.findall(r"attach\(\.\.\., (.+?)\)(?:$|[.\n])", text)
    return eval(  # the text is ours
        f"drift_merge.attach(model, prior, {call}, **options)",
        {"drift_merge": drift_merge, "model": model, "prior": prior, "options": options},
    )


def test_two_towers_that_nothing_tells_apart_are_refused_and_the_remedy_works(toy):
    tensors = {n: t + 1 for n, t in memory_tensors(toy.pair.mllm).items() if n.startswith(TOWER)}
    both = renamed(tensors, (TOWER, "model.encoder.")) | renamed(tensors, (TOWER, "model.decoder."))
    model = holder({n: t.clone() for n, t in both.items()})
    with pytest.raises(AlignmentError, match=r"2 language towers .* model\.decoder\.layers") as e:
        drift_merge.attach(model, toy.prior)
    with pytest.warns(UserWarning, match="does not have the weights"):
        handle = remedy_call(e.value.remedy, model, toy.prior, strict=False)
    assert all(name.startswith("model.decoder.") for name in biases(handle, model))


def test_towers_that_are_tied_are_one(toy):
    tensors = {
        n: nn.Parameter(t) for n, t in memory_tensors(toy.pair.mllm).items() if n.startswith(TOWER)
    }
    both = renamed(tensors, (TOWER, "model.encoder.")) | renamed(tensors, (TOWER, "model.decoder."))
    model = holder(both)
    assert (
        len(biases(drift_merge.attach(model, toy.prior, rule="absolute", alpha=1.0), model)) == 20
    )


def test_a_tower_may_be_said_and_one_that_is_not_there_is_refused_with_those_that_are(toy):
    model = two_towers(toy, is_first=True)
    with pytest.warns(UserWarning, match="does not have the weights"):
        handle = drift_merge.attach(model, toy.prior, tower="model.decoder", strict=False)
    assert all(name.startswith("model.decoder.") for name in biases(handle, model))
    with pytest.raises(AlignmentError, match=r"no list of layers under 'model\.thinker'") as e:
        drift_merge.attach(model, toy.prior, tower="model.thinker")
    found = biases(remedy_call(e.value.remedy, model, toy.prior, rule="absolute", alpha=1.0), model)
    assert len(found) == 20


@pytest.mark.parametrize("outer", ["model", "model.model", "classifier.mllm"])
def test_a_model_inside_a_model_is_found(toy, outer):
    tensors = {f"{outer}.{n}": t for n, t in memory_tensors(toy.pair.mllm).items()}
    model = holder(tensors | {"score.weight": torch.zeros(2, c.HIDDEN)})
    found = biases(drift_merge.attach(model, toy.prior, rule="absolute", alpha=1.0), model)
    assert len(found) == 20
    assert all(name.startswith(f"{outer}.") for name in found)


def test_names_that_nothing_explains_are_paired_by_shape_and_recorded_values(toy):
    model = holder(renamed(memory_tensors(toy.pair.mllm), *OTHER))
    handle = drift_merge.attach(model, toy.prior, rule="absolute", alpha=1.0)
    assert handle.coverage.matched == handle.coverage.selected == 20
    assert set(handle.coverage.by_value) == {
        f"layers.{n}.{name}.weight" for n in range(2) for name in ("mlp.up_proj", "mlp.gate_proj")
    }
    found = biases(handle, model)
    for name, delta in toy.deltas().items():
        if "norm" not in name:
            (place,) = renamed({TOWER + name: None}, *OTHER)
            assert torch.allclose(found[place], delta), name
    assert "4 paired by their values" in handle.report()["coverage"]["text"]


def test_gate_and_up_under_names_of_their_own_are_told_by_their_values(toy):
    places = ((".up_proj.", ".one."), (".gate_proj.", ".two."))
    model = holder(renamed(memory_tensors(toy.pair.mllm), *places))
    found = biases(drift_merge.attach(model, toy.prior, rule="absolute", alpha=1.0), model)
    deltas = toy.deltas()
    for layer in range(2):
        at = f"layers.{layer}.mlp."
        assert torch.allclose(found[f"{TOWER}{at}one.weight"], deltas[f"{at}up_proj.weight"])
        assert torch.allclose(found[f"{TOWER}{at}two.weight"], deltas[f"{at}gate_proj.weight"])


def twins(toy):
    """Up and gate have equal values in the model and in the prior, under names of their own."""
    tensors = renamed(
        memory_tensors(toy.pair.mllm), (".up_proj.", ".one."), (".gate_proj.", ".two.")
    )
    for name in [n for n in tensors if ".one." in n]:
        tensors[name.replace(".one.", ".two.")] = tensors[name].clone()
    entries = dict(toy.prior.tensors)
    for name in [n for n in entries if "up_proj" in n]:
        gate = name.replace("up_proj", "gate_proj")
        keys = ("sample_mllm", "fingerprint_mllm", "norm_mllm")
        entries[gate] = entries[gate] | {key: entries[name][key] for key in keys}
    prior = type(toy.prior)(toy.prior.path, toy.prior.manifest | {"tensors": entries})
    return holder(tensors), prior


def test_what_values_do_not_tell_apart_is_refused_by_both_names_and_the_map_works(toy, tmp_path):
    model, prior = twins(toy)
    with pytest.raises(AlignmentError, match=r"8 of 24 selected tensors have no partner") as e:
        drift_merge.attach(model, prior)
    assert (
        "layers.0.mlp.gate_proj.weight (24, 16), on the disk model.layers.0.mlp" in e.value.message
    )
    assert f"nearest in memory {TOWER}layers.0.mlp." in e.value.message
    text, _, call = e.value.remedy.partition("\nand pass ")
    _, _, yaml = text.partition("map.yaml:\n")
    (tmp_path / "map.yaml").write_text(yaml)
    call = call.replace("map.yaml", str(tmp_path / "map.yaml"))
    handle = remedy_call(call, model, prior)
    assert handle.coverage.matched == 20
    assert not handle.coverage.by_value


def test_a_model_whose_values_are_others_is_not_paired_and_no_map_is_offered(toy):
    changed = {n: t + 1 for n, t in memory_tensors(toy.pair.mllm).items()}
    with pytest.raises(AlignmentError, match=r"8 of 24 selected") as e:
        drift_merge.attach(holder(renamed(changed, *OTHER)), toy.prior)
    assert "map" not in e.value.remedy
    assert "strict=False" in e.value.remedy


def test_a_run_that_goes_on_keeps_the_pairs_that_its_first_weights_told(toy):
    model = holder(renamed(memory_tensors(toy.pair.mllm), *OTHER))
    state = drift_merge.attach(model, toy.prior).state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    with pytest.raises(AlignmentError):
        drift_merge.attach(model, toy.prior)
    handle = drift_merge.attach(model, toy.prior, state=state)
    assert len(handle.coverage.by_value) == 4
    assert handle.coverage.units == 20


def test_a_state_from_before_there_were_such_pairs_is_read(toy):
    state = drift_merge.attach(toy.model(), toy.prior).state_dict()
    del state["by_value"]
    assert drift_merge.attach(toy.model(), toy.prior, state=state).coverage.units == 20


def without_embedding(tensors):
    return {n: t for n, t in tensors.items() if "embed" not in n and "head" not in n}


def test_a_model_without_a_tower_is_refused_and_the_remedy_works(toy):
    tensors = without_embedding(memory_tensors(toy.pair.mllm))
    model = holder({n: t + 1 for n, t in tensors.items()})
    with pytest.raises(AlignmentError, match="no language tower") as e:
        drift_merge.attach(model, toy.prior)
    with pytest.warns(UserWarning, match="does not have the weights"):
        handle = remedy_call(
            e.value.remedy, model, toy.prior, rule="absolute", alpha=1.0, strict=False
        )
    assert len(biases(handle, model)) == 20


def test_a_model_of_which_nothing_is_known_is_refused_without_an_invented_name(toy):
    with pytest.raises(AlignmentError, match="no language tower") as e:
        drift_merge.attach(nn.Linear(3, 3), toy.prior)
    assert "up_proj" not in e.value.remedy
    assert "map_file=" in e.value.remedy


def test_a_model_whose_structure_says_nothing_is_paired_by_values_alone(toy):
    """Layers that are no list, names that say nothing, no embedding: a pipeline's stage, say."""
    tensors = without_embedding(memory_tensors(toy.pair.mllm))
    numbered = {f"w{number}": name for number, name in enumerate(sorted(tensors))}
    model = holder({short: tensors[name] for short, name in numbered.items()})
    handle = drift_merge.attach(model, toy.prior, rule="absolute", alpha=1.0)
    assert len(handle.coverage.by_value) == handle.coverage.matched == 20
    found = biases(handle, model)
    for short, bias in found.items():
        assert torch.allclose(bias, toy.deltas()[numbered[short].removeprefix(TOWER)])


def test_the_callback_of_a_trainer_takes_the_same_options(toy):
    from drift_merge.trainers.wiring import Wiring

    model = two_towers(toy, is_first=True)
    wiring = Wiring(toy.prior, {"tower": "model.encoder", "map_file": None})
    assert wiring.start(model).coverage.units == 20
    wiring.stop()
