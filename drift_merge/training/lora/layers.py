"""LoRA, rsLoRA and DoRA through PEFT: which weights are trained by factors, and the factors' bias.

The mathematics is in `projection`: one delta becomes one direction D per trained factor, and
every factor's gradient gets `g -= c D`.

**The coefficient c is one for all factors of a weight, in factor space**: |g|, <g, D> and |D| are
taken over A, B (and m) together, because |G| and <G, delta> of the dense weight are not known from
the factors' gradients. So `gradnorm` and `adaptive_cosine` measure the part of delta that the
adapter can follow. `absolute` and `absolute_param_norm` need no norm of G and are exact: the
result is the projection of the biased dense gradient. Where B is 0, as PEFT begins, D_A is 0.

PEFT is not imported: its layers are known by their attributes (tested with peft 0.21). The base
weight is only read for DoRA, which reads it in every forward pass too; a packed one (bitsandbytes,
GPTQ) is never touched, since delta has the shape of the weight as it acts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from drift_merge.errors import RecipeError
from drift_merge.training.units import Origin, Unit

_TABLES = {  # role of a factor -> where PEFT's layers keep it, by adapter
    "a": ("lora_A", "lora_embedding_A"),
    "b": ("lora_B", "lora_embedding_B"),
    "m": ("lora_magnitude_vector",),
}
_DORA, _LIKE_LORA = "Dora", "MiCA"  # how PEFT's variants that act as s B A (and m) are called


@dataclass(frozen=True, slots=True)
class Factor:
    """A trained tensor of an adapter."""

    role: str  # "a" (R, I), "b" (O, R) or "m" (O,)
    name: str  # as model.named_parameters() gives it
    parameter: nn.Parameter


@dataclass(frozen=True, slots=True)
class Adapter:
    """One active adapter of one layer, with at least one trained factor."""

    layer: Any  # PEFT's LoraLayer
    name: str  # such as "default"
    factors: tuple[Factor, ...]

    @property
    def scale(self) -> float:
        """s: alpha / R, or alpha / sqrt(R) with rsLoRA; PEFT may change it during training."""
        return float(self.layer.scaling[self.name])

    @property
    def variant(self) -> str:
        """The class of PEFT's variant, empty for plain LoRA and rsLoRA."""
        variant = getattr(self.layer, "lora_variant", {}).get(self.name)
        return "" if variant is None else type(variant).__name__


@dataclass(frozen=True, slots=True)
class Adapted:
    """A weight that is trained through adapters."""

    name: str  # of the base weight, as named_parameters() gives it where it is a parameter
    shape: tuple[int, ...]  # of the weight as it acts: (O, I), (E, O, I), or transposed
    is_transposed: bool  # (I, O), as in GPT-2's Conv1D, embeddings and some experts
    adapters: tuple[Adapter, ...]

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Every trained factor, in the order of `directions`."""
        return tuple(factor for adapter in self.adapters for factor in adapter.factors)


def at_beginning(weights: Iterable[Adapted]) -> bool:
    """Whether every B is 0 as PEFT begins: nothing was trained, or nothing loaded what was.

    Where factors are sharded all ranks call this together.
    """
    for weight in weights:
        for factor in weight.factors:
            if factor.role == "b":
                count = factor.parameter.detach().count_nonzero()
                whole = count.full_tensor() if hasattr(count, "full_tensor") else count
                if int(whole) or not factor.parameter.numel():  # ZeRO-3's are not to be seen
                    return False
    return True


def find_adapted(model: nn.Module) -> dict[str, Adapted]:
    """Find the weights that are trained through LoRA, by the name of the base weight.

    Args:
        model: with or without PEFT's wrappers, and any wrapper around those.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = ((path, module) for path, module in model.named_modules() if is_lora(module))
    found = (_describe(path, layer, names) for path, layer in layers)
    return {adapted.name: adapted for adapted in found if adapted.adapters}


