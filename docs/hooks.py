# SPDX-License-Identifier: Apache-2.0
"""Pages that mkdocs makes of what is written elsewhere: the reference, the command line, the examples, root files."""

import argparse
import ast
import importlib
import inspect
import os
import re
import textwrap
from pathlib import Path
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from docstrings import PACKAGES, path_of, public_names
from fastdense.cli.commands import make_parser

ROOT = Path(__file__).resolve().parents[1]
# What the repository's pages link to, and where the site has it; a link to anything else becomes its text.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "THIRD_PARTY.md": "third_party.md",
    "examples/README.md": "examples.md",
}


def reference(package: str) -> str:
    """One entry a public name: classes first, then functions."""
    module = importlib.import_module(package)
    names = sorted(public_names(package), key=lambda name: not inspect.isclass(getattr(module, name)))
    entries = "\n\n".join(f"::: {path_of(package, name)}" for name in names)
    return f"# {package}\n\n{inspect.getdoc(module)}\n\n{entries}\n"


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def command_help(command: argparse.ArgumentParser) -> str:
    """What ``-h`` prints, with its paragraphs and examples taken out of the fixed columns."""
    description, command.description = command.description or "", None
    text = ""
    for paragraph in re.split(r"\n\s*\n", description.strip()):
        heading, _, lines = paragraph.partition("\n")
        example = f"{heading.capitalize()}\n\n```text\n{textwrap.dedent(lines)}\n```"
        text += f"{example if heading.startswith('example') else paragraph}\n\n"
    return f"{text}```text\n{command.format_help()}```\n"


def command_line() -> str:
    with mock.patch.dict(os.environ, COLUMNS="110"):
        parser = make_parser()
        text = f"# Command line\n\n{command_help(parser)}"
        for name, command in subcommands(parser).items():
            text += f"\n## fastdense {name}\n\n{command_help(command)}"
    return text


def examples() -> str:
    """The list of examples, then the source of each."""
    text = (ROOT / "examples/README.md").read_text()
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = text.replace(f"| `{path.name}` |", f"| [`{path.name}`](#{path.name.replace('.', '')}) |")
        source = path.read_text()
        summary = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0]
        text += f"\n## {path.name}\n\n{summary}\n\n```python\n{source}```\n"
    return text


def root_page(name: str) -> str:
    return relink((ROOT / name).read_text()).replace("](benchmarks/results/", "](results/")


def relink(text: str) -> str:
    """Turns links between files of the repository into links between pages of the site."""

    def page(match: re.Match[str]) -> str:
        label, target = match.groups()
        path, mark, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        if path not in PAGES and not path.startswith("docs/"):
            return label
        if label == path:
            label = (ROOT / path).read_text().partition("\n")[0].removeprefix("# ")
        return f"[{label}]({PAGES.get(path, path.removeprefix('docs/'))}{mark}{anchor})"

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", page, text)


def on_page_markdown(markdown: str, **_: object) -> str:
    return markdown.replace("](../benchmarks/results/", "](results/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {f"reference/{package}.md": reference(package) for package in PACKAGES}
    pages |= {"cli.md": command_line(), "examples.md": examples()}
    pages |= {page: root_page(name) for name, page in PAGES.items() if page not in pages}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for picture in sorted((ROOT / "benchmarks/results").glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files
