"""Methods on singular directions through the stream: fused matrices, files, checks, sweeps."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drift_merge.errors import DriftMergeError, RecipeError, VerificationError
from drift_merge.merges.manifest import open_merge
from drift_merge.merges.verify import verify_merge
from tests import reference_spectral as reference
from tests.merges.suite import Case, run_merge, write_sources

CHAT = Case("chat-vector", "paper", True)
HALF = 2.0**-8  # of bfloat16: half a step, relative


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        tensors |= load_file(file)
    return {name: tensor.double() for name, tensor in tensors.items()}


def made(sources, out, case=CHAT, **recipe):
    run_merge(case, sources, out, **({"dtype": "float32"} | recipe))
    return weights_of(out)


def test_each_matrix_gets_its_leading_directions_and_vectors_the_plain_weight(sources, tmp_path):
    found = made(sources, tmp_path / "out", options={"rank": 1}, weights=(0.05, 0.1))
    mllm, base = weights_of(sources.mllm), weights_of(sources.base)
    reasoners = [weights_of(path) for path in sources.reasoners]
    records = open_merge(tmp_path / "out").tensors
    matrices = 0
    for name, own in mllm.items():
        if records[name]["method"] == "copy" or records[name]["method"] == "cast":
            continue
        taus = [tensors[name] - base[name] for tensors in reasoners]
        if own.ndim == 2:
            taus = [reference.leading(tau, 1, "frobenius") for tau in taus]
            matrices += records[name]["matrices"]
        exact = own + 0.05 * taus[0] + 0.1 * taus[1]
        assert (found[name] - exact).abs().max() <= 2e-6 * exact.abs().max(), name
    assert matrices == 14  # q, k, v, o, gate, up, down of two layers
    assert "1 leading directions" in open_merge(tmp_path / "out").manifest["formula"]


@pytest.mark.parametrize("name", ["tsv-m", "chat-vector"])
def test_any_number_of_workers_gives_the_same_bytes(name, sources, tmp_path):
    options = {"rank": 2} if name == "chat-vector" else {}
    for threads in (1, 3):
        run_merge(
            Case(name, "paper", True),
            sources,
            tmp_path / str(threads),
            options=options,
            threads=threads,
        )
    one, other = (sorted((tmp_path / n).glob("*.safetensors")) for n in ("1", "3"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in other]


def test_verify_makes_the_same_again_and_says_so(sources, tmp_path):
    made(sources, tmp_path / "out", options={"rank": 1})
    report = verify_merge(open_merge(tmp_path / "out"), **given(sources), sample=100)
    assert not report.near
    assert len(report.recomputed) == len(open_merge(tmp_path / "out").tensors)


def given(sources):
    return {
        "reasoners": [str(path) for path in sources.reasoners],
        "mllm": str(sources.mllm),
        "base": str(sources.base),
    }


@pytest.mark.parametrize(("change", "is_near"), [(1e-6, True), (0.5, False)])
def test_verify_accepts_another_processors_roundings_and_nothing_more(
    change, is_near, sources, tmp_path, monkeypatch
):
    """A file that differs a little from what is made again, as one from another machine would."""
    from drift_merge.maths.spectra import steps

    leading = steps.leading

    def other(matrix, rank, key):
        found = leading(matrix, rank, key)
        return type(found)(found.u, found.values * (1 + change), found.v, found.error)

    with monkeypatch.context() as patched:
        patched.setattr(steps, "leading", other)
        made(sources, tmp_path / "out", options={"rank": 1, "norm": "none"})
    if is_near:
        report = verify_merge(open_merge(tmp_path / "out"), **given(sources), sample=100)
        assert len(report.near) == 14
    else:
        with pytest.raises(VerificationError, match="is off by"):
            verify_merge(open_merge(tmp_path / "out"), **given(sources), sample=100)


def test_a_damaged_file_fails_however_its_tensors_were_made(sources, tmp_path):
    made(sources, tmp_path / "out", options={"rank": 1})
    file = next((tmp_path / "out").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(VerificationError):
        verify_merge(open_merge(tmp_path / "out"), **given(sources))


def test_a_step_that_no_tensor_would_take_is_refused(sources, tmp_path):
    for case, options in ((CHAT, {"rank": 1}), (Case("iso-c", "paper", True), {})):
        with pytest.raises(RecipeError, match="none of the 5 tensors"):
            run_merge(case, sources, tmp_path / "out", options=options, modules="norm")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"rank": 1, "eta": 40.0}, "both choose"),
        ({"rank": 1, "bands": ":=1"}, "both choose"),
        ({"norm": "nuclear"}, "has no effect"),
        ({"bands": ":=1", "norm": "nuclear"}, "has no effect"),
        ({"bands": "0:4=1,3:5=1"}, "each direction once"),
        ({"bands": "0:4"}, "FIRST:END=FACTOR"),
        ({"rank": -1}, "0 or more"),
        ({"rank": 1.5}, "whole number"),
        ({"calibrate_alpha": 0.5}, "without --calibrate svc"),
    ],
)
def test_options_without_effect_or_sense_are_refused(options, what, sources, tmp_path):
    with pytest.raises(RecipeError) as caught:
        run_merge(CHAT, sources, tmp_path / "out", options=options)
    assert what in caught.value.message
    assert caught.value.remedy


def write_gates(sources, path, factors, names=None):
    shapes = {name: tensor.shape for name, tensor in weights_of(sources.mllm).items()}
    chosen = [n for n in shapes if n.startswith("model.layers.") and len(shapes[n]) == 2]
    save_file({n.removeprefix("model."): torch.tensor(factors) for n in (names or chosen)}, path)
    return chosen


def test_gates_of_a_file_are_the_factors_of_the_directions(sources, tmp_path):
    names = write_gates(sources, tmp_path / "gates.safetensors", [0.9, 0.25])
    options = {"gates": str(tmp_path / "gates.safetensors")}
    found = made(sources, tmp_path / "out", options=options, weights=(1.0, 0.0))
    mllm, base = weights_of(sources.mllm), weights_of(sources.base)
    reasoner = weights_of(sources.reasoners[0])
    for name in names:
        parts = reference.svd(reasoner[name] - base[name])
        exact = mllm[name] + reference.directions(parts, [0.9, 0.25])
        assert (found[name] - exact).abs().max() <= 2e-6 * exact.abs().max()
    verify_merge(open_merge(tmp_path / "out"), **given(sources), sample=20)


@pytest.mark.parametrize(
    ("factors", "names", "what"),
    [
        ([0.5], ["model.layers.0.mlp.up_proj.weight"], "has no gates"),
        ([0.5] * 999, None, "directions"),
        ([[0.5]], None, "expected a vector"),
        ([float("nan")], None, "NaN"),
    ],
)
def test_gates_that_do_not_fit_are_refused(factors, names, what, sources, tmp_path):
    write_gates(sources, tmp_path / "gates.safetensors", factors, names)
    with pytest.raises(DriftMergeError) as caught:
        made(sources, tmp_path / "out", options={"gates": str(tmp_path / "gates.safetensors")})
    assert what in f"{caught.value.message} {caught.value.remedy}"


def test_changed_gates_are_another_plan(sources, tmp_path):
    from drift_merge.plans.prepare import prepare
    from drift_merge.recipes.recipe import Recipe

    found = []
    for factor in (0.5, 0.25):
        write_gates(sources, tmp_path / "gates.safetensors", [factor])
        recipe = Recipe(
            method="chat-vector",
            reasoners=(str(sources.reasoners[0]),),
            mllm=str(sources.mllm),
            base=str(sources.base),
            options={"gates": str(tmp_path / "gates.safetensors")},
        )
        found.append(prepare(recipe).plan().fingerprint())
    assert found[0] != found[1]


def test_a_sweep_over_bands_and_ranks_gives_what_single_runs_give(sources, tmp_path, call):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: chat-vector\nreasoner: {sources.reasoners[0]}\nmllm: {sources.mllm}\n"
        f"base: {sources.base}\ndtype: float32\n"
    )
    call(
        "drift-merge",
        "sweep",
        str(recipe),
        "--set",
        "bands=0:1=0.1;1:3=0.2,3:=0.1",
        "-o",
        str(tmp_path / "sweep"),
    )
    single = made(
        sources, tmp_path / "one", options={"bands": "1:3=0.2,3:=0.1"}, weights=(1.0, 0.0)
    )
    swept = weights_of(tmp_path / "sweep" / "bands=1:3=0.2,3:=0.1")
    assert all(swept[name].equal(single[name]) for name in single)
    assert (tmp_path / "sweep" / "bands=0:1=0.1").is_dir()


def test_iso_warns_where_most_directions_are_noise(sources, tmp_path, call):
    done = call(
        "drift-merge",
        "iso-c",
        *sources.arguments(Case("iso-c", "paper", True)),
        "-o",
        str(tmp_path / "out"),
    )
    assert done.code == 0
    records = json.loads((tmp_path / "out" / "drift_merge.json").read_text())["tensors"].values()
    shares = [r["stable_rank"] / min(r["shape"]) for r in records if "matrices" in r]
    assert len(shares) == 14
    assert all(0.0 < share <= 1.0 for share in shares)
    assert ("[noise]" in done.err) == any(share < 0.1 for share in shares)


def test_mergekit_names_of_ram_are_read(sources, tmp_path, call):
    for name, options in (("ram", {}), ("ramplus_tl", {"r": 0.3})):
        file = tmp_path / f"{name}.yml"
        models = "".join(f"  - model: {p}\n" for p in (sources.mllm, *sources.reasoners))
        parameters = "".join(f"  {k}: {v}\n" for k, v in {"epsilon": 0.01, **options}.items())
        file.write_text(
            f"merge_method: {name}\nbase_model: {sources.base}\nmodels:\n{models}"
            f"parameters:\n{parameters}dtype: float32\n"
        )
        modules = ("--modules", "attn,mlp,norm")
        done = call("drift-merge", "run", str(file), *modules, "-o", str(tmp_path / name))
        assert done.code == 0, done.err
        found = weights_of(tmp_path / name)
        base = weights_of(sources.base)
        models = [weights_of(path) for path in (sources.mllm, *sources.reasoners)]
        key = "model.layers.1.mlp.up_proj.weight"
        taus = [(model[key] - base[key]).flatten().tolist() for model in models]
        factors = [1.0] * 3
        if options:
            factors = reference.ram_plus_factors(taus, 0.01, 0.3, 0.2)
        exact = base[key].flatten() + torch.tensor(reference.ram(taus, 0.01, factors)).double()
        assert (found[key].flatten() - exact).abs().max() <= 1e-6


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_frank_with_a_decay_is_the_papers_and_metagpt_one_set_for_all(decay, sources, tmp_path):
    case = Case("task-arithmetic", "paper", True)
    options = {"frank_decay": decay} if decay else {}
    base = weights_of(sources.base)
    models = [weights_of(path) for path in (sources.mllm, *sources.reasoners)]
    names = [n for n in base if n.startswith("model.layers.")]

    def squared(chosen):
        return [sum(float(((m[n] - base[n]) ** 2).sum()) for n in chosen) for m in models]

    layers = [squared([n for n in names if f".{layer}." in n]) for layer in (0, 1)]
    exact = reference.frank(layers, decay)
    if not decay:  # equation 13, which the paper has first
        exact = [[part / sum(norms) for part in norms] for norms in layers]
    run_merge(case, sources, tmp_path / "out", weights=("frank",), options=options)
    records = open_merge(tmp_path / "out").tensors
    for layer in (0, 1):
        record = records[f"model.layers.{layer}.mlp.up_proj.weight"]
        found = [record["mllm_weight"], *record["weights"]]
        assert found == pytest.approx(exact[layer], rel=1e-5)
    run_merge(case, sources, tmp_path / "meta", weights=("metagpt",), modules="attn,mlp,norm")
    whole = squared([*names, "model.norm.weight"])
    record = open_merge(tmp_path / "meta").tensors["model.layers.1.mlp.up_proj.weight"]
    found = [record["mllm_weight"], *record["weights"]]
    assert found == pytest.approx([part / sum(whole) for part in whole], rel=1e-5)
    with pytest.raises(RecipeError, match="without --weight frank"):
        run_merge(case, sources, tmp_path / "no", options={"frank_decay": 0.3})
