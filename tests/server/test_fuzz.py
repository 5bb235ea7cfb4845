"""RELIABILITY 3: sensible requests and others; 2xx or 4xx in the error shape, a canary undisturbed."""

import pytest

from tests.server.fuzz import storm


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_fuzz(live, count):
    live.fake.step_s = 0.0
    await storm(live.url, count, seed=20)
