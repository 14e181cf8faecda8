"""Recipes as files: our own YAML and the published settings; round trips of every recipe."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.errors import RecipeError
from drift_merge.maths.methods import METHODS
from drift_merge.plans.prepare import prepare
from drift_merge.recipes.files import absolute, read_recipe
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.values import build_recipe, to_values
from drift_merge.recipes.words import MERGE_MODULES, PRIOR
from drift_merge.recipes.yaml import read_mapping, write_mapping
from tests import checkpoints as c
from tests.strategies import quick

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
PAIR = "reasoner: org/text\nmllm: org/vision\n"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def recipe_of(path, text, **overrides):
    return read_recipe(write(path / "recipe.yaml", text)).recipe(overrides)


def meaning(recipe):
    """What a recipe asks for, whether defaults are spelled out or not."""
    return recipe.method, recipe.reasoners, recipe.mllm, recipe.base, recipe.parameters()


# Our own format.


def test_keys_are_the_long_names_of_the_options(tmp_path):
    recipe = recipe_of(
        tmp_path,
        "method: ties\nreasoner: [org/one, org/two]\nmllm: org/vision\nbase: org/base\n"
        "weight: [0.3, '[0, 0.5]']\nmllm-weight: attn=0.1,0.2\nvariant: mergekit\ndensity: 1e-1\n"
        "normalize: false\nmodules: [attn, mlp]\nlayers: 4:28\ndtype: float32\n"
        "max_shard_size: 2GB\non-mismatch: skip\nallow-nonfinite: true\n",
    )
    assert recipe == Recipe(
        method="ties",
        reasoners=("org/one", "org/two"),
        mllm="org/vision",
        base="org/base",
        weights=(0.3, "[0, 0.5]"),
        mllm_weight="attn=0.1,0.2",
        variant="mergekit",
        options={"density": 0.1, "normalize": False},
        modules="attn,mlp",
        layers="4:28",
        dtype="float32",
        max_shard_size="2GB",
        on_mismatch="skip",
        allow_nonfinite=True,
    )


def test_defaults_are_those_of_the_command_of_the_method(tmp_path):
    merge = recipe_of(tmp_path, f"method: linear\n{PAIR}")
    prior = recipe_of(tmp_path, f"method: prior\n{PAIR}")
    assert (merge.modules, merge.dtype) == (MERGE_MODULES, "source")
    assert (prior.modules, prior.dtype) == ("attn,mlp", "bfloat16")


def test_an_override_wins_over_the_file_and_the_file_is_not_blamed_for_it(tmp_path):
    text = f"method: linear\n{PAIR}weight: 0.1\nmodules: attn\n"
    assert recipe_of(tmp_path, text, weight=[0.7], modules="mlp").weights == (0.7,)
    with pytest.raises(RecipeError) as raised:
        recipe_of(tmp_path, text, dtype="int8")
    assert raised.value.message.startswith(f"{tmp_path / 'recipe.yaml'}: --dtype is 'int8'")


def test_paths_are_relative_to_the_file_where_they_exist_there(tmp_path):
    (tmp_path / "models/text").mkdir(parents=True)
    text = "method: linear\nreasoner: models/text\nmllm: org/name@main\noutput: made\n"
    request = read_recipe(write(tmp_path / "recipe.yaml", text))
    assert request.values["reasoner"] == str(tmp_path / "models/text")
    assert request.values["mllm"] == "org/name@main"
    assert request.values["output"] == str(tmp_path / "made")


WRONG = {
    "an unknown key": ("wieght: 0.1", 4, "unknown key 'wieght'. Did you mean weight?"),
    "a key of another method": ("weight: 1\nepsilon: 0.1", 5, "linear has no option epsilon"),
    "an unknown dtype": ("weight: 0.1\ndtype: int8", 5, "--dtype is 'int8'; expected one of"),
    "a weight that is none": ("weight: much", 4, "--weight 'much' cannot be used"),
    "a flag that is none": ("allow-nonfinite: 3", 4, "expected true or false"),
    "a word that is a flag": ("modules: true", 4, "modules is True; expected a word"),
    "a seed where nothing is drawn": ("seed: 1", 4, "linear has no option seed"),
    "a key twice": ("weight: 1\nweight: 2", 5, "'weight' is there already, in line 4"),
    "a base where none is taken": ("base: org/base", 4, "linear takes no base"),
    "two weights for one reasoner": ("weight: [1, 2]", 4, "--weight is given 2 times"),
}


@pytest.mark.parametrize(("text", "line", "message"), WRONG.values(), ids=list(WRONG))
def test_an_error_names_the_file_and_the_line(tmp_path, text, line, message):
    with pytest.raises(RecipeError) as raised:
        recipe_of(tmp_path, f"method: linear\n{PAIR}{text}\n")
    assert f"{tmp_path / 'recipe.yaml'}, line {line}: " in raised.value.message
    assert message in raised.value.message
    assert raised.value.remedy


def test_a_number_that_is_none_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"line 4: density is 'x'; expected a number"):
        recipe_of(tmp_path, f"method: ties\n{PAIR}density: x\nbase: org/base")


@pytest.mark.parametrize("missing", ["method", "reasoner", "mllm"])
def test_what_every_recipe_needs_is_asked_for(tmp_path, missing):
    lines = f"method: linear\n{PAIR}".splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith(missing))
    with pytest.raises(RecipeError, match=f"{missing} is missing"):
        recipe_of(tmp_path, text)


def test_an_unknown_method_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(RecipeError, match=r"line 1: .*Did you mean slerp\?"):
        recipe_of(tmp_path, f"method: slrep\n{PAIR}")


# Round trips.

WEIGHT = st.one_of(
    st.floats(-2, 2).filter(lambda x: x == x),
    st.sampled_from(["attn=0.1,mlp=0.3,0", "[0,0.5,1]", "re:o_proj=0.2,0.1", "0.25"]),
)
NUMBERS = {"max_iter": (5.0, 20.0), "agreement": (1.0, 2.0)}


def value_of(option):
    """Values that an option takes, whatever its kind."""
    if option.choices:
        return st.sampled_from(option.choices)
    if option.name == "keep_layers":
        return st.sampled_from(["0:6", "1,3"])
    if option.name == "bands":
        return st.sampled_from(["0:16=0.1,16:64=0.05", ":=0.5", "none"])
    if option.name == "gates":
        return st.sampled_from(["none", "/gates/one.safetensors"])
    kinds = {bool: st.booleans(), int: st.integers(0, 9)}
    return kinds.get(option.kind, st.sampled_from(NUMBERS.get(option.name, (0.25, 0.5))))


def _leave_out_what_conflicts(options):
    """At most one choice of singular directions, and nothing that has no effect beside it."""
    choices = [name for name in ("rank", "eta", "bands", "gates") if name in options]
    is_matched = choices[:1] in (["rank"], ["eta"]) and options[choices[0]]
    for name in [*choices[1:], *([] if is_matched else ["norm"])]:
        options.pop(name, None)
    options.pop("frank_decay", None)
    if options.get("calibrate", "none") == "none":
        options.pop("calibrate_alpha", None)


@st.composite
def recipes(draw):
    """Any recipe that the catalog allows."""
    name = draw(st.sampled_from([*METHODS, PRIOR]))
    reasoners = ("org/a",)
    found = {
        "method": name,
        "mllm": "org/vision",
        "modules": draw(st.sampled_from(["mlp", "re:q"])),
    }
    found["layers"] = draw(st.sampled_from([None, "0:2", "1", "0,2:3"]))
    found["dtype"] = draw(st.sampled_from(["source", "bfloat16", "float32"]))
    found["on_mismatch"] = draw(st.sampled_from(["error", "skip"]))
    found["max_shard_size"] = draw(st.sampled_from(["5GB", "1MiB"]))
    found["map_file"] = draw(st.sampled_from([None, Path("/maps/one.yaml")]))
    found["allow_nonfinite"] = draw(st.booleans())
    found["base"] = draw(st.sampled_from([None, "org/base"])) if name == PRIOR else None
    if name == PRIOR:
        return Recipe(reasoners=reasoners, **found)
    method = METHODS[name]
    if method.reasoners[1] is None:
        reasoners = ("org/a", "org/b", "org/c@main")[: draw(st.integers(method.reasoners[0], 3))]
    if method.base != "none" and (method.base == "required" or draw(st.booleans())):
        found["base"] = "org/base"
    variant = draw(st.sampled_from(method.variants))
    found["variant"] = draw(st.sampled_from([variant, *([None] * (variant == "paper"))]))
    required = method.required.get(variant, ())
    taken = {*method.defaults[variant], *required}
    if "weight" in taken and ("weight" in required or draw(st.booleans())):
        count = draw(st.sampled_from([1, len(reasoners)]))
        found["weights"] = tuple(draw(WEIGHT) for _ in range(count))
    if "mllm_weight" in taken and draw(st.booleans()):
        found["mllm_weight"] = draw(WEIGHT)
    found["options"] = {
        name: draw(value_of(method.option(name)))
        for name in method.option_names(variant)
        if name in required or draw(st.booleans())
    }
    _leave_out_what_conflicts(found["options"])
    return Recipe(reasoners=reasoners, **found)


@given(recipes())
@quick
def test_a_recipe_written_and_read_again_asks_for_the_same(tmp_path_factory, recipe):
    file = tmp_path_factory.mktemp("written") / "recipe.yaml"
    file.write_text(write_mapping(absolute(to_values(recipe))))
    assert meaning(read_recipe(file).recipe()) == meaning(recipe)


@given(recipes())
@quick
def test_the_options_of_a_recipe_make_that_recipe(recipe):
    again = build_recipe(to_values(recipe))
    assert meaning(again) == meaning(recipe)
    assert to_values(again) == to_values(recipe)


@given(recipes())
@quick
def test_a_recipe_survives_its_manifest(recipe):
    parameters = json.loads(json.dumps(recipe.parameters()))
    again = Recipe.from_parameters(
        recipe.method,
        parameters,
        reasoners=recipe.reasoners,
        mllm=recipe.mllm,
        base=recipe.base,
        map_file=recipe.map_file,
    )
    assert meaning(again) == meaning(recipe)


def test_what_is_equal_to_a_default_is_not_written():
    recipe = build_recipe({"method": "ties", "reasoner": "a/b", "mllm": "c/d", "base": "e/f"})
    assert list(to_values(recipe)) == ["method", "reasoner", "mllm", "base"]
    spelled = dataclasses.replace(recipe, options={"density": 0.2, "scale": 1.0}, variant="paper")
    assert to_values(spelled) == to_values(recipe)


def test_numbers_are_not_guessed_at(tmp_path):
    file = write(tmp_path / "x.yaml", "a: 1:30\nb: 1e-4\nc: 2026-01-01\nd: true\ne: ~\nf: 007\n")
    assert read_mapping(file) == {
        "a": "1:30",
        "b": "1e-4",
        "c": "2026-01-01",
        "d": True,
        "e": None,
        "f": "007",
    }


# Published settings.


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Tiny models in the place of the published ones, deep enough for k = 5."""
    directory = tmp_path_factory.mktemp("stand_ins")
    pair = c.make_pair(directory, layers=8)
    tensors = c.reasoner_tensors(8, seed=7)
    base = c.write_checkpoint(directory / "base", tensors, c.text_config(8))
    return {"reasoner": str(pair.reasoner), "mllm": str(pair.mllm), "base": str(base)}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_every_published_setting_can_be_planned(stand_ins, file):
    request = read_recipe(file)
    given = {key: value for key, value in stand_ins.items() if key in request.values}
    if "method" not in request.values:  # a pair, for --config
        given["method"] = "chat-vector" if "base" in request.values else "linear"
    recipe = request.recipe(given)
    counts = prepare(recipe).plan().counts()
    kept_layers = 6 if recipe.method == "layer-swap" else 0
    num_norms = (2, 1) if recipe.modules == MERGE_MODULES else (0, 0)  # of a layer, and the last
    assert counts[recipe.method] == (8 - kept_layers) * (10 + num_norms[0]) + num_norms[1]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_every_setting_says_whether_it_is_published(file):
    comments = " ".join(line for line in file.read_text().splitlines() if "#" in line)
    assert ("arXiv" in comments or "Published" in comments) != ("Untested" in comments)


def test_a_seed_is_a_whole_number(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("method: dare-ties\nreasoner: org/a\nmllm: org/b\nbase: org/c\nseed: 0.5\n")
    with pytest.raises(RecipeError, match=r"line 5: seed is '0.5'; expected a whole number"):
        read_recipe(file).recipe()
