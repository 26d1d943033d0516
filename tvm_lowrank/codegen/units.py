"""Dot products: instructions that multiply operands of a format, and add the products up in float32 or int32.

TVM's types have no vectors of bfloat16 that reach LLVM: they would become float32 on the way. So such operands are kept
as their bits (uint16), and an instruction is a small function in LLVM IR that the code generator inlines.
"""
# mypy: disable-error-code="valid-type"

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import tvm
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from tvm_lowrank.codegen.kept import SUMS, kept, widened
from tvm_lowrank.formats import FLOAT32, FORMATS, Format


def inlined(target: tvm.target.Target, group: int) -> str:
    """A group of attributes in LLVM IR: functions that have it are inlined, for their processor is their caller's."""
    cpu, features = str(target.attrs.get("mcpu", "")), ",".join(map(str, target.attrs.get("mattr", ())))
    return f'attributes #{group} = {{ alwaysinline nounwind "target-cpu"="{cpu}" "target-features"="{features}" }}'


ELEMENTS = {"bfloat16": "bfloat", "int8": "i8"}  # LLVM's types of what is multiplied


@dataclass(frozen=True)
class Unit:
    """An instruction for dot products of a format.

    It adds to each of ``lanes`` float32 (or int32) numbers ``depth`` products: of ``depth`` numbers that are the same
    for all lanes, and of ``depth`` for each lane. One that has ``rows`` does so for up to as many positions at once,
    and with up to ``steps`` times as many products (see `tvm_lowrank.codegen.tiles`).

    Attributes
    ----------
    format
        The name of the operands' format.
    features
        What the processor must have, in LLVM's words.
    instruction
        LLVM's name of it.
    signed
        Whether bytes that are the same for all lanes are signed; those for each lane always are.
    """

    name: str
    format: str
    features: frozenset[str]
    instruction: str
    lanes: int
    depth: int
    rows: int = 1
    steps: int = 1
    signed: bool = False

    @property
    def element(self) -> str:
        """LLVM's type of an operand."""
        return ELEMENTS[self.format]

    @property
    def left(self) -> str:
        """How the numbers are kept that are the same for all lanes."""
        return self.right if self.signed or not FORMATS[self.format].whole else "uint8"

    @property
    def right(self) -> str:
        """How the numbers are kept of each lane."""
        return kept(self.format)

    @property
    def sums(self) -> str:
        """What is added up."""
        return SUMS if FORMATS[self.format].whole else FLOAT32

    @property
    def function(self) -> str:
        """The name of the function in LLVM IR."""
        return f"tvm_lowrank_{self.name}"

    def code(self, target: tvm.target.Target) -> str:
        """The function in LLVM IR. It is inlined only where its processor and features are those of its caller."""
        count = self.lanes * self.depth
        accumulators, words, operands = (
            f"<{self.lanes} x {'float' if self.sums == FLOAT32 else 'i32'}>",
            f"<{self.lanes} x i32>",
            f"<{count} x {self.element}>",
        )
        types = f"{accumulators}, {operands}, {operands}"
        return f"""
define {accumulators} @{self.function}({accumulators} %sum, {words} %left, {words} %right) #0 {{
  %a = bitcast {words} %left to {operands}
  %b = bitcast {words} %right to {operands}
  %result = call {accumulators} @{self.instruction}({accumulators} %sum, {operands} %a, {operands} %b)
  ret {accumulators} %result
}}
declare {accumulators} @{self.instruction}({types})
{inlined(target, 0)}
"""


UNITS = {
    unit.name: unit
    for unit in (
        Unit(
            name="avx512_bf16",
            format="bfloat16",
            features=frozenset({"avx512bf16"}),
            instruction="llvm.x86.avx512bf16.dpbf16ps.512",
            lanes=16,
            depth=2,
        ),
        Unit(
            name="arm_bf16",
            format="bfloat16",
            features=frozenset({"bf16", "neon"}),
            instruction="llvm.aarch64.neon.bfdot.v4f32.v8bf16",
            lanes=4,
            depth=2,
        ),
        Unit(
            name="amx_bf16",
            format="bfloat16",
            features=frozenset({"amx-bf16", "amx-tile"}),
            instruction="llvm.x86.tdpbf16ps",
            lanes=16,
            depth=2,
            rows=16,
            steps=16,
        ),
        Unit(
            name="avx512_vnni",
            format="int8",
            features=frozenset({"avx512vnni"}),
            instruction="llvm.x86.avx512.vpdpbusd.512",
            lanes=16,
            depth=4,
        ),
        Unit(
            name="avx_vnni",
            format="int8",
            features=frozenset({"avxvnni"}),
            instruction="llvm.x86.avx512.vpdpbusd.256",
            lanes=8,
            depth=4,
        ),
        Unit(
            name="amx_int8",
            format="int8",
            features=frozenset({"amx-int8", "amx-tile"}),
            instruction="llvm.x86.tdpbusd",
            lanes=16,
            depth=4,
            rows=16,
            steps=16,
        ),
        Unit(
            name="arm_dotprod",
            format="int8",
            features=frozenset({"dotprod", "neon"}),
            instruction="llvm.aarch64.neon.sdot.v4i32.v16i8",
            lanes=4,
            depth=4,
            signed=True,
        ),
    )
}
"""By name."""


