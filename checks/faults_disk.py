"""Full disks, folders that cannot be read or written, files that vanish or change, one name for two trainings."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from checks.attempt import PATIENCE, Attempt, bound_by_permissions, file_limit, run
from checks.same import difference
from checks.strikes import at_call, kill, limited

FULL = "a full disk"


def attack(ledger, place, short):
    fill_while_training(ledger, place, short)
    stale_caches(ledger, place)
    changing_files(ledger, place)
    if short:
        return
    fill_while_writing(ledger, place)
    fill_tmpfs(ledger, place)
    forbidden_folders(ledger, place)
    same_name_twice(ledger, place)


def copied(place, name, *, count=None):
    """A copy of the data that an attack may spoil, of its first `count` pairs."""
    data = place.root / name
    shutil.copytree(place.data, data)
    for kind in ("images", "masks"):
        for path in sorted((data / "train" / kind).iterdir())[count or 1000 :]:
            path.unlink()
    return data


def stopped_run(place, name, *more):
    """A training that a signal has stopped in its third step, ready to be resumed."""
    prepare = at_call("losses.training_loss", 3, lambda: kill(signal.SIGTERM))
    attempt = run(*place.train(name, *more), prepare=prepare)
    assert attempt.status == 143, attempt.err
    return place.runs / name


def fill_while_training(ledger, place, short):
    """The disk fills in the write of one file: one line, the former file whole; with space again nothing is lost."""
    cases = {
        "last.pt": limited("torch.save", 3, 20_000),
        "metrics.jsonl": limited("rundir.append_metrics", 2, 100),
        "best.json": limited("rundir.write_text", 3, 100),
        "best.pt": limited("rundir.write_best", 1, 5_000),
    }
    for number, (name, prepare) in enumerate(list(cases.items())[: 1 if short else None]):
        folder = stopped_run(place, f"full-{number}")
        attempt = run(*place.resume(folder.name), prepare=prepare)
        problem = attempt.not_refused("cannot write", name, "free space")
        torn = [path.name for path in folder.iterdir() if path.suffix == ".tmp"]
        problem = problem or (f"left {torn}" if torn else "")
        problem = problem or run(*place.resume(folder.name)).not_fine() or difference(folder, place.whole)
        ledger.add("disk", FULL, problem and f"{name}: {problem}")
    attempt = run(*place.train("page"), prepare=limited("report.write_page", 2, 100))
    problem = attempt.not_refused("index.html", status=0) or difference(place.runs / "page", place.whole)
    ledger.add("disk", FULL, problem and f"index.html: {problem}")


def fill_while_writing(ledger, place):
    """The same for the cache, masks, the zip and prepared data."""
    images, out = place.data / "test/images", place.root / "masks"
    attempt = run("data.py", "--data", place.data, "--cache", place.root / "full", prepare=file_limit(1 << 20))
    problem = attempt.not_refused("cannot write the cache") or ("left a file" * bool(os.listdir(place.root / "full")))
    ledger.add("disk", FULL, problem)

    predict = ["predict.py", "--whole", "--weights", place.weights, "--input", images, "--output", out]
    assert not run(*predict).not_fine()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    problem = run(*predict, prepare=limited("images.write_mask", 1, 100)).not_refused("cannot write", str(out))
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    ledger.add("disk", FULL, problem or ("a former mask is not whole" if before != after else ""))

    target = place.root / "full.zip"
    target.write_bytes(b"former")
    package = ["package.py", "--weights", place.weights, "--data", place.data, "--run", 1, "--zip", target]
    for prepare, told in ((file_limit(20_000), "ckpt.pth"), (limited("shutil.copyfile", 2, 5_000), "full.zip")):
        problem = run(*package, prepare=prepare).not_refused("cannot write", told)
        ledger.add("disk", FULL, problem or ("former zip not whole" if target.read_bytes() != b"former" else ""))

    prepared = ["prepare.py", "--raw", place.data, "--out", place.root / "prepared"]
    problem = run(*prepared, prepare=file_limit(5_000)).not_refused("cannot write", "see --out")
    ledger.add("disk", FULL, problem or run(*prepared).not_fine())


@contextlib.contextmanager
def tmpfs(folder, size):
    """A file system of its own at a folder; OSError where it cannot be mounted."""
    folder.mkdir(exist_ok=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
    if mount.returncode:
        raise OSError(mount.stderr.decode().strip())
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def fill_tmpfs(ledger, place):
    """A file system that is really full: runs, cache and masks on it."""
    case, small = "a full file system", place.root / "small"
    try:
        with tmpfs(small, "240k"):
            command = place.train("filled")
            command[command.index("--runs") + 1] = small
            problem = run(*command).not_refused("cannot write", "free space")
            subprocess.run(["mount", "-o", "remount,size=50m", small], check=True)
            if (small / "filled/args.json").exists():
                command[command.index("--name")] = "--resume"
                del command[command.index("--resume") + 2 :]
            problem = problem or run(*command).not_fine() or difference(small / "filled", place.whole)
            ledger.add("disk", case, problem)
        with tmpfs(small, "3m"):
            attempt = run("data.py", "--data", place.data, "--cache", small / "cache")
            problem = attempt.not_refused("cannot write the cache", "No space left")
            ledger.add("disk", case, problem or ("left a file" * bool(os.listdir(small / "cache"))))
        with tmpfs(small, "4k"):
            attempt = run("predict.py", "--whole", "--weights", place.weights, "--input", place.data / "test/images",
                          "--output", small)  # fmt: skip
            ledger.add("disk", case, attempt.not_refused("cannot write", "No space left"))
    except (OSError, FileNotFoundError) as error:
        ledger.skip("disk", case, str(error))


def forbidden_folders(ledger, place):
    """Folders and files without permission, and files where folders should be."""
    case, file = "no permission, no folder", place.root / "file"
    file.write_text("")
    data, locked, runs = copied(place, "locked-data", count=5), place.root / "locked", place.root / "locked-runs"
    cache = place.root / "locked-cache"
    assert not run("data.py", "--data", data, "--cache", cache).not_fine()
    locked.mkdir()
    runs.mkdir()
    shutil.copytree(stopped_run(place, "to-lock"), runs / "kept")
    secret = sorted((data / "train/images").iterdir())[0]
    read_only = [*place.data.rglob("*"), cache, *cache.iterdir(), locked, runs, *runs.rglob("*"), place.data]
    modes = {path: path.stat().st_mode for path in [*read_only, secret]}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    secret.chmod(0)
    photo = sorted((place.data / "test/images").iterdir())[0]
    fine, train = [], ["train.py", "--data", place.data, *place.flags]
    refused = [
        (place.train("x")[:2] + [locked] + place.train("x")[3:], "cannot make"),
        (place.train("x")[:2] + [file] + place.train("x")[3:], "cannot make"),
        (["train.py", "--runs", runs, "--data", place.data, "--resume", "kept"], "cannot write"),
        ([*train, "--runs", place.runs, "--name", "x", "--cache", locked / "new"], "cannot write the cache"),
        ([*train, "--runs", place.runs, "--name", "x", "--cache", file], "cannot write the cache"),
        (["data.py", "--data", data, "--cache", cache], secret.name),
        (["predict.py", "--weights", place.weights, "--input", secret, "--output", place.root / "o"], secret.name),
        (["predict.py", "--weights", place.weights, "--input", photo, "--output", locked], "cannot write"),
        (["predict.py", "--weights", place.weights, "--input", photo, "--output", file], "cannot make folder"),
        (["package.py", "--weights", place.weights, "--data", place.data, "--run", 0, "--zip", locked / "a.zip"],
         "cannot write"),
        (["prepare.py", "--raw", place.data, "--out", locked / "data"], "cannot write"),
        (["synth.py", "--out", locked / "drawn"], "cannot"),
        (["report.py", "--runs", runs], "cannot write"),
    ]  # fmt: skip
    try:
        probe = run("data.py", "--data", place.data, "--cache", locked / "probe", prepare=bound_by_permissions)
        if not probe.status:
            ledger.skip("disk", case, "root is not bound by permissions here")
            return
        fine.append(run(*place.train("read-only-data"), prepare=bound_by_permissions).not_fine())
        fine.append(fine[0] or difference(place.runs / "read-only-data", place.whole))
        for problem in fine:
            ledger.add("disk", case, problem)
        for command, told in refused:
            problem = run(*command, prepare=bound_by_permissions).not_refused(told)
            ledger.add("disk", case, problem and f"{' '.join(map(str, command))[:150]}: {problem}")
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def changing_files(ledger, place):
    """Files that vanish or change between the audit and the training, in the training's start, and before a resume."""
    case, data = "changing files", copied(place, "changing", count=10)
    masks = sorted((data / "train/masks").iterdir())
    cache, kept = place.root / "changing-cache", masks[0].read_bytes()

    def restore():
        masks[0].write_bytes(kept)

    vanish, change = masks[0].unlink, lambda: masks[0].write_bytes(masks[1].read_bytes())
    for act, where, told in (
        (vanish, None, "lack a partner"),
        (vanish, "data._key", masks[0].name),
        (vanish, "data._build", masks[0].name),
        (change, "data._build", "changed while"),
    ):
        shutil.rmtree(cache, ignore_errors=True)
        if where is None:
            act()
        prepare = at_call(where, 1, act) if where and where != "data._key" else at_call("hashlib.sha256", 1, act)
        attempt = run(*place.train("changed", data=data, cache=cache), prepare=prepare if where else None)
        problem = attempt.not_refused(told) or ("a run was begun" * (place.runs / "changed").exists())
        ledger.add("disk", case, problem and f"{act} at {where}: {problem}")
        restore()
    problem = run("data.py", "--data", data, "--cache", cache).not_fine()
    change()
    attempt = run("data.py", "--data", data, "--cache", cache)
    problem = problem or attempt.not_refused("other data", status=0)
    ledger.add("disk", case, problem)
    restore()

    prepare = at_call("losses.training_loss", 3, lambda: kill(signal.SIGTERM))
    run(*place.train("changed", data=data, cache=cache), prepare=prepare)
    change()
    attempt = run(*place.resume("changed", data=data, cache=cache))
    ledger.add("disk", case, attempt.not_refused("no longer those that", lines=1 + attempt.err.count("other data")))

    photos = sorted((copied(place, "vanishing") / "test/images").iterdir())
    attempt = run("predict.py", "--whole", "--weights", place.weights, "--input", photos[0].parent,
                  "--output", place.root / "m", prepare=at_call("images.read_image", 1, photos[1].unlink))  # fmt: skip
    problem = attempt.not_refused(photos[1].name)
    ledger.add("disk", case, problem or ("" if len(os.listdir(place.root / "m")) == 2 else "the others were not done"))


