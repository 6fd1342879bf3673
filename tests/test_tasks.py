"Properties of the samplers over arbitrary requests."
import copy, math, os, pickle, shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.func import vmap

from metanb.core import Task
from metanb.tasks import FewShot, Quadratic, Sinusoid, Stream, choose, hashed_bits, minibatches, normal, task_keys, uniform

relaxed = settings(deadline=None, max_examples=40)

CLASSES, IMAGES = 24, 12
numbered = torch.arange(CLASSES * IMAGES, dtype=torch.float32).view(CLASSES, IMAGES, 1, 1, 1)  # image j of class c holds 12c + j
pixels = torch.arange(CLASSES * IMAGES * 3 * 16).remainder(251).to(torch.uint8).view(CLASSES, IMAGES, 3, 4, 4)
families = torch.arange(CLASSES) // 6
known = SimpleNamespace(images=pixels, families=families, family_names=list("abcd"), counts=8 + torch.arange(CLASSES) % 5)
rows = torch.arange(150.0)[:, None]

SAMPLERS = dict(
    sinusoid=Sinusoid(), grid=Sinusoid(shots=5, queries=100, frequency=(0.8, 1.2), grid=True), double=Sinusoid(dtype=torch.float64),
    quadratic=Quadratic(), tall=Quadratic(dim=3, rows=7),
    few_shot=FewShot(pixels, 5, 1, 3), rotated=FewShot(pixels, 5, 2, 3, rotations=True),
    subset=FewShot(pixels, 3, 1, 2, classes=[5, 1, 7, 20]), family=FewShot(known, 5, 1, 3, families=True, rotations=True),
    stream=Stream(rows, -rows, steps=7, batch=50, queries=9), query_stream=Stream(rows, steps=3, batch=20, queries=5, query_batches=4),
)
every = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
counts = st.integers(0, 2**31)


def same(a: Task, b: Task):
    for s, t in zip(a, b): assert s.dtype == t.dtype and torch.equal(s, t)


def part(tasks: Task, index) -> Task: return Task(*(t[index] for t in tasks))


@every
@relaxed
@given(T=st.integers(1, 9), seed=st.integers(-(2**70), 2**70), step=counts, start=counts, data=st.data())
def test_a_task_depends_on_seed_step_and_number_alone(sampler, T, seed, step, start, data):
    i = data.draw(st.integers(0, T - 1))
    batch = sampler.sample(T, seed, step, start)
    same(part(batch, i), part(sampler.sample(1, seed, step, start + i), 0))
    same(batch, sampler.sample(T, seed, step, start))


@every
def test_other_numbers_other_tasks(sampler):
    base = sampler.sample(20, seed=1, step=2, start=3)
    for seed, step, start in ((2, 2, 3), (1, 3, 3), (1, 2, 23), (2, 1, 3)):
        assert not torch.equal(base.x, sampler.sample(20, seed, step, start).x)
    assert len({tuple(x.flatten().tolist()) for x in base.x}) == 20


@every
def test_torch_generator_is_neither_read_nor_changed(sampler):
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), sampler.sample(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    same(first, sampler.sample(3))


@every
def test_mapped_traced_copied_and_pickled(sampler):
    keys = task_keys(6, seed=5)
    expected = sampler.draw(keys)
    same(vmap(sampler.draw)(keys), expected)
    same(sampler.draw(keys.view(2, 3)), Task(*(t.unflatten(0, (2, 3)) for t in expected)))
    torch.compiler.reset()  # of variants of one function torch compiles eight in a process
    same(torch.compile(sampler.draw, backend="eager", fullgraph=True)(keys), expected)
    for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler)), sampler.to("cpu"), replace(sampler)):
        same(twin.draw(keys), expected)


@every
def test_tasks_are_drawn_where_their_keys_are(sampler):
    drawn = sampler.to("meta").draw(task_keys(6, seed=5).to("meta"))  # a device without numbers, which refuses tensors of the CPU as a GPU does
    assert all(t.is_meta and t.shape == s.shape and t.dtype == s.dtype for t, s in zip(drawn, sampler.sample(6, seed=5)))


@every
def test_samplers_do_not_change(sampler):
    with pytest.raises(AttributeError): sampler.queries = 3
    before = repr(sampler)
    sampler.sample(2)
    assert repr(sampler) == before and len(before) < 300


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["sinusoid", "rotated"])
def test_compiled_draws_are_the_same(name):
    keys = task_keys(6, seed=5)
    expected, compiled = SAMPLERS[name].draw(keys), torch.compile(SAMPLERS[name].draw, fullgraph=True)(keys)
    for a, b in zip(expected, compiled): torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if name == "sinusoid" else 0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every
