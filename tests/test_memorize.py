"What `14_memorize` promises for any learner, task and run; the closed forms and the pictures are in the notebook."
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import grad, jacrev, vmap
from torch.nn import functional as F
from torch.testing import assert_close

from metanb.core import Learner, MetaLearner, SGD, Task, meta_grads
from metanb.imaml import IMAML
from metanb.maml import ANIL, FOMAML, MAML, Reptile
from metanb.memorize import WAVES, Forgetting, Generator, Smooth, Watch, Waves, forgetting, hessian_penalty, rademacher, support_key
from metanb.meta_sgd import LSLR, MADAM, MetaSGD, MultiStep
from metanb.models import MLP, Conv4
from metanb.pcgrad import meta_pcgrad
from metanb.tasks import FewShot, Quadratic, Sinusoid
from metanb.train import evaluate, fit


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), MLP(36, 8, 3, norm=True, std=None)).double()


def images(classes=8):
    return torch.rand(classes, 6, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def single(batch, i=0): return Task(*(t[i] for t in batch))


CURVES = Sinusoid(shots=6, queries=5, dtype=torch.float64).sample(3, seed=2)
METHODS = dict(MAML=partial(MAML, lr=0.05), FOMAML=partial(FOMAML, lr=0.05), ANIL=partial(ANIL, lr=0.05, steps=2),
               LSLR=partial(LSLR, lr=0.05, steps=2),
               MetaSGD=partial(MetaSGD, lr=0.05), MADAM=partial(MADAM, steps=2), IMAML=partial(IMAML, lr=0.05, steps=4))


def directional(f, parameters, eps=1e-5, seed=3):
    "The derivative of f() along a random direction, by autograd and by a central difference."
    parameters = list(parameters)
    generator = torch.Generator().manual_seed(seed)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    grads = torch.autograd.grad(f(), parameters, allow_unused=True)
    exact = sum((g * d).sum() for g, d in zip(grads, direction) if g is not None).item()
    values = []
    for step in (eps, -2 * eps):
        with torch.no_grad():
            for p, d in zip(parameters, direction): p.add_(d, alpha=step)
        values.append(f().item())
    with torch.no_grad():
        for p, d in zip(parameters, direction): p.add_(d, alpha=eps)
    return exact, (values[0] - values[1]) / (2 * eps)


# ---- probes

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_key_is_a_function_of_bits_and_seed(dtype):
    x, y = torch.randn(20, 4, 3).to(dtype), torch.arange(80).view(20, 4)
    keys = vmap(support_key)(x, y)
    assert torch.equal(keys, torch.stack([support_key(a, b) for a, b in zip(x, y)]))
    assert len(keys.unique()) == 20
    assert support_key(x[0], y[0]) != support_key(x[0], y[0], seed=1) != support_key(x[0], y[0] + 1, seed=1)
    assert torch.equal(grad(lambda t: t * rademacher(support_key(x[0], y[0]), {"w": t})["w"])(torch.tensor(2.0)).abs(), torch.tensor(1.0))


def test_signs():
    like = {"a": torch.zeros(50, 40), "b": torch.zeros((), dtype=torch.float64), "none": torch.zeros(0, 3)}
    signs = rademacher(torch.tensor(7), like)
    assert {n: (t.shape, t.dtype) for n, t in signs.items()} == {n: (t.shape, t.dtype) for n, t in like.items()}
    assert set(signs["a"].unique().tolist()) == {-1.0, 1.0} and abs(signs["a"].mean()) < 0.1
    later = rademacher(torch.tensor(7), like, skip=2001)
    assert not torch.equal(later["a"], signs["a"])
    assert torch.equal(rademacher(torch.tensor(7), {"a": like["a"][1:]}, skip=40)["a"], signs["a"][1:])


# ---- the penalty

class Diagonal(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, n, dtype=torch.float64))

    def forward(self, x): return self.w * x


