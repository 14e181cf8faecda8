"""What is not sent, not overwritten, not written to."""

import json

import pytest
import yaml

from drift_merge.errors import CheckpointError
from drift_merge.storage.checkpoint import open_checkpoint
from tests.hub.places import REPO, files_at, shards_of
from tests.hub.pushing import NAMES_OF_MODELS, push, refused


def test_a_damaged_prior_is_not_sent(hub, own):
    shard = own.prior / shards_of(own.prior)[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    refused(1, "layers.", directory=own.prior)
    assert hub.repos == {}


def test_a_missing_shard_is_named_before_anything_is_sent(hub, own):
    (own.prior / shards_of(own.prior)[0]).unlink()
    refused(3, "prior-00001-of-", directory=own.prior)
    assert hub.repos == {}


def test_what_is_no_prior_is_not_sent(hub, built):
    refused(3, "is not a prior", directory=built.merged)
    refused(3, "is not a merge", directory=built.prior, program="drift-merge")


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "org/na me", "org/name@main", "./x", "/x/y"])
def test_a_place_that_is_none_is_a_usage_error(hub, built, repo_id):
    refused(2, "is no place on the Hub", directory=built.prior, repo_id=repo_id)


def test_a_commit_cannot_be_written_to(hub, built):
    refused(2, "cannot be written to", directory=built.prior, options=["--revision", "a" * 40])


def test_a_public_repository_is_not_written_to_without_public(hub, repo, built):
    repo.private = False
    refused(6, "published at once", "--public", directory=built.prior)
    push(built.prior, "--public")


def test_an_existing_private_repository_stays_private_and_that_is_said(hub, repo, built):
    result = push(built.prior, "--public")
    assert "stays private" in result.stderr
    assert repo.private


def test_another_prior_is_not_overwritten_unless_told(hub, built):
    push(built.prior)
    before = files_at(hub)
    refused(6, "another artifact", "reasoner and mllm", "--overwrite", directory=built.other)
    assert files_at(hub) == before
    push(built.other, "--overwrite")
    there = files_at(hub)
    assert {n for n in there if n.endswith(".safetensors")} == set(shards_of(built.other))
    assert json.loads(there["prior.json"])["parameters"]["dtype"] == "float32"


def test_an_overwritten_prior_never_looks_complete_in_between(hub, built):
    push(built.prior)
    begin = len(hub.repos[REPO].log)
    push(built.other, "--overwrite")
    log = hub.repos[REPO].log[begin:]
    assert all("README.md" not in names for _, _, names in log[:-1])
    assert "prior.json" not in log[0][2]


def test_a_merge_is_not_put_over_a_prior_nor_a_prior_over_a_merge(hub, built):
    push(built.prior)
    refused(6, "a drift prior", directory=built.merged, program="drift-merge")
    push(built.merged, "--overwrite", program="drift-merge")
    assert "prior.json" not in files_at(hub)
    refused(6, "a merge of drift-merge", directory=built.prior)


def test_somebodys_model_is_never_overwritten(hub, built):
    hub.add_commit(REPO, built.pair.mllm)
    hub.repos[REPO].private = True
    for options in ([], ["--overwrite"]):
        refused(6, "something else", "another name", directory=built.prior, options=options)
        refused(6, "something else", directory=built.merged, program="drift-merge", options=options)


def test_the_unfinished_upload_of_another_prior_is_not_mixed_with_this_one(hub, repo, built):
    push(built.other)
    del repo.commits[repo.refs["main"]]["prior.json"], repo.commits[repo.refs["main"]]["README.md"]
    refused(6, "unfinished upload of another", "--overwrite", directory=built.prior)
    push(built.prior, "--overwrite")
    assert {n for n in files_at(hub) if n.endswith(".safetensors")} == set(shards_of(built.prior))


def test_a_commit_by_somebody_else_in_between_is_an_error(hub, repo, built):
    hub.inject("POST .*/commit/main", status=412)
    refused(6, "has changed while", "Run the same command again", directory=built.prior)


def test_a_prior_on_the_hub_does_not_load_as_a_model(hub, built):
    push(built.prior)
    for name in files_at(hub):
        assert NAMES_OF_MODELS.fullmatch(name) is None
    for headers_only in (True, False):
        with pytest.raises(CheckpointError, match="is a drift prior: differences") as caught:
            open_checkpoint(REPO, headers_only=headers_only)
        assert "drift-prior inspect" in caught.value.remedy
    front = yaml.safe_load(files_at(hub)["README.md"].decode().split("---\n")[1])
    assert front["library_name"] == "drift-prior"
    assert "not-a-model" in front["tags"]
    assert "pipeline_tag" not in front
