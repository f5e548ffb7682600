"""The page to try the tasks, in the system's Chromium."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from playwright.sync_api import expect, sync_playwright

import tiny
from live import live
from test_engine import alone
from test_serve import SPOKEN
from unolora import runs, training
from unolora.serving import auth

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """Opens the page of a server; at the end nothing may have gone to the console, or elsewhere."""
    contexts, noise, asked = [], [], []

    def open_page(site, expected=(), **settings):
        contexts.append((browser.new_context(**settings), site, expected))
        page = contexts[-1][0].new_page()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(site.url)
        return page

    yield open_page
    for context, site, expected in contexts:
        context.close()
        assert [text for text in noise if not any(word in text for word in expected)] == []
        assert asked
        assert [url for url in asked if not url.startswith((f"{site.url}/", "data:"))] == []


def ask(page, *lines, tasks=None):
    page.locator("#choices input").first.wait_for()
    if tasks is not None:
        page.get_by_role("button", name="None").click()
        for task in tasks:
            page.get_by_role("checkbox", name=re.compile(f"^{task}")).check()
    page.get_by_label("Texts, one a line").fill("\n".join(lines))
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#status")).to_contain_text("answers in")


def test_tasks_side_by_side(run, site, opened):
    page = opened(site)
    pair = "\t".join(SPOKEN["heat"])
    ask(page, SPOKEN["mood"], pair)
    articles = page.locator("article")
    assert articles.locator("h2").all_inner_texts() == [SPOKEN["mood"], pair.replace("\t", " ⇥ ")]
    wanted = alone(run, [("mood", SPOKEN["mood"]), ("topic", SPOKEN["mood"])])
    cards = articles.first.locator(".answer")
    assert cards.locator("h3").all_inner_texts() == ["mood", "topic", "heat"]
    for card, answer in zip(cards.all()[:2], wanted, strict=True):
        assert card.locator(".label").inner_text() == answer["label"]
        shares = dict(re.split(r"\n+", bar.inner_text()) for bar in card.locator(".bars li").all())
        assert list(shares) == sorted(answer["probabilities"], key=answer["probabilities"].get, reverse=True)
        for label, share in shares.items():
            assert float(share.removesuffix(" %")) == pytest.approx(100 * answer["probabilities"][label], abs=0.051)
        first = card.locator(".bars li").first
        width = first.evaluate("bar => getComputedStyle(bar, '::after').backgroundSize.split(' ')[0]")
        assert float(width.removesuffix("%")) == pytest.approx(100 * max(answer["probabilities"].values()), abs=0.051)
    assert cards.nth(2).inner_text() == "heat\nreads 2 texts (first, second): part them by a tab".replace("\n", "\n\n")
    (number,) = alone(run, [("heat", tuple(SPOKEN["heat"]))])
    shown = articles.nth(1).locator(".answer").nth(2).locator(".label").inner_text()
    assert float(shown) == pytest.approx(number["value"], abs=1e-2)
    boxes = [card.bounding_box() for card in cards.all()]
    assert len({round(box["y"]) for box in boxes}) == 1, "the tasks are not beside each other"


def test_the_heat_map_is_that_of_this_text(site, opened):
    page = opened(site)
    ask(page, SPOKEN["mood"], tasks=["mood", "topic"])
    page.get_by_text("How each task scales the ranks for this text").click()
    tables = page.locator("table.heat")
    expect(tables).to_have_count(2)
    wanted = site.service.engine.scales([("mood", SPOKEN["mood"]), ("topic", SPOKEN["mood"])])
    for table, s, name in zip(tables.all(), wanted, ["mood", "topic"], strict=True):
        assert table.locator("caption").inner_text() == name
        rows = [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]
        assert rows == [[f"{value:.2f}" for value in row] for row in s.tolist()]
        assert table.locator("tbody th").all_inner_texts() == ["0.output.dense", "1.output.dense"]
        sides = [
            [cell.get_attribute("class") for cell in row.locator("td").all()] for row in table.locator("tr").all()[1:]
        ]
        assert sides == [["less" if value < 1 else "more" for value in row] for row in s.tolist()]
    colours = {
        cell.evaluate("cell => getComputedStyle(cell).backgroundColor") for cell in page.locator(".heat td").all()
    }
    assert len(colours) > 10


def test_the_heat_map_names_query_and_value(opened, tmp_path):
    settings = tiny.settings(tmp_path / "run", adapter={"target_modules": "query-value"}, training={"steps": 2})
    with live(runs.load_run(training.train(settings))) as site:
        page = opened(site)
        ask(page, SPOKEN["mood"], tasks=["mood"])
        page.get_by_text("How each task scales the ranks for this text").click()
        names = page.locator("table.heat tbody th")
        expect(names).to_have_count(4)
        assert names.all_inner_texts() == ["0.query", "0.value", "1.query", "1.value"]


def test_copies_do_the_same(run, site, opened):
    page = opened(site, permissions=["clipboard-read", "clipboard-write"])
    text = """it's a "good" day $HOME `ls` \\n"""
    ask(page, text, tasks=["mood", "topic"])
    wanted = [answer["label"] for answer in alone(run, [("mood", text), ("topic", text)])]
    copied = []
    for button in page.get_by_role("button", name="Copy").all():
        button.click()
        expect(page.get_by_role("button", name="Copied").first).to_be_visible()
        copied.append(page.evaluate("navigator.clipboard.readText()"))
    commands = [["bash", "-c", copied[0]], [sys.executable, "-c", copied[1] + "\n"]]
    for command in commands:
        if command[0] == "bash" and shutil.which("curl") is None:
            continue
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        answers = json.loads(done.stdout if command[0] == "bash" else done.stdout.replace("'", '"'))["answers"]
        assert [answer["label"] for answer in answers] == wanted


