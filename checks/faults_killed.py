"""Trainings killed or stopped at any moment: what is resumed equals what was never interrupted."""

import contextlib
import os
import random
import signal
import socket
import time
from pathlib import Path

import checkpoint
from checks.attempt import PATIENCE, Attempt, children, run
from checks.same import difference
from checks.strikes import at_call, at_cpu_time, at_result, noted, slowed, torn_save
from checks.strikes import both as together

CHAIN = 3  # a training is killed so many times before it may end
SAVED_WITHIN = 5  # seconds from a signal to the save


def attack(ledger, place, short):
    rng = random.Random(6)
    kill_trainings(ledger, place, rng, CHAIN if short else 24)
    stop_trainings(ledger, place, short)
    if not short:
        kill_groups(ledger, place, rng, 6)
        kill_packing(ledger, place)
        end_launched(ledger, place)


def moments(rng, cpu):
    """Endless (case, prepare) of the moments to die at: of each kind in turn, at a random place of a training."""
    while True:
        yield "a random moment", at_cpu_time(rng.uniform(0.05, cpu))
        yield "inside a step", at_call("losses.training_loss", rng.randint(1, 8), after=rng.random() < 0.5)
        yield "inside a checkpoint's write", torn_save(rng.randint(1, 8), rng.random())
        yield "inside validation", at_call("metrics.confusion", rng.randint(1, 8))
        yield "inside the cache's build", at_result(rng.randint(1, 12))
        yield "around a file's replacement", at_call("os.replace", rng.randint(1, 12), after=rng.random() < 0.5)


def begin_or_go_on(place, name, cache, **how):
    """Start the training of this name, or go on with it where it exists, as its user would."""
    exists = (place.runs / name / "args.json").exists()
    return Attempt(*(place.resume if exists else place.train)(name, cache=cache), **how)


def kill_trainings(ledger, place, rng, kills):
    """SIGKILL at random moments, CHAIN times in the life of a training; each must end like the uninterrupted one."""
    kinds, struck, number = moments(rng, place.cpu), 0, 0
    while struck < kills:
        number += 1
        name, cache, cases = f"killed-{number}", place.root / f"cache-{number}", []
        problem = ""
        while struck < kills and len(cases) < CHAIN and not problem:
            case, prepare = next(kinds)
            attempt = begin_or_go_on(place, name, cache, prepare=prepare).wait()
            problem = attempt.trouble()
            if attempt.status != -signal.SIGKILL:  # it ended before the moment came
                problem = problem or attempt.not_fine()
                continue
            struck += 1
            cases.append(case)
        problem = problem or begin_or_go_on(place, name, cache).wait().not_fine()
        problem = problem or difference(place.runs / name, place.whole)
        if not problem and (left := [p.name for p in cache.iterdir() if p.suffix == ".tmp"]):
            problem = f"{left} left in the cache"
        for case in cases:
            ledger.add("killed", case, problem and f"{name} ({', '.join(cases)}): {problem}")


