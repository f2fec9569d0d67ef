"""What goes wrong outside: killed and doubled runs, full disks, bad pictures, hostile checkpoints, odd numbers."""

import dataclasses
import functools
import gc
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY, anonymous_memory, faces_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from sabotage import SABOTAGES
from torchvision import transforms

import restoration_utils as ru

ROOT = Path(__file__).parents[1]
DRIVER = """
import contextlib, dataclasses, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from conftest import TINY
import torch
import restoration_utils as ru
torch.set_num_threads(1)
faces_folder, outputs = map(Path, sys.argv[1:3])
settings = dataclasses.replace(TINY, **(dict(pretrain_epochs=3, gan_epochs=3, gan_lr_step=2) | eval(sys.argv[3])))
places = ru.Places("test", outputs, outputs / "fakefaces_degraded")
print("ready", flush=True)
faces = ru.Faces(faces_folder, "", *ru.list_images(faces_folder))
with contextlib.redirect_stdout(None):
    pairs = ru.prepare_pairs(faces, places, settings)
print("degraded", flush=True)
run, splits = ru.Run(settings, places, torch.device("cpu"), ru.faces_id(pairs)), ru.split_pairs(pairs, settings)
generator, discriminator = ru.build_generator(settings), ru.build_discriminator(settings)
ru.pretrain_generator(generator, splits.pretrain_train, splits.pretrain_validation, run)
print("pretrained", flush=True)
ru.train_gan(generator, discriminator, splits.gan_train, splits.gan_validation, run)
print("finished", flush=True)
"""


def start(faces, outputs, changes="{}", **popen):
    """The whole pipeline on a tiny configuration, in a process of its own that has finished importing."""
    code = DRIVER.format(root=str(ROOT), tests=str(ROOT / "tests"))
    command = [sys.executable, "-c", code, str(faces.folder), str(outputs), changes]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def finish(process):
    """What a process said until its end: exit status, stdout, stderr."""
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def assert_all_files_are_whole(outputs):
    for path in outputs.rglob("[!.]*.pth"):
        ru.load_checkpoint(path)
    for path in outputs.rglob("[!.]*.json"):
        json.loads(path.read_text())
    for path in [*outputs.rglob("[!.]*.jpg"), *outputs.rglob("[!.]*.png")]:
        ru.read_image(path)


def states(outputs):
    """Everything that decides how training goes on and what it leaves, without the time it took."""
    content = {path.name: ru.load_checkpoint(path) for path in sorted(outputs.glob("[!.]*.pth"))}
    for checkpoint in content.values():
        for row in checkpoint.get("history", []):
            row.pop("seconds")
    return content


def pictures(outputs):
    """The bytes of all degraded images and samples."""
    return {path.name: path.read_bytes() for path in [*outputs.rglob("[!.]*.jpg"), *outputs.rglob("[!.]*.png")]}


def assert_same(a, b, where=""):
    """Equal to the last bit, however nested."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}/{number}")
    else:
        assert a == b, where


# ----------------------------------------------------------------------------------------------------------------------
# Killed, doubled, without room
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_random_moments_and_run_again_it_ends_with_the_same_bits(faces, tmp_path):
    process, started = start(faces, tmp_path / "whole"), time.perf_counter()
    assert process.stdout.readline() == "degraded\n"
    degrading = time.perf_counter() - started
    status, _, err = finish(process)
    assert status == 0, err
    seconds, seed = time.perf_counter() - started, random.randrange(10**6)
    rng = random.Random(seed)
    whole = states(tmp_path / "whole"), pictures(tmp_path / "whole")
    kills = Counter()  # by the last thing that was done before
    for number in range(8):  # runs, each killed again and again until it comes to its end
        outputs = tmp_path / f"killed_{number}"
        for attempt in range(100):
            longest = degrading if attempt < 3 else seconds / 2
            done, err = finish_or_kill(start(faces, outputs), rng.uniform(0, longest))
            if done == "finished":
                break
            kills[done] += 1
            assert_all_files_are_whole(outputs)
        assert done == "finished", err
        assert_same((states(outputs), pictures(outputs)), whole, f"{number}")
        if number and kills["ready"] and min(kills[stage] for stage in ("degraded", "pretrained")) >= 3:
            break  # how many fall into which stage is chance
    else:
        pytest.fail(f"killed too seldom somewhere: {kills}, seed {seed}")
    print(f"killed after {dict(kills)}, seed {seed}")


def finish_or_kill(process, seconds):
    """What a process has said last within that time, after which it is killed, and its stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
        assert process.returncode == 0, err
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    said = [line for line in out.split() if line in ("degraded", "pretrained", "finished")]
    return said[-1] if said else "ready", err


def test_the_newest_two_checkpoints_are_kept_and_the_older_one_helps_if_the_newer_is_damaged(
    run, pairs, capsys, monkeypatch
):
    split = ru.split_pairs(pairs, run.settings)
    settings_of = {n: run._replace(settings=dataclasses.replace(run.settings, pretrain_epochs=n)) for n in (1, 2, 3)}

    def train(epochs):
        return ru.pretrain_generator(
            ru.build_generator(run.settings), split.pretrain_train, split.pretrain_validation, settings_of[epochs]
        )

    train(3)
    last, previous = run.outputs / "pretrain_last.pth", run.outputs / "pretrain_previous.pth"
    assert [len(ru.load_checkpoint(path)["history"]) for path in (previous, last)] == [2, 3]
    whole = ru.load_checkpoint(last)
    last.write_bytes(last.read_bytes()[:1000])
    save_checkpoint = ru.save_checkpoint

    def no_room(path, *arguments, **content):
        if path == last:
            raise OSError("full")
        save_checkpoint(path, *arguments, **content)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):  # and now the disk is full, too
        patch.setattr(ru, "save_checkpoint", no_room)
        train(3)
    assert len(train(3)) == 3 and "WARNING" not in capsys.readouterr().out.rpartition("already done")[2]
    assert_same(whole["generator"], ru.load_checkpoint(last)["generator"])
    last.write_bytes(b"")
    previous.unlink()
    with pytest.raises(ValueError, match=r"pretrain_last\.pth"):
        train(3)


