"""`adapter_config.json` field by field, and what the weights of an adapter may be."""

import json
import shlex

import numpy as np
import pytest

from drift_merge.errors import CheckpointError
from drift_merge.recipes.adapted import join_adapter
from drift_merge.storage.adapters.factors import is_adapter
from drift_merge.storage.adapters.fields import base_of
from drift_merge.storage.adapters.selection import find_pattern
from drift_merge.storage.checkpoint import open_checkpoint
from drift_merge.storage.sources import parse_source
from tests import checkpoints as c
from tests.adapters import IN_FILE, write_adapter

MODULES = {
    f"model.layers.{n}.self_attn.{name}_proj": (rows, c.HIDDEN)
    for n in range(2)
    for name, rows in (("q", c.HIDDEN), ("k", c.KV))
}
Q = "model.layers.0.self_attn.q_proj"
A, B = f"{IN_FILE}{Q}.lora_A.weight", f"{IN_FILE}{Q}.lora_B.weight"
FITTING = {"target_modules": ["q_proj", "k_proj"]}


@pytest.fixture
def base(tmp_path):
    return c.make_pair(tmp_path).reasoner


def join(adapter, base):
    return join_adapter(parse_source(str(adapter)), open_checkpoint(str(base)))


def refused(base, adapter, match):
    with pytest.raises(CheckpointError, match=match) as error:
        join(adapter, base)
    assert error.value.remedy
    return error.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("peft_type", value) for value in ("IA3", "ADALORA", "OFT", "VERA", "", None)),
        *(
            ("init_lora_weights", start)
            for start in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "eva", "lora_ga")
        ),
        *(("init_lora_weights", start) for start in ("new", "True", None, 1, ["pissa"])),
        *(("bias", value) for value in ("all", "lora_only")),
        ("trainable_token_indices", [1]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("megatron_config", {"hidden_size": 8}),
        ("velora_config", {"num_groups": 4}),
        ("alora_invocation_tokens", [5, 6]),
        ("use_qalora", True),
        ("monteclora_config", {"num_samples": 8}),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("lora_bias", True),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1}),
        ("ensure_weight_tying", True),
        *(("enable_everything", value) for value in (True, 0, 1, "on", [0], {"a": None})),
    ],
)
def test_a_field_that_changes_more_is_refused_by_name_and_value(tmp_path, base, field, value):
    write_adapter(tmp_path / "lora", base, MODULES, **FITTING | {field: value})
    error = refused(base, tmp_path / "lora", f"has {field}: ")
    assert repr(value)[:20] in error.message
    assert "not plain LoRA" in error.message


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": "none", "lora_bias": False, "use_qalora": False, "kasa_config": None},
        {"init_lora_weights": True, "loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "gaussian", "megatron_core": "megatron.core"},
        {"lora_dropout": 0.1, "inference_mode": True, "task_type": "CAUSAL_LM"},
        {"rank_pattern": {}, "alpha_pattern": None, "layer_replication": None},
        {"a_field_of_tomorrow": None, "another": False, "third": {}, "fourth": [], "fifth": ""},
        {"target_modules": "all-linear"},
        {"target_modules": r".*self_attn\.[qk]_proj"},
        {"target_modules": ["q_proj", "k_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0, 1]},
    ],
)
def test_fields_at_their_defaults_or_without_effect_are_taken(tmp_path, base, fields):
    write_adapter(tmp_path / "lora", base, MODULES, **FITTING | fields)
    found = join(tmp_path / "lora", base).adapters
    assert set(found) == {f"{module}.weight" for module in MODULES}
    assert {adapter.scale for adapter in found.values()} == {3.0}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("r", 0, "a count above 0"),
        ("r", 2.0, "a count above 0"),
        ("r", None, "a count above 0"),
        ("lora_alpha", "16", "a number"),
        ("lora_alpha", None, "a number"),
        ("lora_alpha", True, "a number"),
        ("use_rslora", "false", "true or false"),
        ("use_dora", 1, "true or false"),
        ("rank_pattern", {"q_proj": "8"}, "counts above 0"),
        ("rank_pattern", ["q_proj"], "counts above 0"),
        ("alpha_pattern", {"q_proj(": 8}, "regular expressions"),
        ("target_modules", "q_proj(", "regular expressions"),
        ("target_modules", [1], "a list of names"),
        ("modules_to_save", {"a": 1}, "a list of names"),
        ("layers_to_transform", "1", "a number or a list"),
    ],
)
def test_a_field_of_the_wrong_kind_is_an_error(tmp_path, base, field, value, expected):
    write_adapter(tmp_path / "lora", base, MODULES, **FITTING | {field: value})
    error = refused(base, tmp_path / "lora", rf"{field} in adapter_config\.json is ")
    assert expected in error.message


