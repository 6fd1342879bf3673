"""Kills, full disks, damaged files and long runs: nothing loses a run, and what is broken is named.

Processes are forked from one that has imported everything, so that each costs hundredths of a second and many kills are cheap.
"""
import errno
import gc
import hashlib
import io
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from metanb import cli, data
from metanb.dimaml import Normal, load_init, save_init
from metanb.lstm import LSTMRule, load_rule, save_rule
from metanb.maml import MAML
from metanb.models import MLP
from metanb.tasks import Sinusoid
from metanb.train import SEAL, fit, load_checkpoint, load_learner, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

# Reads {"do": code} or {"wait": pid} from standard input, one a line; a child runs `code` and exits with `status`.
NURSERY = """
import json, os, signal, sys, traceback
import torch._dynamo  # which training would import in each child anew
import metanb.cli, metanb.data, metanb.dimaml, metanb.lstm, metanb.maml, metanb.models, metanb.tasks, metanb.train, metanb.unroll
torch.set_num_threads(1)

def live(code, folder):
    os.chdir(folder)
    for name, number in (("out", 1), ("err", 2)): os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    scope = {"status": 0}
    try: exec(code, scope)
    except BaseException: traceback.print_exc(); scope["status"] = 70
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command has returned; what is interrupted from here on is not it
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(scope["status"])

print("ready", flush=True)
for line in sys.stdin:
    ask = json.loads(line)
    if "do" in ask:
        answer = os.fork()
        if not answer: live(ask["do"], ask["folder"])
    else: answer = os.waitstatus_to_exitcode(os.waitpid(ask["wait"], 0)[1])
    print(answer, flush=True)
"""


class Nursery:
    "A process from which others are forked; a child's output is in the files `out` and `err` of its folder."
    def __init__(self):
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, **words):
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, code, folder): return self.ask(do=code, folder=str(folder))  # its process number

    def wait(self, pid): return self.ask(wait=pid)  # its exit status, or minus the signal that ended it

    def run(self, code, folder):
        status = self.wait(self.start(code, folder))
        return status, (folder / "out").read_text(), (folder / "err").read_text()


@pytest.fixture(scope="session")
def nursery():
    made = Nursery()
    yield made
    made.process.stdin.close()
    made.process.wait(60)


# ---- kills

# A checkpoint after every step, each written in four pieces: about half of a run is inside a write.
OFTEN = """
import builtins, functools, time, metanb.data, metanb.train
class Pieces:
    def __init__(self, file): self.file = file
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def write(self, part):
        part = memoryview(part).cast("B")
        for piece in range(0, len(part), size := len(part) // 4 + 1):
            self.file.write(part[piece:piece + size])
            self.file.flush()
            time.sleep(0.0005)
def opened(path, mode="r", **options):
    file = builtins.open(path, mode, **options)
    return Pieces(file) if "w" in mode else file
metanb.data.open = opened
metanb.train.fit = functools.partial(metanb.train.fit, checkpoint_every=1)
"""

# The command line, as `metanb train …`; `words` may ask to continue.
COMMAND = OFTEN + """
import metanb.cli
words = ["--resume"] if {resume} else ["--tasks", "sinusoid", "--scale", "smoke", "--steps", "60"]
status = metanb.cli.main(["train", *words, "--checkpoint", "run", "--device", "cpu", "--no-progress"])
"""

# The function, with all that a run can carry along: dropout, a scheduler, other first weights each time.
FUNCTION = OFTEN + """
import torch
from torch import nn
from metanb.core import SGD, MetaLearner
from metanb.tasks import Sinusoid
torch.manual_seed(time.time_ns() % 1000 if {resume} else 0)  # the checkpoint's weights count, not these
learner = MetaLearner(nn.Sequential(nn.Linear(1, 20), nn.ReLU(), nn.Dropout(0.1), nn.Linear(20, 1)), rule=SGD(0.01))
opt = torch.optim.Adam(learner.parameters(), 1e-2)
metanb.train.fit(learner, Sinusoid(), 60, 5, opt, scheduler=torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=60),
                 validation=Sinusoid(), validate_every=7, validation_tasks=5, checkpoint="run")
"""

# Segments of a long inner run, whose weights go on from one meta-step to the next, also those that the inner loop leaves alone.
TRUNCATED = OFTEN + """
import torch
from metanb.core import MetaLearner
from metanb.meta_sgd import WeightRates
from metanb.models import MLP
from metanb.tasks import Sinusoid
from metanb.unroll import Along, fit_truncated
torch.manual_seed(time.time_ns() % 1000 if {resume} else 0)
learner = MetaLearner(MLP(1, 8, 1, std=None), rule=WeightRates, adapt="head", steps=6, objective=Along())
fit_truncated(learner, Sinusoid(), 40, unroll=2, tasks=3, validation=Sinusoid(), validate_every=7, validation_tasks=5, checkpoint="run",
              checkpoint_every=1)
"""


