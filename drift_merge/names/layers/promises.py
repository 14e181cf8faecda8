"""What the words of `--modules` promise: each takes something, and what no word takes is named."""

from collections import Counter
from collections.abc import Collection, Iterable

from drift_merge.names.modules import ModuleSelection, classify
from drift_merge.names.tensors import Finding

EMPTY_WORD = "empty_word"  # code of the finding that refuses an alignment
# Embed and head may be one tensor, which is said; norms may hold no parameters (OLMo's).
_WORDS = ("attn", "mlp", "mixer")
NO_NORMS = "no_norms"
_MAX_NAMED = 6


def empty_words(selection: ModuleSelection, names: Collection[str]) -> list[Finding]:
    """Return an error for each word or regular expression that takes none of `names`.

    Args:
        selection: what is asked for.
        names: canonical names of both towers that are selected, matched or not.
    """
    if not names:
        return []  # refused by itself
    classes = set(map(classify, names))
    words = [word for word in _WORDS if word in selection.modules and word not in classes]
    words += [f"re:{p.pattern}" for p in selection.patterns if not any(map(p.search, names))]
    where = "" if selection.layers is None else " in the layers that --layers names"
    found = [
        Finding(
            EMPTY_WORD,
            "error",
            f"{word} takes no tensor{where}: no module of the language tower is of this class.",
            f"Leave {word} out of --modules, or take what it should be by name: --modules"
            " 're:REGEX' searches the names that drift-prior align REASONER MLLM -v lists.",
        )
        for word in words
    ]
    if "norm" in selection.modules and "norm" not in classes:
        message = f"norm takes no tensor{where}: the language tower stores no norms."
        remedy = "Nothing to do if its norms have no parameters; otherwise name them: re:REGEX"
        found.append(Finding(NO_NORMS, "warning", message, remedy))
    return found


def left_out(names: Iterable[str], selection: ModuleSelection) -> list[Finding]:
    """Return what is said of the tensors that no word of the selection takes.

    Args:
        names: canonical names that both towers have and that are not selected.
        selection: what is asked for.
    """
    if selection.layers is not None or "full" in selection.modules:
        return []
    counts = Counter(kind for name in names if (kind := _kind(name)))
    if not counts:
        return []
    shown = [f"{kind} ({count:,})" for kind, count in sorted(counts.items())]
    more = f" and {len(shown) - _MAX_NAMED} more" if len(shown) > _MAX_NAMED else ""
    message = (
        f"In no class that is selected, so left as they are, are {counts.total():,} of the language"
        f" tower's tensors: {', '.join(shown[:_MAX_NAMED])}{more}."
    )
    has_mixers = any(kind.startswith("mixer") for kind in counts)
    word = "mixer (state-space and convolution blocks) or full" if has_mixers else "full"
    remedy = f"Nothing to do if that is meant; otherwise add {word} to --modules."
    return [Finding("left_out", "warning" if has_mixers else "info", message, remedy)]


def _kind(name: str) -> str:
    """Return what to call a tensor of a mixer or of no class: its module; "" for other classes."""
    word, segments = classify(name), name.split(".")
    if word not in ("mixer", "other"):
        return ""
    inside = segments[2] if segments[0] == "layers" else segments[0]
    return f"mixer.{inside}" if word == "mixer" and inside != "mixer" else inside
