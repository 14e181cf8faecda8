"""`drift-prior align`: who is who in two models, from headers and configs alone."""

from collections.abc import Sequence
from typing import Any

import click

from drift_merge.artifacts.describe import describe_findings
from drift_merge.cli import config_file, options, render
from drift_merge.cli.answers import command_line
from drift_merge.cli.entry import print_json
from drift_merge.cli.planning import say_absent
from drift_merge.errors import AlignmentError
from drift_merge.names.align import require_complete
from drift_merge.names.tensors import Alignment, Finding
from drift_merge.plans.prepare import prepare
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import PRIOR


@click.command()
@click.argument("sources", nargs=-1, metavar="REASONER MLLM")
@options.config
@options.selection(PRIOR)
@click.option("-v", "--verbose", is_flag=True, help="One line per tensor, with its names.")
@options.json_option
@click.pass_context
def align(
    ctx: click.Context, /, sources: tuple[str, ...], as_json: bool, verbose: bool, **values: Any
) -> None:
    """Pair the tensors of two models, from headers and configs.

    Guide: drift-prior guide priors

    \b
    Example:
        drift-prior align deepseek-ai/DeepSeek-R1-Distill-Qwen-7B Qwen/Qwen2.5-VL-7B-Instruct
    """
    recipe = config_file.recipe_of(ctx, PRIOR, sources, values)
    ctx.exit(align_action(recipe, as_json=as_json, verbose=verbose))


def align_action(recipe: Recipe, *, as_json: bool, verbose: bool = False) -> int:
    """Align and print; 0 when every selected tensor is matched, else 4."""
    say_absent(recipe, quiet=as_json)
    prepared = prepare(recipe, headers_only=True, quiet=True)
    alignment = prepared.reasoners[0][1]
    refusal: AlignmentError | None = None
    try:
        require_complete(alignment, on_mismatch=recipe.on_mismatch)
    except AlignmentError as error:
        refusal = error
    if as_json:
        print_json(_alignment_json(alignment, prepared.findings))
        return refusal.exit_code if refusal else 0
    if verbose:
        render.alignment_records(alignment)
        print()
    render.alignment_table(alignment)
    verdict = f"{alignment.num_matched:,} of {alignment.num_selected:,} selected tensors matched"
    print(
        f"{verdict}: {'REFUSED' if refusal else 'complete' if _is_full(alignment) else 'partial'}."
    )
    render.findings(prepared.findings)
    if refusal:
        raise refusal  # says which tensors, and what to do
    render.note(f"Next: {command_line('drift-prior compute', recipe, '-o', 'prior/')}")
    return 0


def _is_full(alignment: Alignment) -> bool:
    return alignment.num_matched == alignment.num_selected


def _alignment_json(alignment: Alignment, findings: Sequence[Finding]) -> dict[str, Any]:
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
                **({"second_names": record.second_names} if record.second_names else {}),
            }
            for record in alignment.records
        ],
        "rows": {
            name: {
                "matched": rows.num_matched,
                "unmatched": rows.num_unmatched,
                "unexplained": rows.num_unexplained,
            }
            for name, rows in alignment.rows.items()
        },
        "findings": describe_findings(findings),
    }
