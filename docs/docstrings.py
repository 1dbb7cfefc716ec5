# SPDX-License-Identifier: Apache-2.0
"""Reads the docstrings for mkdocstrings: roles become links, "Example:" a section, ``a, b: text`` two arguments."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import griffe

# Those that the navigation has a page for.
PACKAGES = re.findall(r"reference/([\w.]+)\.md", (Path(__file__).parents[1] / "mkdocs.yml").read_text())
ARGUMENTS = re.compile(r"^(?:Args|Attributes):\n(?: {4}.*\n|\n)*", re.MULTILINE)
TOGETHER = re.compile(r"^ {4}(\w+(?:, \w+)+)(:.*\n(?: {5,}.*\n)*)", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|mod|meth):`([\w.]+)`")


def public_names(package: str) -> list[str]:
    """What a package exports, but for packages, in the order of its ``__all__``; else what a module defines."""
    module = importlib.import_module(package)
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == package]
    names = getattr(module, "__all__", [name for name in defined if not name.startswith("_")])
    return [name for name in names if not inspect.ismodule(getattr(module, name))]


def path_of(package: str, name: str) -> str:
    """Where griffe finds a public name: a file of the package may have the same one."""
    path = f"{package}.{name}"
    folders = getattr(importlib.import_module(package), "__path__", ())
    return f"{path}.{name}" if any((Path(folder) / f"{name}.py").exists() for folder in folders) else path


def apart(together: re.Match[str]) -> str:
    return "".join(f"    {name}{together[2]}" for name in together[1].split(", "))


class Docstrings(griffe.Extension):
    """Rewrites each docstring once it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        documented = [(package, name) for package in reversed(PACKAGES) for name in public_names(package)]
        self.paths = {name: path_of(package, name) for package, name in documented}

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = ROLE.sub(self.link, obj.docstring.value)
            text = ARGUMENTS.sub(lambda arguments: TOGETHER.sub(apart, arguments[0]), text + "\n")
            obj.docstring.value = re.sub("^Example:$", "Examples:", text, flags=re.MULTILINE).rstrip()

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Gives named tuples the signature that they have."""
        if cls.docstring and any(str(base) == "NamedTuple" for base in cls.bases):
            fields = [(name, field) for name, field in cls.attributes.items() if "instance-attribute" in field.labels]
            lines = [f"    {name}: {f.annotation}{f' = {f.value}' if f.value else ''},\n" for name, f in fields]
            cls.docstring.value += f"\n\n```python\n{cls.name}(\n{''.join(lines)})\n```"

    def link(self, role: re.Match[str]) -> str:
        module, _, name = role[1].rpartition(".")
        known = name in self.paths and module in ("", *PACKAGES)
        return f"[`{role[1]}`][{self.paths[name]}]" if known else f"`{role[1]}`"
