"""Both networks: layers, shapes, ranges, and what they refuse."""

import colorsys
import dataclasses
import math

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY
from torch import nn

import restoration_utils as ru


def test_full_size_generator_has_the_layers_and_widths_of_the_spec():
    with torch.device("meta"):
        generator, discriminator = ru.UNetGenerator(), ru.PatchGANDiscriminator()
    down = [m for layer in generator.encoder for m in layer if isinstance(m, nn.Conv2d)]
    up = [m for layer in generator.decoder for m in layer if isinstance(m, nn.ConvTranspose2d)]
    assert [m.out_channels for m in down] == [64, 128, 256, 512, 512, 512, 512, 512]
    assert [m.out_channels for m in up] == [512, 512, 512, 512, 256, 128, 64]
    assert [m.in_channels for m in up] == [512, 1024, 1024, 1024, 1024, 512, 256]  # from the second on with a skip
    assert all((m.kernel_size, m.stride) == ((4, 4), (2, 2)) for m in down + up)
    judge = [m for m in discriminator.layers if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in judge] == [64, 128, 256, 512, 1]
    assert [m.stride[0] for m in judge] == [2, 2, 2, 1, 1] and judge[0].in_channels == 6
    assert not any(isinstance(m, nn.Sigmoid) for m in discriminator.modules())


def test_maps_go_down_to_1_and_back_and_the_output_is_in_range():
    generator, sizes = ru.build_generator(TINY), []
    for layer in [*generator.encoder, *generator.decoder]:
        layer.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    restored = generator(torch.rand(1, 3, 256, 256) * 2 - 1)  # one image, in training mode
    assert sizes == [128, 64, 32, 16, 8, 4, 2, 1, 2, 4, 8, 16, 32, 64, 128]
    assert restored.shape == (1, 3, 256, 256)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(30)  # whatever the weights
        restored = generator(torch.rand(2, 3, 256, 256) * 2 - 1)
    assert restored.abs().max() <= 1


def test_windows_of_photographs_are_mended_in_the_same_range_and_their_damage_found_alike():
    generator = ru.build_generator(TINY).eval()
    with torch.no_grad():
        generator.output.propose.weight.normal_(), generator.output.detect.hole.weight.normal_()
        assert generator.mend(torch.full((1, 3, 256, 256), 1.25), torch.ones(1, 1, 1, 1)).abs().max() <= 1
        seen = torch.rand(2, 3, 256, 256) * 2 - 1
        assert torch.equal(generator.find_damage(seen), generator.output(generator.features(seen), seen).hole)


def test_a_noise_level_given_takes_the_place_of_the_picture_s_own():
    layer = ru.OutputLayer(4, 4)
    noisy = 0.2 * torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.grain.noise.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        detail = ru.detail_of(noisy)
        own = ru.noise_level(ru.block_levels(detail))
        units = (ru.grain_unit(detail, level) for level in (3 * own, own, None))
        other, same, none = (layer.correct(noisy, detail, unit, torch.zeros(1))[1] for unit in units)
    assert torch.equal(same, none) and (other - same).abs().max() > 0.01


