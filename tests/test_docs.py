# SPDX-License-Identifier: Apache-2.0
"""The site builds without a warning, is complete and fetches nothing; the code in the pages runs."""

import importlib
import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastdense.cli.commands import make_parser

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fastdense", "fastdense.nn", "fastdense.ops", "fastdense.models")
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(page: str) -> list[tuple[int, str]]:
    """Line and text of each block of Python."""
    text = (ROOT / page).read_text()
    return [(text.count("\n", 0, found.start(1)), found[1]) for found in SNIPPET.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_code_in_the_pages_runs(page, one_thread):
    """Block after block, with the names of those before it."""
    names: dict[str, object] = {}
    for line, text in snippets(page):
        exec(compile("\n" * line + text, ROOT / page, "exec"), names)


def test_pages_with_code_are_found():
    assert {"README.md", "docs/bicubic.md"} <= {page for page in PAGES if snippets(page)}


@pytest.mark.parametrize("page", [page for page in PAGES if "/" not in page])
def test_links_of_root_pages_lead_to_files(page):
    """Those between pages of the site are checked when it is built."""
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []


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
    for name in module.__all__:
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
