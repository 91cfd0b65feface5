"""One process of `fathom launch --on local`: fathom's command line, which ends when the launcher is gone.

    python -m fathom.launch.rank train RECIPE [key=value ...]

The launcher stops its processes itself, unless it is killed outright: then nobody would, and they would go on for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

LAUNCHER, UNBUFFERED = "FATHOM_LAUNCHER_PID", "PYTHONUNBUFFERED"
POLL_SECONDS = 0.2
SAVE_SECONDS = 60.0
"""How long an abandoned process may take to stop and save."""


def watch_launcher(pid: int) -> None:
    """Waits until process `pid` is no longer the parent; then asks this process to stop, and at last kills it."""
    while os.getppid() == pid:
        time.sleep(POLL_SECONDS)
    # Its end of our pipes is gone too: what is written there would be an error, in the middle of the save.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(nowhere, output)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVE_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> int:
    launcher = os.environ.get(LAUNCHER, "")
    if launcher.isdigit():
        threading.Thread(target=watch_launcher, args=(int(launcher),), daemon=True).start()
    from fathom.cli import main as fathom

    return fathom(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
