"What `19_hierarchical` promises of its GRUs, its rule, the log objective, the zoo and training on it."
import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from metanb.core import SGD, Task, first_order, meta_grads
from metanb.hierarchical import (Bowl, HierarchicalRule, LogAlong, Problem, Rescaled, Rosenbrock, Teacher, Valley, blank, fit_zoo, gru_cell, lengths,
                                 per_tensor, per_weight, ratio, relative_log, running_rms, slow_gru, unseen, zoo)
from metanb.lstm import LearnedOptimizer, LSTMRule, load_rule, owners, quadratic_run, run_rule, save_rule, training_run
from metanb.maml import MAML
from metanb.models import MLP
from metanb.tasks import Quadratic, Sinusoid
from metanb.train import load_learner
from metanb.unroll import Along, FiniteOnly, Recomputed, Truncated, fit_truncated, segment_grads

F64 = torch.float64


def rule(dtype=F64, seed=0, **settings):
    torch.manual_seed(seed)
    return HierarchicalRule(**{"rates": (1e-2, 1e-2), **settings}).to(dtype)


def roll(rule, grads, dtype=F64):
    "The weights after each of the given gradients, from zero."
    params = {n: torch.zeros_like(g) for n, g in grads[0].items()}
    state, points = rule.init(params), []
    for k, g in enumerate(grads):
        params, state = rule(params, g, state, k)
        points.append(params)
    return points, state


