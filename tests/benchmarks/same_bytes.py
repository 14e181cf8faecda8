"""Hash what every command writes: a change that must not change results is run before and after.

    python tests/benchmarks/same_bytes.py DIR > before.json
    python tests/benchmarks/same_bytes.py DIR --against before.json     # exit 1 names what differs

One prior of each kind, one merge per method and variant, a sweep, a mergekit recipe and one step
of training per rule, of a pair made from a fixed seed. DIR is emptied.
"""

import argparse
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests import checkpoints as c  # noqa: E402

PRIORS = {
    "prior": [],
    "prior-base": ["--base", "base"],
    "prior-full": ["--modules", "full"],
    "prior-int8": ["--dtype", "int8"],
    "prior-float8": ["--dtype", "float8_e4m3fn", "--through", "bfloat16"],
}
GIVEN = {"weight": "0.3", "density": "0.4", "t": "0.25"}
MERGEKIT = """\
merge_method: ties
base_model: mllm
dtype: bfloat16
models:
  - model: reasoner
    parameters: {weight: [0.2, 0.8], density: 0.4}
"""


def command(program: str, *arguments: str) -> None:
    """Run one command in this process; what it prints is kept for its failure."""
    said = io.StringIO()
    sys.argv = [program, *arguments]
    main: Callable[[], None] = import_module(f"drift_merge.cli.{program[6:]}").main
    code: object = 0
    try:
        with redirect_stdout(said), redirect_stderr(said):
            main()
    except SystemExit as error:
        code = error.code
    if code:
        raise SystemExit(f"{' '.join(sys.argv)}\n{said.getvalue()}")


def hashes(place: Path) -> dict[str, str]:
    """The hash of every file of an output but its card and manifest, which speak of versions."""
    words = ("README.md", "prior.json", "drift_merge.json")
    return {
        path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.name not in words
    }


def methods() -> dict[str, list[str]]:
    """A call for every method in every variant."""
    listed = io.StringIO()
    sys.argv = ["drift-merge", "methods", "--json"]
    with redirect_stdout(listed), suppress(SystemExit):
        import_module("drift_merge.cli.merge").main()
    calls = {}
    for method in json.loads(listed.getvalue())["methods"]:
        for variant in method["defaults"]:
            options = ["--variant", variant] if len(method["defaults"]) > 1 else []
            for name in method["required"].get(variant, ()):
                options += [f"--{name.replace('_', '-')}", GIVEN[name]]
            if method["base"] == "required":
                options += ["--base", "base"]
            calls[f"{method['name']}.{variant}"] = [method["name"], *options]
            if method["base"] == "optional":
                calls[f"{method['name']}.{variant}.base"] = [
                    *(method["name"], *options, "--base", "base")
                ]
    return calls


def one_step(rule: str) -> str:
    """The hash of the weights after one step with a prior and gradients of a fixed seed."""
    import drift_merge

    model = torch.nn.Module()
    with safe_open("mllm/model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, value in weights.items():
        module = model
        *path, leaf = name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, torch.nn.Parameter(value.float()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    drift_merge.attach(model, "prior", rule=rule, alpha=0.5, optimizer=optimizer)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()[:16]


def run(place: Path) -> dict[str, object]:
    """Make everything below `place`, which becomes the current directory."""
    import os

    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    os.chdir(place)
    files = {"tokenizer.json": c.tokenizer()}
    pair = c.make_pair(place, reasoner_sidecars=files, mllm_sidecars=files)
    tensors = c.random_tensors(c.text_shapes(), seed=7)
    c.write_checkpoint(place / "base", tensors, c.text_config(), sidecars=files)
    found: dict[str, object] = {}
    for name, options in PRIORS.items():
        command("drift-prior", "compute", *map(str, pair), "-o", name, *options)
        found[name] = hashes(place / name)
    command("drift-prior", "compress", "prior", "--dtype", "int8", "-o", "small")
    command("drift-prior", "apply", "prior", "mllm", "--scale", "0.2", "-o", "applied")
    found |= {name: hashes(place / name) for name in ("small", "applied")}
    for name, call in methods().items():
        command("drift-merge", call[0], "reasoner", "mllm", *call[1:], "-o", name)
        found[name] = hashes(place / name)
        shutil.rmtree(name)
    Path("recipe.yaml").write_text("method: linear\nreasoner: reasoner\nmllm: mllm\n")
    Path("mergekit.yml").write_text(MERGEKIT)
    command("drift-merge", "sweep", "recipe.yaml", "--set", "weight=0.1:0.3:0.1", "-o", "sweep")
    command("drift-merge", "run", "mergekit.yml", "-o", "mergekit")
    found |= {name: hashes(place / name) for name in ("sweep", "mergekit")}
    rules = ("absolute", "absolute_param_norm", "gradnorm", "adaptive_cosine")
    return found | {f"step.{rule}": one_step(rule) for rule in rules}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", type=Path)
    parser.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    before = json.loads(arguments.against.read_text()) if arguments.against else None
    found = run(arguments.place.resolve())
    if before is None:
        print(json.dumps(found, indent=1))
    else:
        differs = sorted(
            name for name in before.keys() | found.keys() if before.get(name) != found.get(name)
        )
        print(f"{len(before)} results before, {len(found)} now, {len(differs)} differ: {differs}")
        sys.exit(1 if differs else 0)
