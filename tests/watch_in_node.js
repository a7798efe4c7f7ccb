// Runs the JavaScript of `marref watch` without a browser: a JSON request on stdin, the files to
// load as arguments, a JSON answer on stdout.
"use strict";

const fs = require("node:fs");
const vm = require("node:vm");

for (const file of process.argv.slice(2)) {
  vm.runInThisContext(fs.readFileSync(file, "utf-8"), { filename: file });
}

function flatten(tree, prefix = "") {
  if (ArrayBuffer.isView(tree)) return [[prefix, Array.from(tree)]];
  const joined = (key) => (prefix ? `${prefix}.${key}` : key);
  return Object.entries(tree).flatMap(([key, branch]) => flatten(branch, joined(key)));
}

function decode({ config, params }, { tokens, label, rule, guidance_scale = 1, drawn }) {
  const steps = [];
  let state = start(tokens, rule);
  const is_over = () => (drawn ? steps.length === drawn.length : is_done(state));
  while (!is_over()) {
    const { logits } = look(config, params, state.tokens, label, guidance_scale);
    state = advance(state, logits, rule, drawn?.[steps.length]);
    steps.push(state);
  }
  return steps;
}

const answers = {
  forward: ({ config, params }, { tokens, label }) =>
    Object.fromEntries(flatten(forward(config, params, tokens, label))),
  decode,
  schedule: (_, { name, num_masked, num_steps }) => SCHEDULES[name](num_masked, num_steps),
  halton: (_, { length }) => halton(length),
  gate: (_, { x, gelu }) => x.map(gelu === "erf" ? normal_distribution : tanh_gate),
  uniforms: (_, { seed, step, purpose, length }) => uniforms_of(seed, step, purpose, length),
};

const { model, jobs } = JSON.parse(fs.readFileSync(0, "utf-8"));
if (model) model.params = unpack(model.shapes, Buffer.from(model.weights, "base64"));
process.stdout.write(JSON.stringify(jobs.map((job) => answers[job.do](model, job))));
