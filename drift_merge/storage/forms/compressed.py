"""How a compressed delta is named and shaped on disk: 8-bit codes, and one float32 scale per row.

A row is a vector along the last dimension. The codes have the name and the shape of the delta;
the scales lie beside them under `NAME:scale`, one for each row: shape[:-1]. No canonical name
ends like that: module names hold no colon, and a plan that meets one is refused.

    delta = codes * scales[..., None]

Names and shapes only; the arithmetic is `maths.compression`.
"""

from collections.abc import Mapping

from drift_merge.errors import CheckpointError
from drift_merge.storage.forms.factored import U_SUFFIX, V_SUFFIX, factor_shapes, places_of
from drift_merge.storage.headers import TensorInfo, tensor_bytes
from drift_merge.storage.measured import StoredKey, TensorRecord

COMPRESSED = {"float8_e4m3fn": "F8_E4M3", "int8": "I8"}  # option -> safetensors code
CODES = frozenset(COMPRESSED.values())
SCALE_SUFFIX = ":scale"
SCALE_DTYPE = "F32"
_PLAIN = "BF16"  # of tensors that compression would not make smaller
_NARROW = ("BF16", "F16")


def scale_name(name: str) -> str:
    """The name of the scales of a compressed tensor."""
    return name + SCALE_SUFFIX


def stored_as(shape: tuple[int, ...], code: str, source: str) -> str:
    """The dtype code under which a tensor of a compressed prior is stored.

    Vectors (biases, norms) and tensors whose rows hold four elements or fewer stay in 16 bits:
    with a scale per row they would not become smaller, and one scale for a whole bias would cost
    accuracy for a thousandth of the bytes.

    Args:
        shape: of the tensor.
        code: of the compressed tensors, one of `CODES`.
        source: code of the dtype that delta has before.
    """
    rows = shape[:-1]
    packed = tensor_bytes(code, shape) + tensor_bytes(SCALE_DTYPE, rows)
    if len(shape) > 1 and packed < tensor_bytes(_PLAIN, shape):
        return code
    return source if source in _NARROW else _PLAIN


def stored_fingerprints(
    entries: Mapping[str, TensorRecord], key: StoredKey = "fingerprint"
) -> dict[str, str]:
    """The fingerprint of every stored tensor: of the named ones and their scales, or of
    the factors that stand for them.

    Args:
        entries: what a run or a manifest says of each tensor.
        key: of the entry that is the fingerprint of its bytes.
    """
    found = {}
    for name, entry in entries.items():
        found[name] = entry[key]
        if "fingerprint_scale" in entry:
            found[scale_name(name)] = entry["fingerprint_scale"]
        if "fingerprint_v" in entry:
            found[name + U_SUFFIX], found[name + V_SUFFIX] = found.pop(name), entry["fingerprint_v"]
    return found


def describe_stored(
    entries: Mapping[str, TensorRecord],
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype code and shape of every stored tensor of a manifest, as `stored_fingerprints`."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in entries.items():
        shape = tuple(entry["shape"])
        if "rank" in entry:
            u, v = factor_shapes(places_of(entry), entry["rank"])
            found[name + U_SUFFIX], found[name + V_SUFFIX] = (
                (entry["dtype"], u),
                (entry["dtype"], v),
            )
            continue
        found[name] = (entry["dtype"], shape)
        if "fingerprint_scale" in entry:
            found[scale_name(name)] = (SCALE_DTYPE, shape[:-1])
    return found


def find_scales(tensors: Mapping[str, TensorInfo], where: str) -> dict[str, str]:
    """The name of the scales of every compressed tensor among `tensors`.

    Raises:
        CheckpointError: scales are missing, left over, or of another shape or dtype.
    """
    found: dict[str, str] = {}
    for name, info in tensors.items():
        if info.dtype not in CODES:
            continue
        scales = tensors.get(scale_name(name))
        expected = (SCALE_DTYPE, info.shape[:-1])
        if scales is None or (scales.dtype, scales.shape) != expected or len(info.shape) < 2:
            got = "there are none" if scales is None else f"got {scales.dtype} {scales.shape}"
            raise CheckpointError(
                f"{where}: {name} is {info.dtype} and needs scales {scale_name(name)} of "
                f"{expected[0]} {expected[1]}; {got}.",
                remedy="Make or download the directory again.",
            )
        found[name] = scales.name
    known = set(found.values())
    alone = [name for name in tensors if name.endswith(SCALE_SUFFIX) and name not in known]
    if alone:
        raise CheckpointError(
            f"{where}: {alone[0]} is the scale of no compressed tensor.",
            remedy="Make or download the directory again.",
        )
    return found
