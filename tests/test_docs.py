"""The documentation: tutorials work as they are printed, links lead somewhere, commands and options exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import tvm_lowrank
from tvm_lowrank.cli import app as cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))

FENCE = re.compile(r"^```(?P<info>[^`\n]*)\n(?P<text>.*?)^``` *$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\[[^\]\n]*\]\((?P<target>[^)\s]+)\)")
FILE = re.compile(r'python title="(?P<name>[\w.]+)"')
CALL = re.compile(r"(?:^|\s)tvm_lowrank(?:\.cli)? +(?P<words>[^#|;&)]*)")
PROGRAMS = ("sh", "python")
SILENT = "text"  # what a tutorial shows and nobody runs
COMMANDS = ("", "sh", "text")  # blocks in which commands are looked for
SECONDS = 300  # for one block; they take less than 30


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: what follows the fence, its text, and the line of the fence."""

    info: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [Block(m["info"].strip(), m["text"], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def execute(block: Block, folder: Path) -> None:
    """Run a block as a reader would: a shell's commands, or a program that was saved to a file."""
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    if block.info == "python":
        program = folder / f"block_{block.line}.py"
        program.write_text(block.text)
        command = [sys.executable, program.name]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"the block in line {block.line}:\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_works_as_it_is_printed(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        file = FILE.fullmatch(block.info)
        if file:
            (tmp_path / file["name"]).write_text(block.text)
        elif block.info in PROGRAMS:
            execute(block, tmp_path)
        else:
            assert block.info == SILENT, f"line {block.line}: a block of {block.info!r} is neither run nor meant to be"


def test_every_tutorial_is_found() -> None:
    assert {page.stem for page in TUTORIALS} >= {"finetuning", "onnx", "own-model", "pass", "python"}
    for page in TUTORIALS:
        assert any(block.info in PROGRAMS for block in blocks(page)), name(page)


def links(page: Path) -> Iterator[str]:
    """The targets of a page's relative links, without what is behind the #."""
    text = CODE.sub("", FENCE.sub("", page.read_text()))
    for target in LINK.findall(text):
        if not re.match(r"[a-z]+:|#", target):
            yield target.partition("#")[0]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path = (page.parent / target).resolve()
        assert path.exists(), f"{name(page)}: no {target}"
        # the web site holds nothing outside of docs/
        assert DOCS not in page.parents or DOCS in path.parents, f"{name(page)}: {target} leaves docs/"


def calls(block: Block) -> Iterator[list[str]]:
    """The words behind each `tvm_lowrank` of a block of commands."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for call in CALL.finditer(line):
            yield call["words"].split()


def found(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words name, or None, and the words that are left."""
    command: Any = get_command(cli.app)
    while command is not None and getattr(command, "commands", None):
        if not words or words[0].startswith("-"):
            break
        command, words = command.commands.get(words[0]), words[1:]
    return command, words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_options_exist(page: Path) -> None:
    for block in blocks(page):
        if block.info not in COMMANDS:
            continue
        for words in calls(block):
            said = f"{name(page)}, the block in line {block.line}: tvm_lowrank {' '.join(words)}"
            command, rest = found(words)
            assert command is not None, f"{said}: no such command"
            known = {"-h", "--help"}.union(*([*option.opts, *option.secondary_opts] for option in command.params))
            options = {word.partition("=")[0] for word in rest if word.startswith("--")}
            assert options <= known, f"{said}: no {', '.join(sorted(options - known))}"


def test_commands_are_looked_for_where_they_are() -> None:
    words = [words for block in blocks(ROOT / "README.md") if block.info in COMMANDS for words in calls(block)]
    assert "search" in [each[0] for each in words]
    assert found(["winograd"])[0] is None and found(["device", "fly"])[0] is None
    assert {parameter.name for parameter in found(["search"])[0].params} >= {"model", "finetune", "resume"}


def test_every_page_is_in_the_navigation() -> None:
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert pages <= set((ROOT / "mkdocs.yml").read_text().split())


def test_the_reference_has_every_public_name() -> None:
    described = re.findall(r"^::: tvm_lowrank[\w.]*\.(\w+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    assert set(described) >= set(tvm_lowrank.__all__)
