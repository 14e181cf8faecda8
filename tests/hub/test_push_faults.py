"""Pushes over lines that break, to servers that fail, refuse, forget to answer or lie."""

import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from drift_merge.hub import push as pushing
from drift_merge.hub import refusals
from drift_merge.hub.files import COMMIT_FILES
from tests import checkpoints as c
from tests.faults.harness import assert_refusal, run
from tests.hub.places import REPO, TOKEN, account, files_at, shards_of
from tests.hub_server.store import Account
from tests.runs import run_prior

CHUNK_BYTES = 65_536  # as the server reads a body
# Every kind of request that a push makes.
REQUESTS = (
    "GET /api/whoami-v2",
    "GET /api/models/org/prior/revision/",
    "GET /api/models/org/prior/tree/",
    "POST /api/repos/create",
    "POST /api/models/org/prior/preupload/",
    "POST /org/prior.git/info/lfs/objects/batch",
    "PUT /upload/",
    "POST /api/lfs/verify",
    "POST /api/validate-yaml",
    "POST /api/models/org/prior/commit/",
)


@pytest.fixture(scope="module")
def whole(built, tmp_path_factory):
    """What an undisturbed push leaves, by file."""
    with account(tmp_path_factory.mktemp("whole")) as hub:
        assert run("drift-prior", "push", str(built.prior), REPO).code == 0
        return files_at(hub)


def pushed(built, *options):
    return run("drift-prior", "push", str(built.prior), REPO, *options)


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_server_that_fails_twice_is_waited_out(hub, built, whole, request_):
    hub.inject(re.escape(request_), status=503, times=2)
    result = pushed(built)
    assert result.code == 0, result
    assert files_at(hub) == whole


# The client verifies an upload only when it has just sent it: the next attempt finds it there.
@pytest.mark.parametrize("request_", [r for r in REQUESTS if "verify" not in r])
def test_a_server_that_keeps_failing_is_given_up_and_the_same_command_goes_on(
    hub, built, whole, request_
):
    fault = hub.inject(re.escape(request_), status=500)
    assert_refusal(pushed(built), 3, ["HTTP 500", "The fault is on that side"])
    assert REPO not in hub.repos or "README.md" not in files_at(hub)
    fault.times = 0
    hub.forget_requests()
    assert pushed(built).code == 0
    assert files_at(hub) == whole


@pytest.mark.parametrize("request_", REQUESTS)
def test_an_answer_that_is_lost_does_no_harm(hub, built, whole, request_):
    hub.inject(re.escape(request_), loses_answer=True, times=1)
    result = pushed(built)
    assert result.code == 0, result
    assert files_at(hub) == whole
    assert len(hub.repos) == 1


def test_a_pull_request_whose_creation_was_not_answered_is_not_opened_twice(hub, repo, built):
    hub.inject("POST /api/models/org/prior/discussions", loses_answer=True, times=1)
    assert pushed(built, "--pr").code == 0
    assert [discussion["status"] for discussion in repo.discussions] == ["open"]


def test_a_branch_whose_creation_was_not_answered_is_used(hub, repo, built, whole):
    hub.inject("POST /api/models/org/prior/branch/", loses_answer=True, times=1)
    assert pushed(built, "--revision", "v1").code == 0
    assert files_at(hub, ref="v1") == whole


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """A prior of one shard of a dozen chunks."""
    folder = tmp_path_factory.mktemp("large")
    shapes = c.text_shapes(1) | {"model.layers.0.mlp.up_proj.weight": (768, 512)}
    tensors = {name: c.store(_numbers(shape, 0)) for name, shape in shapes.items()}
    c.write_checkpoint(folder / "reasoner", tensors, c.text_config(1))
    theirs = {name: c.store(_numbers(shape, 1)) for name, shape in shapes.items()}
    vision = {name: c.store(_numbers(s, 2)) for name, s in c.vision_shapes().items()}
    c.write_checkpoint(folder / "mllm", theirs | vision, c.mllm_config(1))
    run_prior(folder / "reasoner", folder / "mllm", folder / "prior", modules="mlp")
    assert (folder / "prior" / shards_of(folder / "prior")[0]).stat().st_size > 11 * CHUNK_BYTES
    return folder / "prior"


