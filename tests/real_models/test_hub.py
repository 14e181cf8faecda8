"""Real weights through a Hub: pushed by the unmodified client, pulled, verified, loaded, used.

The Hub is the loopback server of `tests/hub_server`, which speaks LFS; the client is told to
leave Xet out (HF_HUB_DISABLE_XET) and where the server is (HF_ENDPOINT), nothing else. Needs the
models of README.md in DRIFT_MERGE_REAL_DIR; DRIFT_MERGE_REPORT names a file for the card and the
listings.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # this folder is no package, and `tests` is not installed

from tests.hub_server.client import environment  # noqa: E402
from tests.hub_server.repo import tree  # noqa: E402
from tests.hub_server.server import HubServer  # noqa: E402
from tests.hub_server.store import Account  # noqa: E402

REAL = os.environ.get("DRIFT_MERGE_REAL_DIR", "")
PRIOR, MERGED, PARENTS = "org/smollm2-prior", "org/smollm2-merged", ("them/reasoner", "them/mllm")
ABSENT = [name for name in ("transformers", "PIL") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not REAL, reason="needs DRIFT_MERGE_REAL_DIR; see README.md"),
    pytest.mark.skipif(bool(ABSENT), reason=f"needs {', '.join(ABSENT)}; see README.md"),
]

ATTACH = """
import json, sys, torch, drift_merge
from transformers import AutoModelForImageTextToText
mllm, prior = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(mllm, dtype=torch.float32)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
handle = drift_merge.attach(model, drift_merge.load_prior(prior), optimizer=optimizer)
ids = torch.arange(1, 33).reshape(1, -1)
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
report = handle.report()
print(json.dumps({"steps": report["steps"], "bias_ratio": report["bias_ratio"]}))
"""


LOAD = """
import json, sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
where = sys.argv[1]
model, info = AutoModelForImageTextToText.from_pretrained(
    where, dtype=torch.float32, output_loading_info=True
)
processor = AutoProcessor.from_pretrained(where)
content = [{"type": "image"}, {"type": "text", "text": "what shape is in the image?"}]
text = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
)
inputs = processor(text=[text], images=[Image.new("RGB", (64, 64))], return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
answer = processor.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(json.dumps({"misfits": {key: len(info[key]) for key in info}, "answer": answer}))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Hub with both parents on it, and a function that runs a command against it."""
    folder = tmp_path_factory.mktemp("real-hub")
    with HubServer(folder / "store") as hub:
        hub.accounts["hf_writer"] = Account("alice", orgs=("org",))
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Of SmolLM2-135M\n")
        for repo_id in PARENTS:
            commit = hub.add_commit(repo_id, Path(REAL) / repo_id.partition("/")[2])
            hub.repos[repo_id].commits[commit]["README.md"] = folder / "README.md"
        path = f"{HERE.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        variables = environment(hub, folder / "home") | {"HF_TOKEN": "hf_writer"}
        environ = os.environ | variables | {"PYTHONPATH": path}

        def run(*arguments, home="home"):
            tool, *rest = map(str, arguments)
            module = f"drift_merge.cli.{tool.removeprefix('drift-')}"
            start = ["-c", f"from {module} import main; main()"]
            start = start if tool.startswith("drift-") else [tool]
            done = subprocess.run(
                [sys.executable, *start, *rest],
                capture_output=True,
                text=True,
                cwd=folder,
                env=environ | {"HF_HOME": str(folder / home)},
            )
            print(f"$ {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")
            assert done.returncode == 0, done.stderr
            return done

        yield hub, folder, run


@pytest.fixture(scope="module")
def pushed(world):
    """The real prior and the real merge, made from the Hub's parents and pushed."""
    hub, folder, run = world
    run("drift-prior", "compute", *PARENTS, "-o", "prior", "--max-shard-size", "50MB", "-q")
    run("drift-merge", "linear", *PARENTS, "-o", "merged", "--max-shard-size", "100MB", "-q")
    run("drift-prior", "push", "prior", PRIOR, "-n")
    hub.forget_requests()
    run("drift-prior", "push", "prior", PRIOR)
    run("drift-merge", "push", "merged", MERGED)
    return hub, folder, run


def listing(hub, repo_id):
    """What the Hub's API says is there."""
    repo = hub.repos[repo_id]
    rows = []
    for entry in tree(repo.commits[repo.refs["main"]]):
        digest = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        rows.append(f"{entry['size']:>12,}  {digest[:16]}  {entry['path']}")
    return rows


def test_what_is_pulled_elsewhere_verifies_against_its_sources(pushed):
    _, folder, run = pushed
    sources = ("--reasoner", PARENTS[0], "--mllm", PARENTS[1])
    for tool, repo_id, out in (("drift-prior", PRIOR, "p"), ("drift-merge", MERGED, "m")):
        run(tool, "pull", repo_id, "-o", out, home="elsewhere")
        run(tool, "verify", out, *sources, "--seed", "1")
        ours = folder / {"p": "prior", "m": "merged"}[out]
        for path in ours.glob("*.safetensors"):
            assert path.read_bytes() == (folder / out / path.name).read_bytes()


def test_the_merge_loads_in_transformers_from_the_hub_with_every_key(pushed):
    _, folder, run = pushed
    (folder / "load.py").write_text(LOAD)
    loaded = json.loads(run("load.py", MERGED, home="fresh").stdout.splitlines()[-1])
    assert set(loaded["misfits"].values()) == {0}
    assert loaded["answer"]


def test_the_prior_does_not_load_in_transformers(pushed, tmp_path):
    hub, folder, _ = pushed
    code = (
        "import sys; from transformers import AutoConfig, AutoModelForCausalLM as M\n"
        "try:\n    M.from_pretrained(sys.argv[1])\n"
        "except (OSError, ValueError) as error:\n    print('refused:', error)\n"
    )
    variables = environment(hub, tmp_path / "home") | {"HF_TOKEN": "hf_writer"}
    done = subprocess.run(
        [sys.executable, "-c", code, PRIOR],
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused:"), done.stdout
    assert folder.is_dir()


def test_attach_trains_with_the_prior_by_its_hub_id(pushed):
    _, folder, run = pushed
    (folder / "attach.py").write_text(ATTACH)
    done = run("attach.py", PARENTS[1], PRIOR)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["steps"] == 1
    assert report["bias_ratio"] > 0


def test_inspect_and_align_by_hub_id_cost_kilobytes(pushed):
    hub, _, run = pushed
    hub.forget_requests()
    run("drift-prior", "inspect", PRIOR, home="empty")
    inspected = hub.bytes_sent()
    hub.forget_requests()
    run("drift-prior", "align", *PARENTS, home="empty")
    print(f"inspect: {inspected:,} bytes; align: {hub.bytes_sent():,} bytes")
    assert inspected < 500_000
    assert hub.bytes_sent() < 500_000


def test_the_card_names_parents_commits_and_licenses(pushed):
    hub, _, _ = pushed
    repo = hub.repos[PRIOR]
    card = repo.commits[repo.refs["main"]]["README.md"].read_text()
    for parent in PARENTS:
        assert parent in card
        assert hub.repos[parent].refs["main"] in card
    assert card.startswith("---\nlicense: apache-2.0\n")
    if report := os.environ.get("DRIFT_MERGE_REPORT"):
        lines = ["# The card of the real prior, as it was on the loopback Hub", "", card, ""]
        for repo_id in (PRIOR, MERGED):
            lines += [f"## Files of {repo_id}", "", "```", *listing(hub, repo_id), "```", ""]
            lines += ["Commits:", ""]
            lines += [f"- {s} ({len(n)} files)" for _, s, n in hub.repos[repo_id].log] + [""]
        Path(report).write_text("\n".join(lines))
