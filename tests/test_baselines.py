"What `20_baselines` promises of any model, caller and trainer; the closed forms are tested in the notebook."
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn import functional as F
from torch.testing import assert_close

from metanb.baselines import (EmbeddingLearner, FromScratch, InContext, MatchingNet, NearestNeighbour, Pretrained, ProtoNet, Siamese,
                              freeze_norm, label_columns, squared_distance)
from metanb.core import Learner, Task, meta_grads, task_grads
from metanb.models import MLP, Conv4, NoConv, ResNet12, with_head
from metanb.pcgrad import pcgrad
from metanb.tasks import FewShot, Sinusoid
from metanb.train import evaluate, fit, load_learner

F64 = torch.float64
TRAINED = Siamese, MatchingNet, ProtoNet, InContext
METRIC = NearestNeighbour, Siamese, MatchingNet, ProtoNet


def patterns(classes=24, noise=0.15):
    "Classes of images of 4 × 4: a noisy pattern in the upper half, strong noise below."
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(classes, 1, 1, 4, 4, generator=generator) + noise * torch.randn(classes, 8, 1, 4, 4, generator=generator)
    images[..., 2:, :] = 2 * torch.randn(classes, 8, 1, 2, 4, generator=generator)
    return images


def sampler(ways=5, shots=1, queries=3, **more): return FewShot(patterns(), ways=ways, shots=shots, queries=queries, **more)


def tasks(T=3, dtype=F64, **shape): return sampler(**shape).sample(T, seed=1).to(dtype)


def first(batch): return Task(*(t[0] for t in batch))


def net(outputs=5, seed=0):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh())
    return with_head(body, 12, outputs)


def learner_of(make, model=None, dtype=F64, **options):
    model = net() if model is None else model
    if make is not InContext: options = dict(layer="body", **options)
    return make(model, loss=F.cross_entropy, **options).to(dtype)


@pytest.mark.parametrize("make", TRAINED)
@pytest.mark.parametrize("shots", [1, 3])
def test_a_batch_chunks_a_loop_and_backward_agree(make, shots):
    learner, batch = learner_of(make), tasks(shots=shots)
    grads, losses = meta_grads(learner, batch)
    for chunk in (1, 2): assert_close(meta_grads(learner, batch, chunk=chunk), (grads, losses))
    for i in range(3):
        learner.zero_grad()
        loss = learner(Task(*(t[i] for t in batch)))
        loss.backward()
        assert_close(loss.detach(), losses[i])
        for n, p in learner.named_parameters(): assert_close(p.grad, grads[n][i])


@pytest.mark.parametrize("make", TRAINED)
def test_gradients_are_those_of_finite_differences(make):
    learner, task = learner_of(make), first(tasks(shots=2))
    loss = lambda *weights: torch.func.functional_call(learner, dict(zip(names, weights)), (task,))
    names, weights = zip(*((n, p.detach().clone().requires_grad_()) for n, p in learner.named_parameters()))
    assert torch.autograd.gradcheck(loss, weights, fast_mode=True)


@pytest.mark.parametrize("make, ways, steps, rate", [
    (Siamese, 5, 120, 1e-2), (MatchingNet, 5, 60, 1e-2), (ProtoNet, 5, 60, 1e-2), (InContext, 2, 150, 3e-3)])
def test_losses_fall_and_unseen_classes_are_recognised(make, ways, steps, rate):
    learner = learner_of(make, net(ways), torch.float32, **(dict(width=32, depth=2) if make is InContext else {}))
    unseen = sampler(ways=ways, classes=range(16, 24))
    before = evaluate(learner, unseen, tasks=60).mean[-1]
    opt = torch.optim.Adam(learner.parameters(), rate)
    history = fit(learner, sampler(ways=ways, classes=range(16)), steps=steps, tasks=4, opt=opt, progress=False)
    assert sum(history["loss"][-10:]) < 0.85 * sum(history["loss"][:10])
    after = evaluate(learner, unseen, tasks=60)
    assert after.steps == 0 and after.metric == "accuracy" and after.mean[-1] > before + 0.15


@pytest.mark.parametrize("make", (*METRIC, InContext))
def test_predict_returns_one_set_of_outputs_whatever_the_steps(make):
    learner, task = learner_of(make), first(tasks(shots=2))
    out = learner.predict(task.x, task.y, task.xq)
    assert out.shape == (1, 15, 5) and out.dtype == F64
    assert torch.equal(learner.predict(task.x, task.y, task.xq, steps=10), out)
    each = vmap(lambda t: learner.predict(*t[:3]))(tasks(shots=2))
    assert_close(each[0], out)


