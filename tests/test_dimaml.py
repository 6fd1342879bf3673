"What `16_dimaml` promises of any model, family and trainer."
import copy
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.func import functional_call, grad
from torch.nn import functional as F
from torch.testing import assert_close

from metanb.core import MetaLearner, SGD, Task, exact, meta_grads
from metanb.dimaml import (DIMAML, FAMILIES, Correlated, Mixture, Normal, Quantile, Uniform, delta_orthogonal, fan_in, gradient_quotient,
                           implicit_draw, interpolate, kaiming, load_init, metainit, outer_settings, piece_moments, save_init, soft_inverse,
                           train_curve, transfer)
from metanb.maml import MAML
from metanb.meta_sgd import MetaSGD
from metanb.models import MLP
from metanb.tasks import Sinusoid, Stream
from metanb.train import evaluate, fit, save_checkpoint
from metanb.unroll import Along, Recomputed, Truncated, fit_truncated, loss_curves

F64 = torch.float64
families = pytest.mark.parametrize("family", list(FAMILIES.values()), ids=list(FAMILIES))


def conv_net(width=6, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 4, 1)).double()


def rows(T=2, steps=9, batch=8):
    gen = torch.Generator().manual_seed(4)
    x = torch.randn(200, 3, generator=gen, dtype=F64)
    return Stream(x, (x.sum(1, keepdim=True)).sin(), steps=steps, batch=batch, queries=16, query_batches=3)


def small(seed=0):
    torch.manual_seed(seed)
    return MLP(3, 6, 1, activation=nn.Tanh, std=None).double()


@families
def test_moments_say_what_is_drawn(family):
    init = family(conv_net())
    torch.manual_seed(1)
    for n, p in init.named_parameters():
        if p.requires_grad: p.data += 0.2 * torch.randn_like(p)
    drawn = [init.sample() for _ in range(600)]
    for name, (mean, std) in init.moments().items():
        w = torch.stack([d[name] for d in drawn])
        each = w.flatten(1).mean(1)  # one number a draw: the elements of a draw may be correlated
        assert abs(each.mean() - mean) < 5 * each.std() / len(each) ** 0.5 + 1e-9, name
        if std > 0: assert abs(w.std(correction=0) / std - 1) < 0.15, name
        else: assert_close(w, torch.full_like(w, mean))


@families
def test_normalising_layers_and_single_numbers_start_as_they_are(family):
    init, net = family(conv_net()), conv_net()
    weights = init.sample()
    assert_close(weights["1.weight"], torch.ones(6, dtype=F64))
    assert_close(weights["1.bias"], torch.zeros(6, dtype=F64))
    assert_close(weights["4.bias"], net[4].bias.detach())
    assert not init.scale.get_parameter("1.weight").requires_grad and init.location.get_parameter("1.weight").requires_grad
    assert init.scale.get_parameter("4.bias").requires_grad


@families
def test_meta_gradient_of_location_and_scale_is_the_closed_form_on_a_linear_model(family):
    torch.manual_seed(0)
    line = nn.Linear(5, 1).double()
    task = Task(*(torch.randn(1, 8, k, dtype=F64) for k in (5, 1, 5, 1)))
    learner = MetaLearner(line, init=family, rule=SGD(0.0))
    torch.manual_seed(3)
    grads, losses = meta_grads(learner, task, chunk=1)
    torch.manual_seed(3)
    w = learner.init.sample()
    m, s = learner.init.location.get_parameter("weight").detach(), learner.init.scale.get_parameter("weight").detach()
    errors = task.xq[0] @ w["weight"].T + w["bias"] - task.yq[0]
    g = 2 / 8 * (errors * task.xq[0]).sum(0)
    assert_close(losses[0], (errors**2).mean())
    assert_close(grads["init.location.weight"][0], g.sum())
    assert_close(grads["init.scale.weight"][0], (g * (w["weight"][0] - m) / s).sum())


def test_one_inner_step_of_a_linear_model_multiplies_by_its_jacobian():
    torch.manual_seed(0)
    line, rate = nn.Linear(4, 1, bias=False).double(), 0.1
    task = Task(*(torch.randn(1, 6, k, dtype=F64) for k in (4, 1, 4, 1)))
    learner = MetaLearner(line, init=Normal, rule=SGD(rate), steps=1)
    torch.manual_seed(2)
    grads, _ = meta_grads(learner, task, chunk=1)
    torch.manual_seed(2)
    w = learner.init.sample()["weight"][0]
    slope = lambda x, y, w: 2 / len(x) * x.T @ (x @ w - y[:, 0])
    H = 2 / 6 * task.x[0].T @ task.x[0]
    after = w - rate * slope(task.x[0], task.y[0], w)
    g = (torch.eye(4, dtype=F64) - rate * H) @ slope(task.xq[0], task.yq[0], after)
    m, s = learner.init.location.get_parameter("weight").detach(), learner.init.scale.get_parameter("weight").detach()
    assert_close(grads["init.location.weight"][0], g.sum())
    assert_close(grads["init.scale.weight"][0], (g * (w - m) / s).sum())


