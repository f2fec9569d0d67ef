"""Face and old-photo restoration: the one helper module of the six notebooks.

Read it from top to bottom beside the notebooks; every section calls only what stands above it:

    settings and places     all notebooks     profiles, folders, device, files, progress
    faces                   01                finding the portraits, or drawing synthetic ones
    degradation             01                noise, faded colours, holes; a whole folder of them
    data                    02                pairs, splits by original, loaders
    models                  03                U-Net generator, PatchGAN discriminator
    checkpoints             04, 05            saving, finding, loading, resuming
    pretraining             04                L1 + 0.1 MSE, StepLR, early stopping
    GAN training            05                least-squares GAN + 100 L1 (pix2pix)
    evaluation              06                PSNR, SSIM, L1; restoring a photograph of one's own
    figures                 02 to 06          grids and loss curves

Conventions: image files and the degradations hold uint8 BGR arrays (H, W, 3), as OpenCV does; networks see float RGB
tensors (N, 3, 256, 256) in [-1, 1]. Importing this module has no side effects.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import io
import json
import math
import os
import shutil
import sys
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

import cv2
import matplotlib.pyplot as plt
import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler, random_split
from torchvision import transforms

# ======================================================================================================================
# Settings and places
# ======================================================================================================================


@dataclass(frozen=True)
class Settings:
    """Every number of the project, once, with its unit. Change one with `dataclasses.replace(settings, name=value)`."""

    profile: str = "full"
    seed: int = 2024  # of the degradations, the split, the weights and the order of the batches

    # faces
    max_faces: int | None = None  # use only the first so many originals of the folder; None: all
    portraits: int = 400  # synthetic portraits to draw where there is no folder of faces
    portrait_size: int = 1024  # px

    # step 1, degradation
    noise_sigma: float = 25.0  # of 255, at whatever size the original has
    saturation: tuple[float, float] = (0.3, 0.7)  # factor on S of HSV
    value: tuple[float, float] = (0.6, 1.2)  # factor on V of HSV
    polygons: int = 3  # holes in an occluded image
    polygon_vertices: tuple[int, int] = (6, 10)
    polygon_size: tuple[float, float] = (80.0, 200.0)  # px, longer side of the bounding box, in a 1024 px image
    jpeg_quality: int = 95  # 4:4:4; lower, or with subsampled colour, JPEG would be a fourth degradation

    # step 2, data
    image_size: int = 256  # px, what the networks see
    cache_gb: float = 4.0  # of memory for the images of that size; if they do not fit, every epoch reads them anew
    pretrain_validation: float = 0.2  # share of the originals
    gan_validation: float = 0.1  # share of the originals, a subset of the above
    pretrain_batch: int = 8
    gan_batch: int = 4
    flip: float = 0.5  # probability of mirroring a training pair

    # step 3, models
    width: int = 64  # channels of the generator's first layer; the widest have 8 times as many
    discriminator_width: int = 64
    full_resolution_channels: int = 32  # of the generator's output layer, where the input joins as the last skip
    plain: bool = False  # the recipe as commonly written: instance norm, dropout 0.5, every pixel drawn anew; sets
    # parts_weight, ema and shift to zero

    # both trainings
    mixed_precision: bool = True  # convolutions in 16 bits where the hardware is faster with them
    time_budget: float | None = None  # hours that a training may take; None: 11 on Kaggle, which stops at 12, else any
    ema: float = 0.99  # decay of the average of the weights that is validated and saved
    lr_gamma: float = 0.1  # StepLR's factor
    sample_every: int = 1  # epochs
    sample_faces: int = 2  # validation faces in every sample image, each in all three kinds

    # step 4, pretraining
    pretrain_epochs: int = 10
    pretrain_lr: float = 1e-3  # Adam, PyTorch's default betas
    pretrain_lr_step: int = 15  # epochs
    patience: int = 10  # epochs without a better validation loss before stopping early
    mse_weight: float = 0.1  # beside L1
    parts_weight: float = 1.0  # of the loss that teaches the generator's parts (colour, holes), beside L1

    # step 5, GAN training
    gan_epochs: int = 10
    generator_lr: float = 1e-4
    discriminator_lr: float = 2e-4
    gan_betas: tuple[float, float] = (0.5, 0.999)  # Radford et al. 2016
    gan_lr_step: int = 25  # epochs
    l1_weight: float = 100.0
    shift: int = 8  # px, the discriminator's total stride: it sees pairs rolled by fewer than that; 0: as they are
    every_second_batch_after: int = 10  # epochs; from then on the generator is trained on every second batch only
    checkpoint_every: int = 10  # epochs

    def __post_init__(self) -> None:
        if self.plain:  # what the recipe does not have is off, whatever it was set to
            for name, off in {"parts_weight": 0.0, "ema": 0.0, "shift": 0}.items():
                object.__setattr__(self, name, off)


PROFILES = {
    "full": Settings(),
    "quick": Settings(
        profile="quick", max_faces=200, portraits=200, portrait_size=512, width=16, discriminator_width=16,
        full_resolution_channels=16, gan_epochs=3, checkpoint_every=1,
    ),
    "smoke": Settings(
        profile="smoke", max_faces=12, portraits=12, portrait_size=128, width=4, discriminator_width=4,
        full_resolution_channels=4, pretrain_epochs=2, gan_epochs=2, checkpoint_every=1,
    ),
}  # fmt: skip


def choose_settings(device: torch.device, environ: Mapping[str, str] = os.environ) -> Settings:
    """The profile named by RESTORATION_PROFILE; without it `full` on a GPU and `quick` on a CPU.

    With RESTORATION_PLAIN=1, the same schedule for the recipe as commonly written, without what this project adds.
    """
    name = environ.get("RESTORATION_PROFILE") or ("full" if device.type == "cuda" else "quick")
    if name not in PROFILES:
        raise ValueError(f"RESTORATION_PROFILE is {name!r}; choose one of {', '.join(PROFILES)}")
    return replace(PROFILES[name], plain=is_on("RESTORATION_PLAIN", environ))


def is_on(switch: str, environ: Mapping[str, str]) -> bool:
    """Whether an environment variable is 1; unset, empty or 0 is off. ValueError for anything else."""
    if environ.get(switch, "") not in ("", "0", "1"):
        raise ValueError(f"{switch} is {environ[switch]!r}; set it to 1 or leave it out")
    return environ.get(switch) == "1"


@dataclass(frozen=True)
class Places:
    """Where things live: what is written (`outputs`, `degraded`) and, on Kaggle, what is attached (read-only)."""

    platform: str
    outputs: Path
    degraded: Path
    attached: Path | None = None


def _kaggle_folder(root: Path) -> Path | None:
    """The folder that holds Kaggle's `input` and `working`: at the root, or above the notebook or this module."""
    above = [parent for start in (Path.cwd(), Path(__file__).resolve()) for parent in (start, *start.parents)]
    candidates = [root / "kaggle", *(folder for folder in above if folder.name == "kaggle")]
    return next((c for c in candidates if (c / "input").is_dir() and (c / "working").is_dir()), None)


def given_path(text: str) -> Path:
    """A path that a user gave, absolute; a relative one counts from this module's folder."""
    return (Path(__file__).resolve().parent / Path(text).expanduser()).resolve()


def find_places(root: str | Path = "/", environ: Mapping[str, str] = os.environ) -> Places:
    """Kaggle: /kaggle/working. Elsewhere: outputs/ beside this module. OUTPUT_DIR overrides both.

    As in FACES_DIR, a relative path counts from this module's folder, wherever the notebook runs.
    `root` stands for the file system's root, so that a test can make up a Kaggle.
    """
    kaggle = _kaggle_folder(Path(root))
    platform = "Kaggle" if kaggle else "Colab" if "COLAB_RELEASE_TAG" in environ else "local"
    outputs = kaggle / "working" / "outputs" if kaggle else Path(__file__).resolve().parent / "outputs"
    degraded = (kaggle / "working" if kaggle else outputs) / "fakefaces_degraded"
    if environ.get("OUTPUT_DIR"):
        outputs = given_path(environ["OUTPUT_DIR"])
        degraded = outputs / "fakefaces_degraded"
    outputs.mkdir(parents=True, exist_ok=True)
    return Places(platform, outputs, degraded, kaggle / "input" if kaggle else None)


def choose_device(report: Callable[[str], None] = print) -> torch.device:
    """CUDA if one convolution really runs on it, otherwise the CPU, with the reason.

    A P100 answers `is_available()` and then fails: current PyTorch builds hold no kernels for it.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        F.conv2d(torch.ones(1, 1, 4, 4, device="cuda"), torch.ones(1, 1, 3, 3, device="cuda")).sum().item()
        torch.backends.cudnn.benchmark = True  # all images have one size: worth finding the fastest algorithms for it
        return torch.device("cuda")
    except RuntimeError as error:
        name = torch.cuda.get_device_name()
        reason = str(error).splitlines()[0]
        report(f"The GPU ({name}) cannot run this PyTorch ({reason}); using the CPU. On Kaggle choose 'GPU T4 x2'.")
        return torch.device("cpu")


def keep_freed_memory() -> None:
    """Tells glibc to keep the memory of freed tensors for the next ones.

    Otherwise it gives every large block back to the system and gets it anew, page by page, emptied: half of the time
    that restoring takes on a CPU, and an eighth of the training's.
    """
    with contextlib.suppress(OSError, AttributeError):  # other systems
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap,
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: which does not shrink


def start(report: Callable[[str], None] = print) -> tuple[Settings, Places, torch.device]:
    """What every notebook's setup cell calls: settings, places and device, and one line that names them.

    In a notebook it also makes inline figures JPEG.
    """
    if "ipykernel" in sys.modules:  # as PNG, the many photographs would make notebooks of several megabytes
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("jpeg", pil_kwargs={"quality": 80})
    keep_freed_memory()
    device = choose_device(report)
    settings, places = choose_settings(device), find_places()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU with {torch.get_num_threads()} threads"
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, OpenCV {cv2.__version__}"
    profile = settings.profile + (", the plain recipe" if settings.plain else "")
    outputs = os.path.relpath(places.outputs) if places.outputs.is_relative_to(Path.cwd().parent) else places.outputs
    report(f"{versions} | {places.platform}, {name} | profile {profile} | outputs in {outputs}")
    return settings, places, device


def check(claim: str, holds: bool, settings: Settings, environ: Mapping[str, str] = os.environ) -> None:
    """Says whether what a notebook's prose promises held in this run.

    With RESTORATION_STRICT=1 a broken promise is an AssertionError, except in `smoke`, which is too short to learn.
    """
    strict = is_on("RESTORATION_STRICT", environ) and settings.profile != "smoke"
    if strict and not holds:
        raise AssertionError(f"does not hold in this run: {claim}")
    print(f"holds: {claim}" if holds else f"DOES NOT HOLD in this run (profile {settings.profile}): {claim}")


PARTIAL = ".partial-"  # how the names of files begin that are not yet whole


def derive_seed(*parts: object) -> int:
    """A 64-bit seed from what it is for: (seed, kind, file name) of a degraded file, (seed, stage, epoch) of an epoch.

    So nothing random depends on the order in which things happen, or on the number of workers.
    """
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` to write to, and renames it when that succeeded.

    Whoever reads `path` finds the old file or the whole new one, never half of it. The suffix is kept, since
    savefig chooses the format by it. Raises OSError, naming `path` and the room that is left, if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}{path.suffix}")
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        room = next(shutil.disk_usage(p).free for p in path.parents if p.is_dir())
        raise OSError(
            f"{path} could not be written ({error.strerror or error}; {room / 1e6:.0f} MB are free there). What was "
            "there before is kept: mend that, and run this again"
        ) from error


@contextlib.contextmanager
def alone_in(*folders: Path) -> Iterator[None]:
    """Only one run at a time gets into this block with a folder; leftovers of a killed one are swept out first.

    The lock is the operating system's and ends with its holder, however that dies; the workers of a killed run's loader
    hold it for some seconds longer. Folders are made if missing. Raises RuntimeError if another run holds one of them,
    OSError if their file system has no locks.
    """
    with contextlib.ExitStack() as stack:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(folder / ".lock", timeout=10))
            except Timeout as error:
                raise RuntimeError(
                    f"another run is writing to {folder}. Wait until it has ended, stop it (in Jupyter: shut down its "
                    "kernel), or set another OUTPUT_DIR"
                ) from error
            except (OSError, NotImplementedError) as error:
                raise OSError(f"{folder} cannot be locked ({error}): set OUTPUT_DIR to one on a local disk") from error
            for leftover in folder.glob(f"{PARTIAL}*"):
                with contextlib.suppress(FileNotFoundError):  # what is being written now is younger than a minute
                    if time.time() - leftover.stat().st_mtime > 60:
                        leftover.unlink()
        yield


def copy_file(source: Path, destination: Path) -> None:
    """Copies a file atomically."""
    with source.open("rb") as content, atomic(destination) as temporary, temporary.open("wb") as copy:
        shutil.copyfileobj(content, copy)


def in_parallel(function: Callable, items: Sequence, workers: int | None = None) -> Iterator:
    """As `map`, in threads; 500 at a time, since every waiting call takes a kilobyte."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for first in range(0, len(items), 500):
            yield from pool.map(function, items[first : first + 500])


def write_json(path: Path, content: object) -> None:
    """Writes `content` as JSON, atomically."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)  # piece by piece: as one string, a long one would take as much again


class _CellLine(io.TextIOBase):
    """A stream for tqdm that shows its newest line in the notebook cell, replacing the one before.

    Plain tqdm writes to stderr, and its widget needs ipywidgets; either leaves debris in a saved notebook.
    """

    def __init__(self) -> None:
        from IPython.display import display

        self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, text: str) -> int:
        """Shows the line."""
        if line := text.strip("\r\n "):
            self.handle.update({"text/plain": line}, raw=True)
        return len(text)


def progress(label: str, total: int, unit: str, initial: int = 0):
    """A tqdm bar: one line in a notebook cell, a live bar on a terminal, nothing in a log file."""
    from tqdm import tqdm

    in_notebook = "ipykernel" in sys.modules
    return tqdm(
        desc=label, total=total, unit=unit, initial=initial, mininterval=0.5, ascii=" -#" if in_notebook else None,
        file=_CellLine() if in_notebook else sys.stderr, disable=not (in_notebook or sys.stderr.isatty()),
    )  # fmt: skip


# ======================================================================================================================
# Faces
# ======================================================================================================================

KINDS = ("noisy", "color", "occluded")  # of degradation, and the suffixes of their files
MANIFEST = "degraded_manifest.json"  # lies in every folder of degraded images and says what made them
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
MAX_PIXELS = 10**8  # of a picture: degrading takes some 50 bytes for each, restoring 80
UNREAD_SUFFIXES = {".heic", ".heif", ".avif", ".jxl", ".psd", ".dng", ".cr2", ".nef", ".arw"}  # pictures for others


def read_image(path: str | Path) -> np.ndarray:
    """The one loader of image files: uint8 BGR (H, W, 3), EXIF orientation applied, as `cv2.imread` gives it.

    16-bit images are brought to 8 bits, grey ones get three equal channels, transparency is dropped. Everything else
    goes through here too, PIL included (`open_image`), so that every step sees the same pixels.

    Raises ValueError, naming the file, if it cannot be read, is empty, truncated, no image, or has over MAX_PIXELS;
    MemoryError if there is not enough for it.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not content:
        raise ValueError(f"{path}: the file is empty")
    if content[:2] == b"\xff\xd8" and _is_truncated_jpeg(content):
        raise ValueError(f"{path}: the JPEG is truncated")
    if (pixels := _count_pixels(content)) > MAX_PIXELS:
        raise ValueError(f"{path}: too many pixels ({pixels / 1e6:.0f} million; {MAX_PIXELS / 1e6:.0f} are the most)")
    try:  # what cv2.imread does, but on Windows that cannot open a path that is not ASCII
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError(f"{path}: not enough memory to read it") from error
        raise ValueError(f"{path}: OpenCV cannot read it ({error.err or error})") from error
    if image is None:
        convert = "; convert it to JPEG" if Path(path).suffix.lower() in UNREAD_SUFFIXES else ""
        raise ValueError(f"{path}: not an image that OpenCV can read{convert}")
    return image


def _count_pixels(content: bytes) -> int:
    """How many pixels a picture's header promises, since kilobytes may unpack to gigabytes; 0 if it is not understood.

    A PNG's header is read here: PIL reads all that stands before the picture, too, and refuses what OpenCV accepts.
    """
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return int.from_bytes(content[16:20], "big") * int.from_bytes(content[20:24], "big")
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.width * image.height
    except Image.DecompressionBombError:
        return 2 * Image.MAX_IMAGE_PIXELS
    except Exception:  # whatever PIL trips over; OpenCV may do better
        return 0


def _is_truncated_jpeg(content: bytes) -> bool:
    """Whether no end marker follows the first scan; OpenCV fills what is missing with grey and says nothing.

    Segments are skipped by their length: a thumbnail in the EXIF data has an end marker of its own.
    """
    position = 2
    while content[position : position + 1] == b"\xff" and content[position + 1 : position + 2] != b"\xda":
        is_filler = content[position + 1 : position + 2] == b"\xff"  # any number of them may precede a marker
        position += 1 if is_filler else 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return content.find(b"\xff\xd9", position) < 0


def to_pil(image: np.ndarray) -> Image.Image:
    """A uint8 BGR array (H, W, 3) as a PIL image in RGB."""
    return Image.fromarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))


def open_image(path: str | Path) -> Image.Image:
    """The file as a PIL image in RGB, with exactly the pixels of `read_image`."""
    return to_pil(read_image(path))


def write_image(path: str | Path, image: np.ndarray, quality: int = Settings.jpeg_quality) -> None:
    """Writes uint8 BGR (H, W, 3) atomically; a .jpg with the given quality and full colour resolution (4:4:4)."""
    sampling = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    path = Path(path)
    is_jpeg = path.suffix.lower() in {".jpg", ".jpeg"}
    try:  # what cv2.imwrite does, but on Windows that cannot open a path that is not ASCII
        done, content = cv2.imencode(path.suffix, image, options if is_jpeg else [])
    except cv2.error:
        done = False
    if not done:
        height, width = image.shape[:2]
        raise ValueError(f"{path}: OpenCV cannot write {width} x {height} px as {path.suffix}")
    with atomic(path) as temporary:
        content.tofile(temporary)


