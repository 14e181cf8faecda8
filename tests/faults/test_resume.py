"""What an unfinished run leaves, and what a later one makes of it."""

import errno
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import SIDECARS, Pair, make_pair, read_files
from tests.faults.forks import CHANGES, RENAMES, Forks, Run
from tests.faults.harness import assert_refusal, command

NAMES = ("compute", "linear")
FLUSH_BYTES = 1000


@pytest.fixture(scope="module", params=NAMES)
def unfinished(
    request: pytest.FixtureRequest, forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> "Unfinished":
    return Unfinished(request.param, forks, tmp_path_factory.mktemp(request.param))


class Unfinished:
    """A run that was killed when about two thirds of it were journaled."""

    def __init__(self, name: str, forks: Forks, directory: Path) -> None:
        self.name = name
        self.forks = forks
        self.directory = directory
        self.pair = make_pair(directory / "pair", num_shards=2, mllm_sidecars=SIDECARS)
        fresh = self.run(directory / "whole", self.pair, count=("pwrite", "write"))
        assert fresh.code == 0, fresh
        self.whole = read_files(directory / "whole")
        self.num_writes = fresh.calls.count("pwrite")
        at = 2 * fresh.calls.count("write") // 3  # lines of the journal are what `write` writes
        killed = self.run(directory / "out", self.pair, count=("write",), at=at, do="kill")
        assert killed.code == -9

    def run(self, out: Path, pair: Pair, *options: str, **request: object) -> Run:
        arguments = [*command(self.name, pair, out), *options]
        return self.forks.run(*arguments, extent_bytes=FLUSH_BYTES, **request)

    def copy(self, directory: Path) -> Path:
        """OUT of a copy of the unfinished state; OUT itself is absent."""
        shutil.copytree(self.directory / "out.partial", directory / "out.partial", symlinks=True)
        return directory / "out"

    def assert_finishes(self, out: Path, *options: str) -> Run:
        run = self.run(out, self.pair, *options, count=("pwrite",))
        assert run.code == 0, run
        assert read_files(out) == self.whole
        assert not out.with_name("out.partial").exists()
        return run


def test_a_resumed_run_does_not_compute_again_what_was_journaled(
    unfinished: Unfinished, tmp_path: Path
) -> None:
    out = unfinished.copy(tmp_path)
    lines = (tmp_path / "out.partial" / "journal.jsonl").read_text().count("\n")
    run = unfinished.assert_finishes(out)
    assert lines > 2
    assert "Resumed: " in run.stderr
    assert len(run.calls) < 0.8 * unfinished.num_writes


@pytest.mark.parametrize("options", [("--threads", "3"), ("--json",), ("-q",), ("--overwrite",)])
def test_options_that_change_no_byte_resume(
    options: tuple[str, ...], unfinished: Unfinished, tmp_path: Path
) -> None:
    run = unfinished.assert_finishes(unfinished.copy(tmp_path), *options)
    assert len(run.calls) < 0.8 * unfinished.num_writes


def refuses(unfinished: Unfinished, out: Path, pair: Pair, *options: str) -> None:
    """The command refuses, touches nothing, and its remedy works as pasted."""
    partial = out.with_name("out.partial")
    before = read_files(partial)
    run = unfinished.run(out, pair, *options)
    assert_refusal(run, 6, [str(partial), "other inputs or options"])
    assert read_files(partial) == before
    assert not out.exists()
    remedy = run.stderr.partition("discard it: ")[2].strip()
    assert shlex.split(remedy) == ["rm", "-r", str(partial)]
    subprocess.run(remedy, shell=True, check=True)
    assert unfinished.run(out, pair, *options).code == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--modules", "attn"),
        ("--dtype", "float32"),
        ("--max-shard-size", "1KB"),
        ("--layers", "0:1"),
        ("--allow-nonfinite",),
    ],
    ids=lambda options: options[0],
)
def test_other_options_are_refused_with_the_command_that_discards(
    options: tuple[str, ...], unfinished: Unfinished, tmp_path: Path
) -> None:
    refuses(unfinished, unfinished.copy(tmp_path), unfinished.pair, *options)


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 1))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("role", ["reasoner", "mllm"])
@pytest.mark.parametrize("change", [touch, flip])
def test_a_changed_input_is_refused_with_the_command_that_discards(
    change: Callable[[Path], None], role: str, unfinished: Unfinished, tmp_path: Path
) -> None:
    # The copy has the times of the original, so that the change alone tells them apart.
    original = unfinished.directory / "pair"
    kept = unfinished.directory / "kept"
    shutil.copytree(original, kept)
    try:
        shard = getattr(unfinished.pair, role) / "model-00002-of-00002.safetensors"
        change(shard)
        refuses(unfinished, unfinished.copy(tmp_path), unfinished.pair)
    finally:
        shutil.rmtree(original)
        kept.rename(original)
    assert unfinished.assert_finishes(unfinished.copy(tmp_path / "again"))


