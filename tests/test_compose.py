"""Pieces of different papers work together, on curves and on classes.

A composition trains on one fixed batch of tasks, where its meta-loss must fall; and whatever the pieces, the meta-gradient is the derivative of the meta-loss.
"""
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from metanb.baselines import InContext, MatchingNet, Pretrained, ProtoNet, Siamese
from metanb.core import MetaLearner, Point, SGD, Task, add, dot, exact, mean, meta_grads, task_grads
from metanb.dimaml import DIMAML
from metanb.hierarchical import HierarchicalRule, LogAlong, ZooRun
from metanb.imaml import IMAML, NewtonCG
from metanb.lstm import LSTMRule, quadratic_run
from metanb.maml import ANIL, BOIL, FOMAML, MAML, Adam, Reptile
from metanb.memorize import Generator, hessian_penalty
from metanb.meta_sgd import LSLR, MADAM, LayerStepRates, LearnedAdam, MetaSGD, MultiStep, WeightRates
from metanb.models import MLP, with_head
from metanb.mtl import MTL, ScaleShift
from metanb.pcgrad import meta_pcgrad, pcgrad
from metanb.shaping import Shaped
from metanb.tasks import FewShot, Quadratic, Sinusoid, Stream
from metanb.train import fit
from metanb.unroll import Momentum, RandomStart, Recomputed, StreamLearner, Truncated

KINDS = "regression", "classification"


class Fixed:
    "The same tasks in every meta-step."
    def __init__(self, tasks): self.tasks = tasks
    def sample(self, T, seed=0, step=0, start=0): return Task(*(t[start : start + T] for t in self.tasks))


def images():
    "Twelve classes of 6×6 images: a random prototype each, and noise."
    generator = torch.Generator().manual_seed(0)
    return torch.rand(12, 1, 1, 6, 6, generator=generator) + 0.3 * torch.rand(12, 8, 1, 6, 6, generator=generator)


def problem(kind, tasks=4, dtype=torch.float32):
    "A network, its loss and a batch of tasks."
    torch.manual_seed(0)
    if kind == "regression": net, loss, sampler = MLP(1, 12, 12, 1, activation=nn.Tanh, std=None), F.mse_loss, Sinusoid(shots=6, queries=6)
    else:
        body = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh())
        net, loss, sampler = with_head(body, 12, 3), F.cross_entropy, FewShot(images(), ways=3, shots=2, queries=3)
        nn.init.normal_(net.head.weight, std=0.3)
    return net.to(dtype), loss, sampler.sample(tasks, seed=1).to(dtype)


def falls(make, kind, steps=25, lr=3e-2, **options):
    "The mean meta-loss after training over the one before."
    net, loss, tasks = problem(kind)
    learner = make(net, loss=loss)
    before = meta_grads(learner, tasks)[1].mean()
    opt = torch.optim.Adam([p for p in learner.parameters() if p.requires_grad], lr)
    fit(learner, Fixed(tasks), steps, len(tasks.x), opt, compile=False, progress=False, **options)
    return (meta_grads(learner, tasks)[1].mean() / before).item()


def generator(kind):
    "First weights from a network that reads the support examples: an input and a target, or an image."
    return partial(Generator, inputs=2 if kind == "regression" else 36)


METHODS = dict(
    MAML=partial(MAML, lr=0.05, steps=2), FOMAML=partial(FOMAML, lr=0.05, steps=2), Reptile=partial(Reptile, lr=0.05, steps=3),
    ANIL=partial(ANIL, lr=0.05, steps=2), BOIL=partial(BOIL, lr=0.05, steps=2), MetaSGD=partial(MetaSGD, lr=0.05, steps=2),
    LSLR=partial(LSLR, lr=0.05, steps=2), MADAM=partial(MADAM, lr=0.01, steps=2), IMAML=partial(IMAML, lr=0.1, steps=5, lam=1.0),
    MTL=partial(MTL, lr=0.05, steps=3), Pretrained=partial(Pretrained, lr=0.05, steps=2), InContext=partial(InContext, width=16, depth=1, heads=2),
)
METRIC = dict(ProtoNet=partial(ProtoNet, layer="body"), MatchingNet=partial(MatchingNet, layer="body"), Siamese=partial(Siamese, layer="body", features=12))


@pytest.mark.parametrize("name, kind", [(n, k) for n in METHODS for k in KINDS] + [(n, "classification") for n in METRIC])
def test_meta_pcgrad_trains_every_learner(name, kind):
    assert falls({**METHODS, **METRIC}[name], kind, combine=partial(meta_pcgrad, groups=2)) < 0.95


