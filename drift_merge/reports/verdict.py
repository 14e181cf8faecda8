"""What a cosine says in two sentences, beside the pairs of which results are published."""

from dataclasses import dataclass

from drift_merge.priors.summary import advice

# Cosine of the two towers, lowest and highest over the layers (DRIFT, arXiv 2510.15050), and how
# naive linear merging changed MathVista, MathVision and MathVerse, in points.
PUBLISHED = (
    ("Qwen2.5-VL and DeepSeek-R1-Distill-Qwen", 0.63, 0.75, (-2.1, -2.3, -8.2)),
    ("Qwen2-VL and Qwen2-Math", 0.67, 0.765, (-1.0, 0.6, -0.2)),
    ("Idefics2 and MetaMath-Mistral", 0.975, 1.0, (1.4, -5.3, 1.4)),
    ("LLaVA-NeXT and Dart-Math-Uniform", 0.999, 1.0, (0.8, 2.0, 1.4)),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a pair, and why."""

    label: str
    sentences: tuple[str, str]
    cosine: float | None


def verdict(cosine: float | None, relative_norm: float | None) -> Verdict:
    """The verdict on a pair of language towers.

    Args:
        cosine: of the two over all that was compared; None: not known.
        relative_norm: |delta| / |mllm|, likewise.
    """
    if cosine is None or relative_norm is None:
        why = "The cosine of the two towers is not known: every tensor holds NaN or Inf, or is zero"
        return Verdict("No verdict", (f"{why}.", "Check both checkpoints before any use."), None)
    if relative_norm == 0.0:
        same = "delta is zero in every tensor that was compared: the two are equal there."
        return Verdict("Equal", (same, "A merge or a prior would change nothing."), cosine)
    first = f"|delta| is {relative_norm:.2%} of the norm of the weights it is added to."
    return Verdict(label_of(cosine), (first, advice(cosine)), cosine)


def label_of(cosine: float) -> str:
    """The verdict in a few words; its bounds are those of `priors.summary.advice`."""
    if cosine < 0.3:
        return "Neither merge nor prior"
    if cosine < 0.8:
        return "Use as a prior"
    if cosine < 0.97:
        return "Between: measure both"
    return "Merge"
