"""The plan: the chosen (method, rank, number format) for every site, a small JSON file that people may edit by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tvm_lowrank.errors import UserError
from tvm_lowrank.formats import FLOAT32, FORMATS
from tvm_lowrank.methods.chain import Rank

SCHEMA = 1
DENSE = "dense"


@dataclass(frozen=True)
class Choice:
    """What a site becomes: a method's name and its rank (None for `dense`), and the format that it is computed in."""

    method: str = DENSE
    rank: Rank | None = None
    format: str = FLOAT32

    def __post_init__(self) -> None:
        if (self.method == DENSE) != (self.rank is None):
            raise ValueError(f"method {self.method!r} cannot have rank {self.rank!r}")
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r} is not known; formats are {', '.join(FORMATS)}")

    def __str__(self) -> str:
        shape = self.method if self.rank is None else f"{self.method} {self.rank}"
        return shape if self.format == FLOAT32 else f"{shape} in {self.format}"

    @property
    def float32(self) -> Choice:
        """The same, computed in float32."""
        return Choice(self.method, self.rank)

    def to_json(self) -> dict[str, Any]:
        """What is not said is as in `Choice()`."""
        return {
            "method": self.method,
            **({} if self.rank is None else {"rank": self.rank}),
            **({} if self.format == FLOAT32 else {"format": self.format}),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Choice:
        """The inverse of `to_json`; ValueError, KeyError, TypeError or AttributeError if the entry is not one."""
        rank = entry.get("rank")
        return cls(entry["method"], tuple(rank) if isinstance(rank, list) else rank, entry.get("format", FLOAT32))


def formats_in(plan: Mapping[str, Choice]) -> dict[str, str]:
    """Site to the name of its format, also where it is float32, as `tvm_lowrank.precision.with_formats` takes them."""
    return {site: choice.format for site, choice in plan.items()}


@dataclass(frozen=True)
class Plan(Mapping[str, Choice]):
    """Site id to choice; sites that are not named stay dense, in float32."""

    choices: Mapping[str, Choice] = field(default_factory=dict)

    def __getitem__(self, site: str) -> Choice:
        return self.choices[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)

    @property
    def formats(self) -> dict[str, str]:
        """Site to the name of its format, where that is not float32."""
        return {site: format for site, format in formats_in(self).items() if format != FLOAT32}

    @property
    def decomposed(self) -> Plan:
        """The sites that become chains, without formats."""
        return Plan({site: choice.float32 for site, choice in self.choices.items() if choice.rank is not None})

    def to_json(self) -> str:
        sites = {site: choice.to_json() for site, choice in self.choices.items()}
        return json.dumps({"schema": SCHEMA, "sites": sites}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, name: str = "plan") -> Plan:
        """Parse `to_json`'s output.

        Raises
        ------
        UserError
            If the text is not a plan of this schema; the message names the entry.
        """
        try:
            document = json.loads(text)
            schema, sites = document["schema"], document["sites"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{name} is not a plan: {error}; it needs 'schema' and 'sites'") from error
        if schema != SCHEMA:
            raise UserError(f"{name} has schema {schema!r}; this version reads schema {SCHEMA}")
        choices = {}
        for site, entry in sites:
            try:
                choices[site] = Choice.from_json(entry)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f'{name}: site {site!r} is malformed: {error}; e.g. {{"method": "spatial", "rank": 32}}'
                ) from error
        return cls(choices)

    @classmethod
    def of(cls, plan: Mapping[str, Choice] | Path | str) -> Plan:
        """A plan as users give it: a mapping, or the path of a file."""
        return cls.read(Path(plan)) if isinstance(plan, str | Path) else cls(plan)

    @classmethod
    def read(cls, path: Path) -> Plan:
        try:
            return cls.from_json(path.read_text(), name=str(path))
        except OSError as error:
            raise UserError(f"cannot read plan {path}: {error.strerror}") from error
