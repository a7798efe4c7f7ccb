// The forward pass of MAR in float32, for one sequence: marref/model.py and marref/layers again.
//
//     x = embedding(tokens)
//     x = x + class_embedding(label)        where the model has classes
//     x = block(x)                          num_layers times
//     logits = linear(layer_norm(x))        the head
//
// An array is a Float32Array, row by row; the comment above a function gives its shape. Sums are
// made in JavaScript's own numbers, float64, and rounded once, when they are stored. The names are
// marref's, in its spelling, so that both can be read side by side.
"use strict";

// Compute all activations of a sequence, the logits last: a tree whose dotted names are those of
// the golden vectors, as blocks.0.attention.weights. The label num_classes is no class.
function forward(config, params, tokens, label = config.num_classes) {
  const activations = { embedding: embedding(params.embedding, tokens, config) };
  let x = activations.embedding;
  if (config.num_classes !== undefined) {
    const added = class_embedding(params.class_embedding, label, config);
    activations.class_embedding = added;
    x = x.map((value, i) => value + added[i % config.embed_dim]);
  }
  activations.blocks = params.blocks.map((block_params) => {
    const of_block = block(block_params, x, config);
    x = of_block.output;
    return of_block;
  });
  activations.final_norm = layer_norm(params.final_norm, x, config.layer_norm_epsilon);
  activations.logits = linear(params.head, activations.final_norm);
  return activations;
}

// table[token] + position: tokens [length] -> [length, embed_dim]
function embedding({ table }, tokens, { embed_dim, positions }) {
  const x = new Float32Array(tokens.length * embed_dim);
  tokens.forEach((token, p) => {
    for (let i = 0; i < embed_dim; i++) {
      const wave = Math.fround(sinusoid(p, i, embed_dim, positions));
      x[p * embed_dim + i] = table[token * embed_dim + i] + wave;
    }
  });
  return x;
}

// Feature i of position p: sin(p w) or cos(p w), see marref/positions.py.
function sinusoid(p, i, embed_dim, positions) {
  const half = embed_dim / 2;
  if (positions === "interleaved") {
    const angle = p * 10000 ** -((2 * Math.floor(i / 2)) / embed_dim);
    return i % 2 === 0 ? Math.sin(angle) : Math.cos(angle);
  }
  const angle = p * 10000 ** -((i % half) / Math.max(half - 1, 1));
  return i < half ? Math.sin(angle) : Math.cos(angle);
}

// What the class adds at every position: [embed_dim]
function class_embedding({ table }, label, { embed_dim }) {
  return table.slice(label * embed_dim, (label + 1) * embed_dim);
}

// x + attention(norm(x)), then x + feed_forward(norm(x)): [length, embed_dim], as output
function block(params, x, { num_heads, gelu, layer_norm_epsilon }) {
  const attention_norm = layer_norm(params.attention_norm, x, layer_norm_epsilon);
  const of_attention = attention(params.attention, attention_norm, num_heads);
  const attended = add(x, of_attention.output);
  const feed_forward_norm = layer_norm(params.feed_forward_norm, attended, layer_norm_epsilon);
  const of_feed_forward = feed_forward(params.feed_forward, feed_forward_norm, gelu);
  const output = add(attended, of_feed_forward.down);
  return {
    attention_norm,
    attention: of_attention,
    feed_forward_norm,
    feed_forward: of_feed_forward,
    output,
  };
}

// scale (x - mean) / sqrt(variance + epsilon) + bias, over the features of each position:
// [length, features] -> the same
function layer_norm({ scale, bias }, x, epsilon) {
  const features = scale.length;
  const y = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += features) {
    let mean = 0;
    for (let i = 0; i < features; i++) mean += x[start + i] / features;
    let variance = 0;
    for (let i = 0; i < features; i++) variance += (x[start + i] - mean) ** 2 / features;
    const inverse_std = 1 / Math.sqrt(variance + epsilon);
    for (let i = 0; i < features; i++) {
      y[start + i] = scale[i] * (x[start + i] - mean) * inverse_std + bias[i];
    }
  }
  return y;
}

// x kernel + bias: [length, inputs] -> [length, outputs]
function linear({ kernel, bias }, x) {
  const outputs = bias.length;
  const inputs = kernel.length / outputs;
  const y = new Float32Array((x.length / inputs) * outputs);
  const sums = new Float64Array(outputs);
  for (let row = 0; row * inputs < x.length; row++) {
    sums.set(bias);
    for (let i = 0; i < inputs; i++) {
      const x_i = x[row * inputs + i];
      for (let o = 0; o < outputs; o++) sums[o] += x_i * kernel[i * outputs + o];
    }
    y.set(sums, row * outputs);
  }
  return y;
}

// Every position gathers from all positions: [length, embed_dim] -> the same, as output
function attention(params, x, num_heads) {
  const length = x.length / params.output.bias.length;
  const split = (projection) => split_heads(linear(projection, x), length, num_heads);
  const [query, key, value] = [params.query, params.key, params.value].map(split);
  const weights = attention_weights(query, key, length, num_heads);
  const context = gather(weights, value, length, num_heads);
  return { query, key, value, weights, context, output: linear(params.output, context) };
}

