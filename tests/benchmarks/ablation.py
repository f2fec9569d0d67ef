"""What does every ingredient of the training bring on real photographs? Each is left out once.

    python tests/benchmarks/ablation.py FOLDER [--photographs N] [--epochs N] [--seeds 2024 ...] [--only NAME ...]

Pretrains `quick` on drawn pictures for a few epochs, as it is and without each ingredient, every time with as many
updates. Every training is measured as in photos.py on photographs spread over FOLDER, and compared photograph by
photograph with the one of the same seed that leaves nothing out. What is done is kept in OUTPUT_DIR/ablation; an
interrupted run goes on. Two epochs take some 12 minutes on two cores, and meanwhile 2 GB of disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
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
    "grain lessons": {"grain_lessons": 0},
    "aged pairs and lessons": {"kinds": ru.KINDS[:3]},
}


def settings_of(name: str, seed: int, epochs: int) -> ru.Settings:
    """Those of `quick`, without one ingredient."""
    common = dataclasses.replace(ru.PROFILES["quick"], seed=seed, pretrain_epochs=epochs)
    return dataclasses.replace(common, **WITHOUT[name])


def train(name: str, seed: int, epochs: int, folder: Path) -> None:
    """Pretrains without one ingredient; writes pretrained_generator_best.pth to the folder."""
    settings, places = settings_of(name, seed, epochs), ru.Places("here", folder, folder / "degraded")
    pairs = ru.prepare_pairs(ru.find_faces(settings, places), places, settings)
    split, run = ru.split_pairs(pairs, settings), ru.Run(settings, places, ru.choose_device(), ru.faces_id(pairs))
    common = settings_of("nothing", seed, epochs)
    originals = common.max_faces * (1 - common.pretrain_validation) + common.scenes
    length = round(originals * (len(common.kinds) + 2))  # the undamaged, and the aged twice
    rng, chosen = np.random.default_rng(seed), []
    while len(chosen) < length:
        chosen += [split.pretrain_train[i] for i in rng.permutation(len(split.pretrain_train))]
    ru.pretrain_generator(ru.build_generator(settings), chosen[:length], split.pretrain_validation, run)
    for stored in folder.glob("*.npy"):  # more than a gigabyte
        stored.unlink()


def measured(name: str, seed: int, epochs: int, files: list[Path], outputs: Path) -> dict[str, list[dict]]:
    """The measurements of all photographs after a training without one ingredient, by kind; done now, or before."""
    folder = outputs / f"{name}_{seed}_{epochs}"
    result = folder / f"{files[0].parent.name}_{ru.fingerprint(*(path.name for path in files))}.json"
    if not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "pretrained_generator_best.pth").exists() or [*folder.glob("*.npy")]:
            train(name, seed, epochs, folder)
        generator = ru.load_generator(folder / "pretrained_generator_best.pth", ru.choose_device())
        ru.write_json(result, dict(photos.tables(files, generator, (*photos.SETTINGS.kinds, "clean"), None)))
    return json.loads(result.read_text())


def compare(kind: str, rows: dict[str, list[list[dict]]]) -> None:
    """A line for every ingredient: the means of all seeds, and what is lost without it, photograph by photograph."""
    print(f"\n{kind}")
    values = {name: [np.array([row["after"] for row in seed]) for seed in seeds] for name, seeds in rows.items()}
    for name, seeds in rows.items():
        mean, low, high = measure.mean_interval(np.mean(values[name], 0) - np.mean(values["nothing"], 0))
        against = "" if name == "nothing" else f"{mean:+.2f} dB ({low:+.2f} to {high:+.2f})"
        inside = np.array([row["after inside"] for seed in seeds for row in seed], float)  # None becomes NaN
        inside = f", inside {np.nanmean(inside):.1f}" if np.isfinite(inside).any() else ""
        much = sum(row["share"] > photos.MUCH for seed in seeds for row in seed)
        inside += f", over {photos.MUCH:.1%} repainted in {much}" if kind == "clean" else ""
        by_seed = " ".join(f"{after.mean():.2f}" for after in values[name])
        print(f"  without {name:22s} {by_seed}  {against:26s} worst {np.min(values[name]):.1f}{inside}")


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
    names = ru.list_images(given.folder)[0]
    files = [given.folder / names[i] for i in sorted({*np.linspace(0, len(names) - 1, given.photographs, dtype=int)})]
    outputs, rows = ru.find_places().outputs / "ablation", {}
    for seed, name in itertools.product(given.seeds, dict.fromkeys(["nothing", *given.only])):
        print(f"\nwithout {name}, seed {seed}, {given.epochs} epochs")
        for kind, table in measured(name, seed, given.epochs, files, outputs).items():
            rows.setdefault(kind, {}).setdefault(name, []).append(table)
    print(f"\nPSNR in dB by seed, {len(files)} photographs of {given.folder.name}, {given.epochs} epochs")
    for kind, by_name in rows.items():
        compare(kind, by_name)


if __name__ == "__main__":
    main()
