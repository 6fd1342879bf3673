"What `17_shaping` promises: the objectives' gradients and limit cases, learned shapes, flooding, and what bad input gets."
import copy
import math

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.testing import assert_close

from metanb.core import Task, exact, first_order, last, meta_grads
from metanb.dimaml import DIMAML
from metanb.maml import MAML
from metanb.shaping import KINDS, Flooded, Shaped, auc, emphasis, fit_shape, flood, inverse_exponential, shaped_loss
from metanb.tasks import Sinusoid, Stream
from metanb.train import fit
from metanb.unroll import Along, Momentum, Recomputed, StreamLearner, Truncated, fit_truncated, loss_curves

F64 = torch.float64
CURVE = torch.tensor([2.0, 1.2, 0.5, 0.6, 0.3], dtype=F64)


def differences(J, losses, h=1e-6):
    steps = h * torch.eye(len(losses), dtype=losses.dtype)
    return torch.stack([(J(losses + step) - J(losses - step)) / (2 * h) for step in steps])


def net(dtype=F64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)


def stream(dtype=F64, steps=9):
    torch.manual_seed(0)
    x = torch.randn(60, 1, dtype=dtype)
    return Stream(x, torch.sin(2 * x), steps=steps, batch=8, queries=6)


def learner(objective, gradient=exact, dtype=F64, kind=StreamLearner, **axes):
    return kind(net(dtype), rule=Momentum(0.05), steps=9, objective=objective, gradient=gradient, **axes).to(dtype)


# the area

def test_auc_is_a_weighted_sum_and_its_weights_are_its_gradient():
    w = torch.tensor([0.1, 0.0, 2.0, -1.0, 4.0], dtype=F64)
    assert_close(auc(CURVE), CURVE.sum())
    assert_close(auc(CURVE, w), w @ CURVE)
    assert_close(grad(auc)(CURVE, w), w)
    assert_close(vmap(auc)(torch.stack([CURVE, 2 * CURVE])), auc(torch.stack([CURVE, 2 * CURVE])))
    assert_close(auc(CURVE, w.tolist()), auc(CURVE, w))
    assert_close(auc(CURVE, 0.5), 0.5 * auc(CURVE))
    assert auc(torch.tensor([1.0, math.nan])).isnan()


def test_auc_as_an_objective_is_along():
    a, b = (meta_grads(learner(o), stream().sample(2)) for o in (Along(3, reduce="sum"), Along(3, reduce=auc)))
    assert_close(a, b)
    only = Along(3, reduce=lambda losses: auc(losses, [0, 0, 1]))
    assert_close(meta_grads(learner(only), stream().sample(2)), meta_grads(learner(last), stream().sample(2)))


# the target

def test_target_at_its_ends_and_its_slope():
    assert_close(inverse_exponential(0.0, 2.0, 7.0, 0.3), torch.tensor(2.3))
    t = torch.linspace(0, 50, 11, dtype=F64)
    f = inverse_exponential(t, 2.0, 20.0, 0.3)
    assert_close(f, torch.tensor([2 * math.exp(-2 * math.e * v / 20) + 0.3 for v in t.tolist()], dtype=F64))
    assert f.diff().max() < 0 and f.min() > 0.3
    assert_close(inverse_exponential(t, 2.0, 1e12, 0.3), torch.full_like(t, 2.3))  # s → ∞: level
    assert_close(inverse_exponential(t[1:], 2.0, 1e-3, 0.3), torch.full_like(t[1:], 0.3))  # s → 0: a flood
    for argnum in (1, 2, 3):  # in a, s and z
        at = [torch.tensor(v, dtype=F64) for v in (4.0, 2.0, 7.0, 0.3)]
        def f(v): return inverse_exponential(*at[:argnum], v, *at[argnum + 1:])
        assert_close(grad(f)(at[argnum]), (f(at[argnum] + 1e-6) - f(at[argnum] - 1e-6)) / 2e-6, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=["float32", "float64", "bfloat16"])
def test_dtypes_stay(dtype):
    losses = CURVE.to(dtype)
    assert inverse_exponential(torch.arange(3), losses.max(), 5.0, 0.1).dtype == dtype
    for kind in KINDS:
        value = shaped_loss(losses, 5.0, 0.1, kind)
        assert value.dtype == dtype
        assert_close(value.double(), shaped_loss(CURVE, 5.0, 0.1, kind), rtol=0.03 if dtype == torch.bfloat16 else 1e-5, atol=0.03)
    assert emphasis(losses, 0.5).dtype == auc(losses, [1.0] * 5).dtype == dtype


