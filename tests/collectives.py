"""Reading the collectives of a compiled program: what crosses devices, and how many bytes."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_LINE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One operation between devices.

    Attributes:
      kind: One of `KINDS`.
      shapes: The dtype and shape of each of its results, on one device.
      devices: The number of devices that take part together.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    devices: int

    @property
    def entries(self) -> int:
        return sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def bytes(self) -> int:
        """The bytes of the results."""
        return sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in self.shapes)

    @property
    def sent(self) -> float:
        """The bytes that a device sends, in a ring where there is a choice."""
        share = (self.devices - 1) / self.devices
        return {
            "all-reduce": 2 * share * self.bytes,
            "all-gather": share * self.bytes,
            "reduce-scatter": (self.devices - 1) * self.bytes,
            "all-to-all": share * self.bytes,
            "collective-permute": self.bytes,
        }[self.kind]


def collectives(compiled: Any) -> list[Collective]:
    """The collectives of a compiled function, those between one device and itself left out."""
    found = []
    for line in compiled.as_text().splitlines():
        match = _LINE.search(line)
        if not match:
            continue
        result, kind, start = match.groups()
        shapes = [
            (dtype, tuple(map(int, filter(None, sizes.split(",")))))
            for dtype, sizes in _SHAPE.findall(result)
        ]
        if start and kind != "all-reduce":  # Its operands come first.
            shapes = shapes[len(shapes) // 2 :]
        devices = _devices(line)
        if devices > 1:
            found.append(Collective(kind, tuple(shapes), devices))
    return found


def _devices(line: str) -> int:
    grid = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if grid:
        return int(grid.group(2))
    named = re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", line)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)))
    groups = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if groups:
        return len(groups.group(1).split(","))
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs:
        return 1 + pairs.group(1).count("},{")
    raise ValueError(f"No groups of devices in: {line}")
