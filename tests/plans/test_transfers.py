"""The plan of transfers: from headers alone, complete, within the limit, and fast."""

from dataclasses import replace
from pathlib import Path

import pytest

from drift_merge.errors import RecipeError
from drift_merge.plans.plan import Plan
from drift_merge.plans.prepare import Prepared, prepare
from drift_merge.plans.transfers import Transfers, overlap_bytes, plan_transfers
from drift_merge.recipes.recipe import Recipe
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.hub import ranges
from drift_merge.storage.loans import leases
from drift_merge.storage.sources import RemoteShard
from tests import checkpoints as c
from tests.hub_server.models import make_layered_pair, write_layered

EVERYTHING = 10**9


def on_the_hub(checkpoint: Checkpoint, repo_id: str) -> Checkpoint:
    """The same checkpoint, as if its shards were still on the Hub."""
    shards = checkpoint.shards.items()
    remote = {n: RemoteShard(repo_id, "0" * 40, n, header.file_bytes) for n, header in shards}
    return replace(checkpoint, remote=remote)


def prepared(tmp_path: Path, method: str = "linear", **values: object) -> Prepared:
    pair = make_layered_pair(tmp_path / "models", layers=6, num_shards=(5, 7))
    recipe = Recipe(method=method, reasoners=(str(pair.reasoner),), mllm=str(pair.mllm), **values)  # type: ignore[arg-type]
    found = prepare(recipe)
    reasoners = [(on_the_hub(each, f"r/{n}"), a) for n, (each, a) in enumerate(found.reasoners)]
    base = (on_the_hub(found.base[0], "b/b"), found.base[1]) if found.base else None
    mllm = on_the_hub(found.mllm, "m/m")
    return replace(found, mllm=mllm, reasoners=tuple(reasoners), base=base)


def planned(plan: Plan, limit: int = EVERYTHING, finished: object = ()) -> Transfers:
    found = plan_transfers([plan], limit_bytes=limit, finished=[finished] if finished else ())  # type: ignore[list-item]
    assert found is not None
    return found


def check(plan: Plan, transfers: Transfers, limit: int) -> None:
    """Work through the transfers in their order: everything is there in time, within the limit."""
    left = [lease.num_uses for lease in transfers.leases]
    granted = 0
    for ticket in sorted(transfers.tickets, key=lambda ticket: transfers.ranks[ticket]):
        numbers = transfers.tickets[ticket]
        granted = max(granted, *(number + 1 for number in numbers)) if numbers else granted
        here = [n for n in range(granted) if left[n] > 0]
        assert set(numbers) <= set(here)
        assert sum(transfers.leases[n].request.size_bytes for n in here) <= limit
        for number in numbers:
            left[number] -= 1
    assert not any(left)


def least(plan: Plan) -> int:
    with pytest.raises(RecipeError, match=r"--cache-limit is 1 bytes") as caught:
        planned(plan, 1)
    return int(caught.value.message.partition(" needs ")[2].split()[0].replace(",", ""))


def test_every_shard_comes_once_and_leaves_where_there_is_room(tmp_path: Path) -> None:
    plan = prepared(tmp_path).plan()
    transfers = planned(plan)
    assert transfers.num_shards == len(transfers.leases) == 12
    assert transfers.again_bytes == transfers.num_parts == 0
    sizes = [header.file_bytes for source in plan.sources for header in source.shards.values()]
    assert transfers.download_bytes == transfers.cache_bytes == sum(sizes)
    check(plan, transfers, EVERYTHING)


def test_models_in_the_order_of_their_layers_need_few_shards_at_a_time(tmp_path: Path) -> None:
    plan = prepared(tmp_path).plan()
    limit = 4 * max(h.file_bytes for source in plan.sources for h in source.shards.values())
    transfers = planned(plan, limit)
    assert transfers.again_bytes == 0
    check(plan, transfers, limit)


@pytest.mark.parametrize("worth_parting", [0, EVERYTHING])
def test_the_least_limit_is_enough_and_one_byte_less_is_not(
    worth_parting: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "WORTH_PARTING_BYTES", worth_parting)
    monkeypatch.setattr(ranges, "GAP_BYTES", 0)
    plan = prepared(tmp_path).plan()
    limit = least(plan)
    check(plan, planned(plan, limit), limit)
    with pytest.raises(RecipeError, match=f"needs {limit:,} bytes"):
        planned(plan, limit - 1)


def test_work_that_is_done_needs_nothing_any_more(tmp_path: Path) -> None:
    plan = prepared(tmp_path).plan()
    names = [step.name for step in plan.steps]
    half = planned(plan, finished=set(names[: len(names) // 2]))
    assert 0 < half.download_bytes < planned(plan).download_bytes
    assert plan_transfers([plan], limit_bytes=1, finished=[set(names)]) is None


def test_local_sources_need_no_transfers(tmp_path: Path) -> None:
    pair = c.make_pair(tmp_path)
    recipe = Recipe(method="linear", reasoners=(str(pair.reasoner),), mllm=str(pair.mllm))
    assert plan_transfers([prepare(recipe).plan()], limit_bytes=1) is None


def with_base(tmp_path: Path, **values: object) -> Plan:
    base = write_layered(
        tmp_path / "base", c.random_tensors(c.text_shapes(6), 5), c.text_config(6), num_shards=3
    )
    return prepared(tmp_path, base=str(base), **values).plan()


@pytest.mark.parametrize(
    ("values", "walks"),
    [
        ({"method": "task-arithmetic"}, 0),
        ({"method": "task-arithmetic", "weights": ("frank",)}, 1),
        ({"method": "ties", "options": {"density": 0.5, "trim": "global"}}, 2),
    ],
)
def test_walks_before_the_work_are_passes_of_their_own_that_turn_round_at_the_end(
    values: dict[str, object], walks: int, tmp_path: Path
) -> None:
    plan = with_base(tmp_path, **values)
    assert planned(plan).passes == (0,) * walks + (None,)
    assert planned(plan).again_bytes == 0
    limit = least(plan)
    transfers = planned(plan, limit)
    check(plan, transfers, limit)
    # What is at hand at the end of one pass is what the next begins with.
    total = planned(plan).download_bytes
    assert transfers.download_bytes <= (walks + 1) * total - walks * limit // 3


def test_plans_of_a_sweep_share_their_transfers(tmp_path: Path) -> None:
    first = prepared(tmp_path)
    plans = [replace(first, recipe=replace(first.recipe, weights=(w,))).plan() for w in (0.1, 0.2)]
    both = plan_transfers(plans, limit_bytes=EVERYTHING)
    assert both is not None
    alone = planned(plans[0])
    assert both.download_bytes == alone.download_bytes
    uses = [lease.num_uses for lease in both.leases]
    assert uses == [2 * lease.num_uses for lease in alone.leases]


def test_an_order_depends_on_the_plan_alone(tmp_path: Path) -> None:
    plan = prepared(tmp_path).plan()
    assert planned(plan, least(plan)) == planned(plan, least(plan))


@pytest.mark.parametrize(
    ("ranges", "others", "expected"),
    [
        ([(0, 10)], [], 0),
        ([(0, 10)], [(5, 7), (6, 20)], 5),
        ([(0, 10), (20, 30)], [(5, 25)], 10),
        ([(0, 10)], [(10, 20)], 0),
        ([(3, 5)], [(0, 4), (0, 9)], 2),
    ],
)
def test_overlap_counts_bytes_once(
    ranges: list[tuple[int, int]], others: list[tuple[int, int]], expected: int
) -> None:
    assert overlap_bytes(ranges, others) == expected
