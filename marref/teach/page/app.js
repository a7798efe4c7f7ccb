// The page: it keeps a start, the states that follow from it, and which of them is shown.
//
// Whatever is changed (a token, the rule) makes a new history. Only states are kept; the forward
// pass of the step that is shown is computed when it is shown.
"use strict";

const model = JSON.parse(document.getElementById("model").textContent);
const params = unpack(model.shapes, bytes_of(model.weights));
const codec = model.codec;
const alphabet = Array.from(codec.alphabet ?? "");
const is_text = codec.kind === "characters" || codec.kind === "bytes";

// What each choice of "Rule" says in marref's arguments; what it leaves out is the default.
const RULES = {
  confidence: {},
  maskgit: { choice_temperature: 4.5 },
  margin: { order: "margin" },
  entropy: { order: "entropy" },
  random: { order: "random" },
  halton: { order: "halton" },
  "left-to-right": { order: "left-to-right" },
  threshold: { reveal: { rule: "threshold", probability: 0.9 } },
};
const FOR_TOKENS = 0;
const FOR_ORDER = 1;
const NUM_CANDIDATES = 5;
const NUMBERS = ["temperature", "num-steps", "seed", "guidance"];
// Of more steps than this the chart draws no gaps between bars: they would hide the bars.
const MANY_STEPS = 24;
// From here on the colour of a blank, in either theme, has more contrast to the other text colour.
const SURE = 0.68;

const page = {
  history: [], // [0] is the start, [k] the state after step k
  step: 0, // the one that is shown
  seen: null, // the forward pass of that step: its input, activations and logits
  selected: 0,
  columns: 1,
  latest: 0, // counts the requests to show a step, so that a later one ends an earlier one
};

const at = (id) => document.getElementById(id);
const cells_of = (id) => at(id).querySelectorAll(".cell");

