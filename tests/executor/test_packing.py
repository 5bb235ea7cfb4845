import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from xllm.device.reference import ReferenceDevice
from xllm.device.table import open_device
from xllm.executor.packing import ALIGN, download_all, upload_all

ARRAYS = st.sampled_from(["int32", "int64", "float32", "float64"]).flatmap(
    lambda dtype: arrays(dtype, array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=9))
)


@given(given=st.lists(ARRAYS, min_size=1, max_size=6), device=st.sampled_from(["cpu", "reference"]))
def test_every_array_arrives_as_it_was(given, device):
    for array, tensor in zip(given, upload_all(open_device(device), *given), strict=True):
        assert tensor.shape == array.shape
        assert np.array_equal(tensor.numpy(), array, equal_nan=True)
        assert str(tensor.dtype) == f"torch.{array.dtype}"


def test_every_array_is_aligned_for_wide_loads():
    device = open_device("reference")
    first, second = upload_all(device, np.arange(3, dtype=np.int32), np.arange(5))
    assert (second.data_ptr() - first.data_ptr()) % ALIGN == 0
    assert first.dtype == torch.int32


class CountingDevice(ReferenceDevice):
    def __init__(self):
        super().__init__()
        self.downloads = 0

    def download(self, tensor):
        self.downloads += 1
        return super().download(tensor)


def test_what_lies_together_comes_back_in_one_copy():
    piece = torch.arange(40, dtype=torch.uint8)
    ids, flags, apart = piece[16:32].view(torch.int64), piece[34:37].view(torch.bool), torch.arange(3)

    def copies(*tensors):
        device = CountingDevice()
        fetched = download_all(device, *tensors)
        device.mark().wait()
        for host, tensor in zip(fetched, tensors, strict=True):
            assert host.dtype == tensor.dtype
            assert torch.equal(host, tensor)
        return device.downloads

    assert copies(ids, flags) == copies(flags, ids) == copies(ids[1:], flags[:2]) == 1
    assert copies(ids, apart) == copies(apart, ids[:0]) == 2
    assert copies(ids[:0], flags) == 2


def test_where_nothing_is_copied_downloads_are_the_tensors_themselves():
    piece = torch.arange(4)
    assert download_all(open_device("cpu"), piece[:2], piece[2:])[1].data_ptr() == piece[2:].data_ptr()
