"""A function over many files in worker processes, with a progress line on a terminal."""

import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor


def in_parallel(function, tasks, workers=None, doing="working", start=None):
    """Yield function(task) for every task of a list, in order, from `workers` processes (default one a core).

    `start` = (function, argument) is called once in each worker before its first task.
    """
    pool = ProcessPoolExecutor(workers or os.cpu_count(), initializer=_start_worker, initargs=(start,))
    shown = sys.stderr.isatty()
    try:
        for done, result in enumerate(pool.map(function, tasks, chunksize=8), 1):
            if shown and (done % 20 == 0 or done == len(tasks)):
                print(f"\r{doing} {done}/{len(tasks)}", end="", file=sys.stderr, flush=True)
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
        if shown:
            print(file=sys.stderr)


def _start_worker(start):
    # Ctrl-C is the parent's to report; a worker finishes its file.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if start:
        start[0](start[1])
