"""`drift-prior align`: its table, its verdict, its JSON and its exit codes."""

import pytest

from drift_merge.names.tensors import STATUSES
from tests import checkpoints as c

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return c.make_pair(tmp_path_factory.mktemp("pair"), num_shards=(1, 3))


@pytest.fixture(scope="module")
def torn(tmp_path_factory):
    """A pair with one tensor of another shape."""
    return c.make_pair(tmp_path_factory.mktemp("torn"), reasoner={NAME: c.store([[1.0, 2.0]])})


def test_a_complete_pair_gives_a_table_a_verdict_and_the_next_command(call, pair):
    result = call("drift-prior", "align", *pair.arguments)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].split() == ["module", *STATUSES]
    assert lines[-1] == "20 of 20 selected tensors matched: complete."
    assert f"Next: drift-prior compute {pair.reasoner} {pair.mllm} -o prior/" in result.err


def check_schema(value, pair):
    assert set(value) == {"schema", "coverage", "tensors", "rows", "findings"}
    assert value["schema"] == 1
    assert set(value["coverage"]) == {"selected", "matched"}
    for tensor in value["tensors"]:
        assert list(tensor) == ["name", "reasoner", "mllm", "shape", "status"]
        assert tensor["status"] in STATUSES
        assert isinstance(tensor["name"], str)
        for side in ("reasoner", "mllm"):
            assert isinstance(tensor[side], str | list | None)
    for finding in value["findings"]:
        assert list(finding) == ["code", "severity", "message", "remedy"]
        assert finding["severity"] in ("error", "warning", "info")
        assert all(finding.values())
    for side in ("reasoner", "mllm"):
        listed = []
        for tensor in value["tensors"]:
            names = tensor[side]
            listed += [names] if isinstance(names, str) else names or []
        assert sorted(listed) == sorted(c.read_tensors(getattr(pair, side)))


@pytest.mark.parametrize("modules", ["attn,mlp", "norm", "re:up_proj", "mlp,norm"])
def test_json_lists_every_tensor_of_both_checkpoints_exactly_once(call, pair, modules):
    result = call("drift-prior", "align", *pair.arguments, "--modules", modules, "--json")
    assert (result.code, result.err) == (0, "")
    check_schema(result.json, pair)
    matched = sum(t["status"] == "matched" for t in result.json["tensors"])
    assert result.json["coverage"] == {"selected": matched, "matched": matched}


def test_a_mismatch_is_exit_4_and_is_explained(call, torn):
    result = call("drift-prior", "align", *torn.arguments)
    assert result.code == 4
    assert "19 of 20 selected tensors matched: REFUSED." in result.out
    assert "layers.1.mlp.up_proj.weight" in result.err
    assert "(1, 2)" in result.err
    assert "--on-mismatch skip" in result.err
    assert "Next:" not in result.err


def test_a_mismatch_in_json_is_exit_4_with_the_whole_account(call, torn):
    result = call("drift-prior", "align", *torn.arguments, "--json")
    assert (result.code, result.err) == (4, "")
    check_schema(result.json, torn)
    assert result.json["coverage"] == {"selected": 20, "matched": 19}
    bad = [t["name"] for t in result.json["tensors"] if t["status"] == "shape_mismatch"]
    assert bad == ["layers.1.mlp.up_proj.weight"]


def test_skipping_the_mismatch_is_exit_0_and_says_partial(call, torn):
    result = call("drift-prior", "align", *torn.arguments, "--on-mismatch", "skip")
    assert result.code == 0
    assert "19 of 20 selected tensors matched: partial." in result.out
    as_json = call("drift-prior", "align", *torn.arguments, "--on-mismatch", "skip", "--json")
    assert as_json.code == 0


def test_nothing_matched_is_exit_4_even_when_mismatches_are_skipped(call, torn):
    flags = ("--modules", r"re:layers\.1\.mlp\.up_proj", "--on-mismatch", "skip")
    for more in ((), ("--json",)):
        assert call("drift-prior", "align", *torn.arguments, *flags, *more).code == 4


@pytest.mark.parametrize(
    ("layers", "count"), [("0", 10), ("0:1", 10), ("1:", 10), ("0:2", 20), ("-1:", 10)]
)
def test_layers_select_by_number(call, pair, layers, count):
    result = call("drift-prior", "align", *pair.arguments, "--layers", layers, "--json")
    assert result.json["coverage"] == {"selected": count, "matched": count}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--modules", "atn,mlp"), ("atn", "attn", "mlp", "norm", "embed", "head", "full", "re:")),
        (("--modules", "re:("), ("re:(",)),
        (("--modules", ""), ("attn",)),
        (("--layers", "two"), ("two",)),
        (("--layers", "5"), ("5",)),
        (("--on-mismatch", "ignore"), ("error", "skip")),
        (("--dtype", "float32"), ("--dtype",)),
    ],
)
def test_a_wrong_option_is_exit_2_and_lists_the_choices(call, pair, flags, words):
    result = call("drift-prior", "align", *pair.arguments, *flags)
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


