"""The guide of methods says what the methods are."""

import re

import pytest

from drift_merge.maths.methods import METHODS
from drift_merge.maths.methods.table import CALIBRATION, SPECTRAL
from tests.cli.documents import COMMANDS, GUIDES, options_of

SECTIONS = dict(re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", GUIDES["methods"], re.DOTALL | re.M))


# Said once, of all methods that need a base.
SHARED = {"--weight", "--mllm-weight", "--scale", "--calibrate", "--calibrate-alpha"}


STEP = {f"--{name}" for name in SPECTRAL}  # of all methods with a spectral step


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_has_a_row_and_a_section_that_names_its_options_and_its_source(method):
    least, most = method.reasoners
    number = str(least) if least == most else f"{least} or more"
    row = f"| `{method.name}` | {method.base} | {number} | {', '.join(method.variants)} |"
    assert row in GUIDES["methods"]
    section = SECTIONS[method.name]
    every = set.intersection(*(set(options_of(COMMANDS["drift-merge", n])) for n in METHODS))
    general = every | {"--base", "--variant"} | (SHARED if method.base == "required" else set())
    general |= STEP if "rank" in method.defaults["paper"] else set()
    assert not {
        flag
        for flag, flags in options_of(COMMANDS["drift-merge", method.name]).items()
        if flag not in general and not any(own in section for own in flags)
    }
    for variant in method.variants[1:]:
        assert variant in section or variant == "mergekit", variant
    for arxiv in re.findall(r"\d{4}\.\d{5}", method.paper):
        assert arxiv in section


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_defaults_that_the_guide_states_are_those_of_the_method(method):
    """`--density` (0.2) stands for the default variant."""
    text = re.split("[Vv]ariant `", " ".join(SECTIONS[method.name].split()))[0]
    stated = {}
    for flag, value in re.findall(r"`--([a-z-]+)[^`]*` \(([^)]+)\)", text):
        stated.setdefault(flag.replace("-", "_"), value)
    known = {
        name: value
        for name, value in method.defaults[method.variants[0]].items()
        if name != "is_delta"
        and not (f"--{name}" in STEP and "rank" in method.defaults["paper"])
        and (method.base != "required" or f"--{name.replace('_', '-')}" not in SHARED)
    }
    assert known.keys() <= stated.keys()
    for name, value in known.items():
        if isinstance(value, bool | str):
            assert stated[name] == str(value).lower(), name
        else:
            assert float(stated[name]) == value, name


def test_the_guide_states_the_defaults_that_methods_share():
    text = GUIDES["methods"].partition("## Singular directions")[2].partition("\n## ")[0]
    stated = dict(re.findall(r"`--([a-z-]+)[^`]*` \((\w[\w.]*)", text))
    for name, value in {**SPECTRAL, **CALIBRATION}.items():
        assert stated[name.replace("_", "-")] == (value if isinstance(value, str) else f"{value:g}")
    for method in METHODS.values():
        alpha = method.defaults["paper"].get("calibrate_alpha", CALIBRATION["calibrate_alpha"])
        said = f"`--calibrate-alpha` ({alpha:g})" in SECTIONS[method.name]
        assert said == (alpha != CALIBRATION["calibrate_alpha"]), method.name


def test_the_guide_has_no_method_that_does_not_exist():
    assert set(SECTIONS) == set(METHODS)
