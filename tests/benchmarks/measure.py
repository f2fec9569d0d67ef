"""How good is a generator, next to doing nothing and next to what one would reach for without it?

Notebook 06 uses the functions, which lie here since what one notebook alone needs does not burden the module. The
command line measures the weights in an outputs folder and prints the tables:

    python tests/benchmarks/measure.py [OUTPUT_DIR]

Everything is measured at 256 px on clipped 8-bit RGB values, on validation faces that no stage has trained on; realism
in squares of 64 px. The classical alternatives work on the same 256 px images as the network. Non-local means gets its
best strength, found on training faces; the inpainting methods get the true mask, which the network does not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import restoration_utils as ru

STRENGTHS = (2, 3, 4, 5, 6, 8, 10, 15)  # of non-local means
REGIONS = ("inside", "border", "outside")  # of the holes
BORDER = 2  # px on both sides of a hole's edge
FACES = 60  # whose realism is judged at most
CROP = 64  # px, what the classifier that tells restored from original decides on

# ----------------------------------------------------------------------------------------------------------------------
# Classical alternatives: uint8 BGR (H, W, 3) in and out
# ----------------------------------------------------------------------------------------------------------------------


def non_local_means(image: np.ndarray, strength: float) -> np.ndarray:
    """Buades et al. 2005, as OpenCV has it: patches of 7 px, a window of 21 px, one strength for light and colour."""
    return cv2.fastNlMeansDenoisingColored(image, None, strength, strength, 7, 21)


def undo_mean_fading(image: np.ndarray, settings: ru.Settings) -> np.ndarray:
    """Divides S and V of HSV by the means of the ranges that the damage draws them from."""
    hsv = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_BGR2HSV)
    hsv[..., 1] /= np.mean(settings.saturation)
    hsv[..., 2] /= np.mean(settings.value)
    hsv[..., 1:] = hsv[..., 1:].clip(0, 1)
    return np.rint(cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR) * 255).astype(np.uint8)


def equalize(image: np.ndarray) -> np.ndarray:
    """Contrast-limited adaptive histogram equalisation (CLAHE) of the lightness, limit 2, 8 x 8 tiles."""
    lab = cv2.cvtColor(image, cv2.COLOR_BGR2LAB)
    lab[..., 0] = cv2.createCLAHE(2.0, (8, 8)).apply(np.ascontiguousarray(lab[..., 0]))
    return cv2.cvtColor(lab, cv2.COLOR_LAB2BGR)


def stretch(image: np.ndarray) -> np.ndarray:
    """Stretches every channel so that its darkest and lightest hundredth become black and white."""
    low, high = np.percentile(image, (1, 99), axis=(0, 1))
    return np.rint(((image - low) / np.maximum(high - low, 1)).clip(0, 1) * 255).astype(np.uint8)


def inpaint(image: np.ndarray, hole: np.ndarray, method: int) -> np.ndarray:
    """Fills the true hole, float (H, W), from around it: Telea 2004 or Navier-Stokes (Bertalmio et al. 2001)."""
    return cv2.inpaint(image, (hole > 0).astype(np.uint8), 3, method)


def classical_methods(kind: str, strength: float, settings: ru.Settings) -> dict[str, Callable]:
    """By name, what one would use without a network for a kind of damage: functions of (image, hole)."""
    if kind == "noisy":
        return {f"non-local means, {strength}": lambda image, hole: non_local_means(image, strength)}
    if kind == "color":
        fixed = {"inverse of the mean fading": lambda image, hole: undo_mean_fading(image, settings)}
        return fixed | {"CLAHE": lambda image, hole: equalize(image)}
    if kind == "aged":
        return {"denoised, channels stretched": lambda image, hole: stretch(non_local_means(image, 6))}
    if kind == "occluded":
        telea = {"Telea, true mask": lambda image, hole: inpaint(image, hole, cv2.INPAINT_TELEA)}
        return telea | {"Navier-Stokes, true mask": lambda image, hole: inpaint(image, hole, cv2.INPAINT_NS)}
    return {}


def to_arrays(images: Tensor) -> list[np.ndarray]:
    """Networks' images (N, 3, H, W) as uint8 BGR arrays."""
    return [np.ascontiguousarray(i.permute(1, 2, 0).cpu().numpy()[..., ::-1]) for i in ru.to_pixels(images)]


