"What `18_lstm` promises of rules, tuning, `LearnedOptimizer` and rules in files, for any model, dtype and caller."
import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from metanb.core import SGD, Task, first_order, meta_grads
from metanb.data import ImageClasses
from metanb.imaml import NewtonCG
from metanb.lstm import (HAND_MADE, Adagrad, LearnedOptimizer, LSTMRule, Nesterov, RMSprop, area, final, find_class, image_mlp,
                         image_stream, load_rule, log_sign, lstm_cell, owners, quadratic_run, run_rule, save_rule, settings_of,
                         small_conv, squared_error, training_run, tune)
from metanb.maml import MAML, Adam
from metanb.meta_sgd import WeightRates
from metanb.pcgrad import pcgrad
from metanb.tasks import Quadratic, Sinusoid, Stream
from metanb.unroll import FiniteOnly, Momentum, Recomputed, fit_truncated
from metanb.train import evaluate, fit

F64 = torch.float64
TWINS = {"SGD": dict(cls=torch.optim.SGD), "momentum": dict(cls=torch.optim.SGD, momentum=0.9),
         "Nesterov": dict(cls=torch.optim.SGD, momentum=0.9, nesterov=True), "RMSprop": dict(cls=torch.optim.RMSprop),
         "Adagrad": dict(cls=torch.optim.Adagrad), "Adam": dict(cls=torch.optim.Adam)}