def full(*shape):
    return c.store(np.ones(shape), "F32")


@pytest.mark.parametrize(
    ("changes", "fields", "match"),
    [
        ({A: None}, {}, f"for {Q} it stores {B}; expected A and B"),
        ({B: None}, {}, f"for {Q} it stores {A}; expected A and B"),
        ({A: None, B: None}, {}, rf"1 modules .*have no factors: {Q}"),
        ({A: full(0)}, {}, r"lora_A\.weight is empty.*\(0,\).*ZeRO-3"),
        ({A: full(0, c.HIDDEN)}, {}, "is empty"),
        ({A: full(3, c.HIDDEN)}, {}, r"give .*q_proj rank 2, but A is \(3, 16\)"),
        ({B: full(c.HIDDEN, 3)}, {}, "rank 2"),
        ({}, {"r": 8}, "rank 8"),
        ({}, {"r": 8, "rank_pattern": {"k_proj": 2}}, "q_proj rank 8"),
        ({A: full(2)}, {}, "no linear layer"),
        ({A: full(2, c.HIDDEN, 1)}, {}, "no linear layer"),
        ({A: full(2, c.HIDDEN + 1)}, {}, r"expected \(16, 17\)"),
        ({A: full(2, 3), B: full(5, 2)}, {}, r"q_proj\.weight of .* is \(16, 16\)"),
        ({A: c.store(np.ones((2, c.HIDDEN)), "I64")}, {}, "dtype I64"),
        ({f"{IN_FILE}{Q}.lora_magnitude_vector": full(c.HIDDEN)}, {}, "expected A and B"),
        ({}, {"use_dora": True, "_strip": True}, "not plain LoRA"),
        ({f"{IN_FILE}{Q}.lora_B.bias": full(c.HIDDEN)}, {}, "neither a factor"),
        ({f"{IN_FILE}model.embed_tokens.lora_embedding_A": full(2, 9)}, {}, "neither a factor"),
        ({f"{IN_FILE}model.norm.weight": full(c.HIDDEN)}, {}, "neither a factor"),
        (
            {f"{IN_FILE}model.embed_tokens.token_adapter.trainable_tokens_delta": full(1, 16)},
            {"modules_to_save": ["embed_tokens"]},
            "neither a factor",
        ),
        (
            {f"{IN_FILE}model.embed_tokens.base_layer.weight": full(40, 16)},
            {"modules_to_save": ["embed_tokens"]},
            "neither a factor",
        ),
        ({}, {"modules_to_save": ["lm_head"]}, "names lm_head, but"),
        (
            {f"{IN_FILE}model.norm.weight": full(c.HIDDEN + 1)},
            {"modules_to_save": ["norm"]},
            "modules_to_save: .*is \\(17,\\)",
        ),
        ({}, {"target_modules": ["q_proj"]}, "k_proj, which its fields"),
        ({}, {"target_modules": "q_proj|k_proj"}, "which its fields"),
        ({}, {"exclude_modules": ["layers.1.self_attn.q_proj"]}, "1.self_attn.q_proj, which its"),
        ({}, {"layers_to_transform": [0]}, "layers.1.*which its fields"),
        ({}, {"layers_to_transform": 1, "layers_pattern": ["blocks"]}, "which its fields"),
        ({}, {"target_modules": ["q_proj", "k_proj", "up_proj"]}, "2 modules .*mlp.up_proj"),
        ({f"{IN_FILE}model.layers.9.self_attn.q_proj.lora_A.weight": full(2, c.HIDDEN),
          f"{IN_FILE}model.layers.9.self_attn.q_proj.lora_B.weight": full(c.HIDDEN, 2)}, {},
         "layers.9.self_attn.q_proj is no module"),
    ],
)  # fmt: skip
def test_weights_that_contradict_the_fields_or_the_base_are_errors(
    tmp_path, base, changes, fields, match
):
    fields = dict(fields)
    strip = fields.pop("_strip", False)
    written = {k: v for k, v in fields.items() if not (strip and k == "use_dora")}
    write_adapter(tmp_path / "lora", base, MODULES, changes=changes, **FITTING | written)
    if strip:
        path = tmp_path / "lora/adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    refused(base, tmp_path / "lora", match)


