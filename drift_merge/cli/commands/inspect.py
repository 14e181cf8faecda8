"""`inspect` of both programs: what an artifact is made of, from its manifest."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from drift_merge.cli import options, render
from drift_merge.cli.answers import print_formula, print_merge
from drift_merge.cli.commands.pull import locate
from drift_merge.cli.entry import print_json
from drift_merge.cli.heat_map import print_heat_map
from drift_merge.merges.manifest import open_merge
from drift_merge.names.tensors import Finding
from drift_merge.priors.manifest import open_prior
from drift_merge.priors.spectra import ModuleSpectrum, spectra
from drift_merge.reports.figures import KINDS, OF_MERGES
from drift_merge.reports.figures import of_prior as of_prior_tensors
from drift_merge.reports.pages.merges import merge_figures
from drift_merge.storage import sizes


def inspect_prior_action(path: Path, *, as_json: bool, with_spectra: bool = False) -> None:
    """Print the manifest of a prior; with `with_spectra` also what its directions hold."""

    prior = open_prior(path)
    if as_json:
        found = {"spectra": [asdict(row) for row in spectra(prior)]} if with_spectra else {}
        print_json({"schema": 1, **prior.manifest, **found})
        return
    manifest = prior.manifest
    print_formula(manifest)
    _print_sources(manifest["sources"])
    print(render.prior_table(manifest))
    print_heat_map(of_prior_tensors(prior.tensors), KINDS[0])
    if with_spectra:
        _print_spectra(spectra(prior))
    _print_size(manifest, len(prior.tensors))


def inspect_merge_action(path: Path, *, as_json: bool) -> None:
    """Print the manifest of a merge."""

    merge = open_merge(path)
    if as_json:
        print_json({"schema": 1, **merge.manifest})
        return
    print_merge(merge.manifest)
    print_heat_map(merge_figures(merge), OF_MERGES[0])
    _print_size(merge.manifest, len(merge.tensors))


def _print_spectra(rows: Iterable[ModuleSpectrum]) -> None:
    for row in rows:
        print(
            f"{row.module}: {row.num_matrices:,} matrices, stable rank {row.stable_rank:.4g} "
            f"(median; least {row.least_stable_rank:.4g}), first direction {row.first_share:.2%} "
            "of the energy"
        )


def _print_sources(sources: Mapping[str, Mapping[str, Any]]) -> None:
    for role, source in sources.items():
        revision = f" @ {source['revision']}" if source["revision"] else ""
        print(f"{role:9} {source['repo_id'] or source['source']}{revision}")


def _print_size(manifest: Mapping[str, Any], num_tensors: int) -> None:
    print(
        f"{num_tensors:,} tensors, {sizes.size(manifest['size_bytes'])}, "
        f"{len(manifest['shards']):,} shard(s), made with {manifest['tool']['name']} "
        f"{manifest['tool']['version']}"
    )
    render.findings(Finding(**finding) for finding in manifest["findings"])


@click.command("inspect")
@click.argument("prior")
@click.option(
    "--spectra",
    "with_spectra",
    is_flag=True,
    help="Also by module: stable rank, and the share of the first singular direction.",
)
@options.json_option
def of_prior(prior: str, with_spectra: bool, as_json: bool) -> None:
    """Show what a prior is made of, from its manifest.

    PRIOR is a directory, or a Hub id org/name[@revision]; no tensor is fetched or read without
    --spectra, which reads all.

    Guide: drift-prior guide priors

    \b
    Example:
        drift-prior inspect prior/
    """

    path = locate(prior, "PRIOR", whole=with_spectra, quiet=as_json)[1]
    inspect_prior_action(path, as_json=as_json, with_spectra=with_spectra)


@click.command("inspect")
@click.argument("merge", metavar="OUT")
@options.json_option
def of_merge(merge: str, as_json: bool) -> None:
    """Show how a merged checkpoint was made, from its manifest.

    OUT is a directory, or a Hub id org/name[@revision]; no tensor is fetched.

    Guide: drift-merge guide merging

    \b
    Example:
        drift-merge inspect merged/
    """

    inspect_merge_action(locate(merge, "MERGE", whole=False)[1], as_json=as_json)
