"""A small Hugging Face Hub on the loopback interface, for the unmodified huggingface_hub client.

It serves local directories as repositories: the model API, the file tree, `resolve` with
ranges, redirects of large files to a second origin (the "CDN"), the Hub's error headers. Faults
are injected per request, and every exchange is logged with the bytes that were sent.

    with HubServer() as hub:
        hub.add_commit("org/name", tmp_path / "model")
        with connected(hub, tmp_path / "home", monkeypatch): ...    # client.py
"""

import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.hub_server import writes
from tests.hub_server.repo import Repo, git_sha1, info, is_large, sha256, tree
from tests.hub_server.store import Account, RefusedError, Store

_SENT_AT_ONCE = 65_536
# Two hosts, as in the world: clients take what comes from one host for one server.
_HOSTS = {"hub": "127.0.0.1", "cdn": "127.0.0.2"}
_ERROR_CODES = {
    "RepoNotFound": "Repository not found",
    "RevisionNotFound": "Invalid rev id",
    "EntryNotFound": "Entry not found",
    "GatedRepo": "Access to this model is restricted",
}


@dataclass
class Fault:
    """What to do to requests whose "METHOD /path" matches; the oldest matching fault acts.

    A range follows the path: "GET /path bytes=0-99".
    """

    match: str  # regular expression, searched
    times: int = 1_000_000  # how many requests it strikes
    status: int = 0  # answer with this status instead
    code: str = ""  # X-Error-Code of that answer
    headers: dict[str, str] = field(default_factory=dict)  # more headers of that answer
    delay_seconds: float = 0.0  # before the answer
    cut_after: int = -1  # close the connection after so many bytes of the body
    bytes_per_second: float = 0.0  # throttle both bodies; 0 is unthrottled
    ignore_range: bool = False  # answer 200 with the whole file
    body: bytes | None = None  # answer 200 with this instead
    cut_request_after: int = -1  # close the connection after so many bytes of the request's body
    loses_answer: bool = False  # do what is asked, then close the connection without an answer
    spoils: bool = False  # keep an uploaded file with its first byte changed


@dataclass(frozen=True)
class Exchange:
    """One request and what was sent for it."""

    method: str
    path: str
    range: str  # the Range header, or ""
    has_token: bool
    origin: str  # "hub" or "cdn"
    status: int
    bytes_sent: int  # of the body
    bytes_received: int = 0  # of the request's body


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed in the middle of a line are what some tests are about."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class HubServer:
    """The Hub and its CDN, each on its own loopback address, until the `with` block ends."""

    def __init__(self, store: Path | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, bool] = {}  # token -> has access to gated and private repositories
        self.accounts: dict[str, Account] = {}  # token -> who may write, and what
        self.store = Store(store or Path())  # of uploads; a server without one is only read from
        self.faults: list[Fault] = []
        self.bytes_per_second = 0.0  # of all bodies together; 0 is unthrottled
        self._idle_at = 0.0  # when the throttled line has sent all that it was given
        self._log: list[Exchange] = []
        self._num_open = 0  # requests that are being answered
        self.num_begun = 0  # requests so far, those that are being answered included
        self.blobs: dict[str, Path] = {}  # sha256 -> file, as the CDN serves them
        self._changed = threading.Condition()
        self.closing = threading.Event()
        self._servers = [self._listen("hub"), self._listen("cdn")]
        self.url, self.cdn_url = ("http://{}:{}".format(*s.server_address) for s in self._servers)

    def __enter__(self) -> "HubServer":
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.02,)) for server in self._servers
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()

    def _listen(self, origin: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "origin": origin})
        return _Server((_HOSTS[origin], 0), handler)

    def add_commit(self, repo_id: str, folder: Path, ref: str = "main") -> str:
        """Make the folder's files the newest commit of a branch (or tag); return its hash."""
        repo = self.repos.setdefault(repo_id, Repo(repo_id))
        commit = repo.add_commit(folder, ref)
        self.blobs |= {sha256(p): p for p in repo.commits[commit].values() if is_large(p)}
        return commit

    def inject(self, match: str, **what: Any) -> Fault:
        """Add a fault; see `Fault` for what it can be."""
        fault = Fault(match, **what)
        self.faults.append(fault)
        return fault

    def begin_request(self, request: str) -> Fault | None:
        """Note a request; return the fault that strikes it, counted as used."""
        with self._changed:
            self._num_open += 1
            self.num_begun += 1
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, request):
                    fault.times -= 1
                    return fault
        return None

    def end_request(self, exchange: Exchange) -> None:
        """Log an exchange whose last byte has been sent."""
        with self._changed:
            self._log.append(exchange)
            self._num_open -= 1
            self._changed.notify_all()

    def requests(self, match: str = "") -> list[Exchange]:
        """The exchanges so far whose "METHOD /path" matches the regular expression."""
        with self._changed:
            # A client has its answer a moment before the server has logged it.
            self._changed.wait_for(lambda: self._num_open == 0, timeout=1.0)
            return [x for x in self._log if re.search(match, f"{x.method} {x.path}")]

    def forget_requests(self) -> None:
        """Begin an empty log."""
        self.requests()
        self._log.clear()

    def pace(self, size: int) -> None:
        """Wait as long as `size` more bytes take on the throttled line that all requests share."""
        if self.bytes_per_second:
            with self._changed:
                # A pause that was too long is made up for: up to a tenth of a second at once.
                begin = max(self._idle_at, time.monotonic() - 0.1)
                self._idle_at = begin + size / self.bytes_per_second
                wait = self._idle_at - time.monotonic()
            self.closing.wait(wait)

    def bytes_sent(self, match: str = "") -> int:
        """Bytes of all bodies sent for matching requests."""
        return sum(exchange.bytes_sent for exchange in self.requests(match))

    def bytes_received(self, match: str = "") -> int:
        """Bytes of all bodies that came with matching requests."""
        return sum(exchange.bytes_received for exchange in self.requests(match))


