"""Opens every image before training begins, and takes a fingerprint of what training will see."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from itertools import islice
from typing import Any

from drift_merge.errors import SourceError
from drift_merge.storage import fingerprints
from drift_merge.storage.processes import num_cores
from drift_merge.trainers.sft.data.example import Example, Picture

_AT_ONCE = 256  # examples whose images are opened before the next are made


def check_pictures(examples: Iterable[Example]) -> tuple[str, int, bool]:
    """Read and open the images of all examples.

    Returns:
        One fingerprint of all bytes in their order, the number of images, and whether they were
        opened: without Pillow they are only read.

    Raises:
        SourceError: an image is absent or broken; names the row of the data.
    """
    is_opened = find_spec("PIL") is not None
    known: dict[Any, str] = {}
    prints: list[str] = []

    def look(pair: tuple[str, Picture]) -> str:
        where, picture = pair
        key = picture.path
        if key is None or key not in known:
            content = read_picture(picture, where)
            if is_opened:
                open_picture(picture, where, content)
            found = fingerprints.of_bytes(content)
            if key is None:
                return found
            known[key] = found
        return known[key]

    waiting = iter(examples)
    with ThreadPoolExecutor(num_cores()) as pool:  # Pillow lets other threads run
        while some := list(islice(waiting, _AT_ONCE)):
            pairs = [(example.where, picture) for example in some for picture in example.pictures]
            prints += pool.map(look, pairs)
    return fingerprints.of_json(prints), len(prints), is_opened


def read_picture(picture: Picture, where: str) -> bytes:
    """The bytes of an image.

    Raises:
        SourceError: the file is not there.
    """
    if picture.path is None:
        return picture.content or b""
    try:
        return picture.path.read_bytes()
    except OSError as error:
        raise SourceError(
            f"{where}: there is no image {picture.path}.",
            remedy="Paths of images are relative to the folder of the data:"
            f" {picture.path.parent.resolve()} was looked in.",
        ) from error


def open_picture(picture: Picture, where: str, content: bytes | None = None) -> Any:
    """An image in RGB, turned as its EXIF data say, as transformers' loader does.

    Raises:
        SourceError: it cannot be opened, or is cut short.
    """
    image, operations = import_module("PIL.Image"), import_module("PIL.ImageOps")
    content = read_picture(picture, where) if content is None else content
    try:
        with image.open(BytesIO(content)) as opened:
            return operations.exif_transpose(opened).convert("RGB")
    except Exception as error:  # Pillow's plugins raise whatever they come upon
        raise SourceError(
            f"{where}: {picture.label} cannot be opened as an image: {error}",
            remedy="Replace it, or take its row out of the data.",
        ) from error
