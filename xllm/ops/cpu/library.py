"""The C++ kernels as Python callables: plain C functions over tensors' addresses.

A call costs 1 to 2 microseconds, where an operator of PyTorch costs 3 to 9. The callables check nothing; the modules
beside this one know the shapes.
"""

import ctypes
import functools
import logging
from collections.abc import Sequence
from typing import Any

from xllm.ops.cpu.build import BuildError, build

log = logging.getLogger(__name__)

P, N, F, I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int  # noqa: E741  pointer, size, float, int

ROPE = [P, P, P, P, P, F, P, P, N, N, N, N, N, N, N, I]
ATTENTION = [P, N, P, N, N, P, P, P, N, N, F, N, N, N, N, P, I]
SIGNATURES: dict[str, tuple[Sequence[Any], Any]] = {
    "xllm_panel_rows": ([], N),
    "xllm_pack_float32": ([P, P, N, N, N, I], None),
    "xllm_pack_bfloat16": ([P, P, N, N, N, I], None),
    "xllm_embedding_float32": ([P, P, P, N, N, I], None),
    "xllm_embedding_bfloat16": ([P, P, P, N, N, I], None),
    "xllm_linear_gflops": ([I], ctypes.c_double),
    "xllm_linear_float32": ([P, P, P, P, N, N, N, I], None),
    "xllm_linear_bfloat16": ([P, P, P, P, N, N, N, I, I], None),
    "xllm_rms_norm": ([P, P, F, P, N, N, I], None),
    "xllm_add_rms_norm": ([P, P, P, F, P, N, N, I], None),
    "xllm_silu_and_mul": ([P, P, N, N, I], None),
    "xllm_rope_and_cache_float32": (ROPE, None),
    "xllm_rope_and_cache_bfloat16": (ROPE, None),
    "xllm_attention_float32": (ATTENTION, None),
    "xllm_attention_bfloat16": (ATTENTION, None),
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, built first where need be; None, with one warning, where it cannot be had."""
    try:
        library = ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        log.warning(
            "The fast CPU operators are not available, the model runs several times slower in plain PyTorch: %s",
            error,
        )
        return None
    for name, (arguments, result) in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def require() -> ctypes.CDLL:
    """The library for modules that are only imported where it is there."""
    library = load()
    assert library is not None, "xllm.ops.table picks these operators only where the library loads"
    return library