def require_supported(adapted: Adapted) -> None:
    """Refuse an adapter whose effect on the weight is not s B A or DoRA's.

    Raises:
        RecipeError: naming the weight and PEFT's variant.
    """
    for adapter in adapted.adapters:
        is_dora = adapter.variant.startswith(_DORA)
        if adapter.variant and not is_dora and not adapter.variant.startswith(_LIKE_LORA):
            raise RecipeError(
                f"{adapted.name}: adapter {adapter.name!r} is PEFT's {adapter.variant}, whose"
                " effect on the weight is not s B A; LoRA, rsLoRA and DoRA are supported.",
                remedy="Use a plain LoraConfig, or leave these modules out: modules=... or"
                " layers=...",
            )
        if is_dora and (len(adapted.adapters) > 1 or adapted.is_transposed):
            why = "is transposed" if adapted.is_transposed else "has several active adapters"
            raise RecipeError(
                f"{adapted.name}: DoRA on a weight that {why} is not supported.",
                remedy="Use LoRA there (use_dora=False), or one adapter: model.set_adapter(NAME)",
            )


def factor_units(unit: Unit, adapted: Adapted) -> tuple[Unit, ...]:
    """One ordinary unit for each trained factor of a weight, in the order of `directions`.

    They carry the name of the prior's tensor, and so share its coefficient.

    Args:
        unit: of the base weight.
        adapted: the weight.

    Raises:
        RecipeError: as in `require_supported`.
    """
    require_supported(adapted)
    return tuple(
        replace(
            unit,
            parameter_name=factor.name,
            parameter=factor.parameter,
            shape=full_shape(factor.parameter),
            begin=0,
            origin=Origin(0, 0, False),
            is_adapted=False,
        )
        for factor in adapted.factors
    )


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter; ZeRO-3 leaves an empty one behind."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _tensor(layer: Any, adapter: str, role: str) -> Tensor | None:
    for table in _TABLES[role]:
        entries = getattr(layer, table, {})
        if adapter in entries:
            entry = entries[adapter]
            value: Tensor = entry if isinstance(entry, Tensor) else entry.weight
            return value
    return None


def is_lora(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's layers with LoRA."""
    wanted = ("lora_A", "lora_B", "scaling", "base_layer", "active_adapters")
    return all(hasattr(module, attribute) for attribute in wanted)


def _describe(path: str, layer: Any, names: dict[int, str]) -> Adapted:
    leaf = getattr(layer, "parameter_name", "weight")  # LoRA on a parameter, such as experts
    base, where = layer.base_layer, f"{path}.base_layer"
    while hasattr(base, "base_layer"):  # nested where several parameters of a module have LoRA
        base, where = base.base_layer, f"{where}.base_layer"
    name = names.get(id(getattr(base, leaf, None)), f"{where}.{leaf}")
    shape, is_transposed = _shape(layer)
    adapters = (_adapter(layer, adapter, names) for adapter in active_adapters(layer))
    return Adapted(name, shape, is_transposed, tuple(one for one in adapters if one.factors))


def _adapter(layer: Any, name: str, names: dict[int, str]) -> Adapter:
    factors = []
    for role in _TABLES:
        parameter = _tensor(layer, name, role)
        if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
            factors.append(Factor(role, names[id(parameter)], parameter))
    return Adapter(layer, name, tuple(factors))


def active_adapters(layer: Any) -> tuple[str, ...]:
    """The adapters of a layer that act; none where they are switched off."""
    return () if getattr(layer, "disable_adapters", False) else tuple(layer.active_adapters)


def _shape(layer: Any) -> tuple[tuple[int, ...], bool]:
    """The shape of the weight as stored unpacked, and whether it is transposed."""
    rows, columns = int(layer.out_features), int(layer.in_features)
    experts = int(getattr(layer, "num_experts", 1))
    if experts > 1:
        is_transposed = not layer._did_swap_in_out_features
    else:
        is_embedding = bool(getattr(layer, "lora_embedding_A", {}))
        is_transposed = is_embedding or bool(getattr(layer, "fan_in_fan_out", False))
    matrix = (columns, rows) if is_transposed else (rows, columns)
    return ((experts, *matrix) if experts > 1 else matrix), is_transposed
