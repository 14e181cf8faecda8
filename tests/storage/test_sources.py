import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.errors import CheckpointError, SourceError
from drift_merge.storage.folder.contents import is_sidecar
from drift_merge.storage.sources import Source, mistaken_path, parse_source
from drift_merge.storage.weight_map import (
    INDEX,
    SINGLE,
    find_weights,
    parse_index,
    require_shards,
    shard_names,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_an_existing_directory_is_local(inside: Path) -> None:
    (inside / "org" / "name").mkdir(parents=True)
    source = parse_source("org/name")
    assert source == Source("org/name", "local", path=Path("org/name"))
    assert source.label == "name"


def test_home_is_expanded_and_a_dot_has_the_name_of_its_directory(inside: Path) -> None:
    (inside / "model").mkdir()
    assert parse_source("~/model").path == inside / "model"
    assert parse_source(".").label == inside.name


def test_a_single_file_needs_its_config_beside_it(inside: Path) -> None:
    (inside / "model").mkdir()
    (inside / "model" / "a.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        parse_source("model/a.safetensors")
    (inside / "model" / "config.json").write_text("{}")
    source = parse_source("model/a.safetensors")
    assert (source.kind, source.path) == ("local", Path("model/a.safetensors"))
    assert source.label == "model/a.safetensors"


@pytest.mark.parametrize(
    ("text", "repo_id", "revision", "label"),
    [
        ("gpt2", "gpt2", None, "gpt2"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", None, None),
        ("org/name@main", "org/name", "main", "org/name@main"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3", "org/name@refs/pr/3"),
        (f"org/name@{COMMIT}", "org/name", COMMIT, "org/name@01234567"),
        (f"org/name@{COMMIT.upper()}", "org/name", COMMIT, "org/name@01234567"),
        ("_org/n_a.m-e", "_org/n_a.m-e", None, None),
    ],
)
def test_a_hub_id_is_taken_apart(
    inside: Path, text: str, repo_id: str, revision: str | None, label: str | None
) -> None:
    source = parse_source(text)
    assert (source.kind, source.repo_id, source.revision) == ("hub", repo_id, revision)
    assert source.label == (label or text)
    assert source.is_pinned == (revision == COMMIT)


PATHS = (
    "./x ../x /no/such ~/no-such a/b/c a\\b org/name/ x.safetensors x.gguf m/x.bin /no/such@main"
)


@pytest.mark.parametrize("text", PATHS.split())
def test_what_looks_like_a_path_and_is_absent_never_becomes_a_hub_id(
    inside: Path, text: str
) -> None:
    with pytest.raises(SourceError, match="No such path") as caught:
        parse_source(text)
    assert caught.value.exit_code == 3
    assert caught.value.remedy


WRONG_IDS = (
    "org/-name org/name. org/na--me a..b org/name.git @main org/n\u00e4me org/name@ o/n@a..b"
)


@pytest.mark.parametrize("text", [*WRONG_IDS.split(), "two words", "o/n@a b", "x" * 97, "", "  "])
def test_what_is_neither_a_path_nor_a_hub_id_is_refused(inside: Path, text: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse_source(text)
    assert caught.value.exit_code == 3
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.pth", "a.ckpt"])
def test_a_pickle_is_refused_with_a_conversion_command(inside: Path, name: str) -> None:
    (inside / name).touch()
    with pytest.raises(CheckpointError, match="pickles") as caught:
        parse_source(name)
    assert caught.value.exit_code == 5
    assert "weights_only=True" in caught.value.remedy
    assert f"'./{name}'" in caught.value.remedy


def test_gguf_other_files_and_dangling_links_are_refused(inside: Path) -> None:
    (inside / "a.gguf").touch()
    (inside / INDEX).touch()
    (inside / "link").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="GGUF"):
        parse_source("a.gguf")
    with pytest.raises(SourceError, match=r"not a \.safetensors file"):
        parse_source(INDEX)
    with pytest.raises(SourceError, match="dangling link"):
        parse_source("link")


def test_parsing_a_source_imports_neither_torch_nor_huggingface_hub() -> None:
    code = (
        "import sys; from drift_merge.storage import hub, sources; "
        "sources.parse_source('org/name'); "
        "print([m for m in ('torch', 'numpy', 'huggingface_hub') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_an_index_gives_its_weight_map_and_each_shard_once() -> None:
    data = b'{"metadata": {"total_size": -1}, "weight_map": {"b": "2.safetensors", '
    data += b'"a": "1.safetensors", "c": "sub/2.safetensors", "d": "2.safetensors"}}'
    weight_map = parse_index(data, where="X")
    assert list(weight_map) == ["b", "a", "c", "d"]
    assert shard_names(weight_map) == ["1.safetensors", "2.safetensors", "sub/2.safetensors"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "no weight_map"),
        (b'{"weight_map": []}', "no weight_map"),
        (b'{"weight_map": {}}', "empty weight_map"),
        (b'{"weight_map": {"a": 1}}', "expected a file name"),
        (b'{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}', "lists 'a' twice"),
        (b'{"weight_map": {"a": "pytorch_model.bin"}}', r"expected a \.safetensors file"),
        (b'{"weight_map": {"a": "a\\n.safetensors"}}', "unprintable"),
    ],
)
def test_a_broken_index_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_index(data, where="org/name: index")
    assert caught.value.message.startswith("org/name: index")


@pytest.mark.parametrize(
    "shard",
    ["../x", "a/../../x", "/etc/x", "a//x", "./x", "..\\x", "C:/x", "C:x", "\\\\host\\x", "", "a/"],
)
def test_an_index_that_leaves_its_directory_is_refused(shard: str) -> None:
    text = repr(f"{shard}.safetensors" if shard and not shard.endswith("/") else shard)
    data = f'{{"weight_map": {{"a": {text}}}}}'.replace("'", '"').encode()
    with pytest.raises(CheckpointError, match="not a plain path below its own directory"):
        parse_index(data, where="X")


def find(*files: str) -> list[str]:
    return find_weights(files, where="org/name", directory="name")


def test_weights_are_found_by_index_then_single_file_then_all_files() -> None:
    assert find(INDEX, "model-1.safetensors", "consolidated.safetensors") == [INDEX]
    assert find(SINGLE, "model.fp16.safetensors", "adapter_config.json") == [SINGLE]
    assert find("b.safetensors", "a.safetensors", "x/c.safetensors") == [
        "a.safetensors",
        "b.safetensors",
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no weights"),
        (["config.json"], "holds no weights"),
        ([SINGLE, INDEX], "both"),
        (["unet/model.safetensors"], "in folders only"),
        (["adapter_config.json", "adapter_model.safetensors"], "LoRA adapter"),
        (["prior.json", "prior.safetensors"], "drift prior"),
        (["m.Q4_K_M.gguf"], "GGUF"),
        ([f"pytorch_model-{i}.bin" for i in range(5)], r"pickles \(.*0.bin, .*, \.\.\. 2 more"),
    ],
)
def test_a_directory_without_readable_weights_is_refused(files: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        find(*files)
    assert caught.value.remedy


def test_a_shard_that_the_index_names_must_be_there() -> None:
    require_shards(["a"], ["a", "b"], where="X")
    with pytest.raises(CheckpointError, match=r"X names 1 missing shard\(s\): c"):
        require_shards(["a", "c"], ["a", "b"], where="X")


def test_sidecars_are_all_files_but_weights_their_copies_and_hidden_ones() -> None:
    kept = ["config.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "code/modeling.py"]
    kept += ["spk_dict.pt", "video_preprocessor_config.json", "assets/demo.png", "README.md"]
    kept += ["adapter_model.safetensors", "vocoder/model.safetensors", "flow.pt", "m.nemo"]
    left = ["model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"]
    left += ["original/params.json", "onnx/config.json", "tf_model.h5", "m.gguf", "optimizer.pt"]
    left += [".gitattributes", "code/.DS_Store", ".cache/x.json", "__pycache__/modeling.pyc"]
    left += ["checkpoint-9/model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"]
    left += ["model-00001-of-00009.safetensors", "wandb/debug.log", "a/runs/x", "latest"]
    assert [name for name in kept if not is_sidecar(name)] == []
    assert [name for name in left if is_sidecar(name)] == []


@pytest.mark.parametrize(
    ("text", "is_likely"),
    [
        ("merged", True),
        ("merged@main", True),
        ("here/merged", True),
        ("Qwen/Qwen2-7B", False),
        ("here", False),  # it is there
    ],
)
def test_a_hub_id_that_may_be_a_mistyped_path_is_known_as_such(
    text: str, is_likely: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert mistaken_path(text) == (str(tmp_path / text) if is_likely else "")


@given(st.sets(st.integers(1, 6)), st.booleans(), st.booleans())
def test_the_files_of_one_model_are_a_whole_set_or_an_error(
    numbers: set[int], consolidated: bool, adapter: bool
) -> None:
    """Of a set of six, however many are there; beside another format and an adapter."""
    shards = [f"model-{number:05d}-of-00006.safetensors" for number in sorted(numbers)]
    others = ["consolidated.safetensors"] * consolidated + ["adapter_model.safetensors"] * adapter
    try:
        found = find_weights([*shards, *others, "config.json"], where="m", directory="m")
    except CheckpointError:
        found = []
    whole = shards if len(shards) == 6 else []
    assert found == (whole if shards else ["consolidated.safetensors"] * consolidated)
