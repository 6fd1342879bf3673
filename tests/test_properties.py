"""What holds for any request, any gradients and any wrong value; the same examples in each run."""
import importlib
import inspect
import math
import pkgutil
import re
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torch.func import grad, grad_and_value, vmap
from torch.testing import assert_close

import metanb
from metanb import data
from metanb.baselines import FromScratch, InContext, MatchingNet, Pretrained, Siamese
from metanb.core import SGD, MetaLearner, Task, add, dot, mean, meta_grads, norm, surrogate
from metanb.dimaml import DIMAML, Mixture, Quantile
from metanb.hierarchical import Bowl, HierarchicalRule, LogAlong, Rescaled, Rosenbrock, Teacher, Valley, ZooRun, fit_zoo, lengths, zoo
from metanb.imaml import IMAML, NewtonCG, Proximal
from metanb.lstm import Adagrad, LearnedOptimizer, LSTMRule, Nesterov, RMSprop, small_conv
from metanb.maml import ANIL, BOIL, FOMAML, MAML, Adam, Reptile
from metanb.memorize import Generator, Watch, Waves, forgetting, hessian_penalty
from metanb.meta_sgd import LSLR, MADAM, LayerStepRates, LearnedAdam, MetaSGD, MultiStep, WeightRates
from metanb.models import MLP, Autoencoder, Conv4, NoConv, ResNet12, with_head
from metanb.mtl import MTL, HardTasks
from metanb.pcgrad import WatchConflict, conflict, meta_pcgrad, pcgrad
from metanb.shaping import Flooded, Shaped, emphasis, inverse_exponential
from metanb.tasks import FewShot, Quadratic, Sampler, Sinusoid, Stream
from metanb.train import evaluate, fit
from metanb.unroll import Along, Momentum, RandomStart, Recomputed, StreamLearner, Truncated, fit_truncated, loss_curves

few_examples = settings(deadline=None, max_examples=30, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

# ---- samplers

PIXELS = torch.rand(8, 9, 1, 4, 4, generator=torch.Generator().manual_seed(0))
ROWS = torch.arange(40.0)[:, None]
SAMPLERS = {
    "Sinusoid": Sinusoid(4, 3), "Quadratic": Quadratic(3), "FewShot": FewShot(PIXELS, 3, 2, 4),
    "Stream": Stream(ROWS, -ROWS, steps=3, batch=4, queries=2), "Waves": Waves(4, 3), "Bowl": Bowl(3), "Valley": Valley(3),
    "Teacher": Teacher(3, steps=2, batch=2, queries=2),
}
OTHERS = {"Sampler", "Grouped", "HardTasks", "Focused"}  # the base; what goes by a task's place in the batch, or by what came before


MODULES = [importlib.import_module(f"metanb.{m.name}") for m in pkgutil.iter_modules(metanb.__path__)
           if m.name not in ("__main__", "_modidx", "cli", "bench")]


def test_each_sampler_is_here():
    found = {name for m in MODULES for name, c in vars(m).items() if inspect.isclass(c) and issubclass(c, Sampler)}
    assert found - OTHERS == set(SAMPLERS)


@pytest.mark.parametrize("name", SAMPLERS)
@few_examples
@given(T=st.integers(1, 7), chunk=st.integers(1, 7), seed=st.integers(-(2**70), 2**70), step=st.integers(0, 2**40),
       start=st.integers(0, 2**31))
def test_chunks_of_a_batch_are_the_batch(name, T, chunk, seed, step, start):
    "Task i of step s depends on (seed, s, i) alone: however a batch is cut, its tasks are the same, bit for bit."
    whole = SAMPLERS[name].sample(T, seed, step, start)
    parts = [SAMPLERS[name].sample(min(chunk, T - i), seed, step, start + i) for i in range(0, T, chunk)]
    for field, pieces in zip(whole, zip(*parts)): assert torch.equal(field, torch.cat(pieces))


ranges = st.tuples(*[st.floats(-1e3, 1e3, width=32)] * 2).map(sorted).map(tuple)


@pytest.mark.parametrize("kind", [Sinusoid, *(partial(Waves, wave=w) for w in ("square", "sawtooth"))], ids=["sine", "square", "sawtooth"])
@few_examples
@given(domain=ranges, amplitude=ranges, grid=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 99))
def test_curves_stay_within_their_ranges(kind, domain, amplitude, grid, dtype, seed):
    "Inputs lie in the domain, and no output is larger than the amplitude, for any ranges."
    (low, high), most = domain, max(map(abs, amplitude))
    tasks = kind(shots=3, queries=4, domain=domain, amplitude=amplitude, grid=grid, dtype=dtype).sample(5, seed)
    slack = 1e-6 * max(1.0, abs(low), abs(high), most)
    for x, y in ((tasks.x, tasks.y), (tasks.xq, tasks.yq)):
        assert x.dtype == y.dtype == dtype and x.min() >= low - slack and x.max() <= high + slack and y.abs().max() <= most + slack


