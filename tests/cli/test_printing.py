"""What a run prints, and how it ends when it is interrupted."""

import signal

import numpy as np
import pytest

from tests import checkpoints as c


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return c.make_pair(tmp_path_factory.mktemp("pair"), mllm_sidecars=c.SIDECARS)


def test_compute_prints_the_table_the_findings_and_what_the_cosine_means(call, tmp_path):
    pair = c.make_pair(tmp_path, reasoner_config={"rope_theta": 10000.0})
    result = call("drift-prior", "compute", *pair.arguments, "-o", tmp_path / "out")
    lines = result.out.splitlines()
    assert lines[0] == "delta = theta_reasoner - theta_mllm   (bfloat16)"
    header = ["module", "tensors", "elements", "|delta|", "|delta|/|mllm|", "cosine", "equal"]
    assert lines[1] == "Adding delta moves the mllm towards the reasoner."
    assert lines[2].split() == header
    assert [line.split()[0] for line in lines[3:6]] == ["attn", "mlp", "all"]
    assert lines[6].startswith("Exactly equal entries of reasoner and mllm: ")
    assert lines[7].startswith("Cosine 0.9")
    assert "Warning [rope_theta]" in result.err


def test_compute_with_a_base_names_it_and_verify_needs_it(call, tmp_path):
    pair = c.make_pair(tmp_path)
    base = c.write_checkpoint(tmp_path / "base", c.reasoner_tensors(seed=9), c.text_config())
    out = tmp_path / "out"
    made = call("drift-prior", "compute", *pair.arguments, "--base", base, "-o", out)
    assert made.code == 0
    assert "theta_reasoner - theta_base" in made.out
    assert f"--base {base}" in made.err
    given = ("--reasoner", pair.reasoner, "--mllm", pair.mllm)
    assert call("drift-prior", "verify", out, *given).code == 2
    assert call("drift-prior", "verify", out, *given, "--base", base).code == 0
    assert call("drift-prior", "verify", out, "--base", base).code == 2


def test_a_tensor_that_only_the_base_lacks_is_counted_on_stderr(call, tmp_path):
    pair = c.make_pair(tmp_path)
    tensors = c.reasoner_tensors(seed=9)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    base = c.write_checkpoint(tmp_path / "base", tensors, c.text_config())
    flags = (*pair.arguments, "--base", base, "-o", tmp_path / "out", "--on-mismatch", "skip")
    result = call("drift-prior", "compute", *flags)
    assert "1 of 20 selected tensors have no partner in base and get no delta" in result.err


def test_compute_takes_one_reasoner(call, pair, tmp_path):
    sources = (pair.reasoner, pair.reasoner, pair.mllm)
    result = call("drift-prior", "compute", *sources, "-o", tmp_path / "out")
    assert result.code == 2
    assert "one REASONER" in result.err


@pytest.mark.parametrize("weights", [("nan",), ("inf",), ("0.1", "0.2"), ("x",)])
def test_wrong_weights_are_exit_2(call, pair, tmp_path, weights):
    flags = [flag for weight in weights for flag in ("--weight", weight)]
    result = call("drift-merge", "linear", *pair.arguments, *flags, "-o", tmp_path / "out")
    assert result.code == 2
    assert "--weight" in result.err


@pytest.mark.parametrize("device", ["cuda:99", "cuda:1000"])
def test_a_device_that_is_not_there_is_exit_2(call, pair, tmp_path, device):
    flags = ("--device", device, "-o", tmp_path / "out")
    result = call("drift-prior", "compute", *pair.arguments, *flags)
    assert result.code == 2
    assert device in result.err
    assert list(tmp_path.iterdir()) == []


def test_linear_prints_the_roles_and_weights(call, pair, tmp_path):
    flags = ("--weight", 0.25, "-o", tmp_path / "out")
    result = call("drift-merge", "linear", *pair.arguments, *flags)
    rows = [line.split() for line in result.out.splitlines()]
    assert ["mllm", "mllm", "0.75"] in rows
    assert ["reasoner", "reasoner", "0.25"] in rows


def test_a_merge_that_rounding_swallows_is_warned_about(call, tmp_path):
    tensors = c.mllm_tensors()
    near = {
        n: c.store(t.values * np.float32(1 + 2**-7))
        for n, t in tensors.items()
        if "visual" not in n
    }
    pair = c.make_pair(tmp_path, reasoner=near)
    flags = (*pair.arguments, "--weight", 0.01, "-o", tmp_path / "out")
    result = call("drift-merge", "linear", *flags)
    assert "Warning [rounding]" in result.err
    wide = call("drift-merge", "linear", *flags, "--dtype", "float32", "--overwrite")
    assert "Warning [rounding]" not in wide.err


def test_no_color_and_a_pipe_leave_no_escape_codes(call, pair, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    result = call("drift-prior", "compute", *pair.arguments, "-o", tmp_path / "out")
    assert "\x1b" not in result.out + result.err


def test_a_bug_is_exit_70_with_a_way_to_report_it(call, pair, monkeypatch):
    from drift_merge.cli.commands import align

    def fail(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(align, "prepare", fail)
    result = call("drift-prior", "align", *pair.arguments)
    assert result.code == 70
    assert "ZeroDivisionError: oops" in result.err
    assert "DRIFT_MERGE_DEBUG=1" in result.err
    assert "Traceback" not in result.err


def test_an_interrupt_is_exit_130(call, pair, monkeypatch):
    from drift_merge.cli.commands import align

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(align, "prepare", interrupt)
    assert call("drift-prior", "align", *pair.arguments).code == 130
    assert (
        call("drift-prior", "align", *pair.arguments, "--json").json["error"]["kind"]
        == "interrupted"
    )


def test_a_second_interrupt_does_not_cut_the_cleaning_up_short(call, pair, monkeypatch):
    from drift_merge.cli.commands import align

    cleaned = []

    def interrupted(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            cleaned.append(True)

    monkeypatch.setattr(align, "prepare", interrupted)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert call("drift-prior", "align", *pair.arguments).code == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert cleaned == [True]


def test_a_run_without_an_interrupt_leaves_the_handler_as_it_was(call, pair):
    before = signal.getsignal(signal.SIGINT)
    assert call("drift-prior", "align", *pair.arguments).code == 0
    assert signal.getsignal(signal.SIGINT) is before
