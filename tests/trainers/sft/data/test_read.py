"""Files and folders as people have them; pictures are opened before anything is trained."""

import json

import pytest

from drift_merge.errors import RecipeError, SourceError
from drift_merge.trainers.sft.data.pictures import check_pictures
from drift_merge.trainers.sft.data.read import fingerprint_of, read_examples
from tests.trainers.sft.pictures import png

GOOD = {"image": "one.png", "question": "Q", "answer": "A"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "one.png").write_bytes(png())
    return tmp_path


def write(folder, *lines):
    path = folder / "data.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts))
    return path


def answers(path):
    return [example.turns[-1].text for example in read_examples(path)]


def test_lines_and_a_list_are_read_with_their_places(folder):
    rows = [GOOD, GOOD | {"answer": "B", "id": 7}]
    path = write(folder, rows[0], "", rows[1])
    assert answers(path) == ["A", "B"]
    assert [e.where.rpartition(", ")[2] for e in read_examples(path)] == ["line 1", "line 3"]
    assert read_examples(path).unused() == ["id"]
    listed = folder / "data.json"
    listed.write_text(json.dumps(rows))
    assert answers(listed) == ["A", "B"]
    assert read_examples(listed)[1].where.endswith("item 2")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2: this is not an object"),
        ({}, "line 2: there is"),
    ],
)
def test_a_bad_line_is_named_with_its_number(folder, line, words):
    with pytest.raises(RecipeError, match=words):
        read_examples(write(folder, GOOD, line))


def test_an_empty_or_absent_file_is_refused(folder):
    with pytest.raises(RecipeError, match="holds no example"):
        read_examples(write(folder, ""))
    with pytest.raises(RecipeError, match="is not JSON"):
        read_examples(write(folder, "[1,"))
    with pytest.raises(SourceError, match="cannot be read"):
        read_examples(folder / "absent.jsonl")


def test_a_text_may_hold_what_python_takes_for_the_end_of_a_line_and_a_file_a_bom(folder):
    texts = ["one\u2028two", "one\u0085two", "one\x0ctwo"]
    lines = [json.dumps(GOOD | {"answer": text}, ensure_ascii=False) for text in texts]
    for ending in ("\n", "\r\n"):
        path = folder / "data.jsonl"
        path.write_bytes(ending.join([*lines, ""]).encode("utf-8-sig"))
        assert answers(path) == [json.loads(line)["answer"] for line in lines]


def test_a_missing_image_names_the_line_and_the_folder_that_was_looked_in(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "data.jsonl").write_text(json.dumps(GOOD | {"image": "no.png"}))
    examples = read_examples(type(folder)("data.jsonl"))
    with pytest.raises(
        SourceError, match=r"data\.jsonl, line 1: there is no image no\.png"
    ) as raised:
        check_pictures(examples)
    assert str(folder.resolve()) in raised.value.remedy


@pytest.mark.parametrize("spoil", [lambda data: b"no image", lambda data: data[:-30]])
def test_a_broken_image_is_named_with_its_line(folder, spoil):
    pytest.importorskip("PIL.Image")
    (folder / "two.png").write_bytes(spoil(png(size=(40, 40))))
    examples = read_examples(write(folder, GOOD, GOOD | {"image": "two.png"}))
    with pytest.raises(SourceError, match=r"line 2: .*two\.png cannot be opened as an image"):
        check_pictures(examples)


def test_a_changed_picture_changes_the_fingerprint_and_a_name_alone_does_not(folder):
    path = write(folder, GOOD, GOOD)
    before, count, _ = check_pictures(read_examples(path))
    assert count == 2
    (folder / "two.png").write_bytes(png())
    renamed = write(folder, GOOD, GOOD | {"image": "two.png"})
    assert check_pictures(read_examples(renamed))[0] == before
    (folder / "two.png").write_bytes(png((0, 0, 255)))
    assert check_pictures(read_examples(renamed))[0] != before


def test_a_folder_has_one_fingerprint(folder):
    before = fingerprint_of(folder)
    assert fingerprint_of(folder) == before
    (folder / "one.png").write_bytes(png((0, 0, 255)))
    assert fingerprint_of(folder) != before


@pytest.mark.engines
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["parquet", "saved", "splits", "pictures", "json folder"])
def test_parquet_and_folders_hold_the_same_examples(folder, monkeypatch, kind):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
    rows = [{"messages": [asked, said], "images": [{"bytes": png(), "path": None}]}] * 3
    features = datasets.Features(
        messages=[
            {
                "role": datasets.Value("string"),
                "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
            }
        ],
        images=datasets.List(datasets.Image()),
    )
    found = datasets.Dataset.from_list(rows, features=features)
    path = folder / "set"
    if kind == "parquet":
        path = folder / "set.parquet"
        found.to_parquet(path)
    elif kind == "saved":
        found.save_to_disk(path)
    elif kind == "splits":
        datasets.DatasetDict(train=found, test=found.select([0])).save_to_disk(path)
    elif kind == "pictures":
        (path / "data").mkdir(parents=True)
        found.to_parquet(path / "data" / "train-00000-of-00001.parquet")
    else:
        path.mkdir()
        (path / "train.jsonl").write_text(json.dumps(GOOD) + "\n")
        (path / "one.png").write_bytes(png())
        rows = rows[:1]
    examples = read_examples(path)
    assert [example.turns[-1].text for example in examples] == ["A"] * len(rows)
    _, count, _ = check_pictures(examples)
    assert count == len(rows)
    assert examples[0].turns[0].text == "Q"


@pytest.mark.engines
@pytest.mark.filterwarnings("default")
def test_a_data_set_of_several_splits_without_train_is_refused(folder, monkeypatch):
    datasets = pytest.importorskip("datasets")
    found = datasets.Dataset.from_list([{"question": "Q", "answer": "A"}])
    datasets.DatasetDict(one=found, two=found).save_to_disk(folder / "set")
    with pytest.raises(RecipeError, match="the splits one, two"):
        read_examples(folder / "set")
    (folder / "x.parquet").write_bytes(b"x")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    with pytest.raises(SourceError, match="cannot be read as a data set"):
        read_examples(folder / "x.parquet")
