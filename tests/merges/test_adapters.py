"""LoRA adapters as reasoners: theta = base + s B A, streamed, equals the merged weights."""

import json

import numpy as np
import pytest

from drift_merge.engine.job import RunOptions
from drift_merge.errors import AlignmentError, CheckpointError, RecipeError
from drift_merge.merges.make import make_merge
from drift_merge.plans.prepare import prepare
from drift_merge.recipes.recipe import Recipe
from tests import adapters
from tests import checkpoints as c
from tests.adapters import ALPHA, IN_FILE, RANK, write_adapter

MODULE = "model.layers.0.self_attn.o_proj"
NAME = f"{MODULE}.weight"
ONE = {MODULE: (c.HIDDEN, c.HIDDEN)}


@pytest.fixture
def pair(tmp_path):
    return c.make_pair(tmp_path, dtype="F32")


def prepared(pair, adapter, **values):
    values = {"method": "passthrough", "modules": "attn,mlp,norm"} | values
    return prepare(Recipe(reasoners=(str(adapter),), mllm=str(pair.mllm), **values))


def merged(pair, out, adapter, **values):
    ready = prepared(pair, adapter, **values)
    make_merge(ready, ready.plan(), out, RunOptions(threads=1))
    return c.read_tensors(out)


def assert_merged(found, base, factors, scales):
    """Every adapted weight is the naive one, every other weight of a layer the base's."""
    before = c.read_tensors(base)
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if "layers." not in name:
            continue
        if module not in factors or not name.endswith(".weight"):
            assert np.array_equal(found[name].values, tensor.values), name
            continue
        a, b, magnitude = factors[module]
        expected = adapters.merged(tensor.values, factors[module], scales[module])
        limit = adapters.bound(tensor.values, a, b, scales[module])
        assert np.abs(found[name].values - expected).max() <= limit * (1 + (magnitude is not None))


def in_layers(name):
    return ".layers." in name and "_proj." in name


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / np.sqrt(RANK)),
        ({"lora_alpha": 1}, 1 / RANK),
        ({"lora_alpha": 2.5}, 2.5 / RANK),
        ({"lora_alpha": 0}, 0),
        ({"use_dora": True}, ALPHA / RANK),
        ({"fan_in_fan_out": True, "target_modules": ["q_proj"]}, ALPHA / RANK),
    ],
)
def test_every_weight_is_base_plus_the_scaled_product(tmp_path, pair, config, scale):
    def chosen(name):
        return in_layers(name) and ("target_modules" not in config or "k_proj" in name)

    if "target_modules" in config:
        config = config | {"target_modules": ["k_proj"]}  # not square: shapes say how it lies
    modules = adapters.modules_of(pair.reasoner, chosen)
    factors = write_adapter(tmp_path / "lora", pair.reasoner, modules, **config)
    found = merged(pair, tmp_path / "out", tmp_path / "lora")
    assert_merged(found, pair.reasoner, factors, dict.fromkeys(factors, scale))


def test_patterns_match_the_end_of_a_name_in_groups_and_the_first_one_counts(tmp_path, pair):
    modules = adapters.modules_of(pair.reasoner, in_layers)
    alphas = {"layers.0.self_attn.q_proj": 64, "q_proj|k_proj": 16, "^v_proj": 99, "mlp.*": 2}
    ranks = {"model.layers.1.mlp.up_proj": 3, "up_proj|down_proj": 4, "_proj": 5}

    def of(module, table, otherwise):
        """Written out by hand, not with regular expressions."""
        layer, _, name = module.removeprefix("model.layers.").split(".")
        return table.get((layer, name), table.get(name, otherwise))

    true_alphas = {("0", "q_proj"): 64, "q_proj": 16, "k_proj": 16}
    true_alphas |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 2)
    true_ranks = {("1", "up_proj"): 3, "up_proj": 4, "down_proj": 4}
    own = {module: of(module, true_ranks, RANK) for module in modules}
    factors = write_adapter(
        tmp_path / "lora", pair.reasoner, modules,
        ranks=own, rank_pattern=ranks, alpha_pattern=alphas,
    )  # fmt: skip
    scales = {module: of(module, true_alphas, ALPHA) / own[module] for module in modules}
    found = merged(pair, tmp_path / "out", tmp_path / "lora")
    assert_merged(found, pair.reasoner, factors, scales)


