"""Nets for other tools: TorchScript, torch.export, ONNX, torch.compile, torch.fx; and what refuses them in one line."""

import warnings

import pytest
import timm
import torch
from test_models import SOME, images, make, some_models
from torch import nn
from torch.fx.experimental.optimization import fuse
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from pcdeq_zoo import PcDEQ, PcDEQConv2d, PcDEQLinear
from pcdeq_zoo.data import normalize
from pcdeq_zoo.weights import checkpoints


class TestExport:
    """`exportable=True`: one graph with a loop that ends early, for any batch size."""

    @pytest.fixture(autouse=True)
    def _compile_afresh(self) -> None:
        torch._dynamo.reset()

    def pair(self, name: str) -> tuple[PcDEQ, PcDEQ]:
        """The same weights, for export and solved as usual."""
        model = make(name, exportable=True, tol=1e-4)
        usual = make(name, stop="residual", tol=1e-6)
        usual.load_state_dict(model.state_dict())
        return model, usual

    @some_models
    def test_torch_export_keeps_the_batch_dynamic(self, name: str):
        model, usual = self.pair(name)
        batch = torch.export.Dim("batch", min=1, max=1024)
        with torch.no_grad():
            program = torch.export.export(model, (images(name, 2),), dynamic_shapes=({0: batch},))
        for n in (1, 64):
            x = images(name, n)
            with torch.no_grad():
                torch.testing.assert_close(program.module()(x), usual(x), rtol=1e-3, atol=1e-3)

    @pytest.mark.skipif(
        torch.__version__ < (2, 11), reason="the ONNX exporter takes such loops in PyTorch 2.11, and not in 2.8"
    )
    def test_onnx_runs_in_onnxruntime(self, tmp_path):
        onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[onnx]'")
        name = "pcdeq1_mc_relu6_mnist"
        model, usual = self.pair(name)
        batch = torch.export.Dim("batch", min=1, max=1024)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter's own dependencies
            program = torch.onnx.export(
                model, (images(name),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
            )
        program.save(tmp_path / "model.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
        for n in (1, 64):
            x = images(name, n)
            (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(y), usual(x), rtol=1e-3, atol=1e-3)

    def test_compiles_without_graph_breaks(self):
        name = "pcdeq1_mc_tanh_mnist"
        model, usual = self.pair(name)
        x = images(name, 4)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the compiler
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), usual(x), rtol=1e-3, atol=1e-3)

    def test_a_layer_of_your_own_net_compiles_without_graph_breaks(self):
        with timm.layers.set_exportable(True):
            net = nn.Sequential(nn.Linear(4, 5), PcDEQLinear(5, "tanh"))
        x = torch.rand(3, 4)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            compiled = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
            net[1].exportable = False
            torch.testing.assert_close(compiled, net(x), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("dynamic", [None, True])
    def test_compiled_nets_take_another_batch_and_another_tolerance(self, dynamic: bool | None):
        model, usual = self.pair("pcdeq1_l_tanh_mnist")
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            for n, tol in ((4, 1e-4), (8, 1e-4), (3, 1e-3), (5, 1e-2)):
                model.solver.tol = tol
                x = images("pcdeq1_l_tanh_mnist", n)
                torch.testing.assert_close(compiled(x), usual(x), rtol=1e-3, atol=1e-3)

    def test_compiled_training(self):
        model, usual = (net.train() for net in self.pair("pcdeq1_l_tanh_mnist"))
        x = images("pcdeq1_l_tanh_mnist", 8)
        if torch.__version__ < (2, 7):
            with pytest.raises(Exception, match=r"refuse_gradient_of_a_loop|under torch.no_grad\(\) only"):
                torch.compile(model, fullgraph=True, backend="aot_eager")(x)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
        usual(x).square().sum().backward()
        for (name, ours), theirs in zip(model.named_parameters(), usual.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0.02, atol=1e-4, msg=name)

    def test_compiling_the_usual_model_works_around_the_solver(self):
        name = "pcdeq1_mc_tanh_mnist"
        model, x = make(name), images(name, 4)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x), rtol=1e-4, atol=1e-5)


