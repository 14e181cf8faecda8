"""The vocabulary of a checkpoint from all files that speak of it, each checked with the others."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote

from drift_merge.errors import AlignmentError, CheckpointError
from drift_merge.names.tokens.formats import ADDED, VOCABULARIES, TokenIds, listed_tokens
from drift_merge.names.vocabulary import Vocabulary

TOKEN_FILES = (*VOCABULARIES, *ADDED)

_WITHOUT = "leave embed and head out, e.g. --modules attn,mlp,norm"
_POINTER = b"version https://git-lfs"
# Names that stand for "no token yet": slow tokenizers let added_tokens_decoder rename them.
_PLACEHOLDER = re.compile(r"unused|reserved|placeholder|extra", re.IGNORECASE)
# Tokenizers of these classes shift or reorder the ids of their sentencepiece model.
_SHIFTED = re.compile(
    r"XLMRoberta|Camembert|MBart|Nllb|XGLM|Barthez|Bartpho|PLBart|Pegasus|SeamlessM4T",
    re.IGNORECASE,
)


def vocabulary_file(names: Sequence[str]) -> str | None:
    """Which of a checkpoint's files holds its vocabulary; None if none does."""
    return next((name for name in VOCABULARIES if name in names), None)


class Vocabularies:
    """Vocabularies by files. Files of equal bytes, as within a family, are parsed once."""

    def __init__(self) -> None:
        self._known: dict[str, Vocabulary] = {}

    def read(self, files: Mapping[str, Path], where: str) -> Vocabulary:
        """Read token -> id from every file that names tokens.

        Args:
            files: those of `TOKEN_FILES` that the checkpoint has, and where they lie.
            where: the checkpoint in the user's words.

        Returns:
            The same object where the bytes are the same.

        Raises:
            AlignmentError: if no file holds the vocabulary, or it needs a library that is not
                installed; says which.
            CheckpointError: if a file cannot be read, or two of them disagree; names both.
        """
        main = vocabulary_file(list(files))
        if main is None:
            raise AlignmentError(
                f"{where} has no file that says which row is which token"
                f" (looked for {', '.join(VOCABULARIES)}).",
                remedy=f"Put its tokenizer.json beside the weights, or {_WITHOUT}",
            )
        names = [main, *(name for name in ADDED if name in files)]
        data = {name: _read(files[name], where) for name in names}
        digest = hashlib.blake2b()
        for name, content in data.items():
            digest.update(f"{name} {len(content)} ".encode() + content)
        key = digest.hexdigest()
        if key not in self._known:
            self._known[key] = join(_sources(data, where), where)
        return self._known[key]


def join(sources: Sequence[tuple[str, TokenIds]], where: str) -> TokenIds:
    """Join what several files say of one vocabulary.

    Args:
        sources: file and its token -> id; the first holds the vocabulary.
        where: the checkpoint in the user's words.

    Raises:
        CheckpointError: if a token has two ids, or an id two tokens of different files.
    """
    (main, first), *others = sources
    joined, tokens = dict(first), {row: token for token, row in first.items()}
    origin: dict[str, str] = {}
    for file, ids in others:
        for token, row in ids.items():
            known = joined.get(token)
            if known == row:
                continue
            if known is not None:
                said = f"{token!r} has id {known:,} in {origin.get(token, main)}, but {row:,}"
                raise _contradiction(where, f"{said} in {file}")
            before = tokens.get(row)
            if before is not None and not _is_renamed(before, origin.get(before, main)):
                said = f"id {row:,} is {before!r} in {origin.get(before, main)}, but {token!r}"
                raise _contradiction(where, f"{said} in {file}")
            if before is not None:
                del joined[before]
            joined[token], tokens[row], origin[token] = row, token, file
    return joined


def _is_renamed(token: str, file: str) -> bool:
    """Whether an added token may take the place of one: fast tokenizers do not do it."""
    is_slow = not file.startswith(("tokenizer.json", *ADDED))
    return is_slow and _PLACEHOLDER.search(token) is not None


def _contradiction(where: str, said: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {said}; which token the row stands for cannot be known.",
        remedy=f"Make the two files agree (download them again), or {_WITHOUT}",
    )


def _sources(data: Mapping[str, bytes], where: str) -> list[tuple[str, TokenIds]]:
    """What each file says; of tokenizer.json both what the library and what the text says."""
    found = []
    for name, content in data.items():
        parse = VOCABULARIES.get(name) or ADDED[name]
        try:
            if content.startswith(_POINTER):
                raise ValueError("it is a pointer of git-lfs, not the file")
            found.append((name, parse(content)))
            if name == "tokenizer.json":
                found.append((f"{name} (added_tokens)", listed_tokens(content)))
        except AlignmentError:
            raise
        except Exception as error:  # of the tokenizers library or of Python: bare
            kind = "a tokenizer" if name == "tokenizer.json" else "a file of tokens"
            reason = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else error
            raise CheckpointError(
                f"{where}: {name} is not {kind} that can be read: {reason}",
                remedy=f"Download it again (git lfs pull, if it came by git), or {_WITHOUT}",
            ) from error
    _refuse_shifted(data, where)
    return found


def _refuse_shifted(data: Mapping[str, bytes], where: str) -> None:
    """Refuse a sentencepiece model whose pieces are not numbered as the rows are."""
    if "tokenizer.model" not in data or "tokenizer_config.json" not in data:
        return
    kind = str(json.loads(data["tokenizer_config.json"]).get("tokenizer_class"))
    if _SHIFTED.search(kind):
        raise AlignmentError(
            f"{where}: the ids of a {kind} are not those of its tokenizer.model.",
            remedy=f"Save it as a fast tokenizer (tokenizer.json), or {_WITHOUT}",
        )


def _read(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{where}: {path.name} cannot be read: {error.strerror or error}.",
            remedy=f"Check that the file exists and is readable: ls -lL {quote(str(path))}",
        ) from error
