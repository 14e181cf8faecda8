"""Computes delta anew, from the weights as they are now to the reasoner: `handle.refresh()`.

The new delta of this rank's regions lies in a temporary file that is mapped and has no name any
more: no anonymous memory, and nothing is left behind however the process ends.
"""

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from drift_merge.engine.context import WorkerContext
from drift_merge.engine.inputs import Inputs
from drift_merge.engine.reader import Reader
from drift_merge.errors import AlignmentError, OutputError, RecipeError
from drift_merge.names.align import align
from drift_merge.names.name_map import NameMap, SideMap, read_name_map
from drift_merge.names.tables import table_of
from drift_merge.names.tensors import Alignment, Model, matrix_shape
from drift_merge.names.vocabulary import Vocabulary
from drift_merge.plans.plan import Step
from drift_merge.plans.views import view_of
from drift_merge.plans.vocabularies import read_vocabularies
from drift_merge.recipes.adapted import join_adapter
from drift_merge.recipes.sources import open_unless_adapter
from drift_merge.storage.adapters.fields import base_of
from drift_merge.storage.checkpoint import Checkpoint, open_checkpoint
from drift_merge.storage.sources import Source
from drift_merge.training.deltas.held import Resident
from drift_merge.training.deltas.opened import OpenPrior
from drift_merge.training.deltas.packed import Regions, numel_of
from drift_merge.training.gradients.layout import GradientLayout
from drift_merge.training.units import Block, Unit, blocks_of

CHUNK = 2**18  # elements
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def require_refreshable(
    priors: Sequence[OpenPrior], weights: Sequence[float], control: str | None
) -> None:
    """Refuse what cannot be taken anew.

    Raises:
        RecipeError: there are several priors, a control, or deltas of low rank.
    """
    if control is not None:
        raise RecipeError(
            f"refresh() would put the reasoner's delta in place of {control!r}.",
            remedy="Leave refresh() out of a run with a control.",
        )
    if len(priors) > 1 or tuple(weights) != (1.0,):
        raise RecipeError(
            "refresh() is defined for one prior of weight 1.",
            remedy="Compute priors against the current weights, and attach those.",
        )
    entries = priors[0].prior.tensors
    low = [name for name, entry in entries.items() if "rank" in entry]
    if low:
        raise RecipeError(
            f"refresh() takes all of delta anew, but {low[0]} is of rank "
            f"{entries[low[0]]['rank']} in this prior.",
            remedy="Attach a prior that was computed without --rank, or compute one of this "
            "rank against the current weights.",
        )


def refreshed_deltas(
    opened: OpenPrior,
    regions: Regions,
    layout: GradientLayout,
    reasoner: str | Path | None,
    dtype: torch.dtype,
    directory: str | Path | None = None,
) -> Resident:
    """Compute delta = theta_reasoner - theta for the regions of this rank.

    Args:
        opened: the prior in use; names and shapes stay those of its tensors.
        regions: of this rank.
        layout: gives the values of the weights.
        reasoner: checkpoint or Hub id; None for the one that the prior names.
        dtype: in which delta is stored.
        directory: for the temporary file; None for Python's (TMPDIR).

    Raises:
        OutputError: there is no room for the temporary file.
        RecipeError: an adapter is trained: its weights are not theta.
        AlignmentError: the reasoner lacks a tensor.
        SourceError, CheckpointError: the reasoner cannot be read.
    """
    adapted = [unit.name for unit in regions if unit.is_adapted]
    if adapted:
        raise RecipeError(
            f"refresh() needs the weights themselves, but {len(adapted):,} of them are trained"
            f" through adapters, e.g. {adapted[0]}.",
            remedy="Merge the adapters, compute a prior for the result, and attach that.",
        )
    named = str(reasoner if reasoner is not None else opened.source("reasoner"))
    with reading(opened, "reasoner", named, regions) as (pool, values):
        return pool.submit(_Recompute(values, layout).regions, regions, dtype, directory).result()


@contextmanager
def reading(
    opened: OpenPrior, side: str, named: str, regions: Regions
) -> Iterator[tuple[ThreadPoolExecutor, "SideValues"]]:
    """Open a checkpoint of a prior, to be read in the pool's one thread.

    That is one of its own, since the reader of the engine gives its thread one core only.

    Args:
        opened: the prior; names and shapes are those of its tensors.
        side: "reasoner" or "mllm".
        named: the checkpoint, or a Hub id.
        regions: what will be read.
    """
    checkpoint = _open(named)
    alignment = _align(checkpoint, opened, side, {unit.name for unit in regions})
    with ThreadPoolExecutor(1) as pool, Inputs([checkpoint]) as inputs:
        run = WorkerContext(inputs, torch.device("cpu"), lambda size: None)
        yield pool, SideValues(run, checkpoint, alignment)


def _open(text: str) -> Checkpoint:
    found = open_unless_adapter(text, open_checkpoint)
    if not isinstance(found, Source):
        return found
    return join_adapter(found, open_checkpoint(base_of(found)))


