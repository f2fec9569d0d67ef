"""Places, profiles, faces, pairs, splits and loaders."""

import dataclasses
import json
import math
from pathlib import Path

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


CPU = torch.device("cpu")


def test_profiles_are_chosen_by_device_or_name(monkeypatch):
    assert ru.choose_settings(CPU).profile == "quick"
    assert ru.choose_settings(torch.device("cuda")).profile == "full"
    monkeypatch.setenv("RESTORATION_PROFILE", "smoke")
    assert ru.choose_settings(torch.device("cuda")).profile == "smoke"
    monkeypatch.setenv("RESTORATION_PROFILE", "fast")
    with pytest.raises(ValueError, match="smoke"):
        ru.choose_settings(CPU)


def test_switches_are_1_or_0_and_nothing_else_and_that_is_said_at_the_start(monkeypatch):
    for value, plain in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("RESTORATION_PLAIN", value)
        assert ru.choose_settings(CPU).plain == plain
    monkeypatch.setenv("RESTORATION_PLAIN", "yes")
    with pytest.raises(ValueError, match="RESTORATION_PLAIN is 'yes'"):
        ru.choose_settings(CPU)
    monkeypatch.setenv("RESTORATION_STRICT", "true")
    for late in (ru.start, lambda: ru.check("anything", True, TINY)):
        with pytest.raises(ValueError, match="RESTORATION_STRICT is 'true'"):
            late()


def test_a_misspelt_variable_is_named_and_what_was_meant(monkeypatch):
    monkeypatch.setenv("RESTORATION_PROFLE", "smoke")
    with pytest.raises(ValueError, match=r"no such variable: RESTORATION_PROFLE; there are RESTORATION_PROFILE"):
        ru.choose_settings(CPU)


def test_plain_can_be_switched_off_again():
    plain = dataclasses.replace(ru.PROFILES["quick"], plain=True)
    assert dataclasses.replace(plain, plain=False) == ru.PROFILES["quick"]


def test_parts_of_a_seed_do_not_run_into_each_other():
    assert ru.derive_seed(1, "a/b") != ru.derive_seed(1, "a", "b")
    assert len({ru.derive_seed(*x) for x in (("a", "", "b"), ("a", "b"), ("a//b",), ("a/b",), ("a", "/b"))}) == 5


@pytest.mark.parametrize("given", ["below a file", "nowhere", "closed"])
def test_an_output_folder_that_cannot_be_written_is_named_with_what_to_set(tmp_path, monkeypatch, given):
    (tmp_path / "file").touch()
    folder = {"below a file": tmp_path / "file" / "o", "nowhere": Path("/proc/nowhere/o"), "closed": tmp_path / "o"}[
        given
    ]
    monkeypatch.setenv("OUTPUT_DIR", str(folder))
    if given == "closed":

        def closed(**options):
            raise PermissionError(13, "Permission denied", str(options["dir"]))

        monkeypatch.setattr(ru.tempfile, "TemporaryFile", closed)
    with pytest.raises(OSError, match=rf"OUTPUT_DIR names {folder}, which cannot be written \(.*set OUTPUT_DIR"):
        ru.find_places()


def test_a_read_only_checkout_says_what_to_set(monkeypatch):
    def closed(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(ru.tempfile, "TemporaryFile", closed)
    with pytest.raises(
        OSError, match=r"results would go to .*outputs, which cannot be written .Read-only.*set OUTPUT_DIR"
    ):
        ru.find_places()


def test_a_gpu_is_used_only_if_a_convolution_runs_and_32_bits_are_32(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))

    def fails(*arguments):
        raise RuntimeError("no kernel image is available\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(ru.F, "conv2d", fails)
        assert ru.choose_device().type == "cpu"
    said = capsys.readouterr().out
    assert "Tesla P100" in said and "no kernel image" in said and "T4" in said and "and more" not in said
    assert ru.choose_device().type == "cuda" and not torch.backends.cudnn.allow_tf32


def test_places_on_a_made_up_kaggle_and_with_overrides(tmp_path, monkeypatch):
    (tmp_path / "kaggle" / "input").mkdir(parents=True)
    (tmp_path / "kaggle" / "working").mkdir()
    monkeypatch.chdir(tmp_path / "kaggle" / "working")
    places = ru.find_places()
    assert places.platform == "Kaggle"
    assert places.outputs == tmp_path / "kaggle" / "working" / "outputs"
    assert places.degraded == tmp_path / "kaggle" / "working" / "fakefaces_degraded"
    assert places.attached == tmp_path / "kaggle" / "input"
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "elsewhere"))
    moved = ru.find_places()
    assert moved.degraded == tmp_path / "elsewhere" / "fakefaces_degraded"


