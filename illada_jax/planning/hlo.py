"""Reads the text of a compiled TPU program: the cycles, bytes and collectives that a device executes, loops unrolled.

The compiler writes its own estimate of cycles into each fusion; collectives and kernels (Pallas) carry none. The text
gives neither all trip counts of loops nor the collectives that cross slices: both are derived here.
"""

import collections
import dataclasses
import enum
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s4": 0.5, "u4": 0.5, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4,
              "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Opcodes that move nothing through memory themselves.
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call", "iota",
        "after-all", "partition-id", "replica-id", "optimization-barrier", "copy-done", "async-done", "async-start",
        "all-gather-done", "all-reduce-done", "collective-permute-done"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: element type, dimensions, and True if it is in on-chip memory rather than in HBM."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def size(self) -> float:
        """Bytes."""
        return math.prod(self.dims) * ITEM_BYTES.get(self.dtype, 4)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `text` is the rest of the line after the opcode."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    text: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands, in order."""
        depths = itertools.accumulate(((letter == "(") - (letter == ")") for letter in self.text), initial=1)
        end = next((position for position, depth in enumerate(depths) if not depth), len(self.text))
        return tuple(re.findall(r"%([\w.\-]+)", self.text[:end]))

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls."""
        return tuple(name for group in _CALLED.findall(self.text) for name in re.findall(r"%([\w.\-]+)", group))

    @property
    def number(self) -> int:
        """The position of a parameter, or the value of an integer constant."""
        return int(re.match(r"\d+", self.text).group())

    def attribute(self, name: str) -> str | None:
        """The value of an attribute such as `index` or `body`; None if it is absent."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return found.group(1) if found else None

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 if there is none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found.group(1)) if found else 0

    @property
    def size(self) -> float:
        """Bytes of the result in HBM."""
        return sum(shape.size for shape in self.shapes if not shape.on_chip)


class Origin(enum.IntEnum):
    """The inputs that a value depends on."""

    CONSTANT = 0  # constants only
    CHOSEN = 1  # chosen parameters of the program, and constants
    OTHER = 2  # anything else


