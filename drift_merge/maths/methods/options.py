"""NEW FILE."""

from drift_merge.maths.methods import METHODS, Method
from drift_merge.maths.methods.table import known_options

INTERNAL = {"is_delta"}  # set by `drift-prior apply` alone

RANDOM = ("dare-", "della")  # methods that draw masks

OPTION_HELP = {
    "agreement": "Number of models that must find an entry important.",
    "column_wise": "One angle per column instead of per row.",
    "density": "Fraction of the entries that is kept, in (0, 1].",
    "dot_threshold": "Above this |cosine| a line replaces the arc.",
    "eps": "Below this norm a model counts as zero.",
    "epsilon": "Half the spread of the keep probabilities around the density.",
    "filter_wise": "One coefficient per row instead of per tensor.",
    "flatten": "One angle per tensor instead of per row.",
    "gamma": "Fraction of the largest entries that is dropped.",
    "mask_lambda": "How much of the others an entry must outweigh to be important.",
    "max_iter": "Most steps towards the mean.",
    "normalize": "Divide by the sum of the weights.",
    "rescale": "Make up for what was dropped.",
    "scale": "Factor of what is added.",
    "t": "From the mllm (0) to the reasoner (1); in nearswap the largest step.",
    "tol": "Step at which the mean is found.",
}


def method_options_of(method: Method) -> dict[str, type]:
    """The method's own options over all its variants: name -> float or bool."""
    found: dict[str, type] = {}
    for variant in method.variants:
        for name in known_options(method, variant):
            default = method.defaults[variant].get(name, 0.0)
            found[name] = bool if isinstance(default, bool) else float
    return {name: kind for name, kind in sorted(found.items()) if name not in INTERNAL}


def option_names() -> set[str]:
    """The long names, without dashes, of the options that only methods have."""
    names = {
        name.replace("_", "-") for method in METHODS.values() for name in method_options_of(method)
    }
    return names | {"mllm-weight", "variant", "seed", "keep-layers", "transition", "trim"}
