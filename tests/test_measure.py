"""The measuring harness against independent references."""

import dataclasses
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY, faces_in
from scipy import stats
from skimage.metrics import peak_signal_noise_ratio

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import measure

import restoration_utils as ru


def smooth(number, size=256, seed=0):
    """Random cloudy pictures (N, 3, size, size) in [-1, 1]."""
    small = torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8
    return torch.nn.functional.interpolate(small, size=size, mode="bicubic").clamp(-1, 1)


def test_region_psnr_agrees_with_scikit_image_on_the_pixels_of_each_region():
    original, hole = smooth(2), torch.zeros(2, 1, 256, 256)
    hole[:, :, 60:100, 80:140] = 1
    restored = original + 0.1 * torch.randn(original.shape, generator=torch.Generator().manual_seed(1))
    ours = measure.region_psnr(restored, original, hole)
    near = np.zeros((256, 256), bool)
    near[58:102, 78:142] = True
    deep = np.zeros((256, 256), bool)
    deep[62:98, 82:138] = True
    regions = {"inside": deep, "outside": ~near, "border": near & ~deep}
    for i in range(2):
        a, b = (ru.to_pixels(x)[i].permute(1, 2, 0).numpy() for x in (restored, original))
        for name, region in regions.items():
            expected = peak_signal_noise_ratio(b[region], a[region])
            assert ours[f"psnr_{name}"][i].item() == pytest.approx(expected, abs=1e-6)


def test_arrays_and_images_are_the_same_pixels():
    images = smooth(2)
    assert torch.equal(ru.to_pixels(measure.to_images(measure.to_arrays(images))), ru.to_pixels(images))
    assert measure.to_arrays(images)[1][10, 20].tolist() == ru.to_pixels(images)[1, :, 10, 20].tolist()[::-1]  # BGR


def test_the_fixed_inverse_undoes_a_fading_by_the_mean_factors():
    settings = dataclasses.replace(TINY, saturation=(0.5, 0.5), value=(0.9, 0.9))
    image = measure.to_arrays(smooth(1))[0] // 2 + 30
    faded = ru.distort_colors(image, np.random.default_rng(0), settings)
    error = np.abs(measure.undo_mean_fading(faded, settings).astype(int) - image)
    assert error.max() <= 3 and np.abs(faded.astype(int) - image).max() > 10


def test_inpainting_changes_the_hole_only_and_fills_it_from_around():
    image, hole = np.full((64, 64, 3), 90, np.uint8), np.zeros((64, 64), np.float32)
    hole[20:30, 20:40] = 1
    damaged = np.where(hole[..., None] > 0, np.uint8(255), image)
    for method in (cv2.INPAINT_TELEA, cv2.INPAINT_NS):
        filled = measure.inpaint(damaged, hole, method)
        assert np.array_equal(filled[hole == 0], image[hole == 0]) and np.abs(filled.astype(int) - 90).max() <= 2


def test_sharpness_and_spectrum_are_right_for_originals_and_wrong_for_blurred_ones():
    images = smooth(3) + 0.1 * torch.randn(3, 3, 256, 256, generator=torch.Generator().manual_seed(2))
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    assert measure.sharpness_ratio(images, images) == pytest.approx(1)
    assert measure.spectrum_distance(images, images) == 0
    assert measure.sharpness_ratio(blurred, images) < 0.5
    assert measure.spectrum_distance(blurred, images) > 3
    greys = [[cv2.cvtColor(a, cv2.COLOR_BGR2GRAY) for a in measure.to_arrays(x)] for x in (blurred, images)]
    variances = [[cv2.Laplacian(g, cv2.CV_64F)[1:-1, 1:-1].var() for g in part] for part in greys]
    expected = np.median(np.divide(*variances))
    assert measure.sharpness_ratio(blurred, images) == pytest.approx(expected, rel=0.1)  # OpenCV rounds its greys


def test_the_radial_spectrum_finds_a_waves_frequency():
    x = torch.linspace(0, 1, 257)[:-1]
    wave = (0.5 * torch.sin(2 * torch.pi * 20 * x)).expand(1, 3, 256, 256)
    assert measure.radial_spectrum(wave).argmax().item() + 1 == 20


def crops(images, weight=None, faces=8):
    face = torch.arange(len(images)) % faces
    return measure.Crops(images, torch.ones_like(images[:, :1]) if weight is None else weight, face)


