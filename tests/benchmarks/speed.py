"""How fast are degrading, loading, training, restoring and importing, next to the straightforward way and the bound?

    python tests/benchmarks/speed.py [degrade] [load] [train] [restore] [import]

All five without a name: some ten minutes on two cores. The bound is measured in the same process: it does only what
cannot be left out (codecs, a copy, a matrix product). Ways are timed in turn, several times, and medians are printed.
With a GPU, `train` measures there, at the spec's batch sizes and at larger ones.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import restoration_utils as ru

CORES = os.cpu_count() or 1
SETTINGS = ru.PROFILES["full"]
JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]


def in_turn(ways: Mapping[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of each way, timed in turn, so that a busy minute meets all; a first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs + 1):
        for name, way in ways.items():
            synchronize()
            started = time.perf_counter()
            way()
            synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: median(values[1:]) for name, values in seconds.items()}


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(title: str, rates: Mapping[str, float], unit: str, ours: str, bound: str) -> None:
    """Prints rates, and how ours compares with each."""
    print(f"\n{title}")
    for name, rate in rates.items():
        note = "" if name == ours else f"  ours is {rates[ours] / rate:.2f} x" + (" the bound" if name == bound else "")
        print(f"  {name:58s} {rate:9.2f} {unit}{note}", flush=True)


def draw_faces(folder: Path, count: int, size: int) -> ru.Faces:
    """Synthetic portraits as originals."""
    settings = dataclasses.replace(SETTINGS, portrait_size=size)
    paths = ru.draw_pictures("portrait", count, settings, ru.Places("benchmark", folder, folder))
    return ru.Faces(paths[0].parent, "synthetic portraits", [path.name for path in paths])


# ----------------------------------------------------------------------------------------------------------------------
# Degrading
# ----------------------------------------------------------------------------------------------------------------------


def degrade_plainly(image: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Noise by NumPy, colours by way of HSV; holes as in the module."""
    if kind == "noisy":
        return np.clip(np.rint(image + rng.normal(0, SETTINGS.noise_sigma, image.shape)), 0, 255).astype(np.uint8)
    if kind == "color":
        hsv = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_BGR2HSV)
        hsv[..., 1] *= rng.uniform(*SETTINGS.saturation)
        hsv[..., 2] = np.minimum(hsv[..., 2] * rng.uniform(*SETTINGS.value), 1)
        return np.rint(255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)).astype(np.uint8)
    return ru.occlude_irregular(image, rng)


