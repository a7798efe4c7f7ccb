"""One contestant of one case, in a process of its own that imports no other framework.

    python -m benchmarks.worker CONTESTANT CASE ARRAYS

The case is JSON, the arrays are an .npz file.  Every command is a line on the standard input,
every answer a line of JSON on the standard output; between them the process sleeps.

    measure       run; answer the seconds of a call
    check FOLDER  write to FOLDER/CONTESTANT.npz what contestants must agree on
    memory        answer the largest memory so far, beyond that after the imports, in bytes
"""

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import CHECKED_STEPS, CONTESTANTS, Case


def main() -> None:
    """Obey commands until the input ends."""
    # What libraries print goes to the standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, case_json, arrays_file = sys.argv[1:]
    case = Case(**json.loads(case_json))
    contestant = CONTESTANTS[name]
    module = importlib.import_module(f"benchmarks.contestants.{contestant.module}")
    module.tiny_operation()
    baseline = memory("VmRSS")
    with np.load(arrays_file) as arrays:
        task = module.TASKS[case.task](case, arrays, contestant.variant)
    print(json.dumps(0), file=answers)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "measure":
            start = time.perf_counter()
            for _ in range(case.calls):
                task.run()
            answer = (time.perf_counter() - start) / case.calls
        elif command == "check":
            outcome = {"training": _trained, "loop": _looped, "decoding": _decoded}[case.task]
            np.savez(Path(argument) / f"{name}.npz", **outcome(task))
            answer = 0
        else:
            answer = memory("VmHWM") - baseline
        print(json.dumps(answer), file=answers)


def _decoded(task: Any) -> dict[str, np.ndarray]:
    return {"tokens": task.run()}


def _trained(task: Any) -> dict[str, np.ndarray]:
    """Loss and gradients, and the loss after a few steps."""
    loss, gradients = task.loss_and_gradients()
    arrays = {f"gradients/{name}": np.array(leaf) for name, leaf in gradients.items()}
    for _ in range(CHECKED_STEPS):
        task.run()
    return {"loss": loss, "loss_after": task.loss_and_gradients()[0], **arrays}


def _looped(task: Any) -> dict[str, np.ndarray]:
    """Do so too, by steps on given batches; the loss after them also of the average."""
    loss, gradients = task.loss_and_gradients()
    arrays = {f"gradients/{name}": np.array(leaf) for name, leaf in gradients.items()}
    for number in range(CHECKED_STEPS):
        task.given_step(number)
    return {"loss": loss, "loss_after": np.array(task.losses()), **arrays}


def memory(field: str) -> int:
    """Resident memory in bytes: now (VmRSS) or at its peak (VmHWM).

    Where there is no /proc, both are the peak so far.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines[field].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
