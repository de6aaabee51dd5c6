"""Run the numeric tests as other processors would: with instruction sets, thread counts and machine code of fewer features.

    python tests/support/run_variants.py                       every variant, one after the other
    python tests/support/run_variants.py threads-1 no-simd     some
    python tests/support/run_variants.py --list
    python tests/support/run_variants.py threads-3 -- tests/model/test_layers.py -k merged

A bound that was read off one machine fails here before it fails on another one. What follows ``--`` is passed to pytest,
instead of the files of ``NUMERIC``, or of ``COMPILED`` where a variant changes numba's code alone. A variant that is what
this processor does anyway is said and not run. Each set of numba's features has its own cache of compiled loops: machine
code for one processor must not be taken by another.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

NUMERIC = [
    "arq",
    "bgr",
    "bgr_device",
    "numba_rows",
    "gptq",
    "gbs",
    "hadamard",
    "kernel_layers",
    "kernels_emulated",
    "kernels_gemm",
    "layers",
    "lowering",
    "lowering_nvfp4",
    "modulation",
    "hessian",
    "onnx_graphs",
    "packing",
    "passes",
    "quality_peers",
    "quality_shapes",
    "quality_simulate",
    "quant_linear_op",
    "quantize",
    "quantizer_kernels",
    "precision",
    "repack",
    "sessions",
    "shift_and_signs",
    "switching",
    "verify_layers",
]
"""Files whose tests compare numbers. transformer_dropin is none: it asks what is accepted, and computes what sessions does."""

COMPILED = [
    "arq",
    "bgr",
    "bgr_device",
    "numba_rows",
    "gptq",
    "hessian",
    "quantize",
    "quantizer_kernels",
    "shift_and_signs",
]
"""The files of ``NUMERIC`` that judge loops which numba compiles. Everything else takes their result as it is."""

NO_NUMBERS = ("test_bad_inputs_of_other_families", "test_a_session_of_one_width_holds_one_form")
"""Tests of these files that cost seconds and compare no numbers: refusals, and what is held in memory."""

NEEDS = {"onednn-amx": "amx_tile"}
"""Variant -> the flag of a processor on which it differs from the plain run."""


def _threads(count: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    return dict.fromkeys(names, str(count))


_GENERIC = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}

VARIANTS: dict[str, dict[str, str]] = {
    **{f"threads-{n}": _threads(n) for n in (1, 2, 3, 4)},
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    # oneDNN takes the highest set the processor has, up to this one: the last is where matrix products of bf16 use tiles.
    "onednn-sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "onednn-avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "onednn-amx": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
    "numba-generic": _GENERIC,
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},
    # Everything lowered at once, with one thread and with an odd number of them.
    "no-simd": {
        **_threads(1), **_GENERIC, "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE",
    },
    "old-3-threads": {
        **_threads(3), **_GENERIC, "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE",
    },
}  # fmt: skip


def _tests(settings: dict[str, str]) -> list[str]:
    """Return pytest's arguments for what a variant can change."""
    files = COMPILED if all(name.startswith("NUMBA_CPU") or name == "NUMBA_CACHE_DIR" for name in settings) else NUMERIC
    paths = [str(next((ROOT / "tests").rglob(f"test_{name}.py"))) for name in files]
    return ["-m", "not slow and not stress", "-k", f"not ({' or '.join(NO_NUMBERS)})", *paths]


def _processor_flags() -> set[str]:
    """Return the features that Linux lists for the first processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def main() -> int:
    """Run the variants that are named, all by default; returns 1 where a test failed in one of them."""
    names = sys.argv[1:]
    arguments: list[str] = []
    if "--" in names:
        cut = names.index("--")
        names, arguments = names[:cut], names[cut + 1 :]
    if "--list" in names:
        for name, settings in VARIANTS.items():
            print(f"{name:16}{' '.join(f'{k}={v}' for k, v in settings.items())}")
        return 0
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        print(f"no such variant: {', '.join(unknown)}; there are {', '.join(VARIANTS)}", file=sys.stderr)
        return 2
    results = []
    with tempfile.TemporaryDirectory(prefix="dvdquant-variants-") as folder:
        for name in names or VARIANTS:
            if name in NEEDS and NEEDS[name] not in _processor_flags():
                print(f"== {name}: not run, this processor has no {NEEDS[name]}, so it is the plain run", flush=True)
                continue
            settings = dict(VARIANTS[name])
            if "NUMBA_CPU_NAME" in settings:
                settings["NUMBA_CACHE_DIR"] = f"{folder}/numba"
            print(f"== {name}: {' '.join(f'{k}={v}' for k, v in settings.items())}", flush=True)
            start = time.monotonic()
            command = [sys.executable, "-m", "pytest", "-q", *(arguments or _tests(settings))]
            code = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, check=False).returncode
            results.append((name, code, time.monotonic() - start))
    print()
    for name, code, seconds in results:
        print(f"{'passed' if code == 0 else 'FAILED':8}{name:16}{seconds:6.0f} s")
    return int(any(code for _, code, _ in results))


if __name__ == "__main__":
    sys.exit(main())
