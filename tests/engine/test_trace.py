"""A trace of an engine in a process of its own, on a device whose work PyTorch sees."""

import gzip

import pytest

from tests import checkpoints
from xllm.config.options import EngineOptions
from xllm.core.errors import Unavailable
from xllm.core.sampling import SamplingParams
from xllm.engine.async_llm import AsyncLLM


async def test_what_ran_in_between_is_in_the_file(tmp_path):
    model = checkpoints.save_qwen3(tmp_path / "model")
    llm = await AsyncLLM.start(
        EngineOptions(model=str(model), device="reference", dtype="float32", max_num_seqs=2, threads=1)
    )
    try:
        with pytest.raises(Unavailable, match="no trace is being taken"):
            await llm.stop_profile(str(tmp_path))
        await llm.start_profile()
        with pytest.raises(Unavailable, match="a trace is being taken already"):
            await llm.start_profile()
        params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
        _ = [delta async for delta in llm.generate({"prompt_token_ids": [5, 6, 7]}, params, request_id="a")]
        path = await llm.stop_profile(str(tmp_path / "traces"))
        assert path.startswith(f"{tmp_path}/traces/xllm-trace-")
        with gzip.open(path) as trace:
            assert b"aten::" in trace.read()
        (tmp_path / "file").write_text("in the way")
        await llm.start_profile()
        with pytest.raises(Unavailable, match="could not be written"):
            await llm.stop_profile(str(tmp_path / "file"))
        _ = [delta async for delta in llm.generate({"prompt_token_ids": [5]}, params, request_id="b")]
    finally:
        await llm.shutdown()
