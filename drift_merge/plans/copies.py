"""Which tensors of a checkpoint have equal bytes: one parameter, perhaps, under two names.

Cheap: a few bytes of each matrix that shares dtype and shape with another, and the whole of
those alone whose few bytes agree.
"""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Sequence

from drift_merge.names.tables import has_table_name
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.fingerprints import WINDOW_BYTES, Fingerprint
from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.mapped import MappedCheckpoint

_SAMPLE = 64  # bytes
_PLACES = ((1, 2), (0, 1), (1, 4), (3, 4))  # of the elements


def find_copies(checkpoint: Checkpoint, *, tables_only: bool = False) -> dict[str, str] | None:
    """Find tensors of equal bytes.

    Matrices of more than one row that hold more than one value; and where two of them are equal,
    what else is equal beside them (norms and biases of a block that is stored twice).

    Args:
        checkpoint: tensors that an adapter changes are left out.
        tables_only: look at embeddings and heads alone.

    Returns:
        Stored name -> one name for all that are equal, of those that have copies; None where the
        data is not on this disk, so that nothing was compared.

    Raises:
        CheckpointError: a shard cannot be read, or changed since its header was read.
    """
    if checkpoint.path is None or checkpoint.remote:
        return None
    infos = [info for info in checkpoint.tensors.values() if info.name not in checkpoint.adapters]
    matrices = [i for i in infos if len(i.shape) > 1 and i.shape[0] > 1 and i.size_bytes]
    if tables_only:
        matrices = [info for info in matrices if has_table_name(info.name)]
    with _Bytes(checkpoint) as data:
        alike = _equal(matrices, lambda info: (info.dtype, info.shape))
        alike = data.equal(alike, data.sample)
        classes = data.equal(alike, data.whole)
        classes += data.equal(_beside(classes, infos), data.whole)
    copies: dict[str, str] = {}
    for same in classes:
        first = copies.get(same[0].name, same[0].name)
        for info in same:
            copies.setdefault(info.name, first)
    return copies


class _Bytes:
    """Bytes of a checkpoint, read where they are asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._mapped = MappedCheckpoint(checkpoint)
        self._shard = ""
        self._few = memoryview(bytearray(_SAMPLE))

    def __enter__(self) -> "_Bytes":
        return self

    def __exit__(self, *_: object) -> None:
        self._mapped.close()

    def equal(
        self, classes: Iterable[Sequence[TensorInfo]], key: Callable[[TensorInfo], Hashable]
    ) -> list[list[TensorInfo]]:
        """Split classes by what `key` reads; those of one tensor are dropped."""
        listed = list(classes)
        found: dict[str, Hashable] = {}
        members = {info.name: info for infos in listed for info in infos}
        for info in sorted(members.values(), key=lambda info: (info.shard, info.start)):
            self._open(info)
            found[info.name] = key(info)
        return [same for infos in listed for same in _equal(infos, lambda info: found[info.name])]

    def sample(self, info: TensorInfo) -> Hashable:
        """A few bytes; the tensor's own name where all places hold one value over and over.

        That is no evidence: all that is zero is equal.
        """
        numel, size = info.numel, info.size_bytes
        unit = max(1, size // numel)
        for numerator, denominator in _PLACES:
            begin = numel * numerator // denominator * unit
            few = self._few[: max(0, size - begin)]
            self._mapped.read(info, begin, few)
            found = bytes(few)
            if found != found[:unit] * (len(found) // unit):
                return begin, bytes(found)
        return info.name

    def whole(self, info: TensorInfo) -> Hashable:
        """A fingerprint of all bytes."""
        fingerprint = Fingerprint()
        window = memoryview(bytearray(min(info.size_bytes, WINDOW_BYTES)))
        for begin in range(0, info.size_bytes, WINDOW_BYTES):
            piece = window[: info.size_bytes - begin]
            self._mapped.read(info, begin, piece)
            fingerprint.update(piece)
        return fingerprint.text()

    def _open(self, info: TensorInfo) -> None:
        if info.shard != self._shard:
            self._shard = info.shard
            self._mapped.read_only_what_is_asked(info)


def _equal(
    infos: Iterable[TensorInfo], key: Callable[[TensorInfo], Hashable]
) -> list[list[TensorInfo]]:
    """Lists of two or more tensors that have one key."""
    found: dict[Hashable, list[TensorInfo]] = {}
    for info in infos:
        found.setdefault(key(info), []).append(info)
    return [same for same in found.values() if len(same) > 1]


def _beside(
    classes: Sequence[Sequence[TensorInfo]], infos: Iterable[TensorInfo]
) -> list[list[TensorInfo]]:
    """Pairs of vectors under the two prefixes of an equal matrix, with the same rest of the name.

    `a.0.q.weight` and `b.0.q.weight` give the prefixes `a` and `b`, and so `a.0.norm.weight` and
    `b.0.norm.weight`.
    """
    vectors = {info.name: info for info in infos if len(info.shape) == 1}
    names, pairs = sorted(vectors), []
    for one, other in sorted(
        {_prefixes(same[0].name, o.name) for same in classes for o in same[1:]}
    ):
        for name in names[bisect_left(names, one) : bisect_left(names, one + chr(0x10FFFF))]:
            info, twin = vectors[name], vectors.get(other + name[len(one) :])
            if twin and (twin.dtype, twin.shape) == (info.dtype, info.shape):
                pairs.append([info, twin])
    return pairs


def _prefixes(one: str, other: str) -> tuple[str, str]:
    """The two names without the segments that they share at their ends."""
    left, right = one.split("."), other.split(".")
    while len(left) > 1 and len(right) > 1 and left[-1] == right[-1]:
        left.pop()
        right.pop()
    return ".".join(left) + ".", ".".join(right) + "."
