"""Continuous MAR in plain loops over 50-digit numbers; see `tests.oracle`, whose parts it uses.

A vector is a list of numbers, a sequence a list of vectors.  Written from the formulas of Li et
al. 2024 (arXiv 2406.11838) and of its published code alone.
"""

from .oracle import add, attention, exact, feed_forward, layer_norm, linear, mp

SMALL = mp.mpf("1e-6")
STEPS = 1000

__all__ = ["conditions", "exact", "loss", "mp", "network", "row_loss", "step_back", "tokens_of"]


# The transformer


def tokens_of(image, p):
    """Patches of p x p, row by row; in each channel, row, column.  [channels, height, width]"""
    tokens = []
    for top in range(0, len(image[0]), p):
        for left in range(0, len(image[0][0]), p):
            patch = [channel[top + i][left : left + p] for channel in image for i in range(p)]
            tokens.append([value for row in patch for value in row])
    return tokens


def conditions(params, tokens, label, masked, *, num_heads, buffer_size, epsilon):
    """z of every token of a sequence.  tokens: [length, token_dim] -> [length, decoder_dim]

    The encoder sees the class `buffer_size` times and then the tokens that are not masked; the
    decoder sees all places, the mask vector where the encoder saw nothing.
    """
    table, own = params["encoder_positions"]["table"], params["class_embedding"]["table"][label]
    h = [own] * buffer_size + [linear(params["token_projection"], token) for token in tokens]
    h = [
        layer_norm(params["token_norm"], add(vector, place), SMALL)
        for vector, place in zip(h, table, strict=True)
    ]
    seen = [i for i in range(len(h)) if i < buffer_size or not masked[i - buffer_size]]
    h = blocks(params["encoder_blocks"], [h[i] for i in seen], num_heads, epsilon)
    h = [layer_norm(params["encoder_norm"], vector, epsilon) for vector in h]
    encoded = dict(zip(seen, (linear(params["decoder_projection"], x) for x in h), strict=True))
    table = params["decoder_positions"]["table"]
    h = [add(encoded.get(i, params["mask_vector"]), table[i]) for i in range(len(table))]
    h = blocks(params["decoder_blocks"], h, num_heads, epsilon)
    h = [layer_norm(params["decoder_norm"], vector, epsilon) for vector in h[buffer_size:]]
    return [add(x, y) for x, y in zip(h, params["diffusion_positions"]["table"], strict=True)]


def blocks(params, x, num_heads, epsilon):
    """x += attention(norm(x)), then x += feed_forward(norm(x)), in every block."""
    for block in params:
        normed = [layer_norm(block["attention_norm"], vector, epsilon) for vector in x]
        branch = attention(block["attention"], normed, num_heads)
        x = [add(vector, change) for vector, change in zip(x, branch, strict=True)]
        normed = [layer_norm(block["feed_forward_norm"], vector, epsilon) for vector in x]
        branch = [feed_forward(block["feed_forward"], vector, "erf") for vector in normed]
        x = [add(vector, change) for vector, change in zip(x, branch, strict=True)]
    return x


# The diffusion network


def network(params, x, t, z):
    """[e, v] of a noisy token x at time t under the condition z.  -> [2 token_dim]"""
    time = linear(params["time_down"], silu(linear(params["time_up"], time_features(t))))
    steering = silu(add(time, linear(params["condition"], z)))
    h = linear(params["input"], x)
    for block in params["blocks"]:
        shift, scale, gate = parts(linear(block["modulation"], steering), 3)
        branch = modulated(layer_norm(block["norm"], h, SMALL), shift, scale)
        branch = linear(block["down"], silu(linear(block["up"], branch)))
        h = [a + g * b for a, g, b in zip(h, gate, branch, strict=True)]
    shift, scale = parts(linear(params["final_modulation"], steering), 2)
    plain = {"scale": [mp.mpf(1)] * len(h), "bias": [mp.mpf(0)] * len(h)}
    return linear(params["output"], modulated(layer_norm(plain, h, SMALL), shift, scale))


def time_features(t):
    """cos(t w_k), then sin(t w_k), k = 0 .. 127, w_k = 10000^(-k/128).  -> [256]"""
    angles = [t * mp.mpf(10000) ** (mp.mpf(-k) / 128) for k in range(128)]
    return [mp.cos(angle) for angle in angles] + [mp.sin(angle) for angle in angles]


def silu(x):
    """x_i / (1 + exp(-x_i)).  [n] -> [n]"""
    return [value / (1 + mp.exp(-value)) for value in x]


def modulated(x, shift, scale):
    """x_i (1 + scale_i) + shift_i.  [n] -> [n]"""
    return [a * (1 + s) + b for a, s, b in zip(x, scale, shift, strict=True)]


def parts(x, count):
    """Cut a vector into so many of equal length."""
    size = len(x) // count
    return [x[i * size : (i + 1) * size] for i in range(count)]


# The process


