"""Help: a golden page per command, and nothing undocumented."""

import re

import click
import pytest

from drift_merge.cli import merge, prior
from drift_merge.cli.entry import version
from drift_merge.recipes.values import known_keys
from tests.golden_files import compare_with_golden

GROUPS = {"drift-prior": prior.group, "drift-merge": merge.group}
COMMANDS = [(p, name) for p, group in GROUPS.items() for name in group.list_commands(None)]
EVERY = [(program,) for program in GROUPS] + COMMANDS


def options(command):
    return [p for p in command.params if isinstance(p, click.Option)]


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help_is_the_golden_page(call, words):
    result = call(*words, "--help")
    assert result.code == 0
    assert result.err == ""
    compare_with_golden(f"help/{'-'.join(words)}.txt", result.out)


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_the_short_flag_prints_the_same_help(call, words):
    assert call(*words, "-h") == call(*words, "--help")


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_every_option_says_what_it_does(program, name):
    for option in options(GROUPS[program].get_command(None, name)):
        assert option.help, option.name


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_every_page_begins_with_a_sentence_and_ends_with_an_example_of_that_command(program, name):
    text = GROUPS[program].get_command(None, name).help
    first = text.split("\n\n")[0]
    assert first.rstrip().endswith(".")
    assert re.search(rf"Example:\n\s+{program} {name}\b", text)


def test_the_same_option_has_the_same_help_wherever_it_configures_a_run():
    seen = {}
    for program, name in COMMANDS:
        command = GROUPS[program].get_command(None, name)
        if "sources" not in {p.name for p in command.params}:
            continue
        for option in options(command):
            if option.name != "base" and (name, option.name) != ("align", "verbose"):
                text = option.help.split("  [")[0]  # defaults are the method's
                seen.setdefault(max(option.opts, key=len), set()).add(text)
    assert {name for name, texts in seen.items() if len(texts) > 1} == set()


def test_keys_of_a_config_file_are_the_options_of_the_commands_that_read_one():
    keys = {
        "method",
        "reasoner",
        "mllm",
        "is-delta",
    }  # the last is set by `drift-prior apply` alone
    for program, name in COMMANDS:
        names = {
            long.removeprefix("--")
            for option in options(GROUPS[program].get_command(None, name))
            for long in option.opts
            if long.startswith("--")
        }
        if "config" in names:
            keys |= names - {"config", "print-config"}
    assert set(known_keys()) == keys
    assert len(known_keys()) == len(keys)


@pytest.mark.parametrize("program", GROUPS)
def test_the_version_is_that_of_the_package(call, program):
    result = call(program, "--version")
    assert (result.code, result.out) == (0, f"{program}, version {version()}\n")


@pytest.mark.parametrize("program", GROUPS)
def test_a_program_without_a_command_prints_its_help_as_a_usage_error(call, program):
    result = call(program)
    assert result.code == 2
    assert "Usage:" in result.err
    assert "Error" not in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("program", "typo", "meant"),
    [
        ("drift-prior", "aling", "align"),
        ("drift-prior", "verfy", "verify"),
        ("drift-merge", "liner", "linear"),
    ],
)
def test_an_unknown_command_is_answered_with_the_nearest_one(call, program, typo, meant):
    result = call(program, typo)
    assert result.code == 2
    assert f"Did you mean {meant}?" in result.err
    for name in GROUPS[program].list_commands(None):
        assert name in result.err
    assert "Traceback" not in result.err
