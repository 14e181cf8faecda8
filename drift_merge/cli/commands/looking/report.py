"""`report` of both programs: one page on a prior, a merge, a sweep, a search or a run."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drift_merge.cli import options, running
from drift_merge.cli.commands.looking.compare import compare_action
from drift_merge.cli.commands.pull import locate
from drift_merge.cli.entry import print_json
from drift_merge.cli.progress import progress
from drift_merge.cli.render import note
from drift_merge.cli.running import CommandOptions
from drift_merge.errors import RecipeError
from drift_merge.merges.manifest import MANIFEST as MERGE
from drift_merge.merges.manifest import Merge, open_merge
from drift_merge.priors.manifest import MANIFEST as PRIOR
from drift_merge.priors.manifest import open_prior
from drift_merge.reports.pages.document import Document
from drift_merge.reports.pages.page import write_page
from drift_merge.reports.sources import mllm_of, require_mllm
from drift_merge.storage.manifests import read_record

if TYPE_CHECKING:
    from drift_merge.reports.compare import Comparison

_PAGE = options.chain(
    click.option(
        "-o",
        "--output",
        type=options.PATH,
        default="report.html",
        show_default=True,
        help="The page to write.",
    ),
    click.option(
        "--picture/--no-picture",
        default=True,
        show_default=True,
        help="Write a PNG beside the card.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace a file that is no page of ours."),
)


@click.command(name="report")
@click.argument("source", metavar="PRIOR|RUN")
@_PAGE
@options.json_option
@options.quiet_option
def of_prior(source: str, picture: bool, **values: Any) -> None:
    """Write a page on a prior, or on a training run.

    PRIOR is a directory, or a Hub id org/name[@revision], of which only the manifest is fetched.
    RUN is the output of drift-prior train, a directory of transformers' Trainer, or a log of
    handle.metrics(): metrics.csv or metrics.jsonl.

    Guide: drift-prior guide reports

    \b
    Example:
        drift-prior report prior/ -o report.html
    """
    path = Path(source).expanduser()
    if path.exists() and not (path / PRIOR).is_file():
        _finish(_run_page(path), values)
        return
    path = locate(source, "PRIOR", whole=False)[1]
    prior = open_prior(path)
    is_whole = all((path / shard).exists() for shard in prior.manifest["shards"])
    quiet = values["quiet"] or values["as_json"]
    from drift_merge.reports.beside import PRIOR_PNG, draw_prior
    from drift_merge.reports.pages.priors import describe_prior

    with progress("Counting", 4 * prior.manifest["num_elements"], quiet=quiet) as advance:
        document = describe_prior(prior, is_whole=is_whole, progress=advance)
    if picture and is_whole:
        _draw(path / PRIOR_PNG, lambda: draw_prior(prior), quiet=quiet)
    _finish(document, values)


def _run_page(path: Path) -> Document:
    from drift_merge.reports.pages.runs import describe_run, read_history

    file = path / "train.json"
    manifest = {}
    if file.is_file():
        manifest = read_record(file, kind="drift-train", version=1)
    return describe_run(path, read_history(path), manifest)


@click.command(name="report")
@click.argument("source", metavar="OUT|SWEEP|SEARCH")
@click.option("--mllm", metavar="SOURCE", help="Where the mllm is now, to measure what changed.")
@click.option("--base", metavar="SOURCE", help="Common ancestor of both, for sign agreement.")
@click.option("--stable-rank", is_flag=True, help="Measure it: each matrix is read 13 times.")
@_PAGE
@options.streaming
@options.threads_option
@options.json_option
@options.quiet_option
def of_merge(source: str, picture: bool, **values: Any) -> None:
    """Write a page on a merge, on the merges of a sweep, or on a search.

    What a merge changed is measured in one pass over it and its mllm, where the manifest names
    that by a path that is there, or --mllm does. SEARCH is the folder OUT.search of a search.

    Guide: drift-merge guide reports

    \b
    Example:
        drift-merge report merged/ -o report.html
    """
    how = {name: values.pop(name) for name in ("mllm", "base", "stable_rank")}
    run = running.take_command_options(dict(values))
    path = Path(source).expanduser()
    if _is_search(path):
        _finish(_search_page(path, how), values)
        return
    if path.is_dir() and not (path / MERGE).is_file():
        _finish(_sweep_page(path, run, how), values)
        return
    from drift_merge.reports.beside import MERGE_PNG
    from drift_merge.reports.pages.merges import describe_merge, merge_figures
    from drift_merge.reports.pictures import heat_maps

    path = locate(source, "MERGE", whole=False)[1]
    merge = open_merge(path)
    comparison, why_not = _measured(merge, run, how)
    document = describe_merge(merge, comparison, why_not)
    if picture and comparison is not None:
        figures = merge_figures(merge, comparison)
        quiet = run.quiet or run.as_json
        _draw(path / MERGE_PNG, lambda: heat_maps(figures, title=document["title"]), quiet=quiet)
    _finish(document, values)


def _is_search(path: Path) -> bool:
    is_folder = path.is_dir() and (path.suffix == ".search" or (path / "search.json").is_file())
    return is_folder or path.name == "search.json"


def _search_page(path: Path, how: dict[str, Any]) -> Document:
    from drift_merge.searches.pages.page import describe_search, open_search

    found = open_search(path)
    given = [(f"--{name.replace('_', '-')}", value) for name, value in how.items() if value]
    if given:
        words = [w for name, value in given for w in ([name] if value is True else [name, value])]
        best = found["output"] or "OUT"
        raise RecipeError(
            f"{given[0][0]} is for a merge; {path} is a search, whose scores are recorded.",
            remedy="See what its best changed: "
            + shlex.join(["drift-merge", "report", best, *words]),
        )
    return describe_search(path, found)


def _sweep_page(path: Path, run: CommandOptions, how: dict[str, Any]) -> Document:
    from drift_merge.reports.pages.sweeps import describe_sweep, open_sweep

    merges = open_sweep(path)
    measured, why_not = {}, ""
    for merge in merges:
        comparison, reason = _measured(merge, run, how)
        why_not = why_not or reason
        if comparison is not None:
            measured[merge.path.name] = comparison
    return describe_sweep(path, merges, measured, why_not)


def _measured(
    merge: Merge, run: CommandOptions, how: dict[str, Any]
) -> "tuple[Comparison | None, str]":
    """A merge compared with its mllm; or why that cannot be done."""
    if not all((merge.path / shard).exists() for shard in merge.manifest["shards"]):
        return None, "Only the manifest was fetched: pull the merge to have it measured."
    mllm = how["mllm"] or mllm_of(merge)
    if mllm is None:
        source = merge.manifest["sources"]["mllm"]["source"]
        where = f"{source} is not a directory here"
        return None, f"Not measured: {where}. To measure it: --mllm {source}, or where it is now."
    ours = (str(merge.path), mllm, how["base"])
    found = compare_action(*ours, run, with_stable_rank=how["stable_rank"])
    require_mllm(merge, found)
    return found, ""


def _draw(path: Path, draw: Callable[[], bytes], *, quiet: bool) -> None:
    """The picture beside the card of an artifact that is on this disk."""
    from drift_merge.reports.pictures import has_matplotlib

    if not has_matplotlib():
        if not quiet:
            note(
                f"No {path.name}: matplotlib is not installed. For pictures: pip install"
                " 'drift_merge[report]'"
            )
        return
    try:
        path.write_bytes(draw())
    except OSError as error:
        note(f"No {path}: {error.strerror or error}. The page has all of it.")
        return
    if not quiet:
        note(f"Wrote {path}, which push shows in the card.")


def _finish(document: Document, values: dict[str, Any]) -> None:
    """Write the page; say where, and the verdict."""
    output: Path = values["output"]
    write_page(document, output, overwrite=values["overwrite"])
    if values["as_json"]:
        print_json({"schema": 1, "output": str(output), **document})
        return
    if not values["quiet"]:
        found = document.get("verdict")
        sentences = [f"{found['label']}.", *found["sentences"]] if found else document["notes"]
        for sentence in sentences:
            note(sentence)
    print(output)
