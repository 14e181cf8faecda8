"""Pieces of Markdown that the cards of priors and merges share."""

from typing import Any


def where(source: dict[str, Any]) -> str:
    """Where a source of a manifest is: Hub id and commit, or its local name."""
    if source["repo_id"]:
        return f"{source['repo_id']} at `{source['revision']}`"
    return f"{source['label']} (local)"


def lineage_section(manifest: dict[str, Any]) -> str:
    """A section with the warnings and errors of a manifest, or nothing."""
    found = [f for f in manifest["findings"] if f["severity"] != "info"]
    lines = [f"- {f['severity'].capitalize()} `{f['code']}`: {f['message']}" for f in found]
    return "\n## Lineage\n\n" + "\n".join(lines) + "\n" if lines else ""
