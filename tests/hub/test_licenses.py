"""Licenses of the parents: read from cards on the Hub and here, compared, and named."""

import shutil

import pytest
import yaml

from drift_merge.errors import RecipeError
from drift_merge.hub.licenses import License, read_license, roll_up
from drift_merge.priors.manifest import open_prior
from tests import checkpoints as c
from tests.faults.harness import run
from tests.hub.places import REPO, files_at
from tests.runs import run_prior

APACHE = License("org/a", "apache-2.0")
MIT = License("org/b", "mit")
OWN = License("org/c", "llama-x", is_other=True, link="https://x/LICENSE")
SILENT = License("d (local)", "unknown", why="its card declares none")


@pytest.mark.parametrize(
    ("parents", "front", "remarks"),
    [
        ([APACHE, APACHE], {"license": "apache-2.0"}, []),
        (
            [APACHE, MIT],
            {
                "license": "other",
                "license_name": "apache-2.0-and-mit",
                "license_link": "LICENSE.md",
            },
            ["differ: org/a is under apache-2.0, org/b is under mit"],
        ),
        (
            [OWN, OWN],
            {"license": "other", "license_name": "llama-x", "license_link": "LICENSE.md"},
            [],
        ),
        ([APACHE, SILENT], {"license": "unknown"}, ["d (local) is not known"]),
        ([MIT, SILENT, OWN], {"license": "unknown"}, ["not known", "differ"]),
    ],
)
def test_equal_licenses_are_taken_and_conflicts_and_gaps_are_named(parents, front, remarks):
    rolled = roll_up(parents)
    assert dict(rolled.front) == front
    assert len(rolled.remarks) == len(remarks)
    for remark, words in zip(rolled.remarks, remarks, strict=True):
        assert words in remark
        assert remark in rolled.section()
        assert remark in rolled.file().decode()
    for parent in parents:
        assert f"- {parent.label}: " in rolled.section()


def test_a_license_that_is_given_wins_and_the_rest_is_still_told():
    rolled = roll_up([APACHE, MIT], "mit")
    assert rolled.front == {"license": "mit"}
    assert "states the license mit" in rolled.remarks[0]
    assert "differ" in rolled.remarks[1]


@pytest.mark.parametrize("given", ["", "Apache 2.0", "other", "a: b"])
def test_a_license_that_is_no_identifier_is_a_usage_error(given):
    with pytest.raises(RecipeError, match="--license"):
        roll_up([APACHE], given)


def test_names_that_the_front_matter_could_not_hold_are_made_plain():
    odd = License("org/x", "My Own: License!", is_other=True)
    assert roll_up([odd]).front["license_name"] == "my-own-license"


def card(**front):
    return f"---\n{yaml.safe_dump(front)}---\n# A model\n".encode()


@pytest.fixture
def family(hub, tmp_path):
    """Two parents on the Hub with cards; returns a function that pushes them and a prior."""

    def make(reasoner, mllm):
        pair = c.make_pair(tmp_path / "pair", reasoner_sidecars=reasoner, mllm_sidecars=mllm)
        hub.add_commit("them/reasoner", pair.reasoner)
        hub.add_commit("them/mllm", pair.mllm)
        run_prior("them/reasoner", "them/mllm", tmp_path / "prior", modules="mlp")
        return tmp_path / "prior"

    return make


def front_of(hub):
    return yaml.safe_load(files_at(hub)["README.md"].decode().split("---\n")[1])


