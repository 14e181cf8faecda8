"""A checkpoint, opened lazily: config, tensor headers and sidecar names; no tensor data.

Opening reads a few kilobytes per shard. Whatever a header says is the truth; the index is
checked against it, and a directory that two readers could understand differently is refused.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from drift_merge.errors import CheckpointError
from drift_merge.storage.folder.contents import Folder, sort_files
from drift_merge.storage.folder.faults import (
    cannot_open,
    in_two_shards,
    is_pointer,
    parse_config,
    pointer_error,
)
from drift_merge.storage.folder.notes import CheckpointNote, adapter_notes, choice_notes
from drift_merge.storage.folder.scan import scan
from drift_merge.storage.forms.compressed import find_scales
from drift_merge.storage.forms.factored import U_SUFFIX, V_SUFFIX, StoredFactors, find_factors
from drift_merge.storage.headers import ShardHeader, TensorInfo, read_header
from drift_merge.storage.sources import RemoteShard, Source, parse_source
from drift_merge.storage.weight_map import (
    ADAPTER_CONFIG,
    INDEX,
    find_weights,
    holds_model,
    parse_index,
    refuse_other_artifacts,
    require_shards,
    shard_names,
)

_MANIFEST = "prior.json"  # of a prior


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """The LoRA factors of one tensor: W = W_base + scale * B @ A.

    DoRA (arXiv 2402.09353, equation 5) then gives every row of W the norm that `magnitude` has.
    """

    a: str  # stored name of A, shape (rank, inputs)
    b: str  # stored name of B, shape (outputs, rank)
    scale: float
    magnitude: str = ""  # stored name, shape (outputs,); empty without DoRA
    is_transposed: bool = False  # W is stored as (inputs, outputs)

    @property
    def names(self) -> tuple[str, ...]:
        """What is read: A, B, and the magnitudes if there are any."""
        return (self.a, self.b, self.magnitude) if self.magnitude else (self.a, self.b)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint as its config and headers describe it."""

    source: Source
    path: Path | None  # local directory; None when only headers were fetched from the Hub. Of a
    # streamed checkpoint the Hub's cache, which may hold some shards and sidecars, or none
    config: dict[str, Any]  # config.json
    tensors: dict[str, TensorInfo]  # by stored name, sorted
    shards: dict[str, ShardHeader]  # by file name, sorted
    folder: Folder = field(default_factory=Folder)  # its other files: carried over, or left out
    notes: tuple[CheckpointNote, ...] = ()  # what was decided while it was opened
    adapters: Mapping[str, StoredAdapter] = field(
        default_factory=dict
    )  # by stored name of the tensor
    scales: Mapping[str, str] = field(default_factory=dict)  # compressed tensor -> its scales
    factors: Mapping[str, StoredFactors] = field(
        default_factory=dict
    )  # delta of low rank -> its factors; `tensors` has it too, without bytes
    remote: Mapping[str, RemoteShard] = field(default_factory=dict)  # by file name: not here yet

    @property
    def size_bytes(self) -> int:
        """Bytes of tensor data, headers excluded."""
        return sum(info.size_bytes for info in self.tensors.values())

    @property
    def sidecars(self) -> tuple[str, ...]:
        """Files that are not the model's weights and belong to it, relative to `path`, sorted."""
        return tuple(self.folder.carried)

    @property
    def directories(self) -> list[Path]:
        """The local directories that are read; two where an adapter is joined to its base."""
        if self.path is None:
            return []
        if self.path != self.path.parent:
            return [self.path]
        return sorted({self.file(s).parent for s in self.shards if s not in self.remote})

    def file(self, shard: str) -> Path:
        """The local path of a shard that is on this disk."""
        if self.path is None or shard in self.remote:
            raise RuntimeError(f"only the headers of {self.source.given} were fetched")
        return self.path / shard


