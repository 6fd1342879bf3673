"What `15_mtl` promises of any net, axis, caller and interrupted run; the mathematics is tested in the notebook."
import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from metanb.core import Learner, MetaLearner, Point, SGD, Task, first_order, meta_grads
from metanb.meta_sgd import LayerStepRates, LearnedAdam, MultiStep, WeightRates
from metanb.models import MLP, Conv4, ResNet12
from metanb.mtl import MTL, Focused, HardTasks, HeadLearner, ScaleShift, class_accuracies
from metanb.pcgrad import pcgrad
from metanb.tasks import FewShot, Sinusoid, task_keys
from metanb.train import evaluate, fit


def conv(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Conv4(5, channels=1, filters=4, stride=2).to(dtype)


def pictures(classes=12, **options):
    torch.manual_seed(1)
    return FewShot(torch.rand(classes, 6, 1, 8, 8, dtype=options.pop("dtype", torch.float32)), **{"queries": 3, **options})


def mtl(**axes): return MTL(conv(), **{"lr": 0.1, "steps": 3, "loss": F.cross_entropy, **axes})


def sine_net():
    torch.manual_seed(0)
    return MLP(1, 20, 20, 1, std=None)


# --- ScaleShift

NETS = {"conv": conv, "mlp": sine_net, "batch-normed mlp": lambda: MLP(3, 6, 2, norm=True),
        "resnet": lambda: ResNet12(5, widths=(2, 3, 4, 5))}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("net", NETS)
def test_it_starts_at_the_pretrained_net_bit_for_bit(net, dtype, affine):
    model = NETS[net]().to(dtype)
    start, want = ScaleShift(model, affine=affine)(), dict(model.named_parameters())
    assert list(start) == list(want)
    for n, p in want.items(): assert torch.equal(start[n], p) and start[n].dtype == dtype


def test_a_net_with_norms_frozen_scales_and_shifts_the_rest():
    init = ScaleShift(conv(), affine=False)
    names = [n for tree in (init.scale, init.shift) for n, _ in tree.named_parameters()]
    assert len(names) == 8 and all(".conv." in n for n in names)
    assert len(list(ScaleShift(conv()).scale.parameters())) == 8  # four kernels and four of BatchNorm's


def test_it_copies_the_net_and_frees_a_frozen_head():
    model = conv().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    learner = MTL(model, lr=0.1, steps=1, loss=F.cross_entropy)
    assert [n for n, p in learner.named_parameters() if not p.requires_grad] == []
    fit(learner, pictures(), steps=2, tasks=2, progress=False)
    for n, t in model.state_dict().items(): assert torch.equal(t, before[n])


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight = self.a.weight
        def forward(self, x): return self.head(self.b(torch.tanh(self.a(x))))
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(3, 4)
    init = ScaleShift(model)
    assert init.model.a.weight is init.model.b.weight
    learner = MTL(model, lr=0.1, steps=1)
    assert_close(learner.run(learner.init(), x), model(x))
    assert not learner.once  # not a sequence


def test_frozen_weights_never_move_and_only_the_head_does_inside():
    learner, tasks = mtl(), pictures()
    frozen = {n: t.clone() for n, t in learner.init.named_buffers()}
    learned = {n: p.detach().clone() for n, p in learner.named_parameters()}
    fit(learner, tasks, steps=3, tasks=2, progress=False)
    assert len(frozen) == 16
    for n, t in learner.init.named_buffers(): assert torch.equal(t, frozen[n])
    moved = {n for n, p in learner.named_parameters() if not torch.equal(p, learned[n])}
    assert {n for n in learned if ".norm." in n or ".head." in n or "conv.weight" in n} <= moved  # BatchNorm cancels a shift before it
    task = Task(*(t[0] for t in tasks.sample(1)))
    start, end = learner.init(), learner.adapt(task.x, task.y)
    assert [n for n in start if not torch.equal(start[n], end[n])] == ["head.weight", "head.bias"]


@pytest.mark.parametrize("bad, words", [
    (lambda: ScaleShift(nn.Linear(3, 2)), "layers below its head"),
    (lambda: ScaleShift(nn.Conv2d(1, 2, 3)), "layers below its head"),
    (lambda: MTL(conv(), adapt="classifier"), "adapt='classifier' matches no parameter"),
    (lambda: MTL(conv(), init=partial(ScaleShift, free="top")), "free='top' matches no parameter"),
    (lambda: MTL(conv(), lr=-1.0), "lr=-1.0"),
    (lambda: MTL(conv(), steps=-1), "steps=-1"),
    (lambda: MTL(nn.ReLU()), "no parameters"),
])
def test_bad_nets_and_heads_are_named(bad, words):
    with pytest.raises(ValueError, match=words): bad()


# --- features once

@pytest.mark.parametrize("axes", [
    {}, {"gradient": first_order}, {"objective": MultiStep(3)}, {"rule": partial(LearnedAdam, lr=0.05, eps=1e-3)},
    {"rule": partial(LayerStepRates, steps=3)},
    {"rule": partial(WeightRates, lr=0.1)}, {"init": Point}, {"batch": 3}, {"adapt": None}, {"adapt": "body"}], ids=lambda axes: "-".join(axes) or "plain")
def test_features_once_is_the_same_learner(axes):
    options = {"init": ScaleShift, "adapt": "head", "rule": SGD(0.1), "steps": 3, "loss": F.cross_entropy, **axes}
    model, tasks = conv(dtype=torch.float64), pictures(dtype=torch.float64).sample(2)
    plain, fast = MetaLearner(model, **options), HeadLearner(model, **options)
    assert fast.once == (not {"batch", "adapt"} & set(axes))
    (want, losses), (got, same) = meta_grads(plain, tasks), meta_grads(fast, tasks, chunk=1)
    assert_close(same, losses)
    for n in want: assert_close(got[n], want[n], rtol=1e-6, atol=1e-9)
    task = Task(*(t[0] for t in tasks))
    assert_close(fast.predict(task.x, task.y, task.xq), plain.predict(task.x, task.y, task.xq))


def test_running_statistics_are_used_as_stored():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    model(torch.randn(50, 4) * 3 + 1)  # fills the averages
    learner = MTL(model, norm="running", lr=0.1, steps=2, loss=F.cross_entropy)
    assert learner.once
    learner.train()
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    assert_close(learner.predict(x, y, x)[0], model.eval()(x))


# --- composition

RULES = {"SGD": None, "MADAM's rule": partial(LearnedAdam, lr=0.05), "LSLR's rule": partial(LayerStepRates, steps=3, lr=0.05)}

@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("problem", ["regression", "classification"])
def test_losses_fall_with_every_rule(problem, rule):
    axes = {} if rule is None else {"rule": rule}
    if problem == "regression": learner, sampler, tasks = MTL(sine_net(), lr=0.01, steps=3, **axes), Sinusoid(), 8
    else: learner, sampler, tasks = mtl(**axes), FewShot(torch.rand(8, 1, 1, 8, 8) + 0.1 * torch.randn(8, 6, 1, 8, 8), queries=3), 4
    history = fit(learner, sampler, steps=40, tasks=tasks, opt=torch.optim.Adam(learner.parameters(), 1e-2), progress=False)
    first, final = (sum(part) / 8 for part in (history["loss"][:8], history["loss"][-8:]))
    assert final < 0.95 * first


def test_it_trains_with_projected_gradients():
    learner = mtl()
    history = fit(learner, pictures(), steps=3, tasks=4, combine=pcgrad, progress=False)
    assert len(history) == 3 and all(torch.isfinite(p).all() for p in learner.parameters())


def test_state_comes_back_from_a_copy_a_pickle_and_a_state_dict():
    learner, tasks = mtl(), pictures().sample(2)
    fit(learner, pictures(), steps=2, tasks=2, progress=False)
    other = MTL(conv(seed=5), lr=0.1, steps=3, loss=F.cross_entropy)  # other pretrained weights: the state holds those too
    other.load_state_dict(learner.state_dict())
    for again in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner)), other):
        assert torch.equal(meta_grads(again, tasks)[1], meta_grads(learner, tasks)[1])