def ending(folder):
    "All that a run ends with, but for its times."
    out = {}
    for name in ("run", "run.best"):
        state = load_checkpoint(folder / name)
        state["history"].pop("seconds")
        out[name] = {k: state[k] for k in ("step", "learner", "opt", "scheduler", "history", "metric", "others")}
    return out


def same(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
    return a == b


@forking
@pytest.mark.slow
@pytest.mark.parametrize("program, kills", [("COMMAND", 30), ("FUNCTION", 8), ("TRUNCATED", 8)])
def test_kills_at_random_moments_change_nothing(nursery, tmp_path, program, kills):
    "Runs that are killed over and over, also while they write a checkpoint, and resumed each time, end as the undisturbed one."
    code, rng = globals()[program], random.Random(program)
    (tmp_path / "whole").mkdir()
    start = time.monotonic()
    assert nursery.run(code.format(resume=False), tmp_path / "whole")[0] == 0, (tmp_path / "whole" / "err").read_text()
    whole, took = ending(tmp_path / "whole"), time.monotonic() - start
    done = inside = 0
    for chain in range(kills):
        folder, step, status = tmp_path / str(chain), 0, -9
        folder.mkdir()
        while status:
            resume, drafts = (folder / "run").exists(), len(list(folder.glob(".run*.part")))
            pid = nursery.start(code.format(resume=resume), folder)
            if done < kills:
                time.sleep(rng.random() * took / 4)
                os.kill(pid, signal.SIGKILL)
            status = nursery.wait(pid)
            assert status in (0, -9), (folder / "err").read_text()
            done, inside = done + (status == -9), inside + (len(list(folder.glob(".run*.part"))) > drafts)
            if status and (folder / "run").exists():
                assert step <= (step := load_checkpoint(folder / "run")["step"]) <= whole["run"]["step"]
                if (folder / "run.best").exists(): load_checkpoint(folder / "run.best")
        assert same(ending(folder), whole), f"chain {chain}, after {done} kills"
        if done == kills: break
    assert done == kills and inside >= kills // 10, f"{inside} of {done} kills were inside a write"
    print(f"{done} kills, {inside} inside a write, {chain + 1} runs of {took:.2f} s")


# ---- Ctrl-C

# Says when the words are being read, since an interrupt before that is not ours.
POLITE = COMMAND.replace("words =", "open('begun', 'w').close()\nwords =")


@forking
@pytest.mark.slow
def test_ctrl_c_at_random_moments_saves_and_exits(nursery, tmp_path):
    "The exit status is 130, one line says what was saved, a second Ctrl-C within the save leaves a whole file, and nothing changes."
    rng, path, begun = random.Random(1), tmp_path / "run", tmp_path / "begun"
    (tmp_path / "whole").mkdir()
    assert nursery.run(COMMAND.format(resume=False), tmp_path / "whole")[0] == 0
    status, interrupted = 130, 0
    while status:
        pid = nursery.start(POLITE.format(resume=path.exists()), tmp_path)
        while not begun.exists(): time.sleep(0.001)
        begun.unlink()
        if interrupted < 8:
            time.sleep(0.02 + rng.random() * 0.15)
            for _ in range(rng.randint(1, 2)):
                os.kill(pid, signal.SIGINT)
                time.sleep(0.002)
        status, said = nursery.wait(pid), (tmp_path / "err").read_text()
        assert not list(tmp_path.glob(".*.part")) and "Traceback" not in said
        if not status: break
        interrupted += 1
        assert status == 130 and said.startswith("metanb: ") and said.count("\n") == 1, said
        if "saved run at step" in said: assert load_checkpoint(path)["step"] == int(said.split()[-1])
    assert interrupted >= 4 and same(ending(tmp_path), ending(tmp_path / "whole"))


# ---- a full disk

@forking
def test_a_disk_that_fills_up_in_training_costs_nothing(nursery, tmp_path):
    "`metanb train` ends with one line and leaves its last checkpoint; with room again it continues to where it would have come."
    (tmp_path / "whole").mkdir()
    assert nursery.run(COMMAND.format(resume=False), tmp_path / "whole")[0] == 0
    room = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))\n"
    status, _, said = nursery.run(room.format((tmp_path / "whole" / "run").stat().st_size - 1500) + COMMAND.format(resume=False), tmp_path)
    assert status == 1 and said.count("\n") == 1 and "run could not be written (File too large); the one from before is still there" in said
    step = load_checkpoint(tmp_path / "run")["step"]
    assert 0 < step < 60 and not list(tmp_path.glob(".*.part"))
    assert nursery.run(COMMAND.format(resume=True), tmp_path)[0] == 0 and same(ending(tmp_path), ending(tmp_path / "whole"))


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("what", ["checkpoint", "cache", "results"])
def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path, monkeypatch, what, call):
    "Whichever call the disk refuses: the file from before is whole, no draft is left, and the error names the file."
    path = tmp_path / "results.json" if what == "results" else tmp_path / "file"
    classes = data.ImageClasses(torch.zeros(2, 1, 1, 4, 4, dtype=torch.uint8), ["a", "b"])
    write = dict(checkpoint=lambda: save_checkpoint(path, {"step": 1}), cache=lambda: data.write_cache(path, classes),
                 results=lambda: data.replace_file(path, [b"{}"]))[what]
    write()
    before = path.read_bytes()
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if call == "write":
        class Full(io.BytesIO): write = full
        def opened(name, mode):
            Path(name).touch()
            return Full()
        monkeypatch.setattr(data, "open", opened, raising=False)
    else: monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError) as e: write()
    monkeypatch.undo()
    assert e.value.errno == errno.ENOSPC and str(path) in str(e.value), str(e.value)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


