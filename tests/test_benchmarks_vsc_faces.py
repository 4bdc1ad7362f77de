"""Faces of the VSC benchmark: parts, augmentation, and CelebA's layout made of a few pictures."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import vsc, vsc_faces, vsc_labels, vsc_measures, vsc_networks, vsc_store
from benchmarks.vsc_methods import METHODS
from benchmarks.vsc_settings import Setting


@pytest.fixture
def olivetti(tmp_path):
    """Two persons, whose pictures say in their gray levels who they are and which one it is."""
    subject = np.repeat([0, 1], 8)[::-1].astype(np.uint8)
    index = np.concatenate([np.arange(8), 10 + np.arange(8)])[::-1].astype(np.int16)
    images = np.broadcast_to(index.astype(np.uint8)[:, None, None], (16, 64, 64))
    (tmp_path / "olivetti").mkdir()
    np.savez(tmp_path / "olivetti" / "olivetti.npz", images=images, subject=subject, index=index)
    return tmp_path


def test_every_person_is_in_each_part_with_pictures_of_its_own(olivetti):
    levels = {}
    for part, count in (("train", 6), ("validation", 1), ("test", 1)):
        images, subject = vsc_faces.faces(olivetti, part)
        assert subject.tolist() == [0] * count + [1] * count
        levels[part] = (images[:, 0, 0] * 255).round().int().tolist()
    assert levels["train"] == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]
    assert levels["validation"] == [6, 16]
    assert levels["test"] == [7, 17]
    y, scale, together = vsc_store.data_of("faces", "train", None, olivetti)
    assert (y.shape, scale, together) == ((12 * vsc_faces.COPIES, 4096), 1.0, 1)


def test_a_copy_is_the_picture_mirrored_and_shifted():
    image = torch.zeros(1, 9, 9)
    image[0, 4, 2] = 1
    copies = vsc_faces.augmented(image, copies=600)
    places = {tuple(place) for place in copies.nonzero()[:, 1:].tolist()}
    expected = {(4 + i, j + k) for i in range(-2, 3) for j in (2, 6) for k in range(-2, 3)}
    assert places == expected
    ramp = torch.arange(9.0).expand(1, 9, 9)
    assert set(vsc_faces.augmented(ramp, copies=50).unique().tolist()) == set(range(9))
    pair = torch.stack([torch.zeros(9, 9), torch.ones(9, 9)])
    assert vsc_faces.augmented(pair, copies=2)[:, 0, 0].tolist() == [0, 1, 0, 1]


@pytest.fixture
def celeba(tmp_path):
    """Ten pictures in CelebA's layout: left half red, right half blue, a white border."""
    (tmp_path / "img_align_celeba").mkdir()
    lines = ["10", "Smiling Young"]
    for number in range(1, 11):
        image = np.full((218, 178, 3), 255, np.uint8)
        image[39:179, 19:89] = (10 * number, 0, 0)
        image[39:179, 89:159] = (0, 0, 10 * number)
        name = f"{number:06d}.jpg"
        Image.fromarray(image).save(
            tmp_path / "img_align_celeba" / name, quality=100, subsampling=0
        )
        lines.append(f"{name} {'1' if number % 2 else '-1':>2s} {'-1' if number < 9 else ' 1'}")
    (tmp_path / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_celeba_is_cropped_to_the_middle_and_keeps_its_attributes(celeba):
    train = vsc_faces.CelebA(celeba, "train")
    assert train.names == [f"{number:06d}.jpg" for number in range(1, 9)]
    assert train.attribute_names == ["Smiling", "Young"]
    assert train.attributes[:, 0].tolist() == [True, False] * 4
    assert not train.attributes[:, 1].any()
    assert vsc_faces.CelebA(celeba, "test").attributes.tolist() == [[False, True]]
    face = train[7].reshape(3, 64, 64)
    # No white is left of the border; two grey levels for what JPEG changes.
    torch.testing.assert_close(
        face[0, :, :30], torch.full((64, 30), 80 / 255), atol=2 / 255, rtol=0
    )
    torch.testing.assert_close(
        face[2, :, 34:], torch.full((64, 30), 80 / 255), atol=2 / 255, rtol=0
    )
    assert face[1].max() < 3 / 255
    assert train.first(3).shape == (3, 3 * 64 * 64)
    assert len(vsc_store.held(train, None)) == 8


def test_attributes_of_celeba_are_of_the_faces_that_are_measured(celeba):
    found = vsc_labels.labelled("celeba", 5, celeba)
    assert (len(found.train), len(found.y)) == (5, 1)
    assert found.labels.tolist() == [[False, True]]
    assert found.names == ("Smiling", "Young")


def test_celeba_is_mirrored_at_random_in_training_alone(celeba):
    torch.manual_seed(0)
    train, _, _ = vsc_store.data_of("celeba", "train", None, celeba)
    red = {bool(train[0].reshape(3, 64, 64)[0, 0, 0] > 0) for _ in range(20)}
    assert red == {True, False}
    held, _, _ = vsc_store.data_of("celeba", "validation", None, celeba)
    assert {bool(held[0].reshape(3, 64, 64)[0, 0, 0] > 0) for _ in range(20)} == {True}


def test_the_official_parts_of_celeba_are_used_where_they_are_listed(celeba):
    numbers = {"000001.jpg": 2, "000002.jpg": 1, "000003.jpg": 0}
    lines = [f"{name} {number}" for name, number in numbers.items()]
    (celeba / "list_eval_partition.txt").write_text("\n".join(lines))
    parts = {part: vsc_faces.CelebA(celeba, part).names for part in vsc_faces.SHARES}
    assert parts == {
        "train": ["000003.jpg"], "validation": ["000002.jpg"], "test": ["000001.jpg"],
    }  # fmt: skip


def test_what_celeba_lacks_is_named(celeba, tmp_path):
    with pytest.raises(FileNotFoundError, match="img_align_celeba in"):
        vsc_faces.CelebA(tmp_path / "img_align_celeba", "train")
    listed = celeba / "list_attr_celeba.txt"
    listed.write_text(listed.read_text() + "000011.jpg 1\n")
    with pytest.raises(ValueError, match=r"2 attributes .* got 1 at 000011.jpg"):
        vsc_faces.CelebA(celeba, "train")


def test_faces_train_from_memory_and_celeba_from_disk(celeba, tmp_path, monkeypatch):
    setting = Setting.of("faces")
    model, guide, _ = vsc.fit(
        setting, "implicit-gaussian", torch.rand(8, 4096), steps=2, batch=4, seed=0
    )
    file = tmp_path / "faces.safetensors"
    vsc.store(file, model, guide, {"kind": "faces", "method": "implicit-gaussian"})
    assert file.stat().st_size < 1e6
    _, _, model, guide, _ = vsc.restore(file)
    found = vsc_measures.measure(
        setting, METHODS["implicit-gaussian"], model, guide, torch.rand(2, 4096), 1
    )
    assert math.isfinite(found["bound"]["J=100"][0])
    assert len(found["by_picture"]["J=1"]) == 2

    # CelebA's own networks take seconds: the narrow ones in colour stand in for them.
    monkeypatch.setattr(
        vsc_networks, "celeba", lambda atoms: vsc_networks.squares(atoms, 3, (4,) * 5, (4,) * 5)
    )
    colours = Setting.of("celeba")
    narrow = Setting(**{**vars(colours), "networks": vsc_networks.celeba, "atoms": 8})
    y, _, _ = vsc_store.data_of("celeba", "train", None, celeba)
    model, guide, found = vsc.fit(narrow, "implicit-gaussian", y, steps=3, batch=2, seed=0)
    assert found["steps"] == 3
    assert found["training_data"] == 6
    codes = torch.zeros(2, 1, 8)
    assert narrow.decode(model, codes).shape == (2, 1, 3 * 64 * 64)


def test_data_are_measured_in_whole_groups():
    assert len(vsc.whole(torch.zeros(47, 2), 20)) == 40
    with pytest.raises(ValueError, match="at least 20 data to measure, got 4"):
        vsc.whole(torch.zeros(4, 2), 20)


def test_the_published_networks_are_of_the_published_sizes():
    encoder, decoder, width = vsc_networks.celeba(512)
    assert width == 256
    assert decoder(encoder(torch.rand(2, 3 * 64 * 64)).repeat(1, 2)).shape == (2, 3 * 64 * 64)
    kernels = [tuple(m.weight.shape) for m in decoder if hasattr(m, "kernel_size")]
    assert kernels == [
        (256, 128, 4, 4), (128, 128, 4, 4), (128, 64, 4, 4), (64, 64, 4, 4), (64, 3, 4, 4),
    ]  # fmt: skip