@few_examples
@given(ways=st.integers(1, 8), shots=st.integers(1, 8), seed=st.integers(0, 99), few=st.integers(0, 7), data=st.data())
def test_few_shot_never_takes_an_image_twice_or_one_that_is_not_there(ways, shots, seed, few, data):
    "Distinct classes, distinct images in each, none beyond its count, all labels as often as asked."
    images, counts = torch.arange(72.0).view(8, 9, 1, 1, 1), torch.tensor([9] * 8)
    counts[few] = data.draw(st.integers(shots + 1, 9))
    queries = data.draw(st.integers(1, int(counts[few]) - shots))
    tasks = FewShot(images, ways, shots, queries, counts=counts).sample(3, seed)
    for x, y, xq, yq in zip(*tasks):
        number = torch.cat([x, xq]).flatten().long()
        labels, kind = torch.cat([y, yq]), number // 9
        assert len(number.unique()) == len(number) == ways * (shots + queries) and (number % 9 < counts[kind]).all()
        assert torch.equal(y.bincount(), torch.full((ways,), shots)) and torch.equal(yq.bincount(), torch.full((ways,), queries))
        assert len({(k, c) for k, c in zip(kind.tolist(), labels.tolist())}) == len(kind.unique()) == ways


# ---- parameter arithmetic

numbers = st.floats(-1e6, 1e6)
SHAPES = {"weight": (3, 2), "bias": (3,), "gain": (), "none": (0, 2)}


@st.composite
def dicts(draw, T=None, size=10.0):
    "Parameters, or with T the gradients of T tasks; whole numbers over eight, whose sums have no rounding in double precision."
    seed = draw(st.integers(0, 2**32))
    lead = () if T is None else (T,)
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randint(-int(8 * size), int(8 * size) + 1, lead + s, generator=g).double() / 8 for n, s in SHAPES.items()}


@few_examples
@given(a=dicts(), b=dicts(), c=dicts(), alpha=st.integers(-64, 64), beta=st.integers(-64, 64))
def test_arithmetic_of_dicts_is_that_of_a_vector_space(a, b, c, alpha, beta):
    "Exactly so, on numbers that need no rounding; lengths to rounding."
    zero = {n: torch.zeros_like(t) for n, t in a.items()}
    equal = lambda u, v: u.keys() == v.keys() and all(torch.equal(u[n], v[n]) for n in u)
    assert equal(add(a, b), add(b, a)) and equal(add(add(a, b), c), add(a, add(b, c)))
    assert equal(add(a, zero, alpha), a) and equal(add(a, a, -1), zero)
    assert equal(add(add(a, b, alpha), b, beta), add(a, b, alpha + beta))
    assert dot(a, b) == dot(b, a) and dot(add(a, b, alpha), c) == dot(a, c) + alpha * dot(b, c) and dot(a, a) >= 0
    assert_close(norm(add(zero, a, alpha)), abs(alpha) * norm(a), rtol=1e-12, atol=0)
    assert dot(a, b).abs() <= norm(a) * norm(b) * (1 + 1e-12) and norm(add(a, b)) <= (norm(a) + norm(b)) * (1 + 1e-12)


@few_examples
@given(phi=dicts(), g=dicts(4), value=st.lists(numbers, min_size=4, max_size=4), power=st.integers(1, 2), huge=st.sampled_from([1.0, 1e12]))
def test_a_surrogate_has_the_value_and_the_gradient_it_is_given(phi, g, value, power, huge):
    "Bit for bit, mapped over tasks, however large ⟨φ, g⟩ is; through any dependence of its parameters on φ by the chain rule."
    value, g = torch.tensor(value, dtype=torch.float64), {n: t * huge for n, t in g.items()}
    one = lambda phi, v, g: surrogate(v, {n: t**power for n, t in phi.items()}, g)
    grads, values = vmap(grad_and_value(one), in_dims=(None, 0, 0))(phi, value, g)
    assert torch.equal(values, value)
    for n in phi: assert_close(grads[n], g[n] if power == 1 else 2 * phi[n] * g[n], rtol=1e-15, atol=0)
    constant = grad(lambda g: one(phi, value[0], g))({n: t[0] for n, t in g.items()})
    assert all((t == 0).all() for t in constant.values())  # no gradient for `grads`


