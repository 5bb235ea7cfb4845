"""What every test may rely on: no network, one thread per worker, and no clock in property tests."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch, tokenizers or huggingface_hub are first imported, here and in processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores

import pytest
from hypothesis import settings

settings.register_profile("house", deadline=None)  # shared machines: an example may be slow for no reason
settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    """Unless tests marked gpu are asked for, a machine's card is out of sight: the other tests are the CPU's."""
    if "gpu" not in str(config.option.markexpr).replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


WITH_THE_CARD_S = (
    600  # a test may wait long until those that look at the card's memory have had it to themselves
)
# What Triton's interpreter (TRITON_INTERPRET=1) can run of the tests marked gpu, on a machine without one.
INTERPRETABLE = ("tests/ops/", "tests/engine/test_interpreted.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("nvidia-smi") is not None:
        for item in items:
            if "gpu" in item.keywords and item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(WITH_THE_CARD_S))
        return
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if "gpu" in item.keywords and not (interpreted and item.nodeid.startswith(INTERPRETABLE)):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def the_card(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests marked gpu share it, but for those of `tests/device`, which look at its memory or take all of it: each has it to
    itself, whatever other workers run."""
    if "gpu" not in request.node.keywords:
        yield
        return
    whole = request.node.nodeid.startswith("tests/device/")
    with (Path(tempfile.gettempdir()) / "xllm-tests-card.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if whole else fcntl.LOCK_SH)
        yield
