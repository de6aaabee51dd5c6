"""Build libdvdquant_kernels: ``python kernels/build.py`` (make kernels).

CMakeLists.txt holds the table of sources and architectures. This script reads it and adds what a project with generated
SASS wants: objects cached by the content of everything they depend on, as many compilers at a time as fit into memory,
and a build that fails on spills, on serialized wgmma and on warnings in our own sources.

``--host aarch64`` cross-compiles on x86-64, for a Jetson for instance (make kernels HOST=aarch64 SM="87 110").

``--emulated`` compiles the same kernels with g++ for a CPU (emulator/emulator.h): the whole C ABI on host memory, for
tests. Where a path's main loop is CUTLASS's, plain loops stand in its place.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from ptxas_log import find_faults  # noqa: E402
from toolchain import (  # noqa: E402
    HOSTS,
    BuildError,
    Host,
    Nvcc,
    available_memory,
    find_cutlass,
    find_host_runtime,
    find_nvcc,
    whole_file,
)

DEFAULT_BUILD = HERE.parent / "build" / "kernels"
# The memory of one compiler process in bytes; the largest that was measured is 5.4 GB, for a CUTLASS file.
CUTLASS_MEMORY = 5_500_000_000
# The architecture whose PTX is built in beside its machine code: GPUs that no machine code is for compile that.
PORTABLE = "80"


@dataclass(frozen=True)
class Source:
    """A line of CMakeLists.txt.

    Args:
        path: The file, relative to kernels/.
        families: The architecture families that its device code exists for.
    """

    path: str
    families: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the file's name, which is unique among the sources."""
        return Path(self.path).name

    @property
    def uses_cutlass(self) -> bool:
        """Return whether it includes CUTLASS, itself or through a header of ours."""
        return any("cutlass/" in path.read_text() for path in local_files(HERE / self.path))

    def architectures(self, requested: tuple[str, ...]) -> tuple[str, ...]:
        """Return the architectures that it is compiled for, as in CMakeLists.txt's dvdq_source.

        Args:
            requested: The architectures of the build.
        """
        return tuple(a for f in self.families for a in requested if re.fullmatch(rf"{f}\d?[af]?", a))

    def left_out(self, requested: tuple[str, ...]) -> bool:
        """Return whether none of the architectures runs it, so that it is not compiled.

        Args:
            requested: The architectures of the build.
        """
        return bool(self.families) and not self.architectures(requested)


def read_sources() -> tuple[tuple[str, ...], list[Source]]:
    """Return the default architectures and the sources of CMakeLists.txt.

    Raises:
        BuildError: CMakeLists.txt does not hold them.
    """
    text = (HERE / "CMakeLists.txt").read_text()
    default = re.search(r"^set\(DVDQ_DEFAULT_ARCHITECTURES ([\w ]+)\)", text, re.MULTILINE)
    lines = re.findall(r"^dvdq_source\((\S+?)((?: \w+)*)\)", text, re.MULTILINE)
    if default is None or not lines:
        raise BuildError("kernels/CMakeLists.txt holds no DVDQ_DEFAULT_ARCHITECTURES or no dvdq_source lines")
    return tuple(default[1].split()), [Source(path, tuple(families.split())) for path, families in lines]


def local_files(path: Path) -> list[Path]:
    """Return a file and every header of ours that it includes, directly or not.

    Args:
        path: The file.
    """
    found: dict[Path, None] = {}
    queue = [path]
    while queue:
        current = queue.pop()
        if current in found:
            continue
        found[current] = None
        for name in re.findall(r'^\s*#\s*include "([^"]+)"', current.read_text(), re.MULTILINE):
            for folder in (current.parent, HERE / "include", HERE / "csrc"):
                if (folder / name).is_file():
                    queue.append((folder / name).resolve())
                    break
    return sorted(found)


