"""What the playground does with every kind of answer, in a browser and over fakes."""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from molex_serve.engine.base import Deliver, ExpertShare, Request
from molex_serve.errors import Conflict, Unavailable
from molex_serve.settings import ServerSettings
from tests.serve.http.browser import Page, chromium, opened
from tests.serve.http.conftest import Running, serving, wait_for
from tests.serve.http.fakes import FakeListed

HOSTILE = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def page(chrome: Chrome, served: Running) -> Iterator[Page]:
    with opened(chrome, served.url) as page:
        yield page


def attribute(running: Running, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    """Experts of these names serve the tokens of adapters in turns."""
    submit, counts = running.engine.submit, Counter()

    def with_names(request: Request, deliver: Deliver) -> None:
        def named(event: Any) -> None:
            shares = []
            for share in event.experts:
                counts[request.id] += 1
                shares.append(share and ExpertShare(names[counts[request.id] % len(names)], 0.5))
            deliver(replace(event, experts=tuple(shares)))

        submit(request, named)

    monkeypatch.setattr(running.engine, "submit", with_names)


def test_a_page_at_rest(page: Page) -> None:
    assert page.rows().keys() == {"base", "law"}
    assert "device" in page.rows()["law"]
    assert "1.0 kB" in page.rows()["law"]
    assert page.row("base").find_element(By.TAG_NAME, "input").is_selected()
    page.each("details", "element.open = true")
    shown = [element for element in page.all("input, textarea, button") if element.is_displayed()]
    assert all(element.accessible_name for element in shown)
    assert not page.one("#stop").is_enabled()


def test_texts_are_never_read_as_html(page: Page, served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    served.adapters.known[HOSTILE] = FakeListed(HOSTILE, kind=HOSTILE, pinned=True)
    served.engine.say = lambda request: HOSTILE.encode()
    attribute(served, monkeypatch, [HOSTILE])
    page.press("Clear")
    page.pick(HOSTILE)
    page.field("Chat").click()
    page.ask(HOSTILE)
    assert page.answered() == HOSTILE
    assert (page.one(".answer h2").text, page.one(".question").text) == (HOSTILE, HOSTILE)
    assert page.texts(".legend .name") == [HOSTILE]
    ActionChains(page.driver).move_to_element(page.all(".token")[2]).perform()
    assert page.one("#tip").text == f"{HOSTILE} · 50%"
    assert page.all("img") == []
    assert page.driver.title == "molex playground"


def test_what_was_set_is_what_is_asked(page: Page, served: Running) -> None:
    page.pick("law")
    for label, text in {"Temperature": "0.5", "Max tokens": "7", "Seed": "3", "Task": "2"}.items():
        page.fill(label, text)
    page.ask("one\ntwo")
    assert len(page.answered()) == 7
    (request,) = served.engine.submitted
    assert bytes(token for token in request.prompt_ids if token < 256) == b"one\ntwo"
    assert (request.sampling.temperature, request.sampling.max_tokens, request.sampling.seed) == (0.5, 7, 3)
    assert (request.task, request.experts, request.generation) == (2, True, "aaaaaaaaaaaa")
    assert "7 tokens · first after" in page.one(".figures").text
    assert "cut at max tokens" in page.one(".figures").text


def test_empty_fields_are_left_to_the_server(page: Page, served: Running) -> None:
    for label in ("Temperature", "Max tokens"):
        page.field(label).clear()
    page.ask("x")
    assert page.answered() == "[base]x"
    sampling = served.engine.submitted[0].sampling
    assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (1.0, None, 256)


def test_tokens_without_an_expert_are_plain(page: Page, served: Running) -> None:
    served.engine.say = lambda request: "naïve".encode()
    page.ask("x")
    assert page.answered() == "naïve"
    assert page.texts(".token") == ["n", "a", "ï", "v", "e"]
    assert page.all(".token[data-expert]") == []
    assert page.texts(".legend .name") == ["no expert"]
    assert page.texts(".legend .count") == ["7"]  # one of them two bytes, and the end
    ActionChains(page.driver).move_to_element(page.all(".token")[1]).perform()
    assert not page.one("#tip").is_displayed()


def test_a_character_that_is_cut_off_is_written_and_no_token(page: Page, served: Running) -> None:
    served.engine.say = lambda request: "é".encode()
    page.fill("Max tokens", "1")
    page.ask("x")
    assert page.answered() == "�"
    assert page.texts(".legend .count") == ["1"]
    assert page.one(".figures").text.startswith("1 token · first after")


def test_a_name_has_one_colour_and_other_names_have_others(
    page: Page, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"expert {number}" for number in range(20)]
    attribute(served, monkeypatch, names)
    served.engine.say = lambda request: b"x" * 40
    page.pick("law")
    page.ask("x")
    page.answered()

    def looks() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for expert, look in page.each(
            ".token", "[element.dataset.expert, element.dataset.colour + element.dataset.line]"
        ):
            found.setdefault(expert, set()).add(look)
        return found

    first = looks()
    assert first.keys() == set(names)
    assert len({look for own in first.values() for look in own}) == len(names) == sum(map(len, first.values()))
    monkeypatch.undo()
    attribute(served, monkeypatch, names[::-1])
    page.ask("y")
    page.answered()
    assert looks() == first


def test_a_chat_goes_on(page: Page, served: Running) -> None:
    page.field("Chat").click()
    served.engine.say = lambda request: b"first"
    page.ask("hello")
    page.answered()
    served.engine.say = lambda request: b"second"
    page.ask("and?")
    page.wait(lambda: page.texts(".answer .text") == ["first", "second"])
    page.answered()
    asked = bytes(token for token in served.engine.submitted[1].prompt_ids if token < 256)
    assert asked == b"hello\n= firstand?\n= "
    assert page.texts(".question") == ["hello", "and?"]
    page.press("Clear")
    page.ask("anew")
    page.answered()
    assert bytes(token for token in served.engine.submitted[2].prompt_ids if token < 256) == b"anew\n= "


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_stop_ends_the_request(page: Page, served: Running, chat: bool) -> None:
    served.engine.steps_left = 3
    served.engine.say = lambda request: b"abcdef"
    if chat:
        page.field("Chat").click()
    page.pick("law")
    page.ask("x")
    page.wait_for_text(".text", "abc")
    assert page.one("#answers").get_attribute("aria-busy") == "true"
    assert served.engine.stats().running == 1
    page.press("Stop")
    wait_for(lambda: served.engine.stats().running == 0)
    assert len(served.engine.cancelled) == 1
    assert page.answered() == "abc"
    assert page.one(".figures").text.endswith("stopped")
    assert page.one("#problem").text == ""


def test_an_answer_that_breaks_off_stays_with_the_reason(page: Page, served: Running) -> None:
    served.engine.fail_after = 3
    page.ask("x")
    assert page.answered() == "[ba"
    assert page.one("#problem").text == "engine_error: a step failed"
    assert page.one(".figures").text.endswith("broken off")


def test_a_question_that_is_refused_goes_back(page: Page, served: Running) -> None:
    served.adapters.busy = True
    page.field("Chat").click()
    page.pick("law")
    page.ask("hello")
    page.wait_for_text("#problem", "429 load_busy: every slot is in use (try again in 1 s)")
    page.wait(lambda: page.field("Prompt").get_property("value") == "hello")
    assert page.all(".answer") == []
    served.adapters.busy = False
    page.press("Run")
    page.answered()
    assert page.one("#problem").text == ""


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Conflict("expected generation a"), "409 generation_conflict: expected generation a"),
        (Unavailable("the server is stopping"), "503 unavailable: the server is stopping (try again in 5 s)"),
    ],
)
def test_refusals_of_the_administration(
    page: Page, served: Running, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    asked: list[tuple[str, str | None]] = []

    def refuse(alias: str, expected_generation: str | None) -> None:
        asked.append((alias, expected_generation))
        raise error

    monkeypatch.setattr(served.adapters, "unload", refuse, raising=False)
    page.press("Unload law")
    page.wait_for_text("#unload-problem", text)
    assert asked == [("law", "aaaaaaaaaaaa")]
    assert "law" in page.rows()


def test_a_model_that_goes_while_it_is_picked_leaves_none_picked(page: Page, served: Running) -> None:
    page.pick("law")
    del served.adapters.known["law"]
    page.wait(lambda: page.rows().keys() == {"base"})  # it looks again by itself
    page.ask("x")
    assert page.all("input[name=model]:checked") == []
    assert served.engine.submitted == []


def test_keys_are_asked_for_and_kept_in_the_tab(chrome: Chrome) -> None:
    settings = ServerSettings(port=0, api_key="secret", admin_key="größer")
    with serving(settings, key="secret") as running:
        page = Page(chrome, running.url)
        page.open()
        page.wait_for_text("#models-problem", "401 invalid_api_key: no valid key")
        page.fill("API key", "secret" + Keys.ENTER)
        page.wait(lambda: page.rows().keys() == {"base", "law"})
        assert page.one("#models-problem").text == ""
        page.press("Unload law")
        page.wait_for_text("#unload-problem", "401 invalid_api_key: no valid key")
        page.fill("Admin key", "größer" + Keys.ENTER)
        page.press("Unload law")
        page.wait(lambda: page.rows().keys() == {"base"})
        chrome.refresh()
        page.wait(lambda: page.rows().keys() == {"base"})
        assert page.each("#keys input", "element.value") == ["secret", "größer"]
        assert chrome.execute_script("return [Object.keys(localStorage), document.cookie]") == [[], ""]


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_its_window(page: Page, served: Running, width: int) -> None:
    long = "x" * 150
    served.adapters.known[long] = FakeListed(long)
    served.engine.say = lambda request: b"y" * 300
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        page.pick(long)
        page.ask("x")
        page.answered()
        assert page.each("html", "[element.scrollWidth, innerWidth]") == [
            [page.each("html", "element.clientWidth")[0], width]
        ]
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_its_policy_lets_it_speak_to_nobody_else(chrome: Chrome, served: Running) -> None:
    seen: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    page = Page(chrome, served.url)
    page.open()
    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        fetch = "fetch(arguments[0], {mode: 'no-cors'}).then(() => arguments[1](1), () => arguments[1](0))"
        assert chrome.execute_async_script(fetch, f"{url}/leak") == 0
        chrome.execute_script("new Image().src = arguments[0]", f"{url}/leak")
        assert seen == []
        chrome.get(f"{url}/open")
        other.shutdown()
    assert "/open" in seen  # the listener hears
    assert page.complaints()
    assert page.foreign()
