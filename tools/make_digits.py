"""Make marref/datasets/digits.npz from the digits in CSV.

    python tools/make_digits.py digits.csv.gz

Each row: 64 grey levels from 0 to 16, row by row, then the digit.  The split is drawn here, once,
and stored, because NumPy does not promise that a seed means the same numbers in every release.
"""

import sys
from pathlib import Path

import numpy as np

NUM_HELD_OUT = 297

rows = np.loadtxt(sys.argv[1], delimiter=",", dtype=np.uint8)
order = np.random.default_rng(0).permutation(len(rows))
target = Path(__file__).parent.parent / "marref" / "datasets" / "digits.npz"
np.savez_compressed(
    target,
    images=rows[:, :64].reshape(-1, 8, 8),
    labels=rows[:, 64],
    held_out=np.sort(order[:NUM_HELD_OUT]),
)
print(f"{target.name}: {len(rows)} images, {target.stat().st_size} bytes")