def content_key(source: Path, command: list[str], compiler: str) -> str:
    """Return a hash of everything that an object depends on: sources and headers of ours, flags, compiler.

    Args:
        source: The source file.
        command: The flags.
        compiler: The version of the compiler.
    """
    digest = hashlib.sha256()
    for part in (compiler, *command):
        digest.update(part.encode() + b"\0")
    for path in local_files(source):
        digest.update(path.relative_to(HERE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def nvcc_flags(
    source: Source,
    architectures: tuple[str, ...],
    cutlass: Path,
    host: Host | None = None,
    left_out: Sequence[str] = (),
) -> list[str]:
    """Return the flags of one source, without its paths; ``-isystem`` keeps CUTLASS's own warnings out.

    Args:
        source: The source.
        architectures: The architectures of the build.
        cutlass: The include folder of CUTLASS.
        host: The processor that the library is for; None means this machine's.
        left_out: The names of the sources that are not compiled.
    """
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    flags += ["-ccbin", host.tool("g++")] if host else []
    flags += ["-I", str(HERE / "include"), "-I", str(HERE / "csrc")]
    if source.uses_cutlass:
        flags += ["--expt-relaxed-constexpr", "-isystem", str(cutlass)]
    if source.name == "plan.cpp":
        built = [*architectures, *(f"compute_{a}" for a in architectures if a == PORTABLE)]
        flags += [f'-DDVDQ_ARCHITECTURES="{";".join(built)}"']
    if source.name == "left_out.cpp":
        flags += [f"-DDVDQ_LEFT_OUT_{Path(name).stem.upper()}" for name in left_out]
    chosen = source.architectures(architectures)
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chosen]
    flags += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in chosen if a == PORTABLE]
    return [*flags, "-Xptxas", "-v"] if chosen else flags


def host_includes(nvcc: Nvcc, host: Host | None) -> list[str]:
    """Return the flags for nvcc's own headers, which it looks for in a folder of the processor that it compiles for.

    Args:
        nvcc: The compiler.
        host: The processor that the library is for; None means this machine's, where nvcc finds them.
    """
    return [word for path in nvcc.includes if host for word in ("-isystem", path)]


def compile_object(
    source: Source,
    architectures: tuple[str, ...],
    nvcc: Nvcc,
    cutlass: Path,
    build: Path,
    host: Host | None = None,
    left_out: Sequence[str] = (),
) -> Path:
    """Return the folder with object.o, log.txt and the cubins of one source, from the cache or compiled now.

    Args:
        source: The source.
        architectures: The architectures of the build.
        nvcc: The compiler.
        cutlass: The include folder of CUTLASS.
        build: The build folder.
        host: The processor that the library is for; None means this machine's.
        left_out: The names of the sources that are not compiled.

    Raises:
        BuildError: The compiler refused, or said something in :func:`find_faults`.
    """
    flags = nvcc_flags(source, architectures, cutlass, host, left_out)
    key = content_key(HERE / source.path, flags, nvcc.version)
    folder = build / "objects" / f"{source.name}-{key}"
    if (folder / "object.o").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{source.name}-") as name:
        work = Path(name)
        (work / "keep").mkdir()
        command = [nvcc.program, *flags, *host_includes(nvcc, host), "--keep", "--keep-dir", str(work / "keep")]
        command += ["-c", str(HERE / source.path), "-o", str(work / "object.o")]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(work)})
        log = done.stdout + done.stderr
        if done.returncode != 0:
            raise BuildError(f"{source.path} does not compile:\n{log[-4000:]}")
        faults = find_faults(log, HERE)
        if faults:
            raise BuildError(f"{source.path} compiles, but:\n    " + "\n    ".join(faults))
        (work / "log.txt").write_text(log)
        for cubin in (work / "keep").glob("*.cubin"):
            # name.compute_80.cubin; just name.cubin where there is one architecture.
            named = re.findall(r"\.(?:compute|sm)_(\w+)", cubin.name)
            cubin.rename(work / f"sm_{named[-1] if named else source.architectures(architectures)[0]}.cubin")
        shutil.rmtree(work / "keep")
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
        work.mkdir()
    return folder


