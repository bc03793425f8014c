"""The page in a real browser. ``IMGLISH_SCREENSHOTS=FOLDER`` keeps what it looks like."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from imglish.search import Index, Query, Results
from tests.web import support

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("selenium", reason="needs selenium")
DRIVER, CHROMIUM = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(DRIVER is None or CHROMIUM is None, reason="no Chromium or no chromedriver on this machine"),
]

KEY = "correct horse battery"


class Held(Index):
    """Reranks when it may."""

    may_rerank = threading.Event()

    def search_many(self, queries: Sequence[Query]) -> list[Results]:
        if any(query.rerank for query in queries):
            assert self.may_rerank.wait(60)
        return super().search_many(queries)


@pytest.fixture(scope="module")
def held(index: Index) -> Held:
    return Held(index.store, index.manifest, index.model)


def _serve(index: Index, **settings: Any) -> Iterator[str]:
    import uvicorn

    from imglish.web.app import create
    from imglish.web.guard import Settings

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create(index, Settings(**settings)), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)
    listener.close()


@pytest.fixture(scope="module")
def address(held: Held) -> Iterator[str]:
    yield from _serve(held)


@pytest.fixture(scope="module")
def locked_address(held: Held) -> Iterator[str]:
    yield from _serve(held, key=KEY)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--lang=en-US", "--window-size=1200,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(str(DRIVER)))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, held: Held, address: str) -> Any:
    Held.may_rerank.set()
    browser.get(address)
    _until(browser, "return document.getElementById('message-title').textContent.length > 0")
    return browser


def _until(browser: Any, script: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(script), script)


def _order(browser: Any) -> list[str]:
    found: list[str] = browser.execute_script(
        "return [...document.querySelectorAll('#grid li')].map(i => i.dataset.key)"
    )
    return found


def _status(browser: Any) -> str:
    return str(browser.find_element("id", "status").text)


def _ask(browser: Any, words: str) -> None:
    box = browser.find_element("id", "words")
    box.clear()
    box.send_keys(words + "\n")


def _press(browser: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def _look(browser: Any, name: str) -> None:
    folder = os.environ.get("IMGLISH_SCREENSHOTS")
    if folder:
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def _settled(browser: Any) -> None:
    _until(browser, "return document.getAnimations().length === 0")
    _until(browser, "return [...document.images].every(image => image.complete)")


def test_the_grid_is_there_at_once_and_reorders(page: Any, index: Index) -> None:
    _look(page, "start")
    Held.may_rerank.clear()
    _ask(page, "a red hat")
    _until(page, "return document.querySelectorAll('#grid li').length === 24")
    assert _order(page) == [hit.key for hit in index.search("a red hat", k=40, rerank=0).hits]
    assert "looked at more closely" in _status(page)
    assert page.execute_script("return document.querySelectorAll('.badges span').length") == 0
    _settled(page)
    _look(page, "towers")
    Held.may_rerank.set()
    _until(page, "return document.querySelectorAll('.badges .up').length > 0")
    wanted = index.search("a red hat", k=40, rerank=40)
    assert _order(page) == [hit.key for hit in wanted.hits]
    badges = page.execute_script("return [...document.querySelectorAll('#grid li')].map(i => i.innerText.trim())")
    for hit, badge in zip(wanted.hits, badges, strict=True):
        sign = "▲" if hit.moved > 0 else "▼"
        assert (f"{sign}{abs(hit.moved)}" in badge) == (hit.moved != 0)
    _settled(page)
    _look(page, "reranked")
    _rows_fill_the_width(page)
    assert page.current_url.endswith("?q=a+red+hat")
    assert page.title != "taken"  # the script in a caption
    assert not [line for line in page.get_log("browser") if line["level"] == "SEVERE"]


def _rows_fill_the_width(page: Any) -> None:
    boxes = page.execute_script(
        "return [...document.querySelectorAll('#grid li')].map(i => [i.offsetTop, i.offsetLeft + i.offsetWidth])"
    )
    width = page.execute_script("return document.getElementById('grid').clientWidth")
    rows: dict[int, int] = {}
    for top, right in boxes:
        rows[top] = max(rows.get(top, 0), right)
    assert len(rows) > 2
    assert all(abs(rows[top] - width) <= 3 for top in sorted(rows)[:-1])
    assert page.execute_script("return document.documentElement.scrollWidth") <= page.execute_script(
        "return innerWidth"
    )


def test_keyboard_and_the_large_picture(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    _ask(page, "a hat")
    _until(page, "return document.querySelectorAll('.badges span').length > 0")
    _settled(page)
    order = _order(page)
    _press(page, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert page.execute_script("return document.activeElement.closest('li').dataset.key") == order[1]
    _press(page, Keys.ENTER)
    _until(page, "return document.querySelectorAll('#similar .tile').length === 12")
    _settled(page)
    assert page.execute_script("return document.getElementById('view').open")
    _look(page, "large")
    _press(page, Keys.ARROW_LEFT)
    name = "return [...document.querySelectorAll('#facts dd')].at(-1).textContent"
    _until(page, f"return ({name.removeprefix('return ')}) === {order[0]!r}")
    page.execute_script("document.querySelector('#similar .tile').click()")
    _until(page, f"return ({name.removeprefix('return ')}) !== {order[0]!r}")
    _press(page, Keys.ESCAPE)
    _until(page, "return !document.getElementById('view').open")
    _press(page, "/")
    assert page.execute_script("return document.activeElement.id") == "words"


def test_the_words_are_shown_in_the_picture(page: Any, index: Index) -> None:
    _ask(page, "a red hat")
    _until(page, "return document.querySelectorAll('.badges span').length > 0")
    page.execute_script("document.querySelector('#grid li[data-key=\"in/4.jpg\"] .tile').click()")
    _until(page, "return document.querySelectorAll('#found-words button').length > 0")
    wanted, _ = index.explain("in/4.jpg", "a red hat")
    chips = page.find_elements("css selector", "#found-words button")
    assert [chip.text for chip in chips] == ["all words", *wanted.words]
    assert page.execute_script("return document.getElementById('heat').hidden")
    _until(page, "return document.getElementById('large').naturalWidth === 180")  # the original
    chips[1].click()
    _settled(page)
    seen = page.execute_script(
        "const c = document.getElementById('heat'), i = document.getElementById('large');"
        "const [a, b] = [c.getBoundingClientRect(), i.getBoundingClientRect()];"
        "const data = [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data];"
        "return [c.hidden, a.width / a.height, Math.abs(a.x + a.width / 2 - b.x - b.width / 2),"
        "  data.filter((_, k) => k % 4 === 3)]"
    )
    assert seen[0] is False
    assert seen[1] == pytest.approx(180 / 240, abs=0.01)  # lies on the picture, not on the window
    assert seen[2] < 1
    heat = wanted.maps[0].flatten()
    alpha = [190 * level / max(float(heat.max()), 1e-12) for level in heat.tolist()]
    assert seen[3] == pytest.approx(alpha, abs=3)
    _look(page, "words")
    chips[1].click()
    page.execute_script("document.activeElement.blur()")
    page.find_element("id", "close").click()
    assert page.execute_script("return document.getElementById('heat').hidden")


def test_a_script_in_a_caption_is_text(page: Any) -> None:
    _ask(page, "a bag")
    _until(page, "return document.querySelectorAll('.badges span').length > 0")
    page.execute_script(
        "[...document.querySelectorAll('#grid li')].find(i => i.dataset.key.includes('<b')).firstChild.click()"
    )
    _until(page, "return document.getElementById('captions').textContent.length > 0")
    assert page.find_element("id", "captions").text == support.SCRIPT
    assert page.execute_script("return document.querySelectorAll('#captions img, #captions script').length") == 0
    assert page.title != "taken"


def test_a_picture_and_what_is_none(page: Any, folder: Path, tmp_path: Path) -> None:
    page.find_element("id", "file").send_keys(str(folder / "photos" / "in" / "5.jpg"))
    _until(page, "return document.querySelectorAll('#grid li').length > 0")
    assert _order(page)[0] == "in/5.jpg"
    _settled(page)
    _look(page, "by-picture")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    page.find_element("id", "file").send_keys(str(broken))
    _until(page, "return !document.getElementById('retry').hidden")
    assert "cannot be read as a picture" in page.find_element("id", "message").text
    _look(page, "error")


def test_nothing_found(page: Any) -> None:
    page.find_element("id", "more-options").click()
    page.find_element("id", "where").send_keys("path starts 'nowhere'")
    _ask(page, "a hat")
    _until(page, "return document.getElementById('message-title').textContent === 'No picture found'")
    _look(page, "none")


def test_chinese_dark_and_narrow(page: Any) -> None:
    page.find_element("id", "language").click()
    assert page.execute_script("return document.documentElement.lang") == "zh-CN"
    assert page.find_element("id", "go").text == "搜索"
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        _ask(page, "黑色上衣")
        _until(page, "return document.querySelectorAll('.badges span').length > 0")
        _settled(page)
        _rows_fill_the_width(page)
        assert "词表" not in _status(page)
        _ask(page, "雪地")  # of which the model knows nothing
        _until(page, "return document.getElementById('status').textContent.includes('词表中没有其中 2 个词')")
        _settled(page)
        back = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert back == "rgb(22, 22, 21)"
        _look(page, "phone-dark-chinese")
        page.execute_script("document.querySelector('#grid .tile').click()")
        _until(page, "return document.querySelectorAll('#similar .tile').length === 12")
        _settled(page)
        _look(page, "phone-large")
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        page.execute_script("localStorage.clear()")


def test_the_page_asks_for_the_key(browser: Any, locked_address: str) -> None:
    Held.may_rerank.set()
    browser.get(locked_address)
    _until(browser, "return !document.getElementById('key-form').hidden")
    _look(browser, "key")
    browser.find_element("id", "key").send_keys("wrong\n")
    _until(browser, "return document.getElementById('message-text').textContent === 'That is not the key.'")
    browser.find_element("id", "key").send_keys(KEY + "\n")
    _until(browser, "return document.getElementById('message-title').textContent === 'What are you looking for?'")
    _ask(browser, "a hat")
    _until(browser, "return document.querySelectorAll('.badges span').length > 0")
    _settled(browser)
    assert browser.execute_script("return document.querySelector('#grid img').naturalWidth") > 0
