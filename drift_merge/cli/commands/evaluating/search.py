"""`drift-merge search`: vary a recipe, evaluate each merge, keep and weigh the best."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from drift_merge.cli import options, render, running
from drift_merge.cli.entry import print_json
from drift_merge.cli.planning import say_absent
from drift_merge.cli.running import CommandOptions
from drift_merge.cli.traffic import engine_options
from drift_merge.evaluation.command import EvaluationCommand, command_of
from drift_merge.evaluation.scores import Scores
from drift_merge.recipes.files import read_recipe
from drift_merge.recipes.own_methods import load_methods
from drift_merge.recipes.recipe import Recipe
from drift_merge.searches.spaces import Space
from drift_merge.searches.start import SearchOptions, space_of, start_search
from drift_merge.searches.study import SAMPLERS
from drift_merge.storage import sizes

_ROWS = (("mllm", "unmerged mllm"), ("default", "default recipe"), ("best", "best"))


def search_action(
    space: Space,
    recipe: Recipe | None,
    evaluate: EvaluationCommand,
    final: EvaluationCommand | None,
    how: SearchOptions,
    run: CommandOptions,
) -> None:
    """Run the search and print what came out."""
    quiet = run.quiet or run.as_json
    first = recipe or space.recipe(space.corners()[0])
    say_absent(first, quiet=quiet)
    if run.dry_run:
        _print_plan(space, first, how, run)
        return
    described = {
        "evaluate": evaluate.text,
        "metric_places": [f"{p.name}={p.text}" for p in evaluate.metrics],
        "item_places": [f"{p.name}={p.text}" for p in evaluate.items],
        "final_evaluate": None if final is None else final.text,
        "null": None,
    }
    say: Callable[[str], None] = (lambda _: None) if quiet else render.note
    # Without a bar for each of many merges: a line for each trial says more.
    silent = CommandOptions(
        device=run.device,
        threads=run.threads,
        overwrite=run.overwrite,
        cache_limit=run.cache_limit,
        quiet=True,
    )
    with engine_options(silent, 0) as engine:
        found = start_search(
            space,
            recipe,
            lambda folder: _evaluator(evaluate, folder),
            None if final is None else lambda folder: _evaluator(final, folder),
            how,
            engine,
            described=described,
            say=say,
        )
    if run.as_json:
        print_json(found)
    elif run.quiet:
        print(found["output"])
    else:
        print_result(found, how.folder)


def _evaluator(command: EvaluationCommand, folder: Path) -> Callable[[Any, str, str], Scores]:
    def evaluate(model: Any, limit: str, label: str) -> Scores:
        out = folder / "evaluations" / (label if limit == "all" else f"{label}-{limit}")
        return command.run(str(model), limit=limit, out=out, label=label)

    return evaluate


def _print_plan(space: Space, first: Recipe, how: SearchOptions, run: CommandOptions) -> None:
    from drift_merge.searches.targets import Sources

    sources = Sources(stream=run.stream)
    plans = [sources.plan(space.recipe(values))[1] for values in space.corners()]
    settings = how.settings()
    plan = max(plans, key=lambda p: p.write_bytes)
    if run.as_json:
        parameters = [p.as_data() for p in space.parameters]
        value = {"schema": 1, "dry_run": True, "trials": how.trials, "parameters": parameters}
        print_json(value | {"sampler": settings.sampler_of(space), "write_bytes": plan.write_bytes})
        return
    print(f"Searches  {', '.join(p.name for p in space.parameters)} of {', '.join(space.methods)}")
    print(f"Trials    {how.trials} by {settings.sampler_of(space)}")
    print(f"Reads     {sizes.size(plan.read_bytes)} for each")
    size = sizes.size(plan.layout.size_bytes + plan.beside_bytes)
    print(f"Writes    {size} for each, one at a time, and as much for the best")
    render.note("Nothing was written (--dry-run).")


def print_result(found: Mapping[str, Any], folder: Path) -> None:
    """The tables of a finished search."""
    from drift_merge.searches.results import remarks

    metrics = [metric["name"] for metric in found["metrics"]]
    goals = {metric["name"]: metric["goal"] for metric in found["metrics"]}
    _print_trials(found, metrics)
    print()
    rows = []
    for split in ("validation", "final"):
        for role, title in _ROWS:
            values = found[split].get(role, {}).get("values")
            if values is None:
                continue
            shown = f"{title} (trial {found['best']})" if role == "best" else title
            against = "mllm" if role == "best" else ""
            cells = [f"{values[m]:.4g}" for m in metrics]
            rows.append([shown, split, *cells, *_compared(found, split, against, goals)])
            if role == "best":
                rows.append(
                    ["", split, *("" for _ in metrics), *_compared(found, split, "default", goals)]
                )
    render.table(["model", "items", *metrics, "best against", "difference", "verdict"], rows)
    for code, text in remarks(found):
        render.note(f"Note [{code}]: {text}")
    render.note(f"See it: {shlex.join(['drift-merge', 'report', str(folder)])}")
    print(f"\n{found['output']}  ({folder / 'search.json'})")


def _compared(
    found: Mapping[str, Any], split: str, against: str, goals: Mapping[str, str]
) -> list[str]:
    """The cells of the comparisons of one table row."""
    from drift_merge.searches.results import verdict

    rows = [r for r in found["comparisons"] if r["on"] == split and r["against"] == against]
    if not rows:
        return ["", "", ""]
    differences = []
    for row in rows:
        paired = row["paired"]
        text = f"{row['difference']:+.4g}"
        if paired is not None:
            text = f"{paired['difference']:+.4g} [{paired['low']:+.3g}, {paired['high']:+.3g}]"
            text += "" if paired["p"] is None else f" p={paired['p']:.3g}"
        differences.append(text)
    verdicts = ", ".join(verdict(row, goals) for row in rows)
    return [against, "; ".join(differences), verdicts]


def _print_trials(found: Mapping[str, Any], metrics: list[str]) -> None:
    names = [p["name"] for d in found["space"] for p in d["parameters"]]
    rows = []
    for trial in found["trials"]:
        marks = "best" if trial["number"] == found["best"] else ""
        if not marks and trial["number"] in found["front"]:
            marks = "front"
        state = trial["state"] if trial["state"] != "complete" else marks
        parameters = [_shown(trial["parameters"].get(name)) for name in names]
        values = [_shown((trial["values"] or {}).get(metric)) for metric in metrics]
        seconds = sum(trial["seconds"].values())
        rows.append([str(trial["number"]), *parameters, *values, f"{seconds:.0f}", state])
    render.table(["trial", *names, *metrics, "seconds", ""], rows)


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


@click.command(name="search")
@click.argument("recipe", type=options.PATH)
@click.option(
    "--space",
    multiple=True,
    required=True,
    metavar="OPTION=VALUES",
    help="weight=0.01:0.3:log, density=0.1:0.9:0.1, method=linear,ties, weight=curve:4:0:0.3; "
    "repeat for several.",
)
@click.option(
    "--evaluate",
    required=True,
    metavar="COMMAND",
    help="Program that evaluates {model}; {limit}, {out} and {trial} are filled in too.",
)
@options.scoring
@click.option("--minimize", multiple=True, metavar="NAME", help="Metric that is better when low.")
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    metavar="N",
    help="Of the whole study, whoever makes them.",
)
@click.option(
    "--rungs",
    metavar="LIMITS",
    help="Such as 100,300,all for {limit}: the worse trials stop early.",
)
@click.option(
    "--sampler",
    type=click.Choice(SAMPLERS),
    help="Who proposes values.  [default: grid of one parameter, nsga2 of several metrics, tpe]",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the sampler.")
@click.option(
    "--storage",
    metavar="URL",
    help="Database of the study, such as postgresql://HOST/NAME.  [default: SQLite in OUT.search]",
)
@click.option("--study", metavar="NAME", help="Of the study in it.  [default: that of OUT]")
@click.option(
    "--scratch", type=options.PATH, metavar="DIR", help="Where merges are tried, such as /dev/shm."
)
@click.option(
    "--final", metavar="COMMAND", help="Like --evaluate, once, on items that chose nothing."
)
@click.option(
    "--null",
    type=click.Choice(["random"]),
    help="Control: reasoners at equal distance in random directions.",
)
@click.option(
    "-o", "--output", type=options.PATH, required=True, help="Directory of the best merge."
)
@options.methods_file
@options.streaming
@options.running
def search_command(
    recipe: Path,
    space: tuple[str, ...],
    evaluate: str,
    metric: tuple[str, ...],
    items: tuple[str, ...],
    timeout: float | None,
    minimize: tuple[str, ...],
    rungs: str | None,
    final: str | None,
    output: Path,
    methods_file: Path | None,
    **values: Any,
) -> None:
    """Search the options of a recipe: make, evaluate and remove merges; keep the best.

    Needs: pip install 'drift_merge[search]'. The same command again, here or on other machines
    with one --storage, goes on with the study.

    Guide: drift-merge guide search

    \b
    Example:
        drift-merge search recipe.yaml --space weight=0.01:0.3:log --trials 20
            --evaluate 'python evaluate.py {model}' --metric stdout -o best/
    """
    run = running.take_command_options(values)
    loaded = read_recipe(recipe, load_methods(methods_file))
    found, whole = space_of(loaded, space)
    first = command_of(evaluate, metric, items, timeout_seconds=timeout)
    last = None
    if final is not None:
        last = command_of(final, metric, items, timeout_seconds=timeout, option="--final")
    limits = tuple(limit.strip() for limit in (rungs or "").split(",") if limit.strip())
    how = SearchOptions(
        metrics=tuple(place.name for place in first.metrics),
        minimize=minimize,
        rungs=limits,
        out=output,
        stream=run.stream,
        quiet=run.quiet or run.as_json,
        **values,
    )
    search_action(found, whole, first, last, how, run)