class _Handler(writes.Uploads):
    hub: HubServer
    origin: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: 40 ms per answer without
    fault: Fault | None
    status: int
    sent: int

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: `HubServer.log` has it all."""

    def do_GET(self) -> None:
        self._exchange()

    def do_HEAD(self) -> None:
        self._exchange()

    def do_POST(self) -> None:
        self._exchange()

    def do_PUT(self) -> None:
        self._exchange()

    def _exchange(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.status, self.sent, self.received = 0, 0, 0
        asked = self.headers.get("Range", "")
        self.fault = self.hub.begin_request(f"{self.command} {path} {asked}".rstrip())
        try:
            self.body = self.receive()
            self._answer(path)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True  # the client has read enough
        finally:
            has_token = self._token() != ""
            counts = (self.status, self.sent, self.received)
            self.hub.end_request(
                Exchange(self.command, path, asked, has_token, self.origin, *counts)
            )

    def _answer(self, path: str) -> None:
        try:
            if self.fault is not None:
                self.hub.closing.wait(self.fault.delay_seconds)
                if self.fault.status:
                    raise RefusedError(self.fault.status, self.fault.code)
            self._route(path)
        except RefusedError as refused:
            self._refuse(refused)

    def _route(self, path: str) -> None:
        if self.origin == "cdn":
            if self.command == "PUT":
                self.keep_upload(path)
                return self._send(200, {"ETag": '"part"'}, b"")
            return self._send_file(self.hub.blobs[path.rpartition("/")[2]], {})
        if self.command == "POST":
            query = dict(parse_qsl(urlsplit(self.path).query))
            status, answer = writes.answer_post(self.hub, self._account(), path, query, self.body)
            return self._send_json(answer, status)
        if (answer := writes.answer_get(self.hub, self._account(), path)) is not None:
            return self._send_json(answer)
        if api := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/(.+))?", path):
            repo_id, what, ref = api.groups()
            ref, folder = self._split(repo_id, ref or "main") if what == "tree" else (ref, "")
            commit, files = self._find(repo_id, ref or "main", is_file=False)
            files = {name: path for name, path in files.items() if name.startswith(folder)}
            if what != "tree":
                return self._send_json(info(self.hub.repos[repo_id], commit, files))
            if folder and not files:
                raise RefusedError(404, "EntryNotFound")
            return self._send_json(tree(files))
        if file := re.fullmatch(r"/([^/]+(?:/[^/]+)?)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
            repo_id, ref, name = file.groups()
            commit, files = self._find(repo_id, ref, is_file=True)
            return self._resolve(commit, files.get(name))
        raise RefusedError(404)

    def _split(self, repo_id: str, text: str) -> tuple[str, str]:
        """Take `main/folder` apart; a ref too may hold slashes."""
        repo = self.hub.repos.get(repo_id)
        for ref in (*repo.refs, *repo.commits) if repo else ():
            if text.startswith(f"{ref}/"):
                return ref, text.removeprefix(f"{ref}/") + "/"
        return text, ""

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _account(self) -> Account | None:
        return self.hub.accounts.get(self._token())

    def _find(self, repo_id: str, ref: str, *, is_file: bool) -> tuple[str, dict[str, Path]]:
        """The commit and its files, if the caller may see them."""
        repo, token = self.hub.repos.get(repo_id), self._token()
        account = self._account()
        has_access = self.hub.tokens.get(token, account is not None and account.owns(repo_id))
        if repo is None or (repo.private and not has_access):
            raise RefusedError(404 if token else 401, "RepoNotFound")
        if repo.gated and is_file and not has_access:
            raise RefusedError(403 if token else 401, "GatedRepo")
        commit = repo.refs.get(ref, ref)
        if commit not in repo.commits:
            raise RefusedError(404, "RevisionNotFound")
        return commit, repo.commits[commit]

    def _resolve(self, commit: str, path: Path | None) -> None:
        head = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path is None:
            raise RefusedError(404, "EntryNotFound")
        if not is_large(path):
            return self._send_file(path, head | {"ETag": f'"{git_sha1(path)}"'})
        name = sha256(path)
        head |= {
            "X-Linked-Size": str(path.stat().st_size),
            "X-Linked-ETag": f'"{name}"',
            "Location": f"{self.hub.cdn_url}/lfs/{name}",
        }
        self._send(302, head, b"")

    def _send_json(self, answer: object, status: int = 200) -> None:
        self._send(status, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _send_file(self, path: Path, head: dict[str, str]) -> None:
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or (self.fault and self.fault.ignore_range):
            return self._send(200, head, path.read_bytes())
        first, last = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
        if first >= size:
            return self._send(416, head | {"Content-Range": f"bytes */{size}"}, b"")
        head |= {"Content-Range": f"bytes {first}-{last}/{size}"}
        with open(path, "rb") as file:
            file.seek(first)
            return self._send(206, head, file.read(last + 1 - first))

    def _refuse(self, refused: RefusedError) -> None:
        message = refused.message or _ERROR_CODES.get(refused.code, "Refused")
        head = {"X-Error-Message": message}
        if refused.code:
            head["X-Error-Code"] = refused.code
        more = self.fault.headers if self.fault else {}
        body = json.dumps({"error": message} | refused.more).encode()
        self._send(refused.status, head | more, body)

    def _send(self, status: int, head: dict[str, str], body: bytes) -> None:
        if self.fault and self.fault.body is not None and status < 300:
            body = self.fault.body
        if self.fault and self.fault.loses_answer:
            return self.hang_up()
        self.status = status
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | head).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(body)

    def _send_body(self, body: bytes) -> None:
        fault = self.fault or Fault("")
        end = len(body) if fault.cut_after < 0 else min(fault.cut_after, len(body))
        for start in range(0, end, _SENT_AT_ONCE):
            self.wfile.write(body[start : min(start + _SENT_AT_ONCE, end)])
            self.hub.pace(min(start + _SENT_AT_ONCE, end) - start)
            self.sent = min(start + _SENT_AT_ONCE, end)
            if fault.bytes_per_second:
                time.sleep(_SENT_AT_ONCE / fault.bytes_per_second)
        if fault.cut_after >= 0:
            self.wfile.flush()
            self.close_connection = True
