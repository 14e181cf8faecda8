"""Every kind of page in a real browser, at both widths and in both colour schemes.

apt-get install chromium chromium-driver
SCREENSHOTS=shots python -m pytest -m browser        # keeps a picture of each, to be looked at

Those of searches are in `test_searches`.
"""

import json
import re

import numpy as np
import pytest

from drift_merge.merges.manifest import open_merge
from drift_merge.priors.manifest import open_prior
from drift_merge.reports.pages.merges import describe_comparison, describe_merge
from drift_merge.reports.pages.page import data_of, to_html
from drift_merge.reports.pages.priors import describe_prior
from drift_merge.reports.pages.runs import describe_run, read_history
from drift_merge.reports.pages.sweeps import describe_sweep, open_sweep
from tests import checkpoints as c
from tests.reports.browser.checks import check_page
from tests.reports.browser.chrome import SCHEMES, WIDTHS, is_installed
from tests.reports.suite import WORDS, compare, make
from tests.runs import run_linear, run_prior

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not is_installed(), reason="chromium and chromedriver are not installed"),
]
PAGES = (
    *("prior", "merge", "merge-away", "comparison", "sweep", "run"),
    *("28-layers", "80-layers", "one-tensor", "nan", "equal", "short-run"),
)
DOWN, RIGHT, ESCAPE = "\ue015", "\ue014", "\ue00c"


def _small(directory):
    made = make(directory / "small")
    prior = describe_prior(open_prior(made.prior))
    merge = open_merge(made.merged)
    pages = {
        "prior": prior,
        "merge": describe_merge(merge, compare(made.merged, made.mllm)),
        "merge-away": describe_merge(merge, None, "Not measured: the mllm is not here."),
    }
    both = compare(made.reasoner, made.mllm, made.base, with_stable_rank=True)
    pages["comparison"] = describe_comparison(both, ["drift-merge", "compare", "A", "B"])
    pages["equal"] = describe_comparison(compare(made.mllm, made.mllm), ["drift-merge"])
    for weight in (0.1, 0.2, 0.4):
        run_linear(made.reasoner, made.mllm, directory / "sweep" / f"weight-{weight}", weight)
    merges = open_sweep(directory / "sweep")
    measured = {m.path.name: compare(m.path, made.mllm) for m in merges}
    pages["sweep"] = describe_sweep(directory / "sweep", merges, measured, "")
    return pages


def _empty_states(directory):
    one = c.make_pair(directory / "one", layers=1)
    modules = "re:up_proj"
    run_prior(*one, directory / "one" / "prior", modules=modules)
    name = "model.layers.0.self_attn.q_proj.weight"
    values = c.reasoner_tensors()[name].values.copy()
    values[0, 0] = np.nan
    zero = {"model.layers.1.self_attn.k_proj.bias": c.store(np.zeros(c.KV))}
    nan = c.make_pair(directory / "nan", reasoner={name: c.store(values), **zero})
    run_prior(*nan, directory / "nan" / "prior", allow_nonfinite=True)
    return {
        "one-tensor": describe_prior(open_prior(directory / "one" / "prior")),
        "nan": describe_prior(open_prior(directory / "nan" / "prior")),
    }