def test_the_classifier_cannot_tell_equals_and_can_tell_noise():
    fake, real = (smooth(96, seed=seed)[:, :, :64, :64] for seed in range(2))
    areas = measure.auc_by_face(crops(fake), crops(real), steps=60, folds=2)
    assert len(areas) == 8 and 0.35 < np.mean(areas) < 0.65
    noisy = fake + 0.1 * torch.randn(fake.shape, generator=torch.Generator().manual_seed(3))
    assert min(measure.auc_by_face(crops(noisy), crops(real), steps=60, folds=2)) > 0.95


def test_the_classifier_judges_the_holes():
    image = smooth(96)[:, :, :64, :64]
    original = image + 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(3))
    hole = torch.zeros(96, 1, 64, 64)
    hole[:, :, 20:36, 30:46] = 1  # a sixteenth of the crop, filled without any grain
    filled = torch.where(hole > 0, image, original)
    assert np.mean(measure.auc_by_face(crops(filled, hole), crops(original, hole), steps=150, folds=2)) > 0.9


def test_the_area_under_the_curve_is_the_mann_whitney_statistic_and_the_curves_integral():
    rng = np.random.default_rng(0)
    fake, real = rng.integers(0, 6, 30), rng.integers(1, 8, 20)  # with many ties
    ours = measure.area_under_curve(torch.tensor(fake).float(), torch.tensor(real).float())
    assert ours == pytest.approx(stats.mannwhitneyu(real, fake).statistic / (20 * 30))
    x, y = (np.array([(scores >= threshold).mean() for threshold in range(8, -1, -1)]) for scores in (fake, real))
    assert ours == pytest.approx(((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2).sum())
    for fakes, area in (([-1.0, 0.0], 1), ([2.0], 0.5), ([3.0, 4.0, 5.0], 0)):
        assert measure.area_under_curve(torch.tensor(fakes), torch.tensor([2.0, 2.0])) == area


def test_areas_are_counted_face_by_face(monkeypatch):
    images, logit = torch.rand(96, 3, 64, 64), torch.arange(96.0)
    monkeypatch.setattr(ru, "detail_of", lambda images: images)
    monkeypatch.setattr(measure, "train_classifier", lambda *a: None)
    monkeypatch.setattr(measure, "logits_of", lambda network, part: part.images[:, 0, 0, 0])
    fake, real = crops(images, faces=3), crops(images.clone(), faces=3)
    real.images[:, 0, 0, 0], fake.images[:, 0, 0, 0] = logit, logit + torch.tensor([-200.0, 200, 0])[real.face]
    assert measure.auc_by_face(fake, real) == [1, 0, 0.5]  # found out, taken for the better original, and not told


@pytest.mark.parametrize(("faces", "folds"), [(2, 2), (3, 3), (10, 4)])
def test_every_face_is_judged_once_by_a_network_that_has_learned_from_all_other_folds(monkeypatch, faces, folds):
    learned, judged = {}, {}

    def train(network, fake, real, steps, seed):
        assert torch.equal(fake.face, real.face) and torch.get_num_threads() == 1
        learned[seed] = set(real.face.tolist())
        return seed

    def judge(network, part):
        assert not learned[network] & set(part.face.tolist())
        assert learned[network] | set(part.face.tolist()) == set(range(faces))
        judged.setdefault(network, []).append(sorted(part.face.tolist()))
        return part.images[:, 0, 0, 0]

    monkeypatch.setattr(measure, "train_classifier", train)
    monkeypatch.setattr(measure, "logits_of", judge)
    part = crops(torch.rand(40, 3, 64, 64), faces=faces)
    assert len(measure.auc_by_face(part, part)) == faces and len(learned) == folds
    assert all(fake == real for fake, real in judged.values())
    assert sorted(face for fake, _ in judged.values() for face in fake) == sorted(part.face.tolist())


def test_one_face_cannot_be_cross_validated():
    part = crops(torch.rand(16, 3, 64, 64), faces=1)
    assert measure.auc_by_face(part, part) == []


def test_one_thread_gives_back_the_others():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyError), measure.one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_crops_are_those_that_a_hole_touches_and_all_where_there_is_none():
    image = torch.arange(4 * 256 * 256).float().view(1, 4, 256, 256)[:, :3]
    hole = torch.zeros(1, 1, 256, 256)
    everything = measure.damaged_crops({"x": image}, hole, torch.tensor([7]))["x"]
    assert everything.images.shape == (16, 3, 64, 64) and everything.weight.min() == 1
    assert torch.equal(everything.images[5], image[0, :, 64:128, 64:128])
    hole[:, :, 70:110, 60:110] = 1  # of the crop to the left it covers less than a twentieth
    assert everything.face.tolist() == [7] * 16
    images = {name: torch.cat([x, x]) for name, x in {"x": image, "y": -image}.items()}
    touched = measure.damaged_crops(images, torch.cat([0 * hole, hole]), torch.tensor([7, 8]))
    assert torch.equal(touched["x"].images, everything.images[5:6])
    assert torch.equal(touched["y"].images, -everything.images[5:6])
    assert touched["x"].weight.sum() == 40 * 46 and touched["x"].face.tolist() == [8]


