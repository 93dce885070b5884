"""The viewer and the report in a real browser: clicks, keys, search, the threshold slider, comparison, no errors.

SCREENSHOTS=folder keeps pictures of both.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from capipe.pipeline.view.queries import Query

from ..looking import words, write_captions, write_chain

CHROMIUM = "/usr/bin/chromium"
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("uvicorn", reason="the viewer needs capipe[view]")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"no {CHROMIUM} on this machine"),
]

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
SIZES = [40, 30]
COUNTED = "/ of [0-9,]+ rows$/.test(document.querySelector('#count').textContent)"  # to the end: not "looked at …"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain that the environment names (for pictures of it), else one made here with hostile captions."""
    given = os.environ.get("SHOWN")
    if given:
        return Path(given)
    return write_chain(tmp_path_factory.mktemp("shown"), SIZES, lambda index: f"{words(index)} {EVIL}")


@pytest.fixture(scope="module")
def address(chain: Path) -> Iterator[str]:
    from capipe.pipeline.view.app import create_app
    from capipe.pipeline.view.connections import server_of
    from capipe.pipeline.view.library import Library
    from capipe.pipeline.view.server import guarded, listen

    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    app = guarded(create_app(Library(chain)), "127.0.0.1", port, "a-token-for-this-test")
    server = server_of(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page of its own; whatever its console complains of fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    made = context.new_page()
    said: list[str] = []
    made.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    made.on("pageerror", lambda error: said.append(str(error)))
    yield made
    context.close()
    complaints = [text for text in said if "404" not in text and "400" not in text]  # no picture; a filter half typed
    assert not complaints


@pytest.fixture
def viewer(page: Any, address: str) -> Any:
    page.goto(f"{address}?token=a-token-for-this-test")
    page.wait_for_selector(".card")
    assert "token" not in page.url
    return page


def until(page: Any, expression: str, seconds: float = 20) -> None:
    """Wait for an expression to be true. Playwright's own waiting would ``eval``, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"{expression} did not come true: {page.locator('body').inner_text()[:800]}"
        page.wait_for_timeout(40)


def keep(page: Any, name: str) -> None:
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.wait_for_timeout(300)
        page.screenshot(path=str(Path(folder) / name))


def test_rows_search_and_filter(viewer: Any, chain: Path) -> None:
    assert viewer.title() != "owned" and viewer.locator("main script, main img[src='x']").count() == 0
    keep(viewer, "view.png")
    viewer.locator("#artifacts button", has_text="captions").first.click()
    until(viewer, "document.title.startsWith('captions')")
    viewer.wait_for_selector(".card img")
    total = int(re.sub(r"\D", "", viewer.locator("#count").inner_text()))
    viewer.keyboard.press("/")
    viewer.keyboard.type("number 1" if "SHOWN" not in os.environ else "purple")
    until(viewer, COUNTED)
    found, whole = map(int, re.findall(r"\d+", viewer.locator("#count").inner_text())[:2])
    assert 0 < found < whole == total
    viewer.keyboard.press("Escape")
    assert viewer.input_value("#search") and viewer.evaluate("document.activeElement === document.body")
    viewer.fill("#search", "")
    until(viewer, f"document.querySelector('#count').textContent === '{total} rows'")
    viewer.fill("#filter", "clip_scor > 0.3")
    until(viewer, "document.querySelector('#filter-error').textContent.includes('did you mean')")
    viewer.fill("#filter", "clip_score > 0.3")
    until(viewer, "document.querySelector('#filter-error').textContent === ''")
    until(viewer, COUNTED)
    assert "filter=clip_score" in viewer.url
    before = viewer.locator("#count").inner_text()
    viewer.reload()
    viewer.wait_for_selector(".card")
    until(viewer, f"document.querySelector('#count').textContent === '{before}'")
    assert viewer.input_value("#filter") == "clip_score > 0.3"


def test_keys_move_open_and_turn_pages(viewer: Any) -> None:
    viewer.keyboard.press("j")
    viewer.keyboard.press("j")
    second = viewer.locator(".card").nth(1)
    assert second.evaluate("card => card === document.activeElement")
    viewer.keyboard.press("k")
    viewer.keyboard.press("Enter")
    viewer.wait_for_selector("dialog#detail[open] section")
    assert "open=" in viewer.url and viewer.locator("#detail h3").count() > 3
    viewer.keyboard.press("Escape")
    until(viewer, "!document.querySelector('#detail').open")
    first = viewer.locator(".card .where").first.inner_text()
    viewer.keyboard.press("ArrowRight")
    until(viewer, f"document.querySelector('.card .where').textContent !== '{first}'")
    assert "shard=" in viewer.url
    viewer.keyboard.press("ArrowLeft")
    until(viewer, f"document.querySelector('.card .where').textContent === '{first}'")
    viewer.keyboard.press("?")
    assert viewer.locator("#help").is_visible()
    viewer.keyboard.press("Escape")
    viewer.go_back()
    until(viewer, f"document.querySelector('.card .where').textContent !== '{first}'")


def test_a_threshold_is_moved_with_the_slider(viewer: Any, chain: Path) -> None:
    from capipe.pipeline.view.library import Library, id_of
    from capipe.pipeline.view.queries import Finder

    viewer.keyboard.press("2")
    viewer.wait_for_selector("#slider")
    viewer.select_option("#column", "re_clip_score")
    until(viewer, "document.querySelector('#keep').textContent.includes('re_clip_score')")
    until(viewer, "!document.querySelector('#main').hasAttribute('aria-busy')")
    slider = viewer.locator("#slider")
    box = slider.bounding_box()
    viewer.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] / 2)
    viewer.mouse.down()
    viewer.mouse.move(box["x"] + box["width"] * 0.62, box["y"] + box["height"] / 2, steps=8)
    viewer.mouse.up()
    value = float(viewer.input_value("#value"))
    until(viewer, f"document.querySelector('#keep').textContent.endsWith('{value:g}\"')")
    until(viewer, "!document.querySelector('#stay').textContent.startsWith('about')")
    told = int(re.findall(r"\d+", viewer.locator("#stay b").inner_text())[0])
    found = Library(chain).table(id_of("captions"))
    assert told == Finder().threshold(found, "re_clip_score", Query(), value, True)["kept"] > 0
    assert viewer.locator("#go .card").count() and viewer.locator("#stays .card").count()
    keep(viewer, "threshold.png")
    slider.focus()
    viewer.keyboard.press("ArrowRight")
    assert float(viewer.input_value("#value")) > value
    viewer.click("#use")
    until(viewer, "document.querySelector('#filter').value.startsWith('re_clip_score >= ')")
    viewer.wait_for_selector(".rows .card")


def test_two_captioners_side_by_side(viewer: Any, chain: Path) -> None:
    viewer.click("#tab-compare")
    viewer.wait_for_selector(".sides")
    if "SHOWN" not in os.environ:
        viewer.select_option("#pick-left", "caption_plain")
        viewer.select_option("#pick-right", "other_caption_plain")
        until(viewer, "document.querySelector('.sides section:last-child h3').textContent.startsWith('other_')")
        viewer.check("#differ")
        until(viewer, COUNTED)
        rows = sum("red" in words(i) for i in range(sum(SIZES)) if i not in (SIZES[0] - 1, sum(SIZES) - 1))
        assert viewer.locator("#count").inner_text() == f"{rows} of {sum(SIZES)} rows"
        marks = viewer.locator(".sides mark").all_inner_texts()
        assert marks and set(marks) == {"red", "crimson"}
    keep(viewer, "compare.png")
    assert viewer.title() != "owned"


def test_a_refresh_shows_what_was_committed_since(viewer: Any, chain: Path) -> None:
    if "SHOWN" in os.environ:
        pytest.skip("nothing is written into a folder that was given")
    write_captions(chain / "shards", chain / "later", model="later", only=1)
    time.sleep(10.5)  # how long the viewer takes its list of folders to be right
    viewer.click("#refresh")
    until(viewer, "document.querySelector('#artifacts').textContent.includes('1 of 2 shards')")
    write_captions(chain / "shards", chain / "later", model="later")
    time.sleep(1.1)
    viewer.keyboard.press("r")
    until(viewer, "!document.querySelector('#artifacts').textContent.includes('1 of 2 shards')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_opens_without_an_error(page: Any, chain: Path, tmp_path: Path, scheme: str) -> None:
    from capipe.pipeline.report.page import write_report

    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.emulate_media(color_scheme=scheme)
    page.goto(Path(write_report(chain, tmp_path / "report.html")).as_uri())
    assert page.title().endswith("capipe") and page.locator("section").count() >= 5
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    assert page.locator("img").count() > 5 and page.evaluate(broken) == 0
    assert page.evaluate("[...document.images].every(image => image.alt)")
    assert page.locator("script, iframe, object, link, [onerror]").count() == 0
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("summary").first.click()
    if scheme == "light":
        page.set_viewport_size({"width": 1180, "height": 1560})
        page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
        page.evaluate("document.querySelector('#training').scrollIntoView()")
        keep(page, "report.png")
    wide = page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert wide
    assert page.pdf(path=str(tmp_path / "report.pdf"))
