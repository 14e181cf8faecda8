"""What the doctor finds."""

import sys

import pytest

from drift_merge.cli.commands.doctor import examine


def test_the_doctor_reports_versions_extras_devices_cache_token_and_disk(
    call, monkeypatch, tmp_path
):
    from huggingface_hub import constants

    blob = tmp_path / "hub" / "models--org--name" / "blobs" / "b"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(bytes(1234))
    (blob.parent / "link").symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    result = call("drift-prior", "doctor", "--json")
    assert result.code == 0
    found = result.json
    assert found["schema"] == 1
    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["versions"]["torch"]
    assert set(found["extras"]) >= {"tokenizers", "train", "report", "test"}
    assert found["extras"]["test"]["packages"]["pytest"] == pytest.__version__
    assert found["devices"][0]["name"] == "cpu"
    assert found["threads"] >= 1
    assert found["hub"]["cache_bytes"] == 1234
    assert found["hub"]["token"] is True
    assert all(free > 0 for free in found["free_bytes"].values())
    text = call("drift-prior", "doctor")
    for shown in (result, text):
        assert "secret" not in shown.out + shown.err


def test_the_doctor_names_what_is_missing_and_how_to_install_it(monkeypatch, call):
    from drift_merge.cli.commands import doctor

    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda p: None if p == "pillow" else installed(p))
    assert call("drift-prior", "doctor").code == 0
    assert "pillow missing" in call("drift-prior", "doctor").out
    assert "pip install 'drift_merge[train]'" in call("drift-prior", "doctor").out
    assert examine()["extras"]["train"]["packages"]["pillow"] is None


def test_the_doctor_survives_a_torch_that_does_not_import_and_a_missing_cache(
    monkeypatch, tmp_path
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "there"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch raises ImportError
    found = examine()
    assert found["devices"][-1]["name"] == "torch"
    assert "does not work" in found["devices"][-1]["description"]
    assert (found["hub"]["cache_bytes"], found["hub"]["token"]) == (0, False)
    assert found["free_bytes"]["Hub cache"] > 0
