"""Pull an artifact into a directory: absent or whole, and what its manifest says.

Files arrive in OUT.partial, each is compared with the hash that the Hub lists for one commit,
and the whole is verified against its own manifest before one rename publishes it. A rerun keeps
the files that have arrived, also when the branch has moved since: those that are still the same
stay, the others are fetched, and the result is always one commit's.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from drift_merge.errors import OutputError, RecipeError, SourceError
from drift_merge.hub.files import BESIDE, CARD, SIGNATURE, PushFile
from drift_merge.hub.licenses import FILE as LICENSES
from drift_merge.hub.progress import ProgressBar, no_progress, watched
from drift_merge.reports.beside import MERGE_PNG, PRIOR_PNG
from drift_merge.storage.hub import models
from drift_merge.storage.hub.artifacts import (
    RemoteFile,
    fetch_manifest,
    list_remote,
    read_listed,
    require_files,
)
from drift_merge.storage.hub.faults import LIBRARY, patiently
from drift_merge.storage.output import OutputDirectory
from drift_merge.storage.outputs.existing import Overwrite, check_output
from drift_merge.storage.sources import Source, parse_source

# Taken along where they are; with the pictures, since a signature covers all that was sent.
BESIDE_MANIFEST = (CARD, LICENSES, "meta.yaml", PRIOR_PNG, MERGE_PNG, SIGNATURE)
_STAGING = ".arriving"  # folder of the payload
_ATTEMPTS = 2  # for a file that arrives with other bytes than the Hub lists


@dataclass(frozen=True, slots=True)
class Pulled:
    """An artifact that is here, whole and verified."""

    path: Path
    source: Source  # pinned
    fetched_bytes: int  # by this run
    kept_bytes: int  # that an earlier run had fetched


def hub_source(text: str) -> Source:
    """A Hub id with a name space, `org/name[@revision]`.

    Raises:
        RecipeError: it is a path, or no id.
    """
    source = parse_source(text)
    if source.repo_id is None or "/" not in source.repo_id:
        raise RecipeError(
            f"{text} is {'a local path' if source.path else 'no id of the form org/name'}.",
            remedy="Give what is to be pulled as org/name or org/name@revision.",
        )
    return source


def fetch_files(
    source: Source,
    manifest: str,
    out: Path,
    verify: Callable[[Path], object],
    *,
    overwrite: Overwrite = False,
    progress: ProgressBar = no_progress,
    say: Callable[[str], None] = lambda _: None,
) -> Pulled:
    """Fetch an artifact to `out`.

    Args:
        source: on the Hub, pinned or not.
        manifest: prior.json or drift_merge.json.
        out: directory to create.
        verify: checks a directory against its manifest, or raises.
        overwrite: replace an existing `out` after success.
        progress: shows the bytes that arrive.
        say: takes sentences for the user.

    Raises:
        SourceError: not there, no right, no answer, or bytes that differ from the Hub's listing.
        CheckpointError: the manifest is broken, or names what the repository does not hold.
        VerificationError: the artifact is not what its manifest says.
        OutputError: `out` exists or cannot be written.
    """
    check_output(out, [], overwrite=overwrite)
    source, manifest_file = fetch_manifest(source, manifest)
    listed = read_listed(source, manifest_file)
    remote = list_remote(source)
    require_files(source, listed, remote)
    names = [manifest, *listed, *(n for n in BESIDE_MANIFEST if n in remote and n not in listed)]
    plan = f"pull {source.repo_id} {manifest}"
    with OutputDirectory(out, plan=plan, overwrite=overwrite) as output:
        wanted = {name: remote[name] for name in names}
        if output.is_published:
            return _had_been_pulled(output, source, manifest, wanted)
        kept = _keep(output, wanted)
        _require_space(output, wanted, kept)
        if kept:
            say(f"Resumed: {len(kept):,} of {len(names):,} files had arrived.")
        missing = {name: file for name, file in wanted.items() if name not in kept}
        with (
            models.progress_bars(shown=False),
            progress("Fetching", sum(file.size_bytes for file in missing.values())) as advance,
            watched(output.payload, advance),
        ):
            for name, file in missing.items():
                _fetch_one(source, output.payload, name, file)
                output.record({name: {"digest": _digest(file)}})
        shutil.rmtree(output.payload / _STAGING, ignore_errors=True)
        verify(output.payload)
        output.publish()
        kept_bytes = sum(wanted[name].size_bytes for name in kept)
        total = sum(file.size_bytes for file in wanted.values())
        return Pulled(output.out, source, total - kept_bytes, kept_bytes)


def _had_been_pulled(
    output: OutputDirectory, source: Source, manifest: str, wanted: Mapping[str, RemoteFile]
) -> Pulled:
    """The answer when an earlier run was killed between its last rename and tidying up."""
    output.tidy()
    if not PushFile(manifest, output.out / manifest, BESIDE).equals(wanted[manifest]):
        raise OutputError(
            f"{output.out} exists already, with an older revision of {source.repo_id}.",
            remedy="Choose another directory with -o, or replace it: add --overwrite.",
        )
    return Pulled(output.out, source, 0, sum(file.size_bytes for file in wanted.values()))


def _keep(output: OutputDirectory, wanted: Mapping[str, RemoteFile]) -> set[str]:
    """The files of an earlier run that this commit has too; others are removed."""
    kept = set()
    for path in [p for p in output.payload.rglob("*") if p.is_file()]:
        name = path.relative_to(output.payload).as_posix()
        found = output.finished.get(name, {}).get("digest")
        if name in wanted and (found == _digest(wanted[name]) or _equals(path, wanted[name])):
            kept.add(name)
        else:
            path.unlink()
    return kept


def _equals(path: Path, file: RemoteFile) -> bool:
    return PushFile(path.name, path, BESIDE).equals(file)


def _digest(file: RemoteFile) -> str:
    return file.sha256 or file.git_sha1


def _require_space(
    output: OutputDirectory, wanted: Mapping[str, RemoteFile], kept: set[str]
) -> None:
    needed = sum(file.size_bytes for name, file in wanted.items() if name not in kept)
    free = shutil.disk_usage(output.payload).free
    if needed > free:
        raise OutputError(
            f"the disk of {output.out} is too small: {needed:,} bytes are needed, "
            f"{free:,} are free.",
            remedy="Free some space, or choose another directory with -o.",
        )


def _fetch_one(source: Source, payload: Path, name: str, file: RemoteFile) -> None:
    """Download one file into the payload and compare it with the Hub's listing."""
    from huggingface_hub import hf_hub_download

    arrived = payload / _STAGING / name
    for attempt in range(_ATTEMPTS):
        download: Callable[[], Any] = partial(
            hf_hub_download,
            str(source.repo_id),
            name,
            revision=source.revision,
            local_dir=payload / _STAGING,
            library_name=LIBRARY,
            force_download=attempt > 0,
        )
        patiently(download, source)
        if _equals(arrived, file):
            break
    else:
        raise SourceError(
            f"{name} of {source.label} arrived with other bytes than the Hub lists, "
            f"{_ATTEMPTS} times: expected {_digest(file)} ({file.size_bytes:,} bytes).",
            remedy="A proxy may have changed it. Try again from another network, or set "
            "HF_ENDPOINT to another mirror.",
        )
    with open(arrived, "rb") as opened:
        os.fsync(opened.fileno())
    (payload / name).parent.mkdir(parents=True, exist_ok=True)
    os.replace(arrived, payload / name)