# the shaped objective

@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("detach", [True, False], ids=["constant", "live"])
def test_gradient_by_the_table_and_by_differences(kind, detach):
    t, s, z = torch.arange(5, dtype=F64), 6.0, 0.2
    decay, after = torch.exp(-2 * math.e * t / s), (torch.arange(5) > 0).double()
    r = CURVE - (2.0 * decay + z)
    d = {"signed": torch.ones(5, dtype=F64), "absolute": r.sign(), "squared": 2 * r}[kind] * after
    expected = d + F.one_hot(torch.tensor(0), 5)
    if not detach: expected = expected - F.one_hot(torch.tensor(0), 5) * (d * decay).sum()
    assert_close(grad(lambda L: shaped_loss(L, s, z, kind, detach=detach))(CURVE), expected)
    a = 2.0 if detach else None
    assert_close(differences(lambda L: shaped_loss(L, s, z, kind, a, detach=detach), CURVE), expected, rtol=1e-6, atol=1e-8)


def test_signed_is_auc_up_to_a_constant():
    constants = [auc(L) - shaped_loss(L, 6.0, 0.2) for L in (CURVE, torch.tensor([2.0, 0.1, 0.2, 0.9, 1.0], dtype=F64))]
    assert_close(*constants)
    assert_close(grad(lambda L: shaped_loss(L, 6.0, 0.2))(CURVE), grad(auc)(CURVE))
    tasks = stream().sample(2)
    assert_close(meta_grads(learner(Shaped(3, 0, s=6.0, z=0.2, kind="signed")), tasks)[0], meta_grads(learner(Along(3, 0, reduce=auc)), tasks)[0])


def test_live_signed_is_unbounded_below_once_the_decays_sum_to_more_than_one():
    def J(top, s): return shaped_loss(torch.cat([torch.tensor([top], dtype=F64), CURVE[1:] / 2]), s, 0.1, detach=False)
    for s in (2.0, 6.0, 60.0):
        slope = 1 - torch.exp(-2 * math.e * torch.arange(1, 5, dtype=F64) / s).sum()
        assert_close((J(1e6, s) - J(10.0, s)) / (1e6 - 10), slope, rtol=1e-6, atol=1e-6)
    assert slope < 0


def test_squared_with_a_level_far_below_is_auc():
    for z in (-1e3, -1e6):
        weights = grad(lambda L: shaped_loss(L, 6.0, z, "squared"))(CURVE)[1:] / (-2 * z)
        assert_close(weights, torch.ones(4, dtype=F64), rtol=0, atol=3 / -z)


@pytest.mark.parametrize("kind", list(KINDS))
def test_limit_cases(kind):
    assert_close(shaped_loss(CURVE[:1], 3.0, 0.4, kind), CURVE[0])  # one reading
    assert_close(shaped_loss(torch.zeros(5), 3.0, 0.0, kind), torch.tensor(0.0))
    assert grad(lambda L: shaped_loss(L, 3.0, 0.0, kind, detach=False))(torch.zeros(5)).isfinite().all()
    on = inverse_exponential(torch.arange(8), 3.0, 5.0)
    assert_close(shaped_loss(on, 5.0, kind=kind), torch.tensor(3.0))
    assert shaped_loss(torch.tensor([1.0, math.nan, 0.5]), 3.0, 0.1, kind).isnan()
    assert not shaped_loss(torch.tensor([math.inf, 1.0, 0.5]), 3.0, 0.1, kind).isfinite()
    assert shaped_loss(CURVE, 3.0, -0.5, kind).isfinite()
    assert_close(vmap(lambda L: shaped_loss(L, 3.0, 0.1, kind))(torch.stack([CURVE, 3 * CURVE])), shaped_loss(torch.stack([CURVE, 3 * CURVE]), 3.0, 0.1, kind))
    assert_close(shaped_loss(CURVE, 30.0, 0.1, kind, t=10 * torch.arange(5)), shaped_loss(CURVE, 3.0, 0.1, kind))


def test_a_length_that_became_negative_shows():
    assert inverse_exponential(1.0, 1.0, torch.tensor(-1.0)).isnan()
    assert vmap(lambda s: shaped_loss(CURVE, s, 0.1, "squared"))(torch.tensor([5.0, -5.0], dtype=F64)).isnan().tolist() == [False, True]


# s and z from data, and learned

