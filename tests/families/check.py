"""Align, compute, merge, load and attach one architecture, and compare with float64.

What is right on the disk is learned from transformers itself: the mllm is saved once more with the
reasoner's values in the parameters that are the reasoner's, and once with the number of each
parameter in it.
"""

import copy
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

import drift_merge
from drift_merge.names.modules import classify
from drift_merge.training.attach import attach
from tests.families.build import Twin, Unbuildable, small_twin, weights

WEIGHT = 0.3
WORDS = ("attn", "mlp", "norm")
COLUMNS = ("align", "compute", "merge", "attach")
# Classes of modules, by the name of the class: a norm by itself, others by the outermost.
_NORM = re.compile(r"Norm|LN$")
_CLASSES = (
    ("mixer", re.compile(r"Mamba|ShortConv|SSM")),
    ("attn", re.compile(r"Attention|DeltaNet|Indexer|Compressor")),
    ("mlp", re.compile(r"M[lL][pP]|Mo[eE]|FeedForward|Expert|Router|SparseMoe")),
)

_IN_LAYER = re.compile(r"\.(?:layers|h|blocks|layer)\.\d+\.")


@dataclass
class Row:
    """One line of the table."""

    kind: str
    partner: str = "-"
    columns: dict[str, str] = field(default_factory=dict)  # "right", or what is wrong
    skipped: str = ""
    is_encoder_decoder: bool = False

    @property
    def is_right(self) -> bool:
        """Whether every column is."""
        return len(self.columns) == len(COLUMNS) and set(self.columns.values()) == {"right"}


