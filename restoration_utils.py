"""Face and old-photo restoration: the one helper module of the six notebooks.

Read it from top to bottom beside the notebooks; every section calls only what stands above it, but
for the appendix:

    settings and places, files              all notebooks
    faces, degradation, ageing              01
    data                                    02
    generator, discriminator                03
    checkpoints, training, pretraining      04
    GAN training                            05
    restoration                             06
    figures                                 all notebooks
    appendix: synthetic portraits, scenes   01

Conventions: image files and the degradations hold uint8 BGR arrays (H, W, 3), as OpenCV does;
networks see float RGB tensors (N, 3, 256, 256) in [-1, 1]. Importing this module has no side
effects.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import ctypes
import functools
import hashlib
import html
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

import cv2
import matplotlib.pyplot as plt
import numpy as np
import psutil
import tifffile
import torch
from filelock import FileLock, Timeout
from matplotlib import font_manager
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from scipy import ndimage
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, random_split
from torchvision import transforms
from torchvision.utils import save_image

# ====== Settings and places =======================================================================

IMAGE_SIZE = 256  # px, what the networks see: eight halvings take it to 1
KINDS = ("noisy", "color", "occluded", "aged")  # of degradation; their files end in _noisy.jpg and so on


@dataclass(frozen=True)
class Settings:
    """Every number of the project, once, with its unit.

    Change one with `dataclasses.replace(settings, name=value)`.
    """

    profile: str = "full"
    seed: int = 2024  # of the degradations, the split, the weights and the order of the batches

    # faces
    max_faces: int | None = None  # use only the first so many originals of the folder; None: all
    portraits: int = 400  # synthetic portraits to draw where there is no folder of faces
    portrait_size: int = 1024  # px
    scenes: int = 400  # synthetic pictures without faces, to train on beside them

    # step 1, degradation
    kinds: tuple[str, ...] = KINDS
    noise_sigma: float = 25.0  # of 255, at whatever size the original has
    saturation: tuple[float, float] = (0.3, 0.7)  # factor on S of HSV
    value: tuple[float, float] = (0.6, 1.2)  # factor on V of HSV
    polygons: int = 3  # holes in an occluded image
    polygon_vertices: tuple[int, int] = (6, 10)
    polygon_size: tuple[float, float] = (80.0, 200.0)  # px, longer side of the bounding box, in a 1024 px image
    jpeg_quality: int = 95  # 4:4:4; lower, or with subsampled colour, JPEG would be one more degradation

    # step 2, data
    pretrain_validation: float = 0.2  # share of the originals
    gan_validation: float = 0.1  # share of the originals, a subset of the above
    pretrain_batch: int = 8
    gan_batch: int = 4
    flip: float = 0.5  # probability of mirroring a training pair
    windows: int = 3  # of 256 px, cut from every original at random sizes; half of the training pairs, if there are any
    undamaged: bool = True  # train on undamaged pairs, too, as many as of every kind but aged, which counts twice

    # step 3, models
    width: int = 64  # channels of the generator's first layer; the widest have 8 times as many
    discriminator_width: int = 64
    full_resolution_channels: int = 32  # of the generator's output layer, where the input joins as the last skip
    plain: bool = False  # the networks as commonly written; see PLAIN

    # both trainings
    mixed_precision: bool = True  # convolutions in 16 bits where the hardware is faster with them
    time_budget: float | None = None  # hours from the session's start; None: 11 on Kaggle, which stops at 12, else any
    ema: float = 0.99  # highest decay of the average of the weights that is validated and saved
    lr_gamma: float = 0.1  # StepLR's factor
    sample_every: int = 1  # epochs
    sample_faces: int = 3  # validation faces in every sample image, each in all kinds

    # step 4, pretraining
    pretrain_epochs: int = 10
    pretrain_lr: float = 1e-3  # Adam, PyTorch's default betas
    heads_lr: float = 2.0  # times pretrain_lr: what looks for grain and holes starts from nothing; 3 can go astray
    heads_norm: float = 1.0  # longest gradient of these weights, mostly 0.1 to 0.5; one of 20 undid a whole training
    pretrain_lr_step: int = 15  # epochs; like the patience reached only where the epochs are raised
    patience: int = 10  # epochs without a better validation loss before stopping early
    mse_weight: float = 0.1  # beside L1
    heads_weight: float = 1.0  # of the losses that teach the generator's heads (colour, grain, holes), beside L1
    color_lessons: int = 24  # thumbnails in every step, faded anew, for the colour head alone
    grain_lessons: int = 8  # squares of 128 px in every step, made noisy anew, for the grain head alone

    # step 5, GAN training
    gan_epochs: int = 10
    generator_lr: float = 1e-4
    discriminator_lr: float = 2e-4
    gan_betas: tuple[float, float] = (0.5, 0.999)  # Radford et al. 2016
    gan_lr_step: int = 25  # epochs; reached only where they are raised
    l1_weight: float = 100.0
    shift: int = 8  # px, the discriminator's total stride: it sees pairs rolled by fewer than that; 0: as they are
    every_second_batch_after: int = 10  # epochs; from then on the generator is trained on every second batch only
    checkpoint_every: int = 10  # epochs

    # step 6, photographs
    sure: float = 0.95  # probability, of a region on average, from which it is damage; see `agreed_damage`


NARROW = {"width": 16, "discriminator_width": 16, "full_resolution_channels": 16}
QUICK = NARROW | {"checkpoint_every": 1, "pretrain_epochs": 4, "gan_epochs": 2, "sure": 0.87}  # not surer, so early
LONG = QUICK | {"full_resolution_channels": 24, "pretrain_epochs": 5, "pretrain_lr_step": 4, "gan_epochs": 1}
LONG |= {"sure": Settings.sure}
TINY = dict.fromkeys(NARROW, 4) | {"checkpoint_every": 1, "pretrain_epochs": 2, "gan_epochs": 2}
FULL = Settings()
PROFILES = {
    "full": FULL,
    "quick": Settings("quick", max_faces=200, portraits=200, portrait_size=512, scenes=120, **QUICK),
    "long": Settings("long", max_faces=400, portraits=400, portrait_size=512, scenes=240, **LONG),
    "smoke": Settings("smoke", max_faces=12, portraits=12, portrait_size=128, scenes=2, windows=1, **TINY),
}
# The recipe as commonly written, to compare with: instance norm, dropout, every pixel drawn anew,
# the pair as it is.
PLAIN = {"plain": True, "heads_weight": 0.0, "color_lessons": 0, "grain_lessons": 0, "ema": 0.0, "shift": 0}
PLAIN |= {"kinds": KINDS[:3], "scenes": 0, "windows": 0, "undamaged": False}
VARIABLES = tuple(f"RESTORATION_{name}" for name in ("PROFILE", "PLAIN", "STRICT", "FACES", "PROCESSES"))


def is_on(variable: str) -> bool:
    """Whether an environment variable is 1; unset, empty or 0: off. ValueError for all else."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{variable} is {value!r}; set it to 1 or leave it out")
    return value == "1"


def choose_settings(device: torch.device) -> Settings:
    """The profile of RESTORATION_PROFILE, else `full` on a GPU and `quick` on a CPU;
    RESTORATION_PLAIN=1: see PLAIN.

    ValueError for another profile, or another variable RESTORATION_*: misspelt, it would be ignored
    in silence.
    """
    if unknown := {name for name in os.environ if name.startswith("RESTORATION_")} - set(VARIABLES):
        raise ValueError(f"no such variable: {', '.join(sorted(unknown))}; there are {', '.join(VARIABLES)}")
    name = os.environ.get("RESTORATION_PROFILE") or ("full" if device.type == "cuda" else "quick")
    if name not in PROFILES:
        raise ValueError(f"RESTORATION_PROFILE is {name!r}; choose one of {', '.join(PROFILES)}")
    return replace(PROFILES[name], **PLAIN) if is_on("RESTORATION_PLAIN") else PROFILES[name]


class Places(NamedTuple):
    """Where things live: written (`outputs`, `degraded`) and, on Kaggle, attached (read-only)."""

    platform: str
    outputs: Path
    degraded: Path
    attached: Path | None = None


def given_path(text: str) -> Path:
    """A path that a user gave, absolute; a relative one always counts from this module's folder."""
    return (Path(__file__).resolve().parent / Path(text).expanduser()).resolve()


def find_places() -> Places:
    """OUTPUT_DIR, else /kaggle/working on Kaggle, else outputs/ beside this module.

    OSError if it cannot be written.
    """
    above = [parent for begin in (Path.cwd(), Path(__file__).resolve()) for parent in (begin, *begin.parents)]
    candidates = [Path("/kaggle"), *(folder for folder in above if folder.name == "kaggle")]
    kaggle = next((c for c in candidates if (c / "input").is_dir() and (c / "working").is_dir()), None)
    platform = "Kaggle" if kaggle else "Colab" if "COLAB_RELEASE_TAG" in os.environ else "local"
    given = os.environ.get("OUTPUT_DIR")
    outputs = kaggle / "working" / "outputs" if kaggle and not given else given_path(given or "outputs")
    degraded = (outputs.parent if kaggle and not given else outputs) / "fakefaces_degraded"
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=outputs).close()
    except OSError as error:
        where = f"OUTPUT_DIR names {outputs}" if given else f"results would go to {outputs}"
        raise OSError(f"{where}, which cannot be written ({error.strerror}); set OUTPUT_DIR to a folder") from error
    return Places(platform, outputs, degraded, kaggle / "input" if kaggle else None)


def choose_device() -> torch.device:
    """CUDA if one convolution really runs on it, otherwise the CPU, with the reason."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        F.conv2d(torch.ones(1, 1, 4, 4, device="cuda"), torch.ones(1, 1, 3, 3, device="cuda")).sum().item()
    except RuntimeError as error:  # a P100 answers is_available(), but current PyTorch builds hold no kernels for it
        name, reason = torch.cuda.get_device_name(), str(error).splitlines()[0]
        print(f"The GPU ({name}) cannot run this PyTorch ({reason}); using the CPU. On Kaggle choose 'GPU T4 x2'.")
        return torch.device("cpu")
    torch.backends.cudnn.benchmark = True  # training batches have one shape: worth finding the fastest algorithms
    torch.backends.cudnn.allow_tf32 = False  # what is not in 16 bits on purpose is in 32, not in TF32's 19
    return torch.device("cuda")


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next tensors: half the restoring time on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # other systems
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap,
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: which does not shrink


def in_notebook() -> bool:
    """Whether this runs in a kernel."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython, "get_ipython") and hasattr(ipython.get_ipython(), "kernel")


def data_uri(kind: str, content: bytes) -> str:
    """An image file's content as an address, so that a page needs no other file."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def image_element(kind: str, content: bytes, text: str) -> str:
    """An image file's content as an HTML element; `text` says what is to be seen."""
    return f'<img alt="{html.escape(text)}" style="max-width:100%" src="{data_uri(kind, content)}">'


CURVE_COLORS = "tableau-colorblind10"  # Matplotlib's style of that name: for all eyes


def show_figures_with_text() -> None:
    """Figures in notebooks become JPEG images, with their label for those who cannot see them.

    They are HTML (which nbconvert's PDF leaves out): in pages made of notebooks, images of other
    kinds lose that text.
    """
    from IPython import get_ipython
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    def draw(figure: plt.Figure) -> str:
        content = io.BytesIO()  # as PNG, the many photographs would take several megabytes
        how = {"quality": 64, "optimize": True, "progressive": True}
        figure.savefig(content, format="jpeg", dpi=90, bbox_inches="tight", pil_kwargs=how)
        return image_element("jpeg", content.getvalue(), figure.get_label())

    plt.style.use(CURVE_COLORS)
    set_matplotlib_formats()  # as nothing else
    get_ipython().display_formatter.formatters["text/html"].for_type(plt.Figure, draw)


def start() -> tuple[Settings, Places, torch.device]:
    """Every notebook's setup cell calls it: settings, places, device, and a line naming them."""
    if in_notebook():
        show_figures_with_text()
    warnings.filterwarnings("ignore", module="PIL")  # about pictures' metadata, in the middle of a progress bar
    keep_freed_memory()
    is_on("RESTORATION_STRICT")  # a wrong value is an error now, not after the training
    device = choose_device()
    settings, places = choose_settings(device), find_places()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU with {torch.get_num_threads()} threads"
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, OpenCV {cv2.__version__}"
    profile = settings.profile + (", the plain recipe" if settings.plain else "")
    outputs = os.path.relpath(places.outputs) if places.outputs.is_relative_to(Path.cwd().parent) else places.outputs
    print(f"{versions} | {places.platform}, {name} | profile {profile} | outputs in {outputs}")
    return settings, places, device


def check(claim: str, holds: bool, settings: Settings) -> None:
    """Says whether what a notebook's prose promises held in this run.

    If not, AssertionError in strict runs.
    """
    if is_on("RESTORATION_STRICT") and settings.profile != "smoke" and not holds:  # smoke is too short to learn
        raise AssertionError(f"does not hold in this run: {claim}")
    print(f"holds: {claim}" if holds else f"DOES NOT HOLD in this run (profile {settings.profile}): {claim}")


# ====== Files =====================================================================================

PARTIAL = ".partial-"  # how the names of files begin that are not yet whole
SESSION = "_RESTORATION_SESSION"  # variable for processes that this one starts: since when the session lasts
RELAY = "_RESTORATION_RELAY"  # variable for them: that they shall mark their progress with
RELAYED = "\x1e"  # how the lines begin that replace one another, from a process to the one that started it