def test_evaluate_runs_more_steps_than_training():
    result = evaluate(mtl(), pictures(), tasks=5, steps=12)
    assert result.values.shape == (5, 13)


# --- hard tasks

class Wrong(Learner):
    "Recognises a class by the brightness of its images, but always fails on some."
    def __init__(self, bad=(0.0, 1.0, 2.0)):
        super().__init__()
        self.loss, self.bad, self.weight = F.cross_entropy, torch.tensor(bad), nn.Parameter(torch.zeros(()))
    def forward(self, task): return (self.weight - 1) ** 2
    def predict(self, x, y, xq, steps=None):
        light = lambda t: t.flatten(1).amax(1)
        label = y[(light(xq)[:, None] - light(x)[None]).abs().argmin(1)]
        label = torch.where((light(xq)[:, None] == self.bad).any(1), (label + 1) % 5, label)
        return (label[:, None] == torch.arange(5)).float()[None]


def shaded(**options):
    "Images whose brightest pixel says the class; the others are zero, in the first row."
    images = torch.zeros(20, 6, 1, 3, 3)
    images[..., 0, 0] = torch.arange(20.0)[:, None, None]
    return FewShot(images, **{"queries": 2, **options})


def classes_of(tasks): return tasks.x.flatten(2).amax(2).long()


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_classes_that_fail_fill_the_pool_and_come_again(chunk):
    hard = HardTasks(shaded(), every=3, keep=6, chunk=chunk)
    fit(Wrong(), hard, steps=9, tasks=8, callbacks=[hard], progress=False)
    assert set(hard.pool.tolist()) == {0, 1, 2}
    again, random = (classes_of(hard.sample(200, step=step)) for step in (11, 10))
    for c in (0, 1, 2):
        assert (again == c).any(1).all()
        assert (random == c).any(1).float().mean() < 0.4


