"""What mistakes are told: a table of wrong calls of every public piece, each with the error it must get and words of its message.

The error names the argument and what was given or what would do, in a sentence or two. A right call stands beside each group.
"""
import contextlib
import hashlib
import importlib
import inspect
import io
import math
import os
import pickle
import pkgutil
import re
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import metanb
from metanb import cli, data
from metanb.baselines import FromScratch, InContext, MatchingNet, NearestNeighbour, Pretrained, ProtoNet, Siamese
from metanb.core import MetaLearner, SGD, Task, meta_grads, scale, set_norm
from metanb.dimaml import DIMAML, Mixture, Normal, Quantile, load_init, save_init, train_curve, transfer
from metanb.hierarchical import Bowl, HierarchicalRule, LogAlong, Rescaled, Teacher, Valley, ZooRun, fit_zoo, lengths
from metanb.imaml import IMAML, NewtonCG
from metanb.lstm import LSTMRule, LearnedOptimizer, RMSprop, load_rule, quadratic_run, save_rule, small_conv, tune
from metanb.maml import ANIL, BOIL, MAML, Adam, Reptile
from metanb.memorize import Generator, Waves, forgetting, hessian_penalty
from metanb.meta_sgd import LSLR, MADAM, LearnedAdam, MetaSGD, MultiStep, WeightRates
from metanb.models import MLP, Autoencoder, Conv4, NoConv, ResNet12, with_head
from metanb.mtl import MTL, HardTasks, ScaleShift
from metanb.pcgrad import WatchConflict, conflict, meta_pcgrad, pcgrad
from metanb.shaping import Flooded, Shaped, auc, emphasis, fit_shape, inverse_exponential, shaped_loss
from metanb.tasks import FewShot, Quadratic, Sinusoid, Stream
from metanb.train import SEAL, LogFile, evaluate, fit, load_checkpoint, load_learner, save_checkpoint
from metanb.unroll import (Along, Momentum, RandomStart, Recomputed, StreamLearner, Truncated, choose_segment, fit_truncated, loss_curves,
                           recompute)

NAN = math.nan
CLASSES = dict(loss=F.cross_entropy)


def net(*sizes): return MLP(*(sizes or (1, 6, 1)), std=None)


def classifier(ways=5): return with_head(nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.ReLU()), 6, ways)


def images(classes=8, n=6): return torch.rand(classes, n, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def few(**changes): return FewShot(**{**dict(images=images(), ways=5, shots=1, queries=2), **changes})


def families():
    "Eight classes of two families, five and three."
    return data.ImageClasses((255 * images()).byte(), list("abcdefgh"), torch.tensor([0] * 5 + [1] * 3), ["Latin", "Greek"])


def sines(T=2): return Sinusoid(shots=4, queries=3).sample(T)


def one(tasks): return Task(*(t[0] for t in tasks))


def changed(tasks, **change):
    "The tasks with some of their four tensors put through a function."
    return tasks._replace(**{n: f(getattr(tasks, n)) for n, f in change.items()})


def train(learner, sampler=None, steps=1, **options):
    return fit(learner, Sinusoid(shots=4, queries=3) if sampler is None else sampler, steps, **{**dict(tasks=2, progress=False), **options})


def segments(learner, **options):
    return fit_truncated(learner, Sinusoid(shots=4, queries=3), 1, **{**dict(unroll=2, tasks=2, progress=False), **options})


def stream(**changes): return Stream(torch.rand(40, 2), torch.rand(40, 1), **{**dict(steps=2, batch=4, queries=2), **changes})


def pair(n=5): return torch.rand(n, 1), torch.rand(n, 1)


def optimizer(params=None): return torch.optim.SGD(net().parameters() if params is None else params, 0.1)


def foreign_scheduler():
    "A scheduler of another optimizer than the one given to `fit`."
    learner = MAML(net())
    return train(learner, opt=optimizer(learner.parameters()), scheduler=torch.optim.lr_scheduler.StepLR(optimizer(), 1))


def plateau():
    learner = MAML(net())
    opt = optimizer(learner.parameters())
    return train(learner, opt=opt, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(opt))


def integer_net():
    model = net()
    model.table = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    return model


def without_gradients():
    model = net()
    model.head.weight.requires_grad_(False)
    return model


# Files as users find them, in the folder of the test.

def kept(path="run.pt", **options):
    "A sound checkpoint."
    train(MAML(net()), checkpoint=path, **options)
    return path


def cut_short():
    path = Path(kept())
    path.write_bytes(path.read_bytes()[:-200])
    return load_checkpoint(path)


def flipped():
    path = Path(kept())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return train(MAML(net()), checkpoint=path)


def of_torch():
    torch.save(net().state_dict(), "weights.pt")
    return load_learner(MAML(net()), "weights.pt")


def text_file():
    Path("notes.txt").write_text("not a checkpoint")
    return load_checkpoint("notes.txt")


class Trap:
    "An object whose unpickling makes a folder."
    def __reduce__(self): return os.mkdir, ("sprung",)


def trap():
    with open("trap.pt", "wb") as f: pickle.dump(Trap(), f)
    try: return load_checkpoint("trap.pt")
    finally: assert not Path("sprung").exists()


class Foreign(SGD):
    "A rule from outside the package."


def foreign_rule(**options):
    save_rule(Foreign(0.1), "rule.pt")
    return load_rule("rule.pt", **options)


def rule_called(name):
    save_checkpoint("rule.pt", dict(rule=name, settings={}, weights={}))
    return load_rule("rule.pt")


def saved(path, value):
    save_checkpoint(path, value)
    return path


def rule_file():
    save_rule(SGD(0.1), "rule.pt")
    return "rule.pt"


def sealed_trap():
    "A pickle that makes a folder, under a checksum that is right."
    stream = io.BytesIO()
    torch.save({"learner": Trap()}, stream)
    content = stream.getvalue()
    Path("trap.pt").write_bytes(content + SEAL + hashlib.sha256(content).hexdigest().encode())
    try: return load_checkpoint("trap.pt")
    finally: assert not Path("sprung").exists()


def sparse():
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([0])).sum().backward()
    LearnedOptimizer(table.parameters(), SGD(0.1)).step()


def stepped():
    model = net()
    model(torch.ones(1, 1)).sum().backward()
    optimizer = LearnedOptimizer(model.parameters(), SGD(0.1))
    optimizer.step()
    return optimizer


def grads(T=4): return {"w": torch.randn(T, 3), "b": torch.randn(T)}


def misspelt_scale(value):
    with patch.dict(os.environ, METANB_SCALE=value): return scale(1, 2, 3)


def command(*words):
    "Runs the command line; what it refuses is an error with its one line."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: status = cli.main(list(words))
        except SystemExit as stop: status = stop.code
    if status: raise cli.Refused(err.getvalue().removeprefix("metanb: error: ").strip())
    return out.getvalue()


V, T = ValueError, TypeError
R, D = cli.Refused, data.DataError

