"""What the benchmarks read and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path | None, default: Any) -> Any:
    """The results of an earlier run, or the default where there are none."""
    return json.loads(path.read_text()) if path and path.exists() else default


def write_json(path: Path | None, result: Any) -> None:
    """Writes results, if there is somewhere to write them."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result) + "\n")


def save(canvas: Any, path: Path, dpi: int) -> None:
    """Writes a figure of matplotlib."""
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=dpi)
