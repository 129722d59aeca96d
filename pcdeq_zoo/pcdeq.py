"""pcDEQ: positive concave deep equilibrium models.

Paper: `Positive Concave Deep Equilibrium Models` (Gabor, Piotrowski, Cavalcante, ICML 2024) -
https://arxiv.org/abs/2402.04029. The architectures are those of Appendix B; checkpoints saved by the authors' code
(https://github.com/mateuszgabor/pcdeq) load as they are.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d, get_device_dtype, to_2tuple
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from pcdeq_zoo.layers import PcDEQConv2d, PcDEQLinear
from pcdeq_zoo.pooling import CompactMaxPool2d
from pcdeq_zoo.solution import OnFailure
from pcdeq_zoo.solver import Solver, Stop
from pcdeq_zoo.state_dict import WeightsError, check_state_dict, translated
from pcdeq_zoo.transforms import transformed
from pcdeq_zoo.variants import VARIANTS, Variant
from pcdeq_zoo.weights import Checkpoint, check_config, checkpoints, verified_file

__all__ = ["PcDEQ"]

# Window of the paper's average pool, by structure. Windows do not overlap, and what does not fill one is dropped: of
# the 7 x 7 positions that MC has at the end, the pool sees the first 4 x 4.
_POOL_WINDOWS = {"l": 1, "sc": 8, "mc": 4}

_POOL_TYPES = ("paper", "avg", "max", "avgmax", "catavgmax", "")


def check_images(x: Tensor, in_chans: int, img_size: tuple[int, int]) -> None:
    """Raise one line that says what is wrong with a batch of images, if anything is."""
    height, width = img_size
    if x.ndim != 4 or x.shape[1] != in_chans or x.shape[2] != height or x.shape[3] != width:
        raise ValueError(f"got images of shape {x.shape}, this model takes (N, {in_chans}, {height}, {width})")
    if not x.is_floating_point():
        raise TypeError(f"got {x.dtype} images, this model takes floating point: scale to [0, 1], then mean and std")
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_meta:
        return  # a graph cannot look at its data
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript takes it nested only
        if transformed():
            return  # nor can torch.func.vmap
    # The sum of finite pixels may overflow, but is ten times faster than to look at each.
    if not math.isfinite(x.sum().item()) and not bool(x.isfinite().all()):
        raise ValueError("got images with NaN or infinite pixels, this model takes finite ones")


torch.fx.wrap("check_images")  # raises on what it sees, so it must be one node of a graph


def in_channels_last(images: Tensor) -> Tensor:
    """Images (N, C, H, W) in the memory order in which convolutions and pools are several times faster.

    A copy: `contiguous` leaves images of one channel, which pass for ordered in any way, and all that follows them, as
    they are.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript takes it nested only
        if transformed():
            return images  # torch.func.vmap knows no memory orders
    return images.clone(memory_format=torch.channels_last)


class PcDEQHead(nn.Module):
    """Pool, dropout and classifier. Without a pool the classifier is a 1x1 convolution, and all outputs are 4-D."""

    def __init__(
        self,
        in_features: int,
        input_size: tuple[int, int],
        window: int,
        num_classes: int,
        pool_type: str,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.input_size = input_size
        self.window = window
        self.drop = nn.Dropout(drop_rate)
        self.pool_type = pool_type
        self.reset(num_classes, pool_type, device=device, dtype=dtype)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """New classifier, and a new pool if `pool_type` is given; see `PcDEQ` for the names."""
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
        self.pool_type = self.pool_type if pool_type is None else pool_type
        if self.pool_type not in _POOL_TYPES:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, _POOL_TYPES))}, got {self.pool_type!r}")
        if self.pool_type == "paper":
            cells = (self.input_size[0] // self.window) * (self.input_size[1] // self.window)
            if cells == 0:
                raise ValueError(
                    f"global_pool='paper' averages {self.window}x{self.window} windows, but the features are "
                    f"{self.input_size[0]}x{self.input_size[1]}; use larger images or global_pool='avg'"
                )
            self.num_features = self.in_features * cells
            self.pool: nn.Module = nn.Sequential(nn.AvgPool2d(self.window), nn.Flatten(1))
        else:
            self.pool = SelectAdaptivePool2d(pool_type=self.pool_type, flatten=bool(self.pool_type))
            self.num_features = self.in_features * self.pool.feat_mult()
        classifier = nn.Linear if self.pool_type else partial(nn.Conv2d, kernel_size=1)
        self.fc = (
            classifier(self.num_features, num_classes, device=device, dtype=dtype) if num_classes else nn.Identity()
        )
        self.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.pool(x))
        return x if pre_logits else self.fc(x)


