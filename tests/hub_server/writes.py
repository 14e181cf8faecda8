"""The write side of a `HubServer`: accounts, repositories, LFS uploads, commits, pull requests.

It speaks the protocol that huggingface_hub speaks without Xet: `preupload` says which files go
to LFS, the LFS batch says where to, a commit is newline-delimited JSON. A file is LFS by its
suffix alone (`hub_repo.LARGE_SUFFIXES`), as a `.gitattributes` would say.
"""

import base64
import json
import os
import re
import socket
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tests.hub_server.repo import LARGE_SUFFIXES, Repo, git_sha1, is_large, sha256
from tests.hub_server.store import Account, RefusedError

FIRST_FILE = ".gitattributes"  # what a new repository holds
WHEN = "2026-01-01T00:00:00.000Z"
READ_AT_ONCE = 65_536  # bytes of a body


class Uploads(BaseHTTPRequestHandler):
    """What a handler of requests needs beside reading: bodies, and lines that break."""

    hub: Any
    fault: Any
    received: int
    body: bytes

    def receive(self) -> bytes:
        """The body of the request; slowly, or not to its end, where a fault says so."""
        length = int(self.headers.get("Content-Length") or 0)
        cut = self.fault.cut_request_after if self.fault else -1
        end = cut if 0 <= cut < length else length
        data = bytearray()
        while len(data) < end:
            chunk = self.rfile.read(min(READ_AT_ONCE, end - len(data)))
            if not chunk:
                raise ConnectionResetError  # the client is gone
            data += chunk
            self.received = len(data)
            if self.fault and self.fault.bytes_per_second:
                time.sleep(READ_AT_ONCE / self.fault.bytes_per_second)
        if end < length:
            self.hang_up()
            raise ConnectionResetError
        return bytes(data)

    def hang_up(self) -> None:
        """Close the connection at once, as a broken line does."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def keep_upload(self, path: str) -> None:
        """Take the body of a PUT to the storage: /upload/OID/PART."""
        data = self.body
        if self.fault is not None and self.fault.spoils:
            data = bytes([data[0] ^ 1]) + data[1:]
        oid, part = re.fullmatch(r"/upload/([0-9a-f]{64})/(\d+)", path).groups()
        self.hub.store.receive(oid, int(part), data)


def answer_post(hub: Any, account: Account | None, path: str, query: dict[str, str], body: bytes):
    """Answer a POST request with a status and plain data."""
    for pattern, handler in _POSTS:
        if found := re.fullmatch(pattern, path):
            return handler(hub, account, found.groups(), query, body)
    raise RefusedError(404)


def answer_get(hub: Any, account: Account | None, path: str) -> Any:
    """Answer what a writer asks; None where the path is not one of those."""
    if path == "/api/whoami-v2":
        if account is None:
            raise RefusedError(401, "", "Invalid credentials in Authorization header")
        return account.described()
    if found := re.fullmatch(r"/api/models/(.+?)/discussions(?:/(\d+))?", path):
        repo = hub.repos[found[1]]
        if found[2]:
            return repo.discussions[int(found[2]) - 1]
        return {"count": len(repo.discussions), "start": 0, "discussions": repo.discussions}
    return None


def _create_repo(hub: Any, account: Account | None, _: Any, __: Any, body: bytes):
    asked = json.loads(body)
    if account is None:
        raise RefusedError(401, "", "Invalid username or password.")
    repo_id = f"{asked.get('organization') or account.name}/{asked['name']}"
    if not account.may_write(repo_id):
        namespace = repo_id.partition("/")[0]
        raise RefusedError(
            403, "", f"You don't have the rights to create a model under the namespace {namespace}"
        )
    if repo_id in hub.repos:
        url = f"{hub.url}/{repo_id}"
        raise RefusedError(409, "", "You already created this model repo", url=url)
    repo = hub.repos[repo_id] = Repo(repo_id)
    repo.private = asked.get("private", asked.get("visibility") == "private")
    first = hub.store.new_file(FIRST_FILE)
    first.write_text("".join(f"*{suffix} filter=lfs -text\n" for suffix in LARGE_SUFFIXES))
    _add_commit(repo, {FIRST_FILE: first}, "main")
    return 200, {"url": f"{hub.url}/{repo_id}", "id": repo_id}


def _preupload(hub: Any, account: Account | None, groups: Any, _: Any, body: bytes):
    _, files = _writable(hub, account, *groups)
    answers = []
    for file in json.loads(body)["files"]:
        name = file["path"]
        answer = {"path": name, "uploadMode": _mode(name), "shouldIgnore": False}
        if name in files:
            answer["oid"] = (sha256 if is_large(files[name]) else git_sha1)(files[name])
        answers.append(answer)
    return 200, {"files": answers}


def _lfs_batch(hub: Any, account: Account | None, groups: Any, _: Any, body: bytes):
    asked = json.loads(body)
    _writable(hub, account, groups[0], asked.get("ref", {}).get("name", "main"))
    size = hub.store.multipart_bytes
    objects = []
    for each in asked["objects"]:
        oid, has = each["oid"], each["oid"] in hub.store.lfs
        answer = {"oid": oid, "size": each["size"]}
        if not has:
            verify = {"href": f"{hub.url}/api/lfs/verify", "header": {}}
            answer["actions"] = {"upload": _upload_action(hub, oid, each["size"], size)}
            answer["actions"]["verify"] = verify
        objects.append(answer)
    return 200, {"transfer": "basic", "objects": objects}


def _upload_action(hub: Any, oid: str, num_bytes: int, part_bytes: int) -> dict[str, Any]:
    if not 0 < part_bytes < num_bytes:
        return {"href": f"{hub.cdn_url}/upload/{oid}/0"}
    numbers = range(1, -(-num_bytes // part_bytes) + 1)
    header = {str(number): f"{hub.cdn_url}/upload/{oid}/{number}" for number in numbers}
    href = f"{hub.url}/api/lfs/complete/{oid}"
    return {"href": href, "header": {"chunk_size": str(part_bytes), **header}}


def _complete(hub: Any, _: Any, groups: Any, __: Any, body: bytes):
    hub.store.complete(groups[0], [part["partNumber"] for part in json.loads(body)["parts"]])
    return 200, {}


def _verify(hub: Any, _: Any, __: Any, ___: Any, body: bytes):
    asked = json.loads(body)
    path = hub.store.lfs.get(asked["oid"])
    if path is None or path.stat().st_size != asked["size"]:
        raise RefusedError(404, "", "the object is not there, or of another size")
    return 200, {}


def _commit(hub: Any, account: Account | None, groups: Any, query: Any, body: bytes):
    repo, files = _writable(hub, account, *groups)
    branch = groups[1]
    if branch not in repo.refs:
        raise RefusedError(400, "", f"{branch} is not a branch")
    files = dict(files)
    for line in map(json.loads, body.splitlines()):
        key, value = line["key"], line["value"]
        if key == "header":
            if value.get("parentCommit") not in (None, repo.refs[branch]):
                raise RefusedError(412, "", "A commit has happened since. Please refresh.")
            summary = value["summary"]
        elif key == "file":
            files[value["path"]] = hub.store.new_file(value["path"])
            files[value["path"]].write_bytes(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[value["path"]] = _lfs_file(hub, value)
        elif files.pop(value["path"], None) is None:  # deletedFile
            raise RefusedError(404, "EntryNotFound", "A file with this name doesn't exist")
    commit = _add_commit(repo, files, branch, summary)
    hub.blobs |= {sha256(p): p for p in files.values() if is_large(p)}
    return 200, {"commitUrl": f"{hub.url}/{repo.repo_id}/commit/{commit}", "commitOid": commit}


def _lfs_file(hub: Any, value: dict[str, Any]) -> Path:
    if value["oid"] not in hub.store.lfs:
        raise RefusedError(400, "", f"LFS pointer of {value['path']} points to no object")
    path = hub.store.new_file(value["path"])
    os.link(hub.store.lfs[value["oid"]], path)
    return path


def _branch(hub: Any, account: Account | None, groups: Any, _: Any, body: bytes):
    repo, _files = _writable(hub, account, groups[0], "main")
    name = groups[1]
    if name.startswith("refs/"):
        raise RefusedError(400, "", "Invalid reference for a branch")
    if name in repo.refs:
        raise RefusedError(409, "", "Reference already exists")
    repo.refs[name] = repo.refs[json.loads(body or b"{}").get("startingPoint", "main")]
    return 201, {}


def _discussion(hub: Any, account: Account | None, groups: Any, _: Any, body: bytes):
    repo, asked = hub.repos[groups[0]], json.loads(body)
    if account is None:
        raise RefusedError(401, "", "Invalid username or password.")
    number = len(repo.discussions) + 1
    repo.refs[f"refs/pr/{number}"] = repo.refs["main"]
    discussion = {
        "num": number,
        "title": asked["title"],
        "author": {"name": account.name},
        "createdAt": WHEN,
        "status": "draft",
        "repo": {"name": repo.repo_id, "type": "model"},
        "isPullRequest": asked["pullRequest"],
        "events": [],
        "changes": {"base": "refs/heads/main"},
        "filesWithConflicts": [],
    }
    repo.discussions.append(discussion)
    return 200, discussion


def _status(hub: Any, account: Account | None, groups: Any, _: Any, body: bytes):
    discussion = hub.repos[groups[0]].discussions[int(groups[1]) - 1]
    discussion["status"] = json.loads(body)["status"]
    event = {"id": "e", "type": "status-change", "createdAt": WHEN, "author": {"name": "x"}}
    return 200, {"newStatus": event | {"data": {"status": discussion["status"]}}}


def _validate_yaml(*_: Any):
    return 200, {"errors": [], "warnings": []}


def _writable(hub: Any, account: Account | None, repo_id: str, ref: str):
    """The repository and the files of a ref, if the account may write to it."""
    repo = hub.repos.get(repo_id)
    if account is None:
        raise RefusedError(401, "", "Invalid username or password.")
    if repo is None or (repo.private and not account.owns(repo_id)):
        raise RefusedError(404, "RepoNotFound")
    is_own_pr = ref.startswith("refs/pr/") and ref in repo.refs
    if not account.may_write(repo_id) and not is_own_pr:
        raise RefusedError(403, "", "Your token lacks the right to write to this repository")
    commit = repo.refs.get(ref, ref)
    if commit not in repo.commits:
        raise RefusedError(404, "RevisionNotFound")
    return repo, repo.commits[commit]


def _add_commit(repo: Repo, files: dict[str, Path], ref: str, summary: str = "initial") -> str:
    commit = repo.next_hash()
    repo.commits[commit] = dict(sorted(files.items()))
    repo.refs[ref] = commit
    repo.log.append((ref, summary, sorted(files)))
    return commit


def _mode(name: str) -> str:
    return "lfs" if name.endswith(LARGE_SUFFIXES) else "regular"


_POSTS = (
    (r"/api/repos/create", _create_repo),
    (r"/api/validate-yaml", _validate_yaml),
    (r"/api/lfs/complete/([0-9a-f]{64})", _complete),
    (r"/api/lfs/verify", _verify),
    (r"/(.+?)\.git/info/lfs/objects/batch", _lfs_batch),
    (r"/api/models/(.+?)/preupload/(.+)", _preupload),
    (r"/api/models/(.+?)/commit/(.+)", _commit),
    (r"/api/models/(.+?)/branch/(.+)", _branch),
    (r"/api/models/(.+?)/discussions", _discussion),
    (r"/api/models/(.+?)/discussions/(\d+)/status", _status),
)
