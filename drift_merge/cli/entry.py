"""The way in and out of both commands: errors become one block and an exit code.

stdout carries the answer only; everything else goes to stderr. With `--json` a failure too is
one JSON object on stdout: {"error": {"kind", "message", "remedy"}}.
"""

import atexit
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import Any, NoReturn

import click

from drift_merge.errors import DriftMergeError, RecipeError, nearest
from drift_merge.storage.outputs.existing import Overwrite
from drift_merge.storage.ranks.environment import place_in
from drift_merge.storage.ranks.meeting import ALONE, Ranks

DEBUG = "DRIFT_MERGE_DEBUG"  # set to 1: show the traceback of every error
INTERRUPTED = 130
BUG = 70
_CODES = {error.kind: error.exit_code for error in DriftMergeError.__subclasses__()}
_CODES["interrupted"] = INTERRUPTED
_ANY = "--overwrite=any"
# Looking for garbage among the objects of torch, which stay, takes 0.4 s of every command: at
# every 700 new objects while it is imported (1 s), and again at the end.
RARELY, OFTEN = (50_000, 20, 100), gc.get_threshold()


def version() -> str:
    """The version of the installed package."""
    from importlib.metadata import version

    return version("drift_merge")


HELP = {"help_option_names": ["-h", "--help"]}


class UnderRanks(Enum):
    """What a command does when torchrun starts several processes of it."""

    FIRST = "first"  # the first does it, the others end at once
    TOGETHER = "together"  # they share the work
    EACH = "each"  # it knows about them itself


@dataclass(frozen=True, slots=True)
class Lazy:
    """A command that is imported when it is called: its help line, and where it is."""

    summary: str
    make: Callable[[], click.Command]
    ranks: UnderRanks = UnderRanks.FIRST


def lazy(module: str, name: str, summary: str, ranks: UnderRanks = UnderRanks.FIRST) -> Lazy:
    """The command `name` of `cli/commands/<module>.py`."""

    def make() -> click.Command:
        found: click.Command = getattr(import_module(f"drift_merge.cli.commands.{module}"), name)
        return found

    return Lazy(summary, make, ranks)


