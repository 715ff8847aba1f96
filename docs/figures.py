# SPDX-License-Identifier: Apache-2.0
"""Run the commands in the documentation again, and put what they print below them: `make figures`.

A block that opens with three backticks and `console` has a command after `$` in its first line, and its output in the
others. Commands run in the root of the repository, in the order of the pages and of the blocks in a page; what goes to
stderr is shown only where a command fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md", "docs/python.md", "docs/rtdetr.md", "docs/onnx.md", "docs/cost.md", "examples/digits/README.md",
    "examples/digit_scenes/README.md", "bench/README.md",
)  # fmt: skip
BLOCK = re.compile(r"(?<=^```console\n)\$ (?P<command>[^\n]+)\n.*?(?=^```$)", re.MULTILINE | re.DOTALL)


def renewed(text: str) -> str:
    """A page with the output of its commands as it is now."""
    return BLOCK.sub(lambda block: f"$ {block['command']}\n{output(block['command'])}", text)


def output(command: str) -> str:
    """What a command prints, without spaces at the ends of lines."""
    print(f"$ {command}", file=sys.stderr, flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    printed = result.stdout + (result.stderr if result.returncode else "")
    return "".join(f"{line.rstrip()}\n" for line in printed.splitlines())


def main() -> None:
    """Renew the pages that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", default=PAGES, help="by default " + ", ".join(PAGES))
    for name in parser.parse_args().pages:
        path = ROOT / name
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
