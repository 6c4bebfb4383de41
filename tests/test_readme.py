"""README and docs: each program, flag, link and test that they name exists; their sizes."""
import importlib
import re
import sys

import pytest
from helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


COMMAND = r"(?:python|torchrun) [^#`]*?((?:tools/|downstream/)?[a-z]+\.py)([^#`'|&;]*)"


def commands(text):
    """(program, its arguments) of each command line of ours, of lines that a backslash joins too"""
    for line in text.replace("\\\n", " ").splitlines():
        for program, arguments in re.findall(COMMAND, line):
            yield program, arguments.split()


def flags_of(program, command, capsys):
    """The flags that a program's --help lists.  command: a first word such as pack, or []"""
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    sys.argv = [program, *command, "--help"]
    with pytest.raises(SystemExit):
        module.main()
    return set(re.findall(r"--[a-z][-a-z0-9]*", capsys.readouterr().out))


def test_every_command_names_a_program_and_its_flags(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    known = {}
    seen = 0
    for page in PAGES:
        for program, arguments in commands(page.read_text()):
            command = arguments[:1] if program == "tools/prepare.py" else []
            key = program, *command
            if key not in known:
                known[key] = flags_of(program, command, capsys)
            used = {word.partition("=")[0] for word in arguments if word.startswith("--")}
            assert used <= known[key], (page.name, program, used - known[key])
            seen += 1
    assert seen > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_pages_are_short(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    lines = text.splitlines()
    assert len(lines) <= 200
    assert page.name != "README.md" or len(text.encode()) <= 16_384
    for line in lines:
        assert len(line) <= 100 or line.startswith("|") or "https://" in line, line


def test_the_tests_that_pages_name_exist():
    names = set(re.findall(r"def (test_\w+)", "".join(
        file.read_text() for file in (ROOT / "tests").glob("test_*.py"))))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+?)(?:\.\.\.)?`", page.read_text()):
            assert any(one.startswith(name) for one in names), (page.name, name)
