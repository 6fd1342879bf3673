"""What fit and evaluate promise, where it takes processes, signals or broken files to see it."""
import copy, json, math, os, resource, signal, subprocess, sys
from pathlib import Path

import pytest, torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as rates

from metanb.core import SGD, Learner, MetaLearner, Task, first_order, mean
from metanb.maml import MAML
from metanb.models import MLP
from metanb.tasks import Sinusoid
from metanb.train import LogFile, TensorBoard, derive, evaluate, fit, load_checkpoint, load_learner, save_checkpoint

ROOT = Path(__file__).parent.parent
SINES = Sinusoid(shots=10, queries=10)


def mlp(drop=0.0): return nn.Sequential(nn.Linear(1, 20), nn.ReLU(), nn.Dropout(drop), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 1))


def new(seed=0, **kw):
    torch.manual_seed(seed)
    return MetaLearner(mlp(kw.pop("drop", 0.0)), rule=SGD(0.01), **kw)


def weights(learner): return [p.detach().clone() for p in learner.parameters()]
def same(a, b): return all(torch.equal(p, q) for p, q in zip(weights(a), weights(b), strict=True))


def crash(at):
    "A callback that fails after step `at`."
    def step(run):
        if run.step == at: raise ConnectionError
    return step


# ---- processes: kill, Ctrl-C (many kills are in test_faults.py)

RUN = """
import sys, torch
from torch import nn
from metanb.core import SGD, MetaLearner
from metanb.tasks import Sinusoid
from metanb.train import fit
path, out, steps, compile = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "compile"
torch.manual_seed(int(sys.argv[5]) if len(sys.argv) > 5 else 0)
net = nn.Sequential(nn.Linear(1, 20), nn.ReLU(), nn.Dropout(0.1), nn.Linear(20, 1))
learner = MetaLearner(net, rule=SGD(0.01))
opt = torch.optim.Adam(learner.parameters(), 1e-2)
scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=steps)
history = fit(learner, Sinusoid(), steps, 5, opt, scheduler=scheduler, validation=Sinusoid(), validate_every=25, validation_tasks=5,
              checkpoint=None if path == "none" else path, checkpoint_every=3, compile=compile,
              callbacks=[lambda run: print(run.step, flush=True)])
torch.save([learner.state_dict(), history.data["loss"], [v for v in history.data["validation"] if v == v]], out)
"""


def start(path, out, steps=300, how="eager", init=0):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", RUN, str(path), str(out), str(steps), how, str(init)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def equal_runs(a, b):
    (wa, la, va), (wb, lb, vb) = (torch.load(p, weights_only=True) for p in (a, b))
    assert all(torch.equal(wa[n], wb[n]) for n in wa) and la == lb and va == vb


def read_until(process, step):
    for line in process.stdout:
        if int(line) >= step: return
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
def test_resume_of_a_compiled_run_is_equal_too(tmp_path):
    finish(start("none", tmp_path / "whole.pt", how="compile"))
    path = tmp_path / "run.ckpt"
    process = start(path, tmp_path / "killed.pt", how="compile")
    read_until(process, 100)
    process.kill(); process.communicate()
    finish(start(path, tmp_path / "killed.pt", how="compile"))
    equal_runs(tmp_path / "whole.pt", tmp_path / "killed.pt")


