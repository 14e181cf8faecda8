"""Rows of embedding and head: which row of the reasoner means the token of an mllm row.

Equal vocabulary sizes hide different tokens (id 151648 is `<think>` in R1-Distill-Qwen and
`<|box_start|>` in Qwen-VL), so rows are paired by token string, never by number alone.
"""

import json
from array import array
from collections.abc import Mapping
from pathlib import Path

from drift_merge.errors import AlignmentError, CheckpointError, SourceError
from drift_merge.names.tensors import Finding, RowMap

Vocabulary = Mapping[str, int]  # token string -> id


class Vocabularies:
    """Vocabularies by file. Files of equal text, as within a family, are parsed once."""

    def __init__(self) -> None:
        self._by_text: dict[str, Vocabulary] = {}

    def read(self, path: Path | str) -> Vocabulary:
        """Read token -> id from a `tokenizer.json`, added tokens included.

        Returns:
            The same object where the text is the same.

        Raises:
            AlignmentError: if the `tokenizers` library is not installed; names the extra.
            SourceError: if there is no such file.
            CheckpointError: if the file is not a tokenizer.
        """
        text = _read_text(path)
        if text not in self._by_text:
            self._by_text[text] = _parse(path, text)
        return self._by_text[text]


def match_rows(
    reasoner: Vocabulary, mllm: Vocabulary, *, reasoner_rows: int, mllm_rows: int
) -> RowMap:
    """Pair the rows of two embeddings by token string.

    Rows beyond the vocabulary (padding) carry no token: they are paired by number if the
    vocabularies are equal, and stay without a partner otherwise.

    Args:
        reasoner: token -> id; ids that are no row are ignored.
        mllm: the same of the mllm.
        reasoner_rows: rows of the reasoner's tensor.
        mllm_rows: rows of the mllm's tensor.

    Returns:
        One entry per mllm row: the reasoner's row, or -1.
    """
    rows = array("q", [-1]) * mllm_rows
    if reasoner is mllm or reasoner == mllm:
        shared = min(reasoner_rows, mllm_rows)
        rows[:shared] = array("q", range(shared))
    else:
        for token, row in mllm.items():
            partner = reasoner.get(token, -1)
            if 0 <= row < mllm_rows and 0 <= partner < reasoner_rows:
                rows[row] = partner
    num_unmatched = rows.count(-1)
    return RowMap(
        rows=rows,
        num_matched=mllm_rows - num_unmatched,
        num_unmatched=num_unmatched,
        is_identity=reasoner_rows == mllm_rows and rows == array("q", range(mllm_rows)),
    )


def compare_vocabularies(reasoner: Vocabulary, mllm: Vocabulary) -> tuple[Finding, ...]:
    """Return the finding `tokens_differ` if ids stand for different tokens in the two."""
    if reasoner is mllm:
        return ()
    theirs = {row: token for token, row in mllm.items()}
    different = sorted(
        (row, token, theirs[row])
        for token, row in reasoner.items()
        if row in theirs and theirs[row] != token
    )
    if not different:
        return ()
    examples = ", ".join(f"id {row} is {one} and {other}" for row, one, other in different[:3])
    more = f" and {len(different) - 3:,} more" if len(different) > 3 else ""
    noun = "id stands" if len(different) == 1 else "ids stand"
    return (
        Finding(
            "tokens_differ",
            "warning",
            f"{len(different):,} {noun} for different tokens in the reasoner and the mllm:"
            f" {examples}{more}.",
            "Rows of embed and head are matched by token, so nothing is mixed up; keep the mllm's"
            " tokenizer and chat template.",
        ),
    )


def _read_text(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SourceError(
            f"there is no {path}; matching embed and head by token needs both tokenizer.json.",
            remedy="Put it beside the weights, or leave embed and head out of --modules.",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, error) from error


def _parse(path: Path | str, text: str) -> dict[str, int]:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise AlignmentError(
            f"{path} cannot be read: the tokenizers library is not installed.",
            remedy="pip install 'drift_merge[tokenizers]'",
        ) from error
    try:
        found: dict[str, int] = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        try:
            json.loads(text)  # gives a line and column where the library gives none
        except ValueError as syntax:
            raise _broken(path, syntax) from error
        raise _broken(path, error) from error
    return found


def _broken(path: Path | str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a tokenizer that the tokenizers library can read: {error}",
        remedy="Download it again, or leave embed and head out of --modules.",
    )
