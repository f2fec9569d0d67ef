"""What does every ingredient of the training bring on real photographs? Each is left out once.

    python tests/benchmarks/ablation.py FOLDER [--photographs N] [--epochs N] [--seeds 2024 ...] [--only NAME ...]

Pretrains `quick` on drawn pictures for a few epochs, as it is and without each ingredient, every time with as many
updates. Every training is measured as in photos.py on photographs spread over FOLDER, and compared photograph by
photograph with the one that leaves nothing out. Weights are kept in OUTPUT_DIR/ablation; an interrupted run goes on.
Two epochs take some 12 minutes on two cores, and meanwhile 2 GB of disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
from pathlib import Path

import measure
import numpy as np
import photos

import restoration_utils as ru  # photos has put it on the path

WITHOUT = {
    "nothing": {},
    "scenes": {"scenes": 0, "portraits": 350, "max_faces": 350},  # to train on, as many originals: 160 + 120, 280 + 0
    "windows": {"windows": 0},
    "undamaged pairs": {"undamaged": False},
    "colour lessons": {"color_lessons": 0},
    "aged pairs and lessons": {"kinds": ru.KINDS[:3]},
}


def train(name: str, seed: int, epochs: int, outputs: Path) -> Path:
    """Pretrains without one ingredient, if that has not been done; the weights of the best epoch."""
    common = dataclasses.replace(ru.PROFILES["quick"], seed=seed, pretrain_epochs=epochs)
    settings, folder = dataclasses.replace(common, **WITHOUT[name]), outputs / f"{name}_{seed}_{epochs}"
    places = ru.Places("here", folder, folder / "degraded")
    weights = folder / "pretrained_generator_best.pth"
    if (folder / "ended").exists():
        return weights
    folder.mkdir(parents=True, exist_ok=True)
    pairs = ru.prepare_pairs(ru.find_faces(settings, places), places, settings)
    split, run = ru.split_pairs(pairs, settings), ru.Run(settings, places, ru.choose_device(), ru.faces_id(pairs))
    originals = common.max_faces * (1 - common.pretrain_validation) + common.scenes
    length = round(originals * (len(common.kinds) + 2))  # the undamaged, and the aged twice
    rng, chosen = np.random.default_rng(seed), []
    while len(chosen) < length:
        chosen += [split.pretrain_train[i] for i in rng.permutation(len(split.pretrain_train))]
    ru.pretrain_generator(ru.build_generator(settings), chosen[:length], split.pretrain_validation, run)
    for stored in folder.glob("*.npy"):  # more than a gigabyte
        stored.unlink()
    (folder / "ended").touch()
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photographs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[ru.Settings.seed])
    parser.add_argument("--only", nargs="+", choices=WITHOUT, default=list(WITHOUT))
    given = parser.parse_args()
    if os.environ.get("FACES_DIR") or os.environ.get("RESTORATION_FACES"):
        parser.error("this trains on drawn portraits: unset FACES_DIR and RESTORATION_FACES")
    ru.keep_freed_memory()
    names, device = ru.list_images(given.folder)[0], ru.choose_device()
    files = [given.folder / names[i] for i in sorted({*np.linspace(0, len(names) - 1, given.photographs, dtype=int)})]
    whole: dict = {}
    for seed, name in itertools.product(given.seeds, dict.fromkeys(["nothing", *given.only])):
        generator = ru.load_generator(train(name, seed, given.epochs, ru.find_places().outputs / "ablation"), device)
        print(f"\nwithout {name}, seed {seed}, {given.epochs} epochs, {len(files)} photographs")
        for kind, rows in photos.tables(files, generator, (*photos.SETTINGS.kinds, "clean"), None):
            photos.print_table(kind, rows)
            after = np.array([row["after"] for row in rows])
            mean, low, high = measure.mean_interval(after - whole.setdefault((seed, kind), after))
            print(f"{'':9s} against all of it {mean:+.2f} dB ({low:+.2f} to {high:+.2f})")


if __name__ == "__main__":
    main()
