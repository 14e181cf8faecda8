"""The files of a PEFT adapter made from a prior: config, manifest and card, as bytes.

Every layer has alpha = rank, so that what PEFT multiplies B A by is 1, for the largest rank (`r`)
and, by `rank_pattern` and `alpha_pattern`, for all others. Targets are whole dotted names: a bare
`q_proj` would hit the vision tower too.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from drift_merge.artifacts.card import where
from drift_merge.priors.manifest import Prior
from drift_merge.storage.manifests import describe_tool, seal
from drift_merge.trainers.extraction.factors import Pair

CONFIG, WEIGHTS, MANIFEST, CARD = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "lora.json",
    "README.md",
)
SERVED_RANK = 512  # the largest that vLLM serves (--max-lora-rank)


@dataclass(frozen=True, slots=True)
class Adapter:
    """Layers by dotted name in memory, and what was left out."""

    prior: Prior
    pairs: Mapping[str, Pair]
    equal: tuple[str, ...]  # layers whose delta is zero
    left_out: Mapping[str, str]  # parameter in memory -> why no adapter can hold it
    parameters: Mapping[str, Any]  # as asked for

    @property
    def rank(self) -> int:
        """The largest."""
        return max(pair.rank for pair in self.pairs.values())

    @property
    def kept(self) -> float:
        """Share of the energy of the deltas of its layers that the directions hold."""
        squares = [(pair.norm**2, pair.kept) for pair in self.pairs.values()]
        return sum(square * kept for square, kept in squares) / sum(s for s, _ in squares)

    @property
    def error(self) -> float:
        """||delta - B A|| / ||delta|| over all its layers, of the factors as they are stored."""
        squares = [(pair.norm**2, pair.error**2) for pair in self.pairs.values()]
        return sqrt(sum(s * e for s, e in squares) / sum(s for s, _ in squares))

    @property
    def kept_of_prior(self) -> float:
        """Share of the energy of the whole prior, with what no adapter can hold."""
        layers = sum(pair.norm**2 for pair in self.pairs.values())
        whole = sum((self.prior.norm(name) or 0.0) ** 2 for name in self.prior.tensors)
        return min(1.0, self.kept * layers / whole)

    def reasons(self) -> dict[str, int]:
        """How many parameters were left out, by reason."""
        return dict(Counter(self.left_out.values()))


def config(adapter: Adapter) -> dict[str, Any]:
    """`adapter_config.json`."""
    source, rank = adapter.prior.manifest["sources"]["mllm"], adapter.rank
    others = {re.escape(n): p.rank for n, p in adapter.pairs.items() if p.rank != rank}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": source["repo_id"] or source["source"],
        "revision": source["revision"],
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(adapter.pairs),
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def manifest(adapter: Adapter) -> dict[str, Any]:
    """`lora.json`: what was kept of every layer, and what was left out and why."""
    before = adapter.prior.manifest
    layers = {
        name: {"rank": p.rank, "norm_delta": p.norm, "kept_energy": p.kept, "error": p.error}
        for name, p in adapter.pairs.items()
    }
    return seal(
        {
            "format_version": 1,
            "kind": "drift-lora",
            "tool": describe_tool(),
            "formula": "theta_mllm + B A, B A ~ " + before["formula"].partition(" = ")[2],
            "parameters": dict(adapter.parameters),
            "prior": {"label": adapter.prior.path.name, "seal": before.get("seal")},
            "sources": before["sources"],
            "rank": adapter.rank,
            "kept_energy": adapter.kept,
            "kept_energy_of_prior": adapter.kept_of_prior,
            "error": adapter.error,
            "layers": layers,
            "equal": list(adapter.equal),
            "not_representable": dict(adapter.left_out),
        }
    )


def card(adapter: Adapter) -> bytes:
    """`README.md`, from the adapter alone."""
    sources = adapter.prior.manifest["sources"]
    mllm = sources["mllm"]
    base = mllm["repo_id"] or mllm["source"]
    served = next(
        r for r in (8, 16, 32, 64, 128, 256, 320, SERVED_RANK, adapter.rank) if r >= adapter.rank
    )
    lines = [f"- {count:,} x {reason}" for reason, count in adapter.reasons().items()]
    missing = "\n".join(lines) or "- nothing"
    return f"""---
library_name: peft
tags: [drift, lora, reasoning]
---

# LoRA: {sources["reasoner"]["label"]} -> {mllm["label"]}

The leading singular directions of {adapter.prior.manifest["formula"]}, as an adapter of
{where(mllm)}, from {where(sources["reasoner"])}. Made with {describe_tool()["name"]}
{describe_tool()["version"]}.

{sentence(adapter)}

Not in the adapter, since a LoRA cannot hold it (by name in `{MANIFEST}`):

{missing}

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(model, "ADAPTER")
```

    vllm serve {base} --enable-lora --max-lora-rank {served} --lora-modules reasoning=ADAPTER
""".encode()


def sentence(adapter: Adapter) -> str:
    """What the adapter holds, in numbers."""
    ranks = sorted(pair.rank for pair in adapter.pairs.values())
    rank = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    equal = f" {len(adapter.equal):,} layers are equal and need none." if adapter.equal else ""
    return (
        f"{len(ranks):,} layers of {rank} keep {adapter.kept:.2%} of the energy of their deltas"
        f" (|delta - B A| / |delta| = {adapter.error:.3g}), {adapter.kept_of_prior:.2%} of the"
        f" prior's.{equal}"
    )
