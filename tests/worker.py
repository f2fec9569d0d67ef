"""The module's command line with something changed first: started by `test_processes.py`, alone or by torchrun.

`worker.py CHANGES... then ARGUMENTS`. Changes are names of functions below, some with a rank: `nan:1`.
"""

import functools
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce

sys.path.insert(0, str(Path(__file__).parents[1]))
import restoration_utils as ru


class WholeBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes: what SyncBatchNorm does on GPUs."""

    def forward(self, x):
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = all_reduce(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = (self.weight * (variance + self.eps).rsqrt())[:, None, None]
        return centred * scale + self.bias[:, None, None]


def whole_batch_norm():
    nn.BatchNorm2d = WholeBatchNorm


def calm_adam():
    """An Adam that does not make full steps of gradients of 1e-9, which are all rounding."""
    torch.optim.Adam = functools.partial(torch.optim.Adam, eps=1e-3)


def in_batch(number, action):
    """Something happens in this process before the update with that number."""
    step, calls = ru.pretrain_step, []

    def changed(*arguments):
        calls.append(1)
        if len(calls) == number:
            action(arguments)
        return step(*arguments)

    ru.pretrain_step = changed


def die():
    in_batch(8, lambda arguments: os.kill(os.getpid(), signal.SIGKILL))


def stop():
    in_batch(8, lambda arguments: os.kill(os.getpid(), signal.SIGSTOP))


def nan():
    in_batch(8, lambda arguments: arguments[2][0].fill_(float("nan")))


def impatient():
    """Waits for others for five seconds only."""
    ru.NOTICED_AFTER = timedelta(seconds=5)


def slow_disk():
    original = ru.save_checkpoint

    def changed(path, run, **content):
        if path.name == "pretrained_generator_best.pth":
            time.sleep(10)
        original(path, run, **content)

    ru.save_checkpoint = changed


def other_gpu():
    """A process whose hardware computes in float16, as if its GPU were older than the others."""
    original = ru.Precision.__init__

    def changed(self, *arguments):
        original(self, *arguments)
        self.dtype = torch.float16

    ru.Precision.__init__ = changed


def full_disk():
    original = ru.save_checkpoint

    def changed(path, run, **content):
        if path.name == "pretrain_last.pth" and len(content["history"]) == 2:
            raise OSError(28, "No space left on device", str(path))
        original(path, run, **content)

    ru.save_checkpoint = changed


if __name__ == "__main__":
    split = sys.argv.index("then")
    for change in sys.argv[1:split]:
        name, _, rank = change.partition(":")
        if not rank or rank == os.environ.get("RANK"):
            globals()[name]()
    sys.exit(ru.main(sys.argv[split + 1 :]))
