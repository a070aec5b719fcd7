"""A whole run, of which the second process is killed while it scores."""

import os
import signal
import sys

from sosp_hub.derivatives import average
from sosp_hub.distributed import process_state
from sosp_hub.prune import main

measure = average._check


def die(*args):
    if process_state().process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(*args)


if __name__ == "__main__":
    average._check = die
    raise SystemExit(main(sys.argv[1:]))
