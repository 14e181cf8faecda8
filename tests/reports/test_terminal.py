"""Heat maps of the terminal: golden text in its three forms, 80 columns at most."""

import io

import numpy as np
import pytest
from rich.console import Console

from drift_merge.reports.figures import KINDS, OF_MERGES, TensorFigures
from drift_merge.reports.places import LANGUAGE
from drift_merge.reports.terminal import draw, lay_out
from tests.golden_files import compare_with_golden

KIND = KINDS[0]
NAMES = {
    **{f"self_attn.{p}_proj.weight": (64, 64) for p in "qkvo"},
    "self_attn.q_proj.bias": (64,),
    **{f"mlp.{p}_proj.weight": (96, 64) for p in ("gate", "up", "down")},
    "input_layernorm.weight": (64,),
}


def tensor(name, shape, norm, cosine=0.9):
    return TensorFigures(name, LANGUAGE, "mlp", shape, norm, 1.0, 1.0, cosine)


def tower(layers, unknown=()):
    """Norms that grow with the layer, exact in binary."""
    return [
        tensor(
            f"layers.{layer}.{name}",
            shape,
            None if (layer, name) in unknown else (layer + 1 + number / 4) / 64,
        )
        for layer in range(layers)
        for number, (name, shape) in enumerate(NAMES.items())
    ]


def drawn(tensors, *, encoding="utf-8", kind=KIND, **console):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    screen = Console(file=file, width=80, force_terminal=True, highlight=False, **console)
    found = lay_out(tensors, kind)
    if found is None:
        return ""
    for line in draw(found, kind, screen):
        screen.print(line, no_wrap=True, soft_wrap=True)
    return raw.getvalue().decode(encoding)


FORMS = {
    "color": {"color_system": "truecolor", "no_color": False},
    "no-color": {"color_system": "truecolor", "no_color": True},
    "ascii": {"color_system": None, "encoding": "ascii"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layers", [1, 28, 94])
def test_the_map_is_the_golden_text(form, layers, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    unknown = {(0, "mlp.up_proj.weight")} if layers == 28 else ()
    found = drawn(tower(layers, unknown), **FORMS[form])
    compare_with_golden(f"terminal/{layers}-layers-{form}.txt", found)
    if form != "color":
        assert max(map(len, found.splitlines())) <= 80
        assert "\x1b" not in found
    if form == "ascii":
        assert found.isascii()


def test_no_layer_and_nothing_known_draw_nothing():
    assert drawn([tensor("embed_tokens.weight", (4, 4), 1.0)]) == ""
    assert drawn(tower(2), kind=OF_MERGES[0]) == ""
    assert drawn([]) == ""


def test_many_kinds_are_shown_by_module_and_rows_of_a_column_add_up():
    tensors = [
        tensor(f"layers.{layer}.mlp.experts.0.part{n}.weight", (8, 8), 0.5)
        for layer in range(200)
        for n in range(20)
    ]
    found = lay_out(tensors, KIND)
    assert [row[0] for row in found.rows] == ["mlp"]
    assert found.by == 3
    # sqrt(60 * 0.25) / sqrt(60)
    assert found.rows[0][1][0] == pytest.approx(np.sqrt(60 * 0.25) / np.sqrt(60))
    text = drawn(tensors, color_system=None)
    assert "everywhere" in text
    assert "3 layers a column" in text
