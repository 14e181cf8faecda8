"""What is selected: modules by word or regular expression, layers by number.

A tensor without a layer (embedding, final norm, head) is left out when layers are given,
unless `embed`, `head` or a regular expression asks for it by name: "the norms of layers 4
to 8" does not mean the final norm.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

from drift_merge.errors import RecipeError
from drift_merge.names.layouts import is_router_bias

CHOICES = ("attn", "mlp", "mixer", "norm", "embed", "head", "full")
DEFAULT_MODULES = "attn,mlp"

ATTENTION = frozenset(
    (
        *("self_attn", "attn", "attention", "self_attention", "linear_attn"),
        *("cross_attn", "crossattention", "encoder_attn"),
    )
)
MLP = frozenset(
    (
        *("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "experts", "router"),
        *("shared_expert", "shared_experts", "share_expert", "shared_mlp"),
    )
)
_NUMBERS = re.compile(r"(\d+)")
_RANKS = {"embed_tokens": 0, "layers": 1, "norm": 2, "lm_head": 3}
MIXERS = frozenset(("mixer", "mamba", "conv", "short_conv", "ssm"))  # no attention, no mlp
_LN = re.compile(r"\.(?:\w*_)?ln(?:_|\d*\.)")  # GPT-2's ln_1, Kosmos' inner_attn_ln
_RANGE = re.compile(r"\s*(?:(-?\d+)|(-?\d+)?\s*:\s*(-?\d+)?)\s*")


@dataclass(frozen=True, slots=True)
class ModuleSelection:
    """Which canonical names are asked for."""

    modules: frozenset[str]  # of CHOICES
    patterns: tuple[re.Pattern[str], ...]
    layers: frozenset[int] | None  # None: all
    has_router_biases: bool = False  # those that balance experts; see `layouts.is_router_bias`

    def takes(self, canonical: str) -> bool:
        """Whether the tensor of this canonical name is selected."""
        module = classify(canonical)
        if not self.has_router_biases and is_router_bias(canonical):
            return False
        layer = None if self.layers is None else layer_of(canonical)
        if self.layers is None or layer in self.layers:
            named = "full" in self.modules or module in self.modules
        elif layer is None:
            named = module in ("embed", "head") and module in self.modules
        else:
            return False
        return named or any(pattern.search(canonical) for pattern in self.patterns)


def classify(canonical: str) -> str:
    """Return the module of a canonical name: attn, mlp, mixer, norm, embed, head or other.

    Norms inside attention (`q_norm`, `k_norm`) are norms; experts and routers are mlp; a mixer
    is a block of state-space or convolution.

    >>> classify("layers.0.self_attn.q_norm.weight")
    'norm'
    """
    first, _, rest = canonical.partition(".")
    if first != "layers":
        return _classify_outside(first)
    number, _, tail = rest.partition(".")
    # Layers are alike, and a model may have 100,000 names: one number stands for all.
    return _classify_inside(f"layers.0.{tail}" if number.isdigit() else canonical)


@lru_cache(maxsize=2**14)
def _classify_inside(canonical: str) -> str:
    """The class of what a layer holds."""
    segments = canonical.split(".")
    if "norm" in canonical.lower() or ("ln" in canonical and _LN.search(canonical)):
        return "norm"
    for segment in segments[2:]:
        if segment in ATTENTION:
            return "attn"
        if segment in MLP:
            return "mlp"
        if segment in MIXERS:
            return "mixer"
    return "mlp" if segments[2:3] == ["gate"] else "other"  # the router of experts


def _classify_outside(module: str) -> str:
    """The class of what the tower holds beside its layers."""
    if module.startswith("embed_tokens"):
        return "embed"
    if module == "lm_head":
        return "head"
    return "norm" if "norm" in module.lower() else "other"


def canonical_order(canonical: str) -> tuple[int, int, str]:
    """A key that sorts as a model runs: embedding, layers by number, final norm, head."""
    rank = _RANKS.get(canonical.partition(".")[0], 4)
    if ".experts." not in canonical:
        return rank, layer_of(canonical) or 0, canonical
    # Expert 10 comes after expert 9.
    texts = _NUMBERS.split(canonical)
    texts[1::2] = [number.zfill(6) for number in texts[1::2]]
    return rank, layer_of(canonical) or 0, "".join(texts)


def layer_of(canonical: str) -> int | None:
    """Return the layer number in a canonical name, None where it has none."""
    if not canonical.startswith("layers."):
        return None
    number = canonical.split(".", 2)[1]
    return int(number) if number.isdigit() else None


def parse_selection(
    modules: str, layers: str | None, num_layers: int, *, has_router_biases: bool = False
) -> ModuleSelection:
    """Read `--modules` and `--layers`.

    Args:
        modules: comma list of `CHOICES` and `re:REGEX`; a regular expression is searched
            (not anchored) in canonical names; commas inside its brackets are its own.
        layers: None for all, or as in `parse_layers`.
        num_layers: layers of the mllm's language tower.
        has_router_biases: take the biases that balance experts with the mlp. Merges do; a prior
            steers gradients, and they have none.

    Raises:
        RecipeError: if a word is not one of the choices, a regular expression or a range
            cannot be read, or nothing is selected.
    """
    if not isinstance(modules, str):  # a list would be read character by character
        raise RecipeError(
            f"modules is {modules!r}; expected text such as {DEFAULT_MODULES!r}.",
            remedy=f"Choices: {', '.join(CHOICES)} or re:REGEX, joined by commas.",
        )
    words = _split_modules(modules)
    patterns = tuple(_compile(word[3:]) for word in words if word.startswith("re:"))
    names = frozenset(word for word in words if not word.startswith("re:"))
    for name in sorted(names.difference(CHOICES)):
        raise _unknown_module(name)
    if not words:
        raise RecipeError(
            "modules is empty: nothing would be selected.",
            remedy=f"Choices: {', '.join(CHOICES)} or re:REGEX, joined by commas.",
        )
    numbers = None if layers is None else parse_layers(layers, num_layers)
    return ModuleSelection(names, patterns, numbers, has_router_biases)


def parse_layers(text: str, num_layers: int) -> frozenset[int]:
    """Read layer numbers: `0:28`, `4:`, `0,3,5:8`; ends may be negative, as in Python.

    Raises:
        RecipeError: if the text cannot be read, a single number is out of range, or no
            layer is selected.

    >>> sorted(parse_layers("0,-2:", 28))
    [0, 26, 27]
    """
    remedy = "Write numbers and half-open ranges, e.g. --layers 0:28, 4:, -4: or 0,3,5:8."
    numbers: set[int] = set()
    for item in text.split(","):
        found = _RANGE.fullmatch(item)
        if found is None:
            raise RecipeError(f"layers: cannot read {item.strip()!r} in {text!r}.", remedy=remedy)
        if found[1] is None:
            start, stop = (int(found[i]) if found[i] else None for i in (2, 3))
            numbers.update(range(*slice(start, stop).indices(num_layers)))
            continue
        number = int(found[1])
        if not -num_layers <= number < num_layers:
            raise RecipeError(
                f"layers: there is no layer {number}; the tower has {num_layers} (0 to"
                f" {num_layers - 1}).",
                remedy=remedy,
            )
        numbers.add(number % num_layers)
    if not numbers:
        raise RecipeError(
            f"layers: {text!r} selects none of the tower's {num_layers} layers.", remedy=remedy
        )
    return frozenset(numbers)


def _split_modules(text: str) -> list[str]:
    """Split at commas, but not inside the brackets of a regular expression: `re:q{1,2}`."""
    words: list[str] = []
    for piece in text.split(","):
        if words and words[-1].startswith("re:") and _is_open(words[-1]):
            words[-1] += "," + piece
        elif piece.strip():
            words.append(piece.strip())
    return words


def _is_open(pattern: str) -> bool:
    return any(pattern.count(left) > pattern.count(right) for left, right in ("{}", "[]", "()"))


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RecipeError(
            f"modules: 're:{pattern}' is not a regular expression: {error}.",
            remedy=r"It is searched in canonical names, e.g. 're:self_attn\.[qk]_proj\.weight'.",
        ) from error


def _unknown_module(name: str) -> RecipeError:
    near = get_close_matches(name, CHOICES, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return RecipeError(
        f"modules: {name!r} is not a module.{guess}",
        remedy=f"Choices: {', '.join(CHOICES)} or re:REGEX on canonical names, joined by commas.",
    )
