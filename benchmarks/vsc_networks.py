"""The convolutional networks of `benchmarks.vsc`, flat at both ends."""

from __future__ import annotations

from torch import nn


def garments(atoms: int) -> tuple[nn.Module, nn.Module, int]:
    """The published decoder of 28x28 pictures, and the published encoder with fewer channels.

    The published encoder has 64, 64, 128 and 128 channels; with these the weights would not fit
    into 1 MB.
    """
    encoder = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *block(1, 12, 2, 1), *block(12, 12, 2, 1), *block(12, 24, 1, 0), *block(24, 24, 2, 0),
        nn.Flatten(),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Linear(atoms, 128), nn.Unflatten(1, (128, 1, 1)),
        *back(128, 128, 2, 0), *back(128, 64, 1, 0), *back(64, 64, 2, 1),
        nn.ReLU(), nn.ConvTranspose2d(64, 1, 4, 2, 1), nn.Sigmoid(), nn.Flatten(),
    )  # fmt: skip
    return encoder, decoder, 24


def celeba(atoms: int) -> tuple[nn.Module, nn.Module, int]:
    """The published pair for 64x64 colour pictures."""
    return squares(atoms, 3, (64, 64, 128, 256, 256), (256, 128, 128, 64, 64))


def faces(atoms: int) -> tuple[nn.Module, nn.Module, int]:
    """That pair for gray pictures, the decoder of half as many channels, the encoder of a fifth."""
    return squares(atoms, 1, (12, 12, 24, 48, 48), (128, 64, 64, 32, 32))


def squares(
    atoms: int, colours: int, down: tuple[int, ...], up: tuple[int, ...]
) -> tuple[nn.Module, nn.Module, int]:
    """Encoder and decoder of 64x64 pictures of these channels; last the encoder's outputs."""
    ins, outs = (colours, *down[:-1]), down
    encoder = nn.Sequential(nn.Unflatten(1, (colours, 64, 64)))
    for place, (before, after) in enumerate(zip(ins, outs, strict=True)):
        encoder.extend(block(before, after, 2, 0 if place == len(down) - 1 else 1))
    encoder.append(nn.Flatten())
    decoder = nn.Sequential(nn.Linear(atoms, 4 * up[0]), nn.Unflatten(1, (up[0], 2, 2)))
    for before, after in zip(up[:-1], up[1:], strict=True):
        decoder.extend(back(before, after, 2, 1))
    decoder.extend(
        [nn.ReLU(), nn.ConvTranspose2d(up[-1], colours, 4, 2, 1), nn.Sigmoid(), nn.Flatten()]
    )
    return encoder, decoder, down[-1]


def block(before: int, after: int, stride: int, padding: int) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, 4, stride, padding, bias=False)
    return [conv, nn.BatchNorm2d(after), nn.ReLU()]


def back(before: int, after: int, stride: int, padding: int) -> list[nn.Module]:
    conv = nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False)
    return [nn.ReLU(), conv, nn.BatchNorm2d(after)]