def test_killed_while_an_attached_training_is_copied_it_still_goes_on(run, pairs, places, tmp_path, monkeypatch):
    split = ru.split_pairs(pairs, run.settings)
    kaggle = tmp_path / "kaggle" / "input" / "earlier"
    earlier = run._replace(places=places._replace(outputs=kaggle))
    network = ru.build_generator(TINY)
    ru.pretrain_generator(network, split.pretrain_train, split.pretrain_validation, earlier)
    now = run._replace(places=places._replace(outputs=tmp_path / "new", attached=kaggle.parent))
    copied, copy_file = [], ru.copy_file

    def killed(allowed, source, destination):
        if len(copied) == allowed:
            raise KeyboardInterrupt
        copied.append(source)
        copy_file(source, destination)

    files = len([path for path in kaggle.iterdir() if path.suffix in (".pth", ".png", ".json")])
    for allowed in range(files):
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        copied.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ru, "copy_file", functools.partial(killed, allowed))
            ru.pretrain_generator(network, split.pretrain_train, split.pretrain_validation, now)
        history = ru.pretrain_generator(network, split.pretrain_train, split.pretrain_validation, now)
        assert len(history) == 2 and (tmp_path / "new" / "pretrained_generator_best.pth").is_file()


def test_killed_while_it_was_degraded_with_other_settings_nothing_is_mixed(faces, tmp_path, monkeypatch):
    ru.degrade_folder(faces, tmp_path / "d", TINY)
    before = {path.name: path.read_bytes() for path in (tmp_path / "d").glob("*.jpg")}
    written, write_image = [], ru.write_image

    def dying(*arguments):
        if len(written) == 13:  # three originals and a quarter
            raise KeyboardInterrupt
        written.append(write_image(*arguments))

    with monkeypatch.context() as patch, pytest.raises(ru.Interrupted, match=r"is kept in .*Run it again") as stopped:
        patch.setattr(ru, "write_image", dying)
        ru.degrade_folder(faces, tmp_path / "d", dataclasses.replace(TINY, seed=1), workers=1)
    assert len(stopped.value._render_traceback_()) == 1  # one line in a notebook
    now = {path.name: path.read_bytes() for path in (tmp_path / "d").glob("*.jpg")}
    assert sum(now[name] != before[name] for name in before) == 13
    assert ru.degrade_folder(faces, tmp_path / "d", TINY)[:2] == (4, 6)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "d").glob("*.jpg")}


def test_somebody_who_interrupts_a_notebook_reads_one_line(capsys):
    shell = InteractiveShell()
    shell.run_cell("import restoration_utils as ru\nraise ru.Interrupted('all is kept')")
    assert capsys.readouterr().out.strip() == "Interrupted: all is kept"


def test_leftovers_of_killed_runs_are_swept_out_but_not_what_is_being_written(tmp_path):
    old, new = tmp_path / f"{ru.PARTIAL}1.pth", tmp_path / f"{ru.PARTIAL}2.pth"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    with ru.alone_in(tmp_path):
        assert not old.exists() and new.exists()


def test_a_second_run_over_the_same_outputs_stops_and_a_killed_one_locks_nobody_out(faces, tmp_path):
    first = start(faces, tmp_path / "o", "{'pretrain_epochs': 5000}")
    try:
        while not (tmp_path / "o" / "pretrain_last.pth").exists():
            assert first.poll() is None
        status, _, err = finish(start(faces, tmp_path / "o"))  # the same settings: finds the training occupied
        assert status != 0 and "another run is writing to" in err.splitlines()[-1]
        status, _, err = finish(start(faces, tmp_path / "o", "{'seed': 1}"))  # replaces degraded images: no harm
        assert status != 0 and "another run is writing to" in err.splitlines()[-1]
        epochs = len(json.loads((tmp_path / "o" / "pretrain_history.json").read_text()))
        while len(json.loads((tmp_path / "o" / "pretrain_history.json").read_text())) == epochs:
            assert first.poll() is None  # it goes on
    finally:
        first.kill()
        first.communicate()
    done = finish(start(faces, tmp_path / "o", "{'pretrain_epochs': 1, 'gan_epochs': 1}"))
    assert done[0] == 0, done[2]


def test_degraded_images_that_another_run_replaces_before_they_are_read_are_refused(faces, places):
    """Otherwise the file of images would hold another run's damage under this one's name for good."""
    pairs = ru.degrade_folder(faces, places.degraded, TINY).pairs
    ru.degrade_folder(faces, places.degraded, dataclasses.replace(TINY, seed=1))
    with pytest.raises(ValueError, match="changed by another run meanwhile"):
        ru.store_images(pairs, places, TINY)
    assert not list(places.outputs.glob("images_*"))


def test_a_file_of_images_that_is_cut_short_is_made_again(faces, places, pairs):
    whole = pairs[0].store.read_bytes()
    pairs[0].store.write_bytes(whole[: len(whole) // 2])
    again = ru.prepare_pairs(faces, places, TINY)
    assert again[0].store.read_bytes() == whole


def test_a_damaged_copy_is_named_with_what_to_do_and_an_original_is_never_to_be_deleted(faces, places):
    pairs = ru.degrade_folder(faces, places.degraded, TINY).pairs
    content = pairs[0].degraded.read_bytes()
    pairs[0].degraded.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"face_0_noisy.*delete it") as error:
        ru.store_images(pairs, places, TINY)
    pairs[0].degraded.write_bytes(content)
    faces.files[3].write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"face_3\.jpg") as error:
        ru.store_images(pairs, places, TINY)
    assert "delete" not in str(error.value)


