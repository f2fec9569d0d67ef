"""Shared fixtures: a tiny folder of faces, tiny settings, and a run that writes to a temporary folder."""

import dataclasses
import os
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
matplotlib.use("Agg")

import restoration_utils as ru

TINY = dataclasses.replace(
    ru.PROFILES["smoke"],
    width=2,
    discriminator_width=2,
    full_resolution_channels=2,
    mixed_precision=False,
    scenes=0,
    undamaged=False,
)


def pytest_collection_modifyitems(config, items):
    """The quick profile is trained only where `training` is asked for."""
    for item in items:
        if item.get_closest_marker("training") and "training" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="40 minutes: -m training"))


class Stub(torch.nn.Module):
    """Stands for a generator: `change` maps what it sees to what it returns, `find` to where it sees damage."""

    plain, sure = False, 0.9

    def __init__(self, change=lambda seen: seen, find=lambda seen: torch.zeros_like(seen[:, :1])):
        super().__init__()
        self.weight, self.change, self.find = torch.nn.Parameter(torch.zeros(1)), change, find

    def color(self, whole):
        return torch.zeros(len(whole), 11), torch.zeros(len(whole))

    def find_damage(self, seen):
        return 40 * self.find(seen) - 20

    def mend(self, seen, level):
        return self.change(seen)


def anonymous_memory() -> int:
    """What this process has allocated, in bytes: resident memory counts pages of libraries, too, as they are cached."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def faces_in(folder) -> ru.Faces:
    """All pictures of a folder."""
    return ru.Faces(folder, "test pictures", *ru.list_images(folder))


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """No test sees the variables of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("RESTORATION_")] + ["FACES_DIR", "OUTPUT_DIR"]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def faces(tmp_path) -> ru.Faces:
    """Ten random pictures of 64 px: quick to make, all different."""
    folder = tmp_path / "faces"
    for number in range(10):
        picture = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        ru.write_image(folder / f"face_{number}.jpg", picture)
    return faces_in(folder)


@pytest.fixture
def places(tmp_path) -> ru.Places:
    return ru.Places("test", tmp_path / "outputs", tmp_path / "outputs" / "fakefaces_degraded")


@pytest.fixture
def pairs(faces, places) -> list[ru.Pair]:
    return ru.prepare_pairs(faces, places, TINY)


@pytest.fixture
def run(pairs, places) -> ru.Run:
    return ru.Run(TINY, places, torch.device("cpu"), ru.faces_id(pairs))


@pytest.fixture
def batch():
    """Two random pairs with a hole, as a loader gives them."""
    generator = torch.Generator().manual_seed(0)
    degraded, original = (torch.rand(2, 3, 256, 256, generator=generator) * 2 - 1 for _ in range(2))
    hole = torch.zeros(2, 1, 256, 256)
    hole[:, :, 50:90, 60:100] = 1
    whole = torch.nn.functional.avg_pool2d(degraded, 4)
    return degraded, original, {"kind": ["occluded", "aged"], "name": ["a", "b"], "hole": hole, "whole": whole}


@pytest.fixture
def lesson():
    """Thumbnails as the colour head gets them."""
    originals = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)
    return ru.color_lesson(originals, TINY, np.random.default_rng(1))