@pytest.mark.parametrize("lr, steps, samples, seed", [(0.1, 0, 1, 0), (0.1, 3, 1, 1), (0.0, 1, 5, 2)])
def test_exact_where_the_hessian_is_diagonal(lr, steps, samples, seed):
    x = torch.linspace(0.2, 2, 9, dtype=torch.float64)
    task = Task(x, x.cos(), x, x)
    learner = MAML(Diagonal(9), lr=lr, steps=steps)
    assert_close(hessian_penalty(learner, task, coefficient=0.3, samples=samples, seed=seed), 0.3 * (4 * x**4 / 81).sum())


def test_unbiased_on_a_quadratic_and_on_a_net():
    task = single(Quadratic(dim=5, dtype=torch.float64).sample(1))
    linear = MAML(nn.Linear(5, 1, bias=False).double(), lr=0.05)
    curve, mlp = single(CURVES), MAML(net(), lr=0.05, steps=2)
    at = {n: p.detach() for n, p in mlp.adapt(curve.x, curve.y).items()}
    flat = torch.cat([p.flatten() for p in at.values()])
    unpack = lambda v: {n: s.view(p.shape) for (n, p), s in zip(at.items(), v.split([p.numel() for p in at.values()]))}
    full = jacrev(grad(lambda v: mlp.task_loss(unpack(v), curve.x, curve.y)))(flat)
    for learner, one, truth in ((linear, task, (2 * task.x.T @ task.x / 5).square().sum()), (mlp, curve, full.square().sum())):
        probes = torch.stack([hessian_penalty(learner, one, seed=s) for s in range(100)]).detach()
        assert abs(probes.mean() - truth) < 4 * probes.std() / 10
        assert_close(hessian_penalty(learner, one, samples=200).item(), truth.item(), rtol=0.3, atol=0)


def test_only_weights_that_move_count():
    task = single(CURVES)
    head = ANIL(net(), lr=0.05)
    params = head.adapt(task.x, task.y)
    body = torch.tanh(F.linear(torch.tanh(F.linear(task.x, params["0.weight"], params["0.bias"])), params["2.weight"], params["2.bias"]))
    design = torch.cat([body, torch.ones_like(body[:, :1])], 1)
    truth = (2 * design.T @ design / len(design)).square().sum()
    assert_close(hessian_penalty(head, task, samples=600).item(), truth.item(), rtol=0.2, atol=0)


def test_given_weights_are_where_it_is_taken():
    task, learner = single(CURVES), MAML(net(), lr=0.05, steps=2)
    adapted, start = learner.adapt(task.x, task.y), learner.init(task.x, task.y)
    assert torch.equal(hessian_penalty(learner, task), hessian_penalty(learner, task, adapted))
    assert not torch.equal(hessian_penalty(learner, task), hessian_penalty(learner, task, start))
    assert_close(hessian_penalty(learner, task, coefficient=2.5), 2.5 * hessian_penalty(learner, task))
    assert hessian_penalty(learner, task, coefficient=0.0) == 0


@pytest.mark.parametrize("name", ["MAML", "LSLR", "MADAM"])
def test_gradient_by_finite_differences(name):
    learner, task = METHODS[name](net()), single(CURVES)
    exact, difference = directional(lambda: hessian_penalty(learner, task, samples=2), learner.parameters())
    assert exact == pytest.approx(difference, rel=1e-5) and exact != 0


NORMS = [nn.BatchNorm1d(6, track_running_stats=False), nn.InstanceNorm1d(6, affine=True), nn.LayerNorm(6),
         nn.GroupNorm(2, 6), nn.RMSNorm(6)]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
@pytest.mark.parametrize("steps", [0, 2])
def test_gradient_through_normalising_layers(norm, steps):
    "torch's fused kernels have a wrong third derivative, which is what the penalty needs."
    torch.manual_seed(0)
    axis = nn.Unflatten(1, (3, 6) if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) else (6, 3))
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 18), axis, norm, nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)).double()
    learner = MAML(model, lr=0.1, steps=steps, loss=F.cross_entropy, penalty=partial(hessian_penalty, coefficient=0.01))
    tasks = FewShot(images(), ways=3, shots=2, queries=2).sample(2)
    exact, difference = directional(lambda: learner(single(tasks)), learner.parameters(), eps=1e-6)
    assert exact == pytest.approx(difference, rel=1e-4)
    assert_close(meta_grads(learner, tasks), meta_grads(learner, tasks, chunk=1))


