"""Picture a report with headless Chromium: `python scripts/picture.py runs/quickstart/report.html docs/report.png`.

`--section learned` takes that section alone (scores, curves, mistakes, learned, sampling, cost, repeat).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRAWN = "document.querySelectorAll('.plot .main-svg').length >= 3 * document.querySelectorAll('.plot').length"


def picture(report: Path, image: Path, *, width: int, height: int, theme: str, section: str | None) -> None:
    """Write the top `width` x `height` CSS pixels of a report, or of a section of it, to a PNG file."""
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"no browser: install one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(300_000)
        page.goto(f"{report.resolve().as_uri()}#theme={theme}")
        page.wait_for_function(DRAWN)
        clip = {"x": 0, "y": 0, "width": width, "height": height}
        if section is not None:
            box = page.locator(f"section[aria-labelledby={section}]").bounding_box()
            if box is None:
                raise SystemExit(f"{report} has no section {section!r}")
            clip |= {"y": box["y"], "height": min(height, box["height"])}
        page.screenshot(path=image, clip=clip, full_page=True)
        chromium.close()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="the report.html of a run, or a comparison")
    parser.add_argument("image", type=Path, help="the PNG file to write")
    parser.add_argument("--section", help="take this section alone")
    parser.add_argument("--width", type=int, default=1280, help="CSS pixels")
    parser.add_argument("--height", type=int, default=1760, help="CSS pixels, at most")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    given = parser.parse_args()
    picture(given.report, given.image, width=given.width, height=given.height, theme=given.theme, section=given.section)


if __name__ == "__main__":
    main()
