"""The pictures of docs/report.md: a report on the built-in model at 4 bits, seen by Debian's chromium.

python benchmarks/report_pictures.py          # writes docs/images/report-summary.png and report-where.png
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import tersor
from tersor.report.collect import collect
from tersor.report.page import write_page

IMAGES = Path(__file__).parents[1] / "docs" / "images"
TABS = {"report-summary": 0, "report-where": 1}
SIZE = {"width": 1000, "height": 860}


def main() -> None:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("playwright is not installed: pip install playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("there is no chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        model, page_file = Path(folder) / "demo-4bit", Path(folder) / "report.html"
        tersor.compress("demo", tersor.GPTQ(bits=4), out=model, samples=32, seq_len=512)
        write_page(collect([model], against="demo"), page_file)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport=SIZE, color_scheme="light")
            page.goto(page_file.as_uri())
            for name, tab in TABS.items():
                page.locator('[role="tab"]').nth(tab).click()
                page.screenshot(path=IMAGES / f"{name}.png")
            browser.close()
    for name in TABS:
        print(IMAGES / f"{name}.png", (IMAGES / f"{name}.png").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
