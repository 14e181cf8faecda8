"""Which files of a checkpoint hold weights, and what its index may say.

Pure functions over file names and bytes: the same rules serve a local directory,
the Hub's listing of a repository, and the Hub's cache. Nothing is opened here.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from shlex import quote
from typing import Any, NoReturn

from drift_merge.errors import CheckpointError
from drift_merge.storage.folder.contents import is_training_state

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"  # of PEFT, and the weights beside it
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# An index has about 80 bytes a tensor; the largest public ones (91,000 tensors) are 9 MB.
MAX_INDEX_BYTES = 100_000_000
MAX_SHARDS = 100_000  # that are looked for by the count in a name

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
GGUF = ("*.gguf", "*.ggml")
# A shard by its name: stem, number, how many there are, and a variant.
_SHARD = re.compile(r"(.+?)[-_.](\d+)-of-(\d+)((?:\.\w+)?)\.safetensors")
_MODEL_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_MODEL_LIKE = re.compile(r"(?:pytorch_)?model\b")

_CONVERT = (
    "Only safetensors is read: a pickle can run code. Convert each file once, running none:\n"
    '{download}  python -c "import sys, torch; from safetensors.torch import save_file; '
    "save_file({{k: v.clone() for k, v in torch.load(sys.argv[1], weights_only=True, "
    "mmap=True).items()}}, sys.argv[2], metadata={{'format': 'pt'}})\" '{old}' '{new}'"
)


def holds_model(files: Iterable[str]) -> bool:
    """Whether files of one folder hold the weights of a model, whatever adapter lies beside."""
    return any(name in (SINGLE, INDEX) or _MODEL_SHARD.fullmatch(name) for name in files)


def find_weights(
    files: Collection[str], *, where: str, directory: str, download: str = ""
) -> list[str]:
    """Name the files that lead to the weights: the index alone, or the shards themselves.

    Args:
        files: every file of the checkpoint, as paths relative to it with `/`.
        where: the checkpoint in the user's words, for messages.
        directory: what to write for its directory in a conversion command.
        download: command that fills that directory first, when it is on the Hub.

    Returns:
        `[INDEX]`, or one or more safetensors files that lie beside config.json: of several
        formats the one that is named as transformers names it.

    Raises:
        CheckpointError: no safetensors weights, both an index and a single file, an adapter,
            a prior, several models, or only formats that are not read (pickles, GGUF).
    """
    top = sorted(name for name in files if "/" not in name)
    shards = [name for name in top if name.endswith(".safetensors") and not _is_other(name)]
    refuse_other_artifacts(top, where=where)
    if INDEX in top and SINGLE in top:
        raise CheckpointError(
            f"{where} holds both {SINGLE} and {INDEX}; loaders disagree about which counts.",
            remedy="Work on a local copy without the one that is left over from an earlier save.",
        )
    if INDEX in top:
        return [INDEX]
    if SINGLE in top:
        return [SINGLE]
    if shards:
        return _choose(shards, where=where)
    if found := [name for name in top if is_pickle(name) or is_gguf(name)]:
        refuse_format(found, where=where, directory=directory, download=download)
    below = sorted({name.rpartition("/")[0] for name in files if name.endswith(".safetensors")})
    if below:
        raise CheckpointError(
            f"{where} has safetensors files in folders only ({_examples(below)}).",
            remedy="Give the folder that holds one whole model, as a local path.",
        )
    raise CheckpointError(
        f"{where} holds no weights: none of its {len(files):,} files is a .safetensors file.",
        remedy="Give a checkpoint directory (config.json and *.safetensors), or a Hub id org/name.",
    )


def _is_other(name: str) -> bool:
    return name.startswith("adapter_") or is_training_state(name)


def _choose(shards: Sequence[str], *, where: str) -> list[str]:
    """The files of one model among those that no index orders: never two formats of it."""

    def keep(rule: Callable[[str], object]) -> dict[str, list[str]]:
        return {key: names for key, names in series.items() if rule(key)} or series

    series: dict[str, list[str]] = {}
    for name in shards:
        match = _SHARD.fullmatch(name)
        key = f"{match[1]}-of-{int(match[3])}{match[4]}" if match else name
        series.setdefault(key, []).append(name)
    series = keep(lambda key: not key.startswith("consolidated"))
    series = keep(_MODEL_LIKE.match)
    series = keep(lambda key: not _absent(series[key]))
    found = [name for names in series.values() for name in names]
    is_plain = not any(_SHARD.fullmatch(name) or _MODEL_LIKE.match(name) for name in found)
    if len(series) > 1 and not is_plain:
        raise CheckpointError(
            f"{where} holds several models and no {INDEX}: {_examples(sorted(series))}.",
            remedy="Work on a local copy that holds one of them.",
        )
    if absent := _absent(found):
        raise CheckpointError(
            f"{where} lacks {len(absent):,} of its shards: {_examples(absent)}.",
            remedy="The checkpoint is incomplete. Download or copy it again.",
        )
    return sorted(found)


def _absent(names: Sequence[str]) -> list[str]:
    """The shards that are missing by the count in their own names; those may start at 0 or 1."""
    numbers = {int(match[2]) for name in names if (match := _SHARD.fullmatch(name))}
    match = _SHARD.fullmatch(names[0])
    if match is None:
        return []
    first, count = (0 if 0 in numbers else 1), min(int(match[3]), MAX_SHARDS)
    missing = sorted(set(range(first, first + count)) - numbers)
    return [
        f"{names[0][: match.start(2)]}{number:0{len(match[2])}d}{names[0][match.end(2) :]}"
        for number in missing
    ]


def refuse_format(
    names: Collection[str], *, where: str, directory: str, download: str = ""
) -> NoReturn:
    """Raise CheckpointError for weights in a format that is not read, with the way out.

    Args:
        names: the files found, at least one, each a pickle or GGUF.
        where: the checkpoint in the user's words.
        directory: where the files are, for the conversion command.
        download: command that fills that directory first, when it is on the Hub.
    """
    pickles = sorted(name for name in names if is_pickle(name))
    if not pickles:
        raise CheckpointError(
            f"{where} holds GGUF weights ({_examples(sorted(names))}); expected safetensors.",
            remedy="GGUF files are converted, often quantized copies. "
            "Use the safetensors checkpoint that they were made from.",
        )
    old = f"{directory}/{pickles[0]}"
    raise CheckpointError(
        f"{where} has its weights in pickles ({_examples(pickles)}), not in safetensors.",
        remedy=_CONVERT.format(
            download=f"  {download}\n" if download else "",
            old=old,
            new=f"{old.rpartition('.')[0]}.safetensors",
        ),
    )


def is_pickle(name: str) -> bool:
    """Say whether the suffix is one of a pickle (`.bin`, `.pt`, ...)."""
    return any(fnmatchcase(name, pattern) for pattern in PICKLES)


def is_gguf(name: str) -> bool:
    """Say whether the suffix is one of llama.cpp's formats."""
    return any(fnmatchcase(name, pattern) for pattern in GGUF)


