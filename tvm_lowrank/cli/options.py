"""Commands whose options are those of a class of `tvm_lowrank.options`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from tvm_lowrank.options import Options, grouped, said

READ_BY_TYPER = (bool, int, float)


def asking(command: Callable[..., None]) -> Callable[..., None]:
    """A command ``f(asked: XOptions, …)`` in the form that typer takes: a parameter for each option of the class.

    What is not given has the default of the class; text is read by the option's own function, whose UserError is one
    line. The command's other parameters are typer's, and come first.
    """
    own = dict(inspect.signature(command, eval_str=True).parameters)
    name = next(name for name, parameter in own.items() if is_dataclass(parameter.annotation))
    options: Any = own.pop(name).annotation
    known = {field.name: field for field in fields(options)}

    @wraps(command)
    def call(**given: Any) -> None:
        beside = {name: given.pop(name) for name in own}
        asked = {name: _value(known[name], value) for name, value in given.items() if value is not None}
        command(**{name: options(**asked)}, **beside)

    parameters = [*own.values(), *_parameters(options, known)]
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    call.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
    return call


def _value(field: Field[Any], given: Any) -> Any:
    read = said(field).read
    return given if read in READ_BY_TYPER else read(given)


def _parameters(options: type[Options], known: dict[str, Field[Any]]) -> Iterator[inspect.Parameter]:
    for name, title in grouped(options).items():
        about = said(known[name])
        if name in options.POSITIONAL:
            info: Any = typer.Argument(help=about.help)
        else:
            flags = (f"--{name.replace('_', '-')}",)  # without it, typer adds a --no- to what is true or false
            info = typer.Option(*flags, help=about.help, envvar=about.environment or None, rich_help_panel=title)
        required, simple = known[name].default is MISSING, about.read in READ_BY_TYPER
        kind: Any = about.read if simple else str
        yield inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[kind if simple or required else kind | None, info],
            default=inspect.Parameter.empty if required else _shown(known[name].default),
        )


def _shown(default: Any) -> Any:
    """A default as `--help` shows it: text, or nothing where only the help can tell."""
    return None if default is None else ",".join(default) if isinstance(default, tuple) else default
