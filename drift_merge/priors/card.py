"""The card of a prior: what it is, what it is not, its formula with the sign, how to use it."""

from typing import Any

from drift_merge.engine.cards import lineage_section, where
from drift_merge.priors.summary import advice, summarize


def prior_card(manifest: dict[str, Any]) -> bytes:
    """`README.md` of a prior, from its manifest alone."""
    sources = manifest["sources"]
    reasoner, mllm = sources["reasoner"], sources["mllm"]
    hub_ids = [s["repo_id"] for s in (mllm, reasoner) if s["repo_id"]]
    front = ["---", "library_name: drift-prior"]
    if hub_ids:
        front += ["base_model:", *(f"- {name}" for name in hub_ids)]
        front += ["base_model_relation: adapter"]
    front += ["tags: [drift, drift-prior, reasoning-prior, weight-diff, not-a-model]", "---"]
    rows = summarize(manifest["tensors"])
    table = "\n".join(
        f"| {r.module} | {r.num_tensors:,} | {r.num_elements:,} | {r.norm_delta:.4g} "
        f"| {r.relative_norm:.4f} | {r.cosine:.4f} |"
        for r in rows
    )
    coverage = manifest["coverage"]
    missing = coverage.get("missing_in_base")
    without = f"; {missing:,} of them have no partner in the base and no delta" if missing else ""
    parents = "\n".join(f"| {role} | {where(source)} |" for role, source in sources.items())
    body = f"""
# Reasoning prior: {reasoner["label"]} -> {mllm["label"]}

Differences of weights between a text LLM that reasons and the language tower of a multimodal
LLM, for use in training (DRIFT, arXiv 2510.15050). **This is not a model**: it cannot be loaded
or served as one.

    {manifest["formula"]}

{manifest["sign"]}

| role | source |
|---|---|
{parents}

- Modules: `{manifest["parameters"]["modules"]}`; {coverage["matched"]:,} of
  {coverage["selected"]:,} selected tensors{without}
- Stored as {manifest["parameters"]["dtype"]}: {manifest["num_elements"]:,} elements,
  {manifest["size_bytes"]:,} bytes

| module | tensors | elements | norm of delta | relative norm | cosine of the towers |
|---|--:|--:|--:|--:|--:|
{table}

{advice(rows[-1].cosine)}
{lineage_section(manifest)}
## Check and reproduce

    drift-prior verify DIR --reasoner {_argument(reasoner)} --mllm {_argument(mllm)}
    {_command(manifest)}

`prior.json` lists every tensor with its norms, cosine and fingerprints. Made with
{manifest["tool"]["name"]} {manifest["tool"]["version"]}. Method: arXiv:2510.15050.
"""
    return ("\n".join(front) + "\n" + body).encode()


def _argument(source: dict[str, Any]) -> str:
    if source["repo_id"]:
        return f"{source['repo_id']}@{source['revision']}"
    return str(source["label"])


def _command(manifest: dict[str, Any]) -> str:
    sources, parameters = manifest["sources"], manifest["parameters"]
    words = ["drift-prior compute", _argument(sources["reasoner"]), _argument(sources["mllm"])]
    if "base" in sources:
        words += ["--base", _argument(sources["base"])]
    words += ["--modules", parameters["modules"], "--dtype", parameters["dtype"], "-o DIR"]
    return " ".join(words)