@pytest.mark.parametrize("make", METRIC)
@pytest.mark.parametrize("shots", [1, 2])
def test_metric_learners_treat_examples_and_labels_alike(make, shots):
    learner, task = learner_of(make), first(tasks(shots=shots))
    out = learner.predict(*task[:3])[0]
    order, names = torch.randperm(5 * shots), torch.tensor([2, 0, 4, 1, 3])
    assert_close(learner.predict(task.x[order], task.y[order], task.xq)[0], out)
    assert_close(learner.predict(task.x, names[task.y], task.xq)[0][:, names], out)
    assert_close(learner.predict(task.x, task.y, task.xq[[4, 0]])[0], out[[4, 0]])  # no BatchNorm: queries don't see each other


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_in_context_ignores_the_order_of_the_support_set_and_answers_queries_one_by_one(kind):
    if kind == "regression":
        learner, task = InContext(MLP(1, 16, 1, std=None), width=16).double(), first(Sinusoid(shots=6, queries=8, dtype=F64).sample(1))
    else: learner, task = learner_of(InContext, width=16), first(tasks(shots=2))
    out, support, queries = learner.predict(*task[:3])[0], torch.randperm(len(task.x)), torch.randperm(len(task.xq))
    assert out.shape == (len(task.xq), 1 if kind == "regression" else 5)
    assert_close(learner.predict(task.x[support], task.y[support], task.xq)[0], out)
    assert_close(learner.predict(task.x, task.y, task.xq[queries])[0], out[queries])
    assert_close(learner.predict(task.x, task.y, task.xq[:1])[0], out[:1])
    other = learner.predict(task.x, task.y.flip(0), task.xq)[0]
    assert not torch.allclose(other, out)  # and it does read the targets


def test_in_context_learns_regression():
    torch.manual_seed(0)
    learner = InContext(MLP(1, 32, 1, std=None), width=32, depth=2)
    curves = Sinusoid(amplitude=(1.0, 1.0), shots=10, queries=10)
    untrained = evaluate(learner, curves, tasks=50).mean[-1]
    history = fit(learner, curves, steps=150, tasks=16, opt=torch.optim.Adam(learner.parameters(), 3e-3), progress=False)
    assert sum(history["loss"][-10:]) < 0.7 * sum(history["loss"][:10])
    assert evaluate(learner, curves, tasks=50).mean[-1] < 0.7 * untrained


def test_prototypes_of_one_shot_are_nearest_neighbours_and_a_linear_classifier():
    model, task = net(), first(tasks())
    proto = learner_of(ProtoNet, model)
    assert_close(proto.predict(*task[:3]), learner_of(NearestNeighbour, model).predict(*task[:3]))
    task = first(tasks(shots=3))
    z, zq = proto.embed(task.x, task.xq)
    c = torch.stack([z[task.y == k].mean(0) for k in range(5)])
    assert_close(proto.predict(*task[:3])[0].log_softmax(-1), (zq @ (2 * c).T - (c**2).sum(-1)).log_softmax(-1))


def test_classes_may_have_unequal_numbers_of_examples():
    task = first(tasks(shots=3))
    keep = torch.tensor([0, 1, 2, 3, 6, 7, 9, 12, 14])
    x, y = task.x[keep], task.y[keep]
    proto = learner_of(ProtoNet)
    z, zq = proto.embed(x, task.xq)
    c = torch.stack([z[y == k].mean(0) for k in range(5)])
    assert_close(proto.predict(x, y, task.xq)[0], -torch.cdist(zq, c) ** 2)
    attention = learner_of(MatchingNet).predict(x, y, task.xq)[0].exp()
    assert_close(attention.sum(-1), torch.ones(15, dtype=F64))


@pytest.mark.parametrize("make", [Siamese, MatchingNet, ProtoNet])
def test_one_learner_trains_and_tests_on_different_numbers_of_ways(make):
    learner = learner_of(make, dtype=torch.float32)
    fit(learner, sampler(ways=20, queries=2), steps=3, tasks=2, progress=False)
    for ways in (2, 5, 24): assert evaluate(learner, sampler(ways=ways), tasks=4).values.shape == (4, 1)
    assert learner.predict(*first(tasks(ways=24, dtype=torch.float32))[:3]).shape == (1, 72, 24)


