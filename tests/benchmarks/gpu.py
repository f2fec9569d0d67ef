"""What only a GPU can show, in one go: does `full` train on it, how fast, and with the CPU's losses?

    python tests/benchmarks/gpu.py [--updates 200]

Draws portraits, then runs both trainings of notebooks 04 and 05 with the settings of `full` (but fewer portraits and
two epochs, together of that many updates; the second counts, since a process's first updates are slow), in 16 and in
32 bits. Prints pairs a second, memory, the ratio of both, the share of the peak (that of a large matrix product,
measured here), how far the losses of the first updates are from the CPU's, and, with several GPUs, how much faster all
of them are than one. Some ten minutes on a T4 (estimated). What several processes cost on a CPU: --profile quick
--updates 60 --processes 2.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import speed

import restoration_utils as ru


def flops_of_a_pair(settings: ru.Settings) -> dict[str, float]:
    """Floating-point operations of one update, for each pair of its batch, by stage."""
    flops = {}
    for number, (stage, size) in enumerate((("pretrain", settings.pretrain_batch), ("gan", settings.gan_batch))):
        step = speed.our_steps(torch.device("cpu"), False, settings)[number]
        with FlopCounterMode(display=False) as counter:
            step(speed.make_batch(size))
        flops[stage] = counter.get_total_flops() / size
    return flops


def first_losses(device: torch.device, settings: ru.Settings, mixed: bool) -> np.ndarray:
    """All losses of the first three updates of both stages, from the same weights and pictures on every device."""
    rows = []
    for number, size in enumerate((settings.pretrain_batch, settings.gan_batch)):
        step = speed.our_steps(device, mixed, settings)[number]
        batch = speed.make_batch(size)
        rows += [[loss.item() for loss in step(copy.deepcopy(batch)).values()] for _ in range(3)]
    return np.concatenate(rows)


def train(run: ru.Run, splits: ru.Splits, folder: Path) -> dict[str, tuple[float, float]]:
    """Seconds of an epoch and GB of GPU memory, by stage, of both trainings as the notebooks run them."""
    run = run._replace(places=run.places._replace(outputs=folder))
    generator, discriminator = ru.build_generator(run.settings), ru.build_discriminator(run.settings)
    measured = {}
    for stage in ("pretrain", "gan"):
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if stage == "pretrain":
            history = ru.pretrain_generator(generator, splits.pretrain_train, splits.pretrain_validation, run)
        else:
            history = ru.train_gan(generator, discriminator, splits.gan_train, splits.gan_validation, run)
        memory = torch.cuda.max_memory_allocated() / 1e9 if run.device.type == "cuda" else float("nan")
        measured[stage] = history[-1]["seconds"], memory
    return measured


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200, help="of each training, about")
    parser.add_argument("--profile", default="full", choices=sorted(ru.PROFILES), help="to try the script itself")
    parser.add_argument("--processes", type=int, help="to compare with one; else as many as there are GPUs")
    options = parser.parse_args()
    device, settings = ru.choose_device(), ru.PROFILES[options.profile]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU: not what this is for"
    print(f"{name}; PyTorch {torch.__version__}; 16 bits: {ru.Precision(device).dtype}", flush=True)

    cpu = first_losses(torch.device("cpu"), settings, False)
    for mixed in (False, True):
        here = first_losses(device, settings, mixed)
        apart = np.abs(here / cpu - 1).max()
        print(f"first updates, {16 if mixed else 32} bits: losses at most {apart:.2%} from the CPU's", flush=True)

    originals = max(10, round(options.updates / 2 * settings.pretrain_batch / (6 * 0.8)))  # six pairs each, four fifths
    settings = replace(settings, portraits=originals, max_faces=originals, portrait_size=512, scenes=0)
    settings = replace(settings, pretrain_epochs=2, gan_epochs=2)
    peaks, flops = speed.peaks(device), flops_of_a_pair(settings)
    count = options.processes or (torch.cuda.device_count() if device.type == "cuda" else 1)
    with tempfile.TemporaryDirectory() as folder:
        places = ru.Places("benchmark", Path(folder), Path(folder) / "degraded")
        pairs = ru.prepare_pairs(ru.find_faces(settings, places), places, settings)
        splits, seconds = ru.split_pairs(pairs, settings), {}
        ways = [(16, 1)] + [(32, 1)] * (ru.Precision(device).dtype is not None) + [(16, count)] * (count > 1)
        for bits, processes in ways:
            os.environ["RESTORATION_PROCESSES"] = str(processes)
            run = ru.Run(replace(settings, mixed_precision=bits == 16), places, device, ru.faces_id(pairs))
            processes = ru.processes_to_start(run)  # of three GPUs, two
            measured = train(run, splits, Path(folder) / f"{bits}_{processes}")
            for stage, (epoch, memory) in measured.items():
                trained = splits.pretrain_train if stage == "pretrain" else splits.gan_train
                rate = len(trained) / epoch
                seconds[bits, processes, stage] = epoch
                memory = memory if processes == 1 else float("nan")  # of the others this process knows nothing
                peak = peaks["mixed" if bits == 16 else "float32"] * (processes if device.type == "cuda" else 1)
                share = rate * flops[stage] / peak
                faster = seconds[16, 1, stage] / epoch
                print(
                    f"{stage}, {bits} bits, {processes} processes: {rate:.1f} pairs/s, all included; {memory:.1f} GB;"
                )
                print(f"    {share:.0%} of the peak; {faster:.2f} x as fast as one process in 16 bits", flush=True)


if __name__ == "__main__":
    main()
