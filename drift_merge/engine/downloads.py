"""Downloads the shards of a run while it works, and says which tensor can be made next.

Without shards on the Hub it does nothing: the order of work stays, nothing is waited for.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from drift_merge.errors import OutputError
from drift_merge.plans.plan import Plan
from drift_merge.plans.transfers import Transfers, plan_transfers
from drift_merge.storage.loans.cache import ShardCache
from drift_merge.storage.loans.leases import Traffic
from drift_merge.storage.output import OutputDirectory
from drift_merge.storage.shards import free_bytes, unwritten_bytes

PlannedOutputs = Sequence[tuple[Plan, OutputDirectory]]


class Downloads(AbstractContextManager["Downloads"]):
    """The downloads of a run. Enter it, then `start` it; tensors are made between `begin`s."""

    def __init__(
        self,
        plans: Sequence[Plan] = (),
        transfers: Transfers | None = None,
        cache: ShardCache | None = None,
    ) -> None:
        self.cache = cache
        self._plans = plans
        self._transfers = transfers
        self._pass = -1

    @property
    def traffic(self) -> Traffic | None:
        """What has been moved so far; None if nothing has to be."""
        return None if self.cache is None else self.cache.traffic

    def start(self) -> None:
        """Begin to download."""
        if self.cache is not None:
            self.cache.start()

    def begin(self, names: Iterable[str], plan: Plan | None = None) -> list[str]:
        """Begin a pass over the inputs.

        Args:
            names: output tensors, in the order that is best without transfers.
            plan: whose inputs are looked at before any tensor is made; None for the work itself.

        Returns:
            The names in the order in which their shards come by.
        """
        transfers, cache = self._transfers, self.cache
        if transfers is None or cache is None:
            return list(names)
        number = self._pass + 1
        while not self._is_of(transfers.passes[number], plan):
            # A method that need not look after all.
            for ticket in (ticket for ticket in transfers.tickets if ticket[0] == number):
                cache.give_back(ticket)
            number += 1
        self._pass = number
        return sorted(names, key=lambda name: transfers.ranks.get((number, name), 0))

    def _is_of(self, owner: int | None, plan: Plan | None) -> bool:
        return plan is None if owner is None else self._plans[owner] is plan

    def borrow(
        self, name: str, uses: int = 1, check: Callable[[], None] = lambda: None
    ) -> AbstractContextManager[None]:
        """Work on one tensor, once its shards are here; they may go when the work ends.

        Args:
            name: of an output tensor.
            uses: of how many outputs it is made by this work.
            check: called while waiting; raises to give up.

        Raises:
            SourceError, OutputError: from entering the context: a shard could not be fetched.
        """
        if self.cache is None:
            return nullcontext()
        return self.cache.borrow((self._pass, name), uses, check)

    def is_here(self, name: str) -> bool:
        """Whether work on one tensor can begin; `give_back` must follow it. For work elsewhere.

        Raises:
            SourceError, OutputError: a shard could not be fetched.
        """
        return self.cache is None or self.cache.is_here((self._pass, name))

    def give_back(self, name: str, uses: int) -> None:
        """Work on one tensor, for some outputs, has ended elsewhere; see `borrow`."""
        if self.cache is not None:
            self.cache.give_back((self._pass, name), uses)

    def adopt(self, name: str) -> None:
        """In a child process that has been told to work on a tensor: its shards are here."""
        if self.cache is not None:
            self.cache.adopt((self._pass, name))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.cache is not None:
            self.cache.__exit__(kind)


def open_downloads(
    jobs: PlannedOutputs,
    *,
    limit_bytes: int,
    report: Callable[[int], None] = lambda _: None,
    share: Collection[str] | None = None,
) -> Downloads:
    """The downloads for plans with equal sources that are executed in one pass.

    Args:
        jobs: plans, each with its output, entered.
        limit_bytes: of all shards that lie on the disk at a time.
        report: called from other threads with bytes downloaded.
        share: output tensors that this process makes; None for all.

    Raises:
        RecipeError: the limit does not hold the shards that one tensor needs.
        OutputError: the disk is too small for the outputs and the shards.
    """
    plans = [plan for plan, _ in jobs]
    finished = [output.finished for _, output in jobs]
    transfers = plan_transfers(plans, limit_bytes=limit_bytes, finished=finished, share=share)
    if transfers is None:
        return Downloads()
    directory = jobs[0][1].shards  # of all outputs, since they are made in one pass
    _require_space(jobs, transfers)
    cache = ShardCache(
        directory, transfers.leases, transfers.tickets, limit_bytes=limit_bytes, report=report
    )
    return Downloads(plans, transfers, cache)


@contextmanager
def sample_downloads(plan: Plan, names: Iterable[str], *, limit_bytes: int) -> Iterator[Downloads]:
    """The downloads for some output tensors that are computed again, in a temporary directory.

    Raises:
        RecipeError: the limit does not hold the shards that one tensor needs.
    """
    others = {step.name for step in plan.steps} - set(names)
    transfers = plan_transfers([plan], limit_bytes=limit_bytes, finished=[others])
    if transfers is None:
        yield Downloads()
        return
    with TemporaryDirectory(prefix="drift_merge-") as folder:
        leases, tickets = transfers.leases, transfers.tickets
        cache = ShardCache(Path(folder, "shards"), leases, tickets, limit_bytes=limit_bytes)
        with Downloads([plan], transfers, cache) as downloads:
            downloads.start()
            yield downloads


def _require_space(jobs: PlannedOutputs, transfers: Transfers) -> None:
    """Refuse a disk that is too small before anything is fetched or written."""
    place = jobs[0][1]
    here = [path.stat().st_blocks * 512 for path in place.shards.rglob("*") if path.is_file()]
    outputs = sum(
        unwritten_bytes(plan.layout, output.payload) + plan.beside_bytes for plan, output in jobs
    )
    shards = max(0, transfers.cache_bytes - sum(here))
    free = free_bytes(place.partial)
    if outputs + shards <= free:
        return
    remedy = "Free some space, or choose an output on another disk with -o."
    if outputs < free:
        left = (free - outputs + sum(here)) // 10**6
        remedy += f"\nOr let fewer shards lie there at a time: --cache-limit {left}MB"
    raise OutputError(
        f"the disk of {place.partial.parent} is too small: {outputs:,} bytes are needed for the "
        f"output and {shards:,} for shards from the Hub, {free:,} are free.",
        remedy=remedy,
    )
