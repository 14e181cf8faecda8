"""`--map FILE`: a YAML of patterns for layouts that the structural rule cannot read.

    reasoner:
      tower: transformer            # optional: the prefix that holds the list of layers
      "transformer.h.{layer}.attn.out.weight": "layers.{layer}.self_attn.o_proj.weight"
      "transformer.h.{layer}.rope.*": null       # not a part of the language tower
    mllm:
      tower: thinker.model

Left of the colon stands a stored name (wrappers stripped), right its canonical name.
`{layer}` and `{expert}` are numbers, `*` is any text; the right side uses them again, each
`*` in its turn. The first pattern that matches a whole name decides; names without a
pattern follow the structural rule.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from drift_merge.errors import RecipeError

if TYPE_CHECKING:
    import yaml

SIDES = ("reasoner", "mllm")
EXAMPLE = """\
reasoner:
  "transformer.h.{layer}.attn.out.weight": "layers.{layer}.self_attn.o_proj.weight"
mllm:
  tower: language_model.model"""

_TOKEN = re.compile(r"\{(\w*)\}|\*")
_CANONICAL = re.compile(r"(?:layers\.(?:\d+|\{layer\})|embed_tokens|norm|lm_head)\.")


@dataclass(frozen=True, slots=True)
class NameRule:
    """One pattern for stored names and what it makes of them."""

    pattern: str  # as written
    expression: re.Pattern[str]
    target: str | None  # canonical name with placeholders; None: outside the tower

    def rename(self, name: str) -> str | None:
        """Return the canonical name of a `name` that matches; None if it is left out."""
        found = self.expression.fullmatch(name)
        if found is None:
            raise ValueError(f"{name} does not match {self.pattern}")
        if self.target is None:
            return None
        stars = iter(range(self.pattern.count("*")))

        def fill(token: re.Match[str]) -> str:
            return str(found[token[1] or f"star{next(stars)}"])

        return _TOKEN.sub(fill, self.target)


@dataclass(frozen=True, slots=True)
class SideMap:
    """What a map says of one model."""

    tower: str | None = None  # stored prefix of the language tower
    rules: tuple[NameRule, ...] = ()

    def find(self, name: str) -> NameRule | None:
        """Return the first rule whose pattern matches the whole name."""
        return next((rule for rule in self.rules if rule.expression.fullmatch(name)), None)


@dataclass(frozen=True, slots=True)
class NameMap:
    """A map file as read."""

    reasoner: SideMap = SideMap()
    mllm: SideMap = SideMap()


def read_name_map(path: Path | str) -> NameMap:
    """Read a map file.

    Raises:
        RecipeError: if the file cannot be read, is not the YAML described above, has an
            unknown key (the nearest one is named) or a pattern that cannot work.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"the map {path} cannot be read: {error}.", remedy=f"A map looks so:\n{EXAMPLE}"
        ) from error
    return parse_name_map(text, where=str(path))


def parse_name_map(text: str, *, where: str = "map") -> NameMap:
    """Read a map from its text; `where` names it in messages. Errors as `read_name_map`."""
    import yaml  # here: most runs have no map

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"{where} is not YAML: {error}", remedy=f"A map looks so:\n{EXAMPLE}"
        ) from error
    if root is None:
        return NameMap()
    sides: dict[str, SideMap] = {}
    for key, line, value in _items(root, where):
        if key not in SIDES:
            raise _unknown(key, SIDES, f"{where}, line {line}")
        sides[key] = _parse_side(value, where)
    return NameMap(**sides)


def name_rule(pattern: str, target: str | None) -> NameRule:
    """One rule of a map. Errors as `read_name_map`."""
    return _parse_rule(pattern, target, "map")


def write_name_map(name_map: NameMap) -> str:
    """The text of a map file; `parse_name_map` of it gives the map again."""
    lines = []
    for side in SIDES:
        said: SideMap = getattr(name_map, side)
        if said == SideMap():
            continue
        lines.append(f"{side}:")
        if said.tower is not None:
            lines.append(f"  tower: {said.tower or json.dumps('')}")
        for rule in said.rules:
            target = "null" if rule.target is None else json.dumps(rule.target)
            lines.append(f"  {json.dumps(rule.pattern)}: {target}")
    return "\n".join(lines)


def _items(node: "yaml.Node", where: str) -> Iterator[tuple[str, int, "yaml.Node"]]:
    """Yield key, line and value of a mapping; refuse anything else and repeated keys."""
    import yaml

    line = node.start_mark.line + 1
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            f"{where}, line {line}: expected names with values.",
            remedy=f"A map looks so:\n{EXAMPLE}",
        )
    seen: set[str] = set()
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.value in seen:
            raise RecipeError(
                f"{where}, line {line}: {key.value!r} stands there twice.",
                remedy="Keep one of the two lines.",
            )
        seen.add(key.value)
        yield str(key.value), line, value


def _parse_side(node: "yaml.Node", where: str) -> SideMap:
    tower: str | None = None
    rules: list[NameRule] = []
    for key, line, value in _items(node, where):
        target = _text(value, f"{where}, line {line}")
        if key == "tower":
            tower = target
        elif "." in key or _TOKEN.search(key):
            rules.append(_parse_rule(key, target, f"{where}, line {line}"))
        else:
            raise _unknown(key, ("tower",), f"{where}, line {line}")
    return SideMap(tower, tuple(rules))


def _text(node: "yaml.Node", where: str) -> str | None:
    if node.tag == "tag:yaml.org,2002:null":
        return None
    if isinstance(node.value, str):
        return node.value
    raise RecipeError(f"{where}: expected one name or null.", remedy=f"A map looks so:\n{EXAMPLE}")


def _parse_rule(pattern: str, target: str | None, where: str) -> NameRule:
    stars = iter(range(len(pattern)))
    pieces, position = [], 0
    for token in _TOKEN.finditer(pattern):
        pieces.append(re.escape(pattern[position : token.start()]))
        if token[0] == "*":
            pieces.append(f"(?P<star{next(stars)}>.*)")
        elif token[1] in ("layer", "expert") and f"{{{token[1]}}}" not in pattern[: token.start()]:
            pieces.append(rf"(?P<{token[1]}>\d+)")
        else:
            raise RecipeError(
                f"{where}: {token[0]} in {pattern!r} cannot be used here.",
                remedy="Placeholders are {layer}, {expert} (each once) and *.",
            )
        position = token.end()
    pieces.append(re.escape(pattern[position:]))
    if target is not None:
        _check_target(pattern, target, where)
    return NameRule(pattern, re.compile("".join(pieces)), target)


def _check_target(pattern: str, target: str, where: str) -> None:
    if not _CANONICAL.match(target):
        raise RecipeError(
            f"{where}: {target!r} is not a canonical name.",
            remedy="Canonical names start with layers.{layer}., embed_tokens., norm. or lm_head.;"
            " write null for a tensor outside the language tower.",
        )
    have, want = ([token[0] for token in _TOKEN.finditer(text)] for text in (pattern, target))
    for placeholder in want:
        if want.count(placeholder) > have.count(placeholder):
            raise RecipeError(
                f"{where}: {target!r} uses {placeholder}, which {pattern!r} does not give.",
                remedy=f"Write {placeholder} in the pattern too.",
            )


def _unknown(key: str, choices: tuple[str, ...], where: str) -> RecipeError:
    near = get_close_matches(key, choices, n=1, cutoff=0.0)
    return RecipeError(
        f"{where}: unknown key {key!r}; the nearest is {near[0] if near else choices[0]!r}.",
        remedy=f"Keys here: {', '.join(choices)}. A map looks so:\n{EXAMPLE}",
    )
