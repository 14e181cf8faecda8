"""Options that the functions of the Python face share, from the tables of the command line."""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from drift_merge.engine.job import RunOptions
from drift_merge.plans.plan import Plan
from drift_merge.recipes.options import recipe_options
from drift_merge.recipes.words import DEFAULT_CACHE_SIZE, PRIOR
from drift_merge.storage.processes import num_cores
from drift_merge.storage.sizes import parse_size

Where = str | Path  # a directory, a `.safetensors` file beside its config.json, or a Hub id
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Running(TypedDict, total=False):
    """How it is done; no byte of the output depends on it."""

    device: str
    threads: int | None
    stream: bool
    cache_limit: str
    overwrite: bool | Literal["any"]
    progress: bool


class Selecting(TypedDict, total=False):
    """Which tensors."""

    modules: str
    layers: str | None
    map_file: Path | None


class How(Running, Selecting, total=False):
    """Which tensors, how they are written, and how it is done."""

    on_mismatch: str
    dtype: str
    round: str
    round_seed: int
    max_shard_size: str
    allow_nonfinite: bool


_RUNNING: dict[str, tuple[Any, str]] = {  # default, and what it is
    "device": ("cpu", "Where to compute: cpu, cuda, cuda:N."),
    "threads": (None, "Workers; None for one per core that this process may use."),
    "stream": (False, "Read Hub sources shard by shard: fetch, use, delete."),
    "cache_limit": (DEFAULT_CACHE_SIZE, "With `stream`: disk for fetched shards."),
    "overwrite": (False, 'Replace an output of ours after success; "any": whatever is there.'),
    "progress": (True, "Show a tqdm bar."),
}


def takes(
    kind: type, method: str = PRIOR, without: Sequence[str] = ()
) -> Callable[[_Function], _Function]:
    """Spell `**how` out in the signature and, at `{options}`, in the docstring of a function."""
    rows = {name: (default, o.help) for name, (o, default) in recipe_options(method).items()}
    known = rows | _RUNNING
    taken = (n for n in kind.__annotations__ if n in known and n not in without)
    found = {name: known[name] for name in taken}

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        listed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        listed += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, (default, _) in found.items()
        ]
        function.__signature__ = signature.replace(parameters=listed)  # type: ignore[attr-defined]
        lines = [f"{name}: {_lower(text)}" for name, (_, text) in found.items()]
        text = (function.__doc__ or "").replace("{options}", "\n        ".join(lines))
        function.__doc__ = text
        return function

    return decorate


def _lower(text: str) -> str:
    return text if text[1:2].isupper() else text[0].lower() + text[1:]


def split(how: dict[str, Any]) -> tuple[dict[str, Any], Running]:
    """Fields of a recipe, and how it is done."""
    running = Running(**{name: how.pop(name) for name in _RUNNING if name in how})  # type: ignore[typeddict-item]
    return how, running


def text_of(where: Where | None) -> str | None:
    """A source as a recipe holds it."""
    return None if where is None else str(where)


@contextmanager
def running_options(plans: Sequence[Plan], how: Running) -> Iterator[RunOptions]:
    """The engine's options, with a bar of tqdm while it works."""
    from tqdm.auto import tqdm

    lock = threading.Lock()
    total = sum(plan.write_bytes for plan in plans)
    is_shown = how.get("progress", True)
    with tqdm(total=total, unit="B", unit_scale=True, disable=not is_shown) as bar:

        def advance(size: int) -> None:
            with lock:  # called from every worker
                bar.update(size)

        yield RunOptions(
            threads=how.get("threads") or num_cores(),
            device=how.get("device", "cpu"),
            overwrite=how.get("overwrite", False),
            progress=advance,
            cache_limit=parse_size(how.get("cache_limit", DEFAULT_CACHE_SIZE)),
        )
