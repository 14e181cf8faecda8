"""Rows of CSV files and of .xlsx files, which are XML in a zip; standard library alone."""

import csv
import re
import zipfile
from pathlib import Path
from xml.etree import ElementTree

from drift_merge.errors import EvaluationError

Row = dict[str, str]
_BROKEN = (OSError, csv.Error, KeyError, ValueError, zipfile.BadZipFile, ElementTree.ParseError)
_NAMESPACE = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


def read_rows(file: Path) -> list[Row]:
    """The rows of the first sheet below its first row, which names the columns.

    Raises:
        EvaluationError: it cannot be read.
    """
    try:
        if file.suffix == ".csv":
            with open(file, newline="", encoding="utf-8-sig") as text:
                return list(csv.DictReader(text))
        table = _sheet(file)
    except _BROKEN as error:
        raise EvaluationError(
            f"{file} cannot be read as a table: {error}.", remedy="See what the kit writes there."
        ) from error
    if not table:
        return []
    width = max(table[0], default=-1) + 1
    names = [table[0].get(column, "") for column in range(width)]
    return [{n: row.get(c, "") for c, n in enumerate(names) if n} for row in table[1:]]


def _sheet(file: Path) -> list[dict[int, str]]:
    """Cells by column for each row of the first sheet."""
    with zipfile.ZipFile(file) as archive:
        shared = []
        if "xl/sharedStrings.xml" in archive.namelist():
            root = ElementTree.fromstring(archive.read("xl/sharedStrings.xml"))
            shared = [_text(item) for item in root.iter(f"{_NAMESPACE}si")]
        sheets = [n for n in archive.namelist() if re.fullmatch(r"xl/worksheets/sheet\d+\.xml", n)]
        root = ElementTree.fromstring(archive.read(min(sheets, key=lambda n: (len(n), n))))
    rows = []
    for row in root.iter(f"{_NAMESPACE}row"):
        cells: dict[int, str] = {}
        for position, cell in enumerate(row.iter(f"{_NAMESPACE}c")):
            name = re.match(r"[A-Z]+", cell.get("r", ""))
            column = _column(name[0]) if name else position
            cells[column] = _value(cell, shared)
        rows.append(cells)
    return rows


def _value(cell: ElementTree.Element, shared: list[str]) -> str:
    kind = cell.get("t", "n")
    if kind == "inlineStr":
        return _text(cell)
    value = cell.findtext(f"{_NAMESPACE}v") or ""
    return shared[int(value)] if kind == "s" else value


def _text(element: ElementTree.Element) -> str:
    return "".join(part.text or "" for part in element.iter(f"{_NAMESPACE}t"))


def _column(letters: str) -> int:
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("A") + 1
    return number - 1
