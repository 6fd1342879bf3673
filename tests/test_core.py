"What `00_core` promises of any module, device and caller; the mathematics is tested in the notebook."
import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close

from metanb.core import MetaLearner, SGD, Task, add, dot, mean, meta_grads, norm


def regression(T=3, N=6, features=4, out=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Task(*(torch.randn(T, N, f, generator=generator, dtype=dtype) for f in (features, out, features, out)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        h = x[None]
        return self.out(self.attention(h, h, h, need_weights=False)[0][0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRUCell(4, 5), nn.Linear(5, 2)

    def forward(self, x): return self.out(self.cell(x, self.cell(x)))


class Nested(nn.Module):
    "A parameter of its own, a list, a dict, a tied weight and a constant buffer."
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.layers[1].weight = self.layers[0].weight
        self.named = nn.ParameterDict({"shift": torch.zeros(4)})
        self.register_buffer("mask", torch.tensor([1.0, 1.0, 0.0, 1.0]))
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layers: x = torch.tanh(layer(x) * self.mask + self.named["shift"])
        return self.out(x) * self.gain


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
    "batch norm with running averages": lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)),
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)),
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 2)),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.Flatten(), nn.Linear(27, 2)),
    "attention": Attention, "nested, tied": Nested,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_module(name, dtype):
    "vmap, chunks and a plain `backward` agree; the model given is left as it was."
    torch.manual_seed(0)
    model, tasks = MODELS[name]().to(dtype), regression(dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    learner = MetaLearner(model, rule=SGD(0.1), steps=2)
    grads, losses = meta_grads(learner, tasks)
    assert list(grads) == [n for n, _ in learner.named_parameters()]
    tolerance = dict(rtol=1e-3, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-9, atol=1e-12)
    for chunk in (1, 2):
        for n, g in meta_grads(learner, tasks, chunk=chunk)[0].items(): assert_close(g, grads[n], **tolerance)
    for i in range(3):
        learner.zero_grad()
        loss = learner(Task(*(t[i] for t in tasks)))
        loss.backward()
        assert_close(loss.detach(), losses[i], **tolerance)
        for n, p in learner.named_parameters(): assert_close(p.grad, grads[n][i], **tolerance)
    for n, t in model.state_dict().items(): assert torch.equal(t, before[n]), n
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_vmap_lacks_a_rule_for_is_pointed_to_the_loop():
    learner, tasks = MetaLearner(Recurrent().double(), rule=SGD(0.1), steps=2), regression()
    _, losses = meta_grads(learner, tasks, chunk=1)
    assert_close(losses[0], learner(Task(*(t[0] for t in tasks))).detach())
    try: assert_close(meta_grads(learner, tasks)[1], losses)  # a torch release that has the rule
    except RuntimeError as e: assert "chunk=1" in "".join(e.__notes__)


def test_adapted_weights_fit_the_users_model():
    model, task = MODELS["nested, tied"]().double(), Task(*(t[0] for t in regression()))
    learner = MetaLearner(model, rule=SGD(0.1), steps=3)
    params = learner.adapt(task.x, task.y, steps=5)
    assert list(params) == [n for n, _ in model.named_parameters()]
    assert_close(functional_call(model, params, (task.xq,)), learner.predict(task.x, task.y, task.xq, steps=5)[-1])


def test_per_task_gradients_of_a_mean_are_the_gradient_of_the_mean_loss():
    learner, tasks = MetaLearner(MODELS["mlp"]().double(), rule=SGD(0.1), steps=2), regression(T=4)
    sum(learner(Task(*task)) for task in zip(*tasks)).div(4).backward()
    for n, g in mean(meta_grads(learner, tasks)[0]).items(): assert_close(g, learner.get_parameter(n).grad)


def test_dropout_is_per_task_and_off_in_evaluation():
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 2)).double()
    same = Task(*(t[:1].expand(3, *t.shape[1:]) for t in regression()))
    learner = MetaLearner(net, rule=SGD(0.1))
    assert len(set(meta_grads(learner, same)[1].tolist())) == 3
    assert len(set(meta_grads(learner.eval(), same)[1].tolist())) == 1


@pytest.mark.parametrize("norm_mode", ["batch", "running"])
def test_norm_modes(norm_mode):
    "`batch` ignores stored averages; `running` uses them in training and evaluation, also after `train()`, and never changes them."
    net = MODELS["batch norm with running averages"]().double()
    net[1].running_mean += 3.0
    learner, task = MetaLearner(net, rule=SGD(0.1), norm=norm_mode), Task(*(t[0] for t in regression()))
    with torch.no_grad():
        outputs = [learner.train(mode).predict(task.x, task.y, task.xq, steps=0)[0] for mode in (True, False)]
        expected = (net.eval() if norm_mode == "running" else net.train())(task.xq)
    for out in outputs: assert_close(out, expected)
    if norm_mode == "running": assert all(torch.equal(a, b) for a, b in zip(learner.buffers(), copy.deepcopy(learner).buffers()) if not a.isnan().any())
    meta_grads(learner, regression())


def test_state_dict_holds_the_meta_parameters_and_loads_back():
    make = lambda seed: (torch.manual_seed(seed), MetaLearner(MODELS["mlp"](), rule=SGD(0.1)))[1]
    one, other, tasks = make(0), make(1), regression(dtype=torch.float32)
    other.load_state_dict(one.state_dict())
    for a, b in zip(meta_grads(one, tasks)[0].values(), meta_grads(other, tasks)[0].values()): assert torch.equal(a, b)
    assert set(one.state_dict()) == {n for n, _ in one.named_parameters()}
    revived = pickle.loads(pickle.dumps(one))
    assert torch.equal(meta_grads(revived, tasks)[1], meta_grads(one, tasks)[1])