def compile_all(
    sources: list[Source], compile_one: Callable[[Source], Path], jobs: int, describe: str = "kernels"
) -> dict[Source, Path]:
    """Compile every source; the first failure is raised.

    Args:
        sources: The sources.
        compile_one: A function that compiles a source and returns its object or folder.
        jobs: The largest number of compilers at a time; memory may allow fewer for sources with CUTLASS.
        describe: The text of the progress bar.

    Returns:
        The result of ``compile_one`` for each source, in the given order.
    """
    from tqdm import tqdm

    budget = threading.BoundedSemaphore(max(1, int(available_memory() * 0.8 // CUTLASS_MEMORY)))

    def run(source: Source) -> Path:
        """Compile a source; one with CUTLASS waits until there is memory for it."""
        if not source.uses_cutlass:
            return compile_one(source)
        with budget:
            return compile_one(source)

    results: dict[Source, Path] = {}
    # Long ones first.
    queue = sorted(sources, key=lambda s: (not s.uses_cutlass, -len(s.families)))
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(queue), desc=describe, unit="file", disable=None) as bar:
        futures = {pool.submit(run, source): source for source in queue}
        for future in as_completed(futures):
            try:
                results[futures[future]] = future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            bar.update()
            bar.set_postfix_str(futures[future].name)
    return {source: results[source] for source in sources}


def link(nvcc: Nvcc, objects: list[Path], build: Path, host: Host | None = None) -> Path:
    """Link the shared library, and make an archive of the same objects beside it; both are replaced as a whole.

    Args:
        nvcc: The compiler.
        objects: The folders of the objects.
        build: The build folder.
        host: The processor that the library is for; None means this machine's.

    Returns:
        The path of the shared library.

    Raises:
        BuildError: The linker refused.
    """
    library, archive = build / "libdvdquant_kernels.so", build / "libdvdquant_kernels.a"
    inputs = [str(folder / "object.o") for folder in objects]
    compiler = ["-ccbin", host.tool("g++"), *host_includes(nvcc, host)] if host else []
    libraries = [str(find_host_runtime(build, host))] if host else list(nvcc.libraries)
    command = [nvcc.program, *compiler, "-shared", "-cudart", "static", *(f"-L{path}" for path in libraries)]
    # The CUDA runtime inside stays inside: only the ABI is exported.
    with whole_file(library) as temporary:
        run_tool([*command, "-Xlinker", "--exclude-libs,ALL", "-o", str(temporary), *inputs])
    members = build / f".members-{os.getpid()}"
    members.mkdir()
    try:
        for folder in objects:
            shutil.copyfile(folder / "object.o", members / f"{folder.name.rpartition('-')[0]}.o")
        with whole_file(archive) as temporary:
            run_tool(
                [
                    host.tool("ar") if host else "ar",
                    "rcs",
                    str(temporary),
                    *(str(path) for path in sorted(members.iterdir())),
                ]
            )
    finally:
        shutil.rmtree(members)
    return library


def run_tool(command: list[str]) -> None:
    """Run a command.

    Args:
        command: The command and its arguments.

    Raises:
        BuildError: It is not installed, or fails; the text holds its own words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise BuildError(f"{command[0]} was not found; install a C++ compiler and binutils") from None
    if done.returncode != 0:
        raise BuildError(f"{Path(command[0]).name} failed:\n{(done.stdout + done.stderr)[-4000:]}")


EMULATED_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DDVDQ_EMULATE")


def build_emulated(folder: Path | None = None, jobs: int = 1) -> Path:
    """Build libdvdquant_kernels_emulated.so: our kernels' device code on a CPU, behind the same ABI.

    Objects are cached.

    Args:
        folder: The folder of the outputs; None means build/kernels.
        jobs: The number of compilers at a time.

    Returns:
        The path of the library.

    Raises:
        BuildError: There is no C++ compiler, or it refused.
    """
    build = folder or DEFAULT_BUILD
    build.mkdir(parents=True, exist_ok=True)
    _, sources = read_sources()
    compiler = os.environ.get("CXX", "g++")
    chosen = [source for source in sources if not source.uses_cutlass] + [Source("emulator/gemm_reference.cpp", ())]
    flags = [*EMULATED_FLAGS, "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += [
        "-I",
        str(HERE / "include"),
        "-I",
        str(HERE / "csrc"),
        "-I",
        str(HERE / "emulator"),
        '-DDVDQ_ARCHITECTURES="emulated"',
    ]

    def compile_one(source: Source) -> Path:
        """Return the object of a source, from the cache or compiled now."""
        key = content_key(HERE / source.path, flags, compiler)
        target = build / "objects" / f"{source.name}-{key}.o"
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(target) as temporary:
                run_tool([compiler, "-x", "c++", *flags, "-c", str(HERE / source.path), "-o", str(temporary)])
        return target

    objects = compile_all(chosen, compile_one, jobs, "emulated kernels")
    library = build / "libdvdquant_kernels_emulated.so"
    with whole_file(library) as temporary:
        run_tool([compiler, "-shared", "-o", str(temporary), *(str(path) for path in objects.values())])
    return library


def build_kernels(
    build: Path,
    architectures: tuple[str, ...],
    jobs: int,
    fetch_nvcc: bool = False,
    only: tuple[str, ...] = (),
    host: Host | None = None,
) -> tuple[Path | None, dict[Source, Path]]:
    """Build the library for CUDA.

    Args:
        build: The build folder.
        architectures: The architectures, such as "90a"; empty means those of CMakeLists.txt.
        jobs: The number of compilers at a time.
        fetch_nvcc: If there is no nvcc, fetch its wheels into the build folder.
        only: The names of the files to compile; empty means all.
        host: The processor that the library is for; None means this machine's.

    Returns:
        The library (None with ``only``, which compiles some sources and does not link), and each source's object
        folder.

    Raises:
        BuildError: Something is missing or was refused.
    """
    default, sources = read_sources()
    architectures = architectures or default
    for architecture in architectures:
        if not re.fullmatch(r"(8|10|11|12)\d|90a", architecture):
            raise BuildError(
                f"no kernels for architecture {architecture}; available: 80 86 87 89 90a 100 103 110 120 121"
            )
    chosen = [source for source in sources if not only or source.name in only]
    if missing := set(only) - {source.name for source in sources}:
        raise BuildError(
            f"no source named {', '.join(sorted(missing))}; available: {', '.join(s.name for s in sources)}"
        )
    left_out = [source.name for source in chosen if source.left_out(architectures)]
    chosen = [source for source in chosen if source.name not in left_out]
    if not chosen:
        raise BuildError(f"{', '.join(left_out)}: none of {' '.join(architectures)} runs it")
    nvcc = find_nvcc(build, fetch_nvcc)
    cutlass = find_cutlass(build) if any(source.uses_cutlass for source in chosen) else Path()
    objects = compile_all(
        chosen, lambda s: compile_object(s, architectures, nvcc, cutlass, build, host, left_out), jobs
    )
    return (None if only else link(nvcc, list(objects.values()), build, host)), objects


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Parse the options that the build and the SASS check share.

    Args:
        description: The text of the help.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--build", type=Path, help="folder of the outputs (default: build/kernels, or with --host build/kernels-HOST)"
    )
    parser.add_argument("--host", choices=sorted(HOSTS), help="processor to build for (default: this machine's)")
    parser.add_argument(
        "--architectures", nargs="+", default=[], metavar="ARCH", help="default: those of CMakeLists.txt"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="FILE", help="compile these files, do not link")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at a time")
    parser.add_argument(
        "--fetch-nvcc", action="store_true", help="without nvcc, fetch its wheels into the build folder"
    )
    parser.add_argument("--emulated", action="store_true", help="the CPU library for tests, with g++; no CUDA needed")
    arguments = parser.parse_args()
    default = DEFAULT_BUILD.with_name(f"{DEFAULT_BUILD.name}-{arguments.host}") if arguments.host else DEFAULT_BUILD
    arguments.build = (arguments.build or default).resolve()
    arguments.build.mkdir(parents=True, exist_ok=True)
    return arguments


def build_as_asked(arguments: argparse.Namespace) -> tuple[Path | None, dict[Source, Path]]:
    """Build the library for CUDA as the command line asks for it, and return what :func:`build_kernels` returns.

    Args:
        arguments: The result of :func:`parse_arguments`.

    Raises:
        BuildError: Something is missing or was refused.
    """
    return build_kernels(
        arguments.build,
        tuple(arguments.architectures),
        arguments.jobs,
        arguments.fetch_nvcc,
        tuple(arguments.only),
        HOSTS.get(arguments.host or ""),
    )


def main() -> int:
    """Build the library, and return the exit status: 0 built, 2 with a message on stderr."""
    arguments = parse_arguments(__doc__)
    try:
        if arguments.emulated:
            library: Path | None = build_emulated(arguments.build, arguments.jobs)
        else:
            library, _ = build_as_asked(arguments)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if library is not None:
        print(library)
    return 0


if __name__ == "__main__":
    sys.exit(main())
