"""Rows of embedding and head: which row of the reasoner means the token of an mllm row.

Equal vocabulary sizes hide different tokens (id 151648 is `<think>` in R1-Distill-Qwen and
`<|box_start|>` in Qwen-VL), so rows are paired by token string, never by number alone.
"""

from array import array
from collections.abc import Mapping

from drift_merge.names.tensors import Finding, RowMap

Vocabulary = Mapping[str, int]  # token string -> id


def match_rows(
    reasoner: Vocabulary, mllm: Vocabulary, *, reasoner_rows: int, mllm_rows: int
) -> RowMap:
    """Pair the rows of two tables by token string.

    A row that carries no token (padding, or one that no file explains) has no partner, however
    equal the vocabularies are.

    Args:
        reasoner: token -> id; ids that are no row are ignored.
        mllm: the same of the mllm.
        reasoner_rows: rows of the reasoner's table.
        mllm_rows: rows of the mllm's table.

    Returns:
        One entry per mllm row: the reasoner's row, or -1.
    """
    rows = array("q", [-1]) * mllm_rows
    is_explained = bytearray(mllm_rows)
    doubtful = set()
    for token, row in mllm.items():
        if not 0 <= row < mllm_rows:
            continue
        is_explained[row] = 1
        partner = reasoner.get(token, -1)
        if 0 <= partner < reasoner_rows:
            if rows[row] not in (-1, partner):  # two tokens of one id, apart in the reasoner
                doubtful.add(row)
            rows[row] = partner
    for row in doubtful:
        rows[row] = -1
    return row_map(rows, num_unexplained=is_explained.count(0), reasoner_rows=reasoner_rows)


def row_map(rows: "array[int]", *, num_unexplained: int, reasoner_rows: int) -> RowMap:
    """Count the rows of a mapping; see `RowMap`."""
    num_unmatched = rows.count(-1)
    return RowMap(
        rows=rows,
        num_matched=len(rows) - num_unmatched,
        num_unmatched=num_unmatched,
        num_unexplained=num_unexplained,
        is_identity=reasoner_rows == len(rows) and rows == array("q", range(len(rows))),
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