def test_a_module_that_is_saved_whole_stands_for_the_bases(tmp_path, pair):
    whole = {
        f"{IN_FILE}model.layers.{n}.input_layernorm.weight": c.store(
            np.full(c.HIDDEN, n + 2), "F32"
        )
        for n in range(2)
    }
    factors = write_adapter(
        tmp_path / "lora", pair.reasoner, ONE, changes=whole, modules_to_save=["input_layernorm"]
    )
    found = merged(pair, tmp_path / "out", tmp_path / "lora")
    for n in range(2):
        name = f"model.layers.{n}.input_layernorm.weight"
        assert (found.pop(name).values == n + 2).all()
        found[name] = c.read_tensors(pair.reasoner)[name]
    assert_merged(found, pair.reasoner, factors, {MODULE: ALPHA / RANK})


@pytest.mark.parametrize("use_dora", [False, True])
def test_chunks_and_threads_do_not_change_a_byte(tmp_path, use_dora, monkeypatch):
    pair = c.make_pair(tmp_path, dtype="BF16")
    modules = adapters.modules_of(pair.reasoner, in_layers)
    write_adapter(tmp_path / "lora", pair.reasoner, modules, use_dora=use_dora)
    whole = merged(pair, tmp_path / "one", tmp_path / "lora")
    monkeypatch.setattr("drift_merge.engine.reader.chunk_elements", lambda device: 3 * c.HIDDEN)
    assert merged(pair, tmp_path / "two", tmp_path / "lora") == whole


def test_task_arithmetic_adds_the_product_and_nothing_else(tmp_path, pair):
    factors = write_adapter(tmp_path / "lora", pair.reasoner, ONE)
    values = {"method": "task-arithmetic", "base": str(pair.reasoner), "dtype": "float32"}
    found = merged(pair, tmp_path / "out", tmp_path / "lora", weights=(0.5,), **values)
    mllm = c.read_tensors(pair.mllm)
    a, b, _ = factors[MODULE]
    expected = mllm[NAME].values.astype(np.float64) + 0.5 * 3.0 * (b @ a)
    assert np.abs(found[NAME].values - expected).max() <= 1e-6 * np.abs(expected).max()
    other = "model.layers.0.mlp.up_proj.weight"
    assert np.abs(found[other].values - mllm[other].values).max() <= 2.0**-22


GPT2 = {
    "attn.c_attn": (3 * c.HIDDEN, c.HIDDEN),
    "attn.c_proj": (c.HIDDEN, c.HIDDEN),
    "mlp.c_fc": (4 * c.HIDDEN, c.HIDDEN),
    "mlp.c_proj": (c.HIDDEN, 4 * c.HIDDEN),
}


def write_gpt2(directory):
    """A text model that stores (inputs, outputs), and an MLLM around another one."""
    shapes = {"wte.weight": (c.VOCABULARY, c.HIDDEN), "ln_f.weight": (c.HIDDEN,)}
    for layer in range(2):
        shapes |= {f"h.{layer}.{name}.weight": shape[::-1] for name, shape in GPT2.items()}
    text = {"model_type": "gpt2", "n_layer": 2, "n_embd": c.HIDDEN, "n_head": c.HEADS}
    names = {f"transformer.{name}": shape for name, shape in shapes.items()}
    c.write_checkpoint(directory / "reasoner", c.random_tensors(names, 1, dtype="F32"), text)
    names = {f"language_model.transformer.{name}": shape for name, shape in shapes.items()}
    names["vision_tower.x.weight"] = (4, 4)
    config = {"model_type": "llava", "text_config": text, "vision_config": {"hidden_size": 4}}
    c.write_checkpoint(directory / "mllm", c.random_tensors(names, 2, dtype="F32"), config)
    return c.Pair(directory / "reasoner", directory / "mllm")


