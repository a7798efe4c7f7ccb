"""Which row of the class table is in a class embedding, and which gradients its table has."""

import numpy as np

from marref.verify.structure.evidence import Candidates, Case


def candidates(case: Case, _block: str, _part: str) -> Candidates:
    """List other rows of the class table, and multiples."""
    table, labels = case.parameters["class_embedding.table"], case.vectors.batch["labels"]
    count = len(table)
    yield "is the row of no class, in every sequence", np.broadcast_to(table[-1], case.golden.shape)
    yield "is row label + 1 of the table, with no class first", table[(labels + 1) % count]
    yield "is row label - 1 of the table", table[labels - 1]
    yield (
        "is table[labels] with 0 for no class",
        table[labels] * (labels < count - 1)[:, np.newaxis],
    )
    yield "is twice table[labels]", 2.0 * table[labels]


def gradient_candidates(case: Case) -> Candidates:
    """List what the gradient of the class table might be."""
    stream = case.vectors.arrays.get("activation_gradients/embedding")
    if stream is None:
        return
    dx, labels = np.asarray(stream, np.float64), case.vectors.batch["labels"]
    of_sequences = dx.sum(axis=1)
    assigned, of_first, shifted = (np.zeros_like(case.golden) for _ in range(3))
    assigned[labels] = of_sequences
    np.add.at(of_first, labels, dx[:, 0])
    np.add.at(shifted, (labels + 1) % len(case.golden), of_sequences)
    yield "has the last of each class's gradients, in place of their sum", assigned
    yield "has the gradients of the first position only, in place of their sum", of_first
    yield "has the gradients one row further, with no class first", shifted
