"""One run of a row: merge, train, measure. And what it starts from: models and priors."""

import itertools
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

import drift_merge
from tests.benchmarks.study import data, models
from tests.benchmarks.study.rows import Row
from tests.benchmarks.study.worlds import World

BATCH = 16
MEASURES: dict[str, Callable[..., Iterator[data.Example]]] = {
    "picture_sums": data.picture_sums,
    "reading": data.transcriptions,
    "easy_vqa": data.shapes,
    "text_sums": data.text_sums,
}


def prepare(world: World, out: Path, say: Callable[[str], None]) -> None:
    """Train the models and compute the priors; what is there is kept."""
    for name, make in world.makers(out, say).items():
        if not (out / name).exists():
            say(f"making {name}")
            (out / name).parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=out) as beside:
                make(Path(beside) / "made")
                (Path(beside) / "made").rename(out / name)


def run(
    world: World, row: Row, value: float | None, seed: int, rate: float, split: str, out: Path
) -> dict[str, Any]:
    """Do what a row says and measure it on a split.

    Returns:
        Per measure (on validation the first alone) a string of 0 and 1, one per item; CPU-seconds
        of merging and training, looks for the curve included; peak
        memory; the curve, (step, share of sums right on the validation split), of trained rows.
    """
    started = time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: a process does many runs
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        start = out / "M"
        if row.merge is not None:
            start = _merge(row, row.merge, value, out / "M", Path(scratch) / "before", out)
        model = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
        curve = []
        if row.is_trained:
            curve = _train(world, model, row, value, seed, rate, out, has_curve=split == "test")
        if row.merge_after is not None:
            model.save_pretrained(Path(scratch) / "trained")
            after, trained = Path(scratch) / "after", Path(scratch) / "trained"
            end = _merge(row, row.merge_after, value, trained, after, out)
            model = LlavaForConditionalGeneration.from_pretrained(end, dtype=torch.float32)
        seconds = time.process_time() - started
        names = MEASURES if split == "test" else ("picture_sums",)  # by which values are chosen
        found = {name: _measure(model, name, split, world, out) for name in names}
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return found | {"seconds": round(seconds, 1), "peak_mb": round(peak), "curve": curve}


def _measure(
    model: nn.Module, name: str, split: str, world: World, out: Path, count: int | None = None
) -> str:
    items = models.take(MEASURES[name], split, count or world.items[name], f"items {name}")
    return "".join("01"[right] for right in models.right(model, items, world.words(out)))


def _merge(
    row: Row, how: dict[str, Any], value: float | None, mllm: Path, to: Path, out: Path
) -> Path:
    how = {"dtype": "float32", "progress": False} | how
    method = how.pop("method")
    if value is not None and row.knob == "weights":
        how["weights"] = value
    elif value is not None:
        how["options"] = how.get("options", {}) | {row.knob: value}
    needs_base = drift_merge.METHODS[method].base == "required"
    base = out / "B" if needs_base else None
    drift_merge.merge(method, out / "R", mllm, to, base=base, **how)
    name = "generation_config.json"  # LLaVA's own: transformers asks for none
    if (mllm / name).exists() and not (to / name).exists():
        shutil.copy(mllm / name, to / name)
    return to


def _train(
    world: World,
    model: nn.Module,
    row: Row,
    alpha: float | None,
    seed: int,
    rate: float,
    out: Path,
    *,
    has_curve: bool,
) -> list[tuple[int, float]]:
    """Fine-tune the language tower on some examples; biased if the row has a prior."""
    rng = random.Random(f"examples {seed}")
    listed = list(itertools.islice(data.picture_sums("train", rng), row.examples))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = world.is_trained(name)
    torch.manual_seed(seed)
    if row.lora:
        from peft import LoraConfig, get_peft_model

        targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        config = LoraConfig(r=row.lora, lora_alpha=row.lora, target_modules=targets)
        model = get_peft_model(model, config)
    chosen = [p for p in model.parameters() if p.requires_grad]
    # The learning rate was chosen for full weights; factors that start at zero take ten times that.
    optimizer = torch.optim.AdamW(chosen, lr=rate * (10 if row.lora else 1), weight_decay=0.0)
    steps = row.examples * world.passes // BATCH
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (steps - step) / steps)
    handle = None
    if row.prior is not None:
        prior, control = out / row.prior, {}
        if ":" in row.prior:
            prior, control = out / "delta", {"control": row.prior}
        handle = drift_merge.attach(
            model, prior, optimizer=optimizer, alpha=alpha, **row.attach, **control
        )
    order: list[data.Example] = []
    curve = []
    words = world.words(out)
    every, items = world.curve
    for step in range(steps):
        if len(order) < BATCH:
            order += rng.sample(listed, len(listed))
        some, order = order[:BATCH], order[BATCH:]
        model.train()
        model(**data.collate(some, words)).loss.backward()
        nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if has_curve and (step + 1) % every == 0:
            right = _measure(model, "picture_sums", "validation", world, out, items)
            curve.append((step + 1, right.count("1") / len(right)))
    if handle is not None:
        assert handle.steps == steps
        handle.remove()
    if row.lora:
        model.merge_and_unload()
    return curve