def test_every_skip_matters():
    generator = ru.build_generator(TINY).eval()
    image = torch.rand(1, 3, 256, 256) * 2 - 1

    def without_skip(module, inputs):
        """The second half of a layer's input is the skip."""
        x, *rest = inputs
        return torch.cat([x[:, : x.shape[1] // 2], torch.zeros_like(x[:, x.shape[1] // 2 :])], 1), *rest

    with torch.no_grad():
        generator.output.propose.weight.normal_()
        before = generator(image)
        for layer in [*generator.decoder[1:], generator.output]:
            handle = layer.register_forward_pre_hook(without_skip)
            assert not torch.equal(generator(image), before)
            handle.remove()


def curves_for(black=(0, 0, 0), contrast=(1, 1, 1), gamma=(1, 1, 1), value=1, saturation=1):
    """What `recolor` takes, from what a reader would say."""
    numbers = [*black, *map(math.log, (*contrast, *gamma, value, saturation))]
    return torch.tensor([numbers], dtype=torch.float32)


def test_recolor_can_undo_both_sorts_of_fading_exactly_and_hsv_is_meant():
    original, v, s = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1, 0.8, 0.5
    unit = (original + 1) / 2
    assert torch.allclose(ru.recolor(original, curves_for()), original, atol=1e-3)
    top = unit.amax(1, keepdim=True)
    faded = v * (top - s * (top - unit)) * 2 - 1
    assert torch.allclose(ru.recolor(faded, curves_for(value=1 / v, saturation=1 / s)), original, atol=1e-3)
    hsv = [colorsys.rgb_to_hsv(*image[:, 0, 0].tolist()) for image in (unit[0], (faded[0] + 1) / 2)]
    assert [b / a for a, b in zip(*hsv)] == pytest.approx([1, 0.5, 0.8], abs=1e-5)  # that was the damage
    black, white, gamma = (
        torch.tensor(x).view(1, 3, 1, 1) for x in ((0.1, 0.2, 0.0), (0.9, 0.7, 1.0), (1.2, 0.8, 1.0))
    )
    print_ = black + (white - black) * unit**gamma
    undo = curves_for(*((x.flatten().tolist()) for x in (black, 1 / (white - black), 1 / gamma)))
    assert torch.allclose(ru.recolor(2 * print_ - 1, undo), original, atol=2e-3)


def test_the_color_head_stretches_and_acts_only_when_it_is_sure():
    head, whole = ru.ColorHead(4).eval(), torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        bias = head.layers[-1].bias
        bias[:11] = torch.tensor([9.0] * 6 + [0.3, 0.0, 0.0, 0.2, -0.2])
        for logits in ((-9.0, -9.0), (-0.25, 0.0)):  # probabilities up to 0.27 and 0.5
            bias[11:] = torch.tensor(logits)
            assert head(whole)[0].abs().max() < 1e-6
        bias[11:] = torch.tensor((5.0, -5.0))  # pale, but not aged
        assert head(whole)[0][:, :9].abs().max() < 1e-6 and head(whole)[0][:, 9:].abs().min() > 0.1
        bias[11:] = 5.0
        curves, faded = head(whole)
        stretched = (ru.recolor(whole, curves_for(black=(0, 0, 0))) + 1) / 2
        low, high = stretched.flatten(2).quantile(0.01, 2), stretched.flatten(2).quantile(0.99, 2)
        assert (faded == 20).all() and torch.allclose(curves[:, :3], low, atol=2e-3)
        assert torch.allclose(curves[:, 3:6], -(high - low).log(), atol=5e-3)
        gains = [0.9 * math.tanh(0.6), 0, 0, 1.5 * math.tanh(0.4), -1.5 * math.tanh(0.4)]
        assert torch.allclose(curves[:, 6:], torch.tensor(gains).expand(2, -1), atol=1e-5)
        bias[11:] = torch.tensor((-0.0502, 0.1548))  # probabilities of 0.45 and 0.65: half of each doubt
        half = head(whole)[0]
        assert torch.allclose(half[:, :3], low / 2, atol=2e-3)
        assert torch.allclose(half[:, 9:], curves[:, 9:] / 2, atol=2e-3)
        bias[11:] = 0.0
        assert torch.allclose(head(whole, doubting=False)[0][:, :3], low / 2, atol=2e-3)  # as far as it is likely


def test_the_color_head_decides_by_quantiles_only():
    torch.manual_seed(0)
    head, whole = ru.ColorHead(), torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        head.layers[-1].weight.normal_()
        head.layers[-1].bias[11:] = 9.0
    assert head(whole)[0].abs().max() > 1e-2
    shuffled = whole.flatten(2)[..., torch.randperm(4096)].view_as(whole)  # where things are does not matter
    assert torch.allclose(head(whole)[0], head(shuffled)[0], atol=1e-5)


def test_doubt_leaves_things_alone():
    probabilities = torch.tensor([0.0, 0.4, 0.5, 0.65, 0.8, 1.0])
    assert ru.doubtless(probabilities, 0.5, 0.8).tolist() == pytest.approx([0, 0, 0, 0.5, 1, 1])


def test_the_grain_head_starts_at_zero_and_leaves_what_has_no_detail_alone():
    head, detail = ru.GrainHead(4), torch.randn(1, 3, 256, 256)
    assert head(detail).abs().max() == 0
    with torch.no_grad():
        head.noise.weight.normal_()
        head.features[0].bias.zero_(), head.features[2].bias.zero_(), head.features[4].bias.zero_()
    assert head(torch.zeros_like(detail)).abs().max() == 0 and head(detail).abs().max() > 0.1
    assert head(detail + 1).mean().abs() < 0.01 * head(detail + 1).abs().mean()  # colours stay


def test_half_the_noise_is_taken_away_where_there_is_half_of_it():
    layer, noisy = ru.OutputLayer(4, 4).eval(), torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.propose.weight.zero_()
        layer.detect.hole.bias.fill_(-9)
        layer.grain.noise.weight.normal_(0, 0.03)
        taken = [image - layer(torch.zeros(1, 4, 128, 128), image).restored for image in (0.1 * noisy, 0.05 * noisy)]
    assert taken[0].abs().mean() > 0.01 and torch.allclose(taken[0] / 2, taken[1], atol=2e-3)


def level_of(images):
    return ru.noise_level(ru.block_levels(ru.detail_of(images)))


def test_the_noise_level_is_that_of_the_flattest_parts():
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-0.8, 0.8, 256)
    scene = (x[:, None] + torch.where(x > 0, torch.sin(900 * x) / 5, 0.0)).expand(2, 3, 256, 256)  # right half: texture
    sigma = torch.tensor([0.02, 0.1]).view(2, 1, 1, 1)
    level = level_of(scene + sigma * torch.randn(2, 3, 256, 256, generator=generator))
    assert level.flatten().tolist() == pytest.approx([0.02, 0.1], rel=0.1)
    assert level_of(torch.zeros(1, 3, 256, 256)) == 0
    noisy = 0.1 * torch.randn(1, 3, 256, 256, generator=generator)
    noisy[:, :, :64], noisy[:, :, :, :64] = -1, 0.5  # a black bar and a grey one, as in scans
    assert level_of(noisy).item() == pytest.approx(0.1, rel=0.1)
    black = torch.zeros(1, 3, 256, 256, requires_grad=True)
    level_of(black).sum().backward()
    assert torch.isfinite(black.grad).all()


def output_layer_with(grain=0.0, hole=-20.0):
    """An output layer whose heads say what they are told to, and whose U-Net says nothing."""
    layer = ru.OutputLayer(4, 4)
    with torch.no_grad():
        layer.propose.weight.zero_()
    layer.grain.forward = lambda scaled: torch.full_like(scaled, grain)
    layer.detect.forward = lambda degraded, detail, scaled: hole * torch.ones_like(degraded[:, :1])
    return layer


def test_the_output_layer_denoises_then_fills_holes_from_around():
    features, seen = torch.zeros(1, 4, 128, 128), torch.rand(1, 3, 256, 256) - 0.5
    same = output_layer_with()(features, seen)
    assert torch.allclose(same.restored, seen, atol=1e-5)
    darker, noisy = output_layer_with(grain=2.0), 0.1 * torch.randn(1, 3, 256, 256)
    assert torch.allclose(darker(features, noisy).restored, noisy - 0.2, atol=0.03)
    hole = torch.full((1, 1, 256, 256), -20.0)
    hole[:, :, 100:140, 90:150] = 20.0
    grey = torch.where(hole > 0, 1.0, 0.3).expand(1, 3, 256, 256)
    filled = output_layer_with(hole=hole)(features, grey)
    assert torch.allclose(filled.restored, torch.full_like(grey, 0.3), atol=1e-4)
    unsure = output_layer_with(hole=hole.clamp(-20, 0.1))(features, grey).restored[..., 120, 120]
    half = torch.tensor(0.1).sigmoid()  # sure by that much; and what is to be filled is no source
    assert torch.allclose(unsure, 1 + half * (0.3 - 1), atol=0.01)
    kept = output_layer_with(hole=hole.clamp(-20, -0.5)).eval()(features, grey)  # but in doubt nothing is repainted
    assert torch.allclose(kept.restored, grey, atol=0.01)
    out_of_range = torch.full_like(grey, 1.25)  # as recolouring leaves it
    assert output_layer_with(hole=hole)(features, out_of_range).restored.abs().max() <= 1


def test_the_plain_generator_is_the_recipe_as_commonly_written():
    generator = ru.build_generator(dataclasses.replace(TINY, plain=True))
    kinds = [type(module) for module in generator.modules()]
    assert kinds.count(nn.InstanceNorm2d) == 6 + 7 and nn.BatchNorm2d not in kinds
    assert [m.p for m in generator.modules() if isinstance(m, nn.Dropout)] == [0.5] * 3
    restoration = generator.eval().restore(torch.rand(2, 3, 256, 256) * 2 - 1)
    assert restoration.restored.shape == (2, 3, 256, 256) and restoration.hole is None
    assert restoration.restored.abs().max() < 1


def test_plain_is_a_setting_of_every_profile(monkeypatch):
    for name, profile in ru.PROFILES.items():
        monkeypatch.setenv("RESTORATION_PROFILE", name)
        monkeypatch.setenv("RESTORATION_PLAIN", "1")
        plain = dataclasses.asdict(ru.choose_settings(torch.device("cpu")))
        changed = {"plain": True} | dict.fromkeys(
            ("heads_weight", "color_lessons", "grain_lessons", "ema", "shift", "scenes", "windows"), 0
        )
        changed |= {"kinds": ru.KINDS[:3], "undamaged": False}
        assert plain == dataclasses.asdict(profile) | changed
    assert not any(profile.plain for profile in ru.PROFILES.values())


def test_local_means_agree_with_opencv():
    image = np.random.default_rng(0).random((256, 256, 3), dtype=np.float32)
    ours = ru.local_mean(torch.from_numpy(image).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    assert np.allclose(ours, cv2.blur(image, (5, 5), borderType=cv2.BORDER_REFLECT_101), atol=1e-5)


def looked_at(head, image):
    """What a hole head says about an image, with a noise level of a tenth."""
    detail = ru.detail_of(image)
    return head(image, detail, detail / 0.1)


def test_the_hole_head_starts_with_rare_holes_and_can_see_flat_white_black_and_noisy_patches():
    torch.manual_seed(1)
    head = ru.HoleHead(4).eval()
    image = 0.6 * torch.rand(1, 3, 256, 256) - 0.3
    assert torch.allclose(looked_at(head, image), torch.full((1, 1, 256, 256), -3.0))
    with torch.no_grad():
        head.hole.weight.normal_()
        before = looked_at(head, image)
        for patch in (0.0, 1.0, -1.0, 2 * torch.rand(1, 3, 40, 40) - 1):  # flat grey, white, black, noise
            damaged = image.clone()
            damaged[:, :, 100:140, 100:140] = patch
            change = (looked_at(head, damaged) - before).abs()[0, 0]
            assert change[110:130, 110:130].mean() > 0.01 and change[:40, :40].max() < 1e-4  # there, and not far away


def test_clues_of_the_hole_head_are_colourful_speckle_and_what_stands_out_from_the_grain():
    head, seen = ru.HoleHead(2), []
    head.features[0].register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0][0]))
    image = torch.rand(1, 3, 256, 256) - 0.5
    line = torch.zeros(1, 1, 256, 256)
    line[..., 128] = 0.2
    for picture in (image, image[:, :1].expand(1, 3, 256, 256), line.expand(1, 3, 256, 256)):
        looked_at(head, picture)
    assert seen[0][8].mean() > 0.3  # noise in every channel by itself, and in all alike
    assert seen[1][8].mean().item() == pytest.approx(-1, abs=1e-3)
    assert seen[2][9:, :, 128].min() > 0.3 and seen[2][9:, :, :120].abs().max() < 0.01


