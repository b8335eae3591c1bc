"""Which code made a number: a digest of what measures, so that results of code that has changed since are noticed."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent
NO_NUMBERS = ("claim", "figure", "dots", "run", "sources")
"""Modules that judge, draw or call the others."""
_AFTERWARDS = ("Verdict", "Results", "Figure", "Experiment")


def sources(module: str) -> list[Path]:
    """The files of a module, of the supervised models, and of what they import from `benchmarks` and this folder."""
    found: dict[str, Path] = {}
    waiting = [module, "bases"]
    while waiting:
        name = waiting.pop()
        path = next((p for p in (FOLDER / f"{name}.py", FOLDER.parent / f"{name}.py") if p.exists()), None)
        if path is None or name in found or name in NO_NUMBERS:
            continue
        found[name] = path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                waiting.append(node.module or "")
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
    return [found[name] for name in sorted(found)]


def measuring(text: str) -> str:
    """The lines of a file that make numbers: no docstrings, no comments, nothing that judges or draws."""
    tree, lines, left = ast.parse(text), text.splitlines(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            left |= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
        elif isinstance(node, ast.FunctionDef):
            said = [node.returns, *(argument.annotation for argument in node.args.args)]
            if any(word in ast.unparse(one) for one in said if one for word in _AFTERWARDS):
                left |= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    kept = (line for number, line in enumerate(lines, 1) if number not in left)
    return "\n".join(line for line in kept if line.strip() and not line.lstrip().startswith("#"))


def code(module: str) -> str:
    """Digest of the lines that make an experiment's numbers, in 12 hexadecimal digits.

    Args:
        module: The experiment's module, such as `a_targets`.
    """
    texts = [f"{path.name}\n{measuring(path.read_text(encoding='utf-8'))}" for path in sources(module)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
