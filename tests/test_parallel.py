"""Several processes: the same weights as one process, also with PCGrad, also after a resume with another number of processes; a killed one."""
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from metanb.compute import distributed, rank
from metanb.maml import MAML, Reptile
from metanb.meta_sgd import MetaSGD
from metanb.models import MLP
from metanb.pcgrad import Grouped, meta_pcgrad, pcgrad
from metanb.tasks import Sinusoid
from metanb.train import fit, load_checkpoint

SINES = Sinusoid(shots=5, queries=5, dtype=torch.float64)
LOW = Sinusoid(shots=5, queries=5, frequency=(0.2, 0.4), dtype=torch.float64)
RUNS = {  # seven tasks: neither two nor four processes get equally many
    "mean": dict(method=MAML, tasks=7), "pcgrad": dict(method=MAML, tasks=7, combine=pcgrad), "reptile": dict(method=Reptile, tasks=7),
    "groups": dict(method=MetaSGD, tasks=6, combine=partial(meta_pcgrad, groups=3)),
    "grouped": dict(method=MAML, tasks=6, combine=partial(meta_pcgrad, groups=2), sampler=Grouped([SINES, LOW])),
}


def run(folder, name, steps=8, checkpoint=None, **options):
    "The weights after `steps` meta-steps of a run in `RUNS`, and its losses."
    how = dict(RUNS[name])
    torch.manual_seed(rank())  # every process builds other first weights; those of process 0 count
    learner = how.pop("method")(MLP(1, 8, 8, 1, std=None).double(), lr=0.05, steps=2)
    opt = torch.optim.Adam(learner.parameters(), 1e-2)
    path = None if checkpoint is None else Path(folder) / f"{checkpoint}.ckpt"
    history = fit(learner, how.pop("sampler", SINES), steps, opt=opt, seed=3, checkpoint=path, checkpoint_every=1, progress=False, validation=SINES,
                  validate_every=4, validation_tasks=5, **how, **options)
    return dict(weights={n: p.detach() for n, p in learner.named_parameters()}, losses=history["loss"], validation=history["validation"])


def kill_at(step):
    "A callback that ends the last process without warning."
    def callback(run):
        if run.step == step and rank() == 1: os.kill(os.getpid(), signal.SIGKILL)
    return callback


def main(folder, part):
    "What each process does; process 0 keeps the results."
    with distributed("cpu"):
        n = torch.distributed.get_world_size()
        if part == "killed": run(folder, "mean", checkpoint="killed", callbacks=[kill_at(5)])
        if part == "runs":
            results = {f"{name} {i}": run(folder, name) for name in RUNS for i in (1, 2)}
            for name in ("mean", "groups"): results[f"{name} stopped"] = run(folder, name, steps=4, checkpoint=f"{name}-from-{n}")
            if n == 4:  # what two processes began
                for name in ("mean", "groups"): results[f"{name} resumed"] = run(folder, name, checkpoint=f"{name}-from-2")
            if rank() == 0: torch.save(results, Path(folder) / f"{n}.pt")


def torchrun(processes, *args):
    "The script's exit status and what it printed."
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), __file__, *map(str, args)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return out.returncode, out.stdout + out.stderr


def close(a, b, what=""):
    for n in b["weights"]:
        torch.testing.assert_close(a["weights"][n], b["weights"][n], rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}, {n}: {text}")
    torch.testing.assert_close(torch.tensor(a["losses"]), torch.tensor(b["losses"]), rtol=1e-9, atol=0, msg=lambda text: f"{what}: {text}")


@pytest.mark.slow
def test_several_processes_train_the_weights_of_one_and_go_on_with_each_others_runs(tmp_path):
    "One test, because starting the processes is what takes the time."
    alone, seen = {name: run(None, name) for name in RUNS}, {}
    for processes in (2, 4):  # in this order: four go on where two stopped
        status, text = torchrun(processes, tmp_path, "runs")
        assert status == 0, text[-3000:]
        seen[processes] = torch.load(tmp_path / f"{processes}.pt")
        for name in RUNS:
            first, second = (seen[processes][f"{name} {i}"] for i in (1, 2))
            close(first, alone[name], f"{name} by {processes}")
            assert first["losses"] == second["losses"], f"{name} by {processes}, again"  # reruns are equal bit for bit
            for n, w in first["weights"].items(): assert torch.equal(second["weights"][n], w), f"{name} by {processes}, again: {n}"
    for name in ("mean", "groups"):
        close(seen[4][f"{name} resumed"], alone[name], f"{name}, begun by 2, ended by 4")
        close(run(tmp_path, name, checkpoint=f"{name}-from-4"), alone[name], f"{name}, begun by 4, ended by 1")


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_leaves_a_checkpoint(tmp_path):
    status, text = torchrun(2, tmp_path, "killed")
    # torchrun names the one that died; the other says that it lost it, unless torchrun ends it before it has spoken
    assert status != 0 and "Signal 9 (SIGKILL)" in text and "local_rank: 1" in text, text[-3000:]
    assert "process 0 of 2 lost the others" in text or "SIGTERM" in text, text[-3000:]
    assert load_checkpoint(tmp_path / "killed.ckpt")["step"] in (4, 5)
    close(run(tmp_path, "mean", checkpoint="killed"), run(None, "mean"))


def test_more_processes_than_tasks_are_refused(monkeypatch):
    monkeypatch.setattr("metanb.compute.processes", lambda: 9)
    monkeypatch.setattr("metanb.compute.rank", lambda: 0)
    with pytest.raises(ValueError, match="tasks=7: 9 processes need at least one task each"): fit(MAML(MLP(1, 4, 1)), SINES, 1, 7)


def test_one_process_needs_no_group():
    with distributed("cpu") as device: assert device == torch.device("cpu") and not torch.distributed.is_initialized()


if __name__ == "__main__": main(*sys.argv[1:])
