"""An NVIDIA GPU as a device: one card, one stream, pinned copies both ways."""

from collections.abc import Callable

import numpy as np
import torch


class CudaDevice:
    """The first card that CUDA_VISIBLE_DEVICES leaves."""

    asynchronous = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", 0)

    def prepare(self, *, threads: int) -> None:
        """`threads` is for what little runs on the host."""
        torch.set_num_threads(threads)
        torch.cuda.set_device(self.torch_device)
        # float32 means float32: a checkpoint that asks for it gets exact products, not TF32
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        # zeros, not garbage: some kernels read a tile before they know its length, and NaN times zero is NaN
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def upload(self, array: np.ndarray) -> torch.Tensor:
        # PyTorch keeps a pinned block from reuse until the copy out of it has run
        return torch.from_numpy(array).pin_memory().to(self.torch_device, non_blocking=True)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        return host

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record()
        return event.synchronize
