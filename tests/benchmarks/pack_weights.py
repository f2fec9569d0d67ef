"""Packs a trained generator for the repository: 16-bit numbers, half the size, in outputs/restoration_weights.pth.

    RESTORATION_PROFILE=long OUTPUT_DIR=outputs/long jupyter nbconvert ... notebooks/01*.ipynb ... notebooks/05*.ipynb
    python tests/benchmarks/pack_weights.py outputs/long/face_restoration_generator_final.pth

Prints how much the same portrait comes back differently: at most a level or two.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import restoration_utils as ru


def pack(source: Path, destination: Path) -> None:
    """Copies a checkpoint's generator, its floats in 16 bits."""
    content = ru.load_checkpoint(source)
    kept = {name: content[name] for name in ("format", "settings", "faces", "begun_from", "epoch")}
    weights = {name: w.half() if w.is_floating_point() else w for name, w in content["generator"].items()}
    with ru.atomic(destination) as temporary:
        torch.save(kept | {"generator": weights}, temporary)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    pack(source, ru.SHIPPED_WEIGHTS)
    print(f"{ru.SHIPPED_WEIGHTS}: {ru.SHIPPED_WEIGHTS.stat().st_size / 1e6:.1f} MB")
    rng = np.random.default_rng(0)
    aged = ru.age_photo(ru.draw_portrait(rng, 512), rng)
    pair = [ru.restore_photo(aged, ru.load_generator(path)).image.astype(int) for path in (source, ru.SHIPPED_WEIGHTS)]
    off = np.abs(pair[0] - pair[1])
    print(f"differs by {off.mean():.3f} levels on average, by {off.max()} at most")