def test_parents_on_the_hub_are_pinned_named_and_their_licenses_taken(hub, family):
    prior = family(
        {"README.md": card(license="mit"), "LICENSE": b"MIT text"},
        {"README.md": card(license="mit"), "NOTICE.txt": b"A notice"},
    )
    assert run("drift-prior", "push", str(prior), REPO).code == 0
    front = front_of(hub)
    assert front["license"] == "mit"
    assert front["base_model"] == ["them/mllm", "them/reasoner"]
    assert front["base_model_relation"] == "adapter"
    text = files_at(hub)["README.md"].decode()
    commits = [hub.repos[f"them/{name}"].refs["main"] for name in ("reasoner", "mllm")]
    for commit in commits:
        assert text.count(commit) >= 3  # table, use, reproduction
    assert f"drift-prior compute them/reasoner@{commits[0]} them/mllm@{commits[1]}" in text
    licenses = files_at(hub)["LICENSE.md"].decode()
    assert "MIT text" in licenses
    assert "A notice" in licenses
    meta = yaml.safe_load(files_at(hub)["meta.yaml"])
    assert meta["sources"]["mllm"] == {"repo": "them/mllm", "revision": commits[1]}


def test_a_conflict_is_named_in_the_card_and_printed(hub, family):
    prior = family(
        {"README.md": card(license="mit")},
        {"README.md": card(license="other", license_name="llama-x", license_link="LICENSE")},
    )
    result = run("drift-prior", "push", str(prior), REPO)
    assert "Warning [license]: The licenses of the parents differ" in result.stderr
    assert "--license" in result.stderr
    assert front_of(hub)["license_name"] == "llama-x-and-mit"
    text = files_at(hub)["README.md"].decode()
    assert "The licenses of the parents differ" in text
    commit = hub.repos["them/mllm"].refs["main"]
    assert f"{hub.url}/them/mllm/blob/{commit}/LICENSE" in text
    assert run("drift-prior", "push", str(prior), REPO, "--license", "mit").code == 0
    assert front_of(hub)["license"] == "mit"


def test_a_parent_that_may_not_be_read_is_of_unknown_license_and_no_obstacle(hub, family):
    mit = {"README.md": card(license="mit")}
    prior = family(mit, mit)
    hub.inject("/them/mllm", status=403)
    result = run("drift-prior", "push", str(prior), REPO)
    assert result.code == 0
    assert "license of them/mllm is not known" in result.stderr
    assert front_of(hub)["license"] == "unknown"
    assert "HTTP 403" in files_at(hub)["README.md"].decode()


def test_the_license_of_a_local_parent_is_read_from_its_card(tmp_path):
    sidecars = {"README.md": card(license="apache-2.0"), "LICENSE": b"text of it"}
    pair = c.make_pair(tmp_path, mllm_sidecars=sidecars)
    run_prior(*pair, tmp_path / "prior")
    sources = open_prior(tmp_path / "prior").manifest["sources"]
    found = read_license(sources["mllm"])
    assert (found.label, found.name) == ("mllm (local)", "apache-2.0")
    assert found.texts == {"LICENSE": "text of it"}
    assert read_license(sources["reasoner"]).why == "its card declares none"


def test_a_local_parent_that_is_gone_or_another_model_now_is_of_unknown_license(tmp_path):
    pair = c.make_pair(tmp_path, mllm_sidecars={"README.md": card(license="mit")})
    run_prior(*pair, tmp_path / "prior")
    source = open_prior(tmp_path / "prior").manifest["sources"]["mllm"]
    (pair.mllm / "config.json").write_text("{}")
    assert "another model" in read_license(source).why
    shutil.rmtree(pair.mllm)
    assert read_license(source).name == "unknown"


@pytest.mark.parametrize(
    "text",
    [
        b"no front matter",
        b"---\nlicense: [a, b]\n---\n",
        b"---\n: [\n---\n",
        b"---\n- a\n---\n",
        b"---\nlicense: other\n---\n",
        b"\xff\xfe",
    ],
)
def test_a_card_that_declares_nothing_usable_means_unknown(tmp_path, text):
    pair = c.make_pair(tmp_path, mllm_sidecars={"README.md": text})
    run_prior(*pair, tmp_path / "prior")
    assert (
        read_license(open_prior(tmp_path / "prior").manifest["sources"]["mllm"]).name == "unknown"
    )