def test_smooth_layers_have_the_same_values():
    x = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for affine in (True, False):
        for layer in (nn.BatchNorm1d(6, affine=affine, track_running_stats=False), nn.BatchNorm1d(6, affine=affine),
                      nn.BatchNorm1d(6, affine=affine).eval(), nn.InstanceNorm1d(6, affine=affine),
                      nn.InstanceNorm1d(6, affine=affine, track_running_stats=True).eval(), nn.LayerNorm([6, 5], elementwise_affine=affine),
                      nn.LayerNorm(5, elementwise_affine=affine), nn.GroupNorm(3, 6, affine=affine)):
            layer = layer.double()
            for p in layer.parameters(): nn.init.normal_(p)
            truth = layer(x)
            with Smooth(): ours = layer(x)
            assert_close(ours, truth)
    for function, args in ((F.batch_norm, (x, None, None, None, None, True)), (F.layer_norm, (x, [5])), (F.instance_norm, (x,))):
        with Smooth(): ours = function(*args)
        assert_close(ours, function(*args))


@pytest.mark.parametrize("name", METHODS)
def test_as_a_penalty_of_every_learner(name):
    penalty = partial(hessian_penalty, coefficient=0.02, samples=2)
    plain, learner = METHODS[name](net()), METHODS[name](net(), penalty=penalty)
    grads, losses = meta_grads(learner, CURVES)
    assert_close((grads, losses), meta_grads(learner, CURVES, chunk=1))
    assert_close((grads, losses), meta_grads(learner, CURVES, chunk=2))
    again = meta_grads(learner, CURVES)
    assert torch.equal(again[1], losses) and all(torch.equal(again[0][n], g) for n, g in grads.items())  # a pure function
    without = meta_grads(plain, CURVES)
    assert any(not torch.allclose(g, without[0][n]) for n, g in grads.items())
    assert_close(losses - without[1], torch.stack([penalty(learner, single(CURVES, i)) for i in range(3)]).detach())


def test_composes_with_multi_step_and_convolutions():
    learner = MAML(net(), lr=0.05, steps=2, objective=MultiStep(2), penalty=hessian_penalty)
    plain = MAML(net(), lr=0.05, steps=2, objective=MultiStep(2))
    task = single(CURVES)
    assert_close(learner(task), plain(task) + hessian_penalty(plain, task))
    torch.manual_seed(0)
    conv = MAML(Conv4(3, filters=3, stride=2), lr=0.1, loss=F.cross_entropy, penalty=partial(hessian_penalty, coefficient=1e-3))
    tasks = FewShot(images().float(), ways=3, shots=1, queries=2).sample(2)
    assert_close(meta_grads(conv, tasks), meta_grads(conv, tasks, chunk=1), rtol=1e-3, atol=1e-4)


def test_it_lowers_curvature_in_training():
    after = {}
    for c in (0.0, 1e-2):
        learner = MAML(net().float(), lr=0.01, penalty=partial(hessian_penalty, coefficient=c))
        fit(learner, Sinusoid(), 40, tasks=4, opt=torch.optim.Adam(learner.parameters(), 1e-2), progress=False)
        after[c] = sum(hessian_penalty(learner, Task(*t), samples=3).item() for t in zip(*Sinusoid().sample(10, seed=5)))
    assert after[1e-2] < 0.6 * after[0.0]


def test_penalty_errors_name_the_argument():
    learner, task = MAML(net()), single(CURVES)
    for bad in (-1e-3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="coefficient="): hessian_penalty(learner, task, coefficient=bad)
    with pytest.raises(TypeError, match="coefficient='0.1': give a number"): hessian_penalty(learner, task, coefficient="0.1")
    with pytest.raises(ValueError, match="samples=0"): hessian_penalty(learner, task, samples=0)
    with pytest.raises(TypeError, match="samples=1.5"): hessian_penalty(learner, task, samples=1.5)
    for bad in (nn.Linear(1, 1), Learner(), None):
        with pytest.raises(TypeError, match="learner: the penalty needs adapted weights"): hessian_penalty(bad, task)


