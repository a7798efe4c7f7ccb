"""The live decoder: its JavaScript computes what marref does, and its page does what it says."""

import base64
import dataclasses
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import marref
from benchmarks import live_page
from marref import cli, data, decoding, demo, files, loss, schedules, trees
from marref.cli import prompts
from marref.decoding import grid
from marref.layers import gelu
from marref.teach import watch
from marref.training import runs
from marref.verify import golden, samplers
from marref.verify.comparison import Golden, compare
from tests.test_continuous_runs import CONFIG as CONTINUOUS
from tests.test_continuous_runs import pictures
from tests.test_data import word_tokenizer
from tests.test_runs import without_pictures

NODE = shutil.which("node")
HARNESS = Path(__file__).with_name("watch_in_node.js")
DEFAULTS = {
    "temperature": 1.0,
    "schedule": "cosine",
    "order": "confidence",
    "choice_temperature": 0.0,
    "exclude_mask_token": True,
}
OTHERWISE = {
    "gelu": "tanh",
    "positions": "interleaved",
    "layer_norm_epsilon": 1e-3,
    "num_classes": 3,
    "seq_len": 9,
}
DRAWN = ("uniforms", "order_uniforms", "noise")
KEYS = ("score", "count", "revealed", "tokens", "mask", "confidence")
OFFERED = (
    "confidence",
    "gumbel",
    "margin",
    "entropy",
    "random",
    "left-to-right",
    "halton",
    "threshold",
)

in_node = pytest.mark.skipif(NODE is None, reason="needs node, to run the page's JavaScript")