def test_random_meta_steps_are_those_of_the_sampler():
    source = shaded()
    hard = HardTasks(source, every=4)
    for step in (0, 1, 2, 4, 5):
        for got, want in zip(hard.sample(3, 7, step, 2), source.sample(3, 7, step, 2)): assert torch.equal(got, want)


def test_a_hard_task_depends_on_its_number_and_the_pool_alone():
    hard = HardTasks(shaded(), keep=8)
    hard.load_state_dict(dict(pool=torch.tensor([4, 9, 4, 11, 2, 17, -1, 3])))
    whole, part = hard.sample(6, 3, 1), hard.sample(2, 3, 1, start=4)
    for a, b in zip(whole, part): assert torch.equal(a[4:], b)
    assert set(classes_of(hard.sample(100, 3, 1)).flatten().tolist()) == {2, 3, 4, 9, 11, 17}
    assert not torch.equal(classes_of(hard.sample(6, 3, 3)), classes_of(whole))


def test_without_failures_tasks_stay_random():
    hard = HardTasks(shaded())
    fit(Wrong(bad=(99.0,)), hard, steps=4, tasks=3, callbacks=[hard], progress=False)
    assert (hard.pool == -1).all()
    assert len(classes_of(hard.sample(100, step=1)).unique()) == 20


