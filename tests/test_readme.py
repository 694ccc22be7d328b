"""The README says what is: its file tree is the checkout's, and its Python snippet runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf8")


def test_the_file_tree_is_current() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "file_tree.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    shown = README.split("<!-- tree -->\n")[1].split("\n<!-- /tree -->")[0].strip()
    assert shown == printed, "run: python scripts/file_tree.py --write"


def test_every_script_named_in_the_readme_exists() -> None:
    named = set(re.findall(r"scripts/[\w/]+\.(?:sh|py)", README))
    assert named >= {"scripts/quickstart.sh", "scripts/test.sh"}
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
