"""A function over many files in worker processes, with a progress line on a terminal."""

import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from errors import UserError
from terminal import show_count, show_line


def in_parallel(function, tasks, workers=None, doing="working", start=None):
    """Yield function(task) for every task of a list, in order, from `workers` processes (default one a core).

    `start` = (function, argument) is called once in each worker before its first task. UserError where a worker died.
    """
    pool = ProcessPoolExecutor(workers or os.cpu_count(), initializer=_start_worker, initargs=(start,))
    begun = time.monotonic()
    try:
        for done, result in enumerate(pool.map(function, tasks, chunksize=8), 1):
            if done % 20 == 0:
                show_count(doing, done, len(tasks), time.monotonic() - begun)
            yield result
    except BrokenProcessPool:
        raise UserError(f"{doing}: a worker process was killed, perhaps for want of memory; do it again") from None
    finally:
        pool.shutdown(cancel_futures=True)
        show_line("", sys.stderr)


def _start_worker(start):
    # Ctrl-C is the parent's to report; a worker finishes its file.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    follow_parent()
    if start:
        start[0](start[1])


def follow_parent():
    """From now on SIGTERM comes to this process when its parent has died, however that died."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
