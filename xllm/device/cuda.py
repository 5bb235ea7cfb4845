"""An NVIDIA GPU as a device: one card, one stream for the work and one for copies beside it, pinned copies both ways."""

import gc
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch

from xllm.device.pages import PageSpace
from xllm.device.pages_cuda import CudaPages
from xllm.device.table import LANES, Graph
from xllm.device.virtual import VirtualRange
from xllm.device.virtual_cuda import CudaRange


class CudaMark:
    """An event in the current stream."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()

    def since(self, earlier: "CudaMark") -> float:
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1e3


class _Registered(mmap.mmap):
    """Host memory that the driver knows, until the last tensor in it has gone."""

    def register(self) -> torch.Tensor:
        memory = torch.frombuffer(self, dtype=torch.uint8)  # holds on to `self`, and so does every view of it
        cudart: Any = torch.cuda.cudart()
        failure = int(cudart.cudaHostRegister(memory.data_ptr(), len(self), 0))
        if failure:
            raise RuntimeError(
                f"CUDA error {failure}: {len(self) / 2**30:.1f} GiB of host memory cannot be pinned"
            )
        self._undo = partial(cudart.cudaHostUnregister, memory.data_ptr())
        return memory

    def __del__(self) -> None:
        if hasattr(self, "_undo"):
            self._undo()  # before the memory is unmapped, which is what happens next


class CudaDevice:
    """The first card that CUDA_VISIBLE_DEVICES leaves."""

    asynchronous = True

    def __init__(self) -> None:
        # nvidia-smi counts cards in this order, and the facts are its
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        self.torch_device = torch.device("cuda", 0)
        self._pool: Any = None  # the memory of all graphs; made when the card is opened

    def prepare(self, *, threads: int) -> None:
        """`threads` is for what little runs on the host."""
        torch.set_num_threads(threads)
        torch.cuda.set_device(self.torch_device)
        self._pool = torch.cuda.graph_pool_handle()
        self._capturing = torch.cuda.Stream(self.torch_device)
        # 0 is the lowest priority there is, and that of the ordinary stream too; copies run on engines of their own
        self._sides = [torch.cuda.Stream(self.torch_device, priority=0) for _ in range(LANES)]
        # float32 means float32: a checkpoint that asks for it gets exact products, not TF32
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        # zeros, not garbage: kernels read whole tiles and mask them, and no mistake there may become a NaN
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def reserve(self, nbytes: int) -> VirtualRange:
        return CudaRange(nbytes, self.torch_device)

    def reserve_pages(self, page_bytes: int, pages: int, places: int) -> PageSpace:
        return CudaPages(page_bytes, pages, places, self.torch_device)

    def upload(self, array: np.ndarray) -> torch.Tensor:
        # PyTorch keeps a pinned block from reuse until the copy out of it has run
        return torch.from_numpy(array).pin_memory().to(self.torch_device, non_blocking=True)

    def upload_into(self, target: torch.Tensor, array: np.ndarray) -> None:
        target.copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        return host

    def mark(self) -> "CudaMark":
        return CudaMark()

    @contextmanager
    def beside(self, after: CudaMark | None, lane: int = 0) -> Iterator[None]:
        # The event was recorded before it came here, so the side stream waits for what it marks, on the card and not in
        # this thread. Which stream is current is a thread's own affair: other threads go on submitting to theirs. The
        # memory copied lives as long as the engine, so the allocator need not be told of its use in another stream.
        side = self._sides[lane]
        if after is not None:
            side.wait_event(after._event)
        with torch.cuda.stream(side):
            yield

    def pinned(self, nbytes: int) -> torch.Tensor:
        # not by torch.empty(pin_memory=True), which takes the next power of two: of 40 GiB it makes 64
        memory = _Registered(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_DONTFORK)  # a child's copy on write would move our pages away from the card
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)  # far fewer pages to pin
        return memory.register()

    def is_lost(self, error: Exception) -> bool:
        # such an error stays with the context, so every later call raises it again; others, lack of memory or a broken
        # capture, have passed
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def memory(self) -> tuple[int, int]:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return free, total

    def peak(self) -> int:
        most, now = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most - now

    def release(self, keep: int = 0) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if keep:
            torch.empty(
                keep, dtype=torch.uint8, device=self.torch_device
            )  # gone at once, and kept by PyTorch
        self._pool = torch.cuda.graph_pool_handle()  # a pool whose graphs have gone cannot be used again

    def capture(self, work: Callable[[], tuple[torch.Tensor, ...]]) -> Graph:
        """After a run for real, which compiles kernels and makes workspaces: neither may happen inside a capture.

        All graphs draw on one pool, so their memory is that of the largest and not the sum; they run one at a time.
        """
        work()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._capturing):
            # thread-local: other threads of the process may use the card meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = work()
            except BaseException:
                with suppress(RuntimeError):  # the capture is broken, as the exception on its way says
                    graph.capture_end()
                raise
            graph.capture_end()
        return Graph(graph.replay, outputs)
