"""Reports in a real browser: Debian's Chromium, driven by Playwright."""

import functools
import shutil

import pytest

import tiny
from unolora import analysis, report, training

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@functools.cache
def run(method="unolora", seed=0):
    training_settings = {"steps": 12, "evaluate_every": 4, "conflict_every": 4, "seed": seed}
    return training.train(tiny.settings(tiny.folder() / f"{method}-{seed}", method=method, training=training_settings))


@functools.cache
def whole():
    """The report of a run with all that a report can hold."""
    folder = run()
    analysis.write(analysis.analyze([folder], rows=4, ablate=True), folder / "analysis")
    return report.write_report(folder)


@functools.cache
def comparison():
    folders = [run(method, seed) for method in ("unolora", "lora-per-task") for seed in (0, 1)]
    return report.write_comparison(folders, tiny.folder() / "comparison.html")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Opened:
    """A page whose figures are drawn, and what it said and asked for on the way."""

    def __init__(self, browser, path, width=1280, scheme="light", **options):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(180_000)  # drawing takes a second, but not on a busy machine
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.plots = self.page.locator(".plot").count()
        if self.plots and options.get("java_script_enabled", True):
            self.page.wait_for_function("document.querySelectorAll('.plot .main-svg').length >= 3 * " + str(self.plots))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def colour(self, of, name="color"):
        return self.page.locator(of).first.evaluate(f"element => getComputedStyle(element)['{name}']")


@pytest.fixture(params=["run", "comparison"])
def page(request):
    return {"run": whole, "comparison": comparison}[request.param]()


def test_the_watch_notices(browser, tmp_path):
    """The premise of the next tests: what goes wrong, and what is asked of a network, is seen."""
    broken = tmp_path / "broken.html"
    broken.write_text("<img src='http://127.0.0.1:9/x.png'><script>throw new Error('noticed')</script>")
    with Opened(browser, broken) as opened:
        assert any("noticed" in line for line in opened.said)
        assert opened.asked == [broken.as_uri(), "http://127.0.0.1:9/x.png"]


def test_every_figure_is_drawn_without_an_error_or_a_request(browser, page):
    with Opened(browser, page) as opened:
        assert opened.plots >= 15
        assert opened.said == []
        assert opened.asked == [page.as_uri()]
        empty = opened.page.evaluate(
            "[...document.querySelectorAll('.plot')].filter((plot) => !plot.querySelector("
            "'.trace, .hm, .scatterlayer .js-line, .barlayer path, .heatmaplayer image')).length"
        )
        assert empty == 0
    assert page.stat().st_size < 6_000_000


def test_a_key_hides_its_series(browser, page):
    with Opened(browser, page) as opened:
        figure = opened.page.locator("figure:has(.key)").first
        key, traces = figure.locator(".key").first, figure.locator(".plot").first.locator(".trace")
        before = traces.count()
        key.focus()
        opened.page.keyboard.press("Enter")
        assert key.get_attribute("aria-pressed") == "false"
        assert traces.count() < before
        opened.page.keyboard.press("Enter")
        assert key.get_attribute("aria-pressed") == "true"
        assert traces.count() == before
        assert opened.said == []


def test_dark_by_the_system_and_by_the_button(browser, page):
    with Opened(browser, page) as light, Opened(browser, page, scheme="dark") as dark:
        assert light.colour("body", "background-color") == "rgb(255, 255, 255)"
        assert dark.colour("body", "background-color") != "rgb(255, 255, 255)"
        inks = [opened.colour(".plot .xtick text", "fill") for opened in (light, dark)]
        assert inks[0] != inks[1]
        light.page.locator("#theme").click()
        light.page.wait_for_timeout(500)
        assert light.colour(".plot .xtick text", "fill") == inks[1]
        assert light.said == dark.said == []


@pytest.mark.parametrize("width", [390, 320])
def test_nothing_scrolls_sideways_on_a_phone(browser, page, width):
    with Opened(browser, page, width, has_touch=True, is_mobile=True) as opened:
        opened.page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        wide = opened.page.evaluate(
            "[...document.querySelectorAll('.scroll')].filter((each) => each.scrollWidth > each.clientWidth + 1)"
            ".map((each) => each.ariaLabel)"
        )
        assert wide == []


def test_keyboard_and_screen_reader(browser, page):
    with Opened(browser, page) as opened:
        opened.page.keyboard.press("Tab")
        assert opened.page.evaluate("document.activeElement.className") == "skip"
        unnamed = opened.page.evaluate(
            "[...document.querySelectorAll('button, [role=img], [role=region], [role=group], table')]"
            ".filter((e) => !(e.innerText.trim() || e.ariaLabel || e.caption)).length"
        )
        assert unnamed == 0
        tree = opened.page.locator("section:has(#scores)").aria_snapshot()
        assert "- table" in tree
        assert "- rowheader" in tree
    with Opened(browser, page, 390) as phone:  # laid out as blocks, it is still a table
        assert "- rowheader" in phone.page.locator("section:has(#scores)").aria_snapshot()


def test_it_prints_and_reads_without_javascript(browser, page):
    with Opened(browser, page) as opened:
        paper = opened.page.pdf(format="A4")
        assert paper.startswith(b"%PDF")
        assert opened.said == []
    with Opened(browser, page, java_script_enabled=False) as opened:
        assert opened.page.locator("table").count() > 10
        assert opened.page.locator("h1").inner_text()
