"""All models against timm's contract, through timm's own interface."""

import copy
import itertools
import warnings

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import group_parameters
from timm.models._features_fx import FeatureGraphNet
from timm.utils import ModelEmaV3
from torch import nn

from pcdeq_zoo import DATASETS, VARIANTS, PcDEQ, PcDEQConv2d, PcDEQLinear
from pcdeq_zoo.data import normalize
from pcdeq_zoo.pcdeq import check_images

every_model = pytest.mark.parametrize("name", VARIANTS)

# One net of each size (SVHN's are CIFAR-10's) and of each activation: where only the structure matters.
SIZES = [
    "pcdeq1_l_tanh_mnist",
    "pcdeq2_sc_sigmoid_mnist",
    "pcdeq1_mc_relu6_mnist",
    "pcdeq1_sc_softsign_svhn",
    "pcdeq1_mc_softsign_cifar",
    "pcdeq1_mc_tanh_cifar_large",
]
every_size = pytest.mark.parametrize("name", SIZES)

# One net of each structure and kind of layer, where a test is slow or the variants differ in nothing it looks at.
SOME = ["pcdeq1_l_tanh_mnist", "pcdeq2_sc_sigmoid_mnist", "pcdeq1_mc_relu6_mnist", "pcdeq1_mc_softsign_cifar"]
some_models = pytest.mark.parametrize("name", SOME)


def images(name: str, n: int = 2) -> torch.Tensor:
    return torch.randn(n, *VARIANTS[name].dataset.input_size)


def make(name: str, **kwargs) -> PcDEQ:
    """An evaluation mode model whose pcDEQ layers do something: W at initialisation is almost 0."""
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, PcDEQLinear | PcDEQConv2d):
                layer.magnitude.fill_(0.5)
    return model


@every_model
def test_shapes_parameters_and_config(name: str):
    variant = VARIANTS[name]
    model = make(name)
    cfg = model.pretrained_cfg
    assert sum(p.numel() for p in model.parameters()) == variant.parameters
    assert cfg["input_size"] == variant.dataset.input_size
    assert cfg["label_names"] == variant.dataset.classes
    assert (cfg["mean"], cfg["std"]) == (variant.dataset.mean, variant.dataset.std)
    assert cfg["tag"] == variant.default_recipe
    assert (model.num_classes, model.in_chans, model.drop_rate) == (10, variant.dataset.input_size[0], 0.0)
    state = model.state_dict()
    assert cfg["classifier"] + ".weight" in state
    assert cfg["first_conv"] + ".weight" in state

    x = images(name)
    with torch.no_grad():
        y, features = model(x), model.forward_features(x)
        assert y.shape == (2, 10)
        assert y.isfinite().all()
        assert features.shape == (2, model.num_features, *cfg["pool_size"])
        assert torch.equal(model.forward_head(features), y)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


@every_size
def test_every_parameter_gets_a_gradient(name: str):
    model = make(name).train()
    model(images(name)).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@every_model
def test_logits_and_gradients_are_those_of_float64(name: str, device: torch.device):
    model, x = make(name), images(name)
    exact = copy.deepcopy(model).double()
    exact.solver.stop, exact.solver.tol, exact.solver.max_evals = "residual", 1e-10, 2000
    wanted, got = exact(x.double()), model.to(device)(x.to(device))
    assert (got.cpu() - wanted).norm() < 1e-3 * wanted.norm()
    weights = torch.randn_like(wanted)
    (wanted * weights).sum().backward()
    (got * weights.to(got)).sum().backward()
    grads, ours = (torch.cat([p.grad.flatten().double().cpu() for p in net.parameters()]) for net in (exact, model))
    assert (ours - grads).norm() < 1e-2 * grads.norm()


