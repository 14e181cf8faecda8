"""A prior as a LoRA adapter: loaded by PEFT into real model classes, compared with an SVD."""

import json
from functools import partial

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

import drift_merge  # noqa: E402
from drift_merge import extract_lora  # noqa: E402
from drift_merge.errors import DriftMergeError, RecipeError, SourceError  # noqa: E402
from drift_merge.priors.manifest import open_prior  # noqa: E402
from tests import tiny_models  # noqa: E402
from tests.real_trainers import tiny  # noqa: E402

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]

RANK = 3


def qwen3():
    values = {k: v for k, v in tiny.TEXT.items() if k != "mlp_bias"}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**values))


def qwen3_vl():
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": tiny.TEXT["hidden_size"],
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    text = tiny.TEXT | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    }
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    config.tie_word_embeddings = False
    return transformers.Qwen3VLForConditionalGeneration(config)


FAMILIES = tiny.FAMILIES | {
    "qwen3_vl": tiny.Family(qwen3, qwen3_vl, "model.language_model.", tiny.as_patches),
    "idefics3": tiny.Family(
        tiny.LLAMA,
        partial(tiny_models.idefics3, tiny.TEXT, tiny.VISION),
        "model.text_model.",
        tiny.as_tiles,
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def setup(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "FAMILIES", FAMILIES)
        return tiny.make_setup(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny.make_setup("llava", tmp_path_factory.mktemp("llava"))


def truncated(delta, rank):
    """By a whole SVD in float64."""
    u, values, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ vt[:rank]


def merged(setup, adapter):
    loaded = peft.PeftModel.from_pretrained(setup.model(), adapter)
    stored = load_file(adapter / "adapter_model.safetensors")
    held = {n.replace(".default.", "."): p for n, p in loaded.named_parameters() if "lora_" in n}
    assert held.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(held[name], tensor.float())
    return loaded.merge_and_unload()


def matrices(setup):
    return {name: delta for name, delta in setup.deltas.items() if delta.ndim == 2}


def test_peft_merges_theta_plus_the_truncated_delta_and_touches_nothing_else(setup, tmp_path):
    made = extract_lora(
        open_prior(setup.prior), tmp_path / "adapter", rank=RANK, dtype="float32", threads=2
    )
    after = merged(setup, tmp_path / "adapter").state_dict()
    before = setup.model().state_dict()
    targets = matrices(setup)
    assert {f"{name}.weight" for name in made.pairs} == targets.keys()
    assert len(made.left_out) == len(open_prior(setup.prior).tensors) - len(targets)
    assert after.keys() == before.keys()
    for name, theta in before.items():
        if name not in targets:
            assert torch.equal(after[name], theta), name
            continue
        expected = theta.double() + truncated(targets[name], RANK)
        scale = theta.abs().max().item() + targets[name].norm().item()
        difference = (after[name] - expected).abs().max().item()
        assert difference <= 32 * torch.finfo(torch.float32).eps * scale, name


def test_what_is_stated_is_what_an_svd_says(setup, tmp_path):
    extract_lora(open_prior(setup.prior), tmp_path / "adapter", rank=RANK)
    manifest = json.loads((tmp_path / "adapter" / "lora.json").read_text())
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, delta in matrices(setup).items():
        layer = name.removesuffix(".weight")
        entry, exact = manifest["layers"][layer], delta.double()
        values = torch.linalg.svdvals(exact).square()
        kept = float(values[:RANK].sum() / values.sum())
        assert entry["kept_energy"] == pytest.approx(kept, rel=1e-5)
        a, b = (stored[f"base_model.model.{layer}.lora_{x}.weight"].double() for x in ("A", "B"))
        error = float((exact - b @ a).norm() / exact.norm())
        assert entry["error"] == pytest.approx(error, rel=1e-4)
        assert error**2 >= 1 - kept - 1e-5


def test_energy_picks_the_lowest_rank_of_each_layer_and_scaling_stays_one(setup, tmp_path):
    made = extract_lora(open_prior(setup.prior), tmp_path / "adapter", energy=0.6, dtype="float32")
    assert len({pair.rank for pair in made.pairs.values()}) > 1
    for name, delta in matrices(setup).items():
        values = torch.linalg.svdvals(delta.double()).square()
        held = values.cumsum(0) / values.sum()
        assert made.pairs[name.removesuffix(".weight")].rank == 1 + int((held < 0.6).sum())
    loaded = peft.PeftModel.from_pretrained(setup.model(), tmp_path / "adapter")
    layers = {
        path.removeprefix("base_model.model."): layer
        for path, layer in loaded.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
    }
    assert layers.keys() == made.pairs.keys()
    for name, layer in layers.items():
        assert layer.scaling["default"] == 1.0
        assert layer.r["default"] == made.pairs[name].rank
    merged(setup, tmp_path / "adapter")


def test_all_directions_and_energy_one_are_the_merge_itself(llava, tmp_path):
    for number, how in enumerate(({"rank": 1000}, {"energy": 1.0})):
        out = tmp_path / str(number)
        made = extract_lora(open_prior(llava.prior), out, dtype="float32", **how)
        assert made.kept == pytest.approx(1.0, abs=1e-6)
        assert made.error < 1e-5
        after = merged(llava, out).state_dict()
        for name, theta in llava.model().state_dict().items():
            delta = llava.deltas.get(name, torch.zeros(()))
            torch.testing.assert_close(after[name], theta + delta, rtol=0, atol=1e-6)


def test_a_low_rank_and_an_8_bit_prior_are_extracted_too(llava, tmp_path):
    for name, how in (("rank", {"rank": 2}), ("int8", {"dtype": "int8"})):
        prior = tmp_path / name
        drift_merge.compute(
            llava.prior.parent / "reasoner", llava.mllm, prior, progress=False, **how
        )
        made = extract_lora(open_prior(prior), tmp_path / f"{name}-lora", rank=8)
        ranks = {pair.rank for pair in made.pairs.values()}
        assert ranks == ({2} if name == "rank" else {8})


def test_norms_embeddings_and_heads_are_told_apart(llava, tmp_path):
    prior = tmp_path / "full"
    for folder in (llava.prior.parent / "reasoner", llava.mllm):
        tiny.tokenizer().save_pretrained(folder)
    drift_merge.compute(
        llava.prior.parent / "reasoner", llava.mllm, prior, modules="full", progress=False
    )
    made = extract_lora(open_prior(prior), tmp_path / "adapter", rank=2)
    assert "lm_head" in made.pairs
    assert made.left_out["model.language_model.embed_tokens.weight"] == "an embedding"
    assert made.left_out["model.language_model.norm.weight"] == "a norm or vector"
    assert len(made.pairs) + len(made.left_out) == len(open_prior(prior).tensors)
    assert made.kept_of_prior < made.kept


def test_a_tied_head_is_not_adapted_alone(tmp_path):
    text = tiny.TEXT | {"tie_word_embeddings": True}
    torch.manual_seed(0)
    mllm = tiny_models.llava(text, tiny.VISION)
    mllm.config.tie_word_embeddings = True
    mllm.tie_weights()
    reasoner = tiny_models.llama(text)
    mllm.save_pretrained(tmp_path / "mllm")
    reasoner.save_pretrained(tmp_path / "reasoner")
    for name in ("mllm", "reasoner"):
        tiny.tokenizer().save_pretrained(tmp_path / name)
    drift_merge.compute(
        tmp_path / "reasoner", tmp_path / "mllm", tmp_path / "prior", modules="full", progress=False
    )
    made = extract_lora(open_prior(tmp_path / "prior"), tmp_path / "adapter", rank=2)
    assert "lm_head" not in made.pairs
    (reason,) = {why for name, why in made.left_out.items() if "embed" in name or "head" in name}
    assert reason.startswith("tied")


def test_equal_models_leave_nothing(llava, tmp_path):
    drift_merge.compute(llava.mllm, llava.mllm, tmp_path / "prior", progress=False)
    with pytest.raises(RecipeError, match="leaves nothing"):
        extract_lora(open_prior(tmp_path / "prior"), tmp_path / "adapter", rank=2)
    assert not list(tmp_path.glob("adapter*"))


def test_wrong_requests_are_refused_and_leave_nothing(llava, tmp_path):
    prior, out = open_prior(llava.prior), tmp_path / "adapter"
    for how in ({}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 1.5}):
        with pytest.raises(RecipeError):
            extract_lora(prior, out, **how)
    with pytest.raises(SourceError, match="--mllm"):
        extract_lora(prior, out, rank=2, mllm=str(tmp_path / "nowhere"))
    with pytest.raises(DriftMergeError, match="input"):
        extract_lora(prior, llava.prior / "inside", rank=2)
    assert not list(tmp_path.iterdir())


def test_the_same_bytes_for_any_number_of_threads(llava, tmp_path):
    for threads in (1, 3):
        extract_lora(open_prior(llava.prior), tmp_path / str(threads), rank=2, threads=threads)
    one, other = (tmp_path / name for name in ("1", "3"))
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()


def test_our_own_reader_sees_the_mllm_fine_tuned(llava, tmp_path):
    made = extract_lora(open_prior(llava.prior), tmp_path / "adapter", rank=1000, dtype="float32")
    drift_merge.compute(
        tmp_path / "adapter", llava.mllm, tmp_path / "again", dtype="float32", progress=False
    )
    first, again = open_prior(llava.prior), open_prior(tmp_path / "again")
    for name, entry in first.tensors.items():
        assert again.norm(name) == pytest.approx(entry["norm_delta"], rel=1e-4)
    assert len(made.pairs) == len(first.tensors)


def test_what_memory_fuses_gets_one_adapter_of_the_fused_layer(tmp_path):
    text = tiny.TEXT | {"num_key_value_heads": tiny.TEXT["num_attention_heads"]}
    torch.manual_seed(0)
    reasoner = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text))
    mllm = transformers.Phi3ForCausalLM(transformers.Phi3Config(**text))
    reasoner.save_pretrained(tmp_path / "reasoner")
    mllm.save_pretrained(tmp_path / "mllm")
    prior = tmp_path / "prior"
    drift_merge.compute(
        tmp_path / "reasoner", tmp_path / "mllm", prior, dtype="float32", progress=False
    )
    extract_lora(open_prior(prior), tmp_path / "adapter", rank=1000, dtype="float32")
    after = peft.PeftModel.from_pretrained(mllm, tmp_path / "adapter").merge_and_unload()
    own, fused = reasoner.state_dict(), after.state_dict()
    for block, name, parts in (
        ("self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
        ("mlp", "gate_up_proj", ("gate_proj", "up_proj")),
    ):
        stacked = torch.cat([own[f"model.layers.1.{block}.{part}.weight"] for part in parts])
        found = fused[f"model.layers.1.{block}.{name}.weight"]
        torch.testing.assert_close(found, stacked, rtol=0, atol=1e-6)


def test_stacked_experts_and_routers_are_named_and_counted(tmp_path):
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    torch.manual_seed(0)
    for name in ("reasoner", "mllm"):
        config = transformers.Qwen3MoeConfig(**tiny.TEXT, **moe)
        transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / name)
    prior = tmp_path / "prior"
    drift_merge.compute(tmp_path / "reasoner", tmp_path / "mllm", prior, progress=False)
    made = extract_lora(open_prior(prior), tmp_path / "adapter", rank=2)
    assert len(made.pairs) == 2 * 4  # q, k, v, o
    assert sum("experts" in name for name in made.left_out) == 2 * 2
    assert made.left_out["model.layers.0.mlp.gate.weight"] == "not the weight of a linear layer"
    assert made.kept_of_prior < 0.5 * made.kept
