"""Turns into a command that dies with its parent: `python -I -S tether.py PARENT_PID PIPE COMMAND [ARGUMENT...]`.

Run by path, never imported, and only light imports: each child's start pays for them. The command keeps the process
id. PIPE is -1 on Linux, where the kernel is asked to kill it (prctl(2), PR_SET_PDEATHSIG). Elsewhere PIPE is the read
end of a pipe whose only write end the parent holds, and a watcher beside the command kills it at the end of file.
"""

from __future__ import annotations

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_WATCHER_LOOKS = 0.2  # seconds: how soon a watcher notices that its command ended by itself


def main() -> None:
    """Tether this process, then become the command. Never returns."""
    parent, pipe, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if pipe < 0:
        _ask_the_kernel(parent)
    else:
        _start_watcher(pipe)
    # Python ignores these two and exec keeps that, as it keeps a mask; the command gets what a shell would give it.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        os.execvp(command[0], command)  # noqa: S606 - the command is our parent's own, and no shell is wanted
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


def _ask_the_kernel(parent: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it died before the request was made, so no signal will come
        sys.exit("the parent is gone")


def _start_watcher(pipe: int) -> None:
    """Fork the watcher; the caller goes on as the command. The command must lead its process group."""
    command = os.getpid()
    if os.fork() != 0:
        os.close(pipe)
        return
    os.setsid()  # what is sent to the command's group or terminal does not concern the watcher
    null = os.open(os.devnull, os.O_RDWR)
    for inherited in (0, 1, 2):  # else whoever reads the command's output would wait for the watcher too
        os.dup2(null, inherited)
    import select

    # An ended command makes its watcher another's child at once, so its number cannot have been given anew here.
    while os.getppid() == command:
        if select.select([pipe], (), (), _WATCHER_LOOKS)[0] and os.getppid() == command:
            os.killpg(command, signal.SIGKILL)
            break
    os._exit(0)


if __name__ == "__main__":
    main()