# {group: (a right call, [(name, wrong call, error, words of the message)])}
TABLE = {
    "learner": (lambda: MAML(net(), lr=0, steps=0, batch=1, adapt=["head.weight"]), [
        ("function-for-model", lambda: MAML(lambda x: x), T, ["model", "torch.nn.Module", "function"]),
        ("class-for-model", lambda: Reptile(nn.Linear), T, ["model", "torch.nn.Module", "type"]),
        ("integer-parameters", lambda: MAML(integer_net()), T, ["model", "floating point", "table (torch.int64)"]),
        ("complex-parameters", lambda: MAML(nn.Linear(1, 1, dtype=torch.cfloat)), T, ["model", "floating point", "complex64"]),
        ("no-parameters", lambda: MAML(nn.Flatten()), V, ["model", "no parameters"]),
        ("steps-negative", lambda: MAML(net(), steps=-1), V, ["steps=-1", "integer, zero or more"]),
        ("steps-fraction", lambda: MAML(net(), steps=1.5), V, ["steps=1.5", "integer, zero or more"]),
        ("steps-words", lambda: ANIL(net(), steps="5"), V, ["steps='5'", "integer"]),
        ("rate-negative", lambda: MAML(net(), lr=-0.01), V, ["lr=-0.01", "zero or more"]),
        ("rate-nan", lambda: MAML(net(), lr=NAN), V, ["lr=nan", "zero or more"]),
        ("rate-words", lambda: MAML(net(), lr="0.1"), T, ["lr", "str", "a number"]),
        ("rate-infinite", lambda: SGD(math.inf), V, ["lr=inf", "finite"]),
        ("rule-by-name", lambda: MAML(net(), rule="sgd"), T, ["rule='sgd'", "not its name"]),
        ("rule-that-is-none", lambda: MAML(net(), rule=nn.Linear(1, 1)), T, ["rule", "Linear", "SGD(0.01)"]),
        ("loss-by-name", lambda: MAML(net(), loss="mse"), T, ["loss='mse'", "not its name"]),
        ("loss-class", lambda: MAML(net(), loss=nn.MSELoss), T, ["loss", "MSELoss is a class", "instance"]),
        ("objective-class", lambda: MAML(net(), objective=Along), T, ["objective", "Along is a class", "instance"]),
        ("objective-function", lambda: MAML(net(), objective=torch.mean), T, ["objective", "at(steps)", "last"]),
        ("batch-zero", lambda: MAML(net(), batch=0), V, ["batch=0", "1 or more", "None for all"]),
        ("batch-words", lambda: MAML(net(), batch="5"), V, ["batch='5'", "whole number", "None for all"]),
        ("batch-fraction", lambda: MAML(net(), batch=1.5), V, ["batch=1.5", "whole number"]),
        ("adapt-unknown", lambda: MAML(net(), adapt="heads"), V, ["adapt='heads'", "head.weight"]),
        ("adapt-one-unknown", lambda: MAML(net(), adapt=["head", "tail"]), V, ["adapt='tail'", "head.weight"]),
        ("adapt-nothing", lambda: MAML(net(), adapt=[]), V, ["adapt=[]", "matches no parameter", "head.weight"]),
        ("body-of-one-layer", lambda: BOIL(nn.Linear(2, 1)), V, ["adapt='body'", "weight, bias"]),
        ("norm-unknown", lambda: MAML(Conv4(filters=2), norm="instance"), V, ["norm='instance'", "'batch'", "'running'"]),
        ("norm-of-a-model", lambda: set_norm(net(), "frozen"), V, ["norm='frozen'", "'batch'", "'running'"]),
        ("norm-without-averages", lambda: MAML(Conv4(filters=2), norm="running"), V, ["norm='running'", "track_running_stats=True"]),
        ("momentum-decay", lambda: Adam(beta1=1), V, ["beta1=1", "[0, 1)"]),
        ("momentum-share", lambda: Momentum(beta=1.5), V, ["beta=1.5", "[0, 1)"]),
        ("random-start-unknown", lambda: RandomStart(net(), std={"nope": 1.0}), V, ["std='nope'", "head.weight"]),
        ("momentum-rate", lambda: Momentum(lr=-1), V, ["lr=-1", "zero or more"]),
    ]),
    "batch-of-tasks": (lambda: meta_grads(MAML(net()), sines(), chunk=1), [
        ("no-leading-dimension", lambda: meta_grads(MAML(net()), one(sines())), V, ["tasks", "leading dimension T", "t[None]"]),
        ("no-leading-dimension-same-sizes", lambda: meta_grads(MAML(net()), one(Sinusoid(4, 4).sample(1))),
         V, ["tasks: x", "[T, N, ...]", "t[None]"]),
        ("no-leading-dimension-images", lambda: meta_grads(MAML(classifier(), **CLASSES), one(few().sample(1))),
         V, ["tasks", "T", "t[None]"]),
        ("list-of-tasks", lambda: meta_grads(MAML(net()), [one(sines()), one(sines())]), T, ["tasks", "four tensors", "list"]),
        ("sampler-for-tasks", lambda: meta_grads(MAML(net()), Sinusoid()), T, ["tasks", "four tensors", "Sinusoid"]),
        ("number-of-tasks-differs", lambda: meta_grads(MAML(net()), changed(sines(3), yq=lambda t: t[:2])),
         V, ["tasks", "same leading dimension T"]),
        ("a-target-missing", lambda: meta_grads(MAML(net()), changed(sines(), yq=lambda t: t[:, :1])),
         V, ["tasks: xq", "3", "yq", "pairs"]),
        ("targets-flat", lambda: meta_grads(MAML(net()), changed(sines(), y=lambda t: t[..., 0], yq=lambda t: t[..., 0])), V,
         ["outputs", "(4, 1)", "targets (4,)", "reshape"]),
        ("outputs-too-many", lambda: train(MAML(net(1, 6, 2))), V, ["outputs", "(4, 2)", "targets (4, 1)"]),
        ("another-dtype", lambda: meta_grads(MAML(net()), sines().to(torch.float64)),
         T, ["tasks: x", "torch.float64", "tasks.to(torch.float32)"]),
        ("chunk-zero", lambda: meta_grads(MAML(net()), sines(), chunk=0), V, ["chunk=0", "1 or more"]),
        ("chunk-fraction", lambda: meta_grads(MAML(net()), sines(), chunk=0.5), V, ["chunk=0.5", "1 or more"]),
        ("nothing-to-learn", lambda: meta_grads(FromScratch(net()), sines()), V, ["learner", "no trainable parameters"]),
        ("images-as-stored", lambda: meta_grads(MAML(classifier(), **CLASSES), changed(few().sample(2), x=lambda t: (255 * t).byte())),
         T, ["tasks: x", "torch.uint8", "x.float() / 255"]),
        ("query-images-as-stored",
         lambda: meta_grads(MAML(classifier(), **CLASSES), changed(few().sample(2), xq=lambda t: (255 * t).byte())),
         T, ["tasks: xq", "torch.uint8", "xq.float() / 255"]),
        ("labels-for-squares", lambda: meta_grads(MAML(classifier()), few().sample(2)),
         T, ["targets", "torch.int64", "mse_loss", "loss=F.cross_entropy"]),
        ("no-queries", lambda: meta_grads(MAML(net()), changed(sines(), xq=lambda t: t[:, :0], yq=lambda t: t[:, :0])),
         V, ["tasks: xq", "no examples"]),
        ("no-tasks", lambda: meta_grads(MAML(net()), Task(*(t[:0] for t in sines()))), V, ["tasks", "T is 0", "at least one"]),
        ("arrays-of-numpy", lambda: meta_grads(MAML(net()), Task(*(t.numpy() for t in sines()))),
         T, ["tasks: x", "ndarray", "four tensors"]),
        ("plain-network", lambda: meta_grads(net(), sines()), T, ["learner", "Sequential", "MAML(model)"]),
        ("learner-class", lambda: meta_grads(MAML, sines()), T, ["learner", "torch.nn.Module", "function"]),
    ]),
    "samplers": (lambda: few(classes=range(5)).sample(2, seed=-1), [
        ("ways-above-classes", lambda: few(ways=9), V, ["ways=9", "8 classes"]),
        ("ways-above-chosen-classes", lambda: few(classes=[0, 1, 2]), V, ["ways=5", "at most 3"]),
        ("ways-words", lambda: few(ways="5"), T, ["ways='5'", "whole number"]),
        ("ways-fraction", lambda: few(ways=2.5), T, ["ways=2.5", "whole number"]),
        ("shots-zero", lambda: few(shots=0), V, ["shots=0", "at least 1"]),
        ("queries-negative", lambda: few(queries=-1), V, ["queries=-1", "at least 1"]),
        ("shots-and-queries-above-images", lambda: few(shots=5, queries=5), V, ["shots + queries = 10", "6 images", "fewer"]),
        ("shots-and-queries-above-counts", lambda: few(counts=[6] * 7 + [2]), V, ["shots + queries = 3", "class 7", "2 images"]),
        ("images-of-one-class", lambda: few(images=images()[0]), V, ["images", "(6, 1, 6, 6)", "[class, image, C, H, W]"]),
        ("images-of-grey-pixels", lambda: few(images=images()[:, :, 0]), V, ["images", "(8, 6, 6, 6)", "[class, image, C, H, W]"]),
        ("images-in-a-list", lambda: few(images=[1, 2]), T, ["images", "list", "tensor"]),
        ("images-of-integers", lambda: few(images=images().long()), T, ["images", "torch.int64", "uint8 or floats"]),
        ("class-number-too-large", lambda: few(classes=[0, 1, 2, 3, 8]), V, ["classes", "8", "from 0 to 7"]),
        ("class-twice", lambda: few(classes=[0, 1, 2, 3, 4, 4]), V, ["classes", "twice"]),
        ("class-mask-too-short", lambda: few(classes=torch.ones(5, dtype=torch.bool)), V, ["classes", "a mask of 5 for 8"]),
        ("class-numbers-of-floats", lambda: few(classes=[0.5, 1]), T, ["classes", "whole numbers"]),
        ("counts-too-many-images", lambda: few(counts=[6] * 7 + [9]), V, ["counts", "class 7 has 9", "6 images"]),
        ("counts-fractions", lambda: few(counts=[2.7] * 8), T, ["counts", "float32", "whole number"]),
        ("counts-too-few", lambda: few(counts=[6] * 7), V, ["counts", "7 for 8 classes", "one number a class"]),
        ("families-without-any", lambda: few(families=True), V, ["families", "families=None"]),
        ("family-unknown", lambda: few(images=families(), families="Klingon"), V, ["families", "'Klingon'", "Latin (5)", "Greek (3)"]),
        ("family-too-small", lambda: few(images=families(), families="Greek"), V, ["'Greek' has 3", "ways=5"]),
        ("families-all-too-small", lambda: few(images=families(), ways=6, families=True), V, ["ways=6", "largest family has 5"]),
        ("labels-unknown", lambda: few(labels="globel"), V, ["labels='globel'", "'local'", "'global'"]),
        ("rotations-of-oblongs", lambda: few(images=images()[..., :4], rotations=True), V, ["rotations=True", "6 × 4", "square"]),
        ("curve-without-points", lambda: Sinusoid(shots=0), V, ["shots=0", "at least 1"]),
        ("range-backwards", lambda: Sinusoid(amplitude=(5, 1)), V, ["amplitude=(5, 1)", "low must be at most high"]),
        ("range-of-one-number", lambda: Sinusoid(phase=3), T, ["phase=3", "(low, high)"]),
        ("range-endless", lambda: Sinusoid(domain=(0, math.inf)), V, ["domain=(0, inf)", "finite"]),
        ("range-beyond-dtype", lambda: Sinusoid(domain=(0, 1e39)), V, ["domain=(0, 1e+39)", "torch.float32"]),
        ("dtype-half", lambda: Sinusoid(dtype=torch.float16), T, ["dtype=torch.float16", "torch.float32"]),
        ("no-tasks", lambda: Sinusoid().sample(0), V, ["T=0", "at least 1"]),
        ("half-a-task", lambda: Quadratic().sample(2.5), T, ["T=2.5", "whole number"]),
        ("step-negative", lambda: Sinusoid().sample(2, step=-1), V, ["step=-1", "at least 0"]),
        ("seed-words", lambda: Sinusoid().sample(2, seed="0"), T, ["seed='0'", "whole number"]),
        ("seed-fraction", lambda: Sinusoid().sample(2, seed=1.5), T, ["seed=1.5", "whole number"]),
        ("batch-words", lambda: stream(batch="4"), T, ["batch='4'", "whole number"]),
        ("wave-unknown", lambda: Waves(wave="triangle"), V, ["wave='triangle'", "square"]),
        ("start-beyond-32-bits", lambda: Sinusoid().sample(2, start=2**32 - 1), V, ["start=4294967295", "2³²"]),
        ("stream-of-a-list", lambda: Stream([1, 2]), T, ["x: expected a tensor", "list"]),
        ("targets-too-few", lambda: Stream(torch.rand(40, 2), torch.rand(39, 1)), V, ["y: 39 targets for 40", "one each"]),
        ("minibatch-too-large", lambda: stream(batch=64), V, ["batch=64", "36 rows", "smaller"]),
        ("queries-above-held-out", lambda: stream(queries=9), V, ["queries=9", "4 rows", "hold more"]),
        ("held-share-too-large", lambda: stream(held=1.5), V, ["held=1.5", "between 0 and 1"]),
        ("held-row-unknown", lambda: stream(held=[0, 40]), V, ["held", "40", "from 0 to 39"]),
    ]),
    "data": (lambda: (families(), data.split_of(data.source_of("Mini-ImageNet"), "val")), [
        ("name-unknown", lambda: data.load("omniglott"), V, ["'omniglott'", "omniglot"]),
        ("split-unknown", lambda: data.load("glyphs", "training"), V, ["'training'", "train, validation, test"]),
        ("folder-missing", lambda: data.load("./no/such/folder"), D, ["no/such/folder", "a folder of images for each class"]),
        ("folder-empty", lambda: data.folder("."), D, ["holds no class folders", "one folder of images for each class"]),
        ("not-there", lambda: data.load("omniglot", root="nowhere"), D, ["Omniglot", "nowhere", "metanb data fetch omniglot"]),
        ("names-too-few", lambda: data.ImageClasses(families().images, ["a"]), V, ["names", "1 entries for 8 classes"]),
        ("images-of-floats", lambda: data.ImageClasses(images(), list("abcdefgh")), T, ["images", "uint8", "torch.float32"]),
        ("images-without-channels", lambda: data.ImageClasses(families().images[:, :, 0], list("abcdefgh")),
         T, ["images", "[class, image, C, H, W]"]),
        ("glyphs-split-unknown", lambda: data.glyphs("dev"), V, ["'dev'", "train"]),
        ("glyphs-none", lambda: data.glyphs(per_class=0), V, ["per_class=0", "at least 1"]),
        ("glyphs-size-words", lambda: data.glyphs(size="28"), T, ["size='28'", "whole number"]),
        ("glyphs-seed-negative", lambda: data.glyphs(seed=-1), V, ["seed=-1", "at least 0"]),
        ("size-words", lambda: data.load("glyphs", size="84"), T, ["size='84'", "whole number"]),
        ("size-zero", lambda: data.load("glyphs", size=0), V, ["size=0", "at least 1"]),
        ("fit-unknown", lambda: data.folder(".", fit="stretch"), V, ["fit='stretch'", "'crop', 'squash'"]),
        ("fetch-unknown", lambda: data.fetch("imagenet"), V, ["'imagenet'", "miniimagenet"]),
    ]),
    "models": (lambda: (MLP(1, 1), small_conv(size=8, filters=2, features=2), Conv4(stride=1, size=16, filters=2),
                        Autoencoder(2, 2, 1, 16)), [
        ("mlp-without-sizes", lambda: MLP(), V, ["sizes=()", "MLP(1, 40, 40, 1)"]),
        ("mlp-of-a-list", lambda: MLP([1, 40, 1]), V, ["sizes=([1, 40, 1],)", "MLP(1, 40, 40, 1)"]),
        ("mlp-of-no-units", lambda: MLP(1, 0, 1), V, ["sizes[1]=0", "at least 1"]),
        ("conv-stride", lambda: Conv4(stride=3), V, ["stride=3", "2 (strided"]),
        ("conv-images-too-small", lambda: Conv4(stride=1, size=8), V, ["size=8", "at least 16"]),
        ("conv-ways-zero", lambda: Conv4(ways=0), V, ["ways=0", "at least 1"]),
        ("noconv-no-pixels", lambda: NoConv(pixels=0), V, ["0", "at least 1"]),
        ("resnet-widths", lambda: ResNet12(widths=(8, 0, 8, 8)), V, ["widths[1]=0", "at least 1"]),
        ("autoencoder-odd", lambda: Autoencoder(planes=3), V, ["planes=3", "even"]),
        ("autoencoder-size", lambda: Autoencoder(size=100), V, ["size=100", "64, 32 or 16"]),
        ("small-conv-size", lambda: small_conv(size=4), V, ["size=4", "at least 8"]),
    ]),
    "training": (lambda: train(MAML(net()), validation=Sinusoid(4, 3), validation_tasks=2, metric="loss", clip=1.0, nonfinite="skip"), [
        ("steps-negative", lambda: train(MAML(net()), steps=-1), V, ["steps=-1", "at least 0"]),
        ("steps-fraction", lambda: train(MAML(net()), steps=1.5), T, ["steps=1.5", "whole number"]),
        ("no-tasks", lambda: train(MAML(net()), tasks=0), V, ["tasks=0", "at least 1"]),
        ("chunk-zero", lambda: train(MAML(net()), chunk=0), V, ["chunk=0", "at least 1"]),
        ("name-for-learner", lambda: train("maml"), T, ["learner", "torch.nn.Module", "str"]),
        ("tasks-for-sampler", lambda: train(MAML(net()), sines()), T, ["sampler", "sample(T, seed=", "Task"]),
        ("sampler-by-name", lambda: train(MAML(net()), "sinusoid"), T, ["sampler", "sample(T, seed=", "str"]),
        ("sampler-class", lambda: train(MAML(net()), Sinusoid), T, ["sampler", "Sinusoid is a class", "Sinusoid(…)"]),
        ("plain-network", lambda: train(net()), T, ["learner", "Sequential", "MAML(model)"]),
        ("seed-words", lambda: train(MAML(net()), seed="0"), T, ["seed='0'", "whole number"]),
        ("labels-for-squares", lambda: train(MAML(classifier()), few()), T, ["targets", "torch.int64", "loss=F.cross_entropy"]),
        ("no-stream", lambda: train(StreamLearner(net(2, 1), steps=2)), V, ["tasks", "minibatches", "tasks.Stream", "MAML"]),
        ("list-for-validation", lambda: train(MAML(net()), validation=[sines()]), T, ["validation", "sample(T, seed=", "list"]),
        ("class-for-validation", lambda: train(MAML(net()), validation=Sinusoid), T, ["validation", "Sinusoid is a class"]),
        ("optimizer-of-the-model", lambda: train(MAML(net()), opt=optimizer()), V, ["opt", "learner.parameters()"]),
        ("optimizer-class", lambda: train(MAML(net()), opt=torch.optim.Adam), T, ["opt", "torch.optim.Optimizer"]),
        ("optimizer-lbfgs", lambda: train(MAML(net()), opt=torch.optim.LBFGS(net().parameters())), T, ["opt", "LBFGS", "no closure"]),
        ("scheduler-of-another", foreign_scheduler, V, ["scheduler", "another optimizer"]),
        ("plateau-without-validation", plateau, V, ["scheduler", "validation=SAMPLER"]),
        ("scheduler-class", lambda: train(MAML(net()), scheduler=torch.optim.lr_scheduler.StepLR), T, ["scheduler", "StepLR(opt, 1000)"]),
        ("scheduler-by-name", lambda: train(MAML(net()), scheduler="cosine"), T, ["scheduler='cosine'", "torch scheduler"]),
        ("combine-by-name", lambda: train(MAML(net()), combine="pcgrad"), T, ["combine='pcgrad'", "function"]),
        ("combine-class", lambda: train(MAML(net()), combine=WatchConflict), T, ["combine", "WatchConflict", "function"]),
        ("combine-keeps-tasks", lambda: train(MAML(nn.Linear(1, 1)), combine=lambda g: g), V, ["combine", "it returned", "expected"]),
        ("clip-negative", lambda: train(MAML(net()), clip=-1), V, ["clip=-1", "above zero"]),
        ("clip-nan", lambda: train(MAML(net()), clip=NAN), V, ["clip=nan", "above zero"]),
        ("clip-words", lambda: train(MAML(net()), clip="1"), T, ["clip='1'", "a number", "str"]),
        ("compile-unknown", lambda: train(MAML(net()), compile="always"), V, ["compile='always'", "'auto'"]),
        ("nonfinite-unknown", lambda: train(MAML(net()), nonfinite="ignore"), V, ["nonfinite='ignore'", "'stop' or 'skip'"]),
        ("metric-unknown", lambda: train(MAML(net()), validation=Sinusoid(4, 3), metric="acc"), V, ["metric='acc'", "'accuracy'"]),
        ("validation-never", lambda: train(MAML(net()), validation=Sinusoid(4, 3), validate_every=0),
         V, ["validate_every=0", "at least 1"]),
        ("validation-on-nothing", lambda: train(MAML(net()), validation=Sinusoid(4, 3), validation_tasks=0),
         V, ["validation_tasks=0", "at least 1"]),
        ("callback-class", lambda: train(MAML(net()), callbacks=[LogFile]), T, ["callbacks", "LogFile is a class", "LogFile(…)"]),
        ("callback-number", lambda: train(MAML(net()), callbacks=[3]), T, ["callbacks", "start, step or end", "int"]),
        ("callback-not-in-a-list", lambda: train(MAML(net()), callbacks=LogFile("log.csv")), T, ["callbacks", "a list", "LogFile"]),
        ("precision-unknown", lambda: train(MAML(net()), precision="fp16"), V, ["precision='fp16'", "'bf16'"]),
        ("log-suffix", lambda: LogFile("log.txt"), V, ["path='log.txt'", ".csv or .jsonl"]),
        ("evaluate-nothing", lambda: evaluate(MAML(net()), Sinusoid(), tasks=0), V, ["tasks=0", "at least 1"]),
        ("evaluate-steps", lambda: evaluate(MAML(net()), Sinusoid(), 2, steps=-1), V, ["steps=-1", "at least 0"]),
        ("evaluate-swapped", lambda: evaluate(Sinusoid(), MAML(net())), T, ["learner", "torch.nn.Module", "Sinusoid"]),
        ("evaluate-network", lambda: evaluate(net(), Sinusoid(), 2), T, ["learner", "Sequential", "MAML(model)"]),
        ("evaluate-class", lambda: evaluate(MAML(net()), Sinusoid, 2), T, ["sampler", "Sinusoid is a class"]),
        ("evaluate-metric-class", lambda: evaluate(MAML(net()), Sinusoid(), 2, metric=nn.MSELoss), V, ["metric", "MSELoss", "'loss'"]),
        ("evaluate-metric", lambda: evaluate(MAML(net()), Sinusoid(), 2, metric="mse"), V, ["metric='mse'", "'loss'"]),
        ("accuracy-of-curves", lambda: evaluate(MAML(net()), Sinusoid(), 2, metric="accuracy"),
         V, ["accuracy", "outputs (10, 1)", "[Q, ways]"]),
    ]),
    "files": (lambda: (kept(), train(MAML(net()), steps=2, checkpoint="run.pt"), load_learner(MAML(net()), "run.pt"),
                       foreign_rule(classes=[Foreign])), [
        ("cut-short", cut_short, V, ["run.pt is damaged", "end is missing", "another path"]),
        ("a-bit-flipped", flipped, V, ["run.pt is damaged", "checksum", "delete it"]),
        ("weights-of-torch", of_torch, V, ["weights.pt is damaged", "no checkpoint of metanb"]),
        ("text", text_file, V, ["notes.txt is damaged", "no checkpoint of metanb"]),
        ("pickle-that-runs-code", trap, V, ["trap.pt is damaged", "no checkpoint of metanb"]),
        ("pickle-that-runs-code-sealed", sealed_trap, V, ["trap.pt is refused", "could run code", "delete it"]),
        ("rule-for-checkpoint", lambda: train(MAML(net()), checkpoint=rule_file()), V, ["rule.pt", "no run", "another path"]),
        ("list-for-checkpoint", lambda: load_learner(MAML(net()), saved("list.pt", [1])), V, ["list.pt", "MetaLearner"]),
        ("missing", lambda: load_checkpoint("never.pt"), FileNotFoundError, ["never.pt"]),
        ("another-rate", lambda: train(MAML(net(), lr=0.5), checkpoint=kept()),
         V, ["run.pt", "another run", "SGD.lr was 0.01, now 0.5", "resume=False"]),
        ("another-seed", lambda: train(MAML(net()), checkpoint=kept(), seed=3), V, ["run.pt", "seed was 0, now 3", "another path"]),
        ("beyond-steps", lambda: train(MAML(net()), checkpoint=kept(steps=2)), V, ["run.pt", "step 2", "steps=1", "more steps"]),
        ("checkpoint-every-zero", lambda: train(MAML(net()), checkpoint="run.pt", checkpoint_every=0),
         V, ["checkpoint_every=0", "at least 1"]),
        ("no-rule", lambda: load_rule(kept()), V, ["run.pt", "no rule", "save_rule"]),
        ("no-distribution", lambda: load_init(kept(), net()), V, ["run.pt", "no initial distribution", "save_init"]),
        ("rule-from-outside", foreign_rule, V, ["Foreign", "not of this package", "classes=(Foreign,)"]),
        ("rule-of-the-system", lambda: rule_called("os.system"), V, ["'os.system'", "not of this package"]),
        ("rule-unknown-here", lambda: rule_called("metanb.lstm.Nadam"), V, ["'metanb.lstm.Nadam'", "not in this version"]),
        ("rule-that-is-none", lambda: rule_called("metanb.core.Task"), V, ["'metanb.core.Task'", "no rule"]),
        ("rule-saved-is-none", lambda: save_rule(nn.Linear(1, 1), "rule.pt"), T, ["rule", "init(params)", "Linear"]),
    ]),
    "rates": (lambda: train(LSLR(net(), steps=2, lr=(0.01, 0.1), objective=MultiStep(2, over=3))), [
        ("rate-negative", lambda: MetaSGD(net(), lr=-0.1), V, ["lr=-0.1", "zero or more"]),
        ("rate-nan", lambda: MetaSGD(net(), lr=NAN), V, ["lr=nan", "(low, high)"]),
        ("interval-backwards", lambda: MetaSGD(net(), lr=(0.1, 0.005)), V, ["lr=(0.1, 0.005)", "(low, high)"]),
        ("no-steps", lambda: LSLR(net(), steps=0), V, ["steps=0", "one step or more"]),
        ("adam-rate-zero", lambda: MADAM(net(), lr=0), V, ["lr=0", "above zero"]),
        ("adam-decay-one", lambda: MADAM(net(), beta2=1.0), V, ["beta2=1.0", "between 0 and 1"]),
        ("adam-rule-rate", lambda: MetaLearner(net(), rule=partial(LearnedAdam, lr=-1)), V, ["lr=-1", "above zero"]),
        ("objective-of-no-steps", lambda: MultiStep(0), V, ["steps=0", "whose loss counts"]),
        ("objective-over-nothing", lambda: MultiStep(2, over=0), V, ["over=0", "1 or more"]),
        ("objective-of-other-steps", lambda: train(MAML(net(), steps=5, objective=MultiStep(3))),
         V, ["objective", "MultiStep(3)", "5 steps", "same number"]),
    ]),
    "implicit": (lambda: train(IMAML(net(), steps=2, lam=0.5, cg_steps=1, learn_lam=True)), [
        ("lam-zero", lambda: IMAML(net(), lam=0), V, ["lam=0", "above zero"]),
        ("lam-negative", lambda: IMAML(net(), lam=-1.0), V, ["lam=-1.0", "above zero"]),
        ("lam-nan", lambda: IMAML(net(), lam=NAN, learn_lam=True), V, ["lam=nan", "above zero"]),
        ("cg-steps-zero", lambda: IMAML(net(), cg_steps=0), V, ["cg_steps=0", "at least 1"]),
        ("lam-words", lambda: IMAML(net(), lam="2.0"), T, ["lam='2.0'", "a number", "str"]),
        ("rule-learned", lambda: IMAML(net(), rule=WeightRates), V, ["rule", "without parameters", "gradient=exact"]),
        ("objective-along", lambda: IMAML(net(), objective=Along()), V, ["objective", "`last`", "gradient=exact"]),
        ("halvings-negative", lambda: NewtonCG(halvings=-1), V, ["halvings=-1", "at least 0"]),
    ]),
    "conflicts": (lambda: (meta_pcgrad(grads(), 2, seed=0), train(MAML(net()), combine=WatchConflict(pcgrad))), [
        ("groups-do-not-divide", lambda: meta_pcgrad(grads(4), 3), V, ["groups=3", "4 tasks", "1, 2, 4"]),
        ("groups-zero", lambda: meta_pcgrad(grads(), 0), V, ["groups=0", "1, 2, 4"]),
        ("groups-in-training", lambda: train(MAML(net()), tasks=5, combine=partial(meta_pcgrad, groups=2)),
         V, ["groups=2", "5 tasks", "1, 5"]),
        ("one-tensor", lambda: pcgrad(torch.randn(4, 3)), T, ["grads", "{name: [T, *shape]}", "Tensor"]),
        ("grads-and-losses", lambda: pcgrad(meta_grads(MAML(net()), sines())), T, ["grads", "the first of the two", "tuple"]),
        ("no-leading-dimension", lambda: conflict({"w": torch.randn(3), "b": torch.tensor(1.0)}), V, ["grads", "leading dimension T"]),
        ("watch-never", lambda: WatchConflict(every=0), V, ["every=0", "at least 1"]),
    ]),
    "memory": (lambda: (hessian_penalty(MAML(net()), one(sines()), samples=2), train(MAML(net(), init=partial(Generator, inputs=2)))), [
        ("penalty-of-no-weights", lambda: hessian_penalty(ProtoNet(classifier()), one(few().sample(1))),
         T, ["learner", "MetaLearner", "ProtoNet"]),
        ("penalty-negative", lambda: hessian_penalty(MAML(net()), one(sines()), coefficient=-1), V, ["coefficient=-1", "zero or more"]),
        ("penalty-without-samples", lambda: hessian_penalty(MAML(net()), one(sines()), samples=0), V, ["samples=0", "at least 1"]),
        ("families-in-a-list", lambda: forgetting(MAML(net()), [Sinusoid(), Waves()]), V, ["families", "{name: sampler}"]),
        ("family-alone", lambda: forgetting(MAML(net()), {"sine": Sinusoid()}), V, ["families", "two or more"]),
        ("family-without-sampler", lambda: forgetting(MAML(net()), {"a": Sinusoid(), "b": "square"}),
         T, ["families['b']", "sample(T, seed=", "str"]),
        ("tests-of-other-names", lambda: forgetting(MAML(net()), {"a": Sinusoid(), "b": Waves()}, tests={"a": Sinusoid()}),
         V, ["tests", "['a', 'b']"]),
        ("one-checkpoint-for-two", lambda: forgetting(MAML(net()), {"a": Sinusoid(), "b": Waves()}, checkpoint="x"),
         V, ["checkpoint", "`fit`", "`Watch`"]),
        ("generator-without-inputs", lambda: MAML(net(), init=Generator), V, ["inputs", "partial(Generator, inputs=…)"]),
        ("generator-of-other-inputs", lambda: train(MAML(net(), init=partial(Generator, inputs=3))), V, ["inputs=3", "2 numbers"]),
        ("generator-without-code", lambda: Generator(net(), inputs=2, latent=0), V, ["latent=0", "at least 1"]),
    ]),
    "transfer": (lambda: train(MTL(classifier(), steps=1, **CLASSES), HardTasks(few())), [
        ("head-alone", lambda: MTL(nn.Linear(3, 2)), V, ["model", "none are left", "layers below its head"]),
        ("free-unknown", lambda: ScaleShift(net(), free="tail"), V, ["free='tail'", "head.weight"]),
        ("hard-curves", lambda: HardTasks(Sinusoid()), T, ["sampler", "FewShot", "Sinusoid"]),
        ("hard-global-labels", lambda: HardTasks(few(labels="global")), V, ["sampler", "labels='local'"]),
        ("hard-always", lambda: HardTasks(few(), every=1), V, ["every=1", "at least 2"]),
        ("hard-of-none", lambda: HardTasks(few(), keep=0), V, ["keep=0", "at least 1"]),
        ("hard-untold", lambda: train(MAML(classifier(), **CLASSES), HardTasks(few()), steps=2), V, ["HardTasks", "callbacks=[hard]"]),
        ("hard-of-another-run", lambda: train(MAML(classifier(), **CLASSES), few(), callbacks=[HardTasks(few())]),
         V, ["HardTasks", "fit(learner, hard"]),
        ("hard-of-other-size", lambda: HardTasks(few()).load_state_dict(HardTasks(few(), keep=3).state_dict()), V, ["keep=10", "3 places"]),
    ]),
    "long-runs": (lambda: (segments(MAML(net(), steps=4, objective=Along(), gradient=Truncated(2)), unroll=None),
                           train(StreamLearner(net(2, 1), steps=2, gradient=Recomputed(1)), stream())), [
        ("on-unknown", lambda: Along(on="both"), V, ["on='both'", "'query' or 'support'"]),
        ("reduce-unknown", lambda: Along(reduce="max"), V, ["reduce='max'", "'mean', 'sum'"]),
        ("every-zero", lambda: Along(every=0), V, ["every=0", "at least 1"]),
        ("start-after-the-end", lambda: train(MAML(net(), steps=2, objective=Along(start=5))), V, ["objective", "step 5", "steps=2"]),
        ("segment-zero", lambda: Recomputed(0), V, ["segment=0", "at least 1"]),
        ("unroll-fraction", lambda: Truncated(2.5), T, ["unroll=2.5", "whole number"]),
        ("truncated-without-unroll", lambda: segments(MAML(net(), steps=4, objective=Along()), unroll=None),
         V, ["unroll", "gradient=Truncated(…)"]),
        ("truncated-by-nothing", lambda: segments(MAML(net(), steps=4, objective=Along()), unroll=0), V, ["unroll=0", "at least 1"]),
        ("truncated-last-loss", lambda: segments(MAML(net(), steps=4)), V, ["objective", "after steps 1 to 2", "Along()"]),
        ("truncated-frozen", lambda: segments(FromScratch(net())), V, ["learner", "no trainable parameters"]),
        ("truncated-foreign-optimizer", lambda: segments(MAML(net(), steps=4, objective=Along()), opt=optimizer()),
         V, ["opt", "learner.parameters()"]),
        ("rule-with-a-loop", lambda: train(MAML(net(), rule=NewtonCG(), gradient=Truncated(1))), V, ["rule", "NewtonCG", "gradient=exact"]),
        ("stream-with-batch", lambda: train(StreamLearner(net(2, 1), steps=2, batch=3), stream()), V, ["batch=3", "in its sampler"]),
        ("curves-every-zero", lambda: loss_curves(MAML(net()), sines(), every=0), V, ["every=0", "at least 1"]),
        ("spread-negative", lambda: RandomStart(net(), std=-0.1), V, ["std=-0.1", "zero or more"]),
        ("spread-nan-of-a-part", lambda: RandomStart(net(), std={"head": NAN}), V, ["std=nan", "zero or more"]),
        ("recomputed-number", lambda: recompute(net(), 3.0), T, ["inputs: 3.0", "torch.tensor(3.0)"]),
        ("memory-too-small", lambda: choose_segment(MAML(net(), steps=9), sines(), memory=10), V, ["memory=10", "chunk="]),
    ]),
    "distributions": (lambda: (Quantile(net(), points=2).sample(), transfer(Normal(net()), net(1, 9, 1)).fill(net(1, 9, 1)),
                               Mixture(net(), components=1).sample(),
                               save_init("init.pt", Normal(net())), load_init("init.pt", net(1, 9, 1), rescale=True)), [
        ("name-for-model", lambda: Normal("net"), T, ["model", "torch.nn.Module", "str"]),
        ("frozen-weight", lambda: Normal(without_gradients()), V, ["model", "head.weight", "buffer"]),
        ("quantile-of-one-point", lambda: Quantile(net(), points=1), V, ["points=1", "at least 2"]),
        ("mixture-of-nothing", lambda: Mixture(net(), components=0), V, ["components=0", "at least 1"]),
        ("fill-another-width", lambda: Normal(net()).fill(net(1, 9, 1)), V, ["model", "transfer(init, model)"]),
        ("transfer-to-more-layers", lambda: transfer(Normal(net()), net(1, 6, 6, 1)),
         V, ["model", "body.linear2.bias", "names must be the same"]),
        ("steps-negative", lambda: DIMAML(net(), steps=-1), V, ["steps=-1", "zero or more"]),
        ("segment-zero", lambda: DIMAML(net(), segment=0), V, ["segment=0", "at least 1"]),
        ("momentum", lambda: DIMAML(net(), beta=1), V, ["beta=1", "[0, 1)"]),
        ("curve-batch", lambda: train_curve(net(), pair(), pair(), 1, 1, batch=9), V, ["batch=9", "5 examples", "smaller"]),
        ("curve-never", lambda: train_curve(net(), pair(), pair(), 1, 0), V, ["every=0", "at least 1"]),
    ]),
    "shapes": (lambda: (fit_shape(torch.rand(3)), train(MAML(net(), steps=3, objective=Shaped(s=2.0, z=0.1, learn=True)))), [
        ("losses-in-a-list", lambda: auc([1.0, 2.0]), T, ["losses", "list", "tensor"]),
        ("losses-of-integers", lambda: auc(torch.arange(3)), T, ["losses", "torch.int64", "floating-point"]),
        ("losses-empty", lambda: emphasis(torch.zeros(0)), V, ["losses", "(0,)", "one reading or more"]),
        ("weights-too-few", lambda: auc(torch.rand(4), [1.0, 2.0]), V, ["weights", "2 for 4 losses"]),
        ("times-too-few", lambda: shaped_loss(torch.rand(4), 2.0, t=torch.arange(3)), V, ["t: 3 for 4 losses", "one time a reading"]),
        ("kind-unknown", lambda: Shaped(s=5.0, kind="cubic"), V, ["kind='cubic'", "'signed'"]),
        ("fall-of-no-time", lambda: Shaped(s=0.0), V, ["s=0.0", "positive"]),
        ("fall-in-words", lambda: Shaped(s="5"), T, ["s='5'", "number", "str"]),
        ("level-nan", lambda: inverse_exponential(0.0, 1.0, 2.0, NAN), V, ["z=nan", "finite"]),
        ("learned-signed", lambda: Shaped(s=5.0, z=0.1, kind="signed", learn=True), V, ["kind='signed'", "'absolute' or 'squared'"]),
        ("learned-from-zero", lambda: Shaped(s=5.0, learn=True), V, ["z=0.0", "positive"]),
        ("truncated", lambda: segments(MAML(net(), steps=4, objective=Shaped(s=2.0))), V, ["losses", "2 of 4 readings", "use `fit`"]),
        ("shape-of-two-readings", lambda: fit_shape(torch.rand(2)), V, ["losses", "three or more"]),
        ("shape-of-nan", lambda: fit_shape(torch.tensor([1.0, NAN, 0.5])), V, ["losses", "all finite"]),
        ("power-negative", lambda: emphasis(torch.rand(3), power=-1), V, ["power=-1", "zero or more"]),
        ("flood-negative", lambda: Flooded(net(), level=-0.1), V, ["level=-0.1", "zero or more"]),
    ]),
    "learned-optimizers": (lambda: (stepped(), tune(quadratic_run(SGD(), 3, 2), SGD, Quadratic(3).sample(2), [0.1])), [
        ("hidden-zero", lambda: LSTMRule(hidden=0), V, ["hidden=0", "at least 1"]),
        ("preprocessing", lambda: LSTMRule(p=0), V, ["p=0", "between 0 and 80"]),
        ("scale-zero", lambda: LSTMRule(scale=0.0), V, ["scale=0.0", "above zero"]),
        ("rmsprop-decay", lambda: RMSprop(gamma=1.0), V, ["gamma=1.0", "[0, 1)"]),
        ("no-rule", lambda: LearnedOptimizer(net().parameters(), nn.Linear(1, 1)), T, ["rule", "init(params)", "Linear"]),
        ("rule-class", lambda: LearnedOptimizer(net().parameters(), LSTMRule), T, ["rule", "LSTMRule()", "type"]),
        ("rule-of-torch", lambda: LearnedOptimizer(net().parameters(), optimizer()), T, ["rule", "init(params)", "SGD"]),
        ("rule-with-a-loop", lambda: LearnedOptimizer(net().parameters(), NewtonCG()), T, ["rule", "NewtonCG", "step by step"]),
        ("rate-negative", lambda: LearnedOptimizer(net().parameters(), SGD(), lr=-1), V, ["lr=-1", "zero or more"]),
        ("integer-tensor", lambda: LearnedOptimizer([torch.zeros(2, dtype=torch.int64)], SGD()), T, ["params", "floating-point"]),
        ("mixed-dtypes", lambda: LearnedOptimizer([torch.zeros(2), torch.zeros(2).double()], SGD()), V, ["params", "a group of its own"]),
        ("sparse-gradient", sparse, T, ["params", "sparse=False"]),
        ("grid-empty", lambda: tune(quadratic_run(SGD()), SGD, Quadratic().sample(2), []), V, ["rates", "at least one"]),
        ("grid-negative", lambda: tune(quadratic_run(SGD(), 3, 2), SGD, Quadratic(3).sample(2), [-1.0]), V, ["lr=-1.0", "zero or more"]),
    ]),
    "hierarchical-rules": (lambda: (HierarchicalRule((2,), 1), Bowl(2).sample(2), Rescaled(net(), 10.0), lengths(1, 0.0)(3)), [
        ("no-levels", lambda: HierarchicalRule(sizes=()), V, ["sizes=()", "(10, 20, 20)"]),
        ("four-levels", lambda: HierarchicalRule(sizes=(1, 2, 3, 4)), V, ["sizes=(1, 2, 3, 4)", "one to three"]),
        ("sizes-of-one-number", lambda: HierarchicalRule(sizes=10), V, ["sizes=10", "(10, 20, 20)"]),
        ("no-timescales", lambda: HierarchicalRule(timescales=0), V, ["timescales=0", "at least 1"]),
        ("rates-of-zero", lambda: HierarchicalRule(rates=(0.0, 1e-2)), V, ["rates=(0.0, 0.01)", "above zero"]),
        ("share-zero", lambda: LogAlong(eps=0), V, ["eps=0", "above 0 and below 1"]),
        ("condition-below-one", lambda: Bowl(condition=(0.5, 2.0)), V, ["condition=(0.5, 2.0)", "1 or more"]),
        ("valley-of-one", lambda: Valley(dim=1), V, ["dim=1", "at least 2"]),
        ("one-class", lambda: Teacher(classes=1), V, ["classes=1", "at least 2"]),
        ("noise-negative", lambda: Teacher(noise=-0.5), V, ["noise=-0.5", "zero or more"]),
        ("gradient-noise-negative", lambda: ZooRun(net(), noise=-1), V, ["noise=-1", "zero or more"]),
        ("factor-zero", lambda: ZooRun(net(), factor=0), V, ["factor=0", "above zero"]),
        ("zoom-zero", lambda: Rescaled(net(), 0.0), V, ["zoom=0.0", "above zero"]),
        ("no-problems", lambda: fit_zoo(HierarchicalRule((2,)), [], 1), V, ["problems", "zoo()"]),
        ("rounds-negative", lambda: fit_zoo(HierarchicalRule((2,)), [], -1), V, ["rounds=-1", "at least 0"]),
        ("length-negative", lambda: lengths(mean=-1), V, ["mean=-1", "zero or more"]),
    ]),
    "comparing-examples": (lambda: (train(ProtoNet(classifier(), layer="body"), few()),
                                    train(InContext(classifier(), width=4, heads=2, depth=1, **CLASSES), few())), [
        ("distance-unknown", lambda: NearestNeighbour(distance="manhattan"), V, ["distance='manhattan'", "'euclidean' or 'cosine'"]),
        ("name-for-model", lambda: ProtoNet("conv4"), T, ["model", "torch.nn.Module", "str"]),
        ("layer-unknown", lambda: ProtoNet(classifier(), layer="bodi"), V, ["layer='bodi'", "body, head"]),
        ("scale-zero", lambda: MatchingNet(classifier(), scale=0), V, ["scale=0", "above zero"]),
        ("embedding-of-unknown-length", lambda: Siamese(nn.Conv2d(1, 2, 3)), V, ["features", "features=D"]),
        ("embedding-of-no-length", lambda: Siamese(classifier(), features=0), V, ["features=0", "at least 1"]),
        ("embedding-of-images", lambda: train(ProtoNet(nn.Conv2d(1, 2, 3)), few()), V, ["model", "(15, 2, 4, 4)", "nn.Flatten()"]),
        ("regression-targets", lambda: train(ProtoNet(net())), T, ["y", "torch.float32", "integer labels"]),
        ("labels-with-gaps", lambda: meta_grads(ProtoNet(classifier()), changed(few().sample(2), y=lambda t: 2 * t)),
         V, ["y", "label 1", "without gaps"]),
        ("labels-negative", lambda: meta_grads(ProtoNet(classifier()), changed(few().sample(2), y=lambda t: t - 1)),
         V, ["y", "0, 1, …", "-1"]),
        ("more-ways-than-outputs", lambda: train(InContext(classifier(3), width=4, heads=2, depth=1, **CLASSES), few()),
         V, ["y", "5 ways", "3 outputs"]),
        ("targets-of-other-width", lambda: train(InContext(net(1, 6, 2), width=4, heads=2, depth=1)), V, ["y", "(4, 1)", "[4, 2]"]),
        ("heads-do-not-divide", lambda: InContext(classifier(), width=10, heads=4), V, ["heads=4", "width=10"]),
        ("reader-without-body", lambda: InContext(nn.Linear(2, 2)), T, ["model", "a body and a last nn.Linear"]),
        ("pretrained-without-head", lambda: Pretrained(nn.Sequential(nn.Linear(1, 2), nn.LayerNorm(2)), classes=9),
         T, ["model", "9 classes", "LayerNorm"]),
    ]),
    "command-line": (lambda: (misspelt_scale("full"), command("data", "list")), [
        ("scale-of-the-environment", lambda: misspelt_scale("fast"), V, ["METANB_SCALE='fast'", "smoke, quick, full"]),
        ("scale-of-another-case", lambda: misspelt_scale("Smoke"), V, ["METANB_SCALE='Smoke'", "smoke, quick, full"]),
        ("scale", lambda: command("compare", "--scale", "huge"), R, ["--scale", "'huge'", "full"]),
        ("method", lambda: command("compare", "--methods", "mamll"), R, ["'mamll'", "did you mean maml?"]),
        ("method-to-train", lambda: command("train", "--method", "protonett", "--tasks", "sinusoid"),
         R, ["'protonett'", "did you mean protonet?"]),
        ("problem", lambda: command("compare", "--tasks", "sinusiod"), R, ["'sinusiod'", "did you mean sinusoid?"]),
        ("folder", lambda: command("compare", "--tasks", "folder:no/such/place"),
         R, ["no/such/place", "a folder of images for each class"]),
        ("ways", lambda: command("compare", "--ways", "1"), R, ["--ways", "'1'", "2 or more"]),
        ("steps", lambda: command("train", "--steps", "1.5"), R, ["--steps", "'1.5'", "whole number"]),
        ("device", lambda: command("compare", "--device", "toaster"), R, ["'toaster'", "leave it out"]),
        ("checkpoint", lambda: command("evaluate", "--checkpoint", "never"), R, ["no checkpoint never", "metanb train"]),
        ("data-set", lambda: command("data", "fetch", "imagenet"), R, ["'imagenet'", "miniimagenet"]),
        ("command", lambda: command("trian"), R, ["'trian'", "train"]),
    ]),
}

