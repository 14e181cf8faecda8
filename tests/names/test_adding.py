"""The guide that says how to add a family, followed: in a copy of the package, and by a map."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from drift_merge import guides
from drift_merge.errors import AlignmentError
from drift_merge.names.align import align, require_complete
from drift_merge.names.name_map import read_name_map
from drift_merge.names.tensors import Model
from tests.names import families as f

PACKAGE = Path(__file__).parents[2] / "drift_merge"
TAIL = "ff.in"  # what the guide calls mlp.up_proj of the new family

SCRIPT = """
import json, sys
from drift_merge.names.align import align, require_complete
from drift_merge.names.tensors import Model
models = [Model(n, {k: tuple(v) for k, v in s.items()}, {}) for n, s in json.load(sys.stdin)]
found = align(*models)
require_complete(found)
print(found.num_matched, [p.parts[0].name for p in found.pairs if "up_proj" in p.canonical][0])
"""


def text_twin():
    """A plain text LLM."""
    return f.decoder()


def new_family():
    """An MLLM whose tower says `ff.in` where others say `mlp.up_proj`."""
    tower = f.decoder("thinker.model.", "thinker.lm_head.")
    renamed = {name.replace("mlp.up_proj", TAIL): shape for name, shape in tower.items()}
    return renamed | {"vision.blocks.0.mlp.up_proj.weight": (f.WIDTH, f.H)}


def test_the_new_family_is_refused_before():
    found = align(Model("text", text_twin(), {}), Model("new", new_family(), {}))
    with pytest.raises(AlignmentError, match=r"3 of 30 .*no partner"):
        require_complete(found)


def test_a_map_settles_it_without_a_change_of_code(tmp_path):
    file = tmp_path / "map.yaml"
    file.write_text(
        f'mllm:\n  "thinker.model.layers.{{layer}}.{TAIL}.weight":'
        ' "layers.{layer}.mlp.up_proj.weight"\n'
    )
    found = align(
        Model("text", text_twin(), {}), Model("new", new_family(), {}), name_map=read_name_map(file)
    )
    require_complete(found)


def test_a_synonym_as_the_guide_shows_it_teaches_the_family(tmp_path):
    [before, after] = re.findall(
        r'^   ( +".+": "mlp.up_proj",)$', guides.text_of("adding-a-family"), re.MULTILINE
    )
    assert f'"{TAIL}"' in after
    shutil.copytree(PACKAGE, tmp_path / "drift_merge")
    file = tmp_path / "drift_merge" / "names" / "layouts.py"
    text = file.read_text(encoding="utf-8")
    assert text.count(f"\n{before}\n") == 1
    file.write_text(text.replace(before, f"{before}\n{after}"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([("text", text_twin()), ("new", new_family())]),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    count, name = done.stdout.split()
    assert int(count) == 3 * 10
    assert name == "model.layers.0.mlp.up_proj.weight"


def test_every_name_that_the_guide_tells_to_change_is_where_it_says():
    text = guides.text_of("adding-a-family")
    for path in re.findall(r"`(drift_merge/[\w/]+\.py|tests/[\w/]+\.py)`", text):
        assert (PACKAGE.parent / path).is_file(), path
    layouts = (PACKAGE / "names" / "layouts.py").read_text(encoding="utf-8")
    for name in ("LISTS", "EMBEDDINGS", "NORMS", "HEADS", "_SYNONYMS"):
        assert f"`{name}`" in text
        assert re.search(rf"^{name} = ", layouts, re.MULTILINE), name
