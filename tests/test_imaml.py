"What `12_imaml` promises of any model, caller and trainer; the closed forms are tested in the notebook."
import copy
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.func import vmap
from torch.nn import functional as F
from torch.testing import assert_close

from metanb.core import Last, SGD, Task, dot, exact, first_order, meta_grads, task_grads
from metanb.imaml import IMAML, NewtonCG, Proximal, conjugate_gradients, implicit
from metanb.maml import Adam, FOMAML, MAML
from metanb.tasks import Quadratic, Sinusoid
from metanb.train import evaluate, fit

F64 = torch.float64


def tanh_net(seed=0, inputs=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def sines(T=3): return Sinusoid(amplitude=(0.1, 2.0), shots=6, queries=6, dtype=F64).sample(T, seed=3)


def solve(A, b, steps): return conjugate_gradients(lambda v: {"w": A @ v["w"]}, {"w": b}, steps)["w"]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 6), seed=st.integers(0, 10**6), extra=st.integers(0, 40))
def test_conjugate_gradients_solve_positive_definite_systems_and_stay_there(n, seed, extra):
    generator = torch.Generator().manual_seed(seed)
    root, b = torch.randn(n, n, generator=generator, dtype=F64), torch.randn(n, generator=generator, dtype=F64)
    A = root @ root.T + torch.eye(n, dtype=F64)
    assert_close(solve(A, b, n + extra), torch.linalg.solve(A, b), rtol=1e-5, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 6), seed=st.integers(0, 10**6), scale=st.sampled_from([0.0, 1e-30, 1.0, 1e12]))