def test_a_quote_in_the_path_does_not_break_the_command_that_discards(
    unfinished: Unfinished, tmp_path: Path
) -> None:
    (tmp_path / "it's; mine").mkdir()
    out = unfinished.copy(tmp_path / "it's; mine")
    refuses(unfinished, out, unfinished.pair, "--modules", "attn")


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.4, 0.6, 0.9, 0.99])
def test_a_torn_journal_is_done_again_from_where_it_tore(
    kept: float, unfinished: Unfinished, tmp_path: Path
) -> None:
    out = unfinished.copy(tmp_path)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    os.truncate(journal, int(kept * journal.stat().st_size))
    unfinished.assert_finishes(out)


@pytest.mark.parametrize(
    "tail",
    [b"\0" * 9, b'{"done": {"x"', b"[]\n", b'{"done": 3}\n', b"\xff\n", b'{"plan": "x"}\n'],
)
def test_garbage_at_the_end_of_the_journal_is_cut_off(
    tail: bytes, unfinished: Unfinished, tmp_path: Path
) -> None:
    out = unfinished.copy(tmp_path)
    with open(tmp_path / "out.partial" / "journal.jsonl", "ab") as journal:
        journal.write(tail)
    run = unfinished.assert_finishes(out)
    assert len(run.calls) < 0.8 * unfinished.num_writes


def test_a_foreign_file_in_the_partial_is_named_and_kept(
    unfinished: Unfinished, tmp_path: Path
) -> None:
    out = unfinished.copy(tmp_path)
    (tmp_path / "out.partial" / "thesis.tex").write_text("precious")
    run = unfinished.run(out, unfinished.pair)
    assert_refusal(run, 6, ["out.partial holds thesis.tex, which is not ours"])
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "precious"
    (tmp_path / "out.partial" / "thesis.tex").unlink()
    unfinished.assert_finishes(out)


@pytest.mark.parametrize("name", ["stray.json", "model-00009-of-00009.safetensors", "a/b.txt"])
def test_a_stray_file_in_the_payload_is_not_published(
    name: str, unfinished: Unfinished, tmp_path: Path
) -> None:
    out = unfinished.copy(tmp_path)
    stray = tmp_path / "out.partial" / "payload" / name
    stray.parent.mkdir(exist_ok=True)
    stray.write_text("{}")
    unfinished.assert_finishes(out)


def shards_of(out: Path) -> list[Path]:
    return sorted((out.with_name("out.partial") / "payload").glob("*.safetensors"))


@pytest.mark.parametrize("damage", ["deleted", "emptied", "zeroed"])
def test_data_lost_after_it_was_journaled_is_never_published_and_the_next_run_starts_afresh(
    damage: str, unfinished: Unfinished, tmp_path: Path
) -> None:
    """As after a power cut on a disk that had lied about flushing."""
    out = unfinished.copy(tmp_path)
    (shard,) = shards_of(out)
    if damage == "deleted":
        shard.unlink()
    else:
        shard.write_bytes(b"" if damage == "emptied" else bytes(shard.stat().st_size))
    run = unfinished.run(out, unfinished.pair)
    assert_refusal(run, 1, ["differs from its fingerprint"])
    assert not out.exists()
    unfinished.assert_finishes(out)