# ---- combiners

COMBINERS = {"mean": lambda g, seed: mean(g), "pcgrad": pcgrad, "meta_pcgrad": lambda g, seed: meta_pcgrad(g, 2, seed)}
every = pytest.mark.parametrize("combine", COMBINERS.values(), ids=COMBINERS)
some = st.sampled_from([2, 4, 6])


def row(g): return torch.cat([t.flatten() for t in g.values()])


def close(a, b, like): assert_close(a, b, rtol=1e-9, atol=1e-12 * max(row(like).abs().max().item(), 1e-300))


@every
@few_examples
@given(T=some, seed=st.integers(0, 999), data=st.data())
def test_parameters_may_come_in_any_order_and_under_any_name(combine, T, seed, data):
    grads = data.draw(dicts(T))
    order = data.draw(st.permutations(list(grads)))
    there, back = combine(grads, seed), combine({f"other.{n}": grads[n] for n in order}, seed)
    assert list(there) == list(grads) and list(back) == [f"other.{n}" for n in order]
    for n in grads: close(there[n], back[f"other.{n}"], grads)


@every
@few_examples
@given(T=some, seed=st.integers(0, 999), exponent=st.integers(-120, 120), sign=st.sampled_from([-1.0, 1.0]), grads=dicts(6))
def test_scaled_gradients_give_the_scaled_result(combine, T, seed, exponent, sign, grads):
    "combine(c g) = c combine(g), for any c ≠ 0, in double precision from 10⁻¹²⁰ to 10¹²⁰."
    grads, c = {n: g[:T] for n, g in grads.items()}, sign * 10.0**exponent
    out = combine({n: c * g for n, g in grads.items()}, seed)
    close(row(out) / c, row(combine(grads, seed)), grads)


@every
@few_examples
@given(T=some, seed=st.integers(0, 999), grads=dicts(6))
def test_without_conflict_it_is_the_mean(combine, T, seed, grads):
    grads = {n: g[:T].abs() for n, g in grads.items()}
    close(row(combine(grads, seed)), row(mean(grads)), grads)


@few_examples
@given(seed=st.integers(0, 999), grads=dicts(2))
def test_of_two_tasks_neither_is_harmed(seed, grads):
    "⟨pcgrad(g), gᵢ⟩ ≥ 0: to first order the step raises neither task's loss; without conflict it is the mean."
    out, each = row(pcgrad(grads, seed)), torch.stack([row({n: g[i] for n, g in grads.items()}) for i in (0, 1)])
    size, cosine = each.norm(dim=1), conflict(grads)[0, 1]
    assert (each @ out >= -1e-12 * size * size.max()).all()
    if cosine >= 0: close(out, each.mean(0), grads)
    else: close(out, each.mean(0) - cosine / 2 * (size[0] * each[1] / size[1] + size[1] * each[0] / size[0]), grads)


@few_examples
@given(T=st.integers(1, 6), seed=st.integers(0, 999), grads=dicts(6))
def test_groups_of_one_and_one_group(T, seed, grads):
    "As many groups as tasks is PCGrad, one group the mean; a task that is there twice counts twice."
    grads = {n: g[:T] for n, g in grads.items()}
    close(row(meta_pcgrad(grads, T, seed)), row(pcgrad(grads, seed)), grads)
    close(row(meta_pcgrad(grads, 1, seed)), row(mean(grads)), grads)
    twice = {n: g.repeat_interleave(2, 0) for n, g in grads.items()}
    close(row(meta_pcgrad(twice, T, seed)), row(pcgrad(grads, seed)), grads)


# ---- arguments

def net(): return MLP(1, 3, 1, std=None)
def classifier(): return with_head(nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU()), 3, 3)
def weights(): return dict(net().named_parameters())
def pair(): return torch.rand(5, 1), torch.rand(5, 1)
def sines(): return Sinusoid(4, 3).sample(2)


