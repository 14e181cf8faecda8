"""What one process of a distributed run does; see tests.real_engines.launch. Plain results."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.real_trainers import tiny

RATE = 0.5
TARGETS = ["q_proj", "v_proj", "down_proj"]


def setup_at(source: str, name: str = "llava") -> tiny.Setup:
    at = Path(source)
    return tiny.Setup(tiny.FAMILIES[name], at / "mllm", at / "prior", {}, name)


def trainer_zero(directory: Path, *, source: str, stage: int, steps: int = 1) -> dict[str, Any]:
    """Trainer under DeepSpeed: two ranks, two micro-batches a step."""
    # It would compile a shared-memory operation and leave a lock behind.
    import deepspeed  # noqa: F401
    import transformers

    from drift_merge.trainers.hf import DriftCallback
    from tests.real_trainers.hf import InOrder, arguments

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    setup, order = setup_at(source), []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            order.append("on_pre_optimizer_step")

    def rule(sums: Any) -> Any:
        from drift_merge.maths.injection import RULES

        order.append("bias")
        return RULES["adaptive_cosine"](sums)

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    trainer = InOrder(
        model=setup.model(),
        args=arguments(directory / "out", deepspeed=config, max_steps=steps, use_cpu=True),
        train_dataset=setup.samples(8 * steps),
        data_collator=setup.collate,
        callbacks=[Watch(), DriftCallback(setup.prior, rule=rule, alpha=1.0)],
    )
    trainer.train()
    from deepspeed.utils import safe_get_full_fp32_param

    engine = trainer.model_wrapped
    weights = {n: safe_get_full_fp32_param(p).clone() for n, p in engine.module.named_parameters()}
    return {"weights": weights, "order": order, "log": trainer.state.log_history[0]}


def lora(
    directory: Path, *, source: str, engine: str, rules: list[str], use_dora: bool = False
) -> dict[str, dict[str, Any]]:
    """One step of SGD on the factors of an adapter by every rule."""
    return {rule: _lora_step(source, engine, rule, use_dora=use_dora) for rule in rules}


def _lora_step(source: str, engine: str, rule: str, *, use_dora: bool) -> dict[str, Any]:
    """Every rank has a batch of its own."""
    import drift_merge

    setup = setup_at(source)
    model = tiny.with_lora(setup, use_dora=use_dora)
    rank = torch.distributed.get_rank()
    batch = setup.collate(setup.samples(4)[2 * rank : 2 * rank + 2])
    trained = [p for p in model.parameters() if p.requires_grad]
    if engine in ("zero2", "zero3"):
        return _lora_zero(model, setup, batch, int(engine[-1]), rule)
    wrapped = model
    if engine == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    elif engine == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model.base_model.model.model.language_model.layers:
            fully_shard(layer)
        fully_shard(model)
        trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=RATE)
    handle = drift_merge.attach(wrapped, setup.prior, rule=rule, alpha=1.0, optimizer=optimizer)
    wrapped(**batch).loss.backward()
    optimizer.step()
    gather = (lambda p: p.full_tensor()) if engine == "fsdp" else (lambda p: p)
    weights = {n: gather(p.detach()).clone() for n, p in model.named_parameters()}
    return {"weights": weights, "metrics": handle.metrics()}


def _lora_zero(
    model: Any, setup: tiny.Setup, batch: dict[str, Any], stage: int, rule: str
) -> dict[str, Any]:
    import deepspeed

    import drift_merge

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(trained, lr=RATE),
        config=config,
        dist_init_required=False,
    )
    handle = drift_merge.attach(engine, setup.prior, rule=rule, alpha=1.0, optimizer=engine)
    engine.backward(engine(**batch).loss)
    engine.step()
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {
        n: safe_get_full_fp32_param(p).clone()
        for n, p in engine.module.named_parameters()
        if p.requires_grad
    }
    return {"weights": weights, "metrics": handle.metrics()}


def verl_engine(directory: Path, *, source: str, text: str) -> dict[str, Any]:
    """verl's FSDP2 engine: three steps whole, and two and one with a checkpoint between."""
    os.environ["VERL_PLATFORM"] = "cpu"
    os.environ["VERL_USE_EXTERNAL_MODULES"] = "tests.real_trainers.verl_cpu,drift_verl"
    plugin = directory / f"plugin{torch.distributed.get_rank()}"
    plugin.mkdir()
    (plugin / "drift_verl.py").write_text(
        "from drift_merge.trainers.verl import install\n"
        f"install({str(Path(source) / 'prior')!r}, schedule='linear')\n"
    )
    sys.path.insert(0, str(plugin))
    import verl  # noqa: F401

    def weights(engine: Any) -> dict[str, Any]:
        return {n: p.detach().full_tensor() for n, p in engine.module.named_parameters()}

    whole, parts = _verl_engine(text), _verl_engine(text)
    _verl_steps(whole, range(3))
    _verl_steps(parts, range(2))
    parts.save_checkpoint(str(directory / "saved"), global_step=2)
    again = _verl_engine(text)
    again.load_checkpoint(str(directory / "saved"), del_local_after_load=False)
    _verl_steps(again, range(2, 3))
    return {
        "whole": weights(whole),
        "again": weights(again),
        "metrics": whole.drift.metrics(),
        "resumed": again.drift.metrics(),
        "files": sorted(path.name for path in (directory / "saved").iterdir()),
    }


def _verl_engine(text: str) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    model = HFModelConfig(
        path=text,
        use_remove_padding=False,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "eager"},
    )
    names = ("param_dtype", "reduce_dtype", "buffer_dtype")
    engine = FSDPEngineConfig(
        strategy="fsdp2",
        dtype="float32",
        model_dtype="fp32",
        use_torch_compile=False,
        mixed_precision=dict.fromkeys(names, "fp32"),
    )
    optimizer = FSDPOptimizerConfig(
        lr=0.01, total_training_steps=4, lr_warmup_steps=0, clip_grad=1e9
    )
    made = FSDPEngineWithLMHead(model, engine, optimizer, CheckpointConfig())
    made.initialize()
    return made


def _verl_steps(engine: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(10 * step + torch.distributed.get_rank())
        ids = torch.randint(3, 80, (2, 12))
        engine.optimizer.zero_grad()
        positions = torch.arange(12).expand(2, 12)
        mask = torch.ones_like(ids)
        found = engine.module(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        )
        logits = found.logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        engine.optimizer_step()