@families
def test_without_spread_it_is_a_point(family):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.tensor([0.7], dtype=F64)), nn.Parameter(torch.tensor([-0.2], dtype=F64))

        def forward(self, x): return self.w * torch.tanh(x) + self.b

    tasks = Sinusoid(dtype=F64).sample(3)
    point, losses = meta_grads(MAML(Two(), lr=0.1, steps=3), tasks)
    drawn, same = meta_grads(MAML(Two(), lr=0.1, steps=3, init=family), tasks)
    assert_close(same, losses)
    for n in "wb": assert_close(drawn[f"init.location.{n}"], point[f"init.model.{n}"][:, 0])
    for g in drawn.values(): assert g.isfinite().all()


@families
def test_vmap_and_a_loop_agree_on_one_task(family):
    learner, tasks = DIMAML(small(), init=family, steps=9, segment=4), rows().sample(1)
    both = []
    for chunk in (None, 1):
        torch.manual_seed(1)
        both.append(meta_grads(learner, tasks, chunk=chunk))
    assert_close(*both)
    torch.manual_seed(1)
    grads, losses = meta_grads(learner, rows().sample(3))
    assert len(set(losses.tolist())) == 3 and all(g.isfinite().all() for g in grads.values())


@families
def test_recomputed_is_the_plain_unroll_with_random_draws(family):
    both = []
    for gradient in (exact, Recomputed(4)):
        torch.manual_seed(1)
        both.append(meta_grads(DIMAML(small(), init=family, steps=9, gradient=gradient), rows().sample(2)))
    assert_close(*both)


@families
def test_state_dict_round_trip_and_file(family, tmp_path):
    init, other = family(small()), family(small(seed=1))
    for p in init.parameters(): p.data += 0.1
    other.load_state_dict(init.state_dict())
    save_init(tmp_path / "init", init)
    for one in (other, load_init(tmp_path / "init", small(seed=2)), copy.deepcopy(init)):
        torch.manual_seed(0); a = one.sample()
        torch.manual_seed(0); b = init.sample()
        assert_close(a, b, rtol=0, atol=0)


@families
def test_transfer_to_another_width(family):
    narrow = family(conv_net(6))
    for p in narrow.parameters(): p.data += 0.01
    wide = transfer(narrow, conv_net(24))
    assert wide.moments() == narrow.moments() and wide.sample()["4.weight"].shape == (1, 96)
    scaled = transfer(narrow, conv_net(24), rescale=True).moments()
    assert math.isclose(scaled["4.weight"][1], narrow.moments()["4.weight"][1] / 2, rel_tol=1e-9)
    assert math.isclose(scaled["0.weight"][1], narrow.moments()["0.weight"][1], rel_tol=1e-9)  # its fan-in is the image's
    means = [transfer(narrow, conv_net(24), rescale=again).location.get_parameter("4.weight").detach() for again in (False, True)]
    assert_close(means[1], means[0] / 4)
    net = wide.fill(conv_net(24))
    assert net(torch.randn(3, 2, 4, 4, dtype=F64)).isfinite().all()


@settings(max_examples=30, deadline=None)
@given(points=st.integers(2, 40), seed=st.integers(0, 10**6), scale=st.sampled_from([-2.0, -1e-3, 0.0, 1.0, 50.0]))
def test_the_quantile_function_never_falls(points, seed, scale):
    torch.manual_seed(seed)
    init = Quantile(nn.Linear(2, 2).double(), points=points)
    init.raw.get_parameter("weight").data.normal_(0, 3)
    init.scale.get_parameter("weight").data.fill_(scale)
    q = init.quantiles("weight", torch.linspace(0, 1, 501, dtype=F64))
    assert (q.diff() >= -1e-12 * q.abs().max()).all() and q.isfinite().all()