@pytest.mark.parametrize("mount", ["fakefaces", "datasets/somebody/fakefaces"])
def test_faces_on_kaggle_in_a_subfolder(faces, tmp_path, mount):
    target = tmp_path / "input" / mount / "images"
    target.parent.mkdir(parents=True)
    faces.folder.rename(target)
    places = ru.Places("Kaggle", tmp_path / "o", tmp_path / "d", tmp_path / "input")
    found = ru.find_faces(TINY, places)
    assert len(found.files) == 10 and found.folder.name == "fakefaces"


def test_faces_dir_comes_first_and_errors_name_the_folder(faces, places, tmp_path, monkeypatch):
    monkeypatch.setenv("FACES_DIR", str(faces.folder))
    assert ru.find_faces(TINY, places).files == faces.files
    limited = dataclasses.replace(TINY, max_faces=4)
    assert len(ru.find_faces(limited, places).files) == 4
    (tmp_path / "void").mkdir()
    for name in ("nowhere", "void"):
        monkeypatch.setenv("FACES_DIR", str(tmp_path / name))
        with pytest.raises(FileNotFoundError, match=name):
            ru.find_faces(TINY, places)


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
    many = [p._replace(name=f"{i}_{p.name}", content=f"{i}{p.content}") for i in range(5) for p in pairs]
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


def test_copies_of_one_photograph_are_on_one_side_whatever_they_are_called(pairs):
    copies = [p._replace(name=f"{p.name} (copy).png") for p in pairs]
    splits = ru.split_pairs([*copies, *pairs], TINY)
    contents = {part: {pair.content for pair in getattr(splits, part)} for part in splits._fields}
    assert not contents["pretrain_train"] & contents["pretrain_validation"]
    assert not contents["gan_train"] & contents["gan_validation"]
    assert sum(map(len, splits[:2])) == 60 and set(splits.pretrain_train) - set(copies) == set(
        ru.split_pairs(pairs, TINY).pretrain_train
    )


