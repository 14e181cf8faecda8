"""The files that name tokens: what each says, and what two of them may not say."""

import json
import sys
from base64 import b64encode

import pytest

from drift_merge.errors import AlignmentError, CheckpointError
from drift_merge.names.tokens import formats
from drift_merge.names.tokens.files import TOKEN_FILES, Vocabularies

BASE = {"a": 0, "b": 1}


def fast_tokenizer(added=("<think>",)):
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel(BASE, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in added])
    return tokenizer.to_str().encode()


def decoder(tokens):
    listed = {str(row): {"content": token, "special": True} for token, row in tokens.items()}
    return json.dumps(
        {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": listed}
    ).encode()


def pieces(*words):
    """A sentencepiece model by its definition: per piece a string, a score and a type."""
    data = b""
    for word in words:
        text = word.encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x00\x80\xbf" + b"\x18\x01"
        data += b"\x0a" + bytes([len(piece)]) + piece
    return data + b"\x12\x02\x08\x07"  # field 2: how it was trained


def lines(*tokens):
    return b"".join(b64encode(t) + f" {i}\n".encode() for i, t in enumerate(tokens))


def read(tmp_path, **files):
    """Write files (`__` for a dot) and read the vocabulary of the folder."""
    for name, data in files.items():
        path = tmp_path / name.replace("__", ".")
        path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    found = {name: tmp_path / name for name in TOKEN_FILES if (tmp_path / name).exists()}
    return Vocabularies().read(found, "org/model")


def test_all_three_sources_are_joined(tmp_path):
    found = read(
        tmp_path,
        tokenizer__json=fast_tokenizer(),
        added_tokens__json={"<think>": 2, "[PAD]": 3},
        tokenizer_config__json=decoder({"[PAD]": 3, "<image>": 4}),
    )
    assert found == BASE | {"<think>": 2, "[PAD]": 3, "<image>": 4}


def test_a_tokenizer_config_without_a_decoder_adds_nothing(tmp_path):
    found = read(
        tmp_path, tokenizer__json=fast_tokenizer(), tokenizer_config__json={"model_max_length": 8}
    )
    assert found == BASE | {"<think>": 2}


@pytest.mark.parametrize(
    ("files", "both", "said"),
    [
        (
            {"added_tokens__json": {"[PAD]": 2}},
            ("tokenizer.json", "added_tokens.json"),
            "id 2 is '<think>'",
        ),
        (
            {"tokenizer_config__json": decoder({"<think>": 5})},
            ("tokenizer.json", "tokenizer_config.json"),
            "'<think>' has id 2",
        ),
        (
            {
                "added_tokens__json": {"<image>": 7},
                "tokenizer_config__json": decoder({"<video>": 7}),
            },
            ("added_tokens.json", "tokenizer_config.json"),
            "id 7 is '<image>'",
        ),
    ],
)
def test_files_that_contradict_each_other_are_an_error_that_names_both(tmp_path, files, both, said):
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, tokenizer__json=fast_tokenizer(), **files)
    message = str(caught.value)
    assert said in message
    assert message.startswith("org/model: ")
    assert all(name in message for name in both)


def test_added_tokens_that_the_library_reads_under_other_ids_are_an_error(tmp_path):
    text = json.loads(fast_tokenizer())
    text["added_tokens"][0]["id"] = 9  # the library gives the next free id, 2
    with pytest.raises(CheckpointError, match=r"'<think>' has id 2 in tokenizer.json, but 9 in"):
        read(tmp_path, tokenizer__json=text)


def test_a_placeholder_of_a_slow_tokenizer_may_be_renamed_and_of_a_fast_one_not(tmp_path):
    found = read(
        tmp_path,
        tokenizer__model=pieces("<unk>", "x", "[UNUSED_TOKEN_1]"),
        tokenizer_config__json=decoder({"<|im_start|>": 2, "<img>": 3}),
    )
    assert found == {"<unk>": 0, "x": 1, "<|im_start|>": 2, "<img>": 3}
    with pytest.raises(CheckpointError, match="id 2 is '<unused0>'"):
        read(
            tmp_path,
            tokenizer__json=fast_tokenizer(["<unused0>"]),
            tokenizer_config__json=decoder({"<|im_start|>": 2}),
        )


