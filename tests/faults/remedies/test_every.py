"""Every remedy of the package that is a command is run, or says why not."""

import ast
import re
from pathlib import Path

import drift_merge
from drift_merge.names import lineage
from tests.faults.remedies.rows import NOT_RUN, ROWS

ROOT = Path(drift_merge.__file__).parent


# Every remedy of the package.


_COMMAND = re.compile(
    r"drift-(?:prior|merge)\b|--[a-z]|\b(?:git|hf|pip|ulimit|ls|python|export) |remedy\("
    r"|merge_by_peft|_CONVERT|_TAKE_OUT|_WITHOUT_QK|model\.save"
)


def _text(node: ast.expr) -> str:
    """The text that an expression makes; what is put in stands in braces as it is written."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.FormattedValue):
        is_plain = not isinstance(node.value, ast.Call | ast.Name)
        return "{}" if is_plain else "{" + ast.unparse(node.value) + "}"
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.IfExp):
        return f"{_text(node.body)} | {_text(node.orelse)}"
    if isinstance(node, ast.BoolOp):
        return " | ".join(map(_text, node.values))
    return "{" + ast.unparse(node) + "}"


def _said(node: ast.AST) -> ast.expr | None:
    """The remedy in `remedy=...`, `remedy = ...` or a finding."""
    if isinstance(node, ast.keyword) and node.arg == "remedy":
        return node.value
    if isinstance(node, ast.Call) and len(node.args) == 4:
        return node.args[3] if getattr(node.func, "id", "") == "Finding" else None
    if isinstance(node, ast.Assign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return node.value if [getattr(t, "id", "") for t in targets] == ["remedy"] else None
    return None


def every_remedy() -> list[tuple[str, str]]:
    """(file, text) of every remedy of the package."""
    return [
        (file.relative_to(ROOT).as_posix(), _text(value))
        for file in sorted(ROOT.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if (value := _said(node)) is not None
    ]


def test_every_remedy_that_is_a_command_is_run_or_says_why_not():
    listed = every_remedy()
    listed += [("names/lineage.py", field[-1]) for field in lineage._FIELDS.values()]
    assert len(listed) > 300  # the search finds them
    commands = [(file, text) for file, text in listed if _COMMAND.search(text)]
    rows = {(row.file, row.says) for row in ROWS}

    def covers(key: tuple[str, str], remedy: tuple[str, str]) -> bool:
        return remedy[0].startswith(key[0]) and key[1] in remedy[1]

    keys = [*rows, *NOT_RUN]
    assert [r for r in commands if not any(covers(key, r) for key in keys)] == []
    assert [key for key in keys if not any(covers(key, r) for r in listed)] == []
