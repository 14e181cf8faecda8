"""The house: imports go down and never in circles, rooms stay small, light commands stay light.

One test per law; each fails with the list of offenders.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests import checkpoints as c
from tests.light import run_without_torch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "drift_merge"
FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def trees() -> dict[Path, ast.Module]:
    """The package, parsed once by the process that runs a test of it, not by all that collect."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


# The floors of the house, from the ground up; a room imports only from floors below its own.
FLOORS = (
    ("errors",),
    ("guides", "maths", "names", "storage"),
    ("recipes",),
    ("plans",),
    ("engine",),
    ("artifacts",),
    ("priors", "merges"),
    ("reports",),
    ("hub",),
    ("training",),
    ("trainers", "evaluation"),
    ("searches",),
    ("api",),
    ("cli",),
    ("__init__", "__main__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LIGHT = (
    *("names", "storage", "recipes", "guides", "cli"),
    *("plans/plan", "plans/prepare", "plans/prior", "plans/merge", "plans/views"),
    *("maths/methods/__init__", "maths/methods/table", "maths/methods/entries"),
    *("maths/methods/entries_on_base", "maths/methods/options"),
)
MAX_FILES, MAX_LINES, MAX_FUNCTION_LINES = 16, 320, 60


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, wherever in it; of ours the file, not its contents."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


@cache
def edges() -> dict[str, set[str]]:
    """What each file imports of the package."""
    return {
        module: {other for other in imported(trees()[path]) if other in MODULES} - {module}
        for module, path in MODULES.items()
    }


def test_every_room_has_a_floor():
    rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms == set(FLOOR)


def test_imports_between_rooms_only_go_down():
    assert not [
        f"{module} imports {other}"
        for module, others in edges().items()
        for other in others
        if (own := room_of(module)) != (their := room_of(other))
        and own != "__init__"
        and FLOOR[their] >= FLOOR[own]
    ]


def test_no_imports_go_round_in_a_circle():
    """Between files, so between the rooms inside a room too; imports within functions count."""
    try:
        TopologicalSorter(edges()).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_each_room_names_the_order_in_which_to_read_its_files_and_they_import_in_that_order():
    """The docstring of a package ends with "Read: a, b, c.", each file once, ground up."""
    offenders = []
    for path in (p for p in FILES if p.name == "__init__.py" and p.parent != PACKAGE):
        text = " ".join((ast.get_docstring(trees()[path]) or "").split())
        listed = re.search(r"Read: ([\w, ]+)\.", text)
        order = re.split(r", ", listed[1]) if listed else []
        inside = {p.stem for p in path.parent.glob("*.py")} - {"__init__"}
        inside |= {p.parent.name for p in path.parent.glob("*/__init__.py")}
        if set(order) != inside or len(order) != len(inside):
            offenders.append(f"{name_of(path)}: {sorted(set(order) ^ inside)}")
            continue
        own = module_of(path)
        place = {f"{own}.{name}": number for number, name in enumerate(order)}
        for module, others in edges().items():
            here = next((n for r, n in place.items() if f"{module}.".startswith(f"{r}.")), None)
            for other in others if here is not None else ():
                there = next((n for r, n in place.items() if f"{other}.".startswith(f"{r}.")), None)
                if there is not None and there > here:
                    offenders.append(f"{module} imports {other}, which is to be read after it")
    assert not offenders


def test_each_room_says_what_it_promises_and_what_it_must_not_know():
    """Three sentences at least: the promise, what it must not know, the order of reading."""
    assert not [
        name_of(path)
        for path in FILES
        if path.name == "__init__.py"
        and path.parent != PACKAGE
        and len(re.findall(r"[.:](?:\s|$)", ast.get_docstring(trees()[path]) or "")) < 3
    ]


def test_no_part_is_called_utils_common_base_or_helpers():
    banned = {"utils", "util", "common", "base", "helpers", "helper", "misc"}
    assert not [p for p in PACKAGE.rglob("*") if p.stem in banned]


def test_no_folder_holds_more_than_sixteen_files():
    folders = [PACKAGE, *(p for p in (ROOT / "tests").rglob("*") if p.is_dir())]
    folders += [p for p in PACKAGE.rglob("*") if p.is_dir()]
    counts = {f.relative_to(ROOT).as_posix(): len(list(f.glob("*.py"))) for f in folders}
    assert not {name: n for name, n in counts.items() if n > MAX_FILES + 1}  # and __init__


def test_files_are_short_plain_and_free_of_this_machine():
    offenders = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        is_foreign = re.search(r"/(work|root|home|tmp|Users|mnt|data|opt)/|[A-Z]:\\\\", text)
        if not text.isascii() or text.count("\n") > MAX_LINES or is_foreign:
            offenders.append(f"{name_of(path)}: {text.count(chr(10))} lines {is_foreign}")
    assert not offenders


def test_numpy_and_transformers_are_not_imported_since_they_are_no_dependencies():
    banned = {"numpy", "transformers"}
    assert not [
        name_of(p) for p, t in trees().items() if {m.split(".")[0] for m in imported(t)} & banned
    ]


def test_everything_public_is_documented():
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    offenders = [name_of(path) for path, tree in trees().items() if not ast.get_docstring(tree)]
    for path, tree in trees().items():
        for scope in (tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))):
            if getattr(scope, "name", "").startswith("_"):
                continue
            offenders += [
                f"{name_of(path)}:{node.lineno} {node.name}"
                for node in scope.body
                if isinstance(node, kinds)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ]
    assert not offenders


