"""The model card of a merged checkpoint: what it is, of what, by which formula."""

from typing import Any

from drift_merge.engine.cards import lineage_section, where


def merge_card(manifest: dict[str, Any]) -> bytes:
    """`README.md` of a merge, from its manifest alone."""
    sources = manifest["sources"]
    mllm, reasoners = sources["mllm"], sources["reasoners"]
    hub_ids = [s["repo_id"] for s in (mllm, *reasoners) if s["repo_id"]]
    front = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    if hub_ids:
        front += ["base_model:", *(f"- {name}" for name in hub_ids)]
        front += ["base_model_relation: merge"]
    front += [f"tags: [merge, {manifest['method']}, drift-merge]", "---"]
    weights = manifest["parameters"]["weights"]
    names = " + ".join(s["label"] for s in reasoners)
    rows = [f"| mllm | {where(mllm)} | {_rest(weights):g} | `{mllm['layout']}` |"]
    rows += [
        f"| reasoner | {where(s)} | {w:g} | `{s['layout']}` |"
        for s, w in zip(reasoners, weights, strict=True)
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

- Method: `{manifest["method"]}`, modules `{manifest["parameters"]["modules"]}`
- Coverage: {coverage}
- Tensors: {counts}; {manifest["size_bytes"]:,} bytes
{lineage_section(manifest)}
`drift_merge.json` lists every tensor with its method, weight and fingerprint. Check the files
with `drift-merge verify DIR`. Made with {manifest["tool"]["name"]} {manifest["tool"]["version"]}.
"""
    return ("\n".join(front) + "\n" + body).encode()


def _rest(weights: list[float]) -> float:
    return round(1.0 - sum(weights), 12)