def test_by_keyboard_alone(site, opened):
    page = opened(site)
    page.locator("#choices input").first.wait_for()
    page.keyboard.press("Tab")  # the link to the interface
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "task-mood"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Space")
    for _ in range(5):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "lines"
    page.keyboard.type("we saw a cat")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("answers in")
    assert page.locator(".answer h3").all_inner_texts() == ["topic", "heat"]
    page.locator("#ask").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.localName") == "summary"
    page.keyboard.press("Enter")
    expect(page.locator("table.heat")).to_have_count(1)


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parse = (text) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (node) => {
    const colour = node ? parse(getComputedStyle(node).backgroundColor) : [255, 255, 255, 255];
    return colour[3] === 255 ? colour : behind(node.parentElement);
  };
  const speaks = (node) => [...node.childNodes].some((each) => each.nodeType === 3 && each.textContent.trim());
  const seen = [...document.querySelectorAll("body *")].filter((node) => speaks(node) && node.checkVisibility());
  return seen.map((node) => {
    const both = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    return [(Math.max(...both) + 0.05) / (Math.min(...both) + 0.05), node.outerHTML.slice(0, 80)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(site, opened, scheme):
    page = opened(site, color_scheme=scheme)
    ask(page, SPOKEN["mood"])
    page.get_by_text("How each task scales the ranks for this text").click()
    expect(page.locator("table.heat").first).to_be_visible()
    page.wait_for_timeout(300)  # bars grow
    seen = page.evaluate(CONTRASTS)
    assert len(seen) > 60
    assert [(round(ratio, 2), what) for ratio, what in seen if ratio < 4.5] == []
    white = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (white == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(site, opened, width):
    page = opened(site, viewport={"width": width, "height": 800})
    ask(page, "a" * 300, SPOKEN["mood"])
    page.get_by_text("How each task scales the ranks for this text").first.click()
    expect(page.locator("table.heat").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_texts_are_texts(site, opened):
    page = opened(site)
    evil = "<img src=x onerror=alert(1)><b>bold</b>"
    ask(page, evil)
    assert page.locator("article h2").inner_text() == evil
    assert page.locator("article img, article b").count() == 0


def test_a_key_is_asked_for(run, tmp_path, opened):
    path = tmp_path / "keys"
    key = auth.new_key(path, "ann")
    with live(run, keys=str(path)) as site:
        page = opened(site, expected=["401"])
        expect(page.get_by_role("alert")).to_contain_text("a valid key is needed")
        page.get_by_label("Kept in this tab").fill(key)
        page.get_by_role("button", name="Ask").click()
        expect(page.locator("#choices input")).to_have_count(3)
        ask(page, "a cat", tasks=["topic"])
        assert page.locator(".answer h3").all_inner_texts() == ["topic"]
        assert key not in page.locator("#copy").inner_text()
        assert "$UNOLORA_KEY" in page.locator("#curl").inner_text()
        page.reload()
        expect(page.locator("#choices input")).to_have_count(3)


def test_what_goes_wrong_is_said(site, opened):
    page = opened(site, expected=["422", "ERR_FAILED"])
    page.locator("#choices input").first.wait_for()
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert")).to_have_text("Write a text.")
    page.get_by_role("button", name="None").click()
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert")).to_have_text("Pick a task.")
    page.get_by_role("button", name="All").click()
    page.get_by_label("Texts, one a line").fill("a" * 20_001)
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert")).to_contain_text("at most 20000 characters in a text, got 20001")
    page.route("**/v1/predict", lambda route: route.abort())
    page.get_by_label("Texts, one a line").fill("a")
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert")).to_have_text("Failed to fetch")
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()


def test_many_lines_go_in_several_requests(site, opened):
    page = opened(site)
    ask(page, *(f"a cat {number}" for number in range(60)))
    expect(page.locator("#status")).to_contain_text("120 answers in")
    assert page.locator("article").count() == 60


def test_the_openapi_page_works_offline(site, opened):
    page = opened(site)
    page.goto(f"{site.url}/docs")
    expect(page.get_by_text("/v1/predict").first).to_be_visible()
