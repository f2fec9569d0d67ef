"""Several processes train as one does, on the CPU with gloo: the same result, and ends that leave nothing behind."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import TINY
from test_training import pretrain, train_gan, with_settings
from torch import distributed as dist

import restoration_utils as ru

WORKER = Path(__file__).parent / "worker.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def jobs_for(run, pairs, path, stages=("pretrain", "gan")):
    """A file with these trainings, for the command `train`."""
    splits = ru.split_pairs(pairs, run.settings)
    weights = [net.state_dict() for net in (ru.build_generator(run.settings), ru.build_discriminator(run.settings))]
    jobs = ("pretrain", run, weights, splits.pretrain_train, splits.pretrain_validation)
    jobs = [jobs, ("gan", run, weights, splits.gan_train, splits.gan_validation)]
    torch.save([job for job in jobs if job[0] in stages], path)
    return path


def train(run, pairs, job, *changes, processes=2, stages=("pretrain", "gan")):
    """These trainings in so many processes; what they wrote, their exit status and the seconds they took."""
    jobs_for(run, pairs, job, stages)
    start = [*TORCHRUN, f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    begun = time.monotonic()
    command = [*start, str(WORKER), *changes, "then", "train", "--job", str(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=300)
    return done.stdout + done.stderr, done.returncode, time.monotonic() - begun


def moved_to(run, folder):
    return run._replace(places=run.places._replace(outputs=folder))


def test_two_processes_learn_what_one_does(run, pairs, tmp_path):
    """Ten updates of each stage and more, with batch norm over the whole batch, as on GPUs."""
    results = []
    for count in (1, 2):
        this = moved_to(with_settings(run, pretrain_epochs=2, gan_epochs=1, width=4), tmp_path / f"by_{count}")
        text, status, _ = train(this, pairs, tmp_path / "job", "whole_batch_norm", "calm_adam", processes=count)
        assert status == 0, text
        assert text.count("epoch  2/2") == 1  # only one of them speaks
        results.append([ru.load_checkpoint(this.outputs / f"{stage}_last.pth") for stage in ("pretrain", "gan")])
    begun = ru.build_generator(this.settings).state_dict()
    for one, two in zip(*results):
        for row, other in zip(one["history"], two["history"], strict=True):
            numbers = {name for name in row if name not in ("seconds", "epoch")}
            assert {name: row[name] for name in numbers} == pytest.approx({name: other[name] for name in numbers}, 1e-4)
        for network in one.keys() & {"generator", "discriminator", "average"}:
            for name, weights in one[network].items():
                assert torch.allclose(weights.double(), two[network][name].double(), rtol=1e-3, atol=1e-3), name
    moved = [(weights - begun[name]).abs().max() for name, weights in results[0][0]["generator"].items()]
    assert max(moved) > 0.02  # ten updates went much further than two processes are apart


def test_another_number_of_processes_goes_on_in_the_same_files(run, pairs, tmp_path):
    run = with_settings(run, pretrain_epochs=1, gan_epochs=1)
    text, status, _ = train(run, pairs, tmp_path / "job")
    assert status == 0, text
    names = {path.name for path in run.outputs.glob("[!.]*.*")}
    assert names >= {"pretrained_generator_best.pth", "pretrain_sample_epoch_1.png", "gan_sample_epoch_1.png"}
    assert names >= {"face_restoration_generator_final.pth", "face_restoration_discriminator_final.pth"}
    assert not any(path.name.startswith(ru.PARTIAL) for path in run.outputs.iterdir())
    longer = with_settings(run, gan_epochs=2)
    _, _, history = train_gan(longer, pairs)  # in this process
    assert [row["epoch"] for row in history] == [1, 2]
    assert history[0] == ru.load_checkpoint(run.outputs / "gan_last.pth")["history"][0]
    assert {path.name for path in run.outputs.glob("[!.]*.*")} > names


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("die:1", "SIGKILL"),
        ("nan:1", "the loss .* is not finite"),
        ("full_disk:0", "No space left on device"),
        ("stop:1", "has not answered for 20 seconds"),
    ],
)
def test_if_one_fails_all_end_with_its_reason_and_nothing_is_lost(run, pairs, tmp_path, change, reason):
    run = with_settings(run, pretrain_epochs=3, gan_epochs=1)
    text, status, seconds = train(run, pairs, tmp_path / "job", change, stages=["pretrain"])
    assert status != 0 and seconds < 80, text  # 20 s until it is noticed, 30 s until it is killed, and the start
    assert re.search(reason, ru.failure_reason(text)), (ru.failure_reason(text), text)
    running = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in running if str(tmp_path) in command]
    kept = ru.load_checkpoint(run.outputs / "pretrain_last.pth")["history"]
    assert len(kept) == 1
    text, status, _ = train(run, pairs, tmp_path / "job", stages=["pretrain"])  # and again, without the fault
    assert status == 0 and "1 of 3 epochs already done" in text
    history = ru.load_checkpoint(run.outputs / "pretrain_last.pth")["history"]
    assert len(history) == 3 and history[:1] == kept


def test_the_others_wait_for_a_slow_disk(run, pairs, tmp_path):
    run = with_settings(run, pretrain_epochs=1)
    changes = ("impatient", "slow_disk:0")  # the first writes for longer than the others wait for one that hangs
    text, status, seconds = train(run, pairs, tmp_path / "job", *changes, stages=["pretrain"])
    assert status == 0 and seconds > 10, text
    assert len(ru.load_checkpoint(run.outputs / "pretrain_last.pth")["history"]) == 1


def test_gpus_that_compute_in_different_kinds_of_16_bits_are_refused(run, pairs, tmp_path):
    text, status, _ = train(run, pairs, tmp_path / "job", "other_gpu:1")
    assert status != 0 and "different kinds of 16 bits" in ru.failure_reason(text), text


def test_the_plain_recipe_trains_in_two_processes(run, pairs, tmp_path):
    """Batch norm in its discriminator, dropout, no heads; in 16 bits where this machine has them."""
    run = with_settings(run, pretrain_epochs=1, gan_epochs=1, mixed_precision=True, **ru.PLAIN)
    text, status, _ = train(run, pairs, tmp_path / "job")
    assert status == 0, text
    assert len(ru.load_checkpoint(run.outputs / "gan_last.pth")["history"]) == 1


def test_a_second_run_over_the_same_folder_stops_at_once(run, pairs, tmp_path):
    with ru.alone_in(run.outputs):
        text, status, seconds = train(run, pairs, tmp_path / "job")
    assert status != 0 and "another run is writing" in ru.failure_reason(text) and seconds < 60


def test_a_notebook_starts_the_processes_shows_what_they_say_and_loads_what_they_wrote(run, pairs, monkeypatch, capsys):
    monkeypatch.setenv("RESTORATION_PROCESSES", "2")
    run = with_settings(run, pretrain_epochs=2, gan_epochs=1)
    generator, history = pretrain(run, pairs)
    said = capsys.readouterr().out
    assert "training in 2 processes" in said and said.count("epoch  2/2") == 1
    assert len(history) == 2 and ru.RELAYED not in said
    best = ru.load_checkpoint(run.outputs / "pretrained_generator_best.pth")["generator"]
    assert all(torch.equal(weights, best[name]) for name, weights in generator.state_dict().items())
    _, discriminator, history = train_gan(run, pairs)
    assert len(history) == 1
    final = ru.load_checkpoint(run.outputs / "face_restoration_discriminator_final.pth")["discriminator"]
    assert all(torch.equal(weights, final[name]) for name, weights in discriminator.state_dict().items())


def test_the_reason_of_a_process_that_failed_reaches_the_notebook(run, pairs, monkeypatch):
    monkeypatch.setenv("RESTORATION_PROCESSES", "2")
    with ru.alone_in(run.outputs), pytest.raises(RuntimeError, match="another run is writing"):
        pretrain(run, pairs)


def test_interrupting_the_notebook_ends_all_processes(run, pairs, monkeypatch, tmp_path):
    monkeypatch.setenv("RESTORATION_PROCESSES", "2")
    run = with_settings(run, pretrain_epochs=500)
    others, started, at = set(psutil.Process().children(recursive=True)), set(), []

    def interrupt():
        history = run.outputs / "pretrain_history.json"
        while not history.is_file():
            time.sleep(0.1)
        started.update(set(psutil.Process().children(recursive=True)) - others)
        at.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(ru.Interrupted, match="Run it again: it goes on"):
        pretrain(run, pairs)
    assert time.monotonic() - at[0] < 60  # not after all the epochs, which take minutes
    assert len(started) >= 3  # the one that starts them, and two
    _, alive = psutil.wait_procs(started, timeout=2)
    assert not alive
    with ru.alone_in(run.outputs):  # nobody holds the folder
        pass


def test_processes_end_with_the_one_that_started_them(run, pairs, tmp_path):
    job = jobs_for(with_settings(run, pretrain_epochs=500), pairs, tmp_path / "job")
    command = [*TORCHRUN, "--nproc_per_node=2", str(WORKER), "then", "train", "--job", str(job)]
    parent = subprocess.Popen(command, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout.readline().startswith("epoch")
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) >= 2
    parent.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def unite_two(rank, store, folder):
    """One of two processes: what its batch norm holds after `unite`, where both held something else."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    network = torch.nn.BatchNorm2d(3)
    network.running_mean.fill_(rank + 1)
    ru.Team(rank, 2).unite(network)
    torch.save(network.running_mean, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_all_validate_with_the_first_ones_batch_norm(tmp_path):
    torch.multiprocessing.spawn(unite_two, (tmp_path / "store", tmp_path), nprocs=2)
    assert [torch.load(tmp_path / f"{rank}.pt").tolist() for rank in range(2)] == 2 * [[1, 1, 1]]


@pytest.mark.parametrize("plain", [False, True])
def test_networks_keep_their_weights_and_names_when_batch_norm_spans_gpus(plain):
    """The optimizer, the average and the notebook hold them already."""
    settings = dataclasses.replace(TINY, plain=plain)
    for network in (ru.build_generator(settings), ru.build_discriminator(settings)):
        before = network.state_dict(keep_vars=True)
        after = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network).state_dict(keep_vars=True)
        assert list(after) == list(before) and all(after[name] is before[name] for name in before)


