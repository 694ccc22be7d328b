"""Print the README's file tree: every file of the house with the first sentence of its docstring.

python scripts/file_tree.py            # print it
python scripts/file_tree.py --write    # put it into README.md (tests/test_readme.py holds the two equal)
"""

import argparse
import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = {
    "storage_specs": "ground floor: what a cache is",
    "cache_builder": "upper floor: how a cache is made",
    "distill": "upper floor: how a student learns from one",
    "scripts": "verbs: set-up, quickstart, benchmarks",
    "tests": "mirrors the rooms",
}
WITHOUT_DOCSTRING = {
    "storage_specs/SPEC.md": "The format in prose, for a stranger to implement.",
    "scripts/constraints.txt": "Pinned versions of what quickstart.sh and test.sh install.",
}
SHOWN = {".py", ".sh", ".md", ".txt"}


def first_sentence(path: Path) -> str:
    """What a file says of itself, up to its first full stop."""
    name = path.relative_to(ROOT).as_posix()
    if name in WITHOUT_DOCSTRING:
        return WITHOUT_DOCSTRING[name]
    text = path.read_text(encoding="utf8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".sh":
        text = next(line for line in text.splitlines() if line.startswith("# ")).removeprefix("# ")
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[\w`)\]])\.(?:\s|$)", paragraph)[0].removesuffix(":")


def tree() -> str:
    """The tree as Markdown code block."""
    listed = subprocess.run(["git", "ls-files", *ROOMS], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = sorted(ROOT / name for name in listed.splitlines())
    lines = []
    for room, purpose in ROOMS.items():
        lines.append(f"{room + '/':<38}{purpose}")
        for path in files:
            inside = path.relative_to(ROOT).as_posix()
            if not inside.startswith(f"{room}/") or path.suffix not in SHOWN or not path.is_file():
                continue
            if room == "tests" and path.suffix != ".md" and "/" in inside.removeprefix("tests/"):
                continue  # the rooms of tests/ mirror the house; one line per file would only repeat it
            if sentence := first_sentence(path):
                lines.append(f"  {inside.removeprefix(room + '/'):<36}{sentence}")
    return "```\n" + "\n".join(lines) + "\n```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tree into README.md")
    if not parser.parse_args().write:
        print(tree())
        return
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf8")
    begin, end = "<!-- tree -->\n", "\n<!-- /tree -->"
    head, rest = text.split(begin)
    readme.write_text(head + begin + tree() + end + rest.split(end)[1], encoding="utf8")


if __name__ == "__main__":
    main()