class Module:
    """A compiled program."""

    def __init__(self, text: str):
        """Parses the text of a compiled program (`compiled.as_text()`)."""
        self.computations: dict[str, dict[str, Instruction]] = {}  # instructions in order, by name
        self.entry = ""  # the computation that is run
        current: dict[str, Instruction] = {}
        for line in text.split("\n"):
            header = _COMPUTATION.match(line)
            if header:
                current = self.computations.setdefault(header.group(2), {})
                if header.group(1):
                    self.entry = header.group(2)
                continue
            found = _INSTRUCTION.match(line)
            if found:
                name, shapes, opcode, rest = found.groups()
                parsed = tuple(Shape(dtype, tuple(int(d) for d in dims.split(",") if d), "S(1)" in (layout or ""))
                               for dtype, dims, layout in _SHAPE.findall(shapes))
                current[name] = Instruction(name, opcode, parsed, rest, line.lstrip().startswith("ROOT "))

    def trip_count(self, loop: Instruction, default: int) -> int:
        """Iterations of a while loop that counts up to a constant; `default` if its bound is computed."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known.group(1))
        condition = self.computations[loop.attribute("condition")]
        root = next(instruction for instruction in condition.values() if instruction.is_root)
        if root.opcode == "compare" and root.attribute("direction") == "LT":
            for operand in root.operands:
                bound = condition[operand]
                while bound.opcode in ("copy", "bitcast"):
                    bound = condition[bound.operands[0]]
                if bound.opcode == "constant":
                    return bound.number
        return default

    def executed(self, name: str, default_trip_count: int = 1,
                 times: int = 1) -> Iterator[tuple[Instruction, str, int]]:
        """Yields (instruction, its computation, number of executions) of `times` runs of the computation `name`.

        Instructions inside fusions are left out. Loops whose bound is computed have `default_trip_count` iterations.
        """
        for instruction in self.computations[name].values():
            yield instruction, name, times
            if instruction.opcode == "while":
                iterations = times * self.trip_count(instruction, default_trip_count)
                yield from self.executed(instruction.attribute("body"), default_trip_count, iterations)
            elif instruction.opcode in ("call", "conditional", "async-start"):
                # Only the first branch counts: in decoding it is the one that computes the whole canvas.
                for called in instruction.called[:1]:
                    yield from self.executed(called, default_trip_count, times)

    def buffers(self) -> list[tuple[str, Instruction, Shape]]:
        """(computation, instruction, array) for every array outside fusions, arguments included."""
        fused = {called for instructions in self.computations.values() for i in instructions.values()
                 if i.opcode == "fusion" for called in i.called}
        return [(name, i, shape) for name, instructions in self.computations.items() if name not in fused
                for i in instructions.values() for shape in i.shapes]

    def origins(self, chosen: Callable[[Instruction], bool]) -> dict[tuple[str, str], Origin]:
        """The origin of each executed instruction's result, by (computation, instruction), through tuples and loops.

        Parameters of the program have the origin CHOSEN if `chosen` is true of them, else OTHER.
        """
        found: dict[tuple[str, str], Origin] = {}

        def visit(name: str, arguments: list[_Origins]) -> _Origins:
            values: dict[str, _Origins] = {}
            for i in self.computations[name].values():
                operands = [values[operand] for operand in i.operands if operand in values]
                value: _Origins = max(map(_most, operands), default=Origin.CONSTANT)
                if i.opcode == "parameter":
                    value = arguments[i.number]
                elif i.opcode == "tuple":
                    value = tuple(operands)
                elif i.opcode == "get-tuple-element" and isinstance(operands[0], tuple):
                    value = operands[0][int(i.attribute("index"))]
                elif i.opcode == "optimization-barrier":
                    value = operands[0]
                elif i.opcode == "call":
                    value = visit(i.called[0], operands)
                elif i.opcode == "while":
                    value, before = operands[0], None
                    while value != before:
                        before, value = value, _join(value, visit(i.attribute("body"), [value]))
                values[i.name] = value
                found[name, i.name] = _most(value)
                if i.is_root:
                    root = value
            return root

        inputs = {i.number: Origin.CHOSEN if chosen(i) else Origin.OTHER
                  for i in self.computations[self.entry].values() if i.opcode == "parameter"}
        visit(self.entry, [inputs[number] for number in sorted(inputs)])
        return found


_Origins = Any  # an Origin, or a (nested) tuple of them


def _most(origins: _Origins) -> Origin:
    return max(map(_most, origins), default=Origin.CONSTANT) if isinstance(origins, tuple) else origins


def _join(one: _Origins, other: _Origins) -> _Origins:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return tuple(_join(a, b) for a, b in zip(one, other, strict=True))
    return max(_most(one), _most(other))


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one device in one run of a program."""

    cycles: float  # the compiler's estimate, without kernels and collectives
    hbm_bytes: float  # read from and written to HBM, kernels included
    ici_bytes: float  # sent within the slice, by the best algorithm of each collective
    dcn_bytes: float  # sent to other slices
    collectives: dict[str, float]  # result bytes by kind
    kernels: dict[str, int]  # calls of each Pallas kernel