# ---- families and forgetting

@pytest.mark.parametrize("wave", WAVES)
@pytest.mark.parametrize("grid", [False, True])
def test_waves_share_their_inputs_with_sinusoid(wave, grid):
    settings = dict(shots=4, queries=7, grid=grid, dtype=torch.float64, frequency=(0.5, 2.0))
    sampler = Waves(wave=wave, **settings)
    ours, sine = sampler.sample(5, seed=1), Sinusoid(**settings).sample(5, seed=1)
    assert torch.equal(ours.x, sine.x) and torch.equal(ours.xq, sine.xq)
    if wave == "sine": assert_close(ours, sine)
    part = sampler.sample(2, seed=1, start=3)
    assert_close(part, Task(*(t[3:] for t in ours)))
    assert ours.y.isfinite().all() and ours.yq.shape == sine.yq.shape


def test_waves_refuse_what_is_none():
    with pytest.raises(ValueError, match="wave='circle': use one of sine"): Waves(wave="circle")
    with pytest.raises(ValueError, match="shots"): Waves(shots=0)


FAMILIES = {"sine": Sinusoid(shots=5, queries=5), "line": Waves(wave="line", shots=5, queries=5), "square": Waves(shots=5, queries=5)}
SHORT = dict(steps=6, tasks=2, every=4, checks=5, progress=False)


def curve_learner(seed=0, **axes): return MAML(net(seed).float(), lr=0.01, **axes)


def test_forgetting_is_fit_after_fit_and_a_pure_function():
    one, two = curve_learner(), curve_learner()
    result = forgetting(one, FAMILIES, **SHORT)
    torch.manual_seed(99)  # what happened before does not matter
    again = forgetting(two, FAMILIES, **SHORT)
    assert torch.equal(result.values, again.values) and all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert result.names == tuple(FAMILIES) and result.ends == (6, 12, 18) and result.metric == "mse_loss" and not result.larger
    assert result.steps.tolist() == [0, 4, 6, 10, 12, 16, 18] and result.values.shape == result.ci95.shape == (3, 7)
    for f, sampler in enumerate(FAMILIES.values()): assert_close(result.values[f, -1], evaluate(one, sampler, 5, None).mean[-1])
    assert not torch.equal(forgetting(curve_learner(), FAMILIES, **SHORT, seed=1).values, result.values)


def test_drop_and_transfer_have_the_right_sign():
    values = torch.tensor([[1.0, 5.0, 3.0], [2.0, 2.5, 6.0]])
    made = lambda larger: Forgetting(("a", "b"), torch.tensor([0, 10, 20]), values, values * 0, (10, 20), "m", larger)
    assert made(True).drop == {"a": 2.0} and made(True).transfer == {"b": 0.5}
    assert made(False).drop == {"a": -2.0} and made(False).transfer == {"b": -0.5}
    assert "drop: a +2.000" in repr(made(True)) and "transfer: b +0.500" in repr(made(True))
    assert made(True).plot().get_ylabel() == "m"


def test_forgetting_with_other_choices():
    seen, tested = [], {n: Sinusoid(shots=3, queries=4) for n in FAMILIES}
    result = forgetting(
        curve_learner(), FAMILIES, **SHORT, opt=partial(torch.optim.SGD, lr=1e-3), tests=tested, adapt=3, seed=4, metric="loss", chunk=1,
        before=lambda learner, name: seen.append(name), combine=partial(meta_pcgrad, groups=2),
        callbacks=[lambda run: seen.append(run.step)])
    assert seen == ["sine", *range(1, 7), "line", *range(1, 7), "square", *range(1, 7)]
    assert torch.equal(result.values[0], result.values[1])  # the same test sampler
    frozen = curve_learner().requires_grad_(False)
    still = forgetting(frozen, FAMILIES, **SHORT)
    assert still.steps.tolist() == [0, 6, 12, 18] and set(still.drop.values()) == {0.0}


