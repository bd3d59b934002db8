"""What a compiled program sends over the network, read from its text."""

import math
import re
from collections import Counter
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

SCATTERED = "all-reduce-scatter"
"""How libtpu writes a reduce-scatter: an all-reduce in a computation of this name, each device keeping its part."""

WHOLE = {"all-reduce": 2}
"""How often the bytes of a collective go over a device's link, where that is not once (a ring)."""


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in a program."""

    count: int
    """How many run in one execution."""
    bytes: int
    """Of the arrays on one device, where they are whole: after a gather, before a scatter."""


def collectives(hlo: str) -> dict[str, Traffic]:
    """The collectives of an optimized HLO module by kind; what is in the loop of a scan counts once a turn."""
    computations, entry = _computations(hlo)
    partitions = re.search(r"\bnum_partitions=(\d+)", hlo[: hlo.find("\n")])
    everyone = int(partitions[1]) if partitions else 1
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()

    def visit(name: str, turns: int) -> None:
        for line in computations.get(name, ()):
            kind, size = _collective(line, everyone)
            if kind:
                kind = "reduce-scatter" if kind == "all-reduce" and name.startswith(SCATTERED) else kind
                counts[kind] += turns
                sizes[kind] += turns * size
            trips = _trips(line, computations) if " while(" in line else 1
            for called in _called(line):
                visit(called, turns * trips)

    visit(entry, 1)
    return {kind: Traffic(counts[kind], sizes[kind]) for kind in KINDS if counts[kind]}


def sent(traffic: dict[str, Traffic]) -> int:
    """Bytes that each device sends, by rings."""
    return sum(WHOLE.get(kind, 1) * one.bytes for kind, one in traffic.items())


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs: as XLA notes it, or what it counts to, from 0 on. 1 where neither is said."""
    known = re.search(r'"known_trip_count":\s*\{"n":\s*"(\d+)"', line)
    if known:
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    lines = lines + [inner for one in lines for name in _called(one) for inner in computations.get(name, [])]
    limits = [found for one in lines if (found := _constant(one)) is not None]
    return -(-max(limits, default=1) // _stride(line, computations))


def _stride(line: str, computations: dict[str, list[str]]) -> int:
    """What a loop counts by: libtpu's rings take two turns at once. 1 where it is not plain to see."""
    condition, body = (
        computations.get(found[1], []) if (found := re.search(rf"\b{part}=%?([\w.\-]+)", line)) else []
        for part in ("condition", "body")
    )
    compared = [found[1] for one in condition if (found := re.search(r"get-tuple-element\(.*index=(\d+)", one))]
    made = {found[1]: one for one in body if (found := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", one))}
    after = _operands(next((one for one in body if one.lstrip().startswith("ROOT ")), ""), "tuple")
    if len(compared) != 1 or int(compared[0]) >= len(after):
        return 1
    added = _operands(made.get(after[int(compared[0])], ""), "add")
    return next((step for name in added if (step := _constant(made.get(name, "")))), 1)


def _operands(line: str, operation: str) -> list[str]:
    """The names of what an instruction takes, if it is this operation."""
    found = re.search(rf" {operation}\(([^)]*)\)", line)
    return re.findall(r"%([\w.\-]+)", found[1]) if found else []


def _constant(line: str) -> int | None:
    """The value of an instruction that is a constant integer."""
    found = re.search(r"= [su](?:32|64)\[\]\S* constant\((\d+)\)", line)
    return int(found[1]) if found else None


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that is run."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif name and line.startswith(" "):
            found[name].append(line)
    return found, entry


def _collective(line: str, everyone: int) -> tuple[str, int]:
    """(kind, bytes where it is whole) of an instruction; ('', 0) for any other, and for a start that has its done."""
    found = re.match(rf"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start|-done)?\(", line)
    if found is None:
        return "", 0
    sizes = [_bytes(dtype, dims) for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,]*)\]", found[1])]
    kind, half = found[2], found[3]
    if kind == "reduce-scatter":  # a start gives what it takes, whole, before its results
        whole = sum(sizes[: len(sizes) // 2]) if half == "-start" else sum(sizes) * (_group(line) or everyone)
        return ("", 0) if half == "-done" else (kind, whole)
    return ("", 0) if half == "-start" else (kind, sum(sizes))


def _group(line: str) -> int:
    """How many devices a collective is among; 0 where it is among all."""
    shape = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if shape:
        return int(shape[1])
    first = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return first[1].count(",") + 1 if first else 0


def _bytes(dtype: str, dims: str) -> int:
    digits = re.search(r"\d+", dtype)  # pred has none, and a byte
    return math.prod(int(n) for n in dims.split(",") if n) * int(digits[0] if digits else 8) // 8


def _called(line: str) -> list[str]:
    """The computations that an instruction runs; not what a reduction applies to two numbers."""
    if "-done(" in line or "-update(" in line:
        return []
    names = re.findall(r"\b(?:body|calls|true_computation|false_computation)=%?([\w.\-]+)", line)
    branches = re.search(r"branch_computations=\{([^}]*)\}", line)
    names += re.findall(r"[\w.\-]+", branches[1]) if branches else []
    return names + (re.findall(r"\bto_apply=%?([\w.\-]+)", line) if " call(" in line else [])
