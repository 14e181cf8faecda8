"""PNG files: the same for the same numbers, and drawn whatever is missing."""

import struct
import sys

import pytest

from drift_merge.errors import RecipeError
from drift_merge.reports.figures import KINDS, TensorFigures
from drift_merge.reports.pictures import curves, has_matplotlib, heat_maps
from drift_merge.reports.places import LANGUAGE

pytestmark = pytest.mark.filterwarnings("default")  # matplotlib's own, of other versions


def tensor(layer, name="mlp.up_proj", norm=1.0, cosine=0.5):
    label = f"layers.{layer}.{name}.weight"
    return TensorFigures(label, LANGUAGE, "mlp", (4, 4), norm, 1.0, 2.0, cosine)


TOWERS = {
    "usual": [tensor(n, name, n + 1.0) for n in range(3) for name in ("mlp.up_proj", "mlp.x")],
    "one tensor": [tensor(0)],
    "no cosine": [tensor(0, cosine=None), tensor(1, cosine=None)],
    "unknown": [tensor(0, norm=None, cosine=None)],
    "no layers": [],
    "94 layers": [tensor(n, norm=float(n)) for n in range(94)],
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "one tensor" else pytest.mark.slow) for n in TOWERS]
)
def test_heat_maps_are_drawn_and_the_same_again(name):
    pytest.importorskip("matplotlib")
    one = heat_maps(TOWERS[name], title=name)
    assert one.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", one[16:24])
    assert 600 < width < 4000
    assert 200 < height < 1500
    assert one == heat_maps(TOWERS[name], title=name)


@pytest.mark.slow
def test_curves_are_drawn_of_nothing_and_of_gaps():
    pytest.importorskip("matplotlib")
    panel = {"key": "loss", "label": "Loss", "unit": "loss", "missing": ""}
    series = [{"name": "all", "points": [[1, 2.0], [2, None], [3, 1.0]]}]
    assert curves([panel | {"series": series}], title="t", x_label="step").startswith(b"\x89PNG")
    assert curves([], title="t", x_label="step").startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not has_matplotlib()
    with pytest.raises(RecipeError) as error:
        heat_maps(TOWERS["usual"], title="t", kinds=KINDS)
    assert "drift_merge[report]" in error.value.remedy
