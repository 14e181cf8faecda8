"""Push an artifact: read_state, create, send in several commits, compare every hash.

Every commit is preceded by a look at what is there, so that the same command after a kill, a
lost answer or a broken line sends only what is missing. The manifest comes after all it names,
and the card last of all, when the hashes of everything else have been found equal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from drift_merge.errors import OutputError, VerificationError
from drift_merge.hub.files import PushFile, in_commits
from drift_merge.hub.refusals import RepositoryRef, persistently
from drift_merge.hub.repository import PULL_REQUEST, RemoteState, read_state
from drift_merge.storage.hub.faults import LIBRARY
from drift_merge.storage.hub.models import progress_bars

Notify = Callable[[str], None]  # a sentence for the user


@dataclass(frozen=True, slots=True)
class PushPlan:
    """What a push will do."""

    target: RepositoryRef
    state: RemoteState  # of the Hub
    files: tuple[PushFile, ...]  # all of the artifact, in order
    delete: tuple[str, ...]  # files of the Hub that go first
    title: str  # of commits and of the pull request
    public: bool = False
    pull_request: bool = False

    @property
    def to_send(self) -> list[PushFile]:
        """The files that the Hub does not have."""
        return [file for file in self.files if not file.equals(self.state.files.get(file.name))]


@dataclass(frozen=True, slots=True)
class Pushed:
    """An artifact that is on the Hub, every hash compared."""

    target: RepositoryRef
    commit: str
    url: str
    is_private: bool
    sent: tuple[str, ...]  # names of the files that were not there before
    sent_bytes: int


def check_visibility(plan: PushPlan, say: Notify) -> None:
    """Refuse to publish without being told to; say what is not changed.

    Raises:
        OutputError: the repository is public and `public` was not asked for.
    """
    if not plan.state.exists:
        if plan.pull_request:
            raise OutputError(
                f"{plan.target.repo_id} does not exist, or this token may not see it: a pull "
                "request needs a repository.",
                remedy="Check the spelling, or create it by pushing without --pr.",
            )
        return
    if not plan.state.is_private and not plan.public:
        raise OutputError(
            f"{plan.target.repo_id} is public: what is sent there is published at once.",
            remedy="If that is meant, add --public. Else push to a new name, which is private.",
        )
    if plan.state.is_private and plan.public:
        say(
            f"{plan.target.repo_id} exists and stays private; --public is for new repositories. "
            f"Change it at {plan.target.page}/settings"
        )


def send_files(plan: PushPlan, say: Notify, *, quiet: bool = False) -> Pushed:
    """Send what the Hub does not have.

    Args:
        plan: whose artifact has been verified.
        say: takes sentences for the user.
        quiet: no progress bars of huggingface_hub.

    Raises:
        OutputError: the user's rights, or what the Hub does not accept.
        SourceError: the network, or a Hub that keeps failing. The same push goes on.
        VerificationError: the Hub has other bytes than were sent.
    """
    target, state, sent = _prepare(plan, say), plan.state, list[PushFile]()
    _delete(plan, target, say)
    total = sum(file.size_bytes for file in plan.to_send)
    with progress_bars(shown=not quiet):
        for group in in_commits(plan.files):
            if all(file.equals(state.files.get(file.name)) for file in group):
                continue
            sent += persistently(partial(_send, plan, target, group), target, say)
            state = read_state(target)
            _compare(target, group, state)
            if len(sent) < len(plan.to_send):
                part = sum(file.size_bytes for file in sent) / max(total, 1)
                say(f"Sent {len(sent):,} of {len(plan.to_send):,} files, {part:.0%} of the bytes.")
    state = read_state(target)
    _compare(target, plan.files, state)
    url = _finish(plan, target)
    return Pushed(
        target,
        str(state.commit),
        url,
        state.is_private,
        tuple(file.name for file in sent),
        sum(file.size_bytes for file in sent),
    )


def _prepare(plan: PushPlan, say: Notify) -> RepositoryRef:
    """Create repository, branch or pull request, where they are not there yet."""
    from huggingface_hub import HfApi

    api, target = HfApi(library_name=LIBRARY), plan.target
    if not plan.state.exists:
        persistently(
            lambda: api.create_repo(target.repo_id, private=not plan.public, exist_ok=True),
            target,
            say,
        )
    if plan.pull_request and (plan.to_send or plan.delete):
        number = persistently(lambda: _pull_request(api, plan), target, say)
        return replace(target, revision=f"{PULL_REQUEST}{number}")
    is_branch = target.revision != "main" and not target.revision.startswith(PULL_REQUEST)
    if is_branch and not plan.state.has_revision:
        persistently(
            lambda: api.create_branch(target.repo_id, branch=target.revision, exist_ok=True),
            target,
            say,
        )
    return target


def _pull_request(api: Any, plan: PushPlan) -> int:
    """The number of the open pull request of this title, or of a new one."""
    repo_id = plan.target.repo_id
    for found in api.get_repo_discussions(repo_id, discussion_type="pull_request"):
        if found.title == plan.title and found.status in ("draft", "open"):
            return int(found.num)
    return int(api.create_pull_request(repo_id, plan.title).num)


def _delete(plan: PushPlan, target: RepositoryRef, say: Notify) -> None:
    """Remove what another artifact has left; its history stays."""
    from huggingface_hub import CommitOperationDelete, HfApi

    def delete() -> None:
        state = read_state(target)
        names = [name for name in plan.delete if name in state.files]
        if names:
            HfApi(library_name=LIBRARY).create_commit(
                target.repo_id,
                [CommitOperationDelete(name) for name in names],
                commit_message=f"Remove {len(names)} files of what was here before",
                revision=target.revision,
                parent_commit=state.commit,
            )

    if plan.delete:
        persistently(delete, target, say)


def _send(plan: PushPlan, target: RepositoryRef, group: Sequence[PushFile]) -> list[PushFile]:
    """Commit the files of a group that the Hub does not have; return them."""
    from huggingface_hub import CommitOperationAdd, HfApi

    state = read_state(target)
    missing = [file for file in group if not file.equals(state.files.get(file.name))]
    operations = []
    for file in missing:
        operation = CommitOperationAdd(file.name, file.content)
        operation.upload_info.sha256 = bytes.fromhex(file.sha256)  # spares a second reading
        operations.append(operation)
    if operations:
        HfApi(library_name=LIBRARY).create_commit(
            target.repo_id,
            operations,
            commit_message=_message(plan, missing),
            revision=target.revision,
            parent_commit=state.commit,
        )
    return missing


def _message(plan: PushPlan, files: Sequence[PushFile]) -> str:
    what = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    return f"{plan.title}: {what}"


def _compare(target: RepositoryRef, files: Sequence[PushFile], state: RemoteState) -> None:
    """Compare the hashes of the Hub with those of the files.

    Raises:
        VerificationError: naming the first file that is missing or differs.
    """
    for file in files:
        remote = state.files.get(file.name)
        if file.equals(remote):
            continue
        found = "nothing" if remote is None else remote.sha256 or remote.git_sha1
        expected = file.sha256 if remote is None or remote.sha256 else file.git_sha1
        raise VerificationError(
            f"{file.name} of {target.repo_id} at {target.revision} is not what was sent: "
            f"expected {expected}, got {found}.",
            remedy=f"Delete this file at {target.page}/tree/{target.revision} and run the same "
            "command again. Without its card the repository does not look finished.",
        )


def _finish(plan: PushPlan, target: RepositoryRef) -> str:
    """Open a pull request for review, now that it is whole; say where everything is."""
    if not target.revision.startswith(PULL_REQUEST):
        return target.page if target.revision == "main" else f"{target.page}/tree/{target.revision}"
    from huggingface_hub import HfApi

    number = int(target.revision.removeprefix(PULL_REQUEST))
    api = HfApi(library_name=LIBRARY)

    def open_it() -> None:
        if api.get_discussion_details(target.repo_id, number).status == "draft":
            api.change_discussion_status(target.repo_id, number, "open")

    persistently(open_it, target)
    return f"{target.page}/discussions/{number}"