def test_a_copy_of_a_compiled_learner_computes_its_own_gradients(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, options: f)  # what is tested is the cache, not the compiler
    learner, tasks = MetaLearner(MODELS["mlp"](), rule=SGD(0.1)), regression(dtype=torch.float32)
    meta_grads(learner, tasks, compile=True)
    other = copy.deepcopy(learner)
    with torch.no_grad():
        for p in other.parameters(): p.mul_(2)
    other.rule.lr = 0.3
    assert_close(meta_grads(other, tasks, compile=True)[1], meta_grads(other, tasks)[1])


WEIGHT = 1.0

def weighted(outputs, y): return WEIGHT * F.mse_loss(outputs, y)


def test_compiled_code_follows_what_changes(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    learner, tasks = MetaLearner(MODELS["mlp"](), rule=SGD(0.1), loss=weighted), regression(dtype=torch.float32)
    def losses():
        got, want = (meta_grads(learner, tasks, compile=c)[1] for c in (True, False))
        assert_close(got, want)
        return got.tolist()
    found = [losses()]
    learner.steps = 3; found.append(losses())
    learner.rule.lr = 0.2; found.append(losses())
    monkeypatch.setitem(globals(), "WEIGHT", 2.0); found.append(losses())
    assert len({tuple(f) for f in found}) == 4


def test_compiling_that_fails_runs_uncompiled_and_says_so_once(monkeypatch):
    def broken(f, options):
        def run(*args): raise RuntimeError("no C++ compiler")
        return run
    monkeypatch.setattr(torch, "compile", broken)
    learner, tasks = MetaLearner(MODELS["mlp"](), rule=SGD(0.1)), regression(dtype=torch.float32)
    with pytest.warns(UserWarning, match="running uncompiled"): _, losses = meta_grads(learner, tasks, compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(meta_grads(learner, tasks, compile=True)[1], losses)
    assert_close(losses, meta_grads(learner, tasks)[1])


def test_frozen_meta_parameters_have_no_gradient():
    learner = MetaLearner(MODELS["mlp"](), rule=SGD(0.1))
    learner.init.model[0].requires_grad_(False)
    grads, _ = meta_grads(learner, regression(dtype=torch.float32))
    assert list(grads) == ["init.model.2.weight", "init.model.2.bias"]


def test_cross_entropy_and_integer_targets():
    tasks = Task(torch.randn(3, 6, 4), torch.randint(5, (3, 6)), torch.randn(3, 7, 4), torch.randint(5, (3, 7)))
    learner = MetaLearner(nn.Linear(4, 5), rule=SGD(0.1), loss=F.cross_entropy)
    assert meta_grads(learner, tasks)[1].shape == (3,)


numbers = st.floats(-100, 100)
vectors = st.lists(numbers, min_size=1, max_size=5)


@settings(deadline=None)
@given(vectors, numbers, st.data())
def test_arithmetic_is_that_of_one_long_vector(a, alpha, data):
    b = data.draw(st.lists(numbers, min_size=len(a), max_size=len(a)))
    cut = data.draw(st.integers(0, len(a)))
    as_dict = lambda v: {"head": torch.tensor(v[:cut], dtype=torch.float64), "tail": torch.tensor(v[cut:], dtype=torch.float64)}
    flat = lambda d: torch.cat([d["head"], d["tail"]])
    a_, b_ = (torch.tensor(v, dtype=torch.float64) for v in (a, b))
    assert_close(flat(add(as_dict(a), as_dict(b), alpha)), a_ + alpha * b_)
    assert_close(dot(as_dict(a), as_dict(b)), (a_ * b_).sum())
    assert_close(norm(as_dict(a)), a_.norm())


BAD = [
    (lambda: MetaLearner(F.relu), TypeError, "torch.nn.Module"),
    (lambda: MetaLearner(nn.ReLU()), ValueError, "no parameters"),
    (lambda: MetaLearner(nn.Linear(2, 2), steps=1.5), ValueError, "steps=1.5"),
    (lambda: MetaLearner(nn.Linear(2, 2), adapt="nothing"), ValueError, "adapt='nothing'"),
    (lambda: MetaLearner(nn.Linear(2, 2), norm="group"), ValueError, "norm='group'"),
    (lambda: MetaLearner(nn.Linear(2, 2), batch=0), ValueError, "batch=0"),
    (lambda: SGD(lr=-0.1), ValueError, "lr=-0.1"),
    (lambda: SGD(lr=float("nan")), ValueError, "lr=nan"),
    (lambda: meta_grads(MetaLearner(nn.Linear(4, 2)), regression(dtype=torch.float32)[:3]), TypeError, "Task of four tensors"),
    (lambda: meta_grads(MetaLearner(nn.Linear(4, 2)), Task(*(t[0] for t in regression(dtype=torch.float32)))), ValueError, "[T, N, ...]"),
    (lambda: meta_grads(MetaLearner(nn.Linear(4, 2)), regression(dtype=torch.float32), chunk=-2), ValueError, "chunk=-2"),
    (lambda: MetaLearner(nn.Linear(4, 2))(Task(torch.ones(3, 4), torch.ones(3), torch.ones(3, 4), torch.ones(3))), ValueError, "(3, 2), the targets (3,)"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error) as raised: call()
    assert message in str(raised.value)


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.code = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)


def test_integer_parameters_are_refused_by_name():
    with pytest.raises(TypeError, match=r"code \(torch.int64\)"): MetaLearner(Whole())