def degrading() -> None:
    """Originals of 1024 px a second."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        faces = draw_faces(root / "faces", 16, 1024)
        rng = np.random.default_rng(1)
        ready = {p: [ru.degrade(cv2.imread(str(p)), kind, rng, SETTINGS) for kind in ru.KINDS] for p in faces.files}
        runs = iter(range(10**6))

        def ours() -> None:
            """The module, into a new folder."""
            ru.degrade_folder(faces, root / f"ours_{next(runs)}", SETTINGS)

        def plainly() -> None:
            """A loop."""
            for path in faces.files:
                image = cv2.imread(str(path))
                for kind in ru.KINDS:
                    degraded = degrade_plainly(image, kind, np.random.default_rng(0))
                    cv2.imwrite(str(root / f"{path.stem}_{kind}.jpg"), degraded, JPEG)

        def codecs(path: Path) -> None:
            """Reads one and writes three of the same size."""
            cv2.imread(str(path))
            for number, image in enumerate(ready[path]):
                cv2.imwrite(str(root / f"{path.stem}_{number}.jpg"), image, JPEG)

        def bound() -> None:
            """The codecs alone, on all cores."""
            with ThreadPoolExecutor(CORES) as pool:
                list(pool.map(codecs, faces.files))

        ways = {"ours": ours, "a plain loop": plainly, f"codecs alone, {CORES} cores": bound}
        seconds = in_turn(ways, 5)
        rates = {name: len(faces.names) / value for name, value in seconds.items()}
        table("Degrading: originals of 1024 px to three JPEGs", rates, "originals/s", "ours", list(ways)[2])


# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


def loading() -> None:
    """Pairs a second that reach the training loop, originals of 1024 px."""
    with tempfile.TemporaryDirectory() as folder:
        root, cpu = Path(folder), torch.device("cpu")
        faces = draw_faces(root / "faces", 24, 1024)
        places = ru.Places("benchmark", root, root / "degraded")
        pairs = ru.prepare_pairs(faces, places, SETTINGS)
        order = ru.training_order(len(pairs), SETTINGS, "benchmark", 1)
        loader = ru.make_loader(pairs, SETTINGS.pretrain_batch, cpu, order)
        batch = next(iter(loader))
        copies = [torch.empty_like(t) for t in (batch[0], batch[1], batch[2]["hole"])]

        def warm() -> None:
            """An epoch without training."""
            for _ in loader:
                pass

        def cold() -> None:
            """All images into the file that is mapped."""
            pairs[0].store.unlink()
            ru.store_images(pairs, places, SETTINGS)

        def files() -> None:
            """As if there were no such file."""
            transform = ru.image_transform()
            for first in range(0, len(pairs), SETTINGS.pretrain_batch):
                chosen = pairs[first : first + SETTINGS.pretrain_batch]
                for path in ("degraded", "original"):
                    torch.stack([transform(ru.open_image(getattr(pair, path))) for pair in chosen])

        def copy() -> None:
            """As many bytes, copied."""
            for _ in range(len(loader)):
                for target, source in zip(copies, (batch[0], batch[1], batch[2]["hole"])):
                    target.copy_(source)

        ways = {
            "warm, one core": warm,
            f"cold: every image read once, {CORES} cores": cold,
            "reading the files in every epoch, one core": files,
            "a copy of the same bytes": copy,
        }
        rates = {name: len(pairs) / value for name, value in in_turn(ways, 5).items()}
        table("Loading: pairs of 1024 px images", rates, "pairs/s", "warm, one core", "a copy of the same bytes")


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


class ReferenceGenerator(nn.Module):
    """A pix2pix U-Net as tutorials write it: instance norm, dropout, upsampling and a 4 x 4 convolution at the end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width * factor for factor in (1, 2, 4, 8, 8, 8, 8, 8)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for number, (inputs, outputs) in enumerate(zip([3, *widths], widths)):
            norm = [nn.InstanceNorm2d(outputs)] if 0 < number < 7 else []
            self.down.append(nn.Sequential(nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False), *norm, nn.LeakyReLU(0.2)))
        for number in range(7, 0, -1):
            layers = [nn.ConvTranspose2d(widths[number] * (1 if number == 7 else 2), widths[number - 1], 4, 2, 1)]
            layers += [nn.InstanceNorm2d(widths[number - 1]), nn.ReLU()]
            self.up.append(nn.Sequential(*layers, *([nn.Dropout(0.5)] if number > 4 else [])))
        pad, last = nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(2 * width, 3, 4, padding=1)
        self.output = nn.Sequential(nn.Upsample(scale_factor=2), pad, last, nn.Tanh())

    def forward(self, degraded: Tensor) -> Tensor:
        """Restored images."""
        maps = [degraded]
        for layer in self.down:
            maps.append(layer(maps[-1]))
        x = maps.pop()
        for layer in self.up:
            x = torch.cat([layer(x), maps.pop()], 1)
        return self.output(x)


def reference_steps(device: torch.device) -> tuple[Callable, Callable]:
    """The two updates with default Adam in float32, nothing else done about speed; functions of a batch."""
    generator = ReferenceGenerator(SETTINGS.width).to(device)
    discriminator = ru.PatchGANDiscriminator(SETTINGS.discriminator_width, plain=True).to(device)
    adam_g = torch.optim.Adam(generator.parameters(), 1e-4, (0.5, 0.999))
    adam_d = torch.optim.Adam(discriminator.parameters(), 2e-4, (0.5, 0.999))

    def pretrain(batch: tuple) -> None:
        """L1 + 0.1 MSE."""
        degraded, original = (x.to(device) for x in batch[:2])
        adam_g.zero_grad()
        restored = generator(degraded)
        loss = F.l1_loss(restored, original) + 0.1 * F.mse_loss(restored, original)
        loss.backward()
        adam_g.step()

    def gan(batch: tuple) -> None:
        """The generator, through the discriminator; then the discriminator, which sees the fake a second time."""
        degraded, original = (x.to(device) for x in batch[:2])
        adam_g.zero_grad()
        restored = generator(degraded)
        score = discriminator(degraded, restored)
        loss = F.mse_loss(score, torch.ones_like(score)) + 100 * F.l1_loss(restored, original)
        loss.backward()
        adam_g.step()
        adam_d.zero_grad()
        real, fake = discriminator(degraded, original), discriminator(degraded, restored.detach())
        loss_d = (F.mse_loss(real, torch.ones_like(real)) + F.mse_loss(fake, torch.zeros_like(fake))) / 2
        loss_d.backward()
        adam_d.step()

    return pretrain, gan