def list_images(folder: Path, refused: dict[str, str] | None = None) -> list[str]:
    """All image files below `folder`, as sorted relative paths; hidden ones and our own degraded copies left out.

    Folders that cannot be looked into, names that are not Unicode and formats that are not read are noted in `refused`
    with the reason. Strings, since Paths take five times the memory.
    """
    found, refused = [], {} if refused is None else refused

    def refuse(error: OSError) -> None:
        """Without this, os.walk would leave the folder out and say nothing."""
        refused[f"{Path(error.filename).relative_to(folder).as_posix()}/"] = error.strerror

    def is_degraded(folder: Path) -> bool:
        """Whether the folder is one of degraded images."""
        with contextlib.suppress(PermissionError):  # os.walk will say so
            return (folder / MANIFEST).exists()
        return False

    unread: dict[str, list[str]] = {}
    for parent, folders, names in os.walk(folder, onerror=refuse):  # does not follow links: no trap in a loop of them
        folders[:] = [f for f in folders if not f.startswith(".") and not is_degraded(Path(parent, f))]
        inner = Path(parent).relative_to(folder)
        images = [n for n in names if Path(n).suffix.lower() in IMAGE_SUFFIXES and not n.startswith(".")]
        stems = {Path(name).stem for name in images}
        for name in images:  # x_noisy.jpg is a degraded copy where x.jpg lies beside it
            stem, _, kind = Path(name).stem.rpartition("_")
            if not (kind in KINDS and stem in stems):
                found.append((inner / name).as_posix())
        for name in names:
            if (suffix := Path(name).suffix.lower()) in UNREAD_SUFFIXES:
                unread.setdefault(suffix, []).append((inner / name).as_posix())
    for suffix, names in unread.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        refused[ascii(min(names))[1:-1] + more] = f"OpenCV does not read {suffix}; convert to JPEG"
    for name in [n for n in found if ascii(n) != n and n != n.encode(errors="ignore").decode()]:
        found.remove(name)
        refused[ascii(name)[1:-1]] = "the file's name is not Unicode; rename it"
    return sorted(found)


# Synthetic portraits. Shapes are in head units: x right, y down from between the eyes, the chin at y = 1. Everyone is
# painted from the front with an average face, whose right half the tables give; last of all the picture is bent to the
# sitter's own features and pose. Pictures in the making are float32 BGR in 0..1. The tables read best packed:
# fmt: off
UNIT, CENTRE = 0.31, np.array((0.5, 0.46))  # the head unit and the middle of the eyes as shares of the picture
GRID = 256  # rows and columns of the reliefs that are lit: soft light needs no more
SKINS = ((33, 42, 66), (46, 66, 104), (70, 98, 146), (94, 128, 178), (122, 155, 205), (152, 182, 226), (176, 198, 232))
HAIRS = ((17, 17, 20), (24, 28, 40), (32, 42, 62), (44, 66, 98), (62, 100, 142), (100, 156, 196), (30, 58, 132))
EYES = ((20, 30, 50), (30, 48, 74), (48, 82, 100), (80, 106, 84), (142, 118, 88), (146, 132, 112))
CLOTHS = ((238, 240, 240), (27, 23, 22), (80, 48, 36), (44, 40, 120), (76, 88, 70), (120, 150, 176), (104, 96, 92),
          (66, 116, 186), (140, 112, 74), (130, 104, 140), (184, 204, 218), (244, 242, 240))
HEAD = ((0, -1.02), (0.26, -0.985), (0.47, -0.86), (0.61, -0.6), (0.665, -0.3), (0.67, 0.1), (0.62, 0.34), (0.53, 0.57),
        (0.4, 0.79), (0.19, 0.945), (0, 0.995))
BODY = ((0.38, 0.4), (0.38, 0.9), (0.44, 1.12), (0.74, 1.3), (1.15, 1.42), (1.6, 1.6), (2.2, 2.5))
NECKLINES = (((0, 1.34), (0.2, 1.32), (0.4, 1.22), (0.47, 1.08)), ((0, 1.5), (0.3, 1.45), (0.5, 1.34), (0.6, 1.2)),
             ((0, 1.1), (0.25, 1.06), (0.4, 0.93)), ((0, 1.62), (0.12, 1.48), (0.3, 1.27), (0.45, 1.07)))
BUMPS = (  # relief of bones, nose and lips: x, y, width, height, rise
    (0, 0.1, 0.06, 0.2, 0.08), (0, 0.41, 0.085, 0.075, 0.15), (0, 0.62, 0.2, 0.14, 0.06), (0, 0.6, 0.12, 0.03, 0.025),
    (0, 0.7, 0.11, 0.035, 0.04), (0, 0.8, 0.12, 0.035, -0.035), (0, 0.92, 0.13, 0.09, 0.07),
    (0.26, -0.21, 0.18, 0.06, 0.04), (0.29, 0, 0.15, 0.1, -0.085), (0.14, -0.02, 0.05, 0.09, -0.045),
    (0.29, 0.02, 0.1, 0.065, 0.06), (0.115, 0.44, 0.05, 0.05, 0.075), (0.4, 0.24, 0.14, 0.11, 0.05),
    (0.34, 0.4, 0.1, 0.11, 0.02), (0.2, -0.48, 0.2, 0.16, 0.03), (0.43, 0.52, 0.1, 0.14, -0.04),
    (0.6, -0.33, 0.08, 0.2, -0.04), (0.28, 0.6, 0.04, 0.07, -0.035))
MORPHS = (  # how faces differ: x, y, reach, and the usual shift right and down there
    (0.67, 0.15, 0.25, 0.025, 0), (0.5, 0.62, 0.2, 0.035, 0), (0, 1, 0.25, 0, 0.035), (0.29, 0, 0.15, 0.012, 0),
    (0.42, 0, 0.08, 0, 0.014), (0.29, -0.07, 0.06, 0, 0.01), (0.3, -0.22, 0.12, 0, 0.018), (0.13, 0.44, 0.08, 0.02, 0),
    (0, 0.44, 0.13, 0, 0.022), (0.2, 0.64, 0.1, 0.02, 0), (0, 0.72, 0.05, 0, 0.014), (0, 0.58, 0.04, 0, 0.008),
    (0.21, 0.64, 0.08, 0, -0.03), (0.4, 1.0, 0.25, 0.05, 0))
UPPER_LID = np.array(((0.145, 0.022), (0.2, -0.038), (0.278, -0.06), (0.355, -0.045), (0.431, -0.008)))
LOWER_LID = np.array(((0.431, -0.008), (0.355, 0.03), (0.285, 0.041), (0.208, 0.035), (0.145, 0.022)))
CREASES = (  # shadows and lights on the face: points, width, tint, strength in youth, more in old age, blur
    (UPPER_LID - (0, 0.036), 0.02, 0.5, 0.8, 0, 0.006), (LOWER_LID, 0.012, 0.3, 0.6, 0, 0.004),
    (LOWER_LID + (0, 0.012), 0.014, 1.12, 0.7, 0, 0.004), (LOWER_LID + (0, 0.06), 0.03, 0.76, 0.3, 0.5, 0.014),
    (((0.025, 0.487), (0.055, 0.474), (0.094, 0.487)), 0.03, 0.2, 0.9, 0, 0.009),
    (((0.125, 0.39), (0.15, 0.44), (0.13, 0.49)), 0.025, 0.5, 0.7, 0, 0.01),
    (((0.15, 0.4), (0.22, 0.5), (0.275, 0.64)), 0.025, 0.6, 0.12, 0.6, 0.011),
    (((0.2, 0.64), (0.21, 0.643), (0.225, 0.647)), 0.04, 0.5, 0.7, 0, 0.012),
    (((0.44, 0), (0.5, -0.02), (0.55, -0.05)), 0.02, 0.6, 0, 0.5, 0.008),
    (((0.44, 0.03), (0.55, 0.06)), 0.02, 0.6, 0, 0.5, 0.008), (((0, -0.45), (0.3, -0.44)), 0.02, 0.6, 0, 0.5, 0.01),
    (((0, -0.36), (0.2, -0.37), (0.36, -0.34)), 0.02, 0.6, 0, 0.5, 0.01))
BROW = np.array(((0.11, -0.15), (0.2, -0.2), (0.33, -0.225), (0.46, -0.175)))
CHEEK = np.array(((0.64, 0.1), (0.56, 0.36), (0.4, 0.6), (0.22, 0.79), (0, 0.84)))
JAW = np.array(((0.65, 0.27), (0.61, 0.56), (0.52, 0.8), (0.34, 0.99), (0, 1.07)))
LIP = np.array(((0.01, 0.54), (0.08, 0.54), (0.16, 0.56))), np.array(((0.05, 0.62), (0.17, 0.625), (0.28, 0.72)))
HAIRLINE = np.array(((0.65, 0.05), (0.63, -0.27), (0.52, -0.49), (0.27, -0.63), (0.08, -0.65)))
CROWN = np.array(((0.7, 0.08), (0.74, -0.4), (0.64, -0.8), (0.36, -1.03), (0.1, -1.09)))


def draw_person(rng):
    """Draw the traits of one sitter: colours are BGR 0..1, age 0..1 runs from twenty to eighty years."""
    woman, age, tone = bool(rng.random() < 0.5), rng.beta(1.1, 1.6), rng.uniform(0, 6)
    skin = np.array([np.interp(tone, range(7), plane) for plane in zip(*SKINS)]) * rng.uniform(0.96, 1.04, 3) / 255
    grey = np.clip((age - 0.5) * 3 + rng.normal(0, 0.25), 0, 1) if age > 0.4 else 0
    hair = np.array(HAIRS[rng.integers(3 if tone < 3 else 7)]) * (1 - grey) + rng.uniform(110, 170) * grey
    styles = "long long wavy wavy bob bun fringe curly" if woman else "short crop crop swept swept curly receding bald"
    light = np.array((rng.choice((-1, 1)) * rng.uniform(0.2, 0.8), rng.uniform(-0.75, -0.3), 0.75))
    warm, morph = np.array((-1, 0, 1)) * rng.uniform(-0.08, 0.12), rng.normal(0, 1, len(MORPHS)).clip(-2, 2)
    morph[[1, 12, 13]] = morph[1] - woman, rng.uniform(-0.1, 1.2), 0.8 - 1.6 * woman  # jaw, smile and neck
    hat, beards = rng.random() < 0.18, "none none stubble stubble full full moustache"
    weaves = "plain plain plain stripes rows checks dots"
    style = str(rng.choice(styles.split()))
    if hat:  # a scarf hides the hair, a cap most of it
        style = "bald" if woman else "short"
    return dict(
        woman=woman, age=age, skin=skin, hair=hair / 255, eyes=np.array(EYES[rng.integers(2 if tone < 3 else 6)]) / 255,
        cloth=np.array(CLOTHS[rng.integers(12)]) / 255, wool=np.array(CLOTHS[rng.integers(12)]) / 255,
        hat=hat, style=style, neckline=int(rng.integers(5)), glasses=rng.random() < 0.15 + 0.2 * age, morph=morph,
        pattern=str(rng.choice(weaves.split())), weave=rng.uniform(0.12, 0.5), pins=4 * (rng.random() < 0.25),
        jacket=rng.random() < 0.3, band=rng.random() < 0.6, dark=np.array(CLOTHS[1 + rng.integers(3)]) / 255,
        part=rng.uniform(-0.3, 0.3), length=rng.uniform(0.9, 1.7), volume=rng.uniform(0.8, 0.98),
        beard="none" if woman else str(rng.choice(beards.split())), freckles=70 * (tone > 3.5 and rng.random() < 0.3),
        teeth=0.05 * (morph[12] > 0.4 and rng.random() < 0.5), turn=rng.uniform(-0.12, 0.12), tilt=rng.normal(0, 0.06),
        zoom=rng.uniform(1.04, 1.14), shift=rng.uniform(-0.03, 0.03, 2),
        light=np.float32(light / np.linalg.norm(light)),  # points from the face to the lamp
        key=np.float32((1 + warm) * rng.uniform(0.95, 1.15)), ambient=np.float32((1 - warm) * rng.uniform(0.12, 0.3)))


def curve(points, steps=8):
    """Run a smooth Catmull-Rom curve through control points along axis 0."""
    p = np.asarray(points, np.float64)
    more = np.concatenate((p[:1], p, p[-1:]))
    a, b, c, d = (q[:, None] for q in (more[:-3], p[:-1], p[1:], more[3:]))
    t = (np.arange(steps) / steps).reshape((-1,) + (1,) * (p.ndim - 1))
    q = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * b - a - 3 * c + d)))
    return np.concatenate((q.reshape((-1,) + p.shape[1:]), p[-1:]))


def ribbon(points, width):
    """Outline a smooth stroke through points that tapers at both ends."""
    line = curve(points)
    along = np.gradient(line, axis=0)
    across = along[:, ::-1] * (-1, 1) / (np.linalg.norm(along, axis=1, keepdims=True) + 1e-9)
    across *= width / 2 * np.sin(np.linspace(0.15, np.pi - 0.15, len(line)))[:, None]
    return np.concatenate((line + across, (line - across)[::-1]))


def oval(x, y, rx, ry, power=1.0):
    """Outline an ellipse, squarer for powers below 1."""
    unit = np.stack((np.cos(np.linspace(0, 2 * np.pi, 33)), np.sin(np.linspace(0, 2 * np.pi, 33))), 1)
    return np.sign(unit) * np.abs(unit) ** power * (rx, ry) + (x, y)


def mirror(half):
    """Continue the right half of a line with its mirror image."""
    return np.concatenate((half, np.asarray(half)[::-1] * (-1, 1)))


def noise(rng, rows, columns, size):
    """Smooth noise of about unit variance: a random grid stretched over a square picture."""
    cells = rng.normal(0, 1.3, (rows, columns)).astype(np.float32)
    return cv2.resize(cells, (size, size), interpolation=cv2.INTER_CUBIC)


def window(image, points, margin):
    """Slices of the picture around points with a margin in head units, and the points in its 1/16 pixels."""
    pixels, pad = (np.asarray(points) * UNIT + CENTRE) * len(image), margin * UNIT * len(image) + 2
    low = np.clip(pixels.reshape(-1, 2).min(0) - pad, 0, len(image) - 1).astype(int)
    high = np.clip(pixels.reshape(-1, 2).max(0) + pad, low + 1, len(image)).astype(int)
    return np.s_[low[1]:high[1], low[0]:high[0]], np.round((pixels - low) * 16).astype(np.int32, order="C")


def fill(image, outline, colour, alpha=1.0, blur=0.0, glaze=False):
    """Paint the inside of an outline, softened by blur head units, with a colour or a picture; a glaze multiplies."""
    part, pixels = window(image, outline, 3 * blur)
    target, paint = image[part], np.asarray(colour, np.float32)
    mask = cv2.fillPoly(np.zeros(target.shape[:2], np.uint8), [pixels], 255, cv2.LINE_AA, 4)
    if blur * len(image) > 1:
        mask = cv2.GaussianBlur(mask, (0, 0), blur * UNIT * len(image))
    paint = target * paint if glaze else paint[part] if paint.ndim == 3 else paint
    target += (paint - target) * (mask.astype(np.float32) * np.float32(alpha / 255))[..., None]


def strands(image, lines, tones, colour, shine, alpha=0.9, solid=True):
    """Paint hairs (hair, point, 2) with tones 0..1, if solid over soft darker hair, in the light of shine."""
    part, pixels = window(image, lines, 0.1)
    target, wide, colour = image[part], max(1, round(len(image) / 512)), np.asarray(colour, np.float32)
    tone, mask = np.full(target.shape[:2], 50, np.uint8), np.zeros(target.shape[:2], np.uint8)
    for line, value in zip(pixels, tones):
        cv2.polylines(tone, [line], False, int(255 * value), wide, cv2.LINE_AA, 4)
    if solid:
        mask = cv2.fillPoly(mask, [around(pixels)], 255, cv2.LINE_AA, 4)
        mask = cv2.GaussianBlur(mask, (0, 0), 0.013 * UNIT * len(image))
    hairs = cv2.polylines(np.zeros_like(mask), list(pixels), False, int(255 * alpha), wide, cv2.LINE_AA, 4)
    mask = cv2.max(mask, hairs)
    tone, glow, gloss = tone[..., None].astype(np.float32) / 255, shine[part][..., :1], shine[part][..., 1:]
    paint = colour * (0.3 + 1.3 * tone) * glow + gloss * tone * (0.4 * colour + 0.18)
    target += (paint - target) * (mask.astype(np.float32) / 255)[..., None]


def around(lines):
    """Outline the area that neighbouring hairs (hair, point, 2) cover."""
    return np.concatenate((lines[0], lines[:, -1], lines[-1, ::-1], lines[::-1, 0]))


def background(rng, size):
    """A studio backdrop or a blurred room: two colours, cloudy light, sometimes discs of bokeh, a vignette."""
    base = rng.choice((rng.uniform(0.05, 0.5), rng.uniform(0.4, 0.97))) + rng.normal(0, 0.03, 3)
    far = base + rng.normal(0, 0.1) + rng.normal(0, 0.03, 3)
    y, x = np.mgrid[-1:1:128j, -1:1:128j].astype(np.float32)
    ramp = 0.5 + rng.uniform(-0.5, 0.5) * x + rng.uniform(-0.5, 0.5) * y + 0.15 * noise(rng, 4, 4, 128)
    image = (base + (far - base) * ramp[..., None]).astype(np.float32)
    for _ in range(rng.integers(6, 18) if rng.random() < 0.35 else 0):
        cx, cy = rng.uniform(-1.5, 1.5, 2)
        r = rng.uniform(0.08, 0.25)
        fill(image, oval(cx, cy, r, r), (base + 0.3) * 1.2, rng.uniform(0.04, 0.3), 0.03)
    image = (image * (1.05 - 0.14 * (x * x + y * y))[..., None]).clip(0.02, 1).astype(np.float32)
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
    for _ in range(rng.integers(1, 4) if rng.random() < 0.35 else 0):  # windows, frames, shelves: light and dark edges
        cx, cy, rx, ry = rng.uniform((-1.7, -1.7, 0.15, 0.3), (1.7, 0.6, 0.6, 1))
        fill(image, oval(cx, cy, rx, ry, 0.2), rng.choice((0.02, 0.3, 0.6, 0.99)) + rng.normal(0, 0.02, 3), 0.9, 0.016)
    return image


