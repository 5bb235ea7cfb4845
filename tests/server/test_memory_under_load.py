"""Memory that goes and comes while clients go on asking: nobody gets another answer, and nobody is lost."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.checkpoints import save_qwen3
from tests.server.test_serve_demo import serving

pytestmark = pytest.mark.timeout(300)
PROMPTS = ["One day", "Two of them", "In the beginning there was", "x"]


@pytest.mark.parametrize("pool", ["paged", "elastic", "contiguous"])
def test_sleeping_and_waking_under_load_loses_nothing(tmp_path, pool):
    model = str(save_qwen3(tmp_path / "model", max_position=512))
    flags = [
        "--device",
        "reference",
        "--enable-sleep-mode",
        "--kv-pool",
        pool,
        "--kv-cache-memory-bytes",
        str(1 << 22),
    ]
    with serving(model, *flags) as served:
        expected = {prompt: served.complete(prompt=prompt).json()["choices"][0]["text"] for prompt in PROMPTS}
        over = threading.Event()
        answers: Counter[int] = Counter()

        def ask(i):
            while not over.is_set():
                prompt = PROMPTS[i % len(PROMPTS)]
                answer = served.complete(prompt=prompt)
                answers[answer.status_code] += 1
                if answer.status_code == 200:
                    assert answer.json()["choices"][0]["text"] == expected[prompt]
                else:
                    assert answer.status_code == 503
                    assert answer.headers["retry-after"]

        with ThreadPoolExecutor(4) as clients:
            asking = [clients.submit(ask, i) for i in range(4)]
            try:
                for i in range(4):
                    assert served.http.post("/sleep?wait=60").json() == {"is_sleeping": True}
                    assert served.http.post("/wake_up").json() == {"is_sleeping": False}
                    if pool == "elastic":
                        limited = served.http.post("/kv_limit", params={"gib": (2 + i % 2) / 1024})
                        assert limited.status_code == 200, limited.text
                    answered = answers[200]
                    while answers[200] < answered + 4:
                        over.wait(0.01)
            finally:
                over.set()
            for one in asking:
                one.result()
        assert answers[200] >= 16
        assert served.metric("kv_cache_usage_perc") == 0.0


def test_a_limit_is_of_an_elastic_pool(tmp_path):
    model = str(save_qwen3(tmp_path / "model", max_position=512))
    with serving(model, "--kv-pool", "elastic", "--kv-cache-memory-bytes", str(1 << 22)) as served:
        answer = served.http.post("/kv_limit?gib=0.002").json()
        assert answer["limit_bytes"] == int(0.002 * 2**30)
        assert 0 < answer["taken_bytes"] < 1 << 22
        assert served.complete().status_code == 200
        for gib in ("0", "-1", "much", "nan", "inf"):
            refused = served.http.post(f"/kv_limit?gib={gib}")
            assert refused.status_code == 400, gib
            assert refused.json()["error"]["param"] == "gib"
        assert served.http.post("/kv_limit").json()["limit_bytes"] is None
        assert served.metric("kv_segments_mapped") >= 1
