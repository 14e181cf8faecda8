"""The card of a prior: what it is, what it is not, its formula with the sign, how to use it."""

from collections.abc import Callable, Mapping
from typing import Any

from drift_merge.artifacts.card import (
    CITATION,
    Published,
    argument,
    front_matter,
    lineage_section,
    picture_line,
    where,
)
from drift_merge.priors.summary import (
    advice,
    equal_sentence,
    show_share,
    stored_sentence,
    summarize,
)
from drift_merge.storage.sizes import in_words

TAGS = ["drift", "drift-prior", "reasoning-prior", "weight-diff", "task-vector", "not-a-model"]
_DEFAULTS = {
    **{"layers": None, "on_mismatch": "error", "map_file": None, "allow_nonfinite": False},
    **{"through": None, "rank": 0},
}


def prior_card(manifest: dict[str, Any], published: Published | None = None) -> bytes:
    """`README.md` of a prior, from its manifest alone.

    Args:
        manifest: of the prior.
        published: where it is on the Hub, and under which license; None for a local one.
    """
    sources = manifest["sources"]
    reasoner, mllm = sources["reasoner"], sources["mllm"]
    front = {
        "library_name": "drift-prior",
        "base_model_relation": "adapter",  # the nearest that the Hub has: applied on top of
        "tags": TAGS,
    }
    parents = "\n".join(f"| {role} | {where(source)} |" for role, source in sources.items())
    rows = summarize(manifest["tensors"])
    equal = equal_sentence(rows, "base" if "base" in sources else "mllm")
    meaning = "\n".join(filter(None, (equal, advice(rows[-1].cosine))))
    body = f"""
# Reasoning prior: {reasoner["label"]} -> {mllm["label"]}

Differences of weights between a reasoner (a text LLM, or another fine-tuning of the same MLLM)
and the language tower of a multimodal LLM, for use in training (DRIFT). **This is not a model**:
it cannot be loaded or served as one.
It is of use with {_name(mllm)} alone, whose weights it was computed against.

    {manifest["formula"]}

{manifest["sign"]}

| role | source |
|---|---|
{parents}

{_facts(manifest)}

| module | tensors | elements | norm of delta | relative norm | cosine of the towers | equal |
|---|--:|--:|--:|--:|--:|--:|
{_table(rows)}

{meaning}
{picture_line(published)}{lineage_section(manifest)}
## Use

{_use(manifest, published.repo_id if published else "DIR")}
{published.licenses if published else ""}
## Reproduce

    {compute_command(manifest)}

`prior.json` lists every tensor with its norms, cosine and fingerprints. Made with
{manifest["tool"]["name"]} {manifest["tool"]["version"]}.
{CITATION}"""
    return (front_matter(published, front, [mllm, reasoner]) + body).encode()


def _name(source: dict[str, Any]) -> str:
    return str(source["repo_id"] or source["label"])


def _facts(manifest: dict[str, Any]) -> str:
    coverage, parameters = manifest["coverage"], manifest["parameters"]
    missing = coverage.get("missing_in_base")
    without = f"; {missing:,} of them have no partner in the base and no delta" if missing else ""
    layers = f", layers `{parameters['layers']}`" if parameters.get("layers") else ""
    outside = f"{coverage['records'].get('outside_tower', 0):,} tensors are outside the tower"
    stored = stored_sentence(manifest["tensors"])
    how = "U V^T of each matrix" if parameters.get("rank") else "codes * scales, row by row"
    compressed = f"\n- {stored} delta = {how}" if stored else ""
    return (
        f"- Modules: `{parameters['modules']}`{layers}\n"
        f"- Coverage: {coverage['matched']:,} of {coverage['selected']:,} selected tensors"
        f"{without}; {outside}\n"
        f"- Stored as {parameters['dtype']}: {manifest['num_elements']:,} elements, "
        f"{in_words(manifest['size_bytes'])} in {len(manifest['shards']):,} shard(s){compressed}"
    )


def _table(rows: Any) -> str:
    return "\n".join(
        f"| {r.module} | {r.num_tensors:,} | {r.num_elements:,} | {r.norm_delta:.4g} "
        f"| {r.relative_norm:.4f} | {r.cosine:.4f} | {show_share(r.equal)} |"
        for r in rows
    )


def _use(manifest: dict[str, Any], place: str) -> str:
    """How to train with it, apply it and verify it: one line each."""
    sources = manifest["sources"]
    roles = " ".join(f"--{role} {argument(source)}" for role, source in sources.items())
    mllm = argument(sources["mllm"])
    return f"""```python
import drift_merge  # in training, once the optimizer exists

handle = drift_merge.attach(model, drift_merge.load_prior("{place}"), optimizer=optimizer)
```

```sh
drift-prior apply {place} {mllm} --scale 0.1 -o merged
drift-prior verify {place} {roles}
```"""


def compute_command(
    manifest: dict[str, Any], name: Callable[[Mapping[str, Any]], str] = argument
) -> str:
    """The command that makes a prior again.

    Args:
        manifest: of the prior.
        name: what a source is called; a local one, if not told, by its label alone.
    """
    if "combined_from" in manifest:
        return str(manifest["combined_from"]["command"])
    sources, parameters = manifest["sources"], manifest["parameters"]
    words = ["drift-prior compute", name(sources["reasoner"]), name(sources["mllm"])]
    if "base" in sources:
        words += ["--base", name(sources["base"])]
    words += ["--modules", parameters["modules"], "--dtype", parameters["dtype"]]
    for key, default in _DEFAULTS.items():
        if (value := parameters.get(key, default)) != default:
            flag = "--" + key.removesuffix("_file").replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
    words += ["--norm", parameters["norm"]] if parameters.get("rank") else []
    return " ".join([*words, "-o DIR"])


def prior_meta(manifest: dict[str, Any]) -> bytes:
    """`meta.yaml` of a prior on the Hub: the manifest in a dozen lines.

    The Hub counts the downloads of a repository by the requests for a file of this name.
    """
    import yaml

    sources = {
        role: {"repo": source["repo_id"], "revision": source["revision"]}
        if source["repo_id"]
        else {"local": source["label"]}
        for role, source in manifest["sources"].items()
    }
    keys = ("kind", "format_version", "formula", "sign", "num_elements", "size_bytes")
    about = {key: manifest[key] for key in keys}
    about |= {
        key: manifest["parameters"][key]
        for key in ("modules", "dtype", "rank")
        if key in manifest["parameters"]
    }
    about |= {"num_tensors": len(manifest["tensors"]), "sources": sources}
    about |= {"tool": manifest["tool"], "paper": "https://arxiv.org/abs/2510.15050"}
    text: str = yaml.safe_dump(about, sort_keys=False, width=100)
    return text.encode()
