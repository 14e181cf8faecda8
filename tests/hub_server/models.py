"""Models as the Hub holds them: shards in the order of the layers, published on a `HubServer`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import checkpoints as c
from tests.hub_server.repo import sha256
from tests.hub_server.server import HubServer

REASONER, MLLM, BASE = "org/reasoner", "org/mllm", "org/base"
TOKENIZERS = {  # the same words in another order
    REASONER: c.tokenizer([f"word{i}" for i in reversed(range(c.VOCABULARY))]),
    MLLM: c.tokenizer(),
}


def write_layered(
    directory: Path,
    tensors: c.Tensors,
    config: Mapping[str, Any],
    *,
    num_shards: int,
    sidecars: Mapping[str, bytes] | None = None,
) -> Path:
    """A checkpoint whose shards are filled one after the other, with about equally many bytes."""
    c.write_checkpoint(directory, {}, config, num_shards=2, sidecars=sidecars)
    for path in directory.glob("model-*"):
        path.unlink()
    total = sum(len(tensor.data) for tensor in tensors.values())
    groups: list[c.Tensors] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if filled * num_shards >= total * len(groups) and len(groups) < num_shards:
            groups.append({})
        groups[-1][name] = tensor
        filled += len(tensor.data)
    weight_map = {}
    for number, some in enumerate(groups, start=1):
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        c.write_shard(directory / shard, some)
        weight_map |= dict.fromkeys(some, shard)
    c.write_index(directory, weight_map, total)
    return directory


def make_layered_pair(
    directory: Path,
    *,
    layers: int = 4,
    num_shards: tuple[int, int] = (3, 4),
    reasoner: Mapping[str, c.Stored] | None = None,
    mllm: Mapping[str, c.Stored] | None = None,
) -> c.Pair:
    """As `checkpoints.make_pair`, with shards as real models have them."""
    return c.Pair(
        write_layered(
            directory / "reasoner",
            c.reasoner_tensors(layers) | dict(reasoner or {}),
            c.text_config(layers),
            num_shards=num_shards[0],
            sidecars={"tokenizer.json": TOKENIZERS[REASONER]},
        ),
        write_layered(
            directory / "mllm",
            c.mllm_tensors(layers) | dict(mllm or {}),
            c.mllm_config(layers),
            num_shards=num_shards[1],
            sidecars=c.SIDECARS | {"tokenizer.json": TOKENIZERS[MLLM]},
        ),
    )


def publish(hub: HubServer, pair: c.Pair, base: Path | None = None) -> None:
    """The newest commits of REASONER, MLLM and perhaps BASE."""
    hub.add_commit(REASONER, pair.reasoner)
    hub.add_commit(MLLM, pair.mllm)
    if base is not None:
        hub.add_commit(BASE, base)


def whole_request(*shards: Path) -> str:
    """A pattern of the requests for all of one of some shards (any, if none is named).

    Requests of a header are not among them; the one that goes on after a broken connection is,
    unless something of the shard has arrived.
    """
    if not shards:
        return r"GET /lfs/\w+$"
    each = [rf"{sha256(path)}( bytes=0-{path.stat().st_size - 1})?$" for path in shards]
    return f"GET /lfs/({'|'.join(each)})"


def shard_bytes(directory: Path) -> int:
    """Bytes of all shards of a checkpoint, headers included."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def downloads(hub: HubServer) -> list[str]:
    """The shards that were sent whole, by the hash that names them on the CDN."""
    whole = [x for x in hub.requests("GET /lfs/") if not x.range and x.status == 200]
    return [exchange.path.rpartition("/")[2] for exchange in whole]
