"""Golden vectors of continuous MAR: as `marref.verify.golden`, of `marref.continuous`.

    params/<name>                              the parameters
    input/images, labels                       the batch
    input/orders, num_masked, label_dropped,
    timesteps, noise                           what is random in a step
    input/start_noise, step_noise              what is random in sampling
    input/ratios                               mask ratios
    masking/num_masked, masked                 how many tokens these mask; the mask of the batch
    noise_schedule/<name>/<steps>/<table>      timestep, beta, alpha_bar, log_variance_low and _high
    activations/<name>                         see `marref.verify.trace_continuous`
    loss/rows/<part>, loss/<part>, loss        squared_error and bound (bits), and their sum
    gradients/<name>                           of the parameters, the last layer first, between them
    activation_gradients/<name>                e and v (output), z, the residual stream
    adamw/<step>/<name>                        parameters after steps 1 and 2 on this batch
    clipped/<step>/<name>                      the same, with the gradients clipped
    sampling/<setting>/counts, scales          tokens and guidance scale of every step
    sampling/<setting>/first/z, z_no_class     conditions in the first step
    sampling/<setting>/first/chain             x_t after each of its diffusion steps
    sampling/<setting>/steps/z, z_no_class     conditions in every step
    sampling/<setting>/steps/tokens            tokens after every step
    sampling/<setting>/images                  and the result

Parameters are drawn so that nothing hides: no layer is 0, a mask vector and a class vector nearly
cancel a position, and the diffusion network's input is small, so that the epsilon of every kind of
norm shows.  At t = 0 the noise is near e: else the bin of 8 bits, whose probability the bound has,
would lie in a tail, for which float32 has no digits.  Parameters, images and noise are bfloat16
numbers: every precision has them exactly.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from marref import optim, trees
from marref.continuous import diffusion, loss, sampling
from marref.continuous.layers import timestep
from marref.continuous.loss import masked_by
from marref.continuous.model import ContinuousMAR, num_masked
from marref.continuous.training import decayed
from marref.trees import Array, Tree
from marref.verify import golden, trace_continuous
from marref.verify.faults.fault import Fault
from marref.verify.rounding import EPSILON, round_to
from marref.verify.trace_continuous import Passes

TINY = ContinuousMAR(
    image_size=6,
    channels=2,
    patch_size=2,
    encoder_dim=6,
    encoder_layers=2,
    decoder_dim=8,
    decoder_layers=1,
    num_heads=2,
    mlp_ratio=2.0,
    buffer_size=3,
    num_classes=3,
    diffusion_dim=8,
    diffusion_layers=2,
    diffusion_batch_mul=2,
)
"""A model to look at."""

_ADAMW = {**golden.OPTIMISERS["adamw"], "beta2": 0.95, "weight_decay": 0.02}
OPTIMISERS: dict[str, dict[str, float]] = {"adamw": _ADAMW, "clipped": {**_ADAMW, "max_norm": 0.1}}
"""As published, but for the learning rate, and for a norm of 3 that hardly clips anything here."""
OPTIMISER_STEPS = (1, 2)

SAMPLING: dict[str, dict[str, Any]] = {
    "class": {},
    "cold": {"temperature": 0.5},
    "constant": {"guidance_scale": 2.5},
    "linear": {"guidance_scale": 3.0, "guidance": "linear"},
    "no-class": {"labels": False},
    "unclipped": {"clip": None},
    "one-step": {"num_steps": 1, "num_diffusion_steps": 10},
    "one-at-a-time": {"num_steps": 9, "num_diffusion_steps": 2},
}
"""What differs from `SAMPLING_DEFAULTS`, by setting."""
SAMPLING_DEFAULTS: dict[str, Any] = {
    "labels": True,
    "num_steps": 3,
    "num_diffusion_steps": 5,
    "temperature": 1.0,
    "guidance_scale": 1.0,
    "guidance": "constant",
    "clip": 3.0,
}
SCHEDULE_STEPS = (1000, 100, 5)
BATCH, _SAMPLED = 4, 2
_TIMES = (0, 0, 1, 500, 998, 999)
_RATIOS = np.array([0.03125, 0.703125, 0.75, 0.8125, 0.875, 0.90625, 1.0])

CONVENTIONS = {
    "layout": "row-major; kernels are [in, out], y = x kernel + bias",
    "tokens": "row by row; inside a token channel, row, column",
    "heads": "head h reads features h * head_dim to (h + 1) * head_dim - 1",
    "masked": "the first num_masked of each order; num_masked = ceil(length * ratio)",
    "places": "the buffer first, then the tokens; the encoder sees the visible ones in order",
    "classes": "the last row of class_embedding.table is no class, which a dropped label becomes",
    "rows": "the masked tokens of the batch, diffusion_batch_mul times over; input/timesteps and "
    "input/noise have rows for the others too",
    "network": "shift, scale, gate in this order; cosines before sines; e before v",
    "loss": "mean over all rows of the squared error and the bound in bits, in which e is constant",
    "noise schedule": "the network is given the index among the 1000 original steps",
    "weight decay": "of the parameters in decayed; the others have none",
    "key bias": "its gradient, which is 0, is set to 0 before every optimiser step",
    "sampling": "the first two rows of input/orders and input/labels; orders are used up from the "
    "end; step_noise in the order in which steps are taken, the last of which is not used",
    "guidance": "e = u + s (c - u), v that of the class; linear: s = 1 + (guidance_scale - 1) "
    "(length - max(m, 1))/length, m masked after the step",
}


def draw(model: ContinuousMAR, seed: int) -> tuple[Tree, dict[str, Array]]:
    """Draw parameters, a batch, and everything that is random.

    Parameters
    ----------
    model : ContinuousMAR
    seed : int

    Returns
    -------
    params : dict
        float64; every number is a bfloat16.
    batch : dict
        See the head of this module.  Of the four labels the first and the third are equal; the
        last is dropped.  Times 0, 0, 1, 500, 998 and 999 are among those of the masked rows.
    """
    rng = np.random.default_rng(seed)
    batch = {
        "images": rng.normal(size=(BATCH, model.channels, model.image_size, model.image_size)),
        "labels": (rng.integers(model.num_classes or 1) + np.array([0, 1, 0, 2]))
        % (model.num_classes or 1),
        **model.draw(rng, BATCH),
        "label_dropped": np.array([False] * (BATCH - 1) + [True]),
        "num_masked": np.array(num_masked(model.length, 0.65)),
        "ratios": _RATIOS,
        **_draw_sampling(model, rng),
    }
    masked = np.flatnonzero(masked_by(batch["orders"], int(batch["num_masked"])))
    batch["timesteps"][masked[: len(_TIMES)]] = _TIMES[: len(masked)]
    if model.num_classes is None:
        del batch["labels"]
    leaves = {
        name: golden.draw_leaf(name, shape, rng) for name, shape in model.parameter_shapes.items()
    }
    place = model.buffer_size + batch["orders"][0, 0]
    positions = leaves["decoder_positions.table"]
    positions[place] = 0.05 * positions[place] - leaves["mask_vector"]
    positions, label = leaves["encoder_positions.table"], batch.get("labels", [0])[0]
    positions[0] = 0.05 * positions[0] - leaves["class_embedding.table"][label]
    for name in ("diffusion.input.kernel", "diffusion.input.bias", "diffusion.output.kernel"):
        leaves[name] *= 0.1 if "input" in name else 0.25
    params = trees.unflatten({name: round_to(leaf, "bfloat16") for name, leaf in leaves.items()})
    batch["images"] = round_to(batch["images"], "bfloat16")
    _come_near(model, params, batch)
    return params, {
        name: round_to(array, "bfloat16") if array.dtype.kind == "f" else array
        for name, array in batch.items()
    }


def _come_near(model: ContinuousMAR, params: Tree, batch: dict[str, Array]) -> None:
    """Let noise be near e at t = 0; see the head of this module."""
    draws = {**batch, "num_masked": int(batch["num_masked"])}
    output, rows, _ = loss.forward(model, params, batch["images"], batch.get("labels"), draws)
    last = rows.time == 0
    batch["noise"][rows.place[last]] = output[last, : model.token_dim] + 0.5 * rows.noise[last]


def _draw_sampling(model: ContinuousMAR, rng: np.random.Generator) -> dict[str, Array]:
    most = max(options["num_diffusion_steps"] for options in settings(model).values())
    drawn = sampling.draw(model, rng, _SAMPLED, most)
    return {name: drawn[name] for name in ("start_noise", "step_noise")}


def settings(model: ContinuousMAR) -> dict[str, dict[str, Any]]:
    """Return the settings of sampling that a model has, with all options."""
    every = {name: {**SAMPLING_DEFAULTS, **options} for name, options in SAMPLING.items()}
    if model.num_classes is not None:
        return every
    return {"no-class": every["no-class"]}


def inputs(model: ContinuousMAR) -> list[str]:
    """Name the inputs, as `draw` returns them."""
    named = ("images", "labels", "orders", "num_masked", "label_dropped", "timesteps", "noise")
    of_classes = model.num_classes is not None
    return [
        *(name for name in named if name != "labels" or of_classes),
        *("ratios", "start_noise", "step_noise"),
    ]


def stages(
    model: ContinuousMAR,
    params: Tree,
    batch: dict[str, Array],
    nudge: Callable[[Tree], Tree] = lambda grads: grads,
) -> dict[str | tuple[str, ...], Callable[[], dict[str, Array]]]:
    """Return the stages of the computation, as `marref.verify.golden.stages` does."""

    @functools.cache
    def passes() -> Passes:
        return trace_continuous.passes(model, params, batch)

    return {
        "masking/": lambda: _masking(model, batch),
        "noise_schedule/": _noise_schedules,
        "activations/": lambda: {f"activations/{n}": a for n, a in passes().activations.items()},
        "loss": lambda: passes().losses,
        ("gradients/", "activation_gradients/"): lambda: trace_continuous.last_layer_first(
            passes().grads, passes().activation_gradients
        ),
        **{
            f"{name}/": functools.partial(_optimise, model, params, batch, nudge, name)
            for name in OPTIMISERS
        },
        **{
            f"sampling/{name}/": functools.partial(_sample, model, params, batch, name, options)
            for name, options in settings(model).items()
        },
    }


def make(
    model: ContinuousMAR, seed: int = 0, dtype: npt.DTypeLike = np.float64
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Make golden vectors.

    Parameters
    ----------
    model : ContinuousMAR
        Its dropout is ignored.
    seed : int
    dtype : float64 or float32
        In which the results are *stored*; they are computed in float64 always.

    Returns
    -------
    arrays : dict of str to array
        In the order in which an implementation would compute them.
    metadata : dict
        As of `marref.verify.golden.make`, with ``model`` "continuous", ``decayed`` (the parameters
        that weight decay acts on) and ``sampling`` (the arguments of each setting).
    """
    golden.check_asked(seed, dtype)
    model = dataclasses.replace(model, dropout=0.0)
    params, batch = draw(model, seed)
    arrays = {
        **{f"params/{name}": leaf for name, leaf in trees.flatten(params).items()},
        **{f"input/{name}": batch[name] for name in inputs(model)},
    }
    for stage in stages(model, params, batch).values():
        arrays |= stage()
    metadata = golden.described(
        model.as_dict(),
        seed,
        arrays,
        model="continuous",
        conventions=CONVENTIONS,
        optimisers=OPTIMISERS,
        decayed=sorted(decayed(params, "published")),
        sampling=settings(model),
    )
    floats = {name: a.astype(dtype) if a.dtype.kind == "f" else a for name, a in arrays.items()}
    return floats, metadata


