"""Pieces of Markdown that the cards of priors and merges share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CITATION = """
## Citation

The method is that of DRIFT ([arXiv:2510.15050](https://arxiv.org/abs/2510.15050)):

```bibtex
@article{huang2025drift,
  title   = {Directional Reasoning Injection for Fine-Tuning MLLMs},
  author  = {Huang, Chao and Zhang, Zeliang and Liu, Jiang and Sun, Ximeng and Wu, Jialian and
             Yu, Xiaodong and Wang, Ze and Xu, Chenliang and Barsoum, Emad and Liu, Zicheng},
  journal = {arXiv preprint arXiv:2510.15050},
  year    = {2025}
}
```
"""


@dataclass(frozen=True, slots=True)
class Published:
    """What a card says beyond the manifest when the artifact is on the Hub."""

    repo_id: str  # "org/name"
    license: Mapping[str, str]  # of the front matter
    licenses: str  # the section
    picture: str = ""  # file name of heat maps that lie beside it; empty: there are none


def front_matter(
    published: Published | None, values: Mapping[str, Any], sources: Sequence[Mapping[str, Any]]
) -> str:
    """The YAML block on top of a card.

    Args:
        published: gives the license; None for a local artifact.
        values: entries in their order; empty ones are left out.
        sources: the parents; those that are on the Hub become `base_model`.
    """
    import yaml

    hub_ids = list(dict.fromkeys(str(s["repo_id"]) for s in sources if s["repo_id"]))
    listed = {**(published.license if published else {}), **values}
    relation = listed.pop("base_model_relation")
    if hub_ids:
        listed |= {"base_model": hub_ids, "base_model_relation": relation}
    order = ("license", "license_name", "license_link", "library_name", "pipeline_tag")
    keys = [*order, "base_model", "base_model_relation", "tags", "model-index"]
    block = {key: listed[key] for key in keys if listed.get(key)}
    return f"---\n{yaml.safe_dump(block, sort_keys=False)}---\n"


def where(source: Mapping[str, Any]) -> str:
    """Where a source of a manifest is: Hub id and commit, or its local name."""
    if source["repo_id"]:
        link = f"[{source['repo_id']}](https://huggingface.co/{source['repo_id']})"
        return f"{link} at `{source['revision']}`"
    return f"{source['label']} (local)"


def argument(source: Mapping[str, Any]) -> str:
    """A source for a command line: pinned where it is on the Hub, else its local name."""
    if source["repo_id"]:
        return f"{source['repo_id']}@{source['revision']}"
    return str(source["label"])


def picture_line(published: Published | None) -> str:
    """The picture beside a published card, or nothing."""
    if published is None or not published.picture:
        return ""
    return f"\n![By layer and module: relative norm and cosine]({published.picture})\n"


def lineage_section(manifest: Mapping[str, Any]) -> str:
    """A section with the warnings and errors of a manifest, or nothing."""
    found = [f for f in manifest["findings"] if f["severity"] != "info"]
    lines = [f"- {f['severity'].capitalize()} `{f['code']}`: {f['message']}" for f in found]
    return "\n## Lineage\n\n" + "\n".join(lines) + "\n" if lines else ""
