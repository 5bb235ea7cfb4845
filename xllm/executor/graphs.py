"""Captured steps by their shape: made on first use or ahead of it, replayed with fresh inputs."""

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from xllm.device.table import Device, Graph
from xllm.executor.packing import PackedInputs

log = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Shape:
    """A step of a fixed shape, ready to be captured."""

    key: Hashable
    what: str  # for people: "steps of 8 sequences"
    blank: Callable[[], Arrays]  # inputs that do no harm, all of the spare slot; made when it is captured
    step: Callable[[Mapping[str, torch.Tensor]], tuple[torch.Tensor, ...]]  # reads only memory that stays
    counts_up: tuple[str, ...] = ()  # inputs that the step itself counts up by one


@dataclass(frozen=True, slots=True)
class _Captured:
    inputs: PackedInputs
    graph: Graph


class GraphTable:
    """Belongs to the executor's thread. A capture that fails is told once; its steps run eagerly from then on."""

    def __init__(self, device: Device):
        self._device = device
        self._captured: dict[Hashable, _Captured] = {}
        self._failed: set[Hashable] = set()
        self.replays = 0
        self.failures = 0

    def __contains__(self, key: Hashable) -> bool:
        """Whether there is nothing left to do for this shape."""
        return key in self._captured or key in self._failed

    def can_replay(self, key: Hashable) -> bool:
        """Whether a replay of this shape costs nothing but itself."""
        return key in self._captured

    def capture(self, shape: Shape) -> None:
        if shape.key in self:
            return
        inputs = PackedInputs(self._device, shape.blank())
        try:
            graph = self._device.capture(lambda: shape.step(inputs.tensors))
        except Exception as e:
            if self._device.is_lost(e):
                raise
            self._failed.add(shape.key)
            self.failures += 1
            log.warning("no graph for %s, they run kernel by kernel and slower: %s", shape.what, e)
        else:
            self._captured[shape.key] = _Captured(inputs, graph)

    def replay(self, shape: Shape, arrays: Arrays) -> tuple[torch.Tensor, ...] | None:
        """The step's outputs, good until the next replay of any graph; None where it has to run eagerly."""
        self.capture(shape)
        captured = self._captured.get(shape.key)
        if captured is None:
            return None
        captured.inputs.write(arrays)
        captured.graph.replay()
        captured.inputs.count_up(shape.counts_up)
        self.replays += 1
        return captured.graph.outputs

    def forget(self) -> None:
        """Drop all graphs, because what they point at goes away."""
        self._captured.clear()