def test_a_sidecar_that_is_gone_at_the_rerun_is_not_published(forks: Forks, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1, mllm_sidecars=SIDECARS)
    arguments = command("linear", pair, tmp_path / "out")
    killed = forks.run(*arguments, count=("rename",), at=1, do="kill")
    assert killed.code == -9
    (pair.mllm / "chat_template.jinja").unlink()
    shutil.rmtree(pair.mllm / "remote")
    assert forks.run(*arguments).code == 0
    assert forks.run(*command("linear", pair, tmp_path / "fresh")).code == 0
    assert read_files(tmp_path / "out") == read_files(tmp_path / "fresh")
    assert not (tmp_path / "out" / "remote").exists()


def test_a_killed_run_is_no_checkpoint_and_no_prior(unfinished: Unfinished, tmp_path: Path) -> None:
    partial = unfinished.copy(tmp_path).with_name("out.partial")
    program = command(unfinished.name, unfinished.pair, tmp_path)[0]
    for path in (partial, partial / "payload"):
        result = unfinished.forks.run(program, "verify", str(path))
        assert_refusal(result, 3, [str(path)])
        result = unfinished.forks.run("drift-prior", "align", *[str(path)] * 2)
        assert_refusal(result, 5, [str(path)])


@pytest.fixture
def sweep(tmp_path: Path) -> list[str]:
    """A sweep of two outputs, to which -o OUT is added."""
    pair = make_pair(tmp_path, layers=1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: linear\nreasoner: {pair.reasoner}\nmllm: {pair.mllm}\n")
    return ["drift-merge", "sweep", str(recipe), "--set", "weight=0.2,0.4", "-o"]


@pytest.mark.parametrize("do", ["kill", errno.EIO])
def test_a_sweep_that_ends_after_its_first_output_is_finished_by_a_rerun(
    do: object, sweep: list[str], forks: Forks, tmp_path: Path
) -> None:
    assert forks.run(*sweep, str(tmp_path / "whole")).code == 0
    out = tmp_path / "out"
    struck = forks.run(*sweep, str(out), count=RENAMES, at=2, do=do)
    assert struck.code != 0
    assert (out / "weight=0.2").exists()
    assert not (out / "weight=0.4").exists()
    again = forks.run(*sweep, str(out))
    assert again.code == 0, again
    assert read_files(out) == read_files(tmp_path / "whole")


def test_a_sweep_killed_while_it_tidies_up_is_finished_by_a_rerun(
    sweep: list[str], forks: Forks, tmp_path: Path
) -> None:
    whole = forks.run(*sweep, str(tmp_path / "whole"), count=CHANGES)
    last = len(whole.calls) - whole.calls[::-1].index("rename")  # the call that publishes the last
    numbers = range(last + 1, len(whole.calls) + 1)
    outs = {number: tmp_path / f"out{number}" for number in numbers}
    killed = forks.strike({n: {"arguments": [*sweep, str(out)]} for n, out in outs.items()}, "kill")
    assert {run.code for run in killed} == {-9}
    again = forks.run_all([{"arguments": [*sweep, str(out)]} for out in outs.values()])
    # Only when the last trace is gone has it ended as any run ends that is repeated.
    assert [run.code for run in again] == [0] * (len(outs) - 1) + [6]
    for out in outs.values():
        assert read_files(out) == read_files(tmp_path / "whole")


def test_an_output_replaced_since_the_sweep_was_killed_is_not_taken_for_its_own(
    sweep: list[str], forks: Forks, tmp_path: Path
) -> None:
    out, words = tmp_path / "out", [*sweep, str(tmp_path / "out")]
    calls = forks.run(*sweep, str(tmp_path / "whole"), count=("rmdir",)).calls
    assert forks.run(*words, count=("rmdir",), at=len(calls) - 1, do="kill").code == -9
    assert os.listdir(out / "weight=0.4.partial") != []
    shutil.copytree(out / "weight=0.2", tmp_path / "copy")
    shutil.rmtree(out / "weight=0.2")
    shutil.move(tmp_path / "copy", out / "weight=0.2")
    assert_refusal(forks.run(*words), 6, ["weight=0.2", "exists already"])