def test_interpolation_meets_its_points_and_its_moments_are_exact():
    q = torch.tensor([-1.0, 0.0, 0.5, 3.0], dtype=F64)
    assert_close(interpolate(q, torch.linspace(0, 1, 4, dtype=F64)), q)
    assert_close(interpolate(q, torch.tensor([1 / 6], dtype=F64)), torch.tensor([-0.5], dtype=F64))
    fine = interpolate(q, (torch.arange(300_000, dtype=F64) + 0.5) / 300_000)
    mean, std = piece_moments(q)
    assert_close(fine.mean(), mean, rtol=1e-6, atol=1e-6)
    assert_close(fine.std(), std, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["raw", "scale", "location"])
def test_the_gradient_of_a_quantile_function_by_finite_differences(part):
    init, probe = Quantile(nn.Linear(6, 4).double(), points=7), torch.randn(4, 6, dtype=F64)
    name, start = f"{part}.weight", getattr(init, part).get_parameter("weight").detach()

    def value(p):
        torch.manual_seed(5)
        return (probe * torch.tanh(functional_call(init, {name: p.view_as(start)})["weight"])).sum()

    flat, h = start.reshape(-1), 1e-5
    differences = torch.stack([(value(flat + e) - value(flat - e)) / (2 * h) for e in h * torch.eye(len(flat), dtype=F64)])
    assert_close(grad(value)(flat), differences, rtol=1e-6, atol=1e-8)


def test_a_mixtures_gradient_keeps_the_level():
    weight, centre, width = (torch.tensor(v, dtype=F64) for v in ([0.3, 0.7], [-1.0, 0.5], [0.4, 1.2]))
    value = torch.tensor([-2.0, 0.1, 1.5], dtype=F64)
    level = lambda v, c, w: (weight * torch.special.ndtr((v[:, None] - c) / w)).sum(-1)
    moved = lambda c, w: implicit_draw(value, weight, c, w)
    h = 1e-6
    for k in range(2):  # dε/dc_k by moving c_k and solving F = u again, to first order by Newton's step
        e = torch.eye(2, dtype=F64)[k] * h
        density = (level(value + h, centre, width) - level(value - h, centre, width)) / (2 * h)
        by_level = -(level(value, centre + e, width) - level(value, centre - e, width)) / (2 * h) / density
        slopes = torch.stack([grad(lambda c: moved(c, width)[i])(centre)[k] for i in range(3)])
        assert_close(slopes, by_level, rtol=1e-6, atol=1e-8)
    assert_close(moved(centre, width), value, rtol=0, atol=0)


def test_a_mixture_of_one_and_an_identity_factor_are_normal():
    net = nn.Conv2d(2, 8, 3).double()
    normal, one, flat = Normal(net), Mixture(net, components=1), Correlated(net)
    assert one.moments()["weight"] == pytest.approx(normal.moments()["weight"]) == flat.moments()["weight"]
    torch.manual_seed(0); a = normal.sample()
    torch.manual_seed(0); b = flat.sample()
    assert_close(a, b)
    w, c = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    slopes = torch.stack([grad(lambda s: implicit_draw(z, w, c, s))(w)[0] for z in torch.tensor([-1.3, 0.0, 2.0], dtype=F64)])
    assert_close(slopes, torch.tensor([-1.3, 0.0, 2.0], dtype=F64))


def test_kernels_are_correlated_as_their_factor_says():
    init = Correlated(nn.Conv2d(4, 50, 2).double())
    torch.manual_seed(0)
    L = torch.randn(4, 4, dtype=F64).tril()
    init.factor.get_parameter("weight").data.copy_(L)
    kernels = torch.stack([init.sample()["weight"] for _ in range(100)]).flatten(0, 2).flatten(1)
    s = init.scale.get_parameter("weight").detach()
    assert_close(kernels.T.cov() / s**2, L @ L.T, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["kaiming", "delta"])
def test_baselines_fill_a_net_with_the_variance_of_their_rule(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ConvTranspose2d(64, 32, 4, 2), nn.Linear(400, 300))
    assert [fan_in(m) for m in net] == [72, 256, 400]
    before = net[0].weight
    assert (kaiming if kind == "kaiming" else delta_orthogonal)(net)[0].weight is before
    assert abs(net[2].weight.var() * 400 / 2 - 1) < 0.05 and not net[0].bias.any()
    if kind == "kaiming": assert all(abs(m.weight.var() * fan_in(m) / 2 - 1) < 0.1 for m in net)
    else:
        middle = net[0].weight[:, :, 1, 1]
        assert_close(middle.T @ middle, 2 * torch.eye(8))
        assert net[0].weight.count_nonzero() == middle.count_nonzero()


