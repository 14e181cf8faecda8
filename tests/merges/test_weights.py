"""Weights per module, per layer and by name, from the command line to the bytes."""

import json

import pytest

from drift_merge.errors import RecipeError
from drift_merge.maths.methods import METHODS
from tests import checkpoints as c
from tests.merges.suite import (
    CASES,
    MERGED,
    Case,
    in_memory,
    name_of,
    run_merge,
    write_sources,
)
from tests.runs import in_memory_linear

LAYERS = 5
LINEAR = Case("linear", "paper", has_base=False)
SWAP = Case("layer-swap", "paper", has_base=False)
TASK = Case("task-arithmetic", "paper", has_base=True)
TIES = Case("ties", "paper", has_base=True)
MIXED = "mlp=[0,1],re:layers.2.self_attn.[kv]_proj=0.75,attn=-0.5,0.25"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"), layers=LAYERS)


def one(sources):
    """With one reasoner."""
    return sources._replace(reasoners=sources.reasoners[:1])


def mixed(name):
    """What MIXED gives a tensor, by its stored name."""
    layer = int(name.split(".")[2]) if "layers." in name else None
    if ".mlp." in name:
        return layer / (LAYERS - 1)
    if "layers.2.self_attn" in name and ("k_proj" in name or "v_proj" in name):
        return 0.75
    return -0.5 if ".self_attn." in name else 0.25


def merged_names(sources):
    return [name for name in c.read_tensors(sources.mllm) if MERGED.match(name)]


def linear_at(sources, weights):
    """The linear merge with one weight for each tensor; 0 copies."""
    mllm, reasoner = c.read_tensors(sources.mllm), c.read_tensors(sources.reasoners[0])
    return {
        name: in_memory_linear(own, [reasoner[name]], [weights[name]]) if weights.get(name) else own
        for name, own in mllm.items()
    }


def test_every_tensor_gets_the_weight_of_its_module_layer_or_name(sources, tmp_path):
    made = run_merge(LINEAR, one(sources), tmp_path / "out", weights=(MIXED,))
    weights = {name: mixed(name) for name in merged_names(sources)}
    assert set(weights.values()) == {0.0, 0.25, 0.5, 0.75, 1.0, -0.5}
    assert c.read_tensors(tmp_path / "out") == linear_at(sources, weights)
    for name, weight in weights.items():
        entry = made.merge.tensors[name]
        assert entry["method"] == ("linear" if weight else "copy"), name
        assert entry.get("weights", [0.0]) == [weight], name
    assert made.merge.manifest["sources"]["reasoners"][0]["weight"] == MIXED
    assert made.merge.manifest["parameters"]["weights"] == [MIXED]


def test_a_dry_run_shows_the_weight_of_every_tensor(call, sources, tmp_path):
    arguments = [*one(sources).arguments(LINEAR), "-o", tmp_path / "out", "--weight", MIXED]
    called = call("drift-merge", "linear", *arguments, "--dry-run", "-v", "--json")
    assert called.code == 0, called
    shown = {step["name"]: step for step in called.json["steps"]}
    for name in merged_names(sources):
        weight = mixed(name)
        assert shown[name]["weights"] == ([weight] if weight else []), name
    table = call("drift-merge", "linear", *arguments, "--dry-run", "-v").out.splitlines()
    line = next(x for x in table if x.startswith("model.layers.2.self_attn.k_proj.weight"))
    assert line.split()[1:3] == ["linear", "0.75"]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_the_weights_of_two_reasoners_and_of_the_mllm(
    call,
    sources,
    tmp_path,
):
    weights = ["--weight", "[0,1]", "--weight", "attn=0.5,-1", "--mllm-weight", "mlp=0.25,0.75"]
    arguments = [*sources.arguments(TASK), "-o", str(tmp_path / "out"), *weights]
    shown = call("drift-merge", "task-arithmetic", *arguments, "-n", "-v", "--json").json["steps"]
    made = call("drift-merge", "task-arithmetic", *arguments, "-q")
    assert made.code == 0, made
    entries = json.loads((tmp_path / "out/drift_merge.json").read_text())["tensors"]
    seen = {step["name"]: step for step in shown}
    for name in merged_names(sources):
        layer = int(name.split(".")[2]) if "layers." in name else LAYERS - 1
        weights = [layer / (LAYERS - 1), 0.5 if ".self_attn." in name else -1.0]
        own = 0.25 if ".mlp." in name else 0.75
        assert seen[name]["weights"] == entries[name]["weights"] == weights, name
        assert entries[name]["mllm_weight"] == own, name
        assert seen[name]["mllm_weight"] == own, name


def test_weights_of_several_reasoners_on_a_base_are_those_of_the_formula(sources, tmp_path):
    weights, own = ("[0,1]", "attn=0.5,-1"), "mlp=0.25,0.75"
    run_merge(TASK, sources, tmp_path / "out", weights=weights, mllm_weight=own)
    read = [c.read_tensors(path) for path in (*sources.reasoners, sources.mllm, sources.base)]
    found = c.read_tensors(tmp_path / "out")
    for name in merged_names(sources):
        first, second, mllm, base = (tensors[name].values.astype(float) for tensors in read)
        layer = int(name.split(".")[2]) if "layers." in name else LAYERS - 1
        expected = base + (0.25 if ".mlp." in name else 0.75) * (mllm - base)
        expected += layer / (LAYERS - 1) * (first - base)
        expected += (0.5 if ".self_attn." in name else -1.0) * (second - base)
        assert abs(found[name].values - expected).max() < 2e-3, name
    assert all(found[name] == read[2][name] for name in found if not MERGED.match(name))


