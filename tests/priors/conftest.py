"""A pair, its priors by dtype, and a copy of one to be damaged."""

import shutil

import pytest

from tests import checkpoints as c
from tests.runs import run_prior


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return c.make_pair(tmp_path_factory.mktemp("pair"), num_shards=(2, 3))


@pytest.fixture(scope="module")
def plain(pair, tmp_path_factory):
    """Uncompressed priors by dtype."""
    directory = tmp_path_factory.mktemp("plain")
    dtypes = ("float32", "bfloat16", "float16", "source")
    for dtype in dtypes:
        run_prior(*pair, directory / dtype, dtype=dtype, modules="attn,mlp,norm")
    return {dtype: directory / dtype for dtype in dtypes}


@pytest.fixture
def prior(plain, tmp_path):
    """A copy of a bfloat16 prior, to be damaged."""
    return shutil.copytree(plain["bfloat16"], tmp_path / "prior")