def test_functions_fit_on_a_page():
    offenders = []
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                begin = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno
                if (node.end_lineno or 0) - (begin or 0) > MAX_FUNCTION_LINES:
                    offenders.append(f"{name_of(path)}: {node.name}")
    assert not offenders


def test_light_files_import_torch_in_functions_only():
    heavy = {"torch", "safetensors", "tokenizers", "rich", "yaml", "huggingface_hub"}
    offenders = []
    for path in (p for p in FILES if name_of(p).startswith(LIGHT)):
        top = [n for n in trees()[path].body if isinstance(n, ast.Import | ast.ImportFrom)]
        modules = {m.split(".")[0] for node in top for m in imported(ast.Module([node], []))}
        offenders += [f"{name_of(path)}: {modules & heavy}"] if modules & heavy else []
    assert not offenders


def test_align_inspect_dry_runs_help_and_version_never_import_torch(tmp_path, monkeypatch):
    from tests.runs import run_linear, run_prior

    files = {"tokenizer.json": c.tokenizer()}
    pair = c.make_pair(tmp_path, reasoner_sidecars=files, mllm_sidecars=files)
    run_prior(*pair, tmp_path / "prior")
    run_linear(*pair, tmp_path / "merged")
    sources, out = pair.arguments, str(tmp_path / "out")
    config = tmp_path / "run.yaml"
    config.write_text("reasoner: reasoner\nmllm: mllm\n")
    calls = [
        [0, "drift-prior", "--help"],
        [0, "drift-merge", "--version"],
        [0, "drift-prior", "align", *sources],
        [0, "drift-prior", "align", *sources, "--modules", "full", "--json"],
        [0, "drift-prior", "align", "--config", str(config)],
        [4, "drift-prior", "align", *reversed(sources)],
        [0, "drift-prior", "inspect", str(tmp_path / "prior")],
        [0, "drift-merge", "inspect", str(tmp_path / "merged"), "--json"],
        [3, "drift-prior", "inspect", str(tmp_path / "merged")],
        [0, "drift-prior", "compute", *sources, "-o", out, "--dry-run", "-v"],
        [0, "drift-prior", "compute", *sources, "-o", out, "-n", "--base", sources[0], "--json"],
        [0, "drift-merge", "linear", *sources, "-o", out, "--dry-run"],
        [0, "drift-merge", "linear", *sources, "-o", out, "--dry-run", "--stream"],
        [6, "drift-merge", "linear", *sources, "-o", sources[1], "--dry-run"],
        [2, "drift-merge", "linear", *sources, "-o", out, "--modules", "atn"],
        *([0, p, n, "--help"] for p, n in (("drift-prior", "demo"), ("drift-merge", "verify"))),
    ]
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    run_without_torch(calls, tmp_path)


def test_help_and_version_start_without_the_modules_that_do_the_work(tmp_path):
    script = (
        "import sys\n"
        "sys.argv = ['drift-prior', '--version']\n"
        "from drift_merge.cli.prior import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'rich', 'yaml', 'huggingface_hub', 'safetensors', 'tqdm'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert 'drift_merge.plans.plan' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_public_face_offers_what_it_lists():
    import drift_merge

    for name in dir(drift_merge):
        assert getattr(drift_merge, name).__doc__
    with pytest.raises(AttributeError, match="no_such_name"):
        drift_merge.no_such_name  # noqa: B018


def test_what_tests_share_stands_in_modules_that_hold_no_tests():
    offenders = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if module.startswith("tests.") and ".test_" in module:
                offenders.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not offenders
