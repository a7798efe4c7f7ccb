// The iterative decoder for one sequence: marref/decoding and marref/schedules.py again.
//
// A step answers three questions: what would each masked position be (predict), which come first
// (rank), and how many are revealed now (the schedule, or a threshold). Chance is an argument: an
// array of uniform numbers for the tokens and one of noise for the order, each with a number for
// every position. So whoever gives the numbers that marref drew gets marref's tokens.
"use strict";

const MASK = 0;

// How many tokens each of K steps reveals of N masked ones; see marref/schedules.py.
const SCHEDULES = {
  // floor(N cos(πk/2K)) stay masked after step k. The floor is that of the exact number: at
  // k = 2K/3 the cosine is 1/2, which floating point may miss.
  cosine(num_masked, num_steps) {
    return counts_of(num_masked, num_steps, (k, steps, before) => {
      const cosine = 3 * k === 2 * steps ? 0.5 : Math.cos((Math.PI * k) / (2 * steps));
      return Math.max(1, Math.min(before - 1, Math.floor(num_masked * cosine)));
    });
  },
  // (1 - k/K) N stay masked, rounded, halves up.
  linear(num_masked, num_steps) {
    return counts_of(num_masked, num_steps, (k, steps) =>
      Math.floor((2 * (steps - k) * num_masked + steps) / (2 * steps)),
    );
  },
};

// Turn what stays masked after step k into what step k reveals.
function counts_of(num_masked, num_steps, masked_after) {
  const steps = Math.min(num_steps, num_masked);
  const counts = [];
  let before = num_masked;
  for (let k = 1; k <= steps; k++) {
    const after = k === steps ? 0 : masked_after(k, steps, before);
    counts.push(before - after);
    before = after;
  }
  return counts;
}

// Where decoding starts. A rule has marref's arguments: num_steps, temperature, schedule, order,
// choice_temperature, exclude_mask_token and, if not the schedule says how many, reveal.
function start(tokens, rule) {
  const mask = tokens.map((token) => token === MASK);
  const num_masked = mask.filter(Boolean).length;
  return {
    number: 0,
    tokens,
    mask,
    confidence: tokens.map(() => 1),
    counts: SCHEDULES[rule.schedule](num_masked, rule.num_steps),
  };
}

function is_done(state) {
  return !state.mask.includes(true);
}

// Whether the rule draws something besides tokens.
function needs_noise(rule) {
  return rule.order === "random" || rule.choice_temperature > 0;
}

// Take a step: from a state and the model's logits [length, vocab_size] to the next state, with all
// that led to it. uniforms and noise are arrays [length], or null.
function advance(state, logits, rule, { uniforms = null, noise = null } = {}) {
  const number = state.number + 1;
  const vocab_size = logits.length / state.tokens.length;
  const predictions = state.mask.map((masked, p) => {
    if (!masked) return null;
    const row = logits.subarray(p * vocab_size, (p + 1) * vocab_size);
    return predict(row, rule, uniforms === null ? null : uniforms[p]);
  });
  const confidence = predictions.map((found, p) => found?.confidence ?? state.confidence[p]);
  const score = predictions.map((found) => found?.score ?? -Infinity);
  const progress = Math.min(number / Math.max(num_rounds(state, rule), 1), 1);
  const priority = rank(score, state.mask, progress, rule, noise);
  const count = count_of(state, confidence, rule);
  const place = places(priority);
  const revealed = state.mask.map((masked, p) => masked && place[p] < count);
  return {
    number,
    tokens: state.tokens.map((token, p) => (revealed[p] ? predictions[p].token : token)),
    mask: state.mask.map((masked, p) => masked && !revealed[p]),
    predicted: predictions.map((found, p) => found?.token ?? state.tokens[p]),
    confidence,
    score,
    count,
    revealed,
    place,
    counts: state.counts,
  };
}

function num_rounds(state, rule) {
  return rule.reveal ? rule.num_steps : state.counts.length;
}

// How many are revealed: what the schedule says, or all of p >= t and at least one.
function count_of(state, confidence, rule) {
  if (!rule.reveal) return state.counts[state.number] ?? 0;
  const sure = confidence.filter((p, i) => state.mask[i] && p >= rule.reveal.probability);
  return Math.min(Math.max(sure.length, 1), state.mask.filter(Boolean).length);
}

// First question: the token of a position, the probability of it, and the score it is ranked by.
function predict(logits, rule, uniform) {
  const allowed = Float64Array.from(logits);
  if (rule.exclude_mask_token) allowed[MASK] = -Infinity;
  const log_p = log_softmax(allowed, rule.temperature || 1);
  let token = arg_max(allowed);
  if (uniform !== null && rule.temperature > 0) token = draw(log_p, uniform);
  return { token, confidence: Math.exp(log_p[token]), score: score_of(log_p, token, rule.order) };
}