def group(place, name, *, prepares=(None, None)):
    """Two processes of one training, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    exists = (place.runs / name / "args.json").exists()
    command = (place.resume if exists else place.train)(name)
    return [
        Attempt(*command, prepare=prepare, variables={
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        })
        for rank, prepare in enumerate(prepares)
    ]  # fmt: skip


def kill_groups(ledger, place, rng, kills):
    """One of two processes is killed: the other ends by itself, and the resumed training equals the whole one."""
    whole = [attempt.wait() for attempt in group(place, "whole-2")]
    case = "one of two processes"
    if problem := whole[0].not_fine() or whole[1].not_fine():
        ledger.add("killed", case, problem)
        return
    kinds, number, struck = moments(rng, place.cpu), 0, 0
    while struck < kills:
        name, problem, rank = f"two-{number}", "", number % 2
        number, prepare = number + 1, next(kinds)[1]
        attempts = [a.wait() for a in group(place, name, prepares=[prepare if r == rank else None for r in (0, 1)])]
        if attempts[rank].status == -signal.SIGKILL:
            struck += 1
            other = attempts[1 - rank]
            told = ["another process of this training"] if rank else []  # where the first one dies, the other is silent
            problem = other.not_fine() and other.not_refused(*told, lines=rank)  # it may have been done already
        problem = problem or next(filter(None, (a.wait().not_fine() for a in group(place, name))), "")
        problem = problem or difference(place.runs / name, place.runs / "whole-2")
        if problem or attempts[rank].status == -signal.SIGKILL:
            ledger.add("killed", case, problem)


def stop_trainings(ledger, place, short):
    """SIGTERM and Ctrl-C: saved within 5 s, status 143 or 130, the last line says how to go on, nothing is lost."""
    cases = [
        ("a step", lambda act: at_call("losses.training_loss", 3, act)),
        ("validation", lambda act: together(at_call("metrics.confusion", 2, act), slowed("metrics.confusion", 0.7))),
        ("a checkpoint's write", lambda act: at_call("torch.save", 4, act)),
        ("the page", lambda act: at_call("report.write_page", 2, act)),
        ("the start", lambda act: at_call("rundir.write_text", 1, act)),
    ]
    for number, what in [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")][: 1 if short else None]:
        for where, prepare in cases[1:2] if short else cases:
            name, told = f"stopped-{where.split()[-1]}-{number}", place.root / "told"
            attempt = run(*place.train(name), prepare=prepare(noted(told, number)))
            folder, last = place.runs / name, (attempt.out.strip().splitlines() or [""])[-1]
            took = time.monotonic() - float(told.read_text()) - (time.time() - (folder / "last.pt").stat().st_mtime)
            problem = attempt.trouble()
            if not problem and attempt.status != 128 + number:
                problem = f"status {attempt.status}"
            if not problem and not last.endswith(f"make resume NAME={folder}"):
                problem = f"last line {last!r}"
            if not problem and took > SAVED_WITHIN:
                problem = f"saved after {took:.1f} s"
            if not problem:
                problem = run(*place.resume(name)).not_fine() or difference(folder, place.whole)
            ledger.add("killed", f"{what} inside {where}" if not short else what, problem)


def kill_packing(ledger, place):
    """The zip of a submission is there whole or not at all, and made again it has the same bytes."""
    command = ["package.py", "--weights", place.weights, "--data", place.data, "--run", 1, "--zip"]
    whole = place.root / "whole.zip"
    if problem := run(*command, whole).not_fine():
        ledger.add("killed", "inside a zip", problem)
        return
    target = place.root / "killed.zip"
    strikes = [("zipfile.ZipFile.writestr", 3), ("shutil.copyfile", 2), ("os.replace", 2), ("os.fsync", 2)]
    for where, nth in strikes:
        target.write_bytes(b"former")
        attempt = run(*command, target, prepare=at_call(where, nth, after=where == "shutil.copyfile"))
        problem = attempt.trouble() or ("" if attempt.status == -signal.SIGKILL else f"status {attempt.status}")
        if not problem and target.read_bytes() != b"former":
            problem = "the former zip is gone"
        problem = problem or run(*command, target).not_fine()
        if not problem and target.read_bytes() != whole.read_bytes():
            problem = "the zip differs from the one made without interruption"
        ledger.add("killed", "inside a zip", problem)


def end_launched(ledger, place):
    """make train NPROC=2: the launcher, or one of its processes, is stopped or killed."""
    for name, number, whom, status, told in (
        ("sigterm", signal.SIGTERM, "launcher", 143, ""),
        ("ctrl-c", signal.SIGINT, "all", 130, ""),
        ("killed-one", signal.SIGKILL, "one", None, "make resume"),
        ("killed-launcher", signal.SIGKILL, "launcher", -9, ""),
    ):
        script, *flags = place.train(f"launched-{name}")
        attempt = Attempt("launch.py", "--nproc", 2, *flags, "--sizes", "64:300")
        folder, deadline = place.runs / f"launched-{name}", time.monotonic() + PATIENCE
        while not (folder / "best.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        attempt.known = [pid for pid in children(attempt.pid) if trains(pid)]
        targets = {"launcher": [attempt.pid], "one": attempt.known[-1:], "all": [attempt.pid, *attempt.known]}[whom]
        for pid in targets:
            os.kill(pid, number)
        attempt.wait()
        problem = attempt.trouble()
        last = (attempt.out.strip().splitlines() or [""])[-1]
        if not problem and status is not None and attempt.status != status:
            problem = f"status {attempt.status}: {attempt.err.strip()[-200:]}"
        if not problem and number != signal.SIGKILL and not last.endswith(f"make resume NAME={folder}"):
            problem = f"last line {last!r}"
        if not problem and told not in attempt.err:
            problem = f"does not tell {told!r}: {attempt.err.strip()[-200:]}"
        if not problem:
            state = checkpoint.load(folder / "last.pt")["progress"]
            problem = "" if state["epoch"] >= 1 else f"the last save is of epoch {state['epoch']}"
        ledger.add("killed", "two launched processes", problem and f"{name}: {problem}")


def trains(pid):
    """Whether a process is one of a training's."""
    with contextlib.suppress(OSError):
        return b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1]
    return False