def test_the_rows_of_the_images_follow_the_order_of_the_pairs(faces, places, pairs):
    backwards = ru.prepare_pairs(faces._replace(names=faces.names[::-1]), places, TINY)
    assert [pair.name for pair in backwards[:: len(TINY.kinds)]] == faces.names[::-1]
    for pair, (_, original, info) in zip(backwards, ru.FaceRestorationGANDataset(backwards)):
        truth = ru.image_transform()(ru.open_image(pair.original))
        truth = transforms.functional.rgb_to_grayscale(truth, 3) if pair.is_grey else truth
        assert info["name"] == pair.name and torch.equal(original, truth)


def test_degraded_images_that_another_run_replaces_meanwhile_change_nothing(run, pairs, faces, places):
    dataset = ru.FaceRestorationGANDataset(pairs)
    before = [images[0].clone() for images in dataset]
    other = ru.prepare_pairs(faces, places, dataclasses.replace(TINY, seed=1))
    assert all(torch.equal(*both) for both in zip(before, (images[0] for images in dataset)))
    assert not torch.equal(before[0], ru.FaceRestorationGANDataset(other)[0][0])


LIMITED = """
import resource, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import numpy as np, torch
import restoration_utils as ru
from conftest import TINY
import matplotlib.pyplot as plt
outputs = Path(sys.argv[1])
run = ru.Run(TINY, ru.Places("test", outputs, outputs / "d"), torch.device("cpu"), "")
figure = ru.show_images([[np.random.default_rng(0).random((300, 300, 3))]], ["noise"])
picture = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
ru.write_json(outputs / "warm.json", [])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)  # what is written beyond fails, as on a full disk
{{
    "checkpoint": lambda: ru.save_checkpoint(outputs / "a.pth", run, generator=ru.build_generator(TINY).state_dict()),
    "figure": lambda: ru.save_figure(figure, outputs / "a.png"),
    "picture": lambda: ru.write_image(outputs / "a.jpg", picture),
    "json": lambda: ru.write_json(outputs / "a.json", list(range(10**5))),
}}[sys.argv[2]]()
"""
WRITTEN = {"checkpoint": "a.pth", "figure": "a.png", "picture": "a.jpg", "json": "a.json"}


@pytest.mark.slow
@pytest.mark.parametrize("what", WRITTEN)
def test_a_write_that_fails_at_any_byte_is_named_and_keeps_what_was_there(tmp_path, what):
    code = LIMITED.format(root=str(ROOT), tests=str(ROOT / "tests"))
    old = tmp_path / WRITTEN[what]
    for limit in (1, 5_000, 50_000):
        old.write_bytes(b"what was there before")
        command = [sys.executable, "-c", code, str(tmp_path), what, str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith("OSError") and str(old) in last and "MB are free" in last
        assert old.read_bytes() == b"what was there before"
        assert not list(tmp_path.glob(f"{ru.PARTIAL}*"))


@pytest.mark.parametrize("stage", ["degrading", "training"])
def test_no_room_in_the_middle_of_a_run_and_then_room_again(run, pairs, faces, tmp_path, monkeypatch, stage):
    replace, calls = os.replace, []

    def full(source, destination):
        calls.append(destination)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        replace(source, destination)

    split = ru.split_pairs(pairs, run.settings)

    def work(folder):
        if stage == "degrading":
            return ru.degrade_folder(faces, folder, TINY, workers=1)
        moved = run._replace(places=run.places._replace(outputs=folder))
        network = ru.build_generator(TINY)
        return ru.pretrain_generator(network, split.pretrain_train, split.pretrain_validation, moved)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"could not be written \(.*No space left"):
        work(tmp_path / "full")
    monkeypatch.setattr(os, "replace", replace)
    assert_all_files_are_whole(tmp_path / "full")
    assert not list((tmp_path / "full").glob(f"{ru.PARTIAL}*"))
    work(tmp_path / "full")
    work(tmp_path / "room")
    assert_same(states(tmp_path / "full"), states(tmp_path / "room"))
    names = [{p.name: p.read_bytes() for p in (tmp_path / n).glob("*.jpg")} for n in ("full", "room")]
    assert names[0] == names[1]


# ----------------------------------------------------------------------------------------------------------------------
# Bad pictures
# ----------------------------------------------------------------------------------------------------------------------

PICTURE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)  # RGB 48 x 64


