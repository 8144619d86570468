"""Same in, same out: trainings of one seed to the byte; predictions whatever the batch and the order."""

import numpy as np
import torch

import checkpoint
from checks.attempt import run
from checks.same import difference
from data import load_pairs
from evaluate import evaluate
from labels import NUM_CLASSES
from model import build
from views import label_map, log_probabilities

# Largest difference of a log-probability where batches are cut otherwise: the order of float32 sums.
ROUNDING = 1e-3


def attack(ledger, place, short):
    train_again(ledger, place, short)
    predict_again(ledger, place)
    other_batches(ledger, place, short)


def train_again(ledger, place, short):
    """A second training of the same seed has the same bytes; one of another seed has not."""
    for number in range(1 if short else 3):
        folder = place.runs / f"again-{number}"
        ledger.add("same", "trainings", run(*place.train(folder.name)).not_fine() or difference(folder, place.whole))
    if short:
        return
    problem = run(*place.train("other-seed", "--seed", "7")).not_fine()
    same = not problem and not difference(place.runs / "other-seed", place.whole)
    ledger.add("same", "trainings", problem or ("another seed changes nothing" if same else ""))


def predict_again(ledger, place):
    """Masks of a folder, again, and of its files one by one and in another order."""
    folder, out = place.data / "train/images", place.root / "once"
    command = ["predict.py", "--whole", "--weights", place.weights, "--views", "flip,scales"]
    problem = run(*command, "--input", folder, "--output", out).not_fine()
    problem = problem or run(*command, "--input", folder, "--output", place.root / "again").not_fine()
    for path in sorted(folder.iterdir(), reverse=True)[:3]:
        problem = problem or run(*command, "--input", path, "--output", place.root / "alone").not_fine()
    for name in ("again", "alone"):
        differing = [p.name for p in (place.root / name).glob("*") if p.read_bytes() != (out / p.name).read_bytes()]
        ledger.add("same", "masks", problem or (f"{differing} of {name} differ" if differing else ""))


def other_batches(ledger, place, short):
    """Log-probabilities and confusions do not depend on the batch an image lies in, beyond rounding."""
    pairs = load_pairs(place.data, place.cache)
    indices = np.arange(len(pairs.names))
    networks = {"checkpoint": checkpoint.load_model(place.weights)[0]}
    for name in () if short else ("microunet", "microsegformer"):
        torch.manual_seed(0)
        networks[name] = build(name).eval()
    for name, model in networks.items():
        images = torch.from_numpy(pairs.images[indices])
        together = log_probabilities([model], images, 64, (True, (1.0,)))
        alone = torch.cat([log_probabilities([model], image[None], 64, (True, (1.0,))) for image in images])
        backwards = log_probabilities([model], images.flip(0), 64, (True, (1.0,))).flip(0)
        for other in (alone, backwards):
            most = (together - other).abs().max().item()
            ledger.add("same", "batches and order", f"{name}: {most} apart" if most > ROUNDING else "")
            moved = (label_map(together, 512, 512) != label_map(other, 512, 512)).float().mean().item()
            ledger.add("same", "batches and order", f"{name}: {moved:.2%} of pixels" if moved > 1e-3 else "")
        one, three = (evaluate(model, pairs, indices, 64, torch.device("cpu"), batch=batch)[0] for batch in (1, 3))
        moved = np.abs(one - three).sum() / 2 / one.sum()
        problem = f"{name}: confusions differ in {moved:.2%}" if moved > 1e-3 or one.shape[1] != NUM_CLASSES else ""
        ledger.add("same", "batches and order", problem)
