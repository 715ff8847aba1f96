"""docs/figures.py: pages that show what commands print get new output, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

from support.scripts import load_script

ROOT = Path(__file__).parent.parent
figures = load_script(ROOT / "docs" / "figures.py")


def test_the_output_of_a_block_is_renewed_and_nothing_else() -> None:
    page = "# Title\n\n```console\n$ echo 'new  ' && echo hidden >&2\nold\nold\n```\n\n```\n$ echo untouched\n```\n"
    renewed = "# Title\n\n```console\n$ echo 'new  ' && echo hidden >&2\nnew\n```\n\n```\n$ echo untouched\n```\n"
    assert figures.renewed(page) == renewed
    assert figures.renewed("```console\n$ true\n```\n") == "```console\n$ true\n```\n"


def test_a_command_that_fails_shows_why() -> None:
    assert figures.output("echo half; echo why >&2; exit 3") == "half\nwhy\n"
    assert figures.output("(echo half; exit 3) | cat") == "half\n"


def test_every_page_has_blocks_with_output() -> None:
    for name in figures.PAGES:
        blocks = list(figures.BLOCK.finditer((ROOT / name).read_text(encoding="utf-8")))
        assert blocks, name
        for block in blocks:
            assert len(block[0].splitlines()) > 1, block["command"]
