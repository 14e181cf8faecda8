"""Pushes, as most tests make them."""

import re

from tests.faults.harness import assert_json_refusal, run
from tests.hub.places import REPO

NAMES_OF_MODELS = re.compile(
    r"config\.json|generation_config\.json|(model|pytorch_model|adapter_model).*|tokenizer.*"
    r"|.*\.(bin|pt|gguf)|adapter_config\.json"
)


def push(directory, *options, repo_id=REPO, program="drift-prior"):
    result = run(program, "push", str(directory), repo_id, *options)
    assert result.code == 0, result
    return result


def refused(code, *mentions, directory, options=(), repo_id=REPO, program="drift-prior"):
    """A push is refused, plainly and as JSON."""
    arguments = (program, "push", str(directory), repo_id, *options)
    result = run(*arguments)
    assert result.code == code, result
    assert result.stdout == ""
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr
    for mention in mentions:
        assert mention in result.stderr, result.stderr
    assert_json_refusal(run(*arguments, "--json"), code, mentions)
