"""Examples for fine-tuning: the file is checked, and only answers are learned."""

import json
from pathlib import Path

import pytest
import torch

from drift_merge.errors import CheckpointError, RecipeError, SourceError
from drift_merge.trainers.sft import examples as ex
from drift_merge.trainers.sft.examples import IGNORED, Collator, Example, read_examples

PAD, IMAGE = 0, 1


class WordProcessor:
    """One token per word, "<image>" twice per image; words are numbered as they come."""

    def __init__(self, *, merges=False):
        self.words = {"<pad>": PAD, "<image>": IMAGE}
        self.merges = merges  # ":" and what follows it become one token

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
        assert not tokenize
        text = ""
        for message in messages:
            text += f"{message['role']} : "
            for part in message["content"]:
                text += "<image> <image> " if part["type"] == "image" else part["text"] + " "
        text += "assistant : " if add_generation_prompt else "</s>"
        return text.replace(": ", ":") if self.merges else text

    def __call__(self, *, text, images, padding, return_tensors):
        assert padding
        assert len(text) == len(images)
        rows = [[self.words.setdefault(w, len(self.words)) for w in t.split()] for t in text]
        width = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def spell(self, ids):
        names = {number: word for word, number in self.words.items()}
        return " ".join(names[int(i)] for i in ids)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(ex, "_open_image", lambda path: path)  # Pillow is optional
    return tmp_path


def collate(processor, pictures, *pairs):
    given = [Example(pictures / f"{n}.png", q, a) for n, (q, a) in zip("ab", pairs, strict=False)]
    return Collator(processor)(given)


def test_labels_are_the_answer_and_its_end_and_nothing_else(pictures):
    processor = WordProcessor()
    batch = collate(processor, pictures, ("what is it", "a cat"), ("who", "it is a big dog"))
    learned = [processor.spell(row[row != IGNORED]) for row in batch["labels"]]
    assert learned == ["a cat </s>", "it is a big dog </s>"]
    inputs, labels = batch["input_ids"], batch["labels"]
    assert torch.equal(inputs[labels != IGNORED], labels[labels != IGNORED])


def test_an_answer_that_repeats_the_question_is_learned_whole(pictures):
    processor = WordProcessor()
    batch = collate(processor, pictures, ("a cat", "a cat a cat"))
    assert processor.spell(batch["labels"][0][batch["labels"][0] != IGNORED]) == "a cat a cat </s>"


def test_a_token_that_joins_the_prompt_and_the_answer_is_learned(pictures):
    processor = WordProcessor(merges=True)
    batch = collate(processor, pictures, ("who", "me"))
    assert processor.spell(batch["labels"][0][batch["labels"][0] != IGNORED]) == ":me </s>"


def test_padding_is_never_learned(pictures):
    batch = collate(WordProcessor(), pictures, ("q", "short"), ("q", "a much longer answer"))
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_a_template_without_the_answer_is_refused(pictures):
    processor = WordProcessor()
    processor.apply_chat_template = lambda *_, **__: "always this"
    with pytest.raises(CheckpointError, match="leaves the answer out"):
        collate(processor, pictures, ("q", "a"))


def test_a_file_that_is_no_image_is_named(tmp_path):
    pytest.importorskip("PIL.Image")
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(SourceError, match=r"a\.png cannot be opened"):
        Collator(WordProcessor())([Example(tmp_path / "a.png", "q", "a")])


def write(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


GOOD = {"image": "one.png", "question": "Q", "answer": "A"}


def test_images_are_found_beside_the_file(tmp_path):
    (tmp_path / "one.png").touch()
    path = write(tmp_path, GOOD, "", GOOD | {"answer": "B", "id": 7})
    assert read_examples(path) == [
        Example(tmp_path / "one.png", "Q", "A"),
        Example(tmp_path / "one.png", "Q", "B"),
    ]


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        ("{", RecipeError, "line 2 is not JSON"),
        ("[]", RecipeError, "line 2 is not an object"),
        (GOOD | {"answer": 3}, RecipeError, "line 2: answer is missing or no text"),
        ({"image": "one.png"}, RecipeError, "question and answer are missing"),
        (GOOD | {"question": " "}, RecipeError, "question is missing"),
        (GOOD | {"image": "two.png"}, SourceError, "line 2: there is no image"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, error, words):
    (tmp_path / "one.png").touch()
    with pytest.raises(error, match=words):
        read_examples(write(tmp_path, GOOD, line))


def test_an_empty_or_absent_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="holds no example"):
        read_examples(write(tmp_path, ""))
    with pytest.raises(SourceError, match="cannot be read"):
        read_examples(tmp_path / "absent.jsonl")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    def refuse(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("drift_merge.trainers.wiring.import_module", refuse)
    with pytest.raises(RecipeError, match=r"drift_merge\[train\]") as raised:
        ex.load_processor(tmp_path, "mllm")
    assert "transformers" in raised.value.message


def test_a_text_may_hold_what_python_takes_for_the_end_of_a_line_and_a_file_a_bom(tmp_path):
    (tmp_path / "1.png").touch()
    texts = ["one\u2028two", "one\u0085two", "one\x0ctwo"]
    lines = [
        json.dumps({"image": "1.png", "question": text, "answer": text}, ensure_ascii=False)
        for text in texts
    ]
    for ending in ("\n", "\r\n"):
        path = tmp_path / "data.jsonl"
        path.write_bytes(ending.join([*lines, ""]).encode("utf-8-sig"))
        found = read_examples(path)
        wanted = [json.loads(line)["question"] for line in lines]
        assert [example.question for example in found] == wanted


def test_a_missing_image_names_the_folder_that_paths_are_relative_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("data.jsonl")
    path.write_text('{"image": "no.png", "question": "a", "answer": "b"}\n')
    with pytest.raises(SourceError, match=r"no image no\.png") as raised:
        read_examples(path)
    assert raised.value.remedy.endswith(f"folder of data.jsonl: {tmp_path.resolve()}")