# {name: (constructor or function, arguments of a right call)}; every argument with a number for a default, or a number here, is tried.
RIGHT = {
    "MAML": (partial(MAML, net()), {}), "FOMAML": (partial(FOMAML, net()), {}), "Reptile": (partial(Reptile, net()), {}),
    "ANIL": (partial(ANIL, net()), {}), "BOIL": (partial(BOIL, net()), {}), "MetaLearner": (partial(MetaLearner, net()), dict(batch=2)),
    "SGD": (SGD, {}), "Adam": (Adam, {}), "Momentum": (Momentum, {}), "Nesterov": (Nesterov, {}), "RMSprop": (RMSprop, {}),
    "Adagrad": (Adagrad, {}),
    "MetaSGD": (partial(MetaSGD, net()), {}), "LSLR": (partial(LSLR, net()), {}), "MADAM": (partial(MADAM, net()), {}),
    "WeightRates": (partial(WeightRates, weights()), {}), "LearnedAdam": (partial(LearnedAdam, weights()), {}),
    "LayerStepRates": (partial(LayerStepRates, weights()), dict(steps=2)), "MultiStep": (MultiStep, dict(steps=2, over=3)),
    "IMAML": (partial(IMAML, net()), {}), "NewtonCG": (NewtonCG, {}),
    "Proximal": (partial(Proximal, net()), {}), "MTL": (partial(MTL, classifier()), {}),
    "HardTasks": (partial(HardTasks, FewShot(PIXELS, 3, 2, 4)), dict(chunk=1)), "WatchConflict": (WatchConflict, {}),
    "Generator": (partial(Generator, net()), dict(inputs=2)), "Watch": (partial(Watch, {"a": Sinusoid()}), dict(every=1, adapt=1)),
    "Quantile": (partial(Quantile, net()), {}), "Mixture": (partial(Mixture, net()), {}), "DIMAML": (partial(DIMAML, net()), {}),
    "LSTMRule": (LSTMRule, {}), "LearnedOptimizer": (partial(LearnedOptimizer, list(net().parameters()), SGD()), {}),
    "HierarchicalRule": (HierarchicalRule, dict(timescales=2)), "LogAlong": (LogAlong, {}), "Bowl": (Bowl, {}), "Valley": (Valley, {}),
    "Rosenbrock": (Rosenbrock, {}), "Teacher": (Teacher, {}), "Rescaled": (partial(Rescaled, net()), {}),
    "ZooRun": (partial(ZooRun, net()), {}),
    "Shaped": (Shaped, dict(s=2.0, a=1.0)), "Flooded": (partial(Flooded, net()), dict(level=0.1)),
    "Along": (Along, dict(start=1)), "Recomputed": (Recomputed, dict(segment=2)), "Truncated": (Truncated, {}),
    "StreamLearner": (partial(StreamLearner, net()), {}), "RandomStart": (partial(RandomStart, net()), dict(std=0.1)),
    "FromScratch": (partial(FromScratch, net()), {}), "Pretrained": (partial(Pretrained, classifier()), dict(classes=9)),
    "Siamese": (partial(Siamese, classifier()), dict(features=3)), "MatchingNet": (partial(MatchingNet, classifier()), {}),
    "InContext": (partial(InContext, classifier()), dict(width=4, depth=1, heads=2)),
    "MLP": (partial(MLP, 1, 2, 1), dict(std=0.1)), "Conv4": (Conv4, dict(filters=2)), "NoConv": (NoConv, dict(pixels=16)),
    "ResNet12": (partial(ResNet12, widths=(2, 2, 2, 2)), {}), "Autoencoder": (Autoencoder, dict(latent=2, planes=2)),
    "small_conv": (small_conv, {}),
    "Sinusoid": (Sinusoid, {}), "Waves": (Waves, {}), "Quadratic": (Quadratic, dict(rows=3)),
    "FewShot": (partial(FewShot, PIXELS), dict(ways=3, queries=2)),
    "Stream": (partial(Stream, ROWS, ROWS), dict(batch=4, queries=2, query_batches=1)),
    # functions that users call
    "sample": (Sinusoid().sample, dict(T=2)), "pcgrad": (partial(pcgrad, {"w": torch.ones(2, 1)}), dict(seed=1)),
    "meta_pcgrad": (partial(meta_pcgrad, {"w": torch.ones(2, 1)}), dict(groups=2, seed=1)),
    "meta_grads": (partial(meta_grads, MAML(net()), sines()), dict(chunk=1)),
    "fit": (partial(fit, MAML(net()), Sinusoid(4, 3), progress=False, validation=Sinusoid(4, 3)),
            dict(steps=0, clip=1.0, chunk=1, validate_every=1, checkpoint_every=1)),
    "evaluate": (partial(evaluate, MAML(net()), Sinusoid(4, 3)), dict(tasks=2, chunk=1)),
    "fit_truncated": (partial(fit_truncated, MAML(net(), steps=4, objective=Along()), Sinusoid(4, 3), progress=False),
                      dict(steps=1, tasks=1, unroll=2, chunk=1)),
    "loss_curves": (partial(loss_curves, MAML(net()), sines()), dict(steps=1, chunk=1)),
    "hessian_penalty": (partial(hessian_penalty, MAML(net()), Task(*(t[0] for t in sines()))), {}),
    "forgetting": (partial(forgetting, MAML(net()), {"a": Sinusoid(), "b": Waves()}), dict(steps=1, tasks=1, checks=2, every=1, adapt=1)),
    "fit_zoo": (partial(fit_zoo, HierarchicalRule((2,)), zoo(2)[:1]), dict(rounds=1, segments=1, unroll=1, tasks=1)),
    "lengths": (lengths, {}),
    "emphasis": (partial(emphasis, torch.rand(3)), {}),
    "inverse_exponential": (partial(inverse_exponential, 0.0), dict(a=1.0, s=2.0, z=0.5)),
    "glyphs": (partial(data.glyphs, "validation"), dict(size=8, per_class=1)),
}
# What the package makes for its users, or for itself.
INSIDE = {"CrossBlock", "Round", "Forgetting", "Result", "Run", "Pullback", "Sweep", "Trajectories", "Validate", "Checkpoint",
          "TensorBoard", "Problem", "Residual", "Focused", "Source"}