def test_items_are_resized_normalised_and_carry_their_hole(pairs):
    dataset = ru.FaceRestorationGANDataset(pairs)
    degraded, original, info = dataset[2]
    assert degraded.shape == original.shape == (3, 256, 256) and info["kind"] == "occluded"
    picture = ru.open_image(pairs[2].original).resize((256, 256), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(original, expected, atol=1e-6)
    rng = np.random.default_rng(ru.derive_seed(TINY.seed, "occluded", pairs[2].name))
    mask = Image.fromarray(ru.occlusion_mask((64, 64), rng)).resize((256, 256), Image.Resampling.BILINEAR)
    assert np.allclose(info["hole"][0].numpy(), np.asarray(mask) / 255) and info["hole"].max() == 1
    assert dataset[0][2]["hole"].sum() == 0


def test_every_item_has_the_pixels_of_the_transform_to_the_last_bit(pairs):
    pairs = [*pairs, pairs[0]._replace(kind="clean")]
    for pair, (degraded, original, _) in zip(pairs, ru.FaceRestorationGANDataset(pairs)):
        expected = pair.original if pair.kind == "clean" else pair.degraded
        assert torch.equal(degraded, ru.image_transform()(ru.open_image(expected)))
        assert torch.equal(original, ru.image_transform()(ru.open_image(pair.original)))


def test_a_mirrored_item_mirrors_pair_and_hole_together(pairs):
    dataset = ru.FaceRestorationGANDataset(pairs)
    plain, mirrored = dataset[2], dataset[2, True]
    for a, b in ((mirrored[0], plain[0]), (mirrored[1], plain[1]), (mirrored[2]["hole"], plain[2]["hole"])):
        assert torch.equal(a, b.flip(-1)) and not torch.equal(a, b)


def test_a_changed_original_is_read_anew(faces, places, pairs):
    before = ru.FaceRestorationGANDataset(pairs)[0][1]
    ru.write_image(pairs[0].original, np.zeros((64, 64, 3), np.uint8))
    again = ru.prepare_pairs(faces, places, TINY)
    assert not torch.equal(before, ru.FaceRestorationGANDataset(again)[0][1])
    assert len(list(places.outputs.glob("images_256px_*.npy"))) == 1  # the old ones are gone


def test_the_order_depends_on_seed_stage_and_epoch_only_and_half_are_mirrored():
    def order(seed, stage, epoch, flip=0.5, length=20):
        return ru.training_order(length, dataclasses.replace(TINY, seed=seed, flip=flip), stage, epoch)

    assert order(1, "gan", 2) == order(1, "gan", 2)
    assert len({str(o) for o in (order(1, "gan", 2), order(2, "gan", 2), order(1, "x", 2), order(1, "gan", 3))}) == 4
    assert sorted(index for index, _ in order(1, "gan", 2)) == list(range(20))
    shares = [np.mean([mirrored for _, mirrored in order(1, "gan", 2, flip, 2000)]) for flip in (0.0, 0.5, 1.0)]
    assert shares == [0, pytest.approx(0.5, abs=0.04), 1]


def test_training_batches_are_full_and_validation_leaves_nothing_out(pairs):
    order = ru.training_order(len(pairs), TINY, "gan", 1)
    assert [len(batch[0]) for batch in ru.make_loader(pairs, 8, CPU, order)] == [8, 8, 8]
    assert [len(batch[0]) for batch in ru.make_loader(pairs, 8, CPU)] == [8, 8, 8, 6]
    assert [
        len(batch[0]) for batch in ru.make_loader(pairs[:3], 8, CPU, order[:0] + [(0, True), (1, False), (2, True)])
    ] == [3]


def test_worker_processes_under_spawn_give_the_same_batches(pairs):
    dataset, order = ru.FaceRestorationGANDataset(pairs[:6]), ru.training_order(6, TINY, "s", 1)
    dataset[0]  # what is open is not sent to a worker
    batches = [
        next(iter(torch.utils.data.DataLoader(dataset, 6, sampler=order, num_workers=n, **kwargs)))
        for n, kwargs in ((0, {}), (1, {"multiprocessing_context": "spawn"}))
    ]
    assert torch.equal(batches[0][0], batches[1][0]) and batches[0][2]["name"] == batches[1][2]["name"]


def test_faces_id_follows_names_and_contents(pairs):
    assert ru.faces_id(pairs) == ru.faces_id(pairs[::-1])
    assert ru.faces_id(pairs) != ru.faces_id([*pairs[1:3], *pairs[3:], pairs[0]._replace(content="0")])


def test_attached_degraded_images_are_used_if_they_are_right(faces, places, tmp_path):
    ru.degrade_folder(faces, tmp_path / "input" / "nb01" / "fakefaces_degraded", TINY)
    attached = places._replace(attached=tmp_path / "input")
    assert ru.prepare_pairs(faces, attached, TINY)[0].degraded.is_relative_to(tmp_path / "input")
    assert not places.degraded.exists()  # nothing was made again
    other = dataclasses.replace(TINY, seed=77)
    assert ru.prepare_pairs(faces, attached, other)[0].degraded.is_relative_to(places.degraded)


def test_relative_paths_count_from_the_modules_folder_and_misspelt_sources_are_refused(tmp_path, monkeypatch, places):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ru, "__file__", str(tmp_path / "repository" / "restoration_utils.py"))
    monkeypatch.setenv("OUTPUT_DIR", "mine")
    assert ru.find_places().outputs == tmp_path / "repository" / "mine"
    monkeypatch.setenv("FACES_DIR", "mine_too")
    with pytest.raises(FileNotFoundError, match="repository/mine_too"):
        ru.find_faces(TINY, places)
    monkeypatch.delenv("FACES_DIR")
    monkeypatch.setenv("RESTORATION_FACES", "Kaggel")
    with pytest.raises(ValueError, match="Kaggel"):
        ru.find_faces(TINY, places)


def test_every_file_is_read_once_for_all_epochs_and_notebooks(faces, places, monkeypatch):
    opened, open_image = [], ru.open_image
    ru.degrade_folder(faces, places.degraded, TINY)
    monkeypatch.setattr(ru, "open_image", lambda path: opened.append(path) or open_image(path))
    pairs = ru.prepare_pairs(faces, places, TINY)
    assert len(opened) == len(set(opened)) == 40
    run = ru.Run(dataclasses.replace(TINY, pretrain_epochs=2), places, CPU, ru.faces_id(pairs))
    split = ru.split_pairs(ru.prepare_pairs(faces, places, TINY), TINY)
    ru.pretrain_generator(ru.build_generator(TINY), split.pretrain_train, split.pretrain_validation, run)
    assert len(opened) == 40


def test_few_photographs_are_noted(faces, places, monkeypatch, capsys):
    few = faces._replace(names=faces.names[:1])
    ru.prepare_pairs(few, places, dataclasses.replace(TINY, profile="quick"))
    assert "NOTE: 1 original will not teach much" in capsys.readouterr().out
    ru.prepare_pairs(faces, places, dataclasses.replace(TINY, profile="quick"))
    assert "NOTE: 10 originals will not teach much" in capsys.readouterr().out


def test_json_holds_no_infinity(tmp_path):
    ru.write_json(tmp_path / "a.json", {"gain": (1.5, -math.inf, math.nan), "kind": "Infinity"})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"gain": [1.5, None, None], "kind": "Infinity"}
