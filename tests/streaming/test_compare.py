"""`drift-merge compare` of two repositories with `--stream`: the figures of local folders."""

import json
from pathlib import Path

from tests import checkpoints as c
from tests.faults.harness import Result, assert_refusal, run
from tests.hub_server.models import BASE, MLLM, REASONER, downloads, shard_bytes, whole_request
from tests.hub_server.server import HubServer

WORDS = ("drift-merge", "compare", "--threads", "1")
FIGURES = ("modules", "tensors", "histogram", "coverage", "verdict")


def compare(*words: object) -> Result:
    return run(*WORDS, *map(str, words))


def figures(result: Result) -> dict[str, object]:
    assert result.code == 0, result
    found = json.loads(result.stdout)
    return {key: found[key] for key in FIGURES}


def test_two_repositories_give_the_figures_of_their_folders_and_count_what_they_fetch(
    hub: HubServer, pair: c.Pair, tmp_path: Path
) -> None:
    base = pair.mllm.with_name("base")
    streamed = compare(REASONER, MLLM, "--base", BASE, "--stream", "--json")
    assert figures(streamed) == figures(compare(*pair, "--base", base, "--json"))
    found = json.loads(streamed.stdout)
    assert (found["a"], found["b"], found["base"]) == (REASONER, MLLM, BASE)
    total = sum(shard_bytes(folder) for folder in (*pair, base))
    assert found["traffic"]["downloaded_bytes"] == total
    assert found["traffic"]["num_downloads"] == len(downloads(hub)) == 3 + 4 + 2
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    plain = compare(REASONER, MLLM, "--modules", "attn", "--stream")
    assert plain.stderr.splitlines()[-1].startswith("Downloaded ")


def test_interrupted_downloads_go_on_and_change_no_figure(hub: HubServer, pair: c.Pair) -> None:
    fault = hub.inject("GET /lfs/", cut_after=5000, times=20)
    found = figures(compare(REASONER, MLLM, "--stream", "--json"))
    assert fault.times == 0
    hub.faults.clear()
    assert found == figures(compare(*pair, "--json"))


def test_a_download_that_fails_for_good_is_a_source_error_and_leaves_nothing(
    hub: HubServer, pair: c.Pair, tmp_path: Path
) -> None:
    hub.inject(whole_request(max(pair.mllm.glob("*.safetensors"))), status=503)
    page = tmp_path / "page.html"
    assert_refusal(compare(REASONER, MLLM, "--stream", "--report", page), 3, ["HTTP 503"])
    assert not page.exists()
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_revision_or_a_repository_that_is_not_there(hub: HubServer, pair: c.Pair) -> None:
    gone = compare(REASONER, f"{MLLM}@no-such", "--stream")
    assert_refusal(gone, 3, [MLLM, "no revision 'no-such'"])
    assert_refusal(compare("org/nobody", MLLM, "--stream"), 3, ["org/nobody"])
    assert downloads(hub) == []
