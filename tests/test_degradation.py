"""The degradations, and degrading a folder of originals."""

import colorsys
import dataclasses
import hashlib
import io
import json
import shutil
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import TINY, faces_in
from PIL import Image

import restoration_utils as ru

ROOT = Path(__file__).parents[1]


def grey(level, size=256):
    return np.full((size, size, 3), level, np.uint8)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.jpg"))}


@pytest.mark.parametrize("kind", ru.KINDS)
def test_degradations_keep_shape_and_input_and_follow_the_seed(kind):
    image = np.random.default_rng(1).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    before = image.copy()
    first, again, other = (ru.degrade(image, kind, np.random.default_rng(seed), TINY) for seed in (5, 5, 6))
    assert first.shape == image.shape and first.dtype == np.uint8
    assert np.array_equal(image, before)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_noise_has_mean_0_and_sigma_25():
    difference = ru.add_gaussian_noise(grey(128), np.random.default_rng(0)).astype(float) - 128
    assert abs(difference.mean()) < 0.3
    assert abs(difference.std() - 25) < 0.3
    assert abs(np.corrcoef(difference[..., 0].ravel(), difference[..., 1].ravel())[0, 1]) < 0.02  # per channel


@pytest.mark.parametrize("level", [0, 255])
def test_noise_clips_instead_of_wrapping(level):
    noisy = ru.add_gaussian_noise(grey(level), np.random.default_rng(0)).astype(float)
    assert np.abs(noisy - level).max() < 6 * 25
    assert np.mean(noisy == level) > 0.45


@pytest.mark.parametrize("saturation", [(0.3, 0.7), (1.0, 1.0)])
@pytest.mark.parametrize("value", [(0.6, 1.2), (1.2, 2.0)])
def test_color_multiplies_s_and_v_as_colorsys_does(saturation, value):
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    image[0, :4] = (0, 0, 0), (255, 255, 255), (9, 9, 9), (0, 0, 255)
    rng = np.random.default_rng(3)
    s_factor, v_factor = rng.uniform(*saturation), rng.uniform(*value)
    result = ru.distort_colors(
        image, np.random.default_rng(3), dataclasses.replace(TINY, saturation=saturation, value=value)
    )
    for pixel, changed in zip(image.reshape(-1, 3), result.reshape(-1, 3)):
        h, s, v = colorsys.rgb_to_hsv(*(pixel[::-1] / 255))
        expected = np.array(colorsys.hsv_to_rgb(h, min(1, s * s_factor), min(1, v * v_factor)))[::-1] * 255
        assert np.abs(changed - expected).max() <= 0.5001  # of rounding


