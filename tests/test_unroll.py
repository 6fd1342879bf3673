"What `05_unroll` promises of any rule, model, dtype, caller and interrupted run; the main comparisons are in the notebook."
import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.testing import assert_close

from metanb.core import SGD, Task, add, dot, exact, first_order, mean, meta_grads, task_grads
from metanb.imaml import NewtonCG, Proximal
from metanb.maml import MAML, Adam
from metanb.meta_sgd import LSLR, MADAM, MetaSGD, MultiStep
from metanb.models import Conv4
from metanb.pcgrad import pcgrad
from metanb.tasks import FewShot, Sinusoid, Stream
from metanb.train import evaluate, fit
from metanb.unroll import (Along, FiniteOnly, Momentum, RandomStart, Recomputed, StreamLearner, Truncated, begin, check_stream, choose_segment,
                           fit_truncated, loss_curves, peak_memory, recompute, segment_grads, unrolled)

F64 = torch.float64


class Rate(Momentum):
    def __init__(self, lr=0.05, beta=0.9):
        super().__init__(lr, beta)
        self.log_lr = nn.Parameter(torch.tensor(math.log(lr)))

    def forward(self, params, grads, velocity, step):
        velocity = add(grads, velocity, self.beta)
        return add(params, velocity, -self.log_lr.exp()), velocity


def net(*layers, dtype=F64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Tanh(), *layers, nn.Linear(6, 1)).to(dtype)


def sines(T=3, dtype=F64): return Sinusoid(amplitude=(0.1, 2.0), shots=6, queries=6, dtype=F64).sample(T, seed=3).to(dtype)


def stream(dtype=F64, **sizes):
    torch.manual_seed(0)
    x = torch.randn(100, 1, dtype=dtype)
    return Stream(x, torch.sin(2 * x), **{"steps": 9, "batch": 8, "queries": 6, **sizes})


def learner(gradient=exact, model=None, dtype=F64, **axes):
    axes = {"rule": Rate(), "steps": 9, "objective": Along(on="support", reduce="sum"), **axes}
    return StreamLearner(net(dtype=dtype) if model is None else model, gradient=gradient, **axes).to(dtype)


def first_of(tasks): return Task(*(t[0] for t in tasks))


def sines_only(): return Sinusoid(shots=6, queries=6)


def overflowed():
    model = net()
    with torch.no_grad(): model[0].weight[0, 0] = math.inf
    return model


@pytest.mark.parametrize("inner", [exact, first_order])
@pytest.mark.parametrize("make", [
    lambda g: MAML(net(), rule=Adam(0.05), steps=5, gradient=g), lambda g: MADAM(net(), lr=0.05, steps=5, gradient=g),
    lambda g: MetaSGD(net(), lr=0.05, steps=5, adapt="head", batch=4, gradient=g), lambda g: LSLR(net(), lr=0.05, steps=5, objective=MultiStep(5), gradient=g),
    lambda g: Proximal(net(), 0.7, learn_lam=True, rule=SGD(0.05), steps=5, gradient=g)], ids=["Adam", "MADAM", "head", "multi-step", "proximal"])
def test_recomputed_is_the_plain_unroll(make, inner):
    expected, losses = meta_grads(make(inner), sines())
    for segment, chunk in ((2, None), (None, 1)):
        grads, again = meta_grads(make(Recomputed(segment, inner is first_order)), sines(), chunk=chunk)
        assert_close(again, losses)
        assert_close(grads, expected, rtol=1e-9, atol=1e-12)


def test_plain_autograd_through_vmap_and_without():
    plain, again = (MAML(net(), rule=Rate().double(), steps=5, gradient=g) for g in (exact, Recomputed(2)))
    expected = mean(meta_grads(plain, sines())[0])
    vmap(again)(sines()).mean().backward()
    assert_close({n: p.grad for n, p in again.named_parameters()}, expected)
    again.zero_grad()
    again(first_of(sines())).backward()
    assert_close({n: p.grad for n, p in again.named_parameters()}, {n: g[0] for n, g in meta_grads(plain, sines())[0].items()})


def test_convolutions_and_labels():
    torch.manual_seed(0)
    tasks = FewShot(torch.rand(10, 4, 1, 16, 16), ways=3, shots=1, queries=2).sample(2)
    plain, again = (MAML(Conv4(3, filters=4), lr=0.1, steps=4, loss=F.cross_entropy) for _ in range(2))
    again.load_state_dict(plain.state_dict())
    again.gradient = Recomputed(2)
    expected = meta_grads(plain, tasks)[0]
    for chunk in (None, 1): assert_close(meta_grads(again, tasks, chunk=chunk)[0], expected, rtol=1e-4, atol=1e-5)
    vmap(again)(tasks).mean().backward()
    assert_close({n: p.grad for n, p in again.named_parameters()}, mean(expected), rtol=1e-4, atol=1e-5)


