"""The playground in a browser over a whole server: its model, a LoRA, a mixture, and another LoRA to load."""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import pytest
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.keys import Keys

from molex.workbench import load_base, load_tokenizer
from molex_serve.assembly import Assembly, assemble
from molex_serve.http.server import Server
from molex_serve.settings import EngineSettings, ServerSettings
from tests.serve.http.browser import Page, chromium, opened
from tests.serve.http.conftest import wait_for
from tests.serve.test_assembly import adapters

READ = "({text: element.textContent, name: element.dataset.expert, share: Number(element.dataset.share)})"


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    with chromium() as driver:
        yield driver


@dataclass(frozen=True)
class Real:
    assembly: Assembly
    url: str


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    """The workbench's base with a LoRA and a mixture of three experts; another LoRA lies in the adapter root."""
    root = tmp_path_factory.mktemp("adapters")
    folders = adapters(root)
    known = {name: folders[name] for name in ("law", "routed")}
    settings = ServerSettings(port=0, adapter_root=str(root), drain_seconds=2)
    engine = EngineSettings(cache_tokens=512)
    assembly = assemble(load_base(), load_tokenizer(), known, server=settings, engine=engine)
    server = Server(assembly.app, settings, log_level="critical")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started or not thread.is_alive(), 30)
    try:
        yield Real(assembly, "http://{}:{}".format(*server.address))
    finally:
        server.should_exit = True
        thread.join(20)
        assembly.close()
    assert not thread.is_alive()


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_a_mixtures_tokens_come_in_the_colours_of_its_experts(chrome: Chrome, real: Real, chat: bool) -> None:
    prompt, asked = "upper: hello", {"model": "routed", "max_tokens": 24, "temperature": 0, "return_experts": True}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    asked |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    choice = httpx.post(real.url + path, json=asked, timeout=60).json()["choices"][0]
    text = choice["message"]["content"] if chat else choice["text"]
    with opened(chrome, real.url) as page:
        if chat:
            page.field("Chat").click()
        page.pick("routed")
        page.fill("Max tokens", "24")
        page.ask(prompt)
        assert page.answered() == text == "".join(page.texts(".token"))
        shown = page.each(".token", READ)
        assert shown == [expert for expert in choice["experts"] if expert["text"]]
        assert len(shown) > 3
        counts = dict(zip(page.texts(".legend .name"), map(int, page.texts(".legend .count")), strict=True))
        assert counts == Counter(expert["name"] for expert in choice["experts"])
        check_tips(page, shown)


def check_tips(page: Page, shown: list[dict[str, Any]]) -> None:
    """By the mouse, and by the keyboard alone."""

    def tip(number: int) -> str:
        return f"{shown[number]['name']} · {round(100 * shown[number]['share'])}%"

    actions = partial(ActionChains, page.driver)
    assert not page.one("#tip").is_displayed()
    actions().move_to_element(page.all(".token")[3]).perform()
    assert page.one("#tip").text == tip(3)
    actions().move_to_element(page.field("Prompt")).perform()
    assert not page.one("#tip").is_displayed()
    page.one("#clear").send_keys("")  # focuses it
    actions().send_keys(Keys.TAB, Keys.TAB).perform()
    assert page.one("#tip").text == tip(0)
    actions().send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT).perform()
    assert page.one("#tip").text == tip(1)
    assert page.all(".token")[1].get_attribute("aria-describedby") == "tip"
    actions().send_keys(Keys.END).perform()
    assert page.one("#tip").text == tip(-1)
    actions().send_keys(Keys.ESCAPE).perform()
    assert not page.one("#tip").is_displayed()


def test_adapters_come_to_the_device_and_go(chrome: Chrome, real: Real) -> None:
    with opened(chrome, real.url) as page:
        page.one("#load-panel summary").click()
        refused = httpx.post(f"{real.url}/v1/adapters", json={"alias": "again", "path": "nowhere"}, timeout=60)
        page.fill("Alias", "again")
        page.fill("Path", "nowhere" + Keys.ENTER)
        page.wait_for_text("#load-problem", refused.json()["error"]["message"])
        assert page.one("#load-problem").text.startswith(f"{refused.status_code} bad_adapter: ")
        page.fill("Path", "code")
        page.field("Pin").click()
        page.press("Load")
        page.wait_for_text("#load-status", "Loaded again: lora")
        assert page.one("#load-problem").text == ""
        page.wait(lambda: "again" in page.rows())
        assert all(fact in page.rows()["again"] for fact in ("device", "lora", "pinned", "kB"))
        page.pick("again")
        page.fill("Max tokens", "4")
        page.ask("upper: hello")
        page.answered()
        assert page.one(".answer h2").text == "again"
        page.press("Unload again")
        page.wait(lambda: "again" not in page.rows())
    assert {model["id"] for model in httpx.get(f"{real.url}/v1/models").json()["data"]} == {"base", "law", "routed"}


def test_an_adapter_is_seen_to_arrive(chrome: Chrome, real: Real) -> None:
    with opened(chrome, real.url) as page:
        assert "disk" in page.rows()["law"]
        page.pick("law")
        page.fill("Max tokens", "4")
        page.ask("upper: hello")
        page.answered()
        page.wait(lambda: "device" in page.rows()["law"] and "lora" in page.rows()["law"])


def test_stop_ends_the_request_in_a_real_engine(chrome: Chrome, real: Real) -> None:
    def cancelled() -> bool:
        return 'molex_cancelled_total{adapter="routed"} 1.0' in httpx.get(f"{real.url}/metrics").text

    engine = real.assembly.engine
    with opened(chrome, real.url) as page:
        page.pick("routed")
        page.fill("Max tokens", "400")
        assert not cancelled()
        with engine.paused():  # so that it is not over before the button is found
            page.ask("upper: hello")
            wait_for(lambda: engine.stats().running + engine.stats().waiting == 1)
            page.press("Stop")
            wait_for(cancelled)
        wait_for(lambda: engine.stats().running + engine.stats().waiting == 0)
        page.wait(lambda: page.one("#run").is_enabled())
        assert page.one("#problem").text == ""