def to_images(arrays: Sequence[np.ndarray]) -> Tensor:
    """The way back of `to_arrays`."""
    stacked = np.stack([array[..., ::-1] for array in arrays])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def tune_non_local_means(pairs: Sequence[ru.Pair], settings: ru.Settings, images: int = 12) -> float:
    """The strength with the best mean PSNR on some noisy training pairs; climbs to it from the middle."""
    noisy = [pair for pair in pairs if pair.kind == "noisy"][:images]
    degraded, original, _ = map(list, zip(*ru.FaceRestorationGANDataset(noisy)))
    degraded, original = to_arrays(torch.stack(degraded)), torch.stack(original)

    @functools.cache
    def score(number: int) -> float:
        """Mean PSNR at one strength; too little and too much of it are worse on both sides."""
        denoised = to_images([non_local_means(d, STRENGTHS[number]) for d in degraded])
        return ru.image_metrics(denoised, original)["psnr"].mean().item()

    best, last = len(STRENGTHS) // 2, len(STRENGTHS) - 1
    while (better := max((max(best - 1, 0), best, min(best + 1, last)), key=score)) != best:
        best = better
    return STRENGTHS[best]


# ----------------------------------------------------------------------------------------------------------------------
# Image by image
# ----------------------------------------------------------------------------------------------------------------------


def region_psnr(images: Tensor, originals: Tensor, hole: Tensor) -> dict[str, Tensor]:
    """PSNR in dB inside the damage, outside it, and within 2 px of its edge; (N,) each. `hole` is (N, 1, H, W).

    NaN for an image without a pixel in that region: very narrow pictures have holes of fewer than 4 px.
    """
    error = (ru.to_pixels(images).double() - ru.to_pixels(originals).double()).square().mean(1, keepdim=True)
    size = 2 * BORDER + 1
    wide = F.max_pool2d(hole, size, stride=1, padding=BORDER)
    narrow = 1 - F.max_pool2d(1 - hole, size, stride=1, padding=BORDER)
    regions = {"inside": narrow > 0.99, "outside": wide < 0.01}
    regions["border"] = ~(regions["inside"] | regions["outside"])
    means = {name: (error * r).sum((1, 2, 3)) / r.sum((1, 2, 3)) for name, r in regions.items()}
    return {f"psnr_{name}": 10 * torch.log10(255**2 / mean) for name, mean in means.items()}


def restore_all(generators: Mapping[str, nn.Module], degraded: Tensor, run: ru.Run) -> dict[str, Tensor]:
    """What each generator makes of a batch, on the CPU."""
    results = {}
    for name, generator in generators.items():
        with ru.evaluating(generator):
            results[name] = generator(degraded.to(run.device, memory_format=torch.channels_last)).cpu()
    return results


def measure(generators: Mapping[str, nn.Module], pairs: Sequence[ru.Pair], strength: float, run: ru.Run) -> list[dict]:
    """One row per image and method: kind, name, method, psnr, ssim, l1; for physical damage also by region.

    Methods are `degraded` (doing nothing), those of `generators` by name, and the classical ones. The kind `clean` has
    an original on both sides.
    """
    clean = [pair.undamaged() for pair in pairs if pair.kind == pairs[0].kind]
    rows = []
    for kind in (*run.settings.kinds, "clean"):
        chosen = [pair for pair in (*pairs, *clean) if pair.kind == kind]
        classical = classical_methods(kind, strength, run.settings)
        for degraded, original, info in ru.make_loader(chosen, run.settings.pretrain_batch, run.device):
            results = {"degraded": degraded} | restore_all(generators, degraded, run)
            for name, method in classical.items():
                results[name] = to_images([method(*x) for x in zip(to_arrays(degraded), info["hole"][:, 0].numpy())])
            for method, images in results.items():
                values = ru.image_metrics(images, original)
                if kind in ru.MASKS:
                    values |= region_psnr(images, original, info["hole"])
                for i, name in enumerate(info["name"]):
                    rows.append(
                        {"kind": kind, "name": name, "method": method} | {k: v[i].item() for k, v in values.items()}
                    )
    return rows


