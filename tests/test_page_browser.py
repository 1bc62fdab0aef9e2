"""The evaluation's page in a browser: pictures, filters, parts of judgments, hostile texts, and how it fits. On demand:

    python -m pytest -m slow tests/test_page_browser.py

It needs playwright's Python package (the extra `browser`) and a Chromium on the PATH; no browser is fetched.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_evals import TEMPLATE, folder, judgment  # noqa: F401 - a fixture
from test_page import THREE, case_of, page_of

from grm_jax.evals import measure
from grm_jax.main import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("window", [(1280, "light"), (400, "light"), (400, "dark")], ids=lambda w: f"{w[0]}-{w[1]}"),
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


PARTLY = ("wrong", "partly", "failed", "right")  # of case i of RM-Bench: PARTLY[i % 4]
JUDGED = """I look at all of them.
**Specific Criteria:** correctness (70%), tone (30%)
### Analysis
{said}

Scores: \\boxed{{{scores}}}"""


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of RM-Bench with three ways to vote, eight judgments a case and greedy ones, and rows that were dropped."""
    rng, cases, rows, once = random.Random(0), [], [], []
    for i in range(24):
        subset = ("chat", "math", "code", "safety-refuse", "safety-response")[i % 5]
        case = case_of(THREE, subset, f"{subset}/{i}")
        cases.append(case)
        for j in range(9):
            good = {"wrong": (1, 1, 1), "partly": (9, 9, 1), "right": (9, 8, 9)}.get(PARTLY[i % 4])
            noise = rng.randrange(4) == 0
            scores = None if good is None else (*good, *((4, 9, 3) if noise else (1, 1, 2)))
            scores = scores and ((*scores[:3], 9, 9, 9) if PARTLY[i % 4] == "wrong" else scores)
            said = ", ".join(map(str, scores)) if scores else "none"
            text = JUDGED.format(said=f"{HOSTILE} {LONG}" if j == 0 else "The first one is right.", scores=said)
            more = {"text": text, "logit": -float(noise) - j / 99} if j < 8 else {"text": f"{text} once"}
            (rows if j < 8 else once).append(judgment(case, j % 8, scores, **more))
    place = tmp_path_factory.mktemp("several") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "RESAMPLES", 10)
        place.write_text(page_of("rm_bench", cases, rows, once, without_a_domain=7)[0])
    return place


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the extra `browser`")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for root
        found = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


@contextlib.contextmanager
def opened(browser, report: Path, width: int, scheme: str) -> Iterator:
    """The page as opened; it says nothing on the console and asks for nothing, whatever is done in the test."""
    found = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    found.on("pageerror", lambda error: said.append(str(error)))
    found.on("console", lambda message: said.append(message.text))
    found.on("request", lambda request: said.append(request.url))
    found.goto(report.as_uri())
    yield found
    assert said == [report.as_uri()]
    found.close()


@pytest.fixture
def page(window: tuple[int, str], browser, report: Path) -> Iterator:
    with opened(browser, report, *window) as found:
        yield found


@pytest.fixture
def rich(window: tuple[int, str], browser, several: Path) -> Iterator:
    with opened(browser, several, *window) as found:
        yield found


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
        assert outside(picture) == []


def outside(picture) -> list[str]:
    """What of a picture's names and dots stands out of it."""
    return picture.locator("text, circle, rect").evaluate_all(
        """nodes => nodes.filter(node => {
            const one = node.getBoundingClientRect(), all = node.ownerSVGElement.getBoundingClientRect();
            return one.left < all.left - 1 || one.right > all.right + 1 || one.bottom > all.bottom + 1;
        }).map(node => node.textContent)"""
    )


def test_each_way_to_vote_has_a_line_and_a_name_in_its_color(rich) -> None:
    for picture in rich.locator(".charts svg").all():
        colors = picture.locator("polyline").evaluate_all("lines => lines.map(line => getComputedStyle(line).stroke)")
        squares = picture.locator("rect").evaluate_all("all => all.map(one => getComputedStyle(one).fill)")
        assert colors == squares
        assert len(set(colors)) == 3
        assert picture.locator("text").all_text_contents()[-3:] == ["voting, %", "guided, %", "softmax, %"]
        assert picture.locator("circle").count() == 3 * 4  # 1, 2, 4 and 8 judgments
        assert outside(picture) == []
        names = [text.bounding_box() for text in picture.locator("text").all()[-3:]]
        assert all(one["y"] + one["height"] <= other["y"] + 2 for one, other in itertools.pairwise(names))


def test_the_top_tells_what_was_dropped(page, rich) -> None:
    assert rich.locator("#dropped").inner_text() == "Dropped: 7 without a domain."
    assert page.locator("#dropped").inner_text() == ""
    assert page.locator("#dropped").bounding_box()["height"] == 0


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