@pytest.mark.parametrize("sources", [(), ("reasoner",), ("one", "two", "mllm")])
def test_a_wrong_number_of_sources_is_exit_2(call, pair, sources):
    known = {
        "reasoner": pair.reasoner,
        "mllm": pair.mllm,
        "one": pair.reasoner,
        "two": pair.reasoner,
    }
    result = call("drift-prior", "align", *(known[s] for s in sources))
    assert result.code == 2
    assert "REASONER" in result.err


def test_a_source_that_is_not_there_is_exit_3(call, pair, tmp_path):
    for more in ((), ("--json",)):
        result = call("drift-prior", "align", tmp_path / "absent", pair.mllm, *more)
        assert result.code == 3
    assert set(result.json) == {"error"}
    assert set(result.json["error"]) == {"kind", "message", "remedy"}
    assert result.json["error"]["kind"] == "source"
    assert "absent" in result.json["error"]["message"]


def test_swapped_arguments_are_exit_4_with_the_command_turned_round(call, pair):
    result = call("drift-prior", "align", pair.mllm, pair.reasoner)
    assert result.code == 4
    assert f"drift-prior align {pair.reasoner} {pair.mllm}" in result.err


def test_a_map_file_pairs_what_structure_cannot(call, tmp_path):
    words = {"up_proj": "one", "gate_proj": "two"}
    tensors = {}
    for name, tensor in c.reasoner_tensors().items():
        for old, new in words.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    ours = c.write_checkpoint(tmp_path / "r", tensors, c.text_config())
    pair = c.make_pair(tmp_path / "p")
    assert call("drift-prior", "align", ours, pair.mllm).code == 4
    rules = tmp_path / "map.yaml"
    lines = [
        f'  "model.layers.{{layer}}.mlp.{new}.weight": "layers.{{layer}}.mlp.{old}.weight"\n'
        for old, new in words.items()
    ]
    rules.write_text("".join(["reasoner:\n", *lines]))
    result = call("drift-prior", "align", ours, pair.mllm, "--map", rules)
    assert result.code == 0, result.err


def test_control_characters_in_names_do_not_reach_the_terminal(call, tmp_path):
    nasty = "model.layers.0.mlp.up_proj.\x1b[31mweight"
    pair = c.make_pair(tmp_path, mllm={nasty: c.store([1.0])})
    for result in (
        call("drift-prior", "align", *pair.arguments, "-v"),
        call("drift-merge", "linear", *pair.arguments, "-o", tmp_path / "o", "-n", "-v"),
    ):
        assert "\x1b" not in result.out + result.err


@pytest.mark.parametrize("broken", [False, True])
def test_verbose_lists_every_tensor_with_its_canonical_and_stored_names(call, pair, torn, broken):
    given = torn if broken else pair
    result = call("drift-prior", "align", *given.arguments, "-v")
    assert result.code == (4 if broken else 0)
    lines = [line.split() for line in result.out.splitlines()]
    assert lines[0] == ["tensor", "status", "reasoner", "mllm"]
    listed = {line[0]: line[1:] for line in lines[1 : lines.index([])]}
    status = "shape_mismatch" if broken else "matched"
    assert listed["layers.1.mlp.up_proj.weight"] == [status, NAME, NAME]
    assert listed["visual.merger.mlp.2.weight"][:2] == ["outside_tower", "-"]
    stored = {name for row in listed.values() for name in row[1:]} - {"-"}
    assert stored == c.read_tensors(given.reasoner).keys() | c.read_tensors(given.mllm).keys()


@pytest.mark.parametrize(
    ("program", "command"), [("drift-prior", "compute"), ("drift-merge", "ties")]
)
def test_quiet_does_not_hide_what_was_skipped(call, torn, tmp_path, program, command):
    base = ("--base", torn.mllm) if command == "ties" else ()
    options = ("--on-mismatch", "skip", "-o", tmp_path / "out", "-q")
    result = call(program, command, *torn.arguments, *base, *options)
    assert (result.code, result.out) == (0, f"{tmp_path / 'out'}\n")
    assert "Warning [skipped]: 1 of 2" in result.err
