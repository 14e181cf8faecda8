"""Every remedy that is a command is taken from stderr as it stands, and run.

A row provokes a refusal, says which text is pasted and what comes of it: the command works (0), or
it leads on (another code). Placeholders such as REASONER are replaced by the real arguments, as a
user would. Remedies that cannot be run here are listed with the reason; the last test counts all.
"""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import drift_merge
from drift_merge.names import lineage
from tests import checkpoints as c
from tests.faults.harness import run

ROOT = Path(drift_merge.__file__).parent
UP = "model.layers.0.mlp.up_proj.weight"
Words = list[str]


@dataclass(frozen=True)
class Row:
    """One remedy."""

    file: str  # where it stands in the package
    says: str  # a part of its text there
    provoke: Callable[[Path], Words]  # makes the inputs; the command that is refused
    pasted: str  # a regular expression: the text of the remedy that is pasted
    code: int = 0  # of what is pasted
    then: int | None = 0  # of the first command, if a whole command was pasted; None: not run


def pair(tmp: Path, **changes: object) -> c.Pair:
    return c.make_pair(tmp, **changes)  # type: ignore[arg-type]


def compute(tmp: Path, *more: str, **changes: object) -> Words:
    made = pair(tmp, **changes)
    return ["drift-prior", "compute", *made.arguments, "-o", str(tmp / "out"), *more]


def align(tmp: Path, *more: str, **changes: object) -> Words:
    return ["drift-prior", "align", *pair(tmp, **changes).arguments, *more]


def merge(tmp: Path, method: str, *more: str, **changes: object) -> Words:
    made = pair(tmp, **changes)
    return ["drift-merge", method, *made.arguments, "-o", str(tmp / "out"), *more]


def swapped(tmp: Path) -> Words:
    made = pair(tmp)
    return ["drift-prior", "align", str(made.mllm), str(made.reasoner)]


def torn(tmp: Path) -> Words:
    return compute(tmp, reasoner={UP: c.store([[1.0, 2.0]])})


def moved(tmp: Path, old: str, new: str, *more: str, side: str = "reasoner") -> Words:
    """`align`, with other names on one side."""
    made = pair(tmp)
    folder = getattr(made, side)
    tensors = {n.replace(old, new): t for n, t in c.read_tensors(folder).items()}
    c.write_shard(next(folder.glob("*.safetensors")), tensors)
    return ["drift-prior", "align", *made.arguments, *more]


def doubled(tmp: Path) -> Words:
    again = c.store([[1.0] * c.HIDDEN] * c.INTERMEDIATE)
    return align(tmp, reasoner={"model.layers.0.feed_forward.w3.weight": again})


def twins(tmp: Path) -> Words:
    made = pair(tmp)
    tensors = c.read_tensors(made.mllm)
    text = {n: t for n, t in tensors.items() if n.startswith("model.")}
    tensors |= {f"talker.{n}": c.store(t.values + 1.0) for n, t in text.items()}
    c.write_shard(next(made.mllm.glob("*.safetensors")), tensors)
    return ["drift-prior", "align", *made.arguments]


def decoders(tmp: Path) -> Words:
    made = pair(tmp)
    for folder in made:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True}))
        tensors = c.read_tensors(folder)
        renamed = {n.replace("model.", "model.decoder.", 1): t for n, t in tensors.items()}
        c.write_shard(next(folder.glob("*.safetensors")), renamed)
    return ["drift-prior", "align", *made.arguments]


def existing(tmp: Path) -> Words:
    (tmp / "out").mkdir(parents=True)
    (tmp / "out/x").write_text("")
    return merge(tmp, "linear", "--overwrite")


def existing_merge(tmp: Path) -> Words:
    """In the way is a merge, with another weight."""
    words = merge(tmp, "linear")
    assert run(*words, "--weight", "0.3").code == 0
    return words


def no_prior(tmp: Path) -> Words:
    pair(tmp)
    return ["drift-prior", "inspect", str(tmp / "mllm")]


def no_merge(tmp: Path) -> Words:
    pair(tmp)
    return ["drift-merge", "inspect", str(tmp / "mllm")]


def prior_as_source(tmp: Path) -> Words:
    assert run(*compute(tmp)).code == 0
    return ["drift-prior", "align", str(tmp / "out"), str(tmp / "mllm")]