def numeric(name):
    "The arguments that are numbers, with whether they must be whole and whether None will do."
    make, right = RIGHT[name]
    found = {}
    for p in inspect.signature(make).parameters.values():
        value, said = right.get(p.name, p.default), str(p.annotation)
        if isinstance(value, bool) or not isinstance(value, int | float) or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL): continue
        found[p.name] = isinstance(value, int) and "float" not in said, "None" in said or p.default is None
    taken = {n for n in right if n not in found and not isinstance(right[n], bool)}  # those behind a **options
    found |= {n: (isinstance(right[n], int), False) for n in taken}
    return found


# Values that do mean something: a spread for no layer, and the first step.
TAKEN = [("RandomStart", "std", {}), ("LogAlong", "start", None)]


class Thing:
    "An object that is no number."
    def __repr__(self): return "<thing>"


NUMBERS = [(name, argument, *kind) for name in RIGHT for argument, kind in numeric(name).items()]


def complaint(name, argument, value):
    "What is wrong with the error that a wrong value for one argument gets; nothing if it is as it should be."
    make, right = RIGHT[name]
    try: make(**{**right, argument: value})
    except (ValueError, TypeError) as e:
        return "" if re.search(rf"\b{argument}\b", str(e)) else f"{argument}={value!r} got {type(e).__name__}: {str(e)[:90]}"
    except Exception as e: return f"{argument}={value!r} got {type(e).__name__}: {str(e)[:90]}"
    return f"{argument}={value!r} was taken"


@pytest.mark.parametrize("name", RIGHT)
def test_a_value_of_a_wrong_type_is_told_by_its_argument(name):
    "Words, containers, other objects, NaN, fractions where a whole number belongs, and None where it has no meaning."
    said = []
    for argument, (whole, optional) in numeric(name).items():
        wrong = ["5", b"5", {}, 1j, Thing(), math.nan, *([2.5] if whole else []), *([] if optional else [None])]
        said += [c for value in wrong if (name, argument, value) not in TAKEN and (c := complaint(name, argument, value))]
    assert not said, "\n".join([f"{name}:", *said])


words = st.text(max_size=3) | st.binary(max_size=3) | st.dictionaries(st.integers(), st.integers(), max_size=2) | st.complex_numbers()


@settings(few_examples, max_examples=200)
@given(which=st.sampled_from(NUMBERS), value=words | st.sets(st.integers(), max_size=2) | st.builds(Thing) | st.just(...))
def test_any_value_that_is_no_number_is_told(which, value):
    if (*which[:2], value) not in TAKEN: assert not complaint(*which[:2], value)


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_call_beside_it_works(name):
    make, right = RIGHT[name]
    make(**right)


def test_every_public_class_with_a_number_among_its_arguments_is_here():
    "A new class joins the table, or the names of those that the package makes for itself."
    lost = set()
    for module in MODULES:
        for name in module.__all__:
            piece = getattr(module, name)
            if not inspect.isclass(piece) or issubclass(piece, Exception) or name in RIGHT or name in INSIDE: continue
            defaults = [p.default for p in inspect.signature(piece).parameters.values()]
            if any(isinstance(d, int | float) and not isinstance(d, bool) for d in defaults): lost.add(f"{module.__name__}.{name}")
    assert not lost