def check(kind: str, folder: Path, columns: tuple[str, ...] = COLUMNS) -> Row:
    """Return the line of an architecture; `folder` is emptied."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    try:
        twin = small_twin(kind)
    except Unbuildable as error:
        return Row(kind, skipped=str(error))
    except Exception as error:
        return Row(kind, skipped=f"no text partner: {_short(error)}")
    row = Row(kind, type(twin.reasoner).__name__, is_encoder_decoder=twin.is_encoder_decoder)
    case = Case(twin, folder)
    try:
        case.save()
    except Exception as error:
        reason = f"transformers cannot save and load it: {_short(error)}"
        return Row(kind, row.partner, skipped=reason)
    if row.is_encoder_decoder:
        columns = ("align",)
    for column in columns:
        try:
            row.columns[column] = getattr(case, column)() or "right"
        except Exception as error:
            row.columns[column] = _short(error)
    return row


class Case:
    """One architecture with its files."""

    def __init__(self, twin: Twin, folder: Path) -> None:
        self.twin, self.folder = twin, folder
        self.reasoner, self.mllm = folder / "reasoner", folder / "mllm"
        self.before: dict[str, Tensor] = {}  # the mllm as stored
        self.target: dict[str, Tensor] = {}  # the same with the reasoner's values
        self.owners: dict[str, set[str]] = {}  # stored name -> parameters that are in it

    def save(self) -> None:
        """Write both models, and learn how the mllm's parameters lie on the disk."""
        twin = self.twin
        for model, path in ((twin.reasoner, self.reasoner), (twin.mllm, self.mllm)):
            model.save_pretrained(path)
            _write_tokenizer(path, model)
        type(twin.mllm).from_pretrained(self.mllm, dtype=torch.bfloat16)
        self.before = load(self.mllm)
        values = weights(twin.reasoner)
        changed, numbered = copy.deepcopy(twin.mllm), copy.deepcopy(twin.mllm).float()
        with torch.no_grad():
            for name, parameter in weights(changed).items():
                if name in twin.partner:
                    value = values[twin.partner[name]]
                    parameter[tuple(slice(0, n) for n in value.shape)].copy_(value)
            for i, (_, parameter) in enumerate(weights(numbered).items()):
                parameter.fill_(i + 1)
        changed.save_pretrained(self.folder / "target")
        numbered.save_pretrained(self.folder / "numbers")
        self.target = load(self.folder / "target")
        names = list(weights(numbered))
        for name, tensor in load(self.folder / "numbers").items():
            is_number = tensor.numel() and tensor.is_floating_point()
            found = {float(x) for x in tensor.float().unique()} if is_number else set()
            self.owners[name] = {
                names[int(x) - 1] for x in found if x == int(x) and 0 < x <= len(names)
            }
        for path in ("target", "numbers"):
            shutil.rmtree(self.folder / path)

    def taken(self) -> set[str]:
        """Stored names that hold a parameter of the reasoner's."""
        return {
            name
            for name, owners in self.owners.items()
            if owners & self.twin.partner.keys() and name in self.before
        }

    def align(self) -> str:
        """Every word takes what its modules hold, all matched; `full` takes the whole tower."""
        if self.twin.is_encoder_decoder:
            return self._refused()
        full = drift_merge.align(self.reasoner, self.mllm, modules="full")
        wanted, got = self.taken(), {pair.mllm for pair in full.pairs}
        if lost := sorted(name for name in wanted - got if not _is_router_bias(name)):
            return f"full leaves out {_some(lost)}"
        if more := sorted(name for name in got - wanted if not _is_router_bias(name)):
            return f"full takes {_some(more)}"
        classes = self._classes()
        for word in WORDS:
            right = {name for name in wanted if classes.get(name) == word}
            if not right:
                continue
            found = drift_merge.align(self.reasoner, self.mllm, modules=word)
            taken = {pair.mllm for pair in found.pairs}
            if lost := sorted(name for name in right - taken if not _is_router_bias(name)):
                return f"{word} leaves out {_some(lost)}"
            wrong = sorted(n for n in taken if classes.get(n, word) not in (word, "other"))
            if wrong:
                return f"{word} takes {_some(wrong)} of {classes[wrong[0]]}"
            if found.num_matched < found.num_selected:
                return f"{word}: {found.num_matched} of {found.num_selected} matched"
        return ""

    def _refused(self) -> str:
        """An encoder-decoder is refused with this word."""
        try:
            drift_merge.align(self.reasoner, self.mllm)
        except drift_merge.AlignmentError as error:
            return "" if "encoder-decoder" in str(error) else _short(error)
        return "not refused, though it is an encoder-decoder"

    def compute(self) -> str:
        """Delta of the whole tower against float64."""
        prior = self._prior()
        deltas = load(prior.path, "prior*.safetensors")
        stored = {c: entry["mllm"] for c, entry in prior.tensors.items()}
        wrong = []
        for canonical, delta in deltas.items():
            name = stored[canonical]
            exact = self.target[name].double() - self.before[name].double()
            if not torch.equal(delta.double(), exact.float().to(delta.dtype).double()):
                wrong.append(name)
        if wrong:
            return f"delta wrong in {_some(sorted(wrong))}"
        left = self.taken() - set(stored.values())
        left = {name for name in left if not _is_router_bias(name)}
        return f"no delta of {_some(sorted(left))}" if left else ""

    def merge(self) -> str:
        """`linear` over the whole tower: loads without a remark, and every value is right."""
        output = self.folder / "merged"
        drift_merge.linear(
            [self.reasoner],
            self.mllm,
            output,
            weights=[WEIGHT],
            modules="full",
            progress=False,
            threads=1,
        )
        cls = type(self.twin.mllm)
        loaded, info = cls.from_pretrained(output, output_loading_info=True, dtype=torch.bfloat16)
        again, before = cls.from_pretrained(
            self.mllm, output_loading_info=True, dtype=torch.bfloat16
        )
        del again
        for key, names in info.items():
            if names and names != before.get(key):
                return f"from_pretrained: {key} {_some(sorted(map(str, names)))}"
        values = weights(self.twin.reasoner)
        wrong = []
        live = weights(loaded)
        for name, old in weights(self.twin.mllm).items():
            expected = old.double()
            if name in self.twin.partner:
                value = values[self.twin.partner[name]]
                rows = tuple(slice(0, n) for n in value.shape)
                expected = expected.clone()
                expected[rows] = (1 - WEIGHT) * expected[rows] + WEIGHT * value.double()
            if _is_router_bias(name) and torch.equal(live[name], old):
                continue  # of another number of experts: left alone
            if not torch.allclose(live[name].double(), expected, rtol=2**-8, atol=1e-6):
                wrong.append(name)
        return f"values wrong in {_some(sorted(wrong))}" if wrong else ""

    def attach(self) -> str:
        """A prior of the default modules biases the tower's parameters of these, no other."""
        prior = self._prior("attn,mlp")
        model = type(self.twin.mllm).from_pretrained(self.mllm, dtype=torch.bfloat16)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        handle = attach(model, prior.path, alpha=1.0, rule="absolute", modules="attn,mlp")
        handle.apply()
        values = weights(self.twin.reasoner)
        classes = {o: classify(c) for c, e in prior.tensors.items() for o in self.owners[e["mllm"]]}
        wrong = []
        for name, parameter in model.named_parameters():
            expected = torch.zeros_like(parameter).double()
            if name in classes and name in self.twin.partner:
                old, new = parameter.double(), values[self.twin.partner[name]].double()
                expected = old - new
            grad = parameter.grad.double() if parameter.grad is not None else expected * 0
            if not torch.allclose(grad, expected, rtol=2**-7, atol=1e-6):
                wrong.append(name)
        return f"gradients wrong in {_some(sorted(wrong))}" if wrong else ""

    def _prior(self, modules: str = "full") -> drift_merge.Prior:
        return drift_merge.compute(
            self.reasoner,
            self.mllm,
            self.folder / f"prior-{modules.replace(',', '-')}",
            modules=modules,
            threads=1,
            progress=False,
        )

    def _classes(self) -> dict[str, str]:
        """Stored name -> word of its modules by their classes; "other" where none says."""
        words = {name: _word(self.twin.mllm, name) for name in self.twin.partner}
        found = {}
        for name, owners in self.owners.items():
            kinds = {words[o] for o in owners if o in words}
            # Inkling keeps parameters of its layers beside them on the disk.
            is_plain = len(kinds) == 1 and _IN_LAYER.search(f".{name}")
            found[name] = kinds.pop() if is_plain else "other"
        return found


