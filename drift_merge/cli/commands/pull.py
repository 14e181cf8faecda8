"""`drift-prior pull` and `drift-merge pull`: an artifact from the Hugging Face Hub."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drift_merge.cli import options
from drift_merge.cli.entry import print_json, ranks_of_command
from drift_merge.cli.progress import progress
from drift_merge.cli.render import note
from drift_merge.hub import publish
from drift_merge.hub.publish import MERGE_KIND, PRIOR_KIND, pull_artifact
from drift_merge.storage.outputs.existing import Overwrite
from drift_merge.storage.sizes import size

if TYPE_CHECKING:
    from drift_merge.hub.publish import ArtifactKind

_OPTIONS = options.chain(
    click.option("-o", "--output", type=options.PATH, required=True, help="Directory to create."),
    options.overwrite_option,
    options.threads_option,
    options.json_option,
    options.quiet_option,
)


@click.command(name="pull")
@click.argument("source", metavar="ORG/NAME[@REVISION]")
@_OPTIONS
def pull_prior(source: str, **values: Any) -> None:
    """Fetch a prior from the Hugging Face Hub, verified against its manifest.

    Guide: drift-prior guide publishing

    \b
    Example:
        drift-prior pull org/name -o prior/
    """

    _pull(PRIOR_KIND, source, **values)


@click.command(name="pull")
@click.argument("source", metavar="ORG/NAME[@REVISION]")
@_OPTIONS
def pull_merge(source: str, **values: Any) -> None:
    """Fetch a merged checkpoint from the Hugging Face Hub, verified against its manifest.

    Guide: drift-merge guide publishing

    \b
    Example:
        drift-merge pull org/name -o merged/
    """

    _pull(MERGE_KIND, source, **values)


def locate(text: str, kind: str, *, whole: bool = True, quiet: bool = False) -> tuple[str, Path]:
    """The directory of an artifact that is here, or on the Hub; see `publish.locate`.

    Args:
        text: a path, or a Hub id `org/name[@revision]`.
        kind: "PRIOR" or "MERGE".
        whole: fetch its tensors too; else the manifest alone.
        quiet: no progress bars.
    """
    path = Path(text).expanduser()

    def find() -> tuple[str, Path]:
        if path.exists():
            return text, path
        return publish.locate(text, getattr(publish, f"{kind}_KIND"), whole=whole, quiet=quiet)

    return ranks_of_command().host_by_host(find)


def _pull(
    kind: "ArtifactKind",
    source: str,
    *,
    output: Path,
    overwrite: Overwrite,
    threads: int,
    as_json: bool,
    quiet: bool,
) -> None:

    silent = quiet or as_json
    pulled = pull_artifact(
        kind,
        source,
        output,
        overwrite=overwrite,
        threads=threads,
        progress=partial(progress, quiet=silent),
        say=(lambda _: None) if silent else note,
    )
    if as_json:
        value = {"repo_id": pulled.source.repo_id, "commit": pulled.source.revision}
        sizes = {"fetched_bytes": pulled.fetched_bytes, "kept_bytes": pulled.kept_bytes}
        print_json({"schema": 1, "output": str(output), **value, **sizes})
        return
    if not quiet:
        note(
            f"Fetched {size(pulled.fetched_bytes)} of {pulled.source.repo_id} at commit "
            f"{pulled.source.revision}, and verified it against its manifest."
        )
    print(output)
