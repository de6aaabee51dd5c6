"""How much of the memory of a Jetson or a GB10 its system sees: firmware keeps a part, whatever the module is sold with."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SEEN", "Seen", "seen_bytes"]

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Seen:
    """The memory that a system says it has in all, as somebody reports it.

    Args:
        module: The module.
        nbytes: Its memory in bytes.
        source: Where the figure was found.
    """

    module: str
    nbytes: int
    source: str


_LOGS = "lines of `tegrastats` in several public repositories, found by a search for {} (2026-11-30)"
SEEN: dict[tuple[str, int], Seen] = {
    ("8.7", 8): Seen(
        "Orin Nano 8 GB",
        7620 * MIB,
        f"{_LOGS.format('`/7620MB`')}; [another report](https://github.com/henrygd/beszel/issues/286) has 7.44 GiB, one of an "
        "older release [7.3](https://github.com/dusty-nv/jetson-containers/issues/342)",
    ),
    ("8.7", 16): Seen("Orin NX 16 GB", 15656 * MIB, _LOGS.format("`/15656MB`")),
    ("8.7", 32): Seen(
        "AGX Orin 32 GB",
        30697 * MIB,
        "a line of `tegrastats` in [Datadog's test](https://github.com/DataDog/datadog-agent/blob/main/pkg/collector/corechecks/"
        "nvidia/jetson/jetson_test.go), and in a laboratory's page on its 32 GB board",
    ),
    ("8.7", 64): Seen(
        "AGX Orin 64 GB",
        62841 * MIB,
        f"{_LOGS.format('`/62841MB`')}; [Ollama's log](https://github.com/ollama/ollama/issues/3406) has 61.4 GiB",
    ),
    ("11.0", 128): Seen("Thor T5000", 125772 * MIB, _LOGS.format("`/125772MB`")),
    ("12.1", 128): Seen(
        "GB10",
        128_501_256_192,
        "[a log](https://github.com/leptonai/gpud/pull/1170); [another machine](https://github.com/MiaAI-Lab/"
        "GLM-5.3-Flash-EXL3-2x-DGX-Sparks/issues/47) has 121.69 GiB",
    ),
}
"""(compute capability, GB that it is sold with) -> what its system sees. Reports of others; none was read here."""


def seen_bytes(sm: str, gib: int) -> int:
    """Return the bytes that the system of a module sees, for one that is not listed the least share of those that are.

    Args:
        sm: The compute capability.
        gib: The memory that it is sold with, in GiB, which makers write as GB.
    """
    if (sm, gib) in SEEN:
        return SEEN[sm, gib].nbytes
    return min(each.nbytes * gib // size for (_, size), each in SEEN.items())