# ---- damage

def damaged(whole):
    "A file with one bit flipped, in each of its first and last bytes in turn and in 500 between them; or cut short at any of 100 lengths."
    rng, size = random.Random(0), len(whole)
    for i in {*range(min(size, 60)), *range(max(0, size - 160), size), *rng.sample(range(size), min(500, size))}:
        yield whole[:i] + bytes([whole[i] ^ 1 << rng.randrange(8)]) + whole[i + 1:]
    for n in rng.sample(range(size), min(100, size)): yield whole[:n]


def small(): return MLP(1, 2, 1, std=None)


def checkpoint(path):
    learner = MAML(small())
    fit(learner, Sinusoid(3, 3), 2, 2, torch.optim.SGD(learner.parameters(), 0.1), checkpoint=path)
    return lambda: load_learner(learner, path)


def rule(path):
    save_rule(LSTMRule(1, 1), path)
    return lambda: load_rule(path)


def distribution(path):
    save_init(path, Normal(small()))
    return lambda: load_init(path, small())


def results(path):
    numbers = dict(tasks="sinusoid", method="maml", title="MAML", seed=0, mean=[1.0, 0.5], ci95=[0.1, 0.05])
    row = numbers | dict(meta_steps=3, train_seconds=1.0, ms_per_step=1.0, adapt_ms=1.0)
    about = dict(made="now", versions={}, device="CPU", processes=1, scale="smoke", seeds=[0], seconds=1.0, problems=dict(sinusoid={}))
    path.write_text(json.dumps(data.seal(dict(format=cli.FORMAT, rows=[row], **about)), indent=1))
    return lambda: cli.load_results(path)


def record(path):
    kept = path.with_suffix("")
    kept.touch()
    cli.write_record(kept, cli.Trial("maml", "sinusoid"), dict(lr=0.1))
    return lambda: cli.read_record(kept)


FILES = {checkpoint: "kept", rule: "kept", distribution: "kept", results: "kept.json", record: "kept.json"}


@pytest.mark.parametrize("make, name", FILES.items(), ids=[make.__name__ for make in FILES])
def test_damage_anywhere_in_a_file_is_named(tmp_path, make, name):
    path = tmp_path / name
    load = make(path)
    load()
    whole = path.read_bytes()
    for bad in damaged(whole):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=f"{name} is (damaged|no results file)"): load()
    path.write_bytes(whole)
    load()


class Bomb:
    "Makes a folder when it is read."
    def __init__(self, folder): self.folder = folder
    def __reduce__(self): return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("load", [load_checkpoint, lambda p: load_learner(MAML(small()), p), load_rule, lambda p: load_init(p, small()),
                                  lambda p: fit(MAML(small()), Sinusoid(3, 3), 1, 2, checkpoint=p)],
                         ids=["load_checkpoint", "load_learner", "load_rule", "load_init", "fit"])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, load, sealed):
    "Also when its checksum is right; the message is ours, names the file, and doesn't tell how to let the code run."
    path, stream = tmp_path / "evil.file", io.BytesIO()
    torch.save(dict(step=0, learner={"w": Bomb(tmp_path / "boom")}), stream)
    content = stream.getvalue()
    path.write_bytes(content + (SEAL + hashlib.sha256(content).hexdigest().encode() if sealed else b""))
    with pytest.raises(ValueError) as e: load(path)
    said = str(e.value)
    assert "evil.file" in said and ("refused" if sealed else "damaged") in said and "weights_only" not in said and "\n" not in said
    assert not (tmp_path / "boom").exists()