def pickled(tmp: Path) -> Words:
    import torch

    made = pair(tmp)
    tensors = c.read_tensors(made.reasoner)
    next(made.reasoner.glob("*.safetensors")).unlink()
    values = {n: torch.tensor(t.values).bfloat16() for n, t in tensors.items()}
    torch.save(values, made.reasoner / "pytorch_model.bin")
    return ["drift-prior", "align", *made.arguments]


def recompressed(tmp: Path) -> Words:
    assert run(*compute(tmp, "--dtype", "int8")).code == 0
    options = ["--dtype", "float8_e4m3fn", "-o", str(tmp / "again")]
    return ["drift-prior", "compress", str(tmp / "out"), *options]


def other_shards(tmp: Path) -> Words:
    assert run(*compute(tmp)).code == 0
    shard = next((tmp / "out").glob("prior*.safetensors"))
    tensors = c.read_shard(shard)
    name, tensor = next(iter(tensors.items()))
    c.write_shard(shard, tensors | {name: c.store(tensor.values, "F32")})
    options = ["--dtype", "int8", "-o", str(tmp / "made")]
    return ["drift-prior", "compress", str(tmp / "out"), *options]


def base_of_other_names(tmp: Path) -> Words:
    """Layer 0 fits the reasoner alone, layer 1 the base alone."""
    made = pair(tmp)
    shutil.rmtree(made.reasoner)
    for folder, layer in ((made.reasoner, 1), (tmp / "base", 0)):
        tensors = {
            name: c.store(tensor.values[..., :2]) if f"layers.{layer}." in name else tensor
            for name, tensor in c.reasoner_tensors().items()
        }
        c.write_checkpoint(folder, tensors, c.text_config())
    words = ["drift-prior", "compute", *made.arguments, "-o", str(tmp / "out")]
    return [*words, "--base", str(tmp / "base"), "--on-mismatch", "skip"]


def mapped(tmp: Path) -> Words:
    (tmp / "names.yaml").write_text('reasoner:\n  "lm_head.*": "lm_head.*"\n')
    assert run(*compute(tmp, "--map", str(tmp / "names.yaml"))).code == 0
    return ["drift-merge", "run", str(tmp / "out"), "-o", str(tmp / "again")]


def two_shards(tmp: Path) -> Words:
    made = pair(tmp, num_shards=2)
    one, other = sorted(made.reasoner.glob("*.safetensors"))
    tensors = c.read_shard(other)
    name, tensor = next(iter(c.read_shard(one).items()))
    c.write_shard(other, tensors | {name: tensor})
    return ["drift-prior", "align", *made.arguments]


