"""Nothing of the tables is without effect, reference or word: options, methods, the Python face."""

import ast
import inspect
from pathlib import Path

import pytest

import drift_merge
from drift_merge.api.options import How
from drift_merge.maths.methods import METHODS
from drift_merge.maths.methods.options import OPTIONS
from drift_merge.recipes.options import recipe_options
from tests import checkpoints as c
from tests.maths.methods import test_reference, test_spectral
from tests.merges.suite import CASES, name_of, run_merge

# A value far enough from every default that the result must be another.
OTHER = {
    "agreement": 3.0,
    "bands": "0:2=0.5",
    "boost": 1.0,
    "calibrate": "svc",
    "calibrate_alpha": 2.0,
    "common": 0.2,
    "counts": "tensor",
    "density": 0.5,
    "dot_threshold": 0.0,
    "eps": 100.0,
    "epsilon": 0.3,
    "eta": 10.0,
    "frank_decay": 0.5,
    "gamma": 0.3,
    "keep_layers": "1",
    "mask_lambda": 3.0,
    "max_iter": 1.0,
    "max_overlap": 0.001,
    "norm": "none",
    "rank": 1,
    "scale": 0.6,
    "seed": 5,
    "share": 0.1,
    "t": 0.9,
    "threshold": 0.1,
    "time": 0.01,
    "tol": 10.0,
    "transition": 1,
    "trim": "global",
}
# Beside which values an option has an effect: with density 1 there is nothing to rescale, ...
BESIDE = {
    **{key: {"density": 0.5} for key in ("rescale", "epsilon", "gamma", "seed", "trim")},
    "column_wise": {"flatten": False},
    "max_iter": {"tol": 0.0},
    "norm": {"rank": 1},
    "frank_decay": {"frank_decay": 0.1},
    **{key: {"threshold": 0.01} for key in ("boost", "counts", "max_overlap")},
    "calibrate_alpha": {"calibrate": "svc"},
}
OPTION_CASES = [
    (case, option)
    for case in CASES
    for option in METHODS[case.name].option_names(case.variant)
    if not METHODS[case.name].option(option).is_internal
    and option != "gates"  # a file; see test_spectral.py
]
_FIRST = {(case.name, option): case for case, option in reversed(OPTION_CASES)}
PARAMETERS = [  # by default in the first variant that has the option; in the others: -m slow
    pytest.param(
        *(case, option),
        id=f"{name_of(case)}-{option}",
        marks=[pytest.mark.slow] * (_FIRST[case.name, option] != case),
    )
    for case, option in OPTION_CASES
]


@pytest.fixture(scope="module")
def plain(sources, tmp_path_factory):
    """The weights of every case with the options that it needs, each made once."""
    made = {}

    def tensors(case, **options):
        key = (case, tuple(sorted(options.items())))
        if key not in made:
            out = tmp_path_factory.mktemp("made") / "out"
            # Of equal weights the first guess of the Karcher mean can be the mean.
            more = {"weights": (3.0, 0.2)} if case.name == "karcher" else {}
            more |= {"weights": ("frank",)} if "frank_decay" in options else {}
            run_merge(
                case, sources, out, options=options, dtype="float32", modules="mlp,norm", **more
            )
            made[key] = c.read_tensors(out)
        return made[key]

    return tensors


@pytest.mark.parametrize(("case", "option"), PARAMETERS)
def test_every_option_of_every_variant_changes_a_result(case, option, plain):
    method = METHODS[case.name]
    default = method.defaults[case.variant].get(option)
    other = not default if isinstance(default, bool) else OTHER[option]
    if case.name == "nearswap":
        other = 1e-3
    names = method.option_names(case.variant)
    given = {k: v for k, v in BESIDE.get(option, {}).items() if k in names}
    given = {} if option == "norm" and case.name == "star" else given
    is_changed = plain(case, **given) != plain(case, **given | {option: other})
    assert is_changed


def test_every_method_is_compared_with_a_naive_reference():
    files = (test_reference, test_spectral)
    trees = [ast.parse(Path(inspect.getfile(file)).read_text()) for file in files]
    words = {n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    assert set(METHODS) - words == set()


def test_every_option_of_the_table_is_some_methods():
    taken = {name for method in METHODS.values() for name in method.option_names()}
    assert set(OPTIONS) == taken


@pytest.mark.parametrize("name", METHODS)
def test_a_row_says_in_words_and_in_a_formula_what_the_method_does(name):
    method = METHODS[name]
    assert 10 < len(method.summary) < 70
    assert not method.summary.endswith(".")
    assert method.formula != method.summary
    assert method.paper


def test_python_offers_the_options_of_recipes():
    of_priors = {"through", "rank", "norm"}
    of_methods = {"base", "weights", "mllm_weight", "variant"} | of_priors
    shared = set(recipe_options("")) - of_methods
    assert shared <= set(How.__annotations__)
    parameters = inspect.signature(drift_merge.merge).parameters
    defaults = {name: default for name, (_, default) in recipe_options("linear").items()}
    for name in shared:
        assert parameters[name].default == defaults[name]
    assert {"options", *of_methods} - of_priors <= set(parameters)


def test_what_is_public_is_listed_once():
    listed = set(dir(drift_merge))
    text = Path(inspect.getfile(drift_merge)).read_text()
    typed = {
        alias.asname
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert typed == listed