class PcDEQ(nn.Module):
    """A pcDEQ image classifier: stages of convolution, BatchNorm, pcDEQ layer, max pool and BatchNorm (Appendix B).

    Args:
        structure: "l": one dense stage on the flattened image, "sc": one convolutional stage, "mc": several, each
            after the first halving the image.
        activation: Of the pcDEQ layers: "relu6", "tanh", "softsign" (pcDEQ-1) or "sigmoid" (pcDEQ-2).
        channels: Width of each stage.
        num_classes: Classes, 0 for no classifier.
        in_chans: Channels of the images.
        img_size: Height and width of the images; other sizes are refused.
        global_pool: "paper": average of 8x8 ("sc") or 4x4 ("mc") windows, dropping what does not fill one. "avg",
            "max", "avgmax", "catavgmax": over all positions. "": none.
        drop_rate: Dropout before the classifier.
        tol, max_evals, stop, on_failure: Settings of the solves, see `Solver`; later through `model.solver`.
        device, dtype: Of parameters and buffers.

    Raises:
        ValueError: An argument outside these.
    """

    __jit_unused_properties__ = ("solver",)

    def __init__(
        self,
        structure: str = "mc",
        activation: str = "relu6",
        channels: tuple[int, ...] = (20, 50, 80),
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = (32, 32),
        global_pool: str = "paper",
        drop_rate: float = 0.0,
        tol: float | None = None,
        max_evals: int = 200,
        stop: Stop = "estimated",
        on_failure: OnFailure = "warn",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if structure not in _POOL_WINDOWS:
            raise ValueError(f"structure must be one of {', '.join(_POOL_WINDOWS)}, got {structure!r}")
        if not channels or (structure != "mc" and len(channels) != 1):
            raise ValueError(
                f"structure {structure!r} takes {'some' if structure == 'mc' else 'one'} width, got {channels}"
            )
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans}")
        height, width = to_2tuple(img_size)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = (int(height), int(width))
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self._solver = Solver(tol, max_evals, stop, on_failure)

        layers: OrderedDict[str, nn.Module] = OrderedDict()
        feature_info: list[dict[str, Any]] = []
        size, reduction, width_in = self.img_size, 1, in_chans
        for stage, width_out in enumerate(channels, start=1):
            if structure == "l":
                # A dense layer on the flattened image, as a convolution: timm can then adapt it to other in_chans.
                conv = nn.Conv2d(width_in, width_out, size, device=device, dtype=dtype)
                size, reduction = (1, 1), max(size)
            elif stage == 1:
                conv = nn.Conv2d(width_in, width_out, 3, padding=1, device=device, dtype=dtype)
            else:
                conv = nn.Conv2d(width_in, width_out, 3, stride=2, device=device, dtype=dtype)
                size, reduction = ((size[0] - 1) // 2, (size[1] - 1) // 2), reduction * 2
            if min(size) < 1:
                raise ValueError(f"images of {height}x{width} are too small for {len(channels)} stages")
            deq = PcDEQLinear if structure == "l" else PcDEQConv2d
            layers[f"conv{stage}"] = conv
            layers[f"prenorm{stage}"] = nn.BatchNorm2d(width_out, device=device, dtype=dtype)
            layers[f"deq{stage}"] = deq(width_out, activation, solver=self._solver, device=device, dtype=dtype)
            if structure != "l":
                layers[f"pool{stage}"] = CompactMaxPool2d()
            layers[f"postnorm{stage}"] = nn.BatchNorm2d(width_out, device=device, dtype=dtype)
            # A feature per stage; nets of one stage offer the steps within it.
            for tap in ("postnorm",) if structure == "mc" else ("conv", "deq", "postnorm"):
                module = f"features.{tap}{stage}"
                feature_info.append({"num_chs": width_out, "reduction": reduction, "module": module, "size": size})
            width_in = width_out
        self.features = nn.Sequential(layers)
        self.feature_info = feature_info
        self._stage_length = len(layers) // len(channels)
        self.num_features = width_in
        self.head = PcDEQHead(
            width_in, size, _POOL_WINDOWS[structure], num_classes, global_pool, drop_rate, device=device, dtype=dtype
        )
        self.head_hidden_size = self.head.num_features

    @property
    def solver(self) -> Solver:
        """Settings of the solves, shared by all layers; another one may be assigned."""
        return self._solver

    @solver.setter
    def solver(self, solver: Solver) -> None:
        if not isinstance(solver, Solver):
            raise TypeError(f"solver must be a Solver, got {solver!r}")
        self._solver = solver
        for layer in self.modules():
            if isinstance(layer, PcDEQLinear | PcDEQConv2d):
                layer.solver = solver

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates: the stem, then layer by layer (coarse: stage by stage)."""
        stages = r"^features\.[a-z]+(\d+)"
        layers = [(rf"^features\.{name}(\d+)", (order,)) for order, name in enumerate(("conv", "prenorm", "deq"))]
        return {
            "stem": r"^features\.(?:conv|prenorm)1\.",
            "blocks": stages if coarse else [*layers, (r"^features\.postnorm(\d+)", (3,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep one tensor per stage instead of all activations, and compute the stage again in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifier for `num_classes` (0: none); `global_pool` as in the constructor, None keeps it."""
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self.num_classes = num_classes
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features at the taps of `feature_info`, and the final ones.

        Args:
            x: Images (N, C, H, W).
            indices: Taps: the last n if an int, all if None.
            norm: Without effect, the taps are normalised already.
            stop_early: Stop after the last tap that is asked for.
            output_fmt: "NCHW".
            intermediates_only: Return the taps only.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt!r}")
        check_images(x, self.in_chans, self.img_size)
        x = in_channels_last(x)
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        taps = {info["module"].removeprefix("features."): i for i, info in enumerate(self.feature_info)}
        intermediates = []
        for name, layer in self.features.named_children():
            x = layer(x)
            tap = taps.get(name)
            if tap in wanted:
                intermediates.append(x)
            if stop_early and tap == last:
                break
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers after the last tap that is asked for; returns the taps as indices from the front."""
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        info = self.feature_info[last]
        names = list(dict(self.features.named_children()))
        end = names.index(info["module"].removeprefix("features.")) + 1
        if prune_head or end < len(names):
            self.features = self.features[:end]
            self.num_features = self.head.in_features = info["num_chs"]
            self.head.input_size = info["size"]
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """Features (N, num_features, H', W') of images (N, C, H, W), before the pool."""
        check_images(x, self.in_chans, self.img_size)
        x = in_channels_last(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.features, x, every=self._stage_length)
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (N, num_classes) of features, or with `pre_logits` what the classifier sees, (N, head_hidden_size)."""
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module, by any of the names that `translated` knows.

        Raises:
            WeightsError: Tensors that this net cannot have; one line, and nothing is loaded.
        """
        own = self.state_dict()
        state_dict = translated(state_dict, own)
        check_state_dict(state_dict, own, strict)
        return super().load_state_dict(state_dict, strict, assign)


def _without(state_dict: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in state_dict.items() if name not in names}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Pretrained weights under this module's names; refused unless they fit but for `num_classes` and `in_chans`."""
    config: Any = getattr(model, "pretrained_cfg", {})
    wanted = model.state_dict()
    state_dict = translated(state_dict, wanted)
    classifier = state_dict.get("head.fc.weight")
    classes = len(classifier) if isinstance(classifier, Tensor) and classifier.ndim else 0
    if classes != config["num_classes"]:
        # timm would drop a classifier that is not of as many classes as the config says, and leave a random one.
        raise WeightsError(
            f"these weights have {classes} classes, and their config says {config['num_classes']}; for a file of your "
            f"own say pretrained_cfg_overlay=dict(file=..., num_classes={classes})"
        )
    channels = config["input_size"][0]
    if (stem := wanted.get("features.conv1.weight")) is not None:  # timm adapts the input channels
        wanted["features.conv1.weight"] = stem[:, :1].expand(-1, channels, -1, -1)
    head = {name for name in {*wanted, *state_dict} if name.startswith("head.")}
    check_state_dict(_without(state_dict, head), _without(wanted, head))
    if classifier is not None and classes == model.num_classes:
        theirs, ours = (weight.shape[1:].numel() for weight in (classifier, wanted["head.fc.weight"]))
        if theirs != ours:
            raise WeightsError(
                f"the classifier of these weights takes {theirs} features, and this net has {ours}: keep img_size and "
                'global_pool, or try global_pool="avg", or create it with num_classes=0 and reset_classifier(...)'
            )
        check_state_dict(state_dict, wanted)
    return state_dict