def our_steps(
    device: torch.device,
    mixed: bool,
    settings: ru.Settings = SETTINGS,
) -> tuple[Callable, Callable]:
    """The two updates of the notebooks, averaged weights included; they return their losses."""
    run = ru.Run(dataclasses.replace(settings, mixed_precision=mixed), None, device, "")
    generator = ru.build_generator(settings).to(device, memory_format=torch.channels_last)
    discriminator = ru.build_discriminator(settings).to(device, memory_format=torch.channels_last)
    pretraining, training = ru.adam(generator, 1e-3), ru.adam(generator, 1e-4, (0.5, 0.999))
    adam_d = ru.adam(discriminator, 2e-4, (0.5, 0.999))
    average, precision = ru.average_of(generator, settings.ema), [ru.Precision(device, mixed) for _ in range(2)]
    originals = np.random.default_rng(0).integers(0, 256, (9, 128, 128, 3), dtype=np.uint8)

    def pretrain(batch: tuple) -> dict[str, Tensor]:
        """Step 4."""
        lesson = ru.color_lesson(originals, settings, np.random.default_rng(0))
        losses = ru.pretrain_step(generator, pretraining, batch, lesson, run, precision[0])
        average.update_parameters(generator)
        return losses

    def gan(batch: tuple) -> dict[str, Tensor]:
        """Step 5."""
        degraded, original, info = ru.to_device(batch, device)
        with precision[0].autocast(generator):
            restored, hole = generator.restore(degraded, info["whole"])
        images = ru.shifted((degraded, restored, original), settings.shift, np.random.default_rng(0))
        losses = ru.discriminator_step(discriminator, adam_d, images, precision[1])
        losses |= ru.generator_step(discriminator, training, images, (hole, info["hole"]), settings, precision[0])
        average.update_parameters(generator)
        return losses

    return pretrain, gan


def make_batch(size: int) -> tuple:
    """Smooth random pictures with grain and a hole, as a loader gives them."""
    generator = torch.Generator().manual_seed(0)
    original = F.interpolate(torch.rand(size, 3, 32, 32, generator=generator) * 2 - 1, size=256, mode="bilinear")
    degraded = (original + 0.1 * torch.randn(original.shape, generator=generator)).clamp(-1, 1)
    hole = torch.zeros(size, 1, 256, 256)
    hole[:, :, 50:90, 60:100] = 1
    return degraded, original, {"hole": hole, "whole": F.avg_pool2d(degraded, 4)}


