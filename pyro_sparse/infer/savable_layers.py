"""Common layers of torch that a bundle may hold, registered on import: sizes come from tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pyro_sparse.infer.bundle import register_savable


def _sequential(layers: dict[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _linear(weight: Tensor, bias: bool) -> nn.Linear:
    outputs, inputs = weight.shape
    return nn.Linear(inputs, outputs, bias=bias, dtype=weight.dtype)


def _convolution(cls: type, *, transposed: bool) -> Callable[..., Any]:
    def build(weight: Tensor, groups: int, **settings: Any) -> Any:
        first, second, *kernel = weight.shape
        if type(groups) is not int or not 1 <= groups <= max(first, 1):
            raise ValueError(f"Expected 1 to {first} groups, got {groups!r}.")
        inputs, outputs = (first, second * groups) if transposed else (second * groups, first)
        sizes = {"kernel_size": tuple(kernel), "groups": groups, "dtype": weight.dtype}
        return cls(inputs, outputs, **sizes, **settings)

    return build


def _norm(cls: type) -> Callable[..., Any]:
    def build(like: Tensor | None, num_features: int, **settings: Any) -> Any:
        if like is None:  # nothing is allocated then
            return cls(num_features, affine=False, track_running_stats=False, **settings)
        return cls(len(like), dtype=like.dtype, **settings)

    return build


def _norm_arguments(norm: Any) -> dict[str, Any]:
    like = norm.weight if norm.affine else norm.running_mean
    settings = {"eps": norm.eps, "momentum": norm.momentum}
    if like is not None:
        settings |= {"affine": norm.affine, "track_running_stats": norm.track_running_stats}
        like = like.detach()
    return {"like": like, "num_features": norm.num_features, **settings}


def _group_norm(weight: Tensor | None, num_groups: int, num_channels: int, **settings: Any) -> Any:
    if type(num_groups) is not int or num_groups < 1:
        raise ValueError(f"Expected num_groups >= 1, got {num_groups!r}.")
    if weight is None:  # nothing is allocated then
        return nn.GroupNorm(num_groups, num_channels, affine=False, eps=settings["eps"])
    return nn.GroupNorm(num_groups, len(weight), dtype=weight.dtype, **settings)


def _layer_norm(
    weight: Tensor | None, normalized_shape: tuple[int, ...], **settings: Any
) -> nn.LayerNorm:
    if weight is None:
        return nn.LayerNorm(normalized_shape, elementwise_affine=False, eps=settings["eps"])
    return nn.LayerNorm(weight.shape, dtype=weight.dtype, **settings)


def _affine(layer: Any) -> dict[str, Any]:
    weight = None if layer.weight is None else layer.weight.detach()
    return {"weight": weight, "bias": layer.bias is not None, "eps": layer.eps}


def _register_all() -> None:
    def listed(*names: str) -> Callable[[Any], dict[str, Any]]:
        return lambda layer: {name: getattr(layer, name) for name in names}

    def register(cls: Any, arguments: Any, build: Any = None) -> None:
        name = f"torch.nn.{cls.__name__}"
        register_savable(cls, name=name, arguments=arguments, build=build)

    register(
        nn.Sequential,
        lambda network: {"layers": dict(network._modules)},
        _sequential,
    )
    register(
        nn.Linear,
        lambda layer: {"weight": layer.weight.detach(), "bias": layer.bias is not None},
        _linear,
    )
    settings = listed("stride", "padding", "dilation", "groups", "padding_mode")
    for cls in (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d):
        transposed = cls in (nn.ConvTranspose1d, nn.ConvTranspose2d)
        more = listed("output_padding") if transposed else listed()
        register(
            cls,
            lambda layer, more=more: {
                "weight": layer.weight.detach(),
                "bias": layer.bias is not None,
                **settings(layer),
                **more(layer),
            },
            _convolution(cls, transposed=transposed),
        )
    for norm in (nn.BatchNorm1d, nn.BatchNorm2d):
        register(norm, _norm_arguments, _norm(norm))
    register(
        nn.GroupNorm,
        lambda norm: {
            "num_groups": norm.num_groups,
            "num_channels": norm.num_channels,
            **_affine(norm),
        },
        _group_norm,
    )
    register(
        nn.LayerNorm,
        lambda norm: {"normalized_shape": norm.normalized_shape, **_affine(norm)},
        _layer_norm,
    )
    plain: dict[Any, tuple[str, ...]] = {
        nn.Dropout: ("p", "inplace"),
        nn.ELU: ("alpha", "inplace"),
        nn.Flatten: ("start_dim", "end_dim"),
        nn.GELU: ("approximate",),
        nn.Identity: (),
        nn.LeakyReLU: ("negative_slope", "inplace"),
        nn.ReLU: ("inplace",),
        nn.Sigmoid: (),
        nn.SiLU: ("inplace",),
        nn.Softplus: ("beta", "threshold"),
        nn.Tanh: (),
        nn.Unflatten: ("dim", "unflattened_size"),
    }
    for cls, names in plain.items():
        register(cls, listed(*names))


_register_all()
