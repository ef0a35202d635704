"""Start a foreign program that must not outlive us. Run as a file: ``python launch.py PARENT_PID program arg...``.

On Linux it asks the kernel to end it with its parent and becomes the program, so the process id is the program's own.
Elsewhere it stays as a guard: end of standard input (the parent went, or closed the pipe) ends the program.
Standard library only, so that ``python -I -S`` starts it in some 10 ms.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LINUX: bool = sys.platform.startswith("linux")


def die_with(parent: int, number: int = signal.SIGTERM) -> None:
    """Have ``number`` sent to this process when the thread that started it ends (Linux; elsewhere nothing)."""
    if not _LINUX:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it went before we could ask
        os.kill(os.getpid(), number)


def start(command: Sequence[str], log: Path, cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """Start ``command`` so that it ends when we do, out of reach of a terminal's Ctrl-C; its output goes to ``log``."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            cwd=cwd,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """SIGTERM, then SIGKILL after ``patience_s``; returns when the process is gone."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def tail(log: Path, lines: int = 5) -> str:
    """The last lines of a log, on one line, for an error message."""
    try:
        return " | ".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"no log: {error}"


def _guard(command: list[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    if os.fork() == 0:  # the waiter: wakes when standard input ends
        while os.read(0, 4096):
            pass
        child.terminate()
        os._exit(0)
    return child.wait()


def _main(parent: int, command: list[str]) -> int:
    if _LINUX:
        die_with(parent)
        os.execv(command[0], command)  # noqa: S606 - never returns
    return _guard(command)


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), sys.argv[2:]))
