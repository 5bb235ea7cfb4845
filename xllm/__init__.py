"""xLLM: an inference engine for large language models, and the service around it.

Nothing heavy is imported here: names are resolved when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from xllm.core.output import CompletionOutput, RequestOutput
    from xllm.core.sampling import SamplingParams
    from xllm.engine.async_llm import AsyncLLM
    from xllm.engine.beam import BeamSearchParams
    from xllm.engine.llm import LLM

_PUBLIC = {
    "LLM": "xllm.engine.llm",
    "AsyncLLM": "xllm.engine.async_llm",
    "BeamSearchParams": "xllm.engine.beam",
    "SamplingParams": "xllm.core.sampling",
    "RequestOutput": "xllm.core.output",
    "CompletionOutput": "xllm.core.output",
}
__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'xllm' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