@every_size
def test_classifier_can_be_changed_and_removed(name: str):
    x = images(name)
    model = make(name, num_classes=7, drop_rate=0.1)
    assert model(x).shape == (2, 7)
    model.get_classifier().weight.requires_grad_(False)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.num_classes == 3
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, model.head_hidden_size)
    assert make(name, num_classes=0)(x).shape == (2, model.head_hidden_size)
    for bare in (model.reset_classifier(0, "") or model, make(name, num_classes=0, global_pool="")):
        assert bare(x).shape == bare.forward_features(x).shape
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)


@some_models
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
def test_global_pools(name: str, pool: str):
    model, x = make(name, global_pool=pool), images(name)
    features = model.forward_features(x)
    pooled = {
        "avg": features.mean((2, 3)),
        "max": features.amax((2, 3)),
        "avgmax": (features.mean((2, 3)) + features.amax((2, 3))) / 2,
        "catavgmax": torch.cat((features.mean((2, 3)), features.amax((2, 3))), 1),
    }[pool]
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)


def test_the_papers_pool_sees_the_top_left_windows_only():
    model = make("pcdeq1_mc_relu6_cifar")
    features = model.forward_features(images("pcdeq1_mc_relu6_cifar"))
    assert features.shape[2:] == (7, 7)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, :, :4, :4].mean((2, 3)))


@every_size
def test_other_input_channels(name: str):
    for channels in (1, 3, 4):
        x = torch.randn(2, channels, *VARIANTS[name].dataset.input_size[1:])
        assert timm.create_model(name, in_chans=channels)(x).shape == (2, 10)


@every_size
def test_features(name: str):
    model, x = make(name), images(name)
    state = model.state_dict()
    final, taps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert len(taps) == len(model.feature_info) == 3
    for tap, info in zip(taps, model.feature_info, strict=True):
        assert tap.shape[1] == info["num_chs"]
        size = x.shape[-1] / info["reduction"]
        assert size / 2 <= tap.shape[-1] <= size
    for graph in (False, True):
        extractor = timm.create_model(name, features_only=True, **({"feature_cls": FeatureGraphNet} if graph else {}))
        extractor.eval().load_state_dict(
            dict(zip(extractor.state_dict(), (state[k] for k in state if "head" not in k), strict=True))
        )
        for a, b in zip(extractor(x), taps, strict=True):
            torch.testing.assert_close(a, b)
    assert [t.shape for t in model.forward_intermediates(x, [0, 2], intermediates_only=True)] == [
        taps[0].shape,
        taps[2].shape,
    ]
    (first,) = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
    assert torch.equal(first, taps[0])
    with pytest.raises(ValueError, match="output_fmt must be NCHW, got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_features_of_another_number_of_stages():
    extractor = timm.create_model("pcdeq1_mc_relu6_cifar", features_only=True, channels=(8, 16))
    assert [tap.shape[1:] for tap in extractor(torch.rand(1, 3, 32, 32))] == [(8, 32, 32), (16, 15, 15)]


def test_pretrained_features_of_another_size():
    name = "pcdeq1_mc_relu6_cifar"
    extractor = timm.create_model(name, pretrained=True, features_only=True, img_size=64).eval()
    model, x = timm.create_model(name, pretrained=True).eval(), torch.rand(2, 3, 32, 32)
    taps = timm.create_model(name, pretrained=True, features_only=True).eval()(x)
    for mine, tap in zip(taps, model.forward_intermediates(x, intermediates_only=True), strict=True):
        assert torch.equal(mine, tap)
    assert [tap.shape[1:] for tap in extractor(torch.rand(1, 3, 64, 64))] == [(20, 64, 64), (50, 31, 31), (80, 15, 15)]


@pytest.mark.parametrize("name", SOME[1:])
def test_features_are_in_channels_last(name: str):
    """Those of images of one channel, too, which `contiguous` leaves in the other order."""
    model = make(name)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    seen: list[bool] = []
    for norm in norms:
        norm.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
    model(images(name))
    assert seen == [True] * len(norms)


@some_models
def test_pruning(name: str):
    model, x = make(name), images(name)
    taps = model.forward_intermediates(x, intermediates_only=True)
    whole = copy.deepcopy(model)
    assert whole.prune_intermediate_layers([2], prune_head=False) == [2]
    assert torch.equal(whole(x), model(x))
    for index, tap in enumerate(taps):
        short = copy.deepcopy(model)
        assert short.prune_intermediate_layers([index]) == [index]
        assert torch.equal(short(x), tap)
        assert short(x).shape[1] == short.num_features == short.head_hidden_size
        short(x).sum().backward()
        assert all(p.grad is not None for p in short.parameters())
    last = copy.deepcopy(model)
    assert last.prune_intermediate_layers(1) == [2]


@some_models
def test_gradient_checkpointing_changes_nothing(name: str):
    model, x = make(name), images(name)
    model.requires_grad_()
    plain = model(x)
    wanted = torch.autograd.grad(plain.sum(), model.parameters())
    model.set_grad_checkpointing()
    again = model(x)
    torch.testing.assert_close(plain, again)
    for a, b in zip(torch.autograd.grad(again.sum(), model.parameters()), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every_size
def test_group_matcher_groups_every_parameter_in_order(name: str):
    model = timm.create_model(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse), reverse=False)
        assert sorted(itertools.chain(*groups.values())) == sorted(n for n, _ in model.named_parameters())
        assert len(groups) > 1
        assert next(iter(groups.values()))[0] == "features.conv1.weight"


@every_size
def test_meta_device(name: str):
    model = timm.create_model(name, device="meta")
    assert all(t.is_meta for t in itertools.chain(model.parameters(), model.buffers()))
    assert model(images(name).to("meta")).shape == (2, 10)


@some_models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_at_construction_and_after(name: str, dtype: torch.dtype):
    for model in (timm.create_model(name, dtype=dtype), timm.create_model(name).to(dtype)):
        assert all(t.dtype == dtype for t in model.state_dict().values() if t.is_floating_point())
        y = model.train()(images(name).to(dtype))
        y.sum().backward()
        assert y.dtype == dtype
        assert all(p.grad.isfinite().all() for p in model.parameters())


@some_models
def test_scripting(name: str):
    model, x = make(name, scriptable=True, tol=1e-5, stop="estimated"), images(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch announces the end of TorchScript
        warnings.simplefilter("ignore", FutureWarning)
        scripted = torch.jit.script(model)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), model(x), rtol=1e-3, atol=1e-4)