def net(dtype=F64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def rule(dtype=F64, **settings):
    torch.manual_seed(0)
    return LSTMRule(**{"hidden": 6, **settings}).to(dtype)


def train(model, opt, steps, seed=1, missing=lambda k: ()):
    generator, dtype = torch.Generator().manual_seed(seed), next(model.parameters()).dtype
    for k in range(steps):
        x = torch.randn(8, 3, generator=generator, dtype=F64).to(dtype)
        opt.zero_grad()
        (model(x) - x[:, :2]).square().mean().backward()
        for i in missing(k): list(model.parameters())[i].grad = None
        opt.step()
    return [p.detach().clone() for p in model.parameters()]


def stream(steps=6, dtype=F64):
    torch.manual_seed(0)
    x = torch.randn(90, 3, dtype=dtype)
    return Stream(x, x[:, :2].sin(), steps=steps, batch=8, queries=8)


class Shared(nn.Module):
    "A rule with a state that all parameters share, beside one for each."
    def init(self, params):
        return {n: (torch.zeros_like(p), p.new_zeros(())) for n, p in params.items()}, {"total": next(iter(params.values())).new_zeros(())}

    def forward(self, params, grads, state, step):
        own, common = state
        total = common["total"] + sum(g.square().sum() for g in grads.values())
        own = {n: (own[n][0] + g, own[n][1] + 1) for n, g in grads.items()}
        return {n: p - 0.1 * own[n][0] / own[n][1] / (1 + total) for n, p in params.items()}, (own, {"total": total})


# ---- the network

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
def test_log_sign_is_finite_and_continuous(dtype):
    g = torch.tensor([0.0, -0.0, 1e-38, math.exp(-10), 1.0, -1e30], dtype=dtype, requires_grad=True)
    out = log_sign(g)
    assert out.isfinite().all() and out.dtype == dtype
    assert torch.autograd.grad(out.float().sum(), g)[0].isfinite().all()
    if dtype == F64:
        edge = torch.tensor([math.exp(-10) * (1 - 1e-12), math.exp(-10) * (1 + 1e-12)], dtype=F64)
        assert_close(log_sign(edge)[0], log_sign(edge)[1], rtol=1e-9, atol=1e-9)


def test_log_sign_mirrors():
    g = torch.randn(50, dtype=F64) * torch.logspace(-8, 2, 50, dtype=F64)
    big = g.abs() >= math.exp(-5)
    assert_close(log_sign(-g, 5.0)[big], log_sign(g, 5.0)[big] * torch.tensor([1.0, -1.0], dtype=F64))
    assert_close(log_sign(-g, 5.0)[~big, 1], -log_sign(g, 5.0)[~big, 1])


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("p", [None, 10.0], ids=["raw", "log"])
def test_rule_is_torchs_lstm(layers, p):
    r = rule(layers=layers, p=p, scale=0.3)
    lstm = nn.LSTM(1 if p is None else 2, 6, layers, dtype=F64)
    lstm.load_state_dict({f"{n}_l{k}": w for k, cell in enumerate(r.cells) for n, w in cell.named_parameters()})
    params, g = {"w": torch.zeros(2, 2, dtype=F64)}, torch.randn(7, 4, dtype=F64)
    state = r.init(params)
    for k in range(7): params, state = r(params, {"w": g[k].view(2, 2)}, state, k)
    seen = g[..., None] if p is None else log_sign(g, p)
    assert_close(params["w"].flatten(), 0.3 * r.out(lstm(seen)[0])[..., 0].sum(0))


def test_lstm_cell_has_second_derivatives():
    torch.manual_seed(0)
    cell = nn.LSTMCell(2, 3).double()
    inputs = [torch.randn(2, n, dtype=F64, requires_grad=True) for n in (2, 3, 3)]
    assert torch.autograd.gradgradcheck(lambda x, h, c: lstm_cell(cell, x, h, c), inputs)


def test_permuting_coordinates_permutes_the_step():
    r, order = rule(), torch.randperm(6, generator=torch.Generator().manual_seed(0))
    w, g = torch.zeros(6, dtype=F64), torch.randn(6, dtype=F64, generator=torch.Generator().manual_seed(1))
    one, _ = r({"w": w}, {"w": g}, r.init({"w": w}), 0)
    other, _ = r({"w": w}, {"w": g[order]}, r.init({"w": w}), 0)
    assert_close(other["w"], one["w"][order])


def test_zero_gradients_and_scalar_parameters_have_finite_meta_gradients():
    r = rule()
    params = {"s": torch.zeros((), dtype=F64), "e": torch.zeros(1, 1, dtype=F64)}
    state = r.init(params)
    for k in range(3): params, state = r(params, {n: torch.zeros_like(p) for n, p in params.items()}, state, k)
    assert params["s"].shape == () and params["e"].shape == (1, 1)
    grads = torch.autograd.grad(sum(p.sum() for p in params.values()), list(r.parameters()))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("make, message", [
    (lambda: LSTMRule(hidden=0), "hidden"), (lambda: LSTMRule(layers=0), "layers"), (lambda: LSTMRule(p=0.0), "p=0.0"),
    (lambda: LSTMRule(p=1e3), "p=1000"), (lambda: LSTMRule(scale=0.0), "scale=0.0"), (lambda: LSTMRule(scale=math.nan), "scale=nan"),
    (lambda: RMSprop(-1.0), "lr=-1"), (lambda: RMSprop(gamma=1.0), "gamma=1"), (lambda: Adagrad(-1.0), "lr=-1"),
    (lambda: Nesterov(-1.0), "lr=-1"),
    (lambda: small_conv(size=7), "size"), (lambda: tune(None, SGD, None, []), "rates: the grid is empty"),
    (lambda: RMSprop(eps=-1.0), "eps=-1.0"), (lambda: Adagrad(eps=-1.0), "eps=-1.0"), (lambda: quadratic_run(SGD(), dim=0), "dim=0"),
    (lambda: small_conv(outputs=0), "outputs=0"), (lambda: small_conv(features=0), "features=0")],
    ids=["hidden", "layers", "p-zero", "p-huge", "scale-zero", "scale-nan", "rmsprop-lr", "rmsprop-gamma", "adagrad-lr", "nesterov-lr",
         "conv-size", "grid", "rmsprop-eps", "adagrad-eps", "quadratic-dim", "conv-outputs", "conv-features"])
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message): make()


