"""Writes an output directory that is absent or whole, never half.

    OUT.partial/lock           held while a process writes
    OUT.partial/journal.jsonl  the plan and the finished tensors
    OUT.partial/payload/       what will become OUT
    OUT.partial/shards/        inputs fetched from the Hub, while they are needed (--stream)
    OUT.partial/replaced/      the old OUT, for the moment of the swap (--overwrite)

One rename of `payload` to OUT publishes it. A crash at any moment leaves OUT as it was, or in
the moment of the swap in `replaced`, from where the next run takes it back. The same command
resumes from the journal. A leftover that belongs to another plan is never touched: it is named,
with the command that discards it.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from shlex import quote

from drift_merge.errors import CheckpointError, OutputError, VerificationError
from drift_merge.storage.copying import copy_file, write_file
from drift_merge.storage.journal import Journal, read_journal
from drift_merge.storage.measured import Results
from drift_merge.storage.shards import cannot_read, cannot_write

OURS = {"lock", "journal.jsonl", "payload", "shards", "replaced"}


def check_output(out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse an output that exists, or that could destroy an input or the place we work in.

    Args:
        out: the directory to be created.
        inputs: local directories that are read.
        overwrite: an existing `out` may be replaced.

    Raises:
        OutputError: naming the clash.
    """
    final = _real(out)
    if _real(Path()).is_relative_to(final):
        raise OutputError(
            f"the output {out} is or holds the working directory, which would be replaced.",
            remedy="Choose a new directory with -o, such as -o out",
        )
    for path in inputs:
        source = _real(path)
        if final == source or final.is_relative_to(source) or source.is_relative_to(final):
            where = "is" if final == source else "is inside" if source in final.parents else "holds"
            raise OutputError(
                f"the output {out} {where} the input {path}; writing there could destroy it.",
                remedy="Choose a directory outside every input with -o.",
            )
    if finished_plan(out) is None:  # else the run itself finds out whether it was this very plan
        _refuse_existing(out, overwrite=overwrite)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _refuse_existing(out: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise OutputError(
            f"{out} exists and is not a directory.", remedy="Choose another name with -o."
        )
    if not overwrite and _holds_anything(out):
        raise OutputError(
            f"{out} exists already.",
            remedy="Choose another directory with -o, or replace it: add --overwrite.",
        )


def _holds_anything(directory: Path) -> bool:
    try:
        return any(directory.iterdir())
    except OSError as error:
        raise cannot_read(directory, error) from error


def finished_plan(out: Path) -> str | None:
    """The plan of a run that was killed after publishing `out`, before it tidied up."""
    partial = partial_of(out)
    if not out.is_dir() or (partial / "payload").exists():
        return None
    return read_journal(partial / "journal.jsonl")[0]


def partial_of(out: Path) -> Path:
    """Where the unfinished state of `out` lives: beside it (links followed), `NAME.partial`."""
    final = _real(out)
    return final.parent / f"{final.name}.partial"


class OutputDirectory:
    """An output being written. Enter it, fill `payload`, journal, then `publish`.

    Attributes:
        payload: the directory to fill.
        finished: tensors that an earlier run of the same plan has done.
        is_published: the same plan had already been published when this run began.
    """

    def __init__(self, out: Path, *, plan: str, overwrite: bool) -> None:
        self.out = _real(out)  # a rename must replace what a link leads to, not the link
        self.plan = plan
        self.overwrite = overwrite
        self.partial = partial_of(self.out)
        self.payload = self.partial / "payload"
        self.shards = self.partial / "shards"
        self.finished: Results = {}
        self.is_published = False
        self._lock: int | None = None
        self._journal: Journal | None = None

    def __enter__(self) -> "OutputDirectory":
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.partial, error) from error
        try:
            self._take_lock()
            self._prepare()
        except BaseException:
            if self._lock is not None and set(os.listdir(self.partial)) <= {"lock"}:
                self._remove_partial()
            self._release()
            raise
        return self

    def __exit__(self, _kind: object, error: BaseException | None, *_: object) -> None:
        # A run that ended before anything was worth keeping leaves nothing behind, nor does one
        # that the same command could only repeat: a bad input, or data that came back changed.
        is_fresh = not self.finished and not self.shards.exists()  # which holds whole shards only
        worthless = is_fresh or isinstance(error, (CheckpointError, VerificationError))
        if error is not None and not self.is_published and worthless:
            with suppress(OutputError):
                self._remove_partial()
        self._release()

    def _take_lock(self) -> None:
        path = self.partial / "lock"
        while self._lock is None:
            try:
                self.partial.mkdir(parents=True, exist_ok=True)
                lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue  # the one who held it has just removed the directory
            except OSError as error:
                raise cannot_write(path, error) from error
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._lock = lock
            except OSError as error:
                os.close(lock)
                raise OutputError(
                    f"another process is writing {self.out}.",
                    remedy="Wait for it, or choose another directory with -o.",
                ) from error
            # The one who held it may have removed the file between our open and our lock.
            with suppress(OSError):
                if os.stat(path).st_ino == os.fstat(lock).st_ino:
                    return
            os.close(lock)
            self._lock = None

    def _prepare(self) -> None:
        try:
            strangers = sorted(set(os.listdir(self.partial)) - OURS)
        except OSError as error:
            raise cannot_read(self.partial, error) from error
        if strangers:
            raise OutputError(
                f"{self.partial} holds {strangers[0]}, which is not ours.",
                remedy="Move it away, or choose another directory with -o.",
            )
        plan, finished, good_bytes = read_journal(self.partial / "journal.jsonl")
        if finished_plan(self.out) == self.plan:
            self.is_published = True
            return
        self._settle_swap()
        _refuse_existing(self.out, overwrite=self.overwrite)
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

    def publish(self) -> None:
        """Rename the payload to its final name; from here on the output exists, whole."""
        try:
            for folder, _, _ in os.walk(self.payload):
                _sync_directory(Path(folder))
            self._swap()
            _sync_directory(self.out.parent)
        except OSError as error:
            raise cannot_write(self.out, error) from error
        self.is_published = True
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
        for name in ("payload", "shards", "replaced"):
            _remove_tree(self.partial / name)
        try:
            for name in ("journal.jsonl", "lock"):
                (self.partial / name).unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.partial, error) from error
        with suppress(OSError):
            os.rmdir(self.partial)

    def _release(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


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
