from collections.abc import Iterator

import httpx
import pytest

from tests.server.live import Live, serving, until


@pytest.fixture(scope="package")
def shared(tmp_path_factory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("model")) as live:
        yield live


@pytest.fixture
def live(shared: Live) -> Iterator[Live]:
    """The shared server, as it was at the beginning: idle, and the engine behaving."""
    fake = shared.fake
    before = {
        name: getattr(fake, name) for name in ("step_s", "reply", "fail_after", "fail_prompts_with", "cached")
    }
    fake.submitted.clear()
    fake.aborted.clear()
    yield shared
    for name, value in before.items():
        setattr(fake, name, value)
    fake.release()
    until(shared.idle, "the engine to be idle again")


@pytest.fixture
def http(live: Live) -> httpx.Client:
    return live.http
