"What `11_meta_sgd` promises of any model, device, caller and interrupted run; the mathematics is tested in the notebook."
import copy
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from metanb.core import MetaLearner, Task, add, dot, first_order, mean, meta_grads, task_grads
from metanb.maml import MAML, Adam
from metanb.meta_sgd import LSLR, MADAM, LayerStepRates, LearnedAdam, MetaSGD, MultiStep, WeightRates, step_weights
from metanb.tasks import Sinusoid
from metanb.train import evaluate, fit

METHODS = MetaSGD, LSLR, MADAM


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)


def sines(T=3, dtype=torch.float32): return Sinusoid(dtype=dtype).sample(T)


@pytest.mark.parametrize("axes", [{}, {"adapt": "head"}, {"objective": MultiStep(3)}, {"batch": 4}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_meta_gradient_is_the_derivative_on_every_axis(method, axes):
    learner, tasks, eps = method(net(torch.float64), lr=0.05, steps=3, **axes), sines(dtype=torch.float64), 1e-6
    torch.manual_seed(1)
    phi = {n: p.detach() for n, p in learner.named_parameters()}
    u = {n: torch.randn_like(p) for n, p in phi.items()}
    up, down = (task_grads(learner, add(phi, u, s * eps), tasks)[1].mean() for s in (1, -1))
    assert_close(dot(mean(meta_grads(learner, tasks)[0]), u), (up - down) / (2 * eps), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_chunks_and_loop_agree(method):
    learner, tasks = method(net(torch.float64), lr=0.05, steps=3), sines(dtype=torch.float64)
    grads, losses = meta_grads(learner, tasks)
    for chunk in (1, 2):
        again, same = meta_grads(learner, tasks, chunk=chunk)
        assert_close(same, losses)
        for n in grads: assert_close(again[n], grads[n])


@pytest.mark.parametrize("method", METHODS)
def test_constants_carry_the_names_of_the_weights_that_move(method):
    model = net()
    learner, head = method(model), method(model, adapt="head")
    names = [n for n, _ in model.named_parameters()]
    constants = lambda rule: {n.partition(".")[2] for n, _ in rule.named_parameters()}
    assert constants(learner.rule) == set(names)
    assert constants(head.rule) == set(names[-2:])


@pytest.mark.parametrize("method", METHODS)
def test_constants_train_save_copy_and_leave_the_model_alone(method):
    model = net()
    before = copy.deepcopy(model.state_dict())
    learner = method(model, lr=0.05, steps=2)
    start = {n: p.clone() for n, p in learner.named_parameters()}
    fit(learner, Sinusoid(), steps=3, tasks=4, progress=False)
    moved = [not torch.equal(p, start[n]) for n, p in learner.rule.named_parameters(prefix="rule") if not n.endswith("0.bias")]
    assert all(moved)  # a bias that BatchNorm takes out again has no gradient, and so its constants have none
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    other = method(model, lr=0.01, steps=2)
    other.load_state_dict(learner.state_dict())
    for twin in (other, copy.deepcopy(learner)):
        assert torch.equal(evaluate(twin, Sinusoid(), tasks=5, steps=4).values, evaluate(learner, Sinusoid(), tasks=5, steps=4).values)


@pytest.mark.parametrize("rule", [WeightRates, lambda p: LayerStepRates(p, 2), LearnedAdam], ids=["weight", "layer-step", "adam"])
@pytest.mark.parametrize("name", ["weight", "a.b.c.weight", "0.1.weight", "rates", "a.training_"])
def test_any_name_a_module_can_have(rule, name):
    params = {name: torch.ones(2), "other": torch.zeros(())}
    r = rule(params)
    moved, _ = r(params, params, r.init(params), 0)
    assert set(moved) == set(params) and (moved[name] < 1).all()


def test_rates_take_the_dtype_of_their_weight():
    assert {p.dtype for method in METHODS for p in method(net(torch.float64)).rule.parameters()} == {torch.float64}


def test_a_drawn_start_follows_the_seed_and_a_fixed_one_draws_nothing():
    draw = lambda seed: (torch.manual_seed(seed), WeightRates({"w": torch.zeros(5)}, (0.005, 0.1)).rates.w.detach())[1]
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    model, state = net(), torch.get_rng_state()
    for method in METHODS: method(model, lr=0.1)
    assert torch.equal(state, torch.get_rng_state())


def test_lslr_keeps_its_last_rate_beyond_the_trained_steps():
    learner, task = LSLR(net(), lr=(0.01, 0.1), steps=3), Task(*(t[0] for t in sines()))
    longer = LSLR(net(), steps=6)
    longer.init.load_state_dict(learner.init.state_dict())
    for (n, r), short in zip(longer.rule.rates.named_parameters(), learner.rule.rates.parameters()):
        r.data = torch.cat([short.data, short.data[-1:].expand(3)])
    assert torch.equal(learner.predict(task.x, task.y, task.xq, steps=6), longer.predict(task.x, task.y, task.xq))


# ---- MADAM's derivative

@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-(2.0**50), 2.0**50, width=32), min_size=1, max_size=6), st.sampled_from([torch.float32, torch.float64]))
def test_derivative_is_finite_at_any_gradients(gs, dtype):
    "Whatever gradients arrive, zeros and the smallest numbers among them, nothing becomes NaN or infinite."
    params = {"w": torch.zeros((), dtype=dtype)}
    rule = LearnedAdam(params, lr=0.1)

    def end(constants, gs):
        state, at = rule.init(params), params
        for k, g in enumerate(gs): at, state = torch.func.functional_call(rule, constants, (at, {"w": g}, state, k))
        return at["w"]

    constants = {n: p.detach() for n, p in rule.named_parameters()}
    of_constants, of_gradients = torch.func.grad(end, argnums=(0, 1))(constants, torch.tensor(gs, dtype=dtype))
    assert of_gradients.isfinite().all(), of_gradients
    assert all(g.isfinite() for g in of_constants.values()), of_constants


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("axes", [{}, {"gradient": first_order}, {"objective": "multi"}], ids=["exact", "first order", "multi-step"])
def test_dead_units_leave_a_finite_meta_gradient(steps, axes):
    off = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    nn.init.constant_(off[0].bias, -1e3)
    axes = {"objective": MultiStep(steps)} if "objective" in axes else axes
    grads, losses = meta_grads(MADAM(off, lr=0.1, steps=steps, **axes), sines())
    assert losses.isfinite().all() and all(g.isfinite().all() for g in grads.values())


