"""Would the tests notice? Breaks one line of the module at a time and runs the tests that should fail.

    python tests/sabotage.py [WORD ...]     only sabotages whose name contains one of the words

Prints a table and exits with 1 if a sabotage goes unnoticed. Some ten minutes; not part of the test run, which only
checks that every sabotage still finds its line.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Sabotage(NamedTuple):
    """A line's `old` text, which must occur exactly once in the module, what takes its place, and who should notice."""

    name: str
    old: str
    new: str
    tests: str  # for pytest's -k


SABOTAGES = (
    Sabotage("no clip", "return cv2.add(image, grain.reshape(image.shape), dtype=cv2.CV_8U)",
             "return image + grain.reshape(image.shape).astype(np.uint8)", "clips_instead or wrap"),
    Sabotage("no detach", "discriminator(degraded, restored.detach())", "discriminator(degraded, restored)",
             "discriminator_step"),
    Sabotage("no eval()", "    network.eval()\n", "", "eval_mode or comparison_restores"),
    Sabotage("no no_grad", "        with torch.inference_mode():\n            yield\n", "        yield\n", "eval_mode"),
    Sabotage("random state not restored", "    with torch.random.fork_rng(devices=[]):\n        "
             'torch.manual_seed(derive_seed(settings.seed, "generator"))', "    if True:\n        "
             'torch.manual_seed(derive_seed(settings.seed, "generator"))', "building_is_seeded"),
    Sabotage("random state of an epoch not set", "                torch.manual_seed("
             "derive_seed(self.run.settings.seed, self.name, self.epoch) + self.run.team.rank)\n", "", "four_epochs"),
    Sabotage("lock left to the garbage collector", "    finally:\n        lock.release()\n", "",
             "while_it_was_degraded"),
    Sabotage("no os.replace", 'temporary = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}{path.suffix}")',
             "temporary = path", "atomic"),
    Sabotage("weights_only", "weights_only=True", "weights_only=False", "hostile or code_in_a_checkpoint"),
    Sabotage("weights not finite, loading", '        if bad := not_finite(content):\n            raise ValueError(',
             '        if bad := []:\n            raise ValueError(', "hostile"),
    Sabotage("weights not finite, saving", '    if bad := not_finite(content):\n        raise FloatingPointError(',
             '    if bad := []:\n        raise FloatingPointError(', "never_saved"),
    Sabotage("split by file", "if third_of[pair.content] == part", "if len(pair.kind) % 3 == part", "splits_are"),
    Sabotage("split by name", "pair.content for pair in by_name", "pair.name for pair in by_name",
             "splits_are or copies_of_one"),
    Sabotage("seed without the file name", "return derive_seed(settings.seed, self.kind, self.name)",
             "return derive_seed(settings.seed, self.kind)", "says_what_made_it"),
    Sabotage("older code not noticed", 'fingerprint(drawn, [getattr', 'fingerprint([getattr', "older_version"),
    Sabotage("JPEG quality not in what made a file", '(*names, "jpeg_quality")', "names", "every_setting_of_the_deg"),
    Sabotage("0.1 of the MSE", "mse_weight: float = 0.1", "mse_weight: float = 0.2", "settings_are_those"),
    Sabotage("MSE left out", 'loss = losses["l1"] + run.settings.mse_weight * losses["mse"]', 'loss = losses["l1"]',
             "pretrain_step"),
    Sabotage("100 of the L1", "l1_weight: float = 100.0", "l1_weight: float = 10.0", "settings_are_those"),
    Sabotage("L1 left out", 'losses["g_adv"] + settings.l1_weight * losses["g_l1"]', 'losses["g_adv"]',
             "generator_step"),
    Sabotage("best is worst", 'min(history, key=lambda row: row["val_loss"])',
             'max(history, key=lambda row: row["val_loss"])', "early_stopping or best_epoch"),
    Sabotage("patience", "len(history) - best_epoch(history) >= settings.patience",
             "len(history) - best_epoch(history) <= -settings.patience", "early_stopping"),
    Sabotage("pretraining's StepLR",
             '            row["lr"] = scheduler.get_last_lr()[0]\n            scheduler.step()\n',
             '            row["lr"] = scheduler.get_last_lr()[0]\n', "steplr"),
    Sabotage("generator's StepLR", "            scheduler_g.step()\n", "", "gan_schedules"),
    Sabotage("discriminator's StepLR", "            scheduler_d.step()\n", "", "gan_schedules"),
    Sabotage("every second batch", "or number % 2 == 0", "or True", "gan_schedules"),
    Sabotage("learning rate, pretraining", "lr, heads = s.pretrain_lr,", "lr, heads = s.generator_lr,",
             "every_optimizer"),
    Sabotage("learning rate, discriminator", "prepare(discriminator, lr=s.discriminator_lr)",
             "prepare(discriminator, lr=s.generator_lr)", "every_optimizer"),
    Sabotage("betas", ", betas=s.gan_betas)", ")", "every_optimizer"),
    Sabotage("pretraining's samples by the last step", "save_samples(average.module, samples, sample)",
             "save_samples(generator, samples, sample)", "averaged_weights"),
    Sabotage("GAN's samples by the last step", 'save_samples(average.module, samples, run.outputs / f"gan_',
             'save_samples(generator, samples, run.outputs / f"gan_', "averaged_weights"),
    Sabotage("GAN validated by the last step",
             'val = validation_losses(average.module, validation_loader, run.device, team)\n            row |= {"val',
             'val = validation_losses(generator, validation_loader, run.device, team)\n            row |= {"val',
             "averaged_weights"),
    Sabotage("pretraining validated by the last step",
             'val = validation_losses(average.module, validation_loader, run.device, team)\n            row["loss"]',
             'val = validation_losses(generator, validation_loader, run.device, team)\n            row["loss"]',
             "averaged_weights"),
    Sabotage("pretraining saves the last step", "epoch=epoch, generator=average.module.state_dict()",
             "epoch=epoch, generator=generator.state_dict()", "averaged_weights"),
    Sabotage("GAN's checkpoint of the last step", 'weights = {"generator": average.module.state_dict()}',
             'weights = {"generator": generator.state_dict()}', "averaged_weights"),
    Sabotage("GAN leaves the last step", "        generator.load_state_dict(average.module.state_dict())\n", "",
             "averaged_weights"),
    Sabotage("average without warm-up", "get_ema_multi_avg_fn(min(decay, warm))", "get_ema_multi_avg_fn(decay)",
             "reaches_back"),
    Sabotage("network's values cut off", "* 127.5).round().to(torch.uint8)", "* 127.5).to(torch.uint8)",
             "rounded_to_8_bits or metrics_agree"),
    Sabotage("restored values cut off", "np.rint(mixed) if target.dtype == np.uint8 else mixed",
             "mixed", "rounded_to_8_bits"),
    Sabotage("fading cut off", "return cv2.multiply(faded, gain, dtype=cv2.CV_8U)",
             "return cv2.multiply(faded, gain, dtype=cv2.CV_32F).astype(np.uint8)", "colorsys"),
    Sabotage("outline of holes kept", "[1], np.ones((3, 3), np.uint8))", "[1], np.ones((1, 1), np.uint8))", "agree"),
    Sabotage("plausible is always enough", "enough = 0 if np.count_nonzero(mask == 2)",
             "enough = 0 if np.count_nonzero(mask >= 0)", "plausible"),
    Sabotage("the grain head blamed for everything", "with torch.no_grad():  # learnt from lessons of its own",
             "if True:", "colour_and_grain"),
    Sabotage("texture taken for noise", "    return level * doubtless(level / quarter.clamp(min=1e-6), 0.75, 0.9)",
             "    return level", "noise_is_that"),
    Sabotage("windows change what is large", "            restored = restored - "
             "_smooth(restored - seen.clamp(-1, 1), 16)\n", "            pass\n", "no_seams"),
    Sabotage("clipped highlights have a halo", "_smooth(restored - seen.clamp(-1, 1), 16)",
             "_smooth(restored - seen, 16)", "no_halo"),
    Sabotage("windows judge their own noise", "if level is None else level).clamp", "if True else level).clamp",
             "noise_level_given"),
    Sabotage("noise is judged by what is burnt out", "silent = (cut == 0).any(2) | (cut == 255).any(2)",
             "silent = (cut < 0).any(2)", "noise_is_that"),
    Sabotage("noise is judged by what was filled", "            if repainted is not None:", "            if False:",
             "noise_is_that"),
    Sabotage("means of slivers", "cv2.threshold(share, 63, 255,", "cv2.threshold(share, 0, 255,", "one_colour"),
    Sabotage("colours judged with the damage", "        if damage.any():  #", "        if False:  #", "torn_corner"),
    Sabotage("flat grey gets contrast", "if one_tone is None and not (grey and lightest - darkest >= LEAST_CONTRAST):",
             "if one_tone is None and not grey:", "red_wall"),
    Sabotage("a curve for each channel of grey", "        curves[:, :9] = curves[:, :9].view(1, 3, 3).mean(2)."
             "repeat_interleave(3, 1)\n", "        pass\n", "one_curve"),
    Sabotage("the whole picture's changes elsewhere", "((sx, 0, (x + 0.5) * sx - 0.5), (0, sy, (y + 0.5) * sy - 0.5))",
             "((sx, 0, 0), (0, sy, 0))", "slope"),
    Sabotage("a given mask is widened", "damage = cv2.threshold(mask, 127, 255, cv2.THRESH_BINARY)[1]",
             "damage = cv2.dilate(cv2.threshold(mask, 127, 255, cv2.THRESH_BINARY)[1], np.ones((3, 3)))",
             "mask_is_trusted"),
    Sabotage("specks as doubtful as anything", "SPECK_MORE = 14, 3, 0.05", "SPECK_MORE = 14, 3, 0.0", "specks"),
    Sabotage("detection is not taught by a step of the GAN", "loss + settings.l1_weight * settings.heads_weight *",
             "loss + 0 *", "generator_step"),
    Sabotage("detection is not taught in the GAN stage", 'holes = None if generator.plain else (restoration.hole, '
             'info["hole"])', "holes = None", "both_steps"),
    Sabotage("specks judged with their rim", "squares > (threshold + SPECK_MORE) * 255 * sums",
             "sums > threshold * 255 * area", "specks"),
    Sabotage("specks of any thickness", "(radius <= SPECK_RADIUS) & ", "", "specks"),
    Sabotage("specks that a larger size denies", " & (denied == 0)", "", "specks"),
    Sabotage("heads learn no faster", '"heads": s.heads_lr, ', "", "every_optimizer"),
    Sabotage("a wild batch undoes the detector", ', "heads_norm": s.heads_norm}', "}", "every_optimizer"),
    Sabotage("gradients of any length", 'if group.get("largest_norm"):', "if False:", "wild_gradient"),
    Sabotage("gradients shortened before they are unscaled", "        self.scaler.unscale_(optimizer)\n", "",
             "wild_gradient"),
    Sabotage("the whole picture's changes are lost", "            seen = seen + tensor(_enlarged, drift, size) + 1 "
             " # 1: it is a difference\n", "", "whole_picture_says"),
    Sabotage("colour in a grey picture", "    if is_neutral(photo):\n", "    if False:\n", "grey_in_grey_out"),
    Sabotage("a red wall for a print", "    return True if is_print else None", "    return True", "red_wall"),
    Sabotage("a pale print gains colour", "        curves = torch.zeros_like(curves)\n", "        pass\n", "red_wall"),
    Sabotage("the layer under a mask", 'if "A" in image.getbands()', "if False", "share_that_was_repainted"),
    Sabotage("a given mask is not trusted", "    searching = mask is None and fill", "    searching = fill",
             "mask_is_trusted"),
    Sabotage("holes filled with what covers them", "cv2.copyTo(image, known, np.zeros_like(image))", "image",
             "filling_from_edges or soft_edged"),
    Sabotage("holes filled in steps", "    for _ in range(8):\n        cv2.copyTo", "    for _ in range(0):\n        "
             "cv2.copyTo", "filling_from_edges"),
    Sabotage("a grey print's truth in colour", "        if pair.is_grey:  #", "        if False:  #",
             "paired_with_the_grey"),
    Sabotage("colours to be learnt from grey", "torch.where(is_grey, transforms.functional.rgb_to_grayscale("
             "original, 3), original)", "original", "grey_picture_teaches"),
    Sabotage("scenes are validated on", "    pairs = [pair for pair in pairs if not pair.is_scene]\n", "",
             "only_trained_on"),
    Sabotage("mask of another place than the window", "Image.Resampling.BILINEAR, box))  # antialiased",
             'Image.Resampling.BILINEAR, box if image.mode == "RGB" else None))', "windows_show_the_same"),
    Sabotage("in doubt, act", "sure = doubtless(sure, *sure.new_tensor(self.DOUBT).T) if doubting else sure", "pass",
             "only_when_it_is_sure"),
    Sabotage("damage drawn in another order", "    damage = draw_damage(image.shape, rng)\n    aged =",
             "    rng.random()\n    damage = draw_damage(image.shape, rng)\n    aged =", "exactly_what_the_hands"),
    Sabotage("zero_grad", "        optimizer.zero_grad()\n", "", "_step"),
    Sabotage("32 bits for the local mean", "    with torch.autocast(images.device.type, enabled=False):",
             "    if True:", "mixed_precision"),
    Sabotage("unscaled gradients", "self.scaler.step(optimizer)", "optimizer.step()", "mixed_precision"),
    Sabotage("batch norm after an overflow", "torch.where(buffer.isfinite().all(), buffer, old)", "buffer",
             "batch_norm_as_it_was"),
    Sabotage("channels last lost", "[image.contiguous(memory_format=torch.channels_last) for image in rolled]",
             "rolled", "shifted_rolls"),
    Sabotage("TF32", "torch.backends.cudnn.allow_tf32 = False", "pass", "a_gpu_is_used"),
    Sabotage("orientation",
             "            exif.load(image.info[\"exif\"])\n", "            pass\n", "exif or orientation_is"),
    Sabotage("JPEG quality", "jpeg_quality: int = 95", "jpeg_quality: int = 75", "jpeg_is_written"),
    Sabotage("order of the epoch", "self.run.settings, self.name, self.epoch)\n        order,",
             "self.run.settings, self.name, 1)\n        order,", "order_of_its_own"),
    Sabotage("short last batch", "drop_last = order is not None and len(pairs) >= batch", "drop_last = False",
             "batches_are_full"),
    Sabotage("average not saved", '"generator": generator, "average": average, "optimizer"',
             '"generator": generator, "optimizer"', "four_epochs"),
    Sabotage("one look", "for axes in ((), (2,), (3,), (2, 3))]", "for axes in ((),)]", "whichever_way"),
    Sabotage("huge levels", "largest = min(longer, KNOWN_SIZE)", "largest = longer", "where_the_network_knows_it"),
    Sabotage("profile ignored", 'color_transforms(carried.get("icc_profile"), ', "color_transforms(None, ",
             "phones_colours"),
    Sabotage("16 bits cut", "if bits == 16 else None", "if bits == 99 else None", "sixteen_bits"),
    Sabotage("restored again", "if overwrite or not target.is_file()]", "if True]", "there_is_left"),
    Sabotage("one file stops all", "except Exception as error:  # one file", "except KeyError as error:  # one file",
             "stops_no_other"),
    Sabotage("OUT inside IN", "if here.is_relative_to(there) or there.is_relative_to(here):", "if here == there:",
             "endanger"),
    Sabotage("links into IN", "if target.resolve().is_relative_to(here)]:", "if False]:", "links_and_odd"),
    Sabotage("texts in ASCII", "AsRead(text) for tag, text in part.items() if isinstance(text, str)",
             "text for tag, text in ()", "archive_wrote"),
    Sabotage("turned twice", "if exif.pop(0x0112, 1) in", "if exif.get(0x0112, 1) in", "archive_wrote"),
    Sabotage("no still pair", 'alt="after" src="{after}" style="width:50%"', 'alt="after" src="{after}" hidden',
             "slides_in_a_browser"),
    Sabotage("one sureness for all", "for size in sizes], generator.sure", "for size in sizes], 0.8", "how_sure"),
    Sabotage("other settings accepted", "    if differ:\n", "    if False:\n", "refused_by_name"),
    Sabotage("no lock", "        lock.acquire(timeout=10)\n", "        pass\n", "second_run"),
    Sabotage("parts of JPEGs missing", "_is_incomplete_jpeg(content, image):", "False:",
             "part_is_missing"),
    Sabotage("decompression bombs", "> MAX_PIXELS:", "> 10**12:", "bad_picture or too_many_pixels"),
    Sabotage("checksums", "if entry := archive.testzip():", "if entry := None:", "hostile"),
    Sabotage("damaged checkpoint kept", "    os.replace(newest, found)  #", "    pass  #", "newest_two"),
    Sabotage("attached checkpoint copied first", "        if found != self.last:\n",
             "        if found != self.last:\n            copy_file(newest, self.last)\n", "attached_training"),
    Sabotage("closed folders", "os.walk(folder, onerror=lambda e: leave_out(e.filename, e.strerror))",
             "os.walk(folder)", "left_out_of_a_folder"),
    Sabotage("links not listed", "if Path(parent, name).is_symlink()]", "if False]", "left_out_of_a_folder"),
    Sabotage("checksums of PNGs",
             "                Image.open(io.BytesIO(content)).verify()", "                pass", "a_png_of"),
    Sabotage("any content opened", ", formats=[f for f in IMAGE_FORMATS if f in Image.OPEN]", "", "only_pictures"),
    Sabotage("another run's damage read", "if not all(pair.is_done(settings) for pair in same):", "if False:",
             "before_they_are_read"),
    Sabotage("overflows counted", "loss.isfinite() | (not self.scaled)", "torch.tensor(True)", "one_overflow"),
    Sabotage("overflow without a step",
             "                precision_g.keep_finite()", "                pass", "one_overflow"),
    Sabotage("hours for every training", "3600 * budget - (time.time() - session)", "3600 * budget", "kaggles_hours"),
    Sabotage("misspelt variables", 'name.startswith("RESTORATION_")} -', 'name.startswith("?")} -',
             "misspelt"),
    Sabotage("parts of a seed run together", '.replace("/", "\\0")', "", "parts_of_a_seed"),
    Sabotage("gradients of one process only", "return DistributedDataParallel(network, **options)", "return network",
             "two_processes_learn"),
    Sabotage("every process trains on all", "[self.rank :: self.size], batch // self.size", ", batch",
             "shared_evenly or two_processes_learn"),
    Sabotage("losses of one process only", "(team.total(sums) / team.total(counts))", "(sums / counts)",
             "two_processes_learn"),
    Sabotage("processes outlive their parent", "target=_end_with,", "target=lambda parent: None,",
             "end_with_the_one"),
    Sabotage("hours since the notebook's start", "SESSION: str(session_start(run.places))",
             "SESSION: str(psutil.Process().create_time())", "in_the_processes_too"),
    Sabotage("a slow disk taken for a failure",
             "broadcast_object_list(values, 0)", "broadcast_object_list(values, 0, self.group)", "slow_disk"),
    Sabotage("batch norm of every process's own", "dist.broadcast(buffer, 0, self.group)", "pass", "all_validate"),
    Sabotage("unlike GPUs together", "if team.from_first(kind) != kind:", "if False:", "different_kinds"),
    Sabotage("processes outlive an interruption", "            child.terminate()\n", "", "interrupting_the_notebook"),
)  # fmt: skip


