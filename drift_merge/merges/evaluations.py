"""Evaluations that a merge carries: in its manifest, its card, and for the Hub's leaderboards."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drift_merge.merges.card import merge_card
from drift_merge.merges.manifest import MANIFEST, Merge
from drift_merge.merges.sidecars import CARD
from drift_merge.storage import fingerprints
from drift_merge.storage.copying import write_file
from drift_merge.storage.manifests import reseal, to_json

EVAL_RESULTS = ".eval_results"
# Data sets on the Hub behind the names of tasks: beginning of the name, lower case -> id.
_DATASETS = {
    "mathvista": "AI4Math/MathVista",
    "mathverse": "AI4Math/MathVerse",
    "mathvision": "MathLLMs/MathVision",
    "wemath": "We-Math/We-Math",
    "mmmu": "MMMU/MMMU",
    "mmstar": "Lin-Chen/MMStar",
}


def record_evaluation(merge: Merge, evaluation: Mapping[str, Any], *, date: str) -> list[str]:
    """Append an evaluation to a merge's manifest, card and `.eval_results`.

    Args:
        merge: opened.
        evaluation: settings, unmerged, results, as plain data.
        date: such as 2026-11-27.

    Returns:
        Sentences on what was left as it is: a card that somebody has edited, tasks whose data set
        on the Hub is not known.

    Raises:
        OutputError: a file cannot be written.
    """
    notes, files, unknown = [], {}, []
    for row in evaluation["results"]:
        dataset = dataset_of(row["task"])
        if dataset is None:
            unknown.append(row["task"])
            continue
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in row["task"])
        data = _eval_result(row, dataset, evaluation, date)
        _replace(merge.path / EVAL_RESULTS / f"{name}.yaml", data)
        files[f"{EVAL_RESULTS}/{name}.yaml"] = fingerprints.of_bytes(data)
    listed = [*merge.manifest.get("evaluations", []), {"date": date, **evaluation}]
    beside = {**merge.manifest["sidecars"], **files}  # so that push sends them
    manifest = reseal({**merge.manifest, "sidecars": beside, "evaluations": listed})
    card = merge.path / CARD
    if card.is_file() and card.read_bytes() == merge_card(merge.manifest):
        _replace(card, merge_card(manifest))
    else:
        notes.append(f"{card} has been edited and stays as it is; the manifest has the results.")
    _replace(merge.path / MANIFEST, to_json(manifest))
    if unknown:
        notes.append(
            f"No {EVAL_RESULTS} of {', '.join(unknown)}: its data set on the Hub is not known here."
        )
    return notes


def dataset_of(task: str) -> str | None:
    """The data set on the Hub behind a task."""
    plain = task.lower().replace("_", "").replace("-", "")
    return next((found for begin, found in _DATASETS.items() if plain.startswith(begin)), None)


def _eval_result(
    row: Mapping[str, Any], dataset: str, evaluation: Mapping[str, Any], date: str
) -> bytes:
    """One file of the Hub's form (hub-docs, "Evaluation results", 2026)."""
    import yaml

    settings = evaluation["settings"]
    notes = f"{row['metric']} by {settings['with']}; unmerged, evaluated alike: {row['unmerged']:g}"
    entry = {
        "dataset": {"id": dataset, "task_id": row["task"]},
        "value": row["value"],
        "date": date,
        "notes": notes,
    }
    return str(yaml.safe_dump([entry], sort_keys=False)).encode()


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    write_file(partial, data)
    os.replace(partial, path)
