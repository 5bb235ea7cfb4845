"""How the next token of every sequence is chosen, on the device and for the whole batch at once.

Shapes: R rows of a step, one per sequence that samples; A, B or P of them that share a trait; V tokens of the
vocabulary; K candidates of a row; S slots.
"""

from xllm.executor.sampling.sampled import Fetched, Sampled
from xllm.executor.sampling.sampler import Sampler

__all__ = ["Fetched", "Sampled", "Sampler"]
