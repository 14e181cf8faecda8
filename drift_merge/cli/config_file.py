"""`--config FILE`: options from YAML. A flag overrides the file; an unknown key is an error.

Keys are the options' long names, plus `reasoner` and `mllm` for the arguments. One file serves
several commands: a key of another command is named on stderr and has no effect.
"""

from pathlib import Path
from typing import Any

import click

from drift_merge.cli.method_options import option_names
from drift_merge.errors import RecipeError

SOURCES = ("reasoner", "mllm")
PATHS = ("output", "map", "reasoner", "mllm", "base")  # relative to the file, where they exist
_META = "drift_merge.config"
# Every option that some command has; kept equal to the commands by a test.
KEYS = (
    *option_names(),
    *SOURCES,
    *("base", "modules", "layers", "map", "on-mismatch", "dtype", "max-shard-size"),
    *("device", "threads", "output", "overwrite", "allow-nonfinite", "weight"),
    *("dry-run", "json", "quiet", "verbose"),
)


def load(ctx: click.Context, _: click.Parameter, file: Path | None) -> None:
    """Click callback: read the file and make it the defaults of this command."""
    if file is None:
        return
    values = read_config_file(file)
    names = {name: parameter for parameter in ctx.command.params for name in _keys(parameter)}
    foreign = [key for key in values if key not in names and key not in SOURCES]
    if foreign:
        click.echo(f"{file}: no option of {ctx.info_name}, ignored: {', '.join(foreign)}", err=True)
    ctx.default_map = {
        str(names[key].name): _as_given(value, names[key])
        for key, value in values.items()
        if key in names
    }
    ctx.meta[_META] = {key: values[key] for key in SOURCES if key in values}


def read_config_file(file: Path) -> dict[str, Any]:
    """Read a YAML of options.

    Returns:
        By long option name, with paths made relative to the working directory.

    Raises:
        RecipeError: unreadable, not a mapping, or an unknown key (the nearest is named).
    """
    import yaml

    from drift_merge.engine.recipe import nearest

    class Loader(yaml.SafeLoader):
        """Leaves numbers as they are written: YAML 1.1 reads `layers: 4:28` as 268."""

    kept = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag in kept]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(
            f"{file} cannot be read as YAML: {error}", remedy="See configs/ for working examples."
        ) from error
    if not isinstance(values, dict):
        raise RecipeError(
            f"{file} is not a mapping of options to values.",
            remedy="See configs/ for working examples.",
        )
    values = {str(key).replace("_", "-"): value for key, value in values.items()}
    for key in values:
        if key not in KEYS:
            raise RecipeError(
                f"{file}: unknown key {key!r}.{nearest(key, KEYS)}",
                remedy=f"Known keys: {', '.join(KEYS)}",
            )
    return {key: _resolve(file, key, value) for key, value in values.items() if value is not None}


def _as_given(value: Any, parameter: click.Parameter) -> Any:
    """A value in the form the option takes: a list where it repeats, else text with commas."""
    if parameter.multiple:
        return value if isinstance(value, list) else [value]
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _resolve(file: Path, key: str, value: Any) -> Any:
    if isinstance(value, list) and key in PATHS:
        return [_resolve(file, key, item) for item in value]
    if key not in PATHS or not isinstance(value, str):
        return value
    beside = file.parent / Path(value).expanduser()
    return str(beside) if beside.exists() or key == "output" else value


def _keys(parameter: click.Parameter) -> list[str]:
    return [option.lstrip("-") for option in parameter.opts if option.startswith("--")]


def sources(ctx: click.Context, given: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The reasoners and the mllm, from the arguments or else from the config file.

    Raises:
        RecipeError: fewer than two sources are named.
    """
    if not given:
        config = ctx.meta.get(_META, {})
        reasoner = config.get("reasoner", ())
        reasoners = (reasoner,) if isinstance(reasoner, str) else tuple(reasoner)
        given = (*reasoners, *([config["mllm"]] if "mllm" in config else []))
    if len(given) < 2:
        got = f"only {given[0]!r}" if given else "nothing"
        raise RecipeError(
            f"two sources are needed, REASONER and MLLM; got {got}.",
            remedy=f"The text LLM comes first: {ctx.command_path} REASONER MLLM",
        )
    return tuple(map(str, given[:-1])), str(given[-1])
