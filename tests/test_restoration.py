"""Metrics against independent references, and restoring image files of all sorts."""

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import restoration_utils as ru


class Darker(torch.nn.Module):
    """Stands for a generator: subtracts a fixed smooth pattern, which a real one would predict."""

    def __init__(self, amount=0.1):
        super().__init__()
        self.amount = torch.nn.Parameter(torch.tensor(amount))

    def forward(self, images):
        pattern = torch.linspace(0, 1, images.shape[-1]).view(1, 1, 1, -1)
        return (images - self.amount * pattern).clamp(-1, 1)

    def restore(self, images):
        return ru.Restoration(self.forward(images))


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
    result = ru.restore_image_gan(source, tmp_path / "out" / "b.png", Darker())
    assert result.shape == (*size, 3) and result.dtype == np.uint8
    assert np.array_equal(ru.read_image(tmp_path / "out" / "b.png"), result)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_rotation_is_applied_before_restoring(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo()).save(tmp_path / "a.jpg", exif=exif)
    result = ru.restore_image_gan(tmp_path / "a.jpg", tmp_path / "b.png", Darker(0.0))
    assert np.abs(result.astype(int) - ru.read_image(tmp_path / "a.jpg")).max() <= 1
    assert result.shape[:2] == ((80, 120) if orientation < 5 else (120, 80))


def test_the_correction_is_added_to_the_sharp_photo(tmp_path):
    sharp = np.random.default_rng(0).integers(60, 200, (512, 512, 3), dtype=np.uint8)
    ru.write_image(tmp_path / "a.png", sharp)
    result = ru.restore_image_gan(tmp_path / "a.png", tmp_path / "b.png", Darker(0.2)).astype(float)
    expected = sharp - 0.2 * 127.5 * np.linspace(0, 1, 512)[None, :, None]
    assert np.abs(result - expected).max() < 2


class Filler(Darker):
    """Sees a hole in the upper left quarter, is half sure of one in the lower right, and paints grey over the first."""

    def restore(self, images):
        hole = torch.full_like(images[:, :1], -20.0)
        hole[..., :128, :128], hole[..., 128:, 128:] = 20.0, 0.0
        return ru.Restoration(torch.where(hole > 10, 0.0, images), hole=hole)


def test_in_holes_only_the_networks_own_picture_counts(tmp_path):
    sharp = np.random.default_rng(0).integers(60, 200, (512, 512, 3), dtype=np.uint8)
    ru.write_image(tmp_path / "a.png", sharp)
    result = ru.restore_image_gan(tmp_path / "a.png", tmp_path / "b.png", Filler())
    assert np.abs(result[:250, :250].astype(int) - 128).max() <= 1  # no speckle of the hole is left
    assert np.abs(result[:, 262:].astype(int) - sharp[:, 262:]).max() <= 1


@pytest.mark.parametrize("levels", [0.4, 0.6])
def test_values_are_rounded_to_8_bits_and_not_cut_off(tmp_path, levels):
    grey = torch.full((1, 3, 8, 8), (100 + levels) / 127.5 - 1)
    assert ru.to_pixels(grey).unique().tolist() == [round(100 + levels)]
    ru.write_image(tmp_path / "a.png", np.full((256, 256, 3), 100, np.uint8))

    class Brighter(Darker):
        def forward(self, images):
            return images + levels / 127.5 + 0 * self.amount

    result = ru.restore_image_gan(tmp_path / "a.png", tmp_path / "b.png", Brighter())
    assert np.unique(result).tolist() == [round(100 + levels)]


class SoftEdged(Darker):
    """Finds the white square of `test_no_ghost...` and is half sure of its outermost pixel; paints grey over it."""

    def restore(self, images):
        hole = torch.full_like(images[:, :1], -20.0)
        hole[..., 49:101, 49:101], hole[..., 50:100, 50:100] = 0.0, 20.0
        covered = hole.sigmoid()
        return ru.Restoration((1 - covered) * images, hole=hole)


def test_no_ghost_of_a_holes_outline_is_left_around_it(tmp_path):
    picture = np.full((512, 512, 3), 128, np.uint8)
    picture[99:201, 99:201] = 255  # half a pixel wider than 50 to 100 in the network's picture
    ru.write_image(tmp_path / "a.png", picture)
    result = ru.restore_image_gan(tmp_path / "a.png", tmp_path / "b.png", SoftEdged()).astype(int)
    ring = np.abs(result - 128).max(axis=2)[90:210, 90:210]
    assert ring.max() < 40  # what a half-covered pixel of the network's own picture may keep, and no outline beside it


def test_the_networks_own_picture_on_request_keeps_the_aspect(tmp_path):
    ru.write_image(tmp_path / "a.png", photo(200, 400))
    assert ru.restore_image_gan(tmp_path / "a.png", tmp_path / "b.png", Darker(), network_size=True).shape == (
        128,
        256,
        3,
    )


def test_a_clean_photo_loses_no_more_than_in_the_network_itself(tmp_path):
    torch.manual_seed(0)
    generator = ru.build_generator(TINY).eval()
    with torch.no_grad():
        generator.output.propose.weight[:3] *= 10  # or the untrained network would hardly change the photo
    picture = cv2.GaussianBlur(ru.draw_portrait(np.random.default_rng(3), 512), (0, 0), 0.5)
    ru.write_image(tmp_path / "a.png", picture)
    result = ru.restore_image_gan(tmp_path / "a.png", tmp_path / "b.png", generator)
    small = ru.image_transform()(ru.open_image(tmp_path / "a.png"))[None]
    with torch.no_grad():
        own = ru.image_metrics(generator(small), small)["psnr"].item()
    assert peak_signal_noise_ratio(picture, result) >= own - 0.01
    assert own < 40


def test_the_original_is_never_overwritten_and_errors_name_the_file(tmp_path):
    ru.write_image(tmp_path / "a.png", photo())
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ValueError, match="overwritten"):
        ru.restore_image_gan(tmp_path / "a.png", tmp_path / "." / "a.png", Darker())
    with pytest.raises(ValueError, match=r"b\.xyz"):
        ru.restore_image_gan(tmp_path / "a.png", tmp_path / "b.xyz", Darker())
    with pytest.raises(ValueError, match=r"missing\.png"):
        ru.restore_image_gan(tmp_path / "missing.png", tmp_path / "b.png", Darker())
    assert (tmp_path / "a.png").read_bytes() == before and not (tmp_path / "b.png").exists()