def without_base(tmp: Path) -> Words:
    made = pair(tmp)
    adapter = tmp / "adapter"
    factors = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        factors[f"{name}.lora_A.weight"] = c.store([[0.1] * c.HIDDEN] * 2)
        factors[f"{name}.lora_B.weight"] = c.store([[0.1] * 2] * c.INTERMEDIATE)
    adapter.mkdir()
    c.write_shard(adapter / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    config |= {"base_model_name_or_path": str(tmp / "gone")}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return ["drift-prior", "align", str(adapter), str(made.mllm)]


def recipe(tmp: Path, text: str) -> Words:
    made = pair(tmp)
    file = tmp / "recipe.yaml"
    file.write_text(f"reasoner: {made.reasoner}\nmllm: {made.mllm}\n{text}")
    return ["drift-merge", "run", str(file), "-o", str(tmp / "out")]


def swept(tmp: Path) -> Words:
    words = recipe(tmp, "method: linear\n")
    return ["drift-merge", "sweep", words[2], "--set", "weight", "-o", str(tmp / "out")]


MAP = r"--map:\n(.*?)(?:\nOtherwise|\Z)"
ROWS = [
    Row(
        "names/refusals.py",
        "See the canonical names with",
        lambda t: align(t, "--modules", "re:nothing"),
        r"drift-prior align .* -v",
        0,
        None,
    ),
    Row("names/refusals.py", "{_remedy(alignment)}", torn, r"--on-mismatch skip"),
    Row("names/refusals.py", "{_remedy(alignment)}", torn, r"drift-prior align .* -v", 4, None),
    Row("names/refusals.py", "{_remedy(alignment)}", torn, r"drift-prior guide layouts", 0, None),
    Row(
        "names/refusals.py",
        "{_remedy(alignment)}",
        lambda t: moved(t, ".self_attn.k_proj", ".att.k_proj"),
        MAP,
    ),
    Row(
        "names/refusals.py",
        "{_remedy(alignment)}",
        lambda t: moved(t, "layers", "layers.0.layers"),
        r"drift-prior align .* --json",
        4,
        None,
    ),
    Row("names/align.py", "drift-prior align ", swapped, r"drift-prior align .*", 0, None),
    Row("names/align.py", "drift-prior guide layouts", decoders, MAP),
    Row("names/towers.py", "Say which one", twins, MAP),
    Row(
        "names/towers.py",
        "drift-prior guide layouts",
        lambda t: moved(t, "embed_tokens", "tokens_table_of_mine"),
        MAP,
    ),
    Row("names/naming.py", "Leave one of them out", doubled, MAP),
    Row(
        "names/embeddings.py",
        "Leave them out",
        lambda t: align(t, "--modules", "full"),
        r"--modules attn,mlp,norm",
    ),
    Row(
        "names/layers/promises.py",
        "out of --modules, or take",
        lambda t: align(t, "--modules", "attn,mixer"),
        r"drift-prior align REASONER MLLM -v",
        0,
        None,
    ),
    Row(
        "names/modules.py",
        "half-open ranges",
        lambda t: align(t, "--layers", "a"),
        r"--layers 0:28",
    ),
    Row(
        "names/lineage.py",
        "or pass --modules mlp",
        lambda t: compute(t, reasoner_config={"num_attention_heads": 8, "num_key_value_heads": 4}),
        r"--modules mlp",
    ),
    Row(
        "engine/nonfinite.py",
        "--allow-nonfinite",
        lambda t: compute(t, mllm={UP: c.store([[float("nan")] * c.HIDDEN] * c.INTERMEDIATE)}),
        r"--allow-nonfinite",
    ),
    Row("storage/outputs/existing.py", "--overwrite=any", existing, r"--overwrite=any"),
    Row("storage/outputs/existing.py", "add --overwrite", existing_merge, r"--overwrite"),
    Row(
        "recipes/method_rules.py",
        "Add one, such as --rank 1",
        lambda t: merge(t, "linear", "--norm", "nuclear"),
        r"--rank 1",
    ),
    Row(
        "recipes/method_rules.py",
        "Add --calibrate svc",
        lambda t: merge(t, "ties", "--calibrate-alpha", "0.2", "--base", str(t / "reasoner")),
        r"--calibrate svc",
    ),
    Row(
        "plans/merge.py",
        "Select attention or MLP",
        lambda t: merge(t, "linear", "--rank", "1", "--modules", "norm"),
        r"--modules attn,mlp",
    ),
    Row(
        "recipes/method_rules.py",
        "Name the common ancestor",
        lambda t: merge(t, "ties"),
        r"--base BASE",
    ),
    Row(
        "recipes/method_rules.py",
        "Leave --base out",
        lambda t: recipe(t, f"method: linear\nbase: {t}\n"),
        r"drift-merge methods",
        0,
        None,
    ),
    Row(
        "recipes/method_rules.py",
        "Write: drift-merge",
        lambda t: merge(t, "linear", "--weight", "frank"),
        r"drift-merge \S+ \.\.\. --base BASE --weight frank",
        0,
        None,
    ),
    Row(
        "recipes/recipe.py",
        "See them all",
        lambda t: recipe(t, "method: linaer\n"),
        r"drift-merge methods",
        0,
        None,
    ),
    Row("recipes/sweep.py", "Write --set", swept, r"--set weight=0\.05:0\.5:0\.05"),
    Row("priors/manifest.py", "Make one with", no_prior, r"drift-prior compute .* -o PRIOR"),
    Row("merges/manifest.py", "Make one with", no_merge, r"drift-merge linear .* -o OUT"),
    Row(
        "priors/compress.py",
        "compute it again",
        recompressed,
        r"drift-prior compute .* -o OUT",
        0,
        None,
    ),
    Row("priors/manifest.py", "after a look", other_shards, r"drift-prior verify .*", 1, None),
    Row(
        "plans/prior.py",
        "Compare their names",
        base_of_other_names,
        r"drift-prior align BASE MLLM --json",
        4,
        None,
    ),
    Row(
        "plans/merge.py",
        "--no-normalize",
        lambda t: merge(
            t, "linear", "--variant", "mergekit", "--weight", "-1", "--mllm-weight", "1"
        ),
        r"--no-normalize",
    ),
    Row(
        "recipes/method_rules.py",
        "add: --variant",
        lambda t: recipe(t, "method: linear\nweight: 0.3\nvariant: paper\nnormalize: false\n"),
        r"--variant mergekit",
    ),
    Row(
        "recipes/stored_rules.py",
        "or compress: --dtype",
        lambda t: compute(t, "--through", "bfloat16"),
        r"--dtype float8_e4m3fn",
    ),
    Row(
        "recipes/stored_rules.py",
        "Add --rank 16",
        lambda t: compute(t, "--norm", "nuclear"),
        r"--rank 16",
    ),
    Row("recipes/remade.py", "Give that file: --map", mapped, r"--map .*names\.yaml"),
    Row("storage/folder/faults.py", "_TAKE_OUT", two_shards, r"python -c .*"),
    Row("recipes/sources.py", "Write where its base is", without_base, r"python -c .*"),
    Row(
        "storage/weight_map.py",
        "Look at it with",
        prior_as_source,
        r"drift-prior inspect .*",
        0,
        None,
    ),
    Row("storage/weight_map.py", "_CONVERT", pickled, r"python -c .*"),
    Row(
        "cli/running.py",
        "--device cpu",
        lambda t: compute(t, "--device", "cuda:99"),
        r"--device cpu",
    ),
    Row(
        "cli/entry.py",
        "See: {} --help",
        lambda t: ["drift-prior", "aling"],
        r"drift-prior --help",
        0,
        None,
    ),
]
# (file or folder, a part of the text; "" for all there) -> why it is not run here
NOT_RUN = {
    (
        "training/",
        "",
    ): "a change of the user's own training program; tests/training refuse and go on",
    ("trainers/", ""): "a change of the user's own training program; tests/real_trainers run them",
    (
        "cli/commands/looking/report.py",
        "See what its best",
    ): "asks for the mllm; tests/cli/test_looking run the command",
    ("cli/commands/train.py", ""): "trains; tests/real_trainers run it",
    ("hub/", ""): "needs a token or the network; tests/hub run each against a server of their own",
    ("storage/hub/", ""): "needs the network; tests/storage/hub and tests/streaming refuse it",
    ("engine/downloads.py", ""): "needs the network; tests/streaming run --cache-limit",
    ("plans/transfers.py", ""): "needs the network; tests/streaming run --cache-limit",
    ("merges/make.py", ""): "needs the network; tests/streaming run both ways",
    ("engine/workers.py", ""): "a worker that the system killed; tests/engine run it",
    ("recipes/own_methods.py", ""): "a change of the user's own file; tests/merges run it",
    ("maths/methods/own.py", ""): "a change of the user's own file; tests/merges run it",
    ("recipes/remade.py", "--methods FILE"): "the user's own file; tests/merges run it",
    ("recipes/values.py", ""): "the command is that of recipes/recipe.py",
    ("recipes/unwrap.py", ""): "PEFT does it, in Python",
    ("recipes/stored_rules.py", "--round"): "two changes at once: one option less, another more",
    ("recipes/method_rules.py", "--weight frank"): "takes the place of the weights that are given",
    ("priors/combine.py", ""): "options and priors of the user's own; tests/priors refuse each",
    ("priors/verify.py", "each prior with its own"): "a command with fewer options",
    ("plans/gates.py", ""): "names modules of the user's own file",
    ("priors/manifest.py", "with this version"): "of a prior that a version before us wrote",
    ("cli/commands/evaluating/", ""): "the user's own evaluation; tests/evaluation refuse it",
    ("evaluation/", ""): "the user's own evaluation; tests/evaluation refuse it",
    ("searches/", ""): "the user's own evaluation, or optuna; tests/searches refuse it",
    ("reports/", ""): "a page, its name, or a package; tests/reports refuse it",
    ("storage/outputs/lock.py", ""): "needs a file system without locks",
    ("recipes/sweep.py", "in one --set"): "a command with fewer options",
    ("storage/adapters/", ""): "PEFT does it; tests/real_trainers/lora run merge_by_peft",
    ("plans/views.py", "merge_by_peft"): "PEFT does it; tests/real_trainers/lora run it",
    ("plans/views.py", "uncompressed"): "a name that no tensor of a known model has",
    ("names/tokens/formats.py", ""): "installs a package",
    ("names/tokens/files.py", ""): "only looks at a file, or needs git-lfs",
    ("names/embeddings.py", "pip install"): "installs a package; the rest is the other row's",
    ("storage/manifests.py", ""): "installs a package",
    ("storage/folder/faults.py", "ls -lL"): "only looks at a file",
    ("storage/folder/faults.py", "git lfs"): "needs git-lfs and the network",
    (
        "storage/folder/faults.py",
        "too_many_files_remedy",
    ): "ulimit; tests/faults/test_folders run it",
    ("storage/shards.py", ""): "ulimit, or looks at a folder of another user",
    ("storage/sources.py", "ls -l"): "only looks at a file",
    ("storage/weight_map.py", "merge_and_unload"): "tests/real_trainers/lora merge with PEFT",
    ("storage/checkpoint.py", "Make one with"): "the command is that of priors/manifest.py",
    ("priors/deltas.py", ""): "of the Python face; the command is run in tests/cli",
    ("priors/compress.py", "without --allow-nonfinite"): "other checkpoints: nothing to paste",
    ("names/refusals.py", "--on-mismatch error"): "of the Python face: click refuses it first",
    ("names/account.py", ""): "leaves a word out, or names a file that the user writes",
    ("names/lineage.py", "Pass --modules attn"): "of a warning, which stops nothing",
    ("names/lineage.py", "or pass --modules attn"): "the row of --modules mlp, the other way round",
    ("names/lineage.py", "--modules has embed"): "nothing to do",
    ("names/lineage.py", "Leave head out"): "leaves a word out of an option",
    ("names/layers/promises.py", "otherwise add"): "an addition to the user's own list of words",
    ("names/pairing.py", ""): "names a file that the user writes",
    ("names/advice/rotary.py", ""): "of warnings, which stop nothing; tests/names/advice run it",
}


def remedy_of(stderr: str) -> str:
    """The remedy as it is printed, without its margin."""
    _, found, text = stderr.rpartition("\n\n  ")
    assert found, stderr
    return text.replace("\n  ", "\n").rstrip("\n")


def with_options(words: Words, options: Words) -> Words:
    """The same command with options added, each in the place of one of its name."""
    name = options[0]
    if name in words:
        at = words.index(name)
        words = words[:at] + words[at + len(options) :]
    return [*words, *options]


def replaced(text: str, tmp: Path, words: Words) -> str:
    """Real arguments for the placeholders."""
    real = {
        "REASONER": tmp / "reasoner",
        "MLLM": tmp / "mllm",
        "PRIOR": tmp / "p",
        "OUT": tmp / "o",
    }
    base = tmp / "base" if (tmp / "base").exists() else tmp / "reasoner"
    for word, path in {**real, "BASE": base}.items():
        text = re.sub(rf"\b{word}\b", str(path), text)
    return text.replace("...", f"{tmp / 'reasoner'} {tmp / 'mllm'} -o {tmp / 'o'}")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.file}: {row.says}")