def test_occluded_originals_are_damaged_anew_for_the_realism_table(run, pairs):
    occluded = [pair for pair in pairs if pair.kind == "occluded"][:2]
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3, momentum=1.0)).train()
    parts = measure.collect({"x": network}, occluded, run, 3)
    assert network.training and torch.equal(network[0].running_mean, torch.zeros(3))
    degraded, original, restored = (parts[name] for name in ("degraded", "original", "x"))
    assert torch.equal(ru.to_pixels(restored.images), ru.to_pixels(degraded.images / (1 + 1e-5) ** 0.5))
    assert torch.equal(restored.images, ru.to_pixels(restored.images) / 127.5 - 1)
    outside = (degraded.weight == 0).expand(-1, 3, -1, -1)
    assert torch.allclose(degraded.images[outside], original.images[outside], atol=0.02)
    assert (degraded.images - original.images).abs().amax((1, 2, 3)).min() > 0.1
    assert set(degraded.face.tolist()) == {0, 1}
    files = [original for _, original, _ in ru.FaceRestorationGANDataset(occluded)]
    squares = measure.damaged_crops({"x": torch.stack(files)}, torch.zeros(2, 1, 256, 256), torch.arange(2))["x"].images
    assert all((square == squares).flatten(1).all(1).any() for square in original.images)  # not mirrored
    holes = [measure.collect({}, occluded[:1], run, draws)["degraded"].weight for draws in (1, 2, 3, 3)]
    assert len(holes[1]) < len(holes[2]) and torch.equal(holes[2], holes[3])
    assert torch.equal(holes[2][: len(holes[1])], holes[1])
    assert not torch.equal(holes[1][: len(holes[0])], holes[0])


def test_one_draw_is_the_degraded_files(run, pairs):
    noisy = [pair for pair in pairs if pair.kind == "noisy"][:2]
    files = [degraded for degraded, _, _ in ru.FaceRestorationGANDataset(noisy)]
    expected = measure.damaged_crops({"x": torch.stack(files)}, torch.zeros(2, 1, 256, 256), torch.arange(2))["x"]
    ours = measure.collect({}, noisy, run)["degraded"]
    assert all(torch.equal(*parts) for parts in zip(ours, expected))


def test_the_realism_table_has_every_kind_and_method(run, pairs, monkeypatch):
    trained = []
    train = measure.train_classifier
    monkeypatch.setattr(measure, "train_classifier", lambda *a: trained.append(a[3]) or train(*a))
    table = measure.realism({"nothing": torch.nn.Identity()}, pairs[24:36], run)
    assert list(table) == list(ru.KINDS) and set(trained) == {20}  # the profile `smoke`
    for cells in table.values():
        for key, value in cells["degraded"].items():
            assert cells["nothing"][key] == pytest.approx(value, abs=1e-6)  # doing nothing is doing nothing
        for cell in cells.values():
            assert np.isfinite([cell["sharpness"], cell["spectrum_db"]]).all()
            assert len(cell["auc_by_face"]) == 3 and cell["auc"] == pytest.approx(np.mean(cell["auc_by_face"]))
    trained.clear()
    measure.realism({}, pairs[:8], run, steps=3)
    assert set(trained) == {3}


def test_the_realism_of_one_face_has_no_area(run, pairs, capsys):
    table = measure.realism({}, pairs[:4], run)
    assert all(cells["degraded"]["auc"] is None and cells["degraded"]["auc_by_face"] == [] for cells in table.values())
    measure.print_realism(table)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 4 and all(line.endswith(" dB     -") for line in lines)


@pytest.mark.parametrize("count", [10, 20])
@pytest.mark.parametrize("skewed", [False, True])
def test_the_interval_covers_the_mean_95_times_of_100(count, skewed):
    rng, draws = np.random.default_rng(0), 4000
    samples = rng.gamma(8, 1 / 8, (draws, count)) if skewed else rng.normal(1, 3, (draws, count))
    bounds = np.array([measure.mean_interval(sample) for sample in samples])
    covered = ((bounds[:, 1] <= 1) & (bounds[:, 2] >= 1)).mean()
    assert covered == pytest.approx(0.95, abs=0.01)