def test_kaggles_hours_count_from_its_machines_start_in_the_processes_too(run, monkeypatch):
    on_kaggle = run.places._replace(attached=Path("/kaggle/input"))
    assert ru.session_start(on_kaggle) == psutil.Process(1).create_time() != psutil.Process().create_time()
    started = {}

    class Child:
        stdout = ()

        def __init__(self, command, env, **options):
            started.update(env)

        def wait(self):
            return 0

        terminate = wait

    monkeypatch.setattr(ru.subprocess, "Popen", Child)
    monkeypatch.setenv("RESTORATION_PROCESSES", "2")
    assert ru.train_in_processes("gan", (), [], [], run._replace(places=on_kaggle))
    assert float(started[ru.SESSION]) == psutil.Process(1).create_time()


def test_the_reason_is_said_where_nccl_has_waited_too_long():
    """As PyTorch 2 writes it: the process that hangs says nothing, the other one is aborted."""
    waited = "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)"
    aborted = "Signal 6 (SIGABRT) received by PID 12"
    assert ru.failure_reason(f"{waited}\n{aborted}\n") == "it has not answered for 20 seconds"
    killed = "Signal 9 (SIGKILL) received by PID 13"
    assert ru.failure_reason(f"{waited}\n{aborted}\n{killed}\n").startswith("it was ended by SIGKILL")