def encoded(image, form, **options):
    """A PIL image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rgb():
    return Image.fromarray(PICTURE)


def png_header(width, height):
    """A PNG that promises many pixels in a few bytes."""
    content = bytearray(encoded(Image.new("1", (64, 64)), "PNG"))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


def rotated(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(rgb(), "JPEG", quality=95, exif=exif)


def animated():
    frames = [rgb().convert("P"), Image.new("P", (64, 48))]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def with_long_text():
    """A PNG with more text than PIL accepts, as Photoshop writes it."""
    text = b"zTXtXMP\0\0" + zlib.compress(bytes(2 * 10**6))
    chunk = (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
    content = encoded(rgb(), "PNG")
    return content[:33] + chunk + content[33:]


READABLE = {  # name: content, shape as read
    "alpha.png": (encoded(rgb().convert("RGBA"), "PNG"), (48, 64)),
    "palette.png": (encoded(rgb().convert("P"), "PNG"), (48, 64)),
    "deep.png": (encoded(Image.fromarray(PICTURE[..., 0].astype(np.uint16) * 257), "PNG"), (48, 64)),
    "bits.png": (encoded(rgb().convert("1"), "PNG"), (48, 64)),
    "cmyk.jpg": (encoded(rgb().convert("CMYK"), "JPEG"), (48, 64)),
    "progressive.jpg": (encoded(rgb(), "JPEG", progressive=True), (48, 64)),
    "text.png": (with_long_text(), (48, 64)),
    f"{'long' * 60}.jpg": (encoded(rgb(), "JPEG"), (48, 64)),
    "web.webp": (encoded(rgb(), "WEBP", lossless=True), (48, 64)),
    "dot.png": (encoded(Image.new("RGB", (1, 1)), "PNG"), (1, 1)),
    "strip.png": (encoded(Image.new("RGB", (20_000, 10)), "PNG"), (10, 20_000)),
    "name with spaces.jpg": (encoded(rgb(), "JPEG"), (48, 64)),
    "Ảnh cũ – 老照片.jpg": (encoded(rgb(), "JPEG"), (48, 64)),
    "UPPER.JPG": (encoded(rgb(), "JPEG"), (48, 64)),
    "deep/er/nested.jpg": (encoded(rgb(), "JPEG"), (48, 64)),
    "twice.jpg": (encoded(rgb(), "JPEG"), (48, 64)),
    "twice.png": (encoded(rgb(), "PNG"), (48, 64)),
    **{f"exif_{o}.jpg": (rotated(o), (48, 64) if o < 5 else (64, 48)) for o in range(1, 9)},
}
REFUSED = {  # name: content, what the report says
    "empty.jpg": (b"", "not an image"),
    "half.jpg": (encoded(rgb(), "JPEG", quality=95)[:-300], "truncated"),
    "text.jpg": (b"not a picture at all", "not an image"),
    "bomb.png": (png_header(60_000, 60_000), "pixels"),
    "large.png": (png_header(15_000, 10_000), "too many pixels, 150 million; 100 are the most"),
    "bomb_with_wrong_text.png": (
        png_header(15_000, 15_000)[:33] + b"\0\0\0\x04tEXta\0bc????" + png_header(1, 1)[33:],
        "cannot be read",
    ),
    "windows.jpg": (b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(60), "cannot be read"),  # PIL divides by its zeros
}


def folder_of(tmp_path, contents):
    for name, content in contents.items():
        path = tmp_path / "faces" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACES_DIR", str(tmp_path / "faces"))
        return ru.find_faces(TINY, ru.Places("t", tmp_path, tmp_path / "d"))


@pytest.mark.parametrize("name", READABLE)
def test_a_strange_picture_is_degraded_loaded_and_restored(tmp_path, name):
    content, shape = READABLE[name]
    faces = folder_of(tmp_path, {name: content})
    report = ru.degrade_folder(faces, tmp_path / "d", TINY)
    assert report[:3] == (1, 0, {})
    assert {ru.read_image(path).shape for path in (tmp_path / "d").glob("*.jpg")} == {(*shape, 3)}
    pairs = ru.prepare_pairs(faces, ru.Places("t", tmp_path, tmp_path / "d"), TINY)
    for degraded, original, info in ru.FaceRestorationGANDataset(pairs):
        assert degraded.shape == original.shape == (3, 256, 256) and info["hole"].shape == (1, 256, 256)
    result = ru.restore_image_gan(faces.files[0], tmp_path / "r.png", ru.build_generator(TINY))
    assert result.shape == (*shape, 3) and result.dtype == np.uint8


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_picture_is_one_line_and_the_rest_is_done(tmp_path, name):
    content, reason = REFUSED[name]
    faces = folder_of(tmp_path, {name: content, "good.jpg": READABLE["progressive.jpg"][0]})
    report = ru.degrade_folder(faces, tmp_path / "d", TINY)
    assert report.made == 1 and list(report.left_out) == [name] and reason in report.left_out[name]
    assert len([line for line in str(report).splitlines() if name in line]) == 1
    assert len(ru.prepare_pairs(faces, ru.Places("t", tmp_path, tmp_path / "d"), TINY)) == len(TINY.kinds)
    with pytest.raises(ValueError, match=name) as error:
        ru.restore_image_gan(tmp_path / "faces" / name, tmp_path / "r.png", ru.build_generator(TINY))
    assert reason in str(error.value) and not (tmp_path / "r.png").exists()


def test_an_animation_is_its_first_picture(tmp_path):
    faces = folder_of(tmp_path, {"moving.gif": animated(), "good.jpg": READABLE["progressive.jpg"][0]})
    assert ru.degrade_folder(faces, tmp_path / "d", TINY).made == 2
    assert np.array_equal(ru.open_image(faces.files[1]), Image.open(io.BytesIO(animated())).convert("RGB"))


def oriented(form, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(rgb(), form, exif=exif, **options)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "AVIF", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_the_orientation_is_applied_for_every_format_by_the_loader_itself(tmp_path, form, orientation):
    """Decoders differ, by version too: a WebP came back lying on its side, with Exif written with or without prefix."""
    turned = {
        1: lambda x: x,
        3: lambda x: x[::-1, ::-1],
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, -1)[::-1],
    }
    for number, content in enumerate((oriented(form, orientation, quality=95), encoded(rgb(), form, quality=95))):
        (tmp_path / f"{number}.{form.lower()}").write_bytes(content)
    seen, plain = (ru.read_image(tmp_path / f"{number}.{form.lower()}") for number in (0, 1))
    assert np.array_equal(seen, turned[orientation](plain))


def test_damaged_exif_data_are_no_reason_to_refuse_a_picture(tmp_path):
    content = oriented("JPEG", 6)
    at = content.index(b"Exif")
    (tmp_path / "a.jpg").write_bytes(content[: at + 6] + b"XX" + content[at + 8 :])
    assert ru.read_image(tmp_path / "a.jpg").shape == (48, 64, 3)


def scene():
    """A picture that is flat at its lower right, as many are, and detailed elsewhere; RGB."""
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    picture[200:, 200:] = 240
    return Image.fromarray(picture)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}, {"restart_marker_rows": 2}]
)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.97])
def test_a_jpeg_of_which_a_part_is_missing_is_refused_although_it_has_an_end_marker(tmp_path, options, share):
    whole = encoded(scene(), "JPEG", **options)
    first = whole.index(b"\xff\xda") + 14
    cut = whole[: first + int(share * (len(whole) - first))]
    (tmp_path / "whole.jpg").write_bytes(whole)
    assert ru.read_image(tmp_path / "whole.jpg").shape == (320, 400, 3)
    zeros = bytes(len(whole) - len(cut))
    damaged = {"mended.jpg": cut + b"\xff\xd9", "two.jpg": cut + whole}
    damaged |= {"zeros.jpg": cut + zeros, "zeros_mended.jpg": cut + zeros + b"\xff\xd9", "cut.jpg": cut}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            ru.read_image(tmp_path / name)
    (tmp_path / "and_more.jpg").write_bytes(whole + encoded(rgb(), "JPEG"))  # as phones and 3D cameras write them
    assert ru.read_image(tmp_path / "and_more.jpg").shape == (320, 400, 3)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (16, 16), (64, 40)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 20}, {"quality": 100, "subsampling": 0}])
def test_small_and_flat_jpegs_are_whole(tmp_path, size, options):
    for level in (0, 77, 255):
        Image.new("RGB", size, (level,) * 3).save(tmp_path / "a.jpg", **options)
        assert np.abs(ru.read_image(tmp_path / "a.jpg").astype(int) - level).max() <= 8


def test_a_whole_jpeg_is_read_wherever_the_search_for_missing_parts_cuts_it(tmp_path):
    for number in range(1000):  # of a few, the byte before the cut would begin a marker
        pixels = np.full((9, 14), 228, np.uint8)
        pixels[3, number % 14] = number * 7 % 256
        (tmp_path / "a.jpg").write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes())
        assert ru.read_image(tmp_path / "a.jpg").shape == (9, 14, 3)


def test_a_png_of_which_a_part_is_missing_is_refused_although_it_can_be_decoded(tmp_path):
    whole = encoded(scene(), "PNG")
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    with pytest.raises(ValueError, match=r"a\.png: cannot be read"):
        ru.read_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(whole[:-16] + bytes(4) + whole[-12:])  # decodes, but for the checksum of its data
    with pytest.raises(ValueError, match=r"b\.png: cannot be read"):
        ru.read_image(tmp_path / "b.png")


def test_the_orientation_of_a_tiff_is_applied_once_and_that_of_xmp_not_at_all(tmp_path):
    plain = PICTURE[..., ::-1]
    for compression in ("raw", "tiff_lzw"):
        rgb().save(tmp_path / "a.tif", tiffinfo={0x0112: 6}, compression=compression)
        assert np.array_equal(ru.read_image(tmp_path / "a.tif"), np.rot90(plain, -1))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    rgb().save(tmp_path / "a.webp", lossless=True, xmp=xmp)
    assert np.array_equal(ru.read_image(tmp_path / "a.webp"), plain)


def test_only_pictures_are_opened_whatever_a_file_is_called(tmp_path):
    """Pillow would run Ghostscript for this one."""
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="not an image"):
        ru.read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", sorted(ru.JPEG_SUFFIXES))
def test_every_name_of_a_jpeg_can_be_written(tmp_path, suffix):
    ru.write_image(tmp_path / f"a{suffix}", PICTURE)
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert image.format == "JPEG" and [layer[1:3] for layer in image.layer] == [(1, 1)] * 3


def old_tiff(bits):
    """A grey TIFF of 2 or 4 bits, as old scanners wrote them: 8 x 4 px, all white but the first."""
    pixels = bytes([0x3F if bits == 2 else 0x0F]) + b"\xff" * (4 * 8 * bits // 8 - 1)
    entries = {256: 8, 257: 4, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 4, 279: len(pixels)}
    directory = b"".join(
        k.to_bytes(2, "little") + b"\3\0\1\0\0\0" + v.to_bytes(4, "little") for k, v in entries.items()
    )
    at = 8 + len(pixels)
    start = b"II*\0" + at.to_bytes(4, "little") + pixels
    return start + len(entries).to_bytes(2, "little") + directory + bytes(4)


@pytest.mark.parametrize("bits", [2, 4])
def test_tiffs_of_old_scanners_are_read(tmp_path, bits):
    (tmp_path / "a.tif").write_bytes(old_tiff(bits))
    image = ru.read_image(tmp_path / "a.tif")
    assert image.shape == (4, 8, 3) and image[0, 0].max() == 0 and image[1:].min() == 255


def test_values_without_an_agreed_range_are_refused_with_what_to_do(tmp_path):
    Image.fromarray(np.random.default_rng(0).random((5, 5), np.float32)).save(tmp_path / "a.tif")
    Image.fromarray(np.full((5, 5), 10**9, np.int32)).save(tmp_path / "b.tif")
    for name in ("a.tif", "b.tif"):
        with pytest.raises(ValueError, match=rf"{name}.*neither of 8 nor of 16 bits.*save it from there as PNG"):
            ru.read_image(tmp_path / name)


def test_whatever_is_left_out_of_a_folder_is_listed_with_its_reason(tmp_path, monkeypatch):
    good = READABLE["progressive.jpg"][0]
    names = ("good.jpg", ".hidden.jpg", "._good.jpg", "closed/inner.jpg", "a.jfif", "b.jpe", "c.mpo", "good_color.jpg")
    folder_of(tmp_path, dict.fromkeys(names, good))
    folder, elsewhere = tmp_path / "faces", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked.jpg").write_bytes(good)
    (folder / "link").symlink_to(elsewhere)
    (folder / "itself.jpg").symlink_to(folder / "itself.jpg")
    os.mkfifo(folder / "pipe.jpg")
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    readable = ru.readable_suffixes() - {".heic"}  # wherever pillow-heif is installed
    monkeypatch.setattr(ru, "readable_suffixes", lambda: readable)
    faces = folder_of(tmp_path, {"one.heic": b"?", "two.HEIC": b"?", "notes.txt": b"?", "caf\udce9.jpg": good})
    assert faces.names == ["a.jfif", "b.jpe", "c.mpo", "good.jpg"]
    report = str(ru.degrade_folder(faces, tmp_path / "d", TINY))
    for line in (
        "closed: Permission denied",
        "one.heic: .heic is not read here; convert it to JPEG, or: pip install pillow-heif",
        "two.HEIC: .heic is not read here; convert it to JPEG, or: pip install pillow-heif",
        "caf\\udce9.jpg: its name is not Unicode; rename it",
        "link: a link to a folder, not followed; name the folder to which it leads",
        "itself.jpg: not a file",
        "pipe.jpg: not a file",
        "good_color.jpg: taken for a degraded copy of good; rename it if it is none",
    ):
        assert f"  {line}\n" in report + "\n", line
    assert len(faces.left_out) == 8


def test_missing_halves_of_pairs_and_changed_originals(faces, places, pairs):
    pairs[4].degraded.unlink()  # made again
    (places.degraded / "stranger_noisy.jpg").write_bytes(pairs[0].degraded.read_bytes())  # of no original: no pair
    faces.files[2].unlink()  # its degraded copies are no pairs any more
    ru.write_image(faces.files[3], np.zeros((64, 64, 3), np.uint8))  # degraded anew
    fewer = faces_in(faces.folder)
    again = ru.prepare_pairs(fewer, places, TINY)
    assert {pair.name for pair in again} == set(faces.names) - {"face_2.jpg"} and len(again) == 9 * len(TINY.kinds)
    assert all(pair.degraded.exists() for pair in again)
    black = next(pair for pair in again if pair.name == "face_3.jpg" and pair.kind == "color")
    assert ru.read_image(black.degraded).max() == 0


def test_results_below_the_faces_are_not_taken_for_faces(tmp_path, monkeypatch):
    good = READABLE["progressive.jpg"][0]
    folder_of(tmp_path, {"good.jpg": good, "results/comparison_batch_1.png": good})
    places = ru.Places("t", tmp_path / "faces" / "results", tmp_path / "d")
    monkeypatch.setenv("FACES_DIR", str(tmp_path / "faces"))
    assert ru.find_faces(TINY, places).names == ["good.jpg"]
    with pytest.raises(ValueError, match="same folder"):
        ru.find_faces(TINY, ru.Places("t", tmp_path / "faces", tmp_path))


# ----------------------------------------------------------------------------------------------------------------------
# Hostile checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def most_memory(forget=True):
    """The most bytes that this process has held, since they were last forgotten; 0 where only Linux would know."""
    if not Path("/proc/self/clear_refs").exists():
        return 0
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])


class Payload:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (Path(self.trace),))


def hostile(kind, path, run):
    """Writes a checkpoint that no one should trust."""
    weights = ru.build_generator(TINY).state_dict()
    good = {"format": ru.CHECKPOINT_FORMAT, "settings": dataclasses.asdict(TINY), "faces": "", "start": ""}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(path.with_suffix(".trace"))))
    elif kind == "payload in weights":
        torch.save(good | {"generator": weights | {"x": Payload(path.with_suffix(".trace"))}}, path)
    elif kind == "payload in settings":
        torch.save(good | {"generator": weights, "settings": Payload(path.with_suffix(".trace"))}, path)
    elif kind == "other architecture":
        torch.save(good | {"generator": torch.nn.Linear(2, 2).state_dict()}, path)
    elif kind == "other width":
        other = ru.build_generator(dataclasses.replace(TINY, width=3)).state_dict()
        torch.save(good | {"generator": other}, path)
    elif kind == "NaN":
        torch.save(good | {"generator": {k: v.float() * float("nan") for k, v in weights.items()}}, path)
    elif kind == "extra weights":
        torch.save(good | {"generator": weights | {"extra": torch.zeros(1)}}, path)
    elif kind == "flipped bits":
        torch.save(good | {"generator": weights}, path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 64
        path.write_bytes(content)
    elif kind == "settings that are none":
        torch.save(good | {"generator": weights, "settings": {"width": "wide"}}, path)
    elif kind in NO_WEIGHTS:
        torch.save(good | {"generator": NO_WEIGHTS[kind]}, path)
    else:
        torch.save(good | {"generator": weights}, path)
        path.write_bytes(path.read_bytes()[: 10 if kind == "ten bytes" else -2000])


NO_WEIGHTS = {"no weights, None": None, "no weights, list": [1, 2, 3], "no weights, number": 5}
HOSTILE = {  # kind: what the error says
    "pickle": "no checkpoint file",
    "payload in weights": "holds more than numbers",
    "payload in settings": "holds more than numbers",
    "other architecture": "Error.* in loading state_dict",
    "other width": "Error.* in loading state_dict",
    "NaN": "not finite",
    "extra weights": "Error.* in loading state_dict",
    "flipped bits": "checksum",
    "settings that are none": "damaged, or made by another version",
    **dict.fromkeys(NO_WEIGHTS, "not a checkpoint of this project, or damaged"),
    "ten bytes": "cut short",
    "truncated": "cut short",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_checkpoint_is_refused_by_name_and_nothing_of_it_runs(run, tmp_path, kind):
    path = tmp_path / "stranger.pth"
    hostile(kind, path, run)
    with pytest.raises(ValueError, match=rf"stranger\.pth: .*({HOSTILE[kind]})"):
        ru.load_generator(path)
    assert not path.with_suffix(".trace").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Odd numbers
# ----------------------------------------------------------------------------------------------------------------------


def split_of(run, pairs, **changes):
    run = run._replace(settings=dataclasses.replace(run.settings, **changes))
    return run, ru.split_pairs(pairs, run.settings)


def test_gradients_that_are_not_finite_stop_the_training_before_anything_is_saved(run, pairs, monkeypatch):
    run, split = split_of(run, pairs, pretrain_epochs=2, gan_epochs=2)
    generator = ru.build_generator(run.settings)
    ru.pretrain_generator(generator, split.pretrain_train, split.pretrain_validation, run)
    discriminator, step, calls = ru.build_discriminator(run.settings), ru.generator_step, []

    def poisoned(network, optimizer, *batch):
        """The last step of the second epoch leaves weights behind that its own losses do not show."""
        losses = step(network, optimizer, *batch)
        calls.append(1)
        if len(calls) == 2 * (len(split.gan_train) // run.settings.gan_batch):
            optimizer.param_groups[0]["params"][0].data[0] = float("inf")
        return losses

    monkeypatch.setattr(ru, "generator_step", poisoned)
    with pytest.raises(FloatingPointError, match="not finite"):
        ru.train_gan(generator, discriminator, split.gan_train, split.gan_validation, run)
    assert len(ru.load_checkpoint(run.outputs / "gan_last.pth")["history"]) == 1


def test_weights_that_are_not_finite_are_never_saved(run, tmp_path):
    path, weights = tmp_path / "a.pth", ru.build_generator(TINY).state_dict()
    ru.save_checkpoint(path, run, generator=weights)
    good = path.read_bytes()
    for network in ("generator", "discriminator", "average"):
        with pytest.raises(
            FloatingPointError, match=rf"a\.pth is not written: weights of the {network} are not finite"
        ):
            ru.save_checkpoint(path, run, **{network: {"weight": torch.tensor([1.0, float("inf")])}})
    assert path.read_bytes() == good


def test_no_validation_pairs_are_an_error_and_one_is_enough(run, pairs):
    run, split = split_of(run, pairs, pretrain_epochs=1)
    with pytest.raises(ValueError, match="no pairs"):
        ru.pretrain_generator(ru.build_generator(TINY), split.pretrain_train, [], run)
    history = ru.pretrain_generator(ru.build_generator(TINY), split.pretrain_train, split.pretrain_validation[:1], run)
    assert np.isfinite(history[0]["val_loss"])


@pytest.mark.parametrize("plain", [False, True])
def test_a_last_batch_of_one_and_a_batch_larger_than_all(run, pairs, plain):
    run, split = split_of(run, pairs, pretrain_epochs=1, gan_epochs=1, plain=plain, pretrain_batch=13, gan_batch=500)
    assert len(split.pretrain_train) % 13 == 1
    generator = ru.build_generator(run.settings)
    ru.pretrain_generator(generator, split.pretrain_train, split.pretrain_validation, run)
    discriminator = ru.build_discriminator(run.settings)
    history = ru.train_gan(generator, discriminator, split.gan_train, split.gan_validation, run)
    assert all(np.isfinite(value) for value in history[0].values())


@pytest.mark.parametrize("level", [0, 255])
def test_all_black_and_all_white_pictures(tmp_path, level):
    flat = {f"{i}.png": encoded(Image.new("L", (60 + i, 64), level), "PNG") for i in range(6)}
    faces = folder_of(tmp_path, flat)
    places = ru.Places("t", tmp_path / "o", tmp_path / "o" / "d")
    pairs = ru.prepare_pairs(faces, places, TINY)
    run = ru.Run(TINY, places, torch.device("cpu"), ru.faces_id(pairs))
    run, split = split_of(run, pairs, pretrain_epochs=1, gan_epochs=1)
    generator, discriminator = ru.build_generator(run.settings), ru.build_discriminator(run.settings)
    ru.pretrain_generator(generator, split.pretrain_train, split.pretrain_validation, run)
    history = ru.train_gan(generator, discriminator, split.gan_train, split.gan_validation, run)
    assert all(np.isfinite(value) for value in history[0].values())
    restored = ru.restore_image_gan(faces.files[0], tmp_path / "r.png", generator)
    assert np.isfinite(restored).all()


# ----------------------------------------------------------------------------------------------------------------------
# Whatever else may come: fuzzing
# ----------------------------------------------------------------------------------------------------------------------

FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
IMAGES = arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3)))
SEEDS = st.integers(0, 2**63)
RANGE = st.tuples(st.floats(0, 2), st.floats(0, 2)).map(sorted).map(tuple)


@FUZZ
@given(image=IMAGES, seed=SEEDS, kind=st.sampled_from(ru.KINDS), sigma=st.floats(0, 300), value=RANGE, size=RANGE)
def test_any_degradation_keeps_shape_type_and_input_and_follows_its_seed(image, seed, kind, sigma, value, size):
    changed = dataclasses.replace(
        TINY, noise_sigma=sigma, value=value, saturation=value, polygon_size=tuple(500 * x for x in size)
    )
    before = image.copy()
    one, two = (ru.degrade(image, kind, np.random.default_rng(seed), changed) for _ in range(2))
    assert one.shape == image.shape and one.dtype == np.uint8 and not np.shares_memory(one, image)
    assert np.array_equal(one, two) and np.array_equal(image, before)


@FUZZ
@given(image=IMAGES, seed=SEEDS, polygons=st.integers(0, 6), vertices=st.integers(3, 12))
def test_any_occlusion_leaves_alone_what_is_outside_its_mask(image, seed, polygons, vertices):
    changed = dataclasses.replace(TINY, polygons=polygons, polygon_vertices=(3, vertices))
    occluded = ru.occlude_irregular(image, np.random.default_rng(seed), changed)
    rng = np.random.default_rng(seed)
    mask = ru.occlusion_mask(image.shape, rng, changed)
    assert mask.shape == image.shape[:2] and set(np.unique(mask)) <= {0, 255}
    assert bool(mask.any()) == (polygons > 0)
    assert np.array_equal(occluded[mask == 0], image[mask == 0])


@FUZZ
@given(
    stem=st.text(st.characters(exclude_characters="/\\\0", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40),
    suffix=st.sampled_from(sorted(ru.readable_suffixes())).flatmap(lambda s: st.sampled_from([s, s.upper()])),
)
def test_any_file_name_is_found_read_and_degraded(tmp_path, stem, suffix):
    shutil.rmtree(tmp_path / "faces", ignore_errors=True)
    shutil.rmtree(tmp_path / "d", ignore_errors=True)
    name = f"{stem}{suffix}"
    if len(name.encode()) > 200 or stem.startswith("."):  # the test's own files get a longer name
        return
    faces = folder_of(tmp_path, {name: encoded(rgb(), "PNG")})  # what is in it counts, not what it is called
    assert faces.names == [name]
    assert ru.degrade_folder(faces, tmp_path / "d", TINY)[:3] == (1, 0, {})
    assert len(list((tmp_path / "d").glob("*.jpg"))) == len(TINY.kinds)


@settings(FUZZ, max_examples=25)
@given(
    picture=st.one_of(
        arrays.arrays(np.uint8, st.tuples(st.integers(1, 300), st.integers(1, 300)).flatmap(
            lambda s: st.sampled_from([s, (*s, 3), (*s, 4)])), elements=st.integers(0, 255), fill=st.integers(0, 255)),
        arrays.arrays(np.uint16, st.tuples(st.integers(1, 90), st.integers(1, 90)), fill=st.integers(0, 65535)),
    ),
    suffix=st.sampled_from([".png", ".jpg", ".webp", ".bmp", ".tif"]),
)  # fmt: skip
def test_restoring_any_decodable_picture_returns_its_size(tmp_path, picture, suffix):
    if not cv2.imwrite(str(tmp_path / f"in{suffix}"), picture):
        return
    read = cv2.imread(str(tmp_path / f"in{suffix}"))
    result = ru.restore_image_gan(tmp_path / f"in{suffix}", tmp_path / f"out{suffix}", GENERATOR)
    assert result.shape == read.shape and result.dtype == np.uint8
    assert ru.read_image(tmp_path / f"out{suffix}").shape == read.shape


GENERATOR = ru.build_generator(TINY)


@FUZZ
@given(content=st.binary(max_size=300))
def test_any_bytes_are_an_image_or_a_value_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    try:
        image = ru.read_image(path)
    except ValueError as error:
        assert "x.jpg" in str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


MANY = """
import dataclasses, io, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from PIL import Image
from conftest import TINY
import restoration_utils as ru
from test_faults import most_memory
settings, used = dataclasses.replace(TINY, kinds=ru.KINDS[:3], max_faces=None), []  # ageing takes twenty minutes
ru.IMAGE_SIZE = 16  # what is on the disk is not the question here
picture = io.BytesIO()
Image.new("RGB", (8, 8)).save(picture, "PNG")
for count in (500, 20_000):
    folder = Path(sys.argv[1]) / str(count)
    (folder / "faces").mkdir(parents=True)
    for number in range(count):
        (folder / "faces" / f"portrait_{{number:05d}}.png").write_bytes(picture.getvalue() + b"%d" % number)
    before, places = most_memory(), ru.Places("t", folder, folder / "d")
    os.environ["FACES_DIR"] = str(folder / "faces")
    faces = ru.find_faces(settings, places)
    splits = ru.split_pairs(ru.prepare_pairs(faces, places, settings), settings)
    assert len(splits.pretrain_train) == 3 * count * 4 // 5
    used.append(most_memory(forget=False) - before)
