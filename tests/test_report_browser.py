"""A report in a headless Chromium: what is there, what hovering tells, that nothing is fetched, in light and dark.

Any Chromium or Chrome on the path will do; without one these tests are skipped.
"""

import itertools
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import folders
import numpy as np
import pytest
from folders import SUFFIX
from helpers import config, dequantize, random_hf

import minimax_jax as mj

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"no browser here: none of {', '.join(BROWSERS)} is on the path"
)

CONFIG = config(num_local_experts=9)
LAYER, EXPERT = 1, 4
NAME = f"model.layers.{LAYER}.block_sparse_moe.experts.{EXPERT}"
OTHER = f"model.layers.{LAYER}.self_attn.k_norm.weight"
PLOTS = {"sizes", "norms", "scales", "errors", "codes", "outliers", "bias", "bias-map", "others"}
MAPS = {"norms", "scales", "errors", "bias-map"}
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PAGES = {"light": "rgb(247, 247, 245)", "dark": "rgb(19, 20, 24)"}


@dataclass(frozen=True, kw_only=True)
class Tab:
    """A page that was opened, and all that it had to say for itself."""

    page: object
    console: list = field(default_factory=list)
    requests: list = field(default_factory=list)

    def quiet(self, file):
        return self.console == [] and [url for url in self.requests if not url.startswith("blob:")] == [file.as_uri()]

    def drawn(self, scheme):
        self.page.wait_for_selector(f"body[data-drawn={scheme}]")

    def hover(self, plot, x, y):
        """Point at a place in the units of the axes; what is told there."""
        self.page.locator(f"#{plot}").scroll_into_view_if_needed()
        left, top = self.page.evaluate(
            """([plot, x, y]) => {
                const element = document.getElementById(plot), box = element.getBoundingClientRect();
                const { xaxis, yaxis } = element._fullLayout;
                return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)];
            }""",
            [plot, x, y],
        )
        self.page.mouse.move(0, 0)
        self.page.mouse.move(left, top)
        told = self.page.locator(f"#{plot} .hoverlayer .hovertext")
        told.wait_for()
        return "\n".join(told.locator("tspan.line").all_text_contents())


@pytest.fixture(scope="module")
def browser():
    with pytest.importorskip("playwright.sync_api").sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    tree = random_hf(CONFIG)
    folders.write(root / "hf", tree, CONFIG)
    tree[f"{NAME}.w1.weight{SUFFIX}"] *= np.float32(1000)
    tree[OTHER] *= tree[OTHER].dtype.type(2)
    folders.write(root / "tuned", tree, CONFIG)
    return root


@pytest.fixture(scope="module")
def one(made):
    mj.report(made / "tuned", output=made / "one.html")
    return made / "one.html"


@pytest.fixture(scope="module")
def two(made):
    mj.report(made / "hf", made / "tuned", output=made / "two.html")
    return made / "two.html"


@pytest.fixture
def opened(browser):
    tabs = []

    def open_(file, scheme="light", viewport=DESKTOP):
        tab = Tab(page=browser.new_page(viewport=viewport, color_scheme=scheme))
        tabs.append(tab)
        tab.page.on("console", lambda message: tab.console.append(message.text))
        tab.page.on("pageerror", lambda error: tab.console.append(str(error)))
        tab.page.on("request", lambda request: tab.requests.append(request.url))
        tab.page.goto(Path(file).as_uri())
        tab.drawn(scheme)
        return tab

    yield open_
    for tab in tabs:
        tab.page.close()


def norms(folder):
    """The norm of the expert, and those of its matrices, in float64."""
    arrays = folders.arrays(folder)
    parts = [
        np.linalg.norm(dequantize(arrays[key], arrays[key + SUFFIX], np.float64, CONFIG.block))
        for key in (f"{NAME}.{name}.weight" for name in ("w1", "w2", "w3"))
    ]
    return {"whole": np.linalg.norm(parts), **dict(zip(("w1", "w2", "w3"), parts, strict=True))}


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e[+-]\d+)?", text.replace("\u2212", "-"))]


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_there_and_nothing_is_fetched(one, opened, scheme, viewport):
    tab = opened(one, scheme, viewport)
    page = tab.page
    assert {plot.get_attribute("id") for plot in page.locator(".plot").all()} == PLOTS
    assert all(page.locator(f"#{plot} .main-svg").count() for plot in PLOTS)
    assert all(page.locator(f"#{plot} .hm image, #{plot} .heatmaplayer image").count() for plot in MAPS)
    assert page.locator(".findings li").count() >= 5
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == PAGES[scheme]
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    for box in (plot.bounding_box() for plot in page.locator(".plot").all()):
        assert box["width"] > 0.75 * min(viewport["width"], 900) and box["x"] >= 0
    assert tab.quiet(one)


