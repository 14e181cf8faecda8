"""Reads the state of the repository that is written to, and refuses what must not be written."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from drift_merge.errors import DriftMergeError, OutputError, RecipeError
from drift_merge.hub.files import CARD, SIGNATURE, PushFile
from drift_merge.hub.refusals import RepositoryRef, no_token, persistently
from drift_merge.storage.hub import models
from drift_merge.storage.hub.artifacts import WORDS, RemoteFile, list_remote
from drift_merge.storage.hub.faults import LIBRARY, endpoint, is_offline
from drift_merge.storage.listed import listed_files
from drift_merge.storage.sources import Source, parse_source

MAIN = "main"
PULL_REQUEST = "refs/pr/"
# Files that neither make a repository a model nor belong to an artifact of ours.
_HARMLESS = (
    *(".gitattributes", ".gitignore", "*.md", "LICENSE*", "NOTICE*", "meta.yaml", SIGNATURE),
    *(".eval_results/*", "assets/*", "*.png", "*.jpg", "*.jpeg", "*.webp", "*.svg", "*.gif"),
)
# Of an artifact, beside what its manifest names.
_REWRITTEN = (CARD, SIGNATURE, "LICENSE.md", "meta.yaml", "prior.png", "merge.png")


@dataclass(frozen=True, slots=True)
class PushRequest:
    """What the user wants of a push."""

    repo_id: str  # "org/name"
    public: bool = False
    revision: str | None = None  # branch, or refs/pr/N; None for main
    pull_request: bool = False
    overwrite: bool = False  # another artifact of ours may be replaced
    license: str | None = None  # in the place of what the parents say
    card: Path | None = None  # in the place of the one made from the manifest
    sign: str | None = None  # see `hub.signing.signer`


@dataclass(frozen=True, slots=True)
class RemoteState:
    """What is on the Hub at one revision."""

    exists: bool  # the repository
    has_revision: bool = False
    is_private: bool = True
    commit: str | None = None  # of the revision; of main where there is no such revision
    files: Mapping[str, RemoteFile] = field(default_factory=dict)  # of that commit


def parse_target(repo_id: str, revision: str | None) -> RepositoryRef:
    """Read where to push.

    Raises:
        RecipeError: no id of the form org/name, or a revision that cannot be written to.
    """
    try:
        source = parse_source(f"{repo_id}@{revision}" if revision else repo_id)
    except DriftMergeError:
        source = None
    if source is None or source.repo_id != repo_id or "/" not in repo_id:
        raise RecipeError(
            f"{repo_id!r}{f' at {revision!r}' if revision else ''} is no place on the Hub.",
            remedy="Give org/name (your own name is an org too), and a branch with --revision.",
        )
    if source.is_pinned:
        raise RecipeError(
            f"--revision is the commit {revision}; a commit cannot be written to.",
            remedy="Give a branch, or leave --revision out for main.",
        )
    return RepositoryRef(repo_id, revision or MAIN)


def require_account(target: RepositoryRef) -> str:
    """The name of the user whose token is set here.

    Raises:
        OutputError: no token, a token that the Hub does not know, or one that only reads.
        SourceError: no answer.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise no_token(target)
    who: dict[str, Any] = persistently(lambda: HfApi(library_name=LIBRARY).whoami(), target)
    token = who.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise OutputError(
            f"The token {token.get('displayName', '')!r} of {who.get('name')} only reads.",
            remedy=f"Make one that writes at {endpoint()}/settings/tokens, then: hf auth login",
        )
    return str(who.get("name"))