@pytest.mark.parametrize("case", [LINEAR, TASK, SWAP])
def test_a_selected_tensor_that_no_term_covers_stops_the_merge(case, sources, tmp_path):
    with pytest.raises(RecipeError, match=r"norm\.weight \(norm\)") as caught:
        run_merge(case, sources, tmp_path / "out", weights=("attn=0.1,mlp=0.2",))
    assert "attn=0.1,mlp=0.2,0.1" in caught.value.remedy
    assert not (tmp_path / "out").exists()
    run_merge(case, sources, tmp_path / "out", weights=("attn=0.1,mlp=0.2",), modules="attn,mlp")


def test_a_tensor_of_the_mllm_that_its_weight_does_not_cover_stops_the_merge(sources, tmp_path):
    with pytest.raises(RecipeError, match="--mllm-weight"):
        run_merge(TASK, sources, tmp_path / "out", mllm_weight="attn=1")


def test_the_weights_of_the_paper_ties_count_only_when_they_are_given(sources, tmp_path):
    run_merge(TIES, sources, tmp_path / "default")
    run_merge(TIES, sources, tmp_path / "ones", weights=(1.0,), mllm_weight=1.0)
    run_merge(TIES, sources, tmp_path / "given", weights=(0.2, 0.7))
    default, ones, given = (c.read_tensors(tmp_path / n) for n in ("default", "ones", "given"))
    assert default == in_memory(TIES, sources)
    assert default == ones
    assert default != given
    matrices = [name for name in merged_names(sources) if len(default[name].shape) == 2]
    assert all(default[name] != given[name] for name in matrices)


WITH_OWN = [
    case
    for case in CASES
    if "mllm_weight" in METHODS[case.name].defaults[case.variant] and case.name != "consensus-ta"
]


@pytest.mark.parametrize("case", WITH_OWN, ids=name_of)
def test_a_weight_of_the_mllm_alone_counts(case, sources, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    one = "re:layers.0.mlp.up_proj"
    run_merge(case, sources, tmp_path / "default", modules=one)
    run_merge(case, sources, tmp_path / "given", modules=one, mllm_weight=0.2)
    default, given = (c.read_tensors(tmp_path / name) for name in ("default", "given"))
    assert default[name] != given[name]


@pytest.mark.parametrize(
    ("kept", "transition", "factors"),
    [
        ("0:2", 0, [0, 0, 1, 1, 1]),
        ("0:2", 1, [0, 0, 0.5, 1, 1]),
        ("0:2", 2, [0, 0, 0.5, 0.5, 1]),
        ("0,-1:", 1, [0, 0.5, 1, 0.5, 0]),
        ("2", 1, [1, 0.5, 0, 0.5, 1]),
        ("2:", 9, [0.5, 0.5, 0, 0, 0]),
    ],
)
def test_layer_swap_keeps_layers_and_halves_those_beside_them(
    sources, tmp_path, kept, transition, factors
):
    made = run_merge(
        SWAP,
        one(sources),
        tmp_path / "out",
        weights=(0.5,),
        keep_layers=kept,
        transition=transition,
    )
    weights = {}
    for name in merged_names(sources):
        layer = int(name.split(".")[2]) if "layers." in name else None
        weights[name] = 0.5 * (1 if layer is None else factors[layer])
    assert c.read_tensors(tmp_path / "out") == linear_at(sources, weights)
    for name, weight in weights.items():
        assert made.merge.tensors[name].get("weights", [0.0]) == [weight]
    parameters = made.merge.manifest["parameters"]
    assert (parameters["options"]["keep_layers"], parameters["options"]["transition"]) == (
        kept,
        transition,
    )


def test_layer_swap_keeps_the_published_six_layers_unless_told_otherwise(tmp_path):
    sources = write_sources(tmp_path, layers=8)
    made = run_merge(SWAP, one(sources), tmp_path / "out", keep_layers="0:6")
    weights = {name: 0.1 for name in merged_names(sources) if name[13] not in "012345"}
    assert c.read_tensors(tmp_path / "out") == linear_at(sources, weights)
    assert made.merge.manifest["counts"]["layer-swap"] == 2 * 12 + 1


def test_layer_swap_scales_a_gradient_too(sources, tmp_path):
    made = run_merge(
        SWAP, one(sources), tmp_path / "out", weights=("[0,1]",), keep_layers="0", transition=1
    )
    found = [
        made.merge.tensors[f"model.layers.{layer}.mlp.up_proj.weight"].get("weights")
        for layer in range(LAYERS)
    ]
    assert found == [None, [0.125], [0.5], [0.75], [1.0]]


def test_a_weight_for_a_method_that_has_none_is_refused(sources, tmp_path):
    stock, near = Case("model-stock", "paper", True), Case("nearswap", "paper", False)
    for case in (stock, near):
        with pytest.raises(RecipeError, match="weight"):
            run_merge(case, one(sources), tmp_path / "out", weights=(0.5,))


@pytest.mark.parametrize("case", [LINEAR, Case("chat-vector", "paper", True), SWAP])
def test_an_mllm_weight_for_a_method_that_has_none_is_refused(case, sources, tmp_path):
    with pytest.raises(RecipeError, match=r"mllm[-_]weight"):
        run_merge(case, one(sources), tmp_path / "out", mllm_weight=0.5)


def test_linear_of_mergekit_says_what_weight_the_mllm_has(sources, tmp_path):
    case = Case("linear", "mergekit", has_base=False)
    made = run_merge(case, one(sources), tmp_path / "out", weights=(1.0,), mllm_weight=3.0)
    assert made.merge.manifest["sources"]["mllm"]["weight"] == 3.0
    assert c.read_tensors(tmp_path / "out") == linear_at(
        sources, dict.fromkeys(merged_names(sources), 0.25)
    )
