"""The evaluation's page in a browser: pictures, filters, hostile texts, and how it fits. On demand:

    python -m pytest -m slow tests/test_page_browser.py

It needs playwright's Python package (the extra `browser`) and a Chromium on the PATH; no browser is fetched.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from test_evals import TEMPLATE, folder  # noqa: F401 - a fixture

from grm_jax.evals import measure
from grm_jax.main import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
]
HOSTILE = '<script>window.hit = 1</script><img src="x" onerror="window.hit = 1"></pre><b>bold</b> <!-- &amp; \u2028'
LONG = "w" * 400
KINDS = ("wrong", "tied", "failed", "right")  # of case i: KINDS[i % 4]
COUNT = 62  # more than are shown at once
SCORES = {"wrong": [2, 9], "tied": [5, 5], "failed": None, "right": [9, 2]}


@pytest.fixture(scope="module")
def report(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The page of a run of `eval`, made anew from its judgments with scores and texts put in their place."""
    place = tmp_path_factory.mktemp("page")
    rows = [
        {
            "id": f"case-{i}",
            "prompt": f"{HOSTILE if i == 0 else ''} question {i}: {LONG if i == 1 else 'which?'}",
            "chosen": HOSTILE if i < 4 else f"yes {i}",
            "rejected": LONG if i < 8 else f"no {i}",
        }
        for i in range(COUNT)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / ("judge_" * 30)).symlink_to(folder / "judge")  # the page tells the model's name
    asked = ["--benchmark", "preferences", "--data", str(place / "rows.jsonl"), "--model", str(place / ("judge_" * 30))]
    asked += ["--template", TEMPLATE, "--max-new-tokens", "4", "--votes", "4", "--no-greedy", "--force-scores"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "RESAMPLES", 10)
        assert main(["eval", "--output", str(place / "run"), *asked]) == 0
        judged = [json.loads(line) for line in (place / "run/judgments.jsonl").read_text().splitlines()]
        for row in judged:
            kind = KINDS[int(row["id"].rpartition("-")[2]) % 4]
            scores = [1, 2] if kind == "right" and row["sample"] == 0 else SCORES[kind]  # so that votes help
            row |= {"scores": scores, "text": f"{HOSTILE} {LONG} {row['text']}"}
            row |= {"reason": "no box"} if kind == "failed" else {}
        (place / "run/judgments.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
        again = ["--from", str(place / "run/judgments.jsonl"), "--output", str(place / "again")]
        assert main(["eval", *again]) == 0
    return place / "again" / "report.html"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the extra `browser`")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for root
        found = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


@pytest.fixture(params=[(1280, "light"), (400, "light"), (400, "dark")], ids=lambda param: f"{param[0]}-{param[1]}")
def page(request: pytest.FixtureRequest, browser, report: Path):
    """The page as opened; it says nothing on the console and asks for nothing, whatever is done in the test."""
    width, scheme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("console", lambda message: said.append(message.text))
    opened.on("request", lambda request: said.append(request.url))
    opened.goto(report.as_uri())
    yield opened
    assert said == [report.as_uri()]
    opened.close()


def width_of(page) -> int:
    return page.evaluate("document.documentElement.scrollWidth")


def kinds_shown(page) -> list[str]:
    return page.locator("details.case .tag").all_inner_texts()


def test_pictures_are_drawn(page) -> None:
    assert page.locator(".charts svg").count() == 2
    for i in range(2):
        picture = page.locator(".charts svg").nth(i)
        box = picture.bounding_box()
        assert box["width"] > 250
        assert box["height"] > 150
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= page.viewport_size["width"]
        lines = picture.locator("polyline")
        assert lines.count() == 1  # plain votes alone
        assert lines.first.bounding_box()["width"] > 150
        assert lines.first.bounding_box()["height"] > 50
        assert lines.first.evaluate("line => getComputedStyle(line).stroke") != "none"
        dots = picture.locator("circle")
        assert dots.count() == 3  # 1, 2 and 4 judgments
        assert "voting, %" in picture.locator("text").all_text_contents()
        outside = picture.locator("text, circle").evaluate_all(
            """nodes => nodes.filter(node => {
                const one = node.getBoundingClientRect(), all = node.ownerSVGElement.getBoundingClientRect();
                return one.left < all.left - 1 || one.right > all.right + 1 || one.bottom > all.bottom + 1;
            }).map(node => node.textContent)"""
        )
        assert outside == []


def test_filters_change_what_is_shown(page) -> None:
    assert page.locator("#shown").inner_text() == f"{COUNT} of {COUNT} cases"
    assert kinds_shown(page) == [KINDS[i % 4] for i in range(50)]
    page.get_by_role("button", name="Show more").click()
    assert len(kinds_shown(page)) == COUNT
    assert page.get_by_role("button", name="Show more").count() == 0
    for at, kind in enumerate(KINDS):
        page.get_by_role("button", name=kind, exact=True).click()
        count = len(range(at, COUNT, 4))
        assert page.locator("#shown").inner_text() == f"{count} of {COUNT} cases"
        assert kinds_shown(page) == [kind] * count
        pressed = page.locator('#filters button[aria-pressed="true"]').all_inner_texts()
        assert pressed == [kind]
    page.get_by_role("button", name="all", exact=True).click()
    page.get_by_role("textbox").fill("QUESTION 17:")
    assert page.locator("#shown").inner_text() == f"1 of {COUNT} cases"
    assert kinds_shown(page) == ["tied"]
    page.get_by_role("button", name="right", exact=True).click()
    assert page.locator("#shown").inner_text() == f"0 of {COUNT} cases"
    assert kinds_shown(page) == []


def test_a_case_opens_with_its_judgments_as_text(page) -> None:
    """Markup in a query, a response or a judgment stays text, and runs nothing."""
    for i in range(8):
        page.locator("details.case > summary").nth(i).click()
    case = page.locator("details.case").first
    texts = case.locator(":scope > pre").all_text_contents()
    assert texts == [f"user: {HOSTILE} question 0: which?", HOSTILE, LONG]
    heads = case.locator(":scope > p").all_inner_texts()
    assert heads == ["Query", "Response 1: label 1, sum 8", "Response 2: label 0, sum 36"]
    failed = page.locator("details.case").nth(2)
    assert "no score" in failed.locator(":scope > p").nth(1).inner_text()
    judgments = case.locator("details")
    assert judgments.count() == 4
    assert judgments.first.locator("summary").inner_text().startswith("Judgment 1: scores 2, 9")
    judgments.first.locator("summary").click()
    judgment = judgments.first.locator("pre")
    assert judgment.is_visible()
    assert judgment.text_content().startswith(f"{HOSTILE} {LONG}")
    assert page.locator("#cases script, #cases img, #cases b").count() == 0
    assert page.evaluate("window.hit") is None
    assert page.locator("script").count() == 2  # the data and the program


def test_nothing_is_wider_than_the_window(page) -> None:
    assert width_of(page) <= page.viewport_size["width"]
    for i in range(4):
        page.locator("details.case > summary").nth(i).click()
        page.locator("details.case").nth(i).locator("details > summary").first.click()
    assert width_of(page) <= page.viewport_size["width"]
    # Wide tables scroll in their own boxes, and a number with its interval stays in one line.
    assert page.locator(".scroll").count() == page.locator("table").count() > 0
    assert page.get_by_text("37.1 % (").first.bounding_box()["height"] < 40
    assert [head for head in page.locator("tr:first-child").all_inner_texts() if not head.strip()] == []


def test_texts_can_be_read(page) -> None:
    """Text has a contrast of 4.5 and more to what is behind it (WCAG 2.2, 1.4.3)."""
    ratios = page.evaluate(CONTRASTS)
    assert len(ratios) > 8
    assert min(ratios.values()) >= 4.5, ratios


CONTRASTS = """() => {
    const parts = color => color.match(/[\\d.]+/g).map(Number);
    const light = color => parts(color).slice(0, 3).map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = node => {
        for (; node; node = node.parentElement) {
            const color = getComputedStyle(node).backgroundColor, [, , , alpha = 1] = parts(color);
            if (alpha > 0) return color;
        }
        return "rgb(255, 255, 255)";
    };
    const found = {};
    for (const place of ["h1", "#protocol", "#counts", "#warning", "th", "td", "#filters button", "#filters input",
                         "#shown", ".wrong", ".tied", ".failed", ".right", "summary", "svg text"]) {
        const node = document.querySelector(place);
        if (!node) continue;
        const style = getComputedStyle(node, place.includes("input") ? "::placeholder" : null);
        const color = node.closest("svg") ? style.fill : style.color;
        const [one, other] = [light(color), light(behind(node))].sort((a, b) => b - a);
        found[place] = (one + 0.05) / (other + 0.05);
    }
    return found;
}"""