print((used[1] - used[0]) / 19_500, used)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says how much memory was used")
def test_degrading_and_indexing_twenty_thousand_originals_takes_less_than_a_kilobyte_for_each_pair(tmp_path):
    code = MANY.format(root=str(ROOT), tests=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    print(done.stdout.splitlines()[-1])
    assert float(done.stdout.splitlines()[-1].split()[0]) < 3072  # bytes: paths of three pairs, mostly


@pytest.mark.slow
def test_epochs_and_restorations_leak_nothing(run, pairs, faces, tmp_path):
    run, split = split_of(run, pairs, pretrain_epochs=40)
    after = []
    network = ru.build_generator(run.settings)
    losses, save = ru.validation_losses, lambda: (gc.collect(), after.append(anonymous_memory()))

    def counted(*arguments):
        save()
        return losses(*arguments)

    ru.validation_losses = counted
    try:
        ru.pretrain_generator(network, split.pretrain_train, split.pretrain_validation, run)
    finally:
        ru.validation_losses = losses
    assert len(after) == 40 and min(after[-15:]) - min(after[5:20]) < 30e6  # every epoch's images kept: 20 x 38
    sizes = []
    for _ in range(200):
        ru.restore_image_gan(faces.files[0], tmp_path / "r.png", network)
        gc.collect()
        sizes.append(anonymous_memory())
    assert min(sizes[-50:]) - min(sizes[10:60]) < 5e6  # every restoration's images kept: 140 x 1.6


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=[s.name for s in SABOTAGES])
def test_every_sabotage_finds_its_line(sabotage):
    assert (ROOT / "restoration_utils.py").read_text(encoding="utf-8").count(sabotage.old) == 1
