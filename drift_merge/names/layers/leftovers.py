"""Leftovers of two towers: one module under two names, and modules that the mllm put in.

Nothing is guessed: two names are one matrix if shape and place leave no other choice, or if the
words of the names agree; never if both names are known, and mean two things.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping

from drift_merge.names.modules import classify, layer_of
from drift_merge.names.tensors import Shape

# Words that say nothing, or only the class, which is compared by itself.
_FILLERS = frozenset(
    (
        *("to", "proj", "linear", "layer", "w", "weight", "module", "self", "attn", "attention"),
        *("mlp", "ffn", "feed", "forward", "moe", "block", "sparse"),
    )
)
_SAME = {
    **{"out": "o", "query": "q", "key": "k", "value": "v", "layernorm": "norm"},
    **{f"w{letter}": letter for letter in "qkvor"},
    **{"w1": "gate", "w2": "down", "w3": "up", "shared": "share", "experts": "expert"},
}
# What every family means by these: one of them is never another, whatever its shape and place.
_KNOWN = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    )
)
# Rows may lie in another order than q_proj, k_proj or the halves have them: shape tells nothing.
_ORDERED = re.compile(r"\.w[qk]\.|qkv|query_key_value|w13|gate_up|up_gate|att_proj|ff_proj|c_attn")
_SECOND = re.compile(r"_\d+$")  # ERNIE: the router of a second set of experts, `gate.weight_1`
_EXPERT = re.compile(r"\.experts\.(\d+)\.")

Shapes = Mapping[str, Shape | None]


def pair_renamed(
    only_ours: Collection[str], only_theirs: Collection[str], ours: Shapes, theirs: Shapes
) -> list[tuple[str, str]]:
    """Return the leftovers of two towers that are one parameter under two names.

    Two are, if they are in one layer, of one class and one shape, and either the words of their
    names agree (`to_q`, `q_proj`) or no other leftover of that layer has this class and shape.
    A name is paired in every layer that has it, or in none. Two known names are two parameters
    (`input_layernorm`, `post_feedforward_layernorm`), and so are a weight and a bias.
    """
    mine, its = _by_place(only_ours, ours), _by_place(only_theirs, theirs)
    found: list[tuple[str, str]] = []
    for place in sorted(mine.keys() & its.keys()):
        one, other = sorted(mine[place]), sorted(its[place])
        if len(one) == len(other) == 1:
            found.append((one[0], other[0]))
        else:
            found += _by_words(one, other)
    allowed = [(one, other) for one, other in found if _may_be_one(one, other)]
    return _in_every_layer(allowed, only_ours, only_theirs)


def _may_be_one(one: str, other: str) -> bool:
    path, _, leaf = one.rpartition(".")
    its_path, _, its_leaf = other.rpartition(".")
    module, its_module = path.rpartition(".")[2], its_path.rpartition(".")[2]
    if leaf != its_leaf and {leaf, its_leaf} == {"weight", "bias"}:
        return False
    return module == its_module or not {module, its_module} <= _KNOWN


def _by_words(ours: list[str], theirs: list[str]) -> list[tuple[str, str]]:
    """Pair names of the same words, or where those of one are among the other's, and no third's."""
    alike = [(a, b) for a in ours for b in theirs if words_of(a) == words_of(b)]
    if not alike:
        alike = [(a, b) for a in ours for b in theirs if is_within(words_of(a), words_of(b))]
    counts = Counter(name for pair in alike for name in pair)
    return [pair for pair in alike if counts[pair[0]] == counts[pair[1]] == 1]


def is_within(one: list[str], other: list[str]) -> bool:
    """Whether the words of one name are among those of the other."""
    return bool(one and other) and (set(one) <= set(other) or set(other) <= set(one))


def inserted_modules(
    only_theirs: Iterable[str], ours: Shapes, theirs: Shapes, only_ours: Iterable[str]
) -> dict[str, str]:
    """Return canonical name -> module for what the mllm put into the layers it was made from.

    An insertion is a module of a layer, or of modules within one, that no layer of the reasoner has
    a part of, and that holds a matrix; or an expert of another shape than the reasoner's. It comes
    beside others of its class: where the reasoner's layer has none of that class, or its layers
    have leftovers of it, the two are different architectures.
    """
    only_theirs = list(only_theirs)
    if not only_theirs:
        return {}
    left = {classify(name) for name in only_ours if name.startswith("layers.")}
    known = {path for name in ours if name.startswith("layers.") for path in _paths(name)}
    shapes = _expert_shapes(ours)
    made_of = {(layer_of(name), classify(name)) for name in ours}  # what the layers have anyway
    made_of |= {(layer, "other") for layer, _ in made_of}
    modules: dict[str, str] = {}
    for name in only_theirs:
        place = layer_of(name), classify(name)
        if name.startswith("layers.") and place in made_of and place[1] not in left:
            paths, expert = _paths(name), _EXPERT.search(name)
            new = [p for p in paths if p not in known and ("." not in p or p != paths[-1])]
            if not new and _SECOND.search(name) and _SECOND.sub("", name) in ours:
                new = [name.split(".", 2)[2]]
            if new and not (expert and theirs[name] in shapes):
                modules[name] = new[0] if not expert else _EXPERT.sub(".experts.*.", new[0] + ".")
    matrices = {modules[n] for n in modules if (shape := theirs[n]) is None or len(shape) > 1}
    inserted = {name: module.rstrip(".") for name, module in modules.items() if module in matrices}
    for name in only_theirs:  # parameters of an inserted module itself
        path = ".".join(name.split(".")[2:-1])
        if name not in inserted and path in inserted.values():
            inserted[name] = path
    return inserted


def _paths(name: str) -> list[str]:
    """Return the modules of a tensor below its layer, the outer one first."""
    segments = name.split(".")[2:-1]
    return [".".join(segments[: i + 1]) for i in range(len(segments))]


def _expert_shapes(shapes: Shapes) -> set[Shape | None]:
    return {shape for name, shape in shapes.items() if _EXPERT.search(name)}


def _by_place(names: Iterable[str], shapes: Shapes) -> dict[tuple[int, str, Shape], list[str]]:
    """Layer (-1 beside them), class (beside them the last part of the name) and shape -> names."""
    places: dict[tuple[int, str, Shape], list[str]] = defaultdict(list)
    for name in names:
        layer, shape, word = layer_of(name), shapes[name], classify(name)
        if layer is None:
            layer, word = -1, name.rpartition(".")[2]
        is_plain = not name.startswith(("embed_tokens.", "lm_head.")) and word != "other"
        if shape is not None and is_plain and not has_ordered_rows(name):
            places[layer, word, shape].append(name)
    return places


def has_ordered_rows(name: str) -> bool:
    """Whether rows of this tensor may lie in another order than in q_proj, k_proj or two halves."""
    return _ORDERED.search(name) is not None


def words_of(name: str) -> list[str]:
    """Return the words of a name that tell what it is: its modules, numbers and fillers aside.

    >>> words_of("layers.3.self_attn.to_q.weight"), words_of("layers.3.self_attn.q_proj.weight")
    (['q'], ['q'])
    """
    words = [word for part in name.split(".")[2:-1] for word in part.lower().split("_")]
    words = [_SAME.get(word, word) for word in words if word not in _FILLERS]
    leaf = name.rpartition(".")[2].lower()
    return sorted([*filter(None, words), *([] if leaf == "weight" else leaf.split("_"))])


def _in_every_layer(
    found: list[tuple[str, str]], only_ours: Collection[str], only_theirs: Collection[str]
) -> list[tuple[str, str]]:
    def tail(name: str) -> str:
        return name.split(".", 2)[2] if name.startswith("layers.") else name

    ours, theirs = Counter(map(tail, only_ours)), Counter(map(tail, only_theirs))
    kinds = Counter((tail(one), tail(other)) for one, other in found)

    def is_everywhere(mine: str, its: str) -> bool:
        return kinds[mine, its] == ours[mine] == theirs[its]

    return [(one, other) for one, other in found if is_everywhere(tail(one), tail(other))]
