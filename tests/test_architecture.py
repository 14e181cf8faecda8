"""The house: imports go down, light commands stay light, files stay short and documented."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import checkpoints as c

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "drift_merge"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "errors": -1,
    "maths": 0,
    "names": 0,
    "storage": 1,
    "engine": 2,
    "priors": 3,
    "merges": 3,
    "hub": 3,
    "training": 4,
    "reports": 4,
    "publish": 4,  # push and pull, as functions
    "api": 4,  # the Python face: what the command line does, as functions
    "cli": 5,
    "__main__": 6,
    "__init__": 6,
}
LIGHT = ("names", "storage", "engine/plan", "engine/prepare", "engine/recipe", "engine/job", "cli")


def identifier(path):
    return path.relative_to(ROOT).as_posix()


LIGHT_FILES = [p for p in FILES if p.relative_to(PACKAGE).as_posix().startswith(LIGHT)]


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree):
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield f"{node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(module):
    return module.split(".")[1] if module.count(".") else "__init__"


@pytest.mark.parametrize("path", FILES, ids=identifier)
def test_imports_only_go_down(path):
    own = part_of(f"drift_merge.{path.relative_to(PACKAGE).as_posix()}".replace("/", ".")[:-3])
    for module in imported(tree_of(path)):
        if not module.startswith("drift_merge."):
            continue
        other = part_of(module)
        if other not in FLOORS:
            continue  # a name of the public face
        is_down = FLOORS[other] < FLOORS[own] or other == own
        assert is_down, f"{identifier(path)} imports {module}"


def test_every_part_of_the_package_has_a_floor():
    parts = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert parts <= set(FLOORS)


def test_no_part_is_called_utils_common_base_or_helpers():
    banned = {"utils", "util", "common", "base", "helpers", "helper", "misc"}
    assert not [p for p in PACKAGE.rglob("*") if p.stem in banned]


@pytest.mark.parametrize("path", FILES, ids=identifier)
def test_files_are_short_plain_and_free_of_this_machine(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert text.count("\n") <= 320
    assert not re.search(r"/(work|root|home|tmp|Users|mnt|data|opt)/", text)
    assert not re.search(r"[A-Z]:\\\\", text)


@pytest.mark.parametrize("path", FILES, ids=identifier)
def test_numpy_is_not_imported_since_it_is_no_dependency(path):
    assert not {m for m in imported(tree_of(path)) if m.split(".")[0] in ("numpy", "transformers")}


@pytest.mark.parametrize("path", FILES, ids=identifier)
def test_everything_public_is_documented(path):
    tree = tree_of(path)
    assert ast.get_docstring(tree), "the file says nothing of itself"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for scope in (tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))):
        if getattr(scope, "name", "").startswith("_"):
            continue
        for node in scope.body:
            if isinstance(node, kinds) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{node.name}, line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=identifier)
def test_functions_fit_on_a_page(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            begin = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno
            assert (node.end_lineno or 0) - (begin or 0) <= 60, node.name


@pytest.mark.parametrize("path", LIGHT_FILES, ids=identifier)
def test_light_files_import_torch_in_functions_only(path):
    top = [n for n in tree_of(path).body if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = {m.split(".")[0] for node in top for m in imported(ast.Module([node], []))}
    assert not modules & {"torch", "safetensors", "tokenizers", "rich", "yaml", "huggingface_hub"}


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy", "transformers"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Blocker())
from importlib import import_module
import io, json
from contextlib import redirect_stderr, redirect_stdout
from drift_merge.cli.entry import run
failures = []
for expected, program, *arguments in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [program, *arguments]
    group = import_module(f"drift_merge.cli.{program.removeprefix('drift-')}").group
    try:
        with redirect_stdout(out), redirect_stderr(err):
            run(group, program)
    except SystemExit as error:
        if (error.code or 0) != expected:
            failures.append([program, arguments, error.code, out.getvalue() + err.getvalue()])
assert not failures, failures
"""


def test_align_inspect_dry_runs_help_and_version_never_import_torch(tmp_path, monkeypatch):
    from tests.engine.runs import run_linear, run_prior

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
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]


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
