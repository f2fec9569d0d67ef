"""Update steps, both training loops, schedules that fire, resuming, and checkpoints."""

import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from torch.nn import functional as F

import restoration_utils as ru

FLOAT32 = ru.Precision(torch.device("cpu"), wanted=False)
CHANGES = {"pretrain_epochs": 4, "gan_epochs": 4, "ema": 0.9, "pretrain_lr_step": 3, "gan_lr_step": 3}


def with_settings(run, **changes):
    return run._replace(settings=dataclasses.replace(run.settings, **changes))


def pretrain(run, pairs):
    splits, generator = ru.split_pairs(pairs, run.settings), ru.build_generator(run.settings)
    return generator, ru.pretrain_generator(generator, splits.pretrain_train, splits.pretrain_validation, run)


def train_gan(run, pairs):
    splits = ru.split_pairs(pairs, run.settings)
    generator, discriminator = ru.build_generator(run.settings), ru.build_discriminator(run.settings)
    history = ru.train_gan(generator, discriminator, splits.gan_train, splits.gan_validation, run)
    return generator, discriminator, history


def same(a, b):
    """Whether two nested containers of tensors are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def gradient_step(network, loss):
    """The weights after one step of plain gradient descent with rate 1."""
    gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    return [p.detach() - (0 if g is None else g) for p, g in zip(network.parameters(), gradients)]


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_pretrain_step_descends_l1_plus_a_tenth_of_mse_plus_the_heads(run, batch, lesson, pairs, weight):
    lesson |= ru.grain_lesson(pairs, TINY, np.random.default_rng(1))
    run = with_settings(run, heads_weight=weight)
    generator = ru.build_generator(run.settings)
    reference = copy.deepcopy(generator)
    restoration = reference.restore(batch[0], batch[2]["whole"])
    error = restoration.restored - batch[1]
    heads = ru.detection_loss(restoration.hole, batch[2]["hole"]) + ru.color_loss(reference.color, lesson)
    heads = heads + ru.grain_loss(reference.output.grain, lesson)
    expected = gradient_step(reference, error.abs().mean() + 0.1 * error.pow(2).mean() + weight * heads)
    optimizer = torch.optim.SGD(generator.parameters(), 1.0)
    for parameter in generator.parameters():
        parameter.grad = torch.ones_like(parameter)  # must be cleared by the step
    ru.pretrain_step(generator, optimizer, batch, lesson, run, FLOAT32)
    assert all(torch.allclose(p, e, atol=1e-6) for p, e in zip(generator.parameters(), expected))


def test_detection_is_supervised_everywhere_and_what_is_thin_counts_twice(batch):
    logits, hole = torch.randn(2, 1, 256, 256), torch.zeros(2, 1, 256, 256)
    hole[:, :, 49:91, 59:101] = 1  # one pixel more than in the batch, whose corners are at 50 and 60
    batch[2]["hole"][:, :, 50, 60:100] = 0.2  # a fifth is touched,
    batch[2]["hole"][:, :, 20, 60:100] = 0.1  # a tenth is not
    share = np.kron(hole.numpy().reshape(2, 1, 16, 16, 16, 16).mean((3, 5)), np.ones((16, 16)))  # of 16 x 16 px
    p = logits.sigmoid()
    entropy = -((2 - torch.from_numpy(share)) * hole * p.log() + (1 - hole) * (1 - p).log()).mean()
    assert torch.isclose(ru.detection_loss(logits, batch[2]["hole"]).double(), entropy, atol=1e-5)


def test_color_loss_supervises_colours_outside_damage_and_fears_harm(lesson):
    head = ru.ColorHead()
    curves, logits = head(lesson["whole"], doubting=False)
    error = (ru.recolor(lesson["whole"], curves) - lesson["original"]).abs() * lesson["known"]
    q, truth = logits.sigmoid(), lesson["faded"]
    entropy = -(truth * q.log() + torch.tensor((1, 4)) * (1 - truth) * (1 - q).log()).mean()
    assert torch.isclose(ru.color_loss(head, lesson), error.mean() + 0.1 * entropy, atol=1e-6)


def test_the_heads_of_colour_and_grain_learn_from_their_lessons_only(run, batch):
    generator = ru.build_generator(run.settings)
    generator.restore(batch[0], batch[2]["whole"]).restored.sum().backward()
    own = [*generator.color.parameters(), *generator.output.grain.parameters()]
    assert all(parameter.grad is None for parameter in own)


def test_grain_lessons_are_seeded_squares_of_originals_half_of_them_noisy_and_some_as_they_are(pairs):
    settings = dataclasses.replace(TINY, grain_lessons=80)
    lesson, again = (ru.grain_lesson(pairs, settings, np.random.default_rng(0)) for _ in range(2))
    assert all(torch.equal(lesson[name], again[name]) for name in lesson)
    assert lesson["noisy"].shape == lesson["clean"].shape == (80, 3, 128, 128)
    strength = 127.5 * (lesson["noisy"] - lesson["clean"]).flatten(1).std(1)
    assert 3 <= (strength == 0).sum() <= 20 and 10 <= ((strength > 20) & (strength < 26)).sum() <= 40
    assert strength.max() > 30
    grey = (lesson["clean"].std(1) == 0).flatten(1).all(1)
    assert 10 <= grey.sum() <= 30
    colours = np.load(pairs[0].store, mmap_mode="r")[[pair.row for pair in pairs], :, :3]
    colours = set(map(tuple, colours.transpose(0, 1, 3, 4, 2).reshape(-1, 3).tolist()))
    square = ((lesson["clean"][~grey][0] + 1) * 127.5).round().byte().flatten(1).T.tolist()
    assert colours.issuperset(map(tuple, square))
    assert ru.grain_lesson(pairs, dataclasses.replace(TINY, grain_lessons=0), np.random.default_rng(0)) == {}


def test_grain_loss_is_what_is_left_of_the_noise(pairs):
    lesson, head = ru.grain_lesson(pairs, TINY, np.random.default_rng(0)), ru.GrainHead(4)
    assert torch.isclose(ru.grain_loss(head, lesson), (lesson["noisy"] - lesson["clean"]).abs().mean())  # zero at first
    torch.nn.init.normal_(head.noise.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    detail = ru.detail_of(lesson["noisy"])
    level = ru.noise_level(ru.block_levels(detail)).clamp(min=1 / 127.5)
    left = lesson["noisy"] - level * head(detail / level)
    assert torch.isclose(ru.grain_loss(head, lesson), (left - lesson["clean"]).abs().mean())


def test_lessons_are_seeded_and_say_what_has_faded_and_where_there_is_damage():
    originals = np.repeat(np.linspace(0, 255, 128).astype(np.uint8)[None, :, None, None], 3, 3).repeat(128, 2)
    originals[..., 0] = originals[..., 0].transpose(0, 2, 1)  # in colour
    settings = dataclasses.replace(TINY, color_lessons=60)
    lesson = ru.color_lesson(originals, settings, np.random.default_rng(0))
    again = ru.color_lesson(originals, settings, np.random.default_rng(0))
    assert all(torch.equal(lesson[name], again[name]) for name in lesson)
    assert lesson["whole"].shape == lesson["original"].shape == (60, 3, 64, 64)
    pale, aged = lesson["faded"].bool().T
    damaged = (lesson["known"] == 0).flatten(1).any(1)
    assert 5 < pale.sum() < 30 and 5 < aged.sum() < 30 and not (pale & aged).any() and not damaged[pale].any()
    difference = ((lesson["whole"] - lesson["original"]).abs() * lesson["known"]).flatten(1).mean(1)
    assert difference[~pale & ~aged].max() < 0.01 < difference[aged].min()
    grey = (lesson["original"].std(1) == 0).flatten(1).all(1)
    assert 2 < grey.sum() < aged.sum() and aged[grey].all()


def test_discriminator_step_leaves_the_generator_alone_and_halves_the_sum(batch):
    generator, discriminator = ru.build_generator(TINY), ru.build_discriminator(TINY)
    reference, before = copy.deepcopy(discriminator), copy.deepcopy(generator.state_dict())
    restored = generator(batch[0])
    before = copy.deepcopy(generator.state_dict())
    real, fake = reference(batch[0], batch[1]), reference(batch[0], restored.detach())
    expected = gradient_step(reference, 0.5 * (((real - 1) ** 2).mean() + (fake**2).mean()))
    for parameter in discriminator.parameters():
        parameter.grad = torch.ones_like(parameter)  # of a step before, to be forgotten
    optimizer = torch.optim.SGD(discriminator.parameters(), 1.0)
    ru.discriminator_step(discriminator, optimizer, (batch[0], restored, batch[1]), FLOAT32)
    assert all(torch.allclose(p, e, atol=1e-5) for p, e in zip(discriminator.parameters(), expected))
    assert same(before, generator.state_dict()) and all(p.grad is None for p in generator.parameters())


@pytest.mark.parametrize("plain", [False, True])
def test_generator_step_descends_gan_loss_plus_100_l1_and_leaves_the_discriminator_alone(batch, plain):
    generator, discriminator = ru.build_generator(TINY), ru.PatchGANDiscriminator(2, plain)  # plain: batch norm
    reference = copy.deepcopy(generator)
    before = copy.deepcopy(discriminator.state_dict())
    restored = reference(batch[0])
    score = copy.deepcopy(discriminator)(batch[0], restored)
    expected = gradient_step(reference, ((score - 1) ** 2).mean() + 100 * (restored - batch[1]).abs().mean())
    optimizer = torch.optim.SGD(generator.parameters(), 1.0)
    for parameter in generator.parameters():
        parameter.grad = torch.ones_like(parameter)  # of a step before, to be forgotten
    ru.generator_step(discriminator, optimizer, (batch[0], generator(batch[0]), batch[1]), None, TINY, FLOAT32)
    assert all(torch.allclose(p, e, atol=1e-4) for p, e in zip(generator.parameters(), expected))
    assert same(before, discriminator.state_dict())
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())


def test_generator_step_goes_on_teaching_what_a_hole_is(batch):
    generator, discriminator = ru.build_generator(TINY), ru.build_discriminator(TINY)
    reference = copy.deepcopy(generator)
    restored, hole = reference.restore(batch[0])
    score = copy.deepcopy(discriminator)(batch[0], restored)
    loss = (restored - batch[1]).abs().mean() + 0.5 * ru.detection_loss(hole, batch[2]["hole"])
    expected = gradient_step(reference, ((score - 1) ** 2).mean() + 100 * loss)
    optimizer, (restored, hole) = torch.optim.SGD(generator.parameters(), 1.0), generator.restore(batch[0])
    holes, settings = (hole, batch[2]["hole"]), dataclasses.replace(TINY, heads_weight=0.5)
    losses = ru.generator_step(discriminator, optimizer, (batch[0], restored, batch[1]), holes, settings, FLOAT32)
    assert torch.isclose(losses["holes"], ru.detection_loss(*holes))
    assert all(torch.allclose(p, e, atol=1e-4) for p, e in zip(generator.parameters(), expected))


def test_shifted_rolls_all_by_the_same_random_amount_below_the_limit(batch):
    rng, seen = np.random.default_rng(0), set()
    for _ in range(60):
        degraded, original = ru.shifted(batch[:2], 3, rng)
        amounts = [(y, x) for y in range(3) for x in range(3) if torch.equal(batch[0].roll((y, x), (2, 3)), degraded)]
        assert len(amounts) == 1 and torch.equal(original, batch[1].roll(amounts[0], (2, 3)))
        seen |= set(amounts)
    assert len(seen) == 9
    assert all(torch.equal(*both) for both in zip(ru.shifted(batch[:2], 0, rng), batch[:2]))
    for image in ru.shifted(batch[:2], 3, rng):  # rolling alone may lose it
        assert image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("plain", [False, True])
def test_both_steps_of_the_gan_get_shifted_pairs_the_plain_recipe_as_they_are(run, pairs, monkeypatch, plain):
    run = with_settings(run, gan_epochs=1, **(ru.PLAIN if plain else {"shift": 5}))
    shifted, seen, rngs = [], [], []
    steps, taught = (ru.discriminator_step, ru.generator_step), []

    def shift(images, limit, rng):
        assert limit == (0 if plain else 5)
        rngs.append(rng.integers(2**32))
        shifted.append([image.flip(2) for image in images])
        return shifted[-1]

    monkeypatch.setattr(ru, "shifted", shift)
    monkeypatch.setattr(ru, "discriminator_step", lambda *a: seen.append(a[2]) or steps[0](*a))
    monkeypatch.setattr(ru, "generator_step", lambda *a: seen.append(a[2]) or taught.append(a[3]) or steps[1](*a))
    train = ru.split_pairs(pairs, run.settings).gan_train
    train_gan(run, pairs)
    order = ru.training_order(len(train), run.settings, "gan", 1)
    loader = ru.make_loader(train, run.settings.gan_batch, run.device, order)
    assert not plain or taught == [None] * len(loader)
    assert len(seen) == 2 * len(shifted) == 2 * len(loader) and len(set(rngs)) == len(rngs)
    for number, batch in enumerate(loader):
        degraded, original, info = ru.to_device(batch, run.device)
        assert plain or (torch.equal(taught[number][1], info["hole"]) and taught[number][0].requires_grad)
        for given in seen[2 * number : 2 * number + 2]:
            assert all(one is other for one, other in zip(given, shifted[number]))
        assert torch.equal(shifted[number][0].flip(2), degraded) and torch.equal(shifted[number][2].flip(2), original)
        restored = shifted[number][1]
        assert restored.requires_grad and not torch.equal(restored, shifted[number][0])


def test_a_grey_picture_teaches_grey_and_any_other_its_colours(batch):
    degraded, original, _ = batch
    degraded[0] = degraded[0, :1]
    seen, truth, _ = ru.to_device(batch, torch.device("cpu"))
    weights = original.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)  # ITU-R BT.601
    assert torch.allclose(truth[0], (weights * original[0]).sum(0).expand(3, -1, -1), atol=1e-3)
    assert torch.equal(truth[1], original[1]) and torch.equal(seen, degraded)


def test_means_count_images_not_batches():
    means = ru.Means("here")
    means.add({"l1": torch.tensor(1.0)}, 8)
    means.add({"l1": torch.tensor(4.0)}, 1)
    assert means.result()["l1"] == pytest.approx(12 / 9)
    means.add({"l1": torch.tensor(float("nan"))}, 1)
    with pytest.raises(FloatingPointError, match="here"):
        means.result()


def test_validation_is_in_eval_mode_and_changes_nothing(run, pairs):
    generator = ru.build_generator(TINY).train()
    before = copy.deepcopy(generator.state_dict())
    loader = ru.make_loader(pairs[:5], 4, run.device)
    result = ru.validation_losses(generator, loader, run.device)
    assert generator.training and same(before, generator.state_dict())
    generator.eval()
    with torch.no_grad():
        expected = [F.l1_loss(generator(d[None]), o[None]).item() for d, o, _ in loader.dataset]
    assert result["l1"] == pytest.approx(sum(expected) / 5, abs=1e-5)
    with ru.evaluating(generator):
        assert not torch.is_grad_enabled() and not generator.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("stage", "plain"), [("pretrain", False), ("gan", False), ("gan", True)])  # with its dropout
def test_four_epochs_equal_two_and_two_more_bit_for_bit(run, pairs, places, tmp_path, stage, plain):
    train, key = (pretrain, "pretrain_epochs") if stage == "pretrain" else (train_gan, "gan_epochs")
    run = with_settings(run, mixed_precision=not plain, **(ru.PLAIN if plain else {}))
    whole = with_settings(run, **CHANGES)
    train(whole, pairs)
    moved = run._replace(places=places._replace(outputs=tmp_path / "second"))
    train(with_settings(moved, **CHANGES | {key: 2}), pairs)
    torch.rand(100)  # the global random state must not matter
    train(with_settings(moved, **CHANGES), pairs)
    one, two = (ru.load_checkpoint(r.outputs / f"{stage}_last.pth") for r in (whole, moved))
    for content in (one, two):
        for row in content["history"]:
            row.pop("seconds")
    assert len(one["history"]) == 4 and same(one, two)


def precision_of(dtype, make=ru.Precision):
    precision = make(torch.device("cpu"), wanted=False)
    precision.dtype = dtype
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == torch.float16)
    return precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_restores_and_learns_what_float32_does(run, lesson, dtype):
    settings = dataclasses.replace(TINY, width=8, full_resolution_channels=8, discriminator_width=8)
    face = ru.draw_portrait(np.random.default_rng(0), 128)
    clean = torch.stack([ru.image_transform()(ru.to_pil(np.roll(face, shift, 1))) for shift in (0, 30, 60, 90)])
    degraded = (clean + 0.2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    info, results = {"hole": torch.zeros(4, 1, 256, 256), "whole": F.avg_pool2d(degraded, 4)}, []
    for precision, of_d in ((FLOAT32, FLOAT32), (precision_of(dtype), precision_of(dtype))):
        generator, discriminator = ru.build_generator(settings), ru.build_discriminator(settings)
        optimizers = [ru.adam(network, 1e-3) for network in (generator, discriminator)]
        this, losses = with_settings(run, width=8), []
        for _ in range(8):
            losses.append(ru.pretrain_step(generator, optimizers[0], (degraded, clean, info), lesson, this, precision))
        for _ in range(4):
            with precision.autocast(generator):
                restored = generator(degraded)
            assert restored.dtype == torch.float32
            step = ru.discriminator_step(discriminator, optimizers[1], (degraded, restored, clean), of_d)
            step |= ru.generator_step(discriminator, optimizers[0], (degraded, restored, clean), None, TINY, precision)
            losses.append(step)
        results.append([{name: value.item() for name, value in step.items()} for step in losses])
    for exact, mixed in zip(*results):
        assert mixed == pytest.approx(exact, rel=0.05, abs=2e-3)
    assert results[0][7]["l1"] < results[0][0]["l1"]


def test_gradients_that_overflow_for_good_stop_the_training():
    precision = precision_of(torch.float16)
    optimizer = torch.optim.SGD([weight := torch.nn.Parameter(torch.ones(1))], 1.0)
    for _ in range(10):
        precision.update(optimizer, weight.sum() * torch.inf)
    with pytest.raises(FloatingPointError, match="the gradients are not finite"):
        for _ in range(15):
            precision.update(optimizer, weight.sum() * torch.inf)


def test_a_forward_pass_that_overflows_leaves_batch_norm_as_it_was():
    network, precision = (
        torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)),
        precision_of(torch.float16),
    )
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    for factor, same_as_before in ((1, False), (1e6, True), (1, False)):
        before = copy.deepcopy(network.state_dict())
        with torch.no_grad(), precision.autocast(network):  # a batch that only the discriminator learns from
            network(factor * torch.rand(2, 3, 8, 8))
        with precision.autocast(network):
            loss = network(factor * torch.rand(2, 3, 8, 8)).float().sum()
        precision.update(optimizer, loss)
        after = network.state_dict()
        assert not ru.not_finite({"generator": after})
        assert torch.equal(before["1.running_var"], after["1.running_var"]) == same_as_before


def test_mixed_precision_sees_grain_of_less_than_a_grey_level_as_float32_does():
    clean = ru.image_transform()(ru.to_pil(ru.draw_portrait(np.random.default_rng(0), 256)))[None]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ru.block_levels(ru.detail_of(clean))
    assert torch.equal(mixed, ru.block_levels(ru.detail_of(clean)))


def test_mixed_precision_leaves_out_a_step_whose_gradients_overflow():
    network = torch.nn.Linear(1, 1)
    optimizer, precision = torch.optim.SGD(network.parameters(), 1.0), precision_of(torch.float16)
    before, scale = copy.deepcopy(network.state_dict()), precision.scaler.get_scale()
    precision.update(optimizer, network(torch.full((1, 1), torch.inf)).sum())
    assert same(before, network.state_dict()) and precision.scaler.get_scale() < scale
    precision.update(optimizer, network(torch.ones(1, 1)).sum())
    assert network.weight.item() == pytest.approx(before["weight"].item() - 1)  # unscaled again
    other = precision_of(torch.float16)
    other.scaler.load_state_dict(precision.scaler.state_dict())
    assert other.scaler.get_scale() == precision.scaler.get_scale()


@pytest.mark.parametrize("stage", ["pretrain", "gan"])
def test_a_training_says_when_it_ends_and_stops_within_its_time(run, pairs, places, tmp_path, capsys, stage):
    train = pretrain if stage == "pretrain" else train_gan
    train(with_settings(run, **CHANGES), pairs)
    whole = capsys.readouterr().out
    assert whole.count("s, done by about ") == 4 and "stopped" not in whole
    moved = run._replace(places=places._replace(outputs=tmp_path / "second"))
    with pytest.raises(TimeoutError, match="1e-09 hours are over; run this in a new session"):
        train(with_settings(moved, **CHANGES, time_budget=1e-9), pairs)
    age = ru.time.time() - ru.psutil.Process().create_time()
    train(with_settings(moved, **CHANGES, time_budget=(age + 0.4) / 3600), pairs)
    assert f"{stage}: stopped after epoch 1 of 4" in capsys.readouterr().out
    train(with_settings(moved, **CHANGES, time_budget=1e-9), pairs)  # has something to give back, and goes no further
    assert len(ru.load_checkpoint(moved.outputs / f"{stage}_last.pth")["history"]) == 1
    train(with_settings(moved, **CHANGES), pairs)
    one, two = (ru.load_checkpoint(r.outputs / f"{stage}_last.pth") for r in (run, moved))
    assert same(one["average"], two["average"]) and len(two["history"]) == 4


@pytest.mark.parametrize(("hours", "epochs"), [(10.0, 4), (10.9999, 1)])
def test_kaggles_hours_are_counted_from_the_start_of_its_machine_and_not_of_each_training(
    run, pairs, places, monkeypatch, hours, epochs
):
    class Machine:
        def __init__(self, pid):
            assert pid == 1  # the first process of Kaggle's container

        def create_time(self):
            return ru.time.time() - hours * 3600

    monkeypatch.setattr(ru.psutil, "Process", Machine)
    seconds = iter(range(0, 1000, 5))
    monkeypatch.setattr(ru.time, "perf_counter", lambda: next(seconds))  # an epoch takes at least five
    on_kaggle = run._replace(places=places._replace(platform="Kaggle", attached=Path("/kaggle/input")))
    _, history = pretrain(with_settings(on_kaggle, **CHANGES), pairs)
    assert len(history) == epochs
    _, history = pretrain(
        with_settings(on_kaggle, **CHANGES), pairs
    )  # another session: one epoch more, or all are there
    assert len(history) == min(4, epochs + 1)
    hours = 11.1
    with pytest.raises(TimeoutError, match="gan: 11 hours are over"):
        train_gan(with_settings(on_kaggle, **CHANGES), pairs)
    assert not list(places.outputs.glob("face_restoration_*"))


def test_a_pretraining_that_is_not_finished_is_said_before_the_gan_starts_from_it(run, pairs, capsys):
    pretrain(with_settings(run, pretrain_epochs=1), pairs)
    for epochs, said in ((1, False), (2, True)):
        ru.load_pretrained(ru.build_generator(run.settings), with_settings(run, pretrain_epochs=epochs))
        assert ("the pretraining is not finished" in capsys.readouterr().out) == said
    for best, said in ((12, True), (2, False)):  # still improving after more epochs than the patience; stopped early
        rows = [{"epoch": epoch, "val_loss": abs(epoch - best)} for epoch in range(1, 13)]
        ru.write_json(run.outputs / "pretrain_history.json", rows)
        ru.load_pretrained(ru.build_generator(run.settings), with_settings(run, pretrain_epochs=50, patience=10))
        assert ("the pretraining is not finished" in capsys.readouterr().out) == said


def test_one_overflow_in_float16_does_not_stop_a_training(run, pairs, monkeypatch):
    """A step is left out; the means are those of the others."""
    monkeypatch.setattr(ru, "Precision", lambda *arguments: precision_of(torch.float16))
    restore, calls = ru.UNetGenerator.restore, []

    def overflowing(self, degraded, *whole):
        calls.append(self.training)
        overflow = self.training and calls.count(True) in (2, 13, 20)
        return restore(self, degraded * (1e6 if overflow else 1), *whole)

    monkeypatch.setattr(ru.UNetGenerator, "restore", overflowing)
    _, history = pretrain(run, pairs)
    generator, _, gan_history = train_gan(with_settings(run, every_second_batch_after=0, gan_epochs=1), pairs)
    assert calls.count(True) == 21  # two epochs of 5, one of 11; the 20th trains the discriminator only
    for row in [*history, *gan_history]:
        assert all(np.isfinite(value) for value in row.values())
    assert all(tensor.isfinite().all() for tensor in generator.state_dict().values())


def test_the_average_reaches_back_less_far_over_the_first_steps():
    """Otherwise a short training saves weights that have hardly left their first values."""
    network = torch.nn.Linear(1, 1)
    with torch.no_grad():
        network.weight.fill_(1.0)
    average, expected = ru.average_of(network, 0.9), 1.0
    average.update_parameters(network)
    with torch.no_grad():
        network.weight.fill_(0.0)
    for updates in range(1, 120):
        average.update_parameters(network)
        expected *= min(0.9, (1 + updates) / (10 + updates))
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)
        if updates == 32:
            assert expected < 1e-6
    assert ru.average_of(network, 0.0).multi_avg_fn is not None


def test_every_optimizer_gets_its_settings(run, pairs, monkeypatch):
    made, adam = [], ru.adam

    def recording(*arguments, **named):
        made.append(adam(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(ru, "adam", recording)
    pretrain(run, pairs)
    train_gan(run, pairs)
    given = [(type(o).__name__, o.defaults["lr"], o.defaults["betas"]) for o in made]
    assert given == [("Adam", 1e-3, (0.9, 0.999)), ("Adam", 1e-4, (0.5, 0.999)), ("Adam", 2e-4, (0.5, 0.999))]
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in made]
    assert rates == [pytest.approx([1e-3, 2e-3]), [1e-4, 1e-4], [2e-4]]
    norms = [[group.get("largest_norm") for group in optimizer.param_groups] for optimizer in made]
    assert norms == [[None, 1.0], [None, None], [None]]


def test_what_looks_for_grain_and_holes_learns_faster_and_nothing_is_left_out():
    generator = ru.build_generator(TINY)
    rest, fast = ru.adam(generator, 1e-3, heads=3).param_groups
    heads = [*generator.output.grain.parameters(), *generator.output.detect.parameters()]
    assert {id(p) for p in fast["params"]} == {id(p) for p in heads}
    assert len(rest["params"]) + len(heads) == len(list(generator.parameters()))
    assert (rest["lr"], fast["lr"]) == pytest.approx((1e-3, 3e-3))
    assert [group["lr"] for group in ru.adam(ru.build_discriminator(TINY), 2e-4).param_groups] == [2e-4]


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_wild_gradient_of_what_looks_for_holes_is_shortened_and_no_other(dtype):
    generator = ru.build_generator(TINY)
    optimizer = ru.adam(generator, 1e-3, heads_norm=1.0)
    rest, heads = (group["params"] for group in optimizer.param_groups)
    precision = precision_of(dtype) if dtype else FLOAT32

    def norms(factor):
        loss = factor * sum((weight - 1).sum() for part in (rest, heads) for weight in part)
        precision.update(optimizer, loss)
        return [math.sqrt(sum(weight.grad.square().sum().item() for weight in part)) for part in (rest, heads)]

    count = [sum(weight.numel() for weight in part) for part in (rest, heads)]
    assert norms(1.0) == pytest.approx([math.sqrt(count[0]), 1.0], rel=1e-4)
    small = 0.5 / math.sqrt(count[1])  # what is short enough stays as it is
    assert norms(small) == pytest.approx([small * math.sqrt(count[0]), 0.5], rel=1e-4)


@pytest.mark.parametrize("stage", ["pretrain", "gan"])
def test_samples_validation_and_what_is_saved_are_of_the_averaged_weights(run, pairs, monkeypatch, stage):
    drawn, validated, validate = [], [], ru.validation_losses
    monkeypatch.setattr(ru, "save_samples", lambda network, *a: drawn.append(copy.deepcopy(network.state_dict())))
    monkeypatch.setattr(
        ru, "validation_losses", lambda n, *a: validated.append(copy.deepcopy(n.state_dict())) or validate(n, *a)
    )
    network = (pretrain if stage == "pretrain" else train_gan)(with_settings(run, ema=0.9), pairs)[0]
    last = ru.load_checkpoint(run.outputs / f"{stage}_last.pth")
    average = {n.removeprefix("module."): v for n, v in last["average"].items() if n.startswith("module.")}
    assert not same(dict(last["generator"]), average)
    assert len(drawn) == len(validated) == 2 and same(dict(drawn[-1]), average) and same(dict(validated[-1]), average)
    assert stage == "pretrain" or same(dict(network.state_dict()), average)
    name = "pretrained_generator_best.pth" if stage == "pretrain" else "face_restoration_gan_checkpoint_epoch_2.pth"
    saved = ru.load_checkpoint(run.outputs / name)["generator"]
    assert any(same(dict(saved), dict(weights)) for weights in validated)


def test_pretraining_writes_its_files_and_keeps_the_best_epoch(run, pairs, capsys):
    generator, history = pretrain(run, pairs)
    names = {path.name for path in run.outputs.iterdir()}
    assert {"pretrained_generator_best.pth", "pretrain_sample_epoch_1.png", "pretrain_sample_epoch_2.png"} <= names
    assert {"pretrain_history.json", "pretrain_last.pth"} <= names
    best = ru.load_checkpoint(run.outputs / "pretrained_generator_best.pth")
    assert best["epoch"] == min(history, key=lambda row: row["val_loss"])["epoch"]
    assert same(dict(generator.state_dict()), dict(best["generator"]))
    assert history[0].keys() >= {"loss", "val_loss", "val_l1", "lr", "seconds"}
    capsys.readouterr()
    assert pretrain(run, pairs)[1] == history  # a finished run reloads
    assert "already done" in capsys.readouterr().out


def test_every_epoch_has_an_order_of_its_own_that_holds_every_pair_once(run, pairs, monkeypatch):
    step, seen = ru.pretrain_step, []
    monkeypatch.setattr(ru, "pretrain_step", lambda *a: seen.append(a[2][2]) or step(*a))
    train = ru.split_pairs(pairs, run.settings).pretrain_train
    pretrain(with_settings(run, pretrain_epochs=2), pairs)
    orders = [pair for info in seen for pair in zip(info["kind"], info["name"])]
    assert len(train) == 40 and len(orders) == 80  # five full batches an epoch
    first, second = orders[:40], orders[40:]
    assert sorted(first) == sorted(second) == sorted((pair.kind, pair.name) for pair in train) and first != second


def test_the_plain_recipe_trains_through_both_stages(run, pairs):
    plain = with_settings(run, **ru.PLAIN)
    _, first = pretrain(plain, pairs)
    assert "holes" not in first[0]
    generator, _, history = train_gan(plain, pairs)
    assert len(history) == 2 and "holes" not in history[0]
    loaded = ru.load_generator(plain.outputs / "face_restoration_generator_final.pth")
    assert same(dict(loaded.state_dict()), dict(generator.state_dict()))


def test_steplr_and_early_stopping_fire(run, pairs, monkeypatch, capsys):
    losses = iter([0.5, 0.4, 0.6, 0.45, 0.41, 0.1, 0.1])
    monkeypatch.setattr(ru, "validation_losses", lambda *args: {"l1": next(losses), "mse": 0.0})
    run = with_settings(run, pretrain_epochs=7, patience=3, pretrain_lr_step=2)
    _, history = pretrain(run, pairs)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5]  # best after 2, patience 3
    assert [row["lr"] for row in history] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5])
    assert ru.load_checkpoint(run.outputs / "pretrained_generator_best.pth")["epoch"] == 2
    assert "stopped early" in capsys.readouterr().out


def test_gan_schedules_fire_and_its_files_are_there(run, pairs, monkeypatch, capsys):
    steps = []
    original = ru.generator_step
    monkeypatch.setattr(ru, "generator_step", lambda *args: steps.append(1) or original(*args))
    run = with_settings(run, gan_epochs=4, every_second_batch_after=2, checkpoint_every=2, gan_lr_step=3)
    generator, _, history = train_gan(run, pairs)
    assert "FROM SCRATCH" in capsys.readouterr().out
    assert len(steps) == 11 + 11 + 6 + 6  # 45 pairs in full batches of 4
    assert [row["lr_g"] for row in history] == pytest.approx([1e-4] * 3 + [1e-5])
    assert [row["lr_d"] for row in history] == pytest.approx([2e-4] * 3 + [2e-5])
    assert history[0].keys() >= {"d_real", "d_fake", "g_adv", "g_l1", "val_l1", "seconds"}
    names = {path.name for path in run.outputs.iterdir()}
    assert {f"face_restoration_gan_checkpoint_epoch_{n}.pth" for n in (2, 4)} <= names
    assert "face_restoration_gan_checkpoint_epoch_3.pth" not in names
    assert {"face_restoration_generator_final.pth", "face_restoration_discriminator_final.pth"} <= names
    assert {f"gan_sample_epoch_{n}.png" for n in range(1, 5)} <= names
    loaded = ru.load_generator(run.outputs / "face_restoration_generator_final.pth")
    assert not loaded.training and same(dict(loaded.state_dict()), dict(generator.state_dict()))


def test_gan_starts_from_the_pretrained_weights(run, pairs, capsys):
    pretrained, _ = pretrain(run, pairs)
    generator = ru.build_generator(run.settings)
    assert ru.load_pretrained(generator, run) == ru.weights_id(pretrained.state_dict())
    assert same(dict(generator.state_dict()), dict(pretrained.state_dict()))


def test_a_gan_run_from_scratch_is_not_continued_as_one_from_pretrained_weights(run, pairs):
    train_gan(run, pairs)
    pretrain(run, pairs)
    with pytest.raises(ValueError, match="pretrained weights was"):
        train_gan(run, pairs)


def test_the_output_of_05_alone_is_enough_to_go_on_from(run, pairs, places, tmp_path):
    pretrain(run, pairs)
    folders = [places.outputs, tmp_path / "second", tmp_path / "third"]
    for epochs, before, after in ((1, *folders[:2]), (2, *folders[1:])):
        later = run._replace(places=places._replace(outputs=after, attached=before))
        *_, history = train_gan(with_settings(later, gan_epochs=epochs), pairs)
    assert len(history) == 2


def test_best_weights_that_are_gone_are_named(run, pairs):
    pretrain(run, pairs)
    (run.outputs / "pretrained_generator_best.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"pretrained_generator_best\.pth is gone"):
        pretrain(run, pairs)


def test_weights_of_another_run_are_not_replaced_by_attached_ones(run, pairs, places, tmp_path):
    pretrain(run, pairs)
    other = run._replace(places=places._replace(outputs=tmp_path / "other"))
    pretrain(with_settings(other, pretrain_lr=0.01), pairs)
    (tmp_path / "other" / "pretrain_last.pth").unlink()
    both = run._replace(places=places._replace(outputs=tmp_path / "other", attached=places.outputs))
    with pytest.raises(ValueError, match="pretrain_lr"):
        pretrain(both, pairs)


@pytest.mark.parametrize("stage", ["pretrain", "gan"])
def test_a_stage_attached_from_an_earlier_session_goes_on_in_the_outputs(run, pairs, places, tmp_path, stage):
    train, key = (pretrain, "pretrain_epochs") if stage == "pretrain" else (train_gan, "gan_epochs")
    train(with_settings(run, **{key: 1}), pairs)
    later = run._replace(places=places._replace(outputs=tmp_path / "new", attached=places.outputs))
    _, *_, history = train(with_settings(later, **{key: 2}), pairs)
    assert len(history) == 2
    theirs, ours = (
        {path.name for path in folder.glob("[!.i]*") if path.is_file()} for folder in (places.outputs, tmp_path / "new")
    )
    assert theirs <= ours and f"{stage}_sample_epoch_2.png" in ours
    train(with_settings(later._replace(places=places), **{key: 2}), pairs)
    one, two = (ru.load_checkpoint(folder / f"{stage}_last.pth") for folder in (places.outputs, tmp_path / "new"))
    assert same(one["generator"], two["generator"])
    other = later.places._replace(outputs=tmp_path / "third")
    with pytest.raises(ValueError, match="detach"):
        train(with_settings(later._replace(places=other), noise_sigma=9), pairs)
    assert not list((tmp_path / "third").glob("[!.]*"))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(run, pairs, monkeypatch):
    pretrain(with_settings(run, pretrain_epochs=1), pairs)
    good = (run.outputs / "pretrain_last.pth").read_bytes()
    real = ru.image_losses
    monkeypatch.setattr(ru, "image_losses", lambda *a: {k: v * float("nan") for k, v in real(*a).items()})
    with pytest.raises(FloatingPointError, match="epoch 2"):
        pretrain(run, pairs)
    assert (run.outputs / "pretrain_last.pth").read_bytes() == good


@pytest.mark.parametrize("train", [pretrain, train_gan])
def test_other_settings_or_faces_are_refused_by_name(run, pairs, train):
    train(run, pairs)
    before = {path: path.stat().st_mtime_ns for path in run.outputs.glob("*.pth")}
    with pytest.raises(ValueError, match=r"noise_sigma was 25\.0, is 9"):
        train(with_settings(run, noise_sigma=9), pairs)
    with pytest.raises(ValueError, match="faces"):
        train(run._replace(faces="something else"), pairs)
    assert before == {path: path.stat().st_mtime_ns for path in run.outputs.glob("*.pth")}


def test_foreign_and_damaged_checkpoints_are_refused(run, tmp_path):
    path = tmp_path / "x.pth"
    with pytest.raises(FileNotFoundError, match=r"x\.pth"):
        ru.load_generator(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"x\.pth.*not a checkpoint of this project"):
        ru.load_generator(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        ru.load_generator(path)
    ru.save_checkpoint(path, run, discriminator={})
    with pytest.raises(ValueError, match="without a generator"):
        ru.load_generator(path)


class Payload:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"format": ru.CHECKPOINT_FORMAT, "generator": Payload(tmp_path / "trace")}, tmp_path / "x.pth")
    with pytest.raises(ValueError):
        ru.load_generator(tmp_path / "x.pth")
    assert not (tmp_path / "trace").exists()


def test_a_missing_file_names_its_notebook_and_attached_ones_are_found(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="04_pretrain"):
        ru.require_artifact("pretrained_generator_best.pth", run, "04_pretrain_generator")
    attached = run._replace(places=run.places._replace(attached=tmp_path / "input"))
    (tmp_path / "input" / "nb").mkdir(parents=True)
    (tmp_path / "input" / "nb" / "a.pth").touch()
    assert ru.require_artifact("a.pth", attached, "04") == tmp_path / "input" / "nb" / "a.pth"


def test_atomic_writing_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), ru.atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
