"""The model card of a merged checkpoint: what it is, of what, by which formula."""

from typing import Any

from drift_merge.engine.cards import lineage_section, where


def merge_card(manifest: dict[str, Any]) -> bytes:
    """`README.md` of a merge, from its manifest alone."""
    sources, parameters = manifest["sources"], manifest["parameters"]
    mllm, reasoners = sources["mllm"], sources["reasoners"]
    hub_ids = [s["repo_id"] for s in (mllm, *reasoners) if s["repo_id"]]
    front = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    if hub_ids:
        front += ["base_model:", *(f"- {name}" for name in hub_ids)]
        front += ["base_model_relation: merge"]
    front += [f"tags: [merge, {manifest['method']}, drift-merge]", "---"]
    names = " + ".join(s["label"] for s in reasoners)
    listed = [("mllm", mllm), *(("reasoner", source) for source in reasoners)]
    listed += [("base", sources["base"])] if "base" in sources else []
    rows = [
        f"| {role} | {where(source)} | {show_weight(source.get('weight'))} | `{source['layout']}` |"
        for role, source in listed
    ]
    counts = ", ".join(f"{n:,} {method}" for method, n in manifest["counts"].items())
    coverage = "; ".join(
        f"{c['matched']:,} of {c['selected']:,} selected tensors matched"
        for c in manifest["coverage"]
    )
    body = f"""
# {mllm["label"]} with {names}

The multimodal model **{mllm["label"]}** whose language tower has been merged with **{names}**.
Everything outside the selected modules, the vision tower included, is the multimodal model's,
byte for byte.

    {manifest["formula"]}

| role | source | weight | layout |
|---|---|---|---|
{chr(10).join(rows)}

- Method: `{manifest["method"]}` ({parameters["variant"]}){_options(parameters)}
- Modules: `{parameters["modules"]}`
- Coverage: {coverage}
- Tensors: {counts}; {manifest["size_bytes"]:,} bytes
{lineage_section(manifest)}
`drift_merge.json` lists every tensor with its method, weight and fingerprint. Check the files
with `drift-merge verify DIR`. Made with {manifest["tool"]["name"]} {manifest["tool"]["version"]}.
"""
    return ("\n".join(front) + "\n" + body).encode()


def show_weight(weight: float | str | None) -> str:
    """A weight of a manifest for a table."""
    return f"{weight:g}" if isinstance(weight, float | int) else weight or ""


def _options(parameters: dict[str, Any]) -> str:
    options = parameters["options"]
    return "".join(f", {name} {value}" for name, value in options.items())