def _runs(directory):
    folder = directory / "run"
    folder.mkdir()
    lines = []
    for step in range(1, 201):
        figures = {"loss": 2 / step + 0.1, "drift/cosine": 0.01, "drift/distance": step / 2e4}
        for number, module in enumerate(("attn", "mlp", "norm")):
            figures[f"drift/{module}/cosine"] = 0.01 * (number + np.sin(step / 20))
            figures[f"drift/{module}/distance"] = step * (number + 1) / 2e4
            figures[f"drift/{module}/bias_ratio"] = 0.5 + number / 10
        lines.append(json.dumps({"step": step, **figures}))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    short = directory / "short-run"
    short.mkdir()
    (short / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}')
    return {
        "run": describe_run(folder, read_history(folder), {"plan": {"alpha": 1.0}}),
        "short-run": describe_run(short, read_history(short), {}),
    }


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Name -> file."""
    directory = tmp_path_factory.mktemp("browser")
    found = _small(directory) | _empty_states(directory) | _runs(directory)
    for layers in (28, 80):
        folder = directory / f"{layers}-layers"
        pair = c.make_pair(folder, layers=layers, reasoner_sidecars=WORDS, mllm_sidecars=WORDS)
        run_prior(*pair, folder / "prior", modules="full")
        found[f"{layers}-layers"] = describe_prior(open_prior(folder / "prior"))
    assert found.keys() == set(PAGES)
    files = {}
    for name, document in found.items():
        files[name] = directory / f"{name}.html"
        files[name].write_text(to_html(document), encoding="utf-8")
    return files


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_readable_and_asks_for_nothing(chrome, pages, name, width, scheme):
    check_page(chrome, pages[name], width, scheme)


@pytest.mark.parametrize("width", WIDTHS)
def test_what_hovering_shows_is_what_the_manifest_says(chrome, pages, width):
    """`page.js` writes four digits, of a cosine six behind the point."""
    chrome.open(pages["prior"], width, "light")
    tensors = open_prior(pages["prior"].parent / "small" / "prior").tensors
    for name in ("layers.1.mlp.down_proj.weight", "layers.0.self_attn.k_proj.bias", "norm.weight"):
        entry = tensors[name]
        for key in ("relative_norm", "cosine", "equal"):
            shown = chrome.hover(f'.cell[data-name="{name}"][data-key="{key}"]')
            assert shown.startswith(name)
            figures = dict(re.findall(r"^(.+?)\t(.+)$", shown, re.MULTILINE))
            assert figures["shape"] == " x ".join(map(str, entry["shape"]))
            assert float(figures["Cosine"]) == pytest.approx(entry["cosine"], abs=6e-7)
            relative = entry["norm_delta"] / entry["norm_mllm"]
            assert float(figures["Relative norm"]) == pytest.approx(relative, rel=6e-4)
            equal = float(figures["Exactly equal entries"].removesuffix(" %")) / 100
            assert equal == pytest.approx(entry["equal"], rel=6e-4, abs=1e-9)


def test_hovering_a_bar_shows_its_count(chrome, pages):
    chrome.open(pages["prior"], 1440, "light")
    found = data_of(pages["prior"].read_text())["histogram"]["modules"]
    counts = {}
    for module in found.values():
        for exponent, count in module["bins"]:
            counts[exponent] = counts.get(exponent, 0) + count
    most = max(counts.values())
    assert f"{most:,}" in chrome.hover(f'rect.bar[data-count="{most}"]')
    chrome.run(
        "const s = document.getElementById('which'); s.value = 'attn';"
        " s.dispatchEvent(new Event('change'))"
    )
    shown = chrome.run(
        "return [...document.querySelectorAll('rect.bar')].map(b => +b.dataset.count)"
    )
    attn = found["attn"]
    assert sum(shown) == attn["zeros"] + sum(count for _, count in attn["bins"])


def test_a_heat_map_can_be_walked_by_keyboard_and_every_cell_has_a_name(chrome, pages):
    chrome.open(pages["prior"], 1440, "light")
    first = chrome.run(
        "const c = document.querySelector('.grid .cell[tabindex=\"0\"]'); c.focus();"
        " return c.getAttribute('aria-label')"
    )
    before = chrome.tip()
    assert before.splitlines()[0] in first
    chrome.press(RIGHT, DOWN)
    after = chrome.run("return document.activeElement.getAttribute('aria-label')")
    assert after != first
    assert chrome.tip().splitlines()[0] in after
    chrome.press(ESCAPE)
    assert chrome.tip() == ""
    unnamed = "return document.querySelectorAll('.cell:not([aria-label])').length"
    assert chrome.run(unnamed) == 0


def test_what_is_not_known_is_hatched_and_said(chrome, pages):
    chrome.open(pages["nan"], 1440, "light")
    cell = '.cell.unknown[data-name="layers.0.self_attn.q_proj.weight"][data-key="cosine"]'
    assert "not known" in chrome.hover(cell)
    zero = '.cell.unknown[data-name="layers.1.self_attn.k_proj.bias"][data-key="cosine"]'
    assert "not known" in chrome.hover(zero)


def test_a_curve_shows_the_logged_numbers(chrome, pages):
    chrome.open(pages["run"], 1440, "light")
    data = data_of(pages["run"].read_text())
    chrome.run("document.querySelector('[data-key=distance] svg').focus()")
    chrome.press(RIGHT, RIGHT)
    shown = dict(re.findall(r"^(.+?)\t(.+)$", chrome.tip(), re.MULTILINE))
    panel = next(panel for panel in data["panels"] if panel["key"] == "distance")
    assert {s["name"] for s in panel["series"]} == shown.keys()
    for series in panel["series"]:
        assert float(shown[series["name"]]) == pytest.approx(series["points"][2][1], rel=6e-4)
