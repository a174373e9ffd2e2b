"""The playground in headless Chromium, driven as a person would: by what is written on it, by clicks and keys."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1400,900"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-default-apps", "--disable-extensions", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
)
SECONDS = 20


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """Both paths are given, so that nothing is looked for on the network."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no chromium and chromedriver on PATH (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    options.add_experimental_option("perfLoggingPrefs", {"enableNetwork": True, "enablePage": False})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


@dataclass
class Page:
    driver: webdriver.Chrome
    url: str

    def open(self) -> None:
        for kind in ("performance", "browser"):
            self.driver.get_log(kind)  # what an earlier page did is none of this one's
        self.driver.get(self.url)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        (found,) = self.all(selector)
        return found

    def texts(self, selector: str) -> list[str]:
        """As they are in the document, spaces and line ends included."""
        return self.each(selector, "element.textContent")

    def each(self, selector: str, value: str) -> list[Any]:
        """A JavaScript expression's value of every element, at one moment."""
        script = f"return [...document.querySelectorAll(arguments[0])].map((element) => {value})"
        return self.driver.execute_script(script, selector)

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Elements may be replaced while they are read."""
        waiting = WebDriverWait(self.driver, SECONDS, 0.05, [StaleElementReferenceException])
        return waiting.until(lambda driver: condition())

    def wait_for_text(self, selector: str, text: str) -> None:
        self.wait(lambda: text in self.one(selector).text)

    def field(self, label: str) -> WebElement:
        """What a label that begins so belongs to."""
        labels = self.each("label", "[element.textContent.trim(), element.control]")
        (found,) = [control for text, control in labels if text.startswith(label)]
        return found

    def fill(self, label: str, text: str) -> None:
        field = self.field(label)
        field.clear()
        field.send_keys(text)

    def rows(self) -> dict[str, str]:
        """What the list of models says, by alias."""
        return dict(self.each(".model", "[element.querySelector('.alias').textContent, element.innerText]"))

    def row(self, alias: str) -> WebElement:
        return self.wait(
            lambda: dict(self.each(".model", "[element.querySelector('.alias').textContent, element]")).get(alias)
        )

    def pick(self, alias: str) -> None:
        self.row(alias).find_element(By.CLASS_NAME, "alias").click()

    def ask(self, prompt: str) -> None:
        """By Ctrl+Enter. Line ends are typed as such."""
        self.fill("Prompt", prompt)
        self.field("Prompt").send_keys(Keys.CONTROL, Keys.ENTER)

    def answered(self) -> str:
        """Waits for the end of the last answer. Its text."""
        self.wait(lambda: self.one("#run").is_enabled() and self.all(".answer"))
        return self.texts(".answer .text")[-1]

    def press(self, name: str) -> None:
        """The button whose name begins so."""
        buttons = self.each("button", "[element.ariaLabel ?? element.textContent.trim(), element]")
        (found,) = [button for text, button in buttons if text.startswith(name)]
        found.click()

    def requests(self) -> list[str]:
        """Where the page sent any since this was asked last."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def foreign(self) -> set[str]:
        """Of those, what went to another origin; what the page holds itself goes nowhere."""
        home = urlsplit(self.url).netloc
        return {url for url in self.requests() if urlsplit(url).scheme != "data" and urlsplit(url).netloc != home}

    def complaints(self) -> list[str]:
        """What the browser held against the page's own code since this was asked last; answers that were refused, it
        notes too."""
        logged = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [message for message in logged if "Failed to load resource" not in message]


@contextmanager
def opened(driver: webdriver.Chrome, url: str) -> Iterator[Page]:
    """A fresh page, which says nothing to any other server and breaks no rule of its own, whatever is done with it."""
    page = Page(driver, url)
    page.open()
    page.wait(page.rows)
    yield page
    assert page.foreign() == set()
    assert page.complaints() == []