def test_a_batch_is_shared_evenly_or_computed_by_all():
    team = [ru.Team(rank, 2) for rank in range(2)]
    assert [member.share_items([1, 2, 3]) for member in team] == [[1, 3], [2]]
    assert [member.share_items([1]) for member in team] == [[1], [1]]
    shares = [member.share_batches(list(range(11)), 4) for member in team]
    assert shares == [([0, 2, 4, 6], 2), ([1, 3, 5, 7], 2)]  # two full batches
    assert [member.share_batches([7, 8], 4) for member in team] == 2 * [([7, 8], 4)]
    rows = {"a": torch.arange(4), "b": torch.arange(4) * 2}
    assert [member.share_rows(rows)["b"].tolist() for member in team] == [[0, 4], [2, 6]]
    assert team[1].share_rows({"a": torch.arange(3)})["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("wanted", "started"), [("1", 1), ("2", 2), ("3", 2), ("4", 4), ("9", 4), ("", 1)])
def test_as_many_processes_as_can_share_batches_of_8_and_4(run, monkeypatch, wanted, started):
    monkeypatch.setenv("RESTORATION_PROCESSES", wanted)
    assert ru.processes_to_start(run) == started
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert ru.processes_to_start(run) == 1  # those that were started start no others


@pytest.mark.parametrize("wanted", ["0", "-1", "two"])
def test_a_wrong_number_of_processes_is_an_error(run, monkeypatch, wanted):
    monkeypatch.setenv("RESTORATION_PROCESSES", wanted)
    with pytest.raises(ValueError, match="RESTORATION_PROCESSES"):
        ru.processes_to_start(run)


def test_batches_that_cannot_be_shared_are_refused(run, pairs, tmp_path):
    run = run._replace(settings=dataclasses.replace(run.settings, pretrain_batch=3))
    text, status, _ = train(run, pairs, tmp_path / "job")
    assert status != 0 and "2 processes cannot share batches of 3 and 4" in ru.failure_reason(text)