def noise_of(schedule):
    """beta of every step: "cosine", or "linear" from 1e-4 to 0.02.  -> [1000]"""
    if schedule == "linear":
        first, last = mp.mpf("1e-4"), mp.mpf("0.02")
        return [first + (last - first) * i / (STEPS - 1) for i in range(STEPS)]

    def f(i):
        return mp.cos((mp.mpf(i) / STEPS + mp.mpf("0.008")) / mp.mpf("1.008") * mp.pi / 2) ** 2

    return [min(1 - f(i + 1) / f(i), mp.mpf("0.999")) for i in range(STEPS)]


def left_of(beta):
    """1, and the product of all 1 - beta up to each step.  -> [len(beta) + 1]"""
    left = [mp.mpf(1)]
    for b in beta:
        left.append(left[-1] * (1 - b))
    return left


def log_variances(beta, t):
    """Between which log variances the step back at t lies: of x_{t-1} given x_t and x, and beta."""
    left = left_of(beta)
    i = max(t, 1)
    return mp.log(beta[i] * (1 - left[i]) / (1 - left[i + 1])), mp.log(beta[t])


def noisy_token(beta, x, noise, t):
    """sqrt(a) x + sqrt(1 - a) noise, a the product of all 1 - beta up to t.  [n] -> [n]"""
    a = left_of(beta)[t + 1]
    return [mp.sqrt(a) * x_i + mp.sqrt(1 - a) * n for x_i, n in zip(x, noise, strict=True)]


def row_loss(output, x, noise, t, schedule="cosine"):
    """The squared error of e, and the variational bound in bits.  -> two numbers"""
    beta = noise_of(schedule)
    before, now = left_of(beta)[t : t + 2]
    low, high = log_variances(beta, t)
    e, v = parts(output, 2)
    squared, bound = mp.mpf(0), mp.mpf(0)
    noisy = noisy_token(beta, x, noise, t)
    for e_i, v_i, x_i, noise_i, noisy_i in zip(e, v, x, noise, noisy, strict=True):
        squared += (e_i - noise_i) ** 2
        log_variance = (v_i + 1) / 2 * high + (1 - (v_i + 1) / 2) * low
        guess = mp.sqrt(1 / now) * noisy_i - mp.sqrt(1 / now - 1) * e_i
        if t == 0:
            bound -= mp.log(probability_of_bin(x_i, guess, log_variance))
        else:
            c1 = beta[t] * mp.sqrt(before) / (1 - now)
            ratio = (c1 * (x_i - guess)) ** 2 / mp.exp(log_variance)
            bound += (log_variance - low - 1 + mp.exp(low - log_variance) + ratio) / 2
    return squared / len(e), bound / len(e) / mp.log(2)


def probability_of_bin(x, mean, log_variance):
    """Of the bin, 2/255 wide, of x in [-1, 1], the outermost reaching on; at least 1e-12."""

    def phi(a):
        return (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (a + mp.mpf("0.044715") * a**3))) / 2

    shrink = mp.exp(-log_variance / 2)
    above, below = (phi(shrink * (x - mean + side / mp.mpf(255))) for side in (1, -1))
    p = above if x < -0.999 else 1 - below if x > 0.999 else above - below
    return max(p, mp.mpf("1e-12"))


def step_back(output, noisy, t, noise, temperature, schedule="cosine"):
    """x_{t-1} of all 1000 steps: the mean, and but for t = 0 noise.  [n] -> [n]"""
    beta = noise_of(schedule)
    before, now = left_of(beta)[t : t + 2]
    low, high = log_variances(beta, t)
    x = []
    for e, v, noisy_i, noise_i in zip(*parts(output, 2), noisy, noise, strict=True):
        guess = mp.sqrt(1 / now) * noisy_i - mp.sqrt(1 / now - 1) * e
        of_guess = beta[t] * mp.sqrt(before) / (1 - now)
        of_noisy = (1 - before) * mp.sqrt(1 - beta[t]) / (1 - now)
        deviation = mp.exp(((v + 1) / 2 * high + (1 - (v + 1) / 2) * low) / 2) if t else 0
        x.append(of_guess * guess + of_noisy * noisy_i + deviation * temperature * noise_i)
    return x


# The loss


def loss(params, images, labels, draws, *, patch_size, copies, schedule, **of_model):
    """The mean over all masked tokens of all copies of the batch.  -> a number

    draws: orders [batch, length], of which the first num_masked are masked; timesteps and noise,
    a row for each token of each copy.
    """
    sequences = []
    for image, label, order in zip(images, labels, draws["orders"], strict=True):
        masked = [i in order[: draws["num_masked"]] for i in range(len(order))]
        tokens = tokens_of(image, patch_size)
        z = conditions(params, tokens, label, masked, **of_model)
        sequences.append(list(zip(tokens, z, masked, strict=True)))
    beta, terms = noise_of(schedule), []
    rows = iter(zip(draws["timesteps"], draws["noise"], strict=True))
    for _ in range(copies):
        for token, z, is_masked in (row for sequence in sequences for row in sequence):
            t, noise = next(rows)
            if is_masked:
                noisy = noisy_token(beta, token, noise, t)
                output = network(params["diffusion"], noisy, t, z)
                terms.append(sum(row_loss(output, token, noise, t, schedule)))
    return sum(terms) / len(terms)