def test_the_gradient_quotient_is_its_transcription():
    torch.manual_seed(0)
    net, (x, y) = small(), (torch.randn(12, k, dtype=F64) for k in (3, 1))
    params = list(net.parameters())
    g = torch.autograd.grad(F.mse_loss(net(x), y), params, create_graph=True)
    Hg = torch.autograd.grad(sum((t**2).sum() / 2 for t in g), params)
    terms = [((a - b) / (a + 1e-5 * a.sign()) - 1).abs().flatten() for a, b in zip(g, Hg)]
    value = gradient_quotient(lambda p: F.mse_loss(functional_call(net, p, (x,)), y), dict(net.named_parameters()))
    assert_close(value, torch.cat(terms).mean())
    flat = gradient_quotient(lambda p: 0.0 * sum(t.sum() for t in p.values()), dict(net.named_parameters()))
    assert_close(flat, torch.ones((), dtype=F64))  # a loss without slope: |0/ε − 1|, and no NaN


def test_metainit_lowers_the_quotient_and_moves_norms_alone():
    torch.manual_seed(0)
    net = kaiming(MLP(8, 16, 16, 4, std=None))
    for m in net.modules():
        if isinstance(m, nn.Linear): m.weight.data *= 3
    batches = [(torch.randn(64, 8), torch.randn(64, 4)) for _ in range(60)]
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    better, history = metainit(net, lambda k: batches[k], steps=60)
    assert torch.tensor(history[-10:]).median() < 0.5 * torch.tensor(history[:10]).median()
    for n, p in better.named_parameters():
        assert_close(net.get_parameter(n), before[n])  # the one given is left alone
        if p.ndim > 1: assert abs(F.cosine_similarity(p.flatten(), before[n].flatten(), 0)) > 0.9999
        else: assert_close(p, before[n])


def test_training_moves_a_distribution_towards_what_trains_fast():
    learner = DIMAML(small(), steps=9, lr=0.05)
    for p in learner.init.scale.parameters(): p.data *= 0.1  # too small a start
    history = fit(learner, rows(), 40, tasks=2, progress=False, **outer_settings(learner, lr=0.03))
    assert sum(history["loss"][-8:]) < 0.9 * sum(history["loss"][:8]) and history.skipped == 0


def test_outer_settings_give_shapes_a_rate_of_their_own_and_bound_the_norm():
    learner = DIMAML(small(), init=Quantile, steps=9)
    opt, clip = (outer_settings(learner, lr=0.1, shape_lr=0.7)[k] for k in ("opt", "clip"))
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.7]
    params = [p for g in opt.param_groups for p in g["params"]]
    assert {id(p) for p in params} == {id(p) for p in learner.parameters() if p.requires_grad}
    for p in params: p.grad = torch.full_like(p, 100.0)
    clip(params)
    assert abs(sum((p.grad**2).sum() for p in params) ** 0.5 - 10) < 1e-6
    assert len(outer_settings(DIMAML(small(), steps=9))["opt"].param_groups) == 1


def test_checkpoints_and_evaluation(tmp_path):
    def run(steps, path):
        learner = DIMAML(small(), init=Quantile, steps=6)
        fit(learner, rows(steps=6), steps, tasks=1, progress=False, checkpoint=path, **outer_settings(learner, lr=0.01))
        return learner
    whole = run(4, None)
    run(2, tmp_path / "c")
    assert_close(run(4, tmp_path / "c").state_dict(), whole.state_dict())
    a, b = (evaluate(whole, Sinusoid3(), tasks=2, steps=2, metric="loss") for _ in range(2))
    assert_close(a.values, b.values)


class Sinusoid3:
    def sample(self, T, **which): return rows(steps=2).sample(T, **which)


def test_other_choices_on_the_axes():
    tasks = Sinusoid(dtype=F64).sample(2)
    net = MLP(1, 6, 1, std=None).double()
    for learner in (MetaSGD(net, init=Normal), MAML(net, adapt="head", init=Uniform, steps=2), MAML(net, init=Normal(net))):
        grads, losses = meta_grads(learner, tasks)
        assert losses.isfinite().all() and any(n.startswith("init.scale") for n in grads)
    learner = DIMAML(small(), steps=8, gradient=Truncated(4), objective=DIMAML(small(), steps=12).objective)
    history = fit_truncated(learner, rows(steps=8), 4, tasks=2, progress=False)
    assert len(history) == 4
    assert loss_curves(learner, rows(steps=8).sample(2), every=4).shape == (2, 3)


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision_draws_and_gradients_are_finite(family, dtype):
    init = family(conv_net().to(dtype))
    out = sum((w.float() ** 2).sum() for w in init().values())
    out.backward()
    for n, p in init.named_parameters():
        if p.requires_grad: assert p.grad.isfinite().all() and p.dtype == dtype, n