@some_models
def test_scripted_gradient(name: str):
    model, x = make(name, scriptable=True, tol=1e-6, stop="estimated"), images(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        scripted = torch.jit.script(model)
    wanted = torch.autograd.grad(model(x).sum(), model.parameters())
    for a, b in zip(torch.autograd.grad(scripted(x).sum(), scripted.parameters()), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@some_models
def test_deepcopy_and_ema(name: str):
    model, x = make(name), images(name)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    clone = copy.deepcopy(model)  # after a forward
    clone.solver.tol = 0.1
    assert model.solver.tol == 3e-4
    assert all(layer.solver is clone.solver for layer in clone.modules() if hasattr(layer, "solver"))
    for p in model.parameters():  # as an update without an optimizer may leave them
        p.data -= 0.4
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ema = ModelEmaV3(model, decay=0.9)
    for p in model.parameters():
        p.data += 1.0
    ema.update(model)
    for key, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, before[key].lerp(model.state_dict()[key], 0.1))
    assert ema.module(x).isfinite().all()


@some_models
def test_a_sample_does_not_depend_on_its_batch(name: str):
    model, x = make(name), images(name, 64)
    with torch.no_grad():
        together = model(x)
        torch.testing.assert_close(model(x[:1]), together[:1], rtol=1e-3, atol=1e-4)
        mates = x.clone()
        mates[1:] *= 100
        assert torch.equal(model(mates)[0], together[0])


def test_settings_of_the_solver_reach_every_layer():
    model = make("pcdeq1_mc_tanh_cifar", tol=1e-3, max_evals=50, on_failure="raise")
    layers = [m for m in model.modules() if isinstance(m, PcDEQConv2d)]
    assert len(layers) == 3
    assert all((m.solver.tol, m.solver.max_evals, m.solver.on_failure) == (1e-3, 50, "raise") for m in layers)


@pytest.mark.parametrize("name", ["pcdeq1_l_tanh_mnist", "pcdeq1_mc_tanh_cifar"])
def test_timms_transform_is_ours(name: str):
    from PIL import Image

    dataset = VARIANTS[name].dataset
    pixels = torch.randint(0, 256, (1, *dataset.input_size), dtype=torch.uint8)
    array = pixels[0].permute(1, 2, 0).numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    transform = create_transform(**resolve_data_config(model=timm.create_model(name)))
    torch.testing.assert_close(transform(image)[None], normalize(pixels, dataset), rtol=1e-6, atol=1e-6)


class TestBadInput:
    """One line that says what was got and what was wanted."""

    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (torch.rand(2, 1, 32, 32), ValueError, r"\[2, 1, 32, 32\].* this model takes \(N, 1, 28, 28\)"),
            (torch.rand(2, 3, 28, 28), ValueError, r"\[2, 3, 28, 28\].* this model takes \(N, 1, 28, 28\)"),
            (torch.rand(1, 28, 28), ValueError, r"\[1, 28, 28\].* this model takes \(N, 1, 28, 28\)"),
            (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), TypeError, "got torch.uint8 images, .*floating point"),
            (torch.full((2, 1, 28, 28), torch.nan), ValueError, "NaN or infinite pixels"),
            (torch.full((2, 1, 28, 28), torch.inf), ValueError, "NaN or infinite pixels"),
        ],
    )
    @pytest.mark.parametrize("name", ["pcdeq1_l_tanh_mnist", "pcdeq1_sc_tanh_mnist", "pcdeq1_mc_tanh_mnist"])
    def test_images(self, name, x, error, message):
        with pytest.raises(error, match=message) as caught:
            timm.create_model(name)(x)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"num_classes": -2}, ValueError, "num_classes must be 0 .* or more, got -2"),
            ({"in_chans": 0}, ValueError, "in_chans must be at least 1, got 0"),
            ({"activation": "gelu"}, ValueError, "activation must be one of .*, got 'gelu'"),
            ({"global_pool": "median"}, ValueError, "global_pool must be one of .*, got 'median'"),
            ({"structure": "xl"}, ValueError, "structure must be one of l, sc, mc, got 'xl'"),
            ({"channels": ()}, ValueError, r"structure 'mc' takes some width, got \(\)"),
            ({"img_size": 4}, ValueError, "images of 4x4 are too small for 3 stages"),
            ({"img_size": 12}, ValueError, "averages 4x4 windows, but the features are 2x2"),
            ({"tol": 0}, ValueError, "tol must be above 0 and finite, got 0.0"),
            ({"nonsense": 1}, TypeError, "unexpected keyword argument 'nonsense'"),
        ],
    )
    def test_arguments(self, kwargs, error, message):
        with pytest.raises(error, match=message):
            timm.create_model("pcdeq1_mc_tanh_mnist", **kwargs)

    def test_tag(self):
        with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
            timm.create_model("pcdeq1_l_tanh_mnist.imagenet", pretrained=True)


def test_other_sizes_and_widths_build():
    model = timm.create_model("pcdeq1_mc_tanh_cifar", img_size=(48, 40), channels=(8, 16), num_classes=3)
    assert model(torch.randn(2, 3, 48, 40)).shape == (2, 3)
    assert DATASETS["cifar"].input_size == (3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_finite_images_whose_sum_overflows_are_finite(dtype: torch.dtype):
    images = torch.full((2, 1, 28, 28), torch.finfo(dtype).max, dtype=dtype)
    assert not images.sum().isfinite()
    check_images(images, 1, (28, 28))
    images[1, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite pixels"):
        check_images(images, 1, (28, 28))
