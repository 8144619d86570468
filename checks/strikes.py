"""Faults inside a script: it dies at a chosen call of a function, halfway through a file, or at a chosen moment of its
CPU time; a signal reaches it there; a disk is full; a loss is no number. Prepared in the child of checks/attempt.py.

CPU time and counts of calls, not seconds, so that a loaded machine is struck where an idle one is.
"""

import contextlib
import importlib
import io
import os
import resource
import signal
import threading
import time
from pathlib import Path


def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def find(place):
    """(owner, name) of "module.function" or "module.Class.method"."""
    *path, name = place.split(".")
    owner = importlib.import_module(path[0])
    for i, part in enumerate(path[1:], 2):
        owner = getattr(owner, part) if hasattr(owner, part) else importlib.import_module(".".join(path[:i]))
    return owner, name


def around(place, wrapper):
    """Prepare: a call of the function becomes wrapper(call, its number from 1); not in workers that are forked."""

    def prepare():
        owner, name = find(place)
        real, calls, process = getattr(owner, name), [0], os.getpid()

        def struck(*args, **more):
            if os.getpid() != process:
                return real(*args, **more)
            calls[0] += 1
            return wrapper(lambda: real(*args, **more), calls[0])

        setattr(owner, name, struck)

    return prepare


def at_call(place, nth, act=kill, after=False):
    """Prepare: `act()` at the nth call of a function, before or after it."""

    def wrapper(call, number):
        if number == nth and not after:
            act()
        result = call()
        if number == nth and after:
            act()
        return result

    return around(place, wrapper)


def at_result(nth):
    """Prepare: die when workers have given their nth result, as while the cache is made."""

    def counted(results):
        for number, result in enumerate(results, 1):
            if number == nth:
                kill()
            yield result

    return around("parallel.in_parallel", lambda call, number: counted(call()))


def torn_save(nth, share):
    """Prepare: die in the nth checkpoint's write, with a share (0..1) of its bytes written."""

    def prepare():
        import torch

        real, calls = torch.save, [0]

        def struck(content, file, **more):
            calls[0] += 1
            if calls[0] < nth:
                return real(content, file, **more)
            whole = io.BytesIO()
            real(content, whole, **more)
            file.write(whole.getvalue()[: int(share * whole.tell())])
            file.flush()
            return kill()

        torch.save = struck

    return prepare


def at_cpu_time(seconds):
    """Prepare: die when this process has computed for so many seconds from here."""

    def prepare():
        begun = time.process_time()

        def watch():
            while time.process_time() - begun < seconds:
                time.sleep(0.001)
            kill()

        threading.Thread(target=watch, daemon=True).start()

    return prepare


def noted(path, number):
    """An act for `at_call`: note the time in a file, then the signal."""

    def act():
        Path(path).write_text(repr(time.monotonic()))
        kill(number)

    return act


def scaled(place, nth, factor):
    """Prepare: the nth result of a function (and it alone) is multiplied by a factor, as by NaN."""
    return around(place, lambda call, number: call() * factor if number == nth else call())


def slowed(place, seconds):
    """Prepare: each call of a function takes so many seconds longer, as on a slow machine."""
    return around(place, lambda call, number: time.sleep(seconds) or call())


def limited(place, nth, count):
    """Prepare: in the nth call of a function no file grows above so many bytes, as on a full disk."""

    def wrapper(call, number):
        with small_files(count) if number == nth else contextlib.nullcontext():
            return call()

    return around(place, wrapper)


@contextlib.contextmanager
def small_files(count):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def both(*prepares):
    return lambda: [prepare() for prepare in prepares]