def read_state(target: RepositoryRef) -> RemoteState:
    """What is there now.

    Raises:
        OutputError, SourceError: the Hub refuses or does not answer. A repository that does
            not exist, or may not be seen, is no error here.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi(library_name=LIBRARY)

    def info(revision: str) -> Any:
        try:
            return api.model_info(target.repo_id, revision=revision)
        except (errors.RevisionNotFoundError, errors.RepositoryNotFoundError):
            return None

    found = persistently(lambda: info(target.revision), target)
    has_revision = found is not None
    if found is None and target.revision != MAIN:
        found = persistently(lambda: info(MAIN), target)
    if found is None:
        return RemoteState(exists=False)
    files = list_remote(_at(target, found.sha)) if found.sha else {}
    return RemoteState(True, has_revision, bool(found.private), found.sha, files)


def read_state_if_possible(target: RepositoryRef, say: Callable[[str], None]) -> RemoteState:
    """What is there now, or nothing with a sentence why the Hub could not be asked."""
    from huggingface_hub import get_token

    if is_offline():
        say("The Hub was not asked what is there (offline).")
        return RemoteState(exists=False)
    if get_token() is None:
        say("No token is set here: what is private on the Hub is not seen. See: hf auth login")
    try:
        return read_state(target)
    except DriftMergeError as error:
        say(f"The Hub could not be asked what is there: {error.message}")
        return RemoteState(exists=False)


def _at(target: RepositoryRef, commit: str) -> Source:
    repo_id = target.repo_id
    return Source(given=f"{repo_id}@{commit}", kind="hub", repo_id=repo_id, revision=commit)


def to_delete(
    target: RepositoryRef,
    state: RemoteState,
    files: Sequence[PushFile],
    manifest_name: str,
    tensors: Mapping[str, Any],
    *,
    overwrite: bool,
) -> list[str]:
    """What must leave the repository before the artifact can be sent there.

    Args:
        target: where to.
        state: what is there.
        files: what is to be sent.
        manifest_name: of the artifact.
        tensors: of its manifest; where the Hub's manifest has the same, this push completes it.
        overwrite: another artifact of ours may be replaced.

    Raises:
        OutputError: the repository holds something else.
    """
    ours = {file.name: file for file in files}
    for name in WORDS:
        if name not in state.files:
            continue
        manifest = _read_manifest(target, state, name)
        listed = _listed(manifest, state, name)
        if name == manifest_name and manifest.get("tensors") == tensors:
            stale = [each for each in listed if each not in ours]
            signs = [each for each in (CARD, name) if each in state.files]
            return [*signs, *stale] if stale else []
        if not overwrite:
            raise _another(target, manifest, name)
        old = dict.fromkeys((*_REWRITTEN, name, *listed))
        return [n for n in old if n in state.files and not _is_kept(n, ours, state)]
    return _without_manifest(target, state, ours, overwrite=overwrite)


def _read_manifest(target: RepositoryRef, state: RemoteState, name: str) -> dict[str, Any]:
    try:
        content = json.loads(models.fetch_file(_at(target, str(state.commit)), name).read_bytes())
    except ValueError:
        content = {}
    return content if isinstance(content, dict) else {}


def _listed(manifest: Mapping[str, Any], state: RemoteState, name: str) -> list[str]:
    """The files of the artifact that is there, as far as they are."""
    try:
        listed = listed_files(manifest, where=name)
    except (DriftMergeError, TypeError):
        listed = []
    return [each for each in listed if each in state.files]


def _is_kept(name: str, ours: Mapping[str, PushFile], state: RemoteState) -> bool:
    """Whether a file of the old artifact is one of the new, and no sign of a finished upload."""
    return name != CARD and name in ours and ours[name].equals(state.files[name])


def _another(target: RepositoryRef, manifest: Mapping[str, Any], name: str) -> OutputError:
    try:
        sources = manifest["sources"]
        reasoners = sources["reasoners"] if "reasoners" in sources else [sources["reasoner"]]
        labels = " + ".join(each["label"] for each in reasoners)
        made_of = f" of {labels} and {sources['mllm']['label']}"
    except (KeyError, TypeError):
        made_of = ""
    return OutputError(
        f"{target.repo_id} at {target.revision} holds another artifact: a {WORDS[name]}{made_of}.",
        remedy="Push to another name, or to a branch of its own with --revision; "
        "or replace it (its history stays): --overwrite",
    )


def _without_manifest(
    target: RepositoryRef, state: RemoteState, ours: Mapping[str, PushFile], *, overwrite: bool
) -> list[str]:
    """A repository without a manifest: new, a push that was cut, or somebody's model."""
    foreign = [
        name
        for name, remote in state.files.items()
        if not _matches(name, _HARMLESS) and not (name in ours and ours[name].equals(remote))
    ]
    if not foreign:
        return []
    if not all(_matches(name, ("prior-*.safetensors", "prior.safetensors.*")) for name in foreign):
        raise OutputError(
            f"{target.repo_id} at {target.revision} holds something else: {foreign[0]} and "
            f"{len(foreign) - 1:,} other file(s) that are not of this artifact.",
            remedy="Push to another name, or to a branch of its own with --revision.",
        )
    if not overwrite:
        raise OutputError(
            f"{target.repo_id} at {target.revision} holds the unfinished upload of another prior "
            f"({foreign[0]} differs).",
            remedy="Finish that one, push to another name, or replace it: --overwrite",
        )
    return foreign


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