def same_name_twice(ledger, place):
    """A second training of a name is refused while the first one lives, and the first one is not disturbed."""
    case, name = "one name for two", "twice"
    attempt = Attempt(*place.train(name), prepare=at_call("losses.training_loss", 6, lambda: kill(signal.SIGSTOP)))
    deadline = time.monotonic() + PATIENCE
    while "(stopped)" not in Path(f"/proc/{attempt.pid}/status").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    second = [
        (place.resume(name), "another training"),
        (place.train(name), "exists"),
        (place.train(name, "--overwrite"), "another training"),
    ]
    for command, told in second:
        ledger.add("disk", case, run(*command).not_refused(told))
    attempt.send(signal.SIGCONT)
    ledger.add("disk", case, attempt.wait().not_fine() or difference(place.runs / name, place.whole))

    both = [Attempt(*place.train("race")) for _ in range(2)]
    lost = sorted((a.wait() for a in both), key=lambda a: a.status)
    problem = lost[0].not_fine() or difference(place.runs / "race", place.whole)
    problem = problem or lost[1].not_refused()
    ledger.add("disk", case, problem)


def stale_caches(ledger, place):
    """A cache cut short, of other data, of an older version, or left unfinished is not used, and that is told."""
    case, cache, data = "stale caches", place.root / "stale", copied(place, "stale-data", count=4)
    load = ["data.py", "--data", data, "--cache", cache]

    def older():
        import data

        data.CACHE_VERSION -= 1

    score = ["evaluate.py", "--weights", place.weights, "--val-split", 0.3, *load[1:]]
    ledger.add("disk", case, run(*score, prepare=older).not_fine())
    (path,) = cache.iterdir()
    ledger.add("disk", case, run(*load).not_refused("other data or versions", status=0))
    ledger.add("disk", case, run(*load).not_fine())
    (path,) = set(cache.iterdir()) - {path}
    whole = path.read_bytes()
    for spoilt in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"more"):
        path.write_bytes(spoilt)
        problem = run(*load).not_refused(path.name, "cut short" if len(spoilt) < len(whole) else "", status=0)
        ledger.add("disk", case, problem or ("it is not whole" if path.read_bytes() != whole else ""))
    (cache / "left.tmp").write_bytes(b"unfinished")
    path.unlink()
    problem = run(*load).not_refused("other data", status=0)
    ledger.add("disk", case, problem or ("unfinished files stay" if list(cache.glob("*.tmp")) else ""))
    path.unlink()
    path.mkdir()
    ledger.add("disk", case, run(*load).not_refused("cannot write the cache", lines=2))
