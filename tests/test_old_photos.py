"""Ageing, its masks, and restoring at a photograph's own size: seams, halos, grey, holes, masks, memory."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY, Stub
from PIL import Image
from torch import nn

import restoration_utils as ru

SCENE = ru.draw_scene(np.random.default_rng(3), 256)


def rng(seed):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(200, 300, 3), (256, 256, 3), (40, 33, 3)])
def test_ageing_is_seeded_and_leaves_its_input_alone(seed, shape):
    image = cv2.resize(SCENE, shape[1::-1])
    before = image.copy()
    aged = ru.age_photo(image, rng(seed))
    assert aged.shape == shape and aged.dtype == np.uint8 and np.array_equal(image, before)
    assert np.array_equal(aged, ru.age_photo(image, rng(seed))) and not np.array_equal(
        aged, ru.age_photo(image, rng(99))
    )


def test_the_damage_mask_is_exactly_what_the_hands_did():
    """With all else switched off, the aged picture differs inside the mask, and (but for faint rims) nowhere else."""
    grey, covered, elsewhere = np.full((300, 300, 3), 128, np.uint8), 0, 0
    for seed in range(12):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ru, "fade", lambda image, generator, tone: image)
            patch.setattr(ru, "uneven_light", lambda shape, generator: np.ones(shape[:2], np.float32))
            patch.setattr(ru, "film_grain", lambda shape, generator: np.zeros(shape[:2], np.float32))
            patch.setattr(ru.cv2, "GaussianBlur", lambda image, *_: image)
            patch.setattr(ru.cv2, "imencode", lambda suffix, image, options: (True, image))
            patch.setattr(ru.cv2, "imdecode", lambda image, how: image)
            aged = ru.age_photo(grey, rng(seed))
        changed = np.abs(aged.astype(int) - 128).max(2)
        mask = ru.damage_mask(grey.shape, rng(seed)) > 0
        covered += (changed[mask] > 8).sum() / max(1, mask.sum()) / 12
        elsewhere = max(elsewhere, changed[~mask].max())
    assert covered > 0.85 and elsewhere < 40  # the mask begins where a fifth is covered


def test_some_prints_have_few_faults_and_some_have_all():
    shares = [(ru.damage_mask((400, 400), rng(seed)) > 0).mean() for seed in range(60)]
    assert min(shares) == 0 and max(shares) > 0.03 and 0.005 < np.mean(shares) < 0.06
    parts = np.array([[cover.any() for cover, _ in ru.draw_damage((400, 400), rng(seed))] for seed in range(60)])
    assert parts.all(1).any() and (parts.sum(1) == 1).any()


def test_sizes_scale_with_the_picture():
    for seed in range(4):
        large, small = (ru.damage_mask((size, size), rng(seed)) > 0 for size in (1000, 500))
        shrunk = cv2.resize(large.astype(np.uint8) * 255, (500, 500), interpolation=cv2.INTER_AREA) > 127
        overlap = (shrunk & cv2.dilate(small.astype(np.uint8), np.ones((5, 5))).astype(bool)).sum()
        assert overlap >= 0.9 * shrunk.sum()
    assert shrunk.any()  # the last of them, at least


def test_a_black_and_white_print_is_in_one_tone_and_about_half_are():
    colourful = cv2.resize(ru.draw_portrait(rng(5), 256), (256, 256))
    one_tone = [ru.is_black_and_white(rng(seed)) for seed in range(200)]
    assert 0.3 < np.mean(one_tone) < 0.6
    found = [is_grey(np.asarray(ru.without_tint(ru.to_pil(ru.age_photo(colourful, rng(seed)))))) for seed in range(30)]
    assert np.mean(np.equal(found, one_tone[:30])) > 0.9 and not is_grey(
        np.asarray(ru.without_tint(ru.to_pil(colourful)))
    )


def is_grey(pixels):
    return (pixels == pixels[..., :1]).all()


def test_fading_lifts_blacks_dulls_whites_and_keeps_the_order_of_tones():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
    for seed in range(20):
        faded = ru.fade(ramp, rng(seed), -1.0).astype(int)[0]
        assert (np.diff(faded, axis=0) >= 0).all() and (faded[0] < 140).all() and (faded[255] > 120).all()
        assert faded[0].max() > 10 or faded[255].min() < 245
        sepia = ru.fade(ramp, rng(seed), 1.0).astype(int)[0]
        assert (sepia[128:, 2] > sepia[128:, 0]).all()  # more red than blue


def test_grain_has_the_strength_and_the_size_that_its_docstring_gives():
    levels, sizes = [], []
    for seed in range(40):
        grain = ru.film_grain((256, 256), rng(seed))
        levels.append(grain.std())
        sizes.append((grain[:, 1:] * grain[:, :-1]).mean() / grain.var())
    assert 0.5 < min(levels) < 3 and 8 < max(levels) < 20 and abs(np.mean(levels) - 5) < 3
    assert min(sizes) < 0.5 and 0.5 < max(sizes) < 0.95  # neighbours are alike, more so in coarse grain
    for seed in range(4):  # in larger pictures, clumps are larger
        alike = [
            (g[:, 1:] * g[:, :-1]).mean() / g.var() for g in (ru.film_grain((n, n, 3), rng(seed)) for n in (900, 2500))
        ]
        assert alike[1] > alike[0] + 0.1


def test_stains_and_uneven_light_are_slow_and_about_one():
    for seed in range(20):
        field = ru.uneven_light((200, 300), rng(seed))
        assert field.shape == (200, 300) and field.min() > 0.4 and field.max() < 1.6
        assert np.abs(np.diff(field, axis=0)).mean() < 0.01


def test_scenes_are_seeded_and_varied():
    again, other = ru.draw_scene(rng(3), 256), ru.draw_scene(rng(4), 256)
    assert np.array_equal(SCENE, again) and np.abs(SCENE.astype(int) - other).mean() > 5
    assert SCENE.shape == (256, 256, 3) and SCENE.dtype == np.uint8


# ----------------------------------------------------------------------------------------------------------------------
# Training pairs
# ----------------------------------------------------------------------------------------------------------------------


def test_windows_show_the_same_part_of_everything_and_the_whole_comes_along(faces, places):
    settings = dataclasses.replace(TINY, windows=2, scenes=1, undamaged=True)
    faces = faces._replace(scenes=ru.draw_pictures("scene", 1, settings, places))
    pairs = ru.prepare_pairs(faces, places, settings)
    dataset = ru.FaceRestorationGANDataset([*pairs, pairs[0].undamaged()])
    occluded = next(i for i, pair in enumerate(pairs) if pair.kind == "occluded")
    boxes = ru.draw_views((64, 64), settings, rng(ru.derive_seed(settings.seed, "views", pairs[occluded].name)))
    assert boxes[0] == (0, 0, 64, 64) and len(boxes) == 3
    for view, box in enumerate(boxes):
        degraded, original, info = dataset[occluded, False, view]
        for tensor, path in ((degraded, pairs[occluded].degraded), (original, pairs[occluded].original)):
            pixels = np.asarray(ru.open_image(path).resize((256, 256), Image.Resampling.BILINEAR, box))
            assert np.abs((tensor.permute(1, 2, 0).numpy() + 1) * 127.5 - pixels).max() < 0.01
        outside = (degraded - original).abs().amax(0)[info["hole"][0] == 0]
        assert outside.mean() < 0.05  # the mask is cut like the picture
        whole = torch.nn.functional.avg_pool2d(dataset[occluded][0], 4)
        assert torch.allclose(info["whole"], whole)
    clean = dataset[len(pairs)]
    assert torch.equal(clean[0], clean[1]) and clean[2]["kind"] == "clean" and clean[2]["hole"].max() == 0


def test_thumbnails_are_the_originals_once_each_and_pale_ones_are_paler(pairs):
    small = ru.thumbnails(pairs[:8])
    assert small.shape == (2, 128, 128, 3) and small.dtype == np.uint8
    for number, pair in enumerate((pairs[0], pairs[4])):
        original = ru.FaceRestorationGANDataset([pair])[0][1]
        rgb = torch.from_numpy(small[number, ..., ::-1].copy()).permute(2, 0, 1) / 127.5 - 1
        assert (rgb - nn.functional.avg_pool2d(original, 2)).abs().max() < 0.01
    portrait = ru.draw_portrait(rng(1), 256)
    pale = [ru.make_pale(portrait, rng(seed)) for seed in range(10)]
    assert all(np.ptp(image) < np.ptp(portrait) and image.std() < portrait.std() for image in pale)
    assert np.mean([np.ptp(image, axis=2).mean() for image in pale]) < 0.85 * np.ptp(portrait, axis=2).mean()


def test_own_pixels_are_seen_in_half_of_the_windows_and_windows_in_half_of_the_pairs():
    settings = dataclasses.replace(TINY, windows=3)
    order = ru.training_order(4000, settings, "gan", 1)
    assert np.mean([view == 0 for _, _, view in order]) == pytest.approx(0.5, abs=0.04)
    assert {view for _, _, view in order} == {0, 1, 2, 3}
    sides = [box[2] - box[0] for seed in range(300) for box in ru.draw_views((1024, 2000), settings, rng(seed))[1:]]
    assert (
        np.mean(np.isclose(sides, 256)) == pytest.approx(0.5, abs=0.06) and min(sides) >= 255.9 and max(sides) <= 1024
    )
    assert not any(view for _, _, view in ru.training_order(99, dataclasses.replace(TINY, windows=0), "gan", 1))


def test_a_black_and_white_print_is_paired_with_the_grey_photograph(pairs):
    greys = [pair for pair in pairs if pair.is_grey]
    assert greys and all(pair.kind == "aged" for pair in greys)
    for degraded, original, _ in ru.FaceRestorationGANDataset(greys):
        assert torch.allclose(original[0], original[1]) and torch.equal(degraded[0], degraded[2])


def test_scenes_and_undamaged_pairs_are_only_trained_on(faces, places):
    settings = dataclasses.replace(TINY, scenes=2, undamaged=True)
    faces = faces._replace(scenes=ru.draw_pictures("scene", 2, settings, places))
    splits = ru.split_pairs(ru.prepare_pairs(faces, places, settings), settings)
    for train, validation in (splits[:2], splits[2:]):
        assert sum(pair.is_scene for pair in train) == 2 * 6 and not any(pair.is_scene for pair in validation)
        kinds = [pair.kind for pair in train]
        shares = {kind: 6 * kinds.count(kind) / len(train) for kind in (*ru.KINDS, "clean")}
        assert shares == dict.fromkeys(("noisy", "color", "occluded", "clean"), 1) | {"aged": 2}
        assert "clean" not in {pair.kind for pair in validation}


# ----------------------------------------------------------------------------------------------------------------------
# At its own size
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (100, 80), (256, 256), (257, 300), (512, 512), (700, 1100)])
def test_any_size_comes_back_untouched_by_a_network_that_changes_nothing(size):
    photo = cv2.resize(SCENE, size[::-1], interpolation=cv2.INTER_CUBIC)
    restored = ru.restore_photo(photo, Stub())
    assert np.abs(restored.image.astype(int) - photo).max() <= 1
    assert restored.repainted.shape == size and restored.repainted.max() == 0


def test_windows_leave_no_seams_in_flat_grey_or_a_smooth_gradient():
    """Every window is shifted by its own mean, as a network may do that sees no more than the window."""

    def moody(seen):
        return seen + 0.2 * (seen.mean((1, 2, 3), keepdim=True) - 0.3)

    x = np.linspace(40, 200, 900)[None, :, None]
    for photo in (np.full((700, 900, 3), 90.0), np.broadcast_to(x, (700, 900, 3))):
        photo = np.rint(photo).astype(np.uint8)
        restored = ru.restore_photo(photo, Stub(moody)).image
        steps = [np.abs(np.diff(image.astype(int), axis=1)).max() for image in (photo, restored)]
        assert steps[1] <= steps[0] + 1
        assert np.ptp(restored.astype(int) - photo) <= 2  # nor is one part lighter than another


def test_windows_that_disagree_fade_into_each_other():
    values = itertools.cycle([95.0, 5.0, 50.0])

    def paint(places):
        return torch.stack([torch.full((3, 256, 256), next(values)) for _ in places])

    image = ru._by_windows(np.zeros((700, 700, 3), np.uint8), paint, 3, Bar()).astype(int)
    for axis in (0, 1):  # over 64 px and more
        assert 0 < np.abs(np.diff(image, axis=axis)).max() <= 4


def test_what_a_network_does_at_the_border_of_its_window_is_not_seen():
    """Convolutions see less there; a window fades in from zero, so it counts for little."""

    def shy(seen):
        border = torch.ones_like(seen)
        border[..., 4:-4, 4:-4] = 0
        return seen - 0.1 * border

    photo = np.full((700, 900, 3), 90, np.uint8)
    restored = ru.restore_photo(photo, Stub(shy)).image[8:-8, 8:-8].astype(int)
    assert max(np.abs(np.diff(restored, axis=axis)).max() for axis in (0, 1)) <= 1  # not 13


class Bar:
    def update(self):
        pass


def test_a_thin_long_scratch_in_a_large_photograph_is_found_whole_and_not_much_more():
    photo = np.full((1500, 2000, 3), 100, np.uint8)
    cv2.line(photo, (100, 200), (1900, 1300), (255, 255, 255), 3)
    truth = photo[..., 0] > 200

    found = ru.restore_photo(photo, Stub(find=lighter)).repainted > 127
    assert (found & truth).sum() > 0.9 * truth.sum() and found.sum() < 9 * truth.sum()


UNCHANGED = torch.zeros(1, 11)  # curves that leave every colour as it is


def test_noise_is_that_of_the_whole_photograph_where_it_is_flattest_and_texture_is_none():
    noise = rng(0).normal(0, 1, (300, 700, 3))
    meadow = cv2.GaussianBlur(noise, (0, 0), 1) * np.linspace(20, 160, 700)[None, :, None]
    grass = np.where(np.arange(700)[None, :, None] < 400, meadow, 0)
    for sigma in (5, 25):
        photo = (128 + grass + sigma * noise).clip(0, 255).astype(np.uint8)
        assert 127.5 * ru.photo_noise(photo, UNCHANGED).item() == pytest.approx(sigma, rel=0.15)
        small = np.asarray(ru.to_pil(photo[:, 400:]).resize((150, 150), Image.Resampling.BILINEAR))
        assert 127.5 * ru.photo_noise(small, UNCHANGED).item() > 0.25 * sigma  # made smaller, it is noise still
    burnt_out = np.where(np.arange(300)[:, None, None] < 75, 255.0, 128) + 10 * noise
    burnt_out = burnt_out.clip(0, 255).astype(np.uint8)
    assert 127.5 * ru.photo_noise(burnt_out, UNCHANGED).item() == pytest.approx(10, rel=0.15)
    filled = (128 + 10 * noise).clip(0, 255).astype(np.uint8)
    filled[:90], holes = np.rint(128 + 2 * noise[:90]), np.zeros((300, 700), np.uint8)
    assert 127.5 * ru.photo_noise(filled, UNCHANGED).item() < 5
    holes[:90] = 255
    assert 127.5 * ru.photo_noise(filled, UNCHANGED, holes).item() == pytest.approx(10, rel=0.15)
    grain = ru.film_grain((300, 700), rng(3))[..., None]
    told = 127.5 * ru.photo_noise(cv2.convertScaleAbs(128 + grass + grain), UNCHANGED).item()
    assert 0.4 * grain.std() < told < grain.std()  # coarse, it is in part in the local mean
    assert ru.photo_noise((128 + meadow).clip(0, 255).astype(np.uint8), UNCHANGED) == 0
    soft = 128 + cv2.GaussianBlur(noise, (0, 0), 3) * 20  # so weak that hardly a block counts, and one sharp patch
    soft[100:150, 100:150] += 60 * noise[100:150, 100:150]
    assert 127.5 * ru.photo_noise(soft.clip(0, 255).astype(np.uint8), UNCHANGED).item() < 1


def test_highlights_that_recolouring_clips_cast_no_shadow():
    before = np.full((200, 256, 3), 100, np.uint8)
    before[:, 128:] = 250
    brighter = UNCHANGED.clone()
    brighter[:, 9] = 0.3
    seen = ru.recolor(torch.from_numpy(before / 127.5 - 1).float().permute(2, 0, 1)[None], brighter)
    after = ru.to_pixels(seen)[0].permute(1, 2, 0).numpy()
    assert after[0, 0, 0] > 120 and after[0, -1, 0] == 255
    assert np.abs(ru.large_scale_change(before, after, brighter)).max() < 1


def test_highlights_that_recolouring_clips_have_no_halo():
    class Brighter(Stub):
        def color(self, whole):
            curves = UNCHANGED.repeat(len(whole), 1)
            curves[:, 9] = 0.3
            return curves, torch.zeros(len(whole))

    photo = np.full((512, 512, 3), 100, np.uint8)
    photo[:, 256:] = 250
    restored = ru.restore_photo(photo, Brighter(lambda seen: seen.clamp(-1, 1))).image.astype(int)
    assert restored[0, 0, 0] > 120 and restored[0, -1, 0] == 255
    assert np.ptp(restored[:, :250]) <= 1 and np.ptp(restored[:, 262:]) <= 1


def test_windows_are_told_the_noise_of_the_whole_photograph():
    told = []

    class Listener(Stub):
        def mend(self, seen, level):
            told.append(level)
            return super().mend(seen, level)

    photo = (128 + 10 * rng(0).normal(0, 1, (400, 400, 3))).clip(0, 255).astype(np.uint8)
    ru.restore_photo(photo, Listener())
    assert 127.5 * told[-1].item() == pytest.approx(10, rel=0.2)


def test_what_the_whole_picture_says_about_colours_reaches_the_full_size():
    restored = ru.restore_photo(np.full((600, 800, 3), 100, np.uint8), Stub(lambda seen: seen + 20 / 127.5))
    assert np.abs(restored.image.astype(int) - 120).max() <= 2


def test_a_slope_of_the_whole_picture_lies_where_it_belongs_at_full_size():
    slope = torch.linspace(0, 60, 256) / 127.5

    class Sloping(Stub):
        whole = True

        def mend(self, seen, level):  # the first it sees is the whole picture in small
            change, self.whole = slope if self.whole else 0 * slope, False
            return seen + change + change[:, None] / 2

    for height, width in ((600, 900), (900, 300)):
        restored = ru.restore_photo(np.full((height, width, 3), 60, np.uint8), Sloping()).image[..., 0].astype(float)
        y, x = np.mgrid[:height, :width] * 60 / max(height, width)
        error = np.abs(restored - 60 - x - y / 2)[30:-30, 30:-30]  # at the edges it is smoothed
        assert error.max() <= 2


def test_a_torn_corner_does_not_hide_how_the_rest_has_faded():
    """Black and white are sought in the photograph whose holes are filled."""

    class Stretching(Stub):
        def color(self, whole):
            curves = torch.zeros(len(whole), 11)
            curves[:, :3] = (whole.flatten(2).quantile(0.03, 2) + 1) / 2  # its black becomes black
            return curves, torch.zeros(len(whole), 2)

    photo = (60 + cv2.resize(SCENE, (500, 400)) * 0.8).clip(0, 255).astype(np.uint8)
    torn = photo.copy()
    torn[:80, :90] = 0
    finder = Stretching(find=lambda seen: (seen.amax(1, keepdim=True) < -0.9).float())
    expected, restored = ru.restore_photo(photo, Stretching()), ru.restore_photo(torn, finder)
    assert restored.repainted[:75, :85].all()
    assert expected.image.min() < 20 and expected.image.mean() < photo.mean() - 40
    assert np.abs(restored.image[90:].astype(int) - expected.image[90:]).max() <= 6
    given = ru.restore_photo(torn, Stretching(), mask=restored.repainted)
    assert np.array_equal(given.image, restored.image)


def test_the_colour_head_sees_the_whole_photograph_and_grey_gets_one_curve():
    seen = []

    class Tinting(Stub):
        def color(self, whole):
            seen.append(whole)
            curves = UNCHANGED.repeat(len(whole), 1)
            curves[:, :3] = torch.tensor((0.0, 0.1, 0.2))
            return curves, torch.zeros(len(whole), 2)

    photo = cv2.resize(SCENE, (400, 600))
    ru.restore_photo(photo, Tinting())
    small = cv2.resize(photo, (64, 64), interpolation=cv2.INTER_AREA)[..., ::-1].transpose(2, 0, 1)
    assert (seen[0][0] - torch.from_numpy(small / 127.5 - 1)).abs().mean() < 0.02
    grey = ru.to_grey(photo)
    darker = ru.restore_photo(grey, Tinting()).image
    assert is_grey(darker) and np.abs(darker - (grey - 0.1 * 255).clip(0)).max() <= 2


def bright(seen):
    return (seen.amin(1, keepdim=True) > 0.8).float()


def lighter(seen):
    """Where it is lighter than 115 of 255, and a pixel around: what is thin is seen at every size."""
    return (nn.functional.max_pool2d(seen.amax(1, keepdim=True), 3, 1, 1) > -0.1).float()


def test_filling_from_edges_keeps_what_is_known_and_goes_on_with_slopes_and_steps():
    x, y = np.meshgrid(np.arange(333), np.arange(217))
    hole = np.zeros((217, 333), np.uint8)
    hole[60:141, 90:201] = hole[5:8, :300] = hole[200:, 310:] = 255
    for truth in (40 + 0.2 * x + 0.4 * y, np.where(y < 100, 30, 220)):
        truth = np.rint(truth).astype(np.uint8)[..., None].repeat(3, 2)
        covered = np.where(hole[..., None] > 0, np.uint8(255), truth)
        filled = ru.fill_from_edges(covered, hole)
        error = np.abs(filled.astype(int) - truth).max(2)
        assert error[hole == 0].max() == 0 and covered[100, 100, 0] == 255
        if truth.max() < 200:
            assert error.max() <= 12 and error.mean() < 0.6  # over ranges of 22 and 32
        else:
            assert error[5:8].max() <= 1 and max(error[80, 91], error[120, 91]) < 30  # what is near counts
    assert ru.fill_from_edges(covered, np.full_like(hole, 255)) is covered  # nothing known at all


@pytest.mark.parametrize("size", [(513, 256), (1025, 256), (1025, 1025), (1500, 1001), (300, 3001), (640, 480), (7, 1)])
def test_a_hole_in_one_colour_is_filled_with_it_whatever_the_size(size):
    photo = np.broadcast_to(np.array((60, 120, 190), np.uint8), (*size, 3))
    cover = rng(0).random((8, 5)) < 0.5
    hole = cv2.resize(255 * cover.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST)
    hole[:: max(2, size[0] // 9)] = 255
    covered = np.where(hole[..., None] > 0, np.uint8(255), photo)
    assert 0.4 < (hole > 0).mean() < 1
    assert np.abs(ru.fill_from_edges(covered, hole).astype(int) - photo).max() <= 3  # 8 bits, rounded at every size


@pytest.mark.parametrize("side", [3, 8, 30, 100, 300])
def test_soft_edged_damage_on_a_slope_leaves_neither_a_rim_nor_a_halo(side):
    slope = np.broadcast_to(np.linspace(60, 105, 800)[None, :, None], (700, 800, 3)).astype(np.float32)
    cover = np.zeros((700, 800), np.float32)
    cover[200 : 200 + side, 250 : 250 + side] = 1
    soft = cv2.GaussianBlur(cover, (0, 0), 1.0)[..., None]
    restored = ru.restore_photo(np.rint(slope + (255 - slope) * soft).astype(np.uint8), Stub(find=lighter))
    error = np.abs(restored.image - slope).max(2)
    assert error[restored.repainted == 0].max() <= 1 and error.max() <= 3
    assert (restored.repainted > 0).sum() < 1.1 * (side + 10) ** 2


@pytest.mark.parametrize("side", [3, 30, 300])
def test_damage_of_any_size_is_found_whole_and_not_much_more(side):
    photo = np.full((1000, 1200, 3), 100, np.uint8)
    photo[400 : 400 + side, 500 : 500 + side] = 255
    restored = ru.restore_photo(photo, Stub(find=lighter))
    outside = np.abs(restored.image.astype(int) - 100).max(2)
    outside[390 : 410 + side, 490 : 510 + side] = 0
    assert outside.max() <= 1 and restored.image[400 : 400 + side, 500 : 500 + side].max() < 200
    assert (restored.repainted[400 : 400 + side, 500 : 500 + side] > 127).all()
    assert (restored.repainted > 127).sum() < 2.5 * (side + 12) ** 2


def test_grey_in_grey_out_and_sepia_comes_back_neutral():
    def tinting(seen):
        return seen + torch.tensor([0.2, 0.0, -0.2]).view(1, 3, 1, 1)

    grey = ru.to_grey(cv2.resize(SCENE, (400, 300)))
    assert is_grey(ru.restore_photo(grey, Stub(tinting)).image)
    cast = np.rint(grey * np.array([0.6, 0.8, 0.95])).astype(np.uint8)
    assert is_grey(ru.restore_photo(cast, Stub(tinting)).image)
    assert not is_grey(ru.restore_photo(cv2.resize(SCENE, (400, 300)), Stub()).image)


class Contrasting(Stub):
    """Takes every photograph for a faded one."""

    def color(self, whole):
        curves = UNCHANGED.repeat(len(whole), 1)
        curves[:, :6] = torch.tensor((0.3, 0.3, 0.3, 1.0, 1.0, 1.0))
        return curves, torch.zeros(len(whole), 2)


def test_a_red_wall_and_the_sea_keep_their_colours():
    """Of which nobody can say whether they are prints in one tone: they stay as they are."""
    slope = (np.linspace(0, 1, 400) + rng(0).normal(0, 0.01, (300, 400)))[..., None]
    wall, sea = (np.array(dark) + slope * (np.array(light) - dark) for dark, light in
                 (((10, 10, 90), (60, 60, 230)), ((120, 90, 50), (170, 140, 90))))  # fmt: skip
    faint = 100 + 40 * slope + np.array((-20, 0, 20))  # a grey print with a cast, or what else?
    for picture in (wall, sea, faint):
        photo = np.rint(picture).clip(0, 255).astype(np.uint8)
        assert ru.in_one_tone(ru.to_pil(photo)) is None
        assert np.abs(ru.restore_photo(photo, Contrasting()).image.astype(int) - photo).max() <= 1
    assert ru.in_one_tone(ru.to_pil(SCENE)) is False
    full = np.rint(40 + 180 * slope + np.array((-20, 0, 20))).clip(0, 255).astype(np.uint8)
    assert ru.in_one_tone(ru.to_pil(full)) is True
    pale = ru.restore_photo(np.rint(100 + 60 * slope).astype(np.uint8).repeat(3, 2), Contrasting()).image
    assert is_grey(pale) and np.ptp(pale) > 90  # what is grey in any case gets its contrast
    for level in (20, 120, 160):  # but of what has none there is nothing to say
        flat = np.full((300, 400, 3), level, np.uint8)
        assert np.array_equal(ru.restore_photo(flat, Contrasting()).image, flat)


def test_filling_can_be_switched_off_and_a_mask_is_trusted():
    photo = np.full((500, 600, 3), 100, np.uint8)
    photo[100:140, 200:240] = 255
    finder = Stub(find=bright)
    kept = ru.restore_photo(photo, finder, fill=False)
    assert np.array_equal(kept.image, photo) and kept.repainted.max() == 0
    mask = np.zeros((500, 600), np.uint8)
    mask[300:310, 50:500] = 255
    photo[302:308, 55:495] = 160
    given = ru.restore_photo(photo, finder, mask=mask)
    assert np.array_equal(given.repainted, mask) and given.image[120, 220, 0] > 250
    assert np.abs(given.image[300:310, 50:500].astype(int) - 100).max() <= 1
    assert np.array_equal(given.image[mask == 0], photo[mask == 0])
    mask[:5], mask[5:10] = 127, 128
    assert np.array_equal(ru.restore_photo(photo, finder, mask=mask).repainted > 0, mask > 127)
    for useless, why in ((mask // 2, "lightest value"), (np.full_like(mask, 255), "white everywhere")):
        with pytest.raises(ValueError, match=why):
            ru.restore_photo(photo, finder, mask=useless)
    everything = ru.restore_photo(photo, Stub(find=lambda seen: torch.ones_like(seen[:, :1])))
    assert np.array_equal(everything.image, photo) and everything.repainted.max() == 0  # nothing left to fill from
    with pytest.raises(ValueError, match="600 x 500"):
        ru.restore_photo(photo, finder, mask=mask[:, :-1])
    with pytest.raises(ValueError, match="leave one of them out"):
        ru.restore_photo(photo, finder, fill=False, mask=mask)
    for wrong in ((photo, photo), (mask, mask), (photo / 255, mask), (photo[..., :2], None), (photo[:0], None)):
        with pytest.raises(ValueError, match="must be uint8"):
            ru.restore_photo(wrong[0], finder, mask=wrong[1])


def test_the_share_that_was_repainted_is_said_and_masks_are_files(tmp_path, capsys):
    photo = np.full((300, 300, 3), 100, np.uint8)
    mask = np.zeros((300, 300, 3), np.uint8)
    mask[:30] = 255
    ru.write_image(tmp_path / "a.png", photo)
    ru.write_image(tmp_path / "mask.png", mask)
    ru.restore_image_gan(tmp_path / "a.png", tmp_path / "b.png", Stub(), mask=tmp_path / "mask.png")
    layer = np.full((300, 300, 4), 255, np.uint8)  # painted on a layer of its own: elsewhere transparent
    layer[30:, :, 3] = 0
    Image.fromarray(layer).save(tmp_path / "layer.png")
    ru.restore_image_gan(tmp_path / "a.png", tmp_path / "c.png", Stub(), mask=tmp_path / "layer.png")
    said = capsys.readouterr().out
    for name in ("b.png: ", "c.png: "):
        assert float(said.split(name)[1].split("%")[0]) == pytest.approx(10, abs=1)
    assert said.count("repainted, in neutral grey") == 2
    ru.write_image(tmp_path / "colours.png", cv2.resize(SCENE, (300, 300)))
    bright_finder = Stub(find=lambda seen: torch.ones_like(seen[:, :1]))
    ru.restore_image_gan(tmp_path / "colours.png", tmp_path / "d.png", bright_finder, fill=False)
    assert capsys.readouterr().out.endswith("d.png: 0.00% repainted\n")
    with pytest.raises(ValueError, match="the mask would be overwritten"):
        ru.restore_image_gan(tmp_path / "a.png", tmp_path / "mask.png", Stub(), mask=tmp_path / "mask.png")


def test_a_real_generator_restores_at_any_size():
    generator = ru.build_generator(TINY)
    for size in ((64, 48), (300, 520)):
        restored = ru.restore_photo(cv2.resize(SCENE, size), generator)
        assert restored.image.shape == (size[1], size[0], 3)
        assert ru.restore_photo(cv2.resize(SCENE, size), generator, fill=False).repainted.max() == 0
    plain = ru.build_generator(dataclasses.replace(TINY, plain=True))
    assert ru.restore_photo(cv2.resize(SCENE, (300, 520)), plain).image.shape == (520, 300, 3)


MEMORY = """
import sys, threading, time, numpy as np
sys.path.insert(0, sys.argv[1])
import restoration_utils as ru, torch
from conftest import Stub, anonymous_memory
ru.keep_freed_memory()
height, width, everything = map(int, sys.argv[2:])

