"""Processes that end with their owner, however it ends: by kill -9 too.

The program is started through a line of shell. Before the shell becomes the program (same process id, same exit code) it
leaves a second, tiny process behind, which reads a pipe whose other end the owner holds. The owner's end closes that pipe
whatever the reason, and the reader then kills the whole process group: the program and what it has started. A parent-death
signal would do without the reader, but comes when the *thread* ends that started the program, on Linux only, and to the program only.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_SCRIPT = """\
exec 3<&0 </dev/null
( trap '' HUP INT TERM; read -r _; kill -9 0 ) <&3 >/dev/null 2>&1 3<&- &
exec 3<&-
exec "$@"
"""


class Held:
    """A process in a session and group of its own, so a Ctrl-C in a terminal reaches its owner only. Standard input is empty.

    `out` takes both its outputs. OSError where there is no /bin/sh; a program that is not there ends with exit code 127.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        out: int | IO[bytes],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ):
        read, self._line = os.pipe()
        try:
            self.popen: subprocess.Popen[bytes] = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT, "sh", *argv],
                stdin=read, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(self._line)
            raise
        finally:
            os.close(read)
        self._over = False

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def terminate(self) -> None:
        """Asks the program itself; what it has started is its own matter."""
        self.popen.terminate()

    def kill(self) -> None:
        """The whole group, at once. May be called again, and by another thread than that which waits."""
        if not self._over:  # the reader is of the group, so its number has not been given to others
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code, once the program has ended and the rest of its group is gone. TimeoutExpired as Popen's."""
        code = self.popen.wait(timeout_s)
        if not self._over:
            self.kill()
            self._over = True
            os.close(self._line)
        return code
