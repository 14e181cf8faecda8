"""Build a multimodal model of transformers small, and the text model that its tower is.

The text partner is another instance of the tower's own class or of the text LLM of its config.
Which of its parameters is which of the tower's is read from the modules in memory, never from
names on the disk: that is what is tested.
"""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, Gemma3nVisionConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from tests.families.shrink import EXCEPTIONS, merged, shrink

_MAPPINGS = (
    "MULTIMODAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ",
    "TEXT_TO_WAVEFORM",
    "TEXT_TO_SPECTROGRAM",
)
_TOWERS = (  # where the decoder is, if get_decoder() does not say
    "model.vlm.language_model",
    "thinker.model.language_model",
    "thinker.model",
    "model.language_model.model",
    "model.language_model",
    "language_model.model",
    "language_model",
    "model.decoder",
    "text_decoder",
    "decoder",
    "backbone_model",
    "model",
    "git",
)


# The text LLM that a family descends from, where its config does not name it.
_PARTNERS = {
    "cosmos3_omni": "qwen3",
    "ernie4_5_vl_moe": "ernie4_5_moe",
    "evolla": "llama",
    "idefics": "llama",
    "mllama": "llama",
    "qwen2_5_omni": "qwen2",
    "qwen2_5_omni_thinker": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen3_omni_moe": "qwen3_moe",
    "qwen3_omni_moe_thinker": "qwen3_moe",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "glm4v": "glm4",
    "glm46v": "glm4",
    "glmga": "glm4",
    "glm4v_moe": "glm4_moe",
    "granite4_vision": "granite",
    "voxtral_realtime": "mistral",
}
# The class of a checkpoint, where the mapping names another that cannot load it.
_CLASSES = {"shieldgemma2": "ShieldGemma2ForImageClassification"}
# What the mllm calls otherwise in memory: (its name, the text LLM's).
_RENAMED = {"ernie4_5_vl_moe": (("mlp.text_moe.", "mlp."),)}
# Modules below a tower that are no language: of a model that has no module of its own for that.
_NO_LANGUAGE = re.compile(
    r"(?:^|\.)(?:vq\w*|visual|vision\w*|image\w*|embed_tokens_extend"
    r"|protein\w*|perceiver\w*|visual_projection\w*|codec\w*|\w*projector|img_temp\w*)\."
    r"|^(?:audio_\w+|embed_audio\w*)\."
)


class Unbuildable(Exception):
    """Why an architecture has no row in the table."""


@dataclass(frozen=True)
class Twin:
    """The mllm, its text partner, and which parameter of the one is which of the other."""

    mllm: PreTrainedModel
    reasoner: PreTrainedModel
    tower: str  # path of the tower in the mllm
    partner: dict[str, str]  # parameter of the mllm -> the same of the reasoner, in memory
    inserted: frozenset[str]  # parameters below the tower that the reasoner lacks
    is_encoder_decoder: bool


