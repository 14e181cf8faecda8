"""Writes an output directory that is absent or whole, never half.

    OUT.partial/lock           held while a process writes
    OUT.partial/journal.jsonl  the plan and the finished tensors
    OUT.partial/journal-N.jsonl  the same of rank N, under torchrun
    OUT.partial/payload/       what will become OUT
    OUT.partial/shards/        inputs fetched from the Hub, while they are needed (--stream)
    OUT.partial/replaced/      the old OUT, for the moment of the swap (--overwrite)
    OUT.partial/together.json  of several outputs: that all are there, while leftovers are removed

One rename of `payload` to OUT publishes it. A crash at any moment leaves OUT as it was, or in
the moment of the swap in `replaced`, from where the next run takes it back. The same command
resumes from the journal. A leftover that belongs to another plan is never touched: it is named,
with the command that discards it. Under torchrun the first rank takes the lock, prepares and
publishes; each of the others adds to the payload and keeps a journal of its own.
"""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from shlex import quote

from drift_merge.errors import CheckpointError, OutputError, VerificationError
from drift_merge.storage.copying import copy_file, write_file
from drift_merge.storage.journal import Journal, read_journal
from drift_merge.storage.measured import Results
from drift_merge.storage.outputs.existing import (
    TOGETHER,
    Overwrite,
    finished_plan,
    partial_of,
    real,
    refuse_existing,
)
from drift_merge.storage.outputs.filesystems import file_system_of
from drift_merge.storage.outputs.lock import DirectoryLock
from drift_merge.storage.ranks.meeting import ALONE, Ranks
from drift_merge.storage.shards import cannot_read, cannot_write

OURS = {"lock", "journal.jsonl", "payload", "shards", "replaced", TOGETHER}
_OF_RANK = re.compile(r"journal-\d+\.jsonl")