def cifar(root):
    home = root / "cifar-10-batches-py"
    home.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    content = dict(data=pixels, labels=list(range(10)))
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"): (home / name).write_bytes(pickle.dumps(content, protocol=2))
    (home / "batches.meta").write_bytes(pickle.dumps(dict(label_names=[f"k{i}" for i in range(10)]), protocol=2))
    return "cifar10", [home / "batches.meta"]


def celeba(root):
    home = root / "celeba"
    (home / "img_align_celeba").mkdir(parents=True)
    for n in (1, 2): Image.new("RGB", (8, 8)).save(home / "img_align_celeba" / f"{n:06}.jpg")
    (home / "list_attr_celeba.txt").write_text("2\nSmiling Young\n000001.jpg  1 -1\n000002.jpg -1 -1\n")
    (home / "identity_CelebA.txt").write_text("000001.jpg 5\n000002.jpg 7\n")
    return "celeba", [home / "list_attr_celeba.txt", home / "identity_CelebA.txt"]


def mnist(root):
    home = root / "MNIST" / "raw"
    home.mkdir(parents=True)
    for part in ("train", "t10k"):
        (home / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 10, *range(10)]))
        (home / f"{part}-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 10, 0, 0, 0, 1, 0, 0, 0, 2, *range(20)]))
    return "mnist", [home / "train-labels-idx1-ubyte", home / "train-images-idx3-ubyte"]


@pytest.mark.filterwarnings("ignore:this copy")
@pytest.mark.parametrize("make", [cifar, celeba, mnist])
def test_damaged_data_files_are_named_or_read(tmp_path, make):
    "What a flipped bit leaves readable may pass, for these files have no checksum; all else is a `DataError` that names a place."
    name, files = make(tmp_path)
    load = lambda: data.load(name, size=4, root=tmp_path, cache=False, progress=False)
    load()
    for path in files:
        whole, named = path.read_bytes(), 0
        for bad in damaged(whole):
            path.write_bytes(bad)
            try: load()
            except data.DataError as e: named += str(path.parent) in str(e)
        path.write_bytes(whole)
        assert named > len(whole) // 2
    load()


# ---- several processes at once

@forking
def test_many_processes_build_one_cache(nursery, tmp_path):
    "Twelve processes that need the same data at once get the same, and leave one file."
    for c in "ab":
        (tmp_path / "zoo" / c).mkdir(parents=True)
        for i in range(20): Image.new("RGB", (64, 64), (i, ord(c), 0)).save(tmp_path / "zoo" / c / f"{i}.png")
    code = """
import hashlib, os, time, metanb.data
os.environ["METANB_CACHE"] = "../cache"
while not os.path.exists("../go"): time.sleep(0.001)
print(hashlib.sha256(metanb.data.folder("../zoo", size=32, progress=False).images.numpy().tobytes()).hexdigest())
"""
    homes = [tmp_path / str(i) for i in range(12)]
    for home in homes: home.mkdir()
    children = [nursery.start(code, home) for home in homes]
    (tmp_path / "go").touch()
    assert [nursery.wait(child) for child in children] == [0] * 12, (homes[0] / "err").read_text()
    said, = {(home / "out").read_text() for home in homes}
    file, = (tmp_path / "cache").iterdir()
    assert said.strip() == hashlib.sha256(data.read_cache(file)[0].images.numpy().tobytes()).hexdigest()


# ---- a long run

def resident():
    "Bytes of memory that this process holds."
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def alive():
    "How many tensors there are, and how many objects."
    gc.collect()
    every = gc.get_objects()
    return sum(issubclass(type(o), torch.Tensor) for o in every), len(every)  # isinstance would wake deprecated objects


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
def test_ten_thousand_steps_hold_memory_flat(tmp_path):
    "From step 2,000 to 10,000, with validation and checkpoints: no tensor, hardly an object, and at most the history's few bytes a step."
    seen = {}
    def look(run):
        if run.step in (2000, 10_000): seen[run.step] = *alive(), resident()
    history = fit(MAML(nn.Linear(1, 1)), Sinusoid(5, 5), 10_000, 2, validation=Sinusoid(5, 5), validate_every=500, validation_tasks=5,
                  checkpoint=tmp_path / "run", checkpoint_every=500, compile=False, callbacks=[look])
    tensors, objects, size = (late - early for early, late in zip(seen[2000], seen[10_000]))
    assert len(history) == 10_000 and all(map(math.isfinite, history["loss"]))
    assert tensors <= 0 and objects < 200 and size < 8e6, f"{tensors} tensors, {objects} objects and {size / 1e6:.1f} MB more"
    print(f"{tensors} tensors, {objects} objects and {size / 1e6:.1f} MB more")