@pytest.mark.parametrize("flag", [False, True])
def test_weights_that_are_stored_transposed_take_the_transposed_product(tmp_path, flag):
    """The square one too, whose shape does not say it; PEFT asks the class, not the field."""
    pair = write_gpt2(tmp_path)
    modules = {f"transformer.h.{n}.{name}": GPT2[name] for n in range(2) for name in GPT2}
    factors = write_adapter(tmp_path / "lora", pair.reasoner, modules, fan_in_fan_out=flag)
    found = merged(pair, tmp_path / "out", tmp_path / "lora")
    base = c.read_tensors(pair.reasoner)
    for module, parts in factors.items():
        weight = base[f"{module}.weight"].values
        expected = adapters.merged(weight.T, parts).T
        limit = adapters.bound(weight.T, *parts[:2], ALPHA / RANK)
        values = found[f"language_model.{module}.weight"].values
        assert np.abs(values - expected).max() <= limit


IN_MEMORY = "model.language_model.layers"


def of_mllm(pair, *, vision=True):
    """Names in memory of the mllm's modules: of its tower and of its vision tower."""
    found = adapters.modules_of(pair.mllm, in_layers)
    names = {n.replace("model.layers", IN_MEMORY): shape for n, shape in found.items()}
    if vision:
        names["model.visual.blocks.0.attn.qkv"] = (3 * c.VISION, c.VISION)
        names["model.visual.patch_embed.proj"] = (c.VISION, 24)
    return names


def test_an_adapter_trained_on_the_mllm_is_the_mllm_fine_tuned(tmp_path, pair):
    """Even beside a base, which then is the common ancestor."""
    factors = write_adapter(tmp_path / "lora", pair.mllm, of_mllm(pair))
    for name, values in (("one", {}), ("two", {"method": "linear", "weights": (1.0,)})):
        found = merged(pair, tmp_path / name, tmp_path / "lora", **values)
        on_disk = {
            module.replace(IN_MEMORY, "model.layers"): parts
            for module, parts in factors.items()
            if "visual" not in module
        }
        assert_merged(found, pair.mllm, on_disk, dict.fromkeys(on_disk, ALPHA / RANK))
        before = c.read_tensors(pair.mllm)
        assert all(found[n] == tensor for n, tensor in before.items() if n.startswith("visual"))
    values = {"method": "task-arithmetic", "base": str(pair.reasoner), "weights": (1.0,)}
    ((reasoner, _),) = prepared(pair, tmp_path / "lora", **values).reasoners
    assert reasoner.config == json.loads((pair.mllm / "config.json").read_text())


def test_factors_of_the_vision_tower_are_outside_named_and_counted(tmp_path, pair):
    write_adapter(tmp_path / "lora", pair.mllm, of_mllm(pair))
    ready = prepared(pair, tmp_path / "lora")
    (note,) = [finding for finding in ready.findings if finding.code == "adapter"]
    assert "2 modules outside the language tower" in note.message
    assert "model.visual.blocks.0.attn.qkv" in note.message
    ((_, alignment),) = ready.reasoners
    outside = {n for r in alignment.records if r.status == "outside_tower" for n in r.reasoner}
    assert {n for n in outside if "lora_" in n} == {
        f"{IN_FILE}model.visual.{module}.lora_{part}.weight"
        for module in ("blocks.0.attn.qkv", "patch_embed.proj")
        for part in "AB"
    }


