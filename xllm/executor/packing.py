"""Several small arrays to the device in one copy: a copy costs the host as much as a kernel launch."""

from collections.abc import Mapping

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


class PackedInputs:
    """Arrays of fixed shapes that lie together on the device and stay there: what a graph reads, rewritten by one
    copy before each replay."""

    def __init__(self, device: Device, first: Mapping[str, np.ndarray]):
        self._device = device
        self._names = list(first)
        self._shapes = [array.shape for array in first.values()]
        self._bytes = device.upload(_pack(list(first.values())))
        self.tensors = dict(zip(first, _views(self._bytes, list(first.values())), strict=True))

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """New numbers for all of them, in submission order."""
        values = [arrays[name] for name in self._names]
        assert [array.shape for array in values] == self._shapes, "a graph's inputs keep their shapes"
        self._device.upload_into(self._bytes, _pack(values))


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