def _cfg(variant: Variant, checkpoint: Checkpoint | None) -> dict[str, Any]:
    channels, height, width = variant.dataset.input_size
    pool_size = {"l": (1, 1), "sc": (height, width), "mc": (height // 4 - 1, width // 4 - 1)}[variant.structure]
    return {
        "file": checkpoint and str(checkpoint.file),
        "hf_hub_id": checkpoint and checkpoint.hub_id,
        "hf_hub_filename": checkpoint and "model.safetensors",
        "input_size": (channels, height, width),
        "fixed_input_size": True,
        "pool_size": pool_size,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": variant.dataset.mean,
        "std": variant.dataset.std,
        "num_classes": len(variant.dataset.classes),
        "label_names": variant.dataset.classes,
        "first_conv": "features.conv1",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "description": f"{variant.paper_name} for {variant.dataset.title}",
        "origin_url": "https://github.com/mateuszgabor/pcdeq",
        "paper_name": "Positive Concave Deep Equilibrium Models",
        "paper_ids": "arXiv:2402.04029",
    }


def _default_cfgs() -> dict[str, Any]:
    """A config for each checkpoint in the package, and one without weights for each model that has none."""
    shipped = checkpoints().values()
    cfgs = {
        checkpoint.name: _cfg(checkpoint.variant, checkpoint)
        # timm's default is the first of a model.
        for checkpoint in sorted(shipped, key=lambda it: it.tag != it.variant.default_recipe)
    }
    for variant in VARIANTS.values():
        if not any(checkpoint.variant is variant for checkpoint in shipped):
            cfgs[f"{variant.name}.{variant.default_recipe}"] = _cfg(variant, None)
    return cfgs


default_cfgs = generate_default_cfgs(_default_cfgs())


def _create_pcdeq(variant: Variant, pretrained: bool = False, **kwargs: Any) -> PcDEQ:
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    try:
        cfg = resolve_pretrained_cfg(variant.name, kwargs.get("pretrained_cfg"), overlay)
    except TypeError as error:  # a key that timm does not know
        raise WeightsError(f"the pretrained_cfg of these weights is none of timm's: {error}") from error
    file = verified_file(cfg, kwargs.get("cache_dir")) if pretrained else None
    check_config(variant, cfg, kwargs.get("pretrained_model_args") or {}, kwargs, pretrained)
    if pretrained:
        # What timm loads by. A config that comes with weights says nothing here: another classifier, or format, would
        # leave random tensors in the net.
        verified: dict[str, Any] = {"custom_load": False, "label_offset": None, "architecture": variant.name}
        verified |= {"classifier": "head.fc", "first_conv": "features.conv1"}
        if file:
            # This file, which was verified, wherever it came from, and nothing else.
            verified |= {"file": str(file), "source": None, "state_dict": None}
        kwargs["pretrained_cfg_overlay"] = {**overlay, **verified}
    if kwargs.get("features_only"):
        kwargs.setdefault("num_classes", 0)  # no classifier, whose weights would have to fit
    sizes = {"structure": variant.structure, "activation": variant.activation, "channels": variant.channels}
    arguments = {**sizes, **kwargs}
    taps = range(len(arguments["channels"] or ()) if arguments["structure"] == "mc" else 3)
    return build_model_with_cfg(
        PcDEQ,
        variant.name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(taps), "flatten_sequential": True},
        **arguments,
    )


def _entrypoint(variant: Variant) -> Callable[..., PcDEQ]:
    def create(pretrained: bool = False, **kwargs: Any) -> PcDEQ:
        return _create_pcdeq(variant, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = variant.name
    create.__doc__ = (
        f"{variant.paper_name} for {variant.dataset.title}: {variant.parameters:,} parameters, "
        f"{variant.paper_accuracy} % in the paper. Arguments as `timm.create_model` and `PcDEQ`."
    )
    return register_model(create)


globals().update({variant.name: _entrypoint(variant) for variant in VARIANTS.values()})