@pytest.mark.parametrize("make, message", [
    (lambda: LSTMRule(p="x"), "p='x': give a number"), (lambda: LSTMRule(scale="x"), "scale='x'"), (lambda: RMSprop(gamma="x"), "gamma='x'"),
    (lambda: RMSprop("fast"), "lr='fast'"), (lambda: image_mlp(hidden=20), "hidden=20: give the units of each hidden layer"),
    (lambda: tune(None, SGD, None, 0.1), "rates=0.1: give several"), (lambda: LearnedOptimizer(net().parameters(), SGD(), lr="x"), "lr='x'")],
    ids=["p", "scale", "gamma", "lr", "hidden", "rates", "optimizer-lr"])
def test_what_is_no_number_or_no_list_is_named(make, message):
    with pytest.raises(TypeError, match=message): make()


# ---- as a meta-learner

@pytest.mark.parametrize("order", [True, False], ids=["first-order", "exact"])
def test_vmap_and_loop_agree(order):
    torch.manual_seed(0)
    options = dict(steps=6, unroll=3, first_order=order, loss=F.mse_loss, std=0.0)  # no spread: no randomness
    learner = training_run(net(), rule(), **options).double()
    tasks = stream().sample(3)
    (together, a), (alone, b) = meta_grads(learner, tasks), meta_grads(learner, tasks, chunk=1)
    assert_close(a, b)
    assert_close(together, alone)
    assert set(together) == {f"rule.{n}" for n, _ in learner.rule.named_parameters()}


def test_exact_meta_gradient_is_the_finite_difference():
    task = Task(*(t[0] for t in stream().sample(1)))
    learner = training_run(net(), rule(scale=0.3), steps=4, unroll=4, first_order=False, loss=F.mse_loss).double()
    def loss():
        torch.manual_seed(3)
        return learner(task)
    w = learner.rule.cells[1].weight_ih
    slope = torch.autograd.grad(loss(), w)[0][3, 2]
    with torch.no_grad():
        w[3, 2] += 1e-6; above = loss()
        w[3, 2] -= 2e-6; below = loss()
    assert_close(slope, (above - below) / 2e-6, rtol=1e-5, atol=1e-9)


def test_first_order_takes_the_gradient_as_constant():
    "By hand, with the gradients of the run fed in as numbers."
    f = Task(*(t[0] for t in Quadratic(3, dtype=F64).sample(1)))
    learner = quadratic_run(rule(p=None), dim=3, steps=4, unroll=4).double()
    torch.manual_seed(5); torch.autograd.backward(learner(f))
    r = copy.deepcopy(learner.rule); r.zero_grad()
    torch.manual_seed(5); params = learner.init()
    state, total = r.init(params), 0.0
    for k in range(4):
        theta = params["weight"].detach().requires_grad_()
        g = torch.autograd.grad(squared_error(f.x @ theta.mT, f.y), theta)[0]
        params, state = r(params, {"weight": g}, state, k)
        total = total + squared_error(f.x @ params["weight"].mT, f.y) / 4
    total.backward()
    for p, q in zip(learner.rule.parameters(), r.parameters()): assert_close(p.grad, q.grad)


