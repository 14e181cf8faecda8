"""Cards: everything a reader needs, true to the manifest, with commands that run."""

import re
import shlex

import pytest
import yaml

from drift_merge.artifacts.card import Published
from drift_merge.merges.card import merge_card
from drift_merge.merges.manifest import open_merge
from drift_merge.priors.card import prior_card, prior_meta
from drift_merge.priors.manifest import open_prior
from drift_merge.storage.sizes import in_words
from tests import checkpoints as c
from tests.faults.harness import run
from tests.hub.places import MERGED, REPO, files_at
from tests.runs import run_linear, run_prior

PUBLISHED = Published("org/name", {"license": "mit"}, "\n## Licenses\n\n- all mit\n")


def split(card):
    """Front matter and body of a card."""
    _, front, body = card.decode().split("---\n", 2)
    return yaml.safe_load(front), body


def commands(body):
    """The command lines of the `sh` blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", body, re.DOTALL)
    lines = "".join(blocks).splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def test_the_card_of_a_prior_says_what_it_is_and_what_it_is_not(built):
    manifest = open_prior(built.prior).manifest
    front, body = split(prior_card(manifest, PUBLISHED))
    assert front["library_name"] == "drift-prior"
    assert front["license"] == "mit"
    assert {"not-a-model", "drift-prior"} <= set(front["tags"])
    assert "**This is not a model**" in body
    assert manifest["formula"] in body
    assert manifest["sign"] in body
    count = len(manifest["tensors"])
    assert f"Coverage: {count:,} of {count:,} selected tensors" in body
    assert in_words(manifest["size_bytes"]) in body
    assert "arXiv:2510.15050" in body
    assert "## Licenses" in body
    assert 'load_prior("org/name")' in body


def test_lineage_findings_are_in_the_card(tmp_path):
    pair = c.make_pair(tmp_path, mllm_config_changes={"rope_theta": 5.0})
    run_prior(*pair, tmp_path / "prior")
    manifest = open_prior(tmp_path / "prior").manifest
    _, body = split(prior_card(manifest))
    warnings = [f for f in manifest["findings"] if f["severity"] != "info"]
    assert warnings
    for finding in warnings:
        assert f"`{finding['code']}`: {finding['message']}" in body


def test_a_card_without_parents_on_the_hub_claims_no_base_model(built):
    for card in (
        prior_card(open_prior(built.prior).manifest, PUBLISHED),
        merge_card(open_merge(built.merged).manifest, PUBLISHED),
    ):
        front, body = split(card)
        assert not {"base_model", "base_model_relation"} & set(front)
        assert "(local)" in body


def test_a_local_card_speaks_of_a_directory(built):
    _, body = split((built.prior / "README.md").read_bytes())
    assert "drift-prior apply DIR " in body
    assert "## Licenses" not in body


def test_meta_yaml_is_the_manifest_in_short(built):
    manifest = open_prior(built.prior).manifest
    meta = yaml.safe_load(prior_meta(manifest))
    assert meta["kind"] == "drift-prior"
    assert meta["num_tensors"] == len(manifest["tensors"])
    assert meta["sources"] == {"reasoner": {"local": "reasoner"}, "mllm": {"local": "mllm"}}


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (2_345_000_000, "2.35 GB"),
     (7 * 10**15, "7000.00 TB")],
)  # fmt: skip
def test_sizes_in_words(size, words):
    assert in_words(size).startswith(words)
    assert f"{size:,} bytes" in in_words(size)


@pytest.fixture
def parents(hub, tmp_path):
    """A pair on the Hub."""
    pair = c.make_pair(tmp_path / "pair")
    hub.add_commit("them/reasoner", pair.reasoner)
    hub.add_commit("them/mllm", pair.mllm)
    return "them/reasoner", "them/mllm"


def test_every_command_of_a_priors_card_runs(hub, parents, tmp_path):
    options = {"modules": "mlp", "layers": "0", "dtype": "float32"}
    run_prior(*parents, tmp_path / "prior", **options)
    assert run("drift-prior", "push", str(tmp_path / "prior"), REPO).code == 0
    _, body = split(files_at(hub)["README.md"])
    found = commands(body)
    assert [words[1] for words in found] == ["apply", "verify"]
    for words in found:
        result = run(*words)
        assert result.code == 0, result
    again = next(line for line in body.splitlines() if "drift-prior compute" in line)
    words = shlex.split(again)
    assert run(*words[:-1], "again").code == 0
    ours = (tmp_path / "prior/prior.json").read_bytes()
    assert open_prior(tmp_path / "prior").tensors == open_prior(tmp_path / "work/again").tensors
    assert ours


def test_every_command_of_a_merges_card_runs_and_makes_the_same_bytes(hub, parents, tmp_path):
    run_linear(parents[0], parents[1], tmp_path / "merged", 0.25)
    assert run("drift-merge", "push", str(tmp_path / "merged"), MERGED).code == 0
    front, body = split(files_at(hub, MERGED)["README.md"])
    assert front["base_model"] == ["them/mllm", "them/reasoner"]
    assert front["base_model_relation"] == "merge"
    assert front["library_name"] == "transformers"
    found = commands(body)
    assert [words[1] for words in found] == ["pull", "verify", "run"]
    for words in found:
        result = run(*words)
        assert result.code == 0, result
    name = "model.safetensors"
    work = tmp_path / "work"
    assert (work / "again" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
