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
from drift_merge.cli import merge, prior
from drift_merge.cli.commands.demo import demo_action
from drift_merge.cli.commands.doctor import examine
from drift_merge.cli.commands.guide import guide_action
from drift_merge.maths.methods import METHODS
from drift_merge.maths.methods.table import CALIBRATION, SPECTRAL
from tests.run_readme import blocks_of, check_output

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = {topic: guides.text_of(topic) for topic in guides.topics()}
DOCUMENTS = {"README": README, **GUIDES}
GROUPS = {"drift-prior": prior.group, "drift-merge": merge.group}
CONTEXTS = {
    program: click.Context(group, info_name=program, **group.context_settings)
    for program, group in GROUPS.items()
}
COMMANDS = {
    (program, name): group.get_command(CONTEXTS[program], name)
    for program, group in GROUPS.items()
    for name in group.list_commands(CONTEXTS[program])
}
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


def options_of(command):
    """Long flag -> all flags of an option."""
    return {
        max(parameter.opts, key=len): {*parameter.opts, *parameter.secondary_opts}
        for parameter in command.params
        if isinstance(parameter, click.Option)
    }


def test_every_option_is_named_in_a_guide():
    named = set(re.findall(r"--[a-z][a-z0-9-]*", "\n".join(GUIDES.values())))
    assert not {
        f"{program} {name} {flag}"
        for (program, name), command in COMMANDS.items()
        for flag, flags in options_of(command).items()
        if not named & flags
    }


SECTIONS = dict(re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", GUIDES["methods"], re.DOTALL | re.M))
# Said once, of all methods that need a base.
SHARED = {"--weight", "--mllm-weight", "--scale", "--calibrate", "--calibrate-alpha"}
STEP = {f"--{name}" for name in SPECTRAL}  # of all methods with a spectral step


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_has_a_row_and_a_section_that_names_its_options_and_its_source(method):
    least, most = method.reasoners
    number = str(least) if least == most else f"{least} or more"
    row = f"| `{method.name}` | {method.base} | {number} | {', '.join(method.variants)} |"
    assert row in GUIDES["methods"]
    section = SECTIONS[method.name]
    every = set.intersection(*(set(options_of(COMMANDS["drift-merge", n])) for n in METHODS))
    general = every | {"--base", "--variant"} | (SHARED if method.base == "required" else set())
    general |= STEP if "rank" in method.defaults["paper"] else set()
    assert not {
        flag
        for flag, flags in options_of(COMMANDS["drift-merge", method.name]).items()
        if flag not in general and not any(own in section for own in flags)
    }
    for variant in method.variants[1:]:
        assert variant in section or variant == "mergekit", variant
    for arxiv in re.findall(r"\d{4}\.\d{5}", method.paper):
        assert arxiv in section


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_defaults_that_the_guide_states_are_those_of_the_method(method):
    """`--density` (0.2) stands for the default variant."""
    text = re.split("[Vv]ariant `", " ".join(SECTIONS[method.name].split()))[0]
    stated = {}
    for flag, value in re.findall(r"`--([a-z-]+)[^`]*` \(([^)]+)\)", text):
        stated.setdefault(flag.replace("-", "_"), value)
    known = {
        name: value
        for name, value in method.defaults[method.variants[0]].items()
        if name != "is_delta"
        and not (f"--{name}" in STEP and "rank" in method.defaults["paper"])
        and (method.base != "required" or f"--{name.replace('_', '-')}" not in SHARED)
    }
    assert known.keys() <= stated.keys()
    for name, value in known.items():
        if isinstance(value, bool | str):
            assert stated[name] == str(value).lower(), name
        else:
            assert float(stated[name]) == value, name


def test_the_guide_states_the_defaults_that_methods_share():
    text = GUIDES["methods"].partition("## Singular directions")[2].partition("\n## ")[0]
    stated = dict(re.findall(r"`--([a-z-]+)[^`]*` \((\w[\w.]*)", text))
    for name, value in {**SPECTRAL, **CALIBRATION}.items():
        assert stated[name.replace("_", "-")] == (value if isinstance(value, str) else f"{value:g}")
    for method in METHODS.values():
        alpha = method.defaults["paper"].get("calibrate_alpha", CALIBRATION["calibrate_alpha"])
        said = f"`--calibrate-alpha` ({alpha:g})" in SECTIONS[method.name]
        assert said == (alpha != CALIBRATION["calibrate_alpha"]), method.name


def test_the_guide_has_no_method_that_does_not_exist():
    assert set(SECTIONS) == set(METHODS)


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


def test_the_doctor_reports_versions_extras_devices_cache_token_and_disk(
    call, monkeypatch, tmp_path
):
    from huggingface_hub import constants

    blob = tmp_path / "hub" / "models--org--name" / "blobs" / "b"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(bytes(1234))
    (blob.parent / "link").symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    result = call("drift-prior", "doctor", "--json")
    assert result.code == 0
    found = result.json
    assert found["schema"] == 1
    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["versions"]["torch"]
    assert set(found["extras"]) >= {"tokenizers", "train", "report", "test"}
    assert found["extras"]["test"]["packages"]["pytest"] == pytest.__version__
    assert found["devices"][0]["name"] == "cpu"
    assert found["threads"] >= 1
    assert found["hub"]["cache_bytes"] == 1234
    assert found["hub"]["token"] is True
    assert all(free > 0 for free in found["free_bytes"].values())
    text = call("drift-prior", "doctor")
    for shown in (result, text):
        assert "secret" not in shown.out + shown.err


def test_the_doctor_names_what_is_missing_and_how_to_install_it(monkeypatch, call):
    from drift_merge.cli.commands import doctor

    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda p: None if p == "pillow" else installed(p))
    assert call("drift-prior", "doctor").code == 0
    assert "pillow missing" in call("drift-prior", "doctor").out
    assert "pip install 'drift_merge[train]'" in call("drift-prior", "doctor").out
    assert examine()["extras"]["train"]["packages"]["pillow"] is None


def test_the_doctor_survives_a_torch_that_does_not_import_and_a_missing_cache(
    monkeypatch, tmp_path
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "there"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch raises ImportError
    found = examine()
    assert found["devices"][-1]["name"] == "torch"
    assert "does not work" in found["devices"][-1]["description"]
    assert (found["hub"]["cache_bytes"], found["hub"]["token"]) == (0, False)
    assert found["free_bytes"]["Hub cache"] > 0