def test_composes_with_other_axes():
    tasks = Sinusoid(shots=6, queries=6, dtype=F64).sample(3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    plain = MAML(model, rule=rule(), steps=4, gradient=first_order, adapt="head")
    expected, losses = meta_grads(plain, tasks)
    again = MAML(model, rule=rule(), steps=4, gradient=Recomputed(2, True), adapt="head")
    grads, values = meta_grads(again, tasks)
    assert_close(values, losses); assert_close(grads, expected)
    assert all(g.isfinite().all() for g in pcgrad(expected, seed=0).values())
    assert evaluate(plain, Sinusoid(dtype=F64), tasks=3, steps=2).mean.isfinite().all()


def test_training_lowers_the_loss_and_skips_what_diverges():
    torch.manual_seed(0)
    learner, combine = quadratic_run(LSTMRule(hidden=8, p=None), dim=3, steps=10, unroll=5), FiniteOnly()
    before = meta_grads(learner, Quadratic(3).sample(16, seed=9))[1].mean()
    opt = torch.optim.Adam(learner.parameters(), 1e-2)
    history = fit_truncated(learner, Quadratic(3), 40, tasks=8, opt=opt, combine=combine, progress=False)
    assert meta_grads(learner, Quadratic(3).sample(16, seed=9))[1].mean() < 0.7 * before and len(history) == 40


def test_whole_runs_train_by_fit_too():
    learner = training_run(net(torch.float32), LSTMRule(hidden=4), steps=4, unroll=2, loss=F.mse_loss)
    assert len(fit(learner, stream(5, torch.float32), 2, tasks=2, progress=False)) == 2


def test_problems():
    assert sum(p.numel() for p in image_mlp().parameters()) == 784 * 20 + 20 + 200 + 10
    assert image_mlp(49, (4, 3), 5, nn.ReLU)(torch.rand(2, 1, 7, 7)).shape == (2, 5)
    few = ImageClasses(torch.randint(0, 256, (3, 20, 1, 8, 8), dtype=torch.uint8), ["a", "b", "c"])
    sampler = image_stream(few, steps=3, batch=8)
    tasks = sampler.sample(2)
    assert tasks.x.shape == (2, 4, 8, 1, 8, 8) and tasks.y.dtype == torch.int64 and tasks.y.max() == 2
    conv = small_conv(3, channels=1, filters=2, features=4, size=8)
    learner = training_run(conv, rule(torch.float32), steps=3, std=0.0)
    (together, a), (alone, b) = (meta_grads(learner, tasks, chunk=chunk) for chunk in (None, 1))
    assert_close(a, b); assert_close(together, alone, rtol=1e-3, atol=1e-6)


# ---- comparing

def test_same_seed_same_start_and_the_callers_randomness_untouched():
    learner, tasks = training_run(net(torch.float32), SGD(), steps=3, loss=F.mse_loss), stream(4, torch.float32).sample(2)
    torch.manual_seed(7); expected = torch.rand(1)
    torch.manual_seed(7); a = run_rule(learner, SGD(0.1), tasks, seed=1)
    assert torch.rand(1) == expected
    b = run_rule(learner, Adam(0.1), tasks, seed=1)
    assert_close(a[:, 0], b[:, 0])
    assert a[:, 0].ne(run_rule(learner, SGD(0.1), tasks, seed=2)[:, 0]).all()
    assert isinstance(learner.rule, SGD) and learner.rule.lr == 0.01
    assert run_rule(learner, SGD(0.1), tasks, steps=4, every=2).shape == (2, 3)


def test_scores():
    curves = torch.tensor([[9.0, *range(20)]])
    assert final(curves).item() == 18.5 and area(curves).item() == 9.5
    assert final(torch.tensor([[3.0, 2.0]])).item() == 2.0


def test_tune_finds_the_best_rate_and_counts_divergence_as_worst():
    w = torch.full((2, 1, 1), 0.5**0.5)
    sweep = tune(quadratic_run(SGD(), dim=1, steps=10, std=1.0), SGD, Task(w, 0 * w, w, 0 * w), [0.2, 1.0, 1e20])
    assert sweep.best()[0] == 1.0 and sweep.best()[1].lr == 1.0 and not sweep.at_edge()
    assert sweep.scores()[2] == math.inf and sweep.curves.shape == (3, 2, 11)
    assert tune(quadratic_run(SGD(), dim=1, steps=10, std=1.0), SGD, Task(w, 0 * w, w, 0 * w), [0.2, 0.5]).at_edge()


# ---- as an optimizer

def twin(name, params, lr=0.05):
    options = dict(TWINS[name])
    return options.pop("cls")(params, lr=lr, **options)


@pytest.mark.parametrize("name", TWINS)
def test_is_torchs_optimizer_also_where_gradients_are_missing(name):
    missing = lambda k: {0: (0, 3), 3: (1,), 5: (0, 1, 2, 3)}.get(k, ())
    a, b = net(), net()
    ours = train(a, LearnedOptimizer(a.parameters(), HAND_MADE[name](0.05)), 8, missing=missing)
    assert_close(ours, train(b, twin(name, b.parameters()), 8, missing=missing))


def test_groups_and_schedulers():
    a, b = net(), net()
    groups = lambda m: [dict(params=m[0].parameters(), lr=0.5), dict(params=m[2].parameters())]
    ours = LearnedOptimizer(groups(a), SGD(0.1))
    theirs = torch.optim.SGD([dict(params=b[0].parameters(), lr=0.05), dict(params=b[2].parameters(), lr=0.1)])
    schedulers = [torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 0.5**k) for opt in (ours, theirs)]
    for k in range(4):
        assert_close(train(a, ours, 1, seed=k), train(b, theirs, 1, seed=k))
        for s in schedulers: s.step()
    extra = nn.Linear(2, 2).double()
    ours.add_param_group(dict(params=extra.parameters()))
    assert len(ours.param_groups) == 3 and ours.param_groups[2]["lr"] == 1.0


