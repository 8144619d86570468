"""Start train.py in one process or several, with user mistakes told once and before any process starts.

python launch.py --nproc 2 --name a --dice 1.5
python launch.py --resume a

All flags but --nproc are train.py's. By default there is one process a GPU, and on a CPU one with a thread a core.
"""

import logging
import os
import sys
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from device import chosen
from errors import ArgumentParser, UserError, run_main, tell
from options import parse
from rundir import find_run, in_force, read_json


def default_processes(args):
    """One process a GPU; one on a CPU, where a process a core gains nothing over threads (`make bench`)."""
    return max(1, torch.cuda.device_count()) if chosen(args.device) == "cuda" else 1


def check_processes(count, name):
    """UserError where so many processes, more than one, cannot each have a device of this name."""
    kind, gpus = chosen(name), torch.cuda.device_count()
    if kind == "cpu" and count > max(2, os.cpu_count()):
        raise UserError(f"{count} processes are more than this machine's {os.cpu_count()} cores: give a smaller NPROC")
    if kind != "cpu" and not (kind == "cuda" and count <= gpus):
        raise UserError(
            f"{count} processes need a GPU each, and --device {kind} with {gpus} of CUDA's does not give that: "
            "take NPROC=1 (--nproc 1) or DEVICE=cpu"
        )


def main():
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc", type=int, default=0)
    own, flags = parser.parse_known_args()
    if {"-h", "--help"} & set(flags):
        print("--nproc N  processes; without it one a GPU, one on a CPU. All other flags are train.py's:\n")
    args = in_force(*parse(flags))
    if own.nproc < 0 or own.nproc > 1024:
        raise UserError(f"--nproc {own.nproc}: give the number of processes, or 0 for one a GPU")
    # A resumed run goes on with as many as it began with, for sums over processes depend on their number.
    begun = read_json(find_run(args.resume, args.runs) / "args.json").get("processes") if args.resume else None
    processes = own.nproc or begun or default_processes(args)
    command = [sys.executable, str(Path(__file__).with_name("train.py")), *flags]
    if processes == 1:
        os.execv(command[0], command)
    check_processes(processes, args.device)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()), max_restarts=0, monitor_interval=0.2,
    )  # fmt: skip
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // processes)))
    logging.disable(logging.CRITICAL)  # the processes tell their own mistakes; the launcher's report would bury them
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if min(codes.values()) < 0 and codes.get(0) not in (1, 2):  # with those the first process has told why it ended
            name = args.resume or args.name or "..."
            tell(f"a process was killed, perhaps for want of memory; `make resume NAME={name}` goes on")
            return 128 - min(codes.values())
        return max(codes.values())
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    run_main(main)
