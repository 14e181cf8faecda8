"""A document as one HTML file that asks for nothing from the network.

The data stands in it as JSON (`data_of` reads it back); tables are written here, so that they can
be read without JavaScript; heat maps and charts are drawn by `page.js`. There is no library in it:
heat maps of plain elements can be reached by keyboard and screen reader, and a page stays small.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from drift_merge.errors import CheckpointError, OutputError
from drift_merge.reports.pages.document import Document

_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
# Nothing may be loaded, not even by a mistake of ours: the browser refuses it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def to_html(document: Document) -> str:
    """The page."""
    data = json.dumps(document, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    title = escape(document["title"])
    sections = "\n".join(filter(None, (make(document) for make in _SECTIONS)))
    # In one element: its functions are known to all of it before the first line runs.
    scripts = ["page.js", *(["charts.js"] if "sections" in document else [])]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{_file("page.css")}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="formula mono">{escape(document["formula"])}</p>
</header>
<main>
{sections}
</main>
<footer>Made by drift_merge. This file holds all its data and loads nothing.</footer>
<div id="tip" role="tooltip" hidden></div>
<div id="said" class="soft" role="status" aria-live="polite"
 style="position:absolute;left:-9999px"></div>
<script type="application/json" id="data">{data}</script>
<script>
{"".join(map(_file, scripts))}</script>
</body>
</html>
"""


def data_of(html: str) -> Document:
    """The data of a page.

    Raises:
        CheckpointError: it is not a page of this tool.
    """
    found = _DATA.search(html)
    if found is None:
        raise CheckpointError("this is no page of drift_merge.", remedy="Make it again.")
    document: Document = json.loads(found[1])
    return document


def _file(name: str) -> str:
    return files("drift_merge.reports.pages").joinpath(name).read_text(encoding="utf-8")


def _verdict(document: Document) -> str:
    if "verdict" not in document:
        return _notes(document)
    found = document["verdict"]
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in found["sentences"])
    return f"""<section class="verdict" aria-label="Verdict">
<strong>{escape(found["label"])}</strong>
{sentences}</section>
{_notes(document)}
{_scale() if "published" in found and document["kind"] != "merge" else ""}"""


def _scale() -> str:
    """Of a pair of models alone: a merge and its mllm are no such pair."""
    return """<h2>Beside published pairs</h2>
<p class="soft">Cosine of the two towers: bars span the layers of each published pair (with the
points that naive linear merging changed), the thin bar those of this one. Source:
arXiv 2510.15050.</p>
<div id="scale"></div>"""


def _notes(document: Document) -> str:
    return "".join(f"<p>{escape(note)}</p>" for note in document["notes"])


def _maps(document: Document) -> str:
    if "maps" not in document:
        return ""
    names = document["names"]
    return f"""<h2>Where they differ</h2>
<p class="soft">A is {escape(names["A"])}, B is {escape(names["B"])}. Point at a cell, or walk
through a map with the arrow keys, to see its tensor.</p>
<noscript><p class="missing">The heat maps and charts need JavaScript.</p></noscript>
<div id="maps"></div>
<h2>How large the entries of delta are</h2>
<figure id="histogram"></figure>
<h2>By module</h2>
{_figures_table(document["modules"], "module")}
<h2>The largest deltas</h2>
{_figures_table(document["largest"], "tensor")}"""


_HEADS = ("|delta|", "|delta| / |B|", "cos(A, B)", "equal", "max |delta|")


def _figures_table(rows: Sequence[Mapping[str, Any]], first: str) -> str:
    is_tensor = first == "tensor"
    heads = [first, "shape" if is_tensor else "tensors", "entries", *_HEADS]
    cells = []
    for row in rows:
        what = " x ".join(map(str, row["shape"])) if is_tensor else f"{row['count']:,}"
        share = None if row["equal"] is None else f"{row['equal']:.2%}"
        cosine = None if row["cosine"] is None else f"{row['cosine']:.6f}"
        figures = (_text(row["norm_delta"]), _text(row["relative_norm"]), cosine, share)
        shown = [what, f"{row['numel']:,}", *figures, _text(row["max_abs_delta"])]
        cells.append([row["name"], *shown])
    if not rows:
        return '<p class="missing">No tensor whose delta is known.</p>'
    return _table(heads, cells)


