"""One attempt on a script: it runs in a forked child, with a fault prepared inside it, and what came of it is judged.

Forking spares each attempt the import of torch, so that hundreds fit in minutes. The child forgets this project's
modules and imports them anew, so that a prepared fault (checks/strikes.py) is in place before the script binds names.
"""

import ctypes
import os
import resource
import runpy
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy  # noqa: F401 - every script needs it; the children have it from here
import PIL.Image  # noqa: F401
import torch
import torch._dynamo  # noqa: F401 - three seconds, which every optimiser wants
import torch.distributed  # noqa: F401

ROOT = Path(__file__).parent.parent
PATIENCE = 300  # seconds after which an attempt counts as hung, on however loaded a machine


class Attempt:
    """A script under way. `prepare` is called in the child before it; `variables` join its environment."""

    def __init__(self, script, *args, prepare=None, cwd=ROOT, variables=None):
        self.command = [script, *map(str, args)]
        self.files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115 - until waited for
        sys.stdout.flush()
        sys.stderr.flush()
        self.known = []  # processes of other sessions that must end with it
        self.begun, self.pid = time.monotonic(), os.fork()
        if not self.pid:
            self._run(prepare, cwd, variables or {})

    def _run(self, prepare, cwd, variables):
        status = 1
        try:
            os.setsid()
            for file, stream in zip(self.files, (1, 2), strict=True):
                os.dup2(file.fileno(), stream)
            os.chdir(cwd)
            os.environ.update(variables)
            for name in [n for n, m in sys.modules.items() if Path(getattr(m, "__file__", None) or "/").parent == ROOT]:
                del sys.modules[name]
            sys.path[:] = [str(ROOT), *sys.path]
            sys.argv = [str(ROOT / self.command[0]), *self.command[1:]]
            torch.set_num_threads(1)
            if prepare:
                prepare()
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:  # noqa: BLE001 - a child must end here, whatever happens
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def send(self, number):
        os.kill(self.pid, number)

    def wait(self):
        """The attempt, with `status` (negative for a signal), `out`, `err`, `seconds`, and `left` processes."""
        deadline = time.monotonic() + PATIENCE
        while (ended := os.waitpid(self.pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.002)
        self.hung = ended[0] == 0
        if self.hung:
            self.send(signal.SIGKILL)
            ended = os.waitpid(self.pid, 0)
        self.seconds, self.status = time.monotonic() - self.begun, os.waitstatus_to_exitcode(ended[1])
        self.left = self._left_behind()
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        self.out, self.err = texts
        return self

    def _left_behind(self):
        """Processes of the attempt that do not end within a while after it; they are killed then."""
        deadline = time.monotonic() + 30
        while left := [pid for pid in processes() if self.pid == session(pid) or (pid in self.known and session(pid))]:
            if time.monotonic() > deadline:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.02)
        return left

    def trouble(self):
        """What is wrong however it ended: a hang, a traceback, processes left behind; "" where nothing is."""
        if self.hung:
            return f"hung for {PATIENCE} s"
        if "Traceback" in self.err:
            return "traceback: " + self.err.strip().split("\n")[-1][:200]
        return f"left processes {self.left} behind" if self.left else ""

    def not_fine(self):
        """Why this was no success, or ""."""
        return self.trouble() or (f"status {self.status}: {self.err.strip()[-300:]}" if self.status else "")

    def not_refused(self, *told, status=2, lines=1):
        """Why this was no refusal as it should be, one line on stderr that tells each of `told`; "" where it was."""
        if problem := self.trouble():
            return problem
        if self.status != status or self.err.count("\n") != lines:
            return f"status {self.status}, {self.err.count(chr(10))} lines on stderr: {self.err.strip()[-300:]}"
        missing = [word for word in told if word not in self.err]
        return f"does not tell {missing[0]!r}: {self.err.strip()}" if missing else ""


def run(script, *args, **how):
    """An Attempt, waited for."""
    return Attempt(script, *args, **how).wait()


def processes():
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _status(pid, field):
    """A number of /proc/PID/stat, the state being field 0; None for a zombie and where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[field])


def session(pid):
    return _status(pid, 3)


def children(pid):
    return [other for other in processes() if _status(other, 1) == pid]


def file_limit(count):
    """To prepare an attempt with: no file grows above so many bytes, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))


def bound_by_permissions():
    """To prepare an attempt with: permission bits bind root too (Linux capabilities DAC_OVERRIDE, DAC_READ_SEARCH)."""
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", 0x20080522, 0)
    held = ctypes.create_string_buffer(24)
    if libc.capget(header, held):
        raise OSError(ctypes.get_errno(), "capget")
    effective, *rest = struct.unpack("6I", held.raw)
    if libc.capset(header, struct.pack("6I", effective & ~0b110, *rest)):
        raise OSError(ctypes.get_errno(), "capset")
