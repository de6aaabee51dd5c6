"""Whether memory ran out: by the type, the number or the text of a library's error, never by a sentence of ours."""

from __future__ import annotations

import pytest

from dvdquant.errors import EngineError, ResourceError
from dvdquant.system.out_of_memory import is_out_of_memory, ran_out_of_memory


class OutOfMemoryError(RuntimeError):
    """As torch's class is called."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("tried to allocate 2 GiB"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Error Code 2: OutOfMemory (Requested size was 2147483648 bytes.)"),
        ImportError("libx.so: failed to map segment from shared object"),
        RuntimeError("MemoryError"),
    ],
    ids=repr,
)
def test_what_libraries_say(error: Exception) -> None:
    assert is_out_of_memory(error)
    ours = EngineError("it failed")
    assert not is_out_of_memory(ours)
    ours.__cause__ = error
    assert is_out_of_memory(ours)
    outer = EngineError("a step failed")
    outer.__cause__ = ours
    assert is_out_of_memory(outer)


def test_a_sentence_of_ours_is_no_reason() -> None:
    quoted = EngineError("/srv/out of memory/model.onnx is no graph", fix="free memory")
    assert not ran_out_of_memory(quoted)
    quoted.__cause__ = ValueError("no graph")
    assert not ran_out_of_memory(quoted)
    assert is_out_of_memory(EngineError("the engine failed", out_of_memory=True))
    assert not is_out_of_memory(ResourceError("the disk is full"))


def test_a_cause_in_a_circle_ends() -> None:
    one, two = EngineError("one"), EngineError("two")
    one.__cause__, two.__cause__ = two, one
    assert not is_out_of_memory(one)


def test_what_was_handled_before_counts_where_causes_are_asked_for() -> None:
    later = EngineError("it failed")
    later.__context__ = MemoryError()
    assert ran_out_of_memory(later)
    assert not is_out_of_memory(later)