CASES = [pytest.param(call, error, words, id=f"{group}-{name}")
         for group, (_, cases) in TABLE.items() for name, call, error, words in cases]

# Functions with an underscore in their names that users do call, or that share the name of an argument; no message names another.
FOR_USERS = {"meta_grads", "fit_truncated", "save_rule", "load_rule", "save_init", "load_init", "per_class"}


def helpers():
    "The names of the package's other functions, and of torch's innards."
    modules = [importlib.import_module(f"metanb.{m.name}") for m in pkgutil.iter_modules(metanb.__path__) if m.name != "__main__"]
    ours = {n for m in modules for n, f in vars(m).items() if inspect.isfunction(f) and f.__module__ == m.__name__ and "_" in n}
    return ours - FOR_USERS | {"functional_call", "grad_and_value", "vmap", "state_dict", "NoneType", "__init__", "lambda"}


HELPERS = re.compile(rf"\b({'|'.join(sorted(map(re.escape, helpers())))})\b")


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    "Each case has an empty folder, the same random numbers, and no data."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METANB_SCALE", "smoke")
    monkeypatch.setenv("METANB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("METANB_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)


@cache
def told(call):
    "The type and the message of the error that a call raises."
    try: call()
    except Exception as e: return type(e), str(e)
    return None, "nothing"


@pytest.mark.parametrize("call, error, words", CASES)
def test_a_mistake_is_told(call, error, words):
    "The error is of this type, and its message has the argument and what was given or would do."
    got, message = told(call)
    assert got is error and not [word for word in words if word not in message], (got, message)


@pytest.mark.parametrize("call, error, words", CASES)
def test_it_is_told_in_a_sentence_or_two(call, error, words):
    "At most 300 characters, a long list of names not counted, and no name from inside the package."
    message = told(call)[1]
    short, inside = re.sub(r"([\w:-]+, ){5,}", "…, ", message), HELPERS.search(message)
    assert "\n" not in message and len(short) <= 300 and len(re.findall(r"[.!?]\s+[A-Z]", short)) <= 1, message
    assert not inside, (inside[0], message)


@pytest.mark.parametrize("group", TABLE)
def test_what_is_right_beside_it_works(group): TABLE[group][0]()


def test_the_table_is_whole():
    "Each name is given once in its group, and each case says what to look for."
    names = [case.id for case in CASES]
    assert len(set(names)) == len(names) >= 60
    assert all(any(re.search(r"\w", word) for word in case.values[2]) for case in CASES)