// log softmax(z / T). The largest term of the sum, which is 1, is left to log1p: the logarithm of a
// probability that is almost 1 keeps its digits.
function log_softmax(logits, temperature) {
  const largest = arg_max(logits);
  const shifted = logits.map((logit) => (logit - logits[largest]) / temperature);
  let others = 0;
  shifted.forEach((value, id) => {
    if (id !== largest) others += Math.exp(value);
  });
  return shifted.map((value) => value - Math.log1p(others));
}

// The lowest of the ids whose logit is the largest.
function arg_max(logits) {
  let largest = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[largest]) largest = id;
  return largest;
}

// The first id whose cumulative probability, divided by the total, is above the uniform number.
function draw(log_p, uniform) {
  const total = log_p.reduce((sum, value) => sum + Math.exp(value), 0);
  let cumulative = 0;
  return log_p.findIndex((value) => {
    cumulative += Math.exp(value);
    return cumulative > uniform * total;
  });
}

// log p, log (p₁ - p₂) or Σ p log p.
function score_of(log_p, token, order) {
  if (order === "margin") {
    const [first, second] = [...log_p].sort((a, b) => b - a);
    return first + Math.log1p(-Math.exp(second - first));
  }
  if (order === "entropy") {
    return log_p.reduce((sum, value) => sum + (value > -Infinity ? Math.exp(value) * value : 0), 0);
  }
  return log_p[token];
}

// Second question: the number by which a position is revealed, the largest first.
function rank(score, mask, progress, rule, noise) {
  const length = score.length;
  let priority = score;
  if (rule.choice_temperature > 0) {
    priority = score.map((s, p) => s + rule.choice_temperature * (1 - progress) * noise[p]);
  } else if (rule.order === "random") {
    priority = noise;
  } else if (rule.order === "left-to-right") {
    priority = score.map((_, p) => -p);
  } else if (rule.order === "halton") {
    const order = halton(length);
    priority = score.map((_, p) => -order.indexOf(p));
  }
  return mask.map((masked, p) => (masked ? Math.max(priority[p], -Number.MAX_VALUE) : -Infinity));
}

// The place of each position in the order of priority, 0 first; of equals the lower position.
function places(priority) {
  const order = priority.map((_, p) => p);
  order.sort((a, b) => (priority[a] === priority[b] ? a - b : priority[b] > priority[a] ? 1 : -1));
  const place = new Array(priority.length);
  order.forEach((p, index) => (place[p] = index));
  return place;
}

function is_square(length) {
  return Number.isInteger(Math.sqrt(length));
}

// Positions of a square grid in the order in which the Halton sequence first visits them.
function halton(length) {
  if (!is_square(length)) throw new RangeError(`halton: length ${length}, expected a square`);
  const side = Math.sqrt(length);
  const visited = new Set();
  for (let index = 1; visited.size < length; index++) {
    visited.add(digits_reversed(index, 2, side) * side + digits_reversed(index, 3, side));
  }
  return [...visited];
}

// floor(scale φ), φ being the digits of index in a base, mirrored behind the point.
function digits_reversed(index, base, scale) {
  let numerator = 0;
  let denominator = 1;
  for (; index > 0; index = Math.floor(index / base)) {
    numerator = numerator * base + (index % base);
    denominator *= base;
  }
  return Math.floor((scale * numerator) / denominator);
}

// What a step sees of the model: all activations, and the logits, guided unless the scale is 1.
function look(config, params, tokens, label, guidance_scale) {
  const activations = forward(config, params, tokens, label);
  if (guidance_scale === 1) return { activations, logits: activations.logits };
  const unconditional = forward(config, params, tokens).logits;
  return { activations, logits: guide(activations.logits, unconditional, guidance_scale) };
}

// u + s (c - u): from the logits of no class towards those of the class, and beyond with s > 1.
function guide(conditional, unconditional, scale) {
  return conditional.map((c, i) => unconditional[i] + scale * (c - unconditional[i]));
}

// Gumbel noise of uniform numbers.
function gumbel(uniforms) {
  return uniforms.map((u) => -Math.log(-Math.log(u)));
}

// Uniform numbers in [0, 1) that depend on the seed, the step and what they are for, and on nothing
// that was drawn before: the same numbers serve every rule. The generator is splitmix64's little
// brother of 32 bits (Steele, Lea & Flood 2014, with the constants of MurmurHash3's finaliser); two
// of its numbers make the 53 bits of one here. It is not NumPy's: with the same seed marref draws
// others.
function uniforms_of(seed, step, purpose, length) {
  let counter = 0;
  for (const part of [seed, step, purpose]) counter = mix(counter + part + 0x9e3779b9);
  const next = () => mix((counter += 0x9e3779b9));
  return Array.from({ length }, () => ((next() >>> 5) * 2 ** 26 + (next() >>> 6)) / 2 ** 53);
}

function mix(bits) {
  bits = Math.imul(bits ^ (bits >>> 16), 0x85ebca6b);
  bits = Math.imul(bits ^ (bits >>> 13), 0xc2b2ae35);
  return (bits ^ (bits >>> 16)) >>> 0;
}
