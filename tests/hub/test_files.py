"""What is sent: order, hashes, and a manifest that names no path."""

import hashlib
import json
from pathlib import Path

import pytest

from drift_merge.errors import CheckpointError
from drift_merge.hub.files import (
    BESIDE,
    COMMIT_BYTES,
    COMMIT_FILES,
    LAST,
    MANIFEST,
    SHARDS,
    PushFile,
    collect,
    in_commits,
    parents,
    published,
    strays,
)
from drift_merge.merges.manifest import open_merge
from drift_merge.priors.manifest import open_prior
from drift_merge.storage.hub.artifacts import RemoteFile
from drift_merge.storage.listed import listed_files
from drift_merge.storage.manifests import check_seal


def file(stage, size=1, name="x"):
    return PushFile(name, b"a" * size, stage)


@pytest.mark.parametrize("data", [b"", b"a", b"two\nlines\n", bytes(range(256)) * 20_000])
def test_hashes_are_those_of_git_and_of_lfs(tmp_path, data):
    path = tmp_path / "x"
    path.write_bytes(data)
    for content in (data, path):
        found = PushFile("x", content, BESIDE)
        assert found.sha256 == hashlib.sha256(data).hexdigest()
        assert found.git_sha1 == hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()
        assert found.size_bytes == len(data)


def test_a_file_equals_the_hubs_by_the_hash_that_the_hub_has():
    one = PushFile("x", b"abc", BESIDE)
    assert one.equals(RemoteFile(3, one.git_sha1))
    assert one.equals(RemoteFile(3, "f" * 40, one.sha256))  # a pointer's own name says nothing
    assert not one.equals(RemoteFile(3, one.git_sha1, "f" * 64))
    assert not one.equals(RemoteFile(4, one.git_sha1))
    assert not one.equals(RemoteFile(3, "f" * 40))
    assert not one.equals(None)


def test_commits_hold_one_stage_each_in_order_and_no_more_than_a_few_shards():
    files = [file(SHARDS)] * (2 * COMMIT_FILES + 1) + [file(BESIDE)] * 99
    files += [file(MANIFEST), file(LAST)]
    groups = in_commits(files)
    assert [f for group in groups for f in group] == files
    assert [len(g) for g in groups] == [COMMIT_FILES, COMMIT_FILES, 1, 99, 1, 1]
    assert all(len({f.stage for f in group}) == 1 for group in groups)


def test_a_commit_of_large_shards_ends_at_a_number_of_bytes(monkeypatch):
    shards = [file(SHARDS) for _ in range(5)]
    for shard in shards:
        shard.__dict__["size_bytes"] = COMMIT_BYTES // 2
    assert [len(group) for group in in_commits(shards)] == [2, 2, 1]


def test_what_is_collected_is_what_the_manifest_names_in_the_order_of_its_stages(built):
    manifest = open_prior(built.prior).manifest
    files = collect(built.prior, "prior.json", manifest, {"README.md": b"c", "meta.yaml": b"m"})
    names = [f.name for f in files]
    shards = [f.name for f in files if f.stage == SHARDS]
    assert shards == manifest["shards"] == names[: len(shards)]
    assert names[-2:] == ["prior.json", "README.md"]
    assert set(names[len(shards) : -2]) == {"meta.yaml", "prior.safetensors.index.json"}


def test_strays_are_what_is_beside(own):
    manifest = open_prior(own.prior).manifest
    (own.prior / "sub").mkdir()
    (own.prior / "sub/plot.png").write_bytes(b"p")
    (own.prior / ".cache").mkdir()
    (own.prior / ".cache/x").write_bytes(b"p")
    files = collect(own.prior, "prior.json", manifest, {"README.md": b""})
    assert strays(own.prior, files) == ["sub/plot.png"]


@pytest.mark.parametrize("kind", ["prior", "merged"])
def test_a_published_manifest_is_sealed_and_names_no_path(built, kind):
    opened = open_prior(built.prior) if kind == "prior" else open_merge(built.merged)
    manifest = opened.manifest
    public = published(manifest)
    check_seal(public, Path("x"))
    assert str(built.folder) not in json.dumps(public)
    assert [source["source"] for source in parents(public)] == ["mllm", "reasoner"]
    assert public["tensors"] == manifest["tensors"]
    assert published(public) == public
    assert list(public) == list(manifest)


def test_a_manifest_of_sources_on_the_hub_is_published_as_it_is(built):
    manifest = dict(open_prior(built.prior).manifest)
    on_hub = {"repo_id": "org/m", "revision": "a" * 40, "source": "org/m@main", "label": "org/m"}
    sources = {role: {**source, **on_hub} for role, source in manifest["sources"].items()}
    public = published({**manifest, "sources": sources})
    assert public["sources"] == sources


def test_a_path_that_a_finding_quotes_is_replaced_too(built):
    manifest = dict(open_prior(built.prior).manifest)
    path = manifest["sources"]["mllm"]["source"]
    finding = {"code": "c", "severity": "warning", "message": f"see {path}/x", "remedy": path}
    public = published({**manifest, "findings": [finding]})
    assert public["findings"][0] == {**finding, "message": "see mllm/x", "remedy": "mllm"}


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", "a\\b", "", "a//b", "./a", 3, None])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(name):
    with pytest.raises(CheckpointError, match="not a plain path") as caught:
        listed_files({"shards": ["a.safetensors"], "sidecars": {name: "x"}}, where="m")
    assert caught.value.remedy