def test_the_same_on_a_gpu(sampler):
    here, there = sampler.sample(40, seed=3), sampler.to("cuda").sample(40, seed=3)
    for a, b in zip(here, there):
        assert b.is_cuda
        torch.testing.assert_close(b.cpu(), a, rtol=2e-6, atol=2e-6)  # sin may differ in the last place
    torch.testing.assert_close(there.x.cpu(), here.x, rtol=0, atol=0)  # draws and choices may not


@relaxed
@given(ways=st.integers(1, CLASSES), shots=st.integers(1, IMAGES - 1), data=st.data())
def test_no_shared_image_and_no_repeated_class(ways, shots, data):
    queries = data.draw(st.integers(1, IMAGES - shots))
    chosen = data.draw(st.none() | st.lists(st.integers(0, CLASSES - 1), min_size=ways, unique=True))
    tasks = FewShot(numbered, ways, shots, queries, classes=chosen).sample(4, seed=data.draw(counts))
    assert tasks.x.shape == (4, ways * shots, 1, 1, 1) and tasks.xq.shape == (4, ways * queries, 1, 1, 1)
    for x, y, xq, yq in zip(*tasks):
        support, query = x.flatten().long().tolist(), xq.flatten().long().tolist()
        assert len(set(support + query)) == ways * (shots + queries)
        label_of = {}
        for number, label in zip(support + query, y.tolist() + yq.tolist()): assert label_of.setdefault(number // IMAGES, label) == label
        assert sorted(label_of.values()) == list(range(ways))
        assert chosen is None or set(label_of) <= set(chosen)


@relaxed
@given(st.integers(1, 5), st.booleans(), st.just(True) | st.lists(st.integers(0, 3), min_size=1, unique=True), counts)
def test_families_and_padding(ways, turned, which, seed):
    classes, turns, images = FewShot(known, ways, 2, 6, turned, families=which).indices(task_keys(12, seed))
    assert (families[classes] == families[classes[:, :1]]).all()
    assert which is True or set(families[classes].flatten().tolist()) <= set(which)
    assert (images < known.counts[classes][..., None]).all()
    for c, t in zip(classes.tolist(), turns.tolist()): assert len(set(zip(c, t))) == ways


def test_rotated_classes_are_as_many_as_they_should_be():
    sampler = FewShot(pixels, ways=4 * CLASSES, shots=1, queries=1, rotations=True)
    classes, turns, _ = sampler.indices(task_keys(3))
    assert (classes + CLASSES * turns).sort(-1).values.tolist() == [list(range(4 * CLASSES))] * 3
    with pytest.raises(ValueError, match="ways=97: there are 96 classes"): replace(sampler, ways=97)


@relaxed
@given(n=st.integers(1, 60), steps=st.integers(1, 30), data=st.data())
def test_epochs_never_repeat_a_row(n, steps, data):
    batch = data.draw(st.integers(1, n))
    for stream in minibatches(task_keys(3, data.draw(counts)), n, steps, batch):
        assert stream.shape == (steps, batch) and stream.min() >= 0 and stream.max() < n
        for epoch in stream.split(n // batch): assert len(epoch.unique()) == epoch.numel()


def test_a_stream_sees_every_row_and_no_held_one():
    sampler = SAMPLERS["stream"]
    tasks = replace(sampler, steps=60).sample(2)
    held = set(sampler.held_rows.tolist())
    assert set(tasks.x.flatten().long().tolist()) == set(range(150)) - held and set(tasks.xq.flatten().long().tolist()) <= held
    assert torch.equal(tasks.y, -tasks.x)


@relaxed
@given(n=st.integers(1, 40), data=st.data())
def test_choose_among_the_allowed(n, data):
    allowed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any)))
    k = data.draw(st.integers(1, int(allowed.sum())))
    for chosen in choose(task_keys(5, data.draw(counts)), n, k, allowed=allowed).tolist():
        assert len(set(chosen)) == k and allowed[chosen].all()


def test_every_class_is_equally_likely_in_every_place():
    classes, turns, images = FewShot(pixels, 4, 1, 2, rotations=True).indices(task_keys(20_000, seed=2))
    for values, n in ((classes, CLASSES), (turns, 4), (images.flatten(1), IMAGES)):
        for place in values.T:
            expected = len(place) / n
            statistic = ((torch.bincount(place, minlength=n) - expected) ** 2 / expected).sum()
            assert abs(statistic - (n - 1)) < 5 * math.sqrt(2 * (n - 1))


