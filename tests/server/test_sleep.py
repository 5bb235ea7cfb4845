from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.live import serving, until

BODY = {"model": "fake", "prompt": "x", "max_tokens": 3}


@pytest.fixture(scope="module")
def sleepy(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("model"), sleeps=True) as live:
        yield live


def test_who_comes_while_it_sleeps_is_told_to_come_back(sleepy):
    http = sleepy.http
    assert http.get("/is_sleeping").json() == {"is_sleeping": False}
    for _ in range(2):  # twice is once
        assert http.post("/sleep?level=1").json() == {"is_sleeping": True}
    assert http.get("/is_sleeping").json() == {"is_sleeping": True}
    turned_away = http.post("/v1/completions", json=BODY)
    assert turned_away.status_code == 503
    assert "the engine sleeps; POST /wake_up" in turned_away.json()["error"]["message"]
    assert turned_away.headers["retry-after"]
    assert http.get("/health").status_code == 200
    assert http.post("/wake_up").json() == {"is_sleeping": False}
    assert http.post("/v1/completions", json=BODY).status_code == 200


def test_it_does_not_fall_asleep_over_a_request(sleepy):
    sleepy.fake.held = True
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(sleepy.http.post, "/v1/completions", json=BODY)
        until(lambda: sleepy.fake.active == 1, "the request to arrive")
        refused = sleepy.http.post("/sleep")
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "something runs"
        assert sleepy.http.get("/is_sleeping").json() == {"is_sleeping": False}
        sleepy.fake.release()
        assert running.result().status_code == 200


def test_it_waits_for_what_runs_where_asked(sleepy):
    sleepy.fake.held = True
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(sleepy.http.post, "/v1/completions", json=BODY)
        until(lambda: sleepy.fake.active == 1, "the request to arrive")
        assert sleepy.http.post("/sleep?wait=0.05").status_code == 503
        assert sleepy.http.get("/is_sleeping").json() == {"is_sleeping": False}
        asleep = pool.submit(sleepy.http.post, "/sleep?wait=30")
        until(lambda: sleepy.http.get("/is_sleeping").json()["is_sleeping"], "the door to close")
        assert sleepy.http.post("/v1/completions", json=BODY).status_code == 503
        sleepy.fake.release()
        assert running.result().status_code == 200
        assert asleep.result().json() == {"is_sleeping": True}
    sleepy.http.post("/wake_up")


@pytest.mark.parametrize("wait", ["-1", "nan", "long", "1e9"])
def test_other_waits_are_refused(sleepy, wait):
    assert sleepy.http.post(f"/sleep?wait={wait}").status_code == 400


@pytest.mark.parametrize("level", ["0", "2", "deep"])
def test_other_levels_are_refused(sleepy, level):
    refused = sleepy.http.post(f"/sleep?level={level}")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "level"


def test_without_the_flag_there_is_no_such_route(live):
    assert live.http.post("/sleep").status_code == 404
