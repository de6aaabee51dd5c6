"""What an error means for a server: a bad request, a clip that failed once, or a process that must be restarted.

An error of CUDA such as an illegal memory access stays: every later call of the process fails with it, whatever the
request. Such errors come as RuntimeError or ``torch.AcceleratorError``, and the runtime wraps them in EngineError, so
the causes of an error are asked, too. Nothing here imports torch.
"""

from __future__ import annotations

import re
from typing import Literal

from dvdquant.errors import Cancelled, RecipeError, ShapeError, UnsupportedError
from dvdquant.system.out_of_memory import causes, is_out_of_memory

__all__ = ["Fault", "fault_of"]

Fault = Literal["request", "once", "process"]

# Errors of one call, by the text of cudaGetErrorString: the call did nothing, and the context is sound.
_OF_ONE_CALL = (
    "invalid argument",
    "invalid configuration argument",
    "invalid device function",
    "invalid pitch argument",
    "invalid resource handle",
    "no kernel image is available for execution on the device",
    "the provided PTX was compiled with an unsupported toolchain",
    "too many resources requested for launch",
    "too many blocks in cooperative launch",
    "operation not supported",
    "operation not permitted when stream is capturing",
    "operation failed due to a previous error during capture",
    "named symbol not found",
    "device kernel image is invalid",
)
_CODES_OF_ONE_CALL = (1, 2, 9, 12, 98, 200, 209, 222, 400, 500, 701, 720, 801, 900, 901)
# Where torch and TensorRT quote CUDA: everything they quote is taken for lasting, but the errors above.
_QUOTED = re.compile(
    r"CUDA error|CUDA driver error|CUDA kernel errors|Cuda Runtime|Cuda failure|cudaError[A-Z]\w+|CUDA_ERROR_[A-Z_]+"
)
# Texts that say it without the word CUDA. CUBLAS_STATUS_NOT_INITIALIZED mostly is too little memory for its handle.
_LASTING = re.compile(
    r"illegal memory access|device-side assert|uncorrectable ECC|uncorrectable NVLink|unspecified launch failure"
    r"|launch timed out and was terminated|misaligned address|illegal instruction was encountered"
    r"|operation not supported on global/shared address space|invalid program counter|hardware stack error"
    r"|context is destroyed|CUDA-capable device\(s\) is/are busy or unavailable|no CUDA-capable device is detected"
    r"|driver shutting down|GPU has fallen off|(CUBLAS|CUDNN|CUSOLVER)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)",
    re.IGNORECASE,
)


def fault_of(error: BaseException) -> Fault:
    """Return what an error of a generation means for the next one.

    Args:
        error: What was raised, with its causes.

    Returns:
        ``"request"``: the request is wrong, and fails again wherever it is sent; the error's text is for its sender.
        A cancelled request belongs here. ``"once"``: this clip failed, and may succeed later or elsewhere (out of
        memory, NaN, a file that is missing). ``"process"``: this process is broken, and no clip can succeed in it.
    """
    if any(_breaks_process(cause) for cause in causes(error)):
        return "process"
    return "request" if isinstance(error, (Cancelled, RecipeError, ShapeError, UnsupportedError)) else "once"


def _breaks_process(error: BaseException) -> bool:
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return True
    # After a failed allocation the process goes on, with a smaller clip or later.
    if not isinstance(error, Exception) or is_out_of_memory(error):
        return False
    text = str(error)
    # torch.AcceleratorError carries the number of the error.
    code = getattr(error, "error_code", None)
    if type(error).__name__ == "AcceleratorError" and isinstance(code, int) and code:
        return code not in _CODES_OF_ONE_CALL
    if _LASTING.search(text):
        return True
    lower = text.lower()
    return bool(_QUOTED.search(text)) and not any(known.lower() in lower for known in _OF_ONE_CALL)
