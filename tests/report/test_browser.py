"""The page in a headless Chromium, at the width of a desk and of a phone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tersor
from tersor.report.collect import collect
from tersor.report.page import write_page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("plotly", reason="plotly, the extra `report`, is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
QUIET += ("--disable-component-update", "--disable-sync")
WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def pages(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for bits in (4, 3):
        method = tersor.GPTQ(bits=bits, group_size=32)
        tersor.compress(small_source, method, out=folder / f"b{bits}", samples=2, seq_len=32)
    both = [folder / "b4", folder / "b3"]
    how: dict[str, Any] = {"against": small_source, "seq_len": 32, "max_windows": 3, "max_new_tokens": 8}
    write_page(collect(both, **how), folder / "two.html")
    write_page(collect(both[:1], **how), folder / "one.html")
    write_page(collect(both[:1]), folder / "alone.html")
    return {name: folder / f"{name}.html" for name in ("one", "two", "alone")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens a page; nothing may leave it, and nothing go wrong in it."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def opened(path: Path, width: str = "desk", scheme: str = "light") -> Any:
        x, y = WIDTHS[width]
        context = browser.new_context(viewport={"width": x, "height": y}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        context.route("**/*", lambda route: route.continue_())
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else wrong.append(r.url))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def tabs_of(page: Any) -> Any:
    return page.locator('[role="tablist"]').first.locator('[role="tab"]')


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["one", "alone"])
def test_every_tab_is_filled_and_no_wider_than_the_screen(
    pages: dict[str, Path], visit: Any, name: str, width: str
) -> None:
    page = visit(pages[name], width)
    tabs = tabs_of(page)
    assert tabs.count() == 5
    for n in range(tabs.count()):
        tabs.nth(n).click()
        panel = page.locator('[role="tabpanel"]:visible')
        assert panel.count() == 1
        assert len(panel.inner_text()) > 40
        for plot in panel.locator(".plot").all():
            assert plot.locator("svg.main-svg").count() > 0
            assert plot.locator("path, rect, image").count() > 3
            assert plot.bounding_box()["width"] <= WIDTHS[width][0]
        assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width][0]


@pytest.mark.slow
def test_the_keyboard_moves_between_tabs(pages: dict[str, Path], visit: Any) -> None:
    page = visit(pages["one"])
    tabs = tabs_of(page)
    tabs.nth(0).focus()
    for key, shown in (("ArrowRight", 1), ("End", 4), ("ArrowRight", 0), ("ArrowLeft", 4), ("Home", 0)):
        page.keyboard.press(key)
        assert tabs.nth(shown).get_attribute("aria-selected") == "true"
        assert page.evaluate("document.activeElement.id") == tabs.nth(shown).get_attribute("id")
    assert [tabs.nth(n).get_attribute("tabindex") for n in range(5)] == ["0", "-1", "-1", "-1", "-1"]


@pytest.mark.slow
def test_select_boxes_choose_layer_and_measure_and_a_tooltip_names_the_cell(pages: dict[str, Path], visit: Any) -> None:
    page = visit(pages["one"])
    tabs = tabs_of(page)
    tabs.nth(1).click()
    page.hover("#result-1-map .nsewdrag", position={"x": 30, "y": 10})
    page.wait_for_selector("#result-1-map .hoverlayer .hovertext")
    assert re.search(r"block 0, self_attn\.q_proj", page.locator("#result-1-map .hoverlayer").text_content())
    page.select_option("#result-1-measure", label="‖W - Q‖ / ‖W‖")
    assert "‖W - Q‖" in page.locator("#result-1-map").locator("..").get_attribute("aria-label")
    tabs.nth(2).click()
    before = page.evaluate("document.getElementById('result-1-weights').data[1].y.join()")
    chosen = page.locator("#result-1-layer option:not([selected])").first.get_attribute("value")
    page.select_option("#result-1-layer", chosen)
    assert page.evaluate("document.getElementById('result-1-weights').data[1].y.join()") != before
    assert chosen in page.locator("#result-1-weights").locator("..").get_attribute("aria-label")


CONTRAST = """() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const linear = (v) => v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0.5) return c;
    }
    return [255, 255, 255];
  };
  const low = [];
  const texts = "h1,h2,h3,h4,h5,p,td,th,caption,figcaption,button,select,dt,dd,del,ins,code,summary,td span,svg text";
  for (const e of document.querySelectorAll(texts)) {
    const inPlot = e.tagName === "text";
    if (!e.getClientRects().length || !e.textContent.trim()) continue;
    const style = getComputedStyle(e);
    const ink = light(parse(inPlot ? style.fill : style.color)), paper = light(behind(e));
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < 4.5) low.push(`${e.tagName} ${e.textContent.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return low;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_in_both_themes_and_the_switch(pages: dict[str, Path], visit: Any, scheme: str) -> None:
    page = visit(pages["one"], scheme=scheme)
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    first = page.evaluate(paper)
    assert page.get_attribute("#theme", "aria-pressed") == str(scheme == "dark").lower()
    for switched in (False, True):
        if switched:
            page.click("#theme")
            assert page.evaluate(paper) != first
            assert page.get_attribute("#theme", "aria-pressed") == str(scheme == "light").lower()
        tabs = tabs_of(page)
        for n in range(tabs.count()):
            tabs.nth(n).click()
            assert page.evaluate(CONTRAST) == []


@pytest.mark.slow
def test_a_point_of_the_frontier_leads_to_its_result(pages: dict[str, Path], visit: Any) -> None:
    page = visit(pages["two"])
    labels = page.locator("#frontier .textpoint").all_text_contents()
    assert labels == ["b4", "b3"]
    box = page.locator("#frontier .scatterlayer .points path").nth(1).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.up()
    page.wait_for_function("location.hash === '#result-2'")
    assert page.evaluate("document.activeElement.id") == "result-2"
    assert page.locator('a[href="#result-1"]').count() == 1


@pytest.mark.slow
def test_it_prints_on_two_pages(pages: dict[str, Path], visit: Any) -> None:
    page = visit(pages["one"])
    printed = page.pdf(prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) == 2
    assert page.locator('[role="tabpanel"]:visible').count() == 1  # as before


@pytest.mark.slow
def test_without_scripts_everything_can_be_read(pages: dict[str, Path], browser: Any) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["one"].as_uri())
    assert page.locator('[role="tabpanel"]:visible').count() == 5
    assert not page.locator("#theme").is_visible()
    context.close()
