"What `13_pcgrad` promises for any gradients, device and run; the closed forms are in the notebook."
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from metanb.core import MetaLearner, SGD, mean, meta_grads
from metanb.pcgrad import Grouped, WatchConflict, conflict, conflicting, flatten, meta_pcgrad, orders, pcgrad
from metanb.tasks import Sinusoid
from metanb.train import derive, fit

SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "gain": (), "none": (0, 2)}


def gradients(T, seed=0, dtype=torch.float64, device="cpu", zero=()):
    "Random gradients of very different lengths; the tasks in `zero` have none."
    generator = torch.Generator().manual_seed(seed)
    length = 10 ** torch.linspace(-3, 3, T, dtype=torch.float64)[torch.randperm(T, generator=generator)]
    length[list(zero)] = 0
    grads = {n: torch.randn(T, *s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}
    return {n: (g * length.view(T, *[1] * (g.ndim - 1))).to(device, dtype) for n, g in grads.items()}


def algorithm(rows, order):
    "Algorithm 1 of Yu et al. (2020) as printed there, one vector at a time."
    projected = rows.clone()
    for i in range(len(rows)):
        for j in order[i].tolist():
            if j == i: continue
            inner = (projected[i] * rows[j]).sum()
            if inner < 0: projected[i] = projected[i] - inner / (rows[j] * rows[j]).sum() * rows[j]
    return projected


def row(grads): return torch.cat([g.flatten() for g in grads.values()])


@settings(max_examples=60, deadline=None)
@given(T=st.integers(1, 12), seed=st.integers(0, 10**6), zero=st.sets(st.integers(0, 11), max_size=3))
def test_equals_the_papers_algorithm(T, seed, zero):
    grads = gradients(T, seed, zero=[z for z in zero if z < T])
    rows = flatten(grads)
    ours, theirs = row(pcgrad(grads, seed=seed)), algorithm(rows, orders(T, seed)).mean(0)
    assert ours.isfinite().all()
    assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * rows.abs().max().item())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_two_tasks_end_without_conflict(seed):
    grads = gradients(2, seed)
    g = flatten(grads)
    projected = algorithm(g, orders(2, seed))
    assert_close(row(pcgrad(grads, seed)), projected.mean(0))
    size = g.norm(dim=1)
    if g[0] @ g[1] < 0:  # each projected gradient is orthogonal to the other's original, so the first order of its loss does not rise
        for i, j in ((0, 1), (1, 0)): assert abs(projected[i] @ g[j]) < 1e-12 * size.prod()
        assert projected[0] @ projected[1] > -1e-12 * size.prod()
        assert (row(pcgrad(grads, seed)) @ g.T > -1e-12 * size.prod()).all()
    else: assert all(torch.equal(a, b) for a, b in zip(pcgrad(grads).values(), mean(grads).values()))


@pytest.mark.parametrize("combine", [pcgrad, partial(meta_pcgrad, groups=3)])
def test_no_conflict_is_the_mean_bit_for_bit(combine):
    grads = {n: g.abs() for n, g in gradients(6, dtype=torch.float32).items()}
    if combine is pcgrad: assert all(torch.equal(a, b) for a, b in zip(combine(grads).values(), mean(grads).values()))
    else: assert_close(combine(grads), mean(grads))


def test_order_of_parameters_does_not_matter():
    grads = gradients(7)
    there, back = pcgrad(grads, seed=4), pcgrad(dict(reversed(grads.items())), seed=4)
    assert list(back) == list(reversed(there))
    for n in grads: assert_close(there[n], back[n])
    assert_close(conflict(grads), conflict(dict(reversed(grads.items()))))


def test_lengths_of_others_do_not_matter_to_a_projection():
    grads = gradients(2, seed=next(s for s in range(99) if conflict(gradients(2, s))[0, 1] < 0))
    factor = torch.tensor([1.0, 1000.0], dtype=torch.float64)
    scaled = {n: g * factor.view(2, *[1] * (g.ndim - 1)) for n, g in grads.items()}
    assert_close(conflict(grads), conflict(scaled))
    assert_close(algorithm(flatten(grads), orders(2, 0))[0], algorithm(flatten(scaled), orders(2, 0))[0])
    assert_close(row(pcgrad(scaled)), algorithm(flatten(scaled), orders(2, 0)).mean(0))


