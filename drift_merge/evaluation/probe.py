"""The child of `drift-merge check`: loads one checkpoint in transformers, lets it speak, reports.

    python probe.py REQUEST.json RESULT.json

Run as a file, by any interpreter that has torch and transformers (drift_merge may be missing
there), so it imports nothing of this package. No remote code is run.
"""

import json
import math
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM")
# Said each time: without it transformers asks on the terminal whether to run a checkpoint's code.
_NO_CODE = {"trust_remote_code": False}


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """Load, measure, generate.

    Args:
        request: model, revision, device, dtype, max_tokens, text, prompts ({id, text, picture}).
    """
    torch, transformers = import_module("torch"), import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    model, info = _load(transformers, request)
    model = model.to(request["device"]).eval()
    result: dict[str, Any] = {
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "loading": {key: sorted(map(str, info.get(key) or ())) for key in _KEYS},
        "notes": [],
        "perplexity": None,
        "answers": [],
    }
    processor = _processor(transformers, request, result["notes"])
    if processor is None:
        return result
    with torch.inference_mode():
        result["perplexity"] = _perplexity(torch, model, processor, request["text"])
        for prompt in request["prompts"]:
            answer = _answer(model, processor, prompt, request["max_tokens"], result["notes"])
            if answer is not None:
                result["answers"].append({"id": prompt["id"], **answer})
    return result


def _load(transformers: Any, request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """By the first class that knows the config."""
    place = _place(request)
    config = transformers.AutoConfig.from_pretrained(request["model"], **place)
    for name in _CLASSES:
        auto = getattr(transformers, name, None)
        if auto is None or type(config) not in auto._model_mapping:
            continue
        model, info = auto.from_pretrained(
            request["model"],
            dtype=request["dtype"],
            output_loading_info=True,
            use_safetensors=True,
            **place,
        )
        return model, info
    raise ValueError(f"no model class of transformers generates text from {type(config).__name__}")


def _place(request: dict[str, Any]) -> dict[str, Any]:
    revision = request.get("revision")
    return {"revision": revision, **_NO_CODE} if revision else dict(_NO_CODE)


def _processor(transformers: Any, request: dict[str, Any], notes: list[str]) -> Any:
    place = _place(request)
    for auto in (transformers.AutoProcessor, transformers.AutoTokenizer):
        try:
            found = auto.from_pretrained(request["model"], **place)
        except Exception as error:
            reason = str(error).splitlines()[0]
            continue
        if hasattr(found, "tokenizer") or hasattr(found, "convert_tokens_to_ids"):
            return found
        reason = f"{type(found).__name__} has no tokenizer"
    notes.append(f"there is no tokenizer beside the weights, so nothing was generated ({reason})")
    return None


def _tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def _perplexity(torch: Any, model: Any, processor: Any, text: str) -> float | None:
    """exp of the mean loss in nats per token; None where it is not finite."""
    ids = _tokenizer(processor)(text, return_tensors="pt")["input_ids"].to(model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    return math.exp(loss) if math.isfinite(loss) and loss < 700 else None


def _answer(
    model: Any, processor: Any, prompt: dict[str, Any], max_tokens: int, notes: list[str]
) -> dict[str, Any] | None:
    """The greedy answer; None where the prompt cannot be put to this model."""
    try:
        inputs = _inputs(processor, prompt)
    except Exception as error:
        kind = "picture" if prompt.get("picture") else "text"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        note = f"its processor does not take the {kind} prompts ({reason})"
        notes += [] if note in notes else [note]
        return None
    inputs.pop("token_type_ids", None)
    inputs = inputs.to(model.device)
    for name, value in inputs.items():
        if hasattr(value, "is_floating_point") and value.is_floating_point():
            inputs[name] = value.to(model.dtype)
    out = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    asked = inputs["input_ids"]
    new = out[0, asked.shape[1] :].tolist()
    tokenizer = _tokenizer(processor)
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else {*(ends or ())}
    is_capped = len(new) >= max_tokens and not (new and new[-1] in ends)
    while new and new[-1] in {*ends, model.generation_config.pad_token_id}:
        new.pop()
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True).strip(),
        # With special tokens: <think> is one in some vocabularies.
        "raw": tokenizer.decode(asked[0, -8:]) + "\0" + tokenizer.decode(new),
        "tokens": new,
        "is_capped": is_capped,
        "has_picture": bool(prompt.get("picture")),
    }


def _inputs(processor: Any, prompt: dict[str, Any]) -> Any:
    content: list[dict[str, Any]] = [{"type": "text", "text": prompt["text"]}]
    is_tokenizer = _tokenizer(processor) is processor
    if prompt.get("picture"):
        if is_tokenizer:
            raise ValueError("there is a tokenizer but no processor")
        image = import_module("PIL.Image").open(prompt["picture"]).convert("RGB")
        content.insert(0, {"type": "image", "image": image})
    if not getattr(processor, "chat_template", None) and not prompt.get("picture"):
        return _tokenizer(processor)(prompt["text"], return_tensors="pt")
    message = {"role": "user", "content": prompt["text"] if is_tokenizer else content}
    return processor.apply_chat_template(
        [message],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(probe(asked)), encoding="utf-8")
