"""The CPU as a device: threads and memory. Its "stream" is the executor's thread: work runs in the order it came."""

import torch


class CpuDevice:
    torch_device = torch.device("cpu")

    def prepare(self, *, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)  # a denormal costs a hundred cycles and no model means one

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        # malloc of this size is mmap: pages become resident when a block is first written
        return torch.empty(shape, dtype=dtype)
