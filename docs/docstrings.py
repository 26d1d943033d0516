"""For the web site: this project's docstrings in the form that griffe, which reads them for mkdocstrings, expects.

The docstrings say ``name : what it is``, for the signatures have the types. In numpydoc a type would follow the colon.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

SECTION = re.compile(r"^(?=\w+\n-{3,}$)", re.MULTILINE)
ITEM = re.compile(r"^(\w+(?:, \w+)*) : (.+)$", re.MULTILINE)


def numpydoc(text: str) -> str:
    """A docstring in which descriptions stand below the names of parameters and attributes, and below a return type.

    A colon alone is a return type that griffe takes from the signature.
    """
    before, *sections = SECTION.split(text)
    return before + "".join(map(_section, sections))


def _section(text: str) -> str:
    title, _, rest = text.partition("\n")
    dashes, _, body = rest.partition("\n")
    if title in ("Parameters", "Attributes"):
        body = ITEM.sub(r"\1\n    \2", body)
    elif title == "Returns":
        body = ":\n" + textwrap.indent(body, "    ")
    return "\n".join((title, dashes, body))


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = numpydoc(obj.docstring.value)
