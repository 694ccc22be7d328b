"""The house's plan (design.md, section 1): who may import whom, and what a command may load before it runs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from cache_builder.commands import SUMMARY

ROOT = Path(__file__).parents[1]
ROOMS = ("storage_specs", "cache_builder", "distill")
FORBIDDEN = {
    "storage_specs": {"cache_builder", "distill", "torch", "transformers", "vllm"},
    "cache_builder": {"distill"},
    "distill": {"cache_builder", "vllm"},
}
HEAVY = {"torch", "transformers", "tokenizers", "vllm", "zarr", "pyarrow", "numpy", "datasets"}


def imported(file: Path) -> set[str]:
    """Top-level names of everything that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf8"), filename=str(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            names.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names |= {str(item.value).partition(".")[0] for item in node.args if isinstance(item, ast.Constant)}
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        assert not imported(file) & FORBIDDEN[room], f"{file.relative_to(ROOT)} imports what {room} must not"


def test_the_check_sees_lazy_imports(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    from torch.nn import Linear\n    import_module('vllm.x')\n")
    assert imported(tmp_path / "a.py") == {"torch", "vllm"}


def run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below a node but what only annotations need (`if TYPE_CHECKING:`)."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING"):
            yield child
            yield from run_nodes(child)


def import_graph(root: Path, rooms: tuple[str, ...]) -> dict[str, set[str]]:
    """{module: the modules of these rooms that it names in an import, inside functions too}. Packages that are imported
    on the way to a module do not count."""
    files = {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for room in rooms
        for file in (root / room).rglob("*.py")
    }
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, file in files.items():
        for node in run_nodes(ast.parse(file.read_text(encoding="utf8"))):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in files}
            elif isinstance(node, ast.ImportFrom):
                graph[name] |= {
                    module
                    for alias in node.names
                    if (module := f"{node.module}.{alias.name}") in files or (module := str(node.module)) in files
                }
    return graph


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = import_graph(ROOT, ROOMS)
    assert "storage_specs.errors" in graph["cache_builder.engines.vllm"]
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def test_the_check_sees_circles(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text("from room.b import f\n")
    (tmp_path / "room" / "b.py").write_text("if TYPE_CHECKING:\n    from room import a\n")
    assert list(TopologicalSorter(import_graph(tmp_path, ("room",))).static_order()) == ["room.b", "room.a"]
    for imports in ("from room import a", "from room.a import f", "import room.a"):
        (tmp_path / "room" / "b.py").write_text(f"def f():\n    {imports}\n")
        with pytest.raises(CycleError, match="cycle"):
            list(TopologicalSorter(import_graph(tmp_path, ("room",))).static_order())


@pytest.mark.parametrize("command", [*SUMMARY, ""])
def test_help_of_cache_builder_loads_nothing_heavy(command: str) -> None:
    code = (
        "import sys, contextlib\n"
        "from cache_builder.main import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(sys.argv[1:])\n"
        f"print(*sorted(set(sys.modules) & {HEAVY!r}), file=sys.stderr)"
    )
    words = [command, "--help"] if command else ["--help"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
    assert f"cache-builder {command}".strip() in done.stdout
