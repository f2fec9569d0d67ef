"""Metrics against independent references, and restoring image files of all sorts."""

import html
import itertools
import re

import cv2
import matplotlib
import numpy as np
import pytest
import skimage.color
import torch
from conftest import TINY, Stub
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import restoration_utils as ru


def darker(amount=0.1):
    """Stands for a generator: makes pictures a little darker, and sees no damage."""
    return Stub(lambda seen: (seen - amount).clamp(-1, 1))


def photo(height=80, width=120):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([60 + 100 * x / width, 80 + 90 * y / height, 200 - 100 * x / width], -1).astype(np.uint8)


def reference_ssim(x, y):
    """Wang et al. 2004 on one channel: Gaussian windows of 11 px, sigma 1.5, only where they lie in the picture."""
    kernel = cv2.getGaussianKernel(11, 1.5)

    def mean(z):
        return cv2.sepFilter2D(z, cv2.CV_64F, kernel, kernel)[5:-5, 5:-5]

    mx, my = mean(x), mean(y)
    variances, covariance = mean(x * x) - mx**2 + mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (variances + c2))).mean()


def test_metrics_agree_with_independent_ones_on_clipped_8_bit_values():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(3, 3, 8, 8, generator=generator) * 2 - 1, size=64)
    original = smooth + 0.1 * torch.randn(3, 3, 64, 64, generator=generator)
    restored = original + 0.3 * torch.randn(3, 3, 64, 64, generator=generator)  # leaves [-1, 1]
    restored[..., :5, :] = -original[..., :5, :]  # at the border implementations differ
    ours = ru.image_metrics(restored, original)
    for i in range(3):
        a, b = (np.rint((np.clip(t[i].permute(1, 2, 0).numpy(), -1, 1) + 1) * 127.5) for t in (restored, original))
        ssim = np.mean([reference_ssim(a[..., c], b[..., c]) for c in range(3)])
        assert ours["psnr"][i].item() == pytest.approx(peak_signal_noise_ratio(b, a, data_range=255), abs=1e-6)
        assert ours["ssim"][i].item() == pytest.approx(ssim, abs=1e-4)
        assert ours["l1"][i].item() == pytest.approx(np.abs(a - b).mean(), abs=1e-6)


def test_identical_images_have_infinite_psnr_and_ssim_1(recwarn):
    metrics = ru.image_metrics(torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 64, 64))
    assert torch.isinf(metrics["psnr"]).all() and torch.allclose(metrics["ssim"], torch.ones(2).double())
    assert all(values.shape == (2,) and values.dtype == torch.double for values in metrics.values())
    assert not [warning for warning in recwarn if warning.category is RuntimeWarning]


def test_comparison_restores_the_mode_and_saves(run, pairs):
    generator = ru.build_generator(TINY).train()
    figure = ru.compare_results(generator, pairs, run, run.outputs / "comparison_batch_x.png")
    assert generator.training and len(figure.axes) == 15
    assert (run.outputs / "comparison_batch_x.png").stat().st_size > 1000
    assert "dB, SSIM" in figure.axes[0].get_xlabel()


def test_samples_keep_their_own_range_and_rows(run, pairs):
    samples = torch.full((2, 3, 256, 256), -0.5), torch.full((2, 3, 256, 256), 0.5)
    ru.save_samples(torch.nn.Identity(), samples, run.outputs / "s.png")
    grid = ru.read_image(run.outputs / "s.png")
    assert grid.shape == (768, 512, 3)
    assert [int(grid[y].mean()) for y in (10, 300, 600)] == [64, 64, 191]


def samples_in(folder, epochs=3, faces=3):
    """Files of `save_samples`: in each epoch another grey is what is restored, and the degraded one has a hole."""
    degraded, original = torch.full((2, 4 * faces, 3, 256, 256), 0.5)
    degraded[:, :, 150:200, 40:90] = -1
    files = {f"epoch {epoch}": folder / f"s_{epoch}.png" for epoch in range(1, epochs + 1)}
    for epoch, file in enumerate(files.values(), 1):
        ru.save_samples(torch.nn.Threshold(9, -0.2 * epoch), (degraded, original), file)  # all become that value
    return files


def test_an_animation_shows_damaged_every_epoch_and_original(tmp_path):
    shown = ru.animate_samples(samples_in(tmp_path), ru.KINDS, tmp_path / "a.webp")
    with Image.open(tmp_path / "a.webp") as movie:
        assert (movie.n_frames, movie.size) == (5, (800, 3 * 200 + 56))
        levels = []
        for number in range(5):
            movie.seek(number)
            levels.append(np.asarray(movie.convert("RGB"))[56 + 210 : 56 + 390, 10:190].mean())
    flat = 255 * 0.75
    assert flat * 0.8 < levels[0] < flat - 3  # with a hole
    assert levels[1:] == pytest.approx([127.5 * (1 - 0.2 * epoch) for epoch in (1, 2, 3)] + [flat], abs=3)
    assert 'alt="Animation' in shown.data and "data:image/webp;base64," in shown.data
    assert (tmp_path / "a.webp").stat().st_size < 10**6


def test_samples_are_shown_closely_where_the_damage_is(tmp_path):
    files = samples_in(tmp_path)
    figure = ru.show_samples(files, [0, 5], ["noisy", "color"], alt="two faces")
    assert figure.get_label() == "two faces" and len(figure.axes) == 2 * 5
    assert [axis.get_title() for axis in figure.axes[:2]] == ["noisy", "color"]
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == ["degraded", *files, "original"]
    closely = ru.show_samples(files, [0], closely=True).axes[0].images[0].get_array()
    assert closely.shape == (77, 77, 3) and (closely == 0).mean() > 0.4  # all 50 x 50 px of the hole are in it


