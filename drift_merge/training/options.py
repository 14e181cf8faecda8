"""The options of attach() that text can say: for command lines, YAML and callbacks. No torch.

Written once: `drift-prior train`, Axolotl's YAML and the check of a callback's keywords follow.
"""

from typing import Any

from drift_merge.maths.methods.options import Option

RULE_NAMES = ("absolute", "absolute_param_norm", "gradnorm", "adaptive_cosine")
SCHEDULES = ("constant", "cosine", "linear")
WHEN = ("step", "microbatch")
DEVICES = ("auto", "cpu", "cuda")

_ROWS: tuple[tuple[Option, Any], ...] = (  # with the default
    (
        Option(
            name="alpha",
            kind=str,
            metavar="X",
            help="Strength of the prior: a number, or attn=X,mlp=Y.",
        ),
        1.0,
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
