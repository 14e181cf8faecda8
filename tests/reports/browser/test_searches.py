"""The pages of searches in a real browser: what can be read on them is what `search.json` says."""

import json
import re

import pytest

from drift_merge.reports.pages.page import to_html
from drift_merge.searches.pages.page import describe_search
from tests.reports.browser import searches
from tests.reports.browser.checks import check_page
from tests.reports.browser.chrome import SCHEMES, WIDTHS, is_installed

pytest.importorskip("optuna")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not is_installed(), reason="chromium and chromedriver are not installed"),
]
RIGHT = "\ue014"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Name -> file."""
    directory = tmp_path_factory.mktemp("searches")
    files = {}
    for name, search in searches.make(directory).items():
        files[name] = directory / f"{name}.html"
        document = describe_search(directory / f"{name}.search", search)
        files[name].write_text(to_html(document), encoding="utf-8")
    assert files.keys() == set(searches.NAMES)
    return files


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", searches.NAMES)
def test_a_page_is_readable_and_asks_for_nothing(chrome, pages, name, width, scheme):
    check_page(chrome, pages[name], width, scheme)


def result_of(pages, name):
    """The `search.json` that a page was made of."""
    return json.loads((pages[name].parent / f"{name}.search" / "search.json").read_text())


def shown_by(chrome):
    """The title of the tooltip, and its rows."""
    shown = chrome.tip()
    return shown.splitlines()[0], dict(re.findall(r"^(.+?)\t(.+)$", shown, re.MULTILINE))


def same(shown, value):
    """A value as `page.js` writes it: four digits of a number."""
    if isinstance(value, str):
        return shown == value
    return float(shown) == pytest.approx(value, rel=6e-4)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", searches.NAMES)
def test_the_keyboard_walks_a_history_through_every_trial_of_the_search(chrome, pages, name, width):
    found = result_of(pages, name)
    metric = found["metrics"][0]["name"]
    chrome.open(pages[name], width, "light")
    chrome.run(f"document.querySelector('[data-key=history-{metric}] svg').focus()")
    for trial in found["trials"]:
        chrome.press(RIGHT)
        title, rows = shown_by(chrome)
        assert re.match(r"Trial (\d+)", title)[1] == str(trial["number"])
        assert ("the best" in title) is (trial["number"] == found["best"])
        for key, value in trial["parameters"].items():
            assert same(rows[key], value)
        for key, value in (trial["values"] or {}).items():
            assert same(rows[key], value)
        if trial["state"] == "pruned":
            assert same(rows[metric], trial["rungs"][-1]["value"])
            assert rows["stopped after"] == trial["rungs"][-1]["limit"]
        if trial["state"] == "failed":
            assert rows["error"] == trial["error"]["message"].splitlines()[0]
    assert chrome.run("return document.getElementById('said').textContent").startswith("Trial ")
    states = {t["state"] for t in found["trials"]}
    if name in ("search", "search-rungs"):
        assert states == {"complete", "failed" if name == "search" else "pruned"}


def test_the_marks_of_a_search_stand_where_the_axis_says(chrome, pages):
    """Heights against the labels of the axis; of the best in every chart of its metric."""
    found = result_of(pages, "search")
    best = found["trials"][found["best"]]
    chrome.open(pages["search"], 1440, "light")
    for key in ("history-sums", "slice-weight-sums"):
        labels, star = chrome.run(
            "const svg = document.querySelector(`[data-key='${arguments[0]}'] svg`);"
            " const top = svg.getBoundingClientRect().top, s = svg.querySelector('.best');"
            " const b = s.getBBox();"
            " return [[...svg.querySelectorAll('text[text-anchor=end]')].map(t =>"
            " [+t.textContent, +t.getAttribute('y') - 4]), b.y + b.height / 2]",
            key,
        )
        (value0, y0), (value1, y1) = labels[0], labels[-1]
        pixel = (value1 - value0) / (y1 - y0)
        # A star reaches higher than low, by less than a pixel.
        wanted = pytest.approx(best["values"]["sums"], abs=2 * abs(pixel))
        assert value0 + (star - y0) * pixel == wanted
    counted = chrome.run(
        "return document.querySelectorAll('[data-key=front-sums-pictures] svg')[0]"
        ".querySelectorAll('.front, .best').length"
    )
    assert counted == len(found["front"])


def test_the_interval_of_the_winner_is_that_of_the_search(chrome, pages):
    found = result_of(pages, "search")
    chrome.open(pages["search"], 390, "dark")
    rows = [row for row in found["comparisons"] if row["metric"] == "sums"]
    chrome.run("document.querySelector('[data-key=beside-sums] svg').focus()")
    for row in rows:
        chrome.press(RIGHT)
        title, shown = shown_by(chrome)
        assert ("default" in title) is (row["against"] == "default")
        assert ("held-out" in title) is (row["on"] == "final")
        low, high = re.fullmatch(r"(\S+) to (\S+)", shown["95 % interval"]).groups()
        for text, key in ((shown["difference"], "difference"), (low, "low"), (high, "high")):
            assert same(text, row["paired"][key])
        assert same(shown["p"], row["paired"]["p"])
    assert len(rows) == 4