def test_filling_from_around_keeps_what_is_known_and_spreads_it_into_holes():
    image, known = torch.rand(2, 3, 256, 256) * 2 - 1, torch.ones(2, 1, 256, 256)
    assert torch.equal(ru.fill_from_around(image, known), image)
    known[:, :, 90:170, 60:150] = 0
    covered = torch.where(known > 0, image, torch.tensor(5.0))
    filled = ru.fill_from_around(covered, known)
    assert torch.allclose(filled, torch.where(known > 0, image, filled)) and filled.abs().max() <= 1
    x = torch.linspace(-1, 1, 256)
    ramp = (x + x[:, None]).div(2).expand(1, 3, 256, 256)
    filled = ru.fill_from_around(ramp * known[:1], known[:1])
    assert (filled - ramp).abs().max() < 0.2  # a slope goes on across the hole, which covers a range of 0.66
    step = torch.where(x > -0.2, 1.0, -1.0).expand(1, 3, 256, 256)
    filled = ru.fill_from_around(step * known[:1], known[:1])
    assert filled[0, 0, 130, 61] < -0.9 and filled[0, 0, 130, 148] > 0.9  # what is near counts, not the mean of all
    assert ru.fill_from_around(image, torch.zeros_like(known)).abs().max() == 0  # nothing known at all: grey