def architectures() -> dict[str, str]:
    """Return model type -> class of every architecture that may have a decoder tower."""
    found: dict[str, str] = {}
    for mapping in _MAPPINGS:
        for kind, name in getattr(auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            found.setdefault(kind, name if isinstance(name, str) else name[0])
    return found | _CLASSES


def small_model(kind: str) -> PreTrainedModel:
    """Return the small model of an architecture, with values of its own in every parameter.

    Raises:
        Unbuildable: if transformers cannot make it here.
    """
    try:
        cls = CONFIG_MAPPING[kind]
        config = merged(shrink(cls().to_dict()), EXCEPTIONS.get(kind, {}))
        for key in ("model_type", "transformers_version", "architectures"):
            config.pop(key, None)
        return getattr(transformers, architectures()[kind])(cls(**config))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise Unbuildable(f"not built: {type(error).__name__}: {reason[:160]}") from error


def small_twin(kind: str, dtype: torch.dtype = torch.bfloat16) -> Twin:
    """Return the small model of an architecture with its text partner.

    Raises:
        Unbuildable: if it cannot be made, or has no decoder of language.
    """
    mllm = small_model(kind)
    path = find_tower(mllm)
    tower = mllm.get_submodule(path)
    is_encoder_decoder = bool(getattr(mllm.config, "is_encoder_decoder", False)) or (
        any(hasattr(tower, name) for name in ("encoder",)) and hasattr(tower, "decoder")
    )
    one = _head(mllm, tower)
    reasoner, inner = text_partner(kind, tower, has_head=one is not None)
    fill(mllm.to(dtype), "mllm")
    fill(reasoner.to(dtype), "reasoner")
    partner, inserted = {}, set()
    known = {id(p): n for n, p in weights(mllm).items()}  # a tied one by its first name
    theirs = {n: p.shape for n, p in weights(reasoner.get_submodule(inner)).items()}
    renumbered = _renumbered(kind, tower)
    for name, parameter in weights(tower).items():
        other = renumbered(name)
        if _NO_LANGUAGE.search(name):
            continue
        shape = theirs.get(other)
        # An mllm may have added rows to the embedding.
        if shape is not None and (shape[1:] == parameter.shape[1:] and "embed" in other):
            shape = parameter.shape
        if shape == parameter.shape:
            partner[known[id(parameter)]] = f"{inner}.{other}" if inner else other
        else:
            inserted.add(known[id(parameter)])
    other = _head(reasoner, reasoner.get_submodule(inner))
    if one and other and one not in partner:
        partner[one] = other
        biases = one.replace("weight", "bias"), other.replace("weight", "bias")
        if biases[0] in known.values() and biases[1] in weights(reasoner):
            partner[biases[0]] = biases[1]
    return Twin(mllm, reasoner, path, partner, frozenset(inserted), is_encoder_decoder)


def find_tower(model: nn.Module) -> str:
    """Return the path of the decoder of language in a model."""
    paths = {id(module): name for name, module in reversed(list(model.named_modules()))}
    found = None
    if not hasattr(model, "thinker"):
        try:
            found = model.get_decoder()
        except Exception:
            found = None
    if (
        found is not None
        and found is not model
        and not hasattr(found, "vlm")
        and id(found) in paths
        and _embeds(found)
    ):
        return paths[id(found)]
    for path in _TOWERS:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if _embeds(module):
            return path
    raise Unbuildable("no decoder of language: no module with a token embedding and layers")


def text_partner(
    kind: str, tower: PreTrainedModel, *, has_head: bool
) -> tuple[PreTrainedModel, str]:
    """Return a text model with the architecture of `tower` and the path of that in it.

    The text LLM that the family was made from, if the table names it; the text LLM of the
    tower's config; or the tower's own class, with a head if the mllm has one.
    """
    config = copy.deepcopy(tower.config).get_text_config(decoder=True)
    config.tie_word_embeddings = not has_head
    name = _PARTNERS.get(kind, getattr(config, "model_type", ""))
    name = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name)
    if name:
        cls = getattr(transformers, name if isinstance(name, str) else name[0])
        if kind in _PARTNERS:
            model = cls(_translated(cls.config_class, config))
        else:
            try:
                model = cls(config)
            except Exception:  # the class is that of the whole mllm
                model = None
        for path, module in model.named_modules() if model is not None else ():
            if type(module) is type(tower) or _same_names(module, tower):
                return model, path
        if kind in _PARTNERS:
            raise ValueError(f"{cls.__name__} is no partner of {type(tower).__name__}")
    if type(tower).__name__.endswith("ForCausalLM") or not has_head:
        return type(tower)(copy.deepcopy(tower.config)), ""
    return _with_head(tower), "model"