def _masking(model: ContinuousMAR, batch: dict[str, Array]) -> dict[str, Array]:
    counts = [num_masked(model.length, ratio) for ratio in batch["ratios"].tolist()]
    masked = masked_by(batch["orders"], int(batch["num_masked"]))
    return {"masking/num_masked": np.array(counts), "masking/masked": masked}


def _noise_schedules() -> dict[str, Array]:
    arrays = {}
    for schedule in diffusion.SCHEDULES:
        for num_steps in SCHEDULE_STEPS:
            steps = diffusion.process(schedule, num_steps)
            tables = {
                "timestep": steps.timestep,
                "beta": steps.beta,
                "alpha_bar": steps.alpha_bar,
                "log_variance_low": steps.low,
                "log_variance_high": steps.high,
            }
            for name, table in tables.items():
                arrays[f"noise_schedule/{schedule}/{num_steps}/{name}"] = table
    return arrays


def _optimise(
    model: ContinuousMAR,
    params: Tree,
    batch: dict[str, Array],
    nudge: Callable[[Tree], Tree],
    name: str,
) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    options = dict(OPTIMISERS[name])
    max_norm, decay = options.pop("max_norm", None), options.pop("weight_decay")
    decays = decayed(params, "published")
    state = {
        leaf: (array, 0.0 * array, 0.0 * array) for leaf, array in trees.flatten(params).items()
    }
    for step in OPTIMISER_STEPS:
        grads = nudge(trace_continuous.passes(model, _params(state), batch).grads)
        for of_block in (*grads["encoder_blocks"], *grads["decoder_blocks"]):
            # As in golden vectors of the discrete model: it is 0, and rounding would become steps.
            bias = of_block["attention"]["key"]["bias"]
            of_block["attention"]["key"]["bias"] = np.zeros_like(bias)
        if max_norm is not None:
            grads, _ = optim.clip_by_global_norm(grads, max_norm)
        for leaf, grad in trees.flatten(grads).items():
            param, m, v = state[leaf]
            of_leaf = decay if leaf in decays else 0.0
            state[leaf] = optim.update(param, grad, m, v, t=step, weight_decay=of_leaf, **options)
        arrays |= {f"{name}/{step}/{leaf}": param for leaf, (param, _, _) in state.items()}
    return arrays