def test_dropout_drops_the_same_and_later_draws_are_untouched():
    def run(gradient):
        torch.manual_seed(5)
        return meta_grads(MAML(net(nn.Dropout(0.4)), rule=Rate().double(), steps=5, gradient=gradient), sines())[0], torch.rand(3)
    torch.manual_seed(5); run(exact)
    (expected, after), (grads, again) = run(exact), run(Recomputed(2))
    assert_close(grads, expected)
    assert torch.equal(after, again)


def test_recompute_gives_none_to_what_needs_no_gradient_and_reaches_every_input():
    torch.manual_seed(0)
    layer, x, scale = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True), torch.tensor(2, dtype=torch.int64)
    class Scaled(nn.Module):
        def __init__(self): super().__init__(); self.layer = layer
        def forward(self, x, extra): return {"out": self.layer(x) * extra["k"], "same": extra["k"]}
    out = recompute(Scaled(), x, {"k": scale})
    assert out["same"] == 2 and not out["same"].requires_grad
    out["out"].pow(2).sum().backward()
    grads = x.grad, layer.weight.grad
    expected = torch.autograd.grad((layer(x) * 2).pow(2).sum(), (x, layer.weight))
    assert_close(grads, expected)
    with pytest.raises(TypeError, match="is no tensor"): recompute(layer, 3.0)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_edge_lengths(steps):
    objective = Along(start=0)
    plain = MAML(net(), rule=Rate().double(), steps=steps, objective=objective)
    expected, losses = meta_grads(plain, sines())
    for gradient in (Recomputed(), Recomputed(99), Truncated(99)):
        grads, again = meta_grads(MAML(net(), rule=Rate().double(), steps=steps, objective=objective, gradient=gradient), sines())
        assert_close(again, losses); assert_close(grads, expected)


@pytest.mark.parametrize("unroll, inner", [(1, False), (4, False), (4, True), (9, False)])
def test_carried_segments_add_up_to_the_truncated_gradient(unroll, inner):
    tasks = stream().sample(3)
    for axes in ({}, {"adapt": "head"}, {"rule": MADAM(net(), lr=0.05).rule}, {"objective": Along(start=0, on="query", reduce="sum")}):
        one = learner(Truncated(unroll, inner), **axes)
        meta_params, carry, total = {n: p.detach() for n, p in one.named_parameters()}, (), None
        for a in range(0, 9, unroll):
            grads, losses, carry = segment_grads(one, meta_params, tasks, carry, a, min(a + unroll, 9), inner, chunk=1 if a else 2)
            total = grads if total is None else add(total, grads)
        assert_close(total, meta_grads(one, tasks)[0])
        assert not any(t.requires_grad for t in carry[1].values())


def test_a_cut_leaves_the_value_and_one_segment_leaves_the_gradient():
    tasks = stream().sample(3)
    expected, losses = meta_grads(learner(), tasks)
    assert_close(meta_grads(learner(Truncated(2)), tasks)[1], losses)
    assert_close(meta_grads(learner(Truncated(9)), tasks)[0], expected)
    assert (meta_grads(learner(Truncated(2)), tasks)[0]["rule.log_lr"] - expected["rule.log_lr"]).abs().min() > 1e-6


def test_streams_go_round_and_query_batches_take_turns():
    one, task = learner(steps=20), first_of(stream(query_batches=3).sample(1))
    assert torch.equal(one.minibatch(task.x, task.y, 11)[0], task.x[2])
    assert torch.equal(one.query(task, 4)[0], task.xq[1])
    assert one.predict(*task[:3], steps=2).shape == (3, 3, 6, 1)
    assert one.predict(task.x, task.y, task.xq[0], steps=2).shape == (3, 6, 1)
    assert evaluate(one, stream(query_batches=3), tasks=4, steps=3).values.shape == (4, 4)
    assert loss_curves(one, stream().sample(2), steps=7, every=3, on="support").shape == (2, 3)
    with pytest.raises(ValueError, match="a stream comes in minibatches"): learner(batch=3)(task)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_run_is_the_uninterrupted_one(stop, tmp_path):
    def train(steps, path=None):
        one = learner(Truncated(4), net(nn.Dropout(0.2)))
        history = fit_truncated(one, stream(), steps, tasks=2, opt=torch.optim.Adam(one.parameters(), 0.05), checkpoint=path,
                                combine=FiniteOnly(), validation=stream(), validate_every=2, validation_tasks=2, progress=False)
        return history, one.state_dict()
    history, state = train(6)
    train(stop, tmp_path / "run")
    again, resumed = train(6, tmp_path / "run")
    assert again["loss"] == history["loss"]
    assert again["validation"][1::2] == history["validation"][1::2]  # an interrupted run validates at its end too
    for n in state: assert torch.equal(state[n], resumed[n]), n


