"""Rotary position embeddings of two configs: base, scaling and split by axis.

Pair i of the d / 2 row pairs of a head turns by theta^(-2i / d) a token (RoPE, arXiv 2104.09864),
so q_proj and k_proj are trained for one theta. v_proj, o_proj and the mlp are not turned.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

from drift_merge.names.tensors import Finding

Config = Mapping[str, Any]

# Classes whose config leaves rope_theta out when it is 10,000.
_THETA_10K = frozenset(("llama", "mistral", "qwen2", "internlm2", "phi3", "gemma", "gemma2"))
# (family of the text config, rope_theta): public models whose config.json says so.
_PUBLIC = {
    ("qwen2", 1e4): "Qwen2.5-Math-7B, DeepSeek-R1-Distill-Qwen-1.5B and -7B",
    ("qwen2", 1e6): "Qwen2-VL, Qwen2.5-VL, DeepSeek-R1-Distill-Qwen-14B and -32B",
    ("qwen3", 1e6): "Qwen3-8B",
    ("qwen3", 5e6): "Qwen3-VL (2B, 4B, 8B, 32B), Qwen3-4B-Thinking-2507",
}
_SAME_KIND = {"su": "longrope"}  # an older word for the same scaling
_WITHOUT_QK = "--modules 're:(v|o)_proj,mlp'"
_MAX_SHOWN = 4  # values of a list; longrope has one for each pair of a head


def compare_rotary(
    ours: Config, theirs: Config, families: Sequence[str | None] = (None, None)
) -> list[Finding]:
    """Findings rope_theta, rope_scaling and mrope; none where both agree or one is not known.

    Args:
        ours: settings of the reasoner's language tower.
        theirs: those of the mllm's.
        families: of both, as `qwen2`; None where unknown.
    """
    findings = []
    one, other = (_theta(c, f) for c, f in zip((ours, theirs), families, strict=True))
    if one is not None and other is not None and one != other:
        findings.append(_theta_finding(one, other, families))
    one_scaling, other_scaling = _scaling(ours), _scaling(theirs)
    if one_scaling != other_scaling:
        message = (
            f"rope_scaling is {_show_scaling(one_scaling)} in the reasoner and"
            f" {_show_scaling(other_scaling)} in the mllm: q and k meet other rotary angles."
        )
        remedy = (
            "Check that both models descend from the same long-context version, or leave q and k"
            f" out with {_WITHOUT_QK}"
        )
        findings.append(Finding("rope_scaling", "warning", message, remedy))
    return findings + _mrope(_axes(ours), _axes(theirs))


def _theta_finding(ours: float, theirs: float, families: Sequence[str | None]) -> Finding:
    times = max(ours, theirs) / min(ours, theirs)
    slower = "reasoner" if ours > theirs else "mllm"
    message = (
        f"rope_theta is {ours:,.10g} in the reasoner and {theirs:,.10g} in the mllm: q and k live"
        f" in different rotary frames (the slowest pair of a head turns {times:,.3g} times slower"
        f" in the {slower}), so merging q_proj and k_proj is likely to hurt; v_proj, o_proj and the"
        " mlp are not concerned."
    )
    known = _PUBLIC.get((families[1] or "", theirs))
    example = f" (of this family it is that of {known})" if known else ""
    remedy = (
        f"Choose a reasoner of the mllm's size with rope_theta {theirs:,.10g}{example}, or leave q"
        f" and k out with {_WITHOUT_QK}"
    )
    return Finding("rope_theta", "warning", message, remedy)


def _mrope(ours: str, theirs: str) -> list[Finding]:
    """What is said where only the mllm splits rotary angles by axis, or both do differently."""
    if ours == theirs:
        return []
    if not ours:
        return [
            Finding(
                "mrope",
                "info",
                f"The mllm splits rotary angles by axis ({theirs}); for text alone they equal the"
                f" reasoner's.",
                "Nothing to do: this is expected of a Qwen-VL model.",
            )
        ]
    message = (
        f"Rotary angles are split by axis otherwise: {ours} in the reasoner, {theirs or 'not'} in"
        f" the mllm; on images q and k meet other angles."
    )
    remedy = f"Check that both models descend from the same MLLM, or pass {_WITHOUT_QK}"
    return [Finding("mrope", "warning", message, remedy)]


def _settings(config: Config) -> Config:
    """Return rope_parameters (transformers 5) or rope_scaling; the full-attention ones."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        return {}
    if isinstance(settings.get("full_attention"), Mapping):
        return dict(settings["full_attention"])
    return settings


def _theta(config: Config, family: str | None) -> float | None:
    value = _settings(config).get("rope_theta", config.get("rope_theta"))
    if value is None and family in _THETA_10K:
        return 10_000.0
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _axes(config: Config) -> str:
    """Return how rotary angles are split by axis, or nothing."""
    settings = _settings(config)
    sections = settings.get("mrope_section")
    mixed = ", interleaved" if settings.get("mrope_interleaved") else ""
    return f"mrope_section {sections}{mixed}" if sections else ""


def _scaling(config: Config) -> dict[str, Any]:
    """Return the scaling in one spelling, without theta and what is said of axes."""
    settings = dict(_settings(config))
    for key in ("rope_theta", "mrope_section", "mrope_interleaved"):
        settings.pop(key, None)
    kind = settings.pop("rope_type", None) or settings.get("type")
    settings.pop("type", None)
    if kind in (None, "default", "mrope"):
        return {}
    return {"type": _SAME_KIND.get(str(kind), str(kind)), **dict(sorted(settings.items()))}


def _show_scaling(scaling: Config) -> str:
    """A scaling in a few words: its kind, and each number or the first ones of many."""
    if not scaling:
        return "none"
    numbers = [f"{key} {_show(value)}" for key, value in scaling.items() if key != "type"]
    return f"{scaling['type']} ({', '.join(numbers)})" if numbers else str(scaling["type"])


def _show(value: object) -> str:
    if not isinstance(value, list | tuple) or len(value) <= _MAX_SHOWN:
        return str(value)
    first = ", ".join(map(str, value[: _MAX_SHOWN - 1]))
    mark = crc32(repr(list(value)).encode())  # tells two long lists apart
    return f"[{first}, ...] ({len(value)} values, checksum {mark:08x})"
