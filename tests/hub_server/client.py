"""Point huggingface_hub at a `HubServer`, in this process or in a subprocess."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from drift_merge.storage.hub import faults, ranges
from tests.hub_server.server import HubServer


def environment(hub: HubServer, home: Path) -> dict[str, str]:
    """Variables that make a subprocess use `hub`, with its cache and token below `home`."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,127.0.0.2",
        # Nothing here speaks TLS, and every new client reads all authorities: 40 ms each.
        "SSL_CERT_FILE": "",
        "SSL_CERT_DIR": str(home / "authorities"),
    }


@contextmanager
def connected(hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make this process use `hub`: huggingface_hub has read the environment at its import."""
    for variable in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
    ):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment(hub, home).items():
        monkeypatch.setenv(variable, value)
    values: dict[str, object] = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_ETAG_TIMEOUT": 2,
        "HF_HUB_DOWNLOAD_TIMEOUT": 2,
    }
    for name, setting in values.items():
        monkeypatch.setattr(constants, name, setting, raising=False)
        # huggingface_hub < 1.0 copied some of them at its import.
        if hasattr(file_download, name):
            monkeypatch.setattr(file_download, name, setting)
    _close_sessions()
    yield
    _close_sessions()


@contextmanager
def impatient(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that this process uses, and repeats failed requests to at once."""
    never_wait(monkeypatch)
    with HubServer() as server, connected(server, home, monkeypatch):
        yield server


def never_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat failed requests at once: huggingface_hub and we wait seconds before each."""
    monkeypatch.setattr(faults, "WAITS_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(ranges, "WAITS_SECONDS", (0.01, 0.02, 0.03, 0.04))
    for module in (file_download, _http):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None), raising=False)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_HUB_OFFLINE=1 does at the import of huggingface_hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _close_sessions()


def _close_sessions() -> None:
    """Close pooled connections, so that none outlives its server."""
    name = (
        "close_session" if hasattr(huggingface_hub, "close_session") else "configure_http_backend"
    )
    getattr(huggingface_hub, name)()  # the latter before 1.0