@pytest.mark.parametrize("a,s,z", [(0.8, 40.0, 0.15), (3.0, 300.0, 0.0), (0.05, 15.0, 0.05)], ids=["usual", "slow", "fast"])
def test_fit_shape_finds_an_exact_curve(a, s, z):
    t = torch.arange(0, 101, 5, dtype=F64)
    exact = inverse_exponential(t, a, s, z)
    assert_close(torch.tensor(fit_shape(exact, t, grid=5000)), torch.tensor([a, s, z]), rtol=0.02, atol=0.005)
    assert_close(fit_shape(exact.expand(2, 3, -1), t), fit_shape(exact, t))
    assert_close(inverse_exponential(t, *fit_shape(torch.full_like(t, 0.4), t)), torch.full_like(t, 0.4))


@pytest.mark.parametrize("kind", ["absolute", "squared"])
def test_learned_target_has_no_say_in_how_low_the_curve_is(kind):
    def best(L):  # over z, with s fixed; both kinds are convex in z
        return shaped_loss(L, 6.0, torch.linspace(-2, 4, 12001, dtype=F64)[:, None], kind, 2.0).min()
    lower = torch.cat([CURVE[:1], CURVE[1:] - 0.2])
    assert_close(best(CURVE), best(lower), rtol=0, atol=1e-6)
    if kind == "squared":
        z = (CURVE - inverse_exponential(torch.arange(5), 2.0, 6.0).double())[1:].mean()
        assert_close(grad(lambda L: shaped_loss(L, 6.0, z, kind, 2.0))(CURVE)[1:].sum(), torch.tensor(0.0, dtype=F64), rtol=0, atol=1e-6)


def test_signed_in_s_and_z_only_falls():
    shape = torch.tensor([6.0, 0.2], dtype=F64)
    for s in (0.5, 6.0, 600.0):
        slope = grad(lambda v: shaped_loss(CURVE, v[0], v[1]))(shape.clone().fill_(s))
        assert slope[0] < 0
        assert_close(slope[1], torch.tensor(-4.0, dtype=F64))


def test_learned_shape_is_fitted_saved_and_positive():
    it = learner(Shaped(3, 0, s=9.0, z=0.2, kind="squared", learn=True))
    opt = torch.optim.Adam([dict(params=it.objective.parameters(), lr=0.3), dict(params=it.init.parameters(), lr=0.0)])
    fit(it, stream(), steps=30, tasks=3, opt=opt, progress=False, compile=False)
    s, z = it.objective.shape()
    assert s > 0 and z > 0 and (s - 9).abs() > 0.5
    other = learner(Shaped(3, 0, s=1.0, z=1.0, kind="squared", learn=True))
    other.load_state_dict(it.state_dict())
    assert_close(other.objective.shape(), (s, z))
    assert_close(copy.deepcopy(it)(Task(*(t[0] for t in stream().sample(1)))), other(Task(*(t[0] for t in stream().sample(1)))))


# in a learner

@pytest.mark.parametrize("kind", ["absolute", "squared"])
@pytest.mark.parametrize("gradient", [exact, Recomputed(4), Recomputed(), first_order], ids=["exact", "recomputed-4", "recomputed", "first-order"])
def test_vmap_loop_and_recomputation_agree(kind, gradient):
    make = lambda g: learner(Shaped(3, 0, s=9.0, z=0.2, kind=kind, learn=True), g)
    tasks = stream().sample(3)
    grads, losses = meta_grads(make(gradient), tasks)
    assert_close(meta_grads(make(gradient), tasks, chunk=1), (grads, losses))
    plain = exact if isinstance(gradient, Recomputed) else gradient
    assert_close(meta_grads(make(plain), tasks), (grads, losses), rtol=1e-9, atol=1e-12)
    assert "objective.log_shape" in grads