def _text(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _table(heads: Iterable[str], rows: Iterable[Sequence[Any]]) -> str:
    heads, body = list(heads), []
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    for first, *rest in rows:
        cells = "".join(
            f'<td data-label="{escape(label)}">{escape("-" if cell is None else str(cell))}</td>'
            for label, cell in zip(heads[1:], rest, strict=True)
        )
        body.append(f'<tr><td class="name">{escape(str(first))}</td>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _panels(document: Document) -> str:
    if "panels" not in document:
        return ""
    label = "Over the steps" if document["kind"] == "run" else "Over the outputs"
    return f'<h2>{label}</h2>\n<div id="panels" class="maps wide"></div>'


def _sections(document: Document) -> str:
    """Charts, tables and failures under titles of their own, as a search has them."""
    return "\n".join(map(_section, document.get("sections", [])))


def _section(section: Mapping[str, Any]) -> str:
    parts = [f"<h2>{escape(section['title'])}</h2>"]
    if section["missing"]:
        return "\n".join([*parts, f'<p class="missing">{escape(section["missing"])}</p>'])
    parts += [f'<p class="soft">{escape(section["text"])}</p>'] if section["text"] else []
    if section["charts"]:
        parts.append(f'<div class="maps wide" data-section="{escape(section["key"])}"></div>')
    for table in section.get("tables", []):
        rows = [[_shown(cell) for cell in row] for row in table["rows"]]
        drawn = _table(table["columns"], rows)
        if title := table.get("folded"):
            drawn = f"<details><summary>{escape(title)}</summary>{drawn}</details>"
        parts.append(drawn)
    return "\n".join([*parts, *map(_failure, section.get("failures", []))])


def _failure(failure: Mapping[str, Any]) -> str:
    """What some trials have failed with: the first line, then what else was said."""
    numbers = failure["trials"]
    who = f"Trial{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
    first, _, rest = failure["message"].partition("\n")
    said = f"<pre><code>{escape(rest)}</code></pre>" if rest.strip() else ""
    return (
        f'<div class="finding error"><b>{escape(who)} [{escape(failure["kind"])}]</b> '
        f"{escape(first)} <span class=soft>{escape(failure['remedy'])}</span>{said}</div>"
    )


def _outputs(document: Document) -> str:
    if "table" not in document:
        return ""
    found = document["table"]
    rows = [[_shown(cell) for cell in row] for row in found["rows"]]
    return f"<h2>Outputs</h2>\n{_table(found['columns'], rows)}"


def _shown(cell: Any) -> Any:
    return f"{cell:.6g}" if isinstance(cell, float) else cell


def _findings(document: Document) -> str:
    if "findings" not in document:
        return ""
    marks = {"error": "Error", "warning": "Warning", "info": "Note"}
    lines = [
        f'<p class="finding {f["severity"]}"><b>{marks[f["severity"]]} [{escape(f["code"])}]</b> '
        f"{escape(f['message'])} <span class=soft>{escape(f['remedy'])}</span></p>"
        for f in document["findings"]
    ]
    found = "\n".join(lines) or "<p>Nothing was found.</p>"
    return f"<h2>Lineage</h2>\n{found}"


def _facts(document: Document) -> str:
    facts = _list("How it was made", document["facts"])
    coverage = _list("Coverage, in tensors", document.get("coverage", []))
    return f'<div class="pairs">{facts}{coverage}</div>' if facts or coverage else ""


def _list(title: str, rows: Iterable[Sequence[Any]]) -> str:
    items = [
        f"<dt>{escape(str(key))}</dt><dd>"
        f"{escape(f'{value:,}' if isinstance(value, int) else str(value))}</dd>"
        for key, value in rows
    ]
    return f"<section><h2>{title}</h2><dl>{''.join(items)}</dl></section>" if items else ""


def _commands(document: Document) -> str:
    if not document["commands"]:
        return ""
    blocks = [
        f"<p class=soft>{escape(label)}</p><pre data-copy><code>{escape(text)}</code></pre>"
        for label, text in document["commands"]
    ]
    return "<h2>Commands</h2>\n" + "\n".join(blocks)


def write_page(document: Document, path: Path, *, overwrite: bool = False) -> None:
    """Write a page, whole or not at all; another page of this tool is replaced.

    Raises:
        OutputError: something else is there, or it cannot be written.
    """
    try:
        if path.exists() and not overwrite and not _is_page(path):
            raise OutputError(
                f"{path} exists, and is no page of drift_merge.",
                remedy="Give another name with -o, or --overwrite.",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(to_html(document), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}.",
            remedy="Name a file in a directory that you may write to.",
        ) from error


def _is_page(path: Path) -> bool:
    return path.is_file() and bool(_DATA.search(path.read_text("utf-8", errors="replace")))


_SECTIONS = (_verdict, _sections, _panels, _outputs, _maps, _findings, _facts, _commands)