def test_cases_that_are_partly_right_have_a_filter(page, rich) -> None:
    names = ["all", "wrong", "tied", "partly", "failed", "right"]
    assert rich.locator("#filters button").all_inner_texts() == names
    assert page.locator("#filters button").all_inner_texts() == [name for name in names if name != "partly"]
    assert kinds_shown(rich) == [PARTLY[i % 4] for i in range(24)]
    for kind, count in {"wrong": 6, "tied": 0, "partly": 6, "failed": 6, "right": 6, "all": 24}.items():
        rich.get_by_role("button", name=kind, exact=True).click()
        assert rich.locator("#shown").inner_text() == f"{count} of 24 cases"
        assert len(kinds_shown(rich)) == count
        assert set(kinds_shown(rich)) <= {kind} or kind == "all"
        assert width_of(rich) <= rich.viewport_size["width"]
    rich.get_by_role("button", name="partly", exact=True).click()
    assert re.search(r"partly\s+\d\d % of its pairs; math: which", rich.locator("summary").first.inner_text())


def test_a_judgment_is_shown_in_its_parts(rich) -> None:
    """With what the guided vote did with it; the greedy one stands last."""
    rich.locator("details.case > summary").first.click()
    judgments = rich.locator("details.case").first.locator("details.judgment")
    heads = judgments.locator("summary").all_inner_texts()
    assert [head.partition(":")[0] for head in heads] == [*(f"Judgment {j}" for j in range(1, 9)), "Greedy judgment"]
    assert sum(head.endswith(", kept") for head in heads) == 4
    assert sum(head.endswith(", left out") for head in heads) == 4
    assert "logit" not in heads[-1]
    for at, said in ((0, f"{HOSTILE} {LONG}"), (-1, "The first one is right.")):
        one = judgments.nth(at)
        one.locator("summary").click()
        assert one.locator(".part").all_inner_texts() == ["Principles", "Critique", "Scores"]
        opening, principles, critique, scores = one.locator("pre").all_text_contents()
        assert opening == "I look at all of them."
        assert principles == "**Specific Criteria:** correctness (70%), tone (30%)"
        assert critique == f"### Analysis\n{said}"
        assert scores.startswith("Scores: \\boxed{1, 1, 1, 9, 9, 9}")
        assert scores.endswith("once") == (at == -1)
        assert all(part.is_visible() for part in one.locator(".part, pre").all())
    assert width_of(rich) <= rich.viewport_size["width"]
    assert rich.locator("#cases script, #cases img, #cases b").count() == 0
    assert rich.evaluate("window.hit") is None


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
    text = judgments.first.locator("pre").first
    assert text.is_visible()
    assert text.text_content().startswith(f"{HOSTILE} {LONG}")
    assert page.locator("#cases script, #cases img, #cases b").count() == 0
    assert page.evaluate("window.hit") is None
    assert page.locator("script").count() == 2  # the data and the program


def test_nothing_is_wider_than_the_window(page, rich) -> None:
    nothing_is_wider(page)
    nothing_is_wider(rich)
    assert page.get_by_text("37.1 % (").first.bounding_box()["height"] < 40


def nothing_is_wider(page) -> None:
    assert width_of(page) <= page.viewport_size["width"]
    top = page.locator("h1, #protocol, #counts, #dropped, #warning, .charts, .charts figure, .scroll, .bar, #shown")
    for box in filter(None, (part.bounding_box() for part in top.all())):
        assert 0 <= box["x"] <= box["x"] + box["width"] <= page.viewport_size["width"]
    for i in range(4):
        page.locator("details.case > summary").nth(i).click()
        page.locator("details.case").nth(i).locator("details > summary").first.click()
    assert width_of(page) <= page.viewport_size["width"]
    # Wide tables scroll in their own boxes, and a number with its interval stays in one line.
    assert page.locator(".scroll").count() == page.locator("table").count() > 0
    assert [head for head in page.locator("tr:first-child").all_inner_texts() if not head.strip()] == []


def test_texts_can_be_read(page, rich) -> None:
    """Text has a contrast of 4.5 and more to what is behind it (WCAG 2.2, 1.4.3)."""
    rich.locator("details.case > summary").first.click()
    rich.locator("details.judgment > summary").first.click()
    for shown in (page, rich):
        ratios = shown.evaluate(CONTRASTS)
        assert len(ratios) > 8
        assert min(ratios.values()) >= 4.5, ratios
    assert {".part", ".part + pre", ".partly"} <= ratios.keys()


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
    for (const place of ["h1", "#protocol", "#counts", "#dropped", "#warning", "th", "td", "#filters button",
                         "#filters input", "#shown", ".part", ".part + pre", ".wrong", ".tied", ".partly",
                         ".failed", ".right", "summary", "svg text"]) {
        const node = document.querySelector(place);
        if (!node) continue;
        const style = getComputedStyle(node, place.includes("input") ? "::placeholder" : null);
        const color = node.closest("svg") ? style.fill : style.color;
        const [one, other] = [light(color), light(behind(node))].sort((a, b) => b - a);
        found[place] = (one + 0.05) / (other + 0.05);
    }
    return found;
}"""
