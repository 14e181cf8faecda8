"""The options of `drift-prior train`: how the prior biases, and how is trained."""

import click

from drift_merge.cli import options
from drift_merge.training.options import ATTACH_OPTIONS, PUBLISHED

# Of attach()'s options.
_BIASING = (
    *("alpha", "negate", "rule", "until", "control"),
    *("modules", "layers", "schedule"),
)


def _parse_alpha(
    _: click.Context, __: click.Parameter, text: str | None
) -> float | str | dict[str, float] | None:
    """Click callback: `1.0`, `attn=1.0,mlp=0.5`, `published`, or nothing."""
    if text is None or text == PUBLISHED:
        return text
    try:
        if "=" not in str(text):
            return float(text)
        pairs = (word.split("=") for word in text.split(","))
        return {module.strip(): float(value) for module, value in pairs}
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is neither a number nor attn=X,mlp=Y.") from error


prior_options = options.chain(
    click.option("--prior", help="Directory or Hub id of the prior."),
    click.option("--no-prior", is_flag=True, help="Plain fine-tuning, to compare with."),
    *(
        options.click_option(
            option, default, callback=_parse_alpha if option.name == "alpha" else None
        )
        for option, default in (ATTACH_OPTIONS[name] for name in _BIASING)
    ),
)
training_options = options.chain(
    click.option(
        "--epochs", type=float, default=1.0, show_default=True, metavar="X", help="Over the data."
    ),
    click.option(
        "--steps",
        type=click.IntRange(min=1),
        metavar="N",
        help="Steps of the optimizer; instead of --epochs.",
    ),
    click.option(
        "--lr",
        "learning_rate",
        type=float,
        metavar="X",
        help="Peak learning rate, which a cosine brings to 0.  [default: 1e-6; --lora: 1e-4]",
    ),
    click.option(
        "--warmup",
        type=click.FloatRange(0, 1),
        default=0.03,
        show_default=True,
        metavar="FRACTION",
        help="Of the steps, with a rising learning rate.",
    ),
    click.option(
        "--weight-decay",
        type=float,
        default=0.0,
        show_default=True,
        metavar="X",
        help="Of AdamW.",
    ),
    click.option(
        "--max-grad-norm",
        type=float,
        default=1.0,
        show_default=True,
        metavar="X",
        help="Clip the gradient before the bias; 0: do not.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        metavar="N",
        help="Examples in a backward pass.",
    ),
    click.option(
        "--accumulation",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        metavar="N",
        help="Backward passes in a step of the optimizer.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "bf16"]),
        default="fp32",
        show_default=True,
        help="Of activations; weights and AdamW are float32.",
    ),
    click.option(
        "--lora",
        type=click.IntRange(min=1),
        metavar="RANK",
        help="Train LoRA's factors on the tower's matrices; OUT is a PEFT adapter.",
    ),
    click.option(
        "--optimizer",
        type=click.Choice(["adamw", "adamw_8bit"]),
        default="adamw",
        show_default=True,
        help="adamw_8bit: its state in 8 bits, by bitsandbytes.",
    ),
    click.option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        default=True,
        show_default=True,
        help="Compute activations again in the backward pass: less memory, a third more time.",
    ),
    click.option(
        "--max-length",
        type=click.IntRange(min=1),
        metavar="N",
        help="Tokens of an example, with images; longer ones lose the end.  [default: no limit]",
    ),
    click.option(
        "--fsdp",
        is_flag=True,
        help="Shard weights, gradients and optimizer over the processes.",
    ),
    click.option("--train-all", is_flag=True, help="Vision tower and connector are trained too."),
    click.option(
        "--seed",
        type=int,
        default=0,
        show_default=True,
        metavar="N",
        help="Of the order of the examples.",
    ),
    click.option(
        "--save-steps",
        type=click.IntRange(min=1),
        default=100,
        show_default=True,
        metavar="N",
        help="Steps from one checkpoint to the next, in OUT.run.",
    ),
    click.option(
        "--save-total-limit",
        type=click.IntRange(min=1),
        default=2,
        show_default=True,
        metavar="N",
        help="Checkpoints that are kept; one more while it is written.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=0),
        metavar="N",
        help="Processes that prepare batches.  [default: 0 on a CPU, else up to 4]",
    ),
    click.option("--resume", is_flag=True, help="Continue an unfinished run, exactly."),
)
