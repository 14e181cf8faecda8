"""NEW FILE."""

import shlex
from collections.abc import Mapping
from typing import Any

import click

from drift_merge.artifacts.describe import describe_findings
from drift_merge.cli import config_file, options, render
from drift_merge.cli.answers import _one_reasoner
from drift_merge.cli.entry import print_json
from drift_merge.errors import AlignmentError
from drift_merge.names.align import require_complete
from drift_merge.names.tensors import Alignment
from drift_merge.plans.prepare import prepare
from drift_merge.recipes.recipe import Recipe


def align_action(
    reasoners: tuple[str, ...], mllm: str, recipe: Mapping[str, Any], *, as_json: bool
) -> int:
    """Align and print; 0 when every selected tensor is matched, else 4."""
    _one_reasoner(reasoners)
    request = Recipe(method="prior", reasoners=reasoners, mllm=mllm, **recipe)
    prepared = prepare(request, headers_only=True, quiet=True)
    alignment = prepared.reasoners[0][1]
    refusal: AlignmentError | None = None
    try:
        require_complete(alignment, on_mismatch=request.on_mismatch)
    except AlignmentError as error:
        refusal = error
    if as_json:
        print_json(_alignment_json(alignment))
        return refusal.exit_code if refusal else 0
    render.alignment_table(alignment)
    verdict = f"{alignment.num_matched:,} of {alignment.num_selected:,} selected tensors matched"
    print(
        f"{verdict}: {'REFUSED' if refusal else 'complete' if _is_full(alignment) else 'partial'}."
    )
    render.findings(alignment.findings)
    if refusal:
        raise refusal  # says which tensors, and what to do
    render.note(f"Next: drift-prior compute {shlex.join((*reasoners, mllm))} -o prior/")
    return 0


def _is_full(alignment: Alignment) -> bool:
    return alignment.num_matched == alignment.num_selected


def _alignment_json(alignment: Alignment) -> dict[str, Any]:
    def side(names: tuple[str, ...]) -> str | list[str] | None:
        return names[0] if len(names) == 1 else list(names) or None

    return {
        "schema": 1,
        "coverage": {"selected": alignment.num_selected, "matched": alignment.num_matched},
        "tensors": [
            {
                "name": record.name,
                "reasoner": side(record.reasoner),
                "mllm": side(record.mllm),
                "shape": list(record.shape) if record.shape is not None else None,
                "status": record.status,
            }
            for record in alignment.records
        ],
        "findings": describe_findings(alignment.findings),
    }


@click.command()
@click.argument("sources", nargs=-1, metavar="REASONER MLLM")
@options.config
@options.selection("attn,mlp")
@options.json_option
@click.pass_context
def align(ctx: click.Context, /, sources: tuple[str, ...], as_json: bool, **recipe: Any) -> None:
    """Pair the tensors of two models, from headers and configs alone.

    \b
    Example:
        drift-prior align deepseek-ai/DeepSeek-R1-Distill-Qwen-7B Qwen/Qwen2.5-VL-7B-Instruct
    """
    from drift_merge.cli.commands.align import align_action

    reasoners, mllm = config_file.sources(ctx, sources)
    ctx.exit(align_action(reasoners, mllm, recipe, as_json=as_json))
