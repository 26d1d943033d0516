"""Python objects that the user names on the command line: ``file.py:name`` or ``pkg.module:name``."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import sys
import traceback
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

from tvm_lowrank.errors import UserError


def is_reference(text: str) -> bool:
    """Whether a text has the form ``file.py:name`` or ``pkg.module:name``."""
    source, _, name = text.rpartition(":")
    return bool(source) and all(part.isidentifier() for part in name.split("."))


def load_object(reference: str) -> Any:
    """The object that ``file.py:name`` or ``pkg.module:name`` refers to; ``name`` may be dotted.

    The folder of the file (or the current one, for a module) goes to the front of ``sys.path``, as Python does for a
    script, so that the user's code finds its neighbours.

    Raises
    ------
    UserError
        If the file, the module or the name does not exist, or importing it fails.
    """
    if not is_reference(reference):
        raise UserError(f"{reference!r} does not name a Python object; write file.py:name or package.module:name")
    source, _, name = reference.rpartition(":")
    module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        public = [key for key in vars(module) if not key.startswith("_")][:8]
        raise UserError(f"{source} has no {name!r}; it defines {', '.join(public) or 'nothing'}") from None


def absolute(reference: str) -> str:
    """The reference with its file's path made absolute, so that it means the same in any folder."""
    source, _, name = reference.rpartition(":")
    return f"{Path(source).resolve()}:{name}" if source.endswith(".py") else reference


def summary(error: BaseException) -> str:
    """An exception in the user's code as one line: type, first line of the message, and where it was raised."""
    lines = str(error).strip().splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}{where}"


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"no such file: {path}; check the path before the colon")
    path = path.resolve()
    # unique per path: two files called model.py must not be taken for each other, nor for an installed module
    name = f"tvm_lowrank_user_{zlib.crc32(bytes(path)):08x}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    _search_first(path.parent)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"cannot import {path}: {summary(error)}; correct the file") from error
    return module


def _load_module(name: str) -> ModuleType:
    _search_first(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise UserError(f"no module named {error.name!r}; install it, or give the path of a .py file") from error
        raise UserError(f"cannot import {name}: {summary(error)}; install what it needs") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"cannot import {name}: {summary(error)}; correct the module") from error
