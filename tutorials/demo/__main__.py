"""The main job on real input: ``make demo``, or ``python -m tutorials.demo --out demo``."""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import torch

import pyro_sparse

from . import figures, membrane, photograph


def main() -> None:
    parser = argparse.ArgumentParser(description="Denoise a photograph, find a neuron's spikes.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    print("1/2  A photograph: learn a convolutional dictionary from a noisy picture, denoise it")
    picture = photograph.run(options.seed)
    print("2/2  A membrane potential: learn the waveform of a spike, find where it occurs")
    trace = membrane.run(options.seed)
    figures.save_atoms(picture, options.out)
    figures.save_photograph(picture, options.out)
    figures.save_membrane(trace, options.out)

    summary = {
        "psnr_noisy": picture.summary["psnr_noisy"],
        "psnr_dct": picture.summary["psnr_dct"],
        "psnr_learned": picture.summary["psnr_learned"],
        "spike_f1": trace.summary["spike_f1"],
        "photograph": picture.summary,
        "membrane": trace.summary,
        "seed": options.seed,
        "seconds": time.perf_counter() - start,
        "versions": {
            "python": platform.python_version(),
            "pyro_sparse": pyro_sparse.__version__,
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "numpy": np.__version__,
            "matplotlib": matplotlib.__version__,
        },
    }
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    noisy = summary["psnr_noisy"]
    print()
    print(f"{'photograph':28s} {'PSNR':>9s} {'gain':>9s}")
    for name, key in (("noisy", "noisy"), ("DCT dictionary", "dct"), ("learned", "learned")):
        psnr = summary[f"psnr_{key}"]
        print(f"  {name:26s} {psnr:6.2f} dB {psnr - noisy:+6.2f} dB")
    print(f"{'membrane potential':28s} {'F1':>9s} {'spikes':>9s}")
    found = f"{trace.summary['matched']}/{trace.summary['true_spikes']}"
    print(f"  {'detected within 2 ms':26s} {summary['spike_f1']:9.3f} {found:>9s}")
    print(f"{summary['seconds']:.0f} s; figures and summary.json are in {options.out}/")


if __name__ == "__main__":
    main()
