"""A tiny LLaVA of transformers with tokenizer, processor and chat template, and a reasoner."""

from pathlib import Path

from tests import checkpoints as c
from tests import tiny_models

TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} :"
)


def make_processor(path: Path) -> None:
    """Write tokenizer, image processor and chat template."""
    import transformers

    words = [f"word{i}" for i in range(96)]
    words[0], words[1], words[2], words[tiny_models.IMAGE] = "<pad>", "<s>", "</s>", "<image>"
    path.joinpath("tokenizer.json").write_bytes(c.tokenizer(words))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(path)


def make_llava_pair(folder: Path) -> None:
    """Write `folder`/reasoner and `folder`/mllm, with random weights."""
    import torch

    torch.manual_seed(0)
    tiny_models.llama(TEXT).save_pretrained(folder / "reasoner")
    tiny_models.llava(TEXT, VISION).save_pretrained(folder / "mllm")
    make_processor(folder / "mllm")
