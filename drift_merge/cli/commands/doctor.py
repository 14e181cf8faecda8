"""`drift-prior doctor`: what this installation is made of, and what it may use."""

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from drift_merge.cli import options
from drift_merge.cli.entry import print_json
from drift_merge.storage.processes import num_cores
from drift_merge.storage.sizes import size

_PACKAGE = "drift_merge"
_NEEDED = ("torch", "safetensors", "huggingface_hub")


def doctor_action(*, as_json: bool) -> None:
    """Look and print."""
    found = examine()
    if as_json:
        print_json({"schema": 1, **found})
        return
    print("\n".join(_lines(found)))


def examine() -> dict[str, Any]:
    """Everything that is looked at, as plain data."""
    hub = _hub()
    places = {"working directory": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    places["Hub cache"] = Path(hub["cache"])
    return {
        "versions": {
            _PACKAGE: _version(_PACKAGE),
            "python": platform.python_version(),
            **{name: _version(name) for name in _NEEDED},
        },
        "extras": _extras(_requirements()),
        "devices": _devices(),
        "threads": num_cores(),
        "hub": hub,
        "free_bytes": {name: _free_bytes(path) for name, path in places.items()},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> list[str]:
    try:
        return metadata.requires(_PACKAGE) or []
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return []


def _extras(requirements: Iterable[str]) -> dict[str, dict[str, Any]]:
    """By extra: the installed version of each of its packages, None where it is missing."""
    found: dict[str, dict[str, Any]] = {}
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
        if name and extra:
            entry = found.setdefault(
                extra[1], {"packages": {}, "install": f"pip install '{_PACKAGE}[{extra[1]}]'"}
            )
            entry["packages"][name[0]] = _version(name[0])
    return found


def _devices() -> list[dict[str, Any]]:
    """What torch can compute on; a broken torch is a finding too, and none that ends the look."""
    devices: list[dict[str, Any]] = [{"name": "cpu", "description": platform.machine()}]
    try:
        import torch

        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            device = {"name": f"cuda:{number}", "description": found.name}
            devices.append({**device, "memory_bytes": found.total_memory})
    except (ImportError, OSError, RuntimeError) as error:
        devices.append({"name": "torch", "description": f"does not work: {error}"})
    return devices


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    return {
        "endpoint": constants.ENDPOINT,
        "offline": bool(constants.HF_HUB_OFFLINE),
        "cache": str(cache),
        "cache_bytes": _size_bytes(cache),
        "token": get_token() is not None,  # whether, never which
    }


def _size_bytes(directory: Path) -> int:
    """Bytes of the files below a directory; links, by which snapshots name blobs, count as none."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            try:
                total += 0 if path.is_symlink() else path.stat().st_size
            except OSError:  # deleted meanwhile
                continue
    return total


def _free_bytes(path: Path) -> int | None:
    """Of the disk that holds `path`, or would; None where nobody may look."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _lines(found: Mapping[str, Any]) -> list[str]:
    lines = ["Versions"]
    lines += [f"  {name:18}{version or 'missing'}" for name, version in found["versions"].items()]
    lines.append("Extras")
    for extra, entry in found["extras"].items():
        packages = entry["packages"]
        listed = ", ".join(f"{name} {version or 'missing'}" for name, version in packages.items())
        lines.append(f"  {extra:18}{listed}")
        if None in packages.values():
            lines.append(f"  {'':18}to install: {entry['install']}")
    lines.append("Compute")
    for device in found["devices"]:
        memory = f", {size(device['memory_bytes'])}" if "memory_bytes" in device else ""
        lines.append(f"  {device['name']:18}{device['description']}{memory}")
    lines.append(f"  {'threads':18}{found['threads']}")
    hub = found["hub"]
    lines += [
        "Hub",
        f"  {'endpoint':18}{hub['endpoint']}{' (offline)' if hub['offline'] else ''}",
        f"  {'cache':18}{hub['cache']}, {size(hub['cache_bytes'])}",
        f"  {'token':18}{'set' if hub['token'] else 'not set; log in with: hf auth login'}",
        "Free disk",
    ]
    for name, free in found["free_bytes"].items():
        lines.append(f"  {name:18}{'unknown' if free is None else size(free)}")
    return lines


@click.command()
@options.json_option
def doctor(as_json: bool) -> None:
    """Show versions, extras, devices, the Hub's cache, whether a token is set, and free disk.

    Guide: drift-prior guide doctor

    \b
    Example:
        drift-prior doctor
    """
    doctor_action(as_json=as_json)
