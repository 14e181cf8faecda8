"""Time and memory of the merge methods, whole processes, against a plain copy and mergekit.

    python tests/benchmarks/make_checkpoints.py --size 3 --base --out /data/3
    python tests/benchmarks/merges.py /data/3 --mergekit .../mergekit-yaml [--runs 3]
    python tests/benchmarks/merges.py /data/3 --all

The directory holds reasoner/, mllm/ and base/: text checkpoints, so that mergekit can be asked for
the same. All tensors are merged, the embedding too, as mergekit does. Rows are taken in turn so
that drift of the machine hits all alike, with the inputs in the page cache; medians are printed.
Start-up is the same command on a tiny pair; "beyond" is the rest of the time; "ratio" is that rest
over a copy: reading all inputs of the method and copying one, with sync. "ns" is beyond per entry
of the output. Memory is sampled from the kernel every 10 ms: anonymous (what the process owns, its
children together; pages that they share count for each) and resident. "faster" is the wall time of
mergekit over ours. Its TIES takes minutes: --skip-mergekit ties.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from drift_merge.maths.methods import METHODS
from drift_merge.storage.headers import read_header
from tests import checkpoints as tiny
from tests.benchmarks.core import Sample, measure, median

NAMES = ("linear", "task-arithmetic", "slerp", "dare-ties", "ties")
OURS = {  # beside the defaults
    "linear": ["--weight", "0.1"],
    "task-arithmetic": ["--weight", "0.3"],
    "slerp": ["--t", "0.5"],
    "layer-swap": ["--keep-layers", "0"],
    **{name: ["--density", "0.2"] for name in ("ties", "dare-ties", "dare-linear")},
}
BASED = {method.name for method in METHODS.values() if method.base == "required"}
# mergekit's name; its parameters; per model those of mllm and reasoner. Names stand for paths.
MERGEKIT: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "linear": ("linear", {}, {"weight": 0.9}, {"weight": 0.1}),
    "task-arithmetic": ("task_arithmetic", {}, {"weight": 1.0}, {"weight": 0.3}),
    "slerp": ("slerp", {"t": 0.5}, {}, {}),
    "nuslerp": ("nuslerp", {}, {"weight": 1.0}, {"weight": 1.0}),
    "multislerp": ("multislerp", {}, {"weight": 1.0}, {"weight": 1.0}),
    "karcher": ("karcher", {}, {}, {}),
    "arcee-fusion": ("arcee_fusion", {}, {}, {}),
    "nearswap": ("nearswap", {"t": 1e-4}, {}, {}),
    "model-stock": ("model_stock", {}, {}, {}),
    "sce": ("sce", {"select_topk": 0.1}, {}, {}),
}
for _name, _options in {
    "ties": {"density": 0.2},
    "dare-ties": {"density": 0.2},
    "dare-linear": {"density": 0.2},
    "breadcrumbs": {"density": 0.14, "gamma": 0.01},
    "breadcrumbs-ties": {"density": 0.14, "gamma": 0.01},
    "della": {"density": 0.7, "epsilon": 0.15},
    "della-linear": {"density": 0.7, "epsilon": 0.15},
}.items():
    _each = {"weight": 1.0} | _options
    MERGEKIT[_name] = (_name.replace("-", "_"), {}, _each, _each)
BASE_IS_MLLM = ("slerp", "arcee-fusion", "nearswap")


def mergekit_recipe(name: str, sources: Path) -> str:
    """The YAML (as JSON, which YAML holds) that asks mergekit for the same merge."""
    method, options, mllm, reasoner = MERGEKIT[name]
    models = [
        {"model": str(sources / role), **({"parameters": own} if own else {})}
        for role, own in (("mllm", mllm), ("reasoner", reasoner))
    ]
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    recipe |= {"parameters": options} if options else {}
    if name in BASE_IS_MLLM:
        recipe["base_model"] = str(sources / "mllm")
    elif name in BASED:
        recipe["base_model"] = str(sources / "base")
    return json.dumps(recipe, indent=1)


def copy_command(sources: Path, out: Path, *, with_base: bool) -> list[str]:
    """Read every input and copy one: what no merge can be faster than."""
    roles = ("reasoner", "mllm", *(["base"] if with_base else []))
    files = " ".join(f"{sources / role}/*" for role in roles)
    return ["sh", "-c", f"cat {files} > /dev/null; mkdir -p {out}; cp {sources}/mllm/* {out}; sync"]


def our_command(name: str, sources: Path, out: Path, modules: str) -> list[str]:
    """One merge by this tool."""
    base = ["--base", str(sources / "base")] if name in BASED else []
    inputs = [str(sources / "reasoner"), str(sources / "mllm"), *base]
    tool = [sys.executable, "-m", "drift_merge", name, *inputs, "--modules", modules]
    return [*tool, *OURS.get(name, []), "-o", str(out), "-q"]


def commands(
    names: Iterable[str], sources: Path, out: Path, modules: str, mergekit: dict[str, str]
) -> dict[str, list[str]]:
    """What is measured, by row; every command writes to `out`.

    Args:
        names: of our methods.
        sources: directory with reasoner, mllm and base.
        out: directory to create.
        modules: of our merges.
        mergekit: the program, by the methods that it is asked for.
    """
    rows = {
        f"copy {number}": copy_command(sources, out, with_base=number == 3) for number in (2, 3)
    }
    for name in names:
        rows[name] = our_command(name, sources, out, modules)
        if name in mergekit:
            recipe = out.parent / f"{name}.yaml"
            recipe.write_text(mergekit_recipe(name, sources))
            rows[f"mergekit {name}"] = [
                *(mergekit[name], str(recipe), str(out)),
                *("--no-copy-tokenizer", "--quiet"),
            ]
    return rows


def run_all(rows: dict[str, list[str]], sources: Path, out: Path, runs: int) -> dict[str, Sample]:
    """The medians of all rows, rows in turn, inputs in the page cache if they fit."""
    samples: dict[str, list[Sample]] = {}
    for number in range(runs):
        for name, command in rows.items():
            shutil.rmtree(out, ignore_errors=True)
            subprocess.run(["sync"], check=True)
            for file in sources.glob("*/*.safetensors"):
                subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
            samples.setdefault(name, []).append(measure(command))
            shutil.rmtree(out, ignore_errors=True)
            print(f"run {number + 1}: {name}: {samples[name][-1]}", file=sys.stderr, flush=True)
    return {name: median(found) for name, found in samples.items()}


def write_tiny(directory: Path) -> Path:
    """Checkpoints of some kilobytes, with the same roles."""
    for seed, role in enumerate(("base", "reasoner", "mllm")):
        tiny.write_checkpoint(
            directory / role,
            tiny.reasoner_tensors(seed=seed),
            tiny.text_config(),
            sidecars={"tokenizer.json": tiny.tokenizer()},
        )
    return directory


def num_elements(checkpoint: Path) -> int:
    """Entries of all tensors."""
    files = sorted(checkpoint.glob("*.safetensors"))
    headers = [read_header(file, file.name) for file in files]
    return sum(prod(info.shape) for header in headers for info in header.tensors.values())


HEAD = (
    "method            wall s  start-up  beyond  ratio   cpu s    ns  anon MB  resident MB"
    "  mergekit s  cpu s  resident MB  faster"
)


def line(name: str, rows: dict[str, Sample], startup: dict[str, Sample], elements: int) -> str:
    """One row of the table."""
    row = rows[name]
    beyond = row.wall_seconds - startup[name].wall_seconds
    copy = rows["copy 3" if name in BASED else "copy 2"].wall_seconds
    cells = (
        f"{name:16}{row.wall_seconds:8.2f}{startup[name].wall_seconds:10.2f}{beyond:8.2f}"
        f"{beyond / copy:7.2f}{row.cpu_seconds:8.2f}{1e9 * beyond / elements:6.2f}"
        f"{row.anonymous_mb:9.0f}{row.resident_mb:13.0f}"
    )
    theirs = rows.get(f"mergekit {name}")
    if theirs is None:
        return cells
    faster = theirs.wall_seconds / row.wall_seconds
    return (
        f"{cells}{theirs.wall_seconds:12.2f}{theirs.cpu_seconds:7.1f}{theirs.resident_mb:13.0f}"
        f"{faster:8.1f}"
    )


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path, help="directory with reasoner/, mllm/ and base/")
    parser.add_argument("--all", action="store_true", help="every method of the catalog")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", choices=list(METHODS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--modules", default="full", help="of our merges")
    parser.add_argument("--mergekit", help="path of mergekit-yaml in its own environment")
    parser.add_argument(
        "--mergekit-methods", nargs="+", metavar="METHOD", help="default all it has"
    )
    parser.add_argument("--skip-mergekit", action="append", default=[], metavar="METHOD")
    parser.add_argument("--scratch", type=Path, help="where outputs go; default beside the sources")
    return parser.parse_args()


def main() -> None:
    """Measure and print one table."""
    args = arguments()
    names = args.methods or (list(METHODS) if args.all else list(NAMES))
    asked = args.mergekit_methods or list(MERGEKIT)
    asked = [name for name in asked if name in MERGEKIT and name not in args.skip_mergekit]
    mergekit = dict.fromkeys(asked, args.mergekit) if args.mergekit else {}
    sources = args.sources.resolve()
    with tempfile.TemporaryDirectory(dir=args.scratch or sources.parent) as folder:
        out = Path(folder) / "out"
        small = write_tiny(Path(folder) / "tiny")
        startup = run_all(commands(names, small, out, args.modules, {}), small, out, args.runs)
        asked_for = commands(names, sources, out, args.modules, mergekit)
        rows = run_all(asked_for, sources, out, args.runs)
    elements = num_elements(sources / "mllm")
    print(
        f"{sources.name}: {elements:,} entries a model, modules {args.modules}, "
        f"{os.cpu_count()} cores, median of {args.runs}"
    )
    for number in (2, 3):
        print(
            f"reading {number} models and copying one: {rows[f'copy {number}'].wall_seconds:.2f} s"
        )
    print(HEAD)
    for name in names:
        print(line(name, rows, startup, elements))


if __name__ == "__main__":
    main()
