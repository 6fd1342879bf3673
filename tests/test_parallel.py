"""Several processes: the same weights as one process, also with PCGrad, also after a resume with another number of processes; a killed one.

The same for inner loops that are carried on from one meta-step to the next, whose state is spread over the processes."""
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metanb.compute import distributed, rank
from metanb.core import MetaLearner
from metanb.hierarchical import Bowl, HierarchicalRule, Problem, Rosenbrock, Teacher, Valley, blank, fit_zoo
from metanb.lstm import LSTMRule, quadratic_run, squared_error
from metanb.maml import MAML, Reptile
from metanb.meta_sgd import MetaSGD
from metanb.models import MLP
from metanb.pcgrad import Grouped, meta_pcgrad, pcgrad
from metanb.tasks import Quadratic, Sinusoid
from metanb.train import Checkpoint, fit, load_checkpoint
from metanb.unroll import Along, FiniteOnly, Trajectories, Truncated, fit_truncated

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


class Far(Quadratic):
    "Quadratics of which all but the first three overflow, and in the second trajectory all."
    def sample(self, T, seed=0, step=0, start=0):
        task = super().sample(T, seed, step, start)
        far = (torch.arange(start, start + T) > 2) | (step == 1)
        return task._replace(xq=torch.where(far[:, None, None], 1e200, task.xq))


class Opposed(Quadratic):
    "Quadratics of which every other one is mirrored, so that their gradients conflict."
    def sample(self, T, seed=0, step=0, start=0):
        task = super().sample(T, seed, step, start)
        sign = 1.0 - 2.0 * (torch.arange(start, start + T) % 2)[:, None, None]
        return task._replace(y=sign * task.y, yq=sign * task.yq)


def shaken(grads):
    "The mean and some noise: a combiner that draws random numbers."
    return {n: g.mean(0) + 0.01 * torch.randn(g.shape[1:], dtype=g.dtype) for n, g in grads.items()}


def start(sampler=Quadratic(3, dtype=torch.float64), rule=None, **axes):
    "A learned rule, and weights to begin with that are learned too."
    rule = LSTMRule(4, 1).double() if rule is None else rule
    return MetaLearner(nn.Linear(3, 1, bias=False).double(), rule=rule, steps=10, objective=Along(), gradient=Truncated(4), loss=squared_error, **axes), sampler


def random_start(): return quadratic_run(LSTMRule(4, 1).double(), 3, 10, 4).double(), Quadratic(3, dtype=torch.float64)


def dropout():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1)).double()
    return MetaLearner(model, rule=LSTMRule(4, 1).double(), steps=10, objective=Along(), gradient=Truncated(4), loss=squared_error), Quadratic(3)


CARRIED = {  # what `fit_truncated` gets; of ten inner steps a meta-step takes four, four and two
    "lstm": (start, dict(tasks=7, unroll=lambda step: 2 + step % 3)),
    "pcgrad": (partial(start, Opposed(3, dtype=torch.float64)), dict(tasks=7, combine=FiniteOnly(pcgrad))),
    "random": (random_start, dict(tasks=7, combine=shaken)), "random, two at a time": (random_start, dict(tasks=7, chunk=2)),
    "random, task by task": (random_start, dict(tasks=4, chunk=1)),
    "diverged": (partial(start, Far(3, dtype=torch.float64)), dict(tasks=7, combine=FiniteOnly(), nonfinite="skip")),
    "dropout": (dropout, dict(tasks=7)),
}
ALIKE = [*(name for name in CARRIED if name != "dropout"), "zoo"]  # what does not depend on how many processes there are


def carried(folder, name, steps=8, checkpoint=None, **options):
    "As `run`, for runs in `CARRIED`, or for rounds of a zoo."
    torch.manual_seed(rank())
    path = None if checkpoint is None else Path(folder) / f"{checkpoint}.ckpt"
    common = dict(seed=3, checkpoint=path, checkpoint_every=1, progress=False)
    if name == "zoo":  # the net of each problem, and so the spread of its first weights, would be another in every process
        net = MLP(4, 5, 2, activation=nn.Tanh, std=None).double()
        problems = [Problem("bowl", blank(2).double(), Bowl(2)), Problem("valley", Rosenbrock().double(), Valley(), factor=30.0),
                    Problem("net", net, Teacher(4, 2, steps=6, batch=4), F.cross_entropy, None)]
        learner = HierarchicalRule((4, 3), 2, rates=(1e-3, 1e-1)).double()
        rows = fit_zoo(learner, problems, 4, segments=2, unroll=3, tasks=5, **common, **options)
        losses = [r.loss for r in rows]
    else:
        make, how = CARRIED[name]
        learner, sampler = make()
        opt = torch.optim.Adam(learner.parameters(), 1e-2)
        how = {**how, **({"combine": FiniteOnly(how["combine"].combine)} if isinstance(how.get("combine"), FiniteOnly) else {})}  # it counts
        losses = fit_truncated(learner, sampler, steps, opt=opt, **common, **how, **options)["loss"]
    return dict(weights={n: p.detach() for n, p in learner.named_parameters()}, losses=losses)