def test_conjugate_gradients_are_finite_on_any_symmetric_system(n, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    root, b = torch.randn(n, n, generator=generator), scale * torch.randn(n, generator=generator)
    assert solve(root + root.T, b, 30).isfinite().all()


def test_each_task_stops_conjugate_gradients_for_itself():
    A = torch.stack([torch.eye(3), -torch.eye(3), torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.zeros(3, 3)])
    b = torch.ones(4, 3)
    together = vmap(lambda A, b: solve(A, b, 6))(A, b)
    assert_close(together, torch.stack([solve(*pair, 6) for pair in zip(A, b)]))
    assert_close(together, torch.stack([b[0], b[1], 1 / torch.tensor([1.0, 2.0, 4.0]), b[3]]))


@pytest.mark.parametrize("rule", [None, Adam(0.02), NewtonCG(4)], ids=["SGD", "Adam", "Newton-CG"])
@pytest.mark.parametrize("adapt", [None, "head", "body"])
def test_a_batch_chunks_a_loop_and_backward_agree(rule, adapt):
    tasks = sines()
    learner = IMAML(tanh_net(), lr=0.05, steps=3, adapt=adapt, learn_lam=True, **({"rule": rule} if rule else {}))
    grads, losses = meta_grads(learner, tasks)
    for chunk in (1, 2):
        other = meta_grads(learner, tasks, chunk=chunk)
        assert_close(other, (grads, losses))
    for i in range(3):
        learner.zero_grad()
        loss = learner(Task(*(t[i] for t in tasks)))
        loss.backward()
        assert_close(loss.detach(), losses[i])
        for n, p in learner.named_parameters(): assert_close(p.grad, grads[n][i])


@pytest.mark.parametrize("adapt", [None, "head", "body"])
def test_the_implicit_gradient_is_the_unrolled_one_once_converged(adapt):
    options = dict(lr=0.05, steps=400, lam=3.0, adapt=adapt, learn_lam=True)
    unrolled, _ = meta_grads(IMAML(tanh_net(), gradient=exact, **options), sines())
    ours, _ = meta_grads(IMAML(tanh_net(), cg_steps=40, **options), sines())
    assert_close(ours, unrolled, rtol=1e-5, atol=1e-8)


def test_newton_and_gradient_descent_find_the_same_minimum():
    task = Task(*(t[0] for t in sines()))
    slow, fast = (IMAML(tanh_net(), lam=3.0, **o).adapt(task.x, task.y) for o in (dict(lr=0.05, steps=500), dict(rule=NewtonCG(20), steps=12)))
    assert_close(fast, slow, rtol=1e-6, atol=1e-8)


def test_a_newton_step_never_raises_the_proximal_loss():
    tasks, learner = Sinusoid(dtype=F64).sample(6), IMAML(tanh_net(), rule=NewtonCG(3), steps=6, lam=0.01)
    for task in map(lambda t: Task(*t), zip(*tasks)):
        start = learner.init()
        path = [learner.task_loss(p, task.x, task.y) + 0.005 * sum(((p[n] - start[n]) ** 2).sum() for n in p) for p in learner.path(task.x, task.y)]
        assert all(after <= before for before, after in zip(path, path[1:]))


def test_zero_curvature_and_zero_steps_give_the_first_order_gradient():
    tasks, net = Quadratic(3, dtype=F64).sample(4), nn.Linear(3, 1, bias=False).double()
    flat = tasks._replace(x=0 * tasks.x)
    assert_close(meta_grads(IMAML(net, steps=4), flat), meta_grads(IMAML(net, steps=4, gradient=first_order), flat))
    assert_close(meta_grads(IMAML(net, steps=0), flat)[1], meta_grads(MAML(net, steps=0), flat)[1])


def test_at_a_vanishing_pull_the_first_order_proximal_learner_is_fomaml():
    ours, theirs = IMAML(tanh_net(), lr=0.05, steps=4, lam=1e-13, gradient=first_order), FOMAML(tanh_net(), lr=0.05, steps=4)
    assert_close(meta_grads(ours, sines()), meta_grads(theirs, sines()))
    task = Task(*(t[0] for t in sines()))
    assert_close(ours.predict(task.x, task.y, task.xq), theirs.predict(task.x, task.y, task.xq))


def test_dead_units_give_zeros_not_nan():
    net = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    nn.init.constant_(net[0].bias, -1e3)
    for rule in ({}, {"rule": NewtonCG()}):
        grads, losses = meta_grads(IMAML(net, steps=3, cg_steps=20, **rule), sines())
        assert losses.isfinite().all() and all(g.isfinite().all() for g in grads.values())
    solved = sines()
    solved = solved._replace(y=0 * solved.y, yq=0 * solved.yq)  # nothing to learn: all gradients are zero
    for p in net.parameters(): nn.init.zeros_(p)
    assert all((g == 0).all() for g in meta_grads(IMAML(net, steps=3), solved)[0].values())


def test_images_batch_norm_and_minibatches():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x, y = torch.rand(2, 6, 1, 8, 8), torch.arange(6).remainder(3).expand(2, 6)
    tasks = Task(x, y, x.flip(1), y.flip(1))
    learner = IMAML(net, lr=0.1, steps=4, loss=F.cross_entropy, batch=3)
    grads, losses = meta_grads(learner, tasks)
    assert_close(meta_grads(learner, tasks, chunk=1), (grads, losses), rtol=1e-3, atol=1e-5)
    assert learner.predict(x[0], y[0], x[0]).shape == (5, 6, 3)


def test_the_meta_gradient_compiles_to_the_same_numbers():
    tasks, learner = sines(), IMAML(tanh_net(), lr=0.05, steps=2, cg_steps=2)
    params = {n: p.detach() for n, p in learner.named_parameters()}
    traced = torch.compile(lambda p, t: task_grads(learner, p, t), backend="eager", fullgraph=True)
    assert_close(traced(params, tasks), meta_grads(learner, tasks))


def test_it_trains_evaluates_resumes_and_copies(tmp_path):
    sampler, file = Sinusoid(shots=5, queries=5), tmp_path / "run.pt"
    make = lambda: IMAML(tanh_net().float(), lr=0.05, steps=3, learn_lam=True)
    learner, halves = make(), make()
    history = fit(learner, sampler, steps=6, tasks=4, progress=False)
    fit(halves, sampler, steps=3, tasks=4, progress=False, checkpoint=file)
    again = make()
    fit(again, sampler, steps=6, tasks=4, progress=False, checkpoint=file)
    assert_close(again.state_dict(), learner.state_dict(), rtol=0, atol=0)
    assert len(history) == 6 and learner.log_lam != make().log_lam
    assert evaluate(learner, sampler, tasks=4, steps=None).values.shape == (4, 4)
    tasks = sampler.sample(2)
    for twin in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))): assert_close(meta_grads(twin, tasks), meta_grads(learner, tasks))


