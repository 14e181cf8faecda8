"""Weights as users write them: what every form gives each tensor, and what is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.errors import RecipeError
from drift_merge.names.modules import CHOICES
from drift_merge.recipes.weights import parse_weight
from tests.strategies import quick

LAYERS = 5
Q = "layers.{}.self_attn.q_proj.weight"
UP = "layers.{}.mlp.up_proj.weight"
TOP = [("embed_tokens.weight", "embed"), ("norm.weight", "norm"), ("lm_head.weight", "head")]


def at(text, canonical, module, layer=None, num_layers=LAYERS):
    return parse_weight(text).resolve(canonical, module, layer, num_layers)


def attn(text, layer=0, num_layers=LAYERS):
    return at(text, Q.format(layer), "attn", layer, num_layers)


def mlp(text, layer=0, num_layers=LAYERS):
    return at(text, UP.format(layer), "mlp", layer, num_layers)


@given(st.floats(-1e6, 1e6))
@quick
def test_a_number_is_the_weight_of_every_tensor(value):
    for text in (value, str(value), f"  {value} "):
        assert attn(text, 3) == mlp(text, 0) == value
        assert [at(text, name, module) for name, module in TOP] == [value] * 3
        assert parse_weight(text).plain == value


def test_modules_have_their_own_numbers_and_a_bare_one_is_for_the_others():
    text = "attn=0.1, mlp=0.3,0.5"
    assert (attn(text), mlp(text)) == (0.1, 0.3)
    assert [at(text, name, module) for name, module in TOP] == [0.5] * 3
    assert parse_weight(text).plain == text.strip()


@pytest.mark.parametrize("text", ["0.5,attn=0.1,re:q_proj=0.2", "re:q_proj=0.2,attn=0.1,0.5"])
def test_regexes_come_before_modules_and_modules_before_the_rest_in_any_order(text):
    assert attn(text) == 0.2
    assert at(text, "layers.0.self_attn.o_proj.weight", "attn", 0) == 0.1
    assert mlp(text) == 0.5


def test_the_first_of_two_regexes_that_find_a_name_wins():
    assert attn("re:proj=0.1,re:q_proj=0.2,0") == 0.1
    assert attn("re:q_proj=0.2,re:proj=0.1,0") == 0.2


@pytest.mark.parametrize(
    "regex",
    [
        r"layers\.(0|1)\.",
        r"layers\.[0-1]\.",
        r"layers\.\d{1,2}\.self_attn",
        "q_proj.weight$",
        "(?=layers.0)",
        "(q|k)_proj",
    ],
)
def test_a_regex_may_hold_brackets_commas_and_equals_signs(regex):
    assert attn(f"re:{regex}=0.25,0.5") == 0.25
    assert at(f"re:{regex}=0.25,0.5", "norm.weight", "norm") == 0.5


def test_a_gradient_is_linear_from_the_first_layer_to_the_last():
    assert [attn("[0,0.5,1]", layer) for layer in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [attn("[1, 0]", layer) for layer in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert [attn("[0.3]", layer) for layer in range(5)] == [0.3] * 5
    assert attn("[0.2,0.8]", 0, num_layers=1) == 0.2


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.integers(1, 40))
@quick
def test_a_gradient_stays_between_its_points_and_begins_and_ends_with_them(points, num_layers):
    text = str(points)
    found = [attn(text, layer, num_layers) for layer in range(num_layers)]
    assert found[0] == points[0]
    if num_layers > 1:
        assert math.isclose(found[-1], points[-1], abs_tol=1e-12)
    assert all(min(points) - 1e-12 <= x <= max(points) + 1e-12 for x in found)


def test_outside_the_layers_a_gradient_has_its_ends():
    # The embedding stands before the first layer; norm and head after the last.
    assert [at("[0.1,0.9]", name, module) for name, module in TOP] == [0.1, 0.9, 0.9]


def test_gradients_are_possible_for_one_module_and_for_a_regex():
    text = "mlp=[0,1],re:q_proj=[1,0.5],0.1"
    assert [mlp(text, layer) for layer in (0, 2, 4)] == [0, 0.5, 1]
    assert [attn(text, layer) for layer in (0, 2, 4)] == [1, 0.75, 0.5]
    assert at(text, "layers.0.self_attn.o_proj.weight", "attn", 0) == 0.1
    assert parse_weight("[0,1]").plain == "[0,1]"


@pytest.mark.parametrize("text", ["attn=0.1", "re:q_proj=1,attn=0.1", "embed=[0,1],head=2"])
def test_a_tensor_that_no_term_covers_is_an_error_that_names_it(text):
    with pytest.raises(RecipeError, match=r"layers\.1\.mlp\.up_proj\.weight \(mlp\)") as caught:
        mlp(text, 1)
    assert text in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no number"),
        ("a tenth", "no number"),
        ("0.1,,0.2", "no number"),
        ("[]", "no number"),
        ("[0,1", "no number"),
        ("attn=", "no number"),
        ("re:q_proj", "no number"),
        ("atn=0.1", "'atn' is no module"),
        ("=0.1", "'' is no module"),
        ("re:(=0.1", "no regular expression"),
        ("nan", "finite"),
        ("inf", "finite"),
        ("[0,-inf]", "finite"),
        ("0.1,0.2", "twice"),
        ("attn=1,attn=2", "twice"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_the_reason_and_the_forms(text, told):
    with pytest.raises(RecipeError, match=told) as caught:
        parse_weight(text, option="--mllm-weight")
    assert "--mllm-weight" in str(caught.value)
    assert "attn=0.1,mlp=0.3" in caught.value.remedy


@pytest.mark.parametrize("module", [m for m in CHOICES if m != "full"])
def test_every_module_can_have_a_weight(module):
    assert at(f"{module}=0.25,0.5", "x", module) == 0.25
    assert at(f"{module}=0.25,0.5", "x", "other") == 0.5


def test_full_is_no_module_of_a_tensor_and_so_refused_as_a_key():
    # No tensor is of the module "full": its weight would never be used.
    with pytest.raises(RecipeError, match="'full' is no module"):
        parse_weight("full=0.1,0.2")
