"""Pulling: absent or whole, what its manifest says, and always one commit's."""

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

import drift_merge
from drift_merge.errors import CheckpointError, SourceError, VerificationError
from drift_merge.hub import cache
from drift_merge.priors.manifest import open_prior
from drift_merge.priors.verify import verify_prior
from tests.checkpoints import read_files
from tests.faults.harness import assert_refusal, run
from tests.hub.places import MERGED, REPO, account, files_at, shards_of
from tests.hub_server.client import go_offline


@pytest.fixture(scope="module")
def kept(built, tmp_path_factory):
    """The server that the prior and the merge were pushed to, once."""
    with account(tmp_path_factory.mktemp("kept")) as server:
        assert run("drift-prior", "push", str(built.prior), REPO).code == 0
        assert run("drift-merge", "push", str(built.merged), MERGED).code == 0
    return server


@pytest.fixture
def there(hub, kept):
    """The prior and the merge, on a server of the test's own."""
    hub.repos, hub.blobs = copy.deepcopy(kept.repos), dict(kept.blobs)
    return hub


def pulled(source=REPO, out="here", *options, program="drift-prior"):
    result = run(program, "pull", source, "-o", str(out), *options)
    assert result.code == 0, result
    return Path(out)


def refused(code, *mentions, source=REPO, options=(), program="drift-prior"):
    result = run(program, "pull", source, "-o", "here", *options)
    assert_refusal(result, code, mentions)
    return result


def test_what_is_pulled_is_what_is_there_and_verifies(there):
    result = run("drift-prior", "pull", REPO, "-o", "here")
    assert (result.code, result.stdout) == (0, "here\n")
    expected = {n: data for n, data in files_at(there).items() if n != ".gitattributes"}
    assert read_files(Path("here")) == expected
    assert run("drift-prior", "verify", "here").code == 0
    assert os.listdir() == ["here"]


def test_a_merge_is_pulled_with_its_sidecars(there, built):
    pulled(MERGED, program="drift-merge")
    kept = read_files(built.merged)
    found = read_files(Path("here"))
    for name in kept.keys() - {"README.md", "drift_merge.json"}:
        assert found[name] == kept[name]
    assert run("drift-merge", "verify", "here").code == 0
    reasoner, mllm = built.pair.arguments
    again = run("drift-merge", "verify", "here", "--reasoner", reasoner, "--mllm", mllm)
    assert again.code == 0


def test_what_is_pulled_can_be_pushed_and_is_the_same_there(there):
    pulled()
    before = files_at(there)
    assert run("drift-prior", "push", "here", REPO).code == 0
    assert {n for n, data in files_at(there).items() if data != before[n]} <= {
        "README.md",
        "LICENSE.md",
    }


def test_the_answer_as_json_names_the_commit(there):
    answer = json.loads(run("drift-prior", "pull", REPO, "-o", "here", "--json").stdout)
    assert answer["commit"] == there.repos[REPO].refs["main"]
    assert answer["output"] == "here"
    sizes = [len(data) for name, data in files_at(there).items() if name != ".gitattributes"]
    assert answer["fetched_bytes"] == sum(sizes)


def test_a_branch_tag_or_commit_is_pulled(there, built):
    first = there.repos[REPO].refs["main"]
    there.repos[REPO].refs["v1"] = first
    assert run("drift-prior", "push", str(built.other), REPO, "--overwrite").code == 0
    for revision in ("v1", first):
        out = pulled(f"{REPO}@{revision}", f"at-{revision}")
        assert open_prior(out).manifest["parameters"]["dtype"] == "bfloat16"
    assert open_prior(pulled()).manifest["parameters"]["dtype"] == "float32"


def test_files_that_the_manifest_does_not_name_are_left_on_the_hub(there, tmp_path):
    repo = there.repos[REPO]
    (tmp_path / "run_me.py").write_text("print(1)")
    repo.commits[repo.refs["main"]]["run_me.py"] = tmp_path / "run_me.py"
    pulled()
    assert not Path("here/run_me.py").exists()


@pytest.mark.parametrize(
    ("source", "code", "mentions"),
    [
        ("org/nothing", 3, ["has no model org/nothing"]),
        (f"{REPO}@no-such", 3, ["no revision 'no-such'"]),
        (MERGED, 3, ["is not a drift prior", "drift-merge inspect"]),
        ("name", 2, ["no id of the form"]),
        ("..", 2, ["a local path"]),
    ],
)
def test_what_is_not_there_or_no_prior_is_refused(there, source, code, mentions):
    refused(code, *mentions, source=source)
    assert os.listdir() == []


