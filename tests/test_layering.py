"""Oracle: the rules of CONTRIBUTING.md that a machine can check, read off the source text by ``ast``.

Imports under ``if TYPE_CHECKING:`` do not exist at run time and are free; all others count, also inside functions.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "lcl_megatron"
MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
SCRIPTS = [ROOT / "pretrain_lcl.py", *sorted((ROOT / "tools").glob("*.py"))]
SOURCES = [
    *MODULES,
    *SCRIPTS,
    *(path for folder in ("tests", "benchmarks", "examples") for path in sorted((ROOT / folder).rglob("*.py"))),
]

ALLOWED = {
    "config": set(),
    "losses": {"config"},
    "data": {"config"},
    "model": {"config"},
}
"""What a folder may import of the others. Folders not named are free, as long as no cycle arises."""
PLANNER, PLANNER_MAY_IMPORT = "costs", ("config", "data.pages", "model.line", "model.drop_rates", "training.flops")
"""The planner derives a run from its configuration alone: it works without torch, and no run depends on it."""
ONLY_PARALLEL = ("torch.distributed", "megatron.core.parallel_state")
HOMELESS = {"utils", "util", "common", "helpers", "misc"}
MAX_FILE, MAX_FUNCTION, MAX_SCRIPT = 400, 60, 80

TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".sh", ".yaml", ".yml", ".json", ".cfg", ".sbatch", ""}
UNTRACKED = {".git", ".venv", "__pycache__", "build", "dist", "runs", "node_modules"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home)(?=/|\b(?!space))")
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder(module: str) -> str:
    """Return ``data`` for ``lcl_megatron.data.batch``, and nothing for the package itself."""
    return (module.split(".") + [""])[1]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but those under ``if TYPE_CHECKING:``."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from runtime_nodes(other)
        else:
            yield from runtime_nodes(child)


def imported_names(path: Path) -> set[str]:
    """Return every dotted name a file imports, ``from a import b`` as ``a.b``."""
    names: set[str] = set()
    for node in runtime_nodes(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import; write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@cache
def import_graph() -> dict[str, set[str]]:
    """Return the modules of the package that each of its modules imports."""
    known = {module_name(path) for path in MODULES}
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        name = module_name(path)
        targets = {target if target in known else target.rpartition(".")[0] for target in imported_names(path)}
        graph[name] = (targets & known) - {name}
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of one cycle, or nothing."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, set())):
            if cycle := visit(target, [*path, node]):
                return cycle
        done.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield name and length of every function, its docstring not counted."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            is_doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            doc_lines = (first.end_lineno or 0) - first.lineno + 1 if is_doc else 0
            yield f"{relative(path)}:{node.lineno} {node.name}", (node.end_lineno or 0) - node.lineno + 1 - doc_lines


def line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def text_files() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = parts[0].startswith(".") and parts[0] not in (".ci", ".pre-commit-config.yaml", ".dockerignore")
        skipped = hidden or UNTRACKED & set(parts) or any(part.endswith(".egg-info") for part in parts)
        if path.is_file() and not skipped and path.suffix in TEXT_SUFFIXES:
            yield path


def test_find_cycle_finds_one_and_only_one_that_is_there() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_runtime_nodes_leave_out_type_checking_only() -> None:
    code = "import a\nif TYPE_CHECKING:\n    import b\nelse:\n    import c\ndef f():\n    import d\n"
    names = [node.names[0].name for node in runtime_nodes(ast.parse(code)) if isinstance(node, ast.Import)]
    assert names == ["a", "c", "d"]


def test_machine_path_pattern() -> None:
    assert all(MACHINE_PATH.search(text) for text in ("/" + "work/x", "'/" + "root'", "(/" + "home/me)"))
    assert not any(MACHINE_PATH.search(text) for text in ("/workspace/x", "a/root/b", "../home/x", "/data/work/x"))


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_folder_imports_only_what_it_may(name: str) -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in import_graph().items()
        if folder(module) == name
        for target in sorted(targets)
        if folder(target) and folder(target) != name and folder(target) not in ALLOWED[name]
    ]
    assert wrong == []


def test_config_works_without_torch() -> None:
    heavy = ("torch", "megatron", "numpy")
    wrong = [
        f"{relative(path)}: {name}"
        for path in MODULES
        if folder(module_name(path)) == "config"
        for name in sorted(imported_names(path))
        if name.split(".")[0] in heavy
    ]
    assert wrong == []


def test_planner_needs_no_run_and_no_run_needs_it() -> None:
    allowed = tuple(f"{PACKAGE}.{name}" for name in (PLANNER, *PLANNER_MAY_IMPORT))
    wrong = []
    for path in MODULES:
        module = module_name(path)
        if folder(module) == PLANNER:
            names = [n for n in imported_names(path) if n.startswith(PACKAGE) and not n.startswith(allowed)]
            names += [n for n in imported_names(path) if n.split(".")[0] in ("torch", "megatron")]
            wrong += [f"{module} imports {name}" for name in names]
        else:
            wrong += [f"{module} imports {n}" for n in import_graph()[module] if folder(n) == PLANNER]
    assert wrong == []


def test_only_parallel_talks_to_other_ranks() -> None:
    wrong = []
    for path in MODULES:
        if folder(module_name(path)) == "parallel":
            continue
        attributes = {ast.unparse(node) for node in runtime_nodes(tree(path)) if isinstance(node, ast.Attribute)}
        for name in sorted(imported_names(path) | attributes):
            if any(name == module or name.startswith(f"{module}.") for module in ONLY_PARALLEL):
                wrong.append(f"{relative(path)}: {name}")
    assert wrong == []


def test_modules_import_each_other_in_one_direction() -> None:
    assert find_cycle(import_graph()) == []


def test_folders_import_each_other_in_one_direction() -> None:
    graph: dict[str, set[str]] = {}
    for module, targets in import_graph().items():
        graph.setdefault(folder(module), set()).update(
            folder(target) for target in targets if folder(target) != folder(module) and folder(target)
        )
    assert find_cycle(graph) == []


def test_folders_of_data_import_each_other_in_one_direction() -> None:
    def package(module: str) -> str:
        parts = module.split(".")
        return parts[2] if parts[1:2] == ["data"] and len(parts) > 3 else ""

    graph: dict[str, set[str]] = {}
    for module, targets in import_graph().items():
        if package(module):
            others = {package(target) for target in targets} - {package(module), ""}
            graph.setdefault(package(module), set()).update(others)
    assert {"planning", "readers", "storage"} <= graph.keys()
    assert find_cycle(graph) == []


def test_every_module_has_a_home() -> None:
    assert [relative(path) for path in MODULES if path.stem in HOMELESS or path.parent.name in HOMELESS] == []


def test_every_file_fits_on_a_few_screens() -> None:
    assert [f"{relative(path)}: {n}" for path in SOURCES if (n := line_count(path)) > MAX_FILE] == []


def test_every_function_fits_on_a_screen() -> None:
    too_long = [f"{name}: {n} lines" for path in SOURCES for name, n in functions(path) if n > MAX_FUNCTION]
    assert too_long == []


def test_scripts_hold_no_logic() -> None:
    assert [
        f"{relative(path)}: {n}" for path in SCRIPTS if path.exists() and (n := line_count(path)) > MAX_SCRIPT
    ] == []


def test_files_name_no_machine_and_leave_nothing_unfinished() -> None:
    wrong = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATH.search(line) or UNFINISHED.search(line)
    ]
    assert wrong == []


def test_sources_are_ascii() -> None:
    wrong = [relative(path) for path in MODULES if not path.read_text(encoding="utf-8").isascii()]
    assert wrong == []
