"""Giving a card's memory back while nothing runs, and taking it again: weights rest on the host, the KV cache is dropped.

Tensors stay the objects they are, so nobody who holds one needs to know; only their memory goes and comes. Where it lies
afterwards is another place, so graphs must be forgotten before.
"""

from collections.abc import Iterable

import torch


class Sleeper:
    """Belongs to the executor's thread."""

    def __init__(self, weights: Iterable[torch.Tensor], dropped: Iterable[torch.Tensor]):
        """`dropped` comes back as zeros."""
        self._weights = list(_one_per_storage(weights))
        self._dropped = list(_one_per_storage(dropped))
        self._host: list[torch.Tensor] = []
        self._sizes: list[int] = []

    @property
    def asleep(self) -> bool:
        return bool(self._sizes)

    def sleep(self) -> int:
        """Returns the bytes given back."""
        self._host = [_bytes(tensor).to("cpu", copy=True) for tensor in self._weights]
        everything = [tensor.untyped_storage() for tensor in (*self._weights, *self._dropped)]
        self._sizes = [storage.nbytes() for storage in everything]
        for storage in everything:
            storage.resize_(0)
        return sum(self._sizes)

    def wake(self) -> None:
        """Raises what the device raises where the memory is not there (any more); then all still sleeps."""
        everything = [*self._weights, *self._dropped]
        try:
            for tensor, size in zip(everything, self._sizes, strict=True):
                tensor.untyped_storage().resize_(size)
        except Exception:
            for tensor in everything:
                tensor.untyped_storage().resize_(0)
            raise
        for tensor, rested in zip(self._weights, self._host, strict=True):
            _bytes(tensor).copy_(rested)
        for tensor in self._dropped:
            _bytes(tensor).zero_()
        self._host, self._sizes = [], []


def _one_per_storage(tensors: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    return {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor's memory, whatever part of it the tensor shows."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))