def test_a_truncated_file_and_a_missing_one_are_errors(tmp_path, base):
    write_adapter(tmp_path / "lora", base, MODULES)
    path = tmp_path / "lora/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    refused(base, tmp_path / "lora", "truncated")
    path.unlink()
    refused(base, tmp_path / "lora", "has no adapter_model.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"peft_type": NaN'])
def test_a_config_that_is_no_object_is_an_error(tmp_path, base, text):
    write_adapter(tmp_path / "lora", base, MODULES)
    (tmp_path / "lora/adapter_config.json").write_text(text)
    refused(base, tmp_path / "lora", r"adapter_config\.json")


@pytest.mark.parametrize(
    ("field", "fields", "changes"),
    [
        (
            "target_modules",
            {"target_modules": ["lm_head"]},
            {
                f"{IN_FILE}lm_head.lora_A.weight": full(2, c.HIDDEN),
                f"{IN_FILE}lm_head.lora_B.weight": full(c.VOCABULARY, 2),
            },
        ),
        (
            "modules_to_save",
            {"target_modules": ["q_proj", "k_proj"], "modules_to_save": ["embed_tokens"]},
            {f"{IN_FILE}model.embed_tokens.weight": full(c.VOCABULARY, c.HIDDEN)},
        ),
    ],
)
def test_embedding_and_head_are_taken_apart_only_where_they_are_two(
    tmp_path, base, field, fields, changes
):
    modules = MODULES if field == "modules_to_save" else {}
    write_adapter(tmp_path / "lora", base, modules, changes=changes, **fields)
    joined = join(tmp_path / "lora", base)
    assert "lm_head.weight" in joined.adapters or joined.shards[
        joined.tensors["model.embed_tokens.weight"].shard
    ].shard.endswith("adapter_model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    refused(base, tmp_path / "lora", rf"has {field}: .*\(tied\)")


def test_square_weights_of_an_unknown_class_say_nothing_of_being_transposed(tmp_path, base):
    modules = {m: s for m, s in MODULES.items() if "q_proj" in m}
    write_adapter(tmp_path / "lora", base, modules, fan_in_fan_out=True)
    refused(base, tmp_path / "lora", "has fan_in_fan_out: True.*square")


def test_the_revision_of_the_base_is_a_part_of_its_name(tmp_path, base):
    write_adapter(tmp_path / "lora", "org/name", MODULES, revision="abc")
    assert base_of(parse_source(str(tmp_path / "lora"))) == "org/name@abc"
    write_adapter(tmp_path / "local", base, MODULES, revision="main")
    assert base_of(parse_source(str(tmp_path / "local"))) == str(base)


def test_patterns_are_read_as_peft_reads_them():
    patterns = {"q_proj|k_proj": 1, "layers.0.v_proj": 2, "v_proj": 3, "^o_proj": 4, "gate": 5}
    found = {
        name: find_pattern(patterns, f"model.layers.{name}", 0)
        for name in ("0.q_proj", "9.k_proj", "0.v_proj", "1.v_proj", "0.o_proj", "0.gate_proj")
    }
    assert found == {
        "0.q_proj": 1,
        "9.k_proj": 1,
        "0.v_proj": 2,
        "1.v_proj": 3,
        "0.o_proj": 0,
        "0.gate_proj": 0,
    }
    assert find_pattern(patterns, "o_proj", 0) == 4


def test_a_folder_is_an_adapter_until_it_holds_a_whole_model(tmp_path, base):
    write_adapter(tmp_path / "lora", base, MODULES)
    source = parse_source(str(tmp_path / "lora"))
    assert is_adapter(source)
    (tmp_path / "lora/config.json").write_bytes((base / "config.json").read_bytes())
    assert is_adapter(source)
    weights = (base / "model.safetensors").read_bytes()
    (tmp_path / "lora/model.safetensors").write_bytes(weights)
    assert not is_adapter(source)
    assert open_checkpoint(str(tmp_path / "lora")).notes
    assert not open_checkpoint(str(base)).notes


def test_the_command_of_a_remedy_is_one_line_that_a_shell_reads_back(tmp_path, base):
    write_adapter(tmp_path / "it's", base, MODULES, use_qalora=True)
    error = refused(base, tmp_path / "it's", "use_qalora")
    python, flag, code = shlex.split(error.remedy.split("\n")[-1])
    assert (python, flag) == ("python", "-c")
    compile(code, "remedy", "exec")
    assert repr(str(base)) in code
    assert repr(str(tmp_path / "it's")) in code