def derive_seed(*parts: object) -> int:
    """A 64-bit seed from what it is for.

    That is (seed, kind, file name) for a degraded file, (seed, stage, epoch) for an epoch. So
    nothing random depends on the order in which things happen.
    """
    text = "/".join(str(part).replace("/", "\0") for part in parts)  # ("a/b",) is not ("a", "b")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def fingerprint(*parts: object) -> str:
    """16 hexadecimal digits that stand for anything made of numbers, strings and bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()[:16]


def counted(number: int, noun: str) -> str:
    """`1 face`, `2 faces`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` to write to, and renames it when that succeeded.

    Whoever reads `path` finds the old file or the whole new one, never half of it. OSError if it
    cannot be written.
    """
    temporary = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}{path.suffix}")  # savefig chooses the format by the suffix
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        room = next(shutil.disk_usage(p).free for p in path.parents if p.is_dir())
        reason = f"{error.strerror or error}; {room / 1e6:.0f} MB are free there"
        remedy = "What was there before is kept: mend that, and run this again"
        raise OSError(f"{path} could not be written ({reason}). {remedy}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class Interrupted(KeyboardInterrupt):
    """Somebody stopped what can go on; notebooks show its message in place of a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"Interrupted: {self}"]


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Only one run at a time gets into this block with a folder; leftovers of a killed one are
    swept out first.

    The operating system's lock ends with its holder. RuntimeError if another run has it, OSError
    where there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=10)
    except Timeout as error:
        remedy = "Wait until it has ended, stop it (in Jupyter: shut down its kernel), or set another OUTPUT_DIR"
        raise RuntimeError(f"another run is writing to {folder}. {remedy}") from error
    except (OSError, NotImplementedError) as error:
        raise OSError(f"{folder} cannot be locked ({error}): set OUTPUT_DIR to one on a local disk") from error
    try:
        for leftover in folder.rglob(f"{PARTIAL}*"):
            with contextlib.suppress(OSError):  # what is being written now is younger than a minute
                if time.time() - leftover.stat().st_mtime > 60:
                    leftover.unlink()
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"what is finished is kept in {folder}. Run it again: it goes on") from None
    finally:
        lock.release()


def copy_file(source: Path, destination: Path) -> None:
    """Copies a file atomically."""
    with atomic(destination) as temporary:
        shutil.copyfile(source, temporary)


def write_json(path: Path, content: object) -> None:
    """Writes `content` as JSON, atomically; what is not finite, which JSON lacks, becomes null."""
    finite = json.loads(json.dumps(content), parse_constant=lambda name: None)
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(finite, indent=1), encoding="utf-8")


class CellLine(io.TextIOBase):
    """tqdm's newest line in a cell: its stderr or widgets leave debris in a saved notebook."""

    def __init__(self) -> None:
        from IPython.display import display

        self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, text: str) -> int:
        """Shows the line."""
        if line := text.strip("\r\n "):
            self.handle.update({"text/plain": line}, raw=True)
        return len(text)


class RelayedLine(io.TextIOBase):
    """tqdm's newest line, marked, for the process that has started this one."""

    def write(self, text: str) -> int:
        """Prints the line."""
        if line := text.strip("\r\n "):
            print(RELAYED + line, flush=True)
        return len(text)


def progress(label: str, total: int, unit: str, initial: int = 0):
    """A tqdm bar: a line in notebook cells, live on a terminal, none in a log or without stderr."""
    from tqdm import tqdm

    options = {"disable": sys.stderr is None or not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"}
    if in_notebook():
        options = {"file": CellLine(), "ascii": " -#"}
    elif RELAY in os.environ:
        options = {"file": RelayedLine(), "ascii": " -#"}
    return tqdm(desc=label, total=total, unit=unit, initial=initial, mininterval=0.5, **options)


def in_parallel(function: Callable, items: Sequence, label: str = "", unit: str = "", workers: int = 0) -> Iterator:
    """As `map`, in threads, with a progress bar if it has a label.

    Results do not pile up before they are used.
    """
    bar = progress(label, len(items), unit) if label else contextlib.nullcontext()
    with bar, ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for first in range(0, len(items), 64):
            for result in pool.map(function, items[first : first + 64]):
                if label:
                    bar.update()
                yield result


JPEG_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"}
IMAGE_SUFFIXES = JPEG_SUFFIXES | {".png", ".webp", ".avif", ".heic", ".heif", ".bmp", ".tif", ".tiff", ".gif"}
IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "BMP", "TIFF", "GIF")  # as Pillow calls them
UNREAD_SUFFIXES = {".jxl", ".psd", ".dng", ".cr2", ".nef", ".arw"}  # pictures, but for other programs
NEEDED = {".heic": "pip install pillow-heif", ".heif": "pip install pillow-heif", ".avif": "pip install 'pillow>=11.3'"}
MAX_PIXELS = 10**8  # of a picture: degrading takes some 50 bytes for each, restoring 19


def readable_suffixes() -> set[str]:
    """Suffixes of picture files readable here: HEIC and AVIF depend on what is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return IMAGE_SUFFIXES & Image.registered_extensions().keys()


def writable_suffixes() -> set[str]:
    """Suffixes of the picture files that can be written here."""
    return {suffix for suffix in readable_suffixes() if Image.registered_extensions()[suffix] in Image.SAVE}


def open_image(path: str | Path) -> Image.Image:
    """The one loader of image files: a PIL image in RGB, EXIF orientation applied.

    16 bits are brought to 8, grey gets three equal channels, transparency is dropped, of an
    animation the first picture counts. By Pillow, which tells a whole file from a cut one, but for
    TIFFs, of which OpenCV reads more kinds; the orientation is applied here, so that it is the same
    for every format and version. ValueError, naming the file, if it cannot be read, is damaged or
    has over MAX_PIXELS.
    """
    readable_suffixes()  # makes Pillow know all its formats
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow's own limit is a little lower, and only a warning
    PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # Photoshop writes more text than Pillow accepts by default
    try:
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content), formats=[f for f in IMAGE_FORMATS if f in Image.OPEN]) as image:
            if (count := image.width * image.height) > MAX_PIXELS:
                raise ValueError(f"too many pixels, {count / 1e6:.0f} million; {MAX_PIXELS / 1e6:.0f} are the most")
            pixels = None
            tags = image.tag_v2 if image.format == "TIFF" else {}
            if tags.get(284) == 2 and max(tags.get(258, (8,))) > 8:
                raise ValueError("16 bits, in a plane for each colour")  # which neither reads rightly
            if tags and tags.get(0x0112, 1) == 1 and not image.has_transparency_data:
                pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
            rgb = _to_rgb(image) if pixels is None else to_pil(pixels)
            if image.format == "PNG":
                Image.open(io.BytesIO(content)).verify()  # the checksums, which loading does not look at
            elif image.format in ("JPEG", "MPO") and _is_incomplete_jpeg(content, image):
                raise ValueError("a part of the picture is missing")
            orientation = _orientation(image)
        return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb
    except MemoryError as error:
        raise MemoryError(f"{path}: not enough memory to read it") from error
    except Exception as error:  # whatever Pillow's many readers trip over
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else reason
        remedy = "If other programs open it, save it from there as PNG or JPEG"
        if (suffix := Path(path).suffix.lower()) in NEEDED.keys() - readable_suffixes():
            remedy += f", or: {NEEDED[suffix]}"
        raise ValueError(f"{path}: cannot be read ({reason}). {remedy}") from error


def read_image(path: str | Path) -> np.ndarray:
    """The pixels of `open_image` as `cv2.imread` orders them: uint8 BGR (H, W, 3)."""
    return cv2.cvtColor(np.asarray(open_image(path)), cv2.COLOR_RGB2BGR)


_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
UPRIGHT = {orientation: Image.Transpose[turn] for orientation, turn in enumerate(_TURNS.split(), 2)}  # by EXIF's number


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, of a file that has been read.

    Damaged EXIF data say nothing, XMP is not asked.
    """
    exif = Image.Exif()
    with contextlib.suppress(Exception):
        if image.format == "TIFF":
            exif = image.getexif()  # Pillow turns TIFFs itself, and then forgets the tag
        else:
            exif.load(image.info["exif"])
    return exif.get(0x0112) if exif.get(0x0112) in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """An opened image in RGB. ValueError for what has no agreed range."""
    image.load()
    if image.mode[0] not in "IF":
        return image if image.mode == "RGB" else image.convert("RGB")
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("its values are neither of 8 nor of 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def _is_incomplete_jpeg(content: bytes, image: Image.Image) -> bool:
    """Whether a part of the picture is missing, although it could be decoded (a cut file, filled up
    or mended).

    Decoders invent what is missing and say nothing: flat blocks where nothing follows, others from
    zeros. A picture whose last block of 8 x 8 px is not flat and whose last bytes are not all alike
    is whole. Else other bytes are put behind the picture's data, where they change nothing if it is
    whole, and in the place of its last 32, where they do. (Markers: FF DA a scan begins, FF D9 the
    picture ends, FF C2 progressive: several scans, of which any may be cut.)
    """
    begin = 2
    while (marker := content[begin : begin + 2]) != b"\xff\xda":  # from segment to segment, to the picture's data
        if not marker:
            return True
        filler = marker == b"\xff\xff"  # any number of them may precede a marker
        begin += 1 if filler else 2 + int.from_bytes(content[begin + 2 : begin + 4], "big")
    if (end := content.find(b"\xff\xd9", begin)) < 0:
        return True
    begin = max(begin, content.rfind(b"\xff\xda", begin, end))  # of the last scan, in progressive ones
    last = image.crop(((image.width - 1) // 8 * 8, (image.height - 1) // 8 * 8, *image.size)).convert("L")
    if np.ptp(np.asarray(last)) > 3 and len(set(content[end - 32 : end])) > 4 and b"\xff\xc2" not in content:
        return False

    def is_changed(start: bytes) -> bool:
        other = np.random.default_rng(0).integers(0, 255, 4096, dtype=np.uint8).tobytes()
        start = start.rstrip(b"\xff")  # with what follows it would be a marker
        with Image.open(io.BytesIO(start + other + b"\xff\xd9")) as changed:
            changed.load()
            bands = [(0, top, image.width, min(top + 256, image.height)) for top in range(0, image.height, 256)]
            return any(changed.crop(band).tobytes() != image.crop(band).tobytes() for band in bands)  # saves memory

    return is_changed(content[:end]) or (end - begin > 64 and not is_changed(content[: end - 32]))


def to_pil(image: np.ndarray) -> Image.Image:
    """A uint8 BGR array (H, W, 3) as a PIL image in RGB."""
    return Image.fromarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))


def in_one_tone(image: Image.Image) -> bool | None:
    """Whether a photograph is in one tone (grey, sepia, or grey with a cast); None if nobody can
    say.

    In one tone, colours depend on the brightness only: at 256 px, where grain is gone, R - G and B
    - G of 95 % of the pixels are within 5 levels of the median at their brightness (more, if the
    tone is strong), and hardly any far from it: painted cheeks are colour. So it is with a red
    wall, too, with sand or with the sea: where a picture does not reach from dark to light, or is
    as colourful as no print turns, it may be either.
    """
    small = image.resize((min(IMAGE_SIZE, image.width), min(IMAGE_SIZE, image.height)), Image.Resampling.BOX)
    luma = np.asarray(small.convert("L")).ravel()
    brightness, (darkest, lightest) = luma // 8, np.quantile(luma, (0.01, 0.99))
    red, green, blue = np.asarray(small, np.float32).reshape(-1, 3).T
    is_print = lightest - darkest >= 100  # of 76 prints aged by age_photo the palest has 111
    for chroma in (red - green, blue - green):
        usual = ndimage.median(chroma, brightness, np.arange(32))
        jumps = np.abs(np.diff(usual[np.unique(brightness)]))  # from one brightness to the next, a tone changes little
        off, strength = np.abs(chroma - usual[brightness]), np.abs(chroma).mean()
        many, strong = np.quantile(off, 0.95) > 5 + 0.13 * strength, (off > 30).mean() > 0.003
        if many or strong or jumps.max(initial=0) > 30:
            return False
        is_print = is_print and strength <= 50  # theirs: up to 37
    return True if is_print else None


def is_neutral(image: np.ndarray) -> bool:
    """Whether all channels of an image (H, W, 3) are the same."""
    return all(np.array_equal(image[..., 0], image[..., channel]) for channel in (1, 2))


def without_tint(image: Image.Image) -> Image.Image:
    """A photograph that is `in_one_tone` in neutral grey, RGB; any other as it is."""
    return image.convert("L").convert("RGB") if in_one_tone(image) else image


def write_image(path: str | Path, image: np.ndarray, quality: int = Settings.jpeg_quality, comment: str = "") -> None:
    """Writes uint8 BGR (H, W, 3) atomically.

    A .jpg gets this quality, full colour resolution (4:4:4) and the comment.
    """
    path, done = Path(path), False
    suffix = ".jpg" if path.suffix.lower() in JPEG_SUFFIXES else path.suffix
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    with contextlib.suppress(cv2.error):  # not imwrite: on Windows, it opens no path that is not ASCII
        done, content = cv2.imencode(suffix, image, options if suffix == ".jpg" else [])
    if not done:
        raise ValueError(f"{path}: OpenCV cannot write {image.shape[1]} x {image.shape[0]} px as {path.suffix}")
    content = content.tobytes()
    if comment:  # a segment (marker, length, text) behind the 20 bytes with which all begin that OpenCV writes
        content = content[:20] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment.encode() + content[20:]
    with atomic(path) as temporary:
        temporary.write_bytes(content)


# ====== Faces =====================================================================================


class Faces(NamedTuple):
    """The originals in use."""

    folder: Path
    source: str  # what they are, in words
    names: list[str]  # paths relative to the folder, by which an original is called everywhere
    left_out: Mapping[str, str] = MappingProxyType({})  # files of the folder that are not used, and why
    scenes: Sequence[Path] = ()  # pictures without faces, to train on beside them

    @property
    def files(self) -> list[Path]:
        """The originals as paths."""
        return [self.folder / name for name in self.names]


def list_images(folder: Path, kinds: Sequence[str] = KINDS) -> tuple[list[str], dict[str, str]]:
    """All pictures below `folder`, but for hidden files, as sorted relative paths; what was left
    out, and why.

    Left out are degraded copies of these `kinds`, too.
    """
    found, left_out, readable = [], {}, readable_suffixes()

    def leave_out(path: str | Path, reason: str) -> None:
        name = Path(path).relative_to(folder).as_posix()
        left_out[name.encode(errors="backslashreplace").decode()] = reason

    for parent, folders, names in os.walk(folder, onerror=lambda e: leave_out(e.filename, e.strerror)):
        for name in [name for name in folders if Path(parent, name).is_symlink()]:
            leave_out(Path(parent, name), "a link to a folder, not followed; name the folder to which it leads")
        folders[:] = [
            name for name in folders if not name.startswith(".") and (name != "fakefaces_degraded" or not kinds)
        ]
        visible = [Path(parent, name) for name in names if not name.startswith(".")]
        stems = {path.stem for path in visible if path.suffix.lower() in IMAGE_SUFFIXES}
        for path in visible:
            name, suffix = path.relative_to(folder).as_posix(), path.suffix.lower()
            stem, _, kind = path.stem.rpartition("_")
            if suffix in UNREAD_SUFFIXES or suffix in IMAGE_SUFFIXES - readable:
                remedy = f", or: {NEEDED[suffix]}" if suffix in NEEDED else ""
                leave_out(path, f"{suffix} is not read here; convert it to JPEG{remedy}")
            elif suffix not in IMAGE_SUFFIXES:
                continue  # no picture
            elif not path.is_file():
                leave_out(path, "not a file")  # a pipe would be waited for, a broken link leads nowhere
            elif name.encode(errors="ignore").decode() != name:
                leave_out(path, "its name is not Unicode; rename it")
            elif kind in kinds and stem in stems:
                leave_out(path, f"taken for a degraded copy of {stem}; rename it if it is none")
            else:
                found.append(name)
    return sorted(found), left_out


PICTURES_VERSION = 7  # to be raised when draw_portrait or draw_scene paints something else


def draw_pictures(what: str, count: int, settings: Settings, places: Places) -> list[Path]:
    """Draws `count` synthetic portraits or scenes (`what`) in a folder of their own.

    Those already there are kept.
    """
    size, seed = settings.portrait_size, settings.seed
    folder = places.outputs / f"synthetic_{what}s_{count}x{size}px_seed{seed}_v{PICTURES_VERSION}"
    paths = [folder / f"{what}_{index:04d}.jpg" for index in range(count)]
    paint = {"portrait": draw_portrait, "scene": draw_scene}[what]

    def draw(index: int) -> None:  # what is on a picture depends on its number only
        write_image(paths[index], paint(np.random.default_rng([seed, index]), size))

    if not all(path.exists() for path in paths):
        with alone_in(folder):  # another run may just have drawn them
            missing = [index for index in range(count) if not paths[index].exists()]
            list(in_parallel(draw, missing, f"drawing {what}s", what))
    return paths


def _faces_folder(settings: Settings, places: Places) -> tuple[Path, str]:
    """The folder of the originals, and what they are in words."""
    if os.environ.get("FACES_DIR"):
        folder = given_path(os.environ["FACES_DIR"])
        if not folder.is_dir():
            raise FileNotFoundError(f"FACES_DIR names {folder}, which is no folder; set it to one with portraits")
        return folder, f"photographs in {folder.name}/ (FACES_DIR)"
    for pattern in ("fakefaces", "datasets/*/fakefaces", "*/fakefaces") if places.attached else ():
        for folder in sorted(places.attached.glob(pattern)):
            return folder, "StyleGAN portraits (the Kaggle data set fakefaces)"
    wanted = os.environ.get("RESTORATION_FACES")
    if wanted not in (None, "", "kaggle"):
        raise ValueError(f"RESTORATION_FACES is {wanted!r}; the only choice is 'kaggle'")
    if wanted:
        try:  # only on request: it needs the internet
            import kagglehub
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("RESTORATION_FACES=kaggle needs 'pip install kagglehub'") from error
        return Path(kagglehub.dataset_download("hyperclaw79/fakefaces")), "StyleGAN portraits (fakefaces, downloaded)"
    folder = draw_pictures("portrait", settings.portraits, settings, places)[0].parent
    return folder, f"synthetic portraits of {settings.portrait_size} px, drawn by this project"


def find_faces(settings: Settings, places: Places) -> Faces:
    """FACES_DIR, else Kaggle's fakefaces, else (RESTORATION_FACES=kaggle) its download, else
    synthetic portraits.

    FileNotFoundError if there are no pictures, ValueError if faces and outputs are in the same
    folder.
    """
    folder, source = _faces_folder(settings, places)
    names, left_out = list_images(folder)
    if places.outputs == folder:
        raise ValueError(f"the faces and the outputs are in the same folder, {folder}: choose another OUTPUT_DIR")
    if places.outputs.is_relative_to(folder):  # results are no faces to learn from
        results = places.outputs.relative_to(folder).as_posix() + "/"
        names = [name for name in names if not name.startswith(results)]
        left_out = {name: reason for name, reason in left_out.items() if not name.startswith(results)}
    if not names:
        reasons = "".join(f"; {name}: {reason}" for name, reason in left_out.items())
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise FileNotFoundError(f"no images ({suffixes}) in {folder} or its subfolders{reasons}")
    used = names[: settings.max_faces]
    source += f", the first {len(used)} of {len(names)}" if len(used) < len(names) else ""
    return Faces(folder, source, used, left_out, draw_pictures("scene", settings.scenes, settings, places))


# ====== Degradation ===============================================================================


def add_gaussian_noise(
    image: np.ndarray,
    rng: np.random.Generator,
    settings: Settings = FULL,
) -> np.ndarray:
    """Adds Gaussian noise of mean 0 and standard deviation 25 (of 255) to every pixel and channel.

    uint8 (H, W, 3) in and out; the input is not changed. OpenCV draws the noise, in whole numbers,
    several times as fast as NumPy, from a seed that `rng` gives: its random state is the thread's
    own.
    """
    grain = np.empty((image.shape[0], image[0].size), np.int16)
    cv2.setRNGSeed(int(rng.integers(-(2**31), 2**31)))
    cv2.randn(grain, 0, settings.noise_sigma)
    # cv2.add clips; a bare sum would wrap 256 round to 0
    return cv2.add(image, grain.reshape(image.shape), dtype=cv2.CV_8U)


def distort_colors(
    image: np.ndarray,
    rng: np.random.Generator,
    settings: Settings = FULL,
) -> np.ndarray:
    """Fades the colours: multiplies S and V of HSV by one random factor each.

    uint8 BGR (H, W, 3) in and out; the input is not changed. Hue stays, V is clipped at its
    maximum. Written without a detour through HSV, which takes twenty times as long: with V the
    largest of a pixel's channels, a factor s on S turns each channel c into V + s (c - V), and one
    on V multiplies all three.
    """
    s, v = rng.uniform(*settings.saturation), rng.uniform(*settings.value)
    high = functools.reduce(cv2.max, cv2.split(image))  # V
    gain = cv2.LUT(high, np.minimum(v, 255 / np.maximum(np.arange(256), 1)).astype(np.float32))
    high, gain = cv2.merge([high] * 3), cv2.merge([gain] * 3)
    # s is below 1: no channel leaves its range
    faded = cv2.addWeighted(image, s, high, 1 - s, 0, dtype=cv2.CV_32F)
    return cv2.multiply(faded, gain, dtype=cv2.CV_8U)  # rounds


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number between the two, as likely to be from 1 to 2 as from 10 to 20."""
    return np.exp(rng.uniform(math.log(low), math.log(high)))


def unit_vector(angle: np.ndarray | float) -> np.ndarray:
    """Unit vectors (..., 2), x and y, of angles in radians."""
    return np.stack((np.cos(angle), np.sin(angle)), -1)


def _polygons(shape: Sequence[int], rng: np.random.Generator, settings: Settings) -> list[np.ndarray]:
    """Corners, int32 (vertices, 2) as x, y, of random star-shaped polygons inside `shape`."""
    height, width = shape[:2]
    polygons = []
    for _ in range(settings.polygons):
        vertices = rng.integers(settings.polygon_vertices[0], settings.polygon_vertices[1] + 1)
        angles = np.sort(rng.uniform(0, 2 * math.pi, vertices))
        points = rng.uniform(0.5, 1, (vertices, 1)) * unit_vector(angles)
        points -= points.min(axis=0)
        size = rng.uniform(*settings.polygon_size) * min(height, width) / 1024
        points *= size / points.max()
        points += rng.uniform(0, 1, 2) * np.maximum([width - 1, height - 1] - points.max(axis=0), 0)
        polygons.append(np.rint(points).astype(np.int32))
    return polygons


def occlude_irregular(
    image: np.ndarray,
    rng: np.random.Generator,
    settings: Settings = FULL,
) -> np.ndarray:
    """Covers 3 random polygons of 6 to 10 vertices, each with black, white or random noise.

    uint8 (H, W, 3) in and out; the input is not changed. A polygon reaches 80 to 200 px across in a
    1024 px image and scales with min(H, W).
    """
    occluded = image.copy()
    for polygon in _polygons(image.shape, rng, settings):
        inside = cv2.fillPoly(np.zeros(image.shape[:2], np.uint8), [polygon], 1).astype(bool)
        paint = ("black", "white", "noise")[rng.integers(3)]
        if paint == "noise":
            covered = np.count_nonzero(inside), image.shape[2]
            occluded[inside] = rng.integers(0, 256, covered, dtype=np.uint8)
        else:
            occluded[inside] = 255 if paint == "white" else 0
    return occluded


def occlusion_mask(
    shape: Sequence[int],
    rng: np.random.Generator,
    settings: Settings = FULL,
) -> np.ndarray:
    """What `occlude_irregular` covers from the same generator state: uint8 (H, W), 255 inside.

    Masks are drawn again from the seed; `store_images` keeps them at the networks' size.
    """
    mask = np.zeros(tuple(shape[:2]), np.uint8)
    # one at a time: together, fillPoly would leave overlaps open
    for polygon in _polygons(shape, rng, settings):
        cv2.fillPoly(mask, [polygon], 255)
    return mask


# ====== Ageing ====================================================================================

# What fifty years do to a print. Lengths are in thousandths of the shorter side, so a photograph
# ages alike at every size. The list of faults follows Wan et al. 2020 (old photos brought back to
# life), the fading of dyes Wilhelm 1993 (each at its own rate), the shape of scratches Kokaram
# 1998.

BLACK_AND_WHITE = 0.45  # of aged photographs


def jagged_line(start: np.ndarray, end: np.ndarray, rng: np.random.Generator, rough: float) -> np.ndarray:
    """A line from `start` to `end`, (points, 2), bent by midpoints moved sideways.

    They move by about `rough` of its length.
    """
    points = np.array([start, end], np.float64)
    for _ in range(6):
        step = np.diff(points, axis=0)
        moved = rng.normal(0, rough, (len(step), 1)) * step[:, ::-1] * (1, -1)
        middles = (points[:-1] + points[1:]) / 2 + moved
        points = np.insert(points, np.arange(1, len(points)), middles, axis=0)
    return points


def _draw_line(canvas: np.ndarray, points: np.ndarray, opacity: float, thickness: float) -> None:
    """A smooth-edged line that never weakens what is there; thinner than a pixel, it is fainter."""
    strength, width = int(255 * opacity * min(1, max(thickness, 0.35))), max(1, round(thickness))
    low, high = np.clip((points.min(0) - width, points.max(0) + width + 1), 0, canvas.shape[::-1]).astype(int)
    part = canvas[low[1] : high[1], low[0] : high[0]]
    line = np.zeros_like(part)
    if line.size:
        cv2.polylines(line, [np.rint((points - low) * 16).astype(np.int32)], False, strength, width, cv2.LINE_AA, 4)
        part[...] = cv2.max(part, line)


def _draw_scratches(canvas: np.ndarray, rng: np.random.Generator, unit: float) -> None:
    """Long, thin, nearly straight, mostly in one direction, here and there interrupted."""
    size, direction = np.array(canvas.shape[::-1]), rng.uniform(0, math.pi)
    for _ in range(rng.integers(1, 13)):
        angle = direction + rng.normal(0, 0.15) if rng.random() < 0.7 else rng.uniform(0, math.pi)
        reach = unit_vector(angle) * log_uniform(rng, 40, 900) * unit
        begin = rng.uniform(-0.1, 1.0, 2) * size
        line = jagged_line(begin, begin + reach, rng, rng.choice((0.003, 0.02)))
        opacity, thickness = rng.uniform(0.4, 1), rng.uniform(0.6, 2.6) * unit
        cuts = np.sort(rng.integers(0, len(line), 2 * rng.integers(1, 3)))
        pieces = [line] if rng.random() < 0.5 else [line[a : b + 1] for a, b in zip(cuts[::2], cuts[1::2]) if a < b]
        for piece in pieces:
            _draw_line(canvas, piece, opacity, thickness)


def _draw_cracks(light: np.ndarray, dark: np.ndarray, rng: np.random.Generator, unit: float) -> None:
    """Folds from edge to edge and cracks that branch: a light core beside a dark flank.

    In the core the emulsion is gone.
    """
    size = np.array(light.shape[::-1])
    todo = []
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.4:  # a fold
            across, places = rng.integers(2), rng.uniform(0.08, 0.92, 2)
            begin, end = np.array((places[0], 0.0)), np.array((places[rng.integers(2)], 1.0))
            begin, end = (begin[::-1], end[::-1]) if across else (begin, end)
            todo.append((begin * size, end * size, rng.uniform(0.01, 0.04), rng.uniform(1, 4) * unit, 0))
        else:
            begin, angle = rng.uniform(0, 1, 2) * size, rng.uniform(0, 2 * math.pi)
            reach = unit_vector(angle) * rng.uniform(60, 600) * unit
            todo.append((begin, begin + reach, rng.uniform(0.06, 0.2), rng.uniform(1, 5) * unit, 2))
    while todo:
        begin, end, rough, thickness, branches = todo.pop()
        line = jagged_line(begin, end, rng, rough)
        across = (end - begin)[::-1] * (-1, 1) / np.linalg.norm(end - begin)
        flank = rng.choice((-1, 1)) * (thickness / 2 + 0.8 * unit) * across
        _draw_line(dark, line + flank, rng.uniform(0.1, 0.6), 0.7 * thickness)
        opacity, quarters = rng.uniform(0.55, 1), np.flatnonzero(rng.random(4) >= 0.15)  # in places the emulsion holds
        for first in 16 * quarters:
            _draw_line(light, line[first : first + 17], opacity, thickness * rng.uniform(0.5, 1.3))
        for _ in range(rng.integers(0, branches + 1)):
            root, turn = line[rng.integers(8, 56)], rng.choice((-1, 1)) * rng.uniform(0.4, 1.2)
            along = (end - begin) * rng.uniform(0.15, 0.45)
            turned = along * math.cos(turn) + along[::-1] * (-1, 1) * math.sin(turn)
            todo.append((root, root + turned, rough, 0.7 * thickness, 0))


def _draw_dust(canvas: np.ndarray, rng: np.random.Generator, unit: float) -> None:
    """Specks, a few flakes, and hairs."""
    size = np.array(canvas.shape[::-1])
    count = int(log_uniform(rng, 5, 250))
    places, radii = rng.uniform(0, 1, (count, 2)) * size, rng.exponential(1.0, count).clip(0.4, 4) * unit
    opacities, flats, turns = (rng.uniform(*limits, count) for limits in ((0.4, 1), (0.4, 1), (0, 180)))
    for place, radius, opacity, flat, turn in zip(places, radii, opacities, flats, turns):
        axes = np.maximum(np.rint(16 * radius * np.array((1, flat))), 8).astype(int).tolist()
        strength = int(255 * opacity * min(1, max(radius, 0.5)))
        cv2.ellipse(canvas, np.rint(16 * place).astype(int).tolist(), axes, turn, 0, 360, strength, -1, cv2.LINE_AA, 4)
    for _ in range(rng.integers(0, 5)):
        begin, angle = rng.uniform(0, 1, 2) * size, rng.uniform(0, 2 * math.pi)
        reach = unit_vector(angle) * rng.uniform(15, 90) * unit
        hair = jagged_line(begin, begin + reach, rng, 0.15)
        _draw_line(canvas, hair, rng.uniform(0.4, 0.9), rng.uniform(0.5, 1.5) * unit)


def _draw_tears(canvas: np.ndarray, rng: np.random.Generator, unit: float) -> None:
    """Torn corners, worn edges, and pieces of the emulsion that came off."""
    size, outlines = np.array(canvas.shape[::-1]), []
    corners = np.array(((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))) * size
    for before, here, after in zip(np.roll(corners, 1, 0), corners, np.roll(corners, -1, 0)):
        inwards, along = ((to - here) / np.linalg.norm(to - here) for to in (before, after))
        if rng.random() < 0.4:  # a corner
            first, last = rng.uniform(20, 160, 2) * unit
            outlines.append(np.vstack((here, jagged_line(here + inwards * first, here + along * last, rng, 0.15))))
        if rng.random() < 0.3:  # an edge
            line = jagged_line(here, after, rng, 0.004) + inwards * rng.uniform(1, 14) * unit
            outlines.append(np.vstack((here, line, after)))
    for _ in range(rng.integers(0, 4)):  # emulsion
        centre, radius = rng.uniform(0, 1, 2) * size, rng.uniform(4, 40) * unit
        angles = np.sort(rng.uniform(0, 2 * math.pi, 9))
        ring = centre + radius * rng.uniform(0.4, 1, (9, 1)) * unit_vector(angles)
        outlines.append(np.vstack([jagged_line(a, b, rng, 0.12)[:-1] for a, b in zip(ring, np.roll(ring, -1, 0))]))
    for outline in outlines:
        cv2.fillPoly(canvas, [np.rint(16 * outline).astype(np.int32)], 255, cv2.LINE_AA, 4)


def draw_damage(shape: Sequence[int], rng: np.random.Generator) -> list[tuple[np.ndarray, tuple[float, ...]]]:
    """What hands do to a print of `shape`: dust, scratches, cracks, torn corners, some of them or
    all.

    Pairs, the last one lying on top: how far each pixel is covered, uint8 (H, W), 255 is wholly,
    and the colour, BGR.
    """
    rng = np.random.default_rng(rng.integers(2**63))  # of its own: what is drawn later does not depend on the size
    unit, care = min(shape[:2]) / 1000, rng.uniform(0.3, 1.1)
    paper = tuple((rng.uniform(205, 245) + np.array((-14, -4, 0)) * rng.uniform(0, 1.5)).tolist())
    ink = (rng.uniform(5, 70),) * 3
    torn = paper if rng.random() < 0.4 else (rng.choice((*rng.uniform(2, 30, 2), 250)),) * 3  # mostly paper or black
    dark, light, tears = (np.zeros(shape[:2], np.uint8) for _ in range(3))
    if rng.random() < care:
        _draw_dust(light, rng, unit)
    if rng.random() < 0.4 * care:
        _draw_dust(dark, rng, unit)
    if rng.random() < care:
        _draw_scratches(light if rng.random() < 0.75 else dark, rng, unit)
    if rng.random() < care:
        _draw_cracks(light, dark, rng, unit)
    if rng.random() < care:
        _draw_tears(tears, rng, unit)
    return [(dark, ink), (light, paper), (tears, torn)]


def damage_mask(shape: Sequence[int], rng: np.random.Generator, settings: Settings = FULL) -> np.ndarray:
    """What `age_photo` damages physically in an image of `shape`: uint8 (H, W).

    From the same generator state.
    """
    covered = functools.reduce(cv2.max, (cover for cover, _ in draw_damage(shape, rng)))
    return cv2.threshold(covered, 50, 255, cv2.THRESH_BINARY)[1]


def draw_tone(rng: np.random.Generator) -> float:
    """Of a black-and-white print, from 0 (neutral) to 1 (sepia); -1 for one in colour."""
    return rng.choice((0.0, rng.uniform(0, 1))) if rng.random() < BLACK_AND_WHITE else -1.0


def is_black_and_white(rng: np.random.Generator) -> bool:
    """Whether `age_photo` makes a black-and-white print from this generator state.

    Only grey can then come back.
    """
    rng.integers(2**63)  # for `draw_damage`
    return draw_tone(rng) >= 0


def to_grey(image: np.ndarray) -> np.ndarray:
    """The luma of an image (H, W, 3), BGR, in three equal channels (ITU-R BT.601)."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)


def fade(image: np.ndarray, rng: np.random.Generator, tone: float) -> np.ndarray:
    """Fades the dyes or the silver of a print, and yellows its paper, in every channel differently.

    uint8 BGR (H, W, 3) in and out. What holds the colour is a density D, which light passes as
    10 ** -D (Beer's law), 2 in the blacks of a print. Of that each dye keeps a share of its own
    (Wilhelm 1993), and the paper gains some: so blacks get lighter, contrast and colours go, whites
    get dull. With a `tone` from 0 to 1 (sepia), the image is grey, its dyes are one substance,
    silver, and turn brown so far; -1: it is in colour.
    """
    severity = rng.uniform(0.4, 1)
    kept = (1 - severity * (rng.uniform(0.2, 0.8) + rng.uniform(-0.25, 0.25, 3))).clip(0.35, 1)
    # of the paper: yellow
    stain = severity * (rng.uniform(0, 0.2) + rng.uniform(0, 0.3) * np.array((1, 0.4, 0.1)))
    if tone >= 0:
        kept = kept.mean() * (1 + tone * np.array((0.2, 0, -0.15)))
        stain = stain + tone * np.array((0.15, 0.05, 0))
    black = 0.01  # of the light, comes back where D is 2
    linear = (np.arange(256)[:, None] / 255) ** 2.2  # (256, 1)
    light = black + (1 - black) * linear
    light = light**kept * 10**-stain  # (256, 3)
    curves = ((light - black) / (1 - black)).clip(0, 1) ** (1 / 2.2)
    return cv2.LUT(image, np.rint(255 * curves).astype(np.uint8)[None])


def uneven_light(shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """How much of its light a print kept, float32 (H, W): paler patches, odd edges, stains."""
    severity, clouds = rng.uniform(0, 1), rng.standard_normal((4, 4), np.float32)
    field = 1 + 0.08 * severity * cv2.resize(clouds, (48, 48), interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[-1:1:48j, -1:1:48j].astype(np.float32)
    field += severity * rng.uniform(-0.25, 0.15) * np.maximum(np.abs(x), np.abs(y)) ** rng.uniform(3, 8)
    field = cv2.resize(field, shape[1::-1], interpolation=cv2.INTER_LINEAR)
    unit = min(shape[:2]) / 1000
    for _ in range(rng.integers(0, 4) if rng.random() < 0.4 else 0):  # stains, darker at their rim
        stain, radius = np.zeros(shape[:2], np.uint8), rng.uniform(20, 160) * unit
        centre, angles = rng.uniform(0, 1, 2) * shape[1::-1], np.linspace(0, 2 * math.pi, 13)[:-1]
        ring = centre + radius * rng.uniform(0.6, 1, (12, 1)) * unit_vector(angles)
        cv2.fillPoly(stain, [np.rint(16 * ring).astype(np.int32)], 255, cv2.LINE_AA, 4)
        low, high = np.clip((centre - 1.5 * radius, centre + 1.5 * radius), 0, shape[1::-1]).astype(int)
        part = np.s_[low[1] : high[1], low[0] : high[0]]
        if min(high - low) > 4:
            soft = cv2.blur(stain[part], (max(3, int(12 * unit)),) * 2).astype(np.float32) / 255
            field[part] *= 1 - rng.uniform(0.03, 0.2) * (0.6 * soft + 1.6 * soft * (1 - soft))
    return field


def film_grain(shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Grain in luminance, in grey levels, float32 (H, W): of about 1 to 14 levels, its clumps of 1
    to 2.5 px.

    In pictures of over 1000 px, thousandths of the shorter side.
    """
    size = rng.uniform(1, 2.5) * max(1, min(shape[:2]) / 1000)
    strength = log_uniform(rng, 1.5, 14)
    small = np.empty((math.ceil(shape[0] / size), math.ceil(shape[1] / size)), np.float32)
    cv2.setRNGSeed(int(rng.integers(-(2**31), 2**31)))
    cv2.randn(small, 0, strength * min(size, 2.25) ** 0.5)  # the interpolation takes away from it
    return cv2.resize(small, shape[1::-1], interpolation=cv2.INTER_LINEAR)


def age_untouched(image: np.ndarray, rng: np.random.Generator, tone: float) -> np.ndarray:
    """What becomes of a print that nobody touches: the lens and the paper (blur, `draw_tone`), the
    years (fading, uneven light, stains), grain. uint8 BGR (H, W, 3) in and out.
    """
    image = image if tone < 0 else to_grey(image)
    if (lens := rng.uniform(0, 1.6) * min(image.shape[:2]) / 1000) > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), lens)
    image = fade(image, rng, tone)
    aged = cv2.multiply(image, cv2.merge([uneven_light(image.shape, rng)] * 3), dtype=cv2.CV_32F)
    if rng.random() < 0.8:
        aged += film_grain(image.shape, rng)[..., None]
    return cv2.convertScaleAbs(np.maximum(aged, 0, out=aged)).reshape(image.shape)  # of one pixel it drops an axis


def age_photo(image: np.ndarray, rng: np.random.Generator, settings: Settings = FULL) -> np.ndarray:
    """Ages a photograph by some fifty years.

    uint8 BGR (H, W, 3) in and out; the input is not changed. The lens, the paper, the years and the
    grain (`age_untouched`), the hands (dust, scratches, cracks, tears), the scanner (blur, JPEG).
    `damage_mask` redraws what the hands did, `is_black_and_white` says whether the truth is the
    grey photograph.
    """
    damage = draw_damage(image.shape, rng)
    aged = age_untouched(image, rng, draw_tone(rng))
    scanner, quality = rng.uniform(0, 1.0) * min(image.shape[:2]) / 1000, int(rng.integers(60, 96))
    for cover, paint in damage:
        rows, columns = np.nonzero(cover)
        share = cover[rows, columns, None] * np.float32(1 / 255)
        texture = rng.normal(0, 5, (len(rows), 1)).astype(np.float32)
        marked = aged[rows, columns] * (1 - share) + (np.float32(paint) + texture) * share
        aged[rows, columns] = marked.clip(0, 255) + 0.5
    if scanner > 0.3:
        aged = cv2.GaussianBlur(aged, (0, 0), scanner)
    _, jpeg = cv2.imencode(".jpg", aged, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(jpeg, cv2.IMREAD_COLOR)


# ====== Degraded folders ==========================================================================

DEGRADATIONS = {"noisy": add_gaussian_noise, "color": distort_colors, "occluded": occlude_irregular, "aged": age_photo}
MASKS = {"occluded": occlusion_mask, "aged": damage_mask}  # of what is physically damaged, for the kinds that have it


def degrade(image: np.ndarray, kind: str, rng: np.random.Generator, settings: Settings) -> np.ndarray:
    """One of the degradations by the name of its kind, with the numbers of `settings`."""
    return DEGRADATIONS[kind](image, rng, settings)


@functools.cache
def degradation_id(settings: Settings) -> str:
    """A fingerprint of a degraded test card: it gives away files of older code or libraries."""
    card = (np.arange(400 * 480 * 3) % 251).astype(np.uint8).reshape(400, 480, 3)
    draws = [functools.partial(DEGRADATIONS[kind], card) for kind in settings.kinds]
    draws += [functools.partial(MASKS[kind], card.shape) for kind in settings.kinds if kind in MASKS]
    drawn = [fingerprint(*(draw(np.random.default_rng(i), settings).tobytes() for i in range(6))) for draw in draws]
    names = ("seed", "kinds", "noise_sigma", "saturation", "value", "polygons", "polygon_vertices", "polygon_size")
    return fingerprint(drawn, [getattr(settings, name) for name in (*names, "jpeg_quality")])


class Pair(NamedTuple):
    """A degraded image and its original."""

    kind: str  # of damage
    name: str  # of the original
    content: str  # fingerprint of the original's bytes, empty if they could not be read: copies have the same
    original: Path
    degraded: Path
    is_scene: bool = False  # no face: to train on only
    store: Path = Path()  # the file that holds the pixels of both at the networks' size
    row: int = 0  # where in it: the original's,
    plane: int = 0  # its own first colour's,
    mask_plane: int | None = None  # that of what is physically damaged
    is_grey: bool = False  # a black-and-white print, of which no more than the grey photograph can come back

    def undamaged(self) -> Pair:
        """The original on both sides."""
        return self._replace(kind="clean", plane=0, mask_plane=None, is_grey=False)

    def seed(self, settings: Settings) -> int:
        """What the damage is drawn from."""
        return derive_seed(settings.seed, self.kind, self.name)

    def mask(self, shape: Sequence[int], settings: Settings) -> np.ndarray:
        """What is physically damaged, drawn again: uint8 (H, W) for `shape`, 255 there."""
        if self.kind not in MASKS:
            return np.zeros(tuple(shape[:2]), np.uint8)
        return MASKS[self.kind](shape, np.random.default_rng(self.seed(settings)), settings)

    def comment(self, settings: Settings) -> str:
        """The degraded file's JPEG comment: which code, settings and original made it."""
        made_by = fingerprint(degradation_id(settings), self.kind, self.name, self.content)
        return f"degraded by restoration_utils, {made_by}"

    def is_done(self, settings: Settings) -> bool:
        """Whether the degraded file is there, made of this very original, as it would be now."""
        with contextlib.suppress(OSError), Image.open(self.degraded) as image:
            return image.info.get("comment") == self.comment(settings).encode()
        return False


def plan_pairs(faces: Faces, copies: Path, settings: Settings) -> list[Pair]:
    """All originals' pairs, the kinds of one side by side; reads each for its fingerprint."""

    def content_of(path: Path) -> str:
        with contextlib.suppress(OSError):
            return fingerprint(path.read_bytes())
        return ""

    originals = [*zip(faces.names, faces.files), *((f"scenes/{path.name}", path) for path in faces.scenes)]
    stems = [PurePosixPath(name).stem.encode()[:200].decode(errors="ignore") for name, _ in originals]
    count, pairs = Counter(map(str.casefold, stems)), []
    contents = in_parallel(content_of, [path for _, path in originals])
    for number, ((name, path), stem, content) in enumerate(zip(originals, stems, contents)):
        unique = stem if count[stem.casefold()] == 1 else f"{stem}-{fingerprint(name)}"  # a.jpg, a.png and b/a.jpg
        is_scene = number >= len(faces.names)
        pairs += [Pair(k, name, content, path, copies / f"{unique}_{k}.jpg", is_scene) for k in settings.kinds]
    return pairs


def _check_space(originals: Sequence[Path], folder: Path, settings: Settings) -> None:
    """OSError before the work begins if the degraded images will not fit on the disk.

    That is judged by some originals.
    """
    pixels = []  # a noisy one takes about 1.7 bytes of JPEG for each, the others 0.5
    for path in originals[:: max(1, len(originals) // 50)]:
        with contextlib.suppress(Exception), Image.open(path) as image:
            pixels.append(image.width * image.height)
    needed = len(originals) * (3.2 * float(np.mean(pixels or 0)) + math.prod(stored_shape(settings)))
    room = shutil.disk_usage(folder).free
    if folder.parent.parts[-2:] == ("kaggle", "working"):  # Kaggle keeps 20 GB of it, however large the disk is
        room = min(room, 20 * 10**9 - sum(p.stat().st_size for p in folder.parent.rglob("*") if p.is_file()))
    if needed > room:
        what = f"the degraded images of {counted(len(originals), 'original')} need about {needed / 1e9:.1f} GB"
        remedy = "free some, or use fewer originals (max_faces in the settings)"
        raise OSError(f"{what}, {folder} has room for {room / 1e9:.1f}; {remedy}")


class DegradeReport(NamedTuple):
    """What `degrade_folder` did: degraded now, found done, left out and why; and the pairs."""

    made: int
    kept: int
    left_out: dict[str, str]
    pairs: list[Pair]

    def __str__(self) -> str:
        done = f"{counted(self.made, 'original')} degraded now, {self.kept} already done"
        done = done if self.made else f"{counted(self.kept, 'original')}, already done"
        done += "\nleft out:" if self.left_out else ""
        return "\n  ".join([done, *(f"{name}: {reason}" for name, reason in self.left_out.items())])


def degrade_folder(
    faces: Faces, folder: Path, settings: Settings, workers: int = 0, attached: Sequence[Path] = ()
) -> DegradeReport:
    """Writes the degraded versions of every original to `folder`, in parallel.

    Every file says in its JPEG comment what made it; what is there and right is not made again.
    OSError if the disk is too full, ValueError if no original can be read, RuntimeError if another
    run is writing to the folder.
    """

    def where_done(pair: Pair) -> Pair:
        elsewhere = (pair._replace(degraded=place / pair.degraded.name) for place in attached)
        return pair if pair.is_done(settings) else next((p for p in elsewhere if p.is_done(settings)), pair)

    planned = [where_done(pair) for pair in plan_pairs(faces, folder, settings)]
    originals = [list(same) for _, same in itertools.groupby(planned, lambda pair: pair.name)]
    todo = [pairs for pairs in originals if not all(pair.is_done(settings) for pair in pairs)]
    failed = {}

    def work(pairs: list[Pair]) -> str:
        try:
            image = read_image(pairs[0].original)
            for pair in (pair for pair in pairs if not pair.is_done(settings)):
                degraded = degrade(image, pair.kind, np.random.default_rng(pair.seed(settings)), settings)
                write_image(pair.degraded, degraded, settings.jpeg_quality, pair.comment(settings))
        except ValueError as error:
            return str(error).removeprefix(f"{pairs[0].original}: ")
        return ""

    if todo:
        with alone_in(folder):
            _check_space([pairs[0].original for pairs in todo], folder, settings)
            reasons = in_parallel(work, todo, "degrading", "original", workers)
            failed = {pairs[0].name: reason for pairs, reason in zip(todo, reasons) if reason}
    pairs = [pair for pair in planned if pair.name not in failed]
    if all(pair.is_scene for pair in pairs):
        raise ValueError("\n  ".join(["no original could be read:", *(f"{n}: {why}" for n, why in failed.items())]))
    return DegradeReport(len(todo) - len(failed), len(originals) - len(todo), {**faces.left_out, **failed}, pairs)


# ====== Data ======================================================================================


def prepare_pairs(faces: Faces, places: Places, settings: Settings) -> list[Pair]:
    """The pairs of every readable original, degraded first if need be (it says so), and stored."""
    attached = sorted(places.attached.rglob("fakefaces_degraded")) if places.attached else []  # used where still right
    report = degrade_folder(faces, places.degraded, settings, attached=attached)
    print(f"Degraded images: {report}")
    if (count := len({pair.name for pair in report.pairs if not pair.is_scene})) < 50 and settings.profile != "smoke":
        print(f"NOTE: {counted(count, 'original')} will not teach much: 200 are enough to see something happen")
    return store_images(report.pairs, places, settings)


STORE_VERSION = 2  # to be raised when in_one_tone or draw_views do something else


def stored_shape(settings: Settings) -> tuple[int, ...]:
    """Of one original in the store: views (whole, windows), planes, 256, 256.

    The planes are RGB of it and of every kind, and the masks.
    """
    masks = sum(kind in MASKS for kind in settings.kinds)
    return 1 + settings.windows, 3 * (1 + len(settings.kinds)) + masks, IMAGE_SIZE, IMAGE_SIZE


def draw_views(size: tuple[int, int], settings: Settings, rng: np.random.Generator) -> list[tuple[float, ...]]:
    """Which parts of a picture of `size` (width, height) are trained on: boxes (left, top, right,
    bottom).

    The whole, and square windows that are 256 px when the picture's shorter side is some size
    between 256 px and its own, half of them its own: what restoring sees.
    """
    short, views = min(size), [(0.0, 0.0, *map(float, size))]
    for _ in range(settings.windows):
        scaled = rng.choice((short, log_uniform(rng, IMAGE_SIZE, max(short, IMAGE_SIZE + 1))))
        side = min(short, IMAGE_SIZE * short / scaled)
        left, top = rng.uniform(0, 1, 2) * (size[0] - side, size[1] - side)
        views.append((left, top, left + side, top + side))
    return views


def store_images(pairs: Sequence[Pair], places: Places, settings: Settings) -> list[Pair]:
    """Reads all images of the pairs, once and in parallel, into one file in the outputs, and says
    in each pair where.

    `pairs` as `plan_pairs` has them: the kinds of an original side by side, none missing. The file,
    an array, uint8 (originals, views, planes, 256, 256), is mapped into memory, and may be larger.
    Its name says what it is made from.
    """
    originals = [list(same) for _, same in itertools.groupby(pairs, lambda pair: pair.name)]
    what = fingerprint(
        degradation_id(settings), settings.windows, STORE_VERSION, [(pair.name, pair.content) for pair in pairs]
    )
    store, shape = places.outputs / f"images_{IMAGE_SIZE}px_{what}.npy", (len(originals), *stored_shape(settings))

    def read(same: list[Pair]) -> bytes:
        images = []
        for number, path in enumerate([same[0].original, *(pair.degraded for pair in same)]):
            try:
                images.append(open_image(path))
            except ValueError as error:
                raise ValueError(f"{error}" + ("; or delete it: it is made again" if number else "")) from error
        if not all(pair.is_done(settings) for pair in same):
            raise ValueError(f"{same[0].degraded.parent} has been changed by another run meanwhile: run this again")
        size = images[0].size
        images = [images[0], *(without_tint(image) for image in images[1:])]
        images += [Image.fromarray(pair.mask(size[::-1], settings)) for pair in same if pair.kind in MASKS]
        planes = []
        for box in draw_views(size, settings, np.random.default_rng(derive_seed(settings.seed, "views", same[0].name))):
            for image in images:
                resized = np.asarray(image.resize(shape[-2:], Image.Resampling.BILINEAR, box))  # antialiased
                planes.append(resized.transpose(2, 0, 1) if resized.ndim == 3 else resized[None])
        return np.concatenate(planes).tobytes()

    if not store.is_file() or store.stat().st_size < math.prod(shape):
        with alone_in(places.outputs):
            for stale in places.outputs.glob(f"images_{IMAGE_SIZE}px_*.npy"):
                with contextlib.suppress(OSError):  # in use, on Windows
                    stale.unlink()
            with atomic(store) as temporary, temporary.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                file.writelines(in_parallel(read, originals, "reading", "original"))
    rows = {same[0].name: row for row, same in enumerate(originals)}
    masks = {kind: 3 * (1 + len(settings.kinds)) + i for i, kind in enumerate(k for k in settings.kinds if k in MASKS)}
    stored = []
    for pair in pairs:
        planes = {"plane": 3 * (1 + settings.kinds.index(pair.kind)), "mask_plane": masks.get(pair.kind)}
        is_grey = pair.kind == "aged" and is_black_and_white(np.random.default_rng(pair.seed(settings)))
        stored.append(pair._replace(store=store, row=rows[pair.name], **planes, is_grey=is_grey))
    return stored


def faces_id(pairs: Sequence[Pair]) -> str:
    """A short fingerprint of the faces, names and contents, in every checkpoint made from them."""
    return fingerprint(*sorted({(pair.name, pair.content) for pair in pairs if not pair.is_scene}))


class Splits(NamedTuple):
    """The pairs of both stages.

    The GAN's validation faces are among the pretraining's, so no stage trains on them.
    """

    pretrain_train: list[Pair]
    pretrain_validation: list[Pair]
    gan_train: list[Pair]
    gan_validation: list[Pair]


def split_pairs(pairs: Sequence[Pair], settings: Settings) -> Splits:
    """Splits by original, never by file: 80 / 20 % for pretraining, 90 / 10 % for the GAN, nested.

    Seeded. Copies of one photograph under several names count as one. One permutation is cut into
    three: both stages' validation, the pretraining's validation only, both stages' training. To
    train on, there are scenes and undamaged pairs, too, and the aged ones twice. ValueError for
    fewer than 2 originals.
    """
    scenes = [pair for pair in pairs if pair.is_scene]
    pairs = [pair for pair in pairs if not pair.is_scene]
    by_name = sorted(pairs, key=lambda pair: pair.name)
    contents = list(dict.fromkeys(pair.content for pair in by_name))
    both = max(1, round(settings.gan_validation * len(contents)))
    pretrain = max(both, round(settings.pretrain_validation * len(contents)))
    if pretrain >= len(contents):
        given = counted(len(contents), "original")
        raise ValueError(f"too few to split: {given}; 2 are the least, 200 enough to learn from")
    sizes = [both, pretrain - both, len(contents) - pretrain]
    thirds = random_split(contents, sizes, torch.Generator().manual_seed(settings.seed))
    third_of = {content: number for number, third in enumerate(thirds) for content in third}
    parts = [[pair for pair in pairs if third_of[pair.content] == part] for part in range(3)]
    final, middle, train = parts

    def to_train_on(faces: list[Pair]) -> list[Pair]:
        chosen = faces + scenes
        once = [pair for pair in chosen if pair.kind == settings.kinds[0]]
        clean = [pair.undamaged() for pair in once if settings.undamaged]
        again = [pair for pair in chosen if pair.kind == "aged"]  # they have the most to teach
        return chosen + clean + again

    return Splits(to_train_on(train), final + middle, to_train_on(train + middle), final)


def image_transform() -> transforms.Compose:
    """PIL image to float tensor (3, 256, 256) in [-1, 1]; antialiased bilinear, aspect not kept."""
    resize = transforms.Resize((IMAGE_SIZE, IMAGE_SIZE))
    to_range = transforms.Normalize((0.5,) * 3, (0.5,) * 3)
    return transforms.Compose([resize, transforms.ToTensor(), to_range])


class FaceRestorationGANDataset(Dataset):
    """Pairs of degraded image and original: float RGB (3, 256, 256) in [-1, 1] each, and a dict
    with the rest.

    That is `kind`, `name`; `hole`, the true mask of what is physically damaged, float (1, 256, 256)
    in [0, 1]; `whole`, all of the degraded photograph at 64 px, float (3, 64, 64). An item is asked
    for by its index, or to train with by (index, mirrored, view), view 0 being the whole. The
    pixels, from the store, are those of `image_transform`.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = list(pairs)
        self.images = np.load(self.pairs[0].store, mmap_mode="c")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, item: int | tuple[int, bool, int]) -> tuple[Tensor, Tensor, dict]:
        index, mirrored, view = item if isinstance(item, tuple) else (item, False, 0)
        pair = self.pairs[index]
        views = torch.from_numpy(self.images[pair.row])  # (1 + windows, planes, 256, 256)
        where = (view, 0), (view, pair.plane), (0, pair.plane)
        original, degraded, whole = (views[v, i : i + 3].float().div_(255).sub_(0.5).div_(0.5) for v, i in where)
        hole = torch.zeros(1, IMAGE_SIZE, IMAGE_SIZE)
        if pair.mask_plane:
            hole = views[view, pair.mask_plane, None].float().div_(255)
        if pair.is_grey:  # the photograph that comes back from a black-and-white print
            original = transforms.functional.rgb_to_grayscale(original, 3)
        if mirrored:
            degraded, original, hole, whole = (image.flip(-1) for image in (degraded, original, hole, whole))
        info = {"kind": pair.kind, "name": pair.name, "hole": hole, "whole": F.avg_pool2d(whole, 4)}
        return degraded, original, info


def to_pixels(images: Tensor) -> Tensor:
    """Networks' images (N, 3, H, W) in [-1, 1] as uint8 of the same shape, clipped and rounded."""
    return ((images.detach().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def make_loader(
    pairs: Sequence[Pair], batch: int, device: torch.device, order: Sequence[tuple[int, bool, int]] | None = None
) -> DataLoader:
    """A loader of (degraded, original, info) batches in the order given, or in that of the pairs.

    With an order, for training, batches are always full, if there are pairs enough for one.
    ValueError without any.
    """
    if not pairs:
        raise ValueError("no pairs to load: training and validation need at least one each, for every process")
    drop_last = order is not None and len(pairs) >= batch
    dataset, on_gpu = FaceRestorationGANDataset(pairs), device.type == "cuda"
    return DataLoader(dataset, batch, sampler=order, drop_last=drop_last, pin_memory=on_gpu)


def training_order(length: int, settings: Settings, stage: str, epoch: int) -> list[tuple[int, bool, int]]:
    """For an epoch, the order of the pairs, whether each is mirrored, and which view of it: (index,
    mirrored, view).

    Half of the views are the whole picture. It depends on these arguments only: the same after an
    interruption.
    """
    rng = np.random.default_rng(derive_seed(settings.seed, stage, epoch))
    order, mirrored = rng.permutation(length), rng.random(length) < settings.flip
    views = (rng.integers(max(1, 2 * settings.windows), size=length) - settings.windows + 1).clip(0, settings.windows)
    return list(zip(order.tolist(), mirrored.tolist(), views.tolist()))


# ====== Generator =================================================================================


class EncoderLayer(nn.Sequential):
    """Halves the image: LeakyReLU, convolution 4 x 4 with stride 2, batch norm.

    The first layer has no activation before it and no norm; the last has no norm, since on its map
    of 1 x 1 a batch of one image has no variance. Batch norm, because the other common choice,
    instance norm, subtracts every image's mean and with it the colour cast that is to be repaired.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        norm: type[nn.Module] | None,
        activation: bool = True,
    ) -> None:
        layers = [nn.LeakyReLU(0.2)] if activation else []
        layers.append(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=not norm))
        super().__init__(*layers, *([norm(outputs)] if norm else []))


class DecoderLayer(nn.Sequential):
    """Doubles the image: ReLU, transposed convolution, batch norm; dropout in the plain recipe.

    The convolution is 4 x 4 with stride 2.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        norm: type[nn.Module],
        dropout: float = 0.0,
    ) -> None:
        upsample = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False)
        last = [nn.Dropout(dropout)] if dropout else []
        super().__init__(nn.ReLU(), upsample, norm(outputs), *last)


def doubtless(probability: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """How far to act on a probability: not at all up to `low`, wholly from `high`."""
    return ((probability - low) / (high - low)).clamp(0, 1)


class ColorHead(nn.Module):
    """Estimates how a photograph has faded, from the whole of it, and how sure it is that it has.

    Of two ways: as prints age, by a curve for every channel (black, white, gamma), and by a loss of
    saturation S and brightness V of HSV. The numbers come from how bright, how saturated and how
    tinted the picture is where it is so least, most and in between: quantiles at 64 px. Blacks and
    whites are sought between those that are there and those that could be: how far to stretch a
    channel is a smaller question than where its black is. Without the certainty, every good picture
    would be mended a little, too: up to the first probability nothing is done, from the second all.
    """

    QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
    # for saturation and brightness, and for ageing, where a mistake costs more
    DOUBT = ((0.3, 0.6), (0.5, 0.8))

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        layers = [nn.Linear(7 * len(self.QUANTILES), hidden), nn.LeakyReLU(0.2)]
        layers += [nn.Linear(hidden, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 13)]
        self.layers = nn.Sequential(*layers)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, whole: Tensor, doubting: bool = True) -> tuple[Tensor, Tensor]:
        """Photographs of 64 px, (N, 3, 64, 64) in [-1, 1], to curves for `recolor`, (N, 11), and
        logits (N, 2).

        Not `doubting`, to learn, acts as far as it is likely.
        """
        rgb = (whole.float() + 1) / 2
        high, low = rgb.amax(1, keepdim=True), rgb.amin(1, keepdim=True)
        red, green, blue = rgb.split(1, 1)
        saturation = (high - low) / (high + 0.05)
        maps = torch.cat([rgb, high, saturation, red - green, blue - green], 1).flatten(2)
        ranks = [round(quantile * (maps.shape[2] - 1)) for quantile in self.QUANTILES]
        quantiles = maps.sort(2).values[:, :, ranks]  # (N, 7, 9)
        # in 32 bits: the whole picture depends on these few numbers
        with torch.autocast(whole.device.type, enabled=False):
            numbers = self.layers(4 * quantiles.flatten(1) - 2)  # (N, 13)
        faded = 4 * numbers[:, 11:]
        sure = torch.sigmoid(faded)
        sure = doubtless(sure, *sure.new_tensor(self.DOUBT).T) if doubting else sure
        pale, aged = sure.split(1, 1)
        stretch = torch.sigmoid(3 * numbers[:, :6])  # 3, and 2 below: learns fast
        black = aged * stretch[:, :3] * quantiles[:, :3, 1]
        white = 1 - aged * stretch[:, 3:] * (1 - quantiles[:, :3, -2])
        gamma, gains = 0.9 * torch.tanh(2 * numbers[:, 6:9]), 1.5 * torch.tanh(2 * numbers[:, 9:11])
        contrast = -(white - black).clamp(min=0.1).log()
        return torch.cat([black, contrast, aged * gamma, pale * gains], 1), faded


def recolor(images: Tensor, curves: Tensor) -> Tensor:
    """Images (N, 3, H, W), 0 is half grey, through ColorHead's curves.

    They are not clipped to [-1, 1], but to +-1.25.
    """
    black, contrast, gamma = curves[:, :9, None, None].reshape(-1, 3, 3, 1, 1).unbind(1)
    value_gain, saturation = curves[:, 9:].exp()[:, :, None, None, None].unbind(1)
    rgb = (((images + 1) / 2 - black) * contrast.exp()).clamp(min=1e-4) ** gamma.exp()
    # with V the largest channel, S times s turns each channel c into V + s (c - V)
    value = rgb.amax(1, keepdim=True)
    return (2 * value_gain * (value + saturation * (rgb - value)) - 1).clamp(-1.25, 1.25)


def local_mean(images: Tensor) -> Tensor:
    """The mean of 5 x 5 px around every pixel, of the same shape, mirrored at the edges."""
    # avg_pool2d is ten times slower on a CPU
    kernel = images.new_full((images.shape[1], 1, 5, 5), 1 / 25)
    # half a grey level counts: not with the 8 bits of bfloat16
    with torch.autocast(images.device.type, enabled=False):
        return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=images.shape[1])


def detail_of(images: Tensor) -> Tensor:
    """What the images differ from their local mean, of the same shape: grain, texture, edges."""
    return images - local_mean(images)


def block_levels(detail: Tensor) -> Tensor:
    """Root mean square of `detail`, (N, 3, H, W), in every block of 16 x 16 px, (N, blocks)."""
    power = F.avg_pool2d(detail.square().mean(1, keepdim=True), 16)
    return power.flatten(1).clamp(min=1e-12).sqrt()


def noise_level(blocks: Tensor, quantile: float = 0.1) -> Tensor:
    """A picture's noise, from its `block_levels`, (N, any number), as their value where it is
    flattest: (N, 1, 1, 1).

    Where a photograph shows nothing, what is left is its noise (block-based, Olsen 1993). Blocks
    without even half an 8-bit step of it are a border or a hole and do not count; with nothing else
    the level is 0.
    """
    counted = blocks.where(blocks > 0.5 / 127.5, torch.nan)
    return counted.nanquantile(quantile, dim=1).nan_to_num(0.0)[:, None, None, None]


def grain_unit(detail: Tensor, level: Tensor | None = None) -> Tensor:
    """What grain is counted in: images' noise level, (N, 1, 1, 1), or `level`.

    It is at least an 8-bit step.
    """
    return (noise_level(block_levels(detail)) if level is None else level).clamp(min=1 / 127.5)


class GrainHead(nn.Module):
    """Estimates the noise of every pixel, to be subtracted (residual learning: Zhang et al. 2017,
    DnCNN).

    It sees the image minus its local mean, in units of the image's own noise level: what it learns
    for one amount of noise holds for another, and it hardly touches a picture without. It starts at
    zero, and what it takes away has next to no local mean. It learns from lessons of its own
    (`grain_lesson`): in the pairs, few of which are noisy, it would be blamed for colours and
    holes, errors far larger than noise, and a decibel and a half stayed behind.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, reach in ((3, 1), (channels, 2), (channels, 1)):
            layers.append(nn.Conv2d(inputs, channels, 3, padding=reach, dilation=reach))
            layers.append(nn.LeakyReLU(0.2))  # with ReLU all died within 100 steps of a fast start
        self.features = nn.Sequential(*layers)
        self.noise = nn.Conv2d(channels + 3, 3, 3, padding=1, bias=False)
        nn.init.zeros_(self.noise.weight)

    def forward(self, scaled: Tensor) -> Tensor:
        """From an image's detail its noise, both in units of its noise level, (N, 3, H, W)."""
        scaled = scaled.clamp(-6, 6)  # what stands out further is no noise
        noise = convolve_both(self.noise, self.features(scaled), scaled)
        return 3 * detail_of(noise.float())  # 3: learns fast


def convolve_both(convolution: nn.Conv2d, features: Tensor, images: Tensor) -> Tensor:
    """What the convolution (kernel 3) makes of features and images, its further channels.

    They are not copied together.
    """
    # such copies, and gradients that are slices of them, take a sixth of a training step
    weights = convolution.weight.split([features.shape[1], images.shape[1]], 1)
    of_features = F.conv2d(features, weights[0], convolution.bias, padding=1)
    return of_features + F.conv2d(images, weights[1], padding=1)


class HoleHead(nn.Module):
    """Detects holes by what they are made of: little in a photograph is as flat, as white, as black
    or as colourful, and next to nothing but a scratch stands out from the grain in a thin line.

    These are given to it as pictures, and dilated convolutions (Yu and Koltun 2016) at half the
    size look up to 30 px far for edges and corners. A U-Net sees the same, but takes thousands of
    steps to find out what to look for.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3 + 3 + 3 + 3, channels, 4, stride=2, padding=1)]
        for reach in (1, 2, 4, 8):
            layers.append(nn.LeakyReLU(0.2))
            layers.append(nn.Conv2d(channels, channels, 3, padding=reach, dilation=reach))
        self.features = nn.Sequential(*layers, nn.LeakyReLU(0.2))
        self.hole = nn.Conv2d(channels, 4, 3, padding=1)  # a half-size pixel stands for 2 x 2
        nn.init.zeros_(self.hole.weight)
        nn.init.constant_(self.hole.bias, -1.0)  # holes are rare

    def forward(self, degraded: Tensor, detail: Tensor, scaled: Tensor) -> Tensor:
        """Logits of the probability that a pixel was covered, (N, 1, 256, 256).

        From an image, its detail, and that in units of the noise level, (N, 3, 256, 256) each.
        """
        flat = 1 - 20 * local_mean(detail.abs())
        white, black = degraded.amin(1, keepdim=True) - 0.9, -degraded.amax(1, keepdim=True) - 0.9
        colorful = (detail - detail.mean(1, keepdim=True)).abs()  # hair has one colour
        speckle = local_mean(colorful).mean(1, keepdim=True)
        clues = [flat, 10 * white, 10 * black, 10 * speckle - 1, scaled / 4]
        clues = torch.cat(clues, 1).clamp(-1, 1)
        features = self.features(torch.cat([degraded, clues], 1))  # (N, C, 128, 128)
        return 3 * F.pixel_shuffle(self.hole(features).float(), 2)  # 3: learns fast


def fill_from_around(images: Tensor, known: Tensor) -> Tensor:
    """Spreads what is known into what is not, smoothly, whatever its size (pull-push: Gortler et
    al. 1996).

    Known pixels are averaged on a pyramid down to one pixel; on the way back up, every pixel keeps
    its value as far as it is `known`, (N, 1, 256, 256) in [0, 1], and takes the rest from the
    coarser level.
    """
    levels = [(images * known, known)]
    while levels[-1][1].shape[-1] > 1:
        values, weight = (F.avg_pool2d(level, 2) for level in levels[-1])
        trusted = (4 * weight).clamp(max=1)  # one known pixel of four will do: none is nearer
        levels.append((values / weight.clamp(min=1e-6) * trusted, trusted))
    spread = levels[-1][0] / levels[-1][1].clamp(min=1e-6)  # (N, 3, 1, 1)
    for values, weight in reversed(levels[:-1]):
        coarser = F.interpolate(spread, scale_factor=2.0, mode="bilinear", align_corners=False)
        spread = values + (1 - weight) * coarser
    return spread  # (N, 3, 256, 256)


class Restoration(NamedTuple):
    """What the generator thinks: `restored` is its output, by `hole` its detector is taught."""

    restored: Tensor  # (N, 3, 256, 256) in [-1, 1]
    hole: Tensor | None = None  # (N, 1, 256, 256), logits of the probability that a pixel is physically damaged


class OutputLayer(nn.Module):
    """Brings 128 x 128 features to the 256 x 256 image, with the recoloured input itself as one
    more skip.

    It starts close to the identity and learns to depart from it: less grain, a correction of every
    pixel. Into the holes that it detects goes what is around them, and nothing learnt: short
    trainings paint worse than that. The correction is added inside Tanh, so the output lies
    in [-1, 1] whatever the weights.
    """

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(inputs, channels, 4, stride=2, padding=1)
        self.mix = nn.Conv2d(channels + 3, channels, 3, padding=1)
        self.propose = nn.Conv2d(channels + 3, 3 + 1, 3, padding=1)  # correction, hole
        self.grain, self.detect = GrainHead(channels), HoleHead(channels)
        with torch.no_grad():
            self.propose.weight[:3] *= 0.1
            self.propose.bias.zero_()

    def propose_changes(self, features: Tensor, recolored: Tensor) -> Sequence[Tensor]:
        """A correction of every pixel, (N, 3, 256, 256), and a part of the logits of holes.

        The latter are (N, 1, 256, 256). From the last decoder layer with its skip,
        (N, inputs, 128, 128), and the network's own input.
        """
        upsampled = F.relu(self.upsample(F.relu(features)))  # (N, C, 256, 256)
        mixed = F.relu(convolve_both(self.mix, upsampled, recolored))  # (N, C, 256, 256)
        proposed = convolve_both(self.propose, mixed, recolored)
        return proposed.float().split([3, 1], 1)  # from here on in 32 bits

    def find_holes(
        self,
        recolored: Tensor,
        detail: Tensor,
        unit: Tensor,
        proposed: Tensor,
    ) -> Tensor:
        """Logits of the probability that a pixel is covered, (N, 1, 256, 256); `proposed` is the
        part of them above.

        `detail` is `detail_of` the images, `unit` their `grain_unit`.
        """
        return proposed + self.detect(recolored, detail, detail / unit)

    def correct(
        self,
        recolored: Tensor,
        detail: Tensor,
        unit: Tensor,
        correction: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Images without their grain, then with the correction, too.

        Both are (N, 3, 256, 256) in [-1, 1].
        """
        limit = 1 - 0.5 / 255  # a quarter of an 8-bit step inside Tanh's open range
        with torch.no_grad():  # learnt from lessons of its own
            without_grain = (recolored - unit * self.grain(detail / unit)).clamp(-limit, limit)
        return without_grain, torch.tanh(torch.atanh(without_grain) + correction)

    def forward(self, features: Tensor, recolored: Tensor) -> Restoration:
        """Everything for images that are seen whole, from what `propose_changes` takes."""
        correction, hole = self.propose_changes(features, recolored)
        detail = detail_of(recolored)  # (N, 3, 256, 256)
        unit = grain_unit(detail)  # (N, 1, 1, 1)
        hole = self.find_holes(recolored, detail, unit, hole)
        without_grain, kept = self.correct(recolored, detail, unit, correction)
        covered = torch.sigmoid(hole)
        if not self.training:  # wider by a pixel: its edge is no detail to keep
            covered = doubtless(F.max_pool2d(covered, 3, 1, 1), 0.4, 0.6)
        # what is rather hole than not is no source to fill from
        known = (1 - 2 * covered.detach()).clamp(min=0)
        surroundings = fill_from_around(without_grain, known)  # (N, 3, 256, 256)
        return Restoration(kept + covered * (surroundings - kept), hole)


def check_images(images: Tensor, who: str) -> None:
    """Raises ValueError unless `images` is a batch (N, 3, 256, 256)."""
    if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"{who} takes images of shape (N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), not {tuple(images.shape)}")


def whole_gradient(features: Tensor) -> Tensor:
    """The same features, whose gradient is copied together: gaps slow batch norm.

    It is a slice of a concatenation's gradient.
    """
    if features.requires_grad:
        features.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
    return features


class UNetGenerator(nn.Module):
    """U-Net of Isola et al. 2017 (pix2pix): 8 encoder layers from 256 x 256 to 1 x 1, 7 decoder
    layers back to 128 x 128, each with the encoder's map of its size as a skip, and an output layer
    to 256 x 256 through Tanh.

    Degraded RGB (N, 3, 256, 256) in [-1, 1] to restored RGB of the same shape and range. ValueError
    for other shapes. `plain` is the recipe as commonly written: instance norm, dropout 0.5 in three
    decoder layers, no heads.
    """

    def __init__(
        self,
        width: int = Settings.width,
        full_resolution_channels: int = Settings.full_resolution_channels,
        plain: bool = Settings.plain,
        sure: float = Settings.sure,
    ) -> None:
        super().__init__()
        widths = [width * factor for factor in (1, 2, 4, 8, 8, 8, 8, 8)]
        norm, dropout = (nn.InstanceNorm2d, 0.5) if plain else (nn.BatchNorm2d, 0.0)
        self.encoder = nn.ModuleList([EncoderLayer(3, widths[0], None, activation=False)])
        for number in range(1, 8):
            normed = norm if number < 7 else None
            self.encoder.append(EncoderLayer(widths[number - 1], widths[number], normed))
        self.decoder = nn.ModuleList()
        for number in range(7, 0, -1):
            inputs = widths[number] if number == 7 else 2 * widths[number]
            dropped = dropout if number > 4 else 0.0
            self.decoder.append(DecoderLayer(inputs, widths[number - 1], norm, dropped))
        self.plain, self.sure = plain, sure
        if not plain:
            self.color = ColorHead()
            self.output = OutputLayer(2 * widths[0], full_resolution_channels)
        else:  # every pixel is drawn anew from 128 x 128 features; there are no heads
            upsample = nn.ConvTranspose2d(2 * widths[0], 3, 4, stride=2, padding=1)
            self.output = nn.Sequential(nn.ReLU(), upsample, nn.Tanh())

    def forward(self, degraded: Tensor, whole: Tensor | None = None) -> Tensor:
        """The restored images only."""
        return self.restore(degraded, whole).restored

    def restore(self, degraded: Tensor, whole: Tensor | None = None) -> Restoration:
        """The restored images together with the detected holes.

        For windows of photographs, `whole` are those at 64 px, (N, 3, 64, 64), from which the
        colours are judged. That is learnt from lessons of its own (`color_lesson`) and not from
        here.
        """
        check_images(degraded, "the generator")
        if self.plain:
            return Restoration(self.output(self.features(degraded)).float())
        with torch.no_grad():
            curves, _ = self.color(F.avg_pool2d(degraded, 4) if whole is None else whole)
        recolored = recolor(degraded, curves)
        return self.output(self.features(recolored), recolored)

    def features(self, images: Tensor) -> Tensor:
        """What encoder and decoder make of images: (N, 2W, 128, 128)."""
        x, maps = images, []
        for layer in self.encoder:
            x = layer(x)
            maps.append(x)  # (N, W, 128, 128), (N, 2W, 64, 64), ... (N, 8W, 1, 1)
        maps.pop()  # the bottleneck is no skip
        for layer in self.decoder:
            # (N, 16W, 2, 2) to (N, 2W, 128, 128)
            x = torch.cat([whole_gradient(y) for y in (layer(x), maps.pop())], 1)
        return x

    def find_damage(self, recolored: Tensor) -> Tensor:
        """Logits of the probability that a pixel of a photograph's windows is damaged.

        Their shape is (N, 1, 256, 256).
        """
        detail, features = detail_of(recolored), self.features(recolored)
        _, proposed = self.output.propose_changes(features, recolored)
        return self.output.find_holes(recolored, detail, grain_unit(detail), proposed)

    def mend(self, recolored: Tensor, level: Tensor) -> Tensor:
        """A photograph's windows, all but colours and holes, which are mended: (N, 3, 256, 256) in
        [-1, 1].

        `level` is the noise of the whole photograph, (1, 1, 1, 1): a window full of grass cannot
        tell.
        """
        detail, features = detail_of(recolored), self.features(recolored)
        correction, _ = self.output.propose_changes(features, recolored)
        return self.output.correct(recolored, detail, grain_unit(detail, level), correction)[1]


def build_generator(settings: Settings) -> UNetGenerator:
    """A new generator, its weights drawn from the settings' seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "generator"))
        return UNetGenerator(settings.width, settings.full_resolution_channels, settings.plain, settings.sure)


# ====== Discriminator =============================================================================


class PatchGANDiscriminator(nn.Module):
    """Judges pairs patch by patch (Isola et al. 2017): is this candidate the original that belongs
    to this degraded?

    Two RGB batches (N, 3, 256, 256) in [-1, 1] to scores (N, 1, 30, 30), each from 70 x 70 px. No
    sigmoid: under the least-squares loss with targets 1 and 0 the best score already is the
    probability that the patch is real (Mao et al. 2017). ValueError for other shapes.

    It sees the candidate and, ten times magnified, what that changes about the degraded image, but
    for four grey levels: shown how much noise was taken away, it taught the generator to take more,
    and texture with it. No norm: in a batch of only real or only fake pairs it takes away the
    difference. `plain`: the pair as it is, batch norm.
    """

    def __init__(
        self,
        width: int = Settings.discriminator_width,
        plain: bool = Settings.plain,
    ) -> None:
        super().__init__()
        self.plain = plain
        layers: list[nn.Module] = [nn.Conv2d(6, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for inputs, outputs, stride in ((1, 2, 2), (2, 4, 2), (4, 8, 1)):
            convolution = inputs * width, outputs * width, 4, stride, 1
            layers.append(nn.Conv2d(*convolution, bias=not plain))
            layers += [nn.BatchNorm2d(outputs * width)] if plain else []
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, stride=1, padding=1))

    def forward(self, degraded: Tensor, candidate: Tensor) -> Tensor:
        """Scores of the candidates, which are restored or original."""
        check_images(degraded, "the discriminator")
        check_images(candidate, "the discriminator")
        seen = degraded if self.plain else 10 * F.softshrink(candidate - degraded, 4 / 127.5)
        scores = self.layers(torch.cat([seen, candidate], 1))  # (N, 6, 256, 256) to (N, 1, 30, 30)
        return scores.float()


def build_discriminator(settings: Settings) -> PatchGANDiscriminator:
    """A new discriminator, its weights drawn from the settings' seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "discriminator"))
        return PatchGANDiscriminator(settings.discriminator_width, settings.plain)


# ====== Several processes =========================================================================


NOTICED_AFTER = timedelta(seconds=20)  # that a process hangs; all are killed 30 seconds later at the latest


class Team(NamedTuple):
    """The processes that train together, one for each GPU; alone, this one.

    DistributedDataParallel (Li et al. 2020) averages their gradients. All of them know and decide
    the same, so all must come through every method here equally often; each computes its share of
    every batch, and only the first, of `rank` 0, writes and prints.
    """

    rank: int = 0
    size: int = 1
    group: Any = None  # of torch.distributed; its operations wait for NOTICED_AFTER at most

    def share_batches(self, items: Sequence, batch: int) -> tuple[Sequence, int]:
        """This process's items of a sequence that is read in batches, and how many are a batch.

        Batches are as large as ever, all shares taken together. If there are too few items for one,
        every process gets them all, and computes the same as the others.
        """
        if self.size == 1 or len(items) < batch:
            return items, batch
        return items[: len(items) // batch * batch][self.rank :: self.size], batch // self.size

    def share_items(self, items: Sequence) -> Sequence:
        """This process's share of items that are only looked at: no item twice, none left out.

        If there are too few for all, every process gets them all, which leaves a mean as it is.
        """
        return items[self.rank :: self.size] if len(items) >= self.size else items

    def share_rows(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows of tensors that all have; all of them if they cannot be shared."""
        even = all(len(tensor) % self.size == 0 for tensor in tensors.values())
        return {name: tensor[self.rank :: self.size] if even else tensor for name, tensor in tensors.items()}

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def from_first(self, value: Any) -> Any:
        """What the first process gives here, for all of them; they wait for it as in `wait`."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def alone_in(self, folder: Path) -> contextlib.AbstractContextManager:
        """`alone_in` for all of them, by the first."""
        return contextlib.nullcontext() if self.rank else alone_in(folder)

    def wait(self) -> None:
        """Waits until all are here, an hour if need be: the first may write to a slow disk."""
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The first process goes through this block before the others, who may need its files."""
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()
        self.wait()  # the first does not run ahead, either

    def wrap(self, network: nn.Module, **options: Any) -> nn.Module:
        """The network to train with: after `backward` all have the mean of their gradients.

        On GPUs batch norm is over the whole batch (SyncBatchNorm); on CPUs, for which there is
        none, over this process's share, and the first one's statistics are kept.
        """
        if self.size == 1:
            return network
        if next(network.parameters()).is_cuda:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network, self.group)
        options |= {"process_group": self.group, "broadcast_buffers": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the option has another name in the newest PyTorch
            return DistributedDataParallel(network, **options)

    def unite(self, network: nn.Module) -> None:
        """Gives all processes the first one's batch-norm statistics."""
        for buffer in network.buffers() if self.size > 1 else ():
            dist.broadcast(buffer, 0, self.group)


ALONE = Team()


class Computation(nn.Module):
    """Any function of a network as a `forward`, the only thing that DistributedDataParallel hooks.

    The project's generator has more to train with than its `forward`: `restore`, and its heads.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, function: Callable, *arguments: Any) -> Any:
        """`function` of the network."""
        return function(self.network, *arguments)


def compute(function: Callable, network: nn.Module, *arguments: Any) -> Any:
    """`function(network, *arguments)`, also for a network within a `Computation`."""
    if isinstance(network, Computation | DistributedDataParallel):
        return network(function, *arguments)
    return function(network, *arguments)


def join_team(device: torch.device) -> Team:
    """The processes that `torch.distributed.run` has started, this one among them; or it alone.

    They may have to wait for the first, which prepares the data, but not for more than an hour.
    """
    rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if size == 1:
        return Team()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    return Team(rank, size, dist.new_group(timeout=NOTICED_AFTER))


# ====== Checkpoints ===============================================================================

CHECKPOINT_FORMAT = "face-restoration-6"
MAY_CHANGE = {"pretrain_epochs", "gan_epochs", "patience", "checkpoint_every", "sample_every", "sample_faces"}
MAY_CHANGE |= {"time_budget", "sure"}  # settings with which a run may go on that began with others
GAN_ONLY = {"gan_batch", "generator_lr", "discriminator_lr", "gan_betas", "gan_lr_step", "l1_weight", "shift"}
GAN_ONLY |= {"discriminator_width", "every_second_batch_after"}  # settings that pretraining does not look at
# for who has numbers that are not finite
ADVICE = "The epoch before is kept. Look for damaged images, or start anew elsewhere with a lower learning rate"


class Run(NamedTuple):
    """What a training run is made of beside the networks: settings, places, device and faces."""

    settings: Settings
    places: Places
    device: torch.device
    faces: str  # faces_id of all pairs
    begun_from: str = ""  # weights_id of the generator that the GAN training starts from; empty: not looked at
    team: Team = ALONE

    @property
    def outputs(self) -> Path:
        """Where everything is written."""
        return self.places.outputs


def not_finite(content: Mapping[str, Any]) -> str:
    """Names of a checkpoint's networks with a weight that is not a finite number; or nothing."""
    names = sorted(content.keys() & {"generator", "discriminator", "average"})
    return ", ".join(n for n in names if not all(tensor.isfinite().all() for tensor in content[n].values()))


def save_checkpoint(path: Path, run: Run, **content: object) -> None:
    """Saves tensors, numbers, strings and containers of them atomically.

    The settings and faces that made them are saved, too.
    """
    if bad := not_finite(content):
        raise FloatingPointError(f"{path.name} is not written: weights of the {bad} are not finite. {ADVICE}")
    made_by = {"format": CHECKPOINT_FORMAT, "settings": asdict(run.settings), "faces": run.faces}
    with atomic(path) as temporary:
        try:
            torch.save(made_by | {"begun_from": run.begun_from} | content, temporary)
        except RuntimeError as error:
            if "inline_container" not in str(error) and "StreamWriter" not in str(error):
                raise
            raise OSError(f"torch could not write: {str(error).splitlines()[0]}") from error  # a full disk, say


def load_checkpoint(path: str | Path) -> dict:
    """Loads one of our checkpoints to the CPU, wherever it comes from. No code in it is ever run
    (`weights_only`).

    FileNotFoundError if there is none, ValueError if it is damaged (checksums), not ours, or has
    weights not finite.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; notebooks 04 and 05 write them, to OUTPUT_DIR if set")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load checks no checksums
            if entry := archive.testzip():
                raise ValueError(f"the checksum of {entry} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
            raise ValueError(f"its format is not {CHECKPOINT_FORMAT}")
        if bad := not_finite(content):
            raise ValueError(f"weights of the {bad} are not finite")
    except Exception as error:  # whatever the unpickler or the zip reader trips over
        reason = {"BadZipFile": "no checkpoint file, or cut short", "UnpicklingError": "holds more than numbers"}
        reason = reason.get(type(error).__name__, str(error).splitlines()[0] if str(error) else repr(error))
        remedy = "If a notebook of yours has written it, delete it and run that again"
        raise ValueError(f"{path}: not a checkpoint of this project, or damaged ({reason}). {remedy}") from error
    return content


def load_generator(path: str | Path, device: torch.device | str = "cpu") -> UNetGenerator:
    """The generator in `path`, at its trained width, in eval mode; raises as `load_checkpoint`."""
    content = load_checkpoint(path)
    if "generator" not in content:
        raise ValueError(f"{path}: a checkpoint of this project, but without a generator")
    try:
        generator = build_generator(Settings(**content["settings"]))
        generator.load_state_dict(content["generator"])
    except (TypeError, RuntimeError) as error:  # settings of another version; weights of another width or architecture
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: damaged, or made by another version of this project ({reason})") from error
    return generator.to(device, memory_format=torch.channels_last).eval()


def weights_id(weights: Mapping[str, Tensor]) -> str:
    """A short fingerprint of a network's state_dict."""
    return fingerprint(*weights, *(tensor.cpu().contiguous().numpy().tobytes() for tensor in weights.values()))


def find_artifact(name: str, run: Run) -> Path | None:
    """The file of that name in the outputs, else the newest in anything attached on Kaggle."""
    if (run.outputs / name).is_file():
        return run.outputs / name
    attached = run.places.attached.rglob(name) if run.places.attached else ()
    return max(attached, key=lambda path: path.stat().st_mtime, default=None)


def require_artifact(name: str, run: Run, notebook: str) -> Path:
    """As `find_artifact`, or FileNotFoundError: which notebook makes it, where it looked."""
    looked = " and ".join(str(folder) for folder in (run.outputs, run.places.attached) if folder)
    if path := find_artifact(name, run):
        return path
    raise FileNotFoundError(f"{name} is missing: run notebook {notebook} first, it writes it (looked in {looked})")


def check_same_run(path: Path, content: Mapping, run: Run, ignore: Iterable[str] = ()) -> None:
    """ValueError naming what differs if other faces or settings made a checkpoint.

    MAY_CHANGE and `ignore` may differ.
    """
    now = asdict(run.settings) | {"faces": run.faces, "pretrained weights": run.begun_from}
    then = content["settings"] | {"faces": content["faces"], "pretrained weights": content["begun_from"]}
    looked_at = (now.keys() | then.keys()) - MAY_CHANGE.union(ignore, [] if run.begun_from else ["pretrained weights"])
    differ = [f"{n} was {then.get(n)!r}, is {now.get(n)!r}" for n in sorted(looked_at) if now.get(n) != then.get(n)]
    if differ:
        raise ValueError(
            f"{path} was made by another run: {'; '.join(differ)}. It is kept as it is. Go back to those settings and "
            "faces (is FACES_DIR right?), choose another folder with OUTPUT_DIR, or move the .pth files there away (on "
            "Kaggle: detach them) to start anew; for other pretrained weights, gan_last and face_restoration_* only"
        )


# ====== Training ==================================================================================


class Precision:
    """Mixed precision (Micikevicius et al. 2018): convolutions in 16 bits, weights, losses and the
    rest in 32.

    bfloat16 where the hardware has it, float16 on other GPUs (a T4), where the loss is scaled up,
    or gradients would vanish below the smallest number. On CPUs only with AVX-512's bfloat16, and
    if PyTorch is new enough to say so.
    """

    def __init__(self, device: torch.device, wanted: bool = True) -> None:
        self.device, self.dtype = device.type, None
        if wanted and device.type == "cuda":
            whole = torch.cuda.is_bf16_supported(including_emulation=False)
            self.dtype = torch.bfloat16 if whole else torch.float16
        elif wanted and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"):
            self.dtype = torch.bfloat16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.before: list[tuple[Tensor, Tensor]] = []  # the buffers of networks, and what they held

    def autocast(self, network: nn.Module) -> torch.autocast:
        """The context for what the network computes forwards."""
        if self.scaler.is_enabled():
            self.before += [(buffer, buffer.clone()) for buffer in network.buffers()]
        return torch.autocast(self.device, self.dtype, enabled=self.dtype is not None)

    def update(self, optimizer: Optimizer, loss: Tensor) -> None:
        """One optimizer step down the gradients of `loss`; none if float16's are not finite."""
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            if group.get("largest_norm"):  # see adam; a lone wild batch would undo hundreds
                nn.utils.clip_grad_norm_(group["params"], group["largest_norm"])
        self.scaler.step(optimizer)
        self.scaler.update()
        self.keep_finite()
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1e-3:  # step after step had to be left out
            raise FloatingPointError(f"the gradients are not finite. {ADVICE}")

    def keep_finite(self) -> None:
        """If float16 overflowed on the way forwards, puts batch norm's statistics back."""
        while self.before:
            buffer, old = self.before.pop(0)
            buffer.copy_(torch.where(buffer.isfinite().all(), buffer, old))


class Means:
    """Means over images of named losses.

    Every batch counts by its size, so a short last one does not distort them.
    """

    def __init__(self, where: str, precision: Precision | None = None) -> None:
        self.where, self.batches, self.sums, self.counts = where, 0, Counter(), Counter()
        self.scaled = precision is not None and precision.scaler.is_enabled()

    def add(self, losses: Mapping[str, Tensor], images: int) -> None:
        """Counts a batch's mean losses for its `images`.

        The sums stay on the device, but for a look at every twentieth batch.
        """
        self.batches += 1
        for name, loss in losses.items():
            counts = loss.isfinite() | (not self.scaled)  # what overflows in float16 teaches nothing
            self.sums[name] = self.sums[name] + torch.where(counts, loss.detach().double(), 0.0) * images
            self.counts[name] = self.counts[name] + counts * images
        if self.batches % 20 == 0:
            self.result()

    def result(self, team: Team = ALONE) -> dict[str, float]:
        """The means so far, in a team over all its processes.

        Raises FloatingPointError, saying where, if one is not finite.
        """
        sums = torch.stack([*self.sums.values()])
        counts = torch.stack([torch.as_tensor(self.counts[name]).to(sums) for name in self.sums])
        means = dict(zip(self.sums, (team.total(sums) / team.total(counts)).tolist()))
        if bad := [name for name, mean in means.items() if not math.isfinite(mean)]:
            raise FloatingPointError(f"{self.where}: the loss {', '.join(bad)} is not finite. {ADVICE}")
        return means


KAGGLE_INPUT = Path("/kaggle/input")  # on the real Kaggle, whose sessions end after 12 hours


def session_start(places: Places) -> float:
    """Since when hours count, in seconds since 1970: on Kaggle since the machine's start.

    Elsewhere since this process's, or that of the notebook that has started it.
    """
    own = psutil.Process(1 if places.attached == KAGGLE_INPUT else None).create_time()
    return float(os.environ.get(SESSION, own))


class Stage:
    """What both trainings share: going on where the last run stopped, seeds, the time budget,
    progress and saving.

    `state` is everything that decides how the training goes on, by name; it is saved as
    `<name>_last.pth` after every epoch, and the one before stays as `<name>_previous.pth`. An epoch
    depends on its number and on the state before it only, so a run that was stopped ends with the
    same bits (on a CPU: CUDA adds up in no fixed order).
    """

    def __init__(self, name: str, epochs: int, batch: int, train: list[Pair], run: Run, state: dict[str, Any]) -> None:
        self.name, self.total, self.batch, self.train, self.run, self.state = name, epochs, batch, train, run, state
        self.per_epoch = max(1, len(train) // batch)
        self.history: list[dict] = []  # a dict for each epoch
        self.last, self.previous = (run.outputs / f"{name}_{which}.pth" for which in ("last", "previous"))

    def go_on(self, result: Path, ignore: Iterable[str] = ()) -> None:
        """Loads the newest checkpoint into the state, if there is one; if it is damaged, the one
        before it.

        One that is only attached (an earlier Kaggle session) is copied to the outputs first, with
        what lies beside it. Raises ValueError if another run made what is there, the stage's
        `result` included.
        """
        if result.is_file() and not self.last.is_file():
            check_same_run(result, load_checkpoint(result), self.run, ignore)
        if not (found := find_artifact(self.last.name, self.run)):
            return
        newest = found
        try:
            content = load_checkpoint(newest)
        except ValueError as error:
            if not (newest := found.with_name(self.previous.name)).is_file():
                raise
            print(f"WARNING: {error}. Going on from {newest.name}, an epoch earlier")
            content = load_checkpoint(newest)
        check_same_run(found, content, self.run, ignore)
        if found != self.last:
            print(f"{self.name}: going on from what is attached in {found.parent}")
            for path in sorted(found.parent.glob("[!.]*.*")):
                target = self.run.outputs / path.name
                needed = path.suffix in (".pth", ".png", ".json") and not target.exists()
                if target != self.last and (needed or target == result):
                    copy_file(path, target)
            copy_file(newest, self.last)  # at the end: once it is there, nothing is copied any more
        elif newest != found:
            os.replace(newest, found)  # else the next checkpoint would put the damaged one in its place
        for name, holder in self.state.items():  # each brings it to its own device
            if content[name]:  # a scaler's state is empty on a device that needs none
                holder.load_state_dict(content[name])
        self.history = content["history"]
        print(f"{self.name}: {len(self.history)} of {counted(self.total, 'epoch')} already done")
        if self.run.team.rank == 0:  # killed just before it was written?
            write_json(self.run.outputs / f"{self.name}_history.json", self.history)

    def epochs(self) -> Iterator[int]:
        """Numbers of the epochs left that the time budget allows, each with its random state."""
        session, budget = session_start(self.run.places), self.run.settings.time_budget  # budget: hours
        if budget is None:
            budget = 11.0 if self.run.places.attached == KAGGLE_INPUT else math.inf
        done = len(self.history)
        if self.run.team.from_first(done) != done:
            raise ValueError(
                f"{self.last} is not the same file for all processes: OUTPUT_DIR must lie where all see it"
            )
        with progress(self.name, self.total * self.per_epoch, "batch", done * self.per_epoch) as self.bar:
            for epoch in range(done + 1, self.total + 1):
                left = self.run.team.from_first(3600 * budget - (time.time() - session))
                if left <= 0 and not self.history:
                    raise TimeoutError(f"{self.name}: {budget:g} hours are over; run this in a new session")
                if left <= (self.history[-1]["seconds"] if epoch > done + 1 else 0):
                    print(f"{self.name}: stopped after epoch {epoch - 1} of {self.total}, {budget:g} hours are over. "
                          "Run this again to go on (on Kaggle, attach this output)")  # fmt: skip
                    return
                self.epoch, self.started = epoch, time.perf_counter()
                torch.manual_seed(derive_seed(self.run.settings.seed, self.name, self.epoch) + self.run.team.rank)
                yield epoch

    def batches(self) -> Iterator[tuple]:
        """The batches of this epoch, in its own order."""
        order = training_order(len(self.train), self.run.settings, self.name, self.epoch)
        order, size = self.run.team.share_batches(order, self.batch)
        for batch in make_loader(self.train, size, self.run.device, order):
            yield batch
            self.bar.update()

    def save(self, row: Mapping[str, float]) -> None:
        """Ends the epoch: its row goes into the history, all is saved, a line is printed."""
        seconds = self.run.team.from_first(time.perf_counter() - self.started)  # all decide by it
        self.history.append({"epoch": self.epoch, **row, "seconds": seconds})
        if self.run.team.rank == 0:
            self._write()
        self.run.team.wait()
        values = "  ".join(f"{name} {value:.3g}" for name, value in row.items())
        end = time.strftime("%H:%M", time.localtime(time.time() + (self.total - self.epoch) * seconds))
        print(f"epoch {self.epoch:2d}/{self.total}  {values}  {seconds:.0f} s, done by about {end}", flush=True)

    def _write(self) -> None:
        """Saves the state and the history; the state before stays, too."""
        if self.last.is_file():
            self.previous.unlink(missing_ok=True)
            try:
                os.link(self.last, self.previous)  # a second name for the same file: at no moment is there none
            except OSError:  # not every file system has that
                copy_file(self.last, self.previous)
        state = {name: holder.state_dict() for name, holder in self.state.items()}
        save_checkpoint(self.last, self.run, history=self.history, **state)
        write_json(self.run.outputs / f"{self.name}_history.json", self.history)


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


def adam(
    network: nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    heads: float = 1.0,
    heads_norm: float | None = None,
) -> torch.optim.Adam:
    """Adam (Kingma and Ba 2015) for a network's weights, in one pass over them.

    What looks for grain and holes in a generator learns `heads` times as fast. `Precision.update`
    shortens the gradient of these weights to `heads_norm` where it is longer (Pascanu et al. 2013).
    """
    fast = {weight for m in network.modules() if isinstance(m, GrainHead | HoleHead) for weight in m.parameters()}
    parts = [[weight for weight in network.parameters() if (weight in fast) is part] for part in (False, True)]
    groups = [{"params": part, "lr": lr * factor} for part, factor in zip(parts, (1, heads)) if part]
    if fast:
        groups[-1]["largest_norm"] = heads_norm
    return torch.optim.Adam(groups, lr, betas, fused=True)


def prepare_training(
    network: nn.Module,
    run: Run,
    lr: float,
    lr_step: int,
    **options: Any,
) -> tuple[torch.optim.Adam, StepLR, Precision]:
    """A network's optimizer (`adam`, with these options), the schedule of its learning rate, and
    its precision, once it is on the run's device.
    """
    network.to(run.device, memory_format=torch.channels_last)
    optimizer = adam(network, lr, **options)
    schedule = StepLR(optimizer, lr_step, run.settings.lr_gamma)
    return optimizer, schedule, Precision(run.device, run.settings.mixed_precision)


def average_of(network: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights and batch-norm statistics of `network`, with
    PyTorch's own class.

    Under a constant learning rate the last weights jitter; their average over some 1 / (1 - decay)
    steps does not. Over the first steps it reaches back less far, or it would hold untrained
    weights. Decay 0 is the network itself.
    """

    def update(averages: list[Tensor], values: list[Tensor], updates: Tensor) -> None:
        warm = (1 + updates.item()) / (10 + updates.item())
        get_ema_multi_avg_fn(min(decay, warm))(averages, values, updates)

    return AveragedModel(network, multi_avg_fn=update, use_buffers=True)


def to_device(batch: tuple, device: torch.device) -> tuple[Tensor, Tensor, dict]:
    """A loader's batch on the device, images channels last (a third faster on a CPU).

    What is to be learnt from a grey picture is a grey one, even if its original has colours: no
    network knows them.
    """
    degraded, original, info = batch
    options = {"non_blocking": True, "memory_format": torch.channels_last}
    moved = {key: info[key].to(device, **options) for key in ("hole", "whole")}
    degraded, original = degraded.to(device, **options), original.to(device, **options)
    is_grey = (degraded == degraded[:, :1]).flatten(1).all(1)[:, None, None, None]
    original = torch.where(is_grey, transforms.functional.rgb_to_grayscale(original, 3), original)
    return degraded, original.contiguous(memory_format=torch.channels_last), info | moved


def image_losses(restored: Tensor, original: Tensor) -> dict[str, Tensor]:
    """L1 and MSE, means over everything, of images in [-1, 1]."""
    return {"l1": F.l1_loss(restored, original), "mse": F.mse_loss(restored, original)}


def validation_losses(
    generator: nn.Module,
    loader: DataLoader,
    device: torch.device,
    team: Team = ALONE,
) -> dict[str, float]:
    """L1 and MSE over a validation set: means over its images, in eval mode.

    In a team the loader has this process's share of them (`Team.share_items`).
    """
    team.unite(generator)
    means = Means("validation")
    with evaluating(generator):
        for batch in loader:
            degraded, original, _ = to_device(batch, device)
            means.add(image_losses(generator(degraded), original), len(degraded))
    return means.result(team)


def sample_batch(pairs: Sequence[Pair], run: Run) -> tuple[Tensor, Tensor]:
    """Degraded and original of the first few validation faces in all kinds.

    They are the same in every epoch and notebook.
    """
    names = list(dict.fromkeys(pair.name for pair in pairs))[: run.settings.sample_faces]
    chosen = [pair for pair in pairs if pair.name in names]
    degraded, original, _ = next(iter(make_loader(chosen, len(chosen) or 1, run.device)))
    return degraded.to(run.device), original.to(run.device)


def save_samples(generator: nn.Module, samples: tuple[Tensor, Tensor], path: Path) -> None:
    """Writes a grid of samples, a column each: degraded above restored above original.

    Their own range, [-1, 1], is kept.
    """
    degraded, original = samples
    with evaluating(generator):
        rows = torch.cat([degraded, generator(degraded), original])
    with atomic(path) as temporary:
        save_image(rows, temporary, nrow=len(degraded), padding=0, normalize=True, value_range=(-1, 1))


# ====== Starting several processes ================================================================


def processes_to_start(run: Run) -> int:
    """How many processes shall train: RESTORATION_PROCESSES, or as many as there are GPUs.

    They are as many as can share both trainings' batches equally: of 8 and 4 pictures, 1, 2 or 4.
    """
    wanted, on_gpu = os.environ.get("RESTORATION_PROCESSES", ""), run.device.type == "cuda"
    if wanted and (not wanted.isdecimal() or int(wanted) < 1):
        raise ValueError(f"RESTORATION_PROCESSES={wanted}: give a whole number, 1 or more")
    if "LOCAL_RANK" in os.environ:  # this is one of those that were started
        return 1
    most = torch.cuda.device_count() if on_gpu and dist.is_nccl_available() else 1 if on_gpu or not wanted else math.inf
    together = math.gcd(run.settings.pretrain_batch, run.settings.gan_batch)
    fitting = [number for number in range(1, together + 1) if together % number == 0]
    return max(number for number in fitting if number <= min(most, int(wanted or together)))


def train_in_processes(
    stage: str,
    networks: Sequence[nn.Module],
    train: list[Pair],
    validation: list[Pair],
    run: Run,
) -> bool:
    """Trains a stage in several processes, if there are several GPUs; whether it did.

    What they write is then to be loaded.

    They run this module's command `train` under `torch.distributed.run`: a notebook's own process
    cannot be forked once it has used a GPU. RuntimeError, with the reason, if one of them fails;
    all of them end then, and also if this process does.
    """
    if (count := processes_to_start(run)) == 1:
        return False
    torch.cuda.empty_cache()  # one of the processes shares this one's GPU
    print(f"{stage}: training in {count} processes")
    threads = max(1, torch.get_num_threads() // count)  # more than there are cores wait for one another: five times
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), RELAY: "1"}
    environment |= {SESSION: str(session_start(run.places))}
    with tempfile.TemporaryDirectory() as folder:
        job, log = Path(folder) / "job.pt", Path(folder) / "log.txt"
        torch.save([(stage, run, [network.state_dict() for network in networks], train, validation)], job)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        command += ["--local-addr=127.0.0.1", __file__, "train", "--job", str(job)]
        with log.open("w") as errors:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        try:
            show_relayed(child.stdout)
            failed = child.wait()
        except KeyboardInterrupt:
            raise Interrupted(f"what is finished is kept in {run.outputs}. Run it again: it goes on") from None
        finally:
            child.terminate()
            child.wait()
        if failed:
            text = log.read_text(errors="replace")
            print(text[-3000:], file=sys.stderr)
            raise RuntimeError(f"{stage}: a process failed, and all were ended: {failure_reason(text)}")
    return True


def show_relayed(lines: Iterable[str]) -> None:
    """Prints another process's lines as they come; those of its progress (RELAYED) in one place."""
    bar = None
    for line in lines:
        if not line.startswith(RELAYED):
            print(line, end="", flush=True)
        elif in_notebook():
            bar = bar or CellLine()
            bar.write(line[1:])
        elif sys.stderr and sys.stderr.isatty():
            print(f"\r{line[1:-1]}", end="", file=sys.stderr)


def failure_reason(log: str) -> str:
    """Why the processes have ended, from what they and `torch.distributed.run` have written."""
    reasons = re.findall(r"^(?:\[rank\d+\]: ?)?(?:error: |(?=[A-Z]\w*Error: ))(.*)", log, re.MULTILINE)
    lost = "gloo|NCCL|Connection|ChildFailed|timeout caused"  # what the others say, who have only lost this one
    if own := [reason for reason in reasons if not re.search(lost, reason)]:
        return own[0]
    ended_after = {"SIGTERM", *re.findall(r"Unable to shutdown process (\d+)", log)}  # since another one had failed
    if stuck := re.search("Timed out|Application timeout|collective operation timeout", log):  # as gloo and NCCL say
        ended_after.add("SIGABRT")
    for name, process in re.findall(r"Signal \d+ \((\w+)\) received by PID (\d+)", log):
        if not {name, process} & ended_after:
            return f"it was ended by {name}{' (too little memory?)' if name == 'SIGKILL' else ''}"
    if stuck:
        return f"it has not answered for {NOTICED_AFTER.seconds} seconds"
    return [*reasons, *log.strip().splitlines()[-1:], "it has not said why"][0]


# ====== Lessons for the heads =====================================================================


def thumbnails(pairs: Sequence[Pair]) -> np.ndarray:
    """The originals of the pairs, each once, for `color_lesson`: uint8 BGR (N, 128, 128, 3)."""
    images, rows = np.load(pairs[0].store, mmap_mode="r"), sorted({pair.row for pair in pairs})
    small = [images[row, 0, 2::-1].reshape(3, 128, 2, 128, 2).mean((2, 4)).round().astype(np.uint8) for row in rows]
    return np.ascontiguousarray(np.stack(small).transpose(0, 2, 3, 1))


def make_pale(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture, uint8 (H, W, 3), as pale and flat as a good photo may be: nothing to be mended."""
    highest = image.max(2, keepdims=True).astype(np.float32)
    pale = highest + rng.uniform(0.5, 1) * (image - highest)
    black = (rng.uniform(0, 0.15) + rng.normal(0, 0.03, 3)).clip(0)
    white = (1 - rng.uniform(0, 0.2) + rng.normal(0, 0.03, 3)).clip(0, 1)
    return np.rint(255 * black + (white - black) * pale).clip(0, 255).astype(np.uint8)


def color_lesson(originals: np.ndarray, settings: Settings, rng: np.random.Generator) -> dict[str, Tensor]:
    """A batch of thumbnails for the colour head, faded anew every time: of the same few it learns
    too little.

    From `originals`, uint8 BGR (M, 128, 128, 3): `whole` and `original`, float RGB (N, 3, 64, 64)
    in [-1, 1]; `known`, (N, 1, 64, 64), 0 in holes; `faded`, (N, 2), whether by `distort_colors`
    and whether by `age_untouched`. Some of the originals are pale, of some only a part is shown,
    which may be all red or have no white, and one in four stays as it is. Halved after the damage,
    or grain would be too coarse. Empty if there are to be none.
    """

    def halved(image: np.ndarray) -> np.ndarray:
        return cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA)

    kinds = ["clean", *(kind for kind in settings.kinds if kind != "noisy")]  # noise is finer
    rows = []
    for _ in range(settings.color_lessons):
        original, kind = originals[rng.integers(len(originals))], kinds[rng.integers(len(kinds))]
        if rng.random() < 0.15:
            side = int(128 * rng.uniform(0.35, 0.6))
            top, left = rng.integers(0, 129 - side, 2)
            original = cv2.resize(original[top : top + side, left : left + side], (128, 128))
        original = make_pale(original, rng) if rng.random() < 0.3 else original
        degraded, known, tone = original, np.full(original.shape[:2], 255, np.uint8), draw_tone(rng)
        if kind == "aged":  # but for the hands: they leave little behind that matters here, and take most of the time
            degraded = age_untouched(original, rng, tone)
        elif kind == "color":
            degraded = distort_colors(original, rng, settings)
        elif kind == "occluded":
            seed = rng.integers(2**63)
            degraded = occlude_irregular(original, np.random.default_rng(seed), settings)
            known -= occlusion_mask(original.shape, np.random.default_rng(seed), settings)
        whole = np.asarray(without_tint(to_pil(halved(degraded))))
        is_grey = is_neutral(whole) or (kind == "aged" and tone >= 0)  # no colours can come back
        truth = halved(to_grey(original) if is_grey else original)[..., ::-1]
        rows.append((whole, truth, halved(known)[..., None] == 255, (kind == "color", kind == "aged")))
    if not rows:
        return {}
    *images, faded = (torch.from_numpy(np.stack(column)).float() for column in zip(*rows))
    whole, original, known = (image.permute(0, 3, 1, 2) for image in images)
    return {"whole": whole / 127.5 - 1, "original": original / 127.5 - 1, "known": known, "faded": faded}


def color_loss(head: ColorHead, lesson: Mapping[str, Tensor]) -> Tensor:
    """Teaches the colour head whether colours have faded, and to mend them; see `color_lesson`.

    L1 of the recoloured thumbnails outside the holes, and cross-entropy of whether they had faded.
    To take a good photograph for an aged one counts four times: harm is worse than a photograph
    that stays as it is.
    """
    curves, faded = head(lesson["whole"], doubting=False)
    difference = recolor(lesson["whole"], curves) - lesson["original"]
    recolored = (lesson["known"] * difference.abs()).mean()
    weight = 1 + (1 - lesson["faded"]) * lesson["faded"].new_tensor((0, 3))
    return recolored + 0.1 * F.binary_cross_entropy_with_logits(faded, lesson["faded"], weight)


def grain_lesson(pairs: Sequence[Pair], settings: Settings, rng: np.random.Generator) -> dict[str, Tensor]:
    """A batch of squares of 128 px for the grain head, from the originals of the pairs, made noisy
    anew every time.

    `noisy` and `clean`, float RGB (N, 3, 128, 128) in [-1, 1]; empty if there are to be none. Half
    have Gaussian noise, half of these of the usual sigma; three in eight have film grain, as a JPEG
    of quality 60 to 95 keeps it, and one in eight none. One in four is grey: where noise is alike
    in all channels, it is harder to tell from texture.
    """
    images, side, squares = np.load(pairs[0].store, mmap_mode="r"), IMAGE_SIZE // 2, []
    for _ in range(settings.grain_lessons):
        row, view = pairs[rng.integers(len(pairs))].row, rng.integers(1 + settings.windows)
        top, left = rng.integers(0, side + 1, 2)
        square = images[row, view, 2::-1, top : top + side, left : left + side].transpose(1, 2, 0)
        clean = np.ascontiguousarray(np.rot90(square, rng.integers(4)))
        clean = noisy = to_grey(clean) if rng.random() < 0.25 else clean
        kind = rng.integers(8)
        if kind < 4:
            sigma = settings.noise_sigma if kind < 2 else log_uniform(rng, 3, 50)
            noisy = add_gaussian_noise(clean, rng, replace(settings, noise_sigma=sigma))
        elif kind < 7:
            grainy = cv2.convertScaleAbs((clean + film_grain(clean.shape, rng)[..., None]).clip(0))
            quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 96))]
            noisy = cv2.imdecode(cv2.imencode(".jpg", grainy, quality)[1], cv2.IMREAD_COLOR)
        squares.append((noisy[..., ::-1], clean[..., ::-1]))
    if not squares:
        return {}
    noisy, clean = (torch.from_numpy(np.stack(column)).permute(0, 3, 1, 2) for column in zip(*squares))
    return {"noisy": noisy / 127.5 - 1, "clean": clean / 127.5 - 1}


def grain_loss(head: GrainHead, lesson: Mapping[str, Tensor]) -> Tensor:
    """Teaches the grain head: L1 of a `grain_lesson`'s squares without what it takes for noise."""
    detail = detail_of(lesson["noisy"])
    unit = grain_unit(detail)
    return F.l1_loss(lesson["noisy"] - unit * head(detail / unit), lesson["clean"])


# ====== Pretraining ===============================================================================


def detection_loss(hole: Tensor, damage: Tensor) -> Tensor:
    """Teaches the generator what a hole is: cross-entropy of its logits against the true holes.

    Logits are (N, 1, 256, 256). `damage`, of the same shape in [0, 1], is where they are. A hole
    counts as one pixel wider, and what is thin counts twice. Through the blended output alone, a
    detector that is not yet sure would learn too slowly.
    """
    damage = (damage > 0.15).float()
    # max_pool2d takes six times as long
    touched = F.conv2d(damage, damage.new_ones(1, 1, 3, 3), padding=1)
    true = (touched > 0.5).float()  # whole numbers, but for what a GPU's algorithm may round
    # a scratch has few pixels, and matters as much
    around = F.interpolate(F.avg_pool2d(true, 16), scale_factor=16.0)
    return F.binary_cross_entropy_with_logits(hole, true, 1 + true * (1 - around))


def pretrain_losses(
    generator: UNetGenerator,
    degraded: Tensor,
    original: Tensor,
    info: Mapping[str, Tensor],
    lesson: Mapping[str, Tensor],
    precision: Precision,
) -> dict[str, Tensor]:
    """L1 and MSE of what the generator makes of a batch, and the losses of its heads, one by one.

    Those are `detection_loss`, and `color_loss` and `grain_loss` of the lesson: a `color_lesson`, a
    `grain_lesson`, both or empty.
    """
    with precision.autocast(generator):
        restoration = generator.restore(degraded, info["whole"])
    losses = image_losses(restoration.restored, original)
    if restoration.hole is not None:
        losses["holes"] = detection_loss(restoration.hole, info["hole"])
    if "faded" in lesson:
        losses["color"] = color_loss(generator.color, lesson)
    if "noisy" in lesson:
        losses["grain"] = grain_loss(generator.output.grain, lesson)
    return losses


def pretrain_step(
    generator: nn.Module,
    optimizer: Optimizer,
    batch: tuple,
    lesson: Mapping[str, Tensor],
    run: Run,
    precision: Precision,
) -> dict[str, Tensor]:
    """One update of the generator on L1 + 0.1 MSE, and `heads_weight` x what its heads learn.

    Returns all the `pretrain_losses`.
    """
    batch = to_device(batch, run.device)
    lesson = {name: rows.to(run.device) for name, rows in run.team.share_rows(lesson).items()}
    losses = compute(pretrain_losses, generator, *batch, lesson, precision)
    loss = losses["l1"] + run.settings.mse_weight * losses["mse"]
    for head in [name for name in losses if name not in ("l1", "mse")]:
        loss = loss + run.settings.heads_weight * losses[head]
    precision.update(optimizer, loss)  # zero_grad(), backward(), step()
    return losses


def best_epoch(history: Sequence[Mapping]) -> int:
    """The epoch with the lowest validation loss, the first of equals; 0 for an empty history."""
    return min(history, key=lambda row: row["val_loss"])["epoch"] if history else 0


def stopped_early(history: Sequence[Mapping], settings: Settings) -> bool:
    """Whether pretraining ends here: `patience` epochs without a better validation loss."""
    return bool(history) and len(history) - best_epoch(history) >= settings.patience


def pretrain_generator(
    generator: UNetGenerator,
    train: list[Pair],
    validation: list[Pair],
    run: Run,
) -> list[dict]:
    """Pretrains `generator` on L1 + 0.1 MSE with Adam and StepLR, stops early, keeps the best
    weights.

    Writes pretrained_generator_best.pth, pretrain_last.pth (to go on from), pretrain_history.json
    and pretrain_sample_epoch_*.png. Returns the history, a dict for each epoch. Started again it
    goes on where it stopped, and a finished run only reloads. Raises ValueError if other settings
    or faces made what is there, FloatingPointError if a loss is not finite.
    """
    s, team, best = run.settings, run.team, run.outputs / "pretrained_generator_best.pth"
    trained = train_in_processes("pretrain", (generator,), train, validation, run)
    lr, heads = s.pretrain_lr, {"heads": s.heads_lr, "heads_norm": s.heads_norm}
    prepared = prepare_training(generator, run, lr, s.pretrain_lr_step, **heads)
    optimizer, scheduler, precision = prepared
    average = average_of(generator, s.ema)  # what is validated and saved
    validation_loader = make_loader(team.share_items(validation), s.pretrain_batch, run.device)
    samples, originals = sample_batch(validation, run), thumbnails(train)
    state = {"generator": generator, "average": average, "optimizer": optimizer}
    state |= {"scheduler": scheduler, "scaler": precision.scaler}

    with team.alone_in(run.outputs):
        stage = Stage("pretrain", s.pretrain_epochs, s.pretrain_batch, train, run, state)
        with team.first_goes_ahead():
            stage.go_on(best, GAN_ONLY)
        learner = team.wrap(Computation(generator), find_unused_parameters=True)
        for epoch in () if trained else stage.epochs():
            if stopped_early(stage.history, s):
                waited = counted(s.patience, "epoch")
                print(f"pretrain: stopped early, no better validation loss for {waited}")
                break
            means = Means(f"pretrain, epoch {epoch}", precision)
            rng = np.random.default_rng(derive_seed(s.seed, "lessons", epoch))
            for batch in stage.batches():
                lesson = {} if s.plain else color_lesson(originals, s, rng)
                lesson |= {} if s.plain else grain_lesson(train, s, rng)
                losses = pretrain_step(learner, optimizer, batch, lesson, run, precision)
                average.update_parameters(generator)
                means.add(losses, len(batch[0]))
            row = means.result(team)
            val = validation_losses(average.module, validation_loader, run.device, team)
            row["loss"] = row.pop("l1") + s.mse_weight * row.pop("mse")
            row |= {"val_loss": val["l1"] + s.mse_weight * val["mse"], "val_l1": val["l1"]}
            row["lr"] = scheduler.get_last_lr()[0]
            scheduler.step()
            if team.rank == 0 and best_epoch([*stage.history, {**row, "epoch": epoch}]) == epoch:
                save_checkpoint(best, run, epoch=epoch, generator=average.module.state_dict())
            if team.rank == 0 and epoch % s.sample_every == 0:
                sample = run.outputs / f"pretrain_sample_epoch_{epoch}.png"
                save_samples(average.module, samples, sample)
            stage.save(row)
        if not best.is_file():
            advice = "but pretrain_last.pth is not: move it away, too, to train again"
            raise FileNotFoundError(f"{best} is gone, {advice}")
        generator.load_state_dict(load_checkpoint(best)["generator"])
    return stage.history


# ====== GAN training ==============================================================================


def shifted(images: Sequence[Tensor], limit: int, rng: np.random.Generator) -> list[Tensor]:
    """The images (N, C, H, W), all rolled down and to the right by the same random numbers of
    pixels below `limit`.

    A convolution of stride 2 meets odd and even rows with different weights, and so does its
    gradient: always meeting the same ones, the generator learns to draw a faint weave. (Zhao et al.
    2020 shift what a discriminator sees against overfitting.) Rolling leaves a seam where opposite
    borders meet, in real and fake pairs alike.
    """
    down, right = rng.integers(limit, size=2).tolist() if limit else (0, 0)
    rolled = [image.roll((down, right), (2, 3)) for image in images]
    return [image.contiguous(memory_format=torch.channels_last) for image in rolled]


def discriminator_step(
    discriminator: nn.Module,
    optimizer: Optimizer,
    images: Sequence[Tensor],
    precision: Precision,
) -> dict[str, Tensor]:
    """One update of the discriminator: real pairs towards 1, fake pairs towards 0.

    Squared errors (Mao et al. 2017). `images` are degraded, restored and original. Restored is
    detached: this step must not reach the generator, which would be pushed towards being found out.
    """
    degraded, restored, original = images
    with precision.autocast(discriminator):
        real = discriminator(degraded, original)
        fake = discriminator(degraded, restored.detach())
    d_real = F.mse_loss(real, torch.ones_like(real))
    d_fake = F.mse_loss(fake, torch.zeros_like(fake))
    precision.update(optimizer, 0.5 * (d_real + d_fake))  # zero_grad(), backward(), step()
    return {"d_real": d_real, "d_fake": d_fake}


def generator_step(
    discriminator: nn.Module,
    optimizer: Optimizer,
    images: Sequence[Tensor],
    holes: tuple[Tensor, Tensor] | None,
    settings: Settings,
    precision: Precision,
) -> dict[str, Tensor]:
    """One update of the generator, whose output is the second of the `images`: fool the
    discriminator, and 100 x L1.

    To L1 is added `heads_weight` x the `detection_loss` of `holes`, what the generator takes for
    holes and what they are: else it would forget. Returns the losses one by one. Gradients flow
    through the discriminator to the generator, but the discriminator itself, its batch-norm
    statistics included, stays as it is.
    """
    degraded, restored, original = images
    frozen = {name: value.detach() for name, value in discriminator.named_parameters()}
    frozen |= {name: value.clone() for name, value in discriminator.named_buffers()}
    with precision.autocast(discriminator):
        score = torch.func.functional_call(discriminator, frozen, (degraded, restored))
    losses = {"g_adv": F.mse_loss(score, torch.ones_like(score))}
    losses["g_l1"] = F.l1_loss(restored, original)
    loss = losses["g_adv"] + settings.l1_weight * losses["g_l1"]
    if holes and settings.heads_weight:
        losses["holes"] = detection_loss(*holes)
        loss = loss + settings.l1_weight * settings.heads_weight * losses["holes"]
    precision.update(optimizer, loss)
    return losses


def trains_generator(epoch: int, number: int, settings: Settings) -> bool:
    """Whether batch `number` (from 0) of `epoch` (from 1) trains the generator.

    Later on only every second one does.
    """
    return epoch <= settings.every_second_batch_after or number % 2 == 0


def load_pretrained(generator: UNetGenerator, run: Run) -> str:
    """Loads the pretraining's best weights into `generator` if they are there and says so either
    way.

    Attached ones are copied to the outputs, to go on from. Returns the fingerprint of the weights
    in `generator` then.
    """
    name = "pretrained_generator_best.pth"
    if path := find_artifact(name, run):
        content = load_checkpoint(path)
        check_same_run(path, content, run, GAN_ONLY)
        if path.parent != run.outputs:
            copy_file(path, run.outputs / name)
        generator.load_state_dict(content["generator"])
        print(f"The generator starts from {path.name}, epoch {content['epoch']} of the pretraining")
        found = find_artifact("pretrain_history.json", run)
        history = json.loads(found.read_text()) if found else []
        if history and len(history) < run.settings.pretrain_epochs and not stopped_early(history, run.settings):
            print("WARNING: the pretraining is not finished. Let 04 end first: with later weights this cannot go on")
    else:
        print(f"WARNING: no {name} in {run.outputs}: THE GENERATOR STARTS FROM SCRATCH, without the lessons that its "
              "heads get in pretraining: expect holes to stay. If this is not meant, stop and run notebook 04 first; "
              "afterwards this run cannot go on from its weights")  # fmt: skip
    return weights_id(generator.state_dict())


def train_gan(
    generator: UNetGenerator,
    discriminator: PatchGANDiscriminator,
    train: list[Pair],
    validation: list[Pair],
    run: Run,
) -> list[dict]:
    """Trains `generator` and discriminator against each other (pix2pix).

    Starts from pretrained_generator_best.pth if it is there, and says loudly when it is not. Writes
    face_restoration_gan_checkpoint_epoch_*.pth, face_restoration_generator_final.pth,
    face_restoration_discriminator_final.pth, gan_last.pth (to go on from), gan_history.json and
    gan_sample_epoch_*.png. Returns the history, a dict for each epoch. Resumes, and raises, as
    `pretrain_generator`.
    """
    s, team = run.settings, run.team
    trained = train_in_processes("gan", (generator, discriminator), train, validation, run)
    prepare = functools.partial(prepare_training, run=run, lr_step=s.gan_lr_step, betas=s.gan_betas)
    adam_g, scheduler_g, precision_g = prepare(generator, lr=s.generator_lr)
    adam_d, scheduler_d, precision_d = prepare(discriminator, lr=s.discriminator_lr)
    validation_loader = make_loader(team.share_items(validation), s.gan_batch, run.device)
    samples = sample_batch(validation, run)
    state = {"generator": generator, "optimizer_g": adam_g, "scheduler_g": scheduler_g}
    state |= {"discriminator": discriminator, "optimizer_d": adam_d}
    state["scheduler_d"] = scheduler_d
    state |= {"scaler_g": precision_g.scaler, "scaler_d": precision_d.scaler}

    with team.alone_in(run.outputs):
        with team.first_goes_ahead():
            run = run._replace(begun_from=load_pretrained(generator, run))
            average = average_of(generator, s.ema)  # what is validated and saved
            state["average"] = average
            stage = Stage("gan", s.gan_epochs, s.gan_batch, train, run, state)
            stage.go_on(run.outputs / "face_restoration_generator_final.pth")
        learner_g = team.wrap(Computation(generator), find_unused_parameters=True)
        learner_d = team.wrap(discriminator)
        for epoch in () if trained else stage.epochs():
            means = Means(f"gan, epoch {epoch}", precision_g)
            for number, batch in enumerate(stage.batches()):
                degraded, original, info = to_device(batch, run.device)
                train_g = trains_generator(epoch, number, s)
                with torch.set_grad_enabled(train_g), precision_g.autocast(generator):
                    restoration = compute(UNetGenerator.restore, learner_g, degraded, info["whole"])
                rng = np.random.default_rng(derive_seed(s.seed, "shift", epoch, number))
                images = shifted((degraded, restoration.restored, original), s.shift, rng)
                losses = discriminator_step(learner_d, adam_d, images, precision_d)
                if train_g:
                    holes = None if generator.plain else (restoration.hole, info["hole"])
                    losses |= generator_step(discriminator, adam_g, images, holes, s, precision_g)
                    average.update_parameters(generator)
                precision_g.keep_finite()  # where the generator was not trained
                means.add(losses, len(degraded))
            row = means.result(team)
            val = validation_losses(average.module, validation_loader, run.device, team)
            row |= {"val_l1": val["l1"], "lr_g": scheduler_g.get_last_lr()[0]}
            row["lr_d"] = scheduler_d.get_last_lr()[0]
            scheduler_g.step()
            scheduler_d.step()
            if team.rank == 0 and epoch % s.checkpoint_every == 0:
                weights = {"generator": average.module.state_dict()}
                weights["discriminator"] = discriminator.state_dict()
                path = run.outputs / f"face_restoration_gan_checkpoint_epoch_{epoch}.pth"
                save_checkpoint(path, run, **weights)
            if team.rank == 0 and epoch % s.sample_every == 0:
                save_samples(average.module, samples, run.outputs / f"gan_sample_epoch_{epoch}.png")
            stage.save(row)
        generator.load_state_dict(average.module.state_dict())
        for name, network in {"generator": generator, "discriminator": discriminator}.items():
            weights = {name: network.state_dict(), "epoch": len(stage.history)}
            if team.rank == 0:
                save_checkpoint(run.outputs / f"face_restoration_{name}_final.pth", run, **weights)
    return stage.history


# ====== Restoration ===============================================================================


def image_metrics(images: Tensor, originals: Tensor) -> dict[str, Tensor]:
    """PSNR in dB (may be infinite), SSIM (Wang et al. 2004), L1 (of 255), (N,) each.

    All are on clipped, rounded RGB values.
    """
    from skimage.metrics import structural_similarity

    x, y = to_pixels(images).cpu(), to_pixels(originals).cpu()
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    wang |= {"data_range": 255, "channel_axis": 0}
    ssim = [structural_similarity(a, b, **wang) for a, b in zip(x.numpy(), y.numpy())]
    error = x.double() - y.double()
    psnr = 10 * torch.log10(255**2 / error.square().mean((1, 2, 3)))
    return {"psnr": psnr, "ssim": torch.tensor(ssim).double(), "l1": error.abs().mean((1, 2, 3))}


# When is a region damage? From `LIKELY` on a pixel belongs to one; on average it must be `sure`, at
# all sizes at which it reaches between the two numbers of `REACH` px from its middle. With each of
# the first two doublings of its length, from a thirtieth of the picture on, `BONUS` less is enough:
# little in a photograph looks like a scratch or a hole and is as long. A speck, up to so many px
# long and reaching so far from its middle, may be missing at the smaller sizes; of it a pixel
# weighs as much in the mean as it is likely, and `SPECK_MORE` is asked. Where `ENOUGH` of a picture
# is damaged for sure, the rest of its damage is likely, too, and `PLAUSIBLE` will do. Chosen by
# photographs that no training has seen.
LIKELY, PLAUSIBLE, ENOUGH, BONUS, REACH = 0.25, 0.6, 0.001, 0.1, (0.4, 15)
SPECK_LENGTH, SPECK_RADIUS, SPECK_MORE = 14, 3, 0.05
LEAST_CONTRAST = 50  # levels, of a grey picture; the palest of 76 prints aged by age_photo has 111
KNOWN_SIZE = 1024  # px, longer side, up to which damage is looked for: what is larger is smoother than in training
OVERLAP = 64  # px, by which neighbouring windows share a margin, where one fades into the next


class RestoredPhoto(NamedTuple):
    """A restored photograph, uint8 BGR (H, W, 3), and what was repainted, uint8 (H, W).

    The latter is 255 where nothing of the original is left.
    """

    image: np.ndarray
    repainted: np.ndarray


def level_sizes(width: int, height: int) -> list[tuple[int, int]]:
    """Sizes of a photograph, (width, height): the networks', each at most twice the one before, up
    to KNOWN_SIZE.

    Or up to its own, if that is smaller.
    """
    longer = max(width, height)
    largest = min(longer, KNOWN_SIZE)
    steps = max(0, math.ceil(math.log2(largest / IMAGE_SIZE)))
    scales = [(largest / IMAGE_SIZE) ** (step / steps - 1) for step in range(steps + 1)] if steps else [1.0]
    scales = [scale * largest / longer for scale in scales]
    return [(max(1, round(width * scale)), max(1, round(height * scale))) for scale in scales]


def sizes_seen(width: int, height: int, searching: bool) -> list[tuple[int, int]]:
    """The sizes at which a photograph is mended, and those at which damage is searched for."""
    sizes = level_sizes(width, height)
    return [*{sizes[0], (width, height)}, *(sizes if searching else ())]


def window_starts(length: int) -> list[int]:
    """Where windows of 256 px begin that cover `length` px with at least OVERLAP in common."""
    count = max(1, math.ceil((length - OVERLAP) / (IMAGE_SIZE - OVERLAP)))
    return np.linspace(0, max(0, length - IMAGE_SIZE), count).round().astype(int).tolist()


def count_windows(sizes: Iterable[Sequence[int]]) -> int:
    """Of all pictures of these sizes, (width, height), together."""
    return sum(len(window_starts(width)) * len(window_starts(height)) for width, height in sizes)


def _cut(image: np.ndarray, x: int, y: int) -> np.ndarray:
    """A window of an image; what lies beyond its edges is mirrored."""
    cut = image[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE]
    down, right = IMAGE_SIZE - cut.shape[0], IMAGE_SIZE - cut.shape[1]
    return cv2.copyMakeBorder(cut, 0, down, 0, right, cv2.BORDER_REFLECT) if down or right else cut


def _enlarged(image: np.ndarray, size: tuple[int, int], x: int, y: int) -> np.ndarray:
    """A window of a smaller version of an image; `size` (width, height) is the larger one's."""
    sx, sy = image.shape[1] / size[0], image.shape[0] / size[1]
    to_small = np.array(((sx, 0, (x + 0.5) * sx - 0.5), (0, sy, (y + 0.5) * sy - 0.5)))
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, to_small, (IMAGE_SIZE, IMAGE_SIZE), flags=how, borderMode=cv2.BORDER_REFLECT)


def _fade_in(target: np.ndarray, new: np.ndarray, overlap: int, axis: int) -> None:
    """Puts `new` in place of `target`, fading from it over the first `overlap` px along `axis`."""
    target, new = (np.moveaxis(image, axis, 0) for image in (target, new))
    share = ((np.arange(overlap, dtype=np.float32) + 0.5) / overlap).reshape(-1, *[1] * (new.ndim - 1))
    mixed = np.concatenate((target[:overlap] + share * (new[:overlap] - target[:overlap]), new[overlap:]))
    target[...] = np.rint(mixed) if target.dtype == np.uint8 else mixed


def _smooth(change: Tensor, reach: float) -> Tensor:
    """A change, (N, 3, H, W), without anything finer than `reach` px."""
    images = change.permute(0, 2, 3, 1).cpu().numpy()
    blurred = [cv2.GaussianBlur(image, (0, 0), reach, borderType=cv2.BORDER_REFLECT) for image in images]
    return torch.from_numpy(np.stack(blurred)).permute(0, 3, 1, 2).to(change)


def _to_tensor(windows: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """uint8 or float windows (256, 256[, C]), 0..255, to (N, C, 256, 256) in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(windows).astype(np.float32).reshape(len(windows), IMAGE_SIZE, IMAGE_SIZE, -1))
    return (stacked / 127.5 - 1).permute(0, 3, 1, 2).to(device, memory_format=torch.channels_last)


def _by_windows(photo: np.ndarray, look: Callable[[list], Tensor], channels: int, bar: Any) -> np.ndarray:
    """An image as large as `photo`, uint8 (H, W, channels), of what `look` makes of its windows, a
    few at a time.

    It gets where they begin, (x, y), and returns values (N, channels, 256, 256) on the 0..255
    scale.
    """
    height, width = photo.shape[:2]
    image, xs, ys = np.zeros((height, width, channels), np.uint8), window_starts(width), window_starts(height)
    for j, y in enumerate(ys):
        strip = np.zeros((IMAGE_SIZE, max(width, IMAGE_SIZE), channels), np.float32)
        for first in range(0, len(xs), 4):
            values = look([(x, y) for x in xs[first : first + 4]]).clamp(0, 255).permute(0, 2, 3, 1).cpu().numpy()
            for i, window in enumerate(values, first):
                overlap = xs[i - 1] + IMAGE_SIZE - xs[i] if i else 0
                _fade_in(strip[:, xs[i] : xs[i] + IMAGE_SIZE], window, overlap, axis=1)
                bar.update()
        rows, overlap = image[y : y + IMAGE_SIZE], ys[j - 1] + IMAGE_SIZE - y if j else 0
        for x in range(0, width, 4096):  # saves memory
            part = np.s_[: len(rows), x : min(x + 4096, width)]
            _fade_in(rows[part], strip[part], overlap, axis=0)
    return image


def damage_probabilities(photo: np.ndarray, generator: UNetGenerator, curves: Tensor, bar: Any) -> np.ndarray:
    """How likely each pixel of an RGB photograph is physically damaged: uint8 (H, W), 255 is sure.

    Damage is damage whichever way a picture is mirrored: of four looks the surest counts. The
    network, which knows faces upright only, overlooks by chance far more than it takes for damage.
    """

    def look(places: list[tuple[int, int]]) -> Tensor:
        windows = _to_tensor([_cut(photo, x, y) for x, y in places], curves.device)
        seen = recolor(windows, curves.expand(len(places), -1))
        found = [generator.find_damage(seen.flip(axes)).flip(axes) for axes in ((), (2,), (3,), (2, 3))]
        return 255 * torch.sigmoid(torch.stack(found).amax(0))

    return _by_windows(photo, look, 1, bar)[..., 0]


def agreed_damage(maps: Sequence[np.ndarray], sure: float) -> np.ndarray:
    """Where a photograph is damaged, uint8 (H, W), 255 there, from its `damage_probabilities` at
    several sizes.

    A region of likely pixels counts as a whole: it is damage if that is likely on average over its
    pixels and over the sizes that can tell, its own among them. Those are the sizes at which it is
    neither a dot nor larger than what is around it in a window; they have to agree. A speck of dust
    may be too small for all but one, and most of it is its rim, which is never sure: there the mean
    is weighted with the probability itself, and only larger sizes can object. Much that would be no
    damage by itself is some in a picture with other damage: two thresholds, as Canny 1986 has for
    edges.
    """
    mask = np.zeros_like(maps[-1])  # 1 where damage is plausible, 2 where it is sure
    for number, own in enumerate(maps):
        found = (own > LIKELY * 255).astype(np.uint8)
        _, labels, boxes, _ = cv2.connectedComponentsWithStats(found)  # labels of every likely pixel, from 1 on
        length = boxes[:, 2:4].max(1) / max(own.shape)
        inside = cv2.distanceTransform(found, cv2.DIST_L1, 3, dstType=cv2.CV_8U)
        rows = max(1, 2**20 // found.shape[1])
        bands = [np.s_[top : top + rows] for top in range(0, len(found), rows)]  # saves memory
        radius, score, judges, ours, denied = np.zeros((5, len(length)))
        for band in bands:
            np.maximum.at(radius, labels[band], inside[band])
        radius[radius == 255] = np.inf  # or more: 8 bits end there
        del inside

        def total(values: np.ndarray, power: int = 1, labels=labels, bands=bands, count=boxes.shape[0]) -> np.ndarray:
            weights = (values[band].ravel().astype(np.float64) ** power for band in bands)
            return sum(np.bincount(labels[band].ravel(), weight, count) for band, weight in zip(bands, weights))

        area = total(found)  # px
        for n, other in enumerate(maps):
            reach = radius * max(other.shape) / max(own.shape)  # px at that size
            tells = (reach > REACH[0]) & (reach < REACH[1]) | (n == 0) & (reach >= REACH[1])
            seen = total(cv2.resize(other, own.shape[::-1], interpolation=cv2.INTER_AREA))
            score, judges, ours = score + tells * seen, judges + tells, tells if n == number else ours
            denied += (n > number) & tells & (seen < LIKELY * 255 * area)
        less = BONUS * np.log2((30 * length).clip(1, 4))
        speck = (radius <= SPECK_RADIUS) & (boxes[:, 2:4].max(1) <= SPECK_LENGTH) & (denied == 0)
        sums, squares = total(own), total(own, 2)
        for threshold, value in ((PLAUSIBLE, 1), (sure, 2)):
            accepted = (ours > 0) & (score > (threshold - less) * 255 * judges * area)
            accepted |= speck & (squares > (threshold + SPECK_MORE) * 255 * sums)
            for band in bands:
                found[band] = 255 * accepted[labels[band]]
            enlarged = cv2.resize(found, mask.shape[::-1], interpolation=cv2.INTER_LINEAR)
            cv2.max(mask, cv2.threshold(enlarged, 127, value, cv2.THRESH_BINARY, enlarged)[1], mask)
            del enlarged
        del labels, total  # it holds them, too
    enough = 0 if np.count_nonzero(mask == 2) > ENOUGH * mask.size else 1
    return cv2.dilate(cv2.threshold(mask, enough, 255, cv2.THRESH_BINARY)[1], np.ones((3, 3), np.uint8))


def fill_from_edges(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """An image, uint8 (H, W, 3), whose `hole`, uint8 (H, W), 255 there, else 0, is filled smoothly
    from its edges.

    As `fill_from_around`, at any size: half the image, whose pixels are means of what is known (a
    quarter at least, or they are holes, too: 8-bit means of slivers are wrong), is filled and
    enlarged. Then every pixel of the hole becomes the mean around it, a few times, which brings it
    close to what a membrane between the edges would be (Laplace's equation).
    """
    if not hole.any() or hole.all():
        return image
    known, half = cv2.bitwise_not(hole), ((hole.shape[1] + 1) // 2, (hole.shape[0] + 1) // 2)
    share = cv2.resize(known, half, interpolation=cv2.INTER_AREA)
    means = cv2.resize(cv2.copyTo(image, known, np.zeros_like(image)), half, interpolation=cv2.INTER_AREA)
    means = cv2.divide(means, cv2.merge([share] * 3), scale=255)
    smaller = fill_from_edges(means, cv2.threshold(share, 63, 255, cv2.THRESH_BINARY_INV)[1])
    filled = cv2.resize(smaller, hole.shape[::-1], interpolation=cv2.INTER_LINEAR)
    cv2.copyTo(image, known, filled)
    for _ in range(8):
        cv2.copyTo(cv2.blur(filled, (3, 3)), hole, filled)
    return filled


def photo_noise(photo: np.ndarray, curves: Tensor, repainted: np.ndarray | None = None) -> Tensor:
    """The noise level, (1, 1, 1, 1), of a whole photograph, RGB uint8 (H, W, 3): a window full of
    grass cannot tell.

    If nothing is flat in all of it, this would be that of grass, cloth or stone. But noise and film
    grain lie over everything alike, so that the flattest tenth of the picture has as much of it as
    the flattest quarter; of texture it has less. In doubt, there is no noise. What is burnt out,
    jet-black or `repainted`, uint8 (H, W), says nothing.
    """
    blocks = []
    for y in window_starts(photo.shape[0]):
        for x in window_starts(photo.shape[1]):
            cut = _cut(photo, x, y)
            levels = block_levels(detail_of(recolor(_to_tensor([cut], curves.device), curves)))
            silent = (cut == 0).any(2) | (cut == 255).any(2)
            if repainted is not None:
                silent |= _cut(repainted, x, y) > 0
            share = F.avg_pool2d(torch.from_numpy(silent).to(levels)[None, None], 16).flatten(1)
            blocks.append(levels.where(share < 0.1, 0))
    levels = torch.cat(blocks, 1)
    if (levels > 0.5 / 127.5).float().mean() < 0.1:  # the few that would count are not the flattest, but what is sharp
        return levels.new_zeros(1, 1, 1, 1)
    level, quarter = noise_level(levels), noise_level(levels, 0.25)
    return level * doubtless(level / quarter.clamp(min=1e-6), 0.75, 0.9)


def mend_level(
    photo: np.ndarray, holes: np.ndarray, generator: UNetGenerator, curves: Tensor, drift: np.ndarray | None, bar: Any
) -> np.ndarray:
    """Restores `photo`, RGB uint8 (h, w, 3), whose holes are filled, by windows. What is grey stays
    grey.

    `holes` says where, uint8, and `drift` is the `large_scale_change` that is known from the whole
    picture, both at any size.
    """
    size = photo.shape[1::-1]
    noise = photo_noise(photo, curves, cv2.resize(holes, size, interpolation=cv2.INTER_AREA))

    def look(places: list[tuple[int, int]]) -> Tensor:
        def tensor(cut: Callable, image: np.ndarray, *arguments: object) -> Tensor:
            return _to_tensor([cut(image, *arguments, x, y) for x, y in places], curves.device)

        seen = recolor(tensor(_cut, photo), curves.expand(len(places), -1))
        if drift is not None:
            seen = seen + tensor(_enlarged, drift, size) + 1  # 1: it is a difference
        restored = generator.mend(seen, noise)
        if drift is not None:  # windows see no more than themselves: what is large has been mended already
            restored = restored - _smooth(restored - seen.clamp(-1, 1), 16)
        return (restored + 1) * 127.5

    image = _by_windows(photo, look, 3, bar)
    if is_neutral(photo):
        cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB, image)
    return image


def large_scale_change(before: np.ndarray, after: np.ndarray, curves: Tensor) -> np.ndarray:
    """What restoring changed beside colours, slowly across the whole picture: float32 (h, w, 3), of
    255.

    From two RGB images, uint8 (h, w, 3).
    """
    seen, restored = (curves.new_tensor(image).permute(2, 0, 1)[None] / 127.5 - 1 for image in (before, after))
    change = restored - recolor(seen, curves).clamp(-1, 1)
    return 127.5 * _smooth(change, 8)[0].permute(1, 2, 0).cpu().numpy()


def _restore_plainly(photo: np.ndarray, generator: UNetGenerator, size: tuple[int, int]) -> RestoredPhoto:
    """The plain recipe's correction of the whole picture at 256 px, made as large as the photograph
    and added to it.

    To compare with: it takes some 40 bytes a pixel.
    """
    small = np.asarray(to_pil(photo).resize(size, Image.Resampling.BILINEAR))
    with evaluating(generator):
        seen = _to_tensor([_cut(small, 0, 0)], next(generator.parameters()).device)
        change = 127.5 * (generator(seen) - seen)[0, :, : size[1], : size[0]].permute(1, 2, 0).cpu().numpy()
    change = cv2.resize(change, photo.shape[1::-1], interpolation=cv2.INTER_LINEAR)[..., ::-1]
    image = np.rint(photo + change).clip(0, 255).astype(np.uint8)
    return RestoredPhoto(image, np.zeros(photo.shape[:2], np.uint8))


def judge_colors(picture: Image.Image, one_tone: bool | None, generator: UNetGenerator) -> tuple[Image.Image, Tensor]:
    """A photograph, RGB, and the curves, (1, 11), that mend its colours. What is in one tone comes
    back as "L".

    Where nobody can say whether it is (None), its colours stay: more contrast would be more colour,
    which a pale grey print with a cast never had. What is grey gets one curve for all channels; if
    it has hardly any contrast, it stays.
    """
    whole = picture.resize((IMAGE_SIZE,) * 2, Image.Resampling.BILINEAR)
    pixels = np.asarray((whole.convert("L") if one_tone else whole).convert("RGB"))
    grey = is_neutral(pixels)
    curves = generator.color(F.avg_pool2d(_to_tensor([pixels], next(generator.parameters()).device), 4))[0]
    if grey:
        curves[:, :9] = curves[:, :9].view(1, 3, 3).mean(2).repeat_interleave(3, 1)
    darkest, lightest = np.quantile(pixels, (0.01, 0.99))
    if one_tone is None and not (grey and lightest - darkest >= LEAST_CONTRAST):
        curves = torch.zeros_like(curves)
    return picture.convert("L") if grey else picture, curves


def _check_input(photo: np.ndarray, generator: UNetGenerator, fill: bool, mask: np.ndarray | None) -> None:
    """Raises ValueError, saying why, if `restore_photo` cannot do what it is asked for."""
    for what, image, channels in (("photograph", photo, (3,)), ("mask", mask, ())):
        fits = image is None or (image.dtype == np.uint8 and image.shape[2:] == channels and image.ndim >= 2)
        if not fits or (image is not None and not image.size):
            shape = "(H, W, 3)" if channels else "(H, W)"
            raise ValueError(f"the {what} must be uint8 {shape}, not {image.dtype} {image.shape}")
    if mask is not None and mask.shape != photo.shape[:2]:
        sizes = [f"{image.shape[1]} x {image.shape[0]} px" for image in (mask, photo)]
        raise ValueError(f"the mask has {sizes[0]}, the photograph {sizes[1]}")
    if mask is not None and not fill:
        raise ValueError("a mask says what is to be repainted, fill=False that nothing is: leave one of them out")
    if generator.plain and (mask is not None or not fill):
        raise ValueError("the plain recipe draws every pixel anew: it knows neither `fill` nor a mask")
    if mask is not None and 0 < mask.max() < 128:
        raise ValueError(f"the mask's lightest value is {mask.max()}: damage is what is lighter than half grey (127)")
    if mask is not None and mask.min() > 127:
        raise ValueError("the mask is white everywhere: nothing is left to fill from")


def restore_photo(
    photo: np.ndarray, generator: UNetGenerator, fill: bool = True, mask: np.ndarray | None = None, bar: Any = None
) -> RestoredPhoto:
    """Restores a photograph, uint8 BGR (H, W, 3), at its own size: the result, and a mask of what
    was repainted.

    Damage is looked for at several sizes, from 256 px to KNOWN_SIZE, and filled from its edges.
    Then colours and slow changes of light are taken from the whole picture at 256 px; all else is
    mended by overlapping windows at its own size. A photograph in one tone (grey, sepia) comes back
    in neutral grey, but from the plain recipe; see `judge_colors`. (The generator itself, which
    trainings and samples show, looks for damage at one size, and fills it in a simpler way.)

    With a `mask`, uint8 (H, W), exactly what is lighter than half grey in it is repainted; with
    fill=False nothing is. ValueError for both at once, if the photograph or the mask has another
    shape or type, if the mask is dark or white all over, or for the plain recipe, which cannot say
    where it repaints.
    """
    _check_input(photo, generator, fill, mask)
    own, sizes = photo.shape[1::-1], level_sizes(*photo.shape[1::-1])
    if generator.plain:
        return _restore_plainly(photo, generator, sizes[0])
    picture, damage = to_pil(photo), np.zeros(photo.shape[:2], np.uint8)
    del photo  # a large one takes much memory
    searching = mask is None and fill
    if bar is None:
        shown = progress("restoring", count_windows(sizes_seen(*own, searching)), "window")
    else:
        shown = contextlib.nullcontext(bar)  # somebody else's, who also closes it

    def at(size: tuple[int, int]) -> np.ndarray:
        """The picture as it is now, RGB uint8 (h, w, 3), at that size."""
        resized = picture if size == picture.size else picture.resize(size, Image.Resampling.BILINEAR)
        return np.asarray(resized if resized.mode == "RGB" else resized.convert("RGB"))

    with evaluating(generator), shown as bar:
        picture, curves = judge_colors(picture, one_tone := in_one_tone(picture), generator)
        if searching:
            found = agreed_damage(
                [damage_probabilities(at(size), generator, curves, bar) for size in sizes], generator.sure
            )
            if not found.all():  # of nothing but damage nothing can be made
                damage = cv2.threshold(cv2.resize(found, own), 127, 255, cv2.THRESH_BINARY)[1]
        elif mask is not None:
            damage = cv2.threshold(mask, 127, 255, cv2.THRESH_BINARY)[1]
        if damage.any():  # a torn corner, white or black, would hide how the rest has faded
            filled = Image.fromarray(fill_from_edges(at(own), damage))
            picture, curves = judge_colors(filled, one_tone, generator)  # of a tone specks tell more than fillings
            del filled
        small = at(sizes[0])
        image = mend_level(small, damage, generator, curves, None, bar)
        if own != sizes[0]:
            drift = large_scale_change(small, image, curves)
            image = mend_level(at(own), damage, generator, curves, drift, bar)
    picture = None  # as above
    return RestoredPhoto(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), damage)


def read_mask(path: str | Path) -> np.ndarray:
    """An image file as a mask, uint8 (H, W): its lightest channel, 0 where it is transparent."""
    mask = read_image(path).max(2)
    with Image.open(path) as image:
        if "A" in image.getbands() or "transparency" in image.info:  # painted on a layer of its own
            return cv2.min(mask, np.asarray(ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")))
    return mask


# ====== Scans =====================================================================================

# Tags that say how the pixels of a TIFF lie in the file, which a new one has of its own; 34675: the
# colour profile.
TIFF_STRUCTURE = {*range(254, 267), 273, *range(277, 282), 284, *range(290, 294), 301, *range(317, 348), 34675}
TIFF_STRUCTURE |= {*range(512, 533), 37724}
TIFF_ONLY = {700, 33723, 34377}  # XMP, IPTC and Photoshop's data, which other formats keep elsewhere
NOT_AS_TEXT = {"XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type APP1"}  # of a PNG: kept as XMP and EXIF
SAVED_AS = {  # how Pillow shall write a format
    "JPEG": {"quality": Settings.jpeg_quality, "subsampling": 0},  # 0: colours at full resolution, 4:4:4
    "WEBP": {"quality": Settings.jpeg_quality},
    "AVIF": {"quality": Settings.jpeg_quality, "subsampling": "4:4:4"},
    "HEIF": {"quality": Settings.jpeg_quality, "chroma": 444},
}


class Scan(NamedTuple):
    """A picture file of one's own, upright, with what it carries."""

    pixels: np.ndarray  # uint8 or uint16: grey (H, W, 1) or RGB (H, W, 3), in the colours of its profile
    alpha: np.ndarray | None  # its opacity, (H, W), of the same type
    to_srgb: Callable[[Image.Image], Image.Image]  # brings a picture of 8 bits to sRGB, mode "RGB",
    from_srgb: Callable[[Image.Image], Image.Image]  # and one in sRGB to these colours, mode "L" or "RGB"
    carried: dict[str, Any]  # what else it holds, as Pillow's `save` takes it: EXIF, XMP, profile, resolution, ...
    notes: list[str]  # what of it does not come back

    def photo(self, rows: slice = slice(None)) -> np.ndarray:
        """What the networks see of it, or of some rows: uint8 BGR (H, W, 3), sRGB."""
        pixels = self.pixels[rows]
        eight = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
        return cv2.cvtColor(np.asarray(self.to_srgb(as_picture(eight))), cv2.COLOR_RGB2BGR)


def as_picture(pixels: np.ndarray) -> Image.Image:
    """uint8 (H, W, channels) as a picture: grey, grey with opacity, RGB or RGBA."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


class AsRead(str):
    """Text of EXIF data as it was: Pillow reads Latin-1, but writes ASCII, with ? for the rest."""

    def encode(self, *_: object) -> bytes:
        """The bytes that have been read, mostly UTF-8."""
        return super().encode("latin-1")


def exif_of(image: Image.Image, turned: bool) -> Image.Exif:
    """What the camera or the scanner wrote, for upright pixels and without a thumbnail."""
    exif = image.getexif()
    for tag in TIFF_STRUCTURE & exif.keys():
        del exif[tag]
    details, place = (exif.get_ifd(tag) if tag in exif else {} for tag in (0x8769, 0x8825))
    exif.get_ifd(0xA005)  # is read, too, before the file is closed
    if exif.pop(0x0112, 1) in (5, 6, 7, 8) and turned and {0xA002, 0xA003} <= details.keys():  # width and height
        details[0xA002], details[0xA003] = details[0xA003], details[0xA002]
    for part in (exif, details, place):
        part.update({tag: AsRead(text) for tag, text in part.items() if isinstance(text, str)})
    return exif


def metadata(image: Image.Image, turned: bool) -> dict[str, Any]:
    """What an opened file carries beside its pixels, as Pillow's `save` takes it."""
    kept = {"dpi": tuple, "icc_profile": bytes, "comment": (bytes, str), "progressive": int, "compression": str}
    info = {name: image.info.get(name) for name in kept}  # among a PNG's texts may be anything of these names
    carried = {name: info[name] for name, kind in kept.items() if info[name] and isinstance(info[name], kind)}
    if carried.get("dpi") == (1, 1):  # of a TIFF that does not say it
        del carried["dpi"]
    carried["exif"] = Image.Exif()
    with contextlib.suppress(Exception):  # damaged beyond what Pillow forgives
        carried["exif"] = exif_of(image, turned)
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if xmp and isinstance(xmp, (bytes, str)):
        xmp = xmp.encode() if isinstance(xmp, str) else xmp
        carried["xmp"] = re.sub(rb"(tiff:Orientation(?:=[\"']|>))[2-8]", rb"\g<1>1", xmp) if turned else xmp
    if text := {key: value for key, value in getattr(image, "text", {}).items() if key not in NOT_AS_TEXT}:
        carried["text"] = text
    if iptc := [part for marker, part in getattr(image, "applist", ()) if marker == "APP13"]:  # in Photoshop's wrapping
        carried["extra"] = b"".join(b"\xff\xed" + (len(part) + 2).to_bytes(2, "big") + part for part in iptc)
    return carried


def color_transforms(profile: bytes | None, mode: str) -> tuple[Callable, Callable | None]:
    """What brings pictures in `mode` from a profile's colours to sRGB, "RGB", and what brings them
    back, if anything.

    Relative colorimetric, as usual for photographs. A profile that is not understood counts as
    none.
    """
    plain = [functools.partial(Image.Image.convert, mode=m) for m in ("RGB", mode)]
    how = (ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION)
    try:
        own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile or b"")), ImageCms.createProfile("sRGB")
        there = ImageCms.buildTransform(own, srgb, mode, "RGB", *how)
    except (OSError, ImageCms.PyCMSError):
        return plain[0], plain[1]
    back = None
    with contextlib.suppress(ImageCms.PyCMSError):  # some of scanners' profiles can be read only
        back = ImageCms.buildTransform(srgb, own, "RGB", mode, *how)
    apply = ImageCms.applyTransform
    return lambda picture: apply(picture, there), back and (lambda picture: apply(picture, back))


def _sixteen_bits(content: bytes, image: Image.Image, channels: int) -> np.ndarray | None:
    """A PNG's or TIFF's 16 bits, uint16 (H, W, channels), as stored; None if OpenCV fails."""
    if image.format == "TIFF":
        if image.tag_v2.get(338) == (1,):  # colours that were multiplied with the opacity
            return None
        with tifffile.TiffFile(buffer := io.BytesIO(content), mode="r+b") as tiff:
            if "Orientation" in tiff.pages[0].tags:  # some versions of OpenCV turn it, some fail
                tiff.pages[0].tags["Orientation"].overwrite(1)
            content = buffer.getvalue()
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    order = {1: (0,), 2: (0, -1), 3: (2, 1, 0), 4: (2, 1, 0, 3)}[channels]  # of grey or BGR, and opacity
    if pixels is None or pixels.dtype != np.uint16 or np.atleast_3d(pixels).shape[2] <= max(order):
        return None
    pixels = np.atleast_3d(pixels)[..., list(order)]
    return 65535 - pixels if image.format == "TIFF" and image.tag_v2.get(262) == 0 else pixels  # 0: white is zero


def _turned(pixels: np.ndarray, turn: Image.Transpose | None) -> np.ndarray:
    """An array (H, W, channels), turned as Pillow does it."""
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(pixels, 2, 0)] if turn else []
    return np.dstack([np.asarray(plane.transpose(turn)) for plane in planes]) if turn else pixels


def read_scan(path: str | Path) -> Scan:
    """Reads a picture file with all that it carries. Raises as `open_image`."""
    own = open_image(path)
    try:
        return _scan_of(own, Path(path).read_bytes())
    except Exception as error:  # whatever the readers of what it carries trip over
        raise ValueError(f"{path}: cannot be read ({error}). Save it anew from another program") from error


def _scan_of(own: Image.Image, content: bytes) -> Scan:
    """A scan from its picture, upright in RGB, and the bytes of its file."""
    notes = []
    with Image.open(io.BytesIO(content)) as image:
        if (count := getattr(image, "n_frames", 1)) > 1:
            notes.append(f"the first of its {count} pictures")
        tags = image.tag_v2 if image.format == "TIFF" else {}
        bits = max(tags.get(258, (8,))) if tags else 16 if ";16" in str(image.tile[:1]) else 8
        before = UPRIGHT.get(image.getexif().get(0x0112)) if tags else None  # Pillow turns it when it is loaded
        image.load()  # in a PNG, texts may follow the pixels
        turn = UPRIGHT.get(_orientation(image))
        carried = metadata(image, turned=(before or turn) is not None)
        if image.format == "WEBP" and b"VP8L" in content:
            carried["lossless"] = True
        if 33723 in carried["exif"]:  # IPTC is bytes, which many programs call 32-bit numbers
            with tifffile.TiffFile(io.BytesIO(content)) as tiff:
                tag = tiff.pages[0].tags[33723]
            carried["exif"][33723] = content[tag.valueoffset : tag.valueoffset + tag.valuebytecount]
        opaque, mode = not image.has_transparency_data, image.mode
        grey = mode in ("1", "L", "LA", "La") or mode[0] == "I"
        deep = _sixteen_bits(content, image, (1 if grey else 3) + (not opaque)) if bits == 16 else None
        image = image.copy() if turn is None else image.transpose(turn)
    alpha = None if opaque else np.asarray(image.convert("RGBA").getchannel("A"))
    own = own.convert("L") if grey else own
    foreign = mode if mode in ("CMYK", "LAB") else ""
    to_srgb, from_srgb = color_transforms(carried.get("icc_profile"), "CMYK" if foreign == "CMYK" else own.mode)
    if foreign or from_srgb is None:
        own = own if foreign == "LAB" else to_srgb(image if foreign else own).convert(own.mode)
        carried.pop("icc_profile", None)
        to_srgb, from_srgb = color_transforms(None, own.mode)
        notes.append(f"in sRGB instead of {foreign or 'its own colours'}")
    pixels = np.atleast_3d(np.asarray(own))
    if deep is not None and not foreign:
        deep = _turned(deep, before or turn)
        pixels, alpha = (deep, None) if opaque else (deep[..., :-1], deep[..., -1])
    elif bits > 8:
        notes.append(f"in 8 of its {bits} bits")
    return Scan(pixels, alpha, to_srgb, from_srgb, carried, notes)


def with_tone_of(photo: np.ndarray, restored: RestoredPhoto) -> np.ndarray:
    """A photograph that came back in neutral grey, in the tone that it had: uint8 BGR (H, W, 3).

    Every grey gets the mean tint of those pixels of `photo` that it was made of.
    """
    some = np.s_[:: 1 + len(photo) // 1000, :: 1 + photo.shape[1] // 1000]  # are enough
    grey, known = restored.image[some][..., 0].ravel(), (restored.repainted[some] == 0).ravel().astype(float)
    count = np.bincount(grey, known, 256)
    tints = photo[some].astype(float) - to_grey(photo[some])
    levels, curves = np.arange(256), np.empty((256, 1, 3), np.uint8)
    for channel in range(3):
        tint = np.bincount(grey, known * tints[..., channel].ravel(), 256)
        near = ndimage.gaussian_filter1d([tint, count], 6)  # few pixels of a level say little
        curves[:, 0, channel] = np.rint(levels + near[0] / near[1].clip(min=1e-6)).clip(0, 255)
    return cv2.LUT(restored.image, curves)


def put_back(scan: Scan, restored: RestoredPhoto) -> np.ndarray:
    """The scan's own pixels as restoring changes them: as `scan.pixels`.

    What has not been changed stays as it is, colours outside sRGB and the lower of 16 bits, too.
    """
    scale, result = (257 if scan.pixels.dtype == np.uint16 else 1), np.empty_like(scan.pixels)
    for top in range(0, len(result), 256):  # saves memory
        rows = np.s_[top : top + 256]
        pair = [np.asarray(scan.from_srgb(to_pil(image))) for image in (scan.photo(rows), restored.image[rows])]
        before, after = (np.int32(scale) * image.reshape(scan.pixels[rows].shape) for image in pair)
        repainted = restored.repainted[rows, :, None] > 0
        result[rows] = np.where(repainted, after, scan.pixels[rows] + after - before).clip(0, 255 * scale)
    return result


def _options(kind: str, carried: Mapping[str, Any], sixteen: bool) -> tuple[dict[str, Any], list[str]]:
    """What to give to Pillow's `save` for a format, and what of it the format cannot hold."""
    options, lost = {**carried, "compression": None, **SAVED_AS.get(kind, {})}, []
    exif, info = options.pop("exif"), PngImagePlugin.PngInfo()
    if kind != "TIFF":
        for tag in TIFF_ONLY & exif.keys():
            del exif[tag]
    elif "xmp" in carried:
        exif[700] = carried["xmp"]
    if kind == "TIFF":  # with libtiff, Pillow writes no EXIF
        loose = sixteen or {0x8769, 0x8825} & exif.keys() or carried.get("compression", "raw") == "raw"
        options["compression"] = "raw" if loose else "tiff_lzw"
    for key, value in options.pop("text", {}).items():
        info.add_text(key, value)
    if kind == "PNG" and "xmp" in carried:
        info.add_itxt("XML:com.adobe.xmp", carried["xmp"].decode(errors="replace"))
    try:
        options |= {"exif": exif if kind == "TIFF" and exif.tobytes() else exif.tobytes()} if exif else {}
    except Exception:  # a text where a number belongs, say
        lost.append("without its EXIF data, which are damaged")
    if kind != "JPEG" and options.pop("extra", None):
        lost.append("without its IPTC data")
    for name in ("exif", "xmp"):
        if kind == "JPEG" and len(options.get(name, b"")) > 65500:
            del options[name]
            lost.append(f"without its {name.upper()}, too long for a JPEG")
    return options | {"pnginfo": info}, lost


def write_scan(path: str | Path, scan: Scan, pixels: np.ndarray) -> list[str]:
    """Writes pixels, as `scan.pixels`, atomically, with all that the scan carried. Returns what is
    lost, in words.

    The suffix says the format; JPEG, WebP and the like at quality 95, JPEG at 4:4:4. OSError if it
    cannot be written.
    """
    path = Path(path)
    kind = Image.registered_extensions()[path.suffix.lower()]
    kind = "JPEG" if kind == "MPO" else kind
    sixteen = pixels.dtype == np.uint16 and kind in ("PNG", "TIFF")
    options, lost = _options(kind, scan.carried, sixteen)
    if scan.alpha is not None:
        lost += ["without its transparency"] * (kind == "JPEG")
        pixels = pixels if kind == "JPEG" else np.dstack((pixels, scan.alpha))
    if pixels.dtype == np.uint16 and not sixteen:
        pixels = np.rint(pixels / 257).astype(np.uint8)
        lost.append("in 8 of its 16 bits")
    height, width, channels = pixels.shape
    if sixteen and kind == "TIFF":  # to Pillow, which knows 16 bits in grey only, twice as many pixels of 8
        pixels = np.ascontiguousarray(pixels, "<u2").view(np.uint8).reshape(height, 2 * width, channels)
    elif sixteen:
        layers = [(0,), (0, 0, 0, 1), (2, 1, 0), (2, 1, 0, 3)][channels - 1]  # OpenCV knows no grey with opacity
        content = cv2.imencode(".png", pixels[..., list(layers)])[1].tobytes()
        pixels = np.zeros((1, 1, channels), np.uint8)
    image = as_picture(pixels)
    image = image.convert("RGBA") if image.mode == "LA" and kind == "BMP" else image
    with atomic(path) as temporary:
        image.save(temporary, kind, **options)
        if sixteen and kind == "TIFF":
            with tifffile.TiffFile(temporary, mode="r+b") as tiff:
                tiff.pages[0].tags["ImageWidth"].overwrite(width)
                tiff.pages[0].tags["BitsPerSample"].overwrite((16,) * channels)
        elif sixteen:  # what lies before the pixels, from the small picture: begins with 33 bytes about its size
            small = temporary.read_bytes()
            temporary.write_bytes(content[:33] + small[33 : small.rindex(b"IDAT") - 4] + content[33:])
    return lost


class RestoredFile(NamedTuple):
    """What became of a picture file."""

    file: str
    width: int = 0  # px
    height: int = 0
    repainted: float = math.nan  # share of the picture
    seconds: float = math.nan
    remark: str = ""  # what is lost, or why it could not be restored
    done: bool = True


def restore_file(
    source: Path,
    destination: Path,
    generator: UNetGenerator,
    fill: bool = True,
    mask: Path | None = None,
    keep_tone: bool = False,
    bar: Any = None,
) -> tuple[RestoredFile, RestoredPhoto]:
    """Restores one picture file into another, as `restore_image_gan`. OSError if not writable."""
    begun, scan, painted = time.monotonic(), read_scan(source), None if mask is None else read_mask(mask)
    restored = restore_photo(scan.photo(), generator, fill, painted, bar)
    if keep_tone and is_neutral(restored.image):
        restored = restored._replace(image=with_tone_of(scan.photo(), restored))
    remarks = scan.notes + write_scan(destination, scan, put_back(scan, restored))
    share = math.nan if generator.plain else restored.repainted.mean() / 255
    size = restored.image.shape[1::-1]
    return RestoredFile(source.name, *size, share, time.monotonic() - begun, "; ".join(remarks)), restored


def restore_image_gan(
    source: str | Path,
    destination: str | Path,
    generator: UNetGenerator,
    fill: bool = True,
    mask: str | Path | None = None,
    keep_tone: bool = False,
) -> np.ndarray:
    """Restores a photograph at its own size: reads `source`, writes `destination`, says how much
    has been repainted.

    All that the file carries comes back, too: see `Scan`. Returns the photograph in sRGB, uint8 BGR
    (H, W, 3). `fill` and `mask` (an image file) as in `restore_photo`; with `keep_tone` a sepia
    print is not brought to neutral grey. ValueError if `source` cannot be read, if `destination` is
    one of the two, or has no known image suffix.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    mask = None if mask is None else Path(mask).expanduser()
    for what, path in (("original", source), ("mask", mask)):
        if path and destination.exists() and path.exists() and destination.samefile(path):
            raise ValueError(f"{destination}: the {what} would be overwritten; choose another name for the result")
    if destination.suffix.lower() not in writable_suffixes():
        raise ValueError(f"{destination}: choose a name ending in one of {', '.join(sorted(writable_suffixes()))}")
    report, restored = restore_file(source, destination, generator, fill, mask, keep_tone)
    share = "every pixel drawn anew" if generator.plain else f"{report.repainted:.2%} repainted"
    remark = ", in neutral grey" * is_neutral(restored.image) + f"; {report.remark}" * bool(report.remark)
    print(f"{destination.name}: {share}{remark}")
    return restored.image


# ====== Folders of scans ==========================================================================

REPORT, SHEETS = "_restored.csv", "_before_and_after"  # are written beside restored photographs
REPORT_COLUMNS = ["file", "width", "height", "repainted_percent", "seconds", "restored", "remark"]
BYTES_A_PIXEL = 45  # that restoring a file takes at most, from reading to writing


def plan_folder(
    source: Path, destination: Path, suffix: str = ""
) -> tuple[list[tuple[Path, Path]], list[RestoredFile]]:
    """Which picture file below `source` is restored into which one of `destination`, and which
    cannot be, and why.

    With another `suffix` (".png") they change their format. FileNotFoundError if there are none,
    ValueError if the one folder lies in the other or if two files would get the same name.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination} is a file: name a folder for the results of a folder")
    here, there = source.resolve(), destination.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise ValueError(
            f"the photographs are in {source}, the results would go to {destination}: choose a folder for the results "
            "that is neither the same nor inside the other, so that no original can be lost or restored twice"
        )
    names, left_out = list_images(source, kinds=())
    if not names and not left_out:
        raise FileNotFoundError(f"no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}) in {source} or its subfolders")
    pairs = [(source / name, (destination / name).with_suffix(suffix or Path(name).suffix)) for name in names]
    pairs = [
        (path, target) for path, target in pairs if not path.name.startswith((SHEETS, REPORT))
    ]  # of an earlier run
    count = Counter(str(target).lower() if suffix else target for _, target in pairs)  # to some systems, a.JPG is a.jpg
    if inside := [path.name for path, target in pairs if target.resolve().is_relative_to(here)]:
        raise ValueError(f"{inside[0]}: by a link its result would go to {source}, where the originals are")
    names = [path.relative_to(source).as_posix() for path, target in pairs]
    if clash := [n for n, (_, target) in zip(names, pairs) if count[str(target).lower() if suffix else target] > 1]:
        raise ValueError(f"{', '.join(clash[:6])}: some would get the same name; rename them, or leave out --format")
    return pairs, [RestoredFile(name, remark=reason, done=False) for name, reason in left_out.items()]


def _picture_size(path: Path) -> tuple[int, int]:
    """Width and height in px, not turned; of what is no picture, 0."""
    with contextlib.suppress(Exception), Image.open(path) as image:  # why it cannot be read is said when it is
        return image.size
    return 0, 0


class Tally:
    """Counts what several threads have done, in place of a progress bar; stops them when told."""

    def __init__(self) -> None:
        self.done, self.stopped, self.lock = 0, False, threading.Lock()

    def update(self, count: int = 1) -> None:
        """Of a thread that has done so much. InterruptedError if it is to stop."""
        if self.stopped:
            raise InterruptedError("stopped")
        with self.lock:
            self.done += count


def _in_threads(rest: Sequence[tuple[Path, Path]], restore: Callable, fill: bool) -> Iterator[RestoredFile]:
    """`restore(source, destination, tally)` of all pairs, as many at once as there are cores, and
    memory, for them.

    One core a photograph is faster than all for one after the other, and others are read and
    written meanwhile.
    """
    sizes = [size for size in in_parallel(_picture_size, [path for path, _ in rest]) if min(size)]
    room = psutil.virtual_memory().available / 2 / max((BYTES_A_PIXEL * w * h for w, h in sizes), default=1)
    workers = max(1, min(os.cpu_count() or 1, len(rest), int(room)))
    total = sum(count_windows(sizes_seen(*size, fill)) for size in sizes)
    tally, threads = Tally(), torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    with progress("restoring", total, "window") as bar, ThreadPoolExecutor(workers) as pool:
        try:
            running = {pool.submit(restore, *pair, tally) for pair in rest}
            while running:
                finished, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(tally.done - bar.n)
                yield from (future.result() for future in finished)
        finally:  # whatever stops it, nobody waits minutes for the large scans that are on their way
            tally.stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            torch.set_num_threads(threads)


def _report_row(report: RestoredFile) -> list[str]:
    """What became of a file, as a row of the table."""
    shares = (100 * report.repainted, report.seconds)
    numbers = [str(number or "") for number in (report.width, report.height)]
    numbers += ["" if math.isnan(number) else f"{number:.2f}" for number in shares]
    return [report.file, *numbers, "yes" if report.done else "no", report.remark]


def _write_report(path: Path, rows: Iterable[list[str]]) -> None:
    """Writes the table, sorted by file."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8-sig", newline="") as file:  # as Excel wants it
        csv.writer(file).writerows([REPORT_COLUMNS, *sorted(rows)])


def _read_report(path: Path) -> dict[str, list[str]]:
    """The rows that earlier runs wrote, by file."""
    with contextlib.suppress(OSError, ValueError, csv.Error), path.open(encoding="utf-8-sig", newline="") as file:
        return {row[0]: row for row in csv.reader(file) if len(row) == len(REPORT_COLUMNS) and row != REPORT_COLUMNS}
    return {}


def restore_folder(
    source: str | Path,
    destination: str | Path,
    generator: UNetGenerator,
    fill: bool = True,
    keep_tone: bool = False,
    suffix: str = "",
    overwrite: bool = False,
) -> list[RestoredFile]:
    """Restores all pictures below a folder into another one, under the same names; returns what
    became of each.

    What is there already is left, unless `overwrite`: whatever interrupts it, it goes on when it is
    called again. A file that cannot be read is named, the others are restored. Beside them come a
    table (REPORT) and sheets of pairs (SHEETS). `fill` and `keep_tone` as in `restore_image_gan`;
    `suffix` (".png") changes the format. FileNotFoundError and ValueError as `plan_folder`; OSError
    if it cannot write.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    pairs, unread = plan_folder(source, destination, suffix)
    names = {path: path.relative_to(source).as_posix() for path, _ in pairs}

    def restore(path: Path, target: Path, tally: Tally) -> RestoredFile:
        try:
            report, _ = restore_file(path, target, generator, fill, None, keep_tone, tally)
        except OSError:  # cannot be written, or is to stop
            raise
        except Exception as error:  # one file stops no other, whatever is in it
            return RestoredFile(names[path], remark=str(error) or repr(error), done=False)
        return report._replace(file=names[path])

    with alone_in(destination), evaluating(generator):
        rest = [(path, target) for path, target in pairs if overwrite or not target.is_file()]
        there = [RestoredFile(names[path], remark="was there already") for path in names.keys() - dict(rest).keys()]
        earlier = {file: row for file, row in _read_report(destination / REPORT).items() if row[5] == "yes"}
        reports = {report.file: report for report in [*unread, *there]}
        rows = {file: _report_row(report) for file, report in reports.items()}
        rows |= {report.file: earlier[report.file] for report in there if report.file in earlier}
        _write_report(destination / REPORT, rows.values())
        for report in _in_threads(rest, restore, fill):
            reports[report.file], rows[report.file] = report, _report_row(report)
            _write_report(destination / REPORT, rows.values())
        if any(reports[names[path]].done for path, _ in rest) or not (destination / f"{SHEETS}_01.jpg").exists():
            write_sheets([(path, target) for path, target in pairs if target.is_file()], destination)
    return sorted(reports.values())


TILE, PAIRS_ON_A_SHEET = 240, 20  # px of a picture on a sheet


def most_changed(before: np.ndarray, after: np.ndarray, side: int) -> tuple[int, int]:
    """Where the `side` px square begins, (x, y), in which two images differ most, but for tones.

    The images are (H, W, 3).
    """
    change = np.abs(before.astype(np.float32) - after).max(2)
    sums = cv2.integral(np.maximum(change - np.median(change), 0))
    height, width = change.shape[0] + 1 - side, change.shape[1] + 1 - side
    found = sums[side:, side:] - sums[:height, side:] - sums[side:, :width] + sums[:height, :width]
    y, x = np.unravel_index(found.argmax(), found.shape)
    return int(x), int(y)


def _tile(image: np.ndarray) -> np.ndarray:
    """An image in a white square of TILE px."""
    scale = TILE / max(image.shape[:2])
    size = [max(1, round(length * scale)) for length in image.shape[1::-1]]
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    right, down = TILE - size[0], TILE - size[1]
    edges = (down // 2, down - down // 2, right // 2, right - right // 2)
    return cv2.copyMakeBorder(small, *edges, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def before_and_after(source: Path, restored: Path) -> np.ndarray:
    """Before and after, and of both what changed most, enlarged: uint8 BGR (TILE, 4 TILE, 3)."""
    pair = [read_scan(path).photo() for path in (source, restored)]
    side = min(*pair[0].shape[:2], max(TILE // 3, max(pair[0].shape) // 8))
    scale = 512 / max(512, *pair[0].shape)
    small = [cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for image in pair]
    x, y = (round(start / scale) for start in most_changed(*small, max(1, math.floor(side * scale))))
    return np.hstack([_tile(image) for image in (*pair, *(image[y : y + side, x : x + side] for image in pair))])


def write_sheets(pairs: Sequence[tuple[Path, Path]], folder: Path) -> list[Path]:
    """Writes sheets to look at, 20 (original, restored) file pairs on each; returns their paths."""
    font, sheets = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 16), []

    def draw(pair: tuple[Path, Path]) -> np.ndarray:
        with contextlib.suppress(Exception):  # a file that somebody put there, a picture one pixel wide
            return before_and_after(*pair)
        return np.full((TILE, 4 * TILE, 3), 255, np.uint8)

    strips = in_parallel(draw, pairs, "drawing sheets", "picture", workers=2)
    for first in range(0, len(pairs), PAIRS_ON_A_SHEET):
        names = [restored.relative_to(folder).as_posix() for _, restored in pairs[first : first + PAIRS_ON_A_SHEET]]
        rows = math.ceil(len(names) / 2)
        sheet = Image.new("RGB", (2 * (4 * TILE + 20), rows * (TILE + 30) + 25), "white")
        draw_text = functools.partial(ImageDraw.Draw(sheet).text, fill="black", font=font)
        for column, heading in enumerate(2 * ("before", "after", "before, enlarged", "after, enlarged")):
            draw_text((column * TILE + column // 4 * 20, 2), heading)
        for number, (name, strip) in enumerate(zip(names, strips)):
            x, y = number % 2 * (4 * TILE + 20), number // 2 * (TILE + 30) + 25
            sheet.paste(to_pil(strip), (x, y + 25))
            draw_text((x, y + 2), name[-100:])
        sheets.append(folder / f"{SHEETS}_{first // PAIRS_ON_A_SHEET + 1:02d}.jpg")
        write_image(sheets[-1], cv2.cvtColor(np.asarray(sheet), cv2.COLOR_RGB2BGR))
    return sheets


# ====== Figures ===================================================================================


def listing(*things: Callable, folded: bool = False) -> Any:
    """The source of functions and classes in a notebook: a monospaced, coloured block.

    `folded`, only their names are to be seen until the reader clicks on them. HTML with its own
    styles, since pages made of notebooks set other outputs in a proportional font.
    """
    from IPython.display import HTML
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    sources = "\n\n".join(textwrap.dedent(inspect.getsource(thing)) for thing in things)
    style = "font-family:monospace;white-space:pre;overflow-x:auto;line-height:1.35;margin:0"
    block = highlight(sources, PythonLexer(), HtmlFormatter(noclasses=True, prestyles=style))
    names = ", ".join(thing.__qualname__ for thing in things)
    summary = f"<summary>Source of <code>{names}</code></summary>"
    return HTML(f"<details>{summary}{block}</details>" if folded else block)


def show_images(
    columns: Sequence[Sequence],
    rows: Sequence[str],
    captions: Sequence[Sequence[str]] = (),
    titles: Sequence[str] = (),
    alt: str = "",
) -> plt.Figure:
    """A grid of RGB images (arrays or PIL), column by column.

    `rows` are the names at the left, `titles` those above the columns, `captions` stand below every
    image. `alt` says what is to be seen, for whoever cannot see it.
    """
    wide = 11 / max(5, len(columns))  # inches; all of them are at most as wide as a page
    size = wide * len(columns), wide * (1.12 if captions else 1) * len(rows) + 0.3 * bool(titles)
    options = {"squeeze": False, "layout": "constrained", "subplot_kw": {"xticks": [], "yticks": []}}
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, **options)
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            axes[y, x].imshow(image, vmin=0, vmax=255, interpolation="antialiased")
            if captions:
                axes[y, x].set_xlabel(captions[x][y], fontsize=10)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=11)
    for axis, name in zip(axes[:, 0], rows):
        axis.set_ylabel(name, fontsize=11)
    figure.set_label(alt)
    return figure


def interesting_square(before: np.ndarray, after: np.ndarray, share: float = 0.3) -> tuple[slice, slice]:
    """Rows and columns of the square in which two images (H, W, 3) differ most, `share` of the
    shorter side long: where to look closely.
    """
    side = max(1, round(share * min(before.shape[:2])))
    x, y = most_changed(before, after, side)
    return np.s_[y : y + side, x : x + side]


def _sample_tiles(path: Path) -> list[list[np.ndarray]]:
    """The rows of a file of `save_samples`, each a list of images, RGB of 256 px."""
    grid = np.asarray(open_image(path))
    rows = [grid[y : y + IMAGE_SIZE] for y in range(0, len(grid), IMAGE_SIZE)]
    return [[row[:, x : x + IMAGE_SIZE] for x in range(0, row.shape[1], IMAGE_SIZE)] for row in rows]


def show_samples(
    samples: Mapping[str, Path],
    chosen: Sequence[int],
    titles: Sequence[str] = (),
    closely: bool = False,
    alt: str = "",
) -> plt.Figure:
    """The `chosen` columns of files of `save_samples`, by label: degraded, restored, original.

    `closely`, only the square of each in which the degraded image differs most from the original.
    """
    tiles = [_sample_tiles(path) for path in samples.values()]
    fewest = min(len(rows[0]) for rows in tiles)  # `sample_faces` may have changed on the way
    chosen = [x for x in chosen if x < fewest]
    columns = [[tiles[0][0][x], *(rows[1][x] for rows in tiles), tiles[0][2][x]] for x in chosen]
    if closely:
        squares = [interesting_square(column[0], column[-1]) for column in columns]
        columns = [[image[square] for image in column] for square, column in zip(squares, columns)]
    return show_images(columns, ["degraded", *samples, "original"], titles=titles, alt=alt)


def animate_samples(samples: Mapping[str, Path], kinds: Sequence[str], path: Path) -> Any:
    """An animation (WebP) of files of `save_samples`, by label, for a notebook; written to `path`.

    Its pictures: degraded, restored in each file, original; a column for each kind of damage.
    """
    from IPython.display import HTML

    font, side = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 18), 200
    tiles = [_sample_tiles(file) for file in samples.values()]
    faces = min(len(rows[0]) for rows in tiles) // len(kinds)  # `sample_faces` may have changed
    shown = {"degraded": tiles[0][0]} | {name: rows[1] for name, rows in zip(samples, tiles)}
    frames = []
    for label, images in (shown | {"original": tiles[0][2]}).items():
        frame = Image.new("RGB", (len(kinds) * side, faces * side + 56), "white")
        draw = ImageDraw.Draw(frame)
        draw.text((4, 2), label, fill="black", font=font)
        for number, image in enumerate(images[: faces * len(kinds)]):
            x, y = number % len(kinds) * side, number // len(kinds) * side + 56
            frame.paste(Image.fromarray(image).resize((side, side)), (x, y))
        for number, kind in enumerate(kinds):
            draw.text((number * side + 4, 28), kind, fill="black", font=font)
        frames.append(frame)
    with atomic(path) as temporary:
        durations = [1500, *[700] * len(samples), 1500]  # ms
        frames[0].save(
            temporary, "WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=75
        )
    text = f"Animation: the degraded faces, restored after each epoch ({', '.join(samples)}), the originals"
    return HTML(image_element("webp", path.read_bytes(), text))


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Saves a figure atomically at 110 dpi."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _plot_curves(history: Sequence[Mapping], panels: Mapping[str, Mapping[str, str]], path: Path) -> plt.Figure:
    """Curves over epochs, a panel per title; `panels` maps title to {key of history: label}."""
    panels = {title: curves for title, curves in panels.items() if any(key in row for key in curves for row in history)}
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.2), squeeze=False, layout="constrained")
    for axis, (title, curves) in zip(axes[0], panels.items()):
        for key, label in curves.items():
            rows = [row for row in history if key in row]
            axis.plot([row["epoch"] for row in rows], [row[key] for row in rows], marker="o", markersize=3, label=label)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)  # below: curves fill the panel
    figure.set_label("Curves over the epochs: " + "; ".join(panels))
    save_figure(figure, path)
    return figure


def plot_pretrain_losses(history: Sequence[Mapping], path: Path) -> plt.Figure:
    """The pretraining's L1 + 0.1 MSE, and what the heads learn from, drawn and saved as `path`."""
    curves = {"loss": "training", "val_loss": "validation (averaged weights)"}
    panels = {"Pretraining: L1 + 0.1 MSE": curves, "loss of the hole detection": {"holes": "training"}}
    panels |= {"colour lessons": {"color": "training"}, "grain lessons": {"grain": "training"}}
    return _plot_curves(history, panels, path)


def plot_gan_losses(history: Sequence[Mapping], path: Path) -> plt.Figure:
    """The losses of both networks in the GAN training, drawn and saved as `path`."""
    panels = {
        "Discriminator (0.25: it cannot tell)": {"d_real": "on real pairs", "d_fake": "on fake pairs"},
        "Generator, adversarial": {"g_adv": "(D(fake) - 1)²"},
        "Generator, L1": {"g_l1": "training", "val_l1": "validation (averaged weights)"},
        "loss of the hole detection": {"holes": "training"},
    }
    return _plot_curves(history, panels, path)


def compare_results(generator: nn.Module, pairs: Sequence[Pair], run: Run, path: Path, sets: int = 5) -> plt.Figure:
    """Shows `sets` sets of (degraded, restored, original), PSNR and SSIM below.

    Saves them as `path`.
    """
    degraded, original, info = next(iter(make_loader(pairs[:sets], sets, torch.device("cpu"))))
    with evaluating(generator):
        restored = generator(degraded.to(run.device)).cpu()
    before, after = image_metrics(degraded, original), image_metrics(restored, original)
    columns = list(zip(*(to_pixels(x).permute(0, 2, 3, 1).numpy() for x in (degraded, restored, original))))
    captions = []
    for i, name in enumerate(info["name"]):
        scores = [f"{m['psnr'][i]:.1f} dB, SSIM {m['ssim'][i]:.3f}" for m in (before, after)]
        captions.append([*scores, name])
    kinds = ", ".join(dict.fromkeys(info["kind"]))
    alt = f"Degraded ({kinds}), restored and original faces, with PSNR and SSIM below each"
    figure = show_images(columns, ("degraded", "restored", "original"), captions, info["kind"], alt)
    save_figure(figure, path)
    return figure


# ====== Before and after, to play with ============================================================

SLIDER = """
<figure id="{name}" style="margin:1em 0;max-width:{width}px">
<div style="position:relative;display:flex;gap:4px">
<img alt="before" src="{before}" style="width:50%">
<img alt="after" src="{after}" style="width:50%">
</div>
<figcaption>{caption}</figcaption>
<script>
(() => {{
  const figure = document.getElementById("{name}"), [before, after] = figure.querySelectorAll("img");
  const box = before.parentNode, line = document.createElement("div"), slider = document.createElement("input");
  Object.assign(slider, {{type: "range", min: 0, max: 100, step: 0.5, ariaLabel: "share shown as it was before"}});
  box.style.display = "block";
  before.style.cssText = "display:block;width:100%";
  after.style.cssText = "position:absolute;inset:0;width:100%;height:100%";
  line.style.cssText = "position:absolute;top:0;bottom:0;width:2px;background:#fff;box-shadow:0 0 3px #000";
  slider.style.cssText = "position:absolute;inset:0;width:100%;height:100%;margin:0;opacity:0;cursor:ew-resize";
  slider.oninput = () => {{
    after.style.clipPath = `inset(0 0 0 ${{slider.value}}%)`;
    line.style.left = `calc(${{slider.value}}% - 1px)`;
  }};
  slider.onfocus = () => line.style.background = "#fc0";
  slider.onblur = () => line.style.background = "#fff";
  box.append(line, slider);
  slider.oninput();
}})();
</script>
</figure>
"""
PAGE = """<!doctype html>
<meta charset="utf-8"><title>Before and after</title>
<body style="font-family:sans-serif">
<p>Left of the line each photograph as it was, right of it restored. Drag the line, or use Tab and the arrow keys.</p>
"""


def compare_slider(before: np.ndarray, after: np.ndarray, caption: str = "", longest: int = 1200) -> str:
    """Two images, uint8 BGR (H, W, 3), one over the other, with a line between to drag: HTML that
    needs no other file.

    With the keyboard: Tab, then the arrow keys. Where scripts are off, both stand side by side.
    `longest` is the most px of a side.
    """
    sources = []
    for image in (before, after):
        scale = min(1, longest / max(image.shape[:2]))
        small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image
        content = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()
        sources.append(data_uri("jpeg", content))
    name = f"compare-{fingerprint(*sources, caption)}"
    return SLIDER.format(
        name=name, before=sources[0], after=sources[1], width=small.shape[1], caption=html.escape(caption)
    )


def write_page(path: Path, pairs: Iterable[tuple[Path, Path]]) -> None:
    """One HTML page, a `compare_slider` for each (original, restored) pair; needs no other file."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as page:
        page.write(PAGE)
        for number, (source, restored) in enumerate(pairs, 1):
            with contextlib.suppress(ValueError):  # a file that somebody put there
                photos = (read_scan(file).photo() for file in (source, restored))
                page.write(compare_slider(*photos, f"{number}. {restored.name}"))


# ====== Command line ==============================================================================

OWN_WEIGHTS = "face_restoration_generator_final.pth"
SHIPPED_WEIGHTS = Path(__file__).parent / "outputs" / "restoration_weights.pth"  # of profile `long`; see the README
EXAMPLES = """
examples:
  python restoration_utils.py restore scans restored              every picture below scans/, to restored/
  python restoration_utils.py restore old.jpg mended.png          one picture
  python restoration_utils.py restore old.jpg mended.png --mask damage.png
  python restoration_utils.py restore scans restored --no-fill --format png
What is in OUT already is left as it is: interrupted, the same command goes on.
"""


def find_weights(places: Places) -> Path:
    """One's own weights, if the notebooks have written some, otherwise those that come with the
    project.

    FileNotFoundError if there are neither.
    """
    attached = sorted(places.attached.rglob(OWN_WEIGHTS)) if places.attached else []  # on Kaggle
    for path in (places.outputs / OWN_WEIGHTS, *attached, SHIPPED_WEIGHTS):
        if path.is_file():
            return path
    missing = f"neither {OWN_WEIGHTS} in {places.outputs} nor {SHIPPED_WEIGHTS}"
    raise FileNotFoundError(f"no weights: {missing}; run notebook 05_train_gan, or get them again")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description="Restores photographs.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train on the faces: notebooks 04 and 05 without notebooks")
    train.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # see train_in_processes
    train.set_defaults(run=_train)
    restore = commands.add_parser(
        "restore",
        help="restore a picture, or all below a folder",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    restore.set_defaults(run=_restore)
    restore.add_argument("source", metavar="IN", type=Path, help="a picture or a folder")
    restore.add_argument("destination", metavar="OUT", type=Path, help="a file name, or a folder (made if missing)")
    restore.add_argument("--weights", type=Path, help="a checkpoint; else your own, or those that came along")
    how = restore.add_mutually_exclusive_group()
    how.add_argument("--mask", type=Path, help="repaint what is white in this picture, and only that (for one picture)")
    how.add_argument("--no-fill", action="store_true", help="mend colours and noise, repaint nothing")
    restore.add_argument("--keep-tone", action="store_true", help="leave sepia as it is, instead of neutral grey")
    restore.add_argument("--sure", type=float, help="0 to 1: how sure damage must be to be repainted; lower finds more")
    restore.add_argument("--device", choices=("cpu", "cuda"), help="else the GPU, if there is one")
    restore.add_argument("--format", help="of the results: jpg, png, tif, webp, ...; else as the originals")
    restore.add_argument("--overwrite", action="store_true", help="restore again what is in OUT already")
    restore.add_argument("--page", action="store_true", help="also write a page to compare before and after")
    return parser.parse_args(arguments)


def _restore_one(options: argparse.Namespace, generator: UNetGenerator) -> Path:
    """One picture, as the command line asks; returns where it is."""
    source, target = options.source, options.destination
    if target.is_dir() or not target.suffix:
        target = target / source.with_suffix(options.format or source.suffix).name
    elif options.format and target.suffix.lower() != options.format:
        raise ValueError(f"{target.name} does not end in {options.format}: leave out --format")
    if target.exists() and not options.overwrite and target.resolve() != source.resolve():
        print(f"{target} is there already, and is left as it is; --overwrite replaces it")
        return target
    restore_image_gan(source, target, generator, not options.no_fill, options.mask, options.keep_tone)
    return target


def _restore_many(options: argparse.Namespace, generator: UNetGenerator) -> tuple[list[tuple[Path, Path]], int]:
    """A folder, as the command line asks: pairs (original, restored) of files, and exit status."""
    if options.mask:
        raise ValueError("a mask belongs to one picture, not to a folder: restore that picture by itself")
    source, destination = options.source, options.destination
    how = {"fill": not options.no_fill, "keep_tone": options.keep_tone}
    reports = restore_folder(source, destination, generator, suffix=options.format, overwrite=options.overwrite, **how)
    failed = [report for report in reports if not report.done]
    for report in failed:
        print(f"not restored: {report.file}: {report.remark}")
    now = sum(report.done and not math.isnan(report.seconds) for report in reports)
    left = len(reports) - now - len(failed)
    print(f"{now} restored, {left} there already, {len(failed)} not restored; see {destination / REPORT}")
    if left:
        print("To restore again what is there already, with other options, say --overwrite")
    pairs = [(path, target) for path, target in plan_folder(source, destination, options.format)[0] if target.exists()]
    return pairs, int(bool(failed))


def _restore(options: argparse.Namespace) -> int:
    """The command `restore`; returns the exit status."""
    options.format = f".{options.format.lower().lstrip('.')}" if options.format else ""
    if options.format and options.format not in writable_suffixes():
        raise ValueError(f"--format {options.format}: choose one of {', '.join(sorted(writable_suffixes()))}")
    if options.sure is not None and not 0 < options.sure < 1:
        raise ValueError(f"--sure {options.sure}: must lie between 0 and 1")
    if not options.source.exists():
        raise FileNotFoundError(f"{options.source}: no such file or folder")
    weights = options.weights or find_weights(find_places())
    generator = load_generator(weights, options.device or choose_device())
    generator.sure = options.sure or generator.sure
    print(f"weights: {weights}")
    if options.source.is_dir():
        pairs, status = _restore_many(options, generator)
        page = options.destination / f"{SHEETS}.html"
    else:
        target = _restore_one(options, generator)
        pairs, status, page = [(options.source, target)], 0, target.with_suffix(".html")
    if options.page:
        write_page(page, pairs)
        print(f"compare them in {page}")
    return status


def _prepare_training() -> list[tuple]:
    """The jobs (stage, run, weights, train, validation) of both trainings, from the environment.

    Of weights there are none: both begin with new ones.
    """
    settings, places, device = start()
    pairs = prepare_pairs(find_faces(settings, places), places, settings)
    splits, run = split_pairs(pairs, settings), Run(settings, places, device, faces_id(pairs))
    first = "pretrain", run, [], splits.pretrain_train, splits.pretrain_validation
    return [first, ("gan", run, [], splits.gan_train, splits.gan_validation)]


def _end_with(parent: psutil.Process) -> None:
    """Ends this process as soon as its parent has, which may have been killed."""
    while parent.is_running() and os.getppid() == parent.pid:
        time.sleep(1)
    os._exit(1)


def _train(options: argparse.Namespace) -> int:
    """The command `train`: alone, or one of those that `torch.distributed.run` starts."""
    if "LOCAL_RANK" in os.environ:
        threading.Thread(target=_end_with, args=(psutil.Process(os.getppid()),), daemon=True).start()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if os.environ.get("RANK", "0") == "0":
        jobs = torch.load(options.job, "cpu", weights_only=False) if options.job else _prepare_training()
        if RELAY in os.environ:
            Path(options.job).unlink()  # as large as the networks; the notebook may be killed and never tidy up
    else:
        jobs, sys.stdout = None, open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    device = choose_device()
    team = join_team(device)
    for stage, run, weights, train, validation in team.from_first(jobs):
        run, s = run._replace(device=device, team=team), run.settings
        if s.pretrain_batch % team.size or s.gan_batch % team.size:
            batches = f"batches of {s.pretrain_batch} and {s.gan_batch} pictures"
            raise ValueError(f"{team.size} processes cannot share {batches} equally: start 2 or 4")
        kind = Precision(device, s.mixed_precision).dtype
        if team.from_first(kind) != kind:
            raise ValueError("the GPUs compute in different kinds of 16 bits: take equal ones or mixed_precision=False")
        networks = build_generator(s), build_discriminator(s)
        for network, state in zip(networks, weights):
            network.load_state_dict(state)
        if stage == "pretrain":
            history = pretrain_generator(networks[0], train, validation, run)
            if len(history) < s.pretrain_epochs and not stopped_early(history, s):
                break  # the time is over; the GAN shall not start from what is not finished
        else:
            train_gan(*networks, train, validation, run)
    if team.size > 1:
        dist.destroy_process_group()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0, 1 if a file was not restored, 2 if nothing could be done."""
    options = _parse(arguments)
    warnings.filterwarnings("ignore", module="PIL")  # about pictures' metadata
    keep_freed_memory()
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("stopped; what is done is kept, and the same command goes on", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError, FloatingPointError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


# ====== Appendix: the synthetic portraits =========================================================

# Shapes are in head units: x right, y down from between the eyes, the chin at y = 1. The average
# face, whose right half the tables give, is painted from the front, in float32 BGR 0..1; last of
# all the picture is bent to the sitter's own.
HEAD_UNIT = 0.31  # as a share of the picture
EYES_CENTRE = np.array((0.5, 0.46))  # where the middle of the eyes is, likewise
RELIEF_SIZE = 256  # rows and columns of the reliefs that are lit: soft light needs no more
RELIEF_X = ((np.arange(RELIEF_SIZE) + 0.5) / RELIEF_SIZE - EYES_CENTRE[0]) / HEAD_UNIT
RELIEF_Y = ((np.arange(RELIEF_SIZE)[:, None] + 0.5) / RELIEF_SIZE - EYES_CENTRE[1]) / HEAD_UNIT


def _tables(text: str) -> dict[str, np.ndarray]:
    """Tables of numbers from the lines of a text: a name, a colon, and rows parted by commas."""
    lines = (line.partition(":") for line in text.strip().splitlines())
    return {name.strip(): np.array([row.split() for row in rows.split(",")], np.float64) for name, _, rows in lines}


# Colours (BGR); outlines; patches of hair (one guide hair a row); bumps of the face (x, y, width,
# height, rise); how faces differ (x, y, reach, usual shift right and down, by how many of these men
# differ from the average).
PORTRAIT_TABLES = _tables("""
    skin: 33 42 66, 46 66 104, 70 98 146, 94 128 178, 122 155 205, 152 182 226, 176 198 232
    hair: 17 17 20, 24 28 40, 32 42 62, 44 66 98, 62 100 142, 100 156 196, 30 58 132
    iris: 20 30 50, 30 48 74, 48 82 100, 80 106 84, 142 118 88, 146 132 112
    cloth: 248 248 248, 14 13 13, 80 48 36, 44 40 120, 76 88 70, 120 150 176, 66 116 186, 130 104 140, 24 20 18
    head: 0 -1.02, .26 -.985, .47 -.86, .61 -.6, .665 -.3, .67 .1, .62 .34, .53 .57, .4 .79, .19 .945, 0 .995
    ear: .62 -.1, .71 -.13, .755 -.02, .73 .17, .68 .32, .6 .3
    body: 0 .4, .38 .41, .38 .9, .44 1.12, .74 1.3, 1.15 1.42, 1.6 1.6, 2.2 2.5, 0 2.5
    round neck: 0 1.34, .2 1.32, .4 1.22, .47 1.08
    high neck: 0 1.1, .25 1.06, .4 .93
    open neck: 0 1.62, .12 1.48, .3 1.27, .45 1.07
    jacket: .4 1, .42 1.16, .3 1.42, .04 2, 2.2 2.5, 1.7 1.53, 1.2 1.36, .76 1.23, .5 1.1
    collar: .46 1.02, .3 1.2, .02 1.36, .19 1.6, .36 1.42, .52 1.12
    tie: 0 1.34, .08 1.36, .055 1.5, .13 2, 0 2.1
    eye: .145 .022, .2 -.038, .278 -.06, .355 -.045, .431 -.008, .431 -.008, .355 .03, .285 .041, .208 .035, .145 .022
    hair volume: 0 -1.6, .6 -1.35, .88 -.8, .97 0, 1 1, 1 2.5
    brow: .11 -.135 .16 -.165, .2 -.18 .25 -.215, .33 -.21 .38 -.235, .46 -.175 .51 -.167
    moustache: .01 .54 .05 .62, .08 .54 .16 .62, .15 .555 .25 .68
    beard: .64 .1 .66 .26, .56 .34 .61 .51, .4 .58 .5 .76, .22 .77 .3 .95, 0 .82 0 1.06
    crop: .65 .05 .7 .08, .63 -.27 .75 -.4, .52 -.49 .68 -.82, .27 -.63 .4 -1.07, -.04 -.65 -.04 -1.12
    curtain: -.01 -.7 .42 -.52 .6 -.2 .65 .1 .66 .5 .66 1, -.01 -1.12 .5 -1 .76 -.55 .82 0 .86 .5 .84 1.05
    fringe: -.03 -1.06 -.03 -.8 -.03 -.55 -.03 -.3, .3 -1.06 .5 -.8 .58 -.5 .6 -.27
    back: 0 -.6 0 .2 0 1, .75 -.6 .83 .2 .82 1
    bumps 1: 0 .1 .06 .2 .08, 0 .41 .085 .075 .15, .115 .44 .05 .05 .075, .14 -.02 .05 .09 -.045, .29 0 .15 .1 -.085
    bumps 2: 0 .61 .16 .1 .08, 0 .7 .11 .035 .04, 0 .8 .12 .035 -.035, .28 .6 .04 .07 -.035, 0 .92 .13 .09 .07
    bumps 3: .26 -.21 .18 .06 .04, .29 .02 .1 .065 .06, .4 .24 .14 .11 .05, .43 .52 .1 .14 -.04, .6 -.33 .08 .2 -.04
    morphs: .5 .6 .2 .035 0 .5, .4 1 .25 .05 0 .8, .2 .63 .08 0 .016 0, 0 1 .25 0 .03 .2, 0 .44 .13 0 .02 .2
""")
# Tint of blue and green, of red; strength at twenty, what age adds; blur, width (0: an area);
# points on the right half.
FACE_GLAZES = _tables("""
    cheek: .84 1.03, .8 0, .07 .22, .33 .27, .42 .3, .52 .33
    socket: .72 .78, .5 0, .03 .07, .14 -.03, .28 -.09, .43 -.03
    lid: .5 .6, .8 0, .006 .02, .145 -.014, .2 -.074, .278 -.096, .355 -.081, .431 -.044
    lashes: .14 .16, .9 0, .004 .026, .145 .022, .2 -.038, .278 -.06, .355 -.049, .44 -.016
    lower lid: .3 .4, .6 0, .004 .012, .431 -.008, .355 .03, .285 .041, .208 .035, .145 .022
    eye bag: .76 .8, .2 .7, .014 .03, .431 .052, .355 .09, .285 .101, .208 .095, .145 .082
    nostril: .2 .3, .9 0, .009 .03, .025 .487, .055 .474, .094 .487
    upper lip: .54 .76, .85 0, .006 0, 0 .593, .035 .583, .11 .595, .215 .625, .1 .64, 0 .65
    lower lip: .66 .88, .85 0, .007 0, 0 .65, .1 .64, .215 .625, .11 .697, 0 .738
    mouth: .2 .3, .8 0, .005 .02, -.225 .62, -.1 .64, 0 .65, .1 .64, .225 .62
    fold: .68 .76, -.1 1, .012 .025, .15 .4, .22 .5, .275 .64
    crow's foot: .78 .86, -.3 1, .009 .02, .44 0, .5 -.01, .55 -.04
    forehead: .84 .9, -.3 1.2, .013 .035, -.32 -.45, -.1 -.44, .1 -.45, .32 -.44
    glasses: .08 .1, 1 0, .003 .03, 0 -.03, .09 -.01, .12 .11, .2 .16, .38 .16, .46 .12, .49 -.06, .38 -.1, .2 -.1, .1 0
    temple of glasses: .08 .1, 1 0, .003 .03, .47 -.05, .57 -.06, .67 -.05
""")


class Sitter:
    """One invented person; age runs from twenty (0) to eighty years (1)."""

    def __init__(self, rng: np.random.Generator) -> None:
        """Draws what several painters have to know."""
        skins, hairs, irises = (PORTRAIT_TABLES[name] / 255 for name in ("skin", "hair", "iris"))
        self.woman, self.age, tone = rng.random() < 0.5, rng.beta(1.1, 1.6), rng.uniform(0, 6)
        self.skin = np.array([np.interp(tone, range(7), channel) for channel in skins.T])
        grey = np.clip(3 * self.age - 1.5 + rng.normal(0, 0.25), 0, 1) * (self.age > 0.4)
        self.hair = rng.choice(hairs[: 3 if tone < 3 else 7]) * (1 - grey) + rng.uniform(0.43, 0.7) * grey
        self.iris, self.glasses = rng.choice(irises[: 2 if tone < 3 else 6]), rng.random() < 0.15 + 0.2 * self.age
        styles = ("curtain", "curtain", "curtain fringe", "crop", "curtain", "crop", "crop", "")
        self.head_hair = str(rng.choice(styles[:4] if self.woman else styles[4:])).split()
        beards = ("brow", "brow moustache", "brow moustache beard", "brow moustache beard")
        self.face_hair = str(rng.choice(beards[:1] if self.woman else beards)).split()
        names, length = self.face_hair + self.head_hair + ["back"], rng.uniform(0.4, 1.7) if self.woman else 0.1
        self.guides = {name: rows.reshape(len(rows), -1, 2) for name, rows in PORTRAIT_TABLES.items() if name in names}
        self.part, self.curl, rise = rng.uniform(-0.25, 0.25), rng.choice((0, 0, 0.03)), rng.uniform(0.1, 0.5)
        for name in [*self.head_hair, "back"]:
            x, y = np.moveaxis(self.guides[name], -1, 0)
            y = np.where(y > 0, y * length, y - rise * np.clip(-0.65 - y, 0, 1))
            self.guides[name] = np.stack((x, y), -1)
        self.makeup = rng.uniform(1, 1.6) if self.woman else rng.uniform(0.6, 0.9)
        lamp = np.array((rng.choice((-1, 1)) * rng.uniform(0.2, 0.8), rng.uniform(-0.75, -0.3), 0.75))
        self.lamp, warmth = np.float32(lamp / np.linalg.norm(lamp)), np.array((-1, 0, 1)) * rng.uniform(-0.08, 0.12)
        self.light, self.ambient = (1 + warmth) * rng.uniform(0.95, 1.15), (1 - warmth) * rng.uniform(0.12, 0.3)


def smooth_curve(points: np.ndarray, steps: int = 8) -> np.ndarray:
    """Runs a Catmull-Rom spline through points along axis 0."""
    ends = np.concatenate((points[:1], points, points[-1:]))
    a, b, c, d = (ends[i : i + len(points) - 1, None] for i in range(4))
    t = (np.arange(steps) / steps).reshape(-1, *[1] * (points.ndim - 1))
    smooth = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * b - a - 3 * c + d)))
    return np.concatenate((smooth.reshape(-1, *points.shape[1:]), points[-1:]))


def brush_stroke(points: np.ndarray, width: float) -> np.ndarray:
    """Outline of a smooth stroke through points that tapers at both ends."""
    line = smooth_curve(points)
    along = np.gradient(line, axis=0)
    across = along[:, ::-1] * (-width / 2, width / 2) / np.linalg.norm(along, axis=1, keepdims=True)
    across *= np.sin(np.linspace(0.15, np.pi - 0.15, len(line)))[:, None]
    return np.concatenate((line + across, (line - across)[::-1]))


def smooth_noise(rng: np.random.Generator, rows: int, columns: int, size: int) -> np.ndarray:
    """Noise of about unit variance: a random grid stretched over a square picture."""
    return cv2.resize(np.float32(rng.normal(0, 1.3, (rows, columns))), (size, size), interpolation=cv2.INTER_CUBIC)


def paint_shape(
    image: np.ndarray, outline: np.ndarray, paint: object, alpha: float = 1, blur: float = 0, glaze: bool = False
) -> None:
    """Paints a shape and its mirror image, softened by `blur`, with a colour or a picture.

    A glaze multiplies.
    """
    blur, paint = blur * HEAD_UNIT * len(image), np.asarray(paint, np.float32)
    pixels = (np.stack((outline, outline * (-1, 1))) * HEAD_UNIT + EYES_CENTRE) * len(image)
    low = np.clip(pixels.min((0, 1)) - 3 * blur - 2, 0, len(image) - 1).astype(int)
    high = np.clip(pixels.max((0, 1)) + 3 * blur + 2, low + 1, len(image)).astype(int)
    part = np.s_[low[1] : high[1], low[0] : high[0]]  # no more than the shape needs
    mask = np.zeros((high - low)[::-1], np.uint8)
    for polygon in np.rint((pixels - low) * 16).astype(np.int32, order="C"):
        cv2.fillPoly(mask, [polygon], 255, cv2.LINE_AA, 4)
    mask = cv2.GaussianBlur(mask, (0, 0), blur) if blur > 0.3 else mask
    paint = image[part] * paint if glaze else paint[part] if paint.ndim == 3 else paint
    image[part] += (paint - image[part]) * (mask * np.float32(alpha / 255))[..., None]


def paint_backdrop(rng: np.random.Generator, size: int) -> np.ndarray:
    """Paints a wall in cloudy light, perhaps with blurred lamps or hard-edged windows, shelves."""
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    wall = rng.choice((rng.uniform(0.05, 0.5), rng.uniform(0.4, 0.97))) + rng.normal(0, 0.03, 3)
    clouds = 0.5 + rng.uniform(-0.5, 0.5) * x + rng.uniform(-0.5, 0.5) * y + 0.15 * smooth_noise(rng, 4, 4, 128)
    image = wall + rng.normal(rng.normal(0, 0.1), 0.03, 3) * clouds[..., None] - 0.1 * wall * (x * x + y * y)[..., None]
    for across, down, radius in rng.integers((0, 0, 4), (128, 128, 12), (8 * (rng.random() < 0.3), 3)).tolist():
        cv2.circle(image, (across, down), radius, (wall * rng.uniform(1, 1.3) + 0.1).tolist(), -1)
    image = cv2.resize(cv2.blur(np.float32(image.clip(0.02, 1)), (5, 5)), (size, size), interpolation=cv2.INTER_CUBIC)
    if rng.random() < 0.25:
        paint_bars(rng, image, lambda: np.float32(rng.choice((0.02, 0.3, 0.6, 0.99)) + rng.normal(0, 0.02, (2, 3))))
    for _ in range(rng.integers(1, 4) * (rng.random() < 0.4)):  # their edges are no damage
        left, top, wide, high = (rng.uniform((0, 0, 0.05, 0.1), (0.95, 0.7, 0.35, 0.5)) * size).astype(int)
        image[top : top + high, left : left + wide] = rng.choice((0.02, 0.3, 0.6, 0.99)) + rng.normal(0, 0.02, 3)
    return image


def round_relief(outline: np.ndarray, depth: float, bumps: np.ndarray | tuple = ()) -> np.ndarray:
    """Relief of a body from the right half of its outline, with bumps: the wider, the deeper."""
    width = np.interp(RELIEF_Y, outline[:, 1], outline[:, 0] * 1.05 + 0.001)
    height = depth * np.sqrt(width / width.max() * np.clip(1 - np.abs(RELIEF_X / width) ** 2.4, 0, 1))
    for x, y, wide, high, rise in bumps:
        height += rise * np.exp(-0.5 * (((np.abs(RELIEF_X) - x) / wide) ** 2 + ((RELIEF_Y - y) / high) ** 2))
    return np.float32(height)


def light_relief(sitter: Sitter, albedo: np.ndarray, height: np.ndarray, size: int, gloss: float) -> np.ndarray:
    """Lights a relief (head units): wrapped Lambert light, cast shadows, darker hollows, sheen."""
    (lx, ly, lz), step = sitter.lamp, 1 / (HEAD_UNIT * RELIEF_SIZE)
    gy, gx = np.gradient(cv2.GaussianBlur(height, (0, 0), 1.2), step)  # without the steps of its edges
    steep, low, blocked = np.sqrt(1 + gx * gx + gy * gy)[..., None], np.hypot(lx, ly), np.zeros_like(height)
    for reach in np.arange(0.05, 0.4, 0.05):  # walk towards the lamp and note what stands in the way
        shift = np.rint(np.array((-ly, -lx)) / low * reach / step).astype(int)
        blocked = np.maximum(blocked, np.roll(height, shift, (0, 1)) - height - np.float32(reach * lz / low))
    clear = 1 - 0.75 * cv2.GaussianBlur(np.clip(blocked / 0.05, 0, 1), (0, 0), 0.02 / step)[..., None]
    hollow = np.clip((cv2.GaussianBlur(height, (0, 0), 0.07 / step) - height) * 6, 0, 0.5)[..., None]
    facing = (lz - lx * gx - ly * gy)[..., None] / steep
    sheen = np.clip((facing + 1 / steep) / np.sqrt(2 + 2 * lz), 0, 1) ** 18 * gloss  # halfway to the viewer
    wrap = np.float32((0.12, 0.18, 0.32))  # red light travels through skin and softens the edge of shadows
    diffuse = np.clip((facing + wrap) / (1 + wrap), 0, 1) * clear * sitter.light + sitter.ambient * (0.6 + 0.4 / steep)
    lit = np.float32(albedo) ** 2.2 * diffuse * (1 - hollow) + sheen * clear * sitter.light
    return cv2.resize(np.float32(lit.clip(0, 1) ** (1 / 2.2)), (size, size), interpolation=cv2.INTER_CUBIC)


def paint_clothes(rng: np.random.Generator, image: np.ndarray, sitter: Sitter, head: np.ndarray) -> None:
    """Paints plain, striped, checked or dotted clothes, with the head's shadow, or a suit."""
    suit = rng.random() < 0.35
    neck = smooth_curve(PORTRAIT_TABLES["round neck" if suit else rng.choice(("round neck", "high neck", "open neck"))])
    body = smooth_curve(PORTRAIT_TABLES["body"]) * (1.03, 1) - (0, 0.04)
    folds = 0.03 * smooth_noise(rng, 10, 10, RELIEF_SIZE) + 0.006 * smooth_noise(rng, 6, 30, RELIEF_SIZE)
    shade = light_relief(sitter, np.ones(3), np.maximum(head, round_relief(body, 0.5) + folds - 0.1), len(image), 0)
    waves = rng.choice((0, 0, 1), (2, 1)) * rng.uniform(0.12, 0.5) * np.arange(RELIEF_SIZE)  # 0: stripes, or plain
    share = np.clip(4 * np.outer(*np.cos(waves)) - rng.choice((0, 2)), 0, 1)[..., None]
    first, second, coat, tie = np.float32(rng.choice(PORTRAIT_TABLES["cloth"], 4) / 255)
    if suit and rng.random() < 0.7:  # a white shirt: bright, flat and hard-edged, as a hole may be
        first = second = PORTRAIT_TABLES["cloth"][0].astype(np.float32) / 255
    cloth = cv2.resize(np.float32(first + (second - first) * share), image.shape[:2], interpolation=cv2.INTER_CUBIC)
    paint_shape(image, np.concatenate((neck, body[body[:, 1] > neck[-1, 1] + 0.03])), shade * cloth)
    paint_shape(image, brush_stroke(neck[::8] + (0, 0.06), 0.02), 0.6, 0.6, 0.008, glaze=True)
    if suit and rng.random() < 0.6:
        paint_shape(image, PORTRAIT_TABLES["tie"], shade * tie)
    if suit:
        paint_shape(image, PORTRAIT_TABLES["collar"] + (0.01, 0.03), 0.5, 0.6, 0.02, glaze=True)  # its shadow
        paint_shape(image, PORTRAIT_TABLES["collar"], np.minimum(1.1 * shade * first, 1))
        paint_shape(image, PORTRAIT_TABLES["jacket"], shade * coat)


def paint_face(skin: np.ndarray, sitter: Sitter) -> None:
    """Paints eyes, lips, creases, perhaps glasses, and the shadows of the hair on lit skin."""
    ball, eye, disc = skin.copy(), PORTRAIT_TABLES["eye"], cv2.ellipse2Poly((0, 0), (999, 999), 0, 0, 360, 12) / 999
    paint_shape(ball, disc * (0.17, 0.1) + (0.285, 0), (0.75, 0.78, 0.81), 0.75)
    for radius, shade, blur in ((0.059, 0.3, 0.004), (0.047, 1, 0.01), (0.024, 0.05, 0.003)):
        paint_shape(ball, disc * radius + (0.285, -0.009), sitter.iris * shade, 0.96, blur)
    paint_shape(ball, disc * (0.038, 0.022) + (0.285, 0.019), 1.7, 0.6, 0.01, glaze=True)
    paint_shape(ball, brush_stroke(eye[:5] + (0, 0.012), 0.065), 0.4, 0.85, 0.01, glaze=True)
    paint_shape(ball, disc * 0.012 + (0.295, -0.033), 1, 0.9, 0.002)
    paint_shape(skin, smooth_curve(eye), ball, 1, 0.003)  # the opening between the lids
    for name in sitter.head_hair + sitter.face_hair:
        hairs = sitter.guides[name] + (0, 0.03)
        shadow = np.concatenate((hairs[0], hairs[:, -1], hairs[-1, ::-1], hairs[::-1, 0]))
        paint_shape(skin, shadow, sitter.hair * 0.5 + 0.45, 0.6, 0.03, glaze=True)
    for name, rows in FACE_GLAZES.items():
        (cool, red), (young, old), (blur, width), points = *rows[:3], rows[3:]
        outline = brush_stroke(points, width) if width else smooth_curve(points)
        alpha = np.clip(young + old * sitter.age, 0, 1) * (sitter.glasses or "glasses" not in name)
        paint_shape(skin, outline, np.array((cool, cool, red)) ** sitter.makeup, alpha, blur, glaze=True)


def grow_hairs(rng: np.random.Generator, guides: np.ndarray, curl: float) -> tuple[np.ndarray, np.ndarray]:
    """Grows hairs (hair, point, 2) in clumps between guides; returns them and their tones."""
    place, clump = np.sort(rng.random(320)) * (len(guides) - 1.001), np.arange(320) * 26 // 320
    left, share, guides = place.astype(int), (place % 1)[:, None], guides.swapaxes(0, 1)
    lines = guides[:, left] * (1 - share) + guides[:, left + 1] * share
    own = 1.3 * rng.normal(0, 1, (26, 3))[clump] + rng.normal(0, 1, (320, 3))  # sideways, up and in brightness
    loose = min(np.ptp(guides, (0, 1)).max() * 0.015, 0.016) * np.linspace(0.25, 1, len(guides))[:, None, None]
    lines = smooth_curve(lines + loose * own[:, :2], (40 if curl else 20) // len(guides))
    s = np.linspace(0, 1, len(lines))[:, None]
    lines += (s**3 * rng.uniform(-0.25, 0, 320))[..., None] * (lines[-1] - lines[len(lines) // 2])  # uneven ends
    turns = 2 * np.pi * (s * rng.uniform(3, 6, 320) + rng.random(320))
    lines += curl * np.minimum(1, 4 * s)[..., None] * unit_vector(turns)
    return lines.swapaxes(0, 1), np.clip(0.42 + 0.13 * own[:, 2], 0.05, 1)


def paint_hair(rng: np.random.Generator, image: np.ndarray, sitter: Sitter, names: list[str], lit: np.ndarray) -> None:
    """Paints patches of hair in lit colours, hair by hair; the head's covers what is under it."""
    tone, ground, cover = (np.full(image.shape[:2], value, np.uint8) for value in (50, 0, 0))
    thick = max(1, round(len(image) / 512))
    for name, side in ((name, side) for name in names for side in (-1, 1)):
        dense, guides = name not in sitter.face_hair, sitter.guides[name] * (side, 1)
        guides[..., 0] += sitter.part * np.clip(-0.4 - guides[..., 1], 0, 0.6)  # combs it to one side
        lines, tones = grow_hairs(rng, guides, sitter.curl * dense)
        pixels = np.rint((lines * HEAD_UNIT + EYES_CENTRE) * len(image) * 16).astype(np.int32, order="C")
        for line, value in zip(pixels, tones):
            cv2.polylines(tone, [line], False, int(255 * value), thick, cv2.LINE_AA, 4)
        cv2.polylines(cover, list(pixels), False, 230 if dense else 115, thick, cv2.LINE_AA, 4)
        outline = np.concatenate((pixels[0], pixels[:, -1], pixels[-1, ::-1], pixels[::-1, 0]))
        cv2.fillPoly(ground, [outline], 255 * dense, cv2.LINE_AA, 4)
    cover = cv2.max(cover, cv2.GaussianBlur(ground, (0, 0), 0.004 * len(image)))[..., None] * np.float32(1 / 255)
    image += (lit * (0.3 + tone[..., None] * np.float32(1.3 / 255)) - image) * cover


def bend_to_sitter(rng: np.random.Generator, image: np.ndarray, sitter: Sitter) -> np.ndarray:
    """Bends the average face to the sitter's, and a little more: no face is symmetric."""
    y, x = (np.mgrid[0:96, 0:96] + 0.5) / 96
    x, y = ((q - c - rng.uniform(-0.03, 0.03)) / (HEAD_UNIT * 1.09) for q, c in zip((x, y), EYES_CENTRE))
    above, tilt = np.clip((1.5 - y) / 0.9, 0, 1), rng.normal(0, 0.06)  # the shoulders stay where they are
    x, y = x + tilt * above * (y - 0.9), y - tilt * above * x
    x = x - rng.uniform(-0.12, 0.12) * np.clip(1 - (x / 0.8) ** 2, 0, 1) * above
    to_x, to_y = x + 0.008 * smooth_noise(rng, 9, 9, 96), y + 0.008 * smooth_noise(rng, 9, 9, 96)
    for mx, my, reach, right, down, male in PORTRAIT_TABLES["morphs"] * (1, 1, 1, 1, 1, -1 if sitter.woman else 1):
        weight = (male + rng.uniform(-1.6, 1.6)) * np.exp(-((np.abs(x) - mx) ** 2 + (y - my) ** 2) / reach**2)
        to_x, to_y = to_x - right * weight * np.sign(x), to_y - down * weight
    places = np.float32((np.dstack((to_x, to_y)) * HEAD_UNIT + EYES_CENTRE) * len(image))
    places = cv2.resize(places, image.shape[:2], interpolation=cv2.INTER_CUBIC)
    return cv2.remap(image, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def develop(rng: np.random.Generator, image: np.ndarray, grain: float) -> np.ndarray:
    """Photographs a painting, float32 BGR 0..1, as uint8 BGR: blacks, whites, colours, grain."""
    lowest, highest = image.min(2)[::4, ::4], image.max(2)[::4, ::4]
    low, high = np.quantile(lowest, 0.005), np.quantile(highest, 0.995)
    dark, light = np.median(lowest[: len(lowest) // 6]), np.median(highest[: len(highest) // 6])  # sky or backdrop
    usual = rng.random() < 0.85  # as most photographs: from black to white, not pale; else good ones look faded
    black, white = rng.uniform(0, 0.03 if usual else 0.15), rng.uniform(0.94 if usual else 0.6, 1)
    if rng.random() < 0.4 and light > np.quantile(highest, 0.6):  # burnt out: flat white with hard edges, and no hole
        high, white = light * rng.uniform(0.85, 1), rng.uniform(1, 1.1)
    elif rng.random() < 0.3 and dark < np.quantile(lowest, 0.4):  # drowned in black
        low, black = dark * rng.uniform(1, 1.2), rng.uniform(-0.05, 0)
    elif rng.random() < 0.25:  # against the light: windows and gaps of any shape burn out, and glow
        high, white = np.quantile(highest, rng.uniform(0.85, 0.98)), rng.uniform(1, 1.1)
        glow = cv2.GaussianBlur((image - high).clip(0), (0, 0), rng.uniform(1, 20) * len(image) / 512)
        image = image + rng.uniform(0, 2) * glow
    image = black + (image - low) * np.float32((white - black) / max(high - low, 0.2))
    value = image.max(2, keepdims=True)
    image = value - np.float32(rng.uniform(0.6, 1.7) if usual else rng.uniform(0.3, 1.5)) * (value - image)
    if rng.random() < 0.4:  # sharpened by a camera or a scanner: a bright seam along an edge is no crack
        image += rng.uniform(0.2, 1.2) * (image - cv2.GaussianBlur(image, (0, 0), rng.uniform(0.7, 2)))
    image += grain * rng.standard_normal((*image.shape[:2], 1), np.float32)
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def draw_portrait(rng: np.random.Generator, size: int = 512) -> np.ndarray:
    """Paints one invented person as a uint8 BGR picture of size x size pixels."""
    sitter, full = Sitter(rng), max(size, 384)  # thin hairs need pixels: smaller pictures are reduced at the end
    image = paint_backdrop(rng, full)
    head, body, ear, volume = (smooth_curve(PORTRAIT_TABLES[n]) for n in ("head", "body", "ear", "hair volume"))
    height = round_relief(head, 0.62, np.concatenate([PORTRAIT_TABLES[f"bumps {i}"] for i in (1, 2, 3)]))
    pores = 1 + 0.01 * smooth_noise(rng, 110, 110, RELIEF_SIZE)[..., None] * (1.6, 1.3, 0.7)
    skin = light_relief(sitter, sitter.skin * pores, np.maximum(height, round_relief(body, 0.5) - 0.2), full, 0.065)
    hair = light_relief(sitter, sitter.hair, round_relief(volume, 0.8), full, 0.05)
    if "curtain" in sitter.head_hair:
        paint_hair(rng, image, sitter, ["back"], hair * 0.5)
    paint_shape(image, body, skin)
    paint_clothes(rng, image, sitter, height)
    paint_shape(image, ear, skin)
    paint_face(skin, sitter)
    paint_shape(image, head, skin, 1, 0.006)
    bristles = sitter.face_hair[: rng.choice((1, 3, 3))]  # the others are stubble: shadows without hairs
    paint_hair(rng, image, sitter, bristles + sitter.head_hair, hair)
    image = cv2.resize(bend_to_sitter(rng, image, sitter), (size, size), interpolation=cv2.INTER_AREA)
    return develop(rng, image, 0.008)


def cloud_noise(rng, size, slope):
    """Noise of power spectrum 1 / f^slope (clouds 2.5, gravel 0.5), float32 (size, size)."""
    noise, weight = np.zeros((size, size), np.float32), 0.0
    for octave in range(2, int(math.log2(size)) + 1):
        amplitude = 2.0 ** (-octave * (slope - 1) / 2)
        small = rng.standard_normal((2**octave, 2**octave), np.float32)
        noise += amplitude * cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)
        weight += amplitude**2
    return noise / math.sqrt(weight) / 2


def _texture(rng: np.random.Generator, size: int, colors) -> np.ndarray:
    """A square of cloth, bark, wall, leaves or letters in two colours, float32 BGR."""
    kind, first, second = rng.choice(6, p=(0.2, 0.2, 0.15, 0.25, 0.1, 0.1)), *colors
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    angle, period = rng.uniform(0, math.pi), log_uniform(rng, 3, 60) * size / 512
    u = (x * math.cos(angle) + y * math.sin(angle)) / period
    v = (y * math.cos(angle) - x * math.sin(angle)) / period
    if kind == 0:  # plain, with a soft gradient
        share = 0.5 + 0.5 * np.tanh((u - u.mean()) * period / size * rng.uniform(0.2, 3))
    elif kind == 1:  # stripes
        share = np.clip(0.5 + rng.choice((0.7, 3)) * np.sin(2 * math.pi * u), 0, 1)
    elif kind == 2:  # checks or dots
        wave = np.sin(2 * math.pi * u) * np.sin(2 * math.pi * v)
        share = np.clip(rng.uniform(-0.5, 0.7) + rng.choice((1, 4)) * wave, 0, 1)
    elif kind == 3:  # clouds to gravel
        share = np.clip(0.5 + rng.uniform(0.2, 0.8) * cloud_noise(rng, size, rng.uniform(0.3, 2.6)), 0, 1)
    elif kind == 4:  # grass, hair, twigs: thin strokes
        strokes = np.zeros((size, size), np.uint8)
        for _ in range(rng.integers(30, 250)):
            begin, turn = rng.uniform(0, size, 2), angle + rng.normal(0, rng.choice((0.1, 0.4, 2)))
            end = begin + unit_vector(turn) * rng.uniform(0.05, 0.5) * size
            bend = (begin + end) / 2 + rng.normal(0, 0.03, 2) * size
            line = np.rint(16 * smooth_curve(np.stack((begin, bend, end)))).astype(np.int32)
            cv2.polylines(strokes, [line], False, int(rng.integers(80, 256)), int(rng.integers(1, 3)), cv2.LINE_AA, 4)
        share = strokes.astype(np.float32) / 255
    else:  # lettering
        page, height = np.zeros((size, size), np.uint8), rng.uniform(0.02, 0.12) * size
        font, thick = int(rng.integers(8)), max(1, round(height / rng.uniform(6, 14)))
        for line in np.arange(height, size, height * 1.5):
            text = "".join(chr(code) for code in rng.integers(32, 123, 60))
            cv2.putText(page, text, (int(rng.integers(0, 20)), int(line)), font, height / 30, 255, thick, cv2.LINE_AA)
        share = page.astype(np.float32) / 255
    return first + (second - first) * np.float32(share)[..., None]


def paint_bars(rng: np.random.Generator, image: np.ndarray, colors: Callable[[], tuple]) -> None:
    """Beams, masts, horizons or the bars of a window: long and straight, round or bevelled, mostly
    upright or level.

    Into an image, float32 BGR 0..1 (size, size, 3). Without them a straight bright line would
    always be a scratch.
    """
    size, turn, usual = len(image), rng.normal(0, 0.02), colors()[0]
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    thick, long = log_uniform(rng, 0.8, 14) * size / 512, log_uniform(rng, 0.2, 3) * size
    corner, apart = rng.uniform(0, size, 2), log_uniform(rng, 0.04, 0.4) * size
    window = rng.random() < 0.4
    for number in range(int(log_uniform(rng, 1, 16))):
        angle = turn + math.pi / 2 * rng.integers(2) if window or rng.random() < 0.8 else rng.uniform(0, math.pi)
        centre = corner + apart * (number // 2) if window else rng.uniform(0, size, 2)
        if not window:
            thick, long = log_uniform(rng, 0.8, 14) * size / 512, log_uniform(rng, 0.2, 3) * size
        (ux, uy), soft = unit_vector(angle), rng.choice((1.0, rng.uniform(1, 4)))
        along, across = (x - centre[0]) * ux + (y - centre[1]) * uy, (y - centre[1]) * ux - (x - centre[0]) * uy
        cover = np.clip((thick / 2 - np.abs(across)) / soft + 0.5, 0, 1) * np.clip(long / 2 - np.abs(along) + 0.5, 0, 1)
        side = np.clip(2 * across / thick, -1, 1)  # from one edge of the bar to the other
        relief = rng.uniform(-0.5, 0.5) * rng.choice((side, np.sign(side), 1 - 2 * side**2))
        paint = usual if rng.random() < 0.7 else colors()[0]
        image += (cover * min(1, thick))[..., None] * (paint * (1 + relief[..., None]) - image)


def draw_scene(rng: np.random.Generator, size: int = 512) -> np.ndarray:
    """Paints dead leaves (Lee, Mumford and Huang 2001): textured shapes of power-law sizes that
    hide each other.

    uint8 BGR (size, size, 3). Denoisers trained on such pictures alone come close to those trained
    on photographs (Achddou et al. 2021); here they also show the detectors what is no damage: hard
    edges, thin lines, letters, black, white and motley areas.
    """
    contrast, vividness, middle = rng.uniform(0.25, 1), rng.beta(1.2, 2.0), rng.uniform(0.25, 0.75)
    hue = rng.uniform(0, 1, 3)

    def colors() -> tuple[np.ndarray, np.ndarray]:
        pair = []
        for _ in range(2):
            grey = rng.choice((*rng.uniform(0, 1, 3), rng.uniform(0, 0.1), rng.uniform(0.9, 1))) - 0.5
            tint = (rng.choice((hue, rng.uniform(0, 1, 3))) - 0.5) * vividness
            pair.append(np.float32((middle + contrast * (grey + tint)).clip(0, 1)))
        return tuple(pair)

    textures = [_texture(rng, size, colors()) for _ in range(6)]
    image, clouds = textures[0].copy(), cloud_noise(rng, size, 2.2)
    if rng.random() < 0.3:
        image[: rng.integers(size // 6, size)] = colors()[0] if rng.random() < 0.3 else rng.choice((0.02, 0.97))  # sky
    count, smallest = int(log_uniform(rng, 8, 250)), rng.uniform(0.006, 0.05)
    radii = np.sort(np.minimum(smallest * (1 - rng.random(count)) ** -0.8, 0.4))[::-1] * size  # power law
    bars = rng.integers(0, count, rng.choice((0, 0, 1, 2)))  # after so many leaves
    depth = rng.choice((0.1, 0.6))  # of the leaves are out of focus
    for number, radius in enumerate(radii):
        for _ in range((bars == number).sum()):
            paint_bars(rng, image, colors)
        centre, corners = rng.uniform(0, size, 2), rng.choice((3, 4, 4, 6, 12, 24))
        if rng.random() < 0.5:
            angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
        else:
            angles = np.linspace(0, 2 * math.pi, corners, endpoint=False) + rng.uniform(0, 6)
        ring = radius * rng.uniform(rng.choice((0.3, 0.9)), 1, (corners, 1))
        ring = ring * unit_vector(angles) * (1, rng.choice((1, 1, 0.1, 0.4)))
        turn = rng.uniform(0, math.pi)
        ring = centre + ring @ np.array(((math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))))
        ring = smooth_curve(np.vstack((ring, ring[:1])), 4) if rng.random() < 0.5 else ring
        low, high = np.clip((ring.min(0) - 1, ring.max(0) + 2), 0, size).astype(int)
        if min(high - low) < 1:
            continue
        part = np.s_[low[1] : high[1], low[0] : high[0]]
        mask = np.zeros((high - low)[::-1], np.uint8)
        cv2.fillPoly(mask, [np.rint(16 * (ring - low)).astype(np.int32)], 255, cv2.LINE_AA, 4)
        if rng.random() < depth:
            mask = cv2.GaussianBlur(mask, (0, 0), log_uniform(rng, 0.5, 5))
        paint = colors()[0] if rng.random() < 0.4 else textures[rng.integers(6)][part]
        light = 1 + rng.normal(0, 0.12) + rng.uniform(0.02, 0.25) * clouds[part]  # nothing is quite flat, but holes
        image[part] += (paint * light[..., None] - image[part]) * (mask * np.float32(1 / 255))[..., None]
    image *= 1 + rng.uniform(0, 0.25) * cloud_noise(rng, size, 2.8)[..., None]
    if (blur := rng.choice((0, 0, rng.uniform(0.4, 1.5)))) > 0:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    return develop(rng, image, rng.uniform(0, 0.01))


if __name__ == "__main__":
    sys.exit(main())