def test_another_lambda_is_another_run(tmp_path):
    sampler, file = Sinusoid(), tmp_path / "run.pt"
    fit(IMAML(tanh_net(), lam=2.0), sampler, steps=1, tasks=2, progress=False, checkpoint=file)
    with pytest.raises(ValueError, match="lam was 2.0, now 1.0"): fit(IMAML(tanh_net(), lam=1.0), sampler, steps=2, tasks=2, progress=False, checkpoint=file)


class LearnedRate(SGD):
    def __init__(self):
        super().__init__()
        self.lr = nn.Parameter(torch.tensor(0.1))


class EveryStep(Last):
    def at(self, steps): return list(range(steps + 1))
    def value(self, losses): return losses.mean()


@pytest.mark.parametrize("options, message", [
    (dict(lam=0.0), "lam=0.0"), (dict(lam=-1.0), "lam=-1.0"), (dict(lam=float("nan")), "lam=nan"), (dict(lam=float("inf")), "lam=inf"),
    (dict(cg_steps=0), "cg_steps=0"), (dict(lr=-0.1), "lr=-0.1"), (dict(steps=-1), "steps=-1"),
    (dict(objective=EveryStep()), "objective: the implicit gradient"), (dict(rule=LearnedRate()), "rule: a minimum"),
])
def test_bad_settings_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message): IMAML(tanh_net(), **options)


def test_solver_settings_and_types():
    with pytest.raises(ValueError, match="cg_steps=0"): NewtonCG(0)
    with pytest.raises(ValueError, match="halvings=-1"): NewtonCG(halvings=-1)
    with pytest.raises(TypeError, match="cg_steps=2.5"): IMAML(tanh_net(), cg_steps=2.5)
    with pytest.raises(TypeError, match="lam='2': give a number"): IMAML(tanh_net(), lam="2")
    with pytest.raises(TypeError, match="lr='0.1': give a number"): IMAML(tanh_net(), lr="0.1")
    IMAML(tanh_net(), rule=LearnedRate(), gradient=exact)  # learned rates are fine where the path counts
    assert isinstance(IMAML(tanh_net()), Proximal) and IMAML(tanh_net()).gradient is implicit


def test_a_penalty_has_its_implicit_gradient():
    "A ridge on the adapted weights is part of what is differentiated: implicit and exact gradients of the sum agree."
    ridge = lambda learner, task, params: 0.3 * dot(params, params)
    learners = [IMAML(tanh_net(), lr=0.1, steps=300, lam=2.0, cg_steps=40, penalty=ridge, **axes) for axes in ({}, dict(gradient=exact))]
    assert_close(*(meta_grads(learner, sines(2)) for learner in learners), rtol=1e-5, atol=1e-7)


def test_newtons_loop_serves_any_learner():
    "NewtonCG under MAML, without the proximal term: least squares is solved in one step."
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, dtype=F64), torch.randn(6, 1, dtype=F64)
    learner = MAML(nn.Linear(3, 1, bias=False).double(), steps=1, rule=NewtonCG(cg_steps=3))
    assert_close(learner.adapt(x, y)["weight"].T, torch.linalg.lstsq(x, y).solution)
