"""VLMEvalKit of 2026: run.py of a clone, a JSON of models and data, tables (open-compass)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drift_merge.errors import EvaluationError, RecipeError
from drift_merge.evaluation.kits.kit import KitOptions, TaskScore, class_of, require_tasks
from drift_merge.evaluation.kits.spreadsheets import Row, read_rows
from drift_merge.evaluation.scores import newest

NAME = "VLMEvalKit"
MODELS: Mapping[str, str] = {
    "gemma3": "Gemma3",
    "idefics2": "IDEFICS2",
    "idefics3": "IDEFICS2",
    "internvl_chat": "InternVLChat",
    "llava_next": "LLaVA_Next",
    "llava_onevision": "LLaVA_OneVision_HF",
    "mllama": "llama_vision",
    "qwen2_5_vl": "Qwen2VLChat",
    "qwen2_vl": "Qwen2VLChat",
    "qwen3_vl": "Qwen3VLChat",
    "qwen3_vl_moe": "Qwen3VLChat",
    "smolvlm": "SmolVLM",
}
_WITH_PIXELS = ("Qwen2VLChat", "Qwen3VLChat")
DATA: Mapping[str, str] = {  # beginning of a data set's name -> its class
    "MathVista": "MathVista",
    "MathVerse": "MathVerse",
    "MathVision": "MathVision",
    "LogicVista": "LogicVista",
    "WeMath": "WeMath",
    "DynaMath": "Dynamath",
    "MMMU": "MMMUDataset",
    "OCRBench": "OCRBench",
    **dict.fromkeys(("MMStar", "MMBench", "ScienceQA", "AI2D", "RealWorldQA"), "ImageMCQDataset"),
    **dict.fromkeys(("POPE", "HallusionBench", "MME"), "ImageYORNDataset"),
    **dict.fromkeys(("TextVQA", "ChartQA", "DocVQA", "InfoVQA", "OCRVQA"), "ImageVQADataset"),
}
_RUN = "model"  # the name that the model has in the config, and so in the names of files
_OVERALL = ("Overall", "overall")
_HITS = ("hit", "score", "correct")


def words(model: str, config: Mapping[str, Any], options: KitOptions, out: Path) -> list[str]:
    """The command that evaluates a model; writes its config to `out`.

    Raises:
        RecipeError: the clone is not named, or the kit's class for model or data is not known.
    """
    script = None if options.kit_path is None else options.kit_path / "run.py"
    if script is None or not script.is_file():
        raise RecipeError(
            f"VLMEvalKit is not a package: its run.py is not in {options.kit_path}.",
            remedy="Clone it, install it in an interpreter of its own, and name both: --kit-path "
            "VLMEvalKit --python PATH",
        )
    name = class_of(config, MODELS, NAME, options.kit_model)
    described: dict[str, Any] = {"class": name, "model_path": model}
    if name in _WITH_PIXELS:
        described |= {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels}
    if options.max_tokens is not None:
        described["max_new_tokens"] = options.max_tokens
    described |= {key: _plain(value) for key, value in options.model_args.items()}
    if options.limit is not None:
        raise RecipeError(
            "VLMEvalKit evaluates whole data sets: --limit has no counterpart there.",
            remedy="Leave --limit out, or use --with lmms-eval.",
        )
    data = {}
    for task in options.tasks:
        dataset = task.partition("=")[0]
        data[dataset] = {"class": _data_class(task), "dataset": dataset}
    content = {"model": {_RUN: described}, "data": data}
    file = out / "eval.json"
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    found = [options.python, str(script), "--config", str(file), "--work-dir", str(out)]
    return [*found, "--mode", "all", *options.kit_args]


def _data_class(task: str) -> str:
    name, _, given = task.partition("=")
    found = given or next((DATA[begin] for begin in DATA if name.startswith(begin)), "")
    if not found:
        raise RecipeError(
            f"VLMEvalKit's class for the data set {name} is not known here.",
            remedy=f"Name it behind the data set: --tasks {name}=ImageMCQDataset",
        )
    return found


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def read(options: KitOptions, out: Path, since: float) -> dict[str, TaskScore]:
    """The scores of each task: the overall of its table, and the hits of its items.

    Raises:
        EvaluationError: a table is missing, or has no overall score.
    """
    found = {}
    tables = {}
    for task in options.tasks:
        name = task.partition("=")[0]
        for end in ("acc", "score"):
            table = newest(out, f"**/{_RUN}_{name}*{end}.csv", since)
            if table is not None:
                tables[task] = table
                break
    require_tasks(tables, options.tasks, NAME, out)
    for task, table in tables.items():
        name = task.partition("=")[0]
        metric, value = _overall(read_rows(table), table)
        found[task] = TaskScore(metric, value, _items(out, name, since))
    return found


def _overall(rows: list[Row], file: Path) -> tuple[str, float]:
    """A column "Overall" (of its last row), or the accuracy of a row that is called so."""
    for row in reversed(rows):
        for name in _OVERALL:
            if _is_number(row.get(name, "")):
                return name, float(row[name])
    for row in rows:
        cells = list(row.items())
        if cells and cells[0][1] in _OVERALL:
            numbers = {key: value for key, value in cells[1:] if _is_number(value)}
            for name in ("acc", "score", *reversed(numbers)):
                if name in numbers:
                    return name, float(numbers[name])
    raise EvaluationError(
        f"{file} has no overall score.",
        remedy=f"Its columns: {', '.join(rows[0]) if rows else '-'}.",
    )


def _items(out: Path, name: str, since: float) -> dict[str, float]:
    """The hits of the newest table of items that has any; {} if none has."""
    files = [f for f in out.glob(f"**/{_RUN}_{name}*.xlsx") if f.stat().st_mtime >= since - 2.0]
    for file in sorted(files, key=lambda f: f.stat().st_mtime, reverse=True):
        rows = read_rows(file)
        column = next((n for n in _HITS if rows and n in rows[0]), None)
        if column is None:
            continue
        scores = {row.get("index", str(i)): _hit(row[column]) for i, row in enumerate(rows)}
        if len(scores) == len(rows) and all(value is not None for value in scores.values()):
            return {item: float(value or 0.0) for item, value in scores.items()}
    return {}


def _hit(text: str) -> float | None:
    words = {"true": 1.0, "false": 0.0}
    lowered = text.strip().lower()
    return words.get(lowered, float(text) if _is_number(text) else None)


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True