def test_unrolls_may_vary_and_trajectories_take_turns():
    seen = []
    class Seen(Stream):
        def sample(self, T, seed=0, step=0, start=0): seen.append(step); return super().sample(T, seed, step, start)
    x = torch.randn(50, 1, dtype=F64)
    fit_truncated(learner(), Seen(x, x, steps=9, batch=4, queries=4), 6, unroll=lambda step: 3 + step, tasks=2, progress=False)
    assert seen == [0, 1, 2]  # 3 + 4 + 2, 6 + 3, 8 …


@pytest.mark.parametrize("combine", [mean, pcgrad, FiniteOnly(pcgrad)])
def test_other_trainers_and_combiners(combine):
    for gradient in (Recomputed(4), Truncated(4, first_order=True)):
        one, before = learner(gradient), learner().state_dict()
        fit(one, stream(), 2, tasks=3, combine=combine, progress=False)
        assert all(p.isfinite().all() for p in one.parameters())
        assert any(not torch.equal(p, before[n]) for n, p in one.state_dict().items())


def test_diverged_tasks_never_reach_the_meta_parameters():
    class Far(Stream):
        def draw(self, keys):
            task = super().draw(keys)
            return task._replace(x=task.x * torch.where(torch.arange(len(keys)) == 0, torch.tensor(1e200, dtype=F64), 1.0).view(-1, 1, 1, 1))
    x = torch.randn(60, 1, dtype=F64)
    far, line = Far(x, x, steps=9, batch=4, queries=4), nn.Linear(1, 1).double()
    one, combine = learner(Truncated(3), line), FiniteOnly()
    fit_truncated(one, far, 6, tasks=3, combine=combine, progress=False)
    assert combine.skipped == 6 and all(p.isfinite().all() for p in one.parameters())
    kept = FiniteOnly(); kept.load_state_dict(combine.state_dict()); assert kept.skipped == 6
    with pytest.raises(FloatingPointError, match="meta-step 1"): fit_truncated(learner(Truncated(3), line), far, 1, tasks=3, progress=False)
    one = learner(Truncated(3), line)
    with pytest.warns(UserWarning, match="nothing was learned"):
        history = fit_truncated(one, far, 4, tasks=1, combine=FiniteOnly(), nonfinite="skip", progress=False)
    assert history.skipped == 4 and all(p.isfinite().all() for p in one.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_dtypes(dtype):
    tasks = stream(torch.float32).sample(2).to(dtype)
    for gradient in (exact, Recomputed(4), Truncated(4)):
        grads, losses = meta_grads(learner(gradient, nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype), dtype), tasks)
        assert losses.dtype == dtype and losses.isfinite().all()
        assert all(g.dtype == dtype and g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("gradient", [Recomputed(2), Truncated(2)])
def test_one_element_tensors_and_zero_gradients(gradient):
    tasks = Task(*(0 * t for t in stream(batch=1, queries=1).sample(2)))
    model = nn.Linear(1, 1).double()
    nn.init.zeros_(model.bias)
    for rule in (Rate(), Adam(0.01)):
        grads, losses = meta_grads(learner(gradient, model, rule=rule), tasks)
        assert_close(losses, torch.zeros_like(losses))
        assert all(g.isfinite().all() for g in grads.values())


def test_memory_grows_as_its_root():
    short, long_ = ({S: peak_memory(lambda: meta_grads(learner(g, steps=S, objective=Along(every=S)), stream().sample(1))) for S in (8, 32)}
                    for g in (Recomputed(), exact))
    assert long_[32] > 3 * long_[8] and short[32] < 2.6 * short[8] and short[32] < long_[32] / 2
    n = choose_segment(learner(Recomputed()), stream().sample(2))
    assert 1 <= n <= 9


@pytest.mark.parametrize("piece", [Along(2, 4, "support", "sum"), Recomputed(3), Truncated(3, True), Momentum(0.1), FiniteOnly()])
def test_pieces_copy_and_pickle(piece):
    for other in (copy.deepcopy(piece), pickle.loads(pickle.dumps(piece))): assert repr(other).split(" at ")[0] == repr(piece).split(" at ")[0]


@pytest.mark.parametrize("x, y, fine", [
    (torch.zeros(4, 8, 3), torch.zeros(4, 8, 1), True), (torch.zeros(4, 8, 1, 5, 5), torch.zeros(4, 8, dtype=torch.int64), True),
    (torch.zeros(4, 8, dtype=torch.int64), torch.zeros(4, 8, dtype=torch.int64), True), (torch.zeros(4, 3), torch.zeros(4, 1), False),
    (torch.zeros(4, 1, 5, 5), torch.zeros(4, dtype=torch.int64), False), (torch.zeros(4, 2, 5, 5), torch.zeros(4, 3), False)],
    ids=["rows", "images", "tokens", "ordinary-rows", "ordinary-images", "ordinary-images-regression"])
def test_what_passes_for_a_stream(x, y, fine):
    if fine: check_stream(x, y)
    else:
        with pytest.raises(ValueError, match="minibatches"): check_stream(x, y)


@pytest.mark.parametrize("call, error, text", [
    (lambda: Along(every=0), ValueError, "every=0"), (lambda: Along(on="x"), ValueError, "on='x'"), (lambda: Along(reduce="max"), ValueError, "reduce='max'"),
    (lambda: Along(start=5).at(4), ValueError, "start earlier"), (lambda: Recomputed(0), ValueError, "segment=0"), (lambda: Truncated(0), ValueError, "unroll=0"),
    (lambda: Momentum(-1.0), ValueError, "lr=-1.0"), (lambda: Momentum(beta=1.0), ValueError, "beta=1.0"),
    (lambda: MAML(net(), rule=NewtonCG(), gradient=Recomputed())(first_of(sines())), ValueError, "a loop of its own"),
    (lambda: fit_truncated(learner(), stream(), 1), ValueError, "unroll: how many"), (lambda: fit_truncated(learner(), 3, 1, 2), TypeError, "sampler"),
    (lambda: fit_truncated(learner(objective=Along(every=9)), stream(), 1, 3, progress=False), ValueError, "reads no loss after steps 1 to 3"),
    (lambda: choose_segment(learner(), stream().sample(2), memory=10), ValueError, "memory=10"), (lambda: loss_curves(learner(), stream().sample(2), -1), ValueError, "steps=-1"),
    (lambda: Along(1.5), TypeError, "every=1.5"), (lambda: Along(start=1.5), TypeError, "start=1.5"), (lambda: Momentum(beta="x"), TypeError, "beta='x'"),
    (lambda: loss_curves(learner(), stream().sample(2), on="both"), ValueError, "on='both': use 'query' or 'support'"),
    (lambda: loss_curves(net(), stream().sample(2)), TypeError, "learner: expected a MetaLearner.*Sequential"),
    (lambda: loss_curves(learner(), first_of(stream().sample(2))), ValueError, "leading dimension T"), (lambda: loss_curves(learner(), stream().sample(2), chunk=0), ValueError, "chunk=0"),
    (lambda: choose_segment(learner(), stream().sample(2), memory="1 GB"), TypeError, "memory='1 GB': give a number"),
    (lambda: fit_truncated(net(), stream(), 1, 2), TypeError, "learner: .*MAML"), (lambda: FiniteOnly("mean"), TypeError, "combine='mean'"),
    (lambda: recompute(torch.sin, torch.ones(2)), TypeError, "module: got .*Method"), (lambda: unrolled(learner(), first_of(stream().sample(2)), how="cutt"), ValueError, "how='cutt'"),
    (lambda: RandomStart(3), TypeError, "model: expected a torch.nn.Module"), (lambda: RandomStart(net(), std="1"), TypeError, "std='1': give a number"),
    (lambda: RandomStart(net(), std={"0": "1"}), TypeError, "std='1'"), (lambda: RandomStart(net(), std=[1.0]), TypeError, "std=.1.0.: give a number"),
    (lambda: RandomStart(net(), std=math.inf), ValueError, "std=inf"), (lambda: RandomStart(overflowed()), ValueError, "model: the weights of 0.weight"),
    (lambda: fit(learner(), sines_only(), 1, 2, progress=False), ValueError, r"tasks: .*\(6, 1\).*minibatches.*Stream.*MAML"),
    (lambda: evaluate(learner(), sines_only(), 2), ValueError, r"tasks: .*\(6, 1\).*minibatches"),
    (lambda: fit_truncated(learner(), sines_only(), 1, 2, progress=False), ValueError, r"tasks: .*\(6, 1\).*minibatches"),
    (lambda: learner().predict(*first_of(stream().sample(1))[:3], steps=-1), ValueError, "steps=-1")])
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text): call()