function bytes_of(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

// Settings

function settings() {
  const rule = {
    num_steps: number_of("num-steps"),
    temperature: number_of("temperature"),
    schedule: at("schedule").value,
    order: "confidence",
    choice_temperature: 0,
    exclude_mask_token: true,
    ...RULES[at("rule").value],
  };
  const draws = at("drawn").value === "drawn";
  // As in marref: where something is drawn, tokens are too, unless the temperature is 0.
  if (needs_noise(rule) && !draws) rule.temperature = 0;
  const label = at("class").value === "" ? undefined : Number(at("class").value);
  const guidance_scale = label === undefined ? 1 : number_of("guidance");
  return { rule, draws, label, guidance_scale, seed: number_of("seed") };
}

// The number in a field, within the bounds of the field; the default where there is none.
function number_of(id) {
  const { valueAsNumber, defaultValue, min, max, step } = at(id);
  const number = Number.isNaN(valueAsNumber) ? Number(defaultValue) : valueAsNumber;
  const rounded = step === "1" ? Math.floor(number) : number;
  return Math.min(Math.max(rounded, Number(min)), Number(max));
}

// Let each field show what is used of it, and be disabled where it has no effect.
function show_settings() {
  for (const id of NUMBERS) at(id).value = number_of(id);
  const { rule, draws, label } = settings();
  at("temperature").disabled = needs_noise(rule) && !draws;
  for (const id of ["num-steps", "schedule"]) at(id).disabled = rule.reveal !== undefined;
  at("planned-legend").hidden = rule.reveal !== undefined;
  at("seed").disabled = !needs_noise(rule) && !(draws && rule.temperature > 0);
  at("guidance").disabled = label === undefined;
  at("call").textContent = call_of(settings());
}

// The call of marref.iterative_decode that does what the page does.
function call_of({ rule, draws, label, guidance_scale }) {
  const told = rule.reveal ? {} : { num_steps: rule.num_steps };
  if (rule.order !== "confidence") told.order = `"${rule.order}"`;
  if (rule.choice_temperature > 0) told.choice_temperature = rule.choice_temperature;
  if (rule.reveal) told.reveal = `marref.decoding.Threshold(${rule.reveal.probability})`;
  else if (rule.schedule !== "cosine") told.schedule = `"${rule.schedule}"`;
  if (rule.temperature !== 1) told.temperature = rule.temperature;
  if (label !== undefined) told.labels = `[${label}]`;
  if (guidance_scale !== 1) told.guidance_scale = guidance_scale;
  told.tokens = "tokens";
  if (draws || needs_noise(rule)) told.rng = "rng";
  const listed = Object.entries(told).map(([name, value]) => `${name}=${value}`);
  return `marref.iterative_decode(model, params, ${listed.join(", ")})`;
}

// Decoding

// The settings have changed: decode again from the same start, as far as now.
function decode_again() {
  show_settings();
  const step = page.step;
  page.history = [start(page.history[0].tokens, settings().rule)];
  show_at(step);
}

// Let the model look at a state.
function see(input) {
  const { label, guidance_scale } = settings();
  page.seen = { input, ...look(model.config, params, input.tokens, label, guidance_scale) };
}

function take_step() {
  const state = page.history.at(-1);
  const { rule, draws, seed } = settings();
  see(state);
  const number = state.number + 1;
  const length = state.tokens.length;
  const uniforms = draws ? uniforms_of(seed, number, FOR_TOKENS, length) : null;
  const for_order = uniforms_of(seed, number, FOR_ORDER, length);
  const noise = rule.order === "random" ? for_order : gumbel(for_order);
  page.history.push(advance(state, page.seen.logits, rule, { uniforms, noise }));
}

// Decode as far as a step, or to the end if that comes first, and show it. In between the browser
// may draw, and whoever asks for another step ends this.
async function show_at(step) {
  const ticket = ++page.latest;
  let paused = performance.now();
  // At step 0 the predictions of step 1 are shown.
  while (page.history.length <= Math.max(step, 1) && !is_done(page.history.at(-1))) {
    take_step();
    if (performance.now() - paused > 50 && page.history.length <= step) {
      page.step = page.history.length - 1;
      show();
      at("status").textContent = "Computing …";
      await new Promise((resume) => setTimeout(resume));
      if (ticket !== page.latest) return;
      paused = performance.now();
    }
  }
  page.step = Math.min(step, page.history.length - 1);
  if (page.seen?.input !== input_of_step()) see(input_of_step());
  show();
  at("status").textContent = sentence_of_step();
}

function shown_state() {
  return page.history[page.step];
}

// The state with the predictions that are shown, and the one that these were made from.
function state_of_predictions() {
  return page.history[Math.min(Math.max(page.step, 1), page.history.length - 1)];
}

function input_of_step() {
  return page.history[Math.max(page.step - 1, 0)];
}

function last_step() {
  const { rule } = settings();
  const state = page.history.at(-1);
  if (is_done(state)) return page.history.length - 1;
  return rule.reveal ? page.history[0].mask.filter(Boolean).length : state.counts.length;
}

// Change tokens: what is shown, so changed, is the new start.
function edit(changes) {
  const tokens = [...shown_state().tokens];
  for (const [p, token] of changes) tokens[p] = token;
  start_from(tokens);
}

// What tokens look like

// The colour of a token in its place; of a picture in colours each channel is a cell.
function shade_of(token, p) {
  const value = codec.greys[token - 1];
  const is_lit = (channel) => codec.channels === 1 || channel === p % 3;
  return `rgb(${[0, 1, 2].map((channel) => (is_lit(channel) ? value : 0)).join(" ")})`;
}

// A token in a word.
function name_of(token) {
  if (token === MASK) return "[MASK]";
  if (codec.kind === "pixels") return `level ${token - 1}`;
  if (codec.kind === "ids") return String(token - 1);
  const piece = piece_of(token);
  const spoken = { " ": "space", "\n": "line break", "\t": "tab" };
  return spoken[piece] ?? piece;
}

// What a token of text stands for.
function piece_of(token) {
  if (codec.kind === "characters") return alphabet[token - 1];
  if (codec.kind === "tokenizer") return codec.pieces[token - 1];
  const byte = token - 1;
  const is_printed = byte === 9 || byte === 10 || (byte >= 32 && byte < 127);
  return is_printed ? String.fromCharCode(byte) : byte.toString(16).padStart(2, "0");
}

function sign_of(token) {
  if (codec.kind === "ids") return String(token - 1);
  return piece_of(token).replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
}

function place_of(p) {
  if (codec.kind !== "pixels") return `position ${p}`;
  const channel = codec.channels === 3 ? ` ${["red", "green", "blue"][p % 3]}` : "";
  const pixel = Math.floor(p / codec.channels);
  const row = Math.floor(pixel / codec.width) + 1;
  return `row ${row}, column ${(pixel % codec.width) + 1}${channel}`;
}

// The tokens of a text with _ for each blank; \_ is a _. Throws a RangeError at an unknown sign.
function tokens_of(text) {
  const parts = text.match(/\\_|[^_]|_/gu) ?? [];
  return parts.flatMap((part) =>
    part === "_" ? [MASK] : tokens_of_sign(part.at(-1) === "_" ? "_" : part),
  );
}

function tokens_of_sign(sign) {
  if (codec.kind === "bytes") return [...new TextEncoder().encode(sign)].map((byte) => byte + 1);
  const token = alphabet.indexOf(sign) + 1;
  if (token === 0) throw new RangeError(`“${sign}” is not in the alphabet of the run.`);
  return [token];
}

// Show

function show() {
  show_grid();
  show_steps();
  show_counts();
  show_position();
  at("mask-half").disabled = shown_state().tokens.every((token) => token === MASK);
}

function show_grid() {
  const state = shown_state();
  const predictions = state_of_predictions();
  cells_of("grid").forEach((cell, p) => {
    const is_given = page.history[0].tokens[p] !== MASK;
    const revealed_now = page.step > 0 && state.revealed[p];
    const token = state.mask[p] ? predictions.predicted[p] : state.tokens[p];
    const confidence = predictions.confidence[p];
    cell.className = "cell";
    cell.classList.toggle("blank", state.mask[p]);
    cell.classList.toggle("is-sure", state.mask[p] && confidence > SURE);
    cell.classList.toggle("given", is_given);
    cell.classList.toggle("revealed", revealed_now);
    cell.classList.toggle("selected", p === page.selected);
    cell.style.setProperty("--p", confidence.toFixed(3));
    draw_token(cell, token, p, state.mask[p]);
    if (revealed_now) cell.append(element("span", "place", String(state.place[p] + 1)));
    cell.setAttribute("aria-selected", String(p === page.selected));
    cell.tabIndex = p === page.selected ? 0 : -1;
    cell.setAttribute("aria-label", words_of_cell(p, token, confidence, is_given, revealed_now));
  });
}

function draw_token(cell, token, p, is_blank) {
  cell.replaceChildren();
  cell.style.removeProperty("--shade");
  if (codec.kind !== "pixels") {
    cell.append(element("span", "sign", sign_of(token)));
    return;
  }
  const target = is_blank ? element("span", "inner", "") : cell;
  target.style.setProperty("--shade", shade_of(token, p));
  if (is_blank) cell.append(target);
}

function words_of_cell(p, token, confidence, is_given, revealed_now) {
  const state = shown_state();
  const sure = `probability ${confidence.toFixed(2)}`;
  if (state.mask[p]) return `${place_of(p)}: blank, would be ${name_of(token)}, ${sure}`;
  if (is_given) return `${place_of(p)}: ${name_of(token)}, known from the start`;
  const when = revealed_now ? `revealed now as number ${state.place[p] + 1}` : "revealed before";
  return `${place_of(p)}: ${name_of(token)}, ${when}, ${sure}`;
}

function show_steps() {
  const last = last_step();
  at("step").max = last;
  at("step").value = page.step;
  at("step").disabled = last === 0;
  at("step-shown").textContent = `${page.step} of ${last}`;
  at("step").setAttribute("aria-valuetext", `step ${page.step} of ${last}`);
  for (const id of ["first", "back"]) at(id).disabled = page.step === 0;
  for (const id of ["forward", "last"]) at(id).disabled = is_done(shown_state());
  at("before").textContent = page.step > 0 ? "Predictions are those from before this step." : "";
}

function sentence_of_step() {
  const state = shown_state();
  const num_masked = state.mask.filter(Boolean).length;
  const left = num_masked === 0 ? "Nothing is masked." : `${num_masked} still masked.`;
  if (page.step === 0) {
    return num_masked === 0
      ? "Nothing is masked: mask some tokens, and the model fills them in."
      : `The start: ${num_masked} of ${state.tokens.length} tokens are masked.`;
  }
  const order = state.revealed.flatMap((revealed, p) => (revealed ? [p] : []));
  order.sort((p, q) => state.place[p] - state.place[q]);
  const first = order.slice(0, 3);
  const probabilities = told_apart(first.map((p) => state.confidence[p]));
  const told = first.map(
    (p, i) => `${place_of(p)} becomes ${name_of(state.tokens[p])} (p ${probabilities[i]})`,
  );
  const more = order.length > 3 ? `, and ${order.length - 3} more` : "";
  const step = `Step ${page.step} of ${last_step()}`;
  return `${step} revealed ${order.length}: ${told.join("; ")}${more}. ${left}`;
}

// Probabilities with as many digits as tell them apart, from 3 to 9.
function told_apart(probabilities) {
  const num_different = new Set(probabilities).size;
  const with_digits = (digits) => probabilities.map((p) => p.toFixed(digits));
  let digits = 3;
  while (digits < 9 && new Set(with_digits(digits)).size < num_different) digits++;
  return with_digits(digits);
}

function show_counts() {
  const has_schedule = settings().rule.reveal === undefined;
  const counts = has_schedule ? page.history[0].counts : [];
  const done = page.history.slice(1, page.step + 1).map((state) => state.count);
  const num_bars = Math.max(counts.length, done.length);
  const most = Math.max(1, ...counts, ...done);
  const bars = Array.from({ length: num_bars }, (_, k) => {
    const step = element("div", k + 1 === page.step ? "step now" : "step", "");
    for (const [kind, count] of [
      ["done", done[k]],
      ["planned", counts[k]],
    ]) {
      if (count === undefined) continue;
      const bar = element("div", kind, "");
      bar.style.height = `${(100 * count) / most}%`;
      step.append(bar);
    }
    return step;
  });
  at("counts").replaceChildren(...bars);
  at("counts").classList.toggle("dense", num_bars > MANY_STEPS);
  const planned = has_schedule
    ? `The schedule: ${listed(counts) || "nothing to reveal"}.`
    : "No schedule: the threshold says how many.";
  const revealed = done.length > 0 ? ` Revealed: ${listed(done)}.` : "";
  at("counts").setAttribute("aria-label", planned + revealed);
  at("counts-text").textContent = planned + revealed;
}

// Counts in words, many equal ones together: 1 (30 times), 2
function listed(counts) {
  const parts = [];
  for (let first = 0, next; first < counts.length; first = next) {
    next = first + 1;
    while (counts[next] === counts[first]) next++;
    const times = next - first;
    parts.push(...(times > 3 ? [`${counts[first]} (${times} times)`] : counts.slice(first, next)));
  }
  return parts.join(", ");
}

function show_position() {
  const p = page.selected;
  const place = place_of(p);
  at("position-title").textContent = place[0].toUpperCase() + place.slice(1);
  const step = Math.max(page.step, 1);
  const is_blank = input_of_step().mask[p];
  const what = is_blank ? "the blank" : "it";
  at("candidates-caption").textContent =
    `The most probable tokens here, as step ${step} sees ${what}`;
  at("known").hidden = is_blank;
  const rows = candidates(p).map(([token, probability]) => candidate_row(p, token, probability));
  at("candidates").tBodies[0].replaceChildren(...rows);
  show_attention();
}

// The tokens of highest probability at a position, at the temperature of the rule.
function candidates(p) {
  const vocab_size = model.config.vocab_size;
  const logits = Float64Array.from(page.seen.logits.subarray(p * vocab_size, (p + 1) * vocab_size));
  logits[MASK] = -Infinity;
  const log_p = log_softmax(logits, settings().rule.temperature || 1);
  const order = Array.from(log_p.keys()).filter((token) => token !== MASK);
  order.sort((a, b) => log_p[b] - log_p[a] || a - b);
  return order.slice(0, NUM_CANDIDATES).map((token) => [token, Math.exp(log_p[token])]);
}

function candidate_row(p, token, probability) {
  const row = element("tr", "", "");
  const what = element("td", "token", "");
  if (codec.kind === "pixels") {
    const swatch = element("span", "swatch", "");
    swatch.style.setProperty("--shade", shade_of(token, p));
    what.append(swatch);
  }
  what.append(element("span", "token", name_of(token)));
  const bars = element("td", "bars", "");
  const bar = element("div", "", "");
  bar.style.width = `${(100 * probability).toFixed(1)}%`;
  bars.append(bar);
  const put = element("button", "", "put");
  put.type = "button";
  put.setAttribute("aria-label", `put ${name_of(token)} at ${place_of(p)}`);
  put.addEventListener("click", () => edit([[p, token]]));
  const last = element("td", "", "");
  last.append(put);
  row.append(what, element("td", "number", probability.toFixed(3)), bars, last);
  return row;
}

function show_attention() {
  const length = shown_state().tokens.length;
  const { weights } = page.seen.activations.blocks[at("block").value].attention;
  const first = (Number(at("head").value) * length + page.selected) * length;
  const row = Array.from(weights.subarray(first, first + length));
  const largest = Math.max(...row);
  cells_of("attention").forEach((cell, p) => {
    const token = input_of_step().tokens[p];
    cell.style.setProperty("--weight", (row[p] / largest).toFixed(3));
    cell.classList.toggle("is-sure", row[p] / largest > SURE);
    if (codec.kind !== "pixels") cell.textContent = token === MASK ? "_" : sign_of(token);
    cell.classList.toggle("selected", p === page.selected);
  });
  const order = row.map((_, p) => p).sort((a, b) => row[b] - row[a] || a - b);
  const told = order.slice(0, 3).map((p) => `${place_of(p)} (${row[p].toFixed(2)})`);
  const head = `Block ${at("block").value}, head ${at("head").value}`;
  const text = `${head} looks most at ${told.join("; ")}.`;
  at("attention").setAttribute("aria-label", text);
  at("attention-text").textContent = text;
  at("attention-scale").textContent = `0 to ${largest.toPrecision(2)}, the largest here`;
}

function element(name, class_name, text) {
  const made = document.createElement(name);
  if (class_name) made.className = class_name;
  if (text) made.textContent = text;
  return made;
}

// Make the cells, when the page opens and when the number of them or of columns changes.
function make_grids() {
  const { length } = shown_state().tokens;
  page.columns = columns_of();
  document.documentElement.style.setProperty("--columns", page.columns);
  const rows_of = (make_cell, make_row) => {
    const rows = [];
    for (let first = 0; first < length; first += page.columns) {
      const row = make_row();
      for (let p = first; p < Math.min(first + page.columns, length); p++) row.append(make_cell(p));
      rows.push(row);
    }
    return rows;
  };
  const with_role = (name, role, class_name) => {
    const made = element(name, class_name, "");
    made.setAttribute("role", role);
    return made;
  };
  const cell = (p) => {
    const made = with_role("div", "gridcell", "cell");
    made.dataset.position = p;
    return made;
  };
  at("grid").replaceChildren(...rows_of(cell, () => with_role("div", "row", "")));
  at("attention").replaceChildren(
    ...rows_of(
      () => element("div", "cell", ""),
      () => element("div", "row", ""),
    ),
  );
}

function columns_of() {
  if (codec.kind === "pixels") return codec.width * codec.channels;
  const is_narrow = window.matchMedia("(max-width: 44rem)").matches;
  if (codec.kind === "tokenizer") return is_narrow ? 4 : 8;
  return is_narrow ? 12 : 24;
}

// Tokens by hand

function select(p) {
  page.selected = p;
  show_grid();
  show_position();
  focus_selected();
}

function chosen_tool() {
  return document.querySelector("input[name=tool]:checked").value;
}

function use_tool(p) {
  const tool = chosen_tool();
  page.selected = p;
  if (tool === "look") select(p);
  else edit([[p, tool === "mask" ? MASK : Number(at("brush").value)]]);
}

function on_pointer(event) {
  const cell = event.target.closest(".cell");
  if (cell === null) return;
  // A finger's events would all go to the cell that it touched first.
  if (event.type === "pointerdown") event.target.releasePointerCapture(event.pointerId);
  else if (event.buttons !== 1 || chosen_tool() === "look") return;
  use_tool(Number(cell.dataset.position));
}

function on_grid_key(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const p = page.selected;
  const last = shown_state().tokens.length - 1;
  const row_start = p - (p % page.columns);
  const moves = {
    ArrowLeft: p - 1,
    ArrowRight: p + 1,
    ArrowUp: p - page.columns,
    ArrowDown: p + page.columns,
    Home: row_start,
    End: Math.min(row_start + page.columns - 1, last),
  };
  if (event.key in moves) {
    const next = moves[event.key];
    if (next >= 0 && next <= last) select(next);
  } else if (event.key === "PageDown") show_at(page.step + 1);
  else if (event.key === "PageUp") show_at(Math.max(page.step - 1, 0));
  else if (event.key === "Backspace" && is_text) unwrite();
  else if (event.key === "Delete" || event.key === "Backspace") edit([[p, MASK]]);
  else if (!on_sign(event.key)) return;
  event.preventDefault();
}

// A key that stands for a token: type it, or paint with it. Returns whether it does.
function on_sign(key) {
  const p = page.selected;
  const token = shown_state().tokens[p];
  if (is_text) return type_sign(key);
  const top = model.config.vocab_size - 1;
  if (key === "m") edit([[p, MASK]]);
  else if (key === "+") edit([[p, Math.min(token + 1, top)]]);
  else if (key === "-") edit([[p, Math.max(token - 1, 1)]]);
  else if (/^[0-9]$/.test(key) && codec.kind === "pixels") {
    edit([[p, 1 + Math.round((Number(key) * (top - 1)) / 9)]]);
  } else if (key === "Enter" || key === " ") use_tool(p);
  else return false;
  return true;
}

function type_sign(key) {
  const sign = key === "Enter" ? "\n" : key;
  if (Array.from(sign).length !== 1) return false;
  let tokens;
  try {
    tokens = tokens_of(sign);
  } catch (error) {
    at("status").textContent = error.message;
    return true;
  }
  const { length } = shown_state().tokens;
  const fitting = tokens.slice(0, length - page.selected);
  const p = page.selected;
  page.selected = Math.min(p + fitting.length, length - 1);
  edit(fitting.map((token, i) => [p + i, token]));
  focus_selected();
  return true;
}

// Mask the token before this position, and go there: what was typed last.
function unwrite() {
  const p = Math.max(page.selected - 1, 0);
  page.selected = p;
  edit([[p, MASK]]);
  focus_selected();
}

function focus_selected() {
  cells_of("grid")[page.selected].focus();
}

// Start from other tokens, as many as there are.
function start_from(tokens) {
  page.selected = Math.min(page.selected, tokens.length - 1);
  offer_halton(is_square(tokens.length));
  const has_other_length = tokens.length !== shown_state()?.tokens.length;
  page.history = [start(tokens, settings().rule)];
  page.step = 0;
  if (has_other_length) make_grids();
  show_at(0);
}

// Only a square grid has that order; other lengths fall back to the default.
function offer_halton(is_offered) {
  at("rule").querySelector("[value=halton]").hidden = !is_offered;
  if (is_offered || at("rule").value !== "halton") return;
  at("rule").value = "confidence";
  show_settings();
}

function on_text(event) {
  event.preventDefault();
  let problem = "";
  try {
    const tokens = tokens_of(at("text").value);
    if (tokens.length === 0) problem = "There is no text.";
    else if (tokens.length > model.length) {
      problem = `The text has ${tokens.length} tokens, the model takes at most ${model.length}.`;
    } else start_from(tokens);
  } catch (error) {
    problem = error.message;
  }
  at("text-error").textContent = problem;
}

// The page opens

function fill_controls() {
  const { config } = model;
  const size = Object.values(model.shapes).reduce(
    (sum, shape) => sum + shape.reduce((a, b) => a * b, 1),
    0,
  );
  at("about").textContent =
    `${model.title}. Parameters: ${size.toLocaleString("en")}; layers: ${config.num_layers}; ` +
    `heads: ${config.num_heads}; tokens: ${model.length}; ids: ${config.vocab_size - 1} and ` +
    `[MASK]. marref ${model.marref}.`;
  const option = (select, value, text) => at(select).append(new Option(text, value));
  model.classes.forEach((name, number) => option("class", number, name));
  Object.keys(model.examples).forEach((name) => option("example", name, name));
  for (let i = 0; i < config.num_layers; i++) option("block", i, i);
  for (let i = 0; i < config.num_heads; i++) option("head", i, i);
  for (const id of ["grid", "attention"]) at(id).classList.add(codec.kind);
  at("brush").max = config.vocab_size - 1;
  at("brush").value = config.vocab_size - 1;
  at("num-steps").max = model.length;
  for (const id of ["paint-tool", "brush-field"]) at(id).hidden = is_text;
  at("brush-swatch").hidden = codec.channels !== 1;
  at("text-field").hidden = !is_text;
  if (codec.kind === "pixels") at("mask-half").textContent = "What is shown, lower half masked";
  at("example-field").hidden = Object.keys(model.examples).length === 0;
  for (const field of document.querySelectorAll(".of-classes")) {
    field.hidden = model.classes.length === 0;
  }
  at("keys").append(words_of_keys());
}

function words_of_keys() {
  if (is_text) return "a sign writes itself, _ and Delete make a blank, Backspace one before.";
  const digits =
    codec.kind === "pixels" ? "0 to 9 paint, from the lowest level to the highest, " : "";
  return `m and Delete make a blank, ${digits}+ and − change a token by one.`;
}

function listen() {
  at("settings").addEventListener("submit", (event) => event.preventDefault());
  at("settings").addEventListener("change", decode_again);
  at("first").addEventListener("click", () => show_at(0));
  at("back").addEventListener("click", () => show_at(Math.max(page.step - 1, 0)));
  at("forward").addEventListener("click", () => show_at(page.step + 1));
  at("last").addEventListener("click", () => show_at(last_step()));
  at("step").addEventListener("input", () => show_at(at("step").valueAsNumber));
  at("grid").addEventListener("pointerdown", on_pointer);
  at("grid").addEventListener("pointerover", on_pointer);
  at("grid").addEventListener("keydown", on_grid_key);
  for (const id of ["block", "head"]) at(id).addEventListener("change", show_attention);
  at("tools").addEventListener("change", () => choose_tool(chosen_tool()));
  at("brush").addEventListener("input", () => {
    choose_tool("paint");
    show_brush();
  });
  at("mask-all").addEventListener("click", () => start_from(Array(model.length).fill(MASK)));
  at("mask-half").addEventListener("click", () => {
    const { tokens } = shown_state();
    start_from(tokens.map((token, p) => (2 * p < tokens.length ? token : MASK)));
  });
  at("example").addEventListener("change", () => {
    if (at("example").value) start_from([...model.examples[at("example").value]]);
    at("example").value = "";
  });
  at("text-field").addEventListener("submit", on_text);
  window.matchMedia("(max-width: 44rem)").addEventListener("change", () => {
    make_grids();
    show();
  });
}

function choose_tool(tool) {
  document.querySelector(`input[value=${tool}]`).checked = true;
  at("grid").classList.toggle("painting", tool !== "look");
}

function show_brush() {
  const token = Number(at("brush").value);
  at("brush-shown").textContent = is_text ? "" : name_of(token).replace("level ", "");
  if (codec.channels === 1) at("brush-swatch").style.setProperty("--shade", shade_of(token, 0));
}

fill_controls();
show_brush();
choose_tool("look");
listen();
show_settings();
start_from(Array(model.length).fill(MASK));