def values_of(rows: Sequence[Mapping], kind: str, method: str, key: str) -> np.ndarray:
    """One measurement of all images of a kind."""
    return np.array([row[key] for row in rows if row["kind"] == kind and row["method"] == method])


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the bounds of its 95 % interval (Student's t, which is right for few faces, too).

    Without bounds (minus and plus infinity) if there is only one value, which says nothing about how much they vary.
    """
    values = np.asarray(values, dtype=float)
    mean, count = float(values.mean()), len(values)
    if count == 1:
        return mean, -np.inf, np.inf
    spread = values.std(ddof=1) if np.ptp(values) else 0.0  # of equal values, std may be a rounding error
    half = float(stats.t.ppf(0.975, count - 1) * spread / count**0.5)
    return mean, mean - half, mean + half


def summarize(rows: Sequence[Mapping]) -> dict[str, dict[str, dict]]:
    """Means over images by kind and method; None where they are infinite (an original measured against itself).

    `gain` is the mean paired gain in PSNR over `degraded` with its 95 % interval, `improved` the share of images with
    a gain above zero. Images without a pixel in a region are left out of its mean, which is None without any other;
    `psnr_inside_left_out` and its like, there only if not zero, say how many.
    """
    summary: dict[str, dict[str, dict]] = {}
    for kind, method in dict.fromkeys((row["kind"], row["method"]) for row in rows):
        keys = next(row for row in rows if row["kind"] == kind).keys() - {"kind", "name", "method"}
        cell = summary.setdefault(kind, {})[method] = {}
        for key in sorted(keys):
            values = values_of(rows, kind, method, key)
            known = values[~np.isnan(values)]
            cell[key] = float(known.mean()) if len(known) and np.isfinite(known).all() else None
            if len(known) < len(values):
                cell[f"{key}_left_out"] = len(values) - len(known)
        if method != "degraded" and kind != "clean":
            gain = values_of(rows, kind, method, "psnr") - values_of(rows, kind, "degraded", "psnr")
            cell |= {"gain": mean_interval(gain), "improved": float((gain > 0).mean())}
    return summary


def or_dash(value: float | None) -> str:
    """A number in a table; a dash where there is none."""
    return "-" if value is None else f"{value:.2f}"


def print_summary(summary: Mapping[str, Mapping[str, Mapping]]) -> None:
    """The summary as a table."""
    print(f"{'kind':9s} {'method':28s} {'PSNR, dB':>8s} {'SSIM':>7s} {'L1':>6s}  {'gain in PSNR, 95 %':25s} improved")
    for kind, methods in summary.items():
        for method, cell in methods.items():
            psnr = "inf" if cell["psnr"] is None else f"{cell['psnr']:.2f}"
            line = f"{kind:9s} {method:28s} {psnr:>8s} {cell['ssim']:7.4f} {cell['l1']:6.2f}  "
            if "gain" in cell:
                line += "{:+6.2f} ({:+.2f} to {:+.2f})".format(*cell["gain"]).ljust(26) + f"{cell['improved']:.0%}"
            print(line)


def print_regions(summary: Mapping[str, Mapping[str, Mapping]]) -> None:
    """PSNR of the images with physical damage by region, and how many have no pixel there."""
    for kind in (kind for kind in summary if kind in ru.MASKS):
        print(f"{kind:28s}" + "".join(f"{region:>10s}" for region in REGIONS))
        for method, cell in summary[kind].items():
            print(f"{method:28s}" + "".join(f"{or_dash(cell[f'psnr_{region}']):>7s} dB" for region in REGIONS))
        for region in REGIONS:
            if left_out := summary[kind]["degraded"].get(f"psnr_{region}_left_out"):
                print(f"left out of '{region}', without a pixel there: {left_out} image(s)")


# ----------------------------------------------------------------------------------------------------------------------
# Realism: does a set of images look like originals?
# ----------------------------------------------------------------------------------------------------------------------


def grey(images: Tensor) -> Tensor:
    """Luma (N, H, W) on the 0..255 scale, of 8-bit values (ITU-R BT.601)."""
    return torch.einsum("nchw,c->nhw", ru.to_pixels(images).double(), torch.tensor([0.299, 0.587, 0.114]).double())


def sharpness_ratio(images: Tensor, originals: Tensor) -> float:
    """Variance of the Laplacian over that of the original, the median over images; 1 is right, less is blurred.

    One squared grey level is added to both: where there is nothing at all, a ratio means nothing.
    """
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).double().view(1, 1, 3, 3)
    variances = [F.conv2d(grey(x).unsqueeze(1), kernel).var((1, 2, 3)) for x in (images, originals)]
    return ((variances[0] + 1) / (variances[1] + 1)).median().item()


def radial_spectrum(images: Tensor) -> Tensor:
    """Mean power at every whole spatial frequency from 1 to H / 2 (in cycles a picture), over images and directions."""
    size = images.shape[-1]
    window = torch.hann_window(size, periodic=False).double()
    centred = grey(images) - grey(images).mean((1, 2), keepdim=True)
    power = torch.fft.fft2(centred * window * window[:, None]).abs().square().mean(0)
    f = torch.fft.fftfreq(size) * size
    radius = torch.hypot(f[:, None], f).round().long().flatten()
    sums = torch.zeros(int(radius.max()) + 1).double().index_add_(0, radius, power.flatten())
    return (sums / torch.bincount(radius))[1 : size // 2 + 1]


def spectrum_distance(images: Tensor, originals: Tensor) -> float:
    """Mean absolute difference of the radial power spectra in dB; 0 is right."""
    spectra = [10 * torch.log10(radial_spectrum(x) + 1e-9) for x in (images, originals)]
    return (spectra[0] - spectra[1]).abs().mean().item()


class Crops(NamedTuple):
    """Squares of pictures, (M, 3, 64, 64), how much of each pixel to judge, (M, 1, 64, 64), and whose they are."""

    images: Tensor
    weight: Tensor
    face: Tensor  # (M,), a number for each face

    def at(self, index: Tensor) -> Crops:
        """Some of them, by number or mask."""
        return Crops(*(part[index] for part in self))


def logits_of(network: nn.Module, crops: Crops) -> Tensor:
    """One logit a crop, (M,): the network's map of them, averaged where there is something to judge."""
    maps = network(crops.images)
    weight = F.adaptive_avg_pool2d(crops.weight, maps.shape[-2:])
    return (maps * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))


