"""MAR in plain loops over 50-digit numbers: the witness that shares nothing with the package.

Every function is one formula of the architecture, written down as it stands: no arrays, no
tricks against overflow (these numbers have no largest one), no batching but a loop. A vector is
a list of numbers, a sequence a list of vectors, a kernel the list of its rows ([in, out]). What
enters as a float enters exactly.
"""

from fractions import Fraction

import mpmath

mp = mpmath.MPContext()  # a context of its own: the precision of everybody else stays as it is
mp.dps = 50


def exact(tree):
    """Give the same nested dicts and lists with 50-digit numbers, arrays as nested lists."""
    if isinstance(tree, dict):
        return {name: exact(branch) for name, branch in tree.items()}
    if isinstance(tree, list):
        return [exact(branch) for branch in tree]
    return mp.mpf(tree) if isinstance(tree, float) else exact(tree.tolist())


# The model


def forward(params, tokens, labels=None, *, num_heads, gelu, positions, epsilon):
    """Logits of every sequence by itself.  tokens: [batch, length] -> [batch, length, vocab_size]

    x = table[tokens] + sinusoids, and + class_table[label] with labels [batch];  in every block
    x += attention(norm(x)), then x += feed_forward(norm(x));  logits = head(norm(x)).
    """
    logits = []
    for sequence, label in zip(tokens, labels or [None] * len(tokens), strict=True):
        table = params["embedding"]["table"]
        waves = sinusoidal_table(len(sequence), len(table[0]), positions)
        x = [add(table[token], wave) for token, wave in zip(sequence, waves, strict=True)]
        if label is not None:
            x = [add(vector, params["class_embedding"]["table"][label]) for vector in x]
        for block in params["blocks"]:
            normed = [layer_norm(block["attention_norm"], vector, epsilon) for vector in x]
            branch = attention(block["attention"], normed, num_heads)
            x = [add(vector, change) for vector, change in zip(x, branch, strict=True)]
            normed = [layer_norm(block["feed_forward_norm"], vector, epsilon) for vector in x]
            branch = [feed_forward(block["feed_forward"], vector, gelu) for vector in normed]
            x = [add(vector, change) for vector, change in zip(x, branch, strict=True)]
        normed = [layer_norm(params["final_norm"], vector, epsilon) for vector in x]
        logits.append([linear(params["head"], vector) for vector in normed])
    return logits


def sinusoidal_table(length, embed_dim, positions):
    """sin(p w_i) and cos(p w_i) for every position p.  -> [length, embed_dim]

    "concatenated": all sines, then all cosines, w_i = 10000^(-i / max(half - 1, 1));
    "interleaved": sine, cosine, sine, cosine, ..., w_i = 10000^(-2i / embed_dim);
    i = 0 .. half - 1 and half = embed_dim / 2.
    """
    half = embed_dim // 2
    table = []
    for p in range(length):
        if positions == "concatenated":
            angles = [p * mp.mpf(10000) ** (mp.mpf(-i) / max(half - 1, 1)) for i in range(half)]
            table.append([mp.sin(angle) for angle in angles] + [mp.cos(angle) for angle in angles])
        elif positions == "interleaved":
            angles = [p * mp.mpf(10000) ** (mp.mpf(-2 * i) / embed_dim) for i in range(half)]
            table.append([wave(angle) for angle in angles for wave in (mp.sin, mp.cos)])
        else:
            raise ValueError(positions)
    return table


def layer_norm(params, x, epsilon):
    """y_i = (x_i - mean) / sqrt(variance + epsilon) * scale_i + bias_i.  [features] -> [features]

    The variance is the biased one, (1/n) sum_i (x_i - mean)^2.
    """
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    deviation = mp.sqrt(variance + mp.mpf(epsilon))
    scaled = [(value - mean) / deviation * s for value, s in zip(x, params["scale"], strict=True)]
    return add(scaled, params["bias"])


def attention(params, x, num_heads):
    """softmax(Q K^T / sqrt(head_dim)) V for each head, its results side by side, then `output`.

    x: [length, embed_dim] -> [length, embed_dim].  A head owns head_dim consecutive features of
    the queries, the keys and the values.
    """
    queries, keys, values = (
        [linear(params[name], vector) for vector in x] for name in ("query", "key", "value")
    )
    head_dim = len(queries[0]) // num_heads
    y = []
    for query in queries:
        mixed = []
        for head in range(num_heads):
            own = slice(head * head_dim, (head + 1) * head_dim)
            scores = [dot(query[own], key[own]) / mp.sqrt(head_dim) for key in keys]
            weights = softmax(scores)
            for column in zip(*(value[own] for value in values), strict=True):
                mixed.append(dot(weights, column))
        y.append(linear(params["output"], mixed))
    return y


def feed_forward(params, x, gelu):
    """down(gelu(up(x))).  [embed_dim] -> [embed_dim]"""
    activation = {"erf": gelu_erf, "tanh": gelu_tanh}[gelu]
    return linear(params["down"], [activation(value) for value in linear(params["up"], x)])


def gelu_erf(x):
    """x Phi(x) = x/2 (1 + erf(x / sqrt(2))), Phi the standard normal distribution function."""
    return x / 2 * (1 + mp.erf(x / mp.sqrt(2)))


def gelu_tanh(x):
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    return x / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (x + mp.mpf("0.044715") * x**3)))


def softmax(x):
    """exp(x_i) / sum_j exp(x_j).  [n] -> [n]"""
    powers = [mp.exp(value) for value in x]
    total = sum(powers)
    return [power / total for power in powers]


