"""mergekit's YAML read: method, base, models and their settings; what is not supported refused."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from drift_merge.errors import nearest
from drift_merge.recipes.mergekit.parameters import Parameters, Scopes
from drift_merge.recipes.yaml import Entries

Find = Callable[[str], str]  # a source as written -> as it is found from here

_TOP = (
    *("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer"),
)
_REFUSED = {
    "modules": (
        "only the language tower is merged",
        "Say what to merge with `models`; everything else stays the MLLM's.",
    ),
    "chat_template": (
        "the output keeps the MLLM's chat template",
        "Take the key out, and change the file in the output if you need to.",
    ),
}


@dataclass(frozen=True, slots=True)
class Document:
    """What a file of mergekit says, its sources found."""

    reader: Parameters
    root: Entries
    base: str | None
    models: dict[str, Scopes]  # in order; the settings of each, the first one wins
    scopes: Scopes  # of parameters that are not of one model
    num_layers: int | None  # that the slice takes; None: all

    @property
    def method(self) -> str:
        """As mergekit calls it."""
        return str(self.root["merge_method"])

    @property
    def merged(self) -> list[str]:
        """The models without the base."""
        return [model for model in self.models if model != self.base]

    def settings(self, model: str) -> Scopes:
        """The settings of a model; the global ones for a base that is not among the models."""
        return self.models.get(model, self.scopes)

    def refuse(self, key: str, why: str, remedy: str) -> Exception:
        """The error for a top-level key."""
        return self.reader.refuse(self.root.lines.get(key), key, why, remedy)


def read_document(root: Entries, reader: Parameters, find: Find) -> Document:
    """Read the top level of mergekit's YAML.

    Args:
        root: the file.
        reader: of its parameters.
        find: where a source is that the file names.

    Raises:
        RecipeError: a key is unknown or not supported.
    """
    for key, line in root.lines.items():
        if key in _REFUSED:
            raise reader.refuse(line, key, *_REFUSED[key])
        if key not in _TOP:
            raise reader.refuse(
                line, key, f"unknown key.{nearest(key, _TOP)}".rstrip("."), f"Known: {_TOP}"
            )
    general = [_entries(reader, root, "parameters")]
    base, num_layers, scopes = root.get("base_model"), None, general
    if ("slices" in root) == ("models" in root):
        raise reader.refuse(None, "models", "exactly one of models and slices is needed", "Add it.")
    if "slices" in root:
        entry = _only_slice(reader, root)
        listed, key = _list(reader, entry, "sources"), "sources"
        num_layers = _whole_range(reader, listed)
        scopes = [_entries(reader, entry, "parameters"), *general]
        base = entry.get("base_model", base)
    else:
        listed, key = _list(reader, root, "models"), "models"
    models: dict[str, Scopes] = {}
    for item in listed:
        name = find(_source(reader, item, "model", item.get("model")))
        if name in models:
            raise reader.refuse(item.lines["model"], key, f"{name} is there twice", "Keep one.")
        models[name] = [_entries(reader, item, "parameters"), *scopes]
    origin = None if base is None else find(_source(reader, root, "base_model", base))
    return Document(reader, root, origin, models, scopes, num_layers)


def _entries(reader: Parameters, entry: Entries, key: str) -> Entries:
    value = entry.get(key)
    if value is not None and not isinstance(value, Entries):
        raise reader.refuse(entry.lines[key], key, "expected names and values", "Write a mapping.")
    return value if value is not None else Entries()


def _list(reader: Parameters, entry: Entries, key: str) -> list[Entries]:
    items = entry.get(key)
    if not isinstance(items, list) or not items or not all(isinstance(i, Entries) for i in items):
        raise reader.refuse(
            entry.lines.get(key), key, "expected a list of entries", "Write - model: SOURCE."
        )
    for item in items:
        _only(reader, item, ("model", "parameters", "layer_range"), key)
    return items


def _only(reader: Parameters, item: Entries, known: tuple[str, ...], key: str) -> None:
    for name, line in item.lines.items():
        if name not in known:
            why = f"it has the unknown key {name!r}.{nearest(name, known)}".rstrip(".")
            raise reader.refuse(line, key, why, f"Known there: {', '.join(known)}.")


def _only_slice(reader: Parameters, root: Entries) -> Entries:
    """The one slice of a file that merges all layers; anything else makes another model."""
    slices, line = root["slices"], root.lines["slices"]
    if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], Entries):
        raise reader.refuse(
            line,
            "slices",
            "several slices stack layers into a model of another depth, which is not an MLLM's",
            "Merge all layers with `models`; for some of them use --layers or a gradient.",
        )
    _only(reader, slices[0], ("sources", "base_model", "parameters"), "slices")
    return slices[0]


def _whole_range(reader: Parameters, sources: list[Entries]) -> int:
    """The number of layers of a slice whose sources all begin at layer 0."""
    ranges = []
    for source in sources:
        line = source.lines.get("layer_range")
        try:
            first, last = (int(str(bound)) for bound in source["layer_range"])
        except (KeyError, TypeError, ValueError) as error:
            raise reader.refuse(
                line, "layer_range", "expected [0, N]", "Write the number of layers."
            ) from error
        ranges.append((first, last, line))
    first, last, _ = ranges[0]
    for other in ranges:
        if other[:2] != (0, last):
            raise reader.refuse(
                other[2],
                "layer_range",
                f"[{other[0]}, {other[1]}] shifts or leaves out layers",
                "Use `models`, and --layers for some of the layers.",
            )
    return last


def _source(reader: Parameters, entry: Entries, key: str, value: Any) -> str:
    """A source of mergekit's as one of ours: a path, org/name, org/name@revision."""
    line = entry.lines.get(key)
    if isinstance(value, Entries):
        if value.get("lora") or value.get("override_architecture"):
            raise reader.refuse(line, key, "a LoRA or another architecture", _NO_LORA)
        inner = value.get("model", value)
        if isinstance(inner, Entries):
            revision = inner.get("revision")
            return f"{inner.get('path')}@{revision}" if revision else str(inner.get("path"))
        value = inner
    if not isinstance(value, str) or not value:
        raise reader.refuse(line, key, f"{value!r} is no source", "Write a path or org/name.")
    if "+" in value:
        raise reader.refuse(line, key, f"{value!r} adds a LoRA", _NO_LORA)
    return value


_NO_LORA = "Merge the adapter into its model first, and name the result."