def test_tokenizer_json_comes_before_the_files_of_slow_tokenizers(tmp_path):
    found = read(tmp_path, tokenizer__json=fast_tokenizer([]), tokenizer__model=pieces("b", "a"))
    assert found == BASE


def test_every_format_gives_one_token_one_string(tmp_path):
    space, umlaut = b" the", "\u00fc".encode()
    assert formats.tiktoken(lines(b"a", space, umlaut)) == {
        "a": 0,
        "\u0120the": 1,
        "\u00c3\u00bc": 2,
    }
    assert formats.tokenizer_model(lines(b"a", space)) == {"a": 0, "\u0120the": 1}
    assert formats.tokenizer_model(pieces("<s>", "\u2581the")) == {"<s>": 0, "\u2581the": 1}
    vocab = [
        {"rank": i, "token_bytes": b64encode(t).decode(), "token_str": None}
        for i, t in enumerate((b"a", space, b"beyond"))
    ]
    tekken = {
        "config": {"default_num_special_tokens": 3, "default_vocab_size": 5},
        "special_tokens": [{"rank": 0, "token_str": "<unk>"}, {"rank": 1, "token_str": "[IMG]"}],
        "vocab": vocab,
    }
    found = formats.tekken(json.dumps(tekken).encode())
    assert found == {"<unk>": 0, "[IMG]": 1, "a": 3, "\u0120the": 4}
    assert read(tmp_path, vocab__json={"a": 0, "\u0120the": 1}) == {"a": 0, "\u0120the": 1}


def test_sentencepiece_reads_real_lengths():
    long = "\u2581" + "x" * 300
    text = long.encode()
    size = bytes([len(text) & 0x7F | 0x80, len(text) >> 7])
    piece = b"\x0a" + size + text
    whole = b"\x0a" + bytes([len(piece) & 0x7F | 0x80, len(piece) >> 7]) + piece
    assert formats.sentencepiece(whole + pieces("b")) == {long: 0, "b": 1}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.model", b"\n\x05"),
        ("tokenizer.model", b""),
        ("tokenizer.model", b"\x0a\x80"),
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": 3}'),
        ("tokenizer.json", b"\x00"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ("vocab.json", b"[1]"),
        ("vocab.json", b'{"a": "x"}'),
        ("added_tokens.json", b'{"a": true}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"3": {}}}'),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, name, data):
    (tmp_path / "tokenizer.json").write_bytes(fast_tokenizer())
    if name in ("vocab.json", "tokenizer.model"):
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} is not a") as caught:
        read(tmp_path)
    assert "--modules attn,mlp,norm" in caught.value.remedy


def test_a_folder_without_any_vocabulary_says_what_was_looked_for(tmp_path):
    with pytest.raises(AlignmentError, match=r"org/model has no file .*tokenizer\.json, tekken"):
        read(tmp_path, added_tokens__json={"<image>": 0})


def test_pieces_that_the_tokenizer_numbers_otherwise_are_refused(tmp_path):
    with pytest.raises(AlignmentError, match="XLMRobertaTokenizer"):
        read(
            tmp_path,
            tokenizer__model=pieces("<unk>", "a"),
            tokenizer_config__json={"tokenizer_class": "XLMRobertaTokenizer"},
        )


def test_files_of_equal_bytes_are_one_vocabulary_and_others_are_not(tmp_path):
    known, found = Vocabularies(), []
    for folder, added in (("x", ["<think>"]), ("y", ["<think>"]), ("z", ["<other>"])):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "tokenizer.json"
        path.write_bytes(fast_tokenizer(added))
        found.append(known.read({"tokenizer.json": path}, folder))
    assert found[0] is found[1]
    assert found[2] == BASE | {"<other>": 2}


def test_a_missing_library_is_named_with_the_extra(tmp_path, monkeypatch):
    data = fast_tokenizer()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(AlignmentError) as caught:
        read(tmp_path, tokenizer__json=data)
    assert caught.value.remedy == "pip install 'drift_merge[tokenizers]'"