def node(jobs, model=None, params=None):
    """Let Node do jobs, and return what it answers to each; null is NaN or an infinity."""
    scripts = [watch.PAGE / name for name in ("mar.js", "decoder.js")]
    packed = None if model is None else watch.packed(model, params)
    request = json.dumps({"model": packed, "jobs": jobs}, allow_nan=False)
    done = subprocess.run(
        [NODE, HARNESS, *scripts], input=request, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def numbers(array):
    """What JSON can hold of an array: null where it is no number."""
    return None if array is None else [x if math.isfinite(x) else None for x in array.tolist()]


@pytest.fixture(scope="module")
def shipped():
    """The golden vectors that ship."""
    return Golden(*files.load(golden.shipped("tiny")))


@pytest.fixture(scope="module")
def otherwise():
    """Golden vectors of a model whose every choice is the other one."""
    model = dataclasses.replace(golden.PRESETS["tiny"], **OTHERWISE)
    return Golden(*golden.make(model, seed=3))


@pytest.fixture(scope="module", params=["shipped", "otherwise"])
def vectors(request):
    return request.getfixturevalue(request.param)


@in_node
def test_compare_accepts_every_activation_as_float32(vectors):
    labels = vectors.batch.get("labels", np.full(golden.BATCH, -1)).tolist()
    jobs = [
        {"do": "forward", "tokens": tokens, **({"label": label} if label >= 0 else {})}
        for tokens, label in zip(vectors.batch["tokens"].tolist(), labels, strict=True)
    ]
    answers = node(jobs, vectors.model, vectors.params)
    names = [f"activations/{name}" for name in answers[0]]
    assert set(names) == {name for name in vectors.arrays if name.startswith("activations/")}
    arrays = {
        name: np.array([answer[name.removeprefix("activations/")] for answer in answers])
        .reshape(vectors.arrays[name].shape)
        .astype(np.float32)
        for name in names
    }
    compared = compare(vectors, arrays, "float32")
    assert compared.agrees, compared.as_table()


def compared_decoders(vectors, settings, params=None):
    """Let Node decode as golden vectors did, with their numbers for chance, and compare."""
    jobs = []
    for prefix, options in settings.items():
        options = {**DEFAULTS, **options}
        scale = options.pop("guidance_scale", 1)
        steps = {key: vectors.arrays.get(f"{prefix}/steps/{key}") for key in DRAWN}
        noise = steps["order_uniforms"] if steps["noise"] is None else steps["noise"]
        for row, tokens in enumerate(vectors.arrays[f"{prefix}/start"].tolist()):
            job = {"do": "decode", "tokens": tokens, "rule": options, "guidance_scale": scale}
            if f"{prefix}/labels" in vectors.arrays:
                job["label"] = int(vectors.arrays[f"{prefix}/labels"][row])
            if steps["uniforms"] is not None:
                job["drawn"] = drawn_for(row, steps["uniforms"], noise)
            jobs.append(job)
    answers = iter(node(jobs, vectors.model, vectors.params if params is None else params))
    arrays = {}
    for prefix in settings:
        rows = [next(answers) for _ in vectors.arrays[f"{prefix}/start"]]
        arrays |= of_rows(vectors, prefix, rows)
    compared = compare(vectors, arrays, "float32")
    assert compared.agrees, compared.as_table()
    return [row.name for row in compared.rows if row.verdict == "undecided"]


@pytest.fixture(scope="module")
def demo_model():
    """The demo's model with parameters drawn so wide that nothing is nearly a tie."""
    model = demo.DEFAULT.config.resolved(demo.digits()[0]).model(18, demo.NUM_CLASSES)
    return model, model.init(np.random.default_rng(5), dtype=np.float32, std=0.3)


def drawn_for(row, uniforms, noise):
    """The numbers of one row, a step after the other."""
    return [
        {
            "uniforms": numbers(uniforms[k, row]),
            "noise": noise if noise is None else numbers(noise[k, row]),
        }
        for k in range(len(uniforms))
    ]


def of_rows(vectors, prefix, rows):
    """Name what Node decoded, the rows of a setting together, as golden vectors do."""
    found = {}
    for key in KEYS:
        name = f"{prefix}/steps/{key}"
        if name not in vectors.arrays:
            continue
        expected = vectors.arrays[name]
        # A row that is done stays as it is while others go on.
        padded = [steps + [steps[-1]] * (len(expected) - len(steps)) for steps in rows]
        array = np.array([[step[key] for step in steps] for steps in padded], float).swapaxes(0, 1)
        if key == "score":
            array[np.isnan(array)] = -np.inf
        dtype = np.float32 if expected.dtype.kind == "f" else expected.dtype
        found[name] = array.astype(dtype)
    return {**found, f"{prefix}/tokens": found[f"{prefix}/steps/tokens"][-1]}


@in_node
def test_compare_accepts_the_decoder_token_for_token(vectors):
    settings = {f"decode/{name}": options for name, options in golden.DECODINGS.items()}
    if vectors.model.num_classes is not None:
        settings |= {f"guidance/{name}": golden.GUIDANCE[name] for name in ("class", "constant")}
    assert compared_decoders(vectors, settings) == []


@in_node
def test_of_equals_the_lower_position_and_the_lower_id_come_first(shipped):
    settings = {f"ties/{name}": options for name, options in golden.TIES.items()}
    bias = np.zeros(shipped.model.vocab_size)
    bias[:2] = 400.0, 200.0
    head = {"kernel": np.zeros_like(shipped.params["head"]["kernel"]), "bias": bias}
    assert compared_decoders(shipped, settings, {**shipped.params, "head": head}) == []


@in_node
def test_with_the_numbers_of_chance_the_decoder_draws_the_tokens_of_the_golden_samplers(shipped):
    settings = {
        f"samplers/{name}": options
        for name, options in shipped.metadata["samplers"].items()
        if name in OFFERED
    }
    assert len(settings) >= len(OFFERED) - 1  # 5 positions are no square grid for halton
    assert compared_decoders(shipped, settings) == []


@in_node
def test_a_model_like_the_demos_decodes_as_marref_does_from_the_numbers_that_it_drew(demo_model):
    model, params = demo_model
    jobs, expected = [], []
    for order in decoding.ORDERS:
        noisy = {"choice_temperature": 4.5} if order == "confidence" else {}
        rule = {"num_steps": 4, "temperature": 0.8, "order": order, "schedule": "linear", **noisy}
        _, steps = marref.iterative_decode(
            model,
            params,
            labels=[7],
            guidance_scale=1.5,
            rng=np.random.default_rng(5),
            return_steps=True,
            **rule,
        )
        expected.append(steps)
        drawn = drawn_for(0, steps["uniforms"], steps.get("noise"))
        job = {"do": "decode", "tokens": [0] * model.seq_len, "drawn": drawn}
        jobs.append({**job, "label": 7, "guidance_scale": 1.5, "rule": {**DEFAULTS, **rule}})
    for found, steps in zip(node(jobs, model, params), expected, strict=True):
        assert [step["tokens"] for step in found] == steps["tokens"][:, 0].tolist()
        assert [step["revealed"] for step in found] == steps["revealed"][:, 0].tolist()
        confidence = np.array([step["confidence"] for step in found])
        np.testing.assert_allclose(confidence, steps["confidence"][:, 0], atol=1e-5)


@in_node
def test_reveal_counts_are_those_of_the_schedules():
    asked = [
        {"do": "schedule", "name": name, "num_masked": masked, "num_steps": steps}
        for name in ("cosine", "linear")
        for masked in (*range(1, 70), 256, 784)
        # With 39, 51 and 63 the browser's cosine of π/3 is less than 1/2.
        for steps in (1, 2, 3, 6, 8, 9, 12, 33, 39, 51, 63, 64, 256)
    ]
    for job, counts in zip(asked, node(asked), strict=True):
        expected = schedules.SCHEDULES[job["name"]](job["num_masked"], job["num_steps"])
        assert counts == expected.tolist(), job


@in_node
def test_both_gates_of_gelu_keep_their_digits_in_the_tails():
    x = np.linspace(-12, 12, 4801)
    jobs = [{"do": "gate", "gelu": kind, "x": x.tolist()} for kind in gelu.KINDS]
    for job, found in zip(jobs, node(jobs), strict=True):
        expected, _ = gelu.gate(x, job["gelu"])
        np.testing.assert_allclose(found, expected, rtol=1e-12, err_msg=job["gelu"])


@in_node
def test_halton_visits_a_grid_in_marrefs_order():
    jobs = [{"do": "halton", "length": side * side} for side in range(1, 29)]
    for job, order in zip(jobs, node(jobs), strict=True):
        assert order == grid.halton(job["length"]).tolist()


@in_node
def test_uniform_numbers_are_uniform_and_depend_on_seed_step_and_purpose_alone():
    asked = {"do": "uniforms", "seed": 0, "step": 1, "purpose": 0, "length": 4000}
    others = [{**asked, name: asked[name] + 1} for name in ("seed", "step", "purpose")]
    first, again, *rest = (np.array(answer) for answer in node([asked, asked, *others]))
    assert (first == again).all()
    for drawn in (first, *rest):
        assert ((drawn >= 0) & (drawn < 1)).all()
        assert np.abs(np.bincount((drawn * 10).astype(int)) - 400).max() < 80  # 4 of 19
        assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.06
    for drawn in rest:
        assert abs(np.corrcoef(first, drawn)[0, 1]) < 0.06


TEXT = "the quick brown </script> fox jumps over the lazy dog\n" * 20


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A run on characters, after a few steps."""
    folder = tmp_path_factory.mktemp("watch")
    (folder / "text.txt").write_text(TEXT)
    dataset = data.load(folder / "text.txt", kind="characters", length=20)
    sizes = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "num_steps": 3, "batch_size": 4}
    with without_pictures():
        runs.start(dataset, folder / "run", runs.Config(**sizes, num_threads=1))
    return folder / "run"


def told_by(path):
    """What a page says of its model."""
    return json.loads(re.search(r'id="model">(.*?)</script>', path.read_text("utf-8"))[1])


def test_watch_writes_a_page_that_needs_no_other_file(text_run, tmp_path, capsys):
    out = tmp_path / "decode.html"
    assert cli.main(["watch", str(text_run), "--out", str(out)]) == 0
    assert capsys.readouterr().out == (f"Wrote {out}, run, step 3, 0.1 MB; open it in a browser.\n")
    html = out.read_text("utf-8")
    assert re.findall(r'<script src|<link rel="stylesheet"|https?://|@import|fetch\(', html) == []
    scripts = re.findall(r'<script src="(.*?)"', (watch.PAGE / "decode.html").read_text("utf-8"))
    assert scripts == ["mar.js", "decoder.js", "app.js"]
    assert len(re.findall("</script>", html)) == 1 + len(scripts)
    for name in (*scripts, "style.css"):
        assert (watch.PAGE / name).read_text("utf-8") in html


def test_a_page_holds_the_averaged_parameters_of_the_best_checkpoint(text_run, tmp_path):
    cli.main(["watch", str(text_run), "--out", str(tmp_path / "decode.html")])
    told, checkpoint = told_by(tmp_path / "decode.html"), runs.best(text_run)
    assert marref.MAR(**told["config"]) == checkpoint.model
    assert (told["length"], told["codec"]) == (20, checkpoint.codec)
    numbers_of_page = np.frombuffer(base64.b64decode(told["weights"]), "<f4")
    leaves = trees.flatten(checkpoint.state.averaged).values()
    np.testing.assert_array_equal(
        numbers_of_page, np.concatenate([leaf.ravel() for leaf in leaves])
    )


def test_a_saved_model_is_watched_by_its_ids(tmp_path, demo_model):
    marref.training.save_model(tmp_path / "m.npz", *demo_model)
    assert cli.main(["watch", str(tmp_path / "m.npz"), "--out", str(tmp_path / "m.html")]) == 0
    told = told_by(tmp_path / "m.html")
    assert told["codec"] == {"kind": "ids", "count": 17}
    assert told["classes"] == list("0123456789")
    assert (tmp_path / "m.html").stat().st_size < watch.SMALL


def test_what_cannot_be_watched_is_said_and_leaves_the_file_as_it_was(tmp_path, capsys, demo_model):
    (tmp_path / "decode.html").write_text("old")
    with without_pictures():
        runs.start(pictures(), tmp_path / "run", dataclasses.replace(CONTINUOUS, num_steps=1))
    for run, out, message in (
        ("run", "decode.html", "received a run of the continuous model, expected discrete MAR"),
        ("nothing", "decode.html", "holds no run"),
        ("run", "none/decode.html", "none/decode.html, whose folder does not exist"),
    ):
        assert cli.main(["watch", str(tmp_path / run), "--out", str(tmp_path / out)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "decode.html").read_text() == "old"
    with pytest.raises(ValueError, match="codec: ids has 5 ids, expected 17 as the model"):
        watch.page(watch.Watched("", *demo_model, data.codecs.Ids(5), 64))


def test_of_a_large_page_it_is_said_that_steps_take_time(text_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(watch, "SMALL", 10_000)
    assert cli.main(["watch", str(text_run), "--out", str(tmp_path / "decode.html")]) == 0
    assert "more than a tenth of a second a step" in capsys.readouterr().out


def test_the_tokens_of_a_tokenizer_are_shown_by_their_pieces(tmp_path):
    pytest.importorskip("tokenizers")
    codec = data.codecs.Tokenizer(word_tokenizer(tmp_path / "t.json").read_text("utf-8"))
    model = marref.MAR(codec.num_ids + 1, embed_dim=8, num_layers=1, num_heads=2, seq_len=6)
    watched = watch.Watched("", model, model.init(np.random.default_rng(0)), codec, 6)
    pieces = watch.told(watched)["codec"]["pieces"]
    assert pieces == ["[UNK]", "the", "cat", "sat"]


def test_a_picture_is_drawn_in_the_greys_of_its_levels_or_as_ink(demo_model):
    codec = data.codecs.Pixels(8, 8, channels=1, levels=17)
    plain, ink = (
        watch.told(watch.Watched("", *demo_model, codec, 64, ink=ink))["codec"]["greys"]
        for ink in (False, True)
    )
    drawn = codec.decode(np.arange(1, 65).clip(max=17)[np.newaxis]).ravel()[:17]
    assert plain == drawn.tolist()
    assert ink == (255 - drawn).tolist()


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright.sync_api", reason="needs the extra browser")
    if live_page.CHROMIUM is None:
        pytest.skip("needs chromium, the browser")
    with live_page.chromium() as started:
        yield started


@pytest.fixture
def opened(browser):
    """Open a page at a width; at the end, nothing may have been said on the console."""
    contexts, said = [], []

    def open_at(path, width=1400, **options):
        size = {"width": width, "height": 800}
        contexts.append(browser.new_context(viewport=size, reduced_motion="reduce", **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request",
            lambda request: said.append(request.url) if path.name not in request.url else None,
        )
        page.goto(path.as_uri())
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory, demo_model):
    path = tmp_path_factory.mktemp("page") / "decode.html"
    _, held_out = demo.digits()
    watch.write(path, demo.watched(*demo_model, held_out))
    return path


def tokens_of(page):
    return page.evaluate("shown_state().tokens")


def scripted(page, folder, name):
    """Paint, mask, step, change the rule, go back; return the tokens after each."""
    seen = []

    def look():
        page.screenshot(path=folder / f"{name}-{len(seen)}.png", full_page=True)
        seen.append(tokens_of(page))

    page.get_by_label("paints").check()
    page.locator("#grid .cell").nth(3).click()
    look()
    page.get_by_label("masks").check()
    page.locator("#grid .cell").nth(3).click()
    look()
    for _ in range(3):
        page.get_by_role("button", name="Forward").click()
    look()
    page.get_by_label("Rule").select_option("left-to-right")
    look()
    page.get_by_role("button", name="Back", exact=False).click()
    look()
    return seen


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_a_session_paints_masks_steps_changes_the_rule_and_goes_back(
    opened, demo_page, demo_model, tmp_path, width
):
    page = opened(demo_page, width, color_scheme="dark" if width == 800 else "light")
    painted, masked, confidence, left_to_right, back = scripted(page, tmp_path, f"{width}")
    assert painted == [0, 0, 0, 17, *[0] * 60]
    assert masked == [0] * 64
    for tokens, order in ((confidence, "confidence"), (left_to_right, "left-to-right")):
        _, steps = marref.iterative_decode(*demo_model, order=order, return_steps=True)
        assert tokens == steps["tokens"][2, 0].tolist()
    assert back == steps["tokens"][1, 0].tolist()
    assert [bool(token) for token in back] == [True] * 5 + [False] * 59
    assert page.evaluate("document.documentElement.scrollWidth") == width
    pictures = {path.read_bytes() for path in tmp_path.glob("*.png")}
    assert len(pictures) == 5


def test_the_page_draws_what_marref_makes_of_its_uniform_numbers(opened, demo_page, demo_model):
    page = opened(demo_page)
    page.get_by_label("Tokens are").select_option("drawn")
    page.get_by_label("Rule").select_option("maskgit")
    page.get_by_label("Class").select_option("7")
    page.get_by_label("Guidance").fill("1.5")
    page.get_by_label("Guidance").press("Enter")
    page.get_by_role("button", name="To the end").click()
    page.get_by_text("Nothing is masked").wait_for()
    model, params = demo_model
    rule = samplers.rule_of({"num_steps": 8, "choice_temperature": 4.5, "guidance_scale": 1.5})
    state = decoding.State.start(np.zeros((1, 64), np.int64), rule, np.dtype(np.float32))
    while state.busy().any():
        view, scale = state.look(), np.full(view_size(state), 1.5)
        asked = ([0, state.number, purpose, 64] for purpose in (0, 1))
        drawn = [page.evaluate("(asked) => uniforms_of(...asked)", one) for one in asked]
        uniforms, for_order = (np.array([row]) for row in drawn)
        chance = decoding.Chance(uniforms, samplers.gumbel(for_order))
        at = view.wanted
        logits = decoding.guide(
            model(params, state.tokens, [7])[at], model(params, state.tokens)[at], scale
        )
        state.advance(view, decoding.predict(logits, rule, uniforms[at]), chance)
    assert tokens_of(page) == state.tokens[0].tolist()
    assert 'order="' not in page.locator("#call").inner_text()
    for told in ("choice_temperature=4.5", "labels=[7]", "guidance_scale=1.5", "rng=rng"):
        assert told in page.locator("#call").inner_text()
    page.get_by_label("Rule").select_option("random")
    page.get_by_label("Tokens are").select_option("")
    assert 'order="random", temperature=0, labels=[7]' in page.locator("#call").inner_text()


def test_a_field_shows_what_is_used_of_what_was_typed(opened, demo_page):
    page = opened(demo_page)
    for field, typed, used in (
        ("num-steps", "100", "64"),
        ("num-steps", "0", "1"),
        ("num-steps", "2.5", "2"),
        ("temperature", "-1", "0"),
        ("temperature", "20", "10"),
        ("temperature", "", "1"),
        ("temperature", "0.75", "0.75"),
    ):
        page.locator(f"#{field}").fill(typed)
        page.locator(f"#{field}").press("Enter")
        assert page.locator(f"#{field}").input_value() == used
        assert page.evaluate("settings().rule")[field.replace("-", "_")] == float(used)


def test_a_field_without_effect_is_disabled(opened, demo_page):
    page = opened(demo_page)

    def disabled():
        return page.evaluate(
            "[...document.querySelectorAll('#settings :is(input, select):disabled')].map(f => f.id)"
        )

    assert disabled() == ["seed", "guidance"]
    page.get_by_label("Class").select_option("3")
    assert disabled() == ["seed"]
    page.get_by_label("Rule").select_option("random")
    assert disabled() == ["temperature"]
    page.get_by_label("Tokens are").select_option("drawn")
    assert disabled() == []
    page.get_by_label("Rule").select_option("threshold")
    assert disabled() == ["num-steps", "schedule"]
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Temperature").press("Enter")
    assert disabled() == ["num-steps", "schedule", "seed"]


def test_a_threshold_has_no_schedule_to_draw(opened, demo_page):
    page = opened(demo_page)
    assert page.locator("#counts .planned").count() == 8
    page.get_by_label("Rule").select_option("threshold")
    page.get_by_role("button", name="Forward").click()
    assert page.locator("#counts .planned").count() == 0
    assert page.locator("#counts .done").count() == 1
    assert page.locator("#planned-legend").is_hidden()
    assert "No schedule" in page.locator("#counts-text").inner_text()
    assert "num_steps" not in page.locator("#call").inner_text()


def test_while_it_computes_the_page_says_so(opened, demo_page):
    page = opened(demo_page)
    # A clock on which each step takes so long that the page pauses after it.
    said, at_the_end = page.evaluate("""async () => {
        let now = 0;
        performance.now = () => (now += 100);
        const said = [];
        const wait = setTimeout;
        window.setTimeout = (resume) => {
            said.push([at("step-shown").textContent, at("status").textContent]);
            wait(resume);
        };
        await show_at(8);
        return [said, at("status").textContent];
    }""")
    assert said == [[f"{step} of 8", "Computing …"] for step in range(2, 8)]
    assert at_the_end.startswith("Step 8 of 8")


def test_probabilities_have_the_digits_that_tell_them_apart(opened, demo_page):
    page = opened(demo_page)
    for given, expected in (
        ([0.5, 0.25, 0.25], ["0.500", "0.250", "0.250"]),
        ([0.9912, 0.99137, 0.5], ["0.9912", "0.9914", "0.5000"]),
        ([0.5, 0.5 + 1e-12], ["0.500000000", "0.500000000"]),
    ):
        assert page.evaluate("(given) => told_apart(given)", given) == expected


def view_size(state):
    return int(state.masked.sum())


def test_keys_alone_move_paint_mask_and_step_and_each_step_is_said(opened, demo_page):
    page = opened(demo_page)
    page.locator("#grid [tabindex='0']").focus()
    for key in ("ArrowRight", "ArrowDown", "9"):
        page.keyboard.press(key)
    assert tokens_of(page)[9] == 17
    focused = "document.activeElement.getAttribute('aria-label')"
    assert page.evaluate(focused) == "row 2, column 2: level 16, known from the start"
    page.keyboard.press("-")
    assert tokens_of(page)[9] == 16
    page.keyboard.press("Delete")
    assert tokens_of(page)[9] == 0
    page.keyboard.press("PageDown")
    said = page.locator("#status").inner_text()
    assert re.match(r"Step 1 of 8 revealed 2: row \d, column \d becomes level \d+ \(p ", said)
    assert said.endswith("62 still masked.")
    assert page.locator("#grid .revealed").count() == 2
    assert page.locator("#before").inner_text() == "Predictions are those from before this step."
    page.keyboard.press("PageUp")
    assert page.locator("#status").inner_text() == "The start: 64 of 64 tokens are masked."
    assert page.locator("#before").inner_text() == ""
    page.get_by_label("Step 0 of 8").press("End")
    page.get_by_text("Nothing is masked").wait_for()
    assert page.get_by_role("button", name="Forward").is_disabled()


def test_a_position_shows_its_candidates_and_where_a_head_looks(opened, demo_page, demo_model):
    page = opened(demo_page)
    page.locator("#grid .cell").nth(20).click()
    model, params = demo_model
    logits, cache = model.forward(params, np.zeros((1, 64), np.int64))
    p = np.exp(loss.log_softmax(logits[0, 20:21, 1:]))[0]
    rows = page.locator("#candidates tbody tr").all_inner_texts()
    found = [re.match(r"level (\d+)\s+([\d.]+)", row).groups() for row in rows]
    best = np.argsort(-p)[:5]
    assert found == [(str(level), f"{p[level]:.3f}") for level in best]
    page.locator("#block").select_option("1")
    page.locator("#head").select_option("2")
    weights = cache["blocks"][1]["attention"]["weights"][0, 2, 20]
    row, column = divmod(int(weights.argmax()), 8)
    said = page.locator("#attention-text").inner_text()
    assert f"looks most at row {row + 1}, column {column + 1} ({weights.max():.2f});" in said
    told = f"0 to {weights.max():#.2g}, the largest here"
    assert page.locator("#attention-scale").inner_text() == told
    assert page.locator("#known").is_hidden()
    page.get_by_role("button", name=f"put level {best[1]} at row 3, column 5").click()
    assert tokens_of(page)[20] == best[1] + 1
    assert page.locator("#known").is_visible()


def test_an_example_is_loaded_and_its_lower_half_masked(opened, demo_page):
    page = opened(demo_page)
    masked = page.get_by_role("button", name="What is shown, lower half masked")
    assert masked.is_disabled()
    page.get_by_label("An example").select_option("a real 3")
    three = data.digits()[1][data.digit_labels()[1] == 3][0].tolist()
    assert tokens_of(page) == three
    assert page.locator("#status").inner_text().startswith("Nothing is masked")
    masked.click()
    assert tokens_of(page) == three[:32] + [0] * 32


def test_of_a_text_run_blanks_are_typed_and_filled(opened, text_run, tmp_path):
    cli.main(["watch", str(text_run), "--out", str(tmp_path / "text.html")])
    checkpoint = runs.best(text_run)
    codec = data.codec_from_dict(checkpoint.codec)
    page = opened(tmp_path / "text.html", 360)
    assert page.get_by_role("button", name="What is shown, second half masked").is_disabled()
    text = page.get_by_label("Text, with _")
    text.fill("the qu_ck \\_")
    start = page.get_by_role("button", name="Start from this text")
    start.click()
    assert "“_” is not in the alphabet" in page.locator("#text-error").inner_text()
    text.fill("the qu_ck bro__")
    start.click()
    assert page.locator("#text-error").inner_text() == ""
    tokens = prompts.of_text("the qu_ck bro__", codec)
    assert tokens_of(page) == tokens.tolist()
    page.locator("#grid .cell").nth(6).click()
    for key in ("o", " ", "Backspace"):
        page.keyboard.press(key)
    page.keyboard.press("PageDown")
    page.get_by_role("button", name="To the end").click()
    expected = tokens.copy()
    expected[6:8] = codec.encode("o")[0], 0
    assert page.evaluate("page.history[0].tokens") == expected.tolist()
    page.get_by_text("Nothing is masked").wait_for()


def test_halton_is_offered_for_a_square_number_of_tokens_only(opened, text_run, tmp_path):
    cli.main(["watch", str(text_run), "--out", str(tmp_path / "text.html")])
    page = opened(tmp_path / "text.html")
    halton = page.locator("#rule [value=halton]")
    assert halton.get_attribute("hidden") is not None  # of 20 tokens
    for text, rule in (("_" * 16, "halton"), ("_" * 10, "confidence")):
        page.get_by_label("Text, with _").fill(text)
        page.get_by_role("button", name="Start from this text").click()
        if rule == "halton":
            page.get_by_label("Rule").select_option("halton")
        assert (halton.get_attribute("hidden") is None) == (rule == "halton")
        assert page.get_by_label("Rule").input_value() == rule
        page.get_by_role("button", name="To the end").click()
        page.get_by_text("Nothing is masked").wait_for()


def test_going_to_the_first_step_asks_the_model_nothing_again(opened, demo_page):
    page = opened(demo_page)
    page.evaluate("""() => {
        globalThis.asked = 0;
        const real = look;
        look = (...all) => (asked++, real(...all));
    }""")
    for _ in range(2):
        page.get_by_role("button", name="Forward").click()
    assert page.evaluate("asked") == 1