def test_closure_is_called_with_gradients_on():
    model, x = net(), torch.randn(4, 3, dtype=F64)
    opt = LearnedOptimizer(model.parameters(), rule())
    def closure():
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss
    first = opt.step(closure)
    assert first.requires_grad and opt.step(closure) != first
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    before = [p.clone() for p in model.parameters()]
    opt.step()  # nothing has a gradient
    assert_close(before, list(model.parameters()))


def test_is_the_inner_loop():
    learner = training_run(net(), rule(), steps=6, loss=F.mse_loss, std=None).double()
    task, model = Task(*(t[0] for t in stream().sample(1))), net()
    torch.manual_seed(2); model.load_state_dict({n: t.clone() for n, t in learner.init().items()})
    torch.manual_seed(2); expected = learner.adapt(task.x, task.y)
    opt = LearnedOptimizer(model.parameters(), learner.rule)
    for x, y in zip(task.x, task.y): opt.zero_grad(); F.mse_loss(model(x), y).backward(); opt.step()
    for n, p in model.named_parameters(): assert_close(p.detach(), expected[n].detach())
    assert all(p.requires_grad for p in learner.rule.parameters())  # only the optimizer's copy is frozen


@pytest.mark.parametrize("make", [lambda: rule(torch.float32), lambda: rule(), lambda: Adam(0.05), Shared],
                         ids=["lstm-32", "lstm-64", "Adam", "shared"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_state_dict_round_trip_is_exact(make, dtype, tmp_path):
    missing = lambda k: (1,) if k == 0 else ()
    straight, parts = net(dtype), net(dtype)
    opt = LearnedOptimizer(straight.parameters(), make()); train(straight, opt, 3, missing=missing)
    expected = train(straight, opt, 3, seed=2)
    opt = LearnedOptimizer(parts.parameters(), make()); train(parts, opt, 3, missing=missing)
    torch.save(opt.state_dict(), tmp_path / "opt")
    again = LearnedOptimizer(parts.parameters(), make())
    again.load_state_dict(torch.load(tmp_path / "opt", weights_only=True))
    for a, b in zip(train(parts, again, 3, seed=2), expected): assert torch.equal(a, b)


def test_loaded_state_is_a_copy_and_groups_keep_their_rate():
    a, b = net(), net()
    opt = LearnedOptimizer(a.parameters(), Momentum(0.1), lr=0.3); train(a, opt, 2)
    other = LearnedOptimizer(b.parameters(), Momentum(0.1)); other.load_state_dict(opt.state_dict()); train(b, other, 2)
    assert other.param_groups[0]["lr"] == 0.3
    p, q = next(a.parameters()), next(b.parameters())
    assert opt.state[p]["step"] == 2 and other.state[q]["step"] == 4 and opt.state[p]["memory"][0].ne(other.state[q]["memory"][0]).any()


def test_copies_and_pickles():
    model = net()
    opt = LearnedOptimizer(model.parameters(), rule()); train(model, opt, 2)
    twin_model, twin_opt = copy.deepcopy((model, opt))
    assert_close(train(twin_model, twin_opt, 2), train(model, opt, 2))
    assert isinstance(pickle.loads(pickle.dumps(opt)).rule, LSTMRule)


def test_precision():
    "bfloat16 weights: the step is computed in float32 and rounded once; the rule's memory stays float32."
    a, b = net(torch.bfloat16), net(torch.bfloat16).float()
    one, two = LearnedOptimizer(a.parameters(), rule(torch.float32)), LearnedOptimizer(b.parameters(), rule(torch.float32))
    for p, q in zip(a.parameters(), b.parameters()): p.grad = torch.ones_like(p); q.grad = torch.ones_like(q)
    one.step(); two.step()
    for p, q in zip(a.parameters(), b.parameters()):
        assert p.dtype == torch.bfloat16 and torch.equal(p, q.bfloat16())
        assert one.state[p]["memory"][0].dtype == torch.float32
    c = net(F64); opt = LearnedOptimizer(c.parameters(), rule(torch.float32)); train(c, opt, 1)
    assert opt.state[next(c.parameters())]["memory"][0].dtype == F64


def test_a_shared_state_goes_through_the_groups_steps():
    a, b = net(), net()
    opt = LearnedOptimizer(a.parameters(), Shared())
    ours, r, state = train(a, opt, 3), Shared(), None
    params, generator = dict(b.named_parameters()), torch.Generator().manual_seed(1)
    state = r.init(params)
    for k in range(3):
        x = torch.randn(8, 3, generator=generator, dtype=F64)
        loss = (torch.func.functional_call(b, params, (x,)) - x[:, :2]).square().mean()
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()))))
        params, state = r(params, grads, state, k)
        params = {n: p.detach().requires_grad_() for n, p in params.items()}
    assert_close(ours, [p.detach() for p in params.values()])
    assert_close(opt.state[next(a.parameters())]["shared"][0], state[1]["total"])


