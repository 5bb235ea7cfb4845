"""The instances of a simulation: spread over a few processes, which end with this one."""

import math
import subprocess
import sys
from typing import Any

import msgspec

from xllm.bench.simulate_options import SimulateOptions
from xllm.cluster.instance import InstanceInfo, Role
from xllm.config.flags import to_argv
from xllm.core.errors import XllmError
from xllm.engine.modelled_process import ModelledOptions

END_S = 30.0


class WorkerFailed(XllmError):
    """A process of the simulation has ended, or does not."""

    type = "worker_failed"


class Workers:
    """Started when made; `infos` are of all instances."""

    def __init__(self, options: SimulateOptions):
        self.infos: list[InstanceInfo] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        shares = spread(options)
        try:
            for n, (role, count) in enumerate(shares):
                argv = to_argv(_asked(options, n, role, count))
                command = [sys.executable, "-m", "xllm.engine.modelled", *argv]
                self._processes.append(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                )
            for process, (_, count) in zip(self._processes, shares, strict=True):
                self.infos += [_info(process) for _ in range(count)]
        except BaseException:
            self._kill()
            raise

    def finish(self) -> list[dict[str, Any]]:
        """Ends them all. -> how well each instance kept time, as fields of `Lateness`."""
        found: list[dict[str, Any]] = []
        for process in self._processes:
            try:
                out, _ = process.communicate(timeout=END_S)  # closes its input, and so ends it
            except subprocess.TimeoutExpired:
                raise WorkerFailed(f"a process of the simulation did not end within {END_S:g} s") from None
            if process.returncode:
                raise WorkerFailed(f"a process of the simulation ended with {process.returncode}")
            found += [msgspec.json.decode(line)["lateness"] for line in out.splitlines()]
        return found

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def spread(options: SimulateOptions) -> list[tuple[Role, int]]:
    """Of each process: the role of its instances, and how many they are."""
    roles: list[tuple[Role, int]] = [("both", options.instances)]
    if options.prefill:
        roles = [("prefill", options.prefill), ("decode", options.instances - options.prefill)]
    found: list[tuple[Role, int]] = []
    for role, number in roles:
        each = math.ceil(number / max(1, round(options.workers * number / options.instances)))
        found += [(role, min(each, number - n)) for n in range(0, number, each)]
    return found


def _asked(o: SimulateOptions, n: int, role: Role, count: int) -> ModelledOptions:
    """Steps and transfers take as much longer as the trace does."""
    return ModelledOptions(
        id=f"{chr(ord('a') + n % 26)}{n // 26 or ''}", instances=count, role=role,
        fetch_us=None if o.moved_us is None else o.moved_us * o.time_scale, base_ms=o.base_ms * o.time_scale,
        token_us=o.token_us * o.time_scale, context_ns=o.context_ns * o.time_scale, num_blocks=o.num_blocks,
        block_size=o.block_size, max_num_seqs=o.max_num_seqs, max_num_batched_tokens=o.max_num_batched_tokens,
        max_model_len=o.max_model_len, max_num_queued=o.max_num_queued, shutdown_timeout=0.1, until_eof=True,
    )  # fmt: skip


def _info(process: "subprocess.Popen[bytes]") -> InstanceInfo:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise WorkerFailed(f"a process of the simulation ended with {process.wait()} before it was ready")
    return msgspec.json.decode(line, type=InstanceInfo)