def _params(state: dict[str, tuple[Array, Array, Array]]) -> Tree:
    return trees.unflatten({name: param for name, (param, _, _) in state.items()})


def _sample(
    model: ContinuousMAR, params: Tree, batch: dict[str, Array], name: str, options: dict[str, Any]
) -> dict[str, Array]:
    options = dict(options)
    labels = batch["labels"][:_SAMPLED] if options.pop("labels") else None
    steps = options["num_diffusion_steps"]
    draws = {
        "orders": batch["orders"][:_SAMPLED],
        "start_noise": batch["start_noise"],
        "step_noise": batch["step_noise"][:steps],
    }
    functions = (
        ContinuousMAR.forward,
        sampling.Sampler.chain,
        sampling.scales_of,
        diffusion.step_back,
    )
    with trace_continuous.recorded(*functions) as calls:
        images = sampling.sample(model, params, labels, draws=draws, **options)
    zs = [call.result[0] for call in calls[ContinuousMAR.forward]]
    guided = len(zs) > len(calls[sampling.Sampler.chain])
    of_steps = {"z": zs[::2], "z_no_class": zs[1::2]} if guided else {"z": zs}
    (of_scales,) = calls[sampling.scales_of]
    arrays = {
        "counts": of_scales.args[0],
        "scales": of_scales.result,
        **{f"first/{name}": z[0] for name, z in of_steps.items()},
        "first/chain": np.stack([call.result for call in calls[diffusion.step_back][:steps]]),
        **{f"steps/{name}": np.stack(z) for name, z in of_steps.items()},
        "steps/tokens": _tokens_after_steps(model, calls[sampling.Sampler.chain]),
        "images": images,
    }
    return {f"sampling/{name}/{key}": array for key, array in arrays.items()}


