"""Stand-ins for the two kits: the same command lines in, files of the same names and forms out.

What they answer depends on the weights alone: item i is right if the sum of the model's bytes,
taken with i, says so. Forms as lmms-eval 0.7.3 and VLMEvalKit of August 2026 write them.
"""

from pathlib import Path

LMMS_EVAL = """
import argparse, hashlib, json, pathlib
parser = argparse.ArgumentParser()
for name in ("model", "model_args", "tasks", "batch_size", "output_path", "limit", "gen_kwargs",
             "include_path", "device"):
    parser.add_argument("--" + name)
parser.add_argument("--log_samples", action="store_true")
given = parser.parse_args()
settings = dict(pair.split("=", 1) for pair in given.model_args.split(","))
folder = pathlib.Path(settings.get("pretrained") or settings["model"])
seed = hashlib.sha256((folder / "model.safetensors").read_bytes()).digest()
out = pathlib.Path(given.output_path) / str(folder).replace("/", "__")
out.mkdir(parents=True, exist_ok=True)
(out.parent / "called.json").write_text(json.dumps(vars(given)))
results = {}
for task in given.tasks.split(","):
    right = [float(seed[i % 32] > 100) for i in range(int(given.limit or 64))]
    lines = [{"doc_id": i, "target": "A", "filtered_resps": ["A"], "acc_score": r,
              "format_score": 0.0} for i, r in enumerate(right)]
    (out / f"20261127_120000_samples_{task}.jsonl").write_text("\\n".join(map(json.dumps, lines)))
    share = sum(right) / len(right)
    results[task] = {"alias": task, "acc_score,none": share, "acc_score_stderr,none": 0.01,
                     "format_score,none": 0.0, "format_score_stderr,none": "N/A"}
(out / "20261127_120000_results.json").write_text(json.dumps({"results": results}))
"""

VLMEVALKIT = """
import argparse, hashlib, json, pathlib, zipfile
parser = argparse.ArgumentParser()
for name in ("config", "work-dir", "mode", "judge"):
    parser.add_argument("--" + name)
given = parser.parse_args()
config = json.loads(pathlib.Path(given.config).read_text())
(name, model), = config["model"].items()
seed = hashlib.sha256(
    (pathlib.Path(model["model_path"]) / "model.safetensors").read_bytes()).digest()
out = pathlib.Path(given.work_dir) / name / "T20261127_G00000000"
out.mkdir(parents=True, exist_ok=True)

def cell(column, row, value):
    at = f'{"ABCDEF"[column]}{row}'
    if isinstance(value, str):
        return f'<c r="{at}" t="inlineStr"><is><t>{value}</t></is></c>'
    return f'<c r="{at}"><v>{value}</v></c>'

for data, described in config["data"].items():
    right = [int(seed[i % 32] > 100) for i in range(64)]
    rows = [["index", "question", "prediction", "hit"]]
    rows += [[i + 1, "which?", "A", r] for i, r in enumerate(right)]
    body = "".join(
        f'<row r="{n}">' + "".join(cell(c, n, v) for c, v in enumerate(row)) + "</row>"
        for n, row in enumerate(rows, 1))
    sheet = ('<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">'
             f'<sheetData>{body}</sheetData></worksheet>')
    with zipfile.ZipFile(out / f"{name}_{data}_exact_matching_result.xlsx", "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", sheet)
    share = 100 * sum(right) / 64
    if described["class"] == "MathVista":
        table = "Task&Skill,tot,prefetch,hit,acc\\n"
        table += f"Overall,64,0,{sum(right)},{share}\\nVQA,9,0,1,11.1\\n"
    else:
        table = f"split,Overall,a,b\\nnone,{share},1,2\\n"
    (out / f"{name}_{data}_exact_matching_acc.csv").write_text(table)
"""


def write_kits(folder: Path) -> tuple[Path, Path]:
    """Write both: a folder for PYTHONPATH with the package lmms_eval, and a clone."""
    package = folder / "site" / "lmms_eval"
    clone = folder / "VLMEvalKit"
    package.mkdir(parents=True)
    clone.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(LMMS_EVAL)
    (clone / "run.py").write_text(VLMEVALKIT)
    return folder / "site", clone