class OutputDirectory:
    """An output being written. Enter it, fill `payload`, journal, then `publish`.

    Attributes:
        payload: the directory to fill.
        finished: tensors that an earlier run of the same plan has done.
        is_published: the same plan had already been published when this run began.
    """

    def __init__(self, out: Path, *, plan: str, overwrite: Overwrite, ranks: Ranks = ALONE) -> None:
        self.out = real(out)  # a rename must replace what a link leads to, not the link
        self.plan = plan
        self.overwrite = overwrite
        self.partial = partial_of(self.out)
        self.payload = self.partial / "payload"
        self.shards = self.partial / "shards"
        if ranks.size > 1:  # each rank fetches its own, whose sum is the limit of the host
            self.shards /= str(ranks.rank)
        self.finished: Results = {}
        self.is_published = False
        self._ranks = ranks
        self._lock = DirectoryLock(self.partial, self.out)
        self._journal: Journal | None = None

    def __enter__(self) -> "OutputDirectory":
        if not self._ranks.is_first:
            self._follow()
            return self
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.partial, error) from error
        try:
            self._lock.take()
            self._prepare()
            self._ranks.share([self.is_published, self.partial.stat().st_ino])
        except BaseException as error:
            self._ranks.fail(error)
            if self._lock.is_held and set(os.listdir(self.partial)) <= {"lock"}:
                self._remove_partial()
            self._release()
            raise
        return self

    def _follow(self) -> None:
        """Of a rank that is not the first: see what that one has prepared.

        Raises:
            OutputError: it is not here: the ranks do not share this directory.
        """
        self.is_published, number = self._ranks.share(None)
        if self.is_published:
            return
        try:
            found = self.partial.stat().st_ino if self.payload.is_dir() else None
        except OSError as error:
            raise cannot_read(self.partial, error) from error
        if found != number:
            raise OutputError(
                f"{self.partial} is not the directory that the first rank has prepared.",
                remedy="Choose an output on a file system that all hosts share, with -o.",
            )
        journal = self.partial / "journal.jsonl"
        self.finished = read_journal(journal)[1]
        own = journal.with_name(f"journal-{self._ranks.rank}.jsonl")
        self._journal = Journal(own, plan=self.plan, good_bytes=0)

    def __exit__(self, _kind: object, error: BaseException | None, *_: object) -> None:
        # A run that ended before anything was worth keeping leaves nothing behind, nor does one
        # that the same command could only repeat: a bad input, or data that came back changed.
        if not self._ranks.is_first:
            self._release()
            return
        if error is not None and not self.is_published:
            self._ranks.wait_left()
            with suppress(OutputError):
                self.gather_journals()
                is_fresh = not self.finished and not self.shards.exists()  # it holds whole shards
                if is_fresh or isinstance(error, (CheckpointError, VerificationError)):
                    self._remove_partial()
        self._release()

    def gather_journals(self) -> None:
        """Take what all ranks have journaled into the journal of the first, and `finished`."""
        for path in self._rank_journals():
            plan, done, _ = read_journal(path)
            if plan == self.plan:
                self.record({n: each for n, each in done.items() if n not in self.finished})
            try:
                path.unlink()
            except OSError as error:
                raise cannot_write(path, error) from error

    def _rank_journals(self) -> list[Path]:
        try:
            return sorted(p for p in self.partial.iterdir() if _OF_RANK.fullmatch(p.name))
        except OSError as error:
            raise cannot_read(self.partial, error) from error

    @property
    def is_coherent(self) -> bool:
        """Whether ranks on several hosts may write to one file here."""
        return file_system_of(self.partial).is_coherent

    def _prepare(self) -> None:
        self._refuse_strangers()
        plan, finished, good_bytes = read_journal(self.partial / "journal.jsonl")
        if finished_plan(self.out) == self.plan:
            self.is_published = True
            return
        self._settle_swap()
        refuse_existing(self.out, overwrite=self.overwrite)
        if self.payload.is_dir() and plan not in (None, self.plan):
            raise self._other_plan()
        if plan != self.plan or not self.payload.is_dir():
            finished, good_bytes = {}, 0
            _remove_tree(self.payload)
        try:
            self.payload.mkdir(exist_ok=True)
            _remove_small_files(self.payload)
        except OSError as error:
            raise cannot_write(self.payload, error) from error
        self.finished = finished
        journal = self.partial / "journal.jsonl"
        self._journal = Journal(journal, plan=self.plan, good_bytes=good_bytes)
        if good_bytes:
            self.gather_journals()
        self._remove_other_shards()
        for path in self._rank_journals():  # of a plan that is gone
            path.unlink(missing_ok=True)

    def _refuse_strangers(self) -> None:
        try:
            found = set(os.listdir(self.partial)) - OURS
            strangers = sorted(name for name in found if not _OF_RANK.fullmatch(name))
        except OSError as error:
            raise cannot_read(self.partial, error) from error
        if strangers:
            raise OutputError(
                f"{self.partial} holds {strangers[0]}, which is not ours.",
                remedy="Move it away, or choose another directory with -o.",
            )

    def _remove_other_shards(self) -> None:
        """What was fetched for another number of ranks would count against no limit."""
        if self._ranks.size > 1 and (shards := self.partial / "shards").is_dir():
            for path in shards.iterdir():
                if path.name not in map(str, range(self._ranks.size)):
                    _remove_tree(path)

    def _settle_swap(self) -> None:
        """After a kill within the swap: put the old output back, or forget it if the new is out."""
        replaced = self.partial / "replaced"
        if not replaced.exists():
            return
        if os.path.lexists(self.out):
            _remove_tree(replaced)
            return
        try:
            os.rename(replaced, self.out)
        except OSError as error:
            raise cannot_write(self.out, error) from error

    def _other_plan(self) -> OutputError:
        discard = f"rm -r {quote(str(self.partial))}"
        return OutputError(
            f"{self.partial} holds an unfinished run with other inputs or options.",
            remedy=f"Repeat that command to finish it, or discard it: {discard}",
        )

    def record(self, done: Results) -> None:
        """Journal finished tensors whose data has been flushed."""
        assert self._journal is not None
        self._journal.append(done)
        self.finished.update(done)

    def write_file(self, name: str, data: bytes) -> None:
        """Write one small file of the payload and flush it."""
        write_file(self.payload / name, data)

    def copy_file(self, name: str, source: Path, label: str) -> str:
        """Copy one file, of any size, into the payload; returns its fingerprint."""
        return copy_file(source, self.payload / name, label)

    def publish(self, *, tidy: bool = True) -> None:
        """Rename the payload to its final name; from here on the output exists, whole.

        Args:
            tidy: remove what tells that this plan was published. Where a command makes several
                outputs it stays until all are there, so that the same command finishes the rest.
        """
        try:
            for folder, _, _ in os.walk(self.payload):
                _sync_directory(Path(folder))
            self._swap()
            _sync_directory(self.out.parent)
        except OSError as error:
            raise cannot_write(self.out, error) from error
        self.is_published = True
        if tidy:
            self.tidy()

    def _swap(self) -> None:
        replaced = self.partial / "replaced"
        try:
            if self.overwrite and self.out.exists():
                os.rename(self.out, replaced)
            os.rename(self.payload, self.out)
        except BaseException:  # Ctrl-C too may fall between the renames
            if replaced.exists() and not os.path.lexists(self.out):
                os.rename(replaced, self.out)
            raise

    def tidy(self) -> None:
        """Remove what is left beside a published output."""
        self._remove_partial()
        self._release()

    def _remove_partial(self) -> None:
        if (self.partial / "replaced").exists() and not os.path.lexists(self.out):
            return  # the only copy of the old output; the next run takes it back
        # The lock goes last: whoever finds it gone may move in, and then keeps the directory.
        # The journal goes before it and after the rest: it says that this plan was published.
        # The note that says so of several outputs goes after both; it protects nothing.
        for name in ("payload", "shards", "replaced"):
            _remove_tree(self.partial / name)
        try:
            for path in self._rank_journals():
                path.unlink(missing_ok=True)
            for name in ("journal.jsonl", "lock"):
                (self.partial / name).unlink(missing_ok=True)
            if (note := self.partial / TOGETHER).exists():
                note.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.partial, error) from error
        with suppress(OSError):
            os.rmdir(self.partial)

    def _release(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._lock.release()


def _remove_small_files(payload: Path) -> None:
    """Remove everything but shards: it is written again, and may be of sidecars now gone."""
    for path in payload.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.suffix != ".safetensors":
            path.unlink()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_tree(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_write(path, error) from error
