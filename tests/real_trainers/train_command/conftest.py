"""The pair, its prior, its processor and its data, once for each file of tests."""

import pytest


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    pytest.importorskip("transformers")
    pytest.importorskip("PIL")
    from tests.real_trainers import tiny

    setup = tiny.make_setup("llava", tmp_path_factory.mktemp("llava"))
    tiny.write_llava_processor(setup.mllm)
    tiny.write_questions(setup.mllm.parent)
    return setup