def test_forgetting_counts_accuracy_upwards():
    first, second = (FewShot(images(), ways=3, shots=1, queries=2, classes=range(k, k + 4)) for k in (0, 4))
    result = forgetting(MAML(classifier(), lr=0.1, loss=F.cross_entropy), {"first": first, "second": second}, **SHORT)
    assert result.metric == "accuracy" and result.larger
    assert result.drop["first"] == pytest.approx((result.values[0, 2] - result.values[0, -1]).item())
    wrong = lambda outputs, y: (outputs.argmax(-1) != y).double().mean()
    other = forgetting(MAML(classifier(), lr=0.1, loss=F.cross_entropy), {"first": first, "second": second}, **SHORT, metric=wrong)
    assert not other.larger and other.drop["first"] == pytest.approx(result.drop["first"])


def test_forgetting_errors_name_the_argument():
    for bad in ({}, {"one": Sinusoid()}, [Sinusoid(), Sinusoid()]):
        with pytest.raises(ValueError, match="families: give two or more"): forgetting(curve_learner(), bad)
    with pytest.raises(ValueError, match="tests: its names are"): forgetting(curve_learner(), FAMILIES, tests={"sine": Sinusoid()})
    for name in ("checkpoint", "validation", "scheduler"):
        with pytest.raises(ValueError, match=name): forgetting(curve_learner(), FAMILIES, **{name: "x"})
    for bad in (dict(steps=0), dict(every=0), dict(tasks=0), dict(checks=0)):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}=0"): forgetting(curve_learner(), FAMILIES, **{**SHORT, **bad})
    with pytest.raises(TypeError, match="families"): forgetting(curve_learner(), {"a": Sinusoid(), "b": 3}, **SHORT)
    for bad in (dict(steps="4"), dict(every="2"), dict(steps=2.5)):
        with pytest.raises(TypeError, match=f"{next(iter(bad))}=.*give a whole number"): forgetting(curve_learner(), FAMILIES, **{**SHORT, **bad})
    with pytest.raises(ValueError, match="every=0"): Watch(FAMILIES, every=0)
    with pytest.raises(ValueError, match="checks=0"): Watch(FAMILIES, every=1, checks=0)


# ---- the generator

def generated(make=partial(MAML, lr=0.05), **axes):
    "A learner with a Generator whose code has an effect."
    learner = make(net(), init=partial(Generator, inputs=2, latent=3, width=8), **axes)
    with torch.no_grad():
        for p in learner.init.left.parameters(): p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    return learner


@pytest.mark.parametrize("name", METHODS)
def test_a_new_generator_is_the_point(name):
    plain, learner = METHODS[name](net()), METHODS[name](net(), init=partial(Generator, inputs=2, latent=3))
    (grads, losses), (point, point_losses) = meta_grads(learner, CURVES), meta_grads(plain, CURVES)
    assert_close(losses, point_losses)
    for n, g in point.items(): assert_close(grads[n], g)
    assert max(g.abs().max() for n, g in grads.items() if ".left." in n) > 0


@pytest.mark.parametrize("make", [*METHODS.values(), partial(Reptile, lr=0.05, steps=2)], ids=[*METHODS, "Reptile"])
def test_generator_with_every_method(make):
    learner = generated(make)
    grads, losses = meta_grads(learner, CURVES)
    assert_close((grads, losses), meta_grads(learner, CURVES, chunk=1))
    assert all(g.isfinite().all() for g in grads.values()) and grads["init.embed.0.weight"].abs().max() > 0


def test_generator_gradient_by_finite_differences():
    learner = generated(penalty=partial(hessian_penalty, coefficient=0.01))
    exact, difference = directional(lambda: learner(single(CURVES)), learner.parameters())
    assert exact == pytest.approx(difference, rel=1e-4)