def load(path: Path, pattern: str = "*.safetensors") -> dict[str, Tensor]:
    """Return every tensor of a folder."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob(pattern)):
        with safe_open(file, "pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return tensors


def _word(model: nn.Module, name: str) -> str:
    """The word of `--modules` that a parameter belongs to, by the classes of its modules."""
    path = name.rpartition(".")[0]
    owner, module = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
    if isinstance(module, nn.Linear) and not isinstance(owner, nn.ModuleList):
        config = getattr(owner, "config", None) or getattr(model.config, "text_config", None)
        width = getattr(config, "ffn_dim", None)
        if width in (module.in_features, module.out_features):
            return "mlp"  # OPT: matrices of the layer itself
    if not _IN_LAYER.search(f".{name}"):
        return "other"
    if _NORM.search(type(module).__name__):
        return "norm"
    word = "other"
    while path and not re.search(r"(?:^|\.)\d+$", path):
        cls = type(model.get_submodule(path)).__name__
        word = next((w for w, pattern in _CLASSES if pattern.search(cls)), word)
        path = path.rpartition(".")[0]
    return word


def _is_router_bias(name: str) -> bool:
    return name.endswith(("e_score_correction_bias", "router_bias", "expert_bias"))


def _write_tokenizer(path: Path, model: nn.Module) -> None:
    """One token for every row of the largest table, the same in both models."""
    rows = max(
        (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=1
    )
    tokens = {f"t{i}": i for i in range(rows)}
    text: Mapping[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": tokens, "unk_token": "t0"},
    }
    (path / "tokenizer.json").write_text(json.dumps(text))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{len(names)}: {', '.join(names[:2])}{more}"


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().split("\n")]
    return f"{type(error).__name__}: {' / '.join(lines[:3])}"[:300]