def open_checkpoint(
    text: str, *, headers_only: bool = False, stream: bool = False, quiet: bool = False
) -> Checkpoint:
    """Open a checkpoint from what the user wrote.

    Args:
        text: a directory, a `.safetensors` file beside its `config.json`, or a Hub id
            `org/name[@revision]`.
        headers_only: from the Hub, fetch headers by range requests instead of whole shards.
        stream: likewise, and list as `remote` the shards that must be fetched to be read.
        quiet: no progress bars of the Hub's own downloads.

    Raises:
        SourceError: nothing is found under that name.
        CheckpointError: what is found is broken, ambiguous, unsafe or not safetensors.
    """
    source = parse_source(text)
    if source.kind == "local":
        assert source.path is not None
        return _open_local(source, source.path)
    from drift_merge.storage.hub import models

    source = models.resolve_revision(source)
    if not (headers_only or stream):
        return _open_local(source, *models.fetch_snapshot(source, quiet=quiet))
    config, shards, folder = models.fetch_headers(source)
    checkpoint = assemble(source, None, config, shards.values(), folder)
    checkpoint = _with_choice(checkpoint)
    if not stream:
        return checkpoint
    from drift_merge.storage.hub.shards import find_remote

    path, remote = find_remote(source, shards, with_digests=not headers_only)
    return replace(checkpoint, path=path, remote=remote)