def test_code_and_rank():
    learner = generated()
    x, y = CURVES.x[0], CURVES.y[0]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert_close(learner.init(x, y), learner.init(x[order], y[order]))
    z = learner.init.encode(x, y)
    assert z.shape == (3,) and z.abs().max() < 1 and not torch.equal(z, learner.init.encode(*(t[1] for t in CURVES[:2])))
    point = dict(learner.init.model.named_parameters())
    for n, p in learner.init(x, y).items():
        assert p.shape == point[n].shape
        if p.ndim == 2: assert torch.linalg.matrix_rank(p - point[n]) <= 3
    left, right = learner.init.left.get_parameter("2.weight"), learner.init.right.get_parameter("2.weight")
    assert_close(learner.init(x, y)["2.weight"], point["2.weight"] + sum(z[k] * torch.outer(left[k], right[k]) for k in range(3)))


def test_generator_takes_convolutions_scalars_and_labels():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.net = nn.Parameter(torch.ones(())), Conv4(3, filters=2, stride=2)

        def forward(self, x): return self.gain * self.net(x)

    torch.manual_seed(0)
    learner = MAML(Gain(), lr=0.1, loss=F.cross_entropy, init=partial(Generator, inputs=36, latent=2))
    tasks = FewShot(images().float(), ways=3, shots=2, queries=2).sample(2)
    grads, _ = meta_grads(learner, tasks)
    assert grads["init.left.gain"].shape == (2, 2, 1) and all(g.isfinite().all() for g in grads.values())
    assert torch.equal(learner.init.encode(tasks.x[0], tasks.y[0]), learner.init.encode(tasks.x[0], 2 - tasks.y[0]))


def test_generator_trains_saves_and_resumes(tmp_path):
    def run(steps, **kw):
        learner = curve_learner(init=partial(Generator, inputs=2, latent=2))
        history = fit(learner, Sinusoid(shots=5), steps, tasks=4, opt=torch.optim.Adam(learner.parameters(), 1e-2), progress=False, **kw)
        return learner, history

    whole, history = run(30)
    assert sum(history["loss"][-5:]) < sum(history["loss"][:5])
    run(12, checkpoint=tmp_path / "run.pt")
    resumed, _ = run(30, checkpoint=tmp_path / "run.pt")
    fresh = curve_learner(1, init=partial(Generator, inputs=2, latent=2))
    fresh.load_state_dict(whole.state_dict())
    for other in (resumed, fresh, pickle.loads(pickle.dumps(whole))):
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters()))
    point = curve_learner(2)
    missing = fresh.load_state_dict(point.state_dict(), strict=False)  # a MAML checkpoint gives the point
    assert not missing.unexpected_keys and all(not n.startswith("init.model") for n in missing.missing_keys)


def test_generator_errors_name_the_argument():
    with pytest.raises(ValueError, match="inputs: say how many numbers"): MAML(net(), init=Generator)
    for bad in (dict(inputs=0), dict(inputs=2, latent=0), dict(inputs=2, width=0)):
        with pytest.raises(ValueError, match=f"{list(bad)[-1]}=0"): Generator(net(), **bad)
    wide = MAML(net(), init=partial(Generator, inputs=5))
    with pytest.raises(ValueError, match="inputs=5: an example has 2 numbers"): wide(single(CURVES))
    with pytest.raises(ValueError, match="x: a Generator makes"): Generator(net(), inputs=2)()


def test_watch_is_a_callback_of_fit():
    learner, watch = curve_learner(), Watch(FAMILIES, every=3, checks=4)
    fit(learner, Sinusoid(), 7, tasks=2, opt=torch.optim.Adam(learner.parameters(), 1e-3), progress=False, callbacks=[watch])
    assert list(watch.rows) == [3, 6, 7] and watch.result((7,)).values.shape == (3, 3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_same_probes_and_penalty_on_the_gpu():
    learner = generated(penalty=hessian_penalty)
    here = meta_grads(learner, CURVES)
    there = meta_grads(learner.cuda(), Task(*(t.cuda() for t in CURVES)))
    assert torch.equal(support_key(CURVES.x[0], CURVES.y[0]), support_key(CURVES.x[0].cuda(), CURVES.y[0].cuda()).cpu())
    assert_close(there[1].cpu(), here[1])
    for n, g in here[0].items(): assert_close(there[0][n].cpu(), g)