def test_the_interval_is_the_textbooks():
    values = [4.1, 5.0, 3.7, 4.4, 4.8, 4.0]  # mean 13/3, t of 5 degrees of freedom at 97.5 %: 2.5706
    half = 2.570582 * np.sqrt(sum((v - 13 / 3) ** 2 for v in values) / 5) / np.sqrt(6)
    assert measure.mean_interval(values) == pytest.approx((13 / 3, 13 / 3 - half, 13 / 3 + half), abs=1e-6)
    assert measure.mean_interval([3.0]) == (3, -np.inf, np.inf)
    assert len(set(measure.mean_interval([0.1] * 3))) == 1 and measure.mean_interval([0, 0]) == (0, 0, 0)


def test_measuring_has_every_method_and_summarises_paired_gains(run, pairs):
    rows = measure.measure({"nothing": torch.nn.Identity()}, pairs[:12], 3, run)
    assert {row["method"] for row in rows if row["kind"] == "color"} == {
        "degraded", "nothing", "inverse of the mean fading", "CLAHE"
    }  # fmt: skip
    summary = measure.summarize(rows)
    assert summary["color"]["nothing"]["gain"] == (0, 0, 0) and summary["color"]["nothing"]["improved"] == 0
    telea = summary["occluded"]["Telea, true mask"]
    difference = telea["psnr"] - summary["occluded"]["degraded"]["psnr"]
    assert telea["gain"][0] == pytest.approx(difference) and telea["psnr_inside"] is not None
    assert summary["clean"]["degraded"]["psnr"] is None  # infinite: nothing to write into JSON
    noisy = [pair for pair in pairs if pair.kind == "noisy"][:3]
    degraded, original, _ = map(list, zip(*ru.FaceRestorationGANDataset(noisy)))
    degraded, original = measure.to_arrays(torch.stack(degraded)), torch.stack(original)
    psnr = {
        h: ru.image_metrics(measure.to_images([measure.non_local_means(d, h) for d in degraded]), original)["psnr"]
        for h in measure.STRENGTHS
    }
    assert measure.tune_non_local_means(pairs, run.settings, 3) == max(psnr, key=lambda h: psnr[h].mean())


def test_images_without_a_pixel_in_a_region_are_left_out_and_counted(capsys):
    nan = float("nan")
    inside = {"degraded": (5.0, nan, 7.0), "x": (20.0, nan, 30.0)}
    rows = [
        {"kind": "occluded", "name": str(i), "method": method, "psnr": 20 + i, "ssim": 0.9, "l1": 1.0}
        | {"psnr_inside": value, "psnr_border": nan, "psnr_outside": 40.0}
        for method, values in inside.items() for i, value in enumerate(values)
    ]  # fmt: skip
    summary = measure.summarize(rows)
    cell = summary["occluded"]["x"]
    assert cell["psnr_inside"] == 25 and cell["psnr_inside_left_out"] == 1
    assert cell["psnr_border"] is None and cell["psnr_border_left_out"] == 3
    assert cell["psnr_outside"] == 40 and "psnr_outside_left_out" not in cell
    measure.print_regions(summary)
    out = capsys.readouterr().out
    assert "nan" not in out and "'inside', without a pixel there: 1 image" in out and "'outside'," not in out
    assert out.splitlines()[2].split() == ["x", "25.00", "dB", "-", "dB", "40.00", "dB"]


def test_very_narrow_pictures_are_measured(tmp_path, places, capsys, recwarn):
    for number in range(2):
        picture = np.random.default_rng(number).integers(0, 256, (400, 12, 3), dtype=np.uint8)
        ru.write_image(tmp_path / "narrow" / f"{number}.png", picture)
    faces = faces_in(tmp_path / "narrow")
    pairs = ru.prepare_pairs(faces, places, TINY)
    run = ru.Run(TINY, places, torch.device("cpu"), ru.faces_id(pairs))
    summary = measure.summarize(measure.measure({}, pairs, 3, run))
    assert summary["occluded"]["degraded"]["psnr_inside"] is None
    measure.print_summary(summary)
    measure.print_regions(summary)
    realism = measure.realism({}, pairs, run)
    assert realism["occluded"]["degraded"] == {"sharpness": None, "spectrum_db": None, "auc": None, "auc_by_face": []}
    measure.print_realism(realism)
    assert "nan" not in capsys.readouterr().out
    assert not [warning for warning in recwarn if warning.category is RuntimeWarning]


def test_the_command_names_what_is_missing_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUTPUT_DIR", "")
    for given, said in ((tmp_path / "nowhere", "not a folder"), (tmp_path, "05_train_gan")):
        monkeypatch.setattr("sys.argv", ["measure.py", str(given)])
        with pytest.raises(SystemExit) as end:
            measure.main()
        assert end.value.code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
