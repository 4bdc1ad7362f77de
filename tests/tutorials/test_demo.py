import numpy as np
import pytest
import torch

from pyro_sparse.dictionaries import Conv
from tutorials.demo import membrane, neurons, photograph


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 3])
def test_spikes_of_the_membrane_trace_are_found(seed: int) -> None:
    result = membrane.run(seed, progress=False)
    assert result.summary["true_spikes"] == 57
    assert result.summary["spike_f1"] >= 0.95
    assert result.summary["relative_duality_gap"] <= 1e-4


def test_no_active_code_means_no_event() -> None:
    position, size = membrane.merge_events(np.zeros(100), gap=4)
    assert len(position) == len(size) == 0
    assert membrane.split_level(size, floor=0.3) == 0.3


def test_events_merge_at_their_centre_of_mass() -> None:
    codes = np.zeros(50)
    codes[[10, 11, 14, 30]] = 1.0, 2.0, 1.0, 5.0
    position, size = membrane.merge_events(codes, gap=4)
    assert size.tolist() == [4.0, 5.0]
    assert position.tolist() == [(10 + 22 + 14) / 4, 30.0]


def test_matches_are_one_to_one() -> None:
    assert membrane.count_matches(np.array([10.0, 11.0]), np.array([10]), 4) == 1
    assert membrane.count_matches(np.array([10.0, 20.0]), np.array([14, 25]), 4) == 1
    assert membrane.count_matches(np.array([10.0, 12.0]), np.array([9, 12]), 4) == 2


def test_cosine_atoms_are_orthonormal() -> None:
    atoms = photograph.dct_atoms(8).flatten(1)
    torch.testing.assert_close(atoms @ atoms.T, torch.eye(64), atol=1e-6, rtol=0)


def test_risk_estimate_is_near_the_error_that_it_estimates() -> None:
    clean = photograph.load()[200:328, 150:278]
    noisy = clean + photograph.SIGMA * np.random.default_rng(0).standard_normal(clean.shape)
    atoms = photograph.dct_atoms(8)[:, None]
    dictionary = Conv(64, 1, (8, 8), 4, atoms=atoms)
    probe = np.random.default_rng(1).choice([-1.0, 1.0], noisy.shape)
    denoised, risk = photograph.risk_estimate(dictionary, noisy, 1.8, probe)
    error = np.mean((denoised - clean) ** 2)
    # 128^2 pixels: the mean squared noise alone is known to sigma^2 * sqrt(2 / 128^2), 1.1 %.
    assert abs(risk - error) < 5 * photograph.SIGMA**2 * np.sqrt(2 / noisy.size)
    assert error < 0.3 * np.mean((noisy - clean) ** 2)


@pytest.mark.slow
def test_a_dictionary_learned_from_the_noisy_picture_beats_cosines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = photograph.load()
    monkeypatch.setattr(photograph, "load", lambda: whole[100:356, 60:316])
    monkeypatch.setattr(photograph, "LEVELS", (1.8,))
    monkeypatch.setattr(photograph, "NUM_CROPS", 1600)
    summary = photograph.run(progress=False).summary
    # A quarter of the picture and half of the training; the whole reaches 7.5 and 1.0 dB.
    assert summary["psnr_learned"] > summary["psnr_noisy"] + 6.5
    assert summary["psnr_learned"] > summary["psnr_dct"] + 0.3


def test_matches_from_left_to_right_are_the_most_there_are() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        times, spikes = (np.sort(random.uniform(0, 100, random.integers(0, 15))) for _ in range(2))
        events, found = neurons.matched(times, spikes, 4)
        assert events.sum() == found.sum() == membrane.count_matches(times, spikes, 4)


def test_codes_of_one_event_are_one_event() -> None:
    prob = np.array([0.5, 0.0, 0.5, 0.001, 0.9])
    times, probability = neurons.clusters(prob, np.array([10, 11, 12, 13, 30]), gap=3)
    assert times.tolist() == [11.0, 30.0]
    np.testing.assert_allclose(probability, [0.75, 0.9])


def test_simulated_recordings_hold_their_spikes() -> None:
    recording = neurons.simulate_extracellular(rows=10)
    assert recording.y.shape == recording.mask.shape == (10, 1, 640)
    assert (np.diff(recording.spikes) > 0).all()
    (neuron,) = neurons.simulate_fluorescence(1, 40.0)
    assert neuron.spikes[0].max() < neuron.trace.shape[1]
    trials = neurons.simulate_trials(5, 3)
    assert set(np.unique(trials.spikes)) == {0, 1}
