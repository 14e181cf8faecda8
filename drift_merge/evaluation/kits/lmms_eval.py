"""lmms-eval 0.7: run as a module, results and items as JSON (EvolvingLMMs-Lab/lmms-eval)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drift_merge.errors import EvaluationError
from drift_merge.evaluation.kits.kit import KitOptions, TaskScore, class_of, require_tasks
from drift_merge.evaluation.scores import newest, number, read_json

NAME = "lmms-eval"
# Scored by math_verify, without a judge. Not the papers' numbers: other prompts, other scoring.
DEFAULT_TASKS = (
    "mathvista_testmini_cot_reasoning",
    "mathverse_testmini_reasoning",
    "mathvision_reason_testmini_reasoning",
    "wemath_testmini_reasoning",
    "logicvista_reasoning",
)
MODELS: Mapping[str, str] = {
    "gemma3": "gemma3",
    "glm4v": "glm4v",
    "idefics2": "idefics2",
    "idefics3": "vllm",
    "internvl": "internvl_hf",
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "mllama": "llama_vision",
    "phi4_multimodal": "phi4_multimodal",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "smolvlm": "vllm",
    **dict.fromkeys(("gemma4", "mistral3", "internvl_chat", "kimi_vl", "minicpmv"), "vllm"),
}
_WITH_PIXELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
_PREFERRED = ("acc_score", "acc", "accuracy", "exact_match", "score")
_ASIDE = ("alias", "stderr", "samples", "sample_len", "sample_count")


def words(model: str, config: Mapping[str, Any], options: KitOptions, out: Path) -> list[str]:
    """The command that evaluates a model.

    Raises:
        RecipeError: lmms-eval's name for the architecture is not known.
    """
    name = class_of(config, MODELS, NAME, options.kit_model)
    given = {"model" if name in ("vllm", "sglang") else "pretrained": model}
    if name in _WITH_PIXELS:
        given |= {"min_pixels": str(options.min_pixels), "max_pixels": str(options.max_pixels)}
    given |= options.model_args
    found = [options.python, "-m", "lmms_eval", "--model", name]
    found += ["--model_args", ",".join(f"{key}={value}" for key, value in given.items())]
    found += ["--tasks", ",".join(options.tasks), "--batch_size", "1", "--log_samples"]
    found += ["--output_path", str(out)]
    if options.limit is not None:
        found += ["--limit", str(options.limit)]
    if options.max_tokens is not None:
        found += ["--gen_kwargs", f"max_new_tokens={options.max_tokens}"]
    if options.kit_path is not None:
        found += ["--include_path", str(options.kit_path)]
    if options.device is not None:
        found += ["--device", options.device]
    return [*found, *options.kit_args]


def read(options: KitOptions, out: Path, since: float) -> dict[str, TaskScore]:
    """The scores of each task.

    Raises:
        EvaluationError: a file or a task is missing, or it is not clear which metric counts.
    """
    file = newest(out, "**/*results.json", since)
    if file is None:
        raise EvaluationError(
            f"lmms-eval left no results.json in {out}.", remedy=f"See what it said in {out}."
        )
    results = read_json(file).get("results", {})
    require_tasks(results, options.tasks, NAME, out)
    found = {}
    for task in options.tasks:
        metric, value = _primary(task, results[task])
        samples = newest(out, f"**/*samples_{task}.jsonl", since)
        items = {} if samples is None else _items(read_json(samples), metric.partition(",")[0])
        found[task] = TaskScore(metric, value, items)
    return found


def _primary(task: str, result: Mapping[str, Any]) -> tuple[str, float]:
    """The metric that counts of a task, and its value."""
    numbers = {
        key: float(value)
        for key, value in result.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
        if not any(word in key for word in _ASIDE)
    }
    for wanted in _PREFERRED:
        for key, value in numbers.items():
            if key.partition(",")[0] == wanted:
                return key, number(value, f"{task} {key}")
    if len(numbers) == 1:
        ((key, value),) = numbers.items()
        return key, number(value, f"{task} {key}")
    raise EvaluationError(
        f"{task} has {'several metrics' if numbers else 'no metric that is a number'}: "
        f"{', '.join(numbers or result)}.",
        remedy="Run lmms-eval as a command: --with 'python -m lmms_eval ... {model} ...' --metric "
        f"'**/*results.json:results.{task}.\"NAME\"'",
    )


def _items(lines: list[Any], metric: str) -> dict[str, float]:
    """The score of each item, where the file has a number for it; else nothing."""
    found: dict[str, float] = {}
    for position, line in enumerate(lines):
        value = line.get(metric)
        if isinstance(value, Mapping):  # the metric's own record of the item
            value = next((value[n] for n in (metric, *_PREFERRED, "correct") if n in value), None)
        if not isinstance(value, int | float):
            return {}
        found[str(line.get("doc_id", position))] = float(value)
    return found