def test_meta_gradient_by_differences():
    tasks = stream().sample(2)
    make = lambda: learner(Shaped(3, 0, s=9.0, z=0.2, kind="squared", learn=True, detach=False))
    grads = meta_grads(make(), tasks)[0]
    for name, at in (("objective.log_shape", (0,)), ("objective.log_shape", (1,)), ("init.model.0.weight", (2, 0)), ("init.model.2.bias", (0,))):
        values = []
        for h in (1e-6, -1e-6):
            moved = make()
            with torch.no_grad(): dict(moved.named_parameters())[name][at] += h
            values.append(meta_grads(moved, tasks)[1])
        assert_close(grads[name][(slice(None), *at)], (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-8)


def test_other_learners_and_the_support_side():
    tasks = Sinusoid(amplitude=(0.1, 2.0), shots=6, queries=6, dtype=F64).sample(3, seed=3)
    few = MAML(net(), lr=0.05, steps=6, objective=Shaped(2, 0, s=6.0, kind="absolute"))
    curves = loss_curves(few, tasks, every=2)
    assert_close(meta_grads(few, tasks)[1], shaped_loss(curves, 6.0, 0.0, "absolute", t=torch.arange(0, 7, 2)))
    support = learner(Shaped(3, 0, s=9.0, kind="absolute", on="support"))
    curves = loss_curves(support, stream().sample(2), every=3, on="support")
    assert_close(meta_grads(support, stream().sample(2))[1], shaped_loss(curves, 3.0, 0.0, "absolute"))
    cut = meta_grads(learner(Shaped(3, 0, s=9.0), Truncated(4)), stream().sample(2))[1]  # the graph is cut, the curve is whole
    assert_close(cut, meta_grads(learner(Shaped(3, 0, s=9.0)), stream().sample(2))[1])


def test_shaped_dimaml():
    def make(gradient): return DIMAML(net(), steps=9, lr=0.05, objective=Shaped(3, 3, s=9.0, z=0.2, kind="squared", learn=True), gradient=gradient).double()
    results = []
    for gradient, chunk in ((exact, None), (Recomputed(4), None), (Recomputed(4), 1)):
        torch.manual_seed(1)
        results.append(meta_grads(make(gradient), Task(*(t[:1] for t in stream().sample(1))), chunk=chunk))
    assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)
    assert_close(results[0], results[2], rtol=1e-9, atol=1e-12)
    assert {"objective.log_shape", "init.location.0.weight", "init.scale.0.weight"} <= set(results[0][0])


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_inner_run_that_explodes_never_reaches_the_parameters(kind):
    wild = StreamLearner(net(torch.float32), rule=Momentum(1e30), steps=9, objective=Shaped(3, s=9.0, z=0.2, kind=kind))
    before = copy.deepcopy(wild.state_dict())
    with pytest.raises(FloatingPointError, match="meta-step 1"):
        fit(wild, stream(torch.float32), 2, tasks=2, progress=False, compile=False)
    with pytest.warns(UserWarning, match="nothing was learned"):
        history = fit(wild, stream(torch.float32), 2, tasks=2, progress=False, compile=False, nonfinite="skip")
    assert history.skipped == 2
    assert_close(wild.state_dict(), before)


def test_a_part_of_the_curve_is_refused():
    with pytest.raises(ValueError, match="fit_truncated"):
        fit_truncated(learner(Shaped(3, s=9.0)), stream(), 1, unroll=3, tasks=2, progress=False)


# emphasis and flooding

def test_emphasis_is_one_on_average_and_never_negative():
    w = emphasis(CURVE, 0.55, power=2.0)
    gap = (CURVE - 0.55).clamp(min=0) ** 2
    assert_close(w, 5 * gap / gap.sum())
    assert_close(w.mean(), torch.tensor(1.0, dtype=F64))
    assert w.min() == 0
    assert_close(emphasis(CURVE, 5.0), torch.ones(5, dtype=F64))
    assert_close(emphasis(CURVE, CURVE), torch.ones(5, dtype=F64))
    assert_close(emphasis(CURVE), 5 * CURVE / CURVE.sum())
    assert_close(emphasis(CURVE, -1.0, power=0), torch.ones(5, dtype=F64))
    assert_close(grad(lambda L: auc(L, emphasis(L, 0.55)))(CURVE), emphasis(CURVE, 0.55))
    assert_close(vmap(emphasis)(torch.stack([CURVE, CURVE**2])), emphasis(torch.stack([CURVE, CURVE**2])))
    assert emphasis(torch.tensor([1.0, math.nan, 0.0])).isnan().all()


def test_flood_mirrors_the_loss_at_its_level():
    x = torch.tensor([0.05, 0.3, 2.0], dtype=F64)
    assert_close(flood(x, 0.0), x)
    assert_close(flood(x, 0.3), torch.tensor([0.55, 0.3, 2.0], dtype=F64))
    assert_close(grad(lambda v: flood(v, 0.3).sum())(x), torch.tensor([-1.0, 0.0, 1.0], dtype=F64))
    target = inverse_exponential(torch.arange(5), 2.0, 6.0, 0.2).double()  # absolute shaping: flooding with a level that falls
    absolute = lambda L: shaped_loss(L, 6.0, 0.2, "absolute")
    assert_close(grad(absolute)(CURVE)[1:], grad(lambda L: flood(L, target).sum())(CURVE)[1:])


