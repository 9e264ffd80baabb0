"""Signals that ask the process to end, and a closed terminal.

SIGTERM comes from ``kill`` and from schedulers. SIGHUP comes when the terminal is closed: the
kernel sends one, and the shell often a second.
"""

import errno
import os
import signal
import termios


def ending_signals() -> tuple[signal.Signals, ...]:
    """Return SIGTERM, and SIGHUP unless it is ignored: under ``nohup`` a process continues."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGHUP)


def drop_closed_terminal() -> None:
    """Point stdout and stderr at /dev/null if they are a closed terminal: every write would raise
    OSError, even while a checkpoint is saved. Files and pipes stay."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
