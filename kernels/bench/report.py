"""The measurements of a benchmark, their lower bounds, and the table of both. Nothing here needs a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

__all__ = [
    "Machine",
    "Row",
    "Shape",
    "Stage",
    "floor_expand",
    "floor_gemm",
    "floor_rotate_quantize",
    "free_path",
    "to_markdown",
]

Stage = Literal["machine", "RQ", "QL", "RQ+QL", "EX"]


@dataclass(frozen=True)
class Shape:
    """A linear layer on tokens: [m, k] x [n, k]ᵀ.

    Args:
        m: The number of tokens.
        k: The number of input channels.
        n: The number of output channels.
        model: The name of the model.
    """

    m: int
    k: int
    n: int
    model: str = ""

    @property
    def operations(self) -> int:
        """Return the number of multiplications and additions."""
        return 2 * self.m * self.k * self.n

    def __str__(self) -> str:
        return f"{self.model} {self.m}×{self.k}→{self.n}".strip()


@dataclass(frozen=True)
class Machine:
    """The rates measured in the same run, which the floors are made of.

    Args:
        copy: The bytes per second of a device copy, read and written bytes together.
        int8: The operations per second of an 8192³ int8 product; 0 if none could be measured.
        bf16: The same in bf16.
    """

    copy: float
    int8: float
    bf16: float


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        shape: The layer; None for rates of the machine.
        stage: RQ (rotate and quantize), QL (the product on codes), RQ+QL (the layer), EX (a packed weight
            expanded), or machine.
        name: The name of what ran.
        milliseconds: The time; None if it did not run, and ``note`` says why.
        ours: True if it is a kernel of this project.
        floor: The lower bound in milliseconds from the machine's measured rates; None if there is none.
        rate: The achieved rate, in words.
        note: A remark.
        reference: True if ratios of its stage are taken against this row.
    """

    shape: Shape | None
    stage: Stage
    name: str
    milliseconds: float | None
    ours: bool = False
    floor: float | None = None
    rate: str = ""
    note: str = ""
    reference: bool = False


def floor_rotate_quantize(shape: Shape, bytes_per_token: float, scales: int, machine: Machine) -> float:
    """Return the milliseconds to read x (16-bit) and to write codes and fp32 scales once, at the speed of a copy.

    Args:
        shape: The layer.
        bytes_per_token: The bytes of the codes of a token.
        scales: The number of scales of a token.
        machine: The measured rates.
    """
    moved = shape.m * (2 * shape.k + bytes_per_token + 4 * scales)
    return moved / machine.copy * 1e3


def floor_expand(shape: Shape, machine: Machine) -> float:
    """Return the milliseconds to read half a byte a weight and to write one, at the speed of a copy.

    Args:
        shape: The layer.
        machine: The measured rates.
    """
    return 1.5 * shape.n * shape.k / machine.copy * 1e3


def floor_gemm(shape: Shape, bytes_read: float, rate: float, machine: Machine) -> float:
    """Return the milliseconds of a product: the slower of its arithmetic and its traffic at the speed of a copy.

    Args:
        shape: The layer.
        bytes_read: The bytes of both operands. y is written once, 2 bytes an element.
        rate: The operations per second; 0 leaves only the traffic.
        machine: The measured rates.
    """
    arithmetic = shape.operations / rate if rate else 0.0
    return max(arithmetic, (bytes_read + 2 * shape.m * shape.n) / machine.copy) * 1e3


def free_path(folder: Path, date: str, gpu: str, what: str) -> Path:
    """Return ``<date>-<gpu>-<what>.md`` in a folder, or the first with a number behind it that is not there yet.

    Args:
        folder: The folder of the results.
        date: The day.
        gpu: The name of the GPU.
        what: What was run.
    """
    name = f"{date}-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{what}"
    paths = (folder / (f"{name}.md" if number == 1 else f"{name}-{number}.md") for number in count(1))
    return next(path for path in paths if not path.exists())


def to_markdown(rows: Sequence[Row], title: str = "Kernels", environment: Iterable[str] = ()) -> str:
    """Return one table of the rows.

    "of floor" is floor ÷ time; "ours, times faster" is a row's time ÷ that of our reference row of its stage. The
    reference of QL and RQ+QL is the 8-bit activation path. Peers of stage QL do not quantize x; those of RQ+QL do (or
    need not: bf16).

    Args:
        rows: The rows.
        title: The title.
        environment: The lines about machine and software.
    """
    references = {
        (row.shape, row.stage): row.milliseconds for row in rows if row.reference and row.milliseconds is not None
    }
    lines = [f"# {title}", "", *(f"- {line}" for line in environment), ""]
    lines += ["| layer | stage | what | ms | rate | of floor | ours, times faster |", "|---|---|---|---|---|---|---|"]
    previous: Shape | None = None
    for row in rows:
        label = str(row.shape) if row.shape is not None and row.shape != previous else ""
        previous = row.shape
        name = f"**{row.name}**" if row.ours else row.name
        if row.milliseconds is None:
            lines.append(f"| {label} | {row.stage} | {name} | – | {row.note} | – | – |")
            continue
        of_floor = f"{row.floor / row.milliseconds:.0%}" if row.floor is not None else "–"
        base = references.get((row.shape, row.stage))
        faster = f"{row.milliseconds / base:.2f}" if base and not row.reference else "–"
        rate = ", ".join(part for part in (row.rate, row.note) if part)
        lines.append(f"| {label} | {row.stage} | {name} | {row.milliseconds:.4g} | {rate} | {of_floor} | {faster} |")
    return "\n".join(lines) + "\n"
