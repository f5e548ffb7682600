"""Picture a report with headless Chromium: `python scripts/picture.py runs/quickstart/report.html docs/report.png`."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--virtual-time-budget=10000",
)  # fmt: skip


def picture(report: Path, image: Path, *, width: int, height: int, theme: str) -> None:
    """Write the top `width` x `height` CSS pixels of a report to a PNG file."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"no browser: install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as profile:
        where = (f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={image.resolve()}")
        page = f"{report.resolve().as_uri()}#theme={theme}"
        subprocess.run([browser, *QUIET, *where, page], check=True, capture_output=True, timeout=120)
    if not image.is_file():
        raise SystemExit(f"{browser} wrote no picture of {report}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="the report.html of a run")
    parser.add_argument("image", type=Path, help="the PNG file to write")
    parser.add_argument("--width", type=int, default=1280, help="CSS pixels")
    parser.add_argument("--height", type=int, default=1760, help="CSS pixels")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    options = parser.parse_args()
    picture(options.report, options.image, width=options.width, height=options.height, theme=options.theme)


if __name__ == "__main__":
    main()
