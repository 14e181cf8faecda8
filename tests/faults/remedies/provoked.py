"""Inputs and the commands that refuse them."""

import json
import shutil
from pathlib import Path

from tests import checkpoints as c
from tests.faults.harness import run

UP = "model.layers.0.mlp.up_proj.weight"


Words = list[str]


def pair(tmp: Path, **changes: object) -> c.Pair:
    return c.make_pair(tmp, **changes)  # type: ignore[arg-type]


def compute(tmp: Path, *more: str, **changes: object) -> Words:
    made = pair(tmp, **changes)
    return ["drift-prior", "compute", *made.arguments, "-o", str(tmp / "out"), *more]


def align(tmp: Path, *more: str, **changes: object) -> Words:
    return ["drift-prior", "align", *pair(tmp, **changes).arguments, *more]


def merge(tmp: Path, method: str, *more: str, **changes: object) -> Words:
    made = pair(tmp, **changes)
    return ["drift-merge", method, *made.arguments, "-o", str(tmp / "out"), *more]


def swapped(tmp: Path) -> Words:
    made = pair(tmp)
    return ["drift-prior", "align", str(made.mllm), str(made.reasoner)]


def torn(tmp: Path) -> Words:
    return compute(tmp, reasoner={UP: c.store([[1.0, 2.0]])})


def moved(tmp: Path, old: str, new: str, *more: str, side: str = "reasoner") -> Words:
    """`align`, with other names on one side."""
    made = pair(tmp)
    folder = getattr(made, side)
    tensors = {n.replace(old, new): t for n, t in c.read_tensors(folder).items()}
    c.write_shard(next(folder.glob("*.safetensors")), tensors)
    return ["drift-prior", "align", *made.arguments, *more]


def doubled(tmp: Path) -> Words:
    again = c.store([[1.0] * c.HIDDEN] * c.INTERMEDIATE)
    return align(tmp, reasoner={"model.layers.0.feed_forward.w3.weight": again})


def twins(tmp: Path) -> Words:
    made = pair(tmp)
    tensors = c.read_tensors(made.mllm)
    text = {n: t for n, t in tensors.items() if n.startswith("model.")}
    tensors |= {f"talker.{n}": c.store(t.values + 1.0) for n, t in text.items()}
    c.write_shard(next(made.mllm.glob("*.safetensors")), tensors)
    return ["drift-prior", "align", *made.arguments]


def decoders(tmp: Path) -> Words:
    made = pair(tmp)
    for folder in made:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True}))
        tensors = c.read_tensors(folder)
        renamed = {n.replace("model.", "model.decoder.", 1): t for n, t in tensors.items()}
        c.write_shard(next(folder.glob("*.safetensors")), renamed)
    return ["drift-prior", "align", *made.arguments]


def existing(tmp: Path) -> Words:
    (tmp / "out").mkdir(parents=True)
    (tmp / "out/x").write_text("")
    return merge(tmp, "linear", "--overwrite")


def existing_merge(tmp: Path) -> Words:
    """In the way is a merge, with another weight."""
    words = merge(tmp, "linear")
    assert run(*words, "--weight", "0.3").code == 0
    return words


def no_prior(tmp: Path) -> Words:
    pair(tmp)
    return ["drift-prior", "inspect", str(tmp / "mllm")]


def no_merge(tmp: Path) -> Words:
    pair(tmp)
    return ["drift-merge", "inspect", str(tmp / "mllm")]


def prior_as_source(tmp: Path) -> Words:
    assert run(*compute(tmp)).code == 0
    return ["drift-prior", "align", str(tmp / "out"), str(tmp / "mllm")]


def pickled(tmp: Path) -> Words:
    import torch

    made = pair(tmp)
    tensors = c.read_tensors(made.reasoner)
    next(made.reasoner.glob("*.safetensors")).unlink()
    values = {n: torch.tensor(t.values).bfloat16() for n, t in tensors.items()}
    torch.save(values, made.reasoner / "pytorch_model.bin")
    return ["drift-prior", "align", *made.arguments]


def recompressed(tmp: Path) -> Words:
    assert run(*compute(tmp, "--dtype", "int8")).code == 0
    options = ["--dtype", "float8_e4m3fn", "-o", str(tmp / "again")]
    return ["drift-prior", "compress", str(tmp / "out"), *options]


def other_shards(tmp: Path) -> Words:
    assert run(*compute(tmp)).code == 0
    shard = next((tmp / "out").glob("prior*.safetensors"))
    tensors = c.read_shard(shard)
    name, tensor = next(iter(tensors.items()))
    c.write_shard(shard, tensors | {name: c.store(tensor.values, "F32")})
    options = ["--dtype", "int8", "-o", str(tmp / "made")]
    return ["drift-prior", "compress", str(tmp / "out"), *options]


def base_of_other_names(tmp: Path) -> Words:
    """Layer 0 fits the reasoner alone, layer 1 the base alone."""
    made = pair(tmp)
    shutil.rmtree(made.reasoner)
    for folder, layer in ((made.reasoner, 1), (tmp / "base", 0)):
        tensors = {
            name: c.store(tensor.values[..., :2]) if f"layers.{layer}." in name else tensor
            for name, tensor in c.reasoner_tensors().items()
        }
        c.write_checkpoint(folder, tensors, c.text_config())
    words = ["drift-prior", "compute", *made.arguments, "-o", str(tmp / "out")]
    return [*words, "--base", str(tmp / "base"), "--on-mismatch", "skip"]


def mapped(tmp: Path) -> Words:
    (tmp / "names.yaml").write_text('reasoner:\n  "lm_head.*": "lm_head.*"\n')
    assert run(*compute(tmp, "--map", str(tmp / "names.yaml"))).code == 0
    return ["drift-merge", "run", str(tmp / "out"), "-o", str(tmp / "again")]


def two_shards(tmp: Path) -> Words:
    made = pair(tmp, num_shards=2)
    one, other = sorted(made.reasoner.glob("*.safetensors"))
    tensors = c.read_shard(other)
    name, tensor = next(iter(c.read_shard(one).items()))
    c.write_shard(other, tensors | {name: tensor})
    return ["drift-prior", "align", *made.arguments]


def without_base(tmp: Path) -> Words:
    made = pair(tmp)
    adapter = tmp / "adapter"
    factors = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        factors[f"{name}.lora_A.weight"] = c.store([[0.1] * c.HIDDEN] * 2)
        factors[f"{name}.lora_B.weight"] = c.store([[0.1] * 2] * c.INTERMEDIATE)
    adapter.mkdir()
    c.write_shard(adapter / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    config |= {"base_model_name_or_path": str(tmp / "gone")}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return ["drift-prior", "align", str(adapter), str(made.mllm)]


def recipe(tmp: Path, text: str) -> Words:
    made = pair(tmp)
    file = tmp / "recipe.yaml"
    file.write_text(f"reasoner: {made.reasoner}\nmllm: {made.mllm}\n{text}")
    return ["drift-merge", "run", str(file), "-o", str(tmp / "out")]


def swept(tmp: Path) -> Words:
    words = recipe(tmp, "method: linear\n")
    return ["drift-merge", "sweep", words[2], "--set", "weight", "-o", str(tmp / "out")]
