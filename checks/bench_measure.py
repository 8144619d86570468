"""How the benchmark measures: interleaved repeats, functions in processes of their own, their peak memory."""

import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from device import computes_bf16

ROOT = Path(__file__).parents[1]


def machine(threads):
    """One line that says on what was measured."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    model = re.search(r"model name\s*:\s*(.*)", text)
    return (
        f"{model[1] if model else platform.processor() or platform.machine()}, {os.cpu_count()} cores, {threads} used, "
        f"{torch.backends.cpu.get_cpu_capability()}{' with bf16' if computes_bf16() else ''}, torch {torch.__version__}"
    )


def interleaved(functions, repeats):
    """Seconds {name: [of each round]} of functions {name: f} called in turn, after one round that does not count."""
    seconds = {name: [] for name in functions}
    for number in range(repeats + 1):
        for name, function in functions.items():
            begun = time.perf_counter()
            function()
            if number:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def median(values):
    return sorted(values)[len(values) // 2]


def ratio(seconds, slow, fast):
    """Median over the rounds of how many times as long one takes as the other."""
    return median([a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)])


def environment(threads=1):
    """The variables of a process with so many threads, unless it asks for another number itself."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def child(function, threads, **arguments):
    """What a function "module:name" of this folder returns, called in a new process, and that one's peak MiB."""
    command = [sys.executable, "-c", "from checks.bench_measure import serve; serve()", function, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(threads), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{function}: {done.stderr}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["result"], answer["peak"]


def serve():
    """The other end of `child`."""
    module, name = sys.argv[1].split(":")
    result = getattr(importlib.import_module(f"checks.{module}"), name)(**json.loads(sys.argv[2]))
    print(json.dumps({"result": result, "peak": status("VmHWM")}))


def status(key):
    """MiB that /proc names for this process: VmHWM is the peak, RssAnon what is not a file's."""
    return int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
