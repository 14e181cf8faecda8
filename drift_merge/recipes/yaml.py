"""YAML as recipes are written in: read with the line of every key, and written back.

Numbers stay as they are written, since YAML 1.1 reads `layers: 4:28` as 268 and `1e-4` as text;
only true, false and null are understood here.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drift_merge.errors import RecipeError

_EXAMPLES = "See configs/ for working examples."
_KEPT = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")


class Entries(dict[str, Any]):
    """A mapping of a YAML file that remembers the line of each of its keys."""

    lines: dict[str, int]  # 1-based, by key

    def __init__(self) -> None:
        super().__init__()
        self.lines = {}


def read_mapping(file: Path) -> Entries:
    """Read a YAML or JSON file that holds a mapping.

    Returns:
        Every nested mapping is an `Entries` too; scalars are str, bool or None.

    Raises:
        RecipeError: unreadable, no mapping, or a key is there twice.
    """
    import yaml

    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _loader())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(f"{file} cannot be read as YAML: {error}", remedy=_EXAMPLES) from error
    except RecipeError as error:
        raise RecipeError(f"{file}, {error.message}", remedy=error.remedy) from error
    if not isinstance(values, Entries):
        raise RecipeError(f"{file} is not a mapping of options to values.", remedy=_EXAMPLES)
    return values


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if the file holds something else, such as YAML."""
    try:
        with file.open("rb") as opened:
            if opened.read(64).lstrip()[:1] != b"{":
                return None
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_mapping(values: Mapping[str, Any]) -> str:
    """The YAML of plain data, in its order."""
    import yaml

    text: str = yaml.safe_dump(
        dict(values), sort_keys=False, default_flow_style=False, allow_unicode=True, width=10**6
    )
    return text


@functools.cache
def _loader() -> Any:
    """The loader; made when first used, since importing yaml takes time that help must not."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe, with lines, and without a guess at numbers and dates."""

    def mapping(loader: Loader, node: yaml.MappingNode) -> Entries:
        _refuse_repeated([key for key, _ in node.value])
        loader.flatten_mapping(node)
        entries = Entries()
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node, deep=True))
            entries[key] = loader.construct_object(value_node, deep=True)
            entries.lines[key] = key_node.start_mark.line + 1
        return entries

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag in _KEPT]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    return Loader


def _refuse_repeated(keys: Sequence[Any]) -> None:
    """Refuse a mapping that has a key twice; YAML would take the last one."""
    first: dict[str, int] = {}
    for node in keys:
        line = node.start_mark.line + 1
        if str(node.value) in first:
            raise RecipeError(
                f"line {line}: {node.value!r} is there already, in line {first[node.value]}.",
                remedy="Keep one of them.",
            )
        first[str(node.value)] = line