@pytest.mark.parametrize("shape", [(1, 3, 128, 128), (1, 3, 256, 255), (1, 1, 256, 256), (3, 256, 256)])
def test_other_shapes_are_refused_by_the_networks_themselves(shape):
    wrong, right = torch.zeros(shape), torch.zeros(1, 3, 256, 256)
    with pytest.raises(ValueError, match=r"256, 256"):
        ru.build_generator(TINY)(wrong)
    for pair in ((wrong, right), (right, wrong)):
        with pytest.raises(ValueError, match="discriminator"):
            ru.build_discriminator(TINY)(*pair)


@pytest.mark.parametrize("plain", [False, True])
def test_discriminator_gives_30_x_30_scores_of_70_x_70_px_and_sees_both_images(plain):
    discriminator = ru.PatchGANDiscriminator(2, plain).eval()
    assert any(isinstance(m, nn.BatchNorm2d) for m in discriminator.modules()) == plain
    images = [torch.rand(1, 3, 256, 256, requires_grad=True) for _ in range(2)]
    scores = discriminator(*images)
    assert scores.shape == (1, 1, 30, 30)
    scores[0, 0, 15, 15].backward()
    for image in images:
        rows, columns = torch.nonzero(image.grad[0].abs().sum(0), as_tuple=True)
        assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (70, 70)


