"""Searches of one weight whose best is known."""

import drift_merge

SPACE = ["weight=0:0.4"]


def recipe_of(pair, **values):
    values = {"modules": "attn,mlp,norm"} | values
    return drift_merge.Recipe(
        method="linear", reasoners=(str(pair.reasoner),), mllm=str(pair.mllm), **values
    )


def weight_of(path):
    """The weight that a directory was merged with; 0 of the mllm."""
    if not (path / "drift_merge.json").exists():
        return 0.0
    return (drift_merge.open_merge(path).manifest["parameters"]["weights"] or [0.1])[0]


def near(goal):
    return lambda path: -((weight_of(path) - goal) ** 2)


def search(pair, objective, space=SPACE, **more):
    recipe = more.pop("recipe", None) or recipe_of(pair)
    return drift_merge.search(recipe, space, objective, progress=False, threads=1, **more)
