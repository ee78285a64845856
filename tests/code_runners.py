"""Finds, in Python source, what could run code from a file: unpickling, evaluation, code of model folders."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

HARMLESS_PICKLE = {"dump", "dumps", "PickleError", "PicklingError", "UnpicklingError", "HIGHEST_PROTOCOL"}
"""All of ``pickle`` that writes, or names an error."""
PICKLE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle"}
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "execfile",
    "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "code.InteractiveInterpreter",
    "runpy.run_path", "runpy.run_module", "os.system", "os.popen",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader",
    "pandas.read_pickle", "pandas.read_hdf", "pyarrow.deserialize", "pyarrow.unregister_extension_type",
    "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "torch.serialization.add_safe_globals",
    "torch.export.load", "numpy.lib.format.read_array",
}  # fmt: skip
"""What is never named."""
ARGUMENTS = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
"""Functions that are called with this argument, written out, and are never passed on."""
METHODS = {
    "deserialize", "exec_module", "load_module", "read_pickle",
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "recv_object_list",
}  # fmt: skip
"""Methods that are never called, whatever they belong to: DALI pipelines, module loaders, pickles between ranks."""
KEYWORDS = {"trust_remote_code": False, "weights_only": True, "allow_pickle": False, "shell": False}
"""Arguments that have this value wherever they are given."""


@dataclass(frozen=True)
class CodeRunner:
    """A place that could run code from a file."""

    line: int
    """Line of the source."""
    name: str
    """What it is, e.g. ``pickle.loads``."""


def find_code_runners(source: str) -> list[CodeRunner]:
    """Return all such places of a Python source, in order."""
    tree = ast.parse(source)
    finder = _Finder(_aliases(tree))
    found = {(place.line, place.name) for node in ast.walk(tree) for place in finder.of(node)}
    return [CodeRunner(line, name) for line, name in sorted(found)]


def _aliases(tree: ast.AST) -> dict[str, str]:
    """Return what imported names stand for: ``{"np": "numpy", "loads": "pickle.loads"}``."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.split(".")[0]
                names[alias.asname or name] = name
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


class _Finder:
    def __init__(self, aliases: dict[str, str]) -> None:
        self._aliases = aliases
        self._called: set[int] = set()

    def of(self, node: ast.AST) -> Iterator[CodeRunner]:
        """Yield what is wrong with one node; nodes come parents first."""
        if isinstance(node, ast.Call):
            self._called.add(id(node.func))
            yield from self._call(node)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield from self._named(node.lineno, f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            name = self._name(node)
            yield from self._named(node.lineno, name)
            if name in ARGUMENTS and id(node) not in self._called:
                yield CodeRunner(node.lineno, f"{name} passed on")

    def _call(self, node: ast.Call) -> Iterator[CodeRunner]:
        name = self._name(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in ARGUMENTS:
            argument, value = ARGUMENTS[name]
            if argument not in given:
                yield CodeRunner(node.lineno, f"{name} without {argument}={value}")
        for argument, value in KEYWORDS.items():
            if argument in given and not self._is(given[argument], value):
                yield CodeRunner(node.lineno, f"{argument} that is not {value}")
        last = node.func.attr if isinstance(node.func, ast.Attribute) else name.rsplit(".", 1)[-1]
        if last in METHODS:
            yield CodeRunner(node.lineno, last)
        if isinstance(node.func, ast.Attribute) and last in ("from_pretrained", "from_config"):
            owner = node.func.value
            kind = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            if kind.startswith("Auto") and "trust_remote_code" not in given:
                yield CodeRunner(node.lineno, f"{kind}.{last} without trust_remote_code=False")

    @staticmethod
    def _is(node: ast.expr, value: bool) -> bool:
        return isinstance(node, ast.Constant) and node.value is value

    @staticmethod
    def _named(line: int, name: str) -> Iterator[CodeRunner]:
        module, _, last = name.rpartition(".")
        is_pickle = module in PICKLE_MODULES and last not in HARMLESS_PICKLE
        if is_pickle or name.removeprefix("builtins.") in FORBIDDEN:
            yield CodeRunner(line, name)

    def _name(self, node: ast.expr) -> str:
        """Return a dotted name in full; "" where it begins with no name."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        return ".".join([self._aliases.get(node.id, node.id), *reversed(parts)])