def _numbers(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.slow
@pytest.mark.parametrize("multipart", [False, True])
def test_a_line_cut_at_every_chunk_of_an_upload_still_gives_the_same_bytes(
    hub, large, waits, multipart
):
    hub.store.multipart_bytes = 2 * CHUNK_BYTES if multipart else 0
    (name,) = shards_of(large)
    size = (large / name).stat().st_size
    chunks = range(0, 2 * CHUNK_BYTES if multipart else size, CHUNK_BYTES)
    for number, begin in enumerate(chunks):
        repo_id = f"org/cut{number}"
        hub.store.lfs.clear()
        fault = hub.inject("PUT /upload/", cut_request_after=begin, times=1)
        result = run("drift-prior", "push", str(large), repo_id)
        assert result.code == 0, result
        assert fault.times == 0
        assert files_at(hub, repo_id)[name] == (large / name).read_bytes()


def test_a_line_cut_at_every_part_of_an_upload_in_parts_still_gives_the_same_bytes(hub, large):
    hub.store.multipart_bytes = 2 * CHUNK_BYTES
    (name,) = shards_of(large)
    for part in range(1, 7):
        hub.store.lfs.clear()
        fault = hub.inject(rf"PUT /upload/\w+/{part}$", cut_request_after=70_000, times=2)
        repo_id = f"org/part{part}"
        assert run("drift-prior", "push", str(large), repo_id).code == 0
        assert fault.times == 0
        assert files_at(hub, repo_id)[name] == (large / name).read_bytes()


def test_a_slow_line_is_no_fault(hub, built, whole):
    hub.inject("PUT /upload/", bytes_per_second=2_000_000)
    assert pushed(built).code == 0
    assert files_at(hub) == whole


def test_shards_that_have_arrived_are_not_sent_again(hub, built, whole):
    last = shards_of(built.prior)[-1]
    fault = hub.inject("POST /api/models/org/prior/commit/", status=500)
    assert pushed(built).code == 3
    arrived = hub.bytes_received("PUT /upload/")
    fault.times = 0
    hub.forget_requests()
    assert pushed(built).code == 0
    everything = sum(len(whole[name]) for name in shards_of(built.prior))
    assert arrived > 0
    assert arrived + hub.bytes_received("PUT /upload/") == everything
    assert last in files_at(hub)


@pytest.mark.parametrize("header", ["Retry-After", "RateLimit"])
def test_the_wait_that_the_hub_asks_for_is_kept(hub, built, waits, header):
    value = "47" if header == "Retry-After" else '"api";r=0;t=47'
    hub.inject("POST .*/commit/main", status=429, times=1, headers={header: value})
    result = pushed(built)
    assert result.code == 0
    assert 47.0 in waits
    assert "HTTP 429; trying again in 47 s" in result.stderr


def test_a_wait_that_is_too_long_ends_the_push_and_is_named(hub, built, waits):
    hub.inject("POST .*/commit/main", status=429, headers={"Retry-After": "3600"})
    assert_refusal(pushed(built), 3, ["HTTP 429", "asks to wait 3600 s"])
    assert max(waits, default=0) < 3600


def test_no_token_is_an_error_that_says_how_to_log_in(hub, built, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert_refusal(pushed(built), 6, ["no token", "hf auth login"])
    assert hub.requests() == []


def test_a_token_that_was_stored_by_logging_in_is_used(hub, built, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    path = Path(constants.HF_TOKEN_PATH)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TOKEN)
    assert pushed(built).code == 0


def test_a_token_that_only_reads_is_refused_at_once(hub, built):
    hub.accounts[TOKEN] = Account("alice", role="read", orgs=("org",))
    assert_refusal(pushed(built), 6, ["only reads", "hf auth login"])
    assert hub.repos == {}


def test_a_fine_grained_token_without_the_right_is_refused_by_the_hub(hub, built):
    hub.accounts[TOKEN] = Account("alice", role="fineGrained")
    assert_refusal(pushed(built), 6, ["HTTP 403", "namespace org", "hf auth login"])


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "", "does not know the token"),
        (403, "", "may not write to org/prior"),
        (404, "RepoNotFound", "that this token may see"),
        (400, "", "refuses what is sent"),
        (413, "", "refuses what is sent"),
    ],
)
@pytest.mark.parametrize("request_", REQUESTS[4:])
def test_a_refusal_is_an_error_at_once(hub, repo, built, waits, request_, status, code, message):
    hub.inject(re.escape(request_), status=status, code=code)
    result = pushed(built)
    if (status, request_) == (400, "POST /api/validate-yaml"):
        # The client looks at this answer itself, and says so in its own words.
        assert_refusal(result, 6, ["does not accept the card", "Invalid metadata", "--card"])
    else:
        assert_refusal(result, 6, [message])
    assert waits == []
    assert (
        len(hub.requests(re.escape(request_))) <= COMMIT_FILES
    )  # the shards of one commit, at once


def test_an_unknown_token_is_refused(hub, built, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert_refusal(pushed(built), 6, ["does not know the token", "HF_TOKEN", "hf auth login"])


def test_a_network_that_is_down_is_said_so(hub, built, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert_refusal(pushed(built), 3, ["http://127.0.0.1:1", "Check the network"])


def test_wrong_bytes_on_the_hub_are_found_and_the_card_is_not_sent(hub, built):
    hub.inject("PUT /upload/", spoils=True, times=1)
    assert_refusal(pushed(built), 1, ["is not what was sent", "expected", "Delete this file"])
    assert "README.md" not in files_at(hub)
    assert "prior.json" not in files_at(hub)


def test_a_small_file_that_changed_on_the_way_is_found(hub, built, monkeypatch):
    real = pushing.read_state
    seen = []

    def read_state(target):
        state = real(target)
        seen.append(state)
        if "prior.json" in state.files and "README.md" not in state.files:
            name = hub.repos[REPO].commits[state.commit]["prior.json"]
            name.write_bytes(name.read_bytes().replace(b"attn", b"nttn"))
            state = real(target)
        return state

    monkeypatch.setattr(pushing, "read_state", read_state)
    assert_refusal(pushed(built), 1, ["prior.json", "is not what was sent"])
    assert "README.md" not in files_at(hub)


def test_the_waits_are_bounded(hub, built, monkeypatch):
    monkeypatch.setattr(refusals, "WAITS_SECONDS", (0.0, 0.0))
    hub.inject("GET /api/whoami-v2", status=502)
    assert pushed(built).code == 3
    assert len(hub.requests("GET /api/whoami-v2")) == 3
