"""Sizes in bytes, read from what people write and shown as they read them."""

import re

from drift_merge.errors import RecipeError

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{u}B": 1000**i for i, u in enumerate("KMGT", start=1)},
    **{f"{u}IB": 1024**i for i, u in enumerate("KMGT", start=1)},
}


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" (1000-based), "512MiB" (1024-based) or "1000000"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = match[2].upper() if match else ""
    if match is None or unit not in _UNITS or float(match[1]) * _UNITS[unit] < 1:
        raise RecipeError(
            f"{text!r} is not a size.", remedy="Write a number and a unit, such as 5GB or 512MiB."
        )
    return int(float(match[1]) * _UNITS[unit])


def in_words(num_bytes: int) -> str:
    """Bytes for people and for machines: `1.31 GB (1,310,000,000 bytes)`."""
    value, unit = float(num_bytes), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    exact = f"{num_bytes:,} bytes"
    return exact if unit == "bytes" else f"{value:.2f} {unit} ({exact})"


def size(num_bytes: int) -> str:
    """Bytes for people: 12.3 GB."""
    value = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} GB" if value < 1000 else f"{value / 1000:,.2f} TB"