def test_a_model_is_no_prior(there, built):
    there.add_commit("org/model", built.pair.mllm)
    refused(3, "is not a drift prior", "It is a model", source="org/model")


def test_an_upload_that_was_not_finished_is_refused_by_name(there):
    repo = there.repos[REPO]
    del repo.commits[repo.refs["main"]]["prior.json"]
    refused(3, "upload has not been finished")


def test_a_shard_that_is_missing_on_the_hub_is_named(there, built):
    repo, name = there.repos[REPO], shards_of(built.prior)[0]
    del repo.commits[repo.refs["main"]][name]
    refused(5, "is incomplete", name, "the same push again")


@pytest.mark.parametrize("name", ["../../evil.safetensors", "/etc/evil", "a//b", "c:\\evil", "."])
def test_a_manifest_that_leaves_its_directory_is_refused(there, name, tmp_path):
    repo = there.repos[REPO]
    manifest = json.loads(files_at(there)["prior.json"])
    manifest["shards"].append(name)
    changed = tmp_path / "prior.json"
    changed.write_text(json.dumps(manifest))
    repo.commits[repo.refs["main"]]["prior.json"] = changed
    refused(5, "not a plain path below")
    assert os.listdir() == []


def test_a_prior_that_was_changed_on_the_hub_is_found_and_nothing_is_left(there, built, tmp_path):
    name = shards_of(built.prior)[0]
    data = bytearray(files_at(there)[name])
    data[-1] ^= 1
    changed = tmp_path / name
    changed.write_bytes(data)
    repo = there.repos[REPO]
    repo.commits[repo.refs["main"]][name] = changed
    there.blobs |= {hashlib.sha256(data).hexdigest(): changed}
    refused(1, "layers.")
    assert os.listdir() == []


def test_an_existing_directory_is_refused_and_replaced_when_told(there, built):
    shutil.copytree(built.other, "here")
    refused(6, "exists already", "--overwrite")
    pulled(REPO, "here", "--overwrite")
    assert open_prior(Path("here")).manifest["parameters"]["dtype"] == "bfloat16"


def test_wrong_bytes_on_the_way_are_fetched_again_and_then_refused(there, built):
    data = (built.prior / shards_of(built.prior)[0]).read_bytes()
    there.inject("GET /lfs/", body=data[:-1] + b"\0", times=1)
    pulled()
    shutil.rmtree("here")
    there.inject("GET /lfs/", body=data[:-1] + b"\0")
    refused(3, "other bytes than the Hub lists")
    assert not Path("here").exists()


@pytest.mark.parametrize("after", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 300))])
def test_a_line_that_is_cut_is_taken_up_again(there, after):
    there.inject("GET /lfs/", cut_after=after, times=2)
    pulled()


def test_a_pull_that_failed_keeps_the_files_that_have_arrived(there, built):
    last = shards_of(built.prior)[-1]
    fault = there.inject(f"HEAD .*{last}", status=403)
    refused(3, "HTTP 403")
    assert not Path("here").exists()
    assert Path("here.partial").exists()
    fault.times = 0
    there.forget_requests()
    result = run("drift-prior", "pull", REPO, "-o", "here")
    assert result.code == 0
    assert "Resumed: " in result.stderr
    assert there.bytes_sent("GET /lfs/") == (built.prior / last).stat().st_size
    assert os.listdir() == ["here"]


def test_a_branch_that_moves_during_a_pull_does_not_change_what_arrives(there, built, monkeypatch):
    from drift_merge.hub import pull

    real = pull.list_remote

    def move(source):
        files = real(source)
        monkeypatch.setattr(pull, "list_remote", real)
        assert run("drift-prior", "push", str(built.other), REPO, "--overwrite").code == 0
        return files

    monkeypatch.setattr(pull, "list_remote", move)
    pulled()
    assert open_prior(Path("here")).manifest["parameters"]["dtype"] == "bfloat16"


def test_a_branch_that_has_moved_since_a_pull_was_cut_gives_the_new_commit_whole(there, built):
    fault = there.inject(f"HEAD .*{shards_of(built.prior)[-1]}", status=403)
    refused(3, "HTTP 403")
    fault.times = 0
    assert run("drift-prior", "push", str(built.other), REPO, "--overwrite").code == 0
    pulled()
    expected = {n: data for n, data in files_at(there).items() if n != ".gitattributes"}
    assert read_files(Path("here")) == expected