def _open_local(source: Source, path: Path, folder: Folder | None = None) -> Checkpoint:
    directory = path if path.is_dir() else path.parent
    if not any((directory / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
        # No model: perhaps the root of a disk, whose files take minutes to list.
        read_config(directory, source.given)  # says so
    files, astray = scan(directory)
    if ADAPTER_CONFIG in files and not holds_model(files):
        find_weights(files, where=source.given, directory=str(directory))  # says what it is
    config = read_config(directory, source.given)
    index_name = f"{source.given}/{INDEX}"
    weight_map: dict[str, str] = {}
    if path.is_file():
        names = [path.name]
    else:
        names = find_weights(files, where=source.given, directory=str(directory))
    if names == [INDEX]:
        weight_map = parse_index(_read_index(directory / INDEX, index_name), where=index_name)
        names = shard_names(weight_map)
        require_shards(names, files, where=index_name)
    if folder is None:
        folder = sort_files(files, [*names, *([INDEX] if weight_map else [])], astray)
    shards = [_read_shard(directory, name, source.given) for name in names]
    checkpoint = assemble(source, directory, config, shards, folder, weight_map)
    for name, shard in weight_map.items():
        if name not in checkpoint.tensors or checkpoint.tensors[name].shard != shard:
            raise CheckpointError(
                f"{index_name} says that {name} is in {shard}, but it is not.",
                remedy="The index and the shards are of different models: download both again.",
            )
    return checkpoint if weight_map or path.is_file() else _with_choice(checkpoint)


def _with_choice(checkpoint: Checkpoint) -> Checkpoint:
    """The same with a note where names alone have decided which files are the model."""
    chosen = choice_notes(checkpoint.source.label, checkpoint.shards, checkpoint.folder)
    return replace(checkpoint, notes=(*checkpoint.notes, *chosen))


def _read_index(path: Path, label: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise cannot_open(label, path, error) from error
    if is_pointer(data):
        raise pointer_error(label, path)
    return data


def _read_shard(directory: Path, name: str, label: str) -> ShardHeader:
    """A shard's header; an error says whose shard it is, since most are called alike."""
    try:
        return read_header(directory / name, name)
    except CheckpointError as error:
        raise CheckpointError(f"{label}: {error.message}", remedy=error.remedy) from error


def read_config(directory: Path, label: str) -> dict[str, Any]:
    """The `config.json` of a directory, checked to be a JSON object."""
    path = directory / "config.json"
    try:
        data = path.read_bytes()
        if is_pointer(data):
            raise pointer_error(f"{label}: config.json", path)
        config = parse_config(data)
    except FileNotFoundError as error:
        refuse_other_artifacts([entry.name for entry in directory.iterdir()], where=label)
        raise CheckpointError(
            f"{label} has no config.json beside its weights.",
            remedy="Name the directory of a Hugging Face checkpoint, config.json included.",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{label}: config.json cannot be read ({error}).",
            remedy="Download config.json again.",
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{label}: config.json is not a JSON object.", remedy="Download config.json again."
        )
    return config


def assemble(
    source: Source,
    path: Path | None,
    config: dict[str, Any],
    shards: Iterable[ShardHeader],
    folder: Folder | None = None,
    weight_map: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Join shard headers to one checkpoint.

    Raises:
        CheckpointError: a tensor is in two shards, or there is none at all.
    """
    tensors: dict[str, TensorInfo] = {}
    by_name = {header.shard: header for header in shards}
    for header in by_name.values():
        for name, info in header.tensors.items():
            if name in tensors:
                both, named = (tensors[name].shard, info.shard), (weight_map or {}).get(name)
                raise in_two_shards(source.given, path, name, both, named)
            tensors[name] = info
    if not tensors:
        raise CheckpointError(
            f"{source.given} is empty: its headers list no tensor.",
            remedy="Download the checkpoint again.",
        )
    return Checkpoint(
        source=source,
        path=path,
        config=config,
        tensors=dict(sorted(tensors.items())),
        shards=dict(sorted(by_name.items())),
        folder=folder or Folder(),
        notes=adapter_notes(source.given, folder or Folder()),
    )


def open_prior_checkpoint(
    text: str, *, headers_only: bool = False, quiet: bool = False
) -> Checkpoint:
    """Open the shards of a prior as tensors by canonical name; it has no config of a model.

    Args:
        text: a directory, or a Hub id `org/name[@revision]`.
        headers_only: from the Hub, fetch headers by range requests instead of whole shards.
        quiet: no progress bars of the Hub's own downloads.

    Raises:
        SourceError: no such directory, or no such prior on the Hub.
        CheckpointError: it is not a prior, or a shard is broken.
    """
    source = parse_source(text)
    directory = source.path
    if source.kind == "hub":
        from drift_merge.storage.hub import artifacts

        if headers_only:
            source, headers, manifest_file = artifacts.fetch_prior_headers(source)
            return _as_deltas(assemble(source, None, {}, headers), manifest_file)
        manifest = artifacts.PRIOR_MANIFEST
        source, directory = artifacts.fetch_artifact(source, manifest, quiet=quiet)
    names = sorted(p.name for p in directory.glob("prior-*.safetensors")) if directory else []
    if directory is None or not names:
        raise CheckpointError(
            f"{text} is not a prior: it holds no prior-*.safetensors.",
            remedy="Make one with: drift-prior compute REASONER MLLM -o PRIOR",
        )
    shards = [read_header(directory / name, name) for name in names]
    return _as_deltas(assemble(source, directory, {}, shards), directory / _MANIFEST)


def _as_deltas(stored: Checkpoint, manifest: Path) -> Checkpoint:
    """The same with what its tensors stand for: those that are compressed, or of low rank."""
    where = stored.source.given
    scales = find_scales(stored.tensors, where)
    factors: Mapping[str, StoredFactors] = {}
    deltas: dict[str, TensorInfo] = {}
    if any(name.endswith((U_SUFFIX, V_SUFFIX)) for name in stored.tensors):
        factors, deltas = find_factors(stored.tensors, _entries(manifest), where)
    tensors = dict(sorted((stored.tensors | deltas).items()))
    return replace(stored, tensors=tensors, scales=scales, factors=factors)


def _entries(manifest: Path) -> Mapping[str, Any]:
    """What a prior's manifest says of its tensors; nothing where it is missing or broken."""
    try:
        entries = json.loads(manifest.read_bytes())["tensors"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}  # whoever opens the prior by its manifest says so
    return entries if isinstance(entries, dict) else {}
