"""Several small arrays to the device or back in one copy: a copy costs the host as much as a kernel launch, and the
device more than a small kernel."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from xllm.device.table import Device

ALIGN = 16  # bytes: kernels read with the widest loads
_TORCH = {"i4": torch.int32, "i8": torch.int64, "f4": torch.float32, "f8": torch.float64}


def upload_all(device: Device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """Each array on the device, of the same shape and dtype; contiguous arrays only.

    On a device that shares the host's memory nothing is copied, so the arrays must not be changed afterwards.
    """
    if not device.asynchronous:
        return [device.upload(array) for array in arrays]
    return _views(device.upload(_pack(arrays)), arrays)


def download_all(device: Device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Each tensor on the host, once a mark made afterwards has been waited for; one copy where all lie in one piece of
    memory. Contiguous tensors only."""
    pieces = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    if not device.asynchronous or len(pieces) > 1 or not all(tensor.nbytes for tensor in tensors):
        return [device.download(tensor) for tensor in tensors]
    begins = [tensor.storage_offset() * tensor.itemsize for tensor in tensors]
    first = min(begins)
    last = max(begin + tensor.nbytes for begin, tensor in zip(begins, tensors, strict=True))
    whole = torch.empty(0, dtype=torch.uint8, device=tensors[0].device)
    whole.set_(tensors[0].untyped_storage(), first, (last - first,), (1,))
    host = device.download(whole)
    return [
        host[begin - first : begin - first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for begin, tensor in zip(begins, tensors, strict=True)
    ]


class PackedInputs:
    """Arrays of fixed shapes that lie together on the device and stay there: what a graph reads, rewritten by one
    copy before each replay, unless they are there already."""

    def __init__(self, device: Device, first: Mapping[str, np.ndarray]):
        self._device = device
        self._names = list(first)
        self._shapes = [array.shape for array in first.values()]
        self._bytes = device.upload(_pack(list(first.values())))
        self.tensors = dict(zip(first, _views(self._bytes, list(first.values())), strict=True))
        self._there: dict[str, np.ndarray] | None = None  # None: not known

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """New numbers for all of them, in submission order."""
        values = [arrays[name] for name in self._names]
        assert [array.shape for array in values] == self._shapes, "a graph's inputs keep their shapes"
        if self._there is None or not all(
            np.array_equal(arrays[name], self._there[name]) for name in self._names
        ):
            self._device.upload_into(self._bytes, _pack(values))
        self._there = dict(arrays)

    def count_up(self, names: Sequence[str]) -> None:
        """What was submitted counts these up by one, on the device."""
        assert self._there is not None
        self._there |= {name: self._there[name] + 1 for name in names}


def _pack(arrays: "list[np.ndarray] | tuple[np.ndarray, ...]") -> np.ndarray:
    packed = np.empty(sum(_room(array) for array in arrays), dtype=np.uint8)
    offset = 0
    for array in arrays:
        packed[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        offset += _room(array)
    return packed


def _views(packed: torch.Tensor, arrays: "list[np.ndarray] | tuple[np.ndarray, ...]") -> list[torch.Tensor]:
    views, offset = [], 0
    for array in arrays:
        dtype = _TORCH[array.dtype.str[1:]]
        if array.nbytes:
            views.append(packed[offset : offset + array.nbytes].view(dtype).view(array.shape))
        else:  # no bytes can be viewed as anything else
            views.append(torch.empty(array.shape, dtype=dtype, device=packed.device))
        offset += _room(array)
    return views


def _room(array: np.ndarray) -> int:
    return -(-array.nbytes // ALIGN) * ALIGN