@pytest.mark.slow
def test_sigint_saves_and_exits(tmp_path):
    path = tmp_path / "run.ckpt"
    process = start(path, tmp_path / "out.pt", steps=100_000)
    read_until(process, 20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    step = int(out.splitlines()[-1]) if out else 20
    assert process.returncode in (130, -signal.SIGINT) and f"stopped after meta-step {step}; saved {path} at step {step}" in err
    assert load_checkpoint(path)["step"] == step and not (tmp_path / "out.pt").exists()


def test_sigint_without_a_checkpoint_leaves_the_learner_between_two_steps():
    learner, seen = new(), []
    def after(run):
        seen.append(run.step)
        if run.step == 4: os.kill(os.getpid(), signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="after meta-step 4; no checkpoint was asked for"):
        fit(learner, SINES, 10, 3, callbacks=[after])
    assert seen == [1, 2, 3, 4] and signal.getsignal(signal.SIGINT) is before
    twin = new()
    fit(twin, SINES, 4, 3)
    assert same(learner, twin)


# ---- checkpoints

def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(tmp_path):
    path = tmp_path / "run.ckpt"
    save_checkpoint(path, dict(step=1))
    old, limits, handler = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match=r"run.ckpt could not be written \(.*\); the one from before is still there"):
            save_checkpoint(path, dict(step=2, big=torch.zeros(10_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["run.ckpt"]


def test_a_folder_that_cannot_be_made_shows_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    seen = []
    with pytest.raises(OSError): fit(new(), SINES, 2, 2, checkpoint=tmp_path / "file" / "run.ckpt", callbacks=[seen.append])
    assert not seen


def test_damage_is_named_and_the_learner_left_alone(tmp_path):
    path = tmp_path / "run.ckpt"
    fit(new(), SINES, 3, 2, checkpoint=path)
    good = path.read_bytes()
    for bad in (b"", good[:100], good[:-1], good[:5000] + bytes([good[5000] ^ 4]) + good[5001:], good[1:]):
        path.write_bytes(bad)
        learner = new(seed=1)
        for load in (lambda: fit(learner, SINES, 5, 2, checkpoint=path), lambda: load_learner(learner, path)):
            with pytest.raises(ValueError, match="run.ckpt is damaged"): load()
        assert same(learner, new(seed=1)) and path.read_bytes() == bad
    fit(new(), SINES, 3, 2, checkpoint=path, resume=False)
    assert load_checkpoint(path)["step"] == 3


def test_a_leftover_of_a_killed_save_does_no_harm(tmp_path):
    path = tmp_path / "run.ckpt"
    draft = tmp_path / ".run.ckpt.1.1.part"
    draft.write_bytes(b"half a checkpoint")
    os.utime(draft, (0, 0))  # of long ago, so no living process is writing it
    fit(new(), SINES, 3, 2, checkpoint=path)
    assert os.listdir(tmp_path) == ["run.ckpt"] and load_checkpoint(path)["step"] == 3


def warm_up(opt): return rates.SequentialLR(opt, [rates.LinearLR(opt, 0.1, 1, 5), rates.ExponentialLR(opt, 0.9)], [5])


SCHEDULERS = {
    "step": lambda o: rates.StepLR(o, 4), "milestones": lambda o: rates.MultiStepLR(o, [3, 9]),
    "cosine": lambda o: rates.CosineAnnealingLR(o, 20), "lambda": lambda o: rates.LambdaLR(o, lambda s: 1 / (1 + s)),
    "cycle": lambda o: rates.OneCycleLR(o, 0.01, total_steps=30),
    "sequence": warm_up, "plateau": lambda o: rates.ReduceLROnPlateau(o, patience=0),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_any_optimizer_and_scheduler_resumes(tmp_path, opt, scheduler):
    def run(path=None, callbacks=()):
        learner = new()
        o = OPTIMIZERS[opt](learner.parameters())
        return learner, fit(learner, SINES, 12, 2, o, scheduler=SCHEDULERS[scheduler](o), checkpoint=path, checkpoint_every=3,
                            callbacks=callbacks, validation=SINES, validate_every=2, validation_tasks=3)
    with pytest.raises(ConnectionError): run(tmp_path / "c", [crash(7)])
    (a, whole), (b, resumed) = run(), run(tmp_path / "c")
    assert same(a, b) and whole["lr"] == resumed["lr"] and (scheduler == "plateau" or len(set(whole["lr"])) > 1)


@pytest.mark.parametrize("change, names", [
    (dict(seed=1), "seed was 0, now 1"),
    (dict(tasks=3), "tasks was 2, now 3"),
    (dict(sampler=Sinusoid(shots=5)), "Sinusoid.shots was 10, now 5"),
    (dict(learner=MetaLearner(mlp(), rule=SGD(0.02))), "SGD.lr was 0.01, now 0.02"),
    (dict(learner=MetaLearner(mlp(), rule=SGD(0.01), steps=2)), "MetaLearner.steps was 1, now 2"),
    (dict(learner=MetaLearner(nn.Linear(1, 1), rule=SGD(0.01))), "weight init.model"),
    (dict(combine=lambda g: mean(g)), "combine was mean, now <lambda>"),
    (dict(steps=1), "at step 3, beyond steps=1")])
def test_another_runs_checkpoint_is_refused_by_name(tmp_path, change, names):
    path = tmp_path / "run.ckpt"
    fit(new(), SINES, 3, 2, checkpoint=path)
    with pytest.raises(ValueError, match="run.ckpt") as e:
        fit(**{**dict(learner=new(), sampler=SINES, steps=5, tasks=2, checkpoint=path), **change})
    assert names in str(e.value) and "resume=False" in str(e.value)


def test_a_finished_run_returns_its_history_at_once(tmp_path):
    a, b = new(), new(seed=5)
    first = fit(a, SINES, 4, 2, checkpoint=tmp_path / "c")
    again = fit(b, SINES, 4, 2, checkpoint=tmp_path / "c", callbacks=[lambda run: pytest.fail("a step was taken")])
    assert again.data["loss"] == first.data["loss"] and same(a, b) and [type(s) for s in again["step"]] == [int] * 4


def test_best_checkpoint_is_the_one_with_the_best_validation(tmp_path):
    learner = new()
    opt = torch.optim.SGD(learner.parameters(), 0.05)
    history = fit(learner, SINES, 30, 2, opt, validation=SINES, validate_every=3, validation_tasks=20, checkpoint=tmp_path / "c")
    best = min((v, s) for s, v in zip(history["step"], history["validation"]) if not math.isnan(v))
    assert load_checkpoint(tmp_path / "c.best")["step"] == best[1]
    again = evaluate(load_learner(new(seed=3), tmp_path / "c.best"), SINES, 20, None, derive(0, "validation"))
    assert again.mean[-1].item() == pytest.approx(best[0], rel=1e-5)


def test_a_checkpoint_of_another_model_is_refused_by_load_learner(tmp_path):
    fit(new(), SINES, 1, 2, checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="does not fit this MetaLearner"): load_learner(MetaLearner(nn.Linear(1, 1)), tmp_path / "c")


# ---- what a meta-step depends on

def test_runs_repeat_and_leave_the_users_random_numbers_alone():
    torch.manual_seed(11); expected = torch.rand(3)
    torch.manual_seed(11)
    a, b = (MetaLearner(copy.deepcopy(net), rule=SGD(0.01)) for net in [new(drop=0.5).init.model] * 2)
    torch.manual_seed(11)
    fit(a, SINES, 5, 3, validation=SINES, validate_every=2)
    assert torch.equal(torch.rand(3), expected)
    fit(b, SINES, 5, 3)  # validation changes nothing
    assert same(a, b)
    c = new(drop=0.5)
    fit(c, SINES, 5, 3, seed=1)
    assert not same(a, c)


def test_chunks_and_compiling_change_rounding_alone():
    reference = new(); fit(reference, SINES, 5, 6)
    for chunk in (1, 4):
        other = new(); fit(other, SINES, 5, 6, chunk=chunk)
        for p, q in zip(weights(reference), weights(other)): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_only_the_optimizers_parameters_move():
    learner = new()
    before = weights(learner)
    fit(learner, SINES, 2, 2, torch.optim.Adam(list(learner.parameters())[-1:]))
    assert [torch.equal(p, q) for p, q in zip(before, weights(learner))] == [True] * 5 + [False]


def test_a_frozen_parameter_stays():
    learner = new()
    first = next(learner.parameters()).requires_grad_(False)
    before = first.clone()
    history = fit(learner, SINES, 2, 2)
    assert torch.equal(first, before) and first.grad is None and len(history) == 2


def test_combine_and_clip_are_used():
    learner, twin = new(), new()
    fit(learner, SINES, 1, 3, torch.optim.SGD(learner.parameters(), 1.0), combine=lambda g: {n: 0 * t[0] + 2 for n, t in g.items()},
        clip=lambda ps: nn.utils.clip_grad_value_(ps, 0.5))
    for p, q in zip(weights(learner), weights(twin)): torch.testing.assert_close(p, q - 0.5)


def test_training_mode_while_training_and_evaluation_mode_while_evaluating():
    modes = []
    class Spy(nn.Module):
        def __init__(self): super().__init__(); self.f = nn.Linear(1, 1)
        def forward(self, x): modes.append(self.training); return self.f(x)
    learner = MetaLearner(Spy()).eval()
    fit(learner, SINES, 1, 2); assert set(modes) == {True}
    modes.clear(); evaluate(learner, SINES, 2); assert set(modes) == {False} and learner.training
    modes.clear(); fit(learner, SINES, 2, 2, validation=SINES, validate_every=1); assert modes[-1] is False and modes[0] is True


# ---- non-finite

class Fails(Learner):
    "A learner of one number whose loss is `bad` in the steps of a given x."
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(()))
    def forward(self, task): return self.w * task.x.sum()


class Counting:
    "x is 1, and NaN or worse at step 3."
    def __init__(self, bad): self.bad = bad
    def sample(self, T, seed=0, step=0, start=0):
        x = torch.full((T, 1, 1), self.bad if step == 3 else 1.0)
        return Task(x, x, x, x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_nonfinite_stops_with_the_step_and_the_checkpoint_named(tmp_path, bad):
    learner = Fails()
    opt = torch.optim.SGD(learner.parameters(), 0.1)
    with pytest.raises(FloatingPointError, match=r"meta-step 4: .*after step 3.*c at step 2"):
        fit(learner, Counting(bad), 6, 2, opt, checkpoint=tmp_path / "c", checkpoint_every=2)
    assert learner.w.item() == pytest.approx(0.7) and load_checkpoint(tmp_path / "c")["step"] == 2


def test_nonfinite_can_be_skipped_and_is_counted(tmp_path):
    learner = Fails()
    opt = torch.optim.Adam(learner.parameters(), 0.1)
    history = fit(learner, Counting(math.nan), 6, 2, opt, nonfinite="skip", callbacks=[LogFile(tmp_path / "log.jsonl")])
    assert history.skipped == 1 and len(history) == 6 and math.isfinite(learner.w.item()) and opt.state[learner.w]["step"] == 5
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[3])["loss"] is None


# ---- callbacks

def test_log_files_hold_each_step_once_after_a_crash(tmp_path):
    log = lambda: LogFile(tmp_path / "log.csv")
    args = dict(sampler=SINES, steps=8, tasks=2, checkpoint=tmp_path / "c", checkpoint_every=3)
    with pytest.raises(ConnectionError): fit(new(), **args, callbacks=[log(), crash(5)])
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 1 + 5  # closed in order, after the error
    fit(new(), **args, callbacks=[log()])
    assert [line.split(",")[0] for line in (tmp_path / "log.csv").read_text().splitlines()] == ["step", *map(str, range(1, 9))]


def test_tensorboard_gets_the_scalars(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = fit(new(), SINES, 10, 2, validation=SINES, validate_every=5, callbacks=[TensorBoard(tmp_path, every=2)])
    read = events.EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in read.Scalars("loss")] == [2, 4, 5, 6, 8, 10] and [e.step for e in read.Scalars("validation")] == [5, 10]
    assert read.Scalars("loss")[-1].value == pytest.approx(history["loss"][-1], rel=1e-6)


def test_tensorboard_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"): TensorBoard("logs")


def test_end_is_told_after_an_error_and_no_broken_state_is_saved(tmp_path):
    class Spy:
        def step(self, run):
            if run.step == 4: raise RuntimeError("mine")
        def end(self, run): self.error = run.error
    spy = Spy()
    with pytest.raises(RuntimeError, match="mine"): fit(new(), SINES, 8, 2, callbacks=[spy], checkpoint=tmp_path / "c", checkpoint_every=3)
    assert str(spy.error) == "mine" and load_checkpoint(tmp_path / "c")["step"] == 3


def test_a_callback_can_stop_the_run_and_the_checkpoint_is_current(tmp_path):
    def stop(run): run.stop = run.step == 4
    assert len(fit(new(), SINES, 8, 2, callbacks=[stop], checkpoint=tmp_path / "c")) == 4 and load_checkpoint(tmp_path / "c")["step"] == 4


def test_progress_leaves_nothing_in_a_log_file(capfd):
    fit(new(), SINES, 5, 2)
    assert capfd.readouterr() == ("", "")


# ---- evaluate

class Classes:
    "Two classes, told apart by the sign of x."
    def sample(self, T, seed=0, step=0, start=0):
        g = [torch.Generator().manual_seed(hash((seed, step, start + i)) % 2**31) for i in range(T)]
        x = torch.stack([torch.randn(16, 1, generator=k) for k in g])
        return Task(x[:, :8], (x[:, :8, 0] > 0).long(), x[:, 8:], (x[:, 8:, 0] > 0).long())


def test_evaluate_classification_gives_accuracy_and_the_norm_mode():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    for norm in ("batch", "running"):
        learner = MetaLearner(net, rule=SGD(0.5), loss=F.cross_entropy, norm=norm)
        result = evaluate(learner, Classes(), tasks=50, steps=20)
        assert (result.metric, result.norm, result.steps, result.tasks, result.seed) == ("accuracy", norm, 20, 50, 1)
        assert result.values.shape == (50, 21) and result.mean[-1] > result.mean[0]
        assert f"statistics: {norm}" in repr(result) and "\n" not in repr(result)
        torch.testing.assert_close(result.ci95, 1.96 * result.values.std(0) / 50**0.5)
    history = fit(learner, Classes(), 4, 3, validation=Classes(), validate_every=2)
    assert history.metric == "accuracy"
    assert evaluate(learner, Classes(), 5, 2, metric="loss").metric == "cross_entropy"


def test_best_means_largest_for_accuracy(tmp_path):
    torch.manual_seed(0)
    learner = MetaLearner(nn.Linear(1, 2), rule=SGD(0.1), loss=F.cross_entropy)
    history = fit(learner, Classes(), 20, 3, validation=Classes(), validate_every=2, checkpoint=tmp_path / "c")
    seen = {s: v for s, v in zip(history["step"], history["validation"]) if not math.isnan(v)}
    assert load_checkpoint(tmp_path / "c.best")["step"] == min(s for s in seen if seen[s] == max(seen.values()))


def test_the_three_purposes_draw_different_tasks():
    drawn = []
    class Spy:
        def sample(self, T, seed=0, step=0, start=0): drawn.append(seed); return SINES.sample(T, seed=seed, step=step, start=start)
    fit(new(), Spy(), 1, 2, seed=1, validation=SINES)
    training = set(drawn); drawn.clear()
    fit(new(), SINES, 1, 2, seed=1, validation=Spy())
    validation = set(drawn); drawn.clear()
    evaluate(new(), Spy(), 2, seed=1)
    assert training == {1} and len(training | validation | set(drawn)) == 3


def test_evaluate_restores_each_modules_own_mode():
    learner = new()
    learner.train(); learner.init.eval()
    evaluate(learner, SINES, 3)
    assert learner.training and not learner.init.training and torch.is_grad_enabled()


def test_evaluate_own_metric_and_one_task():
    worst = lambda outputs, y: (outputs - y).abs().max()
    result = evaluate(new(), SINES, tasks=1, steps=2, metric=worst)
    assert result.metric == "<lambda>" and result.values.shape == (1, 3) and result.ci95.isnan().all()


def test_a_learner_in_double_takes_single_precision_tasks():
    learner = new().double()
    fit(learner, SINES, 2, 2)
    assert next(learner.parameters()).dtype == torch.float64 and evaluate(learner, SINES, 3).values.dtype == torch.float64


# ---- refusals

def foreign(): return torch.optim.SGD(mlp().parameters())


@pytest.mark.parametrize("change, error, says", [
    (dict(learner=mlp), TypeError, "learner: expected"),
    (dict(sampler=[1]), TypeError, "sampler: expected an object with sample"),
    (dict(steps=-1), ValueError, "steps=-1"), (dict(steps=2.5), TypeError, "steps=2.5"),
    (dict(tasks=0), ValueError, "tasks=0"), (dict(chunk=0), ValueError, "chunk=0"),
    (dict(opt="adam"), TypeError, "opt: expected a torch.optim.Optimizer, got str"),
    (dict(opt=foreign()), ValueError, "none of its parameters belong"),
    (dict(scheduler=rates.StepLR(foreign(), 1)), ValueError, "scheduler: it belongs to another"),
    (dict(clip=-1), ValueError, "clip=-1"), (dict(compile="no"), ValueError, "compile='no'"),
    (dict(nonfinite="ignore"), ValueError, "nonfinite='ignore'"),
    (dict(validation=3), TypeError, "validation: expected an object with sample"),
    (dict(validation=SINES, metric="f1"), ValueError, "metric='f1'"),
    (dict(validation=SINES, validate_every=0), ValueError, "validate_every=0"),
    (dict(validation=SINES, validation_tasks=0), ValueError, "validation_tasks=0"),
    (dict(checkpoint="c", checkpoint_every=0), ValueError, "checkpoint_every=0"), (dict(callbacks=[3]), TypeError, "callbacks: expected")])
def test_misuse_is_refused_by_name(change, error, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as e: fit(**{**dict(learner=new(), sampler=SINES, steps=3, tasks=2, progress=False), **change})
    assert says in str(e.value)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_with_a_sampler_on_the_cpu(tmp_path, compile):
    learner, cpu = new().cuda(), new()
    history = fit(learner, SINES, 20, 5, checkpoint=tmp_path / "c", compile=compile)
    fit(cpu, SINES, 20, 5)
    for p, q in zip(weights(learner), weights(cpu)): torch.testing.assert_close(p.cpu(), q, rtol=1e-3, atol=1e-4)
    other = new(seed=4).cuda()
    assert fit(other, SINES, 20, 5, checkpoint=tmp_path / "c")["loss"] == history["loss"] and same(learner, other)
    assert evaluate(learner, SINES, 10).values.is_cuda
    assert load_learner(new(seed=2), tmp_path / "c")(Task(*(t[0] for t in SINES.sample(1)))).isfinite()


class Stateful:
    "A sampler, combiner and callback in one; what it does depends on how many meta-steps it has seen."
    def __init__(self): self.n = 0
    def sample(self, tasks, **which): return SINES.sample(tasks, **{**which, "seed": self.n % 5})
    def __call__(self, grads): return {n: g.mean(0) * (1 + self.n) for n, g in grads.items()}
    def step(self, run): self.n += 1
    def state_dict(self): return {"n": self.n}
    def load_state_dict(self, state): self.n = state["n"]


def test_parts_with_a_state_resume(tmp_path):
    "A sampler, combiner or callback that has a state continues from the checkpoint, each saved once."
    def run(steps, path=None):
        torch.manual_seed(0)
        learner, own = MAML(MLP(1, 8, 1)), Stateful()
        fit(learner, own, steps, 3, torch.optim.SGD(learner.parameters(), 1e-3), combine=own, callbacks=[own], checkpoint=path)
        return own.n, torch.cat([p.flatten() for p in learner.parameters()])

    run(3, tmp_path / "c")
    assert len(load_checkpoint(tmp_path / "c")["others"]) == 1
    resumed, straight = run(7, tmp_path / "c"), run(7)
    assert resumed[0] == straight[0] == 7 and torch.equal(resumed[1], straight[1])


def test_another_axis_is_another_run(tmp_path):
    "A checkpoint remembers the functions chosen on the axes."
    run = lambda **axes: fit(MAML(MLP(1, 8, 1), **axes), SINES, 1, 2, checkpoint=tmp_path / "c")
    run()
    with pytest.raises(ValueError, match="learner.gradient was exact, now first_order"): run(gradient=first_order)
    with pytest.raises(ValueError, match="learner.penalty was none, now <lambda>"): run(penalty=lambda learner, task, params: 0.0)