def sequence(steps=6, dtype=F64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [{"w": torch.randn(3, 2, generator=generator, dtype=dtype), "b": torch.randn((), generator=generator, dtype=dtype)} for _ in range(steps)]


def one(tasks): return Task(*(t[0] for t in tasks))


# ---- pieces

@pytest.mark.parametrize("shape", [(7,), ()], ids=["rows", "one"])
def test_gru_is_torchs(shape):
    torch.manual_seed(0)
    cell = slow_gru(3, 5).double()
    x, h = torch.randn(*shape, 3, dtype=F64), torch.randn(*shape, 5, dtype=F64)
    assert_close(gru_cell(cell, x, h), cell(x, h))
    extra = torch.randn(15, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, h, e: gru_cell(cell, x, h, e), (x.requires_grad_(), h.requires_grad_(), extra))
    loop = torch.stack([gru_cell(cell, a, b) for a, b in zip(x.reshape(-1, 3), h.reshape(-1, 5))])
    assert_close(torch.func.vmap(lambda a, b: gru_cell(cell, a, b))(x.reshape(-1, 3), h.reshape(-1, 5)), loop)


@pytest.mark.parametrize("size", [1e-28, 1e-12, 1.0, 1e12, 1e30], ids=str)
def test_running_rms_at_any_size(size):
    a, s = torch.tensor([3.0, -1.0, 0.0]), torch.tensor([4.0, 0.0, 2.0])
    assert_close(running_rms(size * a, size * s, 0.75) / size, (0.75 * s**2 + 0.25 * a**2).sqrt())


def test_running_rms_has_the_right_slopes():
    a, s, d = (torch.tensor(v, dtype=F64, requires_grad=True) for v in ([1.0, -2.0, 0.3], [0.5, 1.0, 4.0], 0.9))
    assert torch.autograd.gradcheck(running_rms, (a, s, d))
    zeros = torch.zeros(2, requires_grad=True)
    total = ratio(zeros, running_rms(zeros, zeros, torch.tensor(0.5))).sum() + relative_log(zeros).sum()
    assert torch.autograd.grad(total, zeros)[0].abs().sum() == 0


def test_means_over_tensors_and_back():
    x = torch.arange(10.0).view(5, 2)
    assert_close(per_tensor(x, [3, 0, 2]), torch.tensor([[2.0, 3.0], [0.0, 0.0], [7.0, 8.0]]))
    assert_close(per_weight(torch.tensor([[1.0], [2.0], [3.0]]), [2, 0, 1]), torch.tensor([[1.0], [1.0], [3.0]]))


# ---- the rule

def test_first_step_by_hand():
    "No past yet: every average is the gradient, every input asinh(±1); the rest is the three equations."
    r, g = rule(sizes=(4,), timescales=3).eval(), torch.tensor([2.0, -0.5, 3.0], dtype=F64)
    moved, (alone, tensors, whole) = r({"w": torch.zeros(3, dtype=F64)}, {"w": g}, r.init({"w": g}), 0)
    u = g.sign()[:, None] * math.asinh(1)
    x = torch.cat([u.expand(3, 3), torch.zeros(3, 3, dtype=F64), (u * u).expand(3, 2), torch.zeros(3, 1, dtype=F64)], 1)
    h = r.cells[0](x, r.starts[0].expand(3, 4))
    d = h @ r.out.weight[0] + x[:, :3] @ r.shortcut
    assert_close(moved["w"], -(math.log(1e-2) + r.offset).exp() * d / d.square().mean().sqrt())
    assert_close(alone["w"][:, :4], h)
    assert_close(alone["w"][:, 4:7], g[:, None].expand(3, 3)); assert_close(alone["w"][:, 7:10], g.abs()[:, None].expand(3, 3))
    assert tensors == {} and whole == ()


def test_averages_double_in_length():
    r = rule(timescales=3)
    with torch.no_grad(): r.out.weight.zero_(); r.offsets[0] = math.log(0.8 / 0.2)
    grads = sequence(5)
    _, (alone, _, _) = roll(r, grads)
    n, averages = r.sizes[0], [grads[0]["b"]] * 3
    for g in grads[1:]: averages = [0.8 ** (0.5**k) * a + (1 - 0.8 ** (0.5**k)) * g["b"] for k, a in enumerate(averages)]
    assert_close(alone["b"][0, n:n + 3], torch.stack(averages))


@pytest.mark.parametrize("sizes", [(5,), (5, 6), (5, 6, 7)], ids=["weights", "tensors", "global"])
def test_levels(sizes):
    "Alone, a tensor moves as it does beside others unless a global GRU ties them; a weight's GRU hears its tensor."
    r, grads = rule(sizes=sizes, timescales=1).eval(), sequence()
    together, state = roll(r, grads)
    alone, _ = roll(r, [{"w": g["w"]} for g in grads])
    same = torch.allclose(together[-1]["w"], alone[-1]["w"], atol=1e-12)
    assert same == (len(sizes) < 3)
    assert [tuple(t.shape) for t in state[0].values()] == [(6, 10), (1, 10)]
    assert len(state[1]) == 2 * (len(sizes) > 1) and len(state[2]) == (len(sizes) > 2)
    parts = owners(r.init(grads[0]), ["w", "b"])
    assert parts == ["w", "b"] * min(2, len(sizes)) + [None] * (len(sizes) > 2)


def test_order_within_a_tensor_does_not_matter():
    r, grads, turn = rule().eval(), sequence(), torch.tensor([3, 0, 5, 1, 4, 2])
    a = roll(r, grads)[0][-1]["w"].flatten()[turn]
    b = roll(r, [{"w": g["w"].flatten()[turn], "b": g["b"]} for g in grads])[0][-1]["w"]
    assert_close(a, b)


@pytest.mark.parametrize("factor", [2.0**-60, 1e-3, 1e3, 2.0**60], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
def test_the_loss_has_no_units(factor, dtype):
    r, grads = rule(dtype), sequence(10, dtype)
    plain, scaled = roll(r, grads)[0], roll(r, [{n: factor * t for n, t in g.items()} for g in grads])[0]
    for a, b in zip(plain, scaled): assert_close(a, b, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-31, 1e-20, 1e20, 1e37], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_zero_tiny_and_huge_gradients(value, dtype):
    r, sign = rule(dtype), torch.tensor([1.0, -1.0, 0.0], dtype=dtype)
    grads = [{"w": value * sign * (k % 3 > 0), "one": torch.full((1,), value, dtype=dtype), "none": torch.zeros(0, dtype=dtype)} for k in range(8)]
    def total(weights):
        points = torch.func.functional_call(Roll(r), {f"rule.{n}": w for n, w in weights.items()}, (grads,))
        return sum(p.float().square().sum() for point in points for p in point.values())
    weights = {n: p.detach() for n, p in r.named_parameters()}
    slopes = torch.func.grad(total)(weights)
    end = roll(r, grads)[0][-1]
    assert all(t.isfinite().all() for t in (*end.values(), *slopes.values()))
    assert end["w"][2] == 0  # it never had a gradient
    if value < 1e-30: assert all((t == 0).all() for t in end.values())
    else: assert end["one"] < 0


class Roll(nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, grads): return roll(self.rule, grads)[0]


def test_a_late_first_gradient():
    r, zero = rule(torch.float32), {"w": torch.zeros(3)}
    points, _ = roll(r, [zero] * 50 + [{"w": torch.tensor([1e-5, 0.0, -1e-5])}] * 5)
    assert (points[49]["w"] == 0).all() and points[-1]["w"][0] < 0 < points[-1]["w"][2] and points[-1]["w"][1] == 0


def test_rates_are_drawn_in_training_and_fixed_in_evaluation():
    params, r = {"w": torch.zeros(4000, dtype=F64), "b": torch.zeros(7, dtype=F64)}, rule(rates=(1e-6, 1e-2))
    torch.manual_seed(0); drawn = r.init(params)[0]["w"][:, -1]
    assert math.log(1e-6) <= drawn.min() and drawn.max() <= math.log(1e-2) and abs((drawn.max() - drawn.min()) / math.log(1e2) - 1) < 0.01
    random = torch.get_rng_state()
    fixed = r.eval().init(params)[0]
    assert all((t[:, -1] == math.log(1e-4)).all() for t in fixed.values()) and torch.equal(random, torch.get_rng_state())


def test_steps_do_not_grow_with_the_tensor():
    r = rule().eval()
    for n in (1, 10, 1000):
        g = {"w": torch.randn(n, dtype=F64)}
        step = roll(r, [g])[0][0]["w"]
        assert_close(step.square().mean().sqrt(), (math.log(1e-2) + r.offset).exp().detach())


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=["float32", "float64", "bfloat16"])
def test_untrained_rule_descends(dtype):
    r, losses = rule(dtype, rates=(1e-1, 1e-1)).eval(), []
    params = {"w": torch.ones(20, dtype=dtype)}
    state = r.init(params)
    for k in range(60):
        losses.append(params["w"].float().square().mean().item())
        params, state = r(params, {"w": 2 * params["w"]}, state, k)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("settings, error, words", [
    (dict(sizes=()), ValueError, "sizes"), (dict(sizes=(1, 2, 3, 4)), ValueError, "one to three levels"), (dict(sizes=10), ValueError, "sizes=10"),
    (dict(sizes=(10, 0)), ValueError, r"sizes\[1\]"), (dict(sizes=(2.5,)), TypeError, r"sizes\[0\]"), (dict(timescales=0), ValueError, "timescales"),
    (dict(rates=(0.0, 1.0)), ValueError, "above zero"), (dict(rates=(1e-2, 1e-6)), ValueError, "low must be at most high"), (dict(rates=1e-3), TypeError, "rates")],
    ids=["none", "four", "number", "zero", "float", "timescales", "zero-rate", "reversed", "one-rate"])
def test_bad_settings(settings, error, words):
    with pytest.raises(error, match=words): HierarchicalRule(**settings)


# ---- in the frame

def small(r, steps=4, **axes):
    torch.manual_seed(0)
    sampler = Teacher(3, 2, 4, steps=5, batch=6, queries=8, dtype=F64)
    problem = Problem("net", MLP(3, 4, 2, activation=nn.Tanh, std=None).double(), sampler, nn.functional.cross_entropy, None)
    return problem.run(r, steps, **axes), sampler


def test_meta_gradient_by_finite_differences():
    learner, sampler = small(rule(sizes=(3, 4, 5), timescales=2), steps=5, unroll=5)
    task, names = one(sampler.sample(1)), ["shortcut", "starts.0", "cells.1.weight_ih", "down.20.weight", "keep", "offsets", "out.weight"]
    def value():
        torch.manual_seed(2)
        return learner(task)
    params = dict(learner.rule.named_parameters())
    slopes = torch.autograd.grad(value(), [params[n] for n in names])
    for n, slope in zip(names, slopes):
        flat, at = params[n].data.view(-1), slope.abs().flatten().argmax()
        start, values = flat[at].item(), []
        for shift in (1e-5, -1e-5): flat[at] = start + shift; values.append(value().item())
        flat[at] = start
        assert abs(slope.flatten()[at] - (values[0] - values[1]) / 2e-5) < 1e-6 + 1e-5 * slope.abs().max(), n


def test_vmap_and_loop_agree():
    learner, sampler = small(rule(), steps=4, unroll=2)
    learner.init.moments[:, 1] = 0.0  # no spread: vmap and the loop draw different numbers
    learner.init.moments[:, 0] = torch.linspace(-1, 1, len(learner.init.moments), dtype=F64)
    tasks = sampler.sample(3)
    (grads, losses), (grads1, losses1) = meta_grads(learner, tasks), meta_grads(learner, tasks, chunk=1)
    assert_close(grads, grads1); assert_close(losses, losses1)
    assert set(grads) == {f"rule.{n}" for n, _ in learner.rule.named_parameters()} and losses.isfinite().all()


@pytest.mark.parametrize("gradient", [Recomputed(2), Truncated(2), first_order], ids=["recomputed", "truncated", "first-order"])
def test_gradient_axis(gradient):
    learner, sampler = small(rule(), steps=4, unroll=4)
    task = one(sampler.sample(1))
    def grads(which):
        del learner.gradient
        learner.gradient = which
        torch.manual_seed(1)
        return torch.autograd.grad(learner(task), list(learner.parameters()), allow_unused=True)
    plain, other = grads(Truncated(4)), grads(gradient)
    if isinstance(gradient, Recomputed): assert_close(other, plain)
    assert all(g is None or g.isfinite().all() for g in other)


def test_as_the_rule_of_maml():
    torch.manual_seed(0)
    learner = MAML(MLP(1, 8, 1, std=None), rule=HierarchicalRule(rates=(1e-2, 1e-2)), steps=3, objective=Along(), adapt="head")
    grads, losses = meta_grads(learner, Sinusoid().sample(3))
    assert losses.isfinite().all() and all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("run", [lambda r: (quadratic_run(r, 3, steps=4, unroll=2), Quadratic(3).sample(2)),
                                 lambda r: (training_run(MLP(3, 4, 2), r, steps=4, unroll=2), Teacher(3, steps=5, batch=6).sample(2))], ids=["quadratic", "training"])
def test_in_the_runs_of_lstm(run):
    learner, tasks = run(HierarchicalRule())
    grads, losses = meta_grads(learner, tasks)
    assert losses.isfinite().all() and all(g.isfinite().all() for g in grads.values())
    assert run_rule(learner, HierarchicalRule(), tasks, 6, 2).shape == (2, 4)


def test_learned_optimizer_is_the_inner_loop_and_resumes(tmp_path):
    learner, sampler = small(rule(), steps=5)
    learner.eval()
    task = one(sampler.sample(1))
    torch.manual_seed(1); start = {n: t.clone() for n, t in learner.init().items()}
    torch.manual_seed(1); end = learner.adapt(task.x, task.y)
    net = Rescaled(MLP(3, 4, 2, activation=nn.Tanh, std=None).double())
    net.load_state_dict(start)
    opt = LearnedOptimizer(net.parameters(), learner.rule)
    for k, (x, y) in enumerate(zip(task.x, task.y)):
        if k == 2:
            torch.save(opt.state_dict(), tmp_path / "opt")
            opt = LearnedOptimizer(net.parameters(), learner.rule)
            opt.load_state_dict(torch.load(tmp_path / "opt", weights_only=True))
        opt.zero_grad(); nn.functional.cross_entropy(net(x), y).backward(); opt.step()
    for n, p in net.named_parameters(): assert_close(p.detach(), end[n].detach())


@pytest.mark.parametrize("sizes", [(4,), (4, 5), (4, 5, 6)], ids=["weights", "tensors", "global"])
def test_rules_come_back_from_a_file(sizes, tmp_path):
    r = rule(sizes=sizes, timescales=2)
    save_rule(r, tmp_path / "rule", about="a test")
    again = load_rule(tmp_path / "rule")
    assert (again.sizes, again.timescales, again.rates, again.about) == (sizes, 2, (1e-2, 1e-2), "a test")
    assert_close(roll(again, sequence())[0][-1], roll(r, sequence())[0][-1])


# ---- the objective

def test_log_objective_does_not_depend_on_the_start_or_units():
    losses = torch.tensor([3.0, 1.0, 0.5], dtype=F64, requires_grad=True)
    value = LogAlong(eps=1e-12).value
    assert_close(value(losses), (losses / 3).log().mean()); assert_close(value(7 * losses), value(losses))
    assert_close(torch.autograd.grad(value(losses), losses)[0], 1 / (3 * losses.detach()))


def test_log_objective_in_segments():
    "Two segments' gradients are the whole run's, cut at the same place, weighted by their readings."
    learner, sampler = small(rule(), steps=4, unroll=2)
    learner.objective.eps = 1e-15
    learner.init.moments[:, 1] = 0.3
    tasks, params = sampler.sample(1), {n: p.detach() for n, p in learner.named_parameters()}
    torch.manual_seed(3); whole, value = meta_grads(learner, tasks, chunk=1)
    torch.manual_seed(3); a, first, carry = segment_grads(learner, params, tasks, (), 0, 2, chunk=1)
    b, second, _ = segment_grads(learner, params, tasks, carry, 2, 4, chunk=1)
    for n in whole: assert_close(whole[n], (3 * a[n] + 2 * b[n]) / 5)
    assert first.isfinite().all() and second.isfinite().all() and value.isfinite().all()


@pytest.mark.parametrize("losses", [[0.0, 0.0], [0.0, 1.0], [1e-38, 1e-39], [1e38, 1e-38]], ids=str)
def test_log_objective_at_the_ends(losses):
    losses = torch.tensor(losses, requires_grad=True)
    value = LogAlong().value(losses)
    assert value.isfinite() and torch.autograd.grad(value, losses)[0].isfinite().all()


@pytest.mark.parametrize("eps", [0, 1, -1.0, math.nan], ids=str)
def test_log_objective_refuses(eps):
    with pytest.raises(ValueError, match="eps"): LogAlong(eps=eps)


# ---- the zoo

def test_bowl():
    task = one(Bowl(6, (100.0, 100.0), dtype=F64).sample(1))
    assert_close(torch.linalg.eigvalsh(task.xq.mT @ task.xq).flip(0), torch.logspace(0, -2, 6, dtype=F64))
    assert task.x.shape == (1, 6, 6) and task.y.shape == (1, 6, 1) and torch.equal(task.x[0], task.xq)


@pytest.mark.parametrize("dim", [2, 5])
def test_valley(dim):
    task, model = one(Valley(dim, dtype=F64).sample(1)), Rosenbrock(dim).double()
    (p, q), theta = task.xq[0], torch.randn(dim, dtype=F64)
    model.theta.data = theta.clone()
    expected = sum((p - theta[i]) ** 2 + q**2 * (theta[i + 1] - theta[i] ** 2) ** 2 for i in range(dim - 1))
    assert_close((model(task.xq) - task.yq).square().sum().detach(), expected)


def test_teacher_is_learnable_and_noisy():
    x, y = (t.flatten(0, 1) for t in one(Teacher(4, noise=0.0, steps=40, dtype=F64).sample(1))[:2])
    target = nn.functional.one_hot(y, 2).to(F64)
    assert ((x @ torch.linalg.lstsq(x, target)[0]).argmax(-1) == y).double().mean() > 0.97
    a, b = (one(Teacher(4, noise=s, steps=40).sample(1)).y for s in (0.0, 0.5))
    assert 0.02 < (a != b).float().mean() < 0.4


@pytest.mark.parametrize("sampler", [Bowl(3), Valley(3), Teacher(3, 3, 4, steps=2, batch=3, queries=4)], ids=["bowl", "valley", "teacher"])
def test_tasks_depend_on_their_number_alone(sampler):
    many, few = sampler.sample(5, seed=7, step=2), sampler.sample(2, seed=7, step=2, start=3)
    for a, b in zip(many, few): assert_close(a[3:], b)
    assert not torch.equal(many.x[0], many.x[1])


@pytest.mark.parametrize("problem", zoo(3, 4) + unseen(3, 4), ids=lambda p: p.name.replace(" ", "-"))
def test_every_problem_runs(problem):
    torch.manual_seed(0)
    grads, losses = meta_grads(problem.run(HierarchicalRule(), steps=2, unroll=1), problem.sampler.sample(2))
    assert losses.isfinite().all() and all(g.isfinite().all() for g in grads.values())


def test_rescaled_gradients_and_starts():
    torch.manual_seed(0)
    model, x = MLP(3, 4, 2, std=None).double(), torch.randn(5, 3, dtype=F64)
    zoomed = Rescaled(copy.deepcopy(model), 10.0)
    model(x).sum().backward(); zoomed(x).sum().backward()
    for a, b in zip(model.parameters(), zoomed.parameters()): assert_close(b.grad, 10 * a.grad); assert_close(b, a / 10)
    problem = Problem("", blank(50), Bowl(50), zoom=10.0)
    assert abs(problem.run(SGD()).init()["inner.weight"].std() / 0.1 - 1) < 0.4


def test_noise_on_gradients_not_on_losses():
    task, still = one(Bowl(3).sample(1)), Problem("", blank(3), Bowl(3), std=0.5)
    quiet, loud = still.run(SGD(0.1), steps=2), still._replace(noise=5.0).run(SGD(0.1), steps=2)
    params = {"inner.weight": torch.ones(1, 3)}
    assert quiet.task_loss(params, task.xq, task.yq) == loud.task_loss(params, task.xq, task.yq)
    ends = [run.adapt(task.x, task.y)["inner.weight"] for run in (quiet, loud) if torch.manual_seed(0)]
    assert (ends[0] - ends[1]).abs().max() > 0.1


@pytest.mark.parametrize("make, error, words", [
    (lambda: Bowl(0), ValueError, "dim"), (lambda: Bowl(2, (0.5, 2.0)), ValueError, "condition"), (lambda: Valley(1), ValueError, "dim"),
    (lambda: Valley(2, (0.0, 1.0)), ValueError, "steepness"), (lambda: Teacher(classes=1), ValueError, "classes"),
    (lambda: Teacher(noise=-1.0), ValueError, "noise"),
    (lambda: Teacher(dtype=torch.float16), TypeError, "dtype"), (lambda: Rescaled(nn.Linear(1, 1), 0.0), ValueError, "zoom"),
    (lambda: Problem("", blank(2), Bowl(2), noise=-1.0).run(SGD()), ValueError, "noise"),
    (lambda: Problem("", blank(2), Bowl(2), factor=0.0).run(SGD()), ValueError, "factor"),
    (lambda: fit_zoo(HierarchicalRule(), [], 3), ValueError, "problems"), (lambda: fit_zoo(HierarchicalRule(), zoo(), -1), ValueError, "rounds"),
    (lambda: lengths(0), ValueError, "shortest"), (lambda: lengths(1, -1.0), ValueError, "mean"),
    (lambda: Rosenbrock(1), ValueError, "dim=1: give a whole number of at least 2"), (lambda: blank(0), ValueError, "dim=0"),
    (lambda: Teacher(noise="x"), TypeError, "noise='x': give a number"), (lambda: lengths(mean="x"), TypeError, "mean='x'"),
    (lambda: Rescaled(3, 1.0), TypeError, "model: expected a torch.nn.Module"), (lambda: Rescaled(nn.Linear(1, 1), "x"), TypeError, "zoom='x'"),
    (lambda: Problem("", blank(2), Bowl(2), noise="x").run(SGD()), TypeError, "noise='x'"), (lambda: LogAlong(eps="x"), TypeError, "eps='x'"),
    (lambda: fit_zoo(HierarchicalRule, zoo(), 1), TypeError, "rule: expected a rule with init"), (lambda: fit_zoo(3, zoo(), 1), TypeError, "rule: expected a rule"),
    (lambda: fit_zoo(SGD(), zoo(), 1), ValueError, "rule: SGD has no parameters to train"),
    (lambda: fit_zoo(HierarchicalRule(), zoo, 1), TypeError, "problems: expected a list of `Problem`s such as zoo.., got function"),
    (lambda: fit_zoo(HierarchicalRule(), zoo()[0], 1), TypeError, "problems: expected a list"),
    (lambda: fit_zoo(HierarchicalRule(), ["bowl"], 1), TypeError, "problems: expected a list"),
    (lambda: fit_zoo(HierarchicalRule(), zoo(), 1.5), TypeError, "rounds=1.5"), (lambda: fit_zoo(HierarchicalRule(), zoo(), 1, segments=0), ValueError, "segments=0"),
    (lambda: fit_zoo(HierarchicalRule(), zoo(), 1, segments=1.5), TypeError, "segments=1.5"), (lambda: fit_zoo(HierarchicalRule(), zoo(), 1, unroll=0), ValueError, "unroll=0"),
    (lambda: fit_zoo(HierarchicalRule(), zoo(), 1, unroll=lambda k: 0), ValueError, "unroll=0"), (lambda: fit_zoo(HierarchicalRule(), zoo(), 1, tasks=0), ValueError, "tasks=0"),
    (lambda: fit_zoo(HierarchicalRule(), zoo(), 1, clip=-1.0), ValueError, "clip=-1.0: give a finite number, above zero"),
    (lambda: fit_zoo(HierarchicalRule(), zoo(), 1, clip="x"), TypeError, "clip='x'"), (lambda: fit_zoo(HierarchicalRule(), zoo(), 1, opt="adam"), TypeError, "opt: ")],
    ids=["bowl", "condition", "valley", "steepness", "classes", "noise", "dtype", "zoom", "run-noise", "factor", "problems", "rounds", "shortest",
         "mean", "rosenbrock", "blank", "noise-word", "mean-word", "rescaled-number", "zoom-word", "run-noise-word", "eps-word", "rule-class",
         "rule-number", "rule-fixed", "problems-maker", "problems-one", "problems-names", "rounds-fraction", "segments-zero", "segments-fraction",
         "unroll-zero", "unroll-drawn-zero", "tasks-zero", "clip-negative", "clip-word", "opt-word"])
def test_bad_problems(make, error, words):
    with pytest.raises(error, match=words): make()


# ---- training

def trained(make, rounds=3, **options):
    torch.manual_seed(0)
    r = make()
    return r, fit_zoo(r, [p for p in zoo(4, 4) if p.name in ("bowl", "softmax", "noisy bowl")], rounds, segments=2, unroll=2, tasks=2, **options)


@pytest.mark.parametrize("make", [HierarchicalRule, LSTMRule], ids=["hierarchical", "lstm"])
def test_fit_zoo_trains_any_rule_and_repeats_itself(make):
    (a, rows), (b, again), (c, _) = trained(make), trained(make), trained(make, seed=1)
    assert {r.problem for r in rows} == {"bowl", "softmax", "noisy bowl"} and rows == again and all(r.unroll == 2 and r.skipped == 0 for r in rows)
    assert_close(dict(a.named_parameters()), dict(b.named_parameters()), rtol=0, atol=0)
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters()))


