"What `34_bench` promises: the same gradient from everyone who is timed, a row for everyone who is not, a record that is whole or refused."
import importlib.util
import json
import math
import os
import time
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from metanb import bench as module
from metanb.bench import (IMPLEMENTATIONS, PROBLEMS, Bench, Entry, Jax, Loop, Problem, Row, bench, difference, draw, load_bench, network,
                          sampler, twin)

SINE = replace(PROBLEMS["sinusoid"], tasks=3, steps=2, width=6, dtype="float64")
LETTERS = replace(PROBLEMS["omniglot"], tasks=2, steps=1, ways=3, shots=2, queries=2, width=3, dtype="float64")
EVERYWHERE = {"metanb-eager", "metanb-loop", "loop", "higher", "torchopt", "jax"}


class Wrong(Loop):
    "Its gradient is a thousandth too long, which no one would see in a training curve."
    def gradients(self, weights, tasks): return {n: 1.001 * g for n, g in super().gradients(weights, tasks).items()}
    def train(self, after): raise AssertionError("it must not be timed")


class Crash(Loop):
    "Ends its process in the first meta-step."
    def train(self, after): os._exit(7)


class Late(Loop):
    "Fails in a later meta-step than the first."
    def step(self, number):
        if number: raise RuntimeError("out of ideas\nand a second line")
        super().step(number)


def available(name):
    needs = IMPLEMENTATIONS[name].needs
    if needs and importlib.util.find_spec(needs) is None: pytest.skip(f"{needs} is not installed")
    return IMPLEMENTATIONS[name].make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("problem", [SINE, LETTERS], ids=["sinusoid", "omniglot"])
@pytest.mark.parametrize("name", sorted(EVERYWHERE))
def test_same_gradient(name, problem):
    assert difference(available(name), problem) < 1e-11


@pytest.mark.parametrize("name", ["metanb-im2col", "metanb-channels-last"])
def test_same_gradient_in_other_forms_of_convolution(name):
    assert difference(IMPLEMENTATIONS[name].make, LETTERS) < 1e-11


@pytest.mark.parametrize("name", ["metanb", "metanb-compiled", "metanb-compiled-loop", "metanb-graphs"])
def test_same_gradient_where_it_is_compiled(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # what is compiled, without the minute that it takes
    assert difference(IMPLEMENTATIONS[name].make, SINE) < 1e-11


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["jax", "loop", "metanb-eager"])
def test_meta_steps_learn(name):
    make = available(name)
    problem = replace(SINE, tasks=6, width=12, rate=0.02)
    implementation, count = make(problem), []
    weights = {n: p.detach().clone() for n, p in network(problem).named_parameters()}
    if name == "jax": now = lambda: {n: torch.tensor(w.tolist()) for n, w in implementation.state[0].items()}
    elif name == "metanb-eager": now = lambda: {n.removeprefix("init.model."): p for n, p in implementation.learner.named_parameters()}
    else: now = lambda: dict(implementation.model.named_parameters())
    implementation.train(lambda: count.append(1) or len(count) == 1)
    for n, w in weights.items(): assert (now()[n].detach() - w).abs().max() <= 0.02 * (1 + 1e-6), "Adam's first step is at most its rate"
    assert any((now()[n].detach() - w).abs().max() > 0.019 for n, w in weights.items())
    implementation.train(lambda: count.append(1) or len(count) == 60)
    assert loss_at(problem, {n: p.detach() for n, p in now().items()}) < 0.9 * loss_at(problem, weights)


def loss_at(problem, weights):
    loop = Loop(replace(problem, tasks=60))
    loop.model.load_state_dict(weights)
    tasks = draw(loop.problem, sampler(problem), step=10**6)
    return sum(loop.task_loss(*t).item() for t in zip(*tasks)) / 60


def test_twin_leaves_the_model_alone():
    model = network(LETTERS)
    before = [p.clone() for p in model.parameters()]
    x = draw(LETTERS, sampler(LETTERS), step=0).x[0]
    want = model(x)
    other = twin(model, (2 * p for p in model.parameters()))
    assert_close([p.detach() for p in other.parameters()], [2 * p for p in before])
    assert_close(model(x), want, rtol=0, atol=0)
    assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())


