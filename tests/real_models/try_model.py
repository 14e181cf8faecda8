"""Load a checkpoint in transformers, strictly, and let it answer; print one JSON object.

python tests/real_models/try_model.py real/mllm --image picture.png "what shape is in the image?"
python tests/real_models/try_model.py real/base --plain "The capital of France is"
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.utils.logging import disable_progress_bar


def load(path: Path, *, multimodal: bool) -> tuple[Any, Any, dict[str, int]]:
    """Load model (in float32: bfloat16 is slow on a CPU) and processor; count misfit keys."""
    model_class = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    processor_class = AutoProcessor if multimodal else AutoTokenizer
    model, info = model_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    return model, processor_class.from_pretrained(path), {key: len(info[key]) for key in info}


def ask(model: Any, processor: Any, prompt: str, image: Path | None, max_tokens: int) -> str:
    """Return the greedy continuation of a prompt that is already in the model's chat form."""
    if image is None:
        inputs = processor(text=prompt, return_tensors="pt")
    else:
        with Image.open(image) as picture:
            images = [[picture.convert("RGB")]]
            inputs = processor(text=[prompt], images=images, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def chat(processor: Any, question: str, *, with_image: bool, multimodal: bool) -> str:
    """Write one question, and perhaps an image, in the chat form of the checkpoint."""
    image = [{"type": "image"}] if with_image else []
    content = [*image, {"type": "text", "text": question}] if multimodal else question
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def main() -> None:
    """Parse, load, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--image", type=Path, help="shown with every question")
    parser.add_argument("--plain", action="store_true", help="questions are not put in chat form")
    parser.add_argument("--max-tokens", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    disable_progress_bar()
    config = json.loads((arguments.model / "config.json").read_text())
    multimodal = "vision_config" in config
    model, processor, misfits = load(arguments.model, multimodal=multimodal)
    answers = {}
    for question in arguments.questions:
        with_image = arguments.image is not None
        prompt = question
        if not arguments.plain:
            prompt = chat(processor, question, with_image=with_image, multimodal=multimodal)
        answers[question] = ask(model, processor, prompt, arguments.image, arguments.max_tokens)
    print(json.dumps({"class": type(model).__name__, "misfits": misfits, "answers": answers}))


if __name__ == "__main__":
    main()
