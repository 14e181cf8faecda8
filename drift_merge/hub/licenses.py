"""Licenses of the parents, rolled up: read from their cards, compared, and named in ours.

Nothing here is legal advice: what the parents' cards declare is repeated, and where they differ
or say nothing, that is said.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drift_merge.errors import DriftMergeError, RecipeError
from drift_merge.storage import fingerprints
from drift_merge.storage.hub import models
from drift_merge.storage.hub.faults import LIBRARY, endpoint, is_offline, patiently
from drift_merge.storage.sources import Source

OTHER, UNKNOWN = "other", "unknown"
FILE = "LICENSE.md"  # the name that `license_link` of a card may have
_TEXTS = re.compile(r"(LICENSE|LICENCE|NOTICE|COPYING)([-_.][\w.-]*)?", re.IGNORECASE)
_MAX_TEXT_BYTES = 200_000
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True, slots=True)
class License:
    """What is known of the license of one parent."""

    label: str  # the parent, as cards show it
    name: str  # the Hub's identifier, the name behind `other`, or UNKNOWN
    is_other: bool = False  # `name` is not an identifier of the Hub
    link: str = ""  # to the text, if the parent's card has one
    why: str = ""  # why it is unknown
    texts: Mapping[str, str] = field(default_factory=dict)  # license files by name


@dataclass(frozen=True, slots=True)
class RolledUp:
    """The licenses of all parents, and what follows for the artifact."""

    parents: tuple[License, ...]
    front: Mapping[str, str]  # license, license_name and license_link of the card
    remarks: tuple[str, ...]  # a conflict, an unknown license, or one given by the user

    def section(self) -> str:
        """The section of the card."""
        lines = [*self.remarks, ""] if self.remarks else []
        lines += [f"- {p.label}: {_shown(p)}" for p in self.parents]
        return (
            "\n## Licenses\n\n" + "\n".join(lines) + f"\n\nTexts, where there are any: `{FILE}`.\n"
        )

    def file(self) -> bytes:
        """The content of LICENSE.md: who declares what, and the parents' own license files."""
        lines = ["# Licenses of the parents", "", *self.remarks, ""]
        for parent in self.parents:
            lines += [f"## {parent.label}", "", _shown(parent), ""]
            for name, text in parent.texts.items():
                lines += [f"### {name}", "", *(f"    {line}" for line in text.splitlines()), ""]
        return "\n".join(lines).encode()


def _shown(parent: License) -> str:
    if parent.name == UNKNOWN:
        return f"not known ({parent.why})"
    return f"`{parent.name}`" + (f", {parent.link}" if parent.link else "")


def roll_up(parents: Sequence[License], given: str | None = None) -> RolledUp:
    """One license for the artifact, or the statement that there is none.

    Args:
        parents: one entry per source; the same source may come twice.
        given: what the user says the license is; it wins, and remarks still tell the rest.

    Raises:
        RecipeError: `given` has not the form of a license identifier of the Hub.
    """
    distinct = tuple({parent.label: parent for parent in parents}.values())
    names = sorted({parent.name for parent in distinct})
    remarks = []
    if UNKNOWN in names:
        unknown = ", ".join(p.label for p in distinct if p.name == UNKNOWN)
        remarks.append(f"The license of {unknown} is not known.")
    known = [parent for parent in distinct if parent.name != UNKNOWN]
    if len({parent.name for parent in known}) > 1:
        listed = ", ".join(f"{p.label} is under {p.name}" for p in known)
        remarks.append(f"The licenses of the parents differ: {listed}. Keep to each of them.")
    if given is not None:
        _check_given(given)
        remarks.insert(0, f"The one who published this states the license {given}.")
        return RolledUp(distinct, {"license": given}, tuple(remarks))
    return RolledUp(distinct, _front(distinct, names), tuple(remarks))


def _front(parents: Sequence[License], names: Sequence[str]) -> dict[str, str]:
    if UNKNOWN in names:
        return {"license": UNKNOWN}
    if len(names) == 1 and not parents[0].is_other:
        return {"license": names[0]}
    name = re.sub(r"[^a-z0-9.]+", "-", "-and-".join(names).lower()).strip("-")
    return {"license": OTHER, "license_name": name, "license_link": FILE}