def peaks(device: torch.device) -> dict[str, float]:
    """What a large matrix product reaches here, in FLOP/s by type, and what a copy does, in bytes/s."""
    size = 8192 if device.type == "cuda" else 2048
    result = {}
    mixed = ru.Precision(device).dtype or torch.float32
    for name, dtype in {"float32": torch.float32, "mixed": mixed}.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        result[name] = 2 * size**3 / in_turn({"x": lambda a=a, b=b: a @ b}, 5)["x"]
    x = torch.empty(2**28 if device.type == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    result["copy"] = 2 * x.nbytes / in_turn({"x": lambda: y.copy_(x)}, 5)["x"]
    return result


def training() -> None:
    """Seconds an image, at the spec's batch sizes and widths; the roofline of a step; with a GPU its memory, too.

    The reference is timed twice: by itself, before all else, and in turn with ours and `keep_freed_memory`, which helps
    it as well. Peak memory on a GPU is that of the step beyond what lies there already.
    """
    device = ru.choose_device()
    plain = {}
    for number, size in enumerate((SETTINGS.pretrain_batch, SETTINGS.gan_batch)):
        step, batch = reference_steps(device)[number], make_batch(size)
        plain[size] = size / in_turn({"x": lambda step=step, batch=batch: step(batch)}, 5)["x"]
    ru.keep_freed_memory()
    peak = peaks(device)
    print(f"\nPeaks on {device}: " + ", ".join(f"{name} {value / 1e9:.0f} G/s" for name, value in peak.items()))
    batches = {"pretraining": [SETTINGS.pretrain_batch], "GAN": [SETTINGS.gan_batch]}
    if device.type == "cuda":
        batches = {stage: sizes + [32, 64] for stage, sizes in batches.items()}
    for number, (stage, sizes) in enumerate(batches.items()):
        for size in sizes:
            batch = make_batch(size)
            steps = {"ours": our_steps(device, True)[number], "ours in float32": our_steps(device, False)[number]}
            steps["plain reference, freed memory kept"] = reference_steps(device)[number]
            ways = {name: lambda step=step, batch=batch: step(batch) for name, step in steps.items()}
            rates = {name: size / value for name, value in in_turn(ways, 5 if device.type == "cpu" else 20).items()}
            if size in plain:
                rates["plain reference"] = plain[size]
            with FlopCounterMode(display=False) as counter:
                steps["ours in float32"](batch)
            fastest = max(peak["float32"], peak["mixed"])
            rates["its FLOPs as a matrix product"] = size * fastest / counter.get_total_flops()
            table(f"{stage}, batch {size}: {counter.get_total_flops() / size / 1e9:.0f} GFLOP an image in a step",
                  rates, "images/s", "ours", "its FLOPs as a matrix product")  # fmt: skip
            print("  seconds an image: " + ", ".join(f"{name} {1 / rate:.3f}" for name, rate in rates.items()))
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                steps["ours"](batch)
                print(f"  memory of a step of ours: {(torch.cuda.max_memory_allocated() - before) / 1e9:.1f} GB")


# ----------------------------------------------------------------------------------------------------------------------
# Restoring
# ----------------------------------------------------------------------------------------------------------------------


def most_memory(work: Callable[[], object]) -> str:
    """How many MB more than before were in use at most while `work` ran, where the system says."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return "not known here"

    def highest() -> int:
        """The most so far, in MB."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024

    clear.write_text("5")
    before = highest()
    work()
    return f"{highest() - before} MB"


def restoring() -> None:
    """Photos a second at full width, from file to file, and how much memory that takes."""
    device = ru.choose_device()
    generator = ru.build_generator(SETTINGS).to(device, memory_format=torch.channels_last).eval()
    portrait = ru.draw_portrait(np.random.default_rng(0), 1024)
    batch = make_batch(8)[0].to(device, memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        for width, height in ((4000, 3000), (256, 256)):
            source, result = Path(folder) / "photo.jpg", Path(folder) / "restored.jpg"
            ru.write_image(source, cv2.resize(portrait, (width, height)))

            def restore(source: Path = source, result: Path = result) -> None:
                """As in the README, the model already loaded."""
                ru.restore_image_gan(source, result, generator)

            def network() -> None:
                """One pass of the network."""
                with ru.evaluating(generator):
                    generator(batch[:1])

            def codecs(source: Path = source, result: Path = result) -> None:
                """The file read and written, and one pass of the network."""
                ru.write_image(result, ru.read_image(source))
                network()

            memory = most_memory(restore)  # before freed memory is kept
            ru.keep_freed_memory()
            ways = {"ours": restore, "reading, writing, one pass of the network": codecs}
            rates = {name: 1 / value for name, value in in_turn(ways, 5).items()}
            table(f"Restoring {width} x {height} px, one at a time", rates, "photos/s", "ours", list(ways)[1])
            print(f"  peak memory: {memory}")

    def all_at_once() -> None:
        """Eight images in a batch."""
        with ru.evaluating(generator):
            generator(batch)

    def with_gradients() -> None:
        """As it goes if one forgets to say that nothing is to be learned."""
        generator(batch)

    ways = {"ours, batch of 8": all_at_once, "with gradients": with_gradients}
    rates = {name: 8 / value for name, value in in_turn(ways, 5).items()}
    table("The network alone, 256 px", rates, "images/s", "ours, batch of 8", "")


# ----------------------------------------------------------------------------------------------------------------------
# Importing
# ----------------------------------------------------------------------------------------------------------------------


def importing() -> None:
    """Seconds for the module and for what it cannot do without."""
    root = str(Path(__file__).resolve().parents[2])

    def python(code: str) -> Callable[[], None]:
        """A new interpreter."""
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, cwd=root) and None

    ways = {"restoration_utils": python("import restoration_utils")}
    ways["torch, torchvision, cv2"] = python("import torch, torchvision, cv2")
    seconds = in_turn(ways, 7)
    print("\nImporting: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()), end="; ")
    print(f"ratio {seconds['restoration_utils'] / seconds['torch, torchvision, cv2']:.2f}")


PARTS = {"degrade": degrading, "load": loading, "restore": restoring, "train": training, "import": importing}


def main() -> None:
    """Runs the parts that are asked for, or all."""
    names = sys.argv[1:] or list(PARTS)
    if unknown := set(names) - PARTS.keys():
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    if len(names) > 1:  # a process each: what one part keeps in memory must not help another
        sys.exit(max(subprocess.run([sys.executable, __file__, name]).returncode for name in PARTS if name in names))
    capability = torch.backends.cpu.get_cpu_capability()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{CORES} CPU cores ({capability})"
    print(f"{device}; torch {torch.__version__}, OpenCV {cv2.__version__}")
    PARTS[names[0]]()


if __name__ == "__main__":
    main()
