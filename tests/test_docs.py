"""The pages hold: links and named files are there, commands have the options and settings that they are given."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from imglish.bootstrapping.loop import read_loop
from imglish.cli import COMMANDS, main
from imglish.training.config import Recipe, read_recipe
from imglish.training.setup import base_config
from imglish.training.stages import is_pipeline, read_stages

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")], key=lambda page: page.as_posix()
)
ANY_RECIPE = ROOT / "recipes" / "flickr8k-vilt.yaml"  # stands for the recipe of a reader
PLACES = ("", "src/imglish")  # what names of files are relative to

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """What a link may name within a page, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ +(.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), target


@each_page
def test_named_files_are_there(page: Path) -> None:
    text = page.read_text()
    folders = "recipes|benchmarks|tests|models|nn|objectives|checkpoints|data"
    for name in re.findall(rf"\b(?:{folders})/[\w./*-]+\.(?:py|yaml)", text):
        assert any(list((ROOT / place).glob(name.replace("MODEL", "*"))) for place in PLACES), name
    for name in re.findall(r"\btests/[\w/]+\b(?!\.)", text):
        assert (ROOT / name).exists(), name


@each_page
def test_python_imports_what_exists(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@dataclass(frozen=True)
class Command:
    """words: without the program and without what stands for anything; whole: nothing of it is left out, as it is where
    a command is mentioned within a sentence."""

    words: list[str]
    whole: bool


def commands(page: Path, program: str) -> Iterator[Command]:
    """Every line and every mention of a program (a regular expression) on a page."""
    fences = re.compile(r"^```[a-z]*\n(.*?)^```", flags=re.M | re.S)
    text = page.read_text()
    lines = [*fences.findall(text), *re.findall(r"^    (.*)$", text, flags=re.M)]
    said = [(line.strip(), True) for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines()]
    said += [(" ".join(part.split()), False) for part in re.findall(r"`([^`]+)`", fences.sub("", text))]
    for text, whole in said:
        if found := re.match(rf"(?:\S*/)?{program}(?=[ \w])(.*)", text):
            words = shlex.split(found[1], comments=whole)
            kept = [word for word in words if word not in ("...", "OVERRIDE", "OVERRIDES")]
            yield Command(kept, whole and kept == words)


class Read(Exception):  # noqa: N818, it is no error
    """Thrown where a command has read its arguments: nothing of it is run. read: what these were."""

    def __init__(self, read: argparse.Namespace) -> None:
        self.read = read


def options_of(parser: argparse.ArgumentParser, words: Sequence[str]) -> set[str]:
    """All options of a command: of the job that its words name, else of all its jobs."""
    jobs = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    named = [job for choices in jobs for name, job in choices.items() if name in words]
    wanted = named or [job for choices in jobs for job in choices.values()] or [parser]
    return {option for job in wanted for option in job._option_string_actions}


def arguments_of(command: Command, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace | None:
    """What `imglish` reads of a command. None where it is a mention that leaves out what is required."""
    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            plain = getattr(argparse.ArgumentParser, name)

            def read(parser: argparse.ArgumentParser, words: Sequence[str], plain: Any = plain) -> None:
                given = {word.split("=")[0] for word in words if word.startswith("--")}
                assert given <= options_of(parser, words), f"{parser.prog} has no {given - options_of(parser, words)}"
                raise Read(plain(parser, words))

            patch.setattr(argparse.ArgumentParser, name, read)
        try:
            main(command.words)
        except Read as found:
            return found.read
        except SystemExit:
            assert not command.whole, f"imglish {shlex.join(command.words)}"
    return None


@each_page
def test_commands_have_their_options_and_settings(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands(page, "(?:[A-Z_]+=[^ ]+ )?(?:torchrun .*-m )?imglish"):
        if not command.words or command.words[0].startswith("-"):
            continue
        assert command.words[0] in COMMANDS, command
        read = arguments_of(command, monkeypatch)
        if read is not None and command.words[0] in ("train", "finetune", "bootstrap"):
            check_settings(command.words[0], read.recipe, tuple(read.overrides))


@cache
def check_settings(command: str, name: str, overrides: tuple[str, ...]) -> None:
    """SettingsError where the overrides of a command do not fit its recipe, or the model that this names."""
    path = ANY_RECIPE if name in ("RECIPE", "recipe.yaml") else ROOT / name.replace("MODEL", "albef")
    if command == "bootstrap":
        read_loop(path, overrides)
    elif is_pipeline(path):
        read_stages(path, overrides)
    else:
        recipe = read_recipe(path, overrides)
        if "name" in recipe.model:
            base_config(recipe)
        if path != ANY_RECIPE and any(override.startswith("data.train=") for override in overrides):
            validation = recipe.validation.data or ""  # who trains on own pictures need not have those of the recipe
            assert not validation.startswith("../shared"), f"{name} {shlex.join(overrides)}"


def settings_of(group: Any, name: str) -> Iterator[str]:
    """Dotted names of all settings in a dataclass."""
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        nested = dataclasses.is_dataclass(value)
        yield from settings_of(value, f"{name}{field.name}.") if nested else [name + field.name]


def test_every_setting_of_a_recipe_is_on_a_page() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    for name in settings_of(Recipe(model={"name": "clip-tiny"}), ""):
        last = name.rsplit(".", 1)[-1]
        assert re.search(rf"`[^`\n]*\b{last}\b[^`\n]*`", text), f"no page explains {name}"


@each_page
def test_benchmarks_have_their_options(page: Path) -> None:
    for command in commands(page, r"python (?:-m benchmarks\.|benchmarks/)"):
        name, *words = command.words
        code = (ROOT / "benchmarks" / f"{name.removesuffix('.py')}.py").read_text()
        code += (ROOT / "benchmarks" / "common.py").read_text()
        assert all(f'"{word}"' in code for word in words if word.startswith("--")), command


@each_page
def test_tests_that_pages_name_are_there(page: Path) -> None:
    for command in commands(page, "pytest"):
        for option, name in zip(command.words, command.words[1:]):
            if option == "-k":
                assert name in (ROOT / command.words[0]).read_text(), command


def test_both_readmes_say_the_same() -> None:
    """Their commands, up to what a search asks for, and their links."""
    english, chinese = ROOT / "README.md", ROOT / "README.zh-CN.md"
    said = [
        {tuple(w for w in c.words if " " not in w and w.isascii()) for c in commands(p, "imglish")}
        for p in (english, chinese)
    ]
    assert said[0] == said[1]
    links = [set(re.findall(r"\]\(((?:docs|benchmarks)/[^)]+)\)", page.read_text())) for page in (english, chinese)]
    assert links[0] == links[1]