def work(module: Module, num_devices: int, num_slices: int = 1, default_trip_count: int = 1) -> Work:
    """Adds up the work of a device; for `default_trip_count` see `Module.executed`."""
    cycles = hbm = ici = dcn = 0.0
    collectives: collections.Counter[str] = collections.Counter()
    kernels: collections.Counter[str] = collections.Counter()
    for instruction, computation, times in module.executed(module.entry, default_trip_count):
        cycles += times * instruction.cycles
        if instruction.opcode not in FREE:
            hbm += times * _memory_traffic(module, instruction, module.computations[computation])
        if 'custom_call_target="tpu_custom_call"' in instruction.text:
            kernels[re.sub(r"[.\d]+$", "", instruction.name)] += times
        for kind, size, text in _collectives(module, instruction):
            group, crossing = _group(text, num_devices, num_slices)
            collectives[kind] += times * size
            # Over several slices: first inside each, then every device exchanges its part with its peers in the others.
            inside = max(group // crossing, 1)
            dcn += times * size * _share_sent(kind, crossing) / inside
            ici += times * size * (_share_sent(kind, inside) if crossing == 1 or inside > 1 else 0.0)
    return Work(cycles, hbm, ici, dcn, dict(collectives), dict(kernels))


def _share_sent(kind: str, group: int) -> float:
    """The least that a device sends in a collective of `group` devices, as a multiple of the result's bytes."""
    if group == 1:
        return 0.0
    return {"all-reduce": 2 * (group - 1) / group, "reduce-scatter": group - 1, "collective-permute": 1}.get(
        kind, (group - 1) / group)


def _collectives(module: Module, instruction: Instruction) -> list[tuple[str, float, str]]:
    """(kind, result bytes, text) of the collectives that an instruction starts, itself or inside a fusion."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        shapes = instruction.shapes
        if instruction.opcode.endswith("-start") and len(shapes) > 1:
            shapes = shapes[len(shapes) // 2 :] if kind != "collective-permute" else shapes[1:2]
        return [(kind, sum(shape.size for shape in shapes), instruction.text)]
    if instruction.opcode != "fusion":
        return []
    return [found for called in instruction.called for inner in module.computations[called].values()
            if inner.opcode != "fusion" for found in _collectives(module, inner)]


def _group(text: str, num_devices: int, num_slices: int) -> tuple[int, int]:
    """(number of devices in a group of a collective, number of slices that they span)."""
    per_slice = num_devices // num_slices
    first: list[int] | np.ndarray
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*(?:, device_ids=\([^)]*\))?\s*\{([^}]*)\}", text):
        axes = re.findall(r"'([\w]+)'=(\d+)", found.group(1))
        ids = np.arange(math.prod(int(size) for _, size in axes)).reshape([int(size) for _, size in axes])
        grouped = re.findall(r"'([\w]+)'", found.group(2))
        first = ids[tuple(slice(None) if name in grouped else 0 for name, _ in axes)].reshape(-1)
    elif found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims, order = ([int(x) for x in (group or "").split(",") if x] for group in found.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        first = (ids.transpose(order) if order else ids).reshape(shape)[0]
    elif found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", text):
        first = [int(x) for x in found.group(1).split(",")]
    else:
        first = range(num_devices)
    return len(first), len({int(device) // per_slice for device in first})


def _memory_traffic(module: Module, instruction: Instruction, siblings: dict[str, Instruction]) -> float:
    """Bytes that an instruction reads and writes in HBM; for an array that it slices, those of the slice only."""
    read = {name: siblings[name].size for name in instruction.operands if name in siblings}
    written = instruction.size
    if instruction.opcode == "dynamic-slice":
        return 2 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2 * read.get(instruction.operands[1], 0.0)
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.called[0]]
        parameters = {i.number: i.name for i in inside.values() if i.opcode == "parameter"}
        for index, operand in enumerate(instruction.operands):
            users = [i for i in inside.values() if parameters.get(index) in i.operands]
            if operand in read and users and all(
                    i.opcode == "dynamic-slice" or (i.opcode == "dynamic-update-slice"
                                                    and i.operands[0] == parameters[index]) for i in users):
                read[operand] = sum(i.size for i in users if i.opcode == "dynamic-slice")
        updates = [i for i in inside.values() if i.opcode == "dynamic-update-slice"]
        if updates:
            written = sum(inside[i.operands[1]].size for i in updates)
    return written + sum(read.values())
