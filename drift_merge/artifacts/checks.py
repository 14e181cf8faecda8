"""Check a finished artifact against its manifest, and a sample of it against its sources.

What is checked: the files are there, headers agree with the manifest, every byte has its
fingerprint, every value is finite; with the sources, some tensors are computed again.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_merge.engine.downloads import sample_downloads
from drift_merge.engine.reread import read_shards, reread
from drift_merge.errors import VerificationError
from drift_merge.plans.plan import Plan, Step
from drift_merge.recipes.words import DEFAULT_CACHE_SIZE
from drift_merge.storage.forms.compressed import describe_stored, stored_fingerprints
from drift_merge.storage.headers import ShardHeader, TensorInfo
from drift_merge.storage.measured import InputKey, StoredKey, TensorRecord
from drift_merge.storage.ranks.meeting import ALONE, Ranks
from drift_merge.storage.sizes import parse_size

# Up to which two processors may differ, of what singular directions add or of the stored delta:
# roundings of 1e-7, grown by the gaps between singular values, and an output dtype that rounds a
# few entries the other way.
TOLERANCE = 0.05

_INPUTS: tuple[InputKey, ...] = (
    "fingerprint_mllm",
    "fingerprint_reasoner",
    "fingerprint_reasoners",
    "fingerprint_base",
)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a check has seen; it exists only if everything agreed."""

    num_tensors: int
    size_bytes: int
    recomputed: tuple[str, ...]  # output tensors computed again from the sources
    near: tuple[str, ...] = ()  # of these, equal within `TOLERANCE` only, not to the byte


def check_files(
    directory: Path,
    manifest: Mapping[str, Any],
    fingerprint_key: StoredKey,
    *,
    threads: int,
    progress: Callable[[int], None] = lambda _: None,
    ranks: Ranks = ALONE,
) -> VerifyReport:
    """Re-read every shard of an artifact.

    Args:
        directory: of the artifact.
        manifest: its manifest.
        fingerprint_key: which entry of a tensor is the fingerprint of its stored bytes.
        threads: readers.
        progress: called with the bytes read.
        ranks: the processes that share the reading.

    Raises:
        VerificationError: naming the first tensor or file that is wrong.
    """
    tensors: Mapping[str, TensorRecord] = manifest["tensors"]
    headers = read_shards(directory, manifest["shards"])
    _compare_headers(headers, tensors)
    bad: dict[str, int] = {}
    checked = reread(
        directory,
        headers,
        stored_fingerprints(tensors, fingerprint_key),
        threads=threads,
        inspect=_finite_inspector(bad),
        progress=progress,
        ranks=ranks,
    )
    bad = {name: count for found in ranks.gather(bad) for name, count in found.items()}
    unexpected = {name: n for name, n in bad.items() if "nonfinite" not in tensors.get(name, {})}
    if unexpected:
        name = min(unexpected)
        raise VerificationError(
            f"{name} holds {unexpected[name]:,} NaN or Inf values; its manifest says none.",
            remedy="Make it again from its sources.",
        )
    return VerifyReport(len(tensors), checked.size_bytes, ())


def _compare_headers(
    headers: Mapping[str, ShardHeader], tensors: Mapping[str, TensorRecord]
) -> None:
    described = describe_stored(tensors)
    for header in headers.values():
        for name, info in header.tensors.items():
            expected = described.get(name)
            if expected is None:
                continue  # reread names it
            if expected != (info.dtype, info.shape):
                raise VerificationError(
                    f"{name} in {header.shard} is {info.dtype} {info.shape}; "
                    f"the manifest says {expected[0]} {expected[1]}.",
                    remedy="The shards and the manifest are of different runs: make both again.",
                )


def _finite_inspector(bad: dict[str, int]) -> Callable[[TensorInfo, memoryview], None]:
    import torch

    from drift_merge.engine.workspace import CPU_CHUNK
    from drift_merge.maths.dtypes import TORCH_DTYPES
    from drift_merge.maths.measures import count_nonfinite

    def inspect(info: TensorInfo, window: memoryview) -> None:
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None or not dtype.is_floating_point:
            return
        values = torch.frombuffer(window, dtype=dtype)
        for begin in range(0, values.numel(), CPU_CHUNK):
            if count := count_nonfinite(values[begin : begin + CPU_CHUNK]):
                bad[info.name] = bad.get(info.name, 0) + count

    return inspect


def check_sample(
    plan: Plan,
    tensors: Mapping[str, TensorRecord],
    fingerprint_key: StoredKey,
    *,
    sample: int,
    seed: int,
    device: str = "cpu",
    cache_limit: str = DEFAULT_CACHE_SIZE,
    directory: Path | None = None,
    ranks: Ranks = ALONE,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compute a random sample of tensors again and compare it with the manifest.

    Args:
        plan: of the artifact's recipe on the sources given.
        tensors: the manifest's table.
        fingerprint_key: which entry of a tensor is the fingerprint of its stored bytes.
        sample: number of tensors; all of them if there are fewer.
        seed: of the choice.
        device: where to compute.
        cache_limit: of the shards that lie on this disk at a time, if the plan's are on the Hub.
        directory: of the artifact; its tensors that were made by singular directions may then
            differ by `TOLERANCE`, since their bytes are those of one processor.
        ranks: the processes of which each computes some; all take the same seed.

    Returns:
        The names of the tensors that were computed again and agree, and of those that agree within
        the tolerance only.

    Raises:
        VerificationError: a tensor differs, or an input is not the one that was used.
    """
    from drift_merge.artifacts.nearness import distances, require_near
    from drift_merge.engine.stream import recompute

    missing = sorted(set(tensors) ^ {step.name for step in plan.steps})
    if missing:
        raise VerificationError(
            f"{missing[0]} is on one side only: these sources give {len(plan.steps):,} tensors, "
            f"the manifest has {len(tensors):,}.",
            remedy="Give the sources that the manifest names.",
        )
    chosen = random.Random(seed).sample(list(plan.steps), min(sample, len(plan.steps)))
    own = chosen[ranks.rank :: ranks.size]
    limit = parse_size(cache_limit) // ranks.place.local_size
    with sample_downloads(plan, [step.name for step in own], limit_bytes=limit) as downloads:
        sinks = distances(directory, own, tensors)
        results = recompute(plan, own, device=device, downloads=downloads, sinks=sinks)
    near = []
    for step in own:
        found, entry = results[step.name], tensors[step.name]
        _compare_inputs(step, found, entry)
        made = stored_fingerprints({step.name: found})
        expected = stored_fingerprints({step.name: entry}, fingerprint_key)
        if made != expected and step.name in sinks:
            require_near(step, sinks[step.name], found, TOLERANCE)
            near.append(step.name)
        else:
            _compare_result(made, expected)
    together = {name for each in ranks.gather(near) for name in each}
    names = tuple(step.name for step in chosen)
    return names, tuple(name for name in names if name in together)


def _compare_inputs(step: Step, found: TensorRecord, entry: TensorRecord) -> None:
    """Before the result: a wrong source explains a wrong result."""
    for key in _INPUTS:
        if entry.get(key) is not None and found.get(key) != entry[key]:
            role = key.removeprefix("fingerprint_")
            raise VerificationError(
                f"{step.name}: the {role} given is not the one that was used "
                f"(expected {entry[key]}, got {found.get(key)}).",
                remedy="Give the sources and revisions that the manifest names.",
            )


def _compare_result(made: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for name, got in made.items():
        if got != expected.get(name):
            raise VerificationError(
                f"{name} computed again differs: expected {expected.get(name)}, got {got}.",
                remedy="Make it again; if it differs again, report it with both manifests.",
            )
