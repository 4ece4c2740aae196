"""Read a compiled TPU program from its text: cycles, kernels, collectives and copies, by scope.

Pure functions on the text of an optimised HLO module. A loop's body appears once in the text, so its
operations are multiplied by the trip count; a loop whose trip count depends on data is counted once and
listed. Only what executes is counted: operations inside a fusion are part of the fusion, except that
collectives inside it are listed too.

Compilers up to libtpu 0.0.42 take an element of a tuple with an instruction, `get-tuple-element(%x),
index=1`; later ones name it where it is used, `%x#1`. `parse` turns the second form into the first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# The compiler marks unknown cycles with 1e20; estimated_cycles beyond this contain such a mark.
SENTINEL = 10**12
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128}
_NOISE = re.compile(
    r"^(jit\(.*\)|while|body|cond|closed_call|shard_map|checkpoint|rematted_computation|remat|scan|branch_\d.*"
    r"|eval_jaxpr|pjit|custom_vjp_call.*|custom_jvp_call.*|vmap\(\)|cond_\d.*|None)$"
)


@dataclass(frozen=True)
class Instruction:
    """One HLO instruction: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool = False


@dataclass(frozen=True)
class Op:
    """An operation that executes `times` times: cycles of XLA code, or flops and bytes of another kind.

    All figures are for one execution on one device. `groups` are a collective's replica groups, or its
    (source, target) pairs; it is `awaited` if the schedule starts nothing beside it. `dispatch` marks
    operations outside the loop over steps; `what` is the JAX primitive.
    """

    name: str
    opcode: str
    kind: str  # "xla", "pallas", "collective", "copy"
    scope: str
    what: str
    times: int
    cycles: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    groups: tuple[tuple[int, ...], ...] = ()
    algorithm: str = ""
    awaited: bool = False
    dispatch: bool = False


@dataclass
class Program:
    """All operations, names of those left out for lack of an estimate, and loops of unknown trip count."""

    ops: list[Op] = field(default_factory=list)
    sentinels: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    kernels_without_estimate: list[str] = field(default_factory=list)


# -------------------------------------------------------------------- text


