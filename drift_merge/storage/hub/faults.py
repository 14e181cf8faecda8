"""Explains what goes wrong while reading from the Hub, and tries again what may pass.

huggingface_hub speaks through `requests` (before 1.0), `httpx` (1.x) or `httpx2` (2.x).
Errors are told apart by huggingface_hub's own classes and by status codes, so that none of
the three is imported here.
"""

import errno
import os
import re
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TypeVar

from drift_merge.errors import DriftMergeError, OutputError, SourceError
from drift_merge.storage.sources import Source

T = TypeVar("T")

LIBRARY = "drift_merge"  # in the user agent of every request

# Seconds before the second and the third attempt; downloads resume, so repeating one is cheap.
WAITS_SECONDS = (1.0, 3.0)
_LONGEST_WAIT_SECONDS = 30.0
_PASSING_STATUS = (408, 429, 500, 502, 503, 504)
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def patiently(
    call: Callable[[], T],
    source: Source,
    *,
    retry_answers: bool = True,
    waits: Sequence[float] | None = None,
) -> T:
    """Run `call`, again if the fault may pass, and raise what is left as one of our errors.

    Args:
        call: talks to the Hub through huggingface_hub; repeating it is harmless.
        source: what is being fetched, for messages.
        retry_answers: try again after answers such as HTTP 503. False where `call` has done so,
            as snapshot_download does in huggingface_hub 2.x; before it, they are tried again.
        waits: seconds before every further attempt; None for WAITS_SECONDS.

    Raises:
        SourceError: the Hub, the network or the user's rights.
        OutputError: the cache cannot be written.
    """
    retry_answers = retry_answers or not client_waits()
    for wait in (*(WAITS_SECONDS if waits is None else waits), None):
        try:
            return call()
        except foreign_errors() as error:
            if wait is None or not may_pass(error, retry_answers):
                raise explain(error, source) from error
            time.sleep(asked_wait(error) or wait)
    raise AssertionError("unreachable: the last attempt returns or raises")


def client_waits() -> bool:
    """Whether huggingface_hub itself waits for a Hub that fails, half a minute: in 2.x."""
    return not version("huggingface_hub").startswith(("0.", "1."))


def explain(error: Exception, source: Source) -> DriftMergeError:
    """Say in the user's words what an exception of huggingface_hub means for `source`."""
    from huggingface_hub import errors

    error = origin_of(error)
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_answer(error, source)
    if is_offline() or isinstance(error, errors.OfflineModeIsEnabled):
        return offline_error(source)
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        return OutputError(
            f"The Hub's cache cannot be written while fetching {source.label}: {error}.",
            remedy="Free some space, or put the cache elsewhere: export HF_HOME=/path/with/space",
        )
    detail = first_line(error)
    here = f"There is no directory {source.given} here. "
    if "Timeout" in type(error).__name__ or isinstance(error, TimeoutError):
        return SourceError(
            f"{here}{endpoint()} did not answer in time while fetching {source.label} ({detail}).",
            remedy="Try again; for a slow line: export HF_HUB_DOWNLOAD_TIMEOUT=60",
        )
    return SourceError(
        f"{here}Fetching {source.label} from {endpoint()} failed: {detail}.",
        remedy="Check the network and the proxy settings, then run the same command again: "
        "finished parts are kept.\nA copy in the cache needs no network: export HF_HUB_OFFLINE=1",
    )


def offline_error(source: Source, missing: str = "") -> SourceError:
    """The error for something that is not in the cache while the Hub may not be asked.

    Args:
        source: what was asked for.
        missing: the file that is absent, if it is only one.
    """
    variable = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
    if not os.environ.get(variable):
        variable = "HF_HUB_OFFLINE"
    what = f"{missing} of {source.label}" if missing else source.label
    return SourceError(
        f"{what} is not here and not in the Hub's cache, and {variable} forbids to fetch it.",
        remedy=f"Fetch it once with the network on: {variable}=0 {download_command(source)}",
    )


def download_command(source: Source) -> str:
    """A command that puts the source into the Hub's cache."""
    revision = f" --revision {source.revision}" if source.revision else ""
    return f"hf download {source.repo_id}{revision}"