def pattern(p):
    """The colour of the clothes, plain or with stripes, rows, checks or dots of a second one: a picture of the grid."""
    y, x = np.mgrid[0:GRID, 0:GRID] * p["weave"]
    x, y = {"rows": 0 * x + 1.6, "plain": 0 * x}.get(p["pattern"], x), {"stripes": 0 * y + 1.6}.get(p["pattern"], y)
    share = np.clip(4 * (np.sin(x) * np.sin(y) - 0.5 * (p["pattern"] == "dots")), 0, 1)[..., None]
    return p["cloth"] + (p["wool"] - p["cloth"]) * share


def relight(albedo, height, p, size, gloss=0.065):
    """Light a relief (head units): wrapped Lambert light, cast shadows, darker hollows, a little sheen."""
    light, step = p["light"], 1 / (UNIT * GRID)
    gy, gx = np.gradient(height.astype(np.float32), step)
    steep, side = np.sqrt(1 + gx * gx + gy * gy)[..., None], np.hypot(light[0], light[1])
    height, blocked = np.float32(height), np.zeros(height.shape, np.float32)
    for reach in np.arange(0.05, 0.4, 0.05):  # walk towards the lamp and note what stands in the way
        shift = np.round(-light[1::-1] / side * reach / step).astype(int)
        blocked = np.maximum(blocked, np.roll(height, shift, (0, 1)) - height - reach * light[2] / side)
    clear = 1 - 0.75 * cv2.GaussianBlur(np.clip(blocked / 0.05, 0, 1), (0, 0), 0.02 / step)[..., None]
    hollow = np.clip((cv2.GaussianBlur(height, (0, 0), 0.07 / step) - height) * 6, 0, 0.5)[..., None]
    facing, half = (light[2] - light[0] * gx - light[1] * gy)[..., None] / steep, light + np.float32((0, 0, 1))
    half = (half[2] - half[0] * gx - half[1] * gy)[..., None] / steep / np.linalg.norm(half)
    wrap = np.float32((0.12, 0.18, 0.32))  # red light travels through skin and softens the edge of shadows
    lit = np.clip((facing + wrap) / (1 + wrap), 0, 1) * clear * p["key"] + p["ambient"] * (0.6 + 0.4 / steep)
    lit = np.float32(albedo) ** 2.2 * lit * (1 - hollow) + half.clip(0, 1) ** 18 * clear * p["key"] * gloss
    return cv2.resize((lit.clip(0, 1) ** (1 / 2.2)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)


def bulge(half, depth):
    """Relief of a round body, from the right half of its outline."""
    y, x = (((np.arange(GRID) + 0.5) / GRID - c) / UNIT for c in CENTRE[::-1])
    width = np.interp(y, half[:, 1], half[:, 0])[:, None] + 0.025
    return depth * np.sqrt(np.clip(1 - np.abs(x / width) ** 2.4, 0, 1))


def paint_body(rng, image, p):
    """Neck, shoulders and clothes."""
    head, body, edge, side = curve(HEAD), curve(BODY), curve(NECKLINES[min(p["neckline"], 3)]), p["light"][0]
    garment = mirror(np.concatenate((edge, body[body[:, 1] > edge[-1, 1] + 0.07] * (1.03, 1) - (0, 0.04))))
    bare = relight(p["skin"], bulge(body, 0.5), p, len(image))
    fill(bare, mirror(head) * (0.95, 1) + (-0.16 * side, 0.15), (0.36, 0.36, 0.44), 0.9, 0.05, True)
    fill(bare, garment - (0, 0.02), (0.5, 0.5, 0.55), 0.8, 0.02, True)
    fill(image, mirror(body), bare)
    folds = 0.04 * noise(rng, 10, 10, GRID) + 0.02 * noise(rng, 6, 30, GRID)
    worn = relight(pattern(p), bulge(body * (1.04, 1) - (0, 0.05), 0.45) + folds, p, len(image), 0.01)
    fill(image, garment, worn)
    for k, place in enumerate(rng.uniform((-0.9, 1.5), (0.9, 1.62), (p["pins"], 2))):  # badges and buttons
        fill(image, oval(*place, 0.02 + 0.02 * k, 0.035), 0.97 - 0.94 * (k % 2) * np.ones(3), 0.95, 0.002)
    flap = np.array(((0.38, 0.98), (0.5, 1.08), (0.5, 1.4), (0.3, 1.5), (0.02, 1.62)))
    for k in (-1, 1):
        fill(image, ribbon(edge[::5] * (k, 1) + (0, 0.06), 0.02), (0.6, 0.6, 0.6), 0.6, 0.008, True)
        if p["jacket"]:
            front = np.array(((0.4, 1), (0.42, 1.16), (0.3, 1.42), (0.04, 2), (2.2, 2.5), (1.6, 1.5), (0.7, 1.2)))
            fill(image, front * (k, 1) + (0, 0.03), (0.5, 0.5, 0.5), 0.7, 0.025, True)
            shape = bulge(body * (1.06, 1) - (0, 0.07), 0.45) + folds
            fill(image, front * (k, 1), relight(p["dark"], shape, p, len(image), 0.01))
        elif p["neckline"] == 4:
            fill(image, flap * (k, 1) + (0, 0.03), (0.5, 0.5, 0.5), 0.7, 0.025, True)
            fill(image, flap * (k, 1), np.minimum(worn * 1.1 + 0.01, 1))


def paint_head(rng, image, p):
    """Ears and the lit skin of the head."""
    head, skin, height = curve(HEAD), p["skin"], bulge(curve(HEAD) * 1.04, 0.62)
    y, x = (((np.arange(GRID) + 0.5) / GRID - c) / UNIT for c in CENTRE[::-1])
    height *= np.sqrt(np.clip(1 - np.abs(y / 1.06) ** 4, 0, 1))[:, None]
    for bx, by, wide, high, rise in BUMPS:
        row = np.exp(-0.5 * ((x - bx) / wide) ** 2) + (bx > 0) * np.exp(-0.5 * ((x + bx) / wide) ** 2)
        height += rise * np.outer(np.exp(-0.5 * ((y - by) / high) ** 2), row)
    ear = curve(((0.62, -0.1), (0.71, -0.13), (0.755, -0.02), (0.73, 0.17), (0.68, 0.32), (0.6, 0.3)))
    for k in (-1, 1):
        fill(image, ear * (k, 1), skin * (0.85, 0.85, 0.95) * (0.78 + 0.22 * np.sign(k * p["light"][0])))
        fill(image, ear * (0.35 * k, 0.7) + (0.45 * k, 0.03), (0.5, 0.5, 0.6), 0.8, 0.02, True)
    albedo = (skin * (1 + 0.01 * noise(rng, 110, 110, GRID)[..., None] * (1.6, 1.3, 0.7))).astype(np.float32)
    for cx, cy, r in ((-0.42, 0.3, 0.14), (0.42, 0.3, 0.14), (0, 0.41, 0.08), (0, 0.9, 0.1)):
        fill(albedo, oval(cx, cy, r, r * 0.8), (0.86, 0.88, 1.03), 0.8, 0.07, True)
    for cx, cy in rng.normal((0, 0.2), (0.27, 0.12), (p["freckles"], 2)):
        fill(albedo, oval(cx, cy, 0.01, 0.009), (0.62, 0.7, 0.82), rng.uniform(0.2, 0.8), 0.004, True)
    fill(image, mirror(head), relight(albedo, height, p, len(image)), 1, 0.006)


def paint_eye(image, p, k):
    """One eye: shaded white, iris, lids; k is -1 for the picture's left, 1 for its right."""
    skin, side, r, (x, y) = p["skin"], np.sign(p["light"][0]), 0.059, (0.285 * k + 0.1 * p["turn"], -0.009)
    upper, lower = UPPER_LID * (k, 1), LOWER_LID * (k, 1)
    fill(image, curve(upper + (0, -0.02)), (0.72, 0.7, 0.78), 0.5, 0.03, True)
    ball = image.copy()  # painted whole, then shown through the opening between the lids
    fill(ball, oval(0.285 * k, 0, 0.17, 0.1), (0.75, 0.78, 0.81), 0.7)
    fill(ball, oval(0.16 * k, 0.02, 0.022, 0.015), skin * (0.7, 0.7, 1), 0.6, 0.006)
    for share, colour, blur in ((1, p["eyes"] * 0.3, 0.004), (0.8, p["eyes"], 0.01), (0.4, (0.02, 0.02, 0.02), 0.003)):
        fill(ball, oval(x, y, r * share, r * share), colour, 0.96, blur)
    fill(ball, oval(x - 0.015 * side, y + 0.028, 0.038, 0.022), (1.7, 1.7, 1.7), 0.6, 0.01, True)
    fill(ball, ribbon(upper + (0, 0.012), 0.065), (0.4, 0.38, 0.38), 0.85, 0.01, True)
    fill(ball, oval(x + 0.03 * side, y - 0.024, 0.011, 0.012), (1, 1, 1), 0.9, 0.002)
    fill(image, np.concatenate((curve(upper), curve(lower))), ball, 1, 0.003)
    lash = upper + np.outer((0, 0, 0, 0.3, 1), (0.025 * k, -0.012)) * p["woman"]
    fill(image, ribbon(lash, 0.024 + 0.01 * p["woman"]), skin * 0.12, 0.9, 0.004)


def paint_mouth_and_folds(image, p):
    """Lips as warm glazes over lit skin, the line between them or teeth; then all the creases of the face."""
    side, gap = 0.03 * p["light"][0], p["teeth"]
    seam = np.array(((-0.212, 0.643), (-0.1, 0.643), (0, 0.65), (0.1, 0.643), (0.212, 0.643)))
    parted = seam[::-1] + np.outer((0, 0.8, 1, 0.8, 0), (0, gap))
    top = mirror(((0.212, 0.643), (0.11, 0.6), (0.035, 0.583), (0, 0.593)))
    bottom = mirror(((0.212, 0.643), (0.11, 0.703 + gap), (0, 0.738 + gap)))
    inside = np.concatenate((curve(seam), curve(parted)))
    fill(image, inside, (0.08, 0.06, 0.16), 0.95 * (gap > 0), 0.003)
    fill(image, inside * (0.84, 0.8) + (0, 0.13), (0.72, 0.79, 0.83), 0.85 * (gap > 0), 0.006)
    tint = np.array((0.62, 0.55, 0.85)) if p["woman"] else np.array((0.74, 0.70, 0.90))
    fill(image, np.concatenate((curve(top), curve(seam))), tint * 0.86, 0.9, 0.006, True)
    fill(image, np.concatenate((curve(bottom), curve(parted[::-1]))), tint, 0.9, 0.007, True)
    for x, y, rx, ry, shade in ((side, 0.39, 0.03, 0.025, 1.25), (side, 0.695 + gap, 0.07, 0.014, 1.2),
                                (0, 0.785 + gap, 0.1, 0.02, 0.8)):
        fill(image, oval(x, y, rx, ry), (shade, shade, shade), 0.8, 0.014, True)
    for line in (seam, parted):
        fill(image, ribbon(line, 0.02), p["skin"] * (0.2, 0.18, 0.32), 0.7, 0.005)
    for points, width, tint, young, old, blur in CREASES:
        for k in (-1, 1):
            outline, alpha = ribbon(points, width) * (k, 1), np.clip(young + old * (p["age"] * 1.4 - 0.4), 0, 1)
            fill(image, outline, (tint, tint, tint ** 0.8), alpha, blur, True)


def hair_shine(p, size):
    """Glow and gloss of hair for every pixel: a lit ball with a bright band around the crown."""
    x, y = np.meshgrid(*(((np.arange(64) + 0.5) / 64 - c) / UNIT for c in CENTRE))
    radius, light = np.hypot(x, y / 1.2 + 0.04), p["light"]
    facing = x * light[0] + (y / 1.2 + 0.04) * light[1] + light[2] * np.sqrt(np.clip(1 - radius * radius, 0.05, 1))
    gloss = np.exp(-((radius - 0.74) / 0.1) ** 2) * np.clip(0.2 + x * light[0] - y * 0.6, 0, 1)
    return cv2.resize(np.dstack((0.4 + 0.75 * facing.clip(0, 1), gloss)).astype(np.float32), (size, size))


def comb(rng, guides, count, wave=0.0, curl=0.0):
    """Grow hairs (hair, point, 2) in clumps between guide hairs (point, guide, 2); returns them and their tones."""
    guides = np.asarray(guides, np.float64)
    place = np.sort(rng.random(count)) * (guides.shape[1] - 1.001)
    left, share, clump = place.astype(int), (place % 1)[:, None], np.arange(count) * 26 // count
    loose = np.linspace(0.25, 1, len(guides))[:, None, None] * min(np.ptp(guides, (0, 1)).max() * 0.015, 0.016)
    lines = guides[:, left] * (1 - share) + guides[:, left + 1] * share
    lines += loose * (1.3 * rng.normal(0, 1, (26, 2))[clump] + rng.normal(0, 1, (count, 2)))
    lines = curve(lines, 20 if curl else 7)
    s = np.linspace(0, 1, len(lines))[:, None]
    lines += (s ** 3 * rng.uniform(-0.25, 0, count))[..., None] * (lines[-1] - lines[len(lines) // 2])  # uneven ends
    lines[..., 0] += wave * s * np.sin(2 * np.pi * (2.3 * s + 0.5 * rng.random(26)[clump]))
    turns = 2 * np.pi * (s * rng.uniform(3, 6, count) + rng.random(count))
    lines += curl * np.minimum(1, 4 * s)[..., None] * np.stack((np.cos(turns), np.sin(turns)), -1)
    tones = np.clip(0.42 + rng.normal(0, 0.14, 26)[clump] + rng.normal(0, 0.14, count), 0.05, 1)
    return lines.transpose(1, 0, 2), tones


def parted_hair(part, wide, end):
    """Guides of hair that falls from a parting to both sides, as wide as x and down to y."""
    low = -0.1 + (end + 0.1) * 0.5
    for k in (-1, 1):
        inner = ((part - 0.02 * k, -0.7), (0.27 * k + 0.4 * part, -0.61), (0.52 * k, -0.4), (0.625 * k, -0.12),
                 (0.66 * k, low), (0.66 * k, end))
        outer = ((part * 0.8 - 0.02 * k, -1.12), (0.3 * k + 0.3 * part, -1.07), (0.6 * k, -0.86),
                 ((0.4 * wide + 0.43) * k, -0.5), (wide * k, low), ((wide - 0.03) * k, end + 0.05))
        yield np.stack((inner, outer), 1)


def raised_hair(style):
    """Guides of hair that rises from the hairline to the outline of the head."""
    rise = {"curly": 0.2, "swept": 0.12, "crop": 0.05, "receding": -0.02}.get(style, 0.02)
    line = HAIRLINE + ((0, 0), (0, 0), (0.02, -0.08), (0.02, -0.2), (0, -0.14)) * np.array(style == "receding")
    line, top = mirror(line), mirror(CROWN * (1 + 0.6 * rise, 1 + rise))
    return np.stack((line, (line + top) / 2 - (0, 0.4 * rise), top))


def paint_hair(rng, image, p, shine, behind):
    """The hair behind the neck, or that on the head with its shadow."""
    style, x, head = p["style"], np.linspace(-1, 1, 7), mirror(curve(HEAD))
    end, long = 0.72 if style == "bob" else p["length"], style in ("long", "wavy", "bob", "fringe")
    wave, curl = {"wavy": (0.07, 0), "curly": (0, 0.03)}.get(style, (0.05 * p["volume"] - 0.035, 0))
    tail, bun = ((0.8, -0.6), (0.8, 0.2), (0.8, end)), ((0.22, -0.95), (0.36, -1.18), (0.18, -1.36))
    rows = {"fringe": ((0.3, -1.06), (0.5, -0.8), (0.58, -0.5), (0.6, -0.27))}.get(style, ())
    if behind:
        rows, patches = tail if long else bun if style == "bun" else (), []
    elif long or style == "short":
        patches = list(parted_hair(p["part"], *((p["volume"], end) if long else (0.72, -0.08))))
    else:
        patches = [] if style == "bald" else [raised_hair(style)]
    patches += [np.stack([np.stack((x * a, y + 0.1 * x * x), 1) for a, y in rows])] if rows else []
    for guides in patches:
        lines, tones = comb(rng, guides, 420, wave, curl)
        shaded = image.copy()  # hair throws its shadow on the head only
        fill(shaded, around(lines) + (-0.05 * p["light"][0], 0.05), (0.55, 0.52, 0.58), 0.7, 0.04, True)
        if not behind:
            fill(image, head, shaded)
        strands(image, lines, tones * (0.5 if behind else 1), p["hair"], shine)


def paint_brows_and_beard(rng, image, p, shine):
    """Eyebrows, stubble, moustache or beard: short hairs from a root line to a tip line over a soft shadow."""
    beard, shaded = p["beard"], image.copy()
    thick = np.outer((1, 0.9, 0.65, 0.1), (0, 0.026 - 0.008 * p["woman"]))
    rows = [(BROW + thick, BROW - 0.6 * thick + (0.05, 0.008), 150)] + [LIP + (130,)] * (beard != "none")
    rows += [(CHEEK + (JAW - CHEEK) * a, CHEEK + (JAW - CHEEK) * (a + 0.4), 160) for a in (0, 0.2, 0.4, 0.6)
             if beard in ("stubble", "full")]
    for root, tip, _ in rows:
        for k in (-1, 1):
            area, shade = np.concatenate((root, tip[::-1])) * (k, 1), np.minimum(1, p["hair"] * 0.5 + 0.5)
            fill(shaded, area, shade, 0.6, 0.02, True)
    fill(image, mirror(curve(HEAD)), shaded)
    for root, tip, count in rows[:1] if beard == "stubble" else rows:
        for k in (-1, 1):
            lines, tones = comb(rng, np.stack((root, (root + tip) / 2 + (0.01, 0.005), tip)) * (k, 1), count)
            strands(image, lines, tones * 0.9, p["hair"] * 0.8, shine * (1, 0), 0.45, False)


def paint_glasses(image):
    """Dark-rimmed glasses and the shadow they throw."""
    rim = np.concatenate((oval(0.29, 0.03, 0.215, 0.15, 0.7), oval(0.29, 0.03, 0.197, 0.134, 0.7)))
    bridge, temple = ((-0.09, 0), (0, -0.03), (0.09, 0)), ((0.5, -0.04), (0.6, -0.06), (0.68, -0.05))
    for k in (-1, 1):
        fill(image, (rim + (0, 0.03)) * (k, 1), (0.6, 0.6, 0.6), 0.5, 0.012, True)
        for part in (rim, ribbon(bridge, 0.03), ribbon(temple, 0.03)):
            fill(image, part * (k, 1), (0.05, 0.05, 0.07), 0.92, 0.003)


def paint_hat(rng, image, p):
    """A knitted cap, perhaps with a band, or for women a head scarf."""
    inner = ((0, -0.62), (0.35, -0.55), (0.57, -0.25), (0.6, 0.15), (0.5, 0.6), (0.36, 0.84), (0.17, 0.99), (0, 1.03))
    outer = ((0, -1.2), (0.45, -1.1), (0.76, -0.7), (0.83, -0.1), (0.78, 0.6), (0.9, 1.2), (1.1, 1.7), (0, 2.2))
    folds = 0.012 * noise(rng, 9, 9, GRID) + 0.02 * noise(rng, 5, 24, GRID)
    if not p["woman"]:
        inner, folds = ((0.74, -0.2), (0.4, -0.33), (0, -0.37)), 0.008 * np.sin(np.arange(GRID) / 1.4)
        outer = ((0, -1.25), (0.38, -1.17), (0.65, -0.88), (0.75, -0.5), (0.74, -0.2))
    outline = mirror(np.concatenate((curve(outer), curve(inner)[::1 if not p["woman"] else -1])))
    fill(image, outline + (-0.05 * p["light"][0], 0.05), (0.5, 0.48, 0.52), 0.8, 0.04, True)
    fill(image, outline, relight(p["wool"], bulge(curve(outer), 0.7) + folds, p, len(image), 0.01), 1, 0.004)
    if p["band"] and not p["woman"]:  # a dark band with a badge
        band = mirror(((0.74, -0.2), (0.4, -0.33), (0, -0.37), (0, -0.66), (0.4, -0.62), (0.75, -0.47)))
        fill(image, band, relight(p["dark"], bulge(curve(outer), 0.7), p, len(image), 0.02), 1, 0.003)
        fill(image, oval(0, -0.52, 0.07, 0.09), (0.7, 0.85, 0.9), 0.95, 0.002)


def pose(rng, image, p):
    """Bend the picture to the sitter's features and pose, and a little more: no face is symmetric."""
    y, x = (np.mgrid[0:96, 0:96] + 0.5) / 96
    x, y = ((q - c - d) / (UNIT * p["zoom"]) for q, c, d in zip((x, y), CENTRE, p["shift"] * (1, 0.5)))
    above = np.clip((1.5 - y) / 0.9, 0, 1)  # the shoulders stay where they are
    x, y = x + p["tilt"] * above * (y - 0.9), y - p["tilt"] * above * x
    x = x - p["turn"] * np.clip(1 - (x / 0.8) ** 2, 0, 1) * above
    dx, dy = 0.006 * noise(rng, 7, 7, 96), 0.006 * noise(rng, 7, 7, 96)
    for (mx, my, reach, right, down), amount in zip(MORPHS, p["morph"]):
        weight = amount * np.exp(-((np.abs(x) - mx) ** 2 + (y - my) ** 2) / (reach * reach))
        dx, dy = dx - right * weight * np.sign(x), dy - down * weight
    to = [cv2.resize(((q * UNIT + c) * len(image)).astype(np.float32), image.shape[:2], interpolation=cv2.INTER_CUBIC)
          for q, c in zip((x + dx, y + dy), CENTRE)]
    return cv2.remap(image, to[0], to[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def draw_portrait(rng: np.random.Generator, size: int = 512) -> np.ndarray:
    """Paint one invented person as a uint8 BGR picture of size x size pixels."""
    p = draw_person(rng)
    image = background(rng, max(size, 384))  # thin hairs need pixels: smaller pictures are reduced at the end
    shine = hair_shine(p, len(image))
    paint_hair(rng, image, p, shine, True)
    paint_body(rng, image, p)
    paint_head(rng, image, p)
    for k in (-1, 1):
        paint_eye(image, p, k)
    paint_mouth_and_folds(image, p)
    paint_brows_and_beard(rng, image, p, shine)
    paint_hair(rng, image, p, shine, False)
    if p["hat"]:
        paint_hat(rng, image, p)
    if p["glasses"]:
        paint_glasses(image)
    image = cv2.resize(pose(rng, image, p), (size, size), interpolation=cv2.INTER_AREA)
    image += 0.008 * rng.standard_normal((size, size, 1), np.float32)
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)
# fmt: on


def draw_portraits(folder: Path, count: int, size: int, seed: int) -> None:
    """Draws `count` synthetic portraits of `size` px as portrait_0000.jpg and so on; those already there are kept."""

    def draw(index: int) -> None:
        """Draws one; which one depends on its number only."""
        write_image(folder / f"portrait_{index:04d}.jpg", draw_portrait(np.random.default_rng([seed, index]), size))

    def missing() -> list[int]:
        """The numbers of those to draw."""
        return [i for i in range(count) if not (folder / f"portrait_{i:04d}.jpg").exists()]

    if missing():
        with alone_in(folder):
            todo = missing()  # another run may have drawn them meanwhile
            with progress("drawing portraits", len(todo), "face") as bar:
                for _ in in_parallel(draw, todo):
                    bar.update()


class Faces(NamedTuple):
    """The originals in use: their folder, what they are in words, and their names in a fixed order.

    A name, by which an original is called everywhere, is its path relative to the folder.
    """

    folder: Path
    source: str
    names: list[str]
    refused: Mapping[str, str] = MappingProxyType({})  # folders that could not be looked into, and why

    @property
    def files(self) -> list[Path]:
        """The originals as paths."""
        return [self.folder / name for name in self.names]


def _faces_folder(settings: Settings, places: Places, environ: Mapping[str, str]) -> tuple[Path, str]:
    """The folder of the originals, and what they are in words."""
    if environ.get("FACES_DIR"):
        folder = given_path(environ["FACES_DIR"])
        if not folder.is_dir():
            raise FileNotFoundError(f"FACES_DIR names {folder}, which is no folder; set it to one with portraits")
        return folder, f"photographs in {folder.name}/ (FACES_DIR)"
    for pattern in ("fakefaces", "datasets/*/fakefaces", "*/fakefaces") if places.attached else ():
        for folder in sorted(places.attached.glob(pattern)):
            return folder, "StyleGAN portraits (the Kaggle data set fakefaces)"
    if environ.get("RESTORATION_FACES") not in (None, "", "kaggle"):
        raise ValueError(f"RESTORATION_FACES is {environ['RESTORATION_FACES']!r}; the only choice is 'kaggle'")
    if environ.get("RESTORATION_FACES"):
        try:  # only on request: it needs the internet
            import kagglehub
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("RESTORATION_FACES=kaggle needs 'pip install kagglehub'") from error
        return Path(kagglehub.dataset_download("hyperclaw79/fakefaces")), "StyleGAN portraits (fakefaces, downloaded)"
    folder = places.outputs / f"synthetic_portraits_{settings.portraits}x{settings.portrait_size}px_seed{settings.seed}"
    draw_portraits(folder, settings.portraits, settings.portrait_size, settings.seed)
    return folder, f"synthetic portraits of {settings.portrait_size} px, drawn by this project"


def find_faces(settings: Settings, places: Places, environ: Mapping[str, str] = os.environ) -> Faces:
    """FACES_DIR, else Kaggle's fakefaces, else (RESTORATION_FACES=kaggle) its download, else synthetic portraits.

    Raises FileNotFoundError if the folder holds no images.
    """
    folder, source = _faces_folder(settings, places, environ)
    refused: dict[str, str] = {}
    names = list_images(folder, refused)
    if places.outputs == folder:
        raise ValueError(f"the faces and the outputs are in the same folder, {folder}: choose another OUTPUT_DIR")
    if places.outputs.is_relative_to(folder):  # results are no faces to learn from
        results = places.outputs.relative_to(folder).as_posix() + "/"
        names = [name for name in names if not name.startswith(results)]
    if not names:
        reasons = "".join(f"; {name}: {reason}" for name, reason in refused.items())
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise FileNotFoundError(f"no images ({suffixes}) in {folder} or its subfolders{reasons}")
    used = names[: settings.max_faces]
    source += f", the first {len(used)} of {len(names)}" if len(used) < len(names) else ""
    return Faces(folder, source, used, refused)


# ======================================================================================================================
# Degradation
# ======================================================================================================================


def add_gaussian_noise(image: np.ndarray, rng: np.random.Generator, sigma: float = Settings.noise_sigma) -> np.ndarray:
    """Adds Gaussian noise of mean 0 and standard deviation `sigma` (of 255), drawn for every pixel and channel.

    uint8 (H, W, 3) in and out; the input is not changed. The noise is rounded before it is added, which makes no
    difference to whole numbers. OpenCV draws it, several times as fast as NumPy, from a seed that `rng` gives: its
    random state is the thread's own.
    """
    noise = np.empty((image.shape[0], image[0].size), np.int16)
    cv2.setRNGSeed(int(rng.integers(-(2**31), 2**31)))
    cv2.randn(noise, 0, sigma)
    return cv2.add(image, noise.reshape(image.shape), dtype=cv2.CV_8U)  # clips; a bare sum would wrap 256 round to 0


def distort_colors(
    image: np.ndarray,
    rng: np.random.Generator,
    saturation: tuple[float, float] = Settings.saturation,
    value: tuple[float, float] = Settings.value,
) -> np.ndarray:
    """Fades the colours: multiplies S and V of HSV by one random factor each, drawn from the given ranges.

    uint8 BGR (H, W, 3) in and out; the input is not changed. Hue stays, S and V are clipped at their maximum. Written
    without a detour through HSV, which takes twenty times as long: with V the largest of a pixel's channels, a factor s
    on S turns each channel c into V + s (c - V), and one on V multiplies all three.
    """
    s, v = rng.uniform(*saturation), rng.uniform(*value)
    channels = cv2.split(image)
    high = functools.reduce(cv2.max, channels)  # V
    gain = cv2.LUT(high, np.minimum(v, 255 / np.maximum(np.arange(256), 1)).astype(np.float32))
    high, gain = cv2.merge([high] * 3), cv2.merge([gain] * 3)
    if s <= 1:
        faded = cv2.addWeighted(image, s, high, 1 - s, 0, dtype=cv2.CV_32F)
    else:  # S may come to its maximum, where the lowest channel is 0
        share = np.minimum(s, high / np.maximum(high - functools.reduce(cv2.min, channels)[..., None], 1))
        faded = (high + share * (image.astype(np.float32) - high)).astype(np.float32)
    return cv2.multiply(faded, gain, dtype=cv2.CV_8U)  # rounds


def _polygons(shape: Sequence[int], rng: np.random.Generator, settings: Settings) -> list[np.ndarray]:
    """Corner points, int32 (vertices, 2) as x and y, of random star-shaped polygons inside an image of `shape`."""
    height, width = shape[:2]
    polygons = []
    for _ in range(settings.polygons):
        vertices = rng.integers(settings.polygon_vertices[0], settings.polygon_vertices[1] + 1)
        angles = np.sort(rng.uniform(0, 2 * math.pi, vertices))
        points = rng.uniform(0.5, 1, (vertices, 1)) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        points -= points.min(axis=0)
        size = rng.uniform(*settings.polygon_size) * min(height, width) / 1024
        points *= size / points.max()
        points += rng.uniform(0, 1, 2) * np.maximum([width - 1, height - 1] - points.max(axis=0), 0)
        polygons.append(np.rint(points).astype(np.int32))
    return polygons


def occlude_irregular(image: np.ndarray, rng: np.random.Generator, settings: Settings = PROFILES["full"]) -> np.ndarray:
    """Covers 3 random polygons of 6 to 10 vertices with black, white or random noise, one choice per polygon.

    uint8 (H, W, 3) in and out; the input is not changed. A polygon reaches 80 to 200 px across in a 1024 px image and
    scales with min(H, W).
    """
    occluded = image.copy()
    for polygon in _polygons(image.shape, rng, settings):
        inside = cv2.fillPoly(np.zeros(image.shape[:2], np.uint8), [polygon], 1).astype(bool)
        fill = ("black", "white", "noise")[rng.integers(3)]
        if fill == "noise":
            occluded[inside] = rng.integers(0, 256, (np.count_nonzero(inside), image.shape[2]), dtype=np.uint8)
        else:
            occluded[inside] = 255 if fill == "white" else 0
    return occluded


def occlusion_mask(shape: Sequence[int], rng: np.random.Generator, settings: Settings = PROFILES["full"]) -> np.ndarray:
    """What `occlude_irregular` covers in an image of `shape` from the same generator state: uint8 (H, W), 255 inside.

    Masks are drawn again from the seed whenever they are needed, and never stored.
    """
    mask = np.zeros(tuple(shape[:2]), np.uint8)
    for polygon in _polygons(shape, rng, settings):  # one at a time: together, fillPoly would leave overlaps open
        cv2.fillPoly(mask, [polygon], 255)
    return mask


def degrade(image: np.ndarray, kind: str, rng: np.random.Generator, settings: Settings) -> np.ndarray:
    """One of the three degradations by the name of its kind, with the numbers of `settings`."""
    if kind == "noisy":
        return add_gaussian_noise(image, rng, settings.noise_sigma)
    if kind == "color":
        return distort_colors(image, rng, settings.saturation, settings.value)
    if kind == "occluded":
        return occlude_irregular(image, rng, settings)
    raise ValueError(f"unknown kind of degradation {kind!r}; choose one of {', '.join(KINDS)}")


def _recipe(settings: Settings) -> dict:
    """What the bytes of a degraded file depend on beside the original and its name."""
    used = ("seed", "noise_sigma", "saturation", "value", "polygons", "polygon_vertices", "polygon_size")
    return json.loads(json.dumps({key: getattr(settings, key) for key in (*used, "jpeg_quality")}))


def _output_stems(faces: Faces) -> dict[str, str]:
    """By the originals' names, the file stem of their degraded copies; a short hash is added where it is not unique.

    Otherwise a.jpg and a.png, or one/a.jpg and two/a.jpg, would overwrite each other's copies. File systems take names
    of 255 bytes, so a long one is cut.
    """
    stems = {name: PurePosixPath(name).stem for name in faces.names}
    count = Counter(map(str.casefold, stems.values()))
    for name, stem in stems.items():
        cut = stem.encode()[:200].decode(errors="ignore")
        if count[stem.casefold()] > 1 or cut != stem:
            stems[name] = f"{cut}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return stems


def _copies(folder: Path, stem: str) -> list[Path]:
    """The degraded copies of an original."""
    return [folder / f"{stem}_{kind}.jpg" for kind in KINDS]


def _read_manifest(folder: Path, settings: Settings) -> dict[str, list[str]]:
    """By the originals' names: the content's hash, the stem of the copies and, if there are none, why.

    Empty if other settings made the folder, or it has no manifest or a damaged one.
    """
    try:
        with (folder / MANIFEST).open(encoding="utf-8") as file:
            manifest = json.load(file)
        made = manifest["originals"] if manifest["recipe"] == _recipe(settings) else {}
        whole = [type(e) is list and len(e) in (2, 3) and all(type(x) is str for x in e) for e in made.values()]
        return made if all(whole) else {}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # nothing is lost by that: degraded images are made again from their seeds


def _write_manifest(folder: Path, settings: Settings, originals: dict[str, list[str]]) -> None:
    """Records what was made in `folder`, and by which recipe."""
    write_json(folder / MANIFEST, {"recipe": _recipe(settings), "originals": originals})


def _hash(path: Path) -> str:
    """SHA-256 of a file's content, 32 hexadecimal digits of it; empty if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    except OSError:
        return ""


def _unfinished(faces: Faces, folder: Path, settings: Settings) -> list[str]:
    """The names of originals whose degraded copies are missing from `folder` or were made from something else."""
    manifest, stems = _read_manifest(folder, settings), _output_stems(faces)

    def is_done(name: str) -> bool:
        """Whether the manifest names this very file, and its copies are there or it could not be read then."""
        was, stem, *failed = manifest.get(name, ("", ""))
        if was != _hash(faces.folder / name) or not (was or failed):
            return False
        return bool(failed) or (stem == stems[name] and all(path.exists() for path in _copies(folder, stem)))

    return [name for name, done in zip(faces.names, in_parallel(is_done, faces.names)) if not done]


def _estimate_bytes(sample: Sequence[Path]) -> float:
    """About how much the degraded copies of one original will take, from the sizes in the headers of some.

    At quality 95 and 4:4:4 a noisy image takes about 1.7 bytes a pixel and the two others about 0.5 each.
    """
    pixels = []
    for path in sample:
        with contextlib.suppress(OSError):
            pixels.append(_count_pixels(path.read_bytes()))
    return 2.7 * sum(pixels) / max(1, len(pixels))


def _check_space(sample: Sequence[Path], count: int, folder: Path) -> None:
    """Raises OSError before the work begins if the copies of `count` originals like those of `sample` will not fit."""
    needed, room = count * _estimate_bytes(sample), shutil.disk_usage(folder).free
    if folder.parent.parts[-2:] == ("kaggle", "working"):  # Kaggle keeps 20 GB of it, however large the disk is
        room = min(room, 20 * 10**9 - sum(p.stat().st_size for p in folder.parent.rglob("*") if p.is_file()))
    if needed > room:
        raise OSError(
            f"the degraded images of {count} originals need about {needed / 1e9:.1f} GB, {folder} has room for "
            f"{room / 1e9:.1f}; free some, or use fewer originals (max_faces in the settings)"
        )


class DegradeReport(NamedTuple):
    """What `degrade_folder` did: originals degraded now, those found done, and what could not be read and why."""

    made: int
    kept: int
    failed: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.made} originals degraded in {len(KINDS)} ways now, {self.kept} were already done"]
        if not self.made:
            lines = [f"all {self.kept} originals were already done"]
        if self.failed:
            lines.append("left out, since they cannot be read:")
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.failed.items()])


def _degrade_file(name: str, faces: Faces, stem: str, folder: Path, settings: Settings) -> list[str]:
    """Writes the degraded versions of one original and returns its manifest entry, which says if that failed."""
    path = faces.folder / name
    entry = [_hash(path), stem]  # before it is read: if it changes now, it will be degraded again
    try:
        image = read_image(path)
        for kind, copy in zip(KINDS, _copies(folder, stem)):
            rng = np.random.default_rng(derive_seed(settings.seed, kind, name))
            write_image(copy, degrade(image, kind, rng, settings), settings.jpeg_quality)
    except ValueError as error:
        entry.append(str(error).removeprefix(f"{path}: "))
    return entry


def degrade_folder(faces: Faces, folder: Path, settings: Settings, workers: int | None = None) -> DegradeReport:
    """Writes the three degraded versions of every original to `folder`, in parallel, and a manifest of what made them.

    The bytes depend on the original, its name and the settings only. What the manifest says is done is not made again,
    so a second run does nothing and an interrupted or killed one goes on: two seconds' work is lost at most. Originals
    are never touched.

    Raises OSError if the result will not or does not fit on the disk, ValueError if no original could be read,
    RuntimeError if there is something to do and another run is writing to the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = set(_unfinished(faces, folder, settings))
    if made:
        with alone_in(folder), ThreadPoolExecutor(workers or os.cpu_count()) as pool:  # OpenCV releases the lock
            made = set(_unfinished(faces, folder, settings))  # another run may have made them meanwhile
            _degrade_files([name for name in faces.names if name in made], faces, folder, settings, pool)
    manifest = _read_manifest(folder, settings)
    failed = {name: manifest[name][2] for name in faces.names if len(manifest.get(name, "")) > 2}
    if len(failed) == len(faces.names):
        raise ValueError("\n  ".join(["no original could be read:", *(f"{n}: {why}" for n, why in failed.items())]))
    made -= failed.keys()
    return DegradeReport(len(made), len(faces.names) - len(failed) - len(made), {**faces.refused, **failed})


def _degrade_files(todo: list[str], faces: Faces, folder: Path, settings: Settings, pool: ThreadPoolExecutor) -> None:
    """Degrades the originals of `todo` and keeps the manifest up to date, however this ends."""
    _check_space([faces.folder / name for name in todo[:: max(1, len(todo) // 50)]], len(todo), folder)
    manifest, stems = _read_manifest(folder, settings), _output_stems(faces)
    again, replaced, written = set(todo), {stems[name] for name in todo}, time.monotonic()
    for name in [n for n, entry in manifest.items() if n in again or entry[1] in replaced]:
        del manifest[name]  # forgotten before its files are replaced
    _write_manifest(folder, settings, manifest)
    waiting, running = iter(todo), {}
    try:
        with progress("degrading", len(todo), "original") as bar:
            for _ in todo:
                while len(running) < 64 and (name := next(waiting, None)):  # all at once, they would fill the memory
                    running[pool.submit(_degrade_file, name, faces, stems[name], folder, settings)] = name
                done = next(as_completed(running))
                manifest[running[done]] = done.result()
                del running[done]
                bar.update()
                if time.monotonic() - written > 2:  # so a killed process has little to do again
                    _write_manifest(folder, settings, manifest)
                    written = time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)
        rest = {name: f.result() for f, name in running.items() if not (f.cancelled() or f.exception())}
        _write_manifest(folder, settings, manifest | rest)


# ======================================================================================================================
# Data
# ======================================================================================================================


class Pair(NamedTuple):
    """A degraded image and its original: the kind of damage, the original's name, and where both lie.

    Of the kind `clean`, the degraded image is the original itself.
    """

    kind: str
    name: str
    original_hash: str
    folder: Path  # of the originals
    copies: str  # of which the degraded images' paths begin with

    @property
    def original(self) -> Path:
        """The original file."""
        return self.folder / self.name

    @property
    def degraded(self) -> Path:
        """The degraded file."""
        return self.original if self.kind == "clean" else Path(f"{self.copies}_{self.kind}.jpg")

    def open(self) -> Image.Image:
        """The degraded image. Raises ValueError, naming it and what to do, if it cannot be read."""
        try:
            return open_image(self.degraded)
        except ValueError as error:
            remedy = "" if self.kind == "clean" else "; delete it and run this again: it is made anew"
            raise ValueError(f"{error}{remedy}") from error


def prepare_pairs(
    faces: Faces, places: Places, settings: Settings, report: Callable[[str], None] = print
) -> list[Pair]:
    """The pairs of every readable original, degraded first if that has not been done, and a line that says so.

    Degraded images attached on Kaggle (the output of notebook 01) are used if they are complete and were made with the
    same settings from the same originals; otherwise they are made again from the seed. Only what the manifest names
    counts as a pair.
    """
    folder = places.degraded
    attached = sorted(places.attached.rglob(MANIFEST)) if places.attached else []
    complete = [path.parent for path in attached if not _unfinished(faces, path.parent, settings)]
    if complete:
        folder = complete[0]
        report(f"Degraded images: those attached in {folder}")
    else:
        report(f"Degraded images: {degrade_folder(faces, folder, settings)}")
    pairs, manifest = [], _read_manifest(folder, settings)
    for name in faces.names:
        if name not in manifest:
            raise ValueError(f"{folder} has been replaced by another run since: run this again")
        content, stem, *failed = manifest.pop(name)  # popped: many originals are never in memory twice
        if not failed:
            copies = f"{folder}/{stem}"
            pairs += [Pair(kind, name, content, faces.folder, copies) for kind in KINDS]
    return pairs


def require_unchanged(pairs: Sequence[Pair], settings: Settings) -> None:
    """Raises ValueError if the degraded images of `pairs` have been replaced since, by another run in their folder."""
    manifests = {folder: _read_manifest(folder, settings) for folder in {pair.degraded.parent for pair in pairs}}
    for pair in pairs:
        if manifests[pair.degraded.parent].get(pair.name, [""])[0] != pair.original_hash:
            raise ValueError(f"{pair.degraded} has been replaced by another run since: run this notebook again")


def faces_id(pairs: Sequence[Pair]) -> str:
    """A short fingerprint of the originals, names and contents, that every checkpoint made from them carries."""
    content = sorted({f"{pair.name} {pair.original_hash}" for pair in pairs})
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:12]


class Splits(NamedTuple):
    """The pairs of both stages. The GAN's validation faces are among the pretraining's, so no stage trains on them."""

    pretrain_train: list[Pair]
    pretrain_validation: list[Pair]
    gan_train: list[Pair]
    gan_validation: list[Pair]


def split_pairs(pairs: Sequence[Pair], settings: Settings) -> Splits:
    """Splits by original, never by file: 80 / 20 % for pretraining, 90 / 10 % for the GAN, nested, seeded.

    `random_split` cuts one permutation of the originals into three: both stages' validation, the pretraining's
    validation only, and both stages' training. Raises ValueError if there are too few originals for that.
    """
    names = sorted({pair.name for pair in pairs})
    both = max(1, round(settings.gan_validation * len(names)))
    pretrain = max(both, round(settings.pretrain_validation * len(names)))
    if pretrain >= len(names):
        raise ValueError(f"{len(names)} original(s) are too few to split: 2 are the least, 200 enough to learn from")
    sizes = [both, pretrain - both, len(names) - pretrain]
    parts = random_split(names, sizes, torch.Generator().manual_seed(settings.seed))
    part_of = {name: number for number, part in enumerate(parts) for name in part}
    final, middle, train = ([pair for pair in pairs if part_of[pair.name] == number] for number in range(3))
    return Splits(train, final + middle, train + middle, final)


def image_transform(size: int = Settings.image_size) -> transforms.Compose:
    """PIL image to float tensor (3, size, size) in [-1, 1]; bilinear with antialiasing, the aspect not kept."""
    resize = transforms.Resize((size, size))
    return transforms.Compose([resize, transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])


class Kept(NamedTuple):
    """Images at the networks' size in memory: uint8 RGB, and where each lies by kind and name of its pair."""

    images: Tensor  # (M, 3, 256, 256); an original's kind is `clean`
    holes: Tensor  # (M, 1, 256, 256), of the occluded ones
    image_at: dict[tuple[str, str], int]
    hole_at: dict[str, int]


def keep_images(
    pairs: Sequence[Pair], settings: Settings, report: Callable[[str], None] = print, workers: int | None = None
) -> Kept | None:
    """Reads every image of the pairs once, in parallel, so that no epoch waits for a JPEG to be decoded again.

    None, and a line that says so, if they would take more than `cache_gb`.
    """
    wanted = list(dict.fromkeys((*pairs, *(pair._replace(kind="clean") for pair in pairs))))
    image_at = {(pair.kind, pair.name): row for row, pair in enumerate(wanted)}
    hole_at = {name: row for row, name in enumerate(name for kind, name in image_at if kind == "occluded")}
    square = (settings.image_size,) * 2
    needed = (3 * len(image_at) + len(hole_at)) * math.prod(square) / 1e9
    if needed > settings.cache_gb:
        report(f"{len(wanted)} images would take {needed:.2g} GB, more than cache_gb in the settings "
               f"({settings.cache_gb:g}): they are read anew in every epoch")  # fmt: skip
        return None
    images = torch.empty(len(image_at), 3, *square, dtype=torch.uint8)
    holes = torch.empty(len(hole_at), 1, *square, dtype=torch.uint8)
    kept = Kept(images, holes, image_at, hole_at)
    dataset = FaceRestorationGANDataset(wanted, settings)

    def read(row: int) -> None:
        """One image, with its hole."""
        pair = wanted[row]
        resized = transforms.functional.resize(pair.open(), square)
        images[row] = transforms.functional.pil_to_tensor(resized)
        if pair.kind == "occluded":
            holes[hole_at[pair.name]] = (255 * dataset.hole(pair)).round()

    with progress("reading", len(wanted), "image") as bar:
        for _ in in_parallel(read, range(len(wanted)), workers):
            bar.update()
    return kept


class FaceRestorationGANDataset(Dataset):
    """Pairs of degraded image and original: float RGB (3, 256, 256) in [-1, 1] each, and a dict with kind, name, hole.

    `hole` is the occlusion's true mask, float (1, 256, 256) in [0, 1], drawn again from the seed; zero for other kinds.
    An item is asked for by its index, or by (index, mirrored) to train with. With `kept` nothing is read from the disk;
    the values are the same.
    """

    def __init__(self, pairs: Sequence[Pair], settings: Settings = PROFILES["full"], kept: Kept | None = None) -> None:
        self.pairs, self.settings, self.kept = list(pairs), settings, kept
        self.transform = image_transform(settings.image_size)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, item: int | tuple[int, bool]) -> tuple[Tensor, Tensor, dict]:
        index, mirrored = item if isinstance(item, tuple) else (item, False)
        pair = self.pairs[index]
        images = self._image(pair), self._image(pair._replace(kind="clean")), self.hole(pair)
        degraded, original, hole = (image.flip(-1) for image in images) if mirrored else images
        return degraded, original, {"kind": pair.kind, "name": pair.name, "hole": hole}

    def _image(self, pair: Pair) -> Tensor:
        """The degraded image of a pair; that of kind `clean` is the original."""
        if self.kept is None:
            return self.transform(pair.open())
        pixels = self.kept.images[self.kept.image_at[pair.kind, pair.name]]
        return pixels.float().div_(255).sub_(0.5).div_(0.5)  # as the transform, to the last bit

    def hole(self, pair: Pair) -> Tensor:
        """The true mask of what was covered."""
        if pair.kind != "occluded":
            return torch.zeros(1, *(self.settings.image_size,) * 2)
        if self.kept is not None:
            return self.kept.holes[self.kept.hole_at[pair.name]].float().div_(255)
        with Image.open(pair.degraded) as image:
            shape = image.height, image.width
        return draw_hole(shape, derive_seed(self.settings.seed, pair.kind, pair.name), self.settings)


def draw_hole(shape: Sequence[int], seed: int, settings: Settings) -> Tensor:
    """The mask that `occlude_irregular` covers from a seed in an image of `shape`, as the networks' images are resized:
    float (1, 256, 256) in [0, 1].
    """
    mask = Image.fromarray(occlusion_mask(shape, np.random.default_rng(seed), settings))
    return transforms.functional.to_tensor(mask.resize((settings.image_size,) * 2, Image.Resampling.BILINEAR))


def to_pixels(images: Tensor) -> Tensor:
    """Networks' images (N, 3, H, W) in [-1, 1] as 8-bit values, uint8 of the same shape, clipped and rounded."""
    return ((images.detach().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class EpochSampler(Sampler):
    """Yields (index, mirrored) in an order that depends on the settings' seed, the stage and the epoch only.

    So an epoch is the same whether or not the run was interrupted before it, and whatever the number of workers.
    """

    def __init__(self, length: int, settings: Settings, stage: str) -> None:
        self.length, self.settings, self.stage, self.epoch = length, settings, stage, 1

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        rng = np.random.default_rng(derive_seed(self.settings.seed, self.stage, self.epoch))
        order, mirrored = rng.permutation(self.length), rng.random(self.length) < self.settings.flip
        yield from zip(order.tolist(), mirrored.tolist())


def require_pairs(pairs: Sequence[Pair]) -> None:
    """Raises ValueError if there are none."""
    if not pairs:
        raise ValueError("no pairs to load: both training and validation need at least one")


def make_loader(
    pairs: Sequence[Pair],
    batch: int,
    settings: Settings,
    device: torch.device,
    stage: str | None = None,
    kept: Kept | None = None,
) -> DataLoader:
    """A loader of (degraded, original, info) batches; with `stage` a training loader, shuffled anew every epoch.

    Workers and pinned memory only for a GPU: on the CPU they would take the cores from the training itself. Raises
    ValueError if there are no pairs.
    """
    require_pairs(pairs)
    on_gpu = device.type == "cuda"
    workers = min(4, os.cpu_count() or 1) if on_gpu else 0
    sampler = EpochSampler(len(pairs), settings, stage) if stage else None
    return DataLoader(
        FaceRestorationGANDataset(pairs, settings, kept), batch, sampler=sampler, num_workers=workers,
        pin_memory=on_gpu, persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # shares what is kept
    )  # fmt: skip


# ======================================================================================================================
# Models
# ======================================================================================================================


class EncoderLayer(nn.Sequential):
    """Halves the image: LeakyReLU, convolution 4 x 4 with stride 2, batch norm.

    The first layer has no activation before it and no norm; the last has no norm, since on its 1 x 1 map a batch of one
    image has no variance. Batch norm, because the other common choice, instance norm, subtracts every image's mean and
    with it the colour cast that is to be repaired.
    """

    def __init__(self, inputs: int, outputs: int, norm: type[nn.Module] | None, activation: bool = True) -> None:
        layers = [nn.LeakyReLU(0.2)] if activation else []
        layers.append(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=not norm))
        super().__init__(*layers, *([norm(outputs)] if norm else []))


class DecoderLayer(nn.Sequential):
    """Doubles the image: ReLU, transposed convolution 4 x 4 with stride 2, batch norm; dropout in the plain recipe."""

    def __init__(self, inputs: int, outputs: int, norm: type[nn.Module], dropout: float = 0.0) -> None:
        upsample = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False)
        super().__init__(nn.ReLU(), upsample, norm(outputs), *([nn.Dropout(dropout)] if dropout else []))


class ColorHead(nn.Module):
    """Estimates how far a photograph has faded, and undoes it: one brightness and one saturation for the whole image.

    With V = max(R, G, B), multiplying S and V of HSV by constants turns each channel c into v (V + s (c - V)), and
    undoing it does so too. The two numbers come from how bright and how saturated the picture is where it is so least,
    most, and in between: quantiles of V and S at 64 px. A third one says whether it has faded at all, without which
    every good picture would be mended a little, too.
    """

    QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.gains = nn.Sequential(nn.Linear(2 * len(self.QUANTILES), hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 3))
        nn.init.zeros_(self.gains[-1].weight)  # starts as the identity
        nn.init.zeros_(self.gains[-1].bias)

    def forward(self, degraded: Tensor) -> Tensor:
        """The recoloured image, not clipped: (N, 3, 256, 256), 0 is half grey."""
        rgb = (degraded + 1) / 2
        small = F.avg_pool2d(rgb, 4).clamp(0, 1)  # (N, 3, 64, 64)
        high, low = small.amax(1), small.amin(1)
        maps = torch.stack([high, (high - low) / (high + 0.05)], 1).flatten(2)  # (N, 2, 4096)
        quantiles = maps.quantile(maps.new_tensor(self.QUANTILES), dim=2)  # (9, N, 2)
        with torch.autocast(degraded.device.type, enabled=False):  # the whole picture depends on these few numbers
            gains = self.gains(4 * quantiles.permute(1, 2, 0).flatten(1) - 2)  # (N, 3)
        gains, faded = 2 * torch.tanh(2.5 * gains[:, :2]), 2 * torch.sigmoid(6 * gains[:, 2:])  # slopes: learn fast
        logarithms = (faded * gains).clamp(-2, 2)  # up to a factor of 7; the damage divides by no more than 3.3
        brightness, saturation = logarithms.exp()[:, :, None, None, None].unbind(1)
        value = rgb.amax(1, keepdim=True)
        return 2 * brightness * (value + saturation * (rgb - value)) - 1  # (N, 3, 256, 256)


def local_mean(images: Tensor) -> Tensor:
    """The mean of 5 x 5 px around every pixel, of the same shape, mirrored at the edges.

    As a convolution: avg_pool2d is ten times slower on a CPU.
    """
    kernel = images.new_full((images.shape[1], 1, 5, 5), 1 / 25)
    with torch.autocast(images.device.type, enabled=False):  # half a grey level counts: not with the 8 bits of bfloat16
        return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=images.shape[1])


def detail_of(images: Tensor) -> Tensor:
    """What the images differ from their local mean, of the same shape: grain, texture, edges."""
    return images - local_mean(images)


def noise_level(detail: Tensor) -> Tensor:
    """Standard deviation of a picture's `detail`, (N, 3, 256, 256), where it is flattest: (N, 1, 1, 1), same units.

    Where a photograph shows nothing, what is left is its noise (block-based, Olsen 1993). Blocks of
    16 px without even half an 8-bit step of it are a border or a hole and do not count; with nothing else the level
    is 0.
    """
    blocks = F.avg_pool2d(detail.square().mean(1, keepdim=True), 16).flatten(1).clamp(min=1e-12).sqrt()  # (N, 256)
    level = blocks.where(blocks > 0.5 / 127.5, torch.nan).nanquantile(0.1, dim=1)
    return level.nan_to_num(0.0)[:, None, None, None]


def joined(convolution: nn.Conv2d, features: Tensor, images: Tensor) -> Tensor:
    """What the convolution (kernel 3) makes of features with images as further channels, without copying them together.

    A sixth of the time of a training step goes into such copies, and into gradients that are slices of them.
    """
    weights = convolution.weight.split([features.shape[1], images.shape[1]], 1)
    return F.conv2d(features, weights[0], convolution.bias, padding=1) + F.conv2d(images, weights[1], padding=1)


class GrainHead(nn.Module):
    """Estimates the noise of every pixel, to be subtracted (residual learning: Zhang et al. 2017, DnCNN).

    It sees the image minus its local mean, in units of the image's own noise level: what it learns for one amount of
    noise holds for another, and it hardly touches a picture without. Starts at zero everywhere.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(i, channels, 3, padding=1) for i in (3, channels))
        self.features = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.noise = nn.Conv2d(channels + 3, 3, 3, padding=1, bias=False)
        nn.init.zeros_(self.noise.weight)

    def forward(self, degraded: Tensor) -> Tensor:
        """The noise, (N, 3, 256, 256), in the units of `degraded`."""
        detail = detail_of(degraded)  # (N, 3, 256, 256)
        level = noise_level(detail)  # (N, 1, 1, 1)
        detail = detail / level.clamp(min=1 / 127.5)  # at least an 8-bit step
        detail = detail.clamp(-6, 6)  # what stands out further is no noise
        return 3 * level * joined(self.noise, self.features(detail), detail).float()  # 3: learns fast


class HoleHead(nn.Module):
    """Detects holes by what they are made of: little in a photograph is as flat, as white, as black or as colourful.

    These are given to it as pictures, and dilated convolutions (Yu and Koltun 2016) at half the size look up to 30 px
    far for edges and corners. A U-Net sees the same, but takes thousands of steps to find out what to look for.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3 + 3 + 3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for reach in (1, 2, 4, 8):
            layers += [nn.Conv2d(channels, channels, 3, padding=reach, dilation=reach), nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*layers)
        self.hole = nn.Conv2d(channels, 4, 3, padding=1)  # a half-size pixel stands for 2 x 2
        nn.init.zeros_(self.hole.weight)
        nn.init.constant_(self.hole.bias, -1.0)  # holes are rare

    def forward(self, degraded: Tensor) -> Tensor:
        """Logits of the probability that a pixel was covered, (N, 1, 256, 256)."""
        detail = detail_of(degraded)
        flat = 1 - 20 * local_mean(detail.abs())
        white, black = degraded.amin(1, keepdim=True) - 0.9, -degraded.amax(1, keepdim=True) - 0.9
        speckle = local_mean((detail - detail.mean(1, keepdim=True)).abs()).mean(1, keepdim=True)  # hair has one colour
        clues = torch.cat([flat, 10 * white, 10 * black, 10 * speckle - 1], 1).clamp(-1, 1)  # (N, 6, 256, 256)
        features = self.features(torch.cat([degraded, clues], 1))  # (N, C, 128, 128)
        return 3 * F.pixel_shuffle(self.hole(features).float(), 2)  # 3: learns fast


def fill_from_around(images: Tensor, known: Tensor) -> Tensor:
    """Spreads what is known into what is not, smoothly, whatever its size (pull-push: Gortler et al. 1996).

    Averages of the known pixels are taken on a pyramid down to one pixel; on the way back up, every pixel keeps its
    own value as far as it is known, (N, 1, 256, 256) in [0, 1], and takes the rest from the coarser level.
    """
    levels = [(images * known, known)]
    while levels[-1][1].shape[-1] > 1:
        values, weight = (F.avg_pool2d(part, 2) for part in levels[-1])
        trusted = (4 * weight).clamp(max=1)  # one known pixel of four is enough: nothing nearer is to be had
        levels.append((values / weight.clamp(min=1e-6) * trusted, trusted))
    spread = levels[-1][0] / levels[-1][1].clamp(min=1e-6)  # (N, 3, 1, 1)
    for values, weight in reversed(levels[:-1]):
        coarser = F.interpolate(spread, scale_factor=2.0, mode="bilinear", align_corners=False)
        spread = values + (1 - weight) * coarser
    return spread  # (N, 3, 256, 256)


class Restoration(NamedTuple):
    """What the generator thinks: `restored` is its output, the others are the parts that training supervises."""

    restored: Tensor  # (N, 3, 256, 256) in [-1, 1]
    recolored: Tensor | None = None  # (N, 3, 256, 256), the input without grain, its colours mended, not clipped
    hole: Tensor | None = None  # (N, 1, 256, 256), logits of the probability that a pixel was covered
    fill: Tensor | None = None  # (N, 3, 256, 256) in [-1, 1], what to paint there


class OutputLayer(nn.Module):
    """Brings 128 x 128 features to the 256 x 256 image, with the degraded input itself as one more skip.

    Restored means: keep what is good. So the layer starts close to the identity on its input and learns to
    depart from it: less grain, mended colours of the whole image, and a correction of every pixel. Into the holes that
    it detects goes what is around them, and a correction of its own. Corrections are added inside Tanh, so the output
    lies in [-1, 1] whatever the weights.
    """

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(inputs, channels, 4, stride=2, padding=1)
        self.mix = nn.Conv2d(channels + 3, channels, 3, padding=1)
        self.parts = nn.Conv2d(channels + 3, 3 + 3 + 1, 3, padding=1)  # correction, repaint, hole
        self.recolor, self.grain, self.detect = ColorHead(), GrainHead(channels), HoleHead(channels)
        with torch.no_grad():
            self.parts.weight[:6] *= 0.1
            self.parts.bias.zero_()

    def forward(self, features: Tensor, degraded: Tensor) -> Restoration:
        """From the last decoder layer with its skip, (N, inputs, 128, 128), and the network's own input."""
        upsampled = F.relu(self.upsample(F.relu(features)))  # (N, C, 256, 256)
        mixed = F.relu(joined(self.mix, upsampled, degraded))  # (N, C, 256, 256)
        parts = joined(self.parts, mixed, degraded).float()  # from here on in 32 bits, whatever came before
        correction, repaint, hole = parts.split([3, 3, 1], 1)
        recolored = self.recolor(degraded - self.grain(degraded))  # (N, 3, 256, 256)
        hole = hole + self.detect(degraded)
        covered = torch.sigmoid(hole)
        known = (1 - 2 * covered.detach()).clamp(min=0)  # what is rather hole than not is no source to fill from
        around = fill_from_around(recolored, known)  # (N, 3, 256, 256)
        limit = 1 - 1 / 255  # half an 8-bit step inside Tanh's open range
        kept = torch.tanh(torch.atanh(recolored.clamp(-limit, limit)) + correction)
        fill = torch.tanh(torch.atanh(around.clamp(-limit, limit)) + repaint)
        return Restoration(kept + covered * (fill - kept), recolored, hole, fill)


class PlainOutput(nn.Sequential):
    """The output layer as commonly written: every pixel is drawn anew from 128 x 128 features. It has no parts."""

    def __init__(self, inputs: int) -> None:
        super().__init__(nn.ReLU(), nn.ConvTranspose2d(inputs, 3, 4, stride=2, padding=1), nn.Tanh())

    def forward(self, features: Tensor, degraded: Tensor) -> Restoration:
        """From the last decoder layer with its skip, (N, inputs, 128, 128); the input itself is not looked at."""
        return Restoration(super().forward(features).float())


def whole_gradient(features: Tensor) -> Tensor:
    """The same features. Their gradient, a slice of a concatenation's, is copied together: gaps slow batch norm."""
    if features.requires_grad:
        features.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
    return features


class UNetGenerator(nn.Module):
    """U-Net of Isola et al. 2017 (pix2pix): 8 encoder layers from 256 x 256 to 1 x 1, 7 decoder layers back to
    128 x 128, each with the encoder's map of its size as a skip, and an output layer to 256 x 256 through Tanh.

    Degraded RGB (N, 3, 256, 256) in [-1, 1] to restored RGB of the same shape and range. ValueError for other shapes.
    `plain` is the recipe as commonly written: instance norm, dropout 0.5 in three decoder layers, PlainOutput.
    """

    def __init__(
        self,
        width: int = Settings.width,
        full_resolution_channels: int = Settings.full_resolution_channels,
        plain: bool = Settings.plain,
    ) -> None:
        super().__init__()
        widths = [width * factor for factor in (1, 2, 4, 8, 8, 8, 8, 8)]
        norm = nn.InstanceNorm2d if plain else nn.BatchNorm2d
        self.encoder = nn.ModuleList([EncoderLayer(3, widths[0], None, activation=False)])
        for number in range(1, 8):
            self.encoder.append(EncoderLayer(widths[number - 1], widths[number], norm if number < 7 else None))
        self.decoder = nn.ModuleList()
        for number in range(7, 0, -1):
            inputs = widths[number] if number == 7 else 2 * widths[number]
            self.decoder.append(DecoderLayer(inputs, widths[number - 1], norm, 0.5 if plain and number > 4 else 0.0))
        self.output = PlainOutput(2 * widths[0]) if plain else OutputLayer(2 * widths[0], full_resolution_channels)

    def forward(self, degraded: Tensor) -> Tensor:
        """The restored images only."""
        return self.restore(degraded).restored

    def restore(self, degraded: Tensor) -> Restoration:
        """The restored images together with the detected holes and what was painted into them."""
        check_images(degraded, "the generator")
        x, maps = degraded, []
        for layer in self.encoder:
            x = layer(x)
            maps.append(x)  # (N, W, 128, 128), (N, 2W, 64, 64), ... (N, 8W, 1, 1)
        maps.pop()  # the bottleneck is no skip
        for layer in self.decoder:
            x = torch.cat([whole_gradient(y) for y in (layer(x), maps.pop())], 1)  # (N, 16W, 2, 2) to (N, 2W, 128, 128)
        return self.output(x, degraded)


def check_images(images: Tensor, who: str) -> None:
    """Raises ValueError unless `images` is a batch (N, 3, 256, 256)."""
    size = Settings.image_size
    if images.ndim != 4 or images.shape[1:] != (3, size, size):
        raise ValueError(f"{who} takes images of shape (N, 3, {size}, {size}), not {tuple(images.shape)}")


class PatchGANDiscriminator(nn.Module):
    """Judges pairs patch by patch (Isola et al. 2017): is this candidate the original that belongs to this degraded?

    Two RGB batches (N, 3, 256, 256) in [-1, 1] to scores (N, 1, 30, 30), each from 70 x 70 px. No sigmoid: under the
    least-squares loss with targets 1 and 0 the best score already is the probability that the patch is real (Mao et
    al. 2017). ValueError for other shapes.

    The pair reaches the first layer as the candidate and, ten times magnified, what it changes about the degraded
    image: there a hole or a faded colour stands out. Changes of up to four grey levels are left out, and four levels of
    larger ones: shown how much noise was taken away, it taught the generator to take more, and texture with it. No
    norm: in a batch of only real or only fake pairs batch norm takes away in what the two differ. `plain` is the recipe
    as commonly written: the pair as it is, and batch norm.
    """

    def __init__(self, width: int = Settings.discriminator_width, plain: bool = Settings.plain) -> None:
        super().__init__()
        self.plain = plain
        layers: list[nn.Module] = [nn.Conv2d(6, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for inputs, outputs, stride in ((1, 2, 2), (2, 4, 2), (4, 8, 1)):
            layers.append(nn.Conv2d(inputs * width, outputs * width, 4, stride, padding=1, bias=not plain))
            layers += [nn.BatchNorm2d(outputs * width)] if plain else []
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, stride=1, padding=1))

    def forward(self, degraded: Tensor, candidate: Tensor) -> Tensor:
        """Scores of the candidates, which are restored or original."""
        check_images(degraded, "the discriminator")
        check_images(candidate, "the discriminator")
        seen = degraded if self.plain else 10 * F.softshrink(candidate - degraded, 4 / 127.5)
        return self.layers(torch.cat([seen, candidate], 1)).float()  # (N, 6, 256, 256) to (N, 1, 30, 30)


def build_generator(settings: Settings) -> UNetGenerator:
    """A new generator, its weights drawn from the settings' seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "generator"))
        return UNetGenerator(settings.width, settings.full_resolution_channels, settings.plain)


def build_discriminator(settings: Settings) -> PatchGANDiscriminator:
    """A new discriminator, its weights drawn from the settings' seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "discriminator"))
        return PatchGANDiscriminator(settings.discriminator_width, settings.plain)


# ======================================================================================================================
# Checkpoints
# ======================================================================================================================

CHECKPOINT_FORMAT = "face-restoration-4"
_CONTENT = {
    "format", "settings", "faces", "start", "epoch", "history", "generator", "discriminator", "average", "optimizer",
    "precision", "scheduler", "optimizer_g", "optimizer_d", "scheduler_g", "scheduler_d",
    "precision_g", "precision_d",
}  # fmt: skip
_MAY_CHANGE = {
    "pretrain_epochs", "gan_epochs", "patience", "checkpoint_every", "sample_every", "sample_faces", "cache_gb",
    "time_budget",
}  # fmt: skip
_GAN_ONLY = {
    "gan_batch", "generator_lr", "discriminator_lr", "gan_betas", "gan_lr_step", "l1_weight", "shift",
    "discriminator_width", "every_second_batch_after",
}  # fmt: skip


class Run(NamedTuple):
    """What a training run is made of, beside the networks: its settings, places, device and faces."""

    settings: Settings
    places: Places
    device: torch.device
    faces: str  # faces_id of all pairs
    start: str = ""  # what the GAN training started from, weights_id of the pretrained generator; empty: not looked at

    @property
    def outputs(self) -> Path:
        """Where everything is written."""
        return self.places.outputs


def save_checkpoint(path: Path, run: Run, **content: object) -> None:
    """Saves tensors, numbers, strings and containers of them atomically, with what made them: settings and faces."""
    made_by = {"format": CHECKPOINT_FORMAT, "settings": asdict(run.settings), "faces": run.faces, "start": run.start}
    with atomic(path) as temporary:
        try:
            torch.save(made_by | content, temporary)
        except RuntimeError as error:
            if "inline_container" not in str(error) and "StreamWriter" not in str(error):
                raise
            raise OSError(f"torch could not write: {str(error).splitlines()[0]}") from error  # a full disk, say


def load_checkpoint(path: str | Path) -> dict:
    """Loads one of our checkpoints to the CPU, wherever it comes from. No code in it is ever run (`weights_only`).

    Raises FileNotFoundError if there is no such file, ValueError if it is not one of ours or damaged: also if it would
    unpack to more than its size, holds things that no checkpoint of ours does, or weights that are not finite.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; notebooks 04 and 05 write them, to OUTPUT_DIR if set")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save does not compress, and torch.load checks no checksums
            if sum(entry.file_size for entry in archive.infolist()) > Path(path).stat().st_size:
                raise ValueError("it would unpack to more than its size")
            if entry := archive.testzip():
                raise ValueError(f"the checksum of {entry} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_content(content, Path(path).stat().st_size)
    except Exception as error:  # whatever the unpickler or the zip reader trips over
        reason = {"BadZipFile": "no checkpoint file, or cut short", "UnpicklingError": "holds more than numbers"}
        reason = reason.get(type(error).__name__, str(error).splitlines()[0] if str(error) else repr(error))
        raise ValueError(
            f"{path}: not a checkpoint of this project, or damaged ({reason}). If a notebook of yours has written it, "
            "delete it and run that again"
        ) from error
    return content


def _check_content(content: Any, size: int) -> None:
    """Raises ValueError unless `content` is what a checkpoint of `size` bytes holds: plain settings, finite weights."""
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"its format is not {CHECKPOINT_FORMAT}")
    if strange := content.keys() - _CONTENT:
        raise ValueError(f"holds {', '.join(sorted(map(ascii, strange)))}, which no checkpoint of ours does")
    kinds = {"settings": dict, "faces": str, "start": str, "history": list, "epoch": int}
    for name in ("settings", "faces", "start", *content.keys() & {"history", "epoch"}):
        if not isinstance(content.get(name), kinds[name]):
            raise ValueError(f"its {name} is missing or strange")
    for name, value in content["settings"].items():  # what is nested could grow beyond all bounds when printed
        numbers = value if isinstance(value, tuple) and len(value) < 10 else (value,)
        if not all(isinstance(x, int | float | str | None) for x in numbers):
            raise ValueError(f"its setting {name!a} is strange")
    for network in content.keys() & {"generator", "discriminator", "average"}:
        _check_weights(network, content[network], size)


def _check_weights(network: str, weights: Any, size: int) -> None:
    """Raises ValueError unless `weights` is a state_dict of plain, finite tensors of no more than `size` bytes."""
    tensors = list(weights.values()) if isinstance(weights, dict) else [None]
    for t in tensors:
        plain = type(t) is Tensor and t.layout == torch.strided and t.device.type == "cpu" and not t.is_nested
        if not plain or t.dtype not in (torch.float32, torch.int64):
            raise ValueError(f"its {network} has weights that are no tensors of ours")
    if not all(isinstance(name, str) for name in weights) or sum(t.nbytes for t in tensors) > size:
        raise ValueError(f"its {network} claims to be larger than the file")
    if bad := not_finite(weights):
        raise ValueError(f"its {network} has weights that are not finite ({', '.join(bad)})")


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors in a network's state_dict that are not finite everywhere."""
    return [name for name, value in weights.items() if not value.isfinite().all()]


def load_generator(path: str | Path, device: torch.device | str = "cpu") -> UNetGenerator:
    """The generator saved in `path`, at the width it was trained with, in eval mode and ready to restore.

    Raises FileNotFoundError or ValueError as `load_checkpoint`, and ValueError if the file holds no generator.
    """
    content = load_checkpoint(path)
    if "generator" not in content:
        raise ValueError(f"{path}: a checkpoint of this project, but without a generator")
    try:
        settings = Settings(**content["settings"])
        with torch.device("meta"):  # takes no memory, whatever width the file claims
            generator = UNetGenerator(settings.width, settings.full_resolution_channels, settings.plain)
        shapes = [{n: (t.shape, t.dtype) for n, t in w.items()} for w in (generator.state_dict(), content["generator"])]
        if shapes[0] != shapes[1]:
            raise ValueError("its weights do not fit the width and architecture that it claims")
        generator.load_state_dict(content["generator"], assign=True)
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: damaged, or made by another version of this project ({reason})") from error
    return generator.to(device, memory_format=torch.channels_last).eval()


def weights_id(weights: Mapping[str, Tensor]) -> str:
    """A short fingerprint of a network's state_dict."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def find_artifact(name: str, run: Run) -> Path | None:
    """The file of that name in the outputs or, failing that, the newest one in anything attached on Kaggle."""
    if (run.outputs / name).is_file():
        return run.outputs / name
    attached = run.places.attached.rglob(name) if run.places.attached else ()
    return max(attached, key=lambda path: path.stat().st_mtime, default=None)


def require_artifact(name: str, run: Run, notebook: str) -> Path:
    """As `find_artifact`, but raises FileNotFoundError naming the notebook that makes the file, and where it looked."""
    looked = " and ".join(str(folder) for folder in (run.outputs, run.places.attached) if folder)
    if path := find_artifact(name, run):
        return path
    raise FileNotFoundError(f"{name} is missing: run notebook {notebook} first, it writes it (looked in {looked})")


def check_same_run(path: Path, content: Mapping, run: Run, ignore: Iterable[str] = ()) -> None:
    """Raises ValueError naming what differs if a checkpoint was made by other settings or from other faces.

    Longer schedules and the like may differ, and so may the settings named in `ignore`.
    """
    now, then = asdict(run.settings), content["settings"]
    names = sorted((now.keys() | then.keys()) - _MAY_CHANGE - set(ignore))
    differ = [f"{n} was {then.get(n)!r}, is {now.get(n)!r}" for n in names if now.get(n) != then.get(n)]
    if content["faces"] != run.faces:
        differ.append(f"its faces were others (is FACES_DIR right? fingerprint {content['faces']}, now {run.faces})")
    if run.start and content.get("start") != run.start and not differ:
        raise ValueError(
            f"{path} did not start from the pretrained weights that are there now. It is kept as it is; to start again "
            "from them, move gan_last.pth and face_restoration_*.pth away, or choose another folder with OUTPUT_DIR"
        )
    if differ:
        raise ValueError(
            f"{path} was made by another run: {'; '.join(differ)}. It is kept as it is. Choose another folder with "
            "OUTPUT_DIR, or go back to those settings and faces, or move all .pth files there away (on Kaggle: detach "
            "them) to start anew"
        )


def _load_newest(last: Path) -> tuple[Path, dict]:
    """`<stage>_last.pth` or, if that is damaged, the checkpoint of the epoch before: which one, and its content."""
    try:
        return last, load_checkpoint(last)
    except ValueError as error:
        previous = last.with_name(last.name.replace("_last", "_previous"))
        if not previous.is_file():
            raise
        print(f"WARNING: {error}. Going on from {previous.name}, an epoch earlier")
        return previous, load_checkpoint(previous)


def save_training(stage: str, run: Run, parts: Mapping[str, Any], history: list[dict]) -> None:
    """Saves the state of all `parts` as `<stage>_last.pth`, to go on from; the one before stays as `_previous.pth`."""
    last, previous = run.outputs / f"{stage}_last.pth", run.outputs / f"{stage}_previous.pth"
    if last.is_file():
        previous.unlink(missing_ok=True)
        try:
            os.link(last, previous)  # a second name for the same file: at no moment is there none
        except OSError:  # not every file system has that
            copy_file(last, previous)
    save_checkpoint(last, run, history=history, **{name: part.state_dict() for name, part in parts.items()})


def begin_stage(
    stage: str, result: str, files: Sequence[str], run: Run, parts: Mapping[str, Any], ignore: Iterable[str] = ()
) -> list[dict]:
    """Lets a stage begin or go on in the outputs; returns its history so far.

    The newest `<stage>_last.pth` is loaded into `parts`, all that has a state. If only something attached holds one (an
    earlier Kaggle session), that is copied to the outputs, with the file `result` and the patterns `files`. Raises
    ValueError if another run made what is there.
    """
    last = find_artifact(f"{stage}_last.pth", run)
    if (run.outputs / result).is_file() and not (last and last.parent == run.outputs):
        check_same_run(run.outputs / result, load_checkpoint(run.outputs / result), run, ignore)
    if not last:
        return []
    newest, content = _load_newest(last)
    check_same_run(last, content, run, ignore)
    if last.parent != run.outputs:
        for path in [p for pattern in (*files, result) for p in sorted(last.parent.glob(pattern))]:
            copy_file(path, run.outputs / path.name)
        copy_file(newest, run.outputs / last.name)  # at the end: once it is there, nothing is copied any more
        print(f"{stage}: going on from what is attached in {last.parent}")
    elif newest != last:
        os.replace(newest, last)  # else the next checkpoint would put the damaged one in its place
    for name, part in parts.items():  # each brings it to its own device
        part.load_state_dict(content[name])
    return content["history"]


# ======================================================================================================================
# Pretraining
# ======================================================================================================================


ADVICE = (  # for who has losses that are not finite
    "The checkpoint of the epoch before is kept. Look for damaged images, or lower the learning rate and start anew "
    "with another OUTPUT_DIR"
)


class Precision:
    """Mixed precision (Micikevicius et al. 2018): convolutions in 16 bits, weights, losses and the rest in 32.

    bfloat16 where the hardware has it, float16 on other GPUs (a T4), where the loss is scaled up, or gradients would
    vanish below the smallest number. On CPUs only with AVX-512's bfloat16, and if PyTorch is new enough to say so.
    """

    def __init__(self, device: torch.device, wanted: bool = True) -> None:
        self.device, self.dtype = device.type, None
        if wanted and device.type == "cuda":
            whole = torch.cuda.is_bf16_supported(including_emulation=False)
            self.dtype = torch.bfloat16 if whole else torch.float16
        elif wanted and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"):
            self.dtype = torch.bfloat16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def forward(self) -> torch.autocast:
        """The context for what a network computes forwards."""
        return torch.autocast(self.device, self.dtype, enabled=self.dtype is not None)

    def update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """One step of the optimizer down the gradients of `loss`. Left out if float16's are not finite."""
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()

    def has_collapsed(self) -> bool:
        """Whether step after step had to be left out, so that nothing is learned any more."""
        return self.scaler.is_enabled() and self.scaler.get_scale() < 1e-3

    def state_dict(self) -> dict:
        """The scaler's state; empty where there is none."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """The way back; nothing where nothing is scaled."""
        if self.scaler.is_enabled() and state:
            self.scaler.load_state_dict(state)


class Means:
    """Means over images of named losses: every batch counts by its size, so a short last batch does not distort them.

    Sums stay on the device until they are asked for.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()

    def add(self, losses: Mapping[str, Tensor], images: int) -> None:
        """Counts a batch's mean losses for its `images`."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss.detach().double() * images
            self.counts[name] += images

    def result(self, where: str) -> dict[str, float]:
        """The means so far. Raises FloatingPointError, saying `where`, if one is not finite."""
        means = {name: (total / self.counts[name]).item() for name, total in self.sums.items()}
        if bad := [name for name, mean in means.items() if not math.isfinite(mean)]:
            raise FloatingPointError(f"{where}: the loss {', '.join(bad)} is not finite. {ADVICE}")
        return means


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; the mode of before comes back after."""
    training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        network.train(training)


def adam(network: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.Adam:
    """Adam (Kingma and Ba 2015) for a network's weights, in one pass over them."""
    return torch.optim.Adam(network.parameters(), lr, betas, fused=True)


def average_of(network: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights and batch-norm statistics of `network`, with PyTorch's own class.

    Under a constant learning rate the last step's weights jitter; their average over the last 1 / (1 - decay) steps
    restores as well as weights after a decayed learning rate. Decay 0 is the network itself.
    """
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def to_device(batch: tuple, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Degraded, original and hole of a loader's batch on the device, channels last (a third faster on a CPU)."""
    degraded, original, info = batch
    return tuple(
        tensor.to(device, non_blocking=True, memory_format=torch.channels_last)
        for tensor in (degraded, original, info["hole"])
    )


def image_losses(restored: Tensor, original: Tensor) -> dict[str, Tensor]:
    """L1 and MSE, means over everything, of images in [-1, 1]."""
    return {"l1": F.l1_loss(restored, original), "mse": F.mse_loss(restored, original)}


def sample_batch(pairs: Sequence[Pair], run: Run) -> tuple[Tensor, Tensor]:
    """Degraded and original of the first few validation faces in all kinds, the same in every epoch and notebook."""
    require_pairs(pairs)
    names = list(dict.fromkeys(pair.name for pair in pairs))[: run.settings.sample_faces]
    dataset = FaceRestorationGANDataset([pair for pair in pairs if pair.name in names], run.settings)
    degraded, original, _ = zip(*dataset)
    return torch.stack(degraded).to(run.device), torch.stack(original).to(run.device)


def save_samples(generator: nn.Module, samples: tuple[Tensor, Tensor], path: Path) -> None:
    """Writes a grid of sample images: degraded above restored above original, a column each, in their own range."""
    degraded, original = samples
    with evaluating(generator):
        rows = torch.stack([degraded, generator(degraded), original])  # (3, N, 3, H, W)
    pixels = to_pixels(rows.flatten(0, 1)).unflatten(0, rows.shape[:2]).cpu()
    grid = pixels.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (3 H, N W, 3)
    write_image(path, np.ascontiguousarray(grid.numpy()[..., ::-1]))


def make_loaders(
    stage: str, batch: int, train: Sequence[Pair], validation: Sequence[Pair], run: Run
) -> tuple[DataLoader, DataLoader]:
    """A stage's loaders, for training and validation, with all images in memory if they fit."""
    kept = keep_images((*train, *validation), run.settings)
    loader = make_loader(train, batch, run.settings, run.device, stage, kept)
    return loader, make_loader(validation, batch, run.settings, run.device, kept=kept)


def parts_loss(restoration: Restoration, original: Tensor, hole: Tensor) -> Tensor:
    """Teaches the parts of the output layer their tasks, each on its own: mend colours, find holes, fill them.

    L1 of the recoloured image outside the holes, cross-entropy of the detected against the true holes, and L1 of the
    fill inside the true ones, times 10 since they are few. A hole's outermost pixels are mixtures with the photograph
    and no use to anyone: whatever is touched, and one pixel more, counts as hole.

    Through the blended output alone, the painter would learn only by way of a detector that is not yet sure, and the
    colours by way of a Tanh that has corrected them already.
    """
    around = F.conv2d((hole > 0).float(), hole.new_ones(1, 1, 3, 3), padding=1)  # max_pool2d takes six times as long
    hole = (around > 0.5).float()  # whole numbers, but for what a GPU's algorithm may round
    recolor = ((1 - hole) * (restoration.recolored - original).abs()).mean()
    fill = (hole * (restoration.fill - original).abs()).mean()
    return recolor + F.binary_cross_entropy_with_logits(restoration.hole, hole) + 10 * fill


def train_epochs(
    stage: str,
    epochs: int,
    run: Run,
    parts: Mapping[str, Any],
    loaders: Callable[[], tuple[DataLoader, DataLoader]],
    history: list[dict],
    step: Callable[[tuple, int, int], dict[str, Tensor]],
    finish: Callable[[list[dict], DataLoader], None],
    stop: Callable[[list[dict]], bool] = lambda history: False,
) -> None:
    """The loop around both trainings: trains epoch by epoch, logs, and saves `<stage>_last.pth` after each.

    `parts` and `history` are those of `begin_stage`, `loaders` makes those for training and validation, if there is
    something to do; `step(batch, epoch, number)` makes one update and returns its losses; `finish` gets the history
    (one dict per epoch, the newest last) and the validation loader, adds validation to it and saves what the stage
    saves. An epoch depends on its number and on the state before it only, so a resumed run ends with the same
    bits (on a CPU: CUDA adds up in no fixed order).

    Raises FloatingPointError if a loss or, at the end of an epoch, a weight is not finite.
    """
    if history:
        print(f"{stage}: {len(history)} of {epochs} epochs were already done")
        write_json(run.outputs / f"{stage}_history.json", history)  # killed just before it was written?
    first, begun, budget = len(history) + 1, time.perf_counter(), hours_allowed(run)
    if first > epochs or stop(history):
        return
    loader, validation_loader = loaders()
    with progress(stage, epochs * len(loader), "batch", (first - 1) * len(loader)) as bar:
        for epoch in range(first, epochs + 1):
            if stop(history):
                print(f"{stage}: stopped early, no better validation loss for {run.settings.patience} epochs")
                break
            if epoch > first and time.perf_counter() - begun + history[-1]["seconds"] > 3600 * budget:
                print(f"{stage}: stopped after epoch {epoch - 1} of {epochs}, since another would not end within "
                      f"{budget:g} hours. Run this again to go on (on Kaggle, attach this output)")  # fmt: skip
                break
            started, where = time.perf_counter(), f"{stage}, epoch {epoch}"
            torch.manual_seed(derive_seed(run.settings.seed, stage, epoch))
            loader.sampler.epoch = epoch
            batches = len(loader) + len(validation_loader) / 3  # a batch to validate takes a third of one to learn from
            batches *= epochs - epoch + 1 if epoch == first else 0
            history.append({"epoch": epoch, **_train_epoch(loader, step, epoch, where, bar, batches)})
            if bad := [n for n, p in parts.items() if isinstance(p, Precision) and p.has_collapsed()]:
                raise FloatingPointError(f"{where}: the gradients ({', '.join(bad)}) are not finite. {ADVICE}")
            if bad := [n for n, p in parts.items() if isinstance(p, nn.Module) and not_finite(p.state_dict())]:
                raise FloatingPointError(f"{where}: weights of the {', '.join(bad)} are not finite. {ADVICE}")
            finish(history, validation_loader)
            history[-1]["seconds"] = time.perf_counter() - started
            save_training(stage, run, parts, history)
            write_json(run.outputs / f"{stage}_history.json", history)
            print(_epoch_line(history[-1], epochs))


def hours_allowed(run: Run) -> float:
    """How many hours a training may take from its own start."""
    if run.settings.time_budget is not None:
        return run.settings.time_budget
    return 11.0 if run.places.platform == "Kaggle" else math.inf


def _train_epoch(
    loader: DataLoader, step: Callable, epoch: int, where: str, bar: Any, batches: float
) -> dict[str, float]:
    """The mean losses of an epoch's steps. After twenty of them it says when `batches` are done, if that is not 0."""
    means, started, few = Means(), 0.0, min(20, len(loader))
    for number, batch in enumerate(loader, 1):
        means.add(step(batch, epoch, number - 1), len(batch[0]))
        bar.update()
        if number == 1:  # the first takes longer than any other
            started = time.perf_counter()
        if number % 20 == 0 or number == few:
            means.result(where)  # also waits for the GPU
        if batches and number == few > 1:
            left = (batches - few) * (time.perf_counter() - started) / (few - 1)
            end = time.strftime("%H:%M", time.localtime(time.time() + left))
            print(f"{where}: about {left / 60:.0f} more minutes for all epochs, until {end}")
    return means.result(where)


def _epoch_line(row: Mapping[str, float], epochs: int) -> str:
    """One tidy line for the log: every value of the epoch by its name."""
    values = [f"{name} {value:.3g}" for name, value in row.items() if name not in ("epoch", "seconds")]
    return f"epoch {row['epoch']:2d}/{epochs}  " + "  ".join(values) + f"  {row['seconds']:.0f} s"


def pretrain_step(
    generator: UNetGenerator, optimizer: torch.optim.Optimizer, batch: tuple, run: Run, precision: Precision
) -> dict[str, Tensor]:
    """One update of the generator on L1 + 0.1 MSE + `parts_weight` x `parts_loss`; returns them one by one."""
    degraded, original, hole = to_device(batch, run.device)
    with precision.forward():
        restoration = generator.restore(degraded)
    losses = image_losses(restoration.restored, original)
    loss = losses["l1"] + run.settings.mse_weight * losses["mse"]
    if run.settings.parts_weight:
        losses["parts"] = parts_loss(restoration, original, hole)
        loss = loss + run.settings.parts_weight * losses["parts"]
    precision.update(optimizer, loss)  # zero_grad(), backward(), step()
    return losses


def validation_losses(generator: nn.Module, loader: DataLoader, device: torch.device) -> dict[str, float]:
    """L1 and MSE over a validation set: means over its images, in eval mode."""
    means = Means()
    with evaluating(generator):
        for batch in loader:
            degraded, original, _ = to_device(batch, device)
            means.add(image_losses(generator(degraded), original), len(degraded))
    return means.result("validation")


def pretrain_generator(generator: UNetGenerator, train: list[Pair], validation: list[Pair], run: Run) -> list[dict]:
    """Pretrains on L1 + 0.1 MSE with Adam and StepLR, stops early, and leaves the best weights in `generator`.

    Unless `parts_weight` is zero, `parts_loss` is minimised too; `loss` and `val_loss` in the history are without it.

    Writes pretrained_generator_best.pth, pretrain_last.pth (to go on from), pretrain_history.json and
    pretrain_sample_epoch_*.png. Returns the history, one dict per epoch. Started again it goes on where it stopped, and
    a finished run only reloads. Raises ValueError if other settings or faces made what is there, FloatingPointError if
    a loss is not finite.
    """
    s, best = run.settings, run.outputs / "pretrained_generator_best.pth"
    generator.to(run.device, memory_format=torch.channels_last)
    optimizer = adam(generator, s.pretrain_lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, s.pretrain_lr_step, s.lr_gamma)
    precision = Precision(run.device, s.mixed_precision)
    average = average_of(generator, s.ema)
    samples = sample_batch(validation, run)

    def step(batch: tuple, epoch: int, number: int) -> dict[str, Tensor]:
        """One update, and the average follows."""
        losses = pretrain_step(generator, optimizer, batch, run, precision)
        average.update_parameters(generator)
        return losses

    def finish(history: list[dict], validation_loader: DataLoader) -> None:
        """Validation, schedules, and what is saved after an epoch."""
        row = history[-1]
        row["loss"] = row.pop("l1") + s.mse_weight * row.pop("mse")
        losses = validation_losses(average.module, validation_loader, run.device)
        row |= {"val_loss": losses["l1"] + s.mse_weight * losses["mse"], "val_l1": losses["l1"]}
        row["lr"] = scheduler.get_last_lr()[0]
        scheduler.step()
        if best_epoch(history) == row["epoch"]:
            save_checkpoint(best, run, epoch=row["epoch"], generator=average.module.state_dict())
        if row["epoch"] % s.sample_every == 0:
            save_samples(average.module, samples, run.outputs / f"pretrain_sample_epoch_{row['epoch']}.png")

    def stop(history: list[dict]) -> bool:
        """Early stopping."""
        return len(history) - best_epoch(history) >= s.patience

    parts = {"generator": generator, "average": average, "optimizer": optimizer, "scheduler": scheduler}
    parts |= {"precision": precision}
    files = ("pretrain_history.json", "pretrain_sample_epoch_*.png")
    with alone_in(run.outputs, run.places.degraded):
        history = begin_stage("pretrain", best.name, files, run, parts, _GAN_ONLY)
        if history and not best.is_file():
            raise FileNotFoundError(f"{best} is gone, but pretrain_last.pth is not: move it away, too, to train again")
        require_unchanged(train + validation, s)
        loaders = functools.partial(make_loaders, "pretrain", s.pretrain_batch, train, validation, run)
        train_epochs("pretrain", s.pretrain_epochs, run, parts, loaders, history, step, finish, stop)
        generator.load_state_dict(load_checkpoint(best)["generator"])
    return history


def best_epoch(history: Sequence[Mapping]) -> int:
    """The epoch with the lowest validation loss, the first of equals; 0 for an empty history."""
    return min(history, key=lambda row: row["val_loss"])["epoch"] if history else 0


# ======================================================================================================================
# GAN training
# ======================================================================================================================


def shifted(images: Sequence[Tensor], limit: int, rng: np.random.Generator) -> list[Tensor]:
    """The images (N, C, H, W), all rolled down and to the right by the same random numbers of pixels below `limit`.

    A convolution of stride 2 meets odd and even rows with different weights, and so does its gradient: always meeting
    the same ones, the generator learns to draw a faint weave. (Zhao et al. 2020 shift what a discriminator sees against
    overfitting.) Rolling leaves a seam where opposite borders meet, in real and fake pairs alike.
    """
    down, right = rng.integers(limit, size=2).tolist() if limit else (0, 0)
    return [image.roll((down, right), (2, 3)) for image in images]


def discriminator_step(
    discriminator: PatchGANDiscriminator,
    optimizer: torch.optim.Optimizer,
    degraded: Tensor,
    restored: Tensor,
    original: Tensor,
    precision: Precision,
) -> dict[str, Tensor]:
    """One update of the discriminator: real pairs towards 1, fake pairs towards 0, squared errors (Mao et al. 2017).

    `restored` is detached: this step must not reach the generator, which would be pushed towards being found out.
    """
    with precision.forward():
        real = discriminator(degraded, original)
        fake = discriminator(degraded, restored.detach())
    losses = {"d_real": F.mse_loss(real, torch.ones_like(real)), "d_fake": F.mse_loss(fake, torch.zeros_like(fake))}
    precision.update(optimizer, 0.5 * (losses["d_real"] + losses["d_fake"]))  # zero_grad(), backward(), step()
    return losses


def generator_step(
    discriminator: PatchGANDiscriminator,
    optimizer: torch.optim.Optimizer,
    degraded: Tensor,
    restored: Tensor,
    original: Tensor,
    settings: Settings,
    precision: Precision,
) -> dict[str, Tensor]:
    """One update of the generator, whose output `restored` is: fool the discriminator, and 100 x L1.

    Gradients flow through the discriminator to the generator, but the discriminator itself, its batch-norm statistics
    included, stays as it is.
    """
    frozen = {name: value.detach() for name, value in discriminator.named_parameters()}
    frozen |= {name: value.clone() for name, value in discriminator.named_buffers()}
    with precision.forward():
        score = torch.func.functional_call(discriminator, frozen, (degraded, restored))
    losses = {"g_adv": F.mse_loss(score, torch.ones_like(score)), "g_l1": F.l1_loss(restored, original)}
    precision.update(optimizer, losses["g_adv"] + settings.l1_weight * losses["g_l1"])
    return losses


def trains_generator(epoch: int, number: int, settings: Settings) -> bool:
    """Whether batch `number` (from 0) of `epoch` (from 1) trains the generator: later on only every second one does."""
    return epoch <= settings.every_second_batch_after or number % 2 == 0


def train_gan(
    generator: UNetGenerator, discriminator: PatchGANDiscriminator, train: list[Pair], validation: list[Pair], run: Run
) -> list[dict]:
    """Trains generator and discriminator against each other (pix2pix); leaves the final generator in `generator`.

    Starts from pretrained_generator_best.pth if it is there, and says loudly when it is not. Writes
    face_restoration_gan_checkpoint_epoch_*.pth, face_restoration_generator_final.pth,
    face_restoration_discriminator_final.pth, gan_last.pth (to go on from), gan_history.json and gan_sample_epoch_*.png.
    Returns the history, one dict per epoch. Resumes, and raises, as `pretrain_generator`.
    """
    with alone_in(run.outputs, run.places.degraded):  # the pretrained weights must stay what they are, too
        return _train_gan(generator, discriminator, train, validation, run)


def _train_gan(
    generator: UNetGenerator, discriminator: PatchGANDiscriminator, train: list[Pair], validation: list[Pair], run: Run
) -> list[dict]:
    """`train_gan`, once nobody else is at work."""
    s, final = run.settings, run.outputs / "face_restoration_generator_final.pth"
    run = run._replace(start=load_pretrained(generator, run))
    generator.to(run.device, memory_format=torch.channels_last)
    discriminator.to(run.device, memory_format=torch.channels_last)
    optimizer_g = adam(generator, s.generator_lr, s.gan_betas)
    optimizer_d = adam(discriminator, s.discriminator_lr, s.gan_betas)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, s.gan_lr_step, s.lr_gamma) for o in (optimizer_g, optimizer_d)]
    precision_g, precision_d = (Precision(run.device, s.mixed_precision) for _ in range(2))
    average = average_of(generator, s.ema)
    samples = sample_batch(validation, run)

    def step(batch: tuple, epoch: int, number: int) -> dict[str, Tensor]:
        """One update, and the average follows."""
        degraded, original, _ = to_device(batch, run.device)
        train_g = trains_generator(epoch, number, s)
        with torch.set_grad_enabled(train_g), precision_g.forward():
            restored = generator(degraded)
        rng = np.random.default_rng(derive_seed(s.seed, "shift", epoch, number))
        degraded, restored, original = shifted((degraded, restored, original), s.shift, rng)
        losses = discriminator_step(discriminator, optimizer_d, degraded, restored, original, precision_d)
        if train_g:
            losses |= generator_step(discriminator, optimizer_g, degraded, restored, original, s, precision_g)
            average.update_parameters(generator)
        return losses

    def finish(history: list[dict], validation_loader: DataLoader) -> None:
        """Validation, schedules, and what is saved after an epoch."""
        row, epoch = history[-1], history[-1]["epoch"]
        row["val_l1"] = validation_losses(average.module, validation_loader, run.device)["l1"]
        row["lr_g"], row["lr_d"] = (scheduler.get_last_lr()[0] for scheduler in schedulers)
        for scheduler in schedulers:
            scheduler.step()
        if epoch % s.checkpoint_every == 0:
            weights = {"generator": average.module.state_dict(), "discriminator": discriminator.state_dict()}
            save_checkpoint(run.outputs / f"face_restoration_gan_checkpoint_epoch_{epoch}.pth", run, **weights)
        if epoch % s.sample_every == 0:
            save_samples(average.module, samples, run.outputs / f"gan_sample_epoch_{epoch}.png")

    parts = {"generator": generator, "discriminator": discriminator, "average": average}
    parts |= {"optimizer_g": optimizer_g, "optimizer_d": optimizer_d}
    parts |= {"scheduler_g": schedulers[0], "scheduler_d": schedulers[1]}
    parts |= {"precision_g": precision_g, "precision_d": precision_d}
    files = ("face_restoration_*.pth", "gan_history.json", "gan_sample_epoch_*.png")
    history = begin_stage("gan", final.name, files, run, parts)
    require_unchanged(train + validation, s)
    loaders = functools.partial(make_loaders, "gan", s.gan_batch, train, validation, run)
    train_epochs("gan", s.gan_epochs, run, parts, loaders, history, step, finish)
    generator.load_state_dict(average.module.state_dict())
    for name, network in {"generator": generator, "discriminator": discriminator}.items():
        weights = {name: network.state_dict(), "epoch": len(history)}
        save_checkpoint(run.outputs / f"face_restoration_{name}_final.pth", run, **weights)
    return history


def load_pretrained(generator: UNetGenerator, run: Run) -> str:
    """Loads the pretraining's best weights into `generator` if they are there and says so either way.

    Attached ones are copied to the outputs, which then hold all that is needed to go on. Returns the fingerprint of the
    weights it leaves in `generator`.
    """
    name = "pretrained_generator_best.pth"
    path = find_artifact(name, run)
    if path is None:
        print(f"WARNING: no {name} in {run.outputs}: THE GENERATOR STARTS FROM SCRATCH, without the lessons that its "
              "parts get in pretraining: expect holes to stay. If this is not meant, stop and run notebook 04 first; "
              "afterwards this run cannot go on from its weights")  # fmt: skip
        return weights_id(generator.state_dict())
    content = load_checkpoint(path)
    check_same_run(path, content, run, _GAN_ONLY)
    if path.parent != run.outputs:
        copy_file(path, run.outputs / name)
    generator.load_state_dict(content["generator"])
    print(f"The generator starts from {path.name}, epoch {content['epoch']} of the pretraining")
    return weights_id(generator.state_dict())


# ======================================================================================================================
# Evaluation and restoration
# ======================================================================================================================


def image_metrics(images: Tensor, originals: Tensor) -> dict[str, Tensor]:
    """PSNR in dB, SSIM and L1 (in levels of 255) of every image, (N,) each, on clipped and rounded 8-bit RGB values.

    PSNR and SSIM (Wang et al. 2004) are torchmetrics'. Identical images have an infinite PSNR.
    """
    from torchmetrics.functional import image as metrics

    x, y = to_pixels(images).double(), to_pixels(originals).double()
    psnr = metrics.peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3))
    ssim = metrics.structural_similarity_index_measure(x.float(), y.float(), data_range=255.0, reduction="none")
    return {"psnr": psnr.view(-1), "ssim": ssim.view(-1).double(), "l1": (x - y).abs().mean((1, 2, 3))}


def mean_interval(values: Sequence[float], seed: int = 0, resamples: int = 10_000) -> tuple[float, float, float]:
    """Mean and the bounds of its 95 % bootstrap interval (Efron 1979, percentiles of resampled means).

    Without bounds (minus and plus infinity) if there is only one value, which says nothing about how much they vary.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 1:
        return float(values[0]), -math.inf, math.inf
    means = values[np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def restore_pixels(photo: np.ndarray, generator: UNetGenerator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the network sees of a photo, what it makes of it, and where it sees holes.

    Float RGB (h, w, 3) twice on the 0..255 scale, and probabilities (h, w, 1).
    The longer side becomes 256 px; the rest of the network's square is filled by reflection and cut off again, so the
    aspect is kept. `photo` is uint8 BGR (H, W, 3).
    """
    size, (height, width) = Settings.image_size, photo.shape[:2]
    scale = size / max(height, width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    rgb = to_pil(photo).resize((w, h), Image.Resampling.BILINEAR)
    square = cv2.copyMakeBorder(np.asarray(rgb), 0, size - h, 0, size - w, cv2.BORDER_REFLECT)
    device = next(generator.parameters()).device
    image = image_transform(size)(Image.fromarray(square)).unsqueeze(0)
    with evaluating(generator):
        restoration = generator.restore(image.to(device, memory_format=torch.channels_last))
    restored = (restoration.restored[0].permute(1, 2, 0).cpu().numpy() + 1) * 127.5
    hole = np.zeros((size, size, 1), np.float32)
    if restoration.hole is not None:
        hole = restoration.hole[0].sigmoid().permute(1, 2, 0).cpu().numpy()
    return np.asarray(rgb, dtype=np.float32), restored[:h, :w], hole[:h, :w]


def restore_image_gan(
    source: str | Path, destination: str | Path, generator: UNetGenerator, network_size: bool = False
) -> np.ndarray:
    """Restores a photograph: reads `source`, writes `destination`, and returns what it wrote, uint8 BGR (H, W, 3).

    Any image of any size that OpenCV reads: colour, grey, with transparency (which is dropped), 16-bit, palette,
    EXIF-rotated. The result has the size it came in and keeps its sharpness: the network works at 256 px, and its
    correction, not its picture, is scaled up and added to the photo, photo + upsample(G(small) - small). So noise finer
    than the network's pixels stays, except where it sees a hole: there only its own picture counts. With `network_size`
    that picture is written as it is, its longer side 256 px.

    Raises ValueError if `source` cannot be read, or if `destination` is the source or has no known image suffix.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    if destination.resolve() == source.resolve():
        raise ValueError(f"{destination}: the original would be overwritten; choose another name for the result")
    if destination.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"{destination}: choose a name ending in one of {', '.join(sorted(IMAGE_SUFFIXES))}")
    photo = read_image(source)
    small, restored, hole = restore_pixels(photo, generator)
    if not network_size:  # in place: a large photo's floats take much memory
        size = photo.shape[1::-1]
        how = cv2.INTER_AREA if max(size) < Settings.image_size else cv2.INTER_LINEAR
        detail, restored, hole = (cv2.resize(image, size, interpolation=how) for image in (small, restored, hole))
        np.subtract(photo[..., ::-1], detail, out=detail)
        detail *= np.clip(2 - 2 * hole, 0, 1)[..., None]  # being unsure is not enough to lose detail
        restored += detail
    np.clip(np.rint(restored, out=restored), 0, 255, out=restored)
    image = np.ascontiguousarray(restored[..., ::-1], dtype=np.uint8)
    write_image(destination, image)
    return image


# ======================================================================================================================
# Figures
# ======================================================================================================================


def show_images(columns: Sequence[Sequence], rows: Sequence[str], captions: Sequence[Sequence[str]] = ()) -> plt.Figure:
    """A grid of RGB images (arrays or PIL), column by column, with the rows' names at the left and captions below."""
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(2.1 * len(columns), (2.35 if captions else 2.1) * len(rows)),
        squeeze=False, layout="constrained", subplot_kw={"xticks": [], "yticks": []},
    )  # fmt: skip
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            axes[y, x].imshow(image, vmin=0, vmax=255, interpolation="antialiased")
            if captions:
                axes[y, x].set_xlabel(captions[x][y], fontsize=8)
    for y, name in enumerate(rows):
        axes[y, 0].set_ylabel(name)
    return figure


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Saves a figure atomically at 110 dpi."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _plot_curves(history: Sequence[Mapping], panels: Mapping[str, Mapping[str, str]], path: Path) -> plt.Figure:
    """Curves over the epochs, a panel per title; `panels` maps title to {key of the history: label}."""
    panels = {title: curves for title, curves in panels.items() if any(key in row for key in curves for row in history)}
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, (title, curves) in zip(axes[0], panels.items()):
        for key, label in curves.items():
            rows = [row for row in history if key in row]
            axis.plot([row["epoch"] for row in rows], [row[key] for row in rows], marker="o", markersize=3, label=label)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)  # below: curves fill the panel
    save_figure(figure, path)
    return figure


def plot_pretrain_losses(history: Sequence[Mapping], path: Path) -> plt.Figure:
    """The pretraining's L1 + 0.1 MSE, in training and validation, and `parts_loss`, drawn and saved as `path`."""
    curves = {"loss": "training", "val_loss": "validation (averaged weights)"}
    panels = {"Pretraining: L1 + 0.1 MSE": curves, "Colour, hole and fill on their own": {"parts": "training"}}
    return _plot_curves(history, panels, path)


def plot_gan_losses(history: Sequence[Mapping], path: Path) -> plt.Figure:
    """The discriminator's, the adversarial and the L1 losses of the GAN training, drawn and saved as `path`."""
    panels = {
        "Discriminator (0.25: it cannot tell)": {"d_real": "on real pairs", "d_fake": "on fake pairs"},
        "Generator, adversarial": {"g_adv": "(D(fake) - 1)²"},
        "Generator, L1": {"g_l1": "training", "val_l1": "validation (averaged weights)"},
    }
    return _plot_curves(history, panels, path)


def compare_results(generator: nn.Module, pairs: Sequence[Pair], run: Run, path: Path, sets: int = 5) -> plt.Figure:
    """Shows `sets` sets of (degraded, restored, original) with PSNR and SSIM below, and saves them as `path`."""
    degraded, original, info = next(iter(make_loader(pairs[:sets], sets, run.settings, torch.device("cpu"))))
    with evaluating(generator):
        restored = generator(degraded.to(run.device)).cpu()
    before, after = image_metrics(degraded, original), image_metrics(restored, original)
    columns, captions = [], []
    for i, name in enumerate(info["name"]):
        images = to_pixels(torch.stack([degraded[i], restored[i], original[i]])).permute(0, 2, 3, 1).numpy()
        columns.append(list(images))
        scores = [f"{m['psnr'][i]:.1f} dB, SSIM {m['ssim'][i]:.3f}" for m in (before, after)]
        captions.append([*scores, f"{info['kind'][i]}: {name}"])
    figure = show_images(columns, ("degraded", "restored", "original"), captions)
    save_figure(figure, path)
    return figure
