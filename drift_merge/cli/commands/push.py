"""`drift-prior push` and `drift-merge push`: an artifact to the Hugging Face Hub."""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drift_merge.cli import options
from drift_merge.cli.entry import print_json
from drift_merge.cli.progress import progress
from drift_merge.cli.render import note, table
from drift_merge.hub.files import SIGNATURE
from drift_merge.hub.publish import MERGE_KIND, PRIOR_KIND, prepare_push, push_prepared
from drift_merge.hub.repository import PushRequest
from drift_merge.storage.sizes import size

if TYPE_CHECKING:
    from drift_merge.hub.publish import ArtifactKind, PreparedPush
    from drift_merge.hub.push import Pushed
    from drift_merge.hub.repository import PushRequest

_OPTIONS = options.chain(
    click.option("--public", is_flag=True, help="Anybody may see it; default private."),
    click.option("--revision", metavar="BRANCH", help="Branch to send to; made from main."),
    click.option("--pr", "pull_request", is_flag=True, help="Send it as a pull request."),
    click.option("--overwrite", is_flag=True, help="Replace another prior or merge that is there."),
    click.option("--license", metavar="ID", help="In the place of what the parents' cards say."),
    click.option("--card", type=options.PATH, help="Your README.md in the place of ours."),
    click.option("--sign", metavar="KEY", help="Sign it: a private key (PEM), or sigstore."),
    options.threads_option,
    click.option("-n", "--dry-run", is_flag=True, help="List files and bytes, and stop."),
    options.json_option,
    options.quiet_option,
)


@click.command(name="push")
@click.argument("directory", type=options.PATH, metavar="PRIOR")
@click.argument("repo_id", metavar="ORG/NAME")
@_OPTIONS
def push_prior(directory: Path, repo_id: str, **values: Any) -> None:
    """Verify a prior and send it to the Hugging Face Hub, privately.

    The card and the licenses of both parents are made for it. A push that was cut goes on with
    the same command; at its end every hash of the Hub has been compared.

    Guide: drift-prior guide publishing

    \b
    Example:
        drift-prior push prior/ org/name
    """

    _push(PRIOR_KIND, "drift-prior", directory, repo_id, values)


@click.command(name="push")
@click.argument("directory", type=options.PATH, metavar="OUT")
@click.argument("repo_id", metavar="ORG/NAME")
@_OPTIONS
def push_merge(directory: Path, repo_id: str, **values: Any) -> None:
    """Verify a merged checkpoint and send it to the Hugging Face Hub, privately.

    The card and the licenses of all parents are made for it. A push that was cut goes on with
    the same command; at its end every hash of the Hub has been compared.

    Guide: drift-merge guide publishing

    \b
    Example:
        drift-merge push merged/ org/name
    """

    _push(MERGE_KIND, "drift-merge", directory, repo_id, values)


def _push(
    kind: "ArtifactKind", program: str, directory: Path, repo_id: str, values: dict[str, Any]
) -> None:

    dry_run, threads = values.pop("dry_run"), values.pop("threads")
    as_json, quiet = values.pop("as_json"), values.pop("quiet")
    silent = quiet or as_json
    request = PushRequest(repo_id, **values)
    ready = prepare_push(kind, directory, request, note, dry_run=dry_run)
    _say_remarks(ready)
    if dry_run:
        _print_plan(ready, request, as_json=as_json)
        return
    try:
        pushed = push_prepared(
            kind,
            ready,
            (lambda _: None) if silent else note,
            threads=threads,
            progress=partial(progress, quiet=silent),
            quiet=silent or not sys.stderr.isatty(),
        )
    except KeyboardInterrupt:
        note(f"{repo_id} is incomplete, without its card; the same command completes it.")
        raise
    _print_pushed(pushed, ready, as_json=as_json)
    if not silent:
        where = shlex.quote(repo_id)
        note(f"Next: {program} pull {where} -o {shlex.quote(repo_id.partition('/')[2])}")


def _say_remarks(ready: "PreparedPush") -> None:

    for remark in ready.licenses.remarks:
        note(f"Warning [license]: {remark}")
    if ready.licenses.front.get("license") in ("unknown", "other"):
        note("  The card says so. If you know better: --license ID, or your own card with --card")
    if ready.strays:
        names = ", ".join(ready.strays[:5]) + (", ..." if len(ready.strays) > 5 else "")
        note(f"Not sent, since the manifest does not name them: {names}")


def _print_plan(ready: "PreparedPush", request: "PushRequest", *, as_json: bool) -> None:

    plan = ready.plan
    sent = {file.name for file in plan.to_send}
    rows = [[f.name, f"{f.size_bytes:,}", _status(f.name in sent)] for f in plan.files]
    total = sum(file.size_bytes for file in plan.to_send)
    is_private = plan.state.is_private if plan.state.exists else not request.public
    if as_json:
        files = [
            {"path": f.name, "bytes": f.size_bytes, "status": _status(f.name in sent)}
            for f in plan.files
        ]
        value = _place(plan.target, is_private) | {"exists": plan.state.exists, "files": files}
        value |= {"send_bytes": total, "delete": list(plan.delete), "not_sent": list(ready.strays)}
        value |= {"license": dict(ready.licenses.front), "remarks": list(ready.licenses.remarks)}
        print_json({"schema": 1, "dry_run": True, **value})
        return
    what = "private" if is_private else "public"
    where = "pull request to " if plan.pull_request else ""
    new = "" if plan.state.exists else ", new"
    print(f"To        {where}{plan.target.page} at {plan.target.revision} ({what}{new})")
    print(f"License   {', '.join(ready.licenses.front.values())}")
    for name in plan.delete:
        rows.insert(0, [name, "", "delete"])
    table(["file", "bytes", ""], rows)
    print(f"{len(sent):,} of {len(plan.files):,} files to send, {size(total)}")
    if request.sign is not None:
        note(f"{SIGNATURE} is made when they are sent (--sign).")
    note("Nothing was sent or verified (--dry-run).")


def _status(is_sent: bool) -> str:
    return "send" if is_sent else "there"


def _place(target: Any, is_private: bool) -> dict[str, Any]:
    return {"repo_id": target.repo_id, "revision": target.revision, "private": is_private}


def _print_pushed(pushed: "Pushed", ready: "PreparedPush", *, as_json: bool) -> None:

    if as_json:
        value = _place(pushed.target, pushed.is_private)
        value |= {"url": pushed.url, "commit": pushed.commit}
        value |= {"files": len(ready.plan.files), "sent": list(pushed.sent)}
        print_json({"schema": 1, **value, "sent_bytes": pushed.sent_bytes})
        return
    what = "private" if pushed.is_private else "public"
    note(
        f"Sent {len(pushed.sent):,} files, {size(pushed.sent_bytes)}; "
        f"{len(ready.plan.files):,} are there ({what}) with equal hashes, commit {pushed.commit}."
    )
    print(pushed.url)
