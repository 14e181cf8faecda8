"""What `guide security` says is never done, tried: nothing that is read is run."""

import ast
import json
import pickle
from pathlib import Path

import pytest

from drift_merge import guides
from drift_merge.storage.manifests import reseal
from tests import checkpoints as c
from tests.checkpoints import read_files
from tests.faults.harness import assert_refusal, command, run
from tests.runs import run_linear, run_prior

PACKAGE = Path(__file__).parents[1] / "drift_merge"

# Every call that starts a program, or runs what it reads; the guide names the reason.
RUNS = {
    "recipes/own_methods.py": {"runpy.run_path"},  # --methods FILE
    "evaluation/command.py": {"subprocess.Popen"},  # --evaluate, --with CMD
    "evaluation/check.py": {"subprocess.run"},  # our probe.py, in the interpreter named
    "training/inject/kernels/native.py": {"subprocess.run", "ctypes.CDLL"},  # the compiler
    "storage/processes.py": {"pickle.loads", "ctypes.CDLL"},  # what it has just pickled; libc
    "recipes/yaml.py": {"yaml.load"},  # with a SafeLoader
}
RISKY = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execvp"),
    *("runpy.run_path", "runpy.run_module", "subprocess.run", "subprocess.Popen", "ctypes.CDLL"),
    *("pickle.load", "pickle.loads", "torch.load", "marshal.loads", "yaml.load", "yaml.full_load"),
    *("shelve.open", "joblib.load", "numpy.load", "dill.load", "torch.hub.load"),
}


class Bomb:
    """Leaves a file behind when a pickle of it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_the_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def called(tree):
    """The dotted names of all that is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg for k in node.keywords}


def test_nothing_is_run_but_where_the_guide_says_so():
    found, unsaid = {}, []
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE).as_posix()
        for name, given in called(ast.parse(path.read_text(encoding="utf-8"))):
            if name in RISKY:
                found.setdefault(where, set()).add(name)
            is_auto = ".Auto" in name or name.startswith("auto.")
            if is_auto and name.endswith(("from_pretrained", "from_config")):
                loads = "trust_remote_code" in given or None in given  # **place, see _NO_CODE
                unsaid += [] if loads else [f"{where}: {name}"]
            assert "shell" not in given, where
    assert found == RUNS
    assert not unsaid


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "weights.pkl"])
def test_a_pickle_is_never_loaded_alone_or_beside_weights(name, tmp_path):
    mark = tmp_path / "mark"
    bomb = pickle.dumps(Bomb(mark))
    pair = c.make_pair(tmp_path, mllm_sidecars={name: bomb, "optimizer.pt": bomb})
    for verb in ("align", "compute", "linear"):
        assert run(*command(verb, pair, tmp_path / verb)).code == 0
    for file in pair.mllm.glob("*.safetensors"):
        file.unlink()
    (pair.mllm / "model.safetensors.index.json").unlink(missing_ok=True)
    for verb in ("align", "compute", "linear"):
        result = run(*command(verb, pair, tmp_path / f"{verb}-2"))
        assert_refusal(result, 5, [name, "CVE-2025-32434"])
    assert not mark.exists()


def test_code_beside_a_model_is_carried_over_and_not_run(tmp_path):
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w').close()\n".encode()
    files = {"modeling_own.py": code, "configuration_own.py": code, "setup.py": code}
    auto = {"AutoConfig": "configuration_own.Config", "AutoModel": "modeling_own.Model"}
    pair = c.make_pair(
        tmp_path, mllm_sidecars=files, mllm_config_changes={"auto_map": auto, "model_type": "own"}
    )
    run_linear(*pair, tmp_path / "merged")
    for program in (["verify"], ["inspect"], ["run"]):
        words = [*program, str(tmp_path / "merged")]
        words += ["-o", str(tmp_path / "again")] if program == ["run"] else []
        assert run("drift-merge", *words).code == 0
    assert (tmp_path / "merged/modeling_own.py").read_bytes() == code
    assert not mark.exists()


@pytest.mark.parametrize("line", ["methods: {}", "evaluate: python {}", "python: {}", "with: {}"])
def test_a_recipe_cannot_name_code(line, tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    pair = c.make_pair(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    sources = f"reasoner: {pair.reasoner}\nmllm: {pair.mllm}\n"
    recipe.write_text(f"method: linear\n{sources}{line.format(tmp_path / 'own.py')}\n")
    out = ["-o", str(tmp_path / "out")]
    for words in (["run", str(recipe)], ["sweep", str(recipe), "--set", "weight=0.1"]):
        assert_refusal(run("drift-merge", *words, *out), 2, ["unknown key"])
    recipe.write_text(f"{sources}{line.format(tmp_path / 'own.py')}\n")
    result = run("drift-prior", "compute", "--config", str(recipe), *out)
    assert_refusal(result, 2, ["unknown key"])
    assert not mark.exists()


def test_a_yaml_that_would_make_objects_is_refused(tmp_path):
    mark = tmp_path / "mark"
    for tag in ("object/apply:os.system", "object/new:os.system", "name:os.system"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"method: !!python/{tag} ['touch {mark}']\n")
        result = run("drift-merge", "run", str(recipe), "-o", str(tmp_path / "out"))
        assert_refusal(result, 2, ["cannot be read as YAML"])
    assert not mark.exists()


def test_a_recipe_does_not_overwrite_what_is_not_ours(tmp_path):
    pair = c.make_pair(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/file").write_text("mine")
    recipe = tmp_path / "recipe.yaml"
    for value, code in (("true", 6), ("any", 2)):
        recipe.write_text(
            f"method: linear\nreasoner: {pair.reasoner}\nmllm: {pair.mllm}\n"
            f"output: {tmp_path}/own\noverwrite: {value}\n"
        )
        assert run("drift-merge", "run", str(recipe)).code == code
    assert read_files(tmp_path / "own") == {"file": b"mine"}


@pytest.mark.parametrize("key", ["shards", "index", "sidecars"])
@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", 5])
def test_a_manifest_on_the_disk_leads_to_no_file_outside_its_folder(key, name, tmp_path):
    pair = c.make_pair(tmp_path)
    run_prior(*pair, tmp_path / "prior")
    run_linear(*pair, tmp_path / "merged")
    (tmp_path / "secret").write_text("a secret")
    for program, folder in (("drift-prior", "prior"), ("drift-merge", "merged")):
        file = tmp_path / folder / ("prior.json" if folder == "prior" else "drift_merge.json")
        manifest = json.loads(file.read_bytes())
        file.write_text(json.dumps(reseal(manifest | {key: [name]})))
        for verb in ("verify", "inspect"):
            result = run(program, verb, str(tmp_path / folder))
            assert_refusal(result, 5, ["not a plain path below its own directory"])


def test_the_guide_names_every_file_that_runs_something():
    text = guides.text_of("security")
    for word in ("--methods", "--evaluate", "--with", "--python", "compiler", "probe.py"):
        assert word in text