def test_siamese_pairs_don_t_depend_on_which_is_which():
    learner, task = learner_of(Siamese), first(tasks())
    z, zq = learner.embed(task.x, task.xq)
    assert_close(learner.log_odds(z, zq), learner.log_odds(zq, z).T)
    assert_close(learner.log_odds(z, z).diagonal(), learner.join.bias.expand(5))  # no distance: only the bias speaks


def test_siamese_loss_is_finite_when_no_pair_matches():
    task = first(tasks())
    loss = learner_of(Siamese)(Task(task.x, task.y, task.xq, torch.full_like(task.yq, 7)))
    assert loss.isfinite()


@pytest.mark.parametrize("make", (*METRIC, InContext))
def test_the_model_is_copied_and_state_survives_saving_pickling_and_copying(make, tmp_path):
    model = net()
    before = {n: p.clone() for n, p in model.named_parameters()}
    learner, batch = learner_of(make, model, torch.float32), sampler()
    if make is not NearestNeighbour: fit(learner, batch, steps=3, tasks=2, checkpoint=tmp_path / "c.pt", progress=False)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    task = first(tasks(dtype=torch.float32))
    out, fresh = learner.predict(*task[:3]), learner_of(make, net(seed=5), torch.float32)
    assert not torch.allclose(fresh.predict(*task[:3]), out)
    fresh.load_state_dict(learner.state_dict())
    for other in (fresh, copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))): assert torch.equal(other.predict(*task[:3]), out)
    if make is not NearestNeighbour:
        assert torch.equal(load_learner(learner_of(make, net(seed=6), torch.float32), tmp_path / "c.pt").predict(*task[:3]), out)


@pytest.mark.parametrize("make", TRAINED)
def test_they_go_with_another_way_to_combine(make):
    learner = learner_of(make, dtype=torch.float32)
    history = fit(learner, sampler(), steps=40, tasks=4, combine=pcgrad, opt=torch.optim.Adam(learner.parameters(), 1e-2), progress=False)
    assert sum(history["loss"][-5:]) < sum(history["loss"][:5])


@pytest.mark.parametrize("build", [
    lambda: Conv4(5, filters=6), NoConv, lambda: ResNet12(5, 1, (4, 4, 6, 8)), lambda: Conv4(5, filters=4, stride=1, size=28)],
    ids=["Conv4", "NoConv", "ResNet12", "Conv4 with pooling"])
@pytest.mark.parametrize("make", (Siamese, ProtoNet, InContext))
def test_the_packages_networks_serve_as_they_are(make, build):
    learner = learner_of(make, build(), torch.float32)
    batch = FewShot(torch.rand(6, 3, 1, 28, 28), ways=5, shots=1, queries=2).sample(2)
    grads, losses = meta_grads(learner, batch)
    assert losses.isfinite().all() and all(g.isfinite().all() for g in grads.values())
    assert_close(meta_grads(learner, batch, chunk=1)[1], losses)


def test_batchnorm_sees_support_and_query_together_or_stored_averages():
    body = lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8))
    task = first(tasks(dtype=torch.float32))
    torch.manual_seed(0)
    model = body()
    model[2].running_mean.fill_(0.3)
    batch, running = ProtoNet(model), ProtoNet(model, norm="running")
    z, zq = batch.embed(task.x, task.xq)
    both = model[:2](torch.cat([task.x, task.xq]))
    assert_close(torch.cat([z, zq]), (both - both.mean(0)) / (both.var(0, unbiased=False) + 1e-5).sqrt())
    alone = lambda learner: learner.train().predict(task.x, task.y, task.xq[:1])[0]
    assert_close(alone(running), running.predict(*task[:3])[0, :1])
    assert not torch.allclose(alone(batch), batch.predict(*task[:3])[0, :1])
    assert evaluate(batch, sampler(), tasks=2).norm == "batch" and evaluate(running, sampler(), tasks=2).norm == "running"
    with pytest.raises(ValueError, match="norm='instance'"): ProtoNet(model, norm="instance")


def test_nearest_neighbour_is_a_loop_over_examples():
    batch = tasks(T=2, shots=4)
    for task in (Task(*t) for t in zip(*batch)):
        x, xq = task.x.flatten(1), task.xq.flatten(1)
        closest = torch.tensor([min(range(len(x)), key=lambda i: ((x[i] - q) ** 2).sum().item()) for q in xq])
        assert torch.equal(NearestNeighbour().predict(*task[:3])[0].argmax(-1), task.y[closest])
        cosine = torch.tensor([max(range(len(x)), key=lambda i: (x[i] @ q / x[i].norm() / q.norm()).item()) for q in xq])
        assert torch.equal(NearestNeighbour(distance="cosine").predict(*task[:3])[0].argmax(-1), task.y[cosine])


