"""Build the kernels and check their machine code: ``python kernels/check_sass.py`` (make kernels-check).

Every kernel must hold the tensor core instruction that its path promises, and no access to local memory. The table says
what was found. A kernel that its architecture never runs (s4 outside SM 8.x) is listed as such.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from build import Source, build_as_asked, parse_arguments  # noqa: E402
from ptxas_log import Kernel, demangle, read_kernels  # noqa: E402
from toolchain import BuildError, find_nvdisasm  # noqa: E402


@dataclass(frozen=True)
class Promise:
    """The instruction that the kernels of one file must contain.

    Args:
        source: The name of the file.
        kernel: A regular expression on the readable name of the kernel.
        instruction: A regular expression on the opcode, such as IMMA....S8.
        runs_on: A regular expression on the architectures whose plan ever launches the kernel.
    """

    source: str
    kernel: str
    instruction: str
    runs_on: str = ".*"


PROMISES = (
    Promise("rotate_quantize.cu", r"^strip::", r"HMMA\.16816\.F32"),
    Promise("fused_quantize.cu", "", r"HMMA\.16816\.F32"),
    # Looked up and not computed: a division for each weight would take longer than the memory.
    Promise("packed_weight.cu", r"expand_packed", r"PRMT"),
    Promise("mma_grouped.cu", r"Kind\)[01]>", r"IMMA\.16832\.S8\.S8"),
    Promise("mma_grouped.cu", r"Kind\)[23]>", r"IMMA\.16864\.S4\.S4", r"sm_8"),
    Promise("sm80_gemm_s4.cu", "", r"IMMA\.16864\.S4\.S4", r"sm_8"),
    Promise("sm80_gemm_s8.cu", "", r"IMMA\.16832\.S8\.S8"),
    Promise("sm90a_gemm_s8.cu", "", r"IGMMA\.64x\d+x32\.S8\.S8"),
    Promise("sm90a_gemm_e4m3.cu", "", r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3"),
)
_MATRIX = re.compile(r"^[A-Z]*MMA\b")
_LOCAL = re.compile(r"^(LDL|STL)\b")


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture, and its faults.

    Args:
        source: The name of the file.
        kernel: The kernel and its resources.
        name: Its readable name.
        instructions: The number of times each opcode occurs.
        faults: The broken promises, in words.
        runs: True if the architecture ever launches it.
    """

    source: str
    kernel: Kernel
    name: str
    instructions: Counter[str]
    faults: tuple[str, ...]
    runs: bool

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the table: file, kernel, architecture, registers, shared memory, spills, instructions."""
        matrix = ", ".join(f"{count} {op}" for op, count in sorted(self.instructions.items()) if _MATRIX.match(op))
        resources = (str(self.kernel.registers), str(self.kernel.shared), str(self.kernel.spills))
        found = matrix if self.runs else f"never launched here ({matrix or 'no tensor core instruction'})"
        return self.source, self.name, self.kernel.architecture, *resources, found or "-"


def read_opcodes(sass: str) -> dict[str, Counter[str]]:
    """Count the opcodes, with their modifiers, of each kernel of a disassembly.

    Args:
        sass: The text of ``nvdisasm -c``.

    Returns:
        Mangled name of the kernel -> opcode -> number of occurrences.
    """
    found: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in sass.splitlines():
        if match := re.match(r"^\.text\.(\S+):", line):
            current = found.setdefault(match[1], Counter())
        elif match := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[\w]+)*)", line):
            current[match[1]] += 1
    return found


def examine(source: Source, folder: Path, nvdisasm: str) -> list[Row]:
    """Return the rows of one compiled source.

    Args:
        source: The source.
        folder: The folder of its object, log and cubins.
        nvdisasm: The path of the disassembler.

    Raises:
        BuildError: The disassembler failed, or a cubin is missing.
    """
    kernels = read_kernels((folder / "log.txt").read_text())
    names = demangle(k.name for k in kernels)
    opcodes: dict[tuple[str, str], Counter[str]] = {}
    for cubin in folder.glob("*.cubin"):
        done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(f"nvdisasm failed on {source.name} for {cubin.stem}:\n{done.stderr.strip()[-2000:]}")
        opcodes |= {(name, cubin.stem): counter for name, counter in read_opcodes(done.stdout).items()}
    rows = []
    for kernel in kernels:
        found = opcodes.get((kernel.name, kernel.architecture))
        if found is None:
            raise BuildError(f"{source.name}: no machine code of {names[kernel.name]} for {kernel.architecture}")
        rows.append(judge(source.name, kernel, names[kernel.name], found))
    return rows


def judge(source: str, kernel: Kernel, name: str, found: Counter[str]) -> Row:
    """Compare a kernel with the promises for it.

    Args:
        source: The name of the file.
        kernel: The kernel and its resources.
        name: Its readable name.
        found: The number of times each opcode occurs.
    """
    faults, runs = [], True
    for promise in PROMISES:
        if promise.source != source or not re.search(promise.kernel, name):
            continue
        runs = re.match(promise.runs_on, kernel.architecture) is not None
        if runs and not any(re.match(promise.instruction, op) for op in found):
            faults.append(f"no instruction {promise.instruction}")
    local = sum(count for op, count in found.items() if _LOCAL.match(op))
    if runs and (local or kernel.spills):
        faults.append(f"{local} accesses to local memory, {kernel.spills} bytes of spills")
    return Row(source, kernel, name, found, tuple(faults), runs)


def print_table(rows: list[Row]) -> None:
    """Print the rows, with columns as wide as their widest cell.

    Args:
        rows: The rows.
    """
    table: list[tuple[str, ...]] = [
        ("file", "kernel", "arch", "registers", "static shared", "spills", "tensor core instructions")
    ]
    table += [row.cells() for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def main() -> int:
    """Check the kernels, and return the exit status: 0 all promises kept, 1 some broken, 2 the build failed."""
    arguments = parse_arguments(__doc__)
    try:
        library, objects = build_as_asked(arguments)
        nvdisasm = find_nvdisasm(arguments.build)
        rows = [row for source, folder in objects.items() for row in examine(source, folder, nvdisasm)]
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(rows)
    faults = [f"{r.source} {r.name} {r.kernel.architecture}: {fault}" for r in rows for fault in r.faults]
    for fault in faults:
        print(f"FAULT  {fault}", file=sys.stderr)
    size = f"; {library.name} {library.stat().st_size / 1e6:.1f} MB" if library else ""
    print(f"{len(rows)} kernels, {len(faults)} faults{size}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