def is_offline() -> bool:
    """Whether huggingface_hub has been told not to use the network."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _explain_answer(error: Exception, source: Source) -> SourceError:
    from huggingface_hub import errors

    page = f"{endpoint()}/{source.repo_id}"
    status = status_of(error)
    if isinstance(error, errors.GatedRepoError):
        return SourceError(
            f"{source.label} is gated: its owner asks for consent before download (HTTP {status}).",
            remedy=f"Accept the terms at {page} and log in with the same account: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(
            f"{source.repo_id} has no revision {source.revision!r} on {endpoint()}.",
            remedy=f"Its branches and tags are listed at {page}/tree/main; "
            f"without a revision the default branch is used: {source.repo_id}",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceError(
            f"{source.given} is no path here, and {endpoint()} has no model {source.repo_id} that "
            f"you may see (HTTP {status}).",
            remedy="Check the spelling. If the model is private: hf auth login",
        )
    if status in (401, 403):
        return SourceError(
            f"{endpoint()} refuses {source.label} (HTTP {status}): the token is missing, expired "
            "or has too few rights.",
            remedy=f"Log in: hf auth login\nIf the model has terms, accept them at {page}",
        )
    if status == 429:
        return SourceError(
            f"{endpoint()} limits the rate of requests (HTTP 429) while fetching {source.label}.",
            remedy="Wait some minutes and run the same command again. Logged-in users may ask more "
            "often: hf auth login",
        )
    if status >= 500:
        return SourceError(
            f"{endpoint()} failed to serve {source.label} (HTTP {status}).",
            remedy="The fault is on that side: try again later. Finished parts are kept.",
        )
    return SourceError(
        f"{endpoint()} answered HTTP {status} for {source.label}: {first_line(error)}.",
        remedy=f"See whether the files are there: {page}/tree/{source.revision or 'main'}",
    )


def foreign_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub may raise: its errors, its transport's, the disk's, a bad answer's."""
    from huggingface_hub import errors

    # The first base that is not huggingface_hub's own is the HTTPError of its transport; in httpx
    # that is the parent of timeouts and connection errors too, in requests they are OSErrors.
    transport = next(
        base
        for base in errors.HfHubHTTPError.__mro__
        if not base.__module__.startswith("huggingface_hub")
    )
    # RuntimeError: hf_xet. ValueError: an answer that is not JSON, e.g. of a login portal.
    xet = getattr(errors, "XetDownloadError", RuntimeError)  # huggingface_hub >= 2
    return (transport, OSError, RuntimeError, ValueError, xet)


def origin_of(error: Exception) -> Exception:
    """The fault behind what huggingface_hub puts on top.

    That is "not found in the cache either", or a RuntimeError that names the file being sent.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error.__cause__, Exception) and (
        isinstance(error, LocalEntryNotFoundError) or type(error) is RuntimeError
    ):
        error = error.__cause__
    return error


def may_pass(error: Exception, retry_answers: bool = True) -> bool:
    """Whether the same request may succeed a little later.

    Args:
        error: of `foreign_errors`.
        retry_answers: count answers such as HTTP 503 among them.
    """
    from huggingface_hub import errors

    error = origin_of(error)
    if isinstance(error, errors.HfHubHTTPError):
        return retry_answers and status_of(error) in _PASSING_STATUS
    if is_offline() or isinstance(error, (errors.OfflineModeIsEnabled, ValueError)):
        return False
    return not (isinstance(error, OSError) and error.errno in _CANNOT_WRITE)


def asked_wait(error: Exception, longest: float = _LONGEST_WAIT_SECONDS) -> float:
    """Seconds that the Hub asks to wait (Retry-After, or RateLimit); 0 if it does not say.

    Args:
        error: an answer that the client has raised.
        longest: the most that is returned, in seconds.
    """
    response = getattr(origin_of(error), "response", None)
    headers = {} if response is None else response.headers
    asked = str(headers.get("Retry-After", ""))
    if not asked.isdigit():
        # "api";r=0;t=55: none left, and 55 seconds until there are some again
        limit = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", str(headers.get("RateLimit", "")))
        asked = limit[1] if limit else ""
    return min(float(asked), longest) if asked.isdigit() else 0.0


def status_of(error: Exception) -> int:
    """The HTTP status of an answer that the client has raised; 0 for any other error."""
    response = getattr(error, "response", None)
    return 0 if response is None else int(response.status_code)


def endpoint() -> str:
    """The address of the Hub in use (HF_ENDPOINT)."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def first_line(error: Exception) -> str:
    """The class of an error and the first line of its text."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}".rstrip(".: ")