@pytest.mark.parametrize(
    ("modules", "on"),
    [
        # A text LLM's adapter on an MLLM whose tower has another place, and the other way round.
        ({"model.layers.0.self_attn.o_proj": (c.HIDDEN, c.HIDDEN)}, "mllm"),
        ({f"{IN_MEMORY}.0.self_attn.o_proj": (c.HIDDEN, c.HIDDEN)}, "reasoner"),
        ({"model.visual.blocks.0.attn.qkv": (3 * c.VISION, c.VISION)}, "mllm"),
    ],
)
def test_an_adapter_of_another_tower_is_refused(tmp_path, modules, on):
    pair = c.make_pair(tmp_path)
    if on == "mllm":
        tensors = c.read_tensors(pair.mllm)
        for name in list(tensors):
            moved = name.replace("model.", "model.language_model.", 1)
            tensors[moved if name.startswith("model.") else name] = tensors.pop(name)
        config = json.loads((pair.mllm / "config.json").read_text())
        pair = c.Pair(pair.reasoner, c.write_checkpoint(tmp_path / "moved", tensors, config))
    base = pair.mllm if on == "mllm" else pair.reasoner
    write_adapter(tmp_path / "lora", base, modules)
    with pytest.raises(CheckpointError, match=r"none of its 1 modules|is no module of the base"):
        prepared(pair, tmp_path / "lora")


def test_a_base_that_stands_for_the_named_one_is_said(tmp_path, pair):
    write_adapter(tmp_path / "lora", tmp_path / "elsewhere", ONE)
    with pytest.raises(Exception, match="elsewhere") as missing:
        prepared(pair, tmp_path / "lora")
    assert "base_model_name_or_path" in missing.value.remedy
    values = {"method": "task-arithmetic", "base": str(pair.reasoner)}
    ready = prepared(pair, tmp_path / "lora", **values)
    assert any("elsewhere" in f.message for f in ready.findings if f.code == "adapter")
    write_adapter(tmp_path / "none", "", ONE)
    prepared(pair, tmp_path / "none", **values)
    with pytest.raises(RecipeError, match="names no base"):
        prepared(pair, tmp_path / "none")


def test_a_folder_with_a_model_and_an_adapter_is_the_model(tmp_path, pair):
    modules = adapters.modules_of(pair.reasoner, in_layers)
    write_adapter(tmp_path / "lora", pair.reasoner, modules)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "lora" / name).rename(pair.reasoner / name)
    ready = prepared(pair, pair.reasoner)
    (note,) = [finding for finding in ready.findings if finding.code == "adapter"]
    assert "the model counts" in note.message
    found = merged(pair, tmp_path / "out", pair.reasoner)
    before = c.read_shard(pair.reasoner / "model.safetensors")
    assert np.array_equal(found[NAME].values, before[NAME].values)


def test_what_the_mllm_stores_fused_is_refused_with_a_command(tmp_path):
    pair = c.make_pair(tmp_path, dtype="F32")
    tensors = c.read_tensors(pair.mllm)
    for n in range(2):
        at = f"model.layers.{n}.mlp."
        parts = [tensors.pop(f"{at}{name}_proj.weight").values for name in ("gate", "up")]
        tensors[f"{at}gate_up_proj.weight"] = c.store(np.concatenate(parts), "F32")
    config = json.loads((pair.mllm / "config.json").read_text())
    pair = c.Pair(pair.reasoner, c.write_checkpoint(tmp_path / "fused", tensors, config))
    modules = adapters.modules_of(pair.reasoner, lambda name: "up_proj" in name)
    write_adapter(tmp_path / "lora", pair.reasoner, modules)
    with pytest.raises(AlignmentError, match="stores otherwise") as refused:
        prepared(pair, tmp_path / "lora").plan()
    assert "merge_and_unload()" in refused.value.remedy


def test_an_adapter_that_is_not_plain_lora_is_refused(tmp_path, pair):
    factors = write_adapter(tmp_path / "dora", pair.reasoner, ONE)
    config = tmp_path / "dora/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    assert factors[MODULE][2] is None
    with pytest.raises(CheckpointError, match="not plain LoRA"):
        prepared(pair, tmp_path / "dora")


def test_the_factors_are_a_part_of_the_fingerprint(tmp_path, pair):
    write_adapter(tmp_path / "one", pair.reasoner, ONE)
    write_adapter(tmp_path / "two", pair.reasoner, ONE, lora_alpha=7)
    plans = [prepared(pair, tmp_path / name, modules="attn").plan() for name in ("one", "two")]
    assert plans[0].fingerprint() != plans[1].fingerprint()
