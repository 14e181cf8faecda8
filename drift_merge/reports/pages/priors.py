"""The page of a prior: what its manifest records, and a histogram of its shards."""

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from drift_merge.priors.card import compute_command
from drift_merge.priors.manifest import Prior
from drift_merge.priors.summary import equal_sentence, stored_sentence, summarize
from drift_merge.reports.figures import Group, of_prior
from drift_merge.reports.pages.document import (
    Document,
    describe_findings,
    describe_tensors,
    describe_verdict,
    layer_cosines,
)
from drift_merge.reports.verdict import verdict
from drift_merge.storage.sizes import in_words


def describe_prior(
    prior: Prior, *, is_whole: bool = True, progress: Callable[[int], None] = lambda _size: None
) -> Document:
    """What the page of a prior shows.

    Args:
        prior: opened.
        is_whole: its shards are here, so that |delta| can be counted; else its manifest alone.
        progress: called with the bytes looked at.

    Raises:
        CheckpointError: a shard is missing or broken, or differs from the manifest.
    """
    manifest = prior.manifest
    tensors = of_prior(prior.tensors)
    tower = Group(tuple(tensors))
    sources = manifest["sources"]
    base = "base" if "base" in sources else "mllm"
    notes = [stored_sentence(prior.tensors), equal_sentence(summarize(prior.tensors), base)]
    return {
        "kind": "prior",
        "title": f"Prior: {sources['reasoner']['label']} to {sources['mllm']['label']}",
        "formula": manifest["formula"],
        "names": {"A": "reasoner", "B": "mllm"},
        "verdict": describe_verdict(
            verdict(tower.cosine, tower.relative_norm), layer_cosines(tensors)
        ),
        "notes": [note for note in (manifest["sign"], *notes) if note],
        "histogram": _histogram(prior, is_whole, progress),
        "findings": describe_findings(manifest["findings"]),
        "coverage": describe_coverage(manifest["coverage"]),
        "facts": _facts(manifest, prior),
        "commands": _commands(prior),
        **describe_tensors(tensors, _missing(manifest)),
    }


def _histogram(prior: Prior, is_whole: bool, progress: Callable[[int], None]) -> dict[str, Any]:
    if not is_whole:
        return {"missing": "Only the manifest was fetched; pull the prior to have them counted."}
    from drift_merge.reports.measure import prior_histograms  # here: it needs torch

    found = prior_histograms(prior, progress)
    return {"missing": "", "modules": {name: each.plain() for name, each in found.items()}}


def _missing(manifest: Mapping[str, Any]) -> dict[str, str]:
    sources = manifest["sources"]
    words = ["drift-merge", "compare", given(sources["reasoner"]), given(sources["mllm"])]
    more = f"A prior does not record it. Measured by: {shlex.join(words)}"
    base = ["--base", given(sources["base"]) if "base" in sources else "BASE"]
    return {
        "equal": "The version that made this prior did not count them.",
        "sign_agreement": f"{more} {shlex.join(base)} --report page.html",
        "stable_rank": f"{more} --stable-rank --report page.html",
    }


def given(source: Mapping[str, Any]) -> str:
    """A source as it can be named again: pinned where it is on the Hub, else as it was given."""
    if source["repo_id"]:
        return f"{source['repo_id']}@{source['revision']}"
    return str(source["source"])


def describe_coverage(coverage: Mapping[str, Any]) -> list[list[Any]]:
    """Labels and counts: selected and matched, then every status of the account."""
    rows = [["selected", coverage["selected"]], ["matched", coverage["matched"]]]
    if coverage.get("missing_in_base"):
        rows.append(["matched, but not in the base", coverage["missing_in_base"]])
    records = {k: n for k, n in coverage["records"].items() if k != "matched"}
    return rows + [[status.replace("_", " "), count] for status, count in records.items()]


def _facts(manifest: Mapping[str, Any], prior: Prior) -> list[list[str]]:
    parameters, tool = manifest["parameters"], manifest["tool"]
    sources = [[role, given(source)] for role, source in manifest["sources"].items()]
    layers = [["layers", str(parameters["layers"])]] if parameters.get("layers") else []
    return [
        *sources,
        ["modules", str(parameters["modules"])],
        *layers,
        ["stored as", f"{parameters['dtype']}, {in_words(manifest['size_bytes'])}"],
        ["tensors", f"{len(prior.tensors):,}, {manifest['num_elements']:,} entries"],
        ["made with", f"{tool['name']} {tool['version']}"],
    ]


def _commands(prior: Prior) -> list[list[str]]:
    sources, path = prior.manifest["sources"], shlex.quote(str(prior.path))
    roles = shlex.join([word for role, s in sources.items() for word in (f"--{role}", given(s))])
    mllm = shlex.quote(given(sources["mllm"]))
    return [
        ["Make it again", compute_command(prior.manifest, lambda s: shlex.quote(given(s)))],
        ["Check it", f"drift-prior verify {path} {roles}"],
        ["Add a tenth of it", f"drift-prior apply {path} {mllm} --scale 0.1 -o merged/"],
        ["Train with it", f"drift-prior train {mllm} --prior {path} --data DATA -o trained/"],
    ]