def _check_given(given: str) -> None:
    if _IDENTIFIER.fullmatch(given) is None or given == OTHER:
        raise RecipeError(
            f"--license is {given!r}; expected an identifier such as apache-2.0.",
            remedy="They are listed at https://huggingface.co/docs/hub/repositories-licenses",
        )


def read_license(source: Mapping[str, Any]) -> License:
    """The license that a source of a manifest declares; UNKNOWN with the reason if it does not.

    Args:
        source: an entry of a manifest's `sources`; a local one is looked up where it was.
    """
    if source["repo_id"]:
        pinned = Source(
            given=source["source"],
            kind="hub",
            repo_id=source["repo_id"],
            revision=source["revision"],
        )
        return _on_the_hub(pinned)
    return _local(source)


def _on_the_hub(source: Source) -> License:
    from huggingface_hub import HfApi

    label = str(source.repo_id)
    if is_offline():
        return License(label, UNKNOWN, why="the Hub was not asked: offline")

    def ask() -> Any:
        return HfApi(library_name=LIBRARY).model_info(label, revision=source.revision)

    try:
        info = patiently(ask, source)
    except DriftMergeError as error:
        return License(label, UNKNOWN, why=error.message.rstrip("."))
    card = info.card_data.to_dict() if info.card_data is not None else {}
    page = f"{endpoint()}/{label}/blob/{source.revision}"
    names = [sibling.rfilename for sibling in info.siblings or []]
    texts = {name: _fetched(source, name) for name in names if _TEXTS.fullmatch(name)}
    return _declared(label, card, {n: t for n, t in texts.items() if t}, page)


def _fetched(source: Source, name: str) -> str:
    """A license file of a parent, or nothing where it may not be read."""
    try:
        return _text(models.fetch_file(source, name))
    except DriftMergeError:
        return ""


def _text(path: Path) -> str:
    if path.stat().st_size > _MAX_TEXT_BYTES:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _local(source: Mapping[str, Any]) -> License:
    label = f"{source['label']} (local)"
    directory = _directory(source)
    if directory is None:
        return License(label, UNKNOWN, why="the directory is not here, or holds another model now")
    texts = {
        path.name: _text(path)
        for path in sorted(directory.iterdir())
        if path.is_file() and _TEXTS.fullmatch(path.name)
    }
    card = directory / "README.md"
    front = _front_matter(_text(card)) if card.is_file() else {}
    return _declared(label, front, {n: t for n, t in texts.items() if t}, "")


def _directory(source: Mapping[str, Any]) -> Path | None:
    """Where a local source is, if the model there is still the one that was read."""
    path = Path(os.path.expanduser(source["source"]))
    directory = path if path.is_dir() else path.parent
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    return directory if fingerprints.of_json(config) == source["config"] else None


def _front_matter(card: str) -> dict[str, Any]:
    import yaml

    found = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    try:
        front = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        front = {}
    return front if isinstance(front, dict) else {}


def _declared(label: str, card: Mapping[str, Any], texts: Mapping[str, str], page: str) -> License:
    """The license that a card declares.

    Args:
        label: the parent.
        card: its front matter.
        texts: its license files.
        page: address of its files, to which links of the card are relative; "" where local.
    """
    declared = card.get("license")
    if isinstance(declared, list):
        declared = declared[0] if len(declared) == 1 else None
    if not isinstance(declared, str) or declared == UNKNOWN:
        return License(label, UNKNOWN, why="its card declares none", texts=texts)
    link = str(card.get("license_link") or "")
    if link and "://" not in link:
        link = f"{page}/{link}" if page else ""
    if declared != OTHER:
        return License(label, declared, link=link, texts=texts)
    name = card.get("license_name")
    if not isinstance(name, str) or not name:
        return License(label, UNKNOWN, why="its card says other", link=link, texts=texts)
    return License(label, name, is_other=True, link=link, texts=texts)