def test_hovering_tells_the_name_and_the_figures(made, one, opened):
    told = opened(one).hover("norms", EXPERT, LAYER)
    want = norms(made / "tuned")
    assert NAME in told
    assert numbers(told[told.index("norm ") :].splitlines()[0]) == [pytest.approx(want["whole"], rel=1e-4)]
    for name in ("w1", "w2", "w3"):
        line = told[told.index(f"{name}.weight: ") + len(f"{name}.weight: ") :].splitlines()[0]
        assert numbers(line) == [pytest.approx(want[name], rel=1e-4)]


def test_hovering_tells_what_changed(made, two, opened):
    tab = opened(two, viewport=PHONE)
    told = tab.hover("changes", EXPERT, LAYER)
    arrays = folders.arrays(made / "hf")
    key = f"{NAME}.w1.weight"
    change = 999 * np.linalg.norm(dequantize(arrays[key], arrays[key + SUFFIX], np.float64, CONFIG.block))
    assert NAME in told
    share = numbers(told[told.index("changed by") :].splitlines()[0])[0]
    assert share == pytest.approx(100 * change / norms(made / "tuned")["whole"], rel=1e-3)
    first = tab.page.locator("section:has(#changes) tbody tr").first.inner_text()
    assert first.startswith(NAME)
    assert tab.quiet(two)


def test_hovering_tells_what_else_changed(two, opened):
    tab = opened(two, viewport=PHONE)
    rows = tab.page.evaluate("document.getElementById('changes-others')._fullData[0].text.map((row) => row[0])")
    told = tab.hover("changes-others", LAYER, rows.index("self_attn.k_norm.weight") + 1)
    assert OTHER in told
    assert numbers(told[told.index("changed by") :].splitlines()[0]) == [pytest.approx(50, rel=1e-3)]


LABELS = ".xtick text, .ytick text, .g-xtitle text, .g-ytitle text, .annotation text, .legendtext, .cbaxis text"
BOXES = """(plot, labels) => [...plot.querySelectorAll(labels)]
    .filter((label) => label.getClientRects().length)
    .map((label) => label.getBoundingClientRect())
    .map(({ x, y, width, height }) => ({ x, y, width, height }))"""
"""Of the labels that are shown."""


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_no_label_of_a_plot_lies_over_another_or_leaves_the_page(one, two, opened, viewport):
    for file in (one, two):
        page = opened(file, viewport=viewport).page
        for plot in page.locator(".plot").all():
            boxes = plot.evaluate(BOXES, LABELS)
            assert len(boxes) > 4
            assert all(box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"] for box in boxes)
            over = [pair for pair in itertools.combinations(boxes, 2) if overlap(*pair) > 1]
            assert over == [], plot.get_attribute("id")


def overlap(a, b):
    """Of two boxes, in pixels: the lesser of width and height."""
    return min(
        min(a[at] + a[length], b[at] + b[length]) - max(a[at], b[at])
        for at, length in (("x", "width"), ("y", "height"))
    )


def test_an_outlier_is_told_by_name(made, one, opened):
    tab = opened(one)
    point = tab.page.evaluate("(({ x, y }) => [x[0], y[0]])(document.getElementById('outliers')._fullData[0])")
    told = tab.hover("outliers", *point)
    assert re.search(r"model\.layers\.\d+\.", told) and "times the median block" in told


def test_a_page_follows_the_reader_from_light_to_dark(one, opened):
    tab = opened(one)

    def ink():
        return tab.page.evaluate("getComputedStyle(document.querySelector('#norms .xtick text')).fill")

    light = ink()
    tab.page.emulate_media(color_scheme="dark")
    tab.drawn("dark")
    assert ink() != light
    assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == PAGES["dark"]
    assert tab.quiet(one)


def test_a_page_prints(one, opened):
    tab = opened(one, "dark")
    paper = tab.page.pdf(format="A4")
    assert paper.startswith(b"%PDF") and 3 <= len(re.findall(rb"/Type\s*/Page\b", paper)) <= 12
    tab.page.emulate_media(media="print")
    assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not tab.page.locator("nav").is_visible()


def test_a_page_without_scripts_still_tells_findings_and_tables(one, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(one.as_uri())
    assert page.locator(".findings li").count() >= 5 and "need JavaScript" in page.locator("noscript").inner_text()
    context.close()
