"""The model card of a merged checkpoint: what it is, of what, by which formula."""

from typing import Any

from drift_merge.artifacts.card import (
    Published,
    argument,
    front_matter,
    lineage_section,
    picture_line,
    where,
)
from drift_merge.storage.sizes import in_words


def merge_card(manifest: dict[str, Any], published: Published | None = None) -> bytes:
    """`README.md` of a merge, from its manifest alone.

    Args:
        manifest: of the merge.
        published: where it is on the Hub, and under which license; None for a local one.
    """
    sources = manifest["sources"]
    mllm, reasoners = sources["mllm"], sources["reasoners"]
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model_relation": "merge",
        "tags": ["merge", manifest["method"], "drift-merge"],
    }
    name = published.repo_id.rpartition("/")[2] if published else "merged"
    if manifest.get("evaluations"):
        front["model-index"] = _model_index(manifest, name)
    names = " + ".join(s["label"] for s in reasoners)
    body = f"""
# {mllm["label"]} with {names}

The multimodal model **{mllm["label"]}** whose language tower has been merged with **{names}**.
Everything outside the selected modules, the vision tower included, is the multimodal model's,
byte for byte.

    {manifest["formula"]}

| role | source | weight | layout |
|---|---|---|---|
{_rows(sources)}

{_facts(manifest)}
{picture_line(published)}{lineage_section(manifest)}{_evaluations(manifest)}
## Use and check

{_use(manifest, published.repo_id if published else "DIR")}
{published.licenses if published else ""}
`drift_merge.json` lists every tensor with its method, weight and fingerprint, and is itself a
recipe. Made with {manifest["tool"]["name"]} {manifest["tool"]["version"]}. Merging a text LLM
into a multimodal one: [arXiv:2505.05464](https://arxiv.org/abs/2505.05464); why it can hurt, and
what to do then: [arXiv:2510.15050](https://arxiv.org/abs/2510.15050).
"""
    return (front_matter(published, front, [mllm, *reasoners]) + body).encode()


def _rows(sources: dict[str, Any]) -> str:
    listed = [("mllm", sources["mllm"]), *(("reasoner", s) for s in sources["reasoners"])]
    listed += [("base", sources["base"])] if "base" in sources else []
    return "\n".join(
        f"| {role} | {where(source)} | {show_weight(source.get('weight'))} | `{source['layout']}` |"
        for role, source in listed
    )


def _facts(manifest: dict[str, Any]) -> str:
    parameters = manifest["parameters"]
    counts = ", ".join(f"{n:,} {method}" for method, n in manifest["counts"].items())
    coverage = "; ".join(
        f"{c['matched']:,} of {c['selected']:,} selected tensors matched"
        for c in manifest["coverage"]
    )
    kept = manifest["change_kept"]
    lines = [
        f"- Method: `{manifest['method']}` ({parameters['variant']}){_options(parameters)}",
        f"- Modules: `{parameters['modules']}`",
        f"- Coverage: {coverage}",
        f"- Tensors: {counts}; {in_words(manifest['size_bytes'])}",
    ]
    if kept is not None:
        lines.append(f"- The output's dtype keeps {kept:.0%} of the change (measured on a sample)")
    return "\n".join(lines)


def _use(manifest: dict[str, Any], place: str) -> str:
    sources = manifest["sources"]
    roles = [f"--reasoner {argument(source)}" for source in sources["reasoners"]]
    roles.append(f"--mllm {argument(sources['mllm'])}")
    roles += [f"--base {argument(sources['base'])}"] if "base" in sources else []
    pulled = place.rpartition("/")[2]
    pull = f"drift-merge pull {place} -o {pulled}\n" if "/" in place else ""
    return f"""```python
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("{place}", dtype="auto")
```

```sh
{pull}drift-merge verify {pulled} {" ".join(roles)}
drift-merge run {pulled}/drift_merge.json -o again     # the same bytes
```"""


def _evaluations(manifest: dict[str, Any]) -> str:
    """A section with the evaluations that the manifest has, or nothing."""
    rows = []
    for evaluation in manifest.get("evaluations", []):
        for row in evaluation["results"]:
            paired = row["paired"]
            difference = f"{row['difference']:+.4g}"
            if paired is not None:
                difference += f" [{paired['low']:+.3g}, {paired['high']:+.3g}]"
                difference += ", within noise" if paired["is_noise"] else ""
            task = f"{row['task']} ({row['metric']})"
            own = f"{row['value']:.4g} | {row['unmerged']:.4g} | {difference}"
            by, date = evaluation["settings"]["with"], evaluation["date"]
            rows.append(f"| {task} | {by.replace('|', '/')} | {own} | {date} |")
    if not rows:
        return ""
    head = "| task | by | this | unmerged | difference (95 %, paired) | date |"
    head += "\n|---|---|--:|--:|--:|---|"
    return "\n## Evaluation\n\n" + "\n".join([head, *rows]) + "\n"


def _model_index(manifest: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The results as the Hub's front matter has them."""
    results = [
        {
            "task": {"type": "image-text-to-text"},
            "dataset": {"name": row["task"], "type": row["task"]},
            "metrics": [{"type": row["metric"], "value": row["value"], "name": row["metric"]}],
        }
        for evaluation in manifest["evaluations"]
        for row in evaluation["results"]
    ]
    return [{"name": name, "results": results}]


def show_weight(weight: float | str | None) -> str:
    """A weight of a manifest for a table."""
    return f"{weight:g}" if isinstance(weight, float | int) else weight or ""


def _options(parameters: dict[str, Any]) -> str:
    options = parameters["options"]
    return "".join(f", {name} {value}" for name, value in options.items())
