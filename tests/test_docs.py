"""What the pages say can be typed, and where they point to exists."""

import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import train_lora
from core.options import parse

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "README_zh.md", ROOT / "dataset" / "README.md"]
PAGES += [ROOT / "model" / "minimind_tokenizer" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
COMMAND = re.compile(r"^ +(?:\w+=\S+ )*(?:python|torchrun \S+ \w+) (\S+\.py)\b(.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s:#]*)(?:#([^)\s]+))?\)")
FORMER = "926d890"  # the commit that pages name for what is no longer part of the code
WITHOUT_OPTIONS = {"scripts/quickstart.py", "scripts/run_tests.py", "dataset/compose.py"}


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Script and arguments of each command in a page's indented blocks."""
    text = re.sub(r"\\\n *", "", page.read_text(encoding="utf-8"))
    found = COMMAND.findall(re.sub(r" +[#>] .*$", "", text, flags=re.MULTILINE))
    return [(script, shlex.split(words.replace("...", ""))) for script, words in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_each_command_of_a_page_is_one_that_its_script_takes(page):
    for script, words in commands(page):
        if not (ROOT / script).is_file():
            assert FORMER in page.read_text(encoding="utf-8"), f"{script} is not there"
        elif script in WITHOUT_OPTIONS:
            assert words in ([], ["--use_this_python"])
        else:
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            if script.startswith("benchmarks/"):  # some need what a reader makes first
                flags = {word.removeprefix("--") for word in words if word.startswith("--")}
                assert flags <= {each.name for each in fields(module.Options)}
            else:
                parse(module.Options, words)


def test_the_pages_hold_commands():
    assert sum(len(commands(page)) for page in PAGES) > 50


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if re.match("#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_each_link_of_a_page_leads_somewhere(page):
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {path}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {path}#{anchor}"


@pytest.mark.parametrize("page", ["lora.md", "lora_zh.md"])
def test_a_number_that_a_page_calls_a_default_is_the_default(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    said = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", text, re.MULTILINE))
    assert {"rank", "keep", "keep_rows"} <= said.keys()
    defaults = {each.name: each.default for each in fields(train_lora.Options)}
    assert said == {name: f"{defaults[name]:g}" for name in said}
