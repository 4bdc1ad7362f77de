"""Faces for `benchmarks.vsc`: the 320 Olivetti pictures, and CelebA read from a user's folder.

CelebA may not be handed on, so it is no part of the data here. The experiment published on it is
made with the gray Olivetti faces in its place; who has CelebA runs it as published.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

SIDE = 64
PLACES = {"train": slice(0, 6), "validation": slice(6, 7), "test": slice(7, 8)}
"""Of the eight pictures of a person, in the order of the original numbers."""
COPIES, SHIFT = 16, 2
CROP = 140
"""Pixels of the middle of an aligned CelebA picture, 218 x 178, that are kept, as published."""
SHARES = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}


def faces(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Olivetti faces ``(n, 64, 64)`` from 0 to 1, and whose they are, ``(n,)``.

    Of the eight pictures of each of the 40 persons six are for training, one for validation and
    one for the test, so every person is in each part.
    """
    stored = np.load(folder / "olivetti" / "olivetti.npz")
    order = np.lexsort((stored["index"], stored["subject"]))
    subject = stored["subject"][order]
    chosen = [order[subject == person][PLACES[part]] for person in np.unique(subject)]
    rows = np.concatenate(chosen)
    images = torch.from_numpy(stored["images"][rows].astype(np.float32) / 255)
    return images, torch.from_numpy(stored["subject"][rows].astype(np.int64))


def augmented(images: Tensor, copies: int = COPIES, seed: int = 0) -> Tensor:
    """Pictures ``(copies * n, side, side)``, each mirrored or not and moved by up to two pixels.

    What a shift uncovers is the border repeated. Copies of one picture do not stand together.
    """
    generator = torch.Generator().manual_seed(seed)
    count, side = copies * len(images), images.shape[-1]
    padded = nn.functional.pad(images[:, None], [SHIFT] * 4, mode="replicate")[:, 0]
    windows = padded.unfold(1, side, 1).unfold(2, side, 1)  # (n, shifts, shifts, side, side)
    rows, columns = torch.randint(2 * SHIFT + 1, (2, count), generator=generator)
    found = windows[torch.arange(count) % len(images), rows, columns]
    mirrored = torch.rand(count, generator=generator) < 0.5
    return torch.where(mirrored[:, None, None], found.flip(-1), found)


class CelebA(Dataset[Tensor]):
    """CelebA's aligned faces, read from disk one at a time: the middle 140 pixels, as 64 x 64.

    Args:
        folder: Holds ``img_align_celeba/*.jpg``, ``list_attr_celeba.txt`` and, if the official
            parts are wanted, ``list_eval_partition.txt``. Without the last the parts are the first
            80 %, the next and the last 10 % of the names in order, close to the official ones.
        part: "train", "validation" or "test".
        flip: Mirror at random, by torch's generator.

    Attributes:
        names: Names of the files.
        attributes: True where a face has an attribute, ``(n, attributes)``.
        attribute_names: Such as "Smiling".

    Raises:
        FileNotFoundError: If pictures or attributes are not there.
        ValueError: If the list of attributes has lines of other lengths than its head says.
    """

    def __init__(self, folder: Path, part: str, *, flip: bool = False) -> None:
        self.images = folder / "img_align_celeba"
        listed = folder / "list_attr_celeba.txt"
        for needed in (self.images, listed):
            if not needed.exists():
                raise FileNotFoundError(f"Expected {needed.name} in {folder}, found none.")
        self.flip = flip
        # First line: how many; second: names of the attributes; then a file and its -1 and 1.
        lines = [line.split() for line in listed.read_text().splitlines()[1:] if line.strip()]
        self.attribute_names, rows = lines[0], lines[1:]
        wrong = next((row for row in rows if len(row) != 1 + len(self.attribute_names)), None)
        if wrong is not None:
            raise ValueError(
                f"Expected a file and {len(self.attribute_names)} attributes in every line of "
                f"{listed.name}, got {len(wrong) - 1} at {wrong[0]}."
            )
        rows = sorted(rows)
        inside = _inside(folder / "list_eval_partition.txt", [row[0] for row in rows], part)
        kept = [row for row, chosen in zip(rows, inside, strict=True) if chosen]
        self.names = [row[0] for row in kept]
        self.attributes = torch.tensor([[value == "1" for value in row[1:]] for row in kept])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        """A face from 0 to 1, channels first, flat: ``(3 * 64 * 64,)``."""
        with Image.open(self.images / self.names[index]) as opened:
            left, top = (round((size - CROP) / 2) for size in opened.size)
            middle = opened.convert("RGB").crop((left, top, left + CROP, top + CROP))
        small = middle.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        face = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255).permute(2, 0, 1)
        return (face.flip(-1) if self.flip and torch.rand(()) < 0.5 else face).flatten()

    def first(self, count: int) -> Tensor:
        """The first faces in memory, ``(count, 3 * 64 * 64)``, or all if there are fewer."""
        return torch.stack([self[index] for index in range(min(count, len(self)))])


def _inside(file: Path, names: list[str], part: str) -> list[bool]:
    """Which of the names, in order, are of a part."""
    if file.exists():
        number = str(list(SHARES).index(part))
        listed = dict(line.split() for line in file.read_text().splitlines() if line.strip())
        return [listed.get(name) == number for name in names]
    low, high = (int(share * len(names)) for share in SHARES[part])
    return [low <= index < high for index in range(len(names))]
