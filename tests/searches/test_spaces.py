"""Spaces: what a text means, what a method lacks, and what is refused before any work."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_merge.errors import RecipeError
from drift_merge.maths.methods import METHODS
from drift_merge.recipes.values import build_recipe, method_keys
from drift_merge.searches.spaces import parse_space

BASE = {"method": "ties", "reasoner": "r", "mllm": "m", "base": "b"}
LINEAR = {"method": "linear", "reasoner": "r", "mllm": "m"}


def low(parameter):
    return parameter.ends[0]


def high(parameter):
    return parameter.ends[1]


@pytest.mark.parametrize(
    ("text", "lowest", "highest"),
    [
        ("weight=0.01:0.3:log", 0.01, 0.3),
        ("weight=0:0.35:0.1", 0.0, 0.3),
        ("weight=0.1,attn", 0.1, None),
        ("weight=0.1|0.3", 0.1, 0.3),
        ("weight=curve:3:0:0.5", "[0.0,0.0,0.0]", "[0.5,0.5,0.5]"),
        (
            "weight=attn={0:0.1},mlp={curve:2:0:0.3}",
            "attn=0.0,mlp=[0.0,0.0]",
            "attn=0.1,mlp=[0.3,0.3]",
        ),
        ("weight=re:o_proj={0.1:0.2},0", "re:o_proj=0.1,0", "re:o_proj=0.2,0"),
        ("modules=attn|attn,mlp", "attn", "attn,mlp"),
        ("layers=0:14|14:28", "0:14", "14:28"),
        ("round_seed=0:7", 0, 7),
        ("allow-nonfinite=false,true", False, True),
        ("rank=1:64:log", 1, 64),
        ("bands=0:1={0:0.3},1:16={0:0.1}", "0:1=0.0,1:16=0.0", "0:1=0.3,1:16=0.1"),
        ("bands=0:1=0.1|0:16=0.1,16:64=0.05", "0:1=0.1", "0:16=0.1,16:64=0.05"),
    ],
)
def test_what_a_text_means(text, lowest, highest):
    option = text.partition("=")[0].replace("_", "-")
    if highest is None:
        with pytest.raises(RecipeError, match="attn"):
            parse_space(LINEAR, [text])
        return
    space = parse_space(LINEAR, [text])
    assert space.options(space.draw(low))[option] == lowest
    assert space.options(space.draw(high))[option] == highest


def test_an_option_belongs_to_the_methods_and_variants_that_have_it():
    texts = [
        "method=linear,ties,sce,dare-ties",
        "weight=0.1:0.3",
        "density=0.1:0.9",
        "dare-ties.variant=paper,mergekit",
        "dare-ties.rescale=true,false",
    ]
    space = parse_space(BASE, texts)

    def drawn(method, variant="paper"):
        chosen = {"method": method, "dare-ties.variant": variant}
        return space.options(space.draw(lambda p: chosen.get(p.name, p.ends[0])))

    assert drawn("linear") == LINEAR | {"weight": 0.1}
    assert drawn("ties") == BASE | {"weight": 0.1, "density": 0.1}
    assert drawn("sce") == BASE | {"method": "sce", "density": 0.1}
    assert "rescale" not in drawn("dare-ties")
    assert drawn("dare-ties", "mergekit")["rescale"] is True


def test_options_of_the_recipe_stay_where_the_method_has_them():
    base = BASE | {"density": 0.4, "trim": "global", "modules": "attn", "mllm-weight": 0.5}
    space = parse_space(base, ["method=ties,breadcrumbs,linear"])
    options = {m: space.options({"method": m}) for m in space.methods}
    assert options["ties"] == base
    assert options["breadcrumbs"] == {k: v for k, v in base.items() if k != "trim"} | {
        "method": "breadcrumbs"
    }
    assert options["linear"] == LINEAR | {"modules": "attn"}


def is_recipe(values):
    try:
        return bool(build_recipe(values))
    except RecipeError:
        return False


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_option_of_every_method_can_be_varied(method):
    """Whatever the table gains: numbers by a range or choices, words by their choices."""
    sources = {"reasoner": ["r"] * method.reasoners[0], "mllm": "m", "method": method.name}
    if method.base == "required":
        sources["base"] = "b"
    for variant in method.variants:
        for name in method.option_names(variant):
            option = method.option(name)
            default = method.defaults[variant].get(name)
            if option.is_internal or default is None:
                continue
            needed = dict.fromkeys(method.required.get(variant, ()), 0.5)
            values = option.choices or ("true,false" if option.kind is bool else (default,))
            text = values if isinstance(values, str) else "|".join(map(str, values))
            base = {**sources, "variant": variant, **needed}
            # Some options are for what another one turns on, and refused without it.
            others = ({}, {"rank": 1}, {"calibrate": "svc"})
            base |= next(o for o in others if is_recipe({**base, **o, option.long_name: default}))
            space = parse_space(base, [f"{option.long_name}={text}"])
            recipe = space.recipe(space.draw(low))
            assert name in recipe.options


@settings(max_examples=10)
@given(st.integers(0, 3), st.floats(0.0, 1.0), st.floats(0.1, 0.9))
def test_every_draw_is_a_recipe(number, weight, density):
    texts = ["method=linear,ties,chat-vector,dare-linear", "weight=0:1", "density=0.1:0.9"]
    space = parse_space(BASE, texts)
    picks = {"method": space.methods[number], "weight": weight, "density": density}
    values = space.draw(lambda p: picks[p.name])
    assert space.recipe(values) == build_recipe(space.options(values))
    assert ("density" in values) == ("density" in method_keys(space.methods[number]))


def test_an_option_given_twice_is_of_the_first_and_of_the_second_reasoner():
    space = parse_space(LINEAR | {"reasoner": ["r", "s"]}, ["weight=0:0.1", "weight=0.2:0.3"])
    assert [p.name for p in space.parameters] == ["weight", "weight.2"]
    assert space.recipe(space.draw(high)).weights == (0.1, 0.3)


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        ([], "there is no --space"),
        (["weight"], "OPTION=VALUES"),
        (["wieght=0:1"], "Did you mean weight"),
        (["density=0:1"], "no option density"),
        (["method=linear,tis"], "Did you mean ties"),
        (["tis.density=0.1:0.2"], "Did you mean ties"),
        (["ties.density=0.1:0.2"], "no option density"),
        (["weight=0.3:0.1"], "LOW < HIGH"),
        (["weight=0:1:log"], "begins above 0"),
        (["weight=0:1:2"], "larger than the range"),
        (["weight=0:1:0.1:3"], "LOW:HIGH"),
        (["weight=0:inf"], "not finite"),
        (["weight=0:x"], "no number"),
        (["weight=0.1,0.1"], "given twice"),
        (["weight=0.1,"], "empty"),
        (["weight=curve:1:0:1"], "curve:N"),
        (["weight=curve:3:0"], "curve:N"),
        (["weight={0:1"], "no partner"),
        (["weight=attm={0:1}"], "no module"),
        (["round=nearest,sideways"], "sideways"),
        (["round-seed=0:1.5"], "whole number"),
        (["allow-nonfinite=yes,no"], "true,false"),
        (["weight=0:0.1", "weight=0:0.2"], "1 times|given 2 times"),
        (["round=nearest", "round=stochastic"], "twice"),
        (["method=ties,linear"], "needs a base"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_before_any_work(texts, named):
    with pytest.raises(RecipeError, match=named):
        parse_space(LINEAR, texts)


def test_grids_have_every_step_or_even_points():
    [steps] = parse_space(LINEAR, ["weight=0.1:0.3:0.1"]).parameters
    [even] = parse_space(LINEAR, ["weight=0.01:1:log"]).parameters
    [whole] = parse_space(LINEAR, ["round-seed=1:4"]).parameters
    assert steps.points(99) == [0.1, 0.2, 0.3]
    assert even.points(3) == pytest.approx([0.01, 0.1, 1.0])
    assert whole.points(2) == [1, 2, 3, 4]