def _align(checkpoint: Checkpoint, opened: OpenPrior, side: str, names: set[str]) -> Alignment:
    """Pair a checkpoint with the tensors of the prior, which stand for those of the mllm."""
    manifest = opened.prior.manifest
    map_file = manifest["parameters"]["map_file"]
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    maps = read_name_map(Path(map_file)) if map_file else NameMap()
    alignment = align(
        Model(checkpoint.source.given, shapes, checkpoint.config),
        Model(str(opened.prior.path), dict(opened.shapes)),
        modules=manifest["parameters"]["modules"],
        name_map=NameMap(reasoner=getattr(maps, side), mllm=SideMap(tower="")),
        is_tower=True,
        vocabularies=lambda: _vocabularies(checkpoint, manifest["sources"]["mllm"], names),
    )
    missing = sorted(names - {pair.canonical for pair in alignment.pairs})
    if missing:
        raise AlignmentError(
            f"{checkpoint.source.given} has no partner for {len(missing):,} of the {len(names):,}"
            f" tensors in use, e.g. {missing[0]}.",
            remedy=f"Give the {side} that the prior was computed from"
            + (": handle.refresh(reasoner=...)" if side == "reasoner" else "."),
        )
    return alignment


def _vocabularies(
    reasoner: Checkpoint, mllm: Mapping[str, str], names: set[str]
) -> tuple[Vocabulary, Vocabulary]:
    """Both vocabularies, where rows in use must be matched by token."""
    if not any(map(table_of, names)):
        return {}, {}
    return read_vocabularies(reasoner, open_checkpoint(mllm["repo_id"] or mllm["source"]))


@dataclass(slots=True)
class SideValues:
    """Values of a checkpoint in the layout of the prior."""

    run: WorkerContext
    checkpoint: Checkpoint
    alignment: Alignment

    def blocks(self, unit: Unit, cuts: Iterable[Block]) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """Blocks of a unit, their values (flat, float32), and which rows have a partner (bool)."""
        pair = next(pair for pair in self.alignment.pairs if pair.canonical == unit.name)
        view = view_of(0, pair, self.alignment.rows, self.checkpoint)
        step = Step(unit.name, "cast", "F32", pair.shape, (view,))
        reader, cols = Reader(self.run, step), matrix_shape(pair.shape)[1]
        for block in cuts:
            place = unit.origin.span(block)
            row, rows = place.row, place.rows
            begin, end = row * cols, (row + rows) * cols
            (loaded,) = reader.load(reader.raw(begin, end), begin, end)
            stored = loaded.view(rows, cols)[:, place.col : place.col + place.cols]
            missing = torch.zeros(block.rows, dtype=torch.bool)
            if view.rows is not None:
                missing[self.run.inputs.missing_rows(view, row, row + rows)] = True
            yield block, unit.origin.pick(stored).reshape(-1), missing


@dataclass(slots=True)
class _Recompute:
    """Writes theta_reasoner - theta."""

    reasoner: SideValues
    layout: GradientLayout

    def regions(
        self, regions: Regions, dtype: torch.dtype, directory: str | Path | None
    ) -> Resident:
        """The deltas of all regions, mapped from a temporary file."""
        sizes = {unit: numel_of(unit, region) for unit, region in regions.items()}
        size = max(1, sum(sizes.values()))
        with _reserved(size * dtype.itemsize, directory) as path, torch.no_grad():
            whole = torch.from_file(path, shared=True, size=size, dtype=dtype)
            held, begin = {}, 0
            for unit, size in sizes.items():
                held[unit] = whole[begin : begin + size]
                self._unit(unit, blocks_of(unit, regions[unit], CHUNK), held[unit])
                begin += size
        return Resident.of_values(held)

    def _unit(self, unit: Unit, cuts: Iterable[Block], target: Tensor) -> None:
        values = self.layout.values(unit)
        assert values is not None
        theta, at = values.reshape(-1), 0
        for block, wanted, missing in self.reasoner.blocks(unit, cuts):
            delta = wanted - theta[at : at + block.numel].to("cpu", wanted.dtype)
            delta.view(block.rows, block.cols)[missing] = 0.0  # without a partner: as it is
            target[at : at + block.numel].copy_(delta)
            at += block.numel


@contextmanager
def _reserved(size: int, directory: str | Path | None) -> Iterator[str]:
    """The path of a temporary file of `size` bytes that have their place on the disk.

    A write to the map of a sparse file on a full disk kills the process (SIGBUS).

    Raises:
        OutputError: there is no room, or no such directory.
    """
    where = Path(directory if directory is not None else tempfile.gettempdir())
    with ExitStack() as stack:
        try:
            file = stack.enter_context(
                tempfile.NamedTemporaryFile(prefix="drift_merge-", dir=where, buffering=0)
            )
            _allocate(file.fileno(), size)
        except OSError as error:
            raise OutputError(
                f"the new delta takes {size:,} bytes in a temporary file, for which {where} has no"
                f" room: {error.strerror or error}.",
                remedy="Name a directory on a larger disk: handle.refresh(directory=...), or set"
                " TMPDIR.",
            ) from error
        yield file.name


def _allocate(descriptor: int, size: int) -> None:
    """Give every byte of a file its place on the disk."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        # macOS and some file systems cannot reserve: there bytes must be written.
        if getattr(error, "errno", None) not in (None, *_CANNOT_RESERVE):
            raise
        zeros = bytes(2**20)
        while size > 0:
            size -= os.write(descriptor, zeros[:size])
