"""Files of one's own: what a file carries comes back, whole folders, the command line, the slider."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from conftest import TINY, Stub
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, features

import restoration_utils as ru

MODULE = Path(ru.__file__)
SCENE = ru.draw_scene(np.random.default_rng(7), 256)
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6" tiff:Make="kept"/>'
    b"</rdf:RDF></x:xmpmeta>"
)
IPTC = b"Photoshop 3.0\x008BIM\x04\x04\x00\x00\x00\x00\x00\x0f\x1c\x02\x78\x00\x0aOld albums\x00"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def darker(by: float = 0.1) -> Stub:
    return Stub(lambda seen: seen - by)


def display_p3() -> bytes:
    """The profile of a phone's pictures: sRGB's with other primaries (SMPTE EG 432-1, adapted to D50)."""
    data = bytearray(SRGB)
    primaries = {b"rXYZ": (0.51512, 0.2412, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189)}
    primaries |= {b"bXYZ": (0.1571, 0.06657, 0.78407)}
    for number in range(struct.unpack(">I", data[128:132])[0]):
        name, offset, _ = struct.unpack(">4sII", data[132 + 12 * number : 144 + 12 * number])
        if name in primaries:
            data[offset + 8 : offset + 20] = struct.pack(">3i", *(round(65536 * value) for value in primaries[name]))
    return bytes(data)


def with_thumbnail(exif: Image.Exif) -> bytes:
    """EXIF data and a second directory, which says where a thumbnail lies; Pillow writes none."""
    data = exif.tobytes()[6:]
    order, first = ("<" if data[:2] == b"II" else ">"), 8
    count = struct.unpack(order + "H", data[first : first + 2])[0]
    end = first + 2 + 12 * count
    entries = struct.pack(order + "HHHIIHHIII", 2, 0x0201, 4, 1, len(data) + 30, 0x0202, 4, 1, 4, 0)
    return b"Exif\0\0" + data[:end] + struct.pack(order + "I", len(data)) + data[end + 4 :] + entries + b"tiny"


def picture(mode: str = "RGB", size: tuple[int, int] = (120, 80)) -> Image.Image:
    return ru.to_pil(cv2.resize(SCENE, size, interpolation=cv2.INTER_AREA)).convert(mode)


def utf8(text: str) -> str:
    """A text as cameras write it, UTF-8, to be written by Pillow, which would write ASCII."""
    return ru.AsRead(text.encode().decode("latin-1"))


def camera_exif(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010E], exif[0x010F], exif[0x0132], exif[0x0112] = (
        utf8("Huế 1961"),
        "Maker",
        "2021:05:06 07:08:09",
        orientation,
    )
    details, place = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
    details[0x9003], details[0x927C], details[0xA002], details[0xA003] = "1961:07:08 09:10:11", b"notes", 120, 80
    details[0xA430] = utf8("Lê Lan")  # the owner
    place[1], place[2] = "N", (16.0, 27.0, 48.0)
    read = Image.Exif()
    read.load(exif.tobytes())  # as of a file: now it knows its parts
    for part in (read, read.get_ifd(0x8769)):
        part.update({tag: ru.AsRead(text) for tag, text in part.items() if isinstance(text, str)})
    return read


def restored(tmp_path: Path, name: str, to: str = "", generator: Stub | None = None, **how) -> Image.Image:
    """The file of that name in `tmp_path`, restored, opened with its pixels."""
    destination = tmp_path / "out" / (to or name)
    ru.restore_image_gan(tmp_path / name, destination, generator or darker(), **how)
    with Image.open(destination) as image:
        image.load()
    return image


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", *["avif"] * features.check("avif")])
def test_what_a_camera_and_an_archive_wrote_comes_back(tmp_path, suffix):
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "Tết")
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    carried = {"exif": camera_exif(), "icc_profile": SRGB, "dpi": (600, 600), "pnginfo": info}
    carried |= {"comment": b"by Lan", "extra": b"\xff\xed" + struct.pack(">H", len(IPTC) + 2) + IPTC}
    if suffix != "png":
        carried["xmp"] = XMP
    name = f"a.{suffix}"
    picture().save(tmp_path / name, **carried)
    back = restored(tmp_path, name)
    exif = back.getexif()
    assert back.size == (80, 120) and exif.get(0x0112, 1) == 1  # turned, and not to be turned again
    if suffix != "avif":  # cameras write UTF-8, Pillow reads Latin-1, and of turned AVIFs only ASCII
        assert exif[0x010E].encode("latin-1").decode() == "Huế 1961"
    assert (exif[0x010F], exif[0x0132]) == ("Maker", "2021:05:06 07:08:09")
    details, place = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
    assert details[0x9003] == "1961:07:08 09:10:11" and details[0x927C] == b"notes"
    if suffix != "avif":
        assert details[0xA430].encode("latin-1").decode() == "Lê Lan"
    assert (details[0xA002], details[0xA003]) == ((80, 120) if suffix != "tif" else (120, 80))
    assert place[1] == "N" and place[2] == (16.0, 27.0, 48.0)
    assert back.info["icc_profile"] == SRGB
    if suffix in ("jpg", "png", "tif"):
        assert back.info["dpi"] == pytest.approx((600, 600), abs=0.1)
    if suffix in ("jpg", "png", "webp"):
        xmp = back.info.get("xmp") or back.info["XML:com.adobe.xmp"].encode()
        assert b'tiff:Make="kept"' in xmp and b'tiff:Orientation="1"' in xmp
    if suffix == "jpg":
        assert back.info["comment"] == b"by Lan" and ("APP13", IPTC) in back.applist
    if suffix == "png":
        assert back.text["Title"] == "Tết"


def test_a_thumbnail_is_dropped_and_jpegs_stay_progressive_at_full_colour_resolution(tmp_path):
    picture().save(tmp_path / "a.jpg", progressive=True, exif=with_thumbnail(camera_exif(1)))
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.getexif().get_ifd(ExifTags.IFD.IFD1)[0x0201]
    back = restored(tmp_path, "a.jpg")
    assert back.info.get("progressive") and {layer[1:3] for layer in back.layer} == {(1, 1)}
    assert not back.getexif().get_ifd(ExifTags.IFD.IFD1) and back.getexif()[0x010F] == "Maker"
    picture().save(tmp_path / "b.jpg")
    assert not restored(tmp_path, "b.jpg").info.get("progressive")


def test_a_phones_colours_come_back_as_they_were(tmp_path):
    vivid = np.zeros((80, 120, 3), np.uint8)
    vivid[:, :60] = (255, 0, 0)  # redder than sRGB can say
    vivid[:, 60:] = (180, 120, 100)
    profile = display_p3()
    Image.fromarray(vivid).save(tmp_path / "a.png", icc_profile=profile)
    scan = ru.read_scan(tmp_path / "a.png")
    profiles = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    reference = ImageCms.profileToProfile(Image.fromarray(vivid), *profiles, renderingIntent=1)
    assert np.abs(scan.photo()[:, :, ::-1].astype(int) - np.asarray(reference)).max() <= 1
    assert scan.photo()[0, 100, 2] > 185  # its skin does not fade
    unchanged = restored(tmp_path, "a.png", generator=Stub())
    assert np.array_equal(np.asarray(unchanged), vivid) and unchanged.info["icc_profile"] == profile
    changed = np.asarray(restored(tmp_path, "a.png", generator=darker())).astype(int)
    assert (changed[0, 100] < vivid[0, 100] - 5).all() and changed[0, 0, 0] < 255


def test_a_profile_that_can_only_be_read_and_one_that_is_none(tmp_path):
    to_srgb, back = ru.color_transforms(b"no profile", "RGB")
    assert to_srgb(picture()).tobytes() == picture().tobytes() == back(picture()).tobytes()
    picture().save(tmp_path / "a.png", icc_profile=b"no profile")
    assert np.array_equal(restored(tmp_path, "a.png", generator=Stub()), picture())
    picture("L").save(tmp_path / "b.png", icc_profile=SRGB)  # a profile for RGB
    assert np.array_equal(restored(tmp_path, "b.png", generator=Stub()), picture("L"))
    picture("CMYK").save(tmp_path / "c.jpg")
    back = restored(tmp_path, "c.jpg", generator=Stub())
    assert back.mode == "RGB" and np.abs(np.asarray(back).astype(int) - picture()).mean() < 6


def deep(channels: int) -> np.ndarray:
    eight = cv2.resize(SCENE, (120, 80))[..., [0, 1, 2, 0][:channels]].astype(np.int32) * 257
    return (eight + np.random.default_rng(0).integers(-120, 121, eight.shape)).clip(0, 65535).astype(np.uint16)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_stay_sixteen(tmp_path, suffix, channels):
    pixels, name = deep(channels), f"a.{suffix}"
    if suffix == "png":
        assert cv2.imwrite(str(tmp_path / name), pixels if channels == 1 else pixels[..., [2, 1, 0, 3][:channels]])
    else:
        how = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
        tags = [(315, "s", 0, "Lan", True), (700, "B", len(XMP), XMP.replace(b'tion="6"', b'tion="1"'), True)]
        tifffile.imwrite(tmp_path / name, pixels.squeeze(), photometric="rgb" if channels > 1 else "minisblack",
                         resolution=(1200, 1200), resolutionunit=2, extratags=tags, **how)  # fmt: skip

    def stored(path: Path) -> np.ndarray:
        if suffix == "tif":
            return tifffile.imread(path).reshape(pixels.shape)
        read = np.atleast_3d(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
        return read if channels == 1 else read[..., [2, 1, 0, 3][:channels]]

    back = restored(tmp_path, name, generator=Stub())
    assert np.array_equal(stored(tmp_path / "out" / name), pixels)
    if suffix == "tif":
        assert back.info["dpi"] == (1200, 1200) and back.tag_v2[315] == "Lan" and b"kept" in back.tag_v2[700]
    restored(tmp_path, name, generator=darker(0.1))
    changed, colors = stored(tmp_path / "out" / name).astype(int), min(channels, 3)
    assert changed.shape == pixels.shape
    assert np.array_equal(changed[..., colors:], pixels[..., colors:])  # opacity
    difference = (pixels.astype(int) - changed)[..., :colors][pixels[..., :colors] > 20000]
    assert (difference % 257 == 0).all() and 10 * 257 <= difference.min() <= difference.max() <= 16 * 257
    as_jpeg = restored(tmp_path, name, to="b.jpg", generator=Stub())
    assert as_jpeg.mode == ("L" if channels == 1 else "RGB")


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_16_bit_tiff_may_lie_on_its_side_or_count_from_white_but_not_be_planar(tmp_path, orientation):
    pixels, turn = deep(3), ru.UPRIGHT[orientation]
    upright = np.dstack([np.asarray(Image.fromarray(plane).transpose(turn)) for plane in np.moveaxis(pixels, 2, 0)])
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    restored(tmp_path, "a.tif", generator=Stub())
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "a.tif"), upright)
    planar = np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
    tifffile.imwrite(tmp_path / "b.tif", planar, photometric="rgb", planarconfig="separate")
    with pytest.raises(ValueError, match="a plane for each colour"):
        restored(tmp_path, "b.tif", generator=Stub())
    tifffile.imwrite(tmp_path / "c.tif", 65535 - pixels[..., 0], photometric="miniswhite")
    restored(tmp_path, "c.tif", generator=Stub())
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "c.tif"), pixels[..., 0])


def test_iptc_in_a_tiff_comes_back_and_a_turn_that_only_xmp_tells_stays_there(tmp_path):
    iptc = IPTC[-16:]  # as many programs write it: as 32-bit numbers
    numbers = struct.unpack("<4I", iptc)
    tifffile.imwrite(tmp_path / "a.tif", np.asarray(picture()), photometric="rgb", byteorder="<",
                     extratags=[(33723, "I", 4, numbers, True)])  # fmt: skip
    assert restored(tmp_path, "a.tif").tag_v2[33723] == iptc
    picture().save(tmp_path / "a.jpg", xmp=XMP)
    back = restored(tmp_path, "a.jpg")
    assert back.size == (120, 80) and b'tiff:Orientation="6"' in back.info["xmp"]


def test_damaged_data_about_a_picture_cost_no_picture(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif[0x011A] = "wide"  # a text for a number
    info = PngImagePlugin.PngInfo()
    for name in ("dpi", "xmp", "icc_profile", "comment", "progressive"):
        info.add_text(name, "text")
    picture().save(tmp_path / "a.png", pnginfo=info)
    assert restored(tmp_path, "a.png").text["dpi"] == "text"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Exif, "tobytes", lambda self, offset=8: 1 / 0)
        picture().save(tmp_path / "b.png")
        restored(tmp_path, "b.png")
        patch.setattr(ru, "exif_of", lambda image, turned: exif)
        assert np.array_equal(restored(tmp_path, "b.png", generator=Stub()), picture())
    assert "b.png: 0.00% repainted; without its EXIF data, which are damaged" in capsys.readouterr().out


def test_the_date_of_a_16_bit_tiff_comes_back(tmp_path):
    Image.fromarray(deep(1)[..., 0]).save(tmp_path / "a.tif", exif=camera_exif(1), icc_profile=SRGB)
    back = restored(tmp_path, "a.tif", generator=Stub())
    assert back.getexif().get_ifd(0x8769)[0x9003] == "1961:07:08 09:10:11" and back.info["icc_profile"] == SRGB
    assert back.mode == "I;16" and np.array_equal(np.asarray(back), deep(1)[..., 0])


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_transparency_is_not_touched_and_grey_stays_grey(tmp_path, name):
    for mode in ("RGBA", "LA") if name != "a.webp" else ("RGBA",):
        image = picture(mode)
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(tmp_path / name, **({"lossless": True, "exact": True} if name == "a.webp" else {}))
        back = restored(tmp_path, name, generator=Stub())
        assert back.mode == mode and np.array_equal(back.getchannel("A"), image.getchannel("A"))
        assert np.abs(np.asarray(back).astype(int) - np.asarray(image)).max() <= (1 if name != "a.webp" else 255)
    picture("L").save(tmp_path / "grey.jpg")
    assert restored(tmp_path, "grey.jpg").mode == "L"
    picture("RGBA").save(tmp_path / "b.png")
    assert restored(tmp_path, "b.png", to="b.jpg").mode == "RGB"


def test_of_several_pictures_the_first_is_restored_and_the_rest_is_named(tmp_path, capsys):
    first, second = picture(), picture().rotate(180)
    for name in ("a.tif", "a.gif", "a.mpo"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        back = restored(tmp_path, name, generator=Stub())
        assert np.abs(np.asarray(back.convert("RGB")).astype(int) - first).mean() < 8
        assert "the first of its 2 pictures" in capsys.readouterr().out


def test_a_heic_needs_its_reader_and_says_so(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    picture(size=(128, 96)).save(tmp_path / "a.heic", exif=camera_exif(1))
    assert restored(tmp_path, "a.heic").getexif()[0x010F] == "Maker"
    monkeypatch.setattr(ru, "readable_suffixes", lambda: ru.IMAGE_SUFFIXES - {".heic"})
    assert "pip install pillow-heif" in ru.list_images(tmp_path)[1]["a.heic"]


def test_a_sepia_print_may_keep_its_tone():
    grey = np.linspace(20, 230, 256)[None, :, None] + np.zeros((300, 1, 1))
    tint = np.array((-0.2, 0, 0.15)) * (255 - grey) / 255 * 100
    sepia = np.rint(grey + tint).clip(0, 255).astype(np.uint8)
    result = ru.restore_photo(sepia, darker(0.1))
    assert ru.is_neutral(result.image)
    kept = ru.with_tone_of(sepia, result).astype(int)
    inner = np.s_[:, 30:-30]
    assert np.abs(kept - (sepia.astype(int) - 13))[inner].max() <= 4


# ------ folders


@pytest.fixture
def scans(tmp_path) -> Path:
    """Five pictures in two folders, one damaged file, and one that is no picture."""
    folder = tmp_path / "scans"
    (folder / "album 1").mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "b.png", "album 1/ảnh.JPG", "album 1/a_color.jpg", "album 1/a.jpg")):
        picture(size=(100 + number, 80)).save(folder / name)
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:900])
    (folder / "notes.txt").write_text("not a picture")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_restored_under_the_same_names_and_its_inputs_stay(scans, tmp_path):
    before, out = contents(scans), tmp_path / "out"
    reports = {report.file: report for report in ru.restore_folder(scans, out, darker())}
    assert contents(scans) == before
    pictures = set(before) - {"cut.jpg", "notes.txt"}
    made = contents(out)
    assert set(made) - {".lock"} == pictures | {"_restored.csv", "_before_and_after_01.jpg"}
    assert {name for name, report in reports.items() if report.done} == pictures and "cut.jpg" in reports
    for name in pictures:
        assert ru.read_image(out / name).shape == ru.read_image(scans / name).shape
    with (out / "_restored.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert rows.keys() == reports.keys() and rows["cut.jpg"]["restored"] == "no" and rows["cut.jpg"]["remark"]
    assert rows["album 1/ảnh.JPG"]["width"] == "102" and float(rows["a.jpg"]["seconds"]) > 0
    height, width = 3 * (ru.TILE + 30) + 25, 2 * (4 * ru.TILE + 20)  # with a line of headings
    assert ru.read_image(out / "_before_and_after_01.jpg").shape == (height, width, 3)


def test_what_is_there_is_left_and_a_second_run_does_the_rest(scans, tmp_path):
    out = tmp_path / "out"
    ru.restore_folder(scans, out, darker())
    table = (out / "_restored.csv").read_text(encoding="utf-8-sig").splitlines()
    (out / "b.png").write_bytes(b"mine")
    (out / "a.jpg").unlink()
    (out / f"{ru.PARTIAL}x.jpg").write_bytes(b"left by a killed run")
    again = {report.file: report for report in ru.restore_folder(scans, out, darker(0.3))}
    assert (out / "b.png").read_bytes() == b"mine" and again["b.png"].remark == "was there already"
    assert ru.read_image(out / "a.jpg").mean() < ru.read_image(out / "album 1/a.jpg").mean() - 15
    after = (out / "_restored.csv").read_text(encoding="utf-8-sig").splitlines()
    assert len(after) == len(table) and next(row for row in after if row.startswith("b.png")) in table
    ru.restore_folder(scans, out, darker(), overwrite=True)
    assert ru.read_image(out / "b.png").shape == (80, 101, 3)


def test_sheets_have_twenty_pairs_and_show_what_changed_most(tmp_path):
    before = np.full((400, 600, 3), 90, np.uint8)
    after = before + 20  # a change of tone does not count
    after[300:320, 500:520] = 250
    x, y = ru.most_changed(before, after, 60)
    assert 460 <= x <= 500 and 260 <= y <= 300
    (tmp_path / "in").mkdir()
    for number in range(21):
        ru.write_image(tmp_path / "in" / f"{number:02d}.png", before)
        ru.write_image(tmp_path / "out" / f"{number:02d}.png", after)
    pairs = [(path, tmp_path / "out" / path.name) for path in sorted((tmp_path / "in").iterdir())]
    sheets = ru.write_sheets(pairs, tmp_path / "out")
    assert [ru.read_image(path).shape[0] for path in sheets] == [10 * (ru.TILE + 30) + 25, ru.TILE + 30 + 25]
    strip = ru.before_and_after(*pairs[0])
    assert strip.shape == (ru.TILE, 4 * ru.TILE, 3) and strip[:, 3 * ru.TILE :].max() > 245 > strip[:, : ru.TILE].min()


def test_folders_that_could_endanger_originals_are_refused(scans, tmp_path):
    before = contents(tmp_path)
    for out in (scans, scans / "out", tmp_path, scans / ".." / "scans"):
        with pytest.raises(ValueError, match="neither the same nor inside"):
            ru.restore_folder(scans, out, Stub())
    picture().save(scans / "a.png")
    with pytest.raises(ValueError, match=r"a\.jpg, a\.png.*same name"):
        ru.restore_folder(scans, tmp_path / "out", Stub(), suffix=".webp")
    (scans / "a.png").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no pictures"):
        ru.restore_folder(tmp_path / "empty", tmp_path / "out", Stub())
    with pytest.raises(FileNotFoundError, match="no such"):
        ru.restore_folder(tmp_path / "nowhere", tmp_path / "out", Stub())
    (tmp_path / "empty").rmdir()
    assert contents(tmp_path) == before


def test_links_and_odd_names_do_no_harm(scans, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "album 1").symlink_to(scans / "album 1")
    with pytest.raises(ValueError, match="by a link"):
        ru.restore_folder(scans, out, darker(), overwrite=True)
    (out / "album 1").unlink()
    (scans / "ảnh.psd").write_bytes(b"x")
    (scans / "_before_and_after_01.jpg").write_bytes((scans / "a.jpg").read_bytes())
    (scans / "A.jpg").write_bytes((scans / "a.jpg").read_bytes())
    (out / "album 1").mkdir()
    (out / "album 1" / f"{ru.PARTIAL}old.jpg").write_bytes(b"left by a killed run")
    os.utime(out / "album 1" / f"{ru.PARTIAL}old.jpg", (0, 0))
    ru.restore_folder(scans, out, darker())
    table = (out / "_restored.csv").read_text(encoding="utf-8-sig")
    assert "ảnh.psd,,,,,no," in table and "A.jpg" in table and "_before" not in table
    assert not [name for name in contents(out) if ru.PARTIAL in name]
    for name in ("_restored.csv", "_before_and_after_01.jpg"):  # killed before they were drawn
        (out / name).unlink()
    ru.restore_folder(scans, out, darker())
    assert {"_restored.csv", "_before_and_after_01.jpg"} <= contents(out).keys()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        ru.restore_folder(scans, tmp_path / "file", darker())


def test_whatever_is_in_one_file_stops_no_other(scans, tmp_path, monkeypatch):
    read = ru.read_scan

    def failing(path):
        if path.name == "b.png":
            raise TypeError("bad operand")
        return read(path)

    monkeypatch.setattr(ru, "read_scan", failing)
    reports = {report.file: report for report in ru.restore_folder(scans, tmp_path / "out", Stub())}
    assert not reports["b.png"].done and reports["b.png"].remark == "bad operand" and reports["a.jpg"].done


def test_another_format_for_all(scans, tmp_path):
    ru.restore_folder(scans, tmp_path / "out", Stub(), suffix=".png", fill=False)
    assert np.array_equal(ru.read_image(tmp_path / "out/album 1/ảnh.png"), ru.read_image(scans / "album 1/ảnh.JPG"))


def test_a_full_disk_stops_and_what_is_done_stays(scans, tmp_path, monkeypatch):
    save, done = Image.Image.save, []

    def full(image, path, *arguments, **options):
        if len(done) == 2:
            raise OSError(28, "No space left on device")
        done.append(path)
        return save(image, path, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r"No space left.*run this again"):
        ru.restore_folder(scans, tmp_path / "out", Stub())
    monkeypatch.undo()
    kept = contents(tmp_path / "out")
    assert len([name for name in kept if not name.startswith(("_", "."))]) == 2
    assert not [name for name in kept if ru.PARTIAL in name]
    ru.restore_folder(scans, tmp_path / "out", darker(0.5))
    now = contents(tmp_path / "out")
    assert all(now[name] == kept[name] for name in kept if not name.startswith(("_", ".")))


# ------ command line


@pytest.fixture
def weights(tmp_path) -> Path:
    """Those of a small generator that has learned nothing."""
    run = ru.Run(TINY, ru.Places("test", tmp_path, tmp_path), torch.device("cpu"), "none")
    ru.save_checkpoint(tmp_path / "w.pth", run, generator=ru.build_generator(TINY).state_dict())
    return tmp_path / "w.pth"


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(MODULE), "restore", *map(str, arguments)]


def test_the_command_line_restores_a_folder_and_its_status_tells_of_failures(scans, tmp_path, weights):
    out = tmp_path / "out"
    done = subprocess.run(command(scans, out, "--weights", weights, "--page"), capture_output=True, text=True)
    assert done.returncode == 1 and "5 restored, 0 there already, 1 not restored" in done.stdout, done.stderr
    assert "not restored: cut.jpg" in done.stdout and "Traceback" not in done.stderr
    assert (out / "_before_and_after.html").read_text(encoding="utf-8").count("<figure") == 5


def test_killed_at_any_moment_it_goes_on(scans, tmp_path, weights):
    (scans / "cut.jpg").unlink()
    out, before = tmp_path / "out", contents(scans)
    random = np.random.default_rng(0)
    for _ in range(4):
        process = subprocess.Popen(command(scans, out, "--weights", weights), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and not (out / ".lock").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for name, content in contents(out).items() if out.exists() else ():
            if name in before:
                assert content and ru.read_image(out / name).shape == ru.read_image(scans / name).shape
    done = subprocess.run(command(scans, out, "--weights", weights), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert before.keys() - {"notes.txt"} <= contents(out).keys() and contents(scans) == before


def test_bad_input_is_one_clear_sentence(scans, tmp_path, weights, capsys):
    one = scans / "a.jpg"
    small = tmp_path / "mask.png"
    ru.write_image(small, np.full((10, 10, 3), 255, np.uint8))
    other = tmp_path / "old.pth"
    torch.save({"format": "another"}, other)
    for arguments, words in (
        ((scans, scans), "neither the same nor inside"),
        ((tmp_path / "none.jpg", tmp_path), "none.jpg: no such file or folder"),
        ((scans, tmp_path / "out", "--mask", small), "not to a folder"),
        ((one, tmp_path / "b.jpg", "--mask", small), "10 x 10 px"),
        ((one, one), "would be overwritten"),
        ((one, tmp_path / "b.jpg", "--format", "png"), "leave out --format"),
        ((one, tmp_path / "b.jpg", "--format", "xyz"), "choose one of"),
        ((one, tmp_path / "b.jpg", "--sure", "2"), "between 0 and 1"),
        ((one, tmp_path / "b.jpg", "--weights", other), "not a checkpoint of this project"),
    ):
        given = [] if "--weights" in arguments else ["--weights", weights]
        assert ru.main([str(part) for part in ("restore", *arguments, *given)]) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not (tmp_path / "b.jpg").exists()
    for wrong in (["restore"], ["restore", "a", "b", "--mask", "c", "--no-fill"], []):
        with pytest.raises(SystemExit, match="2"):
            ru.main(wrong)


def test_one_picture_by_command(scans, tmp_path, weights, capsys):
    one = ["restore", str(scans / "a.jpg"), str(tmp_path / "new"), "--weights", str(weights)]
    assert ru.main([*one, "--format", "PNG", "--page", "--keep-tone"]) == 0
    assert (tmp_path / "new" / "a.png").is_file() and (tmp_path / "new" / "a.html").is_file()
    was = (tmp_path / "new" / "a.png").stat().st_mtime_ns
    assert ru.main([*one, "--format", "PNG"]) == 0 and "is there already" in capsys.readouterr().out
    assert (tmp_path / "new" / "a.png").stat().st_mtime_ns == was
    assert ru.main([*one, "--format", "PNG", "--overwrite"]) == 0
    assert (tmp_path / "new" / "a.png").stat().st_mtime_ns != was


def test_ones_own_weights_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(ru, "SHIPPED_WEIGHTS", tmp_path / "shipped.pth")
    places = ru.Places("test", tmp_path / "outputs", tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights"):
        ru.find_weights(places)
    (tmp_path / "shipped.pth").touch()
    assert ru.find_weights(places) == tmp_path / "shipped.pth"
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / ru.OWN_WEIGHTS).touch()
    assert ru.find_weights(places) == tmp_path / "outputs" / ru.OWN_WEIGHTS


# ------ before and after

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


def test_the_slider_needs_nothing_else():
    before, after = np.full((300, 400, 3), 40, np.uint8), np.full((300, 400, 3), 200, np.uint8)
    html = ru.compare_slider(before, after, "<b> & co")
    assert not re.search(r"(?:src|href)=[\"'](?!data:)|https?:|@import|url\(", html)
    assert "&lt;b&gt; &amp; co" in html and html.count("data:image/jpeg;base64,") == 2
    assert html == ru.compare_slider(before, after, "<b> & co") != ru.compare_slider(after, before)
    large = ru.compare_slider(np.zeros((3000, 2000, 3), np.uint8), np.zeros((3000, 2000, 3), np.uint8))
    assert "max-width:800px" in large and len(large) < 100_000


class Browser:
    """A headless Chromium with one page open, spoken to by its DevTools protocol."""

    def __init__(self, page: Path, profile: Path, scripts: bool = True):
        import websocket

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--window-size=700,500"]
        self.process = subprocess.Popen([BROWSER, *options, f"--user-data-dir={profile}"], stderr=subprocess.DEVNULL)
        told = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (told.exists() and len(told.read_text().split()) == 2):
            assert time.monotonic() < deadline, "the browser does not start"
            time.sleep(0.1)
        port, self.number = told.read_text().split()[0], 0
        request = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
        address = json.loads(urllib.request.urlopen(request).read())["webSocketDebuggerUrl"]
        self.socket = websocket.create_connection(address, suppress_origin=True, timeout=60)
        self.do("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.do("Page.navigate", url=page.as_uri())
        time.sleep(1)

    def do(self, method: str, **parameters: object) -> dict:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            pass
        return answer["result"]

    def mouse(self, kind: str, x: int, y: int) -> None:
        self.do("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button="left", buttons=1, clickCount=1)

    def key(self, name: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.do("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def row(self, y: int) -> np.ndarray:
        """The grey levels of a row of the page."""
        shot = base64.b64decode(self.do("Page.captureScreenshot")["data"])
        return cv2.imdecode(np.frombuffer(shot, np.uint8), cv2.IMREAD_GRAYSCALE)[y].astype(int)


@pytest.mark.skipif(not BROWSER, reason="there is no Chromium here")
def test_the_slider_slides_in_a_browser(tmp_path):
    before, after = np.full((300, 400, 3), 40, np.uint8), np.full((300, 400, 3), 200, np.uint8)
    page = tmp_path / "page.html"
    page.write_text("<body style='margin:0'>" + ru.compare_slider(before, after).replace("margin:1em 0", "margin:0"))

    def dark(browser: Browser) -> int:
        return int((np.abs(browser.row(150)[:400] - 40) < 12).sum())

    browser = Browser(page, tmp_path / "profile")
    try:
        assert 190 <= dark(browser) <= 202 and browser.row(150)[395] > 190
        for kind, x in (("Pressed", 200), ("Moved", 150), ("Moved", 100), ("Released", 100)):
            browser.mouse(kind, x, 150)
        dragged = dark(browser)
        assert 90 <= dragged <= 112
        for _ in range(20):
            browser.key("ArrowRight", 39)
        assert 30 <= dark(browser) - dragged <= 50  # 20 steps of half a per cent
        browser.key("End", 35)
        assert dark(browser) >= 395
    finally:
        browser.process.kill()
    browser = Browser(page, tmp_path / "without", scripts=False)
    try:  # both, side by side
        row = browser.row(75)
        assert (np.abs(row[:195] - 40) < 12).all() and (np.abs(row[205:395] - 200) < 12).all()
    finally:
        browser.process.kill()