class CommandGroup(click.Group):
    """Commands in sections, each imported when it is called; unknown ones are answered."""

    def __init__(self, sections: Mapping[str, Mapping[str, Lazy]], **more: Any) -> None:
        super().__init__(**more)
        self._sections = sections
        self._lazy = {name: command for each in sections.values() for name, command in each.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the help."""
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name in self._lazy and cmd_name not in self.commands:
            self.commands[cmd_name] = self._lazy[cmd_name].make()
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The sections with a line for each command; nothing is imported for it."""
        width = max(map(len, self._lazy))
        for title, commands in self._sections.items():
            rows = [(name.ljust(width), command.summary) for name, command in commands.items()]
            with formatter.section(title):
                formatter.write_dl(rows)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The help on stderr where nothing is given: click's own way differs by version."""
        if not args and not ctx.resilient_parsing:
            print(ctx.get_help(), file=sys.stderr)
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name the nearest and list all."""
        name = args[0]
        if name not in self._lazy and not name.startswith("-"):
            raise RecipeError(
                f"there is no command {name!r}.{nearest(name, self._lazy)}",
                remedy=f"Commands: {', '.join(self._lazy)}. See: {ctx.command_path} --help",
            )
        if _ANY in args:
            # A flag of click takes no value, and an option with one would swallow a source.
            args = ["--overwrite" if each == _ANY else each for each in args]
            ctx.meta[_ANY] = True
        if name in self._lazy:
            _take_place(ctx, self._lazy[name].ranks)
        return super().resolve_command(ctx, args)


def _take_place(ctx: click.Context, kind: UnderRanks) -> None:
    """What this process does of a command, if torchrun has started several."""
    ranks: Ranks | None = ctx.obj
    if ranks is None or ranks.size == 1 or kind == UnderRanks.EACH:
        return
    if kind == UnderRanks.TOGETHER:
        ranks.begin()
    elif not ranks.is_first:
        ctx.exit(0)


def how_to_overwrite(ctx: click.Context, _: click.Parameter, value: bool) -> Overwrite:
    """Click callback of `--overwrite`, and of `--overwrite=any`."""
    return "any" if value and ctx.meta.get(_ANY) else value


def ranks_of_command() -> Ranks:
    """The ranks that share the work of this command; `ALONE` if nobody does."""
    ctx = click.get_current_context(silent=True)
    ranks: Ranks | None = ctx.find_root().obj if ctx else None
    return ranks if ranks is not None and ranks.is_together else ALONE


def group(program: str, help: str, sections: Mapping[str, Mapping[str, Lazy]]) -> CommandGroup:
    """A program: its commands by section, `--help` and `--version`."""
    made = CommandGroup(sections, name=program, help=help, context_settings=HELP)
    return click.version_option(package_name="drift_merge", prog_name=program)(made)


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """From the first Ctrl-C on, ignore the others.

    What is under way is stopped, journaled and cleaned up within seconds. Who presses it twice
    would cut that short: downloads were left lying about.
    """

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    # Anything else was chosen by somebody: a program in the background is not to be interrupted.
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def run(group: click.Group, program: str) -> NoReturn:
    """Run a command group as a program and exit with the code of design section 9."""
    as_json = "--json" in sys.argv[1:]
    gc.set_threshold(*RARELY)
    atexit.register(gc.freeze)
    # Once the work is done, Ctrl-C must not turn success into a death by signal: leaving an
    # interpreter that has loaded torch takes a third of a second.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    ranks = ALONE
    try:
        ranks = Ranks(place_in())
        with _one_interrupt():
            code = group.main(prog_name=program, standalone_mode=False, obj=ranks)
        sys.stdout.flush()
        ranks.leave()
    except BrokenPipeError:
        # `drift-prior inspect P | head`: the reader has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (Exception, KeyboardInterrupt) as error:
        if not isinstance(error, KeyboardInterrupt | click.Abort):
            _maybe_raise(error)
        sys.exit(_fail(error, program, ranks, as_json=as_json))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: BaseException, program: str, ranks: Ranks, *, as_json: bool) -> int:
    """Report an error, once for all ranks; the exit code."""
    told = ranks.tell(ranks.failure(*_described(error, program)))
    kind, message, remedy = told.kind, told.message, told.remedy
    if told.rank != ranks.rank:
        kind, message, remedy = _described(told.error(at=ranks.rank), program)
    if told.speaker == ranks.rank != 0:
        ranks.speak()
    _report(kind, message, remedy, as_json=as_json)  # only the first is heard, or the speaker
    ranks.leave()
    return _CODES.get(kind, BUG)


def _described(error: BaseException, program: str) -> tuple[str, str, str]:
    """Kind, message and remedy of whatever has ended a command."""
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "interrupted", *_interrupted()
    if isinstance(error, click.ClickException):
        return "usage", *_usage(error)
    if isinstance(error, DriftMergeError):
        return error.kind, error.message, error.remedy
    return "internal", *_bug(error, program)


def _maybe_raise(error: BaseException) -> None:
    if os.environ.get(DEBUG) == "1":
        raise error


def _report(kind: str, message: str, remedy: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": {"kind": kind, "message": message, "remedy": remedy}}))
        return
    lines = [f"Error: {message}"]
    if remedy:
        lines += ["", *(f"  {line}" for line in remedy.splitlines())]
    print(printable("\n".join(lines)), file=sys.stderr)


def printable(text: str) -> str:
    """The text with control characters spelled out: names in a file can hold terminal codes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _interrupted() -> tuple[str, str]:
    return (
        "interrupted; nothing half-written is left behind.",
        "Run the same command again: finished tensors are kept and it resumes there.",
    )


def _usage(error: click.ClickException) -> tuple[str, str]:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "the command"
    return error.format_message(), f"See: {path} --help"


def _bug(error: BaseException, program: str) -> tuple[str, str]:
    return (
        f"this is a bug in drift_merge {version()}: {type(error).__name__}: {error}",
        f"Please report it with the output of: {DEBUG}=1 {program} ...",
    )


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=1, allow_nan=False))