def test_jax_draws_what_the_problem_asks_for():
    pytest.importorskip("jax")
    import jax
    images = jax.numpy.arange(6 * 5 * 1 * 2 * 2).reshape(6, 5, 1, 2, 2)  # every pixel names its class and image
    problem = replace(LETTERS, tasks=40)
    Jax(SINE)  # double precision from here on
    task = module.jax_tasks(problem, images, jax.random.key(0))
    ours = draw(problem, sampler(problem), step=0)
    assert [t.shape[:2] for t in task] == [tuple(t.shape[:2]) for t in ours]
    assert_close(torch.tensor(task.y.tolist()), ours.y), assert_close(torch.tensor(task.yq.tolist()), ours.yq)
    number = lambda x: (torch.tensor(x.tolist())[:, :, 0, 0, 0] * 255 / 4).round().long()
    for x, xq in zip(number(task.x), number(task.xq)):
        assert len(set([*x.tolist(), *xq.tolist()])) == len(x) + len(xq), "no image twice in a task"
        classes = (x // 5).view(3, 2)
        assert (classes[:, 0] == classes[:, 1]).all() and len(classes[:, 0].unique()) == 3
        assert (xq.view(3, 2) // 5 == classes).all()


@pytest.fixture
def table(monkeypatch):
    "The table of implementations, with some that go wrong; what is added goes again."
    more = dict(wrong=Entry(Wrong, ""), crash=Entry(Crash, ""), late=Entry(Late, ""), missing=Entry(Loop, "", needs="no_such_package"))
    monkeypatch.setattr(module, "IMPLEMENTATIONS", {**IMPLEMENTATIONS, **more})
    monkeypatch.setitem(module.PROBLEMS, "sinusoid", replace(PROBLEMS["sinusoid"], tasks=2, width=4))


def test_who_disagrees_is_refused_and_who_fails_has_a_row(table):
    result = bench("sinusoid", ["wrong", "crash", "late", "missing", "loop"], seconds=0.01, repeats=1, threads=1, progress=False)
    assert [r.implementation for r in result.rows] == ["wrong", "crash", "late", "missing", "loop"]
    assert [r.implementation for r in result.refused] == ["wrong"]
    wrong, crash, late, missing, loop = result.rows
    assert wrong.note.startswith("gradients disagree: by 0.001") and wrong.rounds == () and wrong.first is None
    assert wrong.difference == pytest.approx(1e-3)
    assert crash.note == "failed: its process ended with exit code 7" and crash.difference == 0
    assert late.note == "failed: RuntimeError: out of ideas" and late.first > 0 and late.rounds == ()
    assert missing.note == "not installed: pip install 'metanb[bench]'"
    assert loop.note == "" and len(loop.rounds) == 1 and loop.steps >= 1 and loop.memory > 0 and 0 < loop.ms < math.inf
    text, web = repr(result), result._repr_html_()
    for row in result.rows: assert row.implementation in text and row.implementation in web
    assert "gradients disagree" in text and "threads 1" in text


def sleeps(connection): time.sleep(60)


def test_a_process_that_hangs_or_has_ended_is_told():
    child = module.Child(1, 0.3, sleeps)
    with pytest.raises(module.Failed, match="no answer within 0.3 s"): child.answer()
    child.process.kill(), child.process.join()
    with pytest.raises(module.Failed, match="ended with exit code -9, perhaps for want of memory"): child.ask(1.0)
    child.close()


def test_vary_gives_the_sizes_asked_for(table):
    result = bench("sinusoid", "missing", vary="tasks", sizes=(3, 1, 7), threads=1)
    assert [r.problem.tasks for r in result.rows] == [3, 1, 7] and result.vary == "tasks"
    assert {replace(r.problem, tasks=1) for r in result.rows} == {replace(module.PROBLEMS["sinusoid"], tasks=1)}
    usual = bench(PROBLEMS, "missing", vary="width", threads=1)
    assert [(r.problem.name, r.problem.width) for r in usual.rows] == [(name, n) for name in PROBLEMS for n in module.SIZES["width"]]


def test_without_a_gpu_its_rows_are_not_run_yet():
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    result = bench("omniglot", device="cuda", threads=1)
    assert {r.implementation for r in result.rows} == set(IMPLEMENTATIONS)
    assert {r.note for r in result.rows} == {"not run yet: there is no CUDA device here"}
    assert not result.refused and "not run yet" in repr(result)


def test_slow_ones_are_left_out_unless_named():
    letters = PROBLEMS["omniglot"]
    left_out = {n for n, e in IMPLEMENTATIONS.items() if "left out" in module.absent(e, letters, asked=False)}
    assert left_out - {"jax"} == {"metanb-compiled", "metanb-compiled-loop"}  # jax where it is installed
    assert not any("left out" in module.absent(e, letters, asked=True) for e in IMPLEMENTATIONS.values())


ROWS = (Row(SINE, "loop", 0.0, 0.5, (20.0, 22.0, 21.0), 60, 2**20), Row(SINE, "metanb", 1e-16, 9.0, (2.0, 2.1, 4.0), 600, 2**21),
        Row(SINE, "odd", note="gradients disagree: by 0.3 of their length"), Row(LETTERS, "loop", note="failed: nothing"))


def test_record_comes_back_as_it_was(tmp_path):
    result = Bench(ROWS, dict(device="cpu", threads=1), "tasks")
    result.save(tmp_path / "a.json"), result.save(tmp_path / "b.json")
    back = load_bench(tmp_path / "a.json")
    assert back == result and repr(back) == repr(result)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    json.loads((tmp_path / "a.json").read_text())


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b.replace(b"20.0", b"10.0"), lambda b: b"\x80" + b,
                                    lambda b: b.replace(b'"sha256"', b'"sum"')], ids=["half", "empty", "changed", "bytes", "no sum"])