def test_the_fast_fading_equals_the_plain_one_in_hsv_of_notebook_01():
    cells = json.loads((ROOT / "notebooks" / "01_create_degraded_images.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    scope = {"cv2": cv2, "np": np}
    exec(next(source for source in sources if "def fade_in_hsv" in source).partition("\n\n\n")[0], scope)
    image = np.random.default_rng(1).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        slow = scope["fade_in_hsv"](image, rng.uniform(*TINY.saturation), rng.uniform(*TINY.value))
        fast = ru.distort_colors(image, np.random.default_rng(seed), TINY)
        assert np.abs(fast.astype(int) - slow).max() <= 1 and (fast != slow).mean() < 0.001


def test_color_factors_cover_their_ranges_and_bright_pixels_do_not_wrap():
    pure_red = np.array([[[0, 0, 250]]], np.uint8)
    results = np.array([ru.distort_colors(pure_red, np.random.default_rng(s))[0, 0] for s in range(300)], float)
    value, saturation = results.max(1) / 250, 1 - results.min(1) / results.max(1)
    assert 0.59 < value.min() < 0.63 and value.max() == pytest.approx(255 / 250, abs=0.01)  # clipped at white
    assert 0.29 < saturation.min() < 0.33 and 0.67 < saturation.max() < 0.71


@pytest.mark.parametrize("size", [1024, 512, 256])
def test_polygons_have_the_size_and_the_number_of_corners_of_the_spec(size):
    spans, corners = [], []
    for seed in range(60):
        polygons = ru._polygons((size, size, 3), np.random.default_rng(seed), TINY)
        assert len(polygons) == 3
        for polygon in polygons:
            assert polygon.min() >= 0 and polygon.max() < size
            spans.append(np.ptp(polygon, axis=0).max() * 1024 / size)
            corners.append(len(polygon))
    slack = 1024 / size
    assert 80 - slack <= min(spans) < 90 and 190 < max(spans) <= 200 + slack
    assert set(corners) == {6, 7, 8, 9, 10}


def test_mask_is_exactly_what_is_covered_and_the_rest_is_untouched():
    fills = set()
    for seed in range(40):
        image = grey(128, 300)
        occluded = ru.occlude_irregular(image, np.random.default_rng(seed))
        mask = ru.occlusion_mask(image.shape, np.random.default_rng(seed)) > 0
        assert np.array_equal(occluded[~mask], image[~mask])
        changed = (occluded != image).any(-1)
        assert changed[mask].mean() > 0.999  # a noise pixel may be 128 in all channels by chance
        fills |= {int(level) for level in np.unique(occluded[mask]) if level in (0, 255)}
    assert fills == {0, 255}


def test_folder_bytes_do_not_depend_on_the_number_of_workers(faces, tmp_path):
    for workers in (1, 4):
        ru.degrade_folder(faces, tmp_path / str(workers), TINY, workers)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "4")
    assert len(hashes(tmp_path / "1")) == 40
    one = ru.Faces(faces.folder, "", faces.names[7:8])  # nor on what else is in the folder
    ru.degrade_folder(one, tmp_path / "one", TINY)
    assert hashes(tmp_path / "one").items() <= hashes(tmp_path / "1").items()


def test_originals_are_not_touched_and_a_second_run_does_nothing(faces, tmp_path):
    originals = hashes(faces.folder)
    assert ru.degrade_folder(faces, tmp_path / "d", TINY)[:2] == (10, 0)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()}
    report = ru.degrade_folder(faces, tmp_path / "d", TINY)
    assert report[:2] == (0, 10) and "already done" in str(report)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()}
    assert hashes(faces.folder) == originals


def test_only_what_is_missing_or_changed_is_made_again(faces, tmp_path):
    ru.degrade_folder(faces, tmp_path / "d", TINY)
    (tmp_path / "d" / "face_3_noisy.jpg").unlink()
    ru.write_image(faces.files[5], grey(90, 64))
    assert ru.degrade_folder(faces, tmp_path / "d", TINY)[:2] == (2, 8)
    for changed in (dataclasses.replace(TINY, seed=1), dataclasses.replace(TINY, noise_sigma=30.0)):
        assert ru.degrade_folder(faces, tmp_path / "d", changed).made == 10


