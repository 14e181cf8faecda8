"""When an alignment is not good enough, and what the user is told then."""

import shlex

from drift_merge.errors import AlignmentError, RecipeError
from drift_merge.names.layers.promises import EMPTY_WORD
from drift_merge.names.tensors import Alignment

ON_MISMATCH = ("error", "skip")
# Equal shapes can hide other heads: 32 of 64 and 16 of 128 are both 2,048 rows.
_HEAD_FINDINGS = ("num_heads", "num_kv_heads", "head_dim")


def require_complete(alignment: Alignment, *, on_mismatch: str = "error") -> None:
    """Refuse an alignment that leaves selected tensors without a partner.

    Args:
        alignment: result of `align`.
        on_mismatch: "error" asks that every selected tensor is matched; "skip" lets the
            others stay as the mllm has them.

    Raises:
        AlignmentError: if a selected tensor has no partner (with "error"); always if no tensor
            is matched at all, or if attention is selected and the configs disagree on its heads.
        RecipeError: if `on_mismatch` is another word.
    """
    if on_mismatch not in ON_MISMATCH:
        raise RecipeError(
            f"on_mismatch is {on_mismatch!r}; expected one of {', '.join(ON_MISMATCH)}.",
            remedy="Pass --on-mismatch error (the default) or --on-mismatch skip.",
        )
    if alignment.num_selected == 0:
        tied = [f for f in alignment.findings if f.code == "tied_head"]
        lines = [
            f"--modules and --layers select no tensor of {alignment.mllm.label} or"
            f" {alignment.reasoner.label}.",
            *(finding.message for finding in tied),
        ]
        raise AlignmentError(
            "\n".join(lines),
            remedy=tied[0].remedy
            if tied
            else f"See the canonical names with: {_command(alignment)} -v",
        )
    empty = [f for f in alignment.findings if f.code == EMPTY_WORD]
    if empty and alignment.num_matched:
        message = "\n".join(f"--modules {finding.message}" for finding in empty)
        raise AlignmentError(message, remedy=empty[0].remedy)
    missing = alignment.num_selected - alignment.num_matched
    if alignment.num_matched and (missing == 0 or on_mismatch == "skip"):
        _require_same_heads(alignment)
        return
    total = f"{missing:,} of {alignment.num_selected:,}"
    if alignment.num_matched == 0:
        total = f"None of the selected parameters match: {total}"
    noun = "parameter" if alignment.num_selected == 1 else "parameters"
    verb = "has" if missing == 1 else "have"
    lines = [f"{total} {noun} {verb} no partner of the same shape.", *_examples(alignment, missing)]
    lines += _sizes(alignment)
    lines += [f.message for f in alignment.findings if f.code == "fused_layout"]
    raise AlignmentError("\n".join(lines), remedy=_remedy(alignment))


def _require_same_heads(alignment: Alignment) -> None:
    """Refuse attention whose rows have equal shapes but belong to other heads."""
    wrong = [f for f in alignment.findings if f.severity == "error" and f.code in _HEAD_FINDINGS]
    if wrong and any(pair.module == "attn" for pair in alignment.pairs):
        message = "\n".join(f.message for f in wrong)
        raise AlignmentError(
            f"the attention of {alignment.reasoner.label} and {alignment.mllm.label} has other"
            f" heads, though the shapes agree.\n{message}",
            remedy=wrong[0].remedy,
        )


def _examples(alignment: Alignment, missing: int) -> list[str]:
    names, ours, theirs = (
        max((len(example[i]) for example in alignment.examples), default=0) for i in range(3)
    )
    lines = [
        f"  {name:<{names}}  reasoner {one:<{ours}}  mllm {other:<{theirs}}".rstrip()
        for name, one, other in alignment.examples
    ]
    if missing > len(lines):
        lines.append(
            f"  ... {missing - len(lines):,} more; see them with: {_command(alignment)} --json"
        )
    return lines


def _sizes(alignment: Alignment) -> list[str]:
    ours, theirs = alignment.reasoner, alignment.mllm
    facts = []
    if _differ(ours.hidden_size, theirs.hidden_size):
        facts.append(f"hidden size {ours.hidden_size} and {theirs.hidden_size}")
    if ours.num_layers != theirs.num_layers:
        facts.append(f"{ours.num_layers} and {theirs.num_layers} layers")
    labels = f"({ours.label} and {theirs.label})"
    if facts:
        return [f"These look like different model sizes: {', '.join(facts)} {labels}."]
    found = " and ".join(f"{s.label} has its tower under {s.tower!r}" for s in (ours, theirs))
    return [f"The language towers have the same size; {found}."]


def _remedy(alignment: Alignment) -> str:
    ours, theirs = alignment.reasoner, alignment.mllm
    skip = "pass --on-mismatch skip to leave these parameters unchanged."
    if alignment.num_matched == 0:
        skip = f"see every name with: {_command(alignment)} --json"
    if _differ(ours.hidden_size, theirs.hidden_size) or ours.num_layers != theirs.num_layers:
        return f"Choose a reasoner of the mllm's size, or {skip}"
    if not alignment.offer:
        return (
            f"Choose a reasoner with the mllm's architecture, or {skip}\nIf they are the same"
            " matrices under other names, say which is which in a file given with --map. Its form:"
            f" drift-prior guide layouts\nThe names: {_command(alignment)} -v"
        )
    return (
        "If they are the same matrices under other names, give this file with --map:\n"
        f"{alignment.offer}\nOtherwise {skip}"
    )


def _differ(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and one != other


def _command(alignment: Alignment) -> str:
    labels = shlex.join((alignment.reasoner.label, alignment.mllm.label))
    return f"drift-prior align {labels}"
