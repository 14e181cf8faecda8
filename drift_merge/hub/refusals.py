"""Explains what goes wrong while sending to the Hub, and tries again what may pass.

The Hub's refusals (rights, another content, a full quota) are errors at once. Broken lines and
failing servers are tried again, a few times; the caller looks at the repository anew each time,
so that an answer that was lost does no harm.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from drift_merge.errors import DriftMergeError, OutputError, SourceError
from drift_merge.storage.hub.faults import (
    asked_wait,
    endpoint,
    first_line,
    foreign_errors,
    is_offline,
    origin_of,
    status_of,
)

T = TypeVar("T")

# Seconds before each further attempt; huggingface_hub has tried several times by itself.
WAITS_SECONDS = (2.0, 10.0, 30.0)
LONGEST_WAIT_SECONDS = 600.0  # what the Hub may ask for; more ends the run with that number
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
_LOG_IN = "Log in with a token that may write: hf auth login"


@dataclass(frozen=True, slots=True)
class RepositoryRef:
    """Where something is sent to."""

    repo_id: str  # "org/name"
    revision: str = "main"  # branch, or refs/pr/N

    @property
    def page(self) -> str:
        """The page of the repository."""
        return f"{endpoint()}/{self.repo_id}"


def persistently(
    call: Callable[[], T], target: RepositoryRef, say: Callable[[str], None] = lambda _: None
) -> T:
    """Run `call`, again if the fault may pass, and raise what is left as one of our errors.

    Args:
        call: talks to the Hub; repeating it is harmless.
        target: for messages.
        say: takes a sentence for the user before every long wait.

    Raises:
        OutputError: the user's rights, or what the Hub does not accept.
        SourceError: the network, or a Hub that keeps failing.
    """
    for wait in (*WAITS_SECONDS, None):
        try:
            return call()
        except foreign_errors() as error:
            asked = asked_wait(error, longest=float("inf"))
            if wait is None or asked > LONGEST_WAIT_SECONDS or not _may_pass(error):
                raise explain(error, target) from error
            seconds = asked or wait
            say(f"{endpoint()}: {_short(error)}; trying again in {seconds:.0f} s.")
            time.sleep(seconds)
    raise AssertionError("unreachable: the last attempt returns or raises")


def explain(error: Exception, target: RepositoryRef) -> DriftMergeError:
    """Say in the user's words what an exception of huggingface_hub means for `target`."""
    from huggingface_hub import errors

    error = origin_of(error)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return no_token(target)
    if status_of(error):  # before 1.0 some answers are the transport's own errors
        return _explain_answer(error, target)
    if is_offline() or isinstance(error, errors.OfflineModeIsEnabled):
        return SourceError(
            f"HF_HUB_OFFLINE forbids to send anything to {target.repo_id}.",
            remedy="Send it with the network on: HF_HUB_OFFLINE=0, and the same command again.",
        )
    if isinstance(error, ValueError) and "README.md" in str(error):
        words = " ".join(str(error).split())
        return OutputError(
            f"{endpoint()} does not accept the card of {target.repo_id}: {words}",
            remedy="Give your own with --card, or another --license; then the same command sends "
            "the card alone.",
        )
    return SourceError(
        f"Sending to {target.repo_id} at {endpoint()} failed: {first_line(error)}.",
        remedy="Check the network and the proxy settings, then run the same command again: what "
        "has arrived is not sent again.",
    )


def no_token(target: RepositoryRef) -> OutputError:
    """The error for a user who is not logged in."""
    return OutputError(
        f"Nothing can be sent to {target.repo_id}: no token of {endpoint()} is set here.",
        remedy="Log in with a token that may write: hf auth login\n"
        f"Tokens are made at {endpoint()}/settings/tokens; HF_TOKEN is read too.",
    )


def _explain_answer(error: Exception, target: RepositoryRef) -> DriftMergeError:
    status = status_of(error)
    said = str(getattr(error, "server_message", "") or "").strip().splitlines()
    reason = f": {said[0].rstrip('.')}" if said else ""
    if status == 401:
        return OutputError(
            f"{endpoint()} does not know the token (HTTP 401): it is wrong, expired or revoked.",
            remedy=f"{_LOG_IN}\nIf HF_TOKEN is set, it is used before the one you log in with.",
        )
    if status == 403:
        return OutputError(
            f"The token may not write to {target.repo_id} (HTTP 403){reason}.",
            remedy=f"{_LOG_IN}\nOr push to a name of your own, or open a pull request: --pr",
        )
    if status == 404:
        return OutputError(
            f"{endpoint()} has no {target.repo_id} at {target.revision} that this token may see "
            "(HTTP 404).",
            remedy=f"Check the spelling at {target.page}. If it is private: hf auth login",
        )
    if status == 412:
        return OutputError(
            f"{target.repo_id} has changed while it was being written (HTTP 412).",
            remedy="Somebody else commits there too. Run the same command again: it looks anew.",
        )
    if status == 429:
        asked = asked_wait(error, longest=float("inf"))
        wait = f"It asks to wait {asked:.0f} s. " if asked else ""
        return SourceError(
            f"{endpoint()} limits the rate of requests (HTTP 429).",
            remedy=f"{wait}Run the same command again then: what has arrived is not sent again.",
        )
    if status >= 500:
        return SourceError(
            f"{endpoint()} keeps failing (HTTP {status}) while {target.repo_id} is sent.",
            remedy="The fault is on that side. Run the same command again later: what has arrived "
            "is not sent again.",
        )
    return OutputError(
        f"{endpoint()} refuses what is sent to {target.repo_id} (HTTP {status}){reason}.",
        remedy=f"See the repository and its settings: {target.page}",
    )


def _may_pass(error: Exception) -> bool:
    from huggingface_hub import errors

    error = origin_of(error)
    if status_of(error):
        return status_of(error) in _PASSING_STATUS
    refusals = (ValueError, FileNotFoundError, PermissionError, errors.OfflineModeIsEnabled)
    return not (is_offline() or isinstance(error, refusals))


def _short(error: Exception) -> str:
    status = status_of(origin_of(error))
    return f"HTTP {status}" if status else first_line(origin_of(error))
