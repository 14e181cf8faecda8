"""Options of commands, made from the tables of recipes and methods, and those of running.

An option of a recipe is written once, in `recipes/recipe.py` or `maths/methods/options.py`; here
it becomes click's. Same option, same name, same help everywhere.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from drift_merge.cli import config_file
from drift_merge.cli.entry import how_to_overwrite
from drift_merge.cli.running import check_device
from drift_merge.maths.methods import METHODS, Method
from drift_merge.maths.methods.options import OPTIONS, Option
from drift_merge.maths.methods.table import SPECTRAL
from drift_merge.recipes.options import recipe_options
from drift_merge.recipes.words import DEFAULT_CACHE_SIZE, DTYPE_CODES, PRIOR, SOURCE_DTYPE
from drift_merge.storage.forms.compressed import COMPRESSED
from drift_merge.storage.ranks.environment import own_cores

Decorator = Callable[[Any], Any]

PATH: Any = click.Path(path_type=Path)
OUTPUT_DTYPES = (*DTYPE_CODES, SOURCE_DTYPE)
COMPRESSED_DTYPES = tuple(COMPRESSED)
_BEFORE = ("base", "weights", "mllm_weight", "variant")  # a method's own options come after these
_SELECTING = ("modules", "layers", "map_file", "on_mismatch")


def chain(*decorators: Decorator) -> Decorator:
    """Several click decorators as one, first to last as they appear in the help."""

    def apply(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def click_option(
    option: Option,
    default: Any = None,
    shown: str = "",
    choices: tuple[str, ...] = (),
    callback: Any = None,
) -> Decorator:
    """A row of a table as an option of click.

    Args:
        option: the row.
        default: its value where it is not given; None: the recipe decides.
        shown: what the help says after the row's sentence.
        choices: in the place of the row's.
        callback: click's, that parses the value.
    """
    name = f"--{option.long_name}"
    help = f"{option.help}{f'  [{shown}]' if shown else ''}"
    more: dict[str, Any] = {"help": help, "default": default, "callback": callback}
    if default is not None and option.kind is not bool:
        more |= {"show_default": True}
    if option.kind is bool:
        is_switch = default is False
        flag = name if is_switch else f"{name}/--no-{option.long_name}"
        return click.option(flag, option.name, is_flag=True, **more)
    kinds = {float: click.FLOAT, int: click.INT, Path: PATH, str: click.STRING}
    choices = choices or option.choices
    kind = click.Choice(choices) if choices else kinds[option.kind]
    metavar = option.metavar or None
    return click.option(
        name, option.name, type=kind, metavar=metavar, multiple=option.is_many, **more
    )


def recipe(method: str, *names: str) -> Decorator:
    """Options of a recipe of "prior" or of a merge method: those named, in this order."""
    rows = recipe_options(method)
    dtypes = (*OUTPUT_DTYPES, *(() if method in METHODS else COMPRESSED_DTYPES))
    return chain(
        *(
            click_option(option, default, choices=dtypes if name == "dtype" else ())
            for name, (option, default) in ((name, rows[name]) for name in names)
        )
    )


def selection(method: str) -> Decorator:
    """Which tensors: modules, layers, map, mismatch."""
    return recipe(method, *_SELECTING)


def writing(method: str) -> Decorator:
    """How the output is written."""
    own = ("through", "rank", "norm") if method == PRIOR else ("round", "round_seed")
    names = ("dtype", *own, "max_shard_size", "allow_nonfinite")
    return chain(output_option, recipe(method, *names))


def of_method(method: Method) -> Decorator:
    """Base, weights, variant and the method's own options, with what holds in which variant."""
    rows = recipe_options(method.name)
    found = []
    if method.base != "none":
        also = "" if method.base == "required" else "with it the method works on task vectors"
        found.append(click_option(rows["base"][0], shown=also))
    for name, key in (("weights", "weight"), ("mllm_weight", "mllm_weight")):
        if any(method.takes(key, variant) for variant in method.variants):
            found.append(click_option(rows[name][0], shown=_default(method, key)))
    if len(method.variants) > 1:
        notes = "".join(f"; {name}: {text}" for name, text in method.notes.items())
        shown = f"default: {method.variants[0]}{notes}"
        found.append(click_option(rows["variant"][0], shown=shown, choices=method.variants))
    found += [
        click_option(method.option(name), shown=_default(method, name))
        for name in method.option_names()
        if not method.option(name).is_internal
    ]
    return chain(*found)


def of_step(name: str) -> Decorator:
    """The options of a method's spectral step."""
    method = METHODS[name]
    return chain(*(click_option(method.option(n), shown=_default(method, n)) for n in SPECTRAL))