def linear(params, x):
    """y_j = sum_i x_i kernel_ij + bias_j.  [in] -> [out]"""
    return add([dot(x, column) for column in zip(*params["kernel"], strict=True)], params["bias"])


def dot(x, y):
    """sum_i x_i y_i.  [n], [n] -> a number"""
    return sum(a * b for a, b in zip(x, y, strict=True))


def add(x, y):
    """x_i + y_i.  [n], [n] -> [n]"""
    return [a + b for a, b in zip(x, y, strict=True)]


# The loss


def masked_loss(logits, targets, mask):
    """-(1/|M|) sum_{i in M} log softmax(logits_i)[target_i], and 0 where M is empty.

    M are the masked positions of the whole batch.
    logits: [batch, length, vocab_size]; targets, mask: [batch, length] -> a number
    """
    terms = []
    for rows, ids, flags in zip(logits, targets, mask, strict=True):
        for row, target, masked in zip(rows, ids, flags, strict=True):
            if masked:
                terms.append(-mp.log(softmax(row)[target]))
    return sum(terms) / len(terms) if terms else mp.mpf(0)


# Decoding


def masked_after_steps(num_masked, num_steps, schedule):
    """How many positions are masked after each step k = 1 .. K, K = min(num_steps, N).

    N is `num_masked`, and m what the step before has left.  The last step leaves 0, else
    "cosine": max(1, min(m - 1, floor(N cos(pi k / 2K))));
    "linear": N (1 - k/K), rounded to the nearest integer, halves away from zero.
    """
    last = min(num_steps, num_masked)
    counts = []
    m = num_masked
    for k in range(1, last + 1):
        if k == last:
            m = 0
        elif schedule == "cosine":
            m = max(1, min(m - 1, floor_of_cosine(num_masked, Fraction(k, last))))
        elif schedule == "linear":
            m = int(num_masked * (1 - Fraction(k, last)) + Fraction(1, 2))
        else:
            raise ValueError(schedule)
        counts.append(m)
    return counts


def floor_of_cosine(n, x):
    """floor(n cos(pi x / 2)) for an integer n and a fraction 0 < x < 1.

    By Niven's theorem the cosine is rational only at x = 2/3, where it is 1/2; every other
    n cos(pi x / 2) is no integer, and 50 digits are on the right side of the nearest one.
    """
    if x == Fraction(2, 3):
        return n // 2
    return int(mp.floor(n * mp.cos(mp.pi * x.numerator / (2 * x.denominator))))


def guided(conditional, unconditional, scale):
    """u + s (c - u).  [n], [n] -> [n]"""
    pairs = zip(conditional, unconditional, strict=True)
    return [u + scale * (c - u) for c, u in pairs]


def guidance_scales(num_masked, length, num_steps, schedule, scale):
    """1 + (s - 1) r for each step, r the fraction of all positions that are known after it."""
    left = masked_after_steps(num_masked, num_steps, schedule)
    return [1 + (scale - 1) * mp.mpf(length - masked) / length for masked in left]


def decode(logits_of, tokens, *, num_steps, temperature, schedule, mask_token_id=0):
    """Reveal one sequence, the most confident positions first.

    tokens: [length], `mask_token_id` where unknown; logits_of: [length] -> [length, vocab_size].
    Returns a list with (tokens, mask, confidence) after each step, all [length].

    A step predicts the arg max of the logits (the lower id of equals), [MASK] having the logit
    -inf, with confidence max softmax(logits / temperature), and reveals as many masked positions
    as the schedule says, in the order of falling confidence (the lower position of equals first).
    A known token has confidence 1, a revealed one that of its step, a masked one the latest.
    """
    tokens = list(tokens)
    mask = [token == mask_token_id for token in tokens]
    confidence = [mp.mpf(1)] * len(tokens)
    steps = []
    for remaining in masked_after_steps(sum(mask), num_steps, schedule):
        logits = logits_of(tokens)
        masked = [position for position, flag in enumerate(mask) if flag]
        predicted = {}
        for position in masked:
            ids = [token for token in range(len(logits[position])) if token != mask_token_id]
            scores = [logits[position][token] for token in ids]
            predicted[position] = ids[scores.index(max(scores))]
            confidence[position] = max(softmax([score / mp.mpf(temperature) for score in scores]))
        order = sorted(masked, key=lambda position: (-confidence[position], position))
        for position in order[: len(masked) - remaining]:
            tokens[position] = predicted[position]
            mask[position] = False
        steps.append((list(tokens), list(mask), list(confidence)))
    return steps


def drawn_from(logits, *, temperature, top_k=None, top_p=None, mask_token_id=0):
    """Give the probability with which each id is drawn at a masked position.

    logits: [vocab_size] -> [vocab_size]

    p = softmax(logits / temperature), [MASK] having the logit -inf.  Taken one by one, the most
    probable first and the lower of equals first, an id is kept if fewer than top_k were taken
    before it, and if those have less than top_p together.  What is kept is divided by its sum.
    """
    ids = [token for token in range(len(logits)) if token != mask_token_id]
    p = dict(zip(ids, softmax([logits[token] / mp.mpf(temperature) for token in ids]), strict=True))
    kept, taken = {}, mp.mpf(0)
    for number, token in enumerate(sorted(ids, key=lambda token: (-logits[token], token))):
        if (top_k is None or number < top_k) and (top_p is None or taken < top_p):
            kept[token] = p[token]
        taken += p[token]
    total = sum(kept.values())
    return [kept.get(token, mp.mpf(0)) / total for token in range(len(logits))]