def halt(run): run.stop = run.step == 5


class Kept:
    "Looks after each meta-step whether process 0 has written it."
    def __init__(self, path): self.path = path
    def step(self, run):
        if rank() == 0: assert load_checkpoint(self.path)["step"] == run.step
        assert run.saved.endswith(f"step {run.step}")


def trouble(kind):
    "A callback for process 1 alone: an error, or the signal with which a scheduler ends a job."
    def callback(run):
        if run.step != 5 or rank() != 1: return
        if kind == "error": raise RuntimeError("the disk of process 1 is full")
        os.kill(os.getpid(), signal.SIGTERM)
    return callback


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
        if part in ("error", "signal"): carried(folder, "random", checkpoint=part, callbacks=[trouble(part)])
        if part == "carried":
            results = {name: carried(folder, name) for name in (*CARRIED, "zoo")}
            carried(folder, "dropout", checkpoint=f"dropout-{n}", callbacks=[halt])
            results["dropout resumed"] = carried(folder, "dropout", checkpoint=f"dropout-{n}")
            for name in ("random", "diverged", "zoo"):
                carried(folder, name, checkpoint=f"{name}-from-{n}", callbacks=[halt])
                results[f"{name} resumed"] = carried(folder, name, checkpoint=f"{name}-from-{n // 2}")  # what half as many began
            path = Path(folder) / f"clock-{n}"  # only the clock of process 0 says that it is time
            results["again"] = carried(folder, "random", callbacks=[Checkpoint(path, seconds=1e9 if rank() else 0.0), Kept(path)])
            if rank() == 0: torch.save(results, Path(folder) / f"{n}.pt")
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
    torch.testing.assert_close(torch.tensor(a["losses"]), torch.tensor(b["losses"]), rtol=1e-9, atol=0, equal_nan=True,
                               msg=lambda text: f"{what}: {text}")


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
def test_inner_loops_are_carried_on_as_in_one_process(tmp_path):
    alone = {name: carried(None, name) for name in ALIKE}
    assert [math.isfinite(x) for x in alone["diverged"]["losses"]] == [True] * 3 + [False] + [True] * 4  # the second trajectory ends at once
    for name in ("random", "diverged", "zoo"): carried(tmp_path, name, checkpoint=f"{name}-from-1", callbacks=[halt])
    for processes in (2, 4):
        status, text = torchrun(processes, tmp_path, "carried")
        assert status == 0, text[-3000:]
        seen = torch.load(tmp_path / f"{processes}.pt")
        for name in alone: close(seen[name], alone[name], f"{name} by {processes}")
        for again, name in (("again", "random"), ("dropout resumed", "dropout")):  # bit for bit
            assert seen[again]["losses"] == seen[name]["losses"], again
            for n, w in seen[name]["weights"].items(): assert torch.equal(seen[again]["weights"][n], w), (again, n)
        for name in ("random", "diverged", "zoo"):
            close(seen[f"{name} resumed"], alone[name], f"{name}, begun by {processes // 2}, ended by {processes}")
            close(carried(tmp_path, name, checkpoint=f"{name}-from-{processes}"), alone[name], f"{name}, begun by {processes}, ended by 1")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["error", "signal"])
def test_what_happens_to_one_process_ends_all_and_the_run_goes_on(tmp_path, kind):
    status, text = torchrun(2, tmp_path, kind)
    assert status != 0, text[-3000:]
    if kind == "error": assert "the disk of process 1 is full" in text and ("process 0 of 2 lost the others" in text or "SIGTERM" in text), text[-3000:]
    else: assert "stopped after meta-step 5; saved" in text and "lost the others" not in text, text[-3000:]
    assert load_checkpoint(tmp_path / f"{kind}.ckpt")["step"] == (4 if kind == "error" else 5)
    close(carried(tmp_path, "random", checkpoint=kind), carried(None, "random"))


def test_gradients_that_know_of_one_process_only_are_refused(monkeypatch):
    class Own(Trajectories):
        takes_share = False
    monkeypatch.setattr("metanb.compute.processes", lambda: 2)
    monkeypatch.setattr("metanb.compute.rank", lambda: 0)
    monkeypatch.setattr("metanb.train.agree", lambda flag, device: flag)
    monkeypatch.setattr("metanb.train.start_alike", lambda learner: None)
    learner, sampler = start()
    with pytest.raises(ValueError, match="sampler: Own does not say takes_share = True"): fit(learner, Own(learner, sampler, 4, tasks=4), 1, 4)


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