def test_an_interrupted_run_goes_on(faces, tmp_path, monkeypatch):
    calls, write = [], ru.write_image

    def interrupted(path, *rest):
        calls.append(path)
        if len(calls) > 12:
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(ru, "write_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ru.degrade_folder(faces, tmp_path / "d", TINY, workers=1)
    monkeypatch.setattr(ru, "write_image", write)
    report = ru.degrade_folder(faces, tmp_path / "d", TINY)
    assert report.kept >= 3 and report.made + report.kept == 10
    ru.degrade_folder(faces, tmp_path / "whole", TINY)
    assert hashes(tmp_path / "d") == hashes(tmp_path / "whole")


def test_unreadable_files_are_named_and_skipped(faces, tmp_path):
    (faces.folder / "empty.jpg").touch()
    (faces.folder / "text.jpg").write_text("not a picture")
    content = faces.files[0].read_bytes()
    (faces.folder / "half.jpg").write_bytes(content[: len(content) // 2])
    more = faces_in(faces.folder)
    report = ru.degrade_folder(more, tmp_path / "d", TINY)
    assert report.made == 10 and set(report.left_out) == {"empty.jpg", "text.jpg", "half.jpg"}
    assert all(name in str(report) for name in report.left_out) and "truncated" in str(report).lower()
    cv2.imwrite(str(faces.folder / "long.png"), np.zeros((2, 66_000, 3), np.uint8))  # more than a JPEG can hold
    more = faces_in(faces.folder)
    assert "66000 x 2" in ru.degrade_folder(more, tmp_path / "d", TINY).left_out["long.png"]
    only = ru.Faces(faces.folder, "", ["empty.jpg"])
    with pytest.raises(ValueError, match=r"empty\.jpg"):
        ru.degrade_folder(only, tmp_path / "none", TINY)


def test_same_stem_twice_and_degraded_files_among_the_originals(faces, places):
    picture = ru.read_image(faces.files[0])
    for name in ("face_0.png", "sub/face_1.jpg", "face_2_noisy.jpg", "fakefaces_degraded/face_0_noisy.jpg"):
        ru.write_image(faces.folder / name, picture)
    ru.write_image(faces.folder / "lonely_color.jpg", picture)  # has no original beside it: an original itself
    more = faces_in(faces.folder)
    assert len(more.names) == 13 and "sub/face_1.jpg" in more.names
    assert list(more.left_out) == ["face_2_noisy.jpg"] and "copy of face_2" in more.left_out["face_2_noisy.jpg"]
    pairs = ru.prepare_pairs(more, places, TINY)
    assert len({pair.degraded for pair in pairs}) == 13 * len(TINY.kinds)


def test_jpeg_is_written_at_quality_95_without_colour_subsampling(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    ru.write_image(tmp_path / "a.jpg", picture)
    Image.fromarray(picture).save(tmp_path / "reference.jpg", quality=95, subsampling="4:4:4")
    ours, reference = Image.open(tmp_path / "a.jpg"), Image.open(tmp_path / "reference.jpg")
    assert [layer[1:3] for layer in ours.layer] == [(1, 1)] * 3
    assert ours.quantization == reference.quantization


def test_too_little_space_is_said_before_anything_is_written(faces, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 100, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="room for"):
        ru.degrade_folder(faces, tmp_path / "d", TINY)
    assert not list((tmp_path / "d").glob("*.jpg"))


def test_every_degraded_file_says_what_made_it_and_is_drawn_from_its_own_seed(faces, pairs):
    pair = next(p for p in pairs if p.name == "face_4.jpg" and p.kind == "occluded")
    with Image.open(pair.degraded) as written:
        assert written.info["comment"].decode() == pair.comment(TINY)
    assert len({p.comment(TINY) for p in pairs}) == len(pairs) and pair.is_done(TINY)
    assert not pair._replace(content="0").is_done(TINY) and not pair._replace(kind="noisy").is_done(TINY)
    rng = np.random.default_rng(ru.derive_seed(TINY.seed, "occluded", "face_4.jpg"))
    expected = ru.occlude_irregular(ru.read_image(faces.files[4]), rng)
    assert np.abs(cv2.imread(str(pair.degraded)).astype(int) - expected).mean() < 2


def test_degraded_files_of_an_older_version_of_the_code_are_made_again(faces, places, monkeypatch):
    """The masks are drawn again from the seed: with other polygons than those in the files they would be wrong."""
    ru.degrade_folder(faces, places.degraded, TINY)
    polygons = ru._polygons
    monkeypatch.setattr(ru, "_polygons", lambda *a: [p[::-1] // 2 for p in polygons(*a)])
    ru.degradation_id.cache_clear()
    try:
        assert ru.degrade_folder(faces, places.degraded, TINY)[:2] == (10, 0)
        assert ru.degrade_folder(faces, places.degraded, TINY)[:2] == (0, 10)
    finally:
        ru.degradation_id.cache_clear()


@pytest.mark.parametrize("name", ["seed", "noise_sigma", "saturation", "value", "polygons", "jpeg_quality"])
def test_every_setting_of_the_degradations_is_part_of_what_made_a_file(name):
    changed = {"saturation": (0.3, 0.71), "value": (0.6, 1.21)}.get(name, 7)
    assert ru.degradation_id(dataclasses.replace(TINY, **{name: changed})) != ru.degradation_id(TINY)
    assert ru.degradation_id(dataclasses.replace(TINY, pretrain_lr=7)) == ru.degradation_id(TINY)


def test_a_file_that_cannot_be_read_is_tried_again_and_degraded_once_it_can(faces, places):
    bad = faces.folder / "bad.jpg"
    bad.write_text("not a picture")
    more = faces_in(faces.folder)
    ru.degrade_folder(more, places.degraded, TINY)
    report = ru.degrade_folder(more, places.degraded, TINY)
    assert report[:2] == (0, 10) and set(report.left_out) == {"bad.jpg"}
    attached = places._replace(degraded=places.outputs / "other", attached=places.outputs)
    pairs = ru.prepare_pairs(more, attached, TINY)
    assert len(pairs) == 40 and all(pair.degraded.is_relative_to(places.degraded) for pair in pairs)
    bad.write_bytes(faces.files[0].read_bytes())
    assert ru.degrade_folder(more, places.degraded, TINY)[:3] == (1, 10, {})
    bad.write_text("broken again")
    assert ru.degrade_folder(more, places.degraded, TINY).left_out and len(ru.prepare_pairs(more, places, TINY)) == 40


def test_copies_of_other_originals_are_never_taken_for_ones_own(faces, tmp_path):
    """The same file names from another folder of faces."""
    for number, path in enumerate(faces.files):
        ru.write_image(tmp_path / "up" / "faces" / path.name, grey(20 * number, 64))
    inner = faces_in(tmp_path / "up" / "faces")
    outer = ru.Faces(
        tmp_path / "up", "", [f"faces/{name}" for name in inner.names]
    )  # the same files under longer names
    for now in (inner, outer, inner):
        assert ru.degrade_folder(now, tmp_path / "d", TINY).made == 10
        assert ru.degrade_folder(now, tmp_path / "d", TINY).kept == 10
    ru.degrade_folder(inner, tmp_path / "fresh", TINY)
    assert hashes(tmp_path / "d") == hashes(tmp_path / "fresh")


def test_jpegs_with_a_thumbnail_or_data_behind_the_end_are_judged_by_their_own_scan(tmp_path):
    small, large = Image.fromarray(grey(10, 16)), Image.fromarray(grey(200, 64))
    thumbnail = io.BytesIO()
    small.save(thumbnail, "JPEG")
    large.save(tmp_path / "a.jpg", exif=b"Exif\0\0" + thumbnail.getvalue())
    whole = (tmp_path / "a.jpg").read_bytes()
    assert ru.read_image(tmp_path / "a.jpg").shape == (64, 64, 3)
    (tmp_path / "video.jpg").write_bytes(whole + b"\xff\xda a film follows" * 20)
    assert np.array_equal(ru.read_image(tmp_path / "video.jpg"), ru.read_image(tmp_path / "a.jpg"))
    (tmp_path / "filled.jpg").write_bytes(whole[:2] + b"\xff\xff" + whole[2:])  # allowed before every marker
    assert np.array_equal(ru.read_image(tmp_path / "filled.jpg"), ru.read_image(tmp_path / "a.jpg"))
    (tmp_path / "cut.jpg").write_bytes(whole[:-20])  # the thumbnail's end marker is still there
    with pytest.raises(ValueError, match=r"cut\.jpg: cannot be read .*truncated"):
        ru.read_image(tmp_path / "cut.jpg")


def test_files_are_read_and_written_exactly_as_cv2_imread_and_imwrite_do(faces, tmp_path):
    picture = cv2.imread(str(faces.files[0]))
    assert np.array_equal(ru.read_image(faces.files[0]), picture)
    deep = np.arange(64 * 64 * 3, dtype=np.uint16).reshape(64, 64, 3) * 5
    for name, image in {
        "grey.png": picture[..., 0],
        "alpha.png": np.dstack([picture, picture[..., :1]]),
        "16.png": deep,
    }.items():
        cv2.imwrite(str(tmp_path / name), image)
        assert np.array_equal(ru.read_image(tmp_path / name), cv2.imread(str(tmp_path / name))), name
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    cv2.imwrite(str(tmp_path / "theirs.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 95, *sampling])
    ru.write_image(tmp_path / "ảnh cũ.jpg", picture)
    assert (tmp_path / "ảnh cũ.jpg").read_bytes() == (tmp_path / "theirs.jpg").read_bytes()


def test_when_no_face_can_be_read_it_says_so_though_there_are_scenes(faces, places):
    for path in faces.files:
        path.write_bytes(b"no picture")
    faces = faces._replace(scenes=ru.draw_pictures("scene", 1, TINY, places))
    with pytest.raises(ValueError, match=r"no original could be read:\n  face_0"):
        ru.degrade_folder(faces, places.degraded, TINY)