QUICK = ("pcdeq1_l_tanh_mnist.paper", "pcdeq1_mc_tanh_mnist.zoo", "pcdeq1_mc_relu6_cifar.zoo")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in checkpoints()]
)
@pytest.mark.parametrize("tol", [1e-3, pytest.param(1e-4, marks=pytest.mark.slow)])
def test_an_exported_net_is_as_good_as_a_certified_one(name: str, tol: float, sample):
    """Within a factor of three, of the distance from the exact logits."""
    dataset = checkpoints()[name].variant.dataset
    x = normalize(sample[0][:16], dataset) if dataset.name == "mnist" else torch.randn(16, *dataset.input_size)
    certified, exportable, exact = (
        timm.create_model(name, pretrained=True, **settings).eval()
        for settings in (
            {"tol": tol, "stop": "certified"},
            {"tol": tol, "exportable": True},
            {"stop": "residual", "tol": 1e-10},
        )
    )
    with torch.no_grad():
        program = torch.export.export(exportable, (x,)).module()
        wanted = exact.double()(x.double())
        ours, theirs = ((net(x) - wanted).abs().max().item() for net in (program, certified))
    assert ours <= 3 * theirs


def test_scripted_nets_are_as_good_too(sample):
    x = sample[0][:16].float() / 255
    settings = ({"scriptable": True}, {"stop": "certified"}, {"stop": "residual", "tol": 1e-10})
    nets = [timm.create_model("pcdeq1_mc_tanh_mnist", pretrained=True, **kwargs).eval() for kwargs in settings]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript
        wanted = nets[2].double()(x.double())
        ours, theirs = ((net(x) - wanted).abs().max().item() for net in (torch.jit.script(nets[0]), nets[1]))
    assert ours <= 3 * theirs


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_a_tolerance_out_of_reach_ends_at_rounding(dtype: torch.dtype, error: float, sample):
    """And well before the last of its evaluations."""
    name, x = "pcdeq1_mc_relu6_mnist", sample[0][:16].to(dtype) / 255
    settings = ({"scriptable": True, "tol": 1e-14, "max_evals": 60}, {"stop": "residual", "tol": 1e-13})
    model, exact = (timm.create_model(name, pretrained=True, **kwargs).eval() for kwargs in settings)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        logits = torch.jit.script(model.to(dtype))(x)  # would warn if it did not converge
        torch.testing.assert_close(logits.double(), exact.double()(x.double()), rtol=error, atol=error)


@some_models
def test_tracing_is_refused(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NotImplementedError, match=r"use torch\.export, torch\.onnx\.export\(dynamo=True\) or"):
            torch.jit.trace(make(name), (images(name),))


class TestFx:
    """Any tracer takes the layers as they are, without leaf modules to be named."""

    @some_models
    def test_symbolic_trace(self, name: str):
        model, x = make(name), images(name)
        graph = torch.fx.symbolic_trace(model)
        assert torch.equal(graph(x), model(x))
        assert sum(node.op == "call_module" and "deq" in str(node.target) for node in graph.graph.nodes) == sum(
            isinstance(layer, PcDEQLinear | PcDEQConv2d) for layer in model.modules()
        )
        with pytest.raises(ValueError, match="this model takes"):
            graph(torch.rand(2, 5, 8, 8))
        with pytest.raises(TypeError, match="trace a model that holds it"):
            torch.fx.symbolic_trace(PcDEQLinear(3))

    @some_models
    def test_feature_extractor_of_torchvision(self, name: str):
        model, x = make(name), images(name)
        _, nodes = get_graph_node_names(model)
        assert "features.deq1" in nodes
        found = create_feature_extractor(model, ["features.deq1", "head.fc"])(x)
        x = x.clone(memory_format=torch.channels_last)
        assert torch.equal(found["features.deq1"], model.features[:3](x))
        assert torch.equal(found["head.fc"], model(x))

    def test_fusion_of_batch_norm(self):
        model, x = make("pcdeq1_mc_relu6_mnist"), images("pcdeq1_mc_relu6_mnist")
        fused = fuse(model)
        assert sum(isinstance(module, nn.BatchNorm2d) for module in fused.modules()) < 6
        torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-3)


def test_nothing_listens_to_sigma():
    """A module that is never called would let rules that hook activations be wrong in silence."""
    for name in SOME:
        kinds = {type(module) for module in make(name).modules()}
        assert not kinds & {nn.ReLU6, nn.Tanh, nn.Softsign, nn.Sigmoid}