def _default(method: Method, name: str) -> str:
    """The default of an option, and the variants that have it where not all do."""
    having = [variant for variant in method.variants if method.takes(name, variant)]
    by_value: dict[str, list[str]] = {}
    for variant in having:
        if name in method.defaults[variant]:
            by_value.setdefault(show(method.defaults[variant][name]), []).append(variant)
    given = [variant for variant in having if name not in method.defaults[variant]]
    parts = [f"{value} in {' and '.join(variants)}" for value, variants in by_value.items()]
    if len(by_value) == 1 and not given:
        parts = list(by_value)
    text = f"default: {', '.join(parts)}" if parts else ""
    if given:
        where = f" in {' and '.join(given)}" if parts else ""
        text += f"{'; ' if parts else ''}must be given{where}"
    if len(having) < len(method.variants):
        text = f"with --variant {' or '.join(having)} only; {text}"
    return text


def show(value: object) -> str:
    """A default in the help: 0.1, true, tensor, none."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def every() -> Decorator:
    """Every option that shapes a recipe, of any method, without a default: `run` overrides."""
    dtypes = (*OUTPUT_DTYPES, *COMPRESSED_DTYPES)
    rows = recipe_options("")
    found = {
        name: click_option(row, choices=dtypes if name == "dtype" else ())
        for name, (row, _) in rows.items()
    }
    taken = {name for method in METHODS.values() for name in method.option_names()}
    own = [click_option(OPTIONS[n]) for n in sorted(taken) if not OPTIONS[n].is_internal]
    shared = {OPTIONS[n].long_name for n in taken} & {row.long_name for row, _ in rows.values()}
    found = {n: o for n, o in found.items() if rows[n][0].long_name not in shared}
    first = [found.pop(name) for name in _BEFORE]
    return chain(*first, *own, *found.values())


def values_of(method: Method, values: dict[str, Any]) -> dict[str, Any]:
    """A command's keyword arguments as those of `Recipe`: the method's own under `options`."""
    own = {name: values.pop(name) for name in method.option_names() if name in values}
    values["options"] = {name: value for name, value in own.items() if value is not None}
    return values


config = click.option(
    "--config",
    type=PATH,
    is_eager=True,
    expose_value=False,
    callback=config_file.load,
    help="YAML with any of these options; a flag overrides it.",
)
print_config = click.option(
    "--print-config",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=config_file.remember_print,
    help="Print this call as a recipe for drift-merge run, and stop.",
)
methods_file = click.option(
    "--methods", "methods_file", type=PATH, help="Python file with merge methods of your own."
)
output_option = click.option(
    "-o",
    "--output",
    type=PATH,
    callback=config_file.require_output,
    help="Directory to create.  [required]",
)
shard_size_option = recipe("", "max_shard_size")
rank_options = recipe(PRIOR, "rank", "norm")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Only the answer and warnings.")
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=own_cores,
    show_default="cores",
    metavar="N",
    help="Workers.",
)

streaming = chain(
    click.option(
        "--stream",
        is_flag=True,
        help="Read Hub sources shard by shard: fetch, use, delete.",
    ),
    click.option(
        "--cache-limit",
        default=DEFAULT_CACHE_SIZE,
        show_default=True,
        metavar="SIZE",
        help="With --stream: disk for fetched shards.",
    ),
)

device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="NAME",
    callback=check_device,
    help="Where to compute: cpu, cuda, cuda:N.",
)
interpreter = click.option(
    "--python",
    metavar="PATH",
    help="Interpreter that has what it needs.  [default: this one]",
)
overwrite_option = click.option(
    "--overwrite",
    is_flag=True,
    callback=how_to_overwrite,
    help="Replace OUT after success.",
)

running = chain(
    device_option,
    threads_option,
    overwrite_option,
    click.option("-n", "--dry-run", is_flag=True, help="Stop at the plan and print it."),
    click.option("-v", "--verbose", is_flag=True, help="With --dry-run: one line per tensor."),
    json_option,
    quiet_option,
)


scoring = chain(
    click.option(
        "--metric",
        multiple=True,
        metavar="[NAME=]PLACE",
        help="Where the score is: FILE:path.in.json, stdout:path, or stdout for the last number "
        "printed.  [default: stdout]",
    ),
    click.option(
        "--items",
        multiple=True,
        metavar="[NAME=]PLACE",
        help="Where the scores of the items are, for paired intervals: FILE.jsonl:field.",
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="Of one evaluation.",
    ),
)


sampling = chain(
    click.option(
        "--sample",
        type=click.IntRange(min=1),
        default=8,
        show_default=True,
        metavar="N",
        help="Tensors to compute again.",
    ),
    click.option(
        "--seed",
        type=int,
        default=None,
        metavar="N",
        help="Of the sample; default a new one, which is printed.",
    ),
)