def test_the_discriminator_sees_large_changes_magnified_and_small_ones_not():
    discriminator, degraded = ru.PatchGANDiscriminator(2), torch.rand(1, 3, 256, 256) - 0.5
    seen = []
    discriminator.layers[0].register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    for levels, change in ((3, 0), (5, 10 / 127.5), (-14, -100 / 127.5)):
        candidate = (degraded + levels / 127.5).requires_grad_()
        discriminator(degraded, candidate)
        assert torch.allclose(seen[-1][:, :3], torch.full_like(degraded, change), atol=1e-5)
        assert torch.equal(seen[-1][:, 3:], candidate)
        (gradient,) = torch.autograd.grad(seen[-1][:, :3].sum(), candidate)
        assert torch.equal(gradient, torch.full_like(degraded, 10 if change else 0))


def test_building_is_seeded_and_leaves_the_global_random_state_alone():
    torch.rand(3)  # away from the state that an earlier building may have left
    state = torch.get_rng_state()
    first, second = ru.build_generator(TINY).state_dict(), ru.build_generator(TINY).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.get_rng_state())


def test_convolving_both_is_the_convolution_of_the_concatenation():
    convolution, features, images = torch.nn.Conv2d(7, 5, 3, padding=1), torch.rand(2, 4, 8, 8), torch.rand(2, 3, 8, 8)
    expected = convolution(torch.cat([features, images], 1))
    assert torch.allclose(ru.convolve_both(convolution, features, images), expected, atol=1e-6)
