from xllm.core.clock import monotonic


def test_time_goes_forward():
    assert monotonic() <= monotonic()
