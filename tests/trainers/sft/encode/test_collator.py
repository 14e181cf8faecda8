"""Batches: labels on answers alone, wherever the processor has put the tokens of images."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.errors import CheckpointError, RecipeError, SourceError
from drift_merge.trainers.sft.data.example import Example, Picture, Turn
from drift_merge.trainers.sft.encode.collator import IGNORED, Collator
from drift_merge.trainers.sft.encode.places import places_in
from drift_merge.trainers.wiring import optional

PAD, IMAGE = 0, 1


class WordProcessor:
    """One token per word; "<image>" becomes `size` tokens, the size of its image."""

    image_token_id = IMAGE

    def __init__(self, *, merges=False, is_flat=False):
        self.words = {"<pad>": PAD, "<image>": IMAGE}
        self.merges = merges  # ":" and what follows it become one token
        self.is_flat = is_flat
        self.tokenizer = lambda text, **_: {"input_ids": self.encode(text)}
        self.num_images = 0

    def encode(self, text):
        return [self.words.setdefault(word, len(self.words)) for word in text.split()]

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
        assert not tokenize
        text = ""
        for message in messages:
            text += f"{message['role']} : "
            for part in message["content"]:
                text += "<image> " if part["type"] == "image" else part["text"] + " "
            text += "</s> " if message["role"] == "assistant" else ""
        text += "assistant : " if add_generation_prompt else ""
        return text.replace(": ", ":") if self.merges else text

    def __call__(self, *, text, padding, return_tensors, images=()):
        assert padding
        if self.is_flat != all(isinstance(some, int) for some in images) and images:
            raise ValueError("images are nested otherwise")
        sizes = iter(images if self.is_flat else [one for some in images for one in some])
        rows = []
        for one in text:
            row = []
            for token in self.encode(one):
                row += [IMAGE] * next(sizes) if token == IMAGE else [token]
            rows.append(row)
        self.num_images += len(images)
        width = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.ones(len(images))}

    def spell(self, ids):
        names = {number: word for word, number in self.words.items()}
        return " ".join(names[int(i)] for i in ids)


def example(*pairs, images=((3,),)):
    turns = []
    for number, (asked, answer) in enumerate(pairs):
        sizes = images[number] if number < len(images) else ()
        pictures = [Picture(None, bytes(size)) for size in sizes]
        turns += [Turn("user", (*pictures, asked), False), Turn("assistant", (answer,), True)]
    return Example("data.jsonl, line 1", tuple(turns))


def collate(processor, *examples, **options):
    open_image = lambda picture, where: len(picture.content)  # noqa: E731
    return Collator(processor, open_image=open_image, **options)(examples)


def learned(processor, batch):
    return [processor.spell(row[row != IGNORED]) for row in batch["labels"]]


def test_labels_are_the_answers_and_their_ends_and_nothing_else():
    processor = WordProcessor()
    one = example(("what is it", "a cat"), ("who", "a cat"), images=((3, 1), (5,)))
    two = example(("who", "it is a big dog"), images=())
    batch = collate(processor, one, two)
    assert learned(processor, batch) == ["a cat </s> a cat </s>", "it is a big dog </s>"]
    inputs, labels = batch["input_ids"], batch["labels"]
    assert torch.equal(inputs[labels != IGNORED], labels[labels != IGNORED])
    assert (labels[batch["attention_mask"] == 0] == IGNORED).all()


def test_an_answer_that_repeats_the_question_is_learned_once():
    processor = WordProcessor()
    batch = collate(processor, example(("a cat", "a cat a cat")))
    assert learned(processor, batch) == ["a cat a cat </s>"]
    begin = int((batch["labels"][0] != IGNORED).nonzero()[0])
    assert processor.spell(batch["input_ids"][0][begin - 2 : begin]) == "assistant :"


def test_a_question_that_looks_like_an_answer_is_not_learned():
    processor = WordProcessor()
    asked = "assistant : a cat </s> user : why"
    batch = collate(processor, example((asked, "a cat"), ("x", "a cat"), images=((2,), (4,))))
    width = batch["input_ids"].shape[1]
    places = (batch["labels"][0] != IGNORED).nonzero().flatten().tolist()
    # user : 2 images, 8 words, assistant : | a cat </s> | user : 4 images, x, assistant :
    assert places == [14, 15, 16, width - 3, width - 2, width - 1]


def test_a_token_that_joins_the_prompt_and_the_answer_is_learned():
    processor = WordProcessor(merges=True)
    assert learned(processor, collate(processor, example(("who", "me")))) == [":me </s>"]


@pytest.mark.parametrize("is_flat", [True, False])
def test_images_are_given_as_the_processor_takes_them_and_once(is_flat):
    processor = WordProcessor(is_flat=is_flat)
    batch = collate(processor, example(("a", "b")), example(("a", "c"), images=((1,),)))
    assert learned(processor, batch) == ["b </s>", "c </s>"]
    assert processor.num_images == 2


def test_text_alone_has_no_images():
    processor = WordProcessor()
    assert learned(processor, collate(processor, example(("a", "b"), images=()))) == ["b </s>"]


def test_max_length_cuts_the_end_of_answers_alone():
    processor = WordProcessor()
    one = example(("what", "one two three four"))  # 8 tokens before the answer
    batch = collate(processor, one, max_length=10)
    assert learned(processor, batch) == ["one two"]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (1, 10)
    for limit, what in ((8, "every answer"), (4, "an image")):
        with pytest.raises(RecipeError, match=f"line 1: .* would cut {what} off") as raised:
            collate(processor, one, max_length=limit)
        assert "--max-length 13" in raised.value.remedy


def test_a_processor_that_refuses_is_named_with_the_lines():
    processor = WordProcessor()
    processor.encode = lambda text: 1 / 0
    with pytest.raises(CheckpointError, match="line 1: the model's processor refuses"):
        collate(processor, example(("a", "b")))


def test_a_file_that_is_no_image_is_named(tmp_path):
    pytest.importorskip("PIL.Image")
    (tmp_path / "a.png").write_text("no image")
    asked = Turn("user", (Picture(tmp_path / "a.png"), "q"), False)
    broken = Example("line 9", (asked, Turn("assistant", ("a",), True)))
    with pytest.raises(SourceError, match=r"line 9: .*a\.png cannot be opened"):
        Collator(WordProcessor())([broken])


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    def refuse(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("drift_merge.trainers.wiring.import_module", refuse)
    with pytest.raises(RecipeError, match="datasets") as raised:
        optional("datasets", install="pip install 'drift_merge[data]'")
    assert "drift_merge[data]" in raised.value.remedy


TURNS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 6), max_size=2),  # sizes of images
        st.lists(st.sampled_from("abc"), max_size=4),  # what is asked
        st.lists(st.sampled_from("abc"), min_size=1, max_size=4),  # what is answered
    ),
    min_size=1,
    max_size=4,
)


@given(TURNS)
def test_answers_are_found_wherever_images_moved_them(turns):
    head, end, image = "H", "E", "I"
    text, expanded, ranges, wanted = [], [], [], []
    for sizes, asked, answer in turns:
        text += [image] * len(sizes) + asked + [head]
        expanded += [image] * sum(sizes) + asked + [head]
        ranges.append((len(text), len(text) + len(answer) + 1))
        wanted.append((len(expanded), len(expanded) + len(answer) + 1))
        text += [*answer, end]
        expanded += [*answer, end]
    numbers = {word: number for number, word in enumerate("HEIabc")}
    found = places_in([numbers[w] for w in expanded], [numbers[w] for w in text], ranges, "line 1")
    assert found == wanted


def test_tokens_that_are_not_there_are_an_error():
    with pytest.raises(CheckpointError, match="line 1: the tokens of the answer"):
        places_in([5, 6, 7], [5, 8, 7], [(1, 2)], "line 1")