def test_flooded_learner_is_optim_on_the_flooded_loss():
    tasks = stream().sample(2)
    level = lambda step: inverse_exponential(step, 0.5, 6.0, 0.1)
    for b in (0.0, 0.3, level):
        it, model = learner(last, kind=Flooded, level=b), net()
        opt = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for k, (x, y) in enumerate(zip(tasks.x[0], tasks.y[0])):
            opt.zero_grad(); flood(F.mse_loss(model(x), y), b(k) if callable(b) else b).backward(); opt.step()
        end = it.adapt(tasks.x[0], tasks.y[0])
        assert_close({n: end[n].detach() for n, _ in model.named_parameters()}, {n: p.detach() for n, p in model.named_parameters()})
        assert_close(meta_grads(it, tasks, chunk=1), meta_grads(it, tasks))
    plain = learner(last)
    assert_close(meta_grads(learner(last, kind=Flooded, level=0.0), tasks), meta_grads(plain, tasks))


# what bad input gets

@pytest.mark.parametrize("call,error,says", [
    (lambda: auc([1.0, 2.0]), TypeError, "losses: got list"),
    (lambda: auc(torch.arange(3)), TypeError, "losses: got torch.int64"),
    (lambda: auc(torch.tensor(1.0)), ValueError, "one reading or more"),
    (lambda: shaped_loss(torch.ones(0), 3.0), ValueError, "one reading or more"),
    (lambda: auc(CURVE, [1.0, 2.0]), ValueError, "weights: 2 for 5 losses"),
    (lambda: shaped_loss(CURVE, 0.0), ValueError, "s=0.0: give a positive number"),
    (lambda: shaped_loss(CURVE, math.nan), ValueError, "s=nan: give a positive number"),
    (lambda: shaped_loss(CURVE, 3.0, math.inf), ValueError, "z=inf: give a finite number"),
    (lambda: shaped_loss(CURVE, 3.0, 0.1, "cubed"), ValueError, "kind='cubed': use one of 'signed', 'absolute', 'squared'"),
    (lambda: shaped_loss(CURVE, 3.0, t=torch.arange(4)), ValueError, "t: 4 for 5 losses"),
    (lambda: fit_shape(CURVE[:2]), ValueError, "three or more"),
    (lambda: fit_shape(CURVE * math.nan), ValueError, "all finite"),
    (lambda: Shaped(s=-1.0), ValueError, "s=-1.0"),
    (lambda: Shaped(s=1.0, kind="cubed"), ValueError, "kind='cubed'"),
    (lambda: Shaped(s=1.0, z=0.1, kind="signed", learn=True), ValueError, "its best z is infinite"),
    (lambda: Shaped(s=1.0, learn=True), ValueError, "start from a positive level"),
    (lambda: Shaped(every=0, s=1.0), ValueError, "every=0"),
    (lambda: emphasis(CURVE, power=-1.0), ValueError, "power=-1.0"),
    (lambda: Flooded(net(), level=-0.1), ValueError, "level=-0.1"),
    (lambda: Flooded(net(), level=math.inf), ValueError, "level=inf"),
    (lambda: Flooded(net(), level="0.1"), TypeError, "level='0.1': give a number"),
    (lambda: flood(CURVE, -1.0), ValueError, "level=-1.0: give a finite number, zero or more"),
    (lambda: Shaped(s="x"), TypeError, "s='x': give a positive number or a tensor; got str"),
    (lambda: Shaped(s=1.0, z=None), TypeError, "z=None: give a finite number"),
    (lambda: Shaped(s=1.0, a="x"), TypeError, "a='x': give a finite number"),
    (lambda: Shaped(every=1.5, s=1.0), TypeError, "every=1.5: give a whole number"),
    (lambda: shaped_loss(CURVE, "3"), TypeError, "s='3': give a positive number"),
    (lambda: emphasis(CURVE, power="1"), TypeError, "power='1': give a number"),
    (lambda: fit_shape(CURVE, t=torch.arange(4)), ValueError, "t: 4 for 5 losses"),
], ids=["list", "integers", "scalar", "empty", "weights", "s-zero", "s-nan", "z-inf", "kind", "t", "short", "nan", "shaped-s", "shaped-kind",
        "signed-learned", "z-learned", "every", "power", "level", "level-inf", "level-word", "flood-below-zero", "s-word", "z-none", "a-word",
        "every-fraction", "loss-s-word", "power-word", "fit-times"])
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says.replace("'", ".")): call()