def test_a_commit_that_disappears_during_a_pull_is_an_error_and_leaves_nothing(there):
    there.inject("GET /api/models/org/prior/tree/", status=404, code="RevisionNotFound")
    refused(3, "has no revision")
    assert os.listdir() == []


# Without pulling: the Hub id in the place of a directory


def test_inspect_reads_the_manifest_alone(there, built):
    local = run("drift-prior", "inspect", str(built.prior), "--json")
    hub = run("drift-prior", "inspect", REPO, "--json")
    assert hub.code == 0, hub
    assert json.loads(hub.stdout)["tensors"] == json.loads(local.stdout)["tensors"]
    assert there.requests("lfs|safetensors") == []
    assert run("drift-merge", "inspect", MERGED).code == 0
    assert there.requests("lfs|safetensors") == []


def test_a_local_directory_wins_over_a_hub_id(there, built):
    shutil.copytree(built.other, REPO)
    there.forget_requests()
    result = run("drift-prior", "inspect", REPO)
    assert "(float32)" in result.stdout
    assert there.requests() == []


def test_verify_of_a_hub_id_fetches_it_once(there):
    assert run("drift-prior", "verify", REPO).code == 0
    there.forget_requests()
    assert run("drift-prior", "verify", REPO).code == 0
    assert there.requests("GET /lfs/") == []


def test_apply_takes_a_hub_id_and_says_which_commit_it_was(there, built):
    mllm = built.pair.arguments[1]
    assert run("drift-prior", "apply", REPO, mllm, "-o", "a", "--scale", "0.5").code == 0
    local = run("drift-prior", "apply", str(built.prior), mllm, "-o", "b", "--scale", "0.5")
    assert local.code == 0
    a, b = (read_files(Path(name)) for name in "ab")
    assert {n for n in a if a[n] != b[n]} == {"drift_merge.json", "README.md"}
    source = json.loads(a["drift_merge.json"])["sources"]["reasoners"][0]
    assert (source["repo_id"], source["revision"]) == (REPO, there.repos[REPO].refs["main"])
    assert run("drift-merge", "run", "a/drift_merge.json", "-o", "again").code == 0
    assert read_files(Path("again")) == a


def test_a_dry_run_of_apply_reads_headers_alone(there, built):
    result = run("drift-prior", "apply", REPO, built.pair.arguments[1], "-o", "a", "-n")
    assert result.code == 0, result
    assert all(exchange.range for exchange in there.requests("GET /lfs/"))


def test_a_prior_is_fetched_and_verified_once_and_then_used_offline(there, monkeypatch):
    calls = []

    def verify(path):
        calls.append(path)
        verify_prior(open_prior(path))

    source, path = cache.fetch_prior(REPO, verify=verify, quiet=True)
    assert source.revision == there.repos[REPO].refs["main"]
    assert open_prior(path).tensors
    there.forget_requests()
    assert cache.fetch_prior(REPO, verify=verify, quiet=True)[1] == path
    assert calls == [path]
    assert there.requests("GET /lfs/") == []
    go_offline(monkeypatch)
    assert cache.fetch_prior(REPO, verify=verify)[1] == path


def test_a_prior_that_is_not_what_its_manifest_says_is_not_used(there):
    def verify(_):
        raise VerificationError("it differs")

    for _ in range(2):  # and it is not remembered as verified
        with pytest.raises(VerificationError):
            cache.fetch_prior(REPO, verify=verify, quiet=True)


def test_what_is_no_prior_is_not_fetched(there, built):
    there.add_commit("org/model", built.pair.mllm)
    with pytest.raises(SourceError, match="It is a model"):
        cache.fetch_prior("org/model", verify=lambda _: None)
    repo = there.repos[REPO]
    del repo.commits[repo.refs["main"]][shards_of(built.prior)[0]]
    with pytest.raises(CheckpointError, match="is incomplete"):
        cache.fetch_prior(REPO, verify=lambda _: None)


def test_offline_without_a_copy_is_named(there, monkeypatch):
    go_offline(monkeypatch)
    with pytest.raises(SourceError, match="not in the Hub's cache"):
        cache.fetch_prior(REPO, verify=lambda _: None)


def test_push_and_pull_from_python(hub, built):
    assert drift_merge.push(built.prior, REPO) == f"{hub.url}/{REPO}"
    assert drift_merge.push(str(built.merged), MERGED, public=True) == f"{hub.url}/{MERGED}"
    assert not hub.repos[MERGED].private
    assert open_prior(drift_merge.pull(REPO, "here")).tensors
    assert (drift_merge.pull(MERGED, Path("merged")) / "config.json").is_file()
