"""The options of attach() that text can say: for command lines, YAML and callbacks. No torch.

Written once: `drift-prior train`, Axolotl's YAML and the check of a callback's keywords follow.
"""

from dataclasses import dataclass
from typing import Any

from drift_merge.maths.methods.options import Option

STORED, UNOPPOSED, REMAINING = "stored", "unopposed", "remaining"


@dataclass(frozen=True, slots=True)
class RuleTraits:
    """What is special about a rule beside its formula, which `maths.injection.RULES` has.

    The default alpha lets the data keep their say: at it the bias is at most about as large as
    the gradient (`guides/training.md` has the measurement).
    """

    alpha: float  # the default
    published: float | None  # the strength in its source; None: the source has no trained MLLM
    uses: str = STORED  # of delta: all of it; where g does not oppose it; theta_R - theta_t
    nominal: float | None = None  # |bias| / |g| at alpha = 1 and cos(g, delta) = 0, if known


RULE_TRAITS: dict[str, RuleTraits] = {
    "absolute": RuleTraits(1e-4, 1.0),
    "absolute_param_norm": RuleTraits(1e-4, 1.0),
    "gradnorm": RuleTraits(1.0, 1.0, nominal=1.0),
    "adaptive_cosine": RuleTraits(1.0, 1.0, nominal=0.5),
    "sign": RuleTraits(1.0, None, UNOPPOSED),
    "anchor": RuleTraits(1e-4, None, REMAINING),
}
OWN_RULE = RuleTraits(1.0, None)  # a function of the user's
RULE_NAMES = tuple(RULE_TRAITS)
PUBLISHED = "published"  # as alpha: that of the rule's source
CONTROLS = ("random", "permuted")
SCHEDULES = ("constant", "cosine", "linear")
WHEN = ("step", "microbatch")
DEVICES = ("auto", "cpu", "cuda")

_ROWS: tuple[tuple[Option, Any], ...] = (  # with the default
    (
        Option(
            name="alpha",
            kind=str,
            metavar="X",
            help="Strength of the prior: a number, attn=X,mlp=Y, or published; default by rule.",
        ),
        None,
    ),
    (
        Option(
            name="negate",
            kind=bool,
            help="Move away from the reasoner; alpha may then have either sign.",
        ),
        False,
    ),
    (
        Option(
            name="rule",
            kind=str,
            choices=RULE_NAMES,
            help="How the gradient sets the strength of each tensor's bias.",
        ),
        "adaptive_cosine",
    ),
    (
        Option(
            name="until",
            kind=float,
            metavar="FRACTION",
            help="Stop pulling a tensor at this share of the way to the reasoner.",
        ),
        None,
    ),
    (
        Option(
            name="control",
            kind=str,
            metavar="KIND:SEED",
            help="In place of delta one of equal norms: random:SEED or permuted:SEED.",
        ),
        None,
    ),
    (Option(name="modules", kind=str, metavar="LIST", help="What is biased."), "attn,mlp"),
    (
        Option(
            name="layers", kind=str, metavar="RANGES", help="Such as 0:28 or 0,4:12; default all."
        ),
        None,
    ),
    (
        Option(
            name="schedule",
            kind=str,
            choices=SCHEDULES,
            help="How alpha changes over the steps; default constant.",
        ),
        None,
    ),
    (
        Option(
            name="when",
            kind=str,
            choices=WHEN,
            help="Once per optimizer step, or in every backward pass (the reference code's way).",
        ),
        "step",
    ),
    (Option(name="device", kind=str, choices=DEVICES, help="Where delta waits."), "auto"),
    (
        Option(
            name="strict",
            kind=bool,
            help="Refuse partial coverage, other weights and changed settings, or warn.",
        ),
        True,
    ),
    (
        Option(name="weights", kind=float, is_many=True, help="Of several priors; default 1 each."),
        None,
    ),
    (
        Option(name="map_file", kind=str, key="map", help="YAML of name patterns, as --map."),
        None,
    ),
    (Option(name="tower", kind=str, help="Which of several language towers is meant."), None),
)

ATTACH_OPTIONS: dict[str, tuple[Option, Any]] = {row[0].name: row for row in _ROWS}