def photograph():
    photo = np.full((height, width, 3), 90, np.uint8)
    photo[::100, ::50] = photo[100:200, 100:200] = 255
    return photo

def watch():
    while True:
        used.append(anonymous_memory())
        time.sleep(0.005)

stub = Stub(find=lambda seen: (seen.amin(1, keepdim=True) > 0.4 - everything).float())
ru.restore_photo(np.zeros((300, 300, 3), np.uint8), stub)
used = [anonymous_memory()]
threading.Thread(target=watch, daemon=True).start()
ru.restore_photo(photograph(), stub)
print(max(used) - used[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says how much memory was used")
@pytest.mark.parametrize(
    ("height", "width", "everything"), [(4000, 5000, 0), (4000, 5000, 1), (1000, 20000, 0), (260, 60000, 0)]
)
def test_memory_is_bounded(height, width, everything):
    """Damage here and there, or nothing but damage: 1 GB for 50 megapixels, beside strips of windows."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", MEMORY, str(here.parent), str(height), str(width), str(everything)]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 19 * height * width + 2 * 256 * width * 3 * 4


def test_sizes_have_to_agree_about_damage():
    own = np.zeros((1024, 1024), np.uint8)
    own[500:540, 500:540] = 255
    smaller = [cv2.resize(own, (n, n), interpolation=cv2.INTER_AREA) for n in (256, 512)]
    assert ru.agreed_damage([*smaller, own], 0.8)[499:541, 499:541].min() == 255  # and a pixel around
    assert not ru.agreed_damage([*map(np.zeros_like, smaller), own], 0.8).any()
    assert not ru.agreed_damage([smaller[0], *map(np.zeros_like, (smaller[1], own))], 0.8).any()
    doubtful = [np.uint8(0.55 * level) for level in (*smaller, own)]
    assert not ru.agreed_damage(doubtful, 0.8).any()
    line = np.zeros((1024, 1024), np.uint8)
    line[500:540, 100:900] = 0.65 * 255  # nearly as doubtful, but as long as no speck is
    sizes = [cv2.resize(line, (n, n), interpolation=cv2.INTER_AREA) for n in (256, 512)]
    assert ru.agreed_damage([*sizes, line], 0.8)[505:535, 110:890].min() == 255


def test_damage_is_found_whichever_way_the_picture_is_mirrored():
    def upper_left_only(seen):
        found = bright(seen)
        found[:, :, 128:], found[..., 128:] = 0, 0
        return found

    photo = np.full((256, 256, 3), 100, np.uint8)
    for y, x in ((40, 40), (40, 180), (180, 40), (180, 180)):
        photo[y : y + 30, x : x + 30] = 255
    assert ((ru.restore_photo(photo, Stub(find=upper_left_only)).repainted > 0) >= (photo[..., 0] == 255)).all()


def test_damage_of_a_large_photograph_is_looked_for_where_the_network_knows_it():
    """Enlarged, a print is smoother than all that the network has seen: it finds nothing there, and has no say."""
    seen_sizes = []

    def in_small(photo, generator, curves, bar):
        seen_sizes.append(photo.shape[:2])
        return np.uint8(255 * (photo[..., 0] > 200))

    photo = np.full((1500, 3000, 3), 100, np.uint8)
    photo[700:760, 2000:2090] = 255
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ru, "damage_probabilities", in_small)
        repainted = ru.restore_photo(photo, Stub()).repainted
    assert seen_sizes == [(128, 256), (256, 512), (512, 1024)]
    assert repainted[700:760, 2000:2090].min() == 255 and (repainted > 0).sum() < 1.4 * 60 * 90
    assert ru.level_sizes(512, 300) == [(256, 150), (512, 300)] and ru.level_sizes(100, 80) == [(100, 80)]


def test_a_profile_says_how_sure_its_generator_must_be():
    photo = cv2.resize(SCENE, (300, 300))
    photo[100:180, 100:180] = 255
    doubtful = Stub(find=lambda seen: 0.5155 * (seen[:, :1] > 0.98))  # 0.65 there; so long a region needs 0.2 less
    for sure, found in ((0.8, True), (0.9, False)):
        doubtful.sure = ru.build_generator(dataclasses.replace(TINY, sure=sure)).sure
        repainted = ru.restore_photo(photo, doubtful).repainted
        assert repainted[110:170, 110:170].any() == repainted.any() == found


def test_what_is_plausible_counts_where_much_is_sure():
    for side, found in ((20, False), (50, True)):  # 0.04 % and 0.24 % of the picture
        own = np.zeros((1024, 1024), np.uint8)
        own[500 : 500 + side, 500 : 500 + side] = 255
        own[100:130, 100:130], own[800:805, 800:805] = 0.7 * 255, 0.7 * 255
        own[300:330, 300:330] = 0.45 * 255
        sizes = [cv2.resize(own, (n, n), interpolation=cv2.INTER_AREA) for n in (256, 512)]
        damage = ru.agreed_damage([*sizes, own], 0.8) > 0
        assert damage[505:515, 505:515].all() and not damage[300:330, 300:330].any()
        assert damage[105:125, 105:125].all() == damage[801:804, 801:804].all() == damage[:400, :400].any() == found


def test_specks_need_no_smaller_size_but_a_sure_middle():
    own, empty = np.zeros((512, 512), np.uint8), np.zeros((256, 256), np.uint8)
    own[98:104, 98:104] = 0.3 * 255  # a rim that is not sure
    own[98:103, 98:103] = 255
    own[300:306, 300:306] = 0.82 * 255  # enough for what is larger
    own[200:210, 200:210] = 255  # too thick for a speck, and too long: the other size should see them
    own[250:254, 100:200] = 255
    found = ru.agreed_damage([empty, own], 0.8) > 0
    assert found[98:104, 98:104].all() and found.sum() <= 64
    small = empty.copy()
    small[100:105, 100:105] = 255  # at a larger size, which would see more of it, there is nothing
    assert not ru.agreed_damage([small, np.zeros_like(own)], 0.8).any()
    assert ru.agreed_damage([small], 0.8)[100:105, 100:105].all()