def test_what_a_remedy_says_works_when_it_is_pasted(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = row.provoke(tmp_path)
    refused = run(*words)
    assert refused.code not in (0, 70), refused
    remedy = remedy_of(refused.stderr)
    found = re.search(row.pasted, remedy, re.DOTALL if row.pasted == MAP else 0)
    assert found, remedy
    pasted = found[0] if found.lastindex is None else found[1]
    if row.pasted == MAP:
        file = tmp_path / "map.yaml"
        file.write_text(pasted)
        assert run(*words, "--map", str(file)).code == row.code
        return
    text = replaced(pasted, tmp_path, words)
    if text.startswith("--"):
        result = run(*with_options(words, shlex.split(text)))
        assert result.code == row.code, result
        return
    if text.startswith("python "):
        subprocess.run([sys.executable, *shlex.split(text)[1:]], check=True, cwd=tmp_path)
    else:
        result = run(*shlex.split(text))
        assert result.code == row.code, result
    if row.then is not None and "inspect" not in words:
        assert run(*words).code == row.then


def test_the_warning_of_another_theta_names_modules_that_are_not_concerned(tmp_path):
    words = compute(tmp_path, reasoner_config={"rope_theta": 5.0})
    first = run(*words)
    pasted = re.search(r"--modules '[^']*'", first.stderr)
    assert "Warning [rope_theta]" in first.stderr
    assert pasted
    again = run(*words, *shlex.split(pasted[0]), "--overwrite")
    assert again.code == 0
    assert "Warning [rope_theta]" not in again.stderr
    tensors = json.loads((tmp_path / "out/prior.json").read_text())["tensors"]
    attention = {name.split(".")[3] for name in tensors if "self_attn" in name}
    assert attention == {"v_proj", "o_proj"}


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
