"""The main job as a terminal of 80 columns shows it, drawn for the docs' front page.

python benchmarks/terminal.py         runs the two commands and writes docs/images/terminal.svg
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "terminal.svg"
COMMANDS = (
    "tersor quantize demo --out small --bits 4 --samples 32 --seq-len 256",
    'tersor generate small --prompt "The ship left the harbour" --max-new-tokens 24',
)


def shortened(printed: str) -> str:
    """The middle of a long table is left out."""
    lines = printed.rstrip().splitlines()
    return "\n".join([*lines[:8], "...", *lines[-8:]] if len(lines) > 20 else lines)


def main() -> None:
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            words = [sys.executable, "-m", "tersor", *shlex.split(command)[1:]]
            done = subprocess.run(
                words, cwd=folder, env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True, check=True
            )
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")), soft_wrap=False)
            console.print(Text(shortened(done.stdout)), soft_wrap=False)
            console.print()
    drawn = console.export_svg(title="tersor", theme=MONOKAI, unique_id="tersor")
    # No reader of the docs fetches a font from elsewhere.
    PICTURE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    main()
