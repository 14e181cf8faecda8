"""Tensors with a row per token: which they are, and in which order the pieces of one follow.

Embedding and head, and those of their own that layers have (multi-token prediction). Some
families store the tokens that they added in a second tensor; the two are one table, and ids
continue from one to the next.
"""

import re
from collections.abc import Iterable

from drift_merge.names.layouts import EMBEDDINGS, HEADS

_MODULE = re.compile(
    rf"((?:layers\.\d+\.(?:.+\.)?)?(?:embed_tokens\w*|lm_head|shared_head\.head"
    rf"|{'|'.join(EMBEDDINGS)}|embed_out))\.(.+)"
)
_TABLES = frozenset((*EMBEDDINGS, *HEADS))
_ADDED = re.compile(r"(?:new|additional|extra|added)(?:_\w+)?(?:\.weight)?")
_PIECE = re.compile(rf"weight|\w*embeddings?(?:[._]\d+)?|{_ADDED.pattern}|\d+\.weight")
_NUMBER = re.compile(r"\d+")


def table_of(canonical: str) -> str | None:
    """Return the table that a tensor is (a piece of), None if its rows are no tokens.

    >>> table_of("embed_tokens.new_embedding"), table_of("layers.46.shared_head.head.weight")
    ('embed_tokens', 'layers.46.shared_head.head')
    """
    found = _MODULE.fullmatch(canonical)
    if found is None:
        return None
    if found[2] == "bias":
        return canonical
    return found[1] if _PIECE.fullmatch(found[2]) else None


def has_table_name(stored: str) -> bool:
    """Whether a stored name, of whatever family, is that of an embedding or of a head.

    >>> has_table_name("model.language_model.embed_tokens.weight")
    True
    """
    return not _TABLES.isdisjoint(stored.split("."))


def is_added_piece(leaf: str) -> bool:
    """Whether what follows the name of an embedding is a tensor of added tokens.

    >>> is_added_piece("additional_embedding.weight"), is_added_piece("weight.absmax")
    (True, False)
    """
    return _ADDED.fullmatch(leaf) is not None


def in_order(pieces: Iterable[str]) -> tuple[str, ...] | None:
    """Return the pieces of a table as their ids follow; None where the names do not say.

    >>> in_order(["embed_tokens.new_embedding", "embed_tokens.embedding"])
    ('embed_tokens.embedding', 'embed_tokens.new_embedding')
    """
    ranks = {name: _rank(name) for name in pieces}
    if len(set(ranks.values())) < len(ranks):
        return None
    return tuple(sorted(ranks, key=ranks.__getitem__))


def _rank(name: str) -> tuple[bool, int]:
    leaf = name[len(table_of(name) or "") + 1 :]
    number = _NUMBER.search(leaf)
    return is_added_piece(leaf), int(number[0]) if number else -1
