"""README and guides: their blocks run, their links resolve, and nothing is left without a word."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from drift_merge import guides
from drift_merge.cli.commands.demo import demo_action
from drift_merge.cli.commands.guide import guide_action
from drift_merge.maths.methods import METHODS
from tests.cli.documents import (
    COMMANDS,
    CONTEXTS,
    DOCUMENTS,
    GROUPS,
    GUIDES,
    README,
    ROOT,
    options_of,
)
from tests.run_readme import blocks_of, check_output

MAX_WORDS = 1_400


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What `drift-prior demo -o demo` leaves; the guides begin with it."""
    directory = tmp_path_factory.mktemp("guides") / "demo"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        demo_action(directory, quiet=True)
    return directory


def run_line(line, call):
    """A line of a shell block: our commands in this process, anything else by bash."""
    words = shlex.split(line, comments=True)
    if not words or words[0] not in GROUPS:
        command = ["bash", "-euo", "pipefail", "-c", line]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout
    target = words[words.index(">") + 1] if ">" in words else None
    called = call(*(words[: words.index(">")] if target else words))
    assert called.code == 0, f"{line}\n{called.err}"
    if target is None:
        return called.out
    Path(target).write_text(called.out)
    return ""


def run_python(code, monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())  # as `python -c` has it
    known, out = set(sys.modules), io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "a block", "exec"), {"__name__": "__main__"})
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(Path.cwd())):
            del sys.modules[name]
    return out.getvalue()


