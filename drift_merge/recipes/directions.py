"""What the options of a recipe ask of singular directions, and which of them ask for nothing."""

from collections.abc import Mapping

from drift_merge.maths.methods import Method
from drift_merge.maths.methods.table import CALIBRATION, SPECTRAL, Value

Options = Mapping[str, Value]  # every option of a method, defaults included

NO_GATES = "none"


def takes_step(options: Options) -> bool:
    """Whether an option asks for a spectral step on the task vectors."""
    return any(options.get(name, off) != off for name, off in SPECTRAL.items() if name != "norm")


def takes_matrices(method: Method, options: Options) -> bool:
    """Whether the method, or an option, needs whole projection matrices."""
    is_calibrated = options.get("calibrate", "none") != "none"
    return method.takes_matrices or is_calibrated or takes_step(options)


def idle(options: Options, standard: Options) -> list[str]:
    """Options that stand at a default which asks for nothing: older manifests lack them.

    Args:
        options: of the recipe.
        standard: the defaults of its method and variant.
    """
    names = [n for n, off in SPECTRAL.items() if options.get(n) == off == standard.get(n)]
    if options.get("rank") or options.get("eta"):
        names = [name for name in names if name != "norm"]
    if options.get("calibrate", "none") == "none":
        names += CALIBRATION
    if standard.get("frank_decay") == options.get("frank_decay"):
        names.append("frank_decay")
    return names


def in_words(method: Method, options: Options) -> str:
    """What is done beside the method's formula, for its line in a manifest; "" if nothing."""
    parts = []
    if not method.takes_matrices and takes_step(options):
        kept = f"of its norm ({options['norm']})" if options["norm"] != "none" else "as they are"
        what = {
            "rank": f"the {options['rank']} leading directions, {kept}",
            "eta": f"the directions of {options['eta']:g} % of the singular values, {kept}",
            "bands": f"the bands {options['bands']}",
            "gates": "the gates of a file",
        }
        chosen = next(name for name in what if options[name] != SPECTRAL[name])
        parts.append(f"each matrix of a difference by {what[chosen]}")
    if options.get("calibrate") == "svc":
        parts.append(f"singular values calibrated (svc, alpha {options['calibrate_alpha']:g})")
    return "; ".join(parts)