@dataclass(frozen=True)
class Rounding:
    """An instruction that rounds ``lanes`` float32 numbers to a format: the nearest, ties to even.

    The attributes are those of `Unit`.
    """

    name: str
    format: str
    features: frozenset[str]
    instruction: str
    element: str
    lanes: int

    @property
    def function(self) -> str:
        """The name of the function in LLVM IR: of where the result goes, and where the numbers are."""
        return f"tvm_lowrank_round_{self.name}"

    def code(self, target: tvm.target.Target) -> str:
        """The function in LLVM IR; see `Unit.code`."""
        numbers, result = f"<{self.lanes} x float>", f"<{self.lanes} x {self.element}>"
        return f"""
define void @{self.function}(ptr %to, ptr %from) #1 {{
  %numbers = load {numbers}, ptr %from, align 4
  %result = call {result} @{self.instruction}({numbers} %numbers)
  store {result} %result, ptr %to, align 2
  ret void
}}
declare {result} @{self.instruction}({numbers})
{inlined(target, 1)}
"""


ROUNDINGS = (
    Rounding(
        name="avx512_bf16",
        format="bfloat16",
        features=frozenset({"avx512bf16"}),
        instruction="llvm.x86.avx512bf16.cvtneps2bf16.512",
        element="bfloat",
        lanes=16,
    ),
)


def rounding_of(target: tvm.target.Target, format: str, lanes: int) -> Rounding | None:
    """The instruction that rounds so many numbers to a format on a target, if it has one."""
    features = set(map(str, tvm.target.codegen.llvm_get_cpu_features(target)))
    found = (r for r in ROUNDINGS if (r.format, r.lanes) == (format, lanes) and r.features <= features)
    return next(found, None)


# features of processors that add and multiply vectors of a format as fast as their bytes are fewer
ARITHMETIC = {"fullfp16": "float16", "avx512fp16": "float16"}


def units_of(target: tvm.target.Target) -> list[Unit]:
    """Those that a target's processor has; of instructions that differ in their lanes only, the widest."""
    features = set(map(str, tvm.target.codegen.llvm_get_cpu_features(target)))
    widest: dict[tuple[str, int], Unit] = {}
    for unit in UNITS.values():
        alike = widest.get((unit.format, unit.rows))
        if unit.features <= features and (alike is None or unit.lanes > alike.lanes):
            widest[unit.format, unit.rows] = unit
    return list(widest.values())


def usable(units: Iterable[Unit], format: str, *, inner: int, groups: int) -> list[Unit]:
    """Those that a convolution in a format may use, whose groups read ``inner`` channels each.

    Channels are added where they are no multiple of the depth, but not to each of several groups.
    """
    return [unit for unit in units if unit.format == format and (groups == 1 or inner % unit.depth == 0)]


def formats_of(target: tvm.target.Target) -> list[Format]:
    """The formats that a target's processor computes in faster than in float32, after that."""
    features = map(str, tvm.target.codegen.llvm_get_cpu_features(target))
    arithmetic = [ARITHMETIC[feature] for feature in features if feature in ARITHMETIC]
    dots = [unit.format for unit in units_of(target)]
    return [FORMATS[name] for name in dict.fromkeys([FLOAT32, *dots, *arithmetic])]


def depth_of(units: Iterable[Unit]) -> int:
    """By what the input channels of a group are divided, so that any of these instructions may be used."""
    return max((unit.depth for unit in units), default=1)


def lanes_of(format: str, lanes: int) -> int:
    """How many numbers are added up at once where a vector has so many ``lanes`` of float32."""
    found = FORMATS[format]
    return lanes if found.summed == 1 else lanes * FORMATS[FLOAT32].bytes // found.bytes


@cache
def tensor_intrin(name: str) -> str:
    """The name of TVM's intrinsic for a unit, which is registered."""
    unit = UNITS[name]
    lanes, depth, function = unit.lanes, unit.depth, unit.function
    left, right, sums = unit.left, unit.right, unit.sums

    def product(a: Any, b: Any) -> Any:
        return widened(a, unit.format) * widened(b, unit.format)

    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((depth,), left, offset_factor=1),
        B: T.Buffer((lanes, depth), right, offset_factor=1),
        C: T.Buffer((lanes,), sums, offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:depth], B[0:lanes, 0:depth])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, depth):
                    with T.sblock("update"):
                        lane, step = T.axis.remap("SR", [i, k])
                        C[lane] = C[lane] + product(A[step], B[lane, step])

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((depth,), left, offset_factor=1),
        B: T.Buffer((lanes, depth), right, offset_factor=1),
        C: T.Buffer((lanes,), sums, offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:depth], B[0:lanes, 0:depth])
            T.writes(C[0:lanes])
            word = T.reinterpret(A.vload([0], f"{left}x{depth}"), dtype="int32")
            C[T.ramp(T.int32(0), 1, lanes)] = T.call_extern(
                function,
                C.vload([0], dtype=f"{sums}x{lanes}"),
                T.broadcast(word, lanes),
                T.reinterpret(B.vload([0, 0], dtype=f"{right}x{lanes * depth}"), dtype=f"int32x{lanes}"),
                dtype=f"{sums}x{lanes}",
            )

    intrinsic = f"tvm_lowrank.{name}"
    TensorIntrin.register(intrinsic, description, implementation)
    return intrinsic
