"""Tiny MLLMs of three families with random weights, a reasoner each, a prior, and batches.

Made when a test runs; needs transformers and Pillow, not torchvision.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import drift_merge
from tests import tiny_models
from tests.tiny_models import IMAGE, VISION_END, VISION_START

VOCABULARY = 96
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


class Family(NamedTuple):
    """One kind of MLLM."""

    text: Callable[[], Any]  # a causal language model
    mllm: Callable[[], Any]
    tower: str  # prefix of the tower's layers in memory
    pixels: Callable[[Tensor], dict[str, Tensor]]  # of images (batch, 3, 28, 28)


def qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": TEXT["hidden_size"],
        "fullatt_block_indexes": [0],
        "window_size": 56,
    }
    text = TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        video_token_id=93,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def conversations(folder: Path) -> list[dict[str, Any]]:
    """The questions of `write_questions` as messages, each with the path of its image."""
    lines = [json.loads(line) for line in write_questions(folder).read_text().splitlines()]
    return [
        {
            "messages": [
                {"role": "user", "content": f"<image> {line['question']}"},
                {"role": "assistant", "content": line["answer"]},
            ],
            "images": [str(folder / line["image"])],
        }
        for line in lines
    ]


def as_square(images: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": images}


def as_tiles(images: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": images[:, None]}


def as_patches(images: Tensor) -> dict[str, Tensor]:
    """Two frames of 2 x 2 patches of 14 x 14 pixels for each image, in groups of 2 x 2."""
    count = len(images)
    cut = images.reshape(count, 3, 2, 14, 2, 14).permute(0, 2, 4, 1, 3, 5)
    frames = cut[:, :, :, :, None].expand(-1, -1, -1, -1, 2, -1, -1)
    return {
        "pixel_values": frames.reshape(count * 4, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * count),
    }


LLAMA = partial(tiny_models.llama, TEXT)
SMOLVLM = partial(tiny_models.idefics3, TEXT, VISION, "SmolVLM")
FAMILIES = {
    "qwen2_5_vl": Family(
        partial(tiny_models.qwen2, TEXT), qwen2_5_vl, "model.language_model.", as_patches
    ),
    "llava": Family(
        LLAMA, partial(tiny_models.llava, TEXT, VISION), "model.language_model.", as_square
    ),
    "smolvlm": Family(LLAMA, SMOLVLM, "model.text_model.", as_tiles),
}
TOKENS = {"qwen2_5_vl": 1, "llava": 4, "smolvlm": 4}  # visual tokens of one image


class Setup(NamedTuple):
    """A pair on the disk and its prior, in float32 so that comparisons are sharp."""

    family: Family
    mllm: Path
    prior: Path
    deltas: dict[str, Tensor]  # parameter name in memory -> theta_reasoner - theta_mllm
    name: str

    def model(self) -> Any:
        """A fresh copy of the mllm."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(self.mllm, dtype=torch.float32)

    def samples(self, count: int, seed: int = 0) -> list[dict[str, Tensor]]:
        """Token ids with an image in them, labels on the end, and pixels; one image each."""
        generator = torch.Generator().manual_seed(seed)
        samples = []
        for _ in range(count):
            words = torch.randint(3, 80, (8,), generator=generator).tolist()
            image = [VISION_START, *[IMAGE] * TOKENS[self.name], VISION_END]
            ids = torch.tensor([1, *words[:3], *image, *words[3:]])
            labels = ids.clone()
            labels[:-5] = -100
            pixels = torch.rand(1, 3, 28, 28, generator=generator)
            sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            if self.name == "qwen2_5_vl":
                sample["mm_token_type_ids"] = (ids == IMAGE).int()
            samples.append(sample | {"shot": pixels})
        return samples

    def collate(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch of samples of equal length."""
        images = torch.cat([sample["shot"] for sample in samples])
        keys = [key for key in samples[0] if key != "shot"]
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in keys}
        return batch | self.family.pixels(images)


def make_setup(name: str, directory: Path) -> Setup:
    """Write reasoner, mllm and prior below a directory."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    reasoner, mllm = family.text(), family.mllm()
    state = mllm.state_dict()
    deltas = {}
    with torch.no_grad():
        for own, parameter in reasoner.named_parameters():
            theirs = own if own.startswith("lm_head") else own.replace("model.", family.tower, 1)
            parameter.copy_(state[theirs] + 0.02 * torch.randn_like(parameter))
            deltas[theirs] = parameter.detach() - state[theirs]
    reasoner.save_pretrained(directory / "reasoner")
    mllm.save_pretrained(directory / "mllm")
    drift_merge.compute(
        directory / "reasoner",
        directory / "mllm",
        directory / "prior",
        dtype="float32",
        progress=False,
    )
    selected = {k: v for k, v in deltas.items() if ".self_attn." in k or ".mlp." in k}
    return Setup(family, directory / "mllm", directory / "prior", selected, name)


def biased(
    gradients: dict[str, Tensor], deltas: dict[str, Tensor], alpha: float = 1.0
) -> dict[str, Tensor]:
    """adaptive_cosine, written from the paper: one parameter at a time, float64."""
    result = {}
    for name, gradient in gradients.items():
        g = gradient.double()
        if name in deltas:
            delta = deltas[name].double()
            cosine = (g * delta).sum() / (g.norm() * delta.norm())
            g = g - alpha * 0.5 * (1 + cosine) * g.norm() * delta / delta.norm()
        result[name] = g
    return result


def gradients_of(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients of the mean over all labels of several batches, without any trainer."""
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    model.zero_grad()
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs).logits[:, :-1].flatten(0, 1).float()
        labels = batch["labels"][:, 1:].flatten()
        loss = functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        (loss / count).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def sgd(model: nn.Module, gradients: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
    """The weights after theta <- theta - rate * g, in float64."""
    return {
        name: p.detach().double() - rate * gradients.get(name, torch.zeros(()))
        for name, p in model.named_parameters()
    }


def assert_weights(model: nn.Module, expected: dict[str, Tensor], rate: float) -> None:
    """The weights are the expected ones, but for the rounding of float32 gradients."""
    for name, parameter in model.named_parameters():
        difference = (parameter.detach().double() - expected[name]).abs().max().item()
        # Gradients go through some hundred float32 operations; weights are rounded once more.
        limit = 4 * torch.finfo(torch.float32).eps * expected[name].abs().max().item()
        assert difference <= limit + 2e-5 * rate, (name, difference)


SPOKEN = "what color shape is it a red blue circle square the answer"  # the words of the data
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tokenizer() -> Any:
    """Whole words; token 90 is the image's, as in the configs above."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    known = ["<pad>", "<s>", "</s>", "<unk>", ":", "user", "assistant", *SPOKEN.split()]
    words = {f"w{i}": i for i in range(VOCABULARY)} | {"<image>": IMAGE}
    words = {w: i for w, i in words.items() if w != f"w{IMAGE}" and i >= len(known)}
    words |= {word: i for i, word in enumerate(known)}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    raw.add_special_tokens([AddedToken("<image>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def write_llava_processor(directory: Path) -> None:
    """Complete a tiny LLaVA: tokenizer, chat template, image processor without torchvision."""
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    size = {"height": VISION["image_size"], "width": VISION["image_size"]}
    LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": VISION["image_size"]}, crop_size=size),
        tokenizer(),
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(directory)


def write_questions(directory: Path, count: int = 12) -> Path:
    """A JSON Lines file and its generated pictures."""
    from PIL import Image, ImageDraw

    lines = []
    for number in range(count):
        color, shape = ("red", "blue")[number % 2], ("circle", "square")[number // 2 % 2]
        picture = Image.new("RGB", (28, 28), "white")
        draw = ImageDraw.Draw(picture)
        box = (4 + number, 5, 20 + number % 4, 22)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=color)
        picture.save(directory / f"{number}.png")
        asked = ("what color is it", color) if number % 3 else ("what shape is it", f"a {shape}")
        lines.append({"image": f"{number}.png", "question": asked[0], "answer": asked[1]})
    path = directory / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


LORA_TARGETS = r".*language_model.*\.(q_proj|v_proj|down_proj)"


def with_lora(setup: Setup, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """The mllm with adapters whose factors are all random: PEFT begins with B = 0."""
    import peft

    torch.manual_seed(1)
    values = {"r": 4, "lora_alpha": 6, "target_modules": LORA_TARGETS} | config
    model = peft.get_peft_model(setup.model(), peft.LoraConfig(**values)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def lora_layers(model: nn.Module) -> dict[str, tuple[nn.Module, dict[str, nn.Parameter]]]:
    """Path of the weight in the mllm -> PEFT's layer and its trained factors by full name."""
    layers = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            factors = {
                f"{path}.{name}": parameter
                for name, parameter in module.named_parameters()
                if parameter.requires_grad
            }
            layers[path.removeprefix("base_model.model.") + ".weight"] = (module, factors)
    return layers


def acting_weight(layer: Any) -> Tensor:
    """The weight as PEFT's forward pass applies it, differentiable in its factors."""
    dtype = next(layer.parameters()).dtype
    zero = torch.zeros(1, layer.in_features, dtype=dtype)
    return (layer(torch.eye(layer.in_features, dtype=dtype)) - layer(zero)).T


def biased_factors(
    model: nn.Module, gradients: dict[str, Tensor], setup: Setup, rule: str, alpha: float = 1.0
) -> dict[str, Tensor]:
    """One rule on the factors of every weight together; D by autograd of <delta, W>, float64."""
    result = {name: gradient.double() for name, gradient in gradients.items()}
    tower = dict(setup.model().named_parameters())
    for name, (layer, factors) in lora_layers(model).items():
        delta = setup.deltas[name]
        product = (acting_weight(layer) * delta).sum()
        ds = [d.double() for d in torch.autograd.grad(product, list(factors.values()))]
        gs = [gradients[factor].double() for factor in factors]
        norm_g = sum(float(g.norm() ** 2) for g in gs) ** 0.5
        norm_d = sum(float(d.norm() ** 2) for d in ds) ** 0.5
        cosine = sum(float((g * d).sum()) for g, d in zip(gs, ds, strict=True)) / norm_g / norm_d
        coefficient = {
            "absolute": 1.0,
            "absolute_param_norm": float(tower[name].double().norm() / delta.double().norm()),
            "gradnorm": norm_g / norm_d,
            "adaptive_cosine": 0.5 * (1 + cosine) * norm_g / norm_d,
        }[rule]
        for factor, g, d in zip(factors, gs, ds, strict=True):
            result[factor] = g - alpha * coefficient * d
    return result