def test_shapes_dtypes_and_zero_gradients():
    for dtype in (torch.float32, torch.float64):
        grads = gradients(6, dtype=dtype, zero=(0, 3))
        for out in (pcgrad(grads), meta_pcgrad(grads, groups=3)):
            assert {n: (g.shape, g.dtype) for n, g in out.items()} == {n: (torch.Size(s), dtype) for n, s in SHAPES.items()}
            assert all(g.isfinite().all() for g in out.values())
    cos = conflict(grads)
    assert (cos[0] == 0).all() and (cos[:, 3] == 0).all() and cos[1, 1] == pytest.approx(1)
    assert all((g == 0).all() for g in pcgrad({n: torch.zeros_like(g) for n, g in grads.items()}).values())
    tiny = {n: g * 1e-30 for n, g in gradients(4, dtype=torch.float32).items()}  # squares underflow
    assert all(g.isfinite().all() for g in pcgrad(tiny).values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    grads = gradients(4)
    grads["a.bias"][2, 1] = bad
    assert not row(pcgrad(grads)).isfinite().all()
    assert not conflict(grads)[2].isfinite().all()


def test_conflicting_counts_pairs_once():
    cos = torch.tensor([[1, -0.1, 0.0], [-0.1, 1, -0.5], [0.0, -0.5, 1]])
    assert_close(conflicting(cos), torch.tensor(2 / 3))
    assert conflicting(torch.stack([cos, cos.abs()])).tolist() == pytest.approx([2 / 3, 0])
    assert conflicting(torch.ones(1, 1)) == 0


def test_random_numbers():
    grads = gradients(8)
    state = torch.get_rng_state()
    assert torch.equal(row(pcgrad(grads, seed=1)), row(pcgrad(grads, seed=1)))
    assert torch.equal(torch.get_rng_state(), state)  # a given seed leaves torch's generator alone
    torch.manual_seed(0)
    first, second = row(pcgrad(grads)), row(pcgrad(grads))
    assert not torch.equal(first, second)  # None: new orders at every call
    torch.manual_seed(0)
    assert torch.equal(row(pcgrad(grads)), first)


def test_errors_name_the_argument():
    grads = gradients(6)
    for groups in (0, 4, 7, -1, 2.0, True, "two"):
        with pytest.raises(ValueError, match=r"groups=.*6 tasks divide into 1, 2, 3, 6 equal groups"): meta_pcgrad(grads, groups=groups)
    for wrong in ({}, {"w": torch.ones(())}, {"w": torch.ones(0, 3)}, {"a": torch.ones(2, 3), "b": torch.ones(3)}):
        with pytest.raises(ValueError, match="grads: every tensor needs the same leading dimension T"): pcgrad(wrong)
    for wrong in ((grads, torch.ones(6)), [torch.ones(3, 2)], {"w": [1.0, 2.0]}):
        with pytest.raises(TypeError, match="grads: expected"): conflict(wrong)
    with pytest.raises(TypeError, match="seed=1.5: give a whole number"): pcgrad(grads, seed=1.5)
    with pytest.raises(ValueError, match="every=0"): WatchConflict(every=0)
    for wrong in (1.5, "2", None):
        with pytest.raises(TypeError, match=f"every={wrong!r}: give a whole number"): WatchConflict(every=wrong)


# ---- through fit

def learner(seed=0, drop=0.0):
    torch.manual_seed(seed)
    return MetaLearner(nn.Sequential(nn.Linear(1, 20), nn.ReLU(), nn.Dropout(drop), nn.Linear(20, 1)), rule=SGD(0.1))


def run(combine, steps=10, drop=0.0, **kw):
    model = learner(drop=drop)
    fit(model, Sinusoid(shots=5), steps=steps, tasks=6, opt=torch.optim.Adam(model.parameters(), 1e-2), seed=3, combine=combine, progress=False, **kw)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("combine", [pcgrad, partial(meta_pcgrad, groups=3)], ids=["pcgrad", "meta_pcgrad"])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_a_run_repeats_and_resumes_exactly(combine, drop, tmp_path):
    whole = run(combine, drop=drop)
    torch.manual_seed(99)  # what happened before fit does not matter
    assert torch.equal(run(combine, drop=drop), whole)
    assert not torch.equal(run(mean, drop=drop), whole)
    run(combine, 4, drop, checkpoint=tmp_path / "run.pt")
    assert torch.equal(run(combine, drop=drop, checkpoint=tmp_path / "run.pt"), whole)


def test_watching_changes_nothing_and_keeps_the_cosines(tmp_path):
    watch = WatchConflict(pcgrad, every=4)
    assert torch.equal(run(watch), run(pcgrad))
    assert torch.stack(watch.cosines).shape == (3, 6, 6)
    run(WatchConflict(pcgrad), 4, checkpoint=tmp_path / "run.pt")
    assert torch.equal(run(pcgrad, checkpoint=tmp_path / "run.pt"), run(pcgrad))  # begun watched, continued unwatched


def test_the_cosines_are_those_of_the_tasks_own_gradients():
    tasks = Sinusoid(shots=5).sample(5)
    grads, _ = meta_grads(learner(), tasks)
    alone = [torch.cat([g.flatten() for g in meta_grads(learner(), type(tasks)(*(t[i : i + 1] for t in tasks)))[0].values()]) for i in range(5)]
    want = torch.stack([torch.stack([torch.cosine_similarity(a, b, dim=0) for b in alone]) for a in alone])
    assert_close(conflict(grads), want, rtol=1e-4, atol=1e-5)


def test_groups_of_tasks_are_those_that_meta_pcgrad_takes_apart():
    parts = [Sinusoid(shots=5, amplitude=(a, a)) for a in (1.0, 2.0, 4.0)]
    tasks = Grouped(parts).sample(6, seed=1, step=3)
    largest = torch.cat([tasks.y, tasks.yq], 1).abs().amax((1, 2)).tolist()
    for i, a in enumerate((1, 1, 2, 2, 4, 4)): assert largest[i] <= a
    grads, _ = meta_grads(learner(), tasks)
    mine = {n: g.view(3, 2, *g.shape[1:]).mean(1) for n, g in grads.items()}
    for n, g in meta_pcgrad(grads, groups=len(parts), seed=0).items(): assert_close(g, pcgrad(mine, seed=0)[n])
    for again, first in zip(Grouped(parts).to("cpu").sample(6, seed=1, step=3), tasks): assert torch.equal(again, first)
    for start in (1, 2):
        with pytest.raises(ValueError, match=f"start={start}: a batch of 3 groups starts at a multiple of 3"): Grouped(parts).sample(3, start=start)
    for T, sizes in ((1, [1, 0, 0]), (2, [1, 1, 0]), (4, [2, 1, 1]), (9, [3, 3, 3])):  # any number of tasks, shared out as evenly as can be
        batch = Grouped(parts).sample(T, seed=1)
        each = [part.sample(max(1, n), seed=derive(1, k)).x[:n] for k, (part, n) in enumerate(zip(parts, sizes))]
        assert torch.equal(batch.x, torch.cat(each))
    for wrong in ([], parts[0], None):
        with pytest.raises(ValueError, match="parts: give a list of one sampler or more"): Grouped(wrong)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_same_orders_and_result_on_the_gpu():
    cpu, gpu = gradients(16), gradients(16, device="cuda")
    assert torch.equal(orders(16, 5), orders(16, 5, "cuda").cpu())
    for combine in (partial(pcgrad, seed=5), partial(meta_pcgrad, groups=4, seed=5)):
        for a, b in zip(combine(cpu).values(), combine(gpu).values(), strict=True): assert b.is_cuda; assert_close(a, b.cpu())