def test_it_starts_as_adam_in_float32_too():
    learner, plain, tasks = MADAM(net(), lr=0.02, steps=10), MAML(net(), rule=Adam(0.02), steps=10), sines()
    x, y, xq, _ = Task(*(t[0] for t in tasks))
    assert_close(learner.predict(x, y, xq), plain.predict(x, y, xq), rtol=1e-4, atol=1e-4)


# ---- multi-step loss

def test_weights_sum_to_one():
    for steps in (1, 2, 5, 20):
        for p in (0.0, 0.3, 0.969, 0.98, 1.0, 7.0):
            w = step_weights(steps, p)
            assert_close(w.sum(), torch.tensor(1.0)); assert (w >= 0).all() and w.argmax() in (0, steps - 1)


def multi(): return LSLR(net(), steps=3, objective=MultiStep(3, over=6))


def test_annealing_survives_a_resume(tmp_path):
    whole, part, rest = multi(), multi(), multi()
    run = lambda learner, steps, **kw: fit(learner, Sinusoid(), steps=steps, tasks=3, callbacks=[learner.objective], progress=False, **kw)
    run(whole, 8)
    run(part, 4, checkpoint=tmp_path / "c.pt")
    run(rest, 8, checkpoint=tmp_path / "c.pt")
    for n, t in whole.state_dict().items(): assert torch.equal(t, rest.state_dict()[n]), n
    assert torch.equal(rest.objective.weights, torch.tensor([0.0, 0, 1]))


@pytest.mark.slow
def test_annealing_reaches_a_compiled_meta_gradient():
    learner, tasks = multi(), sines()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a C++ compiler the plain function runs, and agrees with itself
        for p in (0.0, 0.4, 0.8, 1.0):
            learner.objective.weights.copy_(step_weights(3, p))
            assert_close(meta_grads(learner, tasks, compile=True)[1], meta_grads(learner, tasks)[1], rtol=1e-4, atol=1e-5)


# ---- misuse, and other devices

@pytest.mark.parametrize("make, says", [
    (lambda: MetaSGD(net(), lr=-1.0), "lr=-1.0"), (lambda: LSLR(net(), lr=(0.1, 0.0)), r"lr=\(0.1, 0.0\)"), (lambda: MADAM(net(), lr=0.0), "lr=0.0"),
    (lambda: LSLR(net(), steps=0), "steps=0"), (lambda: MADAM(net(), beta1=1.0), "beta1=1.0"), (lambda: MADAM(net(), beta2=0.0), "beta2=0.0"),
    (lambda: MultiStep(0), "steps=0"), (lambda: MultiStep(3, over=0), "over=0"),
    (lambda: MultiStep(1.5), "steps=1.5"), (lambda: MultiStep(3, over=1.5), "over=1.5"), (lambda: MultiStep("3"), "steps='3'"),
    (lambda: MADAM(net(), lr=float("inf")), "lr=inf"), (lambda: MADAM(net(), eps=-1e-8), "eps=-1e-08"), (lambda: Adam(eps=-1.0), "eps=-1.0"),
    (lambda: Adam(beta1=-0.1), "beta1=-0.1"), (lambda: Adam(beta2=float("nan")), "beta2=nan"),
    (lambda: MetaLearner(net(), steps=2, objective=MultiStep(3))(Task(*(t[0] for t in sines()))), r"MultiStep\(3\) in a learner of 2 steps")])
def test_misuse_is_named(make, says):
    with pytest.raises(ValueError, match=says): make()


@pytest.mark.parametrize("make, says", [
    (lambda: MetaSGD(net(), lr="x"), "lr='x': give a learning rate"), (lambda: LSLR(net(), lr="0.1"), "lr='0.1': give a learning rate"),
    (lambda: LSLR(net(), lr=(0.1, 0.2, 0.3)), r"lr=\(0.1, 0.2, 0.3\): .*\(low, high\)"), (lambda: MetaSGD(net(), lr=(0.1, "x")), "lr="),
    (lambda: MADAM(net(), lr="x"), "lr='x': give a number"), (lambda: MADAM(net(), beta1="0.9"), "beta1='0.9': give a number"),
    (lambda: MADAM(net(), eps="x"), "eps='x': give a number"), (lambda: Adam(beta2="x"), "beta2='x': give a number")])
def test_what_is_no_number_is_named(make, says):
    with pytest.raises(TypeError, match=says): make()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("method", METHODS)
def test_the_gpu_agrees(method):
    learner, tasks = method(net(torch.float64), lr=0.05, steps=3, objective=MultiStep(3)), sines(dtype=torch.float64)
    here, _ = meta_grads(learner, tasks)
    there, _ = meta_grads(learner.to("cuda"), tasks.to("cuda"))
    for n in here: assert_close(there[n].cpu(), here[n])