def try_one(sabotage: Sabotage) -> tuple[bool, str]:
    """Whether a test failed, and which one did first."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tests", "notebooks"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        module = (ROOT / "restoration_utils.py").read_text(encoding="utf-8")
        broken = module.replace(sabotage.old, sabotage.new)
        (Path(folder) / "restoration_utils.py").write_text(broken, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "tests", "-q", "-x", "-m", "not slow", "-k"]
        command.append(f"({sabotage.tests}) and not sabotage_finds")  # that one fails whatever is broken
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        failed = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")]
        return done.returncode == 1 and bool(failed), failed[0].rpartition("::")[2] if failed else done.stdout[-300:]


def main() -> None:
    """Tries all, or those that are asked for."""
    chosen = [s for s in SABOTAGES if len(sys.argv) == 1 or any(word in s.name for word in sys.argv[1:])]
    unnoticed = 0
    for sabotage in chosen:
        started = time.perf_counter()
        noticed, by = try_one(sabotage)
        unnoticed += not noticed
        verdict = "noticed  " if noticed else "UNNOTICED"
        print(f"{verdict} {sabotage.name:34s} {time.perf_counter() - started:4.0f} s  {by}", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} noticed")
    sys.exit(bool(unnoticed))


if __name__ == "__main__":
    main()