def test_nearest_neighbour_has_nothing_to_train_and_can_be_evaluated():
    for learner in (NearestNeighbour(), NearestNeighbour(net(), "body")):
        assert not [p for p in learner.parameters() if p.requires_grad]
        assert len(fit(learner, sampler(), steps=4)) == 0
        assert evaluate(learner, sampler(), tasks=20).values.shape == (20, 1)
    assert evaluate(NearestNeighbour().double(), sampler(), tasks=2).values.dtype == F64


def test_label_columns_under_vmap_are_those_of_a_loop():
    y = torch.tensor([[[0, 1, 2], [2, 1, 0]], [[1, 0, 2], [0, 2, 1]]])
    expected = F.one_hot(y)
    assert torch.equal(label_columns(y[0, 0]), expected[0, 0])
    assert torch.equal(vmap(label_columns)(y[0]), expected[0])
    assert torch.equal(vmap(vmap(label_columns))(y), expected)
    assert torch.equal(vmap(label_columns, in_dims=1)(y[0].T), expected[0])
    assert torch.equal(label_columns(y[0, 0].to(torch.int32)), expected[0, 0])


def test_squared_distances_are_those_of_cdist():
    a, b = torch.randn(5, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    assert_close(squared_distance(a, b), torch.cdist(a, b) ** 2)


def test_an_embedding_of_zeros_gives_finite_gradients():
    task = first(tasks(T=1))
    for make in (Siamese, MatchingNet, ProtoNet):
        learner = learner_of(make)
        for p in learner.model.parameters(): nn.init.zeros_(p)
        grads, losses = meta_grads(learner, Task(*(t[None] for t in task)))
        assert losses.isfinite().all() and all(g.isfinite().all() for g in grads.values()), make
    sharp, far = MatchingNet(nn.Identity(), scale=1e4), torch.tensor([[1.0], [-1.0]])
    assert sharp(Task(far, torch.tensor([0, 1]), far, torch.tensor([1, 0]))).isfinite()  # certain and wrong: large, not infinite


@pytest.mark.parametrize("call, error, words", [
    (lambda: ProtoNet("net"), TypeError, "model: expected a torch.nn.Module"),
    (lambda: ProtoNet(net(), "trunk"), ValueError, "layer='trunk'.*body, head"),
    (lambda: ProtoNet(nn.Conv2d(1, 2, 3)), ValueError, r"model: .*end it with nn.Flatten\(\)"),
    (lambda: ProtoNet(net(), norm="group"), ValueError, "norm='group'"),
    (lambda: MatchingNet(net(), scale=0.0), ValueError, "scale=0.0"),
    (lambda: NearestNeighbour(distance="manhattan"), ValueError, "distance='manhattan'.*'cosine'"),
    (lambda: Siamese(nn.Sequential(nn.Conv2d(1, 2, 4), nn.Flatten())), ValueError, "give features=D"),
    (lambda: Siamese(nn.Flatten()), ValueError, "give features=D"),
    (lambda: Siamese(net(), features=0), ValueError, "features=0"),
    (lambda: Siamese(net(), features=3), ValueError, "features=3: the model makes vectors of [0-9]+; give features="),
    (lambda: MatchingNet(net(), scale="10"), TypeError, "scale='10': give a number"),
    (lambda: Pretrained(net(), classes=0), ValueError, "classes=0: give a whole number of at least 1"),
    (lambda: Pretrained(net(), classes=2.5), TypeError, "classes=2.5: give a whole number"),
    (lambda: FromScratch(net(), lr="x"), TypeError, "lr='x': give a number"),
    (lambda: InContext(net(), width=10, heads=4), ValueError, "heads=4"),
    (lambda: InContext(net(), depth=0), ValueError, "depth=0"),
    (lambda: InContext(nn.Linear(3, 2)), TypeError, "a body and a last nn.Linear"),
    (lambda: InContext(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))), TypeError, "got BatchNorm1d"),
    (lambda: Pretrained(nn.Linear(3, 2), classes=4), TypeError, "a body and a last nn.Linear"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_bad_arguments_are_named_with_what_would_do(call, error, words):
    x = torch.rand(5, 1, 4, 4)
    with pytest.raises(error, match=words): call().predict(x, torch.arange(5), x)


@pytest.mark.parametrize("make", METRIC)
@pytest.mark.parametrize("y, error, words", [
    (torch.rand(5), TypeError, "y: got torch.float32.*integer labels"),
    (torch.tensor([0, 1, 2, 4, 4]), ValueError, "y: .*no support example with label 3"),
    (torch.tensor([0, -1, 2, 3, 4]), ValueError, "y: support labels are 0, 1"),
], ids=["floats", "a gap", "negative"])
def test_labels_that_can_t_be_compared_are_refused(make, y, error, words):
    x, learner = torch.rand(5, 1, 4, 4), learner_of(make, dtype=torch.float32)
    with pytest.raises(error, match=words): learner.predict(x, y, x)
    with pytest.raises(error, match=words): vmap(learner.predict)(x[None], y[None], x[None])


def test_in_context_refuses_targets_that_don_t_fit_its_outputs():
    x, learner = torch.rand(6, 1, 4, 4), learner_of(InContext, dtype=torch.float32)
    with pytest.raises(ValueError, match="6 ways, but the model has 5 outputs"): learner.predict(x, torch.arange(6), x)
    with pytest.raises(ValueError, match=r"y: targets have shape \(6, 1\), expected \[6, 5\]"): learner.predict(x, torch.rand(6, 1), x)
    assert learner.predict(x[:3], torch.arange(3), x).shape == (1, 6, 5)  # fewer ways than outputs will do


def test_a_subclass_says_only_how_to_answer():
    class Mean(EmbeddingLearner):
        def answer(self, z, y, zq): return zq @ z.mT
    learner = Mean(net(), "body").double()
    grads, losses = meta_grads(learner, tasks())
    assert isinstance(learner, Learner) and losses.shape == (3,)
    with pytest.raises(NotImplementedError): EmbeddingLearner(net()).double().predict(*first(tasks())[:3])


def test_from_scratch_and_pretrained_keep_their_places():
    assert not [p for p in FromScratch(net()).parameters() if p.requires_grad]
    learner = Pretrained(net(), lr=0.1, loss=F.cross_entropy, classes=24)
    opt = torch.optim.Adam([p for p in learner.parameters() if p.requires_grad], 1e-2)
    history = fit(learner, sampler(labels="global"), steps=60, tasks=4, opt=opt, progress=False)
    assert history["loss"][-1] < history["loss"][0]
    result = evaluate(learner, sampler(), tasks=30, steps=5)
    assert abs(result.mean[0] - 0.2) < 1e-6 and result.mean[-1] > 0.3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", TRAINED)
def test_the_gpu_agrees_with_the_cpu(make):
    learner, batch = learner_of(make), tasks(shots=2)
    grads, losses = meta_grads(learner, batch)
    gpu_grads, gpu_losses = meta_grads(copy.deepcopy(learner).cuda(), batch.to("cuda"))
    assert_close(gpu_losses.cpu(), losses)
    for n, g in grads.items(): assert_close(gpu_grads[n].cpu(), g)
    assert evaluate(NearestNeighbour().cuda(), sampler(), tasks=3).values.is_cuda


def test_frozen_statistics_are_averages_over_tasks_and_leave_the_learner_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 5))
    learner, batch = learner_of(InContext, model), tasks(T=4)
    before, task = learner.predict(*first(batch)[:3]), first(batch)
    frozen = freeze_norm(learner, batch)
    hidden = learner.model[:2](torch.cat([batch.x, batch.xq], 1).flatten(0, 1)).unflatten(0, (4, -1))
    assert_close(frozen.model[2].running_mean, hidden.mean((0, 1)))
    assert_close(frozen.model[2].running_var, hidden.var(1).mean(0))
    assert_close(frozen.train().predict(task.x, task.y, task.xq[:1])[0], frozen.predict(*task[:3])[0, :1])
    assert torch.equal(learner.predict(*task[:3]), before)
    assert evaluate(frozen, sampler(), tasks=2).norm == "running" and evaluate(learner, sampler(), tasks=2).norm == "batch"
    assert_close(freeze_norm(frozen, batch).predict(*task[:3]), frozen.predict(*task[:3]))  # once more changes nothing
    assert meta_grads(frozen, batch)[1].isfinite().all()


def test_traced_gradients_are_the_plain_ones_whatever_the_ways():
    learner = learner_of(ProtoNet)
    params = {n: p.detach() for n, p in learner.named_parameters() if p.requires_grad}
    traced = torch.compile(lambda batch: task_grads(learner, params, batch), backend="aot_eager")  # all of compiling but the code generation
    for ways in (5, 3): assert_close(traced(tasks(ways=ways)), meta_grads(learner, tasks(ways=ways)))
