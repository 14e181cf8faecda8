"""Push and pull as functions: what `drift-prior push` and its like do, for Python too.

import drift_merge
drift_merge.push("prior/", "org/name")                     # private, unless public=True
drift_merge.pull("org/name", "here/")
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from drift_merge.artifacts.card import Published
from drift_merge.errors import DriftMergeError, SourceError
from drift_merge.hub.cache import fetch_verified
from drift_merge.hub.files import (
    CARD,
    SIGNATURE,
    collect,
    hash_files,
    parents,
    published,
    strays,
    title_of,
)
from drift_merge.hub.licenses import FILE, RolledUp, read_license, roll_up
from drift_merge.hub.progress import ProgressBar, no_progress
from drift_merge.hub.pull import Pulled, fetch_files, hub_source
from drift_merge.hub.push import Notify, Pushed, PushPlan, check_visibility, send_files
from drift_merge.hub.repository import (
    PushRequest,
    parse_target,
    read_state,
    read_state_if_possible,
    require_account,
    to_delete,
)
from drift_merge.hub.signing import Signer, signer
from drift_merge.merges.card import merge_card
from drift_merge.merges.manifest import open_merge
from drift_merge.merges.verify import verify_merge
from drift_merge.priors.card import prior_card, prior_meta
from drift_merge.priors.manifest import open_prior
from drift_merge.priors.verify import verify_prior
from drift_merge.reports.beside import merge_picture, prior_picture
from drift_merge.storage.hub.artifacts import (
    MERGE_MANIFEST,
    PRIOR_MANIFEST,
    fetch_manifest,
    list_remote,
)
from drift_merge.storage.manifests import describe_tool
from drift_merge.storage.outputs.existing import Overwrite
from drift_merge.storage.sources import Source, parse_source

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ArtifactKind:
    """What differs between priors and merges here."""

    manifest: str
    open: Callable[[Path], Any]
    verify: Callable[..., Any]
    card: Callable[..., bytes]
    picture: Callable[[Any], tuple[str, bytes | None]]  # its file name; None: there is none


PRIOR_KIND = ArtifactKind(PRIOR_MANIFEST, open_prior, verify_prior, prior_card, prior_picture)
MERGE_KIND = ArtifactKind(MERGE_MANIFEST, open_merge, verify_merge, merge_card, merge_picture)


@dataclass(frozen=True, slots=True)
class PreparedPush:
    """A push that has been planned; nothing has been sent."""

    plan: PushPlan
    artifact: Any  # Prior or Merge
    licenses: RolledUp
    strays: tuple[str, ...]  # files of the directory that are not sent
    signer: Signer | None = None


def prepare_push(
    kind: ArtifactKind, directory: Path, request: PushRequest, say: Notify, *, dry_run: bool = False
) -> PreparedPush:
    """Open the artifact, make its card, and look at the repository.

    Args:
        kind: PRIOR_KIND or MERGE_KIND.
        directory: of the artifact.
        request: what is wanted.
        say: takes sentences for the user.
        dry_run: ask for no token, and go on if the Hub cannot be asked.

    Raises:
        OutputError: no right to write, or the repository holds something else.
        SourceError: no artifact there, or the Hub does not answer.
        RecipeError: the request is not valid.
    """
    target = parse_target(request.repo_id, request.revision)
    signs = None if request.sign is None else signer(request.sign)
    artifact = kind.open(directory)
    if not dry_run:
        require_account(target)
    licenses = roll_up([read_license(s) for s in parents(artifact.manifest)], request.license)
    manifest = published(artifact.manifest)
    made = _made(kind, artifact, manifest, request, licenses)
    files = collect(directory, kind.manifest, manifest, made)
    _say_edited(kind, artifact, request, say)
    state = read_state_if_possible(target, say) if dry_run else read_state(target)
    delete = to_delete(
        target, state, files, kind.manifest, manifest["tensors"], overwrite=request.overwrite
    )
    title = title_of(manifest)
    asked = (request.public, request.pull_request)
    plan = PushPlan(target, state, tuple(files), tuple(delete), title, *asked)
    check_visibility(plan, say)
    if SIGNATURE in state.files and not signs and plan.to_send:
        plan = replace(plan, delete=tuple(dict.fromkeys((*plan.delete, SIGNATURE))))
    return PreparedPush(plan, artifact, licenses, tuple(strays(directory, files)), signs)


def _made(
    kind: ArtifactKind,
    artifact: Any,
    manifest: dict[str, Any],
    request: PushRequest,
    licenses: RolledUp,
) -> dict[str, bytes]:
    """The files that are made for the Hub."""
    made = {}
    name, picture = kind.picture(artifact)
    if picture is not None:
        made[name] = picture
    if FILE not in manifest.get("sidecars", {}):
        made[FILE] = licenses.file()
    if kind is PRIOR_KIND:
        made["meta.yaml"] = prior_meta(manifest)
    if request.card is None:
        about = Published(
            request.repo_id, licenses.front, licenses.section(), "" if picture is None else name
        )
        made[CARD] = kind.card(manifest, about)
        return made
    try:
        made[CARD] = request.card.read_bytes()
    except OSError as error:
        raise SourceError(
            f"--card {request.card} cannot be read: {error.strerror or error}.",
            remedy="Name a Markdown file, or leave --card out.",
        ) from error
    return made


def _say_edited(kind: ArtifactKind, artifact: Any, request: PushRequest, say: Notify) -> None:
    """Tell the user whose edited card would otherwise be left behind in silence."""
    card = artifact.path / CARD
    if request.card is not None or not card.is_file():
        return
    is_ours = artifact.manifest["tool"] == describe_tool()
    if is_ours and card.read_bytes() != kind.card(artifact.manifest):
        say(
            f"{card} has been edited; the card on the Hub is made from the manifest. "
            f"To send yours: --card {card}"
        )


def push_prepared(
    kind: ArtifactKind,
    ready: PreparedPush,
    say: Notify,
    *,
    threads: int = 1,
    progress: ProgressBar = no_progress,
    quiet: bool = False,
) -> Pushed:
    """Verify the artifact, then send it.

    Args:
        kind: PRIOR_KIND or MERGE_KIND.
        ready: of `prepare_push`.
        say: takes sentences for the user.
        threads: readers.
        progress: shows what is done before anything is sent.
        quiet: no progress bars of huggingface_hub.

    Raises:
        VerificationError: the artifact is damaged (nothing was sent), or the Hub has other bytes.
        OutputError, SourceError: see `hub.push.send_files`.
    """
    _verify(kind, ready.artifact.path, threads=threads, progress=progress)
    with progress("Hashing", sum(file.size_bytes for file in ready.plan.files)) as advance:
        hash_files(ready.plan.files, advance)
    files = ready.plan.files
    if ready.signer is not None:
        files = (*files, ready.signer(ready.plan.target.repo_id, files))
    return send_files(replace(ready.plan, files=files), say, quiet=quiet)


def pull_artifact(
    kind: ArtifactKind,
    text: str,
    out: Path,
    *,
    overwrite: Overwrite = False,
    threads: int = 1,
    progress: ProgressBar = no_progress,
    say: Notify = lambda _: None,
) -> Pulled:
    """Fetch an artifact to a directory, verified by its manifest; see `hub.pull.fetch_files`."""
    verify = partial(_verify, kind, threads=threads, progress=progress)
    source = hub_source(text)
    return fetch_files(
        source, kind.manifest, out, verify, overwrite=overwrite, progress=progress, say=say
    )


def _verify(
    kind: ArtifactKind, path: Path, *, threads: int = 1, progress: ProgressBar = no_progress
) -> None:
    artifact = kind.open(path)
    with progress("Verifying", artifact.manifest["size_bytes"]) as advance:
        kind.verify(artifact, threads=threads, progress=advance)


def locate(
    text: str, kind: ArtifactKind, *, whole: bool = True, quiet: bool = False
) -> tuple[str, Path]:
    """Where an artifact is: the directory that `text` names, or one in the Hub's cache.

    Args:
        text: a path, or a Hub id `org/name[@revision]`.
        kind: PRIOR_KIND or MERGE_KIND.
        whole: fetch and verify the tensors too; else the manifest alone.
        quiet: no progress bars of huggingface_hub.

    Returns:
        What to call it in a recipe (a Hub id is pinned to its commit), and the directory.

    Raises:
        SourceError: nothing there under that name.
        CheckpointError, VerificationError: what is on the Hub is broken.
    """
    source = hub_id(text)
    if source is None:
        return text, Path(text).expanduser()
    if whole:
        verify = partial(_verify, kind)
        source, path = fetch_verified(source, kind.manifest, verify=verify, quiet=quiet)
    else:
        source, file = fetch_manifest(source, kind.manifest)
        path = file.parent
    return f"{source.repo_id}@{source.revision}", path


def hub_id(text: str) -> Source | None:
    """The Hub source that `text` names; None where it is a path, there or not."""
    try:
        source = parse_source(text)
    except DriftMergeError:
        return None
    return source if source.repo_id is not None and "/" in source.repo_id else None


def push(
    directory: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    revision: str | None = None,
    pull_request: bool = False,
    overwrite: bool = False,
    license: str | None = None,
    card: str | Path | None = None,
    sign: str | None = None,
) -> str:
    """Verify a prior or a merge and push it to the Hub; return its address there.

    Args:
        directory: of the artifact.
        repo_id: "org/name"; created if it does not exist.
        public: anybody may see it; else a new repository is private.
        revision: branch, made from main if it does not exist; None for main.
        pull_request: send it as a pull request.
        overwrite: replace another prior or merge that is there.
        license: identifier, in the place of what the parents' cards say.
        card: file, in the place of the card that is made from the manifest.
        sign: private key (PEM) to sign what is sent with, or "sigstore"; extra `sign`.

    Raises:
        VerificationError: the artifact is damaged (nothing was sent), or the Hub has other bytes.
        OutputError: no token, no right to write, or the repository holds something else.
        SourceError, RecipeError: no such artifact, no answer; options that are not valid.
    """
    path = Path(directory)
    kind = MERGE_KIND if (path / MERGE_MANIFEST).is_file() else PRIOR_KIND
    own_card = Path(card) if card is not None else None
    wishes = (public, revision, pull_request, overwrite, license, own_card, sign)
    ready = prepare_push(kind, path, PushRequest(repo_id, *wishes), _log.warning)
    return push_prepared(kind, ready, _log.info).url


def pull(source: str, directory: str | Path, *, overwrite: Overwrite = False) -> Path:
    """Fetch a prior or a merge from the Hub, verified; return where it is.

    Args:
        source: `org/name` or `org/name@revision`.
        directory: to create; absent or whole, whatever happens.
        overwrite: replace an existing one of ours after success; "any": whatever is there.

    Raises:
        SourceError, CheckpointError, VerificationError, OutputError, RecipeError.
    """
    parsed = hub_source(source)
    kind = MERGE_KIND if MERGE_MANIFEST in list_remote(parsed) else PRIOR_KIND
    return pull_artifact(kind, source, Path(directory), overwrite=overwrite).path
