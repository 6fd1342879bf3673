"Compiled piece by piece, every learner computes what it computes uncompiled."
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from metanb.compute import meta_gradients
from metanb.core import MetaLearner
from metanb.imaml import IMAML
from metanb.maml import ANIL, FOMAML, MAML, Reptile
from metanb.meta_sgd import LSLR, MetaSGD
from metanb.models import Conv4
from metanb.tasks import FewShot, Sinusoid
from metanb.unroll import Along, Momentum, Recomputed

F64 = torch.float64
LETTERS = FewShot(torch.rand(6, 8, 1, 16, 16, dtype=F64, generator=torch.Generator().manual_seed(0)), ways=3, shots=2, queries=2)
CURVES = Sinusoid(shots=4, queries=5, dtype=F64)


def net(): return nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()


LEARNERS = {
    "MAML": lambda: MAML(net(), lr=0.1, steps=3),
    "no steps": lambda: MAML(net(), lr=0.1, steps=0),
    "FOMAML": lambda: FOMAML(net(), lr=0.1, steps=3),
    "Reptile": lambda: Reptile(net(), lr=0.1, steps=3),
    "ANIL": lambda: ANIL(net(), lr=0.1, steps=3),
    "Meta-SGD": lambda: MetaSGD(net(), steps=3),
    "rates per layer and step": lambda: LSLR(net(), steps=3),
    "iMAML": lambda: IMAML(net(), lr=0.1, steps=3),
    "momentum": lambda: MetaLearner(net(), rule=Momentum(0.1), steps=3),
    "minibatches": lambda: MAML(net(), lr=0.1, steps=3, batch=2),
    "every loss": lambda: MAML(net(), lr=0.1, steps=3, objective=Along()),
    "recomputed": lambda: MAML(net(), lr=0.1, steps=3, gradient=Recomputed()),
    "convolutions": lambda: MAML(Conv4(3, filters=2).double(), lr=0.1, steps=2, loss=F.cross_entropy),
    "pooling": lambda: MAML(Conv4(3, filters=2, stride=1, size=16).double(), lr=0.1, steps=2, loss=F.cross_entropy),
    "dropout": lambda: MAML(nn.Sequential(nn.Linear(1, 5), nn.Dropout(0.5), nn.Linear(5, 1)).double(), lr=0.1, steps=2),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_piecewise(monkeypatch, name):
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learner = LEARNERS[name]()
        sampler = LETTERS if name in ("convolutions", "pooling") else CURVES
        params = {n: p.detach() for n, p in learner.named_parameters() if p.requires_grad}
        both = [meta_gradients(learner, sampler, 3, seed=1, chunk=1, compile=c) for c in (False, True)]
        for step in range(3):
            want, got = (gradients(params, step) for gradients in both)
            assert_close(got, want, rtol=1e-9, atol=1e-12)
            assert all(g.is_contiguous() for g in got[0].values())  # an optimizer's one kernel goes through them in the weights' order
    assert "task_loss" not in vars(learner) and "update" not in vars(learner)
    assert graphs or name == "recomputed"  # its segments are differentiated by `torch.func`, under which torch runs compiled functions uncompiled
