"""A LoRA adapter on the Hub as a reasoner: the bytes of the same one in a directory."""

import json
import os
from pathlib import Path

import pytest

from drift_merge.errors import CheckpointError
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.sources import open_sources
from drift_merge.storage.fingerprints import of_files, require_unchanged
from tests import checkpoints as c
from tests.adapters import write_adapter
from tests.faults.harness import assert_refusal, run
from tests.hub_server.models import MLLM, REASONER
from tests.hub_server.server import HubServer
from tests.streaming.runs import stream, succeed

LORA = "org/lora"
MODULES = {"model.layers.0.self_attn.o_proj": (c.HIDDEN, c.HIDDEN)}


@pytest.fixture
def lora(hub: HubServer, pair: c.Pair, tmp_path: Path) -> Path:
    """The directory of what the Hub has as LORA; its base is REASONER."""
    directory = tmp_path / "lora"
    write_adapter(directory, pair.reasoner, MODULES)
    name_base(directory, REASONER)
    (directory / "README.md").write_text("A card.\n")
    hub.add_commit(LORA, directory)
    return directory


def name_base(directory: Path, base: str) -> None:
    file = directory / "adapter_config.json"
    fields = json.loads(file.read_text()) | {"base_model_name_or_path": base}
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize("command", [("drift-merge", "linear"), ("drift-prior", "compute")])
def test_it_is_read_as_a_directory_is_streamed_or_not_and_offline(
    command: tuple[str, str], lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed([*command, LORA, MLLM], tmp_path / "streamed")
    assert run(*command, LORA, MLLM, "-o", str(tmp_path / "plain")).code == 0
    assert run(*command, str(lora), MLLM, "-o", str(tmp_path / "local")).code == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(*command, LORA, MLLM, "-o", str(tmp_path / "offline")).code == 0
    local = c.read_tensors(tmp_path / "local")
    for name in ("streamed", "plain", "offline"):
        assert c.read_tensors(tmp_path / name) == local, name
    (manifest,) = {p.name for p in (tmp_path / "plain").glob("*.json")} & {
        "prior.json",
        "drift_merge.json",
    }
    document = json.loads((tmp_path / "plain" / manifest).read_text())
    found = json.dumps(document["sources"])
    assert f'"repo_id": "{LORA}"' in found
    assert run(command[0], "verify", str(tmp_path / "plain")).code == 0


def test_a_revision_chooses_and_is_recorded(hub: HubServer, lora: Path, tmp_path: Path) -> None:
    old = run("drift-merge", "linear", LORA, MLLM, "-o", str(tmp_path / "old"))
    newer = tmp_path / "newer"
    write_adapter(newer, lora, {"model.layers.1.self_attn.o_proj": (c.HIDDEN, c.HIDDEN)})
    name_base(newer, REASONER)
    hub.add_commit(LORA, newer)
    new = run("drift-merge", "linear", LORA, MLLM, "-o", str(tmp_path / "new"))
    assert (old.code, new.code) == (0, 0)
    manifest = json.loads((tmp_path / "old/drift_merge.json").read_text())
    (revision,) = {s["revision"] for s in manifest["sources"]["reasoners"] if s["repo_id"] == LORA}
    again = [f"{LORA}@{revision}", MLLM, "-o", str(tmp_path / "again")]
    assert run("drift-merge", "linear", *again).code == 0
    tensors = {name: c.read_tensors(tmp_path / name) for name in ("old", "new", "again")}
    assert tensors["again"] == tensors["old"] != tensors["new"]


def test_a_base_here_that_changes_is_noticed_although_the_adapter_is_pinned(
    hub: HubServer, pair: c.Pair, lora: Path, tmp_path: Path
) -> None:
    name_base(lora, str(pair.reasoner))
    hub.add_commit(LORA, lora)
    recipe = Recipe(method="linear", reasoners=(LORA,), mllm=MLLM)
    _, (joined,), _ = open_sources(recipe, quiet=True)
    assert joined.source.is_pinned
    # Its config is of another machine, where that path may be another model.
    (note,) = joined.notes
    assert f"the directory {pair.reasoner} here stands for that" in note.message
    before = of_files(joined)
    require_unchanged(joined)
    shards = [str(path) for path in pair.reasoner.glob("*.safetensors")]
    os.utime(shards[0], ns=(1, 1))
    assert of_files(joined) != before
    with pytest.raises(CheckpointError, match="was changed or replaced"):
        require_unchanged(joined)


def test_where_no_adapter_may_be_and_without_weights_or_base_it_is_refused(
    hub: HubServer, lora: Path, tmp_path: Path
) -> None:
    as_mllm = run("drift-merge", "linear", REASONER, LORA, "-q", "-o", str(tmp_path / "out"))
    assert_refusal(as_mllm, 5, ["is a LoRA adapter", "Only a reasoner"])
    name_base(lora, "/nowhere/base")
    hub.add_commit(LORA, lora)
    lost = stream(["drift-merge", "linear", LORA, MLLM], tmp_path / "out")
    assert_refusal(lost, 3, ["LoRA adapter on /nowhere/base", "hf download org/lora --revision"])
    name_base(lora, REASONER)
    (lora / "adapter_model.safetensors").unlink()
    hub.add_commit(LORA, lora)
    empty = run("drift-merge", "linear", LORA, MLLM, "-q", "-o", str(tmp_path / "out"))
    assert_refusal(empty, 5, ["it has no adapter_model.safetensors"])
