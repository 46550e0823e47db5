"""Reads a compiled TPU program's text: how many cycles, bytes and collectives a device executes, loops multiplied out.

The compiler writes its own estimate of cycles into each fusion; collectives and kernels (Pallas) carry none. The text
names neither the trip counts of loops nor what crosses slices: both are derived here.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s4": 0.5, "u4": 0.5, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4,
              "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Instructions that move nothing through memory themselves.
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call", "iota",
        "after-all", "partition-id", "replica-id", "optimization-barrier", "copy-done", "async-done", "async-start",
        "all-gather-done", "all-reduce-done", "collective-permute-done"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: element type, dimensions, and whether it lies in memory on the chip rather than in HBM."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def size(self) -> float:
        """Bytes."""
        return math.prod(self.dims) * ITEM_BYTES.get(self.dtype, 4)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `text` is what follows the opcode."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    text: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands, in order."""
        return tuple(re.findall(r"%([\w.\-]+)", self.text[: _closing(self.text)]))

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs."""
        return tuple(name for group in _CALLED.findall(self.text) for name in re.findall(r"%([\w.\-]+)", group))

    @property
    def cycles(self) -> int:
        """The compiler's estimate, 0 where it makes none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found.group(1)) if found else 0

    @property
    def size(self) -> float:
        """Bytes of the result in HBM."""
        return sum(shape.size for shape in self.shapes if not shape.on_chip)


def _closing(text: str) -> int:
    """Where the parenthesis of the operands closes."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    return len(text)


class Module:
    """A compiled program.

    Attributes:
      computations: instructions of each computation, by name.
      entry: name of the one that is run.
    """

    def __init__(self, text: str):
        """Parses the text of a compiled program (`compiled.as_text()`)."""
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.split("\n"):
            header = _COMPUTATION.match(line)
            if header:
                current = self.computations.setdefault(header.group(2), [])
                if header.group(1):
                    self.entry = header.group(2)
                continue
            found = _INSTRUCTION.match(line)
            if found:
                name, shapes, opcode, rest = found.groups()
                parsed = tuple(Shape(dtype, tuple(int(d) for d in dims.split(",") if d), "S(1)" in (layout or ""))
                               for dtype, dims, layout in _SHAPE.findall(shapes))
                current.append(Instruction(name, opcode, parsed, rest, line.lstrip().startswith("ROOT ")))

    def trip_count(self, loop: Instruction, otherwise: int) -> int:
        """Iterations of a while loop that counts up to a constant; `otherwise` where its bound is computed."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known.group(1))
        condition = self.computations[re.search(r"condition=%([\w.\-]+)", loop.text).group(1)]
        by_name = {instruction.name: instruction for instruction in condition}
        root = next(instruction for instruction in condition if instruction.is_root)
        if root.opcode == "compare" and "direction=LT" in root.text:
            for operand in root.operands:
                bound = by_name[operand]
                while bound.opcode in ("copy", "bitcast"):
                    bound = by_name[bound.operands[0]]
                if bound.opcode == "constant":
                    return int(re.match(r"\d+", bound.text).group())
        return otherwise

    def executed(self, otherwise: int = 1) -> list[tuple[Instruction, str, int]]:
        """(instruction, its computation, how often it is executed) of all but the insides of fusions.

        Args:
          otherwise: iterations of loops whose bound is computed.
        """
        found: list[tuple[Instruction, str, int]] = []

        def visit(name: str, times: int) -> None:
            for instruction in self.computations[name]:
                found.append((instruction, name, times))
                if instruction.opcode == "while":
                    body = re.search(r"body=%([\w.\-]+)", instruction.text).group(1)
                    visit(body, times * self.trip_count(instruction, otherwise))
                elif instruction.opcode in ("call", "conditional", "async-start"):
                    # Of several branches only the first runs: that of decoding that computes the whole canvas.
                    for called in instruction.called[:1]:
                        visit(called, times)

        visit(self.entry, 1)
        return found

    def buffers(self) -> list[tuple[str, Instruction, Shape]]:
        """(computation, instruction, array) of all that is made outside of a fusion, arguments included."""
        fused = {called for instructions in self.computations.values() for i in instructions if i.opcode == "fusion"
                 for called in i.called}
        return [(name, i, shape) for name, instructions in self.computations.items() if name not in fused
                for i in instructions for shape in i.shapes]

    def origins(self, chosen: Callable[[Instruction], bool]) -> dict[tuple[str, str], int]:
        """What the result of each executed instruction is made of, by (computation, instruction).

        0: constants alone; CHOSEN: parameters of the program that are `chosen`, and constants; OTHER: something else
        too. Results are followed through tuples and round loops.
        """
        found: dict[tuple[str, str], int] = {}

        def visit(name: str, arguments: list[Origin]) -> Origin:
            values: dict[str, Origin] = {}
            for i in self.computations[name]:
                operands = [values[operand] for operand in i.operands if operand in values]
                value: Origin = max(map(_most, operands), default=0)
                if i.opcode == "parameter":
                    value = arguments[int(re.match(r"\d+", i.text).group())]
                elif i.opcode == "tuple":
                    value = tuple(operands)
                elif i.opcode == "get-tuple-element" and isinstance(operands[0], tuple):
                    value = operands[0][int(re.search(r"index=(\d+)", i.text).group(1))]
                elif i.opcode == "optimization-barrier":
                    value = operands[0]
                elif i.opcode == "call":
                    value = visit(i.called[0], operands)
                elif i.opcode == "while":
                    body, before = re.search(r"body=%([\w.\-]+)", i.text).group(1), None
                    value = operands[0]
                    while value != before:
                        before, value = value, _join(value, visit(body, [value]))
                values[i.name] = value
                found[name, i.name] = _most(value)
                if i.is_root:
                    root = value
            return root

        inputs = {int(re.match(r"\d+", i.text).group()): CHOSEN if chosen(i) else OTHER
                  for i in self.computations[self.entry] if i.opcode == "parameter"}
        visit(self.entry, [inputs[number] for number in sorted(inputs)])
        return found


