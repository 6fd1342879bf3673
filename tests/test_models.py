"What every network of `03_models` must allow; shapes, counts and first weights are tested in the notebook."
import copy, pickle

import pytest, torch
from torch import nn
from torch.func import functional_call, grad, vmap

from metanb.core import select
from metanb.models import MLP, Autoencoder, Conv4, NoConv, Residual, ResNet12

NETS = dict(
    mlp=(lambda: MLP(1, 40, 40, 1), (1,)), normed=(lambda: MLP(3, 8, 2, activation=nn.Tanh, norm=True, std=None), (3,)),
    strided=(lambda: Conv4(5, filters=8), (1, 28, 28)), pooled=(lambda: Conv4(5, 3, 8, stride=1, size=33), (3, 33, 33)),
    no_conv=(lambda: NoConv(5), (1, 28, 28)), resnet=(lambda: ResNet12(5, widths=(4, 6, 8, 10)), (3, 20, 20)),
    autoencoder=(lambda: Autoencoder(8, 2), (3, 64, 64)),
)
every = pytest.mark.parametrize("make, shape", NETS.values(), ids=NETS)
classifiers = pytest.mark.parametrize("name", [n for n in NETS if n != "autoencoder"])


@every
def test_copied_pickled_saved_and_twice_the_precision(make, shape):
    model, x = make(), torch.randn(6, *shape)
    expected, other = model(x), make()
    other.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other): torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model).double()(x.double()).float(), expected, rtol=1e-3, atol=1e-4)
    assert not list(model.buffers()) and all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@every
def test_mapped_over_weights_and_batches(make, shape):
    models, x = [make().double() for _ in range(3)], torch.randn(3, 4, *shape, dtype=torch.float64)
    params = {n: torch.stack([dict(m.named_parameters())[n].detach() for m in models]) for n, _ in models[0].named_parameters()}
    energy = lambda p, x: (functional_call(models[0], p, x) ** 2).mean()
    outputs, gradients = vmap(lambda p, x: functional_call(models[0], p, x))(params, x), vmap(grad(energy))(params, x)
    for i, model in enumerate(models):
        torch.testing.assert_close(outputs[i], model(x[i]))
        (model(x[i]) ** 2).mean().backward()
        for n, p in model.named_parameters(): torch.testing.assert_close(gradients[n][i], p.grad, rtol=1e-6, atol=1e-9)


@every
def test_seeded_first_weights(make, shape):
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(make())
    a, b, c = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(a, b) and not torch.equal(a, c) and a.isfinite().all()


@every
def test_traced(make, shape):
    torch.compiler.reset()  # torch counts the variants of all modules in a process together, and gives up after eight
    model, x = make(), torch.randn(5, *shape)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@classifiers
def test_head_and_body(name):
    make, shape = NETS[name]
    model, x = make(), torch.randn(4, *shape)
    names = [n for n, _ in model.named_parameters()]
    assert select(model, "head") == ("head.weight", "head.bias") and isinstance(model.head, nn.Linear)
    assert select(model, "body") == tuple(n for n in names if n.startswith("body."))
    torch.testing.assert_close(model.head(model.body(x)), model(x))


@pytest.mark.parametrize("side", range(16, 90, 7))
def test_pooled_features_fit_any_size(side):
    assert Conv4(5, 1, 4, stride=1, size=side)(torch.randn(2, 1, side, side)).shape == (2, 5)


def test_dropout_is_for_pretraining():
    torch.manual_seed(0)
    block, x = Residual(2, 4, dropout=0.5), torch.randn(3, 2, 8, 8)
    assert not torch.equal(block(x), block(x)) and torch.equal(block.eval()(x), block(x))
    assert not any(isinstance(m, nn.Dropout) for m in ResNet12(5).modules())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every
def test_the_same_on_a_gpu(make, shape):
    model, x = make().double(), torch.randn(6, *shape, dtype=torch.float64)
    torch.testing.assert_close(model.to("cuda")(x.cuda()).cpu(), model.cpu()(x))


@pytest.mark.parametrize("make, message", [
    (lambda: MLP(1), r"sizes=\(1,\): give at least inputs and outputs"),
    (lambda: MLP(1, -4, 1), r"sizes\[1\]=-4: give a whole number of at least 1"),
    (lambda: Conv4(ways=0), r"ways=0"),
    (lambda: Conv4(filters=0), r"filters=0"),
    (lambda: Conv4(stride=0), r"stride=0: use 2 \(strided convolutions\) or 1 \(max-pooling\)"),
    (lambda: Conv4(stride=1, size=15), r"size=15: give a whole number of at least 16"),
    (lambda: ResNet12(widths=(4, 4, 4, 0)), r"widths\[3\]=0"),
    (lambda: MLP(1, 4, 1, std=-1), r"std=-1: give a finite number, above zero"),
    (lambda: MLP(1, 4, 1, std=0), r"std=0: give a finite number, above zero"),
    (lambda: ResNet12(widths=64), r"widths=64: give the filters of the four blocks"),
    (lambda: ResNet12(widths=(8, 8)), r"widths=\(8, 8\): give the filters of the four blocks"),
    (lambda: Autoencoder(latent=0), r"latent=0"),
    (lambda: Autoencoder(planes=3), r"planes=3: the last layers have half as many"),
])
def test_impossible_sizes_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message): make()


@pytest.mark.parametrize("wrong", [nn.functional.relu, nn.ReLU(), "relu", None, dict], ids=["function", "module", "name", "none", "another class"])
def test_an_activation_is_made_by_a_class_or_a_function_of_nothing(wrong):
    with pytest.raises(TypeError, match="activation=.*give the class of a module, such as nn.ReLU"): MLP(1, 4, 1, activation=wrong)
    assert isinstance(MLP(1, 4, 1, activation=lambda: nn.LeakyReLU(0.3)).body[1], nn.LeakyReLU)