@pytest.mark.parametrize("at", [0, 3, 4, 5], ids=["start", "in-a-round", "between-rounds", "in-the-next"])
def test_fit_zoo_goes_on_from_a_checkpoint(at, tmp_path):
    "Stopped after any meta-step and resumed, it is the uninterrupted run, bit for bit; also with more rounds than were asked for first."
    def halt(run): run.stop = run.step == at
    (a, rows), path = trained(lambda: rule(torch.float32), 4), tmp_path / "run"
    _, first = trained(lambda: rule(torch.float32), 3 if at else 0, checkpoint=path, callbacks=[halt] if at else [])
    assert len(first) == -(-at // 2) and first[:at // 2] == rows[:at // 2]
    b, again = trained(lambda: rule(torch.float32), 4, checkpoint=path)
    assert again == rows
    assert_close(dict(a.named_parameters()), dict(b.named_parameters()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="seed was 0, now 1"): trained(lambda: rule(torch.float32), 4, checkpoint=path, seed=1)
    with pytest.raises(ValueError, match="Rounds.first_order was False, now True"): trained(lambda: rule(torch.float32), 4, checkpoint=path, first_order=True)


def test_a_rule_comes_out_of_a_zoo_checkpoint(tmp_path):
    a, _ = trained(lambda: rule(torch.float32), 2, checkpoint=tmp_path / "run")
    learner = load_learner(zoo(4, 4)[0].run(rule(torch.float32, seed=5)), tmp_path / "run")
    assert_close(dict(learner.rule.named_parameters()), dict(a.named_parameters()), rtol=0, atol=0)


def test_fit_zoo_leaves_diverged_runs_out():
    torch.manual_seed(0)
    r = HierarchicalRule(rates=(1e-2, 1e-2))
    with torch.no_grad(): r.offset.fill_(80.0)  # steps of 1e32
    before = copy.deepcopy(r.state_dict())
    rows = fit_zoo(r, [Problem("valley", Rosenbrock(), Valley())], 1, segments=2, unroll=3, tasks=2)
    assert rows[0].skipped and all(torch.equal(t, before[n]) for n, t in r.state_dict().items())


def test_training_lowers_the_loss():
    problem = Problem("bowl", blank(4), Bowl(4, (1.0, 10.0)))
    torch.manual_seed(0)
    r = HierarchicalRule(rates=(1e-3, 1e-2))
    tasks = problem.sampler.sample(8, seed=5)
    def score():
        return (run_rule(problem.run(r), r.eval(), tasks, 20)[:, -1] + 1e-6).log().mean().item()
    before = score(); r.train()
    fit_zoo(r, [problem], 15, segments=2, unroll=10, opt=torch.optim.Adam(r.parameters(), 1e-2), first_order=True)
    assert score() < before - 0.5


def test_fit_truncated_takes_drawn_lengths():
    learner, sampler = small(rule(), steps=9)
    draws = lengths(2, 1.0)
    history = fit_truncated(learner, sampler, 4, unroll=draws, tasks=2, combine=FiniteOnly(), progress=False)
    assert len(history) == 4 and all(draws(k) >= 2 for k in range(50)) and len({draws(k) for k in range(50)}) > 1
