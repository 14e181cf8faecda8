"""Pushing to a real HTTP server on loopback with the unmodified huggingface_hub client."""

import json

import pytest

from drift_merge.priors.manifest import open_prior
from drift_merge.reports.pictures import has_matplotlib
from drift_merge.storage.checkpoint import open_checkpoint
from tests.faults.harness import assert_refusal, run
from tests.hub.places import MERGED, REPO, files_at, shards_of
from tests.hub.pushing import push, refused
from tests.hub_server.client import go_offline
from tests.runs import run_prior


def test_what_is_pushed_is_there_byte_for_byte_and_private(hub, built):
    result = push(built.prior)
    assert result.stdout == f"{hub.url}/{REPO}\n"
    there = files_at(hub)
    assert hub.repos[REPO].private
    for name in (*shards_of(built.prior), "prior.safetensors.index.json"):
        assert there[name] == (built.prior / name).read_bytes()
    made = {"README.md", "LICENSE.md", "meta.yaml", "prior.json", ".gitattributes"}
    made |= {"prior.png"} if has_matplotlib() else set()
    assert there.keys() == {*shards_of(built.prior), "prior.safetensors.index.json"} | made


def test_the_picture_beside_the_card_is_sent_and_shown(hub, built, own):
    (own.prior / "prior.png").write_bytes(b"a picture")
    push(own.prior)
    there = files_at(hub)
    assert there["prior.png"] == b"a picture"
    assert "](prior.png)" in there["README.md"].decode()
    (own.merged / "merge.png").write_bytes(b"another")
    push(own.merged, repo_id=MERGED, program="drift-merge")
    there = files_at(hub, MERGED)
    assert there["merge.png"] == b"another"
    assert "](merge.png)" in there["README.md"].decode()


def test_a_merge_without_a_picture_shows_none(hub, built):
    push(built.merged, repo_id=MERGED, program="drift-merge")
    there = files_at(hub, MERGED)
    assert "merge.png" not in there
    assert "merge.png" not in there["README.md"].decode()


def test_public_is_public(hub, built):
    push(built.prior, "--public")
    assert not hub.repos[REPO].private


def test_a_merge_is_pushed_with_every_sidecar(hub, built):
    push(built.merged, repo_id=MERGED, program="drift-merge")
    there = files_at(hub, MERGED)
    for path in built.merged.rglob("*"):
        name = path.relative_to(built.merged).as_posix()
        if path.is_file() and name not in ("README.md", "drift_merge.json"):
            assert there[name] == path.read_bytes(), name
    assert json.loads(there["drift_merge.json"])["kind"] == "drift-merge"


@pytest.mark.parametrize("what", ["prior", "merged"])
def test_shards_come_first_the_manifest_after_all_it_names_and_the_card_last(hub, built, what):
    program = "drift-prior" if what == "prior" else "drift-merge"
    directory = built.folder / what
    push(directory, program=program)
    log = [set(names) for _, _, names in hub.repos[REPO].log]
    shards = set(shards_of(directory))
    manifest = "prior.json" if what == "prior" else "drift_merge.json"
    assert len(shards) > 8, "several commits of shards"
    complete = next(i for i, names in enumerate(log) if shards <= names)
    assert complete > 1
    for names in log[: complete + 1]:
        assert names <= shards | {".gitattributes"}
    listed = {*shards, *open_prior(directory).manifest["index"]} if what == "prior" else shards
    assert all(listed <= names for names in log if manifest in names)
    assert [("README.md" in names) for names in log] == [False] * (len(log) - 1) + [True]
    assert manifest in log[-2]


def test_a_second_push_sends_nothing(hub, built):
    push(built.prior)
    commits = len(hub.repos[REPO].commits)
    hub.forget_requests()
    result = push(built.prior, "--json")
    assert json.loads(result.stdout)["sent"] == []
    assert len(hub.repos[REPO].commits) == commits
    assert hub.requests("PUT|commit") == []


def test_the_answer_as_json_says_where_it_is_and_what_was_sent(hub, built):
    answer = json.loads(push(built.prior, "--json").stdout)
    assert answer["url"] == f"{hub.url}/{REPO}"
    assert answer["commit"] == hub.repos[REPO].refs["main"]
    assert answer["private"] is True
    assert answer["files"] == len(answer["sent"]) == len(files_at(hub)) - 1
    sizes = [len(data) for name, data in files_at(hub).items() if name != ".gitattributes"]
    assert answer["sent_bytes"] == sum(sizes)


