"""The table of all settings in ``docs/configuration.md``, made from the dataclasses and their docstrings.

``python -m lcl_megatron.config.reference docs/configuration.md`` rewrites the table; a test holds it true.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
from pathlib import Path
from typing import get_args

from lcl_megatron.config.run import RunConfig
from lcl_megatron.config.toml import field_types, section_types

BEGIN = "<!-- generated: python -m lcl_megatron.config.reference docs/configuration.md -->"
END = "<!-- end of generated part -->"
PREFIXED = ("vision", "pool", "language")
"""Sections whose flags carry the section's name."""


def flag(section: str, name: str) -> str:
    """Return the command-line flag of a field, e.g. ``--train-iters`` or ``--vision.num-layers``."""
    return "--" + (f"{section}." if section in PREFIXED else "") + name.replace("_", "-")


def field_docstrings(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, on one line."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(cls)).body if isinstance(node, ast.ClassDef))
    docs: dict[str, str] = {}
    for field, following in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                docs[field.target.id] = " ".join(text.value.split())
    return docs


def markdown_reference() -> str:
    """Return one Markdown table per section: flag, default, meaning."""
    default = RunConfig()
    lines: list[str] = []
    for section, cls in section_types().items():
        docs = field_docstrings(cls)
        summary = (inspect.getdoc(cls) or "").splitlines()[0]
        lines += [f"### `[{section}]`", "", summary, "", "| flag | default | meaning |", "|---|---|---|"]
        for name, hint in field_types(section).items():
            value = getattr(getattr(default, section), name)
            choices = [argument for argument in get_args(hint) if isinstance(argument, str)]
            meaning = docs[name] + (f" One of {', '.join(f'`{c}`' for c in choices)}." if len(choices) > 1 else "")
            shown = "(empty)" if value in ("", ()) else f"`{value}`"
            lines.append(f"| `{flag(section, name)}` | {shown} | {meaning.replace('|', chr(92) + '|')} |")
        lines.append("")
    return "\n".join(lines)


def with_reference(document: str) -> str:
    """Return a document with the part between its two markers replaced by the present tables."""
    before, _, rest = document.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{markdown_reference()}\n{END}{after}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_reference(page.read_text(encoding="utf-8")), encoding="utf-8")
