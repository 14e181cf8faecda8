"""compute, linear, inspect, verify: exit codes, both streams, JSON, quiet, dry runs."""

import json

import numpy as np
import pytest

from tests import checkpoints as c
from tests.artifacts.damage import flip

MAKERS = [("drift-prior", "compute", "prior.json"), ("drift-merge", "linear", "drift_merge.json")]
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return c.make_pair(tmp_path_factory.mktemp("pair"), mllm_sidecars=c.SIDECARS)


@pytest.fixture(scope="module")
def torn(tmp_path_factory):
    return c.make_pair(tmp_path_factory.mktemp("torn"), reasoner={NAME: c.store([[1.0, 2.0]])})


@pytest.mark.parametrize(("program", "command", "manifest"), MAKERS)
class TestMaking:
    def test_the_path_is_the_last_line_and_the_rest_is_for_people(
        self, call, pair, tmp_path, program, command, manifest
    ):
        out = tmp_path / "out"
        result = call(program, command, *pair.arguments, "-o", out)
        assert result.code == 0
        assert result.out.splitlines()[-1] == str(out)
        assert "theta" in result.out
        assert f"Next: {program} verify {out}" in result.err
        assert (out / manifest).is_file()
        assert not (tmp_path / "out.partial").exists()

    def test_progress_is_a_line_every_tenth_on_stderr_and_nothing_when_quiet(
        self, call, pair, tmp_path, monkeypatch, program, command, manifest
    ):
        from drift_merge.cli import progress

        monkeypatch.setattr(progress, "SHOWN_BYTES", 0)
        flags = (*pair.arguments, "-o", tmp_path / "out", "--overwrite", "--threads", 2)
        shown = call(program, command, *flags)
        checked = call(program, "verify", tmp_path / "out", "--threads", 2)
        for phase, result in (("Streaming", shown), ("Verifying", checked)):
            lines = [x for x in result.err.splitlines() if x.startswith(f"{phase}: ")]
            assert 1 <= len(lines) <= 10
            assert lines[-1].startswith(f"{phase}: 100% of ")
        assert "Streaming" not in shown.out
        assert call(program, command, *flags, "-q").err == ""
        assert call(program, command, *flags, "--json").err == ""

    def test_quiet_prints_only_the_path(self, call, pair, tmp_path, program, command, manifest):
        result = call(program, command, *pair.arguments, "-o", tmp_path / "out", "-q")
        assert result == (0, f"{tmp_path / 'out'}\n", "")

    def test_json_is_one_object_with_the_manifest_without_its_tensors(
        self, call, pair, tmp_path, program, command, manifest
    ):
        out = tmp_path / "out"
        result = call(program, command, *pair.arguments, "-o", out, "--json")
        assert (result.code, result.err) == (0, "")
        written = json.loads((out / manifest).read_text())
        del written["tensors"]
        assert result.json == {"schema": 1, "output": str(out), **written}

    def test_a_dry_run_writes_nothing_and_promises_what_the_real_run_does(
        self, call, pair, tmp_path, program, command, manifest
    ):
        out = tmp_path / "out"
        flags = (*pair.arguments, "-o", out, "--max-shard-size", "4KB")
        dry = call(program, command, *flags, "-n", "--json")
        assert (dry.code, dry.err) == (0, "")
        assert list(tmp_path.iterdir()) == []
        assert dry.json["dry_run"] is True
        assert call(program, command, *flags).code == 0
        sizes = {p.name: p.stat().st_size for p in out.glob("*.safetensors")}
        assert {s["file"]: s["bytes"] for s in dry.json["shards"]} == sizes
        assert dry.json["write_bytes"] == sum(sizes.values())
        assert sum(dry.json["tensors"].values()) == len(c.read_tensors(out))

    def test_a_dry_run_for_people_says_that_nothing_was_written(
        self, call, pair, tmp_path, program, command, manifest
    ):
        result = call(program, command, *pair.arguments, "-o", tmp_path / "out", "--dry-run")
        assert result.code == 0
        assert "Nothing was written" in result.err
        assert result.out.startswith("Tensors")
        assert list(tmp_path.iterdir()) == []

    def test_verbose_lists_every_tensor_of_the_plan(
        self, call, pair, tmp_path, program, command, manifest
    ):
        flags = (*pair.arguments, "-o", tmp_path / "out")
        people = call(program, command, *flags, "-n", "-v")
        machine = call(program, command, *flags, "-n", "-v", "--json")
        call(program, command, *flags, "-q")
        names = set(c.read_tensors(tmp_path / "out"))
        assert {step["name"] for step in machine.json["steps"]} == names
        assert names <= set(people.out.split())

    @pytest.mark.parametrize("dry", [(), ("--dry-run",)])
    @pytest.mark.parametrize(
        ("flags", "code"),
        [
            (("--modules", "atn"), 2),
            (("--dtype", "int4"), 2),
            (("--max-shard-size", "5 apples"), 2),
            (("--layers", "99"), 2),
            (("--threads", "0"), 2),
            (("--device", "tpu"), 2),
            (("--map", "absent.yaml"), 2),
            (("--modules", "embed"), 4),
            (("--modules", "re:nothing"), 4),
        ],
    )
    def test_errors_have_their_exit_code_dry_or_not(
        self, call, pair, tmp_path, program, command, manifest, dry, flags, code
    ):
        result = call(program, command, *pair.arguments, "-o", tmp_path / "out", *flags, *dry)
        assert result.code == code, result.err
        assert result.out == ""
        assert result.err.startswith("Error: ")
        assert "Traceback" not in result.err
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("dry", [(), ("--dry-run",)])
    def test_mismatches_are_exit_4_unless_skipped_with_a_count(
        self, call, torn, tmp_path, program, command, manifest, dry
    ):
        flags = (*torn.arguments, "-o", tmp_path / "out", *dry)
        refused = call(program, command, *flags)
        assert refused.code == 4
        assert "layers.1.mlp.up_proj.weight" in refused.err
        accepted = call(program, command, *flags, "--on-mismatch", "skip")
        assert accepted.code == 0
        assert "Warning [skipped]: 1 of " in accepted.err

    @pytest.mark.parametrize("dry", [(), ("--dry-run",)])
    def test_an_existing_output_is_exit_6_unless_overwritten(
        self, call, pair, tmp_path, program, command, manifest, dry
    ):
        out = tmp_path / "out"
        out.mkdir()
        (out / "precious").write_text("x")
        result = call(program, command, *pair.arguments, "-o", out, *dry)
        assert result.code == 6
        assert "--overwrite" in result.err
        assert (out / "precious").exists()
        result = call(program, command, *pair.arguments, "-o", out, "--overwrite", *dry)
        assert result.code == 6  # nothing says that it is ours
        assert "--overwrite=any" in result.err
        assert (out / "precious").exists()
        result = call(program, command, *pair.arguments, "-o", out, "--overwrite=any", *dry)
        assert result.code == 0
        assert (out / "precious").exists() == bool(dry)

    def test_an_output_inside_an_input_is_exit_6(
        self, call, pair, tmp_path, program, command, manifest
    ):
        for out in (pair.mllm, pair.mllm / "out", pair.reasoner.parent):
            for flags in ((), ("-n",), ("--overwrite",)):
                result = call(program, command, *pair.arguments, "-o", out, *flags)
                assert result.code == 6, out
        assert not (pair.mllm / "out").exists()

    def test_a_missing_output_option_is_exit_2(
        self, call, pair, tmp_path, program, command, manifest
    ):
        result = call(program, command, *pair.arguments)
        assert result.code == 2
        assert "--output" in result.err

    def test_a_failure_with_json_is_one_json_object_on_stdout(
        self, call, torn, tmp_path, program, command, manifest
    ):
        result = call(program, command, *torn.arguments, "-o", tmp_path / "out", "--json")
        assert (result.code, result.err) == (4, "")
        assert set(result.json) == {"error"}
        assert set(result.json["error"]) == {"kind", "message", "remedy"}
        assert result.json["error"]["kind"] == "alignment"

    def test_a_damaged_input_is_exit_5_and_leaves_nothing(
        self, call, tmp_path, program, command, manifest
    ):
        bad = c.store(np.full((c.INTERMEDIATE, c.HIDDEN), np.nan))
        nan = c.make_pair(tmp_path, reasoner={NAME: bad})
        result = call(program, command, *nan.arguments, "-o", tmp_path / "out", "-q")
        assert result.code == 5
        assert f"reasoner: {NAME}: 384 values" in result.err
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
        allowed = call(
            program, command, *nan.arguments, "-o", tmp_path / "out", "--allow-nonfinite"
        )
        assert allowed.code == 0
        assert call(program, "inspect", tmp_path / "out").code == 0
        assert call(program, "inspect", tmp_path / "out", "--json").code == 0
        assert call(program, "verify", tmp_path / "out").code == 0

    def test_inspect_tells_people_and_machines_the_same_manifest(
        self, call, pair, tmp_path, program, command, manifest
    ):
        out = tmp_path / "out"
        call(program, command, *pair.arguments, "-o", out, "-q")
        people = call(program, "inspect", out)
        assert people.code == 0
        assert "theta" in people.out
        machine = call(program, "inspect", out, "--json")
        assert (machine.code, machine.err) == (0, "")
        assert machine.json == {"schema": 1, **json.loads((out / manifest).read_text())}

    def test_inspect_and_verify_of_something_else_are_exit_3(
        self, call, pair, tmp_path, program, command, manifest
    ):
        for name in ("inspect", "verify"):
            for path in (pair.mllm, tmp_path / "absent"):
                result = call(program, name, path)
                assert result.code == 3
                assert manifest in result.err

    def test_a_broken_manifest_is_exit_5(self, call, pair, tmp_path, program, command, manifest):
        out = tmp_path / "out"
        call(program, command, *pair.arguments, "-o", out, "-q")
        (out / manifest).write_text("{")
        for name in ("inspect", "verify"):
            result = call(program, name, out)
            assert result.code == 5
            assert manifest in result.err

    def test_verify_is_exit_0_then_exit_1_naming_the_first_bad_tensor(
        self, call, pair, tmp_path, program, command, manifest
    ):
        out = tmp_path / "out"
        call(program, command, *pair.arguments, "-o", out, "-q")
        good = call(program, "verify", out)
        assert good.code == 0
        assert good.out.startswith("OK: ")
        machine = call(program, "verify", out, "--json")
        assert machine.json["ok"] is True
        assert machine.json["tensors"] == len(c.read_tensors(out))
        shard = next(out.glob("*.safetensors"))
        last = list(c.read_shard(shard))[-1]
        flip(shard, -1)
        bad = call(program, "verify", out)
        assert (bad.code, bad.out.startswith("OK")) == (1, False)
        assert last in bad.err
        machine = call(program, "verify", out, "--json")
        assert machine.code == 1
        assert machine.json["error"]["kind"] == "different"
        assert last in machine.json["error"]["message"]

    def test_verify_with_its_sources_computes_a_sample_again(
        self, call, pair, tmp_path, program, command, manifest
    ):
        out = tmp_path / "out"
        call(program, command, *pair.arguments, "-o", out, "-q")
        given = ("--reasoner", pair.reasoner, "--mllm", pair.mllm)
        result = call(program, "verify", out, *given, "--sample", 5, "--seed", 7)
        assert result.code == 0
        assert "Computed again from the sources, equal: 5 (seed 7)." in result.out
        machine = call(program, "verify", out, *given, "--sample", 5, "--seed", 7, "--json")
        assert len(machine.json["recomputed"]) == 5
        fresh = call(program, "verify", out, *given)
        assert "seed" in fresh.out
        half = call(program, "verify", out, "--mllm", pair.mllm)
        assert half.code == 2

    def test_a_second_run_of_the_same_command_says_so_or_refuses(
        self, call, pair, tmp_path, program, command, manifest
    ):
        flags = (*pair.arguments, "-o", tmp_path / "out")
        assert call(program, command, *flags).code == 0
        before = c.read_files(tmp_path / "out")
        assert call(program, command, *flags).code == 6
        assert call(program, command, *flags, "--overwrite").code == 0
        assert c.read_files(tmp_path / "out") == before