def test_quarter_turns_fail_one_by_one():
    turned = shaded(rotations=True)
    class FailsTurned(Wrong):  # fails on classes that are turned once: their pixel is in the lower left corner
        def predict(self, x, y, xq, steps=None):
            label = y[(xq.flatten(1)[:, None] - x.flatten(1)[None]).abs().sum(2).argmin(1)]
            label = torch.where(xq[:, 0, 2, 0] > 0, (label + 1) % 5, label)
            return (label[:, None] == torch.arange(5)).float()[None]
    hard = HardTasks(turned, keep=12)
    fit(FailsTurned(), hard, steps=6, tasks=8, callbacks=[hard], progress=False)
    found = hard.pool[hard.pool >= 0]
    assert len(found) and (found // 20 == 1).all()
    numbers = hard.numbers()
    assert torch.equal(numbers, torch.arange(80))
    classes, turns, _ = Focused.of(turned, torch.isin(numbers, hard.pool)).indices(task_keys(50))
    assert torch.isin((classes + 20 * turns)[:, 0], found).all()


def test_families_counts_and_a_choice_of_classes_hold_in_hard_tasks():
    torch.manual_seed(0)
    counts = torch.tensor([4, 6] * 10)
    source = shaded(ways=3, queries=2, shots=2, families=True, family=torch.arange(20) // 5, counts=counts, classes=torch.arange(1, 20))
    focused = Focused.of(source, torch.isin(source.pool, torch.tensor([1, 6, 7, 12])))
    classes, turns, images = focused.indices(task_keys(300))
    assert (classes // 5 == classes[:, :1] // 5).all() and (classes > 0).all() and (turns == 0).all()
    assert (images < counts[classes][..., None]).all()
    for family, chosen in ((0, {1}), (1, {6, 7}), (2, {12})):
        mine = classes[classes[:, 0] // 5 == family]
        assert all(chosen <= set(row) for row in mine.tolist())
    assert len(classes[classes[:, 0] // 5 == 3]) > 0  # a family without a failure is drawn as before
    assert (images.sort(-1).values.diff(dim=-1) > 0).all() and (classes.sort(-1).values.diff(dim=-1) > 0).all()


def test_an_interrupted_run_resumes_the_same(tmp_path):
    def run(steps, path, stop=None):
        torch.manual_seed(0)
        learner, hard = mtl(), HardTasks(pictures(), keep=6)
        fit(learner, hard, steps=steps, tasks=3, callbacks=[hard], seed=4, checkpoint=path, checkpoint_every=1, progress=False)
        return learner.state_dict(), hard.pool
    whole, pool = run(7, tmp_path / "whole")
    run(4, tmp_path / "part")
    again, same = run(7, tmp_path / "part")
    assert torch.equal(same, pool) and (pool >= 0).any()
    for n in whole: assert torch.equal(again[n], whole[n])


def test_a_resume_with_other_hard_tasks_is_refused(tmp_path):
    def run(hard): return fit(mtl(), hard, steps=2, tasks=2, callbacks=[hard], checkpoint=tmp_path / "c", progress=False)
    run(HardTasks(pictures()))
    run(HardTasks(pictures()))
    for other in (HardTasks(pictures(), every=3), HardTasks(pictures(), keep=4), HardTasks(pictures(shots=2))):
        with pytest.raises(ValueError, match="belongs to another run"): run(other)


def test_a_new_run_starts_with_an_empty_pool_and_watching_changes_nothing_else():
    source = pictures()
    hard = HardTasks(source)
    first, second = mtl(), mtl()
    for learner in (first, second): fit(learner, hard, steps=4, tasks=2, callbacks=[hard], progress=False)
    for a, b in zip(first.parameters(), second.parameters()): assert torch.equal(a, b)
    watched, plain = mtl(), mtl()
    fit(watched, hard, steps=1, tasks=2, callbacks=[hard], progress=False)
    fit(plain, source, steps=1, tasks=2, progress=False)
    for a, b in zip(watched.parameters(), plain.parameters()): assert torch.equal(a, b)


def test_state_device_copy_and_pickle():
    hard = HardTasks(shaded(), keep=3)
    hard.load_state_dict(dict(pool=torch.tensor([5, -1, 7])))
    for again in (hard.to("cpu"), copy.deepcopy(hard), pickle.loads(pickle.dumps(hard))):
        assert torch.equal(again.state_dict()["pool"], hard.pool)
        assert torch.equal(again.sample(3, step=1).x, hard.sample(3, step=1).x)
    assert hard.to("meta").pool.device.type == "meta"


@pytest.mark.parametrize("bad, kind, words", [
    (lambda: HardTasks(Sinusoid()), TypeError, "give a FewShot"),
    (lambda: HardTasks(shaded(labels="global")), ValueError, "labels='local'"),
    (lambda: HardTasks(shaded(), every=1), ValueError, "every=1"),
    (lambda: HardTasks(shaded(), keep=0), ValueError, "keep=0"),
    (lambda: HardTasks(shaded(), chunk=0), ValueError, "chunk=0"),
    (lambda: HardTasks(shaded()).sample(2, step=1), ValueError, "give it to fit twice"),
    (lambda: HardTasks(shaded(), keep=4).load_state_dict(dict(pool=torch.zeros(3))), ValueError, "keep=4"),
    (lambda: fit(Wrong(), HardTasks(shaded()), steps=2, tasks=2, progress=False), ValueError, "give it to fit twice"),
    (lambda: fit(Wrong(), shaded(), steps=1, tasks=2, callbacks=[HardTasks(shaded())], progress=False),
     ValueError, "run whose sampler it is"),
])
def test_wrong_use_is_named(bad, kind, words):
    with pytest.raises(kind, match=words): bad()


def test_class_accuracies_average_to_accuracy():
    torch.manual_seed(0)
    outputs, y = torch.randn(20, 5), torch.arange(5).repeat(4)
    assert_close(class_accuracies(outputs, y).mean(), (outputs.argmax(-1) == y).float().mean())
    assert_close(torch.func.vmap(class_accuracies)(outputs[None], y[None])[0], class_accuracies(outputs, y))
