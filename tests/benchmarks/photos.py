"""How well are photographs restored at their own size, and how much harm comes to good ones?

    python tests/benchmarks/photos.py FOLDER [--weights FILE] [--first N] [--sheets FOLDER]

Damages every photograph of a folder in every way, restores it with `restore_photo`, and prints a
table: PSNR in dB before and after, with the 95 % interval of the mean, the worst case by name, PSNR inside what is
physically damaged, and in how many pictures over 0.3 % were repainted. Beside it stands what one would use without a
network. With --sheets, degraded, restored, original and mask side by side, to look at; the worst first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import measure
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import restoration_utils as ru

MUCH = 0.003  # of a picture: that much repainted in an undamaged one is harm
SETTINGS = ru.FULL


def psnr(image: np.ndarray, truth: np.ndarray, where: np.ndarray | None = None) -> float:
    """PSNR in dB on 8 bits, of the pixels `where` (H, W) if given; NaN where there are none, at most 100."""
    error = (image.astype(np.float64) - truth) ** 2
    error = error if where is None else error[where]
    return 10 * np.log10(255**2 / max(error.mean(), 255**2 / 1e10)) if error.size else np.nan


def without_a_network(kind: str, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Non-local means of strength 12; Telea with the true mask; aged pictures: strength 6, channels stretched."""
    if kind == "noisy":
        return measure.non_local_means(image, 12)
    if kind == "occluded":
        return measure.inpaint(image, mask, cv2.INPAINT_TELEA)
    return measure.stretch(measure.non_local_means(image, 6)) if kind == "aged" else image


def measure_photo(path: Path, kind: str, generator: ru.UNetGenerator, folder: Path) -> tuple[dict, list[np.ndarray]]:
    """Damages one photograph, as a file, and restores it; the measurements, and the pictures for a sheet."""
    original, pair = ru.read_image(path), ru.Pair(kind, path.name, "", path, folder / f"degraded_{kind}.jpg")
    degraded, truth, mask = original, original, np.zeros(original.shape[:2], bool)
    if kind != "clean":
        damage = ru.degrade(original, kind, np.random.default_rng(pair.seed(SETTINGS)), SETTINGS)
        ru.write_image(pair.degraded, damage, SETTINGS.jpeg_quality)
        degraded, mask = ru.read_image(pair.degraded), pair.mask(original.shape, SETTINGS) > 0
        is_grey = kind == "aged" and ru.is_black_and_white(np.random.default_rng(pair.seed(SETTINGS)))
        truth = ru.to_grey(original) if is_grey else original
    restored, repainted = ru.restore_photo(degraded, generator)
    pictures = {"before": degraded, "after": restored, "without": without_a_network(kind, degraded, mask)}
    row = {"name": path.name, "share": float((repainted > 127).mean())}
    row |= {key: psnr(picture, truth) for key, picture in pictures.items()}
    row |= {f"{key} inside": psnr(picture, truth, mask) for key, picture in pictures.items()}
    return row, [degraded, restored, truth, cv2.merge([np.uint8(255 * mask)] * 3)]


def tables(
    files: list[Path], generator: ru.UNetGenerator, kinds: tuple[str, ...], sheets: Path | None
) -> Iterator[tuple[str, list[dict]]]:
    """For every kind, the measurements of all photographs; sheets are written beside."""
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            rows = []
            for path in files:
                row, pictures = measure_photo(path, kind, generator, Path(folder))
                rows.append(row)
                if sheets:
                    gained = row["after"] - min(row["before"], 60)
                    name = f"{kind}_{100 + gained:06.2f}_{path.stem}.jpg"  # the worst first: by the gain in dB, + 100
                    ru.write_image(sheets / name, np.hstack(pictures))
            yield kind, rows


def print_table(kind: str, rows: list[dict]) -> None:
    """One kind, in three lines."""
    before, after, without = ([row[key] for row in rows] for key in ("before", "after", "without"))
    mean, low, high = measure.mean_interval(after)
    worst = min(rows, key=lambda row: row["after"])
    start = "" if kind == "clean" else f"{np.mean(before):.1f} dB, "
    print(
        f"{kind:9s} {start}restored {mean:.2f} ({low:.2f} to {high:.2f}), worst {worst['after']:.1f} ({worst['name']})"
    )
    if kind == "clean":
        much = sum(row["share"] > MUCH for row in rows)
        print(f"{'':9s} over {MUCH:.1%} repainted in {much} of {len(rows)}")
        return
    lost = sum(row["after"] < row["before"] for row in rows)
    print(
        f"{'':9s} without a network {np.mean(without):.2f}; further from the truth than before: {lost} of {len(rows)}"
    )
    inside = {key: np.array([row[f"{key} inside"] for row in rows]) for key in ("before", "after", "without")}
    if np.isfinite(inside["before"]).any():
        values = ", ".join(f"{key} {np.nanmean(value):.1f}" for key, value in inside.items())
        print(f"{'':9s} inside the damage: {values} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--weights", type=Path, default=ru.find_places().outputs / "face_restoration_generator_final.pth"
    )
    parser.add_argument("--first", type=int, help="only the first so many photographs")
    parser.add_argument("--kinds", nargs="+", default=[*SETTINGS.kinds, "clean"])
    parser.add_argument("--sheets", type=Path)
    given = parser.parse_args()
    ru.keep_freed_memory()
    generator = ru.load_generator(given.weights, ru.choose_device())
    files = [given.folder / name for name in ru.list_images(given.folder)[0]][: given.first]
    print(f"{len(files)} photographs of {given.folder.name}, weights {given.weights.name}")
    for kind, rows in tables(files, generator, tuple(given.kinds), given.sheets):
        print_table(kind, rows)


if __name__ == "__main__":
    main()
