"""The DrSAE benchmark on toy digits, from training to its figures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import drsae, drsae_analysis


def toy(file: Path, size: int, seed: int) -> None:
    """Ten classes: a bright patch at one of ten places."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=size).astype(np.uint8)
    images = rng.integers(0, 40, size=(size, 28, 28))
    for image, place in zip(images, labels):
        row, column = 4 * (place // 2) + 4, 14 * (place % 2)
        image[row : row + 4, column : column + 9] = 250
    np.savez(file, images=images.astype(np.uint8), labels=labels)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mnist"
    folder.mkdir()
    toy(folder / "mnist_train.npz", 260, 0)
    toy(folder / "mnist_test.npz", 80, 1)
    monkeypatch.setenv("PYRO_SPARSE_DATA", str(tmp_path))
    monkeypatch.setattr(drsae, "TRAINED", 200)
    return folder


def run(*arguments: object) -> None:
    drsae.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("full", [False, True])
def test_it_learns_and_is_evaluated_from_its_file(data: Path, tmp_path: Path, full: bool) -> None:
    weights, out = tmp_path / "w.safetensors", tmp_path / "out.json"
    options = ["--full", "--checkpoints", tmp_path / "c"] if full else ["--lr", "3e-3"]
    epochs = ("--epochs", 1, 30)
    run("train", "--units", 20, "--layers", 3, *epochs, "--weights", weights, *options)
    run("evaluate", "--weights", weights, "--data", data / "mnist_test.npz", "--json", out)
    found = json.loads(out.read_text())
    assert found["error"] <= 10 and 0 <= found["calibration_error"] <= 1
    assert found["digits"] == 80
    assert len(found["wrong"]) == round(found["error"] * 80 / 100)
    net, settings = drsae.DrSAE.load(weights)
    assert (net.units, net.layers, settings["epochs"]) == (20, 3, list(epochs[1:]))
    run("calibrate", "--weights", weights, "--json", tmp_path / "t.json")
    calibrated = json.loads((tmp_path / "t.json").read_text())
    assert calibrated["temperature"] == drsae.DrSAE.load(weights)[0].temperature != 1
    assert calibrated["validation"]["error"] == calibrated["validation_before"]["error"]
    assert calibrated["validation"]["nats"] <= calibrated["validation_before"]["nats"]
    run("compare", "--first", out, "--second", out, "--json", tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text())["p"] == 1
    stem = tmp_path / "drsae"
    run("analyse", "--weights", weights, "--figures", stem, "--json", tmp_path / "a.json")
    analysis = json.loads((tmp_path / "a.json").read_text())
    assert len(analysis["angles"]) == 20 and len(analysis["by_layer"]["decoder"]) == 3
    assert len(list(tmp_path.glob("drsae_*.png"))) == 4
    trained = json.loads(weights.with_suffix(".json").read_text())
    assert abs(trained["validation"]["nats"] - trained["validation_before_storage"]["nats"]) < 0.01


def test_a_file_of_weights_keeps_a_hundredth_of_a_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = drsae.DrSAE.start(20, 3, torch.rand(20, 784))
    net.save(tmp_path / "w.safetensors", {"seed": 0})
    back, _ = drsae.DrSAE.load(tmp_path / "w.safetensors")
    for name in ("encoder", "decoder"):
        rows, found = getattr(net, name).detach(), getattr(back, name).detach()
        assert ((rows - found).abs().amax(1) <= rows.abs().amax(1) / 253).all()


def test_the_net_is_the_published_one(data: Path) -> None:
    x, _ = drsae.digits(data / "mnist_train.npz")
    torch.manual_seed(0)
    net = drsae.DrSAE.start(20, 11, x)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(len(x)))
    torch.testing.assert_close(net.encoder, 1.25 / 11 * net.decoder)
    gram = net.decoder @ net.decoder.T
    torch.testing.assert_close(net.recurrence, torch.eye(20) - 1.25 / 11 * gram)
    with torch.no_grad():
        net.recurrence.add_(0.01 * torch.randn(20, 20))
        z = torch.zeros(len(x), 20)
        for _ in range(11):
            z = (x @ net.encoder.T + z @ net.recurrence.T - net.bias).relu()
    torch.testing.assert_close(net.guide.encode(x), z)
    logits = z / (z.square().sum(1, keepdim=True) + 1e-8).sqrt() @ net.model.class_weights.T
    torch.testing.assert_close(net.probabilities(x), logits.softmax(-1))


def test_calibration_is_the_gap_of_confidence_and_accuracy() -> None:
    probabilities = torch.tensor([0.8, 0.2]).expand(100, 2)
    label = (torch.arange(100) >= 60).long()  # the guess is right for sixty of them
    assert drsae.calibration_error(probabilities, label, bins=1) == pytest.approx(0.2, abs=1e-6)


def test_other_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 28, 28)))
    with pytest.raises(ValueError, match="images and labels"):
        drsae.digits(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 8, 8)), labels=np.zeros(2))
    with pytest.raises(ValueError, match=r"\(n, 28, 28\)"):
        drsae.digits(tmp_path / "b.npz")


def test_layers_end_at_the_codes_of_the_guide(data: Path) -> None:
    x, label = drsae.digits(data / "mnist_train.npz")
    torch.manual_seed(0)
    net = drsae.DrSAE.start(20, 5, x)
    units = drsae_analysis.Units(net, x, label)
    torch.testing.assert_close(units.codes, net.guide.encode(x).detach())
    assert torch.equal(units.start > 0, (units.path > 0).any(0))
    torch.testing.assert_close(drsae_analysis.kept(units, 20), units.codes)
    assert ((drsae_analysis.kept(units, 3) > 0).sum(1) <= 3).all()
    assert units.angle.abs().max() < 1e-3  # encoder and decoder start aligned