@pytest.mark.parametrize("name", [name for name, text in DOCUMENTS.items() if blocks_of(text)])
def test_the_blocks_run_and_print_what_the_document_shows(name, demo, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name != "README":  # which makes its own
        shutil.copytree(demo, "demo")
    for block in blocks_of(DOCUMENTS[name]):
        if block.file:
            Path(block.file).write_text(block.code)
            continue
        if block.language == "python":
            printed = run_python(block.code, monkeypatch)
        else:
            printed = "".join(run_line(line, call) for line in block.code.splitlines())
        check_output(block, printed)


def test_an_output_that_a_document_does_not_show_is_found():
    [block] = blocks_of("```sh\necho\n```\n\n```output\none\n...\nthree\n```\n")
    check_output(block, "one\ntwo\n2\nthree\n")
    check_output(block, "one\nthree\n")
    for printed in ("one\ntwo\nthree\nfour\n", "one\ntwo\n", "zero\none\nthree\n", ""):
        with pytest.raises(SystemExit):
            check_output(block, printed)


def test_the_readme_shows_the_real_output_of_eight_lines():
    first = blocks_of(README)[0]
    assert len(first.code.splitlines()) == 8
    assert first.output is not None


def test_the_readme_is_short():
    assert len(README.split()) <= MAX_WORDS


def test_each_guide_begins_with_a_title_and_a_sentence_that_says_what_it_is_for():
    for topic, text in GUIDES.items():
        assert re.match(r"# [^\n]+\n\n(How|What|Which)\b", text), topic
        assert len(guides.first_sentence(topic)) <= 180, topic


def test_every_link_inside_the_repository_leads_to_a_file():
    links = [
        (name, link)
        for name, text in DOCUMENTS.items()
        for link in re.findall(r"\]\(([^)]+)\)", text)
        if not link.startswith("https://")
    ]
    assert links
    home = {"README": ROOT}
    missing = [
        f"{name}: {link}"
        for name, link in links
        if not (home.get(name, ROOT / "drift_merge/guides") / link).is_file()
    ]
    assert not missing


def test_the_readme_leads_to_every_guide():
    assert {f"drift_merge/guides/{topic}.md" for topic in GUIDES} <= set(
        re.findall(r"\]\(([^)]+)\)", README)
    )


def pages():
    """Every help page."""
    for program, group in GROUPS.items():
        yield program, group.get_help(CONTEXTS[program])
    for (program, name), command in COMMANDS.items():
        context = click.Context(command, info_name=name, parent=CONTEXTS[program])
        yield f"{program} {name}", command.get_help(context)


def test_every_topic_that_is_named_anywhere_exists():
    texts = [*DOCUMENTS.items(), *pages()]
    texts += [
        (str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
        for path in (ROOT / "drift_merge").rglob("*.py")
    ]
    named = [
        (where, topic)
        for where, text in texts
        for topic in re.findall(r"drift-(?:prior|merge) guide\s+([a-z][\w-]*)", text)
    ]
    assert named
    assert not [f"{where}: {topic}" for where, topic in named if topic not in GUIDES]


def test_every_command_is_named_in_a_guide():
    everything = " ".join(" ".join(GUIDES.values()).split())
    missing = [
        f"{program} {name}"
        for program, name in COMMANDS
        if name not in METHODS and f"{program} {name}" not in everything
    ]
    assert not missing


def test_every_option_is_named_in_a_guide():
    named = set(re.findall(r"--[a-z][a-z0-9-]*", "\n".join(GUIDES.values())))
    assert not {
        f"{program} {name} {flag}"
        for (program, name), command in COMMANDS.items()
        for flag, flags in options_of(command).items()
        if not named & flags
    }


def test_the_glossary_names_only_modules_and_classes_that_exist():
    text = GUIDES["glossary"]
    sources = {p: p.read_text(encoding="utf-8") for p in (ROOT / "drift_merge").rglob("*.py")}
    classes = {name for s in sources.values() for name in re.findall(r"class (\w+)", s)}
    modules = {
        ".".join(p.relative_to(ROOT / "drift_merge").with_suffix("").parts).removesuffix(
            ".__init__"
        )
        for p in sources
    }
    cells = [
        code
        for line in text.splitlines()
        if line.count(" | ") >= 2
        for code in re.findall(r"`([^`]+)`", line.rsplit(" | ", 1)[1])
    ]
    missing = [
        code
        for code in cells
        if (re.fullmatch(r"[A-Z]\w*[a-z]\w*", code) and code not in classes)
        or (
            re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", code)
            and code not in modules | {"drift_merge.attach"}
        )
        or (
            (dotted := re.fullmatch(r"([a-z_.]+)\.([A-Z]\w*)", code))
            and (dotted[1] not in modules or dotted[2] not in classes)
        )
    ]
    assert len(cells) > 50
    assert not missing


def test_without_a_topic_every_guide_is_listed_with_its_first_sentence(call):
    for program in GROUPS:
        result = call(program, "guide")
        assert result.code == 0
        for topic in GUIDES:
            sentence = guides.first_sentence(topic).replace("`", "")
            assert re.search(rf"^{topic} +{re.escape(sentence)}$", result.out, re.M), topic
        assert f"{program} guide TOPIC" in result.out


@pytest.mark.parametrize("program", GROUPS)
def test_a_shell_completes_as_the_guide_says(program):
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    assert f"{variable}=bash_source {program}" in GUIDES["completion"]
    words = {"COMP_WORDS": f"{program} insp", "COMP_CWORD": "1"}
    for instruction, expected in (
        *((f"{shell}_source", f"{variable}=") for shell in ("zsh", "fish")),
        ("bash_complete", "plain,inspect\n"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", f"from drift_merge.cli.{program[6:]} import main; main()"],
            env=os.environ | words | {variable: instruction},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert expected in done.stdout
        assert done.stderr == ""


def test_a_guide_is_plain_in_a_pipe_and_drawn_on_a_terminal(capsys, monkeypatch):
    guide_action("exit-codes", "drift-prior")
    plain = capsys.readouterr().out
    assert plain == GUIDES["exit-codes"]
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    guide_action("exit-codes", "drift-prior")
    drawn = capsys.readouterr().out
    assert "| code |" not in drawn
    assert "checked and found different" in drawn


def test_every_guide_can_be_drawn(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for topic in GUIDES:
        guide_action(topic, "drift-prior")
        assert len(capsys.readouterr().out) > 200, topic


@pytest.mark.parametrize("program", GROUPS)
def test_an_unknown_topic_is_answered_with_the_nearest(call, program):
    result = call(program, "guide", "trainnig")
    assert result.code == 2
    assert "Did you mean training?" in result.err
    assert "glossary" in result.err
    assert "Traceback" not in result.err
    assert call(program, "guide", "../pyproject").code == 2
