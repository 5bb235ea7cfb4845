"""Modelled instances as processes: what they say, cost, and leave behind."""

import asyncio
import json
import signal
import subprocess
import sys
import time

import msgspec

from tests.engine.dialling import TIMEOUT_S, ask, dialled, ended, have, listen
from xllm.cluster.etcd import Etcd, end_of
from xllm.cluster.etcd_child import EtcdChild
from xllm.cluster.instance import InstanceInfo, Keys, decode
from xllm.core.output import Finish
from xllm.engine.modelled_runner import answer


def started(*flags):
    return subprocess.Popen(
        [sys.executable, "-m", "xllm.engine.modelled", *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    return [json.loads(line) for line in out.splitlines()]


def infos(process, count):
    return [msgspec.json.decode(process.stdout.readline().encode(), type=InstanceInfo) for _ in range(count)]


def test_several_in_a_process_end_with_whoever_started_them():
    process = started("--instances", "3", "--base-ms", "0.5", "--token-us", "0", "--until-eof")
    told = infos(process, 3)
    assert [info.id for info in told] == ["modelled-0", "modelled-1", "modelled-2"]
    for info in told:
        dial = dialled(info.address)
        dial.send(ask("x", [20, 21]))
        tokens, _, _ = listen(dial, ended("x"))
        assert tokens["x"] == answer([20, 21], 8)
        dial.close()
    process.stdin.close()
    process.stdin = None
    ends = finish(process)
    assert [end["id"] for end in ends] == [info.id for info in told]
    assert all(end["lateness"]["steps"] >= 8 for end in ends)


def test_at_the_end_what_runs_is_finished():
    process = started("--base-ms", "5")
    dial = dialled(infos(process, 1)[0].address)
    dial.send(ask("x", [20], 100))
    listen(dial, have("x", 2))
    process.send_signal(signal.SIGTERM)
    _, ends, _ = listen(dial, ended("x"))
    assert ends["x"].finish is Finish.LENGTH
    finish(process)
    dial.close()


def test_it_costs_little_and_brings_no_torch():
    code = (
        "import sys\n"
        "from xllm.engine.modelled import ModelledInstance\n"
        "import xllm.engine.modelled_process, xllm.cluster.registration\n"
        "with ModelledInstance('a'): pass\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
        "import psutil\n"
        "print(psutil.Process().memory_info().rss >> 20)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 60


async def entries(etcd, keys):
    prefix = keys.root + b"instances/"
    return [decode(kv.value, InstanceInfo) for kv in (await etcd.range(prefix, end_of(prefix))).kvs]


async def test_it_registers_and_drains_as_a_real_one():
    keys = Keys("modelled-test")
    with EtcdChild() as child:
        etcd = Etcd(child.url)
        process = started(
            "--id", "m", "--etcd", child.url, "--cluster", keys.cluster, "--base-ms", "5"
        )  # fmt: skip
        told = (await asyncio.to_thread(infos, process, 1))[0]
        assert await entries(etcd, keys) == [told]
        dial = await asyncio.to_thread(dialled, told.address)
        dial.send(ask("x", [20], 200))
        await asyncio.to_thread(listen, dial, have("x", 2))
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + TIMEOUT_S
        while not (await entries(etcd, keys))[0].draining:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        await asyncio.to_thread(listen, dial, ended("x"))
        await asyncio.to_thread(finish, process)
        assert await entries(etcd, keys) == []
        dial.close()
        await etcd.aclose()
