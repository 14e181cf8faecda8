"""Pairs whose head and embedding are, or are not, one parameter."""

import numpy as np

from drift_merge.engine.job import RunOptions
from drift_merge.merges.make import make_merge
from drift_merge.plans.prepare import prepare
from drift_merge.recipes.recipe import Recipe
from tests import checkpoints as c

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = {"tokenizer.json": c.tokenizer()}


def random(shape, seed):
    return c.store(np.random.default_rng(seed).normal(size=shape), "F32")


def opened(method, reasoners, mllm, modules, **recipe):
    request = Recipe(
        method=method,
        reasoners=tuple(map(str, reasoners)),
        mllm=str(mllm),
        modules=modules,
        **recipe,
    )
    return prepare(request, quiet=True)


def merge(method, reasoners, mllm, out, modules="full", **recipe):
    prepared = opened(method, reasoners, mllm, modules, **recipe)
    return make_merge(prepared, prepared.plan(), out, RunOptions(threads=1)).merge


def write(tmp_path, *, reasoner=None, mllm=None, tied=True, our_config=None):
    own = c.mllm_tensors(dtype="F32")
    return c.make_pair(
        tmp_path,
        dtype="F32",
        reasoner={HEAD: None} | (reasoner or {}),
        mllm={HEAD: own[EMBED]} | (mllm or {}),
        reasoner_config={"tie_word_embeddings": True} | (our_config or {}),
        mllm_config_changes={} if tied is None else {"tie_word_embeddings": tied},
        reasoner_sidecars=TOKENS,
        mllm_sidecars=TOKENS,
    )


RECIPES = {
    "linear": {"weights": (0.3,)},
    "slerp": {"weights": (0.3,)},
    "dare-linear": {"options": {"density": 0.5}},
    "della": {"options": {"density": 0.5}},
    "ties": {"options": {"trim": "global"}},
}
