"""What ended a rank, as plain data: it goes to the others, who end with it."""

import json
from dataclasses import asdict, dataclass

from drift_merge.errors import DriftMergeError

INTERRUPTED, INTERNAL = "interrupted", "internal"
NOBODY = -1  # in the place of a rank


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of one rank."""

    rank: int
    host: str
    kind: str  # of the error's class; "interrupted" of Ctrl-C
    message: str
    remedy: str = ""
    speaker: int = 0  # the rank that prints it

    @classmethod
    def of(cls, error: BaseException, rank: int, host: str) -> "Failure":
        """The failure that an exception is."""
        if isinstance(error, DriftMergeError):
            return cls(rank, host, error.kind, error.message, error.remedy)
        if isinstance(error, KeyboardInterrupt):
            return cls(rank, host, INTERRUPTED, "")
        return cls(rank, host, INTERNAL, f"{type(error).__name__}: {error}")

    def error(self, *, at: int) -> BaseException:
        """The exception that rank number `at` ends with; it says whose error it was."""
        if self.kind == INTERRUPTED:
            return KeyboardInterrupt()
        where = "" if self.rank in (at, NOBODY) else f"On rank {self.rank} ({self.host}): "
        for kind in DriftMergeError.__subclasses__():
            if kind.kind == self.kind:
                return kind(where + self.message, remedy=self.remedy)
        if self.remedy:
            return DriftMergeError(where + self.message, remedy=self.remedy)
        return RuntimeError(where + self.message)

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))


def lost(rank: int, who: str, how: str, *, found_by: int) -> Failure:
    """The failure of a rank that has ended without a word; the first says so if it can."""
    return Failure(
        NOBODY,
        "",
        INTERNAL,
        f"rank {rank} ({who}) {how}.",
        "Signal 9 is usually the system out of memory: see torchrun's own table. Run the same "
        "command again, with any number of ranks: it resumes where it stopped.",
        speaker=found_by if rank == 0 else 0,
    )