CHOSEN, OTHER = 1, 2
Origin = Any  # 0, CHOSEN or OTHER, or a tuple of origins


def _most(origin: Origin) -> int:
    return max(map(_most, origin), default=0) if isinstance(origin, tuple) else origin


def _join(one: Origin, other: Origin) -> Origin:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return tuple(_join(a, b) for a, b in zip(one, other, strict=True))
    return max(_most(one), _most(other))


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device executes in one run of a program.

    Attributes:
      cycles: estimated by the compiler, kernels and collectives left out.
      hbm_bytes: read and written between memory and the chip, kernels included.
      ici_bytes: that a device sends within its slice, for the best algorithm of each collective.
      dcn_bytes: that a device sends to other slices.
      collectives: result bytes by kind.
      kernels: how often each Pallas kernel is called, by name.
    """

    cycles: float
    hbm_bytes: float
    ici_bytes: float
    dcn_bytes: float
    collectives: dict[str, float]
    kernels: dict[str, int]


def work(module: Module, num_devices: int, num_slices: int = 1, otherwise: int = 1) -> Work:
    """Adds up what a device executes; see `Module.executed` for loops whose bound is computed."""
    cycles = hbm = ici = dcn = 0.0
    collectives: dict[str, float] = collections.defaultdict(float)
    kernels: dict[str, int] = collections.defaultdict(int)
    by_computation = {name: {i.name: i for i in instructions} for name, instructions in module.computations.items()}
    for instruction, computation, times in module.executed(otherwise):
        cycles += times * instruction.cycles
        if instruction.opcode not in FREE:
            hbm += times * _memory_traffic(module, instruction, by_computation[computation])
        if 'custom_call_target="tpu_custom_call"' in instruction.text:
            kernels[re.sub(r"[.\d]+$", "", instruction.name)] += times
        for kind, size, text in _collectives(module, instruction):
            group, crossing = _group(text, num_devices, num_slices)
            collectives[kind] += times * size
            # Over several slices: first inside each, then every device exchanges its own part with those of the others.
            inside = max(group // crossing, 1)
            dcn += times * size * _share_sent(kind, crossing) / inside
            ici += times * size * (_share_sent(kind, inside) if crossing == 1 or inside > 1 else 0.0)
    return Work(cycles, hbm, ici, dcn, dict(collectives), dict(kernels))


def _share_sent(kind: str, group: int) -> float:
    """What a device sends for a collective of `group` devices at least, as a multiple of the bytes of its result."""
    if group == 1:
        return 0.0
    return {"all-reduce": 2 * (group - 1) / group, "reduce-scatter": group - 1, "collective-permute": 1}.get(
        kind, (group - 1) / group)


def _collectives(module: Module, instruction: Instruction) -> list[tuple[str, float, str]]:
    """(kind, bytes of the result, text) of the collectives that an instruction starts, inside a fusion or not."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        shapes = instruction.shapes
        if instruction.opcode.endswith("-start") and len(shapes) > 1:
            shapes = shapes[len(shapes) // 2 :] if kind != "collective-permute" else shapes[1:2]
        return [(kind, sum(shape.size for shape in shapes), instruction.text)]
    if instruction.opcode != "fusion":
        return []
    return [found for called in instruction.called for inner in module.computations[called]
            if inner.opcode != "fusion" for found in _collectives(module, inner)]


def _group(text: str, num_devices: int, num_slices: int) -> tuple[int, int]:
    """(devices that take part in a collective together, slices that they lie in)."""
    per_slice = num_devices // num_slices
    first: list[int] | np.ndarray
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*(?:, device_ids=\([^)]*\))?\s*\{([^}]*)\}", text):
        axes = re.findall(r"'([\w]+)'=(\d+)", found.group(1))
        ids = np.arange(math.prod(int(size) for _, size in axes)).reshape([int(size) for _, size in axes])
        wanted = re.findall(r"'([\w]+)'", found.group(2))
        first = ids[tuple(slice(None) if name in wanted else 0 for name, _ in axes)].reshape(-1)
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
    """Bytes that an instruction reads and writes in HBM; of an array that it slices, the slice only."""
    read = {name: siblings[name].size for name in instruction.operands if name in siblings}
    written = instruction.size
    if instruction.opcode == "dynamic-slice":
        return 2 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2 * read.get(instruction.operands[1], 0.0)
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.called[0]]
        parameters = {int(re.match(r"\d+", i.text).group()): i.name for i in inside if i.opcode == "parameter"}
        for index, operand in enumerate(instruction.operands):
            users = [i for i in inside if parameters.get(index) in i.operands]
            if operand in read and users and all(
                    i.opcode == "dynamic-slice" or (i.opcode == "dynamic-update-slice"
                                                    and i.operands[0] == parameters[index]) for i in users):
                read[operand] = sum(i.size for i in users if i.opcode == "dynamic-slice")
        updates = [i for i in inside if i.opcode == "dynamic-update-slice"]
        if updates:
            sizes = {i.name: i.size for i in inside}
            written = sum(sizes.get(i.operands[1], 0.0) for i in updates)
    return written + sum(read.values())