def shape_bytes(shape: str) -> float:
    """Bytes of an array shape, or of all arrays in a tuple shape, without tile padding."""
    total = 0.0
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        found = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(found.group()) if found else 0)
        total += bits / 8 * math.prod(map(int, dims.split(","))) if dims else bits / 8
    return total


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Parse a module into {computation name: instructions} and the name of the entry computation.

    Raises ValueError if there is no entry, or if an operand names an element that its tuple lacks.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if lines is not None and line.startswith("  "):
            found = _instruction(line)
            if found:
                lines.append(found)
        elif line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            name = re.match(r"(?:ENTRY )?%?([^\s(]+)", line).group(1)  # type: ignore[union-attr]
            lines = computations[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            lines = None
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return {name: _with_elements(found) for name, found in computations.items()}, entry


def _with_elements(instructions: list[Instruction]) -> list[Instruction]:
    """Give every operand `%x#1` the get-tuple-element instruction that older compilers print."""
    shapes, out = {i.name: i.shape for i in instructions}, []
    for i in instructions:
        for operand in i.operands if i.opcode not in ("constant", "parameter") else ():
            source, _, index = operand.partition("#")
            if not index or operand in shapes:
                continue
            shape = shapes.get(source, "")
            for at in re.findall(r"\d+", index):
                shape = _element(shape, int(at))
            if not shape:
                raise ValueError(
                    f"%{operand}, an operand of %{i.name}, is no element of {shapes.get(source)}"
                )
            shapes[operand] = shape
            out.append(Instruction(operand, shape, "get-tuple-element", (source,), f", index={index}"))
        out.append(i)
    return out


def _element(shape: str, index: int) -> str:
    """Return the shape of element `index` of a tuple shape, or "" if there is none."""
    parts, depth, start = [], 0, 1
    for at, char in enumerate(shape):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(char, 0)
        if (char == "," and depth == 1) or (char == ")" and depth == 0):
            parts.append(re.sub(r"^\s*(/\*.*?\*/)?", "", shape[start:at]))
            start = at + 1
    return parts[index] if shape.startswith("(") and index < len(parts) else ""


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    closing = _closing(rest, opening)
    operands = tuple(re.findall(r"%([\w.\-]+(?:#[\d.#]+|#\{[\d,]+\})?)", rest[opening:closing]))
    opcode = rest[:opening]
    if opcode in ("constant", "parameter"):
        operands = (rest[opening + 1 : closing],)
    return Instruction(found[2], shape, opcode, operands, rest[closing + 1 :], bool(found[1]))


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return len(text) - 1


def _called(instruction: Instruction, key: str) -> str:
    found = re.search(rf"\b{key}=%?([\w.\-]+)", instruction.attributes)
    return found[1] if found else ""


def _number(instruction: Instruction, key: str) -> float:
    found = re.search(rf'"{key}":"?(-?[\d.e+]+)', instruction.attributes)
    return float(found[1]) if found else 0.0


def scope_of(instruction: Instruction) -> str:
    """Return an instruction's `named_scope`s, outermost first, such as "mlp/experts"; "" if it has none.

    Slices that a scan over layers takes from stacked weights have the scope "layer slices".
    """
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    parts = [] if not found else found[1].split("/")[:-1]
    names = []
    for part in parts:
        while inner := re.match(r"^(?:transpose|jvp|vmap|remat|checkpoint)\((.*)\)$", part):
            part = inner[1]
        if part and not _NOISE.match(part) and re.match(r"^\w+$", part) and part not in names:
            names.append(part)
    sliced = any(part.startswith("jit(dynamic_index_in_dim)") for part in parts)
    return "/".join(names) or ("layer slices" if sliced else "")


def primitive_of(instruction: Instruction) -> str:
    """Return the JAX primitive that an instruction, or the root of a fusion, came from."""
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return found[1].rsplit("/", 1)[-1] if found else ""


def trip_count(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """Return a loop's trip count, or None if it depends on data.

    Reads XLA's own note, or recognises the condition `counter < constant`, counting from 0.
    """
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if noted:
        return int(noted[1])
    condition = {i.name: i for i in computations.get(_called(loop, "condition"), [])}
    root = next((i for i in condition.values() if i.root), None)
    if root is None or "direction=LT" not in _with_callee(root, computations):
        return None
    operands = [condition[o] for o in root.operands if o in condition]
    limits = [int(o.operands[0]) for o in operands if o.opcode == "constant" and o.operands[0].isdecimal()]
    counters = [o for o in operands if o.opcode == "get-tuple-element"]
    return limits[0] if len(limits) == 1 and len(counters) == 1 else None


def _with_callee(root: Instruction, computations: dict[str, list[Instruction]]) -> str:
    if root.opcode != "fusion":
        return root.attributes if root.opcode == "compare" else ""
    inner = [i for i in computations.get(_called(root, "calls"), []) if i.root]
    return inner[0].attributes if inner and inner[0].opcode == "compare" else ""


def replica_groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """Parse groups of partitions in any XLA notation, or (source, target) pairs; () means all partitions."""
    pairs = re.search(r"source_target_pairs=\{([\d,{}]*)\}", attributes)
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if found := pairs or listed:
        return tuple(tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", found[1]))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims = (tuple(map(int, found[i].split(","))) for i in (1, 2))
        order = tuple(map(int, found[3].split(","))) if found[3] else tuple(range(len(dims)))
        return _chunks(_transposed(dims, order), shape[-1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        axes = re.findall(r"'([^']+)'=(\d+)", found[1])
        names, dims = [a for a, _ in axes], tuple(int(n) for _, n in axes)
        inner = [names.index(a) for a in re.findall(r"'([^']+)'", found[2])]
        order = tuple(i for i in range(len(dims)) if i not in inner) + tuple(inner)
        return _chunks(_transposed(dims, order), math.prod(dims[i] for i in inner))
    return ()


def _transposed(dims: tuple[int, ...], order: tuple[int, ...]) -> list[int]:
    """Flatten the transpose, by `order`, of 0, 1, ... laid out in the shape `dims`."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    out = [0]
    for axis in order:
        out = [base + i * strides[axis] for base in out for i in range(dims[axis])]
    return out


def _chunks(values: list[int], n: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(values[i : i + n]) for i in range(0, len(values), n))


# -------------------------------------------------------------------- program


def read_program(text: str) -> Program:
    """List every operation that one call of the program executes."""
    computations, entry = parse(text)
    program = Program()

    def walk(name: str, times: int, dispatch: bool) -> Iterator[Op]:
        here = {i.name: i for i in computations[name]}
        chains: set[str] = set()
        for i in computations[name]:
            if i.opcode == "while":
                turns = trip_count(i, computations)
                if turns is None:
                    program.loops.append(i.name)
                inside = (times * (turns or 1), dispatch and turns is not None)
                yield from walk(_called(i, "body"), *inside)
            elif i.opcode == "call":
                yield from walk(_called(i, "to_apply"), times, dispatch)
            elif i.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
                names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
                names = names or [_called(i, "true_computation"), _called(i, "false_computation")]
                each = [list(walk(b, times, dispatch)) for b in names if b]
                yield from max(each, key=lambda ops: sum(o.cycles * o.times for o in ops), default=[])
            else:
                yield from _ops(i, here, computations, times, dispatch, program, chains)

    program.ops = list(walk(entry, 1, True))
    return program


def _ops(i, here, computations, times, dispatch, program, chains) -> Iterator[Op]:
    """Yield the operations of one instruction that is not a loop, call or conditional."""
    common = {"name": i.name, "scope": scope_of(i), "what": primitive_of(i), "times": times}
    common["dispatch"] = dispatch
    inner = computations.get(_called(i, "calls"), []) if i.opcode in ("fusion", "async-start") else []
    for found, scope in [(i, here), *((j, {k.name: k for k in inner}) for j in inner)]:
        opcode = found.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            # a collective that overlaps several fusions appears in each of them, with the same chain_id
            started = found.opcode.endswith("-start") or i.opcode == "async-start"
            if chain := re.search(r'chain_id="(\d+)"', found.attributes):
                if chain[1] in chains:
                    continue
                chains.add(chain[1])
            operands = [scope[o].shape for o in found.operands if o in scope]
            if opcode == "ragged-all-to-all":  # the payload fits into the smaller of its two buffers
                operands = [min(operands[:2], key=shape_bytes)]
            if opcode == "all-reduce" and "AllReduceScatterFusion" in i.attributes:
                opcode = "reduce-scatter"  # what the compiler emits for this fusion
            groups = replica_groups(found.attributes)
            algorithm = re.search(r'"emitter":"(\w+)"', found.attributes)
            yield Op(
                **common | {"name": found.name, "scope": scope_of(found) or common["scope"]},
                opcode=opcode,
                kind="collective",
                bytes=sum(map(shape_bytes, operands)),
                groups=groups,
                awaited=not started and chain is None,
                algorithm=algorithm[1] if algorithm else "",
            )
    if i.opcode == "custom-call" and '"tpu_custom_call"' in i.attributes:
        flops, moved = _number(i, "flops"), _number(i, "bytes_accessed")
        if not flops and not moved:  # no cost estimate: count reading its operands and writing its result
            moved = shape_bytes(i.shape) + sum(shape_bytes(here[o].shape) for o in i.operands if o in here)
            program.kernels_without_estimate.append(i.name)
        yield Op(**common, opcode="custom-call", kind="pallas", flops=flops, bytes=moved)
    elif i.opcode in ("copy-start", "slice-start"):
        yield Op(**common, opcode=i.opcode, kind="copy", bytes=shape_bytes(_first(i.shape)))
    elif i.opcode == "async-done" and _on_sparse_core(i, here):  # gathered rows are read and written
        yield Op(**common, opcode="gather", kind="copy", bytes=2 * shape_bytes(i.shape))
    elif cycles := _number(i, "estimated_cycles"):
        if cycles > SENTINEL or cycles < 0:
            program.sentinels.append(i.name)
        else:
            yield Op(**common, opcode=i.opcode, kind="xla", cycles=int(cycles), bytes=shape_bytes(i.shape))
    elif any(j.opcode == "gather" for j in inner):  # rows gathered by a kernel without an estimate
        yield Op(**common, opcode="gather", kind="pallas", bytes=2 * shape_bytes(i.shape))


def _on_sparse_core(done: Instruction, here: dict[str, Instruction]) -> bool:
    """Return True if this async operation was started on a sparse core, which has no cycle estimate."""
    started = done
    while (
        started.opcode in ("async-done", "async-update", "get-tuple-element") and started.operands[0] in here
    ):
        started = here[started.operands[0]]
    return 'async_execution_thread="sparsecore"' in started.attributes


def _first(shape: str) -> str:
    """Return the first array shape of a tuple shape, or ""."""
    found = re.search(r"[a-z]\w*\[[\d,]*\]", shape)
    return found[0] if found else ""
