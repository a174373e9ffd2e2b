"""The playground's routes, headers, files and colours. What it does is seen in a browser, in two files beside this."""

import itertools
import math
import re
import tomllib
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

import molex_serve.http
from molex_serve.settings import ServerSettings
from tests.serve.http.conftest import Running, serving

ROOT = Path(__file__).parents[3]
FOLDER = Path(molex_serve.http.__file__).parent / "assets" / "playground"
STYLE = (FOLDER / "playground.css").read_text()
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}


class Markup(HTMLParser):
    """linked: what a document refers to. inline: scripts and styles that stand in it, which the policy forbids."""

    def __init__(self, text: str):
        super().__init__()
        self.linked: list[str] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.linked += [str(given[name]) for name in ("src", "href") if name in given]
        self.inline += [name for name in given if name.startswith("on") or name == "style"]
        if tag == "style" or (tag == "script" and "src" not in given):
            self.inline.append(tag)


def reached(http: httpx.Client) -> dict[str, httpx.Response]:
    """The page and all that it and its scripts refer to, by path."""
    found, wanted = {}, ["/"]
    while wanted:
        path = wanted.pop()
        if path in found:
            continue
        found[path] = answer = http.get(path)
        links = Markup(answer.text).linked if path == "/" else re.findall(r'from "(\./[^"]+)"', answer.text)
        wanted += [urljoin(path, link) for link in links]
    return found


def test_every_file_is_reached_from_the_page_and_comes_with_a_strict_policy(shared: Running) -> None:
    found = reached(shared.http)
    files = {"/playground/" + path.name for path in FOLDER.iterdir()}
    assert {path for path in found if path != "/"} == files - {"/playground/index.html"}
    for path, answer in found.items():
        assert answer.status_code == 200
        suffix = Path(path).suffix or ".html"
        assert answer.headers["content-type"].partition(";")[0] == TYPES[suffix]
        assert answer.content == (FOLDER / (Path(path).name or "index.html")).read_bytes()
        rules = [part.strip().partition(" ") for part in answer.headers["content-security-policy"].split(";")]
        policy = {name: given for name, _, given in rules}
        assert policy.items() >= POLICY.items()
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_nothing_comes_from_elsewhere_and_nothing_is_inline() -> None:
    assert Markup((FOLDER / "index.html").read_text()).inline == []
    elsewhere, as_html = r"https?:|url\(|@import", r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\("
    for path in FOLDER.iterdir():
        text = path.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(f"{elsewhere}|{as_html}", text), path


@pytest.mark.parametrize("path", ["/", "/playground/playground.js"])
def test_what_the_browser_has_is_not_sent_again(shared: Running, path: str) -> None:
    first = shared.http.get(path)
    assert first.headers["cache-control"] == "no-cache"
    again = shared.http.get(path, headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    assert shared.http.get(path, headers={"If-None-Match": '"other"'}).content == first.content
    head = shared.http.head(path)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", first.headers["etag"])


@pytest.mark.parametrize("name", ["index.html", "nothing.js", "..%2Fplayground.py", "..%2f..%2fapp.py"])
def test_other_files_are_not_served(shared: Running, name: str) -> None:
    answer = httpx.get(f"{shared.url}/playground/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_the_page_asks_for_no_key_and_what_it_fetches_does() -> None:
    with serving(ServerSettings(port=0, api_key="secret")) as running:
        assert httpx.get(running.url).status_code == 200
        assert httpx.get(f"{running.url}/playground/playground.css").status_code == 200
        assert httpx.get(f"{running.url}/v1/models").status_code == 401


def test_every_file_is_in_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = Path(molex_serve.http.__file__).parent
    packed = {path for pattern in settings["molex_serve.http"] for path in package.glob(pattern) if path.is_file()}
    assert packed >= {path for path in (package / "assets").rglob("*") if path.is_file()}
    assert packed


# how the three kinds of colour-blindness see linear RGB (Machado, Oliveira and Fernandes 2009, at full severity)
EYES = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}

TO_LMS = (
    *((0.41222147, 0.53633254, 0.05144599), (0.21190350, 0.68069955, 0.10739696)),
    (0.08830246, 0.28171884, 0.62997870),
)
TO_LAB = (
    *((0.21045426, 0.79361779, -0.00407205), (1.97799850, -2.42859221, 0.45059371)),
    (0.02590404, 0.78277177, -0.80867577),
)


def dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def linear(colour: str) -> list[float]:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def contrast(one: str, other: str) -> float:
    """As WCAG defines it."""
    low, high = sorted(dot((0.2126, 0.7152, 0.0722), linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def oklab(rgb: Sequence[float]) -> list[float]:
    """Björn Ottosson's space, in which equal distances look about equal."""
    lms = [max(dot(row, rgb), 0.0) ** (1 / 3) for row in TO_LMS]
    return [dot(row, lms) for row in TO_LAB]


def colours_of(dark: bool) -> list[str]:
    pairs = re.findall(r"--expert: light-dark\((#\w{6}), (#\w{6})\)", STYLE)
    assert len(pairs) == 8
    return [pair[dark] for pair in pairs]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("eye", EYES)
def test_experts_colours_can_be_told_apart(eye: str, dark: bool) -> None:
    seen = [[min(max(dot(row, linear(colour)), 0), 1) for row in EYES[eye]] for colour in colours_of(dark)]
    pairs = itertools.combinations(map(oklab, seen), 2)
    assert min(math.dist(one, other) for one, other in pairs) > 0.09


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_lines_are_seen_and_texts_on_the_strongest_tint_are_legible(dark: bool) -> None:
    card, ink = (re.findall(rf"--{name}: (#\w{{6}})", STYLE)[dark] for name in ("card", "ink"))
    tint = (6 + int(re.findall(r"--tint: (\d+)%", STYLE)[dark])) / 100
    for colour in colours_of(dark):
        assert contrast(colour, card) >= 3
        parts = [round(tint * int(colour[i : i + 2], 16) + (1 - tint) * int(card[i : i + 2], 16)) for i in (1, 3, 5)]
        assert contrast(ink, "#{:02x}{:02x}{:02x}".format(*parts)) >= 4.5
