"""The files of the console: what is served at which path, and that they need nothing of elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib import resources

import pytest

from onecard.server.console import CONSOLE_HEADERS, FILES, console_file

SCRIPTS = [name for name in FILES if name.endswith(".js")]


def text_of(name: str) -> str:
    found = console_file("/" if name == "console.html" else f"/console/{name}")
    assert found is not None, name
    return found.body.decode()


class _Reader(HTMLParser):
    """Collects what a strict content security policy forbids, the addresses, the ids and what labels name."""

    def __init__(self) -> None:
        super().__init__()
        self.inline: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.labelled: list[str] = []
        self._tag = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        for name, value in attrs:
            if name == "style" or name.startswith("on"):
                self.inline.append(f"{tag} {name}")
            if name in ("src", "href"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if name in ("for", "aria-labelledby", "aria-describedby"):
                self.labelled.append(value or "")

    def handle_data(self, data: str) -> None:
        if self._tag in ("script", "style") and data.strip():
            self.inline.append(self._tag)

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""


def page() -> _Reader:
    reader = _Reader()
    reader.feed(text_of("console.html"))
    return reader


def test_every_file_is_served_with_its_type() -> None:
    for name, content_type in FILES.items():
        found = console_file("/" if name == "console.html" else f"/console/{name}")
        assert found is not None and found.content_type == content_type and found.body
    there = {each.name for each in resources.files("onecard.server").joinpath("static").iterdir()}
    assert there == set(FILES)


@pytest.mark.parametrize(
    "path",
    [
        "", "//", "/console", "/console/", "/console/console.html", "/console/nothing.js", "/console.js", "/v2",
        "/console/../console.py", "/console/..%2fconsole.py", "/console//console.js", "/console/./console.js",
        "console.js",
    ],
)  # fmt: skip
def test_nothing_else_is(path: str) -> None:
    assert console_file(path) is None


def test_policy_allows_only_this_server_and_nothing_inline() -> None:
    policy = dict(CONSOLE_HEADERS)[b"Content-Security-Policy"].decode()
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'self'"
    assert "unsafe" not in policy and "http" not in policy
    assert {rules[name] for name in ("object-src", "base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert page().inline == []


def test_nothing_comes_from_elsewhere() -> None:
    local = [address for address in page().addresses if not address.startswith(("v2/", "metrics"))]
    assert local
    for address in local:
        assert console_file(f"/{address}") is not None, address
    for name in FILES:
        found = re.findall(r"https?://[^\s\"'`)]+|(?<![:/])//[a-z0-9-]+\.[a-z]", text_of(name))
        assert set(found) <= {"http://www.w3.org/2000/svg"}, name


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_what_is_there_and_make_no_markup_of_text(name: str) -> None:
    text = text_of(name)
    for imported in re.findall(r'from "([^"]+)"', text):
        assert console_file(f"/console/{imported.removeprefix('./')}") is not None, imported
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


def test_every_element_that_a_script_asks_for_is_in_the_page() -> None:
    reader = page()
    assert len(reader.ids) == len(set(reader.ids))
    asked = {each for name in SCRIPTS for each in re.findall(r'byId\("([^"]+)"\)', text_of(name))}
    assert asked
    assert asked <= set(reader.ids)
    assert set(reader.labelled) <= set(reader.ids)


def test_token_is_kept_nowhere() -> None:
    kept = [
        name for name in SCRIPTS if re.search(r"localStorage|sessionStorage|document\.cookie|indexedDB", text_of(name))
    ]
    assert kept == ["console.js"]
    assert re.findall(r'(?:get|set)Item\("([^"]+)"', text_of("console.js")) == ["onecard-theme"] * 2
