"""Rows from what people have: JSON Lines, a JSON list, Parquet, or a folder of a data set.

Text stays in memory; Parquet and folders are mapped by the `datasets` library, images undecoded.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from drift_merge.errors import RecipeError, SourceError
from drift_merge.storage import fingerprints
from drift_merge.trainers.sft.data.example import FORMS, Example
from drift_merge.trainers.sft.data.forms import USED, read_row
from drift_merge.trainers.wiring import optional

_INSTALL = "pip install 'drift_merge[data]'"
_TABLES = (".parquet", ".arrow")


class Examples(Sequence[Example]):
    """The rows of one `--data`, understood one at a time."""

    def __init__(self, rows: Any, places: Sequence[str] | str, folder: Path) -> None:
        """Keep rows that were read.

        Args:
            rows: a sequence of objects.
            places: file and line of each; or a text that a number follows.
            folder: what paths of images are relative to.
        """
        self._rows, self._places, self._folder = rows, places, folder

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:  # an Example; the trainer asks for one at a time
        number = range(len(self))[index]
        places = self._places
        where = f"{places} {number + 1:,}" if isinstance(places, str) else places[number]
        return read_row(self._rows[number], where, self._folder)

    def __iter__(self) -> Iterator[Example]:
        return (self[number] for number in range(len(self)))

    def unused(self) -> list[str]:
        """Fields of the rows that are not looked at."""
        if hasattr(self._rows, "column_names"):
            names = set(self._rows.column_names)
        else:
            names = {name for row in self._rows if isinstance(row, dict) for name in row}
        return sorted(names.difference(USED))


def read_examples(path: Path) -> Examples:
    """Read and understand every row; images are not opened.

    Args:
        path: a file (.jsonl, .json, .parquet) or the folder of a data set.

    Raises:
        SourceError: it is not there.
        RecipeError: a row is not understood, or there is none; or `datasets` is needed.
    """
    examples = _open(path)
    if not len(examples):
        raise RecipeError(f"{path} holds no example.", remedy=FORMS)
    for _ in examples:
        pass  # every row is understood before anything is trained
    return examples


def fingerprint_of(path: Path) -> str:
    """Of all bytes of the data: a file, or the files of a folder by name."""
    if path.is_file():
        return fingerprints.of_bytes(path.read_bytes())
    files = sorted(one for one in path.rglob("*") if one.is_file())
    names = {str(one.relative_to(path)): fingerprints.of_bytes(one.read_bytes()) for one in files}
    return fingerprints.of_json(names)


def _open(path: Path) -> Examples:
    if path.is_dir():
        return Examples(_folder(path), f"{path}, row", path)
    if path.suffix in _TABLES:
        kind = {".parquet": "parquet", ".arrow": "arrow"}[path.suffix]
        rows = _load(path, lambda datasets: datasets.load_dataset(kind, data_files=str(path)))
        return Examples(rows, f"{path}, row", path.parent)
    try:
        # A BOM is no part of the text.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path} cannot be read: {error}.", remedy="Check the path given with --data."
        ) from error
    if text.lstrip().startswith("["):
        rows = _whole(text, path)
        return Examples(rows, f"{path}, item", path.parent)
    # Not splitlines(): U+2028 and U+0085 may stand within a text.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    places = [f"{path}, line {number:,}" for number, _ in lines]
    return Examples(
        [_line(line, place) for (_, line), place in zip(lines, places, strict=True)],
        places,
        path.parent,
    )


def _whole(text: str, path: Path) -> list[Any]:
    try:
        found: list[Any] = json.loads(text)
    except ValueError as error:
        raise RecipeError(f"{path} is not JSON: {error}.", remedy=FORMS) from error
    return found


def _line(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise RecipeError(f"{place} is not JSON: {error}.", remedy=FORMS) from error


def _folder(path: Path) -> Any:
    def load(datasets: Any) -> Any:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path))

    return _load(path, load)


def _load(path: Path, load: Any) -> Any:
    """The one split of a data set, its images as bytes or paths."""
    datasets = optional("datasets", install=_INSTALL)
    datasets.disable_progress_bars()
    try:
        found = load(datasets)
    except Exception as error:  # the library raises whatever its readers raise
        raise SourceError(
            f"{path} cannot be read as a data set: {type(error).__name__}: {error}",
            remedy="Give a .jsonl, .json or .parquet file, or a folder that the datasets library"
            " has saved or can load.",
        ) from error
    if isinstance(found, dict):
        names = list(found)
        if len(names) > 1 and "train" not in names:
            raise RecipeError(
                f"{path} has the splits {', '.join(names)}, and none is called train.",
                remedy="Save the one that is meant: load_from_disk(...)[SPLIT].save_to_disk(...)",
            )
        found = found["train" if "train" in names else names[0]]
    return found.cast(_undecoded(datasets, found.features))


def _undecoded(datasets: Any, feature: Any) -> Any:
    """The same features, with images left as they are stored."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return type(feature)({k: _undecoded(datasets, one) for k, one in feature.items()})
    if isinstance(feature, list):
        return [_undecoded(datasets, one) for one in feature]
    if hasattr(feature, "feature"):
        return type(feature)(_undecoded(datasets, feature.feature), length=feature.length)
    return feature


def count_kinds(examples: Examples) -> dict[str, int]:
    """What the data hold, for the plan: turns to be learned, and rows of text alone."""
    counts: Counter[str] = Counter()
    for example in examples:
        counts["learned_turns"] += sum(turn.is_learned for turn in example.turns)
        counts["text_only"] += not example.pictures
    return dict(counts)
