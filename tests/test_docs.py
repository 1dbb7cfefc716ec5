# SPDX-License-Identifier: Apache-2.0
"""The site builds without a warning, is complete and fetches nothing; the code in the pages runs."""

import importlib
import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest

from fastdense.cli.commands import make_parser

ROOT = Path(__file__).resolve().parents[1]
_NAMES = ("nn", "ops", "models", "train", "timm", "bench", "sr.quality")
PACKAGES = ("fastdense", *(f"fastdense.{name}" for name in _NAMES))
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
PROSE = [*(page for page in PAGES if page not in ("CHANGELOG.md", "THIRD_PARTY.md")), "examples/README.md"]
MOST_WORDS_IN_README = 900
MOST_WORDS_IN_A_SENTENCE = 35
# A block of Python, and the block of text that shows what it prints, if one follows at once.
SNIPPET = re.compile(r"^```python\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


class Snippet(NamedTuple):
    """Line and text of a block of Python; None or what it prints."""

    line: int
    text: str
    printed: str | None


def snippets(page: str) -> list[Snippet]:
    text = (ROOT / page).read_text()
    return [Snippet(text.count("\n", 0, found.start(1)), found[1], found[2]) for found in SNIPPET.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_code_in_the_pages_runs(page, one_thread, capsys):
    """Block after block, with the names of those before it; it prints what the page says."""
    names: dict[str, object] = {}
    for line, text, printed in snippets(page):
        exec(compile("\n" * line + text, ROOT / page, "exec"), names)
        out = capsys.readouterr().out
        assert printed is None or out == printed


def words(text: str) -> list[str]:
    """What has a letter or a digit: not the bars of a table or the marks of a list."""
    return [word for word in text.split() if re.search(r"\w", word)]


def sentences(page: str) -> list[str]:
    """Those of paragraphs, items, headings and cells of tables. Blocks of code have none; a stop in code ends none."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)\s]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", lambda code: re.sub(r"[.!?|]", "", code[0]), text)
    text = re.sub(r"^ *([*-]|#+|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    parts = (part.replace("*", "") for part in re.split(r"\n\s*\n|\|", text))
    return [sentence for part in parts for sentence in re.split(r"[.!?][)\"]*\s", part) if words(sentence)]


def test_sentences_are_told_apart():
    page = "# Head\n\nOne [two](a.md). **Three.** Four `a.b | c?` (five.)\nSix\n\n* seven\n* eight\n"
    page += "\n| a | b c |\n| - | - |\n```\nnone of it\n```\n"
    found = [" ".join(words(sentence)) for sentence in sentences(page)]
    assert found == ["Head", "One two", "Three", "Four `ab c` (five", "Six", "seven", "eight", "a", "b c"]


def test_readme_is_short():
    assert len(words((ROOT / "README.md").read_text())) <= MOST_WORDS_IN_README


@pytest.mark.parametrize("page", PROSE)
def test_sentences_are_short(page):
    longest = max(sentences((ROOT / page).read_text()), key=lambda sentence: len(words(sentence)))
    assert len(words(longest)) <= MOST_WORDS_IN_A_SENTENCE, longest


def test_pages_with_code_are_found():
    assert {"README.md", "docs/bicubic.md"} <= {page for page in PAGES if snippets(page)}
    assert any(snippet.printed for snippet in snippets("README.md"))


@pytest.mark.parametrize("page", [page for page in PAGES if "/" not in page])
def test_links_of_root_pages_lead_to_files(page):
    """Those between pages of the site are checked when it is built."""
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []


@pytest.mark.parametrize("page", PROSE)
def test_files_that_pages_name_exist(page):
    """In code, with their folder; names with a placeholder or a choice in them are left out."""
    named = re.findall(
        r"`((?:benchmarks|csrc|docs|examples|fastdense|requirements|tests)/[\w./]*)`", (ROOT / page).read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


class Page(HTMLParser):
    """Identifiers of a page, what a browser would fetch for it, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.identifiers: set[str] = set()
        self.fetched: list[str] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.identifiers.add(values.get("id") or "")
        self.fetched.append(values.get("src") or "")
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(values.get("href") or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[str, Page]:
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: --strict then sees no warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    return {path.relative_to(folder).as_posix(): Page(path) for path in folder.rglob("*.html")}


@pytest.mark.parametrize("package", PACKAGES)
def test_reference_has_every_public_name(site, package):
    """By its public path, or where a module has the same name by the one behind it."""
    identifiers = site[f"reference/{package}.html"].identifiers
    module = importlib.import_module(package)
    functions = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == package]
    names = getattr(module, "__all__", [name for name in functions if not name.startswith("_")])
    assert names
    for name in names:
        if not inspect.ismodule(getattr(module, name)):
            assert {f"{package}.{name}", f"{package}.{name}.{name}"} & identifiers, name


def test_command_line_page_has_every_option(site):
    text = site["cli.html"].text
    (commands,) = (action for action in make_parser()._actions if action.choices)
    for name, command in commands.choices.items():
        assert f"usage: fastdense {name} " in text
        for action in command._actions:
            assert all(option in text for option in action.option_strings), name


def test_examples_page_has_every_source(site):
    text = site["examples.html"].text
    for path in (ROOT / "examples").glob("*.py"):
        assert path.read_text().strip() in text, path.name


def test_pages_fetch_nothing_from_elsewhere(site):
    fetched = {address for page in site.values() for address in page.fetched}
    assert any(address.endswith(".css") for address in fetched)
    assert [address for address in fetched if re.match(r"\w+:(?!$)|//", address)] == []


def test_stylesheets_fetch_nothing_from_elsewhere():
    assert "url(" not in (ROOT / "docs/style.css").read_text()
