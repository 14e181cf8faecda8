"""`drift-merge compare`: the statistics of any two checkpoints, streamed; nothing is written."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drift_merge.cli import options, render, running
from drift_merge.cli.entry import print_json
from drift_merge.cli.heat_map import print_heat_map
from drift_merge.cli.progress import progress
from drift_merge.cli.running import CommandOptions
from drift_merge.cli.traffic import say_downloads, traffic_of
from drift_merge.priors.summary import show_share
from drift_merge.recipes.options import recipe_options
from drift_merge.recipes.words import PRIOR
from drift_merge.reports.compare import EVERYTHING, plan_comparison, run_comparison
from drift_merge.reports.figures import KINDS, Group, TensorFigures, modules
from drift_merge.reports.pages.document import rounded
from drift_merge.reports.pages.merges import describe_comparison, parts_sentences
from drift_merge.reports.pages.page import write_page
from drift_merge.reports.verdict import verdict
from drift_merge.storage.sizes import parse_size

if TYPE_CHECKING:
    from drift_merge.reports.compare import Comparison

_ROWS = recipe_options(PRIOR)


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--base", metavar="SOURCE", help="Common ancestor of both, for sign agreement.")
@options.click_option(_ROWS["modules"][0], EVERYTHING)
@options.recipe(PRIOR, "layers", "map_file")
@click.option("--report", type=options.PATH, metavar="PAGE", help="Write a page of it, too.")
@click.option("--stable-rank", is_flag=True, help="Measure it: each matrix is read 13 times.")
@options.streaming
@options.threads_option
@options.json_option
@options.quiet_option
def compare(a: str, b: str, report: Path | None, stable_rank: bool, **values: Any) -> None:
    """Compare two checkpoints, text or multimodal; nothing is written.

    delta = A - B. With all modules the vision tower and the connector are compared, too.

    Guide: drift-merge guide reports

    \b
    Example:
        drift-merge compare merged/ Qwen/Qwen2.5-VL-7B-Instruct --report page.html
    """
    base = values.pop("base")
    selection = {name: values.pop(name) for name in ("modules", "layers", "map_file")}
    run = running.take_command_options(values)
    found = compare_action(a, b, base, run, with_stable_rank=stable_rank, **selection)
    if report is not None:
        words = ["drift-merge", "compare", a, b, *(["--base", base] if base else [])]
        if selection["modules"] != EVERYTHING:
            words += ["--modules", selection["modules"]]
        words += ["--layers", selection["layers"]] if selection["layers"] else []
        words += ["--map", str(selection["map_file"])] if selection["map_file"] else []
        words += ["--stable-rank"] if stable_rank else []
        write_page(describe_comparison(found, words), report)
    if run.as_json:
        print_json(_json(found, report))
        return
    if not run.quiet:
        render.findings(found.plan.findings)
        say_downloads(found.traffic)
    _print(found, report)


def compare_action(
    a: str,
    b: str,
    base: str | None,
    run: CommandOptions,
    *,
    with_stable_rank: bool,
    modules: str = EVERYTHING,
    layers: str | None = None,
    map_file: Path | None = None,
) -> "Comparison":
    """Pair and measure, with a bar while it runs."""
    silent = run.quiet or run.as_json
    plan = plan_comparison(
        a,
        b,
        base=base,
        modules=modules,
        layers=layers,
        map_file=map_file,
        stream=run.stream,
        quiet=silent,
    )
    from drift_merge.reports.measure import MeasureOptions  # here: it needs torch

    limit = parse_size(run.cache_limit)
    with progress("Comparing", plan.plan.read_bytes, quiet=silent) as advance:
        how = MeasureOptions(threads=run.threads, cache_limit=limit, progress=advance)
        return run_comparison(plan, how, with_stable_rank=with_stable_rank)


def _print(found: "Comparison", report: Path | None) -> None:
    has_base = found.plan.prepared.base is not None
    heads = ["module", "tensors", "elements", "|delta|", "|delta|/|B|", "cosine", "equal"]
    rows = []
    for name, group in modules(found.tensors).items():
        row = [name, f"{len(group.tensors):,}", f"{group.numel:,}", _text(group.norm_delta)]
        cosine = "-" if group.cosine is None else f"{group.cosine:.4f}"
        row += [_text(group.relative_norm), cosine, show_share(group.equal)]
        rows.append(row + ([show_share(group.sign_agreement)] if has_base else []))
    render.table([*heads, *(["signs"] if has_base else [])], rows)
    print_heat_map(found.tensors, KINDS[0])
    for sentence in parts_sentences(found.tensors):
        print(sentence)
    tower = Group(found.tower)
    result = verdict(tower.cosine, tower.relative_norm)
    print(f"{result.label}. {result.sentences[1]}")
    coverage = {k: len(names) for k, names in found.plan.coverage().items() if names}
    print("Tensors: " + ", ".join(f"{n:,} {k.replace('_', ' ')}" for k, n in coverage.items()))
    if report is not None:
        print(report)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _json(found: "Comparison", report: Path | None) -> dict[str, Any]:
    prepared, tower = found.plan.prepared, Group(found.tower)
    result = verdict(tower.cosine, tower.relative_norm)
    page = {} if report is None else {"output": str(report)}
    return {
        "schema": 1,
        **page,
        "a": prepared.reasoners[0][0].source.given,
        "b": prepared.mllm.source.given,
        "base": prepared.base[0].source.given if prepared.base else None,
        "verdict": {"label": result.label, "sentences": list(result.sentences)},
        "coverage": found.plan.coverage(),
        "findings": [
            {"code": f.code, "severity": f.severity, "message": f.message, "remedy": f.remedy}
            for f in found.plan.findings
        ],
        "modules": {name: _figures(group) for name, group in modules(found.tensors).items()},
        "tensors": {t.name: _tensor(t) for t in found.tensors},
        "histogram": {name: each.plain() for name, each in found.histograms.items()},
        **traffic_of(found.traffic),
    }


def _figures(group: Group) -> dict[str, Any]:
    keys = ("norm_delta", "max_abs_delta", *(kind.key for kind in KINDS))
    plain = {key: rounded(getattr(group, key)) for key in keys}
    return {"tensors": len(group.tensors), "elements": group.numel} | plain


def _tensor(tensor: TensorFigures) -> dict[str, Any]:
    plain = {"part": tensor.part, "module": tensor.module, "shape": list(tensor.shape)}
    norms = {"norm_a": rounded(tensor.norm_a), "norm_b": rounded(tensor.norm_b)}
    keys = ("norm_delta", "max_abs_delta", *(kind.key for kind in KINDS))
    return plain | norms | {key: rounded(getattr(tensor, key)) for key in keys}