def parse_index(data: bytes, *, where: str) -> dict[str, str]:
    """Read the weight map out of an index file, trusting nothing in it.

    Args:
        data: the bytes of `*.safetensors.index.json`.
        where: the file in the user's words, for messages.

    Returns:
        Tensor name -> shard, in the order of the file. Every shard is a plain relative
        path below the index's directory that ends with `.safetensors`.

    Raises:
        CheckpointError: not JSON, no weight map, an empty one, a tensor listed twice, or a
            shard outside the directory. `total_size` is not looked at: it is often wrong.
    """
    index = _load_json(data, where=where)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise _broken(f"{where} has no weight_map object.")
    if not weight_map:
        raise _broken(f"{where} has an empty weight_map: the checkpoint has no tensors.")
    checked: set[str] = set()
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise _broken(f"{where} puts {tensor!r} in {shard!r}; expected a file name.")
        if shard not in checked:
            _check_inside(shard, where=where)
            checked.add(shard)
    return weight_map


def shard_names(weight_map: Mapping[str, str]) -> list[str]:
    """Name the shards of a weight map, each once, sorted."""
    return sorted(set(weight_map.values()))


def require_shards(shards: Iterable[str], files: Collection[str], *, where: str) -> None:
    """Raise CheckpointError if the index names shards that are not among `files`."""
    missing = [shard for shard in shards if shard not in files]
    if missing:
        raise CheckpointError(
            f"{where} names {len(missing):,} missing shard(s): {_examples(missing)}.",
            remedy="The checkpoint is incomplete. Download or copy it again.",
        )


class _DuplicateKeyError(Exception):
    """A JSON object has one key twice; json.loads alone would keep the last in silence."""


def _load_json(data: bytes, *, where: str) -> Any:
    if len(data) > MAX_INDEX_BYTES:
        raise _broken(f"{where} has {len(data):,} bytes; expected at most {MAX_INDEX_BYTES:,}.")
    try:
        return json.loads(data, object_pairs_hook=_without_duplicates)
    except _DuplicateKeyError as error:
        raise _broken(f"{where} lists {error.args[0]!r} twice.") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _broken(f"{where} is not JSON: {error}.") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise _DuplicateKeyError(twice)
    return result


def _check_inside(shard: str, *, where: str) -> None:
    parts = shard.split("/")
    if "" in parts or "." in parts or ".." in parts or "\\" in shard or ":" in parts[0]:
        raise CheckpointError(
            f"{where} names {shard!r}, which is not a plain path below its own directory.",
            remedy="No honest index does this. Find out who made the checkpoint before you use it.",
        )
    if not shard.isprintable():
        raise _broken(f"{where} names {shard!r}, which has unprintable characters.")
    if not shard.endswith(".safetensors"):
        raise _broken(f"{where} names {shard!r}; expected a .safetensors file.")


class IsAdapterError(CheckpointError):
    """The files are those of an adapter, where a whole model is looked for."""


def refuse_other_artifacts(top: Collection[str], *, where: str) -> None:
    """Refuse a prior and an adapter, by the names of their files, where a model is expected."""
    if "prior.json" in top:
        raise CheckpointError(
            f"{where} is a drift prior: differences of weights, not a model.",
            remedy=f"Look at it with: drift-prior inspect {quote(where)}",
        )
    if ADAPTER_CONFIG in top and not holds_model(top):
        raise IsAdapterError(
            f"{where} is a LoRA adapter, not a whole model.",
            remedy="Only a reasoner may be an adapter. Merge it into its base first:"
            " PeftModel.merge_and_unload(), then save_pretrained(DIR).",
        )


def _broken(message: str) -> CheckpointError:
    return CheckpointError(
        message, remedy="The index is broken. Download or save the checkpoint again."
    )


def _examples(names: Collection[str], count: int = 3) -> str:
    shown = ", ".join(list(names)[:count])
    return shown if len(names) <= count else f"{shown}, ... {len(names) - count:,} more"
