"""A function over many files in worker processes, with a progress line on a terminal."""

import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from terminal import show_count, show_line


def in_parallel(function, tasks, workers=None, doing="working", start=None):
    """Yield function(task) for every task of a list, in order, from `workers` processes (default one a core).

    `start` = (function, argument) is called once in each worker before its first task.
    """
    pool = ProcessPoolExecutor(workers or os.cpu_count(), initializer=_start_worker, initargs=(start,))
    begun = time.monotonic()
    try:
        for done, result in enumerate(pool.map(function, tasks, chunksize=8), 1):
            if done % 20 == 0:
                show_count(doing, done, len(tasks), time.monotonic() - begun)
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
        show_line("", sys.stderr)


def _start_worker(start):
    # Ctrl-C is the parent's to report; a worker finishes its file.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if start:
        start[0](start[1])
