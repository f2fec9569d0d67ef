"""What an adversary is for, on a task with many right answers: colouring grey portraits.

Three trainings of the generator of notebook 03 on the same portraits in the same order: L1 alone; the losses of
notebook 05, but with a weight of L1 of 2 in place of 100; and for comparison with 100. The adversary begins after
the same `--before` updates of L1, with the critic alone for the first `CRITIC_ALONE`. Of each training the weights
are shown whose colours are spread most like the originals', chosen on faces that are not shown.

Reads the portraits that a run of notebooks 01 and 02 has drawn (profile `quick`, OUTPUT_DIR) and writes
OUT/example_colouring.jpg and OUT/example_colouring.json. Nothing else uses what it trains; heads for colour, grain
and holes stay at zero. Some 25 minutes on two cores:

    python tests/benchmarks/colouring.py OUT
"""

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import restoration_utils as ru

CRITIC_ALONE, BATCH, EVERY = 60, 4, 100  # updates, pictures, updates between two looks
SHOWN = 6  # faces in the figure


class PairCritic(ru.PatchGANDiscriminator):
    """Sees the pair as pix2pix's does, (grey, candidate), without norm: here all depends on the candidate's colours."""

    def forward(self, degraded, candidate):
        return self.layers(torch.cat([degraded, candidate], 1)).float()


def to_grey(images):
    """RGB in [-1, 1], (N, 3, 256, 256), in grey, of the same shape."""
    return (images * images.new_tensor((0.299, 0.587, 0.114))[:, None, None]).sum(1, keepdim=True).expand(-1, 3, -1, -1)


def batches(originals, updates, seed):
    """(grey, original) with random faces, half of them mirrored; the same for the same seed."""
    rng = np.random.default_rng(seed)
    for _ in range(updates):
        original = originals[torch.from_numpy(rng.integers(len(originals), size=BATCH))]
        original = original.flip(3) if rng.random() < 0.5 else original
        original = original.contiguous(memory_format=torch.channels_last)
        yield to_grey(original).contiguous(memory_format=torch.channels_last), original


def chroma(images):
    """Distance from grey of every pixel in CIELAB, of RGB images in [-1, 1]."""
    rows = (images.permute(0, 2, 3, 1).clamp(-1, 1).cpu().numpy() + 1) / 2
    lab = np.stack([cv2.cvtColor(row.astype(np.float32), cv2.COLOR_RGB2LAB) for row in rows])
    return np.hypot(lab[..., 1], lab[..., 2]).ravel()


def spread_error(images, originals):
    """How far two distributions of chroma are apart: the mean distance of their percentiles."""
    percentiles = np.arange(1, 100)
    return np.abs(np.percentile(chroma(images), percentiles) - np.percentile(chroma(originals), percentiles)).mean()


def colored(generator, originals):
    """What the generator makes of the grey versions."""
    with ru.evaluating(generator):
        return torch.cat([generator(to_grey(rows)) for rows in originals.split(8)])


def look(generator, validation):
    """PSNR in dB, mean chroma and error of its spread, on faces that are not trained on."""
    images = colored(generator, validation)
    psnr = ru.image_metrics(images, validation)["psnr"].mean().item()
    return {
        "psnr": psnr,
        "chroma": float(chroma(images).mean()),
        "spread_error": float(spread_error(images, validation)),
    }


def train(start, originals, validation, settings, updates, adversary):
    """Goes on from `start`; returns the generator whose colours are spread best, and all looks by update."""
    generator, device = copy.deepcopy(start).train(), torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        critic = PairCritic(settings.discriminator_width).to(memory_format=torch.channels_last)
    optimizer_g, optimizer_d = (ru.adam(network, 5e-4, settings.gan_betas) for network in (generator, critic))
    precision, looks, best = ru.Precision(device), {}, None
    for number, (grey, original) in enumerate(batches(originals, updates, 8), 1):
        images = grey, generator(grey), original
        if not adversary:
            precision.update(optimizer_g, F.l1_loss(images[1], original))
        else:
            ru.discriminator_step(critic, optimizer_d, images, precision)
            if number > CRITIC_ALONE:
                ru.generator_step(critic, optimizer_g, images, None, settings, precision)
        if number % EVERY == 0:
            looks[number] = look(generator, validation)
            print(number, {name: round(value, 2) for name, value in looks[number].items()}, flush=True)
            if best is None or looks[number]["spread_error"] < looks[best[0]]["spread_error"]:
                best = number, copy.deepcopy(generator)
    return *best, looks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--before", type=int, default=300, help="updates of L1 alone, before the three trainings part")
    parser.add_argument("--updates", type=int, default=900, help="of each of the three trainings")
    options = parser.parse_args()
    settings, places, _ = ru.start()
    pairs = ru.prepare_pairs(ru.find_faces(settings, places), places, settings)
    splits = ru.split_pairs(pairs, settings)

    def originals_of(chosen):
        names = {pair.name: pair.original for pair in chosen if not pair.is_scene}
        return torch.stack([ru.image_transform()(ru.open_image(path)) for path in names.values()])

    train_on = originals_of(splits.pretrain_train)
    faces = originals_of(splits.pretrain_validation)
    shown, validation = faces[:SHOWN], faces[SHOWN:]
    generator = ru.build_generator(settings).to(memory_format=torch.channels_last).train()
    optimizer, precision = ru.adam(generator, 1e-3), ru.Precision(torch.device("cpu"))
    for grey, original in batches(train_on, options.before, 7):
        precision.update(optimizer, F.l1_loss(generator(grey), original))
    report = {"validation_faces": len(validation), "originals": {"chroma": float(chroma(validation).mean())}}
    rows, names = [to_grey(shown)], ["grey"]
    for name, weight, adversary in (("L1 alone", 0, False), ("GAN, 100 x L1", 100, True), ("GAN, 2 x L1", 2, True)):
        print(name, flush=True)
        how = replace(settings, l1_weight=float(weight), heads_weight=0.0)
        chosen, network, looks = train(generator, train_on, validation, how, options.updates, adversary)
        report[name] = {"chosen": chosen, "looks": looks}
        rows.append(colored(network, shown))
        names.append(name)
    rows.append(shown)
    images = [ru.to_pixels(row).permute(0, 2, 3, 1).numpy() for row in rows]
    options.out.mkdir(parents=True, exist_ok=True)
    ru.write_json(options.out / "example_colouring.json", report)
    figure = ru.show_images(list(zip(*images)), [*names, "original"])
    with ru.atomic(options.out / "example_colouring.jpg") as temporary:
        figure.savefig(temporary, dpi=90, pil_kwargs={"quality": 85})


if __name__ == "__main__":
    main()