def test_a_dry_run_lists_files_and_bytes_and_changes_nothing(hub, built):
    result = push(built.prior, "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert plan["dry_run"] is True
    assert plan["private"] is True
    assert plan["send_bytes"] == sum(file["bytes"] for file in plan["files"])
    assert {file["status"] for file in plan["files"]} == {"send"}
    assert hub.repos == {}
    assert hub.requests("POST|PUT") == []
    push(built.prior)
    sizes = {file["path"]: file["bytes"] for file in plan["files"]}
    there = files_at(hub)
    assert sizes == {name: len(there[name]) for name in there if name != ".gitattributes"}
    text = push(built.prior, "-n").stdout
    assert "0 of" in text
    assert all(name in text for name in sizes)


def test_a_dry_run_needs_neither_token_nor_hub(hub, built, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in push(built.prior, "-n").stderr
    hub.inject("/api/", status=403)
    assert "could not be asked" in push(built.prior, "-n").stderr


def test_a_branch_is_made_and_main_left_alone(hub, repo, built):
    before = repo.refs["main"]
    result = push(built.prior, "--revision", "v1")
    assert result.stdout == f"{hub.url}/{REPO}/tree/v1\n"
    assert repo.refs["main"] == before
    assert "README.md" in files_at(hub, ref="v1")
    push(built.prior, "--revision", "v1")


def test_a_pull_request_is_opened_when_it_is_whole_and_main_is_left_alone(hub, repo, built):
    before = repo.refs["main"]
    result = push(built.prior, "--pr")
    assert result.stdout == f"{hub.url}/{REPO}/discussions/1\n"
    assert repo.refs["main"] == before
    assert "README.md" in files_at(hub, ref="refs/pr/1")
    assert [d["status"] for d in repo.discussions] == ["open"]


def test_a_pull_request_that_was_cut_is_completed_by_the_same_command(hub, repo, built):
    fault = hub.inject("POST /api/models/org/prior/commit/", status=403)
    refused(6, "may not write", directory=built.prior, options=["--pr"])
    assert [d["status"] for d in repo.discussions] == ["draft"]
    fault.times = 0
    push(built.prior, "--pr")
    assert [d["status"] for d in repo.discussions] == ["open"]


def test_a_pull_request_without_anything_new_is_not_opened(hub, built):
    push(built.prior)
    push(built.prior, "--pr")
    assert hub.repos[REPO].discussions == []


def test_a_pull_request_to_a_repository_of_others_needs_no_right_to_write(hub, built, tmp_path):
    hub.add_commit("them/prior", tmp_path / "home")
    push(built.prior, "--pr", "--public", repo_id="them/prior")
    assert "prior.json" in files_at(hub, "them/prior", "refs/pr/1")
    said = ("may not write to them/prior", "--pr", "hf auth login")
    refused(6, *said, directory=built.prior, options=["--public"], repo_id="them/prior")


def test_a_pull_request_needs_a_repository(hub, built):
    refused(6, "does not exist", "without --pr", directory=built.prior, options=["--pr"])


def test_stray_files_are_not_sent_and_are_named(hub, own):
    (own.prior / ".env").write_text("SECRET=1")
    (own.prior / "notes.txt").write_text("mine")
    result = push(own.prior)
    assert not {".env", "notes.txt"} & files_at(hub).keys()
    assert "Not sent" in result.stderr
    assert "notes.txt" in result.stderr


def test_no_file_that_is_sent_names_a_path_of_this_machine(hub, built):
    assert str(built.folder).encode() in (built.prior / "prior.json").read_bytes()
    push(built.prior)
    push(built.merged, repo_id=MERGED, program="drift-merge")
    for repo_id in (REPO, MERGED):
        for name, data in files_at(hub, repo_id).items():
            assert str(built.folder).encode() not in data, name
    card = files_at(hub)["README.md"].decode()
    assert "| reasoner | reasoner (local) |" in card
    assert "base_model" not in card


def test_files_that_others_have_added_stay(hub, built, tmp_path):
    push(built.prior)
    repo, plot = hub.repos[REPO], tmp_path / "plot.png"
    plot.write_bytes(b"png")
    repo.commits[repo.refs["main"]]["assets/plot.png"] = plot
    push(built.other, "--overwrite")
    assert files_at(hub)["assets/plot.png"] == b"png"


def test_the_same_tensors_in_other_shards_leave_no_shard_behind(hub, built, tmp_path):
    push(built.prior)
    run_prior(*built.pair, tmp_path / "one")
    begin = len(hub.repos[REPO].log)
    push(tmp_path / "one")
    first, *between, _ = (set(names) for _, _, names in hub.repos[REPO].log[begin:])
    assert not {"README.md", "prior.json"} & first
    assert all("README.md" not in names for names in between)
    assert [n for n in files_at(hub) if n.endswith(".safetensors")] == shards_of(tmp_path / "one")


def test_a_merge_on_the_hub_is_read_like_any_checkpoint(hub, built):
    push(built.merged, repo_id=MERGED, program="drift-merge")
    there = open_checkpoint(MERGED, headers_only=True)
    assert there.tensors == open_checkpoint(str(built.merged)).tensors
    assert there.config == open_checkpoint(str(built.merged)).config


def test_an_edited_card_is_named_and_can_be_sent(hub, own):
    card = own.prior / "README.md"
    card.write_text("---\ntags: [mine]\n---\nMy own words.\n")
    assert f"--card {card}" in push(own.prior).stderr
    assert b"My own words" not in files_at(hub)["README.md"]
    push(own.prior, "--card", str(card))
    assert files_at(hub)["README.md"] == card.read_bytes()
    refused(3, "cannot be read", directory=own.prior, options=["--card", "nowhere.md"])


def test_offline_mode_is_named(hub, built, monkeypatch):
    go_offline(monkeypatch)
    refused(3, "HF_HUB_OFFLINE", directory=built.prior)


def test_errors_have_the_usual_form(hub, built, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    result = run("drift-prior", "push", str(built.prior), REPO)
    assert_refusal(result, 6, ["hf auth login", "no token"])