def test_bits_and_numbers():
    keys = task_keys(2000, seed=9)
    bits = hashed_bits(keys, 64)
    assert bits.unique().numel() == bits.numel()
    ones = torch.stack([(bits >> b) & 1 for b in range(64)]).double().mean((1, 2))
    assert (ones - 0.5).abs().max() < 5 * 0.5 / math.sqrt(bits.numel())
    for dtype in (torch.float32, torch.float64):
        u, g = uniform(keys, 500, dtype), normal(keys, 500, dtype)
        assert u.dtype == g.dtype == dtype and 0 <= u.min() and u.max() < 1 and g.isfinite().all()
        assert abs(g.mean()) < 5e-3 and abs(g.std() - 1) < 5e-3 and abs((g**4).mean() - 3) < 0.05
        assert abs(torch.corrcoef(g[:, :2].T)[0, 1]) < 5 / math.sqrt(len(g))


@pytest.mark.parametrize("make, error, message", [
    (lambda: Sinusoid(shots=-1), ValueError, r"shots=-1: give a whole number of at least 1"),
    (lambda: Sinusoid(queries=True), TypeError, r"queries=True: give a whole number"),
    (lambda: Sinusoid(amplitude=(5.0, 0.1)), ValueError, r"amplitude=\(5.0, 0.1\): low must be at most high"),
    (lambda: Sinusoid(frequency=(0, math.nan)), ValueError, r"frequency=\(0, nan\)"),
    (lambda: Sinusoid(phase="ab"), TypeError, r"phase='ab': give two numbers \(low, high\)"),
    (lambda: Sinusoid(dtype=torch.int64), TypeError, r"dtype=torch.int64: use torch.float32 or torch.float64"),
    (lambda: Sinusoid().sample(0), ValueError, r"T=0"),
    (lambda: Sinusoid().sample(2, start=-3), ValueError, r"start=-3: give a whole number of at least 0"),
    (lambda: Sinusoid().sample("5"), TypeError, r"T='5': give a whole number"),
    (lambda: Sinusoid().sample(2, seed=1.5), TypeError, r"seed=1.5: give a whole number"),
    (lambda: FewShot(pixels, queries=2).sample(2, seed="0"), TypeError, r"seed='0': give a whole number"),
    (lambda: Sinusoid(phase="12"), TypeError, r"phase='12': give two numbers \(low, high\)"),
    (lambda: FewShot(known, queries=5, families=[]), ValueError, r"families=\[\]: give a family's name or number"),
    (lambda: Quadratic(dim=0), ValueError, r"dim=0"),
    (lambda: FewShot(pixels, ways=25), ValueError, r"ways=25: there are 24 classes; use at most 24 ways"),
    (lambda: FewShot(pixels, shots=4, queries=9), ValueError, r"shots \+ queries = 13: class 0 has 12 images"),
    (lambda: FewShot(known, shots=1, queries=8), ValueError, r"shots \+ queries = 9: class 0 has 8 images"),
    (lambda: FewShot(pixels, queries=2, classes=[1, 24]), ValueError, r"classes: number 24 is not among the 24"),
    (lambda: FewShot(known, ways=7, queries=5, families=True), ValueError, r"ways=7: the largest family has 6 classes"),
    (lambda: FewShot(known, ways=5, queries=5, families="e"), ValueError, r"'e' has 0 classes"),
    (lambda: FewShot(pixels[:, :, :, :3], queries=2, rotations=True), ValueError, r"images are 3 × 4; give square ones"),
    (lambda: FewShot(pixels[0]), ValueError, r"got shape \(12, 3, 4, 4\); give \[class, image, C, H, W\]"),
    (lambda: FewShot(pixels.numpy()), TypeError, r"images: got ndarray; give a tensor"),
    (lambda: FewShot(pixels.bool()), TypeError, r"images: got torch.bool; give uint8 or floats"),
    (lambda: Stream(rows, batch=1000, queries=5), ValueError, r"batch=1000: there are 135 rows to train on"),
    (lambda: Stream(rows, rows[:9]), ValueError, r"y: 9 targets for 150 inputs"),
    (lambda: Stream(rows, batch=5, queries=5, query_batches=0), ValueError, r"query_batches=0"),
    (lambda: Stream(rows, batch=5, queries=5, held=1.0), ValueError, r"held=1.0: give a share between 0 and 1"),
])
def test_impossible_requests_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message): make()