rates, step_rates, adam = (partial(WeightRates, lr=0.05), partial(LayerStepRates, steps=2, lr=0.05), partial(LearnedAdam, lr=0.01))
penalty = partial(hessian_penalty, coefficient=1e-4)
PAIRS = {
    "iMAML's inner problem with LSLR's rates": partial(IMAML, lam=1.0, steps=2, rule=step_rates, gradient=exact),
    "iMAML's inner problem with MADAM's rule": partial(IMAML, lam=1.0, steps=2, rule=adam, gradient=exact),
    "iMAML with Newton-CG, head only": partial(IMAML, steps=2, rule=NewtonCG(cg_steps=3, halvings=3), adapt="head"),
    "iMAML with the Hessian penalty": partial(IMAML, lr=0.1, steps=4, lam=1.0, penalty=penalty),
    "ANIL with Meta-SGD's rates": partial(ANIL, steps=2, rule=rates),
    "BOIL with MADAM's rule": partial(BOIL, steps=2, rule=adam),
    "FOMAML with LSLR's rates, every step counts": partial(FOMAML, steps=2, rule=step_rates, objective=MultiStep(2)),
    "Reptile with an inner Adam": partial(Reptile, steps=3, rule=Adam(lr=0.01, beta1=0.0)),
    "MTL with MADAM's rule": partial(MTL, steps=2, rule=adam),
    "MTL with LSLR's rates": partial(MTL, steps=2, rule=step_rates),
    "MTL with implicit gradients": partial(IMAML, lr=0.1, steps=5, lam=1.0, init=ScaleShift, adapt="head"),
    "Meta-SGD with the Hessian penalty": partial(MetaSGD, lr=0.05, steps=2, penalty=penalty),
    "MAML from generated weights, in minibatches": partial(MAML, lr=0.05, steps=2, init=Generator, batch=3),
    "generated weights with LSLR's rates and a penalty": partial(LSLR, lr=0.05, steps=2, init=Generator, penalty=penalty),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", PAIRS)
def test_the_loss_of_a_composition_falls(pair, kind):
    make = PAIRS[pair]
    if make.keywords.get("init") is Generator: make = partial(make, init=generator(kind))
    assert falls(make, kind, combine=pcgrad) < 0.95


RULES = dict(SGD=SGD(0.05), Adam=Adam(0.01), WeightRates=rates, LayerStepRates=step_rates, LearnedAdam=partial(LearnedAdam, lr=0.01, eps=0.03))
EVERYTHING = list(product(RULES, (None, "head", "body"), (Point, ScaleShift, Generator), (None, partial(hessian_penalty, coefficient=1e-2))))


@pytest.mark.parametrize("number", range(len(EVERYTHING)), ids=lambda k: "-".join(getattr(part, "__name__", type(part).__name__) if callable(part) else str(part)
                                                                                  for part in EVERYTHING[k]))
def test_the_meta_gradient_is_the_derivative_and_the_loop_agrees(number):
    (rule, adapt, init, term), kind = EVERYTHING[number], KINDS[number // 2 % 2]
    net, loss, tasks = problem(kind, tasks=2, dtype=torch.float64)
    learner = MetaLearner(net, init=generator(kind) if init is Generator else init, adapt=adapt, rule=RULES[rule], penalty=term, steps=2, loss=loss)
    random, h = torch.Generator().manual_seed(1), 1e-6
    phi = {n: p.detach() + 0.01 * torch.randn(p.shape, generator=random, dtype=p.dtype) for n, p in learner.named_parameters() if p.requires_grad}
    along = {n: torch.randn(p.shape, generator=random, dtype=p.dtype) for n, p in phi.items()}
    grads, losses = task_grads(learner, phi, tasks)
    up, down = (task_grads(learner, add(phi, along, s * h), tasks)[1].mean() for s in (1, -1))
    assert_close(dot(mean(grads), along), (up - down) / (2 * h), rtol=1e-4, atol=1e-6)
    assert_close(task_grads(learner, phi, tasks, chunk=1), (grads, losses), rtol=1e-8, atol=1e-10)


STREAMS = {
    "LSTM optimizer": lambda: quadratic_run(LSTMRule(), steps=3, unroll=2),
    "hierarchical optimizer": lambda: ZooRun(MLP(3, 4, 1), noise=0.1, factor=2.0, init=RandomStart, rule=HierarchicalRule(), steps=3, objective=LogAlong(),
                                             gradient=Truncated(2), loss=F.mse_loss),
    "DIMAML": lambda: DIMAML(MLP(3, 4, 1), steps=3),
    "shaped, recomputed, momentum": lambda: StreamLearner(MLP(3, 4, 1), rule=Momentum(), steps=3, objective=Shaped(s=2.0, z=0.1, learn=True), gradient=Recomputed()),
}
HERE = {**{f"{n}, {k}": (m, k) for n, m in METHODS.items() for k in KINDS}, **{n: (m, "regression") for n, m in PAIRS.items()},
        **{n: (m, "stream") for n, m in STREAMS.items()}}
del HERE["InContext, classification"]  # like the learners that compare, it looks how many classes there are, which needs numbers


@pytest.mark.parametrize("name", HERE)
def test_nothing_is_made_on_another_device_than_the_weights(name):
    make, kind = HERE[name]
    if kind == "stream":  # a device without numbers, which refuses tensors of the CPU as a GPU does
        learner = make()
        tasks = (Quadratic() if name == "LSTM optimizer" else Stream(torch.randn(30, 3), torch.randn(30, 1), steps=3, batch=4, queries=3)).sample(2)
    else:
        net, loss, tasks = problem(kind, tasks=2)
        learner = (partial(make, init=generator(kind)) if make.keywords.get("init") is Generator else make)(net, loss=loss)
    learner, tasks = learner.to("meta"), tasks.to("meta")
    params = {n: p.detach() for n, p in learner.named_parameters() if p.requires_grad}
    grads, losses = task_grads(learner, params, tasks)
    outputs = learner.predict(*(t[0] for t in tasks[:3]))
    assert all(t.is_meta for t in (losses, outputs, *grads.values(), *mean(grads).values()))
    assert {n: g.shape for n, g in grads.items()} == {n: (2, *p.shape) for n, p in params.items()}
