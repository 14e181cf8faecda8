"""One file that names tokens, parsed to token -> id. Bytes in, plain data out.

Byte-level vocabularies (tiktoken, tekken) get the printable form that `tokenizer.json` and
`vocab.json` use, so that the same token has the same string whatever stores it.
"""

import json
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from drift_merge.errors import AlignmentError

TokenIds = dict[str, int]


def tokenizer_json(data: bytes) -> TokenIds:
    """`tokenizer.json` as the tokenizers library reads it, added tokens included.

    Raises:
        AlignmentError: if the library is not installed; names the extra.
        Exception: the library's, if it cannot read the file.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise AlignmentError(
            "tokenizer.json cannot be read: the tokenizers library is not installed.",
            remedy="pip install 'drift_merge[tokenizers]'",
        ) from error
    text = data.decode()
    try:
        found: TokenIds = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except Exception:  # the library raises bare Exception
        json.loads(text)  # gives a line and column where the library gives none
        raise
    return found


def listed_tokens(data: bytes) -> TokenIds:
    """The `added_tokens` of `tokenizer.json` under the ids that the text itself gives them."""
    tokens = json.loads(data).get("added_tokens") or ()
    return {str(token["content"]): int(token["id"]) for token in tokens}


def token_ids(data: bytes) -> TokenIds:
    """`added_tokens.json` or `vocab.json`: an object of token and id."""
    return {str(token): _number(row) for token, row in _object(data).items()}


def token_decoder(data: bytes) -> TokenIds:
    """The `added_tokens_decoder` of `tokenizer_config.json`; {} where it has none."""
    decoder = _object(data).get("added_tokens_decoder") or {}
    texts = {int(row): token for row, token in decoder.items()}
    return {
        str(token["content"] if isinstance(token, Mapping) else token): row
        for row, token in texts.items()
    }


def tokenizer_model(data: bytes) -> TokenIds:
    """`tokenizer.model`: tiktoken's lines of base64 and rank, or else a sentencepiece model."""
    try:
        return tiktoken(data)
    except ValueError:
        return sentencepiece(data)


def tiktoken(data: bytes) -> TokenIds:
    """Lines of a token in base64 and its rank, which is its id."""
    lines = [line.split() for line in data.decode("ascii").splitlines() if line.strip()]
    if not lines or any(len(line) != 2 for line in lines):
        raise ValueError("expected lines of a token in base64 and its rank")
    return {_printable(_decode(token)): int(rank) for token, rank in lines}


def tekken(data: bytes) -> TokenIds:
    """Mistral's `tekken.json`: special tokens first, then the tokens by rank."""
    whole = _object(data)
    config = whole["config"]
    num_special = int(config["default_num_special_tokens"])
    limit = int(config["default_vocab_size"]) - num_special
    special = {str(t["token_str"]): int(t["rank"]) for t in whole.get("special_tokens") or ()}
    ranked = {int(t["rank"]): _decode(t["token_bytes"]) for t in whole["vocab"]}
    return special | {_printable(t): r + num_special for r, t in ranked.items() if r < limit}


def sentencepiece(data: bytes) -> TokenIds:
    """The pieces of a sentencepiece model, in their order, which is that of their ids.

    The file is a protocol buffer: field 1, repeated, is a piece, and its field 1 the string.

    Raises:
        ValueError: it is cut short, or no such message.
    """
    pieces = [
        value.decode()
        for number, piece in _fields(memoryview(data))
        if number == 1
        for inner, value in _fields(memoryview(piece))
        if inner == 1
    ]
    if not pieces:
        raise ValueError("it is neither a sentencepiece model nor a list of tiktoken's")
    return {piece: row for row, piece in enumerate(pieces)}


def _fields(data: memoryview) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of the fields of a message that have a length; others are passed over."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 2:
            size, at = _varint(data, at)
        elif key & 7 == 0:
            size, at = 0, _varint(data, at)[1]
        elif key & 7 in (1, 5):
            size = 8 if key & 7 == 1 else 4
        else:
            raise ValueError(f"byte {at:,} is no field of a protocol buffer")
        if at + size > len(data):
            raise ValueError(f"it is cut short: a field at byte {at:,} has {size:,} bytes")
        if key & 7 == 2:
            yield key >> 3, bytes(data[at : at + size])
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, the lowest first, and where the next field begins."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise ValueError("it is cut short within a number")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError(f"byte {at:,} is no number of a protocol buffer")


def _printable_bytes() -> dict[int, str]:
    """A printable character for every byte, as in GPT-2's vocabulary (Radford et al., 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    found = {byte: chr(byte) for byte in printable}
    return found | {byte: chr(256 + number) for number, byte in enumerate(others)}


_PRINTABLE = _printable_bytes()


def _printable(token: bytes) -> str:
    return "".join(_PRINTABLE[byte] for byte in token)


def _decode(text: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except Base64Error as error:
        raise ValueError(f"{text[:20]!r} is not base64") from error


def _object(data: bytes) -> dict[str, Any]:
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def _number(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is no id")
    return value


Parser = Callable[[bytes], TokenIds]

# File -> what is read of it. Of the first list, the first that is there holds the vocabulary.
VOCABULARIES: dict[str, Parser] = {
    "tokenizer.json": tokenizer_json,
    "tekken.json": tekken,
    "vocab.json": token_ids,
    "tokenizer.model": tokenizer_model,
    "tiktoken.model": tiktoken,
    "qwen.tiktoken": tiktoken,
}
ADDED: dict[str, Parser] = {
    "added_tokens.json": token_ids,
    "tokenizer_config.json": token_decoder,
}