def test_a_diverged_trajectory_changes_nothing_and_is_counted():
    learner = DIMAML(small(), steps=9, lr=1e200)
    before = copy.deepcopy(learner.state_dict())
    history = fit(learner, rows(), 2, tasks=1, progress=False, **outer_settings(learner))
    assert history.skipped == 2
    assert_close(learner.state_dict(), before)


def test_an_ordinary_training_loop_and_its_readings():
    x = torch.randn(40, 3)
    net = Normal(MLP(3, 8, 3, std=None)).fill(MLP(3, 8, 3))
    curve = train_curve(net, (x, x), (x, x), steps=60, every=20, batch=16, lr=0.1)
    assert curve.shape == (4,) and curve[-1] < curve[0]
    short = Normal(net).fill(MLP(3, 8, 3))
    with pytest.raises(ValueError, match="batch=64"): train_curve(short, (x, x), (x, x), steps=6, every=2, batch=64)


@settings(max_examples=20, deadline=None)
@given(value=st.floats(1e-6, 50))
def test_soft_inverse(value):
    v = torch.tensor(value, dtype=F64)
    assert_close(F.softplus(soft_inverse(v)), v, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("call, error, words", [
    (lambda: DIMAML(small(), steps=0), ValueError, "objective: its first reading is at step 1, of steps=0; take more steps"),
    (lambda: DIMAML(small(), steps=9, objective=Along(start=10)), ValueError, "at step 10, of steps=9"),
    (lambda: DIMAML(small(), beta="x"), TypeError, "beta='x': give a number"),
    (lambda: outer_settings(DIMAML(small(), steps=9), bound=-1), ValueError, "bound=-1: give a finite number, above zero"),
    (lambda: outer_settings(DIMAML(small(), steps=9), bound=math.nan), ValueError, "bound=nan"),
    (lambda: outer_settings(DIMAML(small(), steps=9), lr="fast"), TypeError, "lr='fast': give a number"),
    (lambda: outer_settings(DIMAML(small(), Quantile, steps=9), shape_lr=-1.0), ValueError, "shape_lr=-1.0"),
    (lambda: outer_settings(3), TypeError, "learner: expected a Learner"),
    (lambda: save_init("never", DIMAML(small(), steps=9)), TypeError, "init: expected a distribution.*StreamLearner.*learner.init"),
    (lambda: transfer(small(), small()), TypeError, "init: expected a distribution"),
    (lambda: metainit(small(), None, steps=-1), ValueError, "steps=-1"), (lambda: metainit(small(), None, lr="x"), TypeError, "lr='x'"),
    (lambda: Quantile(small(), points=1.5), TypeError, "points=1.5: give a whole number")],
    ids=["steps-zero", "reading-after-the-end", "beta-word", "bound-negative", "bound-nan", "lr-word", "shape-lr-negative", "settings-of-a-number",
         "save-a-learner", "transfer-a-net", "metainit-steps", "metainit-lr", "points-fraction"])
def test_mistakes_are_named(call, error, words):
    with pytest.raises(error, match=words): call()


@pytest.mark.parametrize("family", [Normal, Quantile, Correlated], ids=lambda f: f.__name__)
def test_a_file_of_another_architecture_is_told_in_a_few_words(family, tmp_path):
    save_init(tmp_path / "x", family(small()))
    with pytest.raises(ValueError) as error: load_init(tmp_path / "x", MLP(3, 6, 6, 6, 1))
    said = str(error.value)
    assert "x does not fit this model (without location.body.linear2.weight" in said and "of the same architecture" in said and len(said) < 350
    load_init(tmp_path / "x", MLP(3, 9, 1))  # another width is what distributions are for


def test_bad_input_is_refused_by_name(tmp_path):
    frozen = small(); frozen.head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="head.weight does not require gradients"): Normal(frozen)
    with pytest.raises(TypeError, match="model: expected"): Normal(3)
    with pytest.raises(ValueError, match="points=1"): Quantile(small(), points=1)
    with pytest.raises(ValueError, match="components=0"): Mixture(small(), components=0)
    with pytest.raises(ValueError, match="use transfer"): Normal(small()).fill(MLP(3, 7, 1).double())
    with pytest.raises(ValueError, match="not in both architectures"): transfer(Normal(small()), MLP(3, 6, 6, 1))
    with pytest.raises(ValueError, match="does not fit"): transfer(Correlated(nn.Conv2d(2, 2, 3)), nn.Conv2d(2, 2, 5))
    save_checkpoint(tmp_path / "x", dict(a=1))
    with pytest.raises(ValueError, match="holds no initial distribution"): load_init(tmp_path / "x", small())