def _tokens_after_steps(model: ContinuousMAR, runs: list[trace_continuous.Call]) -> Array:
    """Fill in what each step generated: [steps, batch, length, token_dim]; 0 where still masked."""
    found = np.zeros((_SAMPLED, model.length, model.token_dim), runs[0].result.dtype)
    after = []
    for run in runs:
        found = found.copy()
        found[run.args[2]] = run.result
        after.append(found)
    return np.stack(after)


def tables_rounded(run: int, precision: str) -> Fault:
    """Make tables that are off in their last digits, as programs compute them in many ways.

    Schedules are computed in float64.  1 - β_t is off by units there, and a cosine's by more where
    ᾱ is small: it is f(t + 1)/f(t), and cos² x is also (1 + cos 2x)/2, whose units are those of 1.
    Of the times' features the frequencies are off, as in `marref.verify.comparison`, and no program
    computes them more coarsely than in float32.
    """
    fault = Fault("tables-rounded")
    unit = EPSILON["float64" if precision == "float64" else "float32"]

    @fault.wraps(diffusion.process)
    def _(old: Any, schedule: str, *args: Any) -> diffusion.Process:
        steps: diffusion.Process = old(schedule, *args)
        units = EPSILON["float64"] / (steps.alpha_bar_before if schedule == "cosine" else 1.0)
        signs = np.random.default_rng(run).choice([-1.0, 1.0], len(steps.beta))
        moved = (1.0 - steps.beta) * (1.0 + units * signs)
        return diffusion.Process(1.0 - moved, steps.timestep)

    @fault.wraps(timestep.features)
    def _(old: Any, timesteps: Array, dtype: npt.DTypeLike) -> Array:
        features: Array = old(timesteps, dtype)
        half = features.shape[1] // 2
        log_w = np.log(10000.0) * np.arange(half) / half
        signs = np.random.default_rng(run).choice([-1.0, 1.0], half)
        dangle = unit * signs * np.maximum(log_w, 1.0) * np.exp(-log_w) * timesteps[:, np.newaxis]
        cosines, sines = features[:, :half], features[:, half:]
        moved = np.concatenate([cosines - sines * dangle, sines + cosines * dangle], axis=1)
        return moved.astype(features.dtype)

    return fault