def test_rules_with_constants_by_name_take_named_parameters():
    model = net()
    rates = WeightRates({n: p.detach() for n, p in model.named_parameters()}, lr=0.05)
    other = net()
    expected = train(other, torch.optim.SGD(other.parameters(), lr=0.05), 3)
    assert_close(train(model, LearnedOptimizer(model.named_parameters(), rates), 3), expected)
    with pytest.raises(ValueError, match="params: WeightRates has constants by parameter name and none for '0'.*model.named_parameters()"):
        train(other, LearnedOptimizer(other.parameters(), rates), 1)


def test_any_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 3, batch_first=True))
    tied = nn.Linear(3, 5, bias=False)
    opt = LearnedOptimizer([*model.parameters(), *tied.parameters(), nn.Parameter(torch.zeros(()))], LSTMRule(hidden=4))
    for _ in range(2):
        opt.zero_grad()
        F.cross_entropy(tied(model(torch.arange(5)[None])[0])[0], torch.arange(5)).backward()
        opt.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_what_an_optimizer_refuses():
    ps = lambda: [nn.Parameter(torch.zeros(2))]
    for wrong in (None, torch.optim.SGD, SGD, nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="rule: expected a rule"): LearnedOptimizer(ps(), wrong)
    with pytest.raises(TypeError, match="loop of its own"): LearnedOptimizer(ps(), NewtonCG())
    with pytest.raises(ValueError, match="lr=-1"): LearnedOptimizer(ps(), SGD(), lr=-1)
    waves = [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]
    with pytest.raises(TypeError, match="real floating-point"): LearnedOptimizer(waves, SGD())
    with pytest.raises(ValueError, match="dtype a group"): LearnedOptimizer(ps() + [nn.Parameter(torch.zeros(2).double())], SGD())
    with pytest.raises(ValueError, match="empty parameter list"): LearnedOptimizer([], SGD())
    table = nn.Embedding(3, 2, sparse=True)
    opt = LearnedOptimizer(table.parameters(), SGD())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse"): opt.step()


