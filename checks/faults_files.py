"""Bad checkpoints and bad zips: none runs code, each is named; random bytes changed give no traceback."""

import io
import pickle
import struct
import zipfile

import numpy as np
import torch

import checkpoint
from checks.attempt import run
from checks.faults import TINY
from checks.test_submission import FAULTS, saved
from model import build
from parameters import PARAM_LIMIT


def attack(ledger, place, short):
    load_checkpoints(ledger, place, short)
    resume_from(ledger, place, short)
    judge_zips(ledger, place, short)
    mutate_zips(ledger, place, 5 if short else 60)


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def bad_checkpoints(place, marker):
    """{case: (bytes, what is told)}."""
    content, whole = place.content, place.weights.read_bytes()
    state = content["state_dict"]
    other = build("microunet", **{**TINY, "widths": [8, 8, 8, 8, 8]}).state_dict()
    fewer = {key: value[:11] if key.startswith("classifier") else value for key, value in state.items()}
    return {
        "empty": (b"", "damaged"), "random bytes": (np.random.default_rng(0).bytes(9999), "damaged"),
        "truncated": (whole[: len(whole) // 2], "damaged"), "last byte missing": (whole[:-1], "damaged"),
        "a zip of something else": (zipped({"a.txt": b"text"}), "damaged"), "text": (b"weights\n", "damaged"),
        "pickle with code": (pickle.dumps({**content, "state_dict": Hostile(marker)}), "damaged"),
        "code in a torch file": (saved({**content, "state_dict": Hostile(marker)}), "more than plain tensors"),
        "a whole module": (saved(build("microunet", **TINY)), "more than plain tensors"),
        "no dict": (saved([1, 2]), "no checkpoint"), "missing keys": (saved({"state_dict": state}), "lacks one of"),
        "weights alone": (saved(state), "lacks one of"),
        "other shapes": (saved({**content, "state_dict": other}), "another network"),
        "a missing weight": (saved({**content, "state_dict": dict(list(state.items())[1:])}), "another network"),
        "11 labels": (saved({**content, "state_dict": fewer}), "another network"),
        "unknown network": (saved({**content, "model": "resnet"}), "unknown network"),
        "unknown arguments": (saved({**content, "model_args": {"wings": 2}}), "does not fit"),
        "mad arguments": (saved({**content, "model_args": {"widths": "abcde"}}), "does not fit"),
        "model no name": (saved({**content, "model": ["microunet"]}), "damaged"),
        "arguments no dict": (saved({**content, "model_args": 5}), "damaged"),
        "weights no dict": (saved({**content, "state_dict": [1]}), "damaged"),
        "size a text": (saved({**content, "size": "64"}), "damaged"),
        "size 0": (saved({**content, "size": 0}), "damaged"),
        "size 1000000": (saved({**content, "size": 10**6}), "damaged"),
        "NaN weights": (saved({**content, "state_dict": {**state, "classifier.bias": torch.full((19,), torch.nan)}}),
                        "no finite numbers"),
        "weight no tensor": (saved({**content, "state_dict": {**state, "classifier.bias": 3}}), "damaged"),
    }  # fmt: skip


def load_checkpoints(ledger, place, short):
    """Every script that loads a checkpoint refuses a bad one by a line that names it."""
    marker, path = place.root / "executed", place.root / "bad.pt"
    photo = next((place.data / "test/images").iterdir())
    scripts = [
        ["predict.py", "--whole", "--weights", path, "--input", photo, "--output", place.root / "bad-masks"],
        ["evaluate.py", "--weights", path, "--data", place.data, "--cache", place.cache],
        ["package.py", "--weights", path, "--data", place.data, "--run", 0, "--zip", place.root / "bad.zip"],
        ["solution.py", "--weights", path, "--input", photo, "--output", place.root / "bad.png"],
        ["ensemble_tta.py", "--weights", path, path, "--average-weights", "--input", photo, "--output", path.parent],
        place.train("from-bad", "--from", path),
    ]  # fmt: skip
    for number, (case, (content, told)) in enumerate(bad_checkpoints(place, marker).items()):
        path.write_bytes(content)
        for command in [scripts[number % len(scripts)]] if short else scripts:
            if command[0] == "train.py" and told in ("unknown network", "does not fit"):
                continue  # the weights alone are taken, and they fit
            problem = run(*command).not_refused(path.name)
            if not problem and command[0] == "predict.py":
                problem = run(*command).not_refused(told)
            problem = problem or ("its code ran" if marker.exists() else "")
            ledger.add("files", "checkpoints", problem and f"{command[0]}, {case}: {problem}")


def resume_from(ledger, place, short):
    """A last.pt or args.json that is damaged or of another run is refused, and nothing of the run is touched."""
    whole = {path.name: path.read_bytes() for path in place.whole.iterdir()}
    state = checkpoint.load(place.whole / "last.pt")
    spoilt = {
        "last.pt truncated": ("last.pt", whole["last.pt"][:-1000]),
        "last.pt without optimiser": ("last.pt", saved({k: v for k, v in state.items() if k != "optimiser"})),
        "last.pt without progress": ("last.pt", saved({k: v for k, v in state.items() if k != "progress"})),
        "last.pt without average": ("last.pt", saved({**state, "average": None})),
        "last.pt is best.pt": ("last.pt", whole["best.pt"]),
        "optimiser of another": ("last.pt", saved({**state, "optimiser": {"state": {}, "param_groups": []}})),
        "args.json cut": ("args.json", whole["args.json"][:99]),
        "args.json a list": ("args.json", b"[]"),
        "args.json without arguments": ("args.json", b"{}"),
        "args.json of unknown arguments": ("args.json", b'{"args": {"wings": 2}}'),
        "metrics.jsonl of no lines": ("metrics.jsonl", b"null\n[]\n"),
    }
    for case in list(spoilt)[::4] if short else spoilt:
        name, content = spoilt[case]
        (place.whole / name).write_bytes(content)
        problem = run(*place.resume("whole")).not_refused(name)
        ledger.add("files", "resumed from damage", problem and f"{case}: {problem}")
        for kept, data in whole.items():
            (place.whole / kept).write_bytes(data)


def zipped(entries, method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def other_faults(names):
    """{case: (change of a sound zip's entries, check that must fail)} beside those of test_submission.py."""
    mask = names[0]

    def only(z, change):
        return {change(k): v for k, v in z.items()}

    return {
        "backslashes": (lambda z: z | {"masks\\x.png": b""}, "members"),
        "a drive": (lambda z: z | {"C:/masks/x.png": b""}, "members"),
        "dots within": (lambda z: z | {"masks/../../x.png": b""}, "members"),
        "a bomb": (lambda z: z | {"solution/zeros": bytes(1 << 26)}, "members"),
        "masks in masks": (lambda z: only(z, lambda k: k.replace("masks/", "masks/masks/")), "names"),
        "names in capitals": (lambda z: only(z, lambda k: k.replace(".png", ".PNG")), "names"),
        "an empty mask": (lambda z: z | {mask: b""}, "masks"),
        "a JPEG for a mask": (lambda z: z | {mask: b"\xff\xd8\xff\xe0" + bytes(99)}, "masks"),
        "no masks": (lambda z: {k: v for k, v in z.items() if "masks" not in k}, "names"),
        "an empty zip": (lambda z: {}, "folders"),
        "too many parameters": (
            lambda z: z | {"solution/ckpt.pth": saved({"state_dict": {"w": torch.zeros(PARAM_LIMIT)}})},
            "parameters",
        ),
        "NaN in it": (
            lambda z: z | {"solution/ckpt.pth": saved({"state_dict": {"w": torch.full((9,), torch.nan)}})},
            "checkpoint",
        ),
    }


def judge_zips(ledger, place, short):
    """check_submission.py names each fault, with status 1 and no traceback."""
    sound, bad = place.root / "sound.zip", place.root / "judged.zip"
    made = run("package.py", "--weights", place.weights, "--data", place.data, "--run", 1, "--zip", sound)
    ledger.add("files", "zips", made.not_fine())
    with zipfile.ZipFile(sound) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    photos = sorted(path.stem for path in (place.data / "test/images").iterdir())
    names = [f"masks/{stem}.png" for stem in photos]

    def judged(content):
        bad.write_bytes(content)
        return run("check_submission.py", "--zip", bad, "--data", place.data, "--phase", "test")

    def renamed(fault):  # test_submission.py's images are called a, b, c
        back = dict(zip(("masks/a.png", "masks/b.png", "masks/c.png"), names, strict=True))
        there = {new: old for old, new in back.items()}
        changed = FAULTS[fault]({there.get(name, name): data for name, data in entries.items()})
        return {back.get(name, name): data for name, data in changed.items()}

    cases = {fault: (lambda z, f=fault: renamed(f), fault.split(":")[0]) for fault in FAULTS} | other_faults(names)
    for case in list(cases)[::5] if short else cases:
        change, check = cases[case]
        attempt = judged(zipped(change(entries)))
        named = any(line.startswith(f"FAIL  {check}") for line in attempt.out.splitlines())
        problem = attempt.trouble() or ("" if attempt.status == 1 and not attempt.err else f"{case}: {attempt.out}")
        ledger.add("files", "zips", problem or ("" if named else f"{case}: no FAIL of {check}: {attempt.out}"))
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        ledger.add("files", "zips", judged(zipped(entries, method)).not_fine())


def mutate_zips(ledger, place, count):
    """A sound zip with random bytes changed: a verdict or a refusal, never a traceback."""
    rng, whole, path = np.random.default_rng(6), (place.root / "sound.zip").read_bytes(), place.root / "mutant.zip"
    directory = struct.unpack("<I", whole[-6:-2])[0]  # where the list of members begins
    for i in range(count):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 9)):
            data[rng.integers(directory if i % 2 else 0, len(data))] = rng.integers(256)
        path.write_bytes(data[: rng.integers(len(data))] if i % 5 == 0 else data)
        attempt = run("check_submission.py", "--zip", path, "--data", place.data, "--phase", "test")
        problem = attempt.trouble() or ("" if attempt.status in (0, 1, 2) else f"status {attempt.status}")
        ledger.add("files", "mutated zips", problem and f"{i}: {problem}")