def _translated(cls: type, config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """Return the config of a text LLM with the sizes of a tower's."""
    fields = config.to_dict()
    for key in ("model_type", "transformers_version", "architectures"):
        fields.pop(key, None)
    count, inserted = fields["num_hidden_layers"], fields.pop("cross_attention_layers", None) or ()
    fields["num_hidden_layers"] = count - sum(layer < count for layer in inserted)
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    if isinstance(fields.get("moe_intermediate_size"), list):
        fields["moe_intermediate_size"] = fields["moe_intermediate_size"][0]
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict):
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    return cls(**fields)


def _with_head(tower: PreTrainedModel) -> PreTrainedModel:
    """Return a text LLM around another instance of the tower's class."""

    class TextForCausalLM(PreTrainedModel):
        config_class = type(tower.config)
        base_model_prefix = "model"
        _supports_sdpa = _supports_attention_backend = True

        def __init__(self, config: transformers.PretrainedConfig) -> None:
            super().__init__(config)
            self.model = type(tower)(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        @classmethod
        def _can_set_experts_implementation(cls) -> bool:
            return True

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    return TextForCausalLM(copy.deepcopy(tower.config))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and the stored buffers of a model, a tied one once."""
    stored = model.state_dict(keep_vars=True)
    found: dict[str, torch.Tensor] = dict(model.named_parameters())
    known = {id(p) for p in found.values()}
    found |= {n: b for n, b in stored.items() if id(b) not in known and b.is_floating_point()}
    return found


def fill(model: nn.Module, salt: str) -> None:
    """Give every parameter and every float buffer that is stored values of its own."""
    generator = torch.Generator().manual_seed(sum(map(ord, salt)))
    with torch.no_grad():
        for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values():
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator) * 0.05
                tensor.copy_(values.to(tensor.dtype))


def _renumbered(kind: str, tower: nn.Module) -> Callable[[str], str]:
    """Return the name of a tower's parameter as its text LLM has it, without inserted layers."""
    inserted = getattr(tower.config.get_text_config(), "cross_attention_layers", None) or ()
    count = getattr(tower.config.get_text_config(), "num_hidden_layers", 0)
    others = [i for i in range(count) if i not in inserted]

    def rename(name: str) -> str:
        for old, new in _RENAMED.get(kind, ()):
            name = name.replace(old, new)

        def number(found: re.Match[str]) -> str:
            layer = int(found[1])
            return f"layers.{others.index(layer)}." if layer in others else f"inserted.{layer}."

        return re.sub(r"layers\.(\d+)\.", number, name, count=1) if inserted else name

    return rename


def _same_names(one: nn.Module, other: nn.Module) -> bool:
    mine = {(name, p.shape) for name, p in one.named_parameters()}
    theirs = {(name, p.shape) for name, p in other.named_parameters()}
    # The mllm may have put modules or layers into its tower.
    return len(mine) > 4 and len(mine - theirs) <= len(mine) // 4


def _embeds(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Embedding) for m in module.modules()) and any(
        isinstance(m, nn.ModuleList) for m in module.modules()
    )


def _head(model: PreTrainedModel, tower: nn.Module) -> str | None:
    """Return the name of the head's weight if it is a parameter of its own."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for owner in _owners(model, tower):
        head = owner.get_output_embeddings()
        weight = getattr(head, "weight", None)
        for name, parameter in model.named_parameters():
            if parameter is weight and id(weight) not in tables:
                return name
    return None


def _owners(model: PreTrainedModel, tower: nn.Module) -> Iterator[PreTrainedModel]:
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(m is tower for m in module.modules()):
            try:
                module.get_output_embeddings()
            except Exception:
                continue
            yield module


class _StandIn(PreTrainedModel):
    """A vision tower of one matrix for those of timm, which is not in the environment."""

    config_class = Gemma3nVisionConfig

    def __init__(self, config: Gemma3nVisionConfig) -> None:
        super().__init__(config)
        self.patches = nn.Linear(8, 16, bias=False)
        self.post_init()


AutoModel.register(Gemma3nVisionConfig, _StandIn, exist_ok=True)