def test_the_interesting_square_holds_what_differs_most():
    before = np.full((100, 140, 3), 90, np.uint8)
    after = before.copy()
    after[60:70, 100:110] = 200
    rows, columns = ru.interesting_square(before, after, 0.3)
    assert rows.stop - rows.start == columns.stop - columns.start == 30
    assert rows.start <= 60 and rows.stop >= 70 and columns.start <= 100 and columns.stop >= 110


def test_listings_are_code_blocks_and_fold_away():
    shown = ru.listing(ru.DecoderLayer, ru.UNetGenerator.features).data
    assert "monospace" in shown and "<details>" not in shown
    text = html.unescape(re.sub("<[^>]*>", "", shown))
    assert text.strip().startswith("class DecoderLayer(nn.Sequential):\n    ") and "\n\ndef features(self" in text
    folded = ru.listing(ru.recolor, folded=True).data
    assert folded.startswith("<details><summary>Source of <code>recolor</code></summary>")
    assert "recolor" in folded.partition("</summary>")[2] and folded.endswith("</details>")


def test_samples_of_different_numbers_of_faces_are_shown_together(tmp_path):
    two, three = samples_in(tmp_path / "2", 1, 2), samples_in(tmp_path / "3", 1, 3)
    files = {"before": two["epoch 1"], "after": three["epoch 1"]}
    assert len(ru.show_samples(files, [0, 5, 10]).axes) == 2 * 4
    ru.animate_samples(files, ru.KINDS, tmp_path / "a.webp")
    with Image.open(tmp_path / "a.webp") as movie:
        assert movie.size == (800, 2 * 200 + 56)


# how the three kinds of colour-blind eyes see linear RGB (Machado, Oliveira and Fernandes 2009, severity 1)
PROTANOPIA = (0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)
DEUTERANOPIA = (0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)
TRITANOPIA = (1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)


def closest_colors(style, eyes, count=4):
    """How far apart the two most similar of a style's first colours are to these eyes (CIEDE2000; 1 is just seen)."""
    cycle = matplotlib.style.library[style]["axes.prop_cycle"].by_key()["color"][:count]
    rgb = np.array([matplotlib.colors.to_rgb(color) for color in cycle])
    seen = (np.array(eyes) @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4).T).T.clip(0, 1)
    lab = skimage.color.rgb2lab(np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)[None])[0]
    return min(skimage.color.deltaE_ciede2000(a, b) for a, b in itertools.combinations(lab, 2))


@pytest.mark.parametrize("eyes", [PROTANOPIA, DEUTERANOPIA, TRITANOPIA], ids=["protan", "deutan", "tritan"])
def test_curves_can_be_told_apart_by_colour_blind_eyes(eyes):
    assert closest_colors(ru.CURVE_COLORS, eyes) > 15
    assert closest_colors("classic", PROTANOPIA) < 15  # not every style would do


MODES = ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(80, 120), (300, 40), (600, 700), (1, 1)])
def test_any_image_comes_back_at_its_size(tmp_path, mode, size):
    picture = Image.fromarray(photo(*size))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        picture = picture.convert(mode)
    source = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    picture.save(source)
    result = ru.restore_image_gan(source, tmp_path / "out" / "b.png", darker())
    assert result.shape == (*size, 3) and result.dtype == np.uint8
    assert np.array_equal(ru.read_image(tmp_path / "out" / "b.png"), result)
    if mode in ("L", "LA", "1", "I;16"):
        assert (result == result[..., :1]).all()  # one channel in, one channel's worth out
    seen = np.asarray(ru.without_tint(ru.open_image(source)))[..., ::-1]
    error = np.abs(result - (seen - 12.75).clip(0))
    assert error.max() <= 1.5 if mode != "1" else error.mean() < 8  # where half of the pixels are clipped


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_rotation_is_applied_before_restoring(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo()).save(tmp_path / "a.jpg", exif=exif)
    result = ru.restore_image_gan(tmp_path / "a.jpg", tmp_path / "b.png", darker(0.0))
    assert np.abs(result.astype(int) - ru.read_image(tmp_path / "a.jpg")).max() <= 1
    assert result.shape[:2] == ((80, 120) if orientation < 5 else (120, 80))


@pytest.mark.parametrize("levels", [0.4, 0.6])
def test_values_are_rounded_to_8_bits_and_not_cut_off(tmp_path, levels):
    grey = torch.full((1, 3, 8, 8), (100 + levels) / 127.5 - 1)
    assert ru.to_pixels(grey).unique().tolist() == [round(100 + levels)]
    ru.write_image(tmp_path / "a.png", np.full((256, 256, 3), 100, np.uint8))

    result = ru.restore_image_gan(tmp_path / "a.png", tmp_path / "b.png", darker(-levels / 127.5))
    assert np.unique(result).tolist() == [round(100 + levels)]


def test_the_original_is_never_overwritten_and_errors_name_the_file(tmp_path):
    ru.write_image(tmp_path / "a.png", photo())
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ValueError, match="overwritten"):
        ru.restore_image_gan(tmp_path / "a.png", tmp_path / "." / "a.png", darker())
    with pytest.raises(ValueError, match=r"b\.xyz"):
        ru.restore_image_gan(tmp_path / "a.png", tmp_path / "b.xyz", darker())
    for name in ("b.jfif", "b.mpo", "b.jpe"):  # JPEG by another name
        ru.restore_image_gan(tmp_path / "a.png", tmp_path / name, darker())
        assert ru.read_image(tmp_path / name).shape == photo().shape
    with pytest.raises(ValueError, match=r"missing\.png"):
        ru.restore_image_gan(tmp_path / "missing.png", tmp_path / "b.png", darker())
    assert (tmp_path / "a.png").read_bytes() == before and not (tmp_path / "b.png").exists()
