"""For the web site: this project's functions and docstrings in the form that griffe, which reads them for mkdocstrings,
expects.

The docstrings say ``name : what it is``, for the signatures have the types. In numpydoc a type would follow the colon.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import MISSING, fields
from typing import Any

import griffe

from tvm_lowrank import options

ASKING = re.compile(r"asking\((\w+)\)")
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


def _written_out(function: griffe.Function, of: type[options.Options]) -> None:
    """Give a function the parameters that its decorator `asking` gives it."""
    known = {field.name: field for field in fields(of)}
    function.parameters = griffe.Parameters(
        *(
            griffe.Parameter(
                name,
                annotation=field.type if isinstance(field.type, str) else inspect.formatannotation(field.type),
                kind=griffe.ParameterKind.keyword_only,
                default=None if field.default is MISSING else repr(field.default),
            )
            for name, field in ((name, known[name]) for name in options.grouped(of))
        )
    )
    if function.docstring is not None:
        function.docstring.value = options.described(function.docstring.value, of)


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if isinstance(obj, griffe.Function):
            for decorator in obj.decorators:
                if given := ASKING.fullmatch(str(decorator.value)):
                    _written_out(obj, getattr(options, given[1]))
        if obj.docstring is not None:
            obj.docstring.value = numpydoc(obj.docstring.value)
