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
    Sabotage("no clip", "return cv2.add(image, noise.reshape(image.shape), dtype=cv2.CV_8U)",
             "return image + noise.reshape(image.shape).astype(np.uint8)", "clips_instead or wrap"),
    Sabotage("no detach", "discriminator(degraded, restored.detach())", "discriminator(degraded, restored)",
             "discriminator_step"),
    Sabotage("no eval()", "    network.eval()\n", "", "eval_mode or comparison_restores"),
    Sabotage("no no_grad", "        with torch.inference_mode():\n            yield\n", "        yield\n", "eval_mode"),
    Sabotage("random state not restored", "    with torch.random.fork_rng(devices=[]):\n        "
             'torch.manual_seed(derive_seed(settings.seed, "generator"))', "    if True:\n        "
             'torch.manual_seed(derive_seed(settings.seed, "generator"))', "building_is_seeded"),
    Sabotage("random state of an epoch not set", "            torch.manual_seed(derive_seed(run.settings.seed, stage, "
             "epoch))\n", "", "four_epochs"),
    Sabotage("no os.replace", 'temporary = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}{path.suffix}")',
             "temporary = path", "atomic"),
    Sabotage("weights_only", "weights_only=True", "weights_only=False", "hostile or code_in_a_checkpoint"),
    Sabotage("zip bombs", "sum(entry.file_size for entry in archive.infolist())", "0", "hostile"),
    Sabotage("claimed width", 'with torch.device("meta"):', "if True:", "hostile"),
    Sabotage("weights not finite", "    if bad := not_finite(weights):\n", "    if bad := []:\n", "hostile"),
    Sabotage("split by file", "if part_of[pair.name] == number", "if len(pair.kind) % 3 == number", "splits_are"),
    Sabotage("seed without the file name", "default_rng(derive_seed(settings.seed, kind, name))",
             "default_rng(derive_seed(settings.seed, kind))", "manifest_says"),
    Sabotage("0.1 of the MSE", "mse_weight: float = 0.1", "mse_weight: float = 0.2", "settings_are_those"),
    Sabotage("MSE left out", 'loss = losses["l1"] + run.settings.mse_weight * losses["mse"]', 'loss = losses["l1"]',
             "pretrain_step"),
    Sabotage("100 of the L1", "l1_weight: float = 100.0", "l1_weight: float = 10.0", "settings_are_those"),
    Sabotage("L1 left out", 'losses["g_adv"] + settings.l1_weight * losses["g_l1"]', 'losses["g_adv"]',
             "generator_step"),
    Sabotage("best is worst", 'min(history, key=lambda row: row["val_loss"])',
             'max(history, key=lambda row: row["val_loss"])', "early_stopping or best_epoch"),
    Sabotage("patience", "len(history) - best_epoch(history) >= s.patience",
             "len(history) - best_epoch(history) <= -s.patience", "early_stopping"),
    Sabotage("pretraining's StepLR", '        row["lr"] = scheduler.get_last_lr()[0]\n        scheduler.step()\n',
             '        row["lr"] = scheduler.get_last_lr()[0]\n', "steplr"),
    Sabotage("GAN's StepLR", "        for scheduler in schedulers:\n            scheduler.step()\n", "",
             "gan_schedules"),
    Sabotage("every second batch", "or number % 2 == 0", "or True", "gan_schedules"),
    Sabotage("zero_grad", "        optimizer.zero_grad()\n", "", "_step"),
    Sabotage("32 bits for the local mean", "    with torch.autocast(images.device.type, enabled=False):",
             "    if True:", "mixed_precision"),
    Sabotage("unscaled gradients", "self.scaler.step(optimizer)", "optimizer.step()", "mixed_precision"),
    Sabotage("EXIF", "cv2.IMREAD_COLOR)", "cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)", "exif"),
    Sabotage("JPEG quality", "jpeg_quality: int = 95", "jpeg_quality: int = 75", "jpeg_is_written"),
    Sabotage("order of the epoch", "            loader.sampler.epoch = epoch\n", "", "order_of_its_own"),
    Sabotage("average not saved", '"average": average, "optimizer": optimizer', '"optimizer": optimizer',
             "four_epochs"),
    Sabotage("other settings accepted", "    if differ:\n", "    if False:\n", "refused_by_name"),
    Sabotage("no lock", 'stack.enter_context(FileLock(folder / ".lock", timeout=10))', "pass", "second_run"),
    Sabotage("truncated JPEGs", 'content[:2] == b"\\xff\\xd8" and _is_truncated_jpeg(content)', "False", "bad_picture"),
    Sabotage("decompression bombs", "    if (pixels := _count_pixels(content)) > MAX_PIXELS:", "    if pixels := 0:",
             "bad_picture"),
    Sabotage("checksums", "if entry := archive.testzip():", "if entry := None:", "hostile"),
    Sabotage("damaged checkpoint kept", "        os.replace(newest, last)  #", "        pass  #", "newest_two"),
    Sabotage("not forgotten, then replaced", "    _write_manifest(folder, settings, manifest)\n    waiting",
             "    waiting", "nothing_is_mixed"),
    Sabotage("manifest not kept up to date", "if time.monotonic() - written > 2:", "if False:", "what_is_done"),
    Sabotage("attached checkpoint copied first", "    if last.parent != run.outputs:\n",
             "    if last.parent != run.outputs:\n        copy_file(newest, run.outputs / last.name)\n",
             "attached_training"),
    Sabotage("closed folders", "os.walk(folder, onerror=refuse)", "os.walk(folder)", "closed_folders"),
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