def build_classifier(seed: int) -> nn.Module:
    """A small network, untrained, that makes a map of logits of images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(0.2)]
        return nn.Sequential(*layers, nn.Conv2d(64, 1, 3, padding=1)).to(memory_format=torch.channels_last)


def train_classifier(network: nn.Module, fake: Crops, real: Crops, steps: int, seed: int) -> nn.Module:
    """Teaches it that its mean logit says: this is from an original."""
    rng = np.random.default_rng(seed)
    optimizer = ru.adam(network, 1e-3)
    labels = torch.arange(2).repeat_interleave(16).float()
    for _ in range(steps):
        chosen = rng.integers(len(fake.images), size=16)
        batch = Crops(*(torch.cat([f[chosen], r[chosen]]) for f, r in zip(fake, real)))
        if rng.random() < 0.5:
            batch = batch._replace(images=batch.images.flip(-1), weight=batch.weight.flip(-1))
        loss = F.binary_cross_entropy_with_logits(logits_of(network, batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch with one thread: on shared cores, several wait for each other for longer than so small networks take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def area_under_curve(fake: Tensor, real: Tensor) -> float:
    """Area under the ROC curve: the share of all pairs in which the real one has the higher logit, ties half."""
    difference = real[:, None] - fake
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def auc_by_face(fake: Crops, real: Crops, steps: int = 300, folds: int = 4) -> list[float]:
    """How well small networks tell a face's restored crops from its original ones: the AUC of every face.

    A classifier two-sample test (Lopez-Paz and Oquab 2017), cross-validated over faces: the networks that judge a face
    have learned from others, in as many folds as there are faces if those are fewer. 0.5 means that they cannot tell,
    which is right; 1 that they always can. Empty with fewer than two faces. Logits are compared within a face: those
    of different networks have different scales, and one face may be grainier than another.

    The networks are shown ten times what the crops differ from their local mean: grain, texture, edges, seams. Given
    the picture as well, 300 steps are not enough to find what is there to be found.
    """
    faces = real.face.unique()
    if len(faces) < 2:
        return []
    folds, logits = min(folds, len(faces)), torch.zeros(2, len(real.face))
    detail = ((10 * ru.detail_of(c.images)).to(memory_format=torch.channels_last) for c in (fake, real))
    sets = [crops._replace(images=images) for crops, images in zip((fake, real), detail)]
    networks = [build_classifier(fold) for fold in range(folds)]

    def judge(fold: int) -> None:
        held_out = torch.isin(real.face, faces[fold::folds])
        with one_thread():
            network = train_classifier(networks[fold], *(crops.at(~held_out) for crops in sets), steps, fold)
            with torch.no_grad():
                logits[:, held_out] = torch.stack([logits_of(network, crops.at(held_out)) for crops in sets])

    for _ in ru.in_parallel(judge, range(folds)):
        pass
    return [area_under_curve(*logits[:, real.face == face]) for face in faces]


def damaged_crops(images: Mapping[str, Tensor], hole: Tensor, face: Tensor) -> dict[str, Crops]:
    """Squares of 64 px, side by side, of all images by method; `face` says for each image whose it is.

    Of images with holes those that a hole covers by a twentieth or more, to be judged in the holes. Whether the rest
    was left alone is not a question of realism; PSNR outside the holes answers it.
    """
    parts = {}
    for name, whole in {**images, "hole": hole}.items():
        squares = whole.unfold(2, CROP, CROP).unfold(3, CROP, CROP)  # (N, C, H / 64, W / 64, 64, 64)
        parts[name] = squares.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    weight = parts.pop("hole")
    face = face.repeat_interleave(len(weight) // len(face))
    chosen = weight.mean((1, 2, 3)) >= 0.05 if hole.any() else torch.ones(len(weight), dtype=torch.bool)
    weight = weight[chosen] if hole.any() else torch.ones_like(weight)
    return {name: Crops(crops[chosen], weight, face[chosen]) for name, crops in parts.items()}


def damaged_anew(pair: ru.Pair, draw: int, settings: ru.Settings) -> tuple[Tensor, Tensor, dict]:
    """As an item of the dataset, with another damage of the same kind, which has not been through a JPEG file."""
    image, seed = ru.read_image(pair.original), ru.derive_seed(settings.seed, "realism", pair.kind, pair.name, draw)
    degraded = ru.degrade(image, pair.kind, np.random.default_rng(seed), settings)
    transform, mask = ru.image_transform(), np.zeros(image.shape[:2], np.uint8)
    if pair.kind == "occluded":
        mask = ru.occlusion_mask(image.shape, np.random.default_rng(seed), settings)
    small = ru.Image.fromarray(mask).resize((ru.IMAGE_SIZE,) * 2, ru.Image.Resampling.BILINEAR)
    hole = ru.transforms.functional.to_tensor(small)
    return transform(ru.to_pil(degraded)), transform(ru.to_pil(image)), {"hole": hole}


def collect(
    generators: Mapping[str, nn.Module], pairs: Sequence[ru.Pair], run: ru.Run, draws: int = 1
) -> dict[str, Crops]:
    """Crops of all images of the pairs, of one kind, by method: `original`, `degraded` and the generators by name.

    With more than one draw, each original is damaged anew as often, in place of its degraded file.
    """
    dataset = ru.FaceRestorationGANDataset(pairs)
    wanted = [(draw, number) for draw in range(draws) for number in range(len(pairs))]
    batches: dict[str, list[Crops]] = {}
    for start in range(0, len(wanted), run.settings.pretrain_batch):
        chosen = wanted[start : start + run.settings.pretrain_batch]
        items = [dataset[n] if draws == 1 else damaged_anew(pairs[n], draw, run.settings) for draw, n in chosen]
        degraded, original = (torch.stack(images) for images in list(zip(*items))[:2])
        images = {"original": original, "degraded": degraded}
        for name, restored in restore_all(generators, degraded, run).items():
            images[name] = ru.to_pixels(restored) / 127.5 - 1  # to 8 bits, as the others
        hole = torch.stack([info["hole"] for _, _, info in items])
        for name, crops in damaged_crops(images, hole, torch.tensor([n for _, n in chosen])).items():
            batches.setdefault(name, []).append(crops)
    return {name: Crops(*(torch.cat(parts) for parts in zip(*crops))) for name, crops in batches.items()}


def realism(
    generators: Mapping[str, nn.Module], pairs: Sequence[ru.Pair], run: ru.Run, steps: int | None = None
) -> dict[str, dict[str, dict]]:
    """By kind and method: sharpness ratio, spectrum distance, and how well classifiers tell images from originals.

    `pairs` are of faces that the generators have not trained on. `auc_by_face` has an area for each face, `auc` is
    their mean, None with fewer than two faces. All is measured in `damaged_crops` of up to 60 faces, and None without
    any crop. A picture has only three holes to be judged by, so occluded originals are damaged anew four times.

    The classifiers learn for `steps`; None: 300, but 20 in the profile `smoke`, which is there to be quick.
    """
    steps = steps or (20 if run.settings.profile == "smoke" else 300)
    result: dict[str, dict[str, dict]] = {}
    for kind in run.settings.kinds:
        draws = 4 if kind == "occluded" else 1
        crops = collect(generators, [pair for pair in pairs if pair.kind == kind][:FACES], run, draws)
        original = crops.pop("original")
        for method, ours in crops.items():
            images = (ours.images, original.images)
            areas = auc_by_face(ours, original, steps)
            result.setdefault(kind, {})[method] = {
                "sharpness": sharpness_ratio(*images) if len(original.face) else None,
                "spectrum_db": spectrum_distance(*images) if len(original.face) else None,
                "auc": float(np.mean(areas)) if areas else None,
                "auc_by_face": areas,
            }
    return result


def print_realism(table: Mapping[str, Mapping[str, Mapping]]) -> None:
    """The realism table; 1, 0 dB and 0.5 are right."""
    print(f"{'kind':9s} {'method':28s} {'sharpness':>9s} {'spectrum':>9s} {'AUC':>5s}")
    for kind, methods in table.items():
        for method, cell in methods.items():
            sharpness, spectrum, auc = (or_dash(cell[key]) for key in ("sharpness", "spectrum_db", "auc"))
            print(f"{kind:9s} {method:28s} {sharpness:>9s} {spectrum:>6s} dB {auc:>5s}")


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def load_generators(run: ru.Run) -> dict[str, nn.Module]:
    """The pretrained, the GAN-trained and, if it has been trained in outputs/plain, the plain generator."""
    files = {"pretrained": "pretrained_generator_best.pth", "restored": "face_restoration_generator_final.pth"}
    generators = {
        name: ru.load_generator(ru.require_artifact(f, run, "04 and 05"), run.device) for name, f in files.items()
    }
    plain = run.outputs / "plain" / files["restored"]
    if plain.is_file():
        content = ru.load_checkpoint(plain)
        if content["faces"] != run.faces or content["settings"]["seed"] != run.settings.seed:
            raise ValueError(f"{plain} was trained on other faces or another split; it cannot be compared")
        generators["plain"] = ru.load_generator(plain, run.device)
    return generators


def main() -> None:
    """Measures the weights in the outputs folder with the settings that they were trained with."""
    parser = argparse.ArgumentParser(description="Tables of notebook 06. FACES_DIR as for the training.")
    parser.add_argument("outputs", nargs="?", help="folder with the weights (default: OUTPUT_DIR, else outputs/)")
    given = parser.parse_args().outputs
    if given and not Path(given).is_dir():
        parser.error(f"{given} is not a folder")
    if given:
        os.environ["OUTPUT_DIR"] = str(Path(given).resolve())
    places, device = ru.find_places(), ru.choose_device()
    final = places.outputs / "face_restoration_generator_final.pth"
    if not final.is_file():
        parser.error(f"{final} is missing: run notebook 05_train_gan first, it writes it")
    content = ru.load_checkpoint(final)
    fields = {field.name for field in dataclasses.fields(ru.Settings)}
    settings = ru.Settings(**{name: value for name, value in content["settings"].items() if name in fields})
    faces = ru.find_faces(settings, places)
    pairs = ru.prepare_pairs(faces, places, settings)
    splits = ru.split_pairs(pairs, settings)
    run = ru.Run(settings, places, device, ru.faces_id(pairs))
    ru.check_same_run(final, content, run)
    generators = load_generators(run)
    strength = tune_non_local_means(splits.pretrain_train, settings)
    size, names = ru.read_image(faces.files[0]).shape, {pair.name for pair in splits.gan_validation}
    print(f"{len(names)} validation faces of {size[1]} x {size[0]} px, measured at 256 px")
    summary = summarize(measure(generators, splits.gan_validation, strength, run))
    print_summary(summary)
    print_regions(summary)
    print_realism(realism(generators, splits.gan_validation, run))


if __name__ == "__main__":
    main()
