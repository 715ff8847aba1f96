"""Is a report a whole page that needs nothing else?"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = ("meta", "circle", "path", "br", "input")


class Balanced(HTMLParser):
    """Checks that every tag is closed, and that nothing is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {name for name, _ in attrs} & {"src", "href", "onload"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def check_page(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert "http" not in text.split("</style>")[0]
    assert "prefers-color-scheme: dark" in text
    return text
