"""Places, profiles, faces, pairs, splits and loaders."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import restoration_utils as ru


def test_settings_are_those_of_the_spec_and_refuse_unknown_names():
    s = ru.PROFILES["full"]
    assert (s.noise_sigma, s.saturation, s.value) == (25, (0.3, 0.7), (0.6, 1.2))
    assert (s.pretrain_batch, s.gan_batch, s.pretrain_validation, s.gan_validation) == (8, 4, 0.2, 0.1)
    assert (s.pretrain_epochs, s.pretrain_lr, s.pretrain_lr_step, s.patience, s.mse_weight) == (10, 1e-3, 15, 10, 0.1)
    assert (s.gan_epochs, s.generator_lr, s.discriminator_lr, s.gan_lr_step) == (10, 1e-4, 2e-4, 25)
    assert (s.l1_weight, s.every_second_batch_after, s.checkpoint_every, s.lr_gamma) == (100, 10, 10, 0.1)
    with pytest.raises(TypeError):
        dataclasses.replace(s, pretrain_epoch=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.seed = 1


def test_profiles_are_chosen_by_device_or_name():
    assert ru.choose_settings(torch.device("cpu"), {}).profile == "quick"
    assert ru.choose_settings(torch.device("cuda"), {}).profile == "full"
    assert ru.choose_settings(torch.device("cuda"), {"RESTORATION_PROFILE": "smoke"}).profile == "smoke"
    with pytest.raises(ValueError, match="smoke"):
        ru.choose_settings(torch.device("cpu"), {"RESTORATION_PROFILE": "fast"})


def test_switches_are_1_or_0_and_nothing_else():
    cpu = torch.device("cpu")
    assert [ru.choose_settings(cpu, {"RESTORATION_PLAIN": value}).plain for value in ("1", "0", "")] == [
        True,
        False,
        False,
    ]
    with pytest.raises(ValueError, match="RESTORATION_PLAIN is 'yes'"):
        ru.choose_settings(cpu, {"RESTORATION_PLAIN": "yes"})
    with pytest.raises(ValueError, match="RESTORATION_STRICT is 'true'"):
        ru.check("anything", True, TINY, {"RESTORATION_STRICT": "true"})


def test_places_on_a_made_up_kaggle_and_with_overrides(tmp_path):
    (tmp_path / "kaggle" / "input").mkdir(parents=True)
    (tmp_path / "kaggle" / "working").mkdir()
    places = ru.find_places(tmp_path, {})
    assert places.outputs == tmp_path / "kaggle" / "working" / "outputs"
    assert places.degraded == tmp_path / "kaggle" / "working" / "fakefaces_degraded"
    assert places.attached == tmp_path / "kaggle" / "input"
    moved = ru.find_places(tmp_path, {"OUTPUT_DIR": str(tmp_path / "elsewhere")})
    assert moved.degraded == tmp_path / "elsewhere" / "fakefaces_degraded"


@pytest.mark.parametrize("mount", ["fakefaces", "datasets/somebody/fakefaces"])
def test_faces_on_kaggle_in_a_subfolder(faces, tmp_path, mount):
    target = tmp_path / "input" / mount / "images"
    target.parent.mkdir(parents=True)
    faces.folder.rename(target)
    places = ru.Places("Kaggle", tmp_path / "o", tmp_path / "d", tmp_path / "input")
    found = ru.find_faces(TINY, places, {})
    assert len(found.files) == 10 and found.folder.name == "fakefaces"


def test_faces_dir_comes_first_and_errors_name_the_folder(faces, places, tmp_path):
    assert ru.find_faces(TINY, places, {"FACES_DIR": str(faces.folder)}).files == faces.files
    limited = dataclasses.replace(TINY, max_faces=4)
    assert len(ru.find_faces(limited, places, {"FACES_DIR": str(faces.folder)}).files) == 4
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ru.find_faces(TINY, places, {"FACES_DIR": str(tmp_path / "nowhere")})
    (tmp_path / "void").mkdir()
    with pytest.raises(FileNotFoundError, match="void"):
        ru.find_faces(TINY, places, {"FACES_DIR": str(tmp_path / "void")})


def test_synthetic_portraits_are_seeded_varied_and_scale():
    first, again, other = (ru.draw_portrait(np.random.default_rng(seed), 128) for seed in (0, 0, 1))
    assert first.shape == (128, 128, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and np.abs(first.astype(int) - other).mean() > 5
    large = ru.draw_portrait(np.random.default_rng(0), 512)
    small = np.asarray(Image.fromarray(large).resize((128, 128), Image.Resampling.BOX), float)
    assert np.abs(small - first).mean() < 5  # the same person at another size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_one_loader_applies_exif_rotation_for_everyone(tmp_path, orientation):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    seen = ru.open_image(tmp_path / "a.jpg")
    assert seen.size == ((60, 40) if orientation < 5 else (40, 60))
    assert np.array_equal(np.asarray(seen)[..., ::-1], ru.read_image(tmp_path / "a.jpg"))


def test_splits_are_grouped_nested_and_of_the_right_size(pairs):
    many = [p._replace(name=f"{i}_{p.name}") for i in range(5) for p in pairs]
    splits = ru.split_pairs(many, TINY)
    names = {part: {pair.name for pair in getattr(splits, part)} for part in splits._fields}
    assert [len(names[part]) for part in splits._fields] == [40, 10, 45, 5]
    assert not names["pretrain_train"] & names["pretrain_validation"]
    assert not names["gan_train"] & names["gan_validation"]
    assert names["gan_validation"] < names["pretrain_validation"]
    assert all(len(getattr(splits, part)) == 3 * len(names[part]) for part in splits._fields)
    assert ru.split_pairs(many, TINY) == splits
    assert ru.split_pairs(many, dataclasses.replace(TINY, seed=9)) != splits
    with pytest.raises(ValueError, match="too few"):
        ru.split_pairs([pairs[0]], TINY)


def test_items_are_resized_normalised_and_carry_their_hole(pairs):
    dataset = ru.FaceRestorationGANDataset(pairs, TINY)
    degraded, original, info = dataset[2]
    assert degraded.shape == original.shape == (3, 256, 256) and info["kind"] == "occluded"
    picture = ru.open_image(pairs[2].original).resize((256, 256), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(original, expected, atol=1e-6)
    rng = np.random.default_rng(ru.derive_seed(TINY.seed, "occluded", pairs[2].name))
    mask = Image.fromarray(ru.occlusion_mask((64, 64), rng)).resize((256, 256), Image.Resampling.BILINEAR)
    assert np.allclose(info["hole"][0].numpy(), np.asarray(mask) / 255) and info["hole"].max() == 1
    assert dataset[0][2]["hole"].sum() == 0


def test_a_mirrored_item_mirrors_pair_and_hole_together(pairs):
    dataset = ru.FaceRestorationGANDataset(pairs, TINY)
    plain, mirrored = dataset[2], dataset[2, True]
    for a, b in ((mirrored[0], plain[0]), (mirrored[1], plain[1]), (mirrored[2]["hole"], plain[2]["hole"])):
        assert torch.equal(a, b.flip(-1)) and not torch.equal(a, b)


def test_a_changed_file_is_read_anew(pairs):
    dataset = ru.FaceRestorationGANDataset(pairs, TINY)
    before = dataset[0][1]
    ru.write_image(pairs[0].original, np.zeros((64, 64, 3), np.uint8))
    assert not torch.equal(before, dataset[0][1])


def test_the_order_depends_on_seed_stage_and_epoch_only_and_half_are_mirrored():
    def order(seed, stage, epoch, flip=0.5, length=20):
        sampler = ru.EpochSampler(length, dataclasses.replace(TINY, seed=seed, flip=flip), stage)
        sampler.epoch = epoch
        return list(sampler)

    assert order(1, "gan", 2) == order(1, "gan", 2)
    assert len({str(o) for o in (order(1, "gan", 2), order(2, "gan", 2), order(1, "x", 2), order(1, "gan", 3))}) == 4
    assert sorted(index for index, _ in order(1, "gan", 2)) == list(range(20))
    shares = [np.mean([mirrored for _, mirrored in order(1, "gan", 2, flip, 2000)]) for flip in (0.0, 0.5, 1.0)]
    assert shares == [0, pytest.approx(0.5, abs=0.04), 1]


def test_worker_processes_under_spawn_give_the_same_batches(pairs):
    dataset, sampler = ru.FaceRestorationGANDataset(pairs[:6], TINY), ru.EpochSampler(6, TINY, "s")
    batches = [
        next(iter(torch.utils.data.DataLoader(dataset, 6, sampler=sampler, num_workers=n, **kwargs)))
        for n, kwargs in ((0, {}), (1, {"multiprocessing_context": "spawn"}))
    ]
    assert torch.equal(batches[0][0], batches[1][0]) and batches[0][2]["name"] == batches[1][2]["name"]


def test_faces_id_follows_names_and_contents(pairs):
    assert ru.faces_id(pairs) == ru.faces_id(pairs[::-1])
    assert ru.faces_id(pairs) != ru.faces_id([*pairs[1:3], *pairs[3:], pairs[0]._replace(original_hash="0")])


def test_attached_degraded_images_are_used_if_they_are_right(faces, places, tmp_path, capsys):
    ru.degrade_folder(faces, tmp_path / "input" / "nb01" / "fakefaces_degraded", TINY)
    attached = dataclasses.replace(places, attached=tmp_path / "input")
    assert ru.prepare_pairs(faces, attached, TINY)[0].degraded.is_relative_to(tmp_path / "input")
    assert "attached" in capsys.readouterr().out
    other = dataclasses.replace(TINY, seed=77)
    assert ru.prepare_pairs(faces, attached, other)[0].degraded.is_relative_to(places.degraded)


def test_relative_paths_count_from_the_modules_folder_and_misspelt_sources_are_refused(tmp_path, monkeypatch, places):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ru, "__file__", str(tmp_path / "repository" / "restoration_utils.py"))
    assert ru.find_places(tmp_path, {"OUTPUT_DIR": "mine"}).outputs == tmp_path / "repository" / "mine"
    with pytest.raises(FileNotFoundError, match="repository/mine_too"):
        ru.find_faces(TINY, places, {"FACES_DIR": "mine_too"})
    with pytest.raises(ValueError, match="Kaggel"):
        ru.find_faces(TINY, places, {"RESTORATION_FACES": "Kaggel"})


def test_kept_images_are_those_of_the_files_to_the_last_bit(pairs, capsys):
    kept = ru.keep_images(pairs, TINY)
    assert kept.images.dtype == kept.holes.dtype == torch.uint8
    assert kept.images.shape == (4 * 10, 3, 256, 256) and kept.holes.shape == (10, 1, 256, 256)
    pairs = [*pairs, pairs[0]._replace(kind="clean")]
    fast, slow = (ru.FaceRestorationGANDataset(pairs, TINY, k) for k in (kept, None))
    for item in [*range(len(pairs)), (1, True), (2, True)]:
        for one, two in zip(fast[item][:2], slow[item][:2]):
            assert torch.equal(one, two)
        assert torch.equal(fast[item][2]["hole"], slow[item][2]["hole"])
    assert not capsys.readouterr().out


def test_training_reads_every_file_once_and_says_so_if_memory_does_not_suffice(run, pairs, monkeypatch, capsys):
    split, opened, read_image = ru.split_pairs(pairs, run.settings), [], ru.read_image
    monkeypatch.setattr(ru, "read_image", lambda path: opened.append(path) or read_image(path))
    settings = dataclasses.replace(run.settings, pretrain_epochs=3, sample_faces=0)
    run = run._replace(settings=settings)
    monkeypatch.setattr(ru, "save_samples", lambda *arguments: None)
    monkeypatch.setattr(ru, "sample_batch", lambda *arguments: None)
    ru.pretrain_generator(ru.build_generator(settings), split.pretrain_train, split.pretrain_validation, run)
    assert len(opened) == len(set(opened)) == 40
    assert ru.keep_images(pairs, dataclasses.replace(settings, cache_gb=0.001)) is None
    assert "40 images would take 0.0085 GB, more than cache_gb" in capsys.readouterr().out