def test_state_of_another_rule_is_refused():
    a, b = net(), net()
    opt = LearnedOptimizer(a.parameters(), Adam(0.1)); train(a, opt, 1)
    other = LearnedOptimizer(b.parameters(), Momentum(0.1)); other.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match="does not fit Momentum"): train(b, other, 1)


def test_owners():
    params = {"a": torch.zeros(1), "b": torch.zeros(2)}
    assert owners(({"a": params["a"], "b": (params["b"], params["b"])}, [params["a"]]), params) == ["a", "b", "b", None]
    assert owners((), params) == [] and owners({"h": params, "c": params}, params) == ["a", "b", "a", "b"]
    assert owners({"h": {"h": params["a"]}, "c": {"h": params["a"]}}, ["h"]) == ["h", "h"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda():
    a, b = net(), net().cuda()
    expected = train(a, LearnedOptimizer(a.parameters(), rule()), 4)
    opt, generator = LearnedOptimizer(b.parameters(), rule()), torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(8, 3, generator=generator, dtype=F64).cuda()
        opt.zero_grad(); (b(x) - x[:, :2]).square().mean().backward(); opt.step()
    assert_close([p.detach().cpu() for p in b.parameters()], expected)


# ---- in files

@pytest.mark.parametrize("make", [lambda: rule(), lambda: rule(torch.float32, p=None, layers=1), lambda: Adam(0.3, eps=1e-3),
                                  lambda: Nesterov(0.2, 0.5), lambda: RMSprop(0.1), lambda: SGD(0.5)],
                         ids=["lstm-64", "lstm-raw", "Adam", "Nesterov", "RMSprop", "SGD"])
def test_rules_come_back_from_a_file(make, tmp_path):
    save_rule(make(), tmp_path / "rule", about="glyphs, 3 steps")
    again = load_rule(tmp_path / "rule")
    assert type(again) is type(make()) and settings_of(again) == settings_of(make()) and again.about == "glyphs, 3 steps"
    for k, t in make().state_dict().items(): assert torch.equal(again.state_dict()[k], t) and again.state_dict()[k].dtype == t.dtype
    a, b = net(), net()
    assert_close(train(a, LearnedOptimizer(a.parameters(), again), 2), train(b, LearnedOptimizer(b.parameters(), make()), 2))


class Own(SGD):
    "A user's own rule."


def test_own_rules_need_to_be_named(tmp_path):
    save_rule(Own(0.2), tmp_path / "own")
    with pytest.raises(ValueError, match="not of this package"): load_rule(tmp_path / "own")
    assert load_rule(tmp_path / "own", classes=(Own,)).lr == 0.2


@pytest.mark.parametrize("name", ["os.system", "metanb.data.os", "metanb.core.nn.Linear", "metanb.core.MetaLearner", "metanb.core.scale",
                                  "SGD",
                                  "metanb.no_such.Rule", "metanb.__main__.main", "metanb.lstm.NoRule", "metanb.lstm.",
                                  "metanb.cli.subprocess.Popen"])
def test_only_rules_of_the_package_are_built(name):
    with pytest.raises(ValueError): find_class(name)


def test_damaged_and_foreign_files(tmp_path):
    save_rule(rule(), tmp_path / "rule")
    data = (tmp_path / "rule").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    (tmp_path / "bent").write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    for name in ("cut", "bent"):
        with pytest.raises(ValueError, match="is damaged"): load_rule(tmp_path / name)
    from metanb.train import save_checkpoint
    save_checkpoint(tmp_path / "other", {"step": 1})
    with pytest.raises(ValueError, match="holds no rule"): load_rule(tmp_path / "other")
    save_checkpoint(tmp_path / "wrong", {"rule": "metanb.lstm.LSTMRule", "settings": {"hidden": 3}, "weights": rule().state_dict()})
    with pytest.raises(ValueError, match="does not take these settings and weights"): load_rule(tmp_path / "wrong")
    with pytest.raises(TypeError, match="settings\\(\\)"): save_rule(WeightRates({"w": torch.zeros(2)}), tmp_path / "rates")