// softmax(query keyᵀ / √head_dim) over the keys, for each head:
// [num_heads, length, head_dim] twice -> [num_heads, length, length]
function attention_weights(query, key, length, num_heads) {
  const head_dim = query.length / (num_heads * length);
  const weights = new Float32Array(num_heads * length * length);
  const scores = new Float64Array(length);
  for (let row = 0; row < num_heads * length; row++) {
    const head = Math.floor(row / length);
    for (let k = 0; k < length; k++) {
      let product = 0;
      for (let i = 0; i < head_dim; i++) {
        product += query[row * head_dim + i] * key[(head * length + k) * head_dim + i];
      }
      scores[k] = product / Math.sqrt(head_dim);
    }
    weights.set(softmax(scores), row * length);
  }
  return weights;
}

// weights value for each head, the heads side by side:
// [num_heads, length, length], [num_heads, length, head_dim] -> [length, embed_dim]
function gather(weights, value, length, num_heads) {
  const head_dim = value.length / (num_heads * length);
  const context = new Float32Array(value.length);
  const sums = new Float64Array(head_dim);
  for (let head = 0; head < num_heads; head++) {
    for (let q = 0; q < length; q++) {
      sums.fill(0);
      for (let k = 0; k < length; k++) {
        const weight = weights[(head * length + q) * length + k];
        const start = (head * length + k) * head_dim;
        for (let i = 0; i < head_dim; i++) sums[i] += weight * value[start + i];
      }
      context.set(sums, (q * num_heads + head) * head_dim);
    }
  }
  return context;
}

// [length, embed_dim] -> [num_heads, length, head_dim]
function split_heads(x, length, num_heads) {
  const head_dim = x.length / (num_heads * length);
  const heads = new Float32Array(x.length);
  for (let p = 0; p < length; p++) {
    for (let head = 0; head < num_heads; head++) {
      const start = (p * num_heads + head) * head_dim;
      heads.set(x.subarray(start, start + head_dim), (head * length + p) * head_dim);
    }
  }
  return heads;
}

// exp(s) / Σ exp(s), less the maximum first so that exp cannot overflow: [n] -> [n]
function softmax(scores) {
  let largest = -Infinity;
  for (let i = 0; i < scores.length; i++) largest = Math.max(largest, scores[i]);
  const weights = new Float64Array(scores.length);
  let sum = 0;
  for (let i = 0; i < scores.length; i++) {
    weights[i] = Math.exp(scores[i] - largest);
    sum += weights[i];
  }
  for (let i = 0; i < scores.length; i++) weights[i] /= sum;
  return weights;
}

// down(gelu(up(x))): [length, embed_dim] -> the same, as down
function feed_forward(params, x, gelu) {
  const up = linear(params.up, x);
  const gate = gelu === "erf" ? normal_distribution : tanh_gate;
  const activation = up.map((value) => value * gate(value));
  return { up, activation, down: linear(params.down, activation) };
}

// Φ(x), the exact gate of GELU. Near 0 by the series 1/2 + φ(x) (x + x³/3 + x⁵/(3·5) + …), further
// out by the continued fraction Φ(-a) = φ(a) / (a + 1/(a + 2/(a + 3/(a + …)))), which keeps the
// digits of a small tail (Abramowitz & Stegun 1964, 26.2.11 and 26.2.14).
function normal_distribution(x) {
  const density = Math.exp(-0.5 * x * x) / Math.sqrt(2 * Math.PI);
  const a = Math.abs(x);
  if (a < 3) {
    let term = x;
    let sum = x;
    for (let odd = 3; Math.abs(term) > 1e-17; odd += 2) {
      term *= (x * x) / odd;
      sum += term;
    }
    return 0.5 + density * sum;
  }
  let fraction = a;
  for (let n = 40; n > 0; n--) fraction = a + n / fraction;
  const tail = density / fraction;
  return x < 0 ? tail : 1 - tail;
}

// σ(2u) = (1 + tanh u)/2, u = √(2/π) (x + 0.044715 x³): the gate of GELU's approximation.
function tanh_gate(x) {
  const u = Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x);
  return 1 / (1 + Math.exp(-2 * u));
}

function add(x, y) {
  return x.map((value, i) => value + y[i]);
}

// Make the tree of parameters: blocks is a list, and all numbers lie one after the other in bytes,
// in the order of shapes, little-endian. A DataView reads them so on every machine.
function unpack(shapes, bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const params = { blocks: [] };
  let offset = 0;
  for (const [name, shape] of Object.entries(shapes)) {
    const leaf = new Float32Array(shape.reduce((a, b) => a * b, 1));
    for (let i = 0; i < leaf.length; i++, offset += 4) leaf[i] = view.getFloat32(offset, true);
    const path = name.split(".");
    const last = path.pop();
    path.reduce((tree, key) => (tree[key] ??= {}), params)[last] = leaf;
  }
  return params;
}