def test_damaged_record_is_named(tmp_path, damage):
    path = tmp_path / "bench.json"
    Bench(ROWS).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="bench.json is damaged"): load_bench(path)


def test_another_file_is_no_record(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="x.json is no result of a benchmark: its format is None"): load_bench(tmp_path / "x.json")


def test_table_has_the_ratio_to_the_loop():
    (first, rows), (second, others) = Bench(ROWS).tables()
    assert first.startswith("sinusoid: 3 tasks") and second.startswith("omniglot: 2 tasks, 3-way 2-shot")
    assert rows[2][:4] == ["metanb", "2.1", "2–4", "10"] and rows[3][1].startswith("gradients disagree")
    assert others[1][1] == "failed: nothing"


def test_pictures_show_what_was_timed():
    axes = Bench(ROWS[:3]).plot()
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["metanb", "loop"]
    grown = Bench(tuple(replace(r, problem=replace(SINE, tasks=T)) for T in (1, 10) for r in ROWS[:3]), vary="tasks").plot()
    assert [list(line.get_xdata()) for line in grown[0].get_lines()] == [[1, 10], [1, 10]] and grown[0].get_xscale() == "log"


@pytest.mark.parametrize("arguments, message", [
    (dict(problems="cartpole"), "problems='cartpole': use sinusoid, omniglot"),
    (dict(implementations="numpy"), "implementations='numpy': use metanb, "),
    (dict(vary="shots"), "vary='shots': use tasks, steps, ways, width, or None"),
    (dict(sizes=(1, 2)), "sizes=(1, 2): say of what, with vary="),
    (dict(vary="tasks", sizes=(0,)), "tasks=0: give a whole number of at least 1"),
    (dict(vary="ways"), "ways=2: sine curves have no classes; use omniglot"),
    (dict(seconds=0), "seconds=0: give a finite number, above zero"),
    (dict(limit=math.nan), "limit=nan: give a finite number"),
    (dict(repeats=0), "repeats=0: give a whole number of at least 1"),
    (dict(threads=0), "threads=0: give a whole number of at least 1"),
], ids=lambda value: " ".join(value) if isinstance(value, dict) else None)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError) as error: bench(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("change, message", [
    (dict(name="mnist"), "name='mnist'"), (dict(dtype="half"), "dtype='half'"), (dict(steps=-1), "steps=-1"), (dict(lr=-1.0), "lr=-1.0"),
    (dict(width=0), "width=0"), (dict(ways=5), "ways=5"),
], ids=lambda value: " ".join(value) if isinstance(value, dict) else None)
def test_bad_problems_are_named(change, message):
    with pytest.raises(ValueError) as error: Problem(**{**dict(name="sinusoid"), **change})
    assert message in str(error.value)
