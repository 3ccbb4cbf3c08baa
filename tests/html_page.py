"""Reads the pages that reports write."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "path", "use", "br"}


class Page(HTMLParser):
    """Collects elements, checks nesting, and keeps the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        assert self.open == [], f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def words(html: str) -> str:
    return " ".join("".join(Page(html).text).split())


def check_self_contained(html: str) -> None:
    """Nothing is loaded or run, ids and what refers to them agree, and the page can be read aloud."""
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    for tag, attrs in page.elements:
        for key, value in attrs.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "href", "xlink:href"):
                assert value.startswith(("data:image/png;base64,", "#")), (tag, key, value[:80])
            assert "url(" not in (value or "").replace("url(#", ""), (tag, key)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {v.removeprefix("#") for _, a in page.elements for k, v in a.items() if k == "xlink:href"}
    links |= {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a}
    links |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert links <= set(ids)
    assert all(attrs.get("alt") for attrs in page.all("img"))
    assert all(attrs.get("scope") in ("row", "col") for attrs in page.all("th"))
    assert all(attrs.get("aria-label") for attrs in page.all("svg"))
    assert "default-src 'none'" in page.all("meta")[1]["content"]
    tables, scrollers = len(page.all("table")), [a for a in page.all("div") if a.get("class") == "scroll"]
    assert tables == len(scrollers)
    assert all(scroller["tabindex"] == "0" for scroller in scrollers)
