"""Bad files: every command says in one line what is wrong with one, and writes nothing."""

import errno
import importlib.util
import json
import os
import shutil

import numpy as np
import pytest

from marref import cli, files
from marref.training import checkpoints
from tests.test_data import archived, claiming, fifo, npy, picture, png, saved, write
from tests.test_runs import without_pictures

TEXT = "the quick brown fox jumps over the lazy dog, and the dog_s tail\n" * 8
IDS = np.arange(60).reshape(10, 6) % 7
TINY = [
    *("--num-steps", "4", "--embed-dim", "4", "--num-layers", "1", "--num-heads", "1"),
    *("--batch-size", "2", "--num-threads", "1", "--checkpoint-every", "2"),
    *("--validate-every", "4"),
]
NEST = 100_000


@pytest.fixture(autouse=True)
def no_pictures():
    with without_pictures():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on characters, one on ids and one on pictures."""
    folder = tmp_path_factory.mktemp("runs")
    write(folder / "text.txt", TEXT)
    np.save(folder / "ids.npy", IDS)
    sources = {
        "text": ["text.txt", "--kind", "characters", "--length", "8"],
        "ids": ["ids.npy"],
        "digits": ["digits"],
    }
    with pytest.MonkeyPatch.context() as patch, without_pictures():
        patch.chdir(folder)
        for name, source in sources.items():
            assert cli.main(["train", *source, "--out", name, *TINY]) == 0
    return folder


def train(make, *options, source="x"):
    """Train on what ``make`` puts into the folder."""
    return lambda folder: (make(folder / source), ["train", source, "--out", "out", *options])[1]


def raw(name, content, *options):
    """Train on a file of these bytes."""
    return train(lambda path: write(path, content), *options, source=name)


def array(values, *options):
    return train(lambda path: saved(path, values), *options, source="x.npy")


def archive(**members):
    return train(lambda path: archived(path, **members), source="x.npz")


def images(make, *options):
    return train(make, *options, source="images")


def prompt(run, name, make):
    """Sample with a prompt that ``make`` puts into a file."""
    return lambda folder: (make(folder / name), ["sample", run, "--prompt", name])[1]


def damaged(run, name, change, *command):
    """Change one file of a run, its bytes to bytes, then resume it or do something else."""

    def harm(folder):
        (path,) = (folder / run).glob(name)
        path.write_bytes(change(path.read_bytes()))
        return list(command) or ["train", "--out", run, "--resume"]

    return harm


def replaced(run, name, make, *command):
    """Put something else where a file of a run was."""

    def harm(folder):
        for path in (folder / run).glob(name):
            path.unlink()
            make(path)
        return list(command) or ["train", "--out", run, "--resume"]

    return harm


def settings(run, change, *command):
    """Change what config.json says."""

    def changed(content):
        told = json.loads(content)
        change(told)
        return json.dumps(told).encode()

    return damaged(run, "config.json", changed, *command)


def oldest(folder, run):
    """Leave a run one checkpoint, so that there is none to go back to."""
    found = checkpoints.found(folder / run / "checkpoints")
    for step in sorted(found)[1:]:
        found[step].unlink()


def only_checkpoint(change, *command):
    def harm(folder):
        oldest(folder, "text")
        return damaged("text", "checkpoints/*", change, *command)(folder)

    return harm


def rewritten(change, *command):
    """Change what the only checkpoint says, with the checksum that belongs to it."""

    def changed(folder):
        oldest(folder, "text")
        (path,) = checkpoints.found(folder / "text" / "checkpoints").values()
        arrays, metadata = files.load(path)
        change(arrays, metadata)
        metadata["checksum"] = checkpoints.checksum(arrays, metadata)
        files.save(path, arrays, metadata)
        return list(command) or ["train", "--out", "text", "--resume"]

    return changed


def with_file(option, make, *command):
    """Give an option a file that ``make`` makes."""
    return lambda folder: (make(folder / "file"), [*command, option, "file"])[1]


def toml(content):
    return with_file(
        "--config", lambda path: write(path, content), "train", "text.txt", "--out", "out"
    )


def no_tokenizer(path):
    pytest.importorskip("tokenizers")
    write(path, "{}")


def transparent(opacity):
    values = np.zeros((8, 8, 4), np.uint8)
    values[..., 3] = opacity
    return values


EVALUATE = ["evaluate", "text"]
SAMPLE = ["sample", "text", "--num", "1"]

BAD_FILES = {
    # Text.
    "an empty text": (raw("x.txt", ""), "x.txt: tokens: a stream of 0"),
    "one byte": (raw("x.txt", "a"), "x.txt: tokens: a stream of 1"),
    "no characters": (raw("x.txt", "", "--kind", "characters"), 'alphabet: received ""'),
    "Latin-1": (raw("x.txt", "Zwölf".encode("latin-1"), "--kind", "characters"), "is no UTF-8"),
    "UTF-16": (raw("x.txt", TEXT.encode("utf-16")), "byte 0 at offset 3, expected text"),
    "Shift-JIS": (raw("x.txt", "日本語".encode("shift-jis"), "--kind", "characters"), "no UTF-8"),
    "too short to split": (raw("x.txt", "abcdefgh", "--length", "6"), "fraction: 0.1 of 8 tokens"),
    "a FIFO": (train(fifo, source="x.txt"), "x.txt: is no regular file"),
    "a FIFO of ids": (train(fifo, source="x.npy"), "x.npy: is no regular file"),
    "a device": (lambda folder: ["train", "/dev/zero", "--out", "out"], "is no regular file"),
    "an empty folder": (train(os.mkdir), "x: holds no PNG or JPEG images"),
    "a folder of text": (
        lambda folder: ["train", ".", "--kind", "bytes", "--out", "out"],
        "is a folder, expected a file",
    ),
    "nothing": (lambda folder: ["train", "nowhere.txt", "--out", "out"], "nowhere.txt"),
    "no tokenizer": (
        with_file("--tokenizer", no_tokenizer, "train", "text.txt", "--out", "out"),
        'file: file: received "{}", expected the JSON of the tokenizers package',
    ),
    # Ids.
    "no bytes at all": (raw("x.npy", b""), "x.npy: cannot be read as .npy"),
    "half a header": (raw("x.npy", npy(IDS)[:40]), "x.npy: cannot be read as .npy"),
    "a truncated array": (raw("x.npy", npy(IDS)[:-1]), "x.npy: truncated"),
    "a header with no bytes behind": (raw("x.npy", npy(shape=(10**12,))), "x.npy: truncated"),
    "a header nested too deeply": (
        raw("x.npy", b"\x93NUMPY\1\0\xff\xff" + b"(" * 65535),
        "x.npy: cannot be read as .npy",
    ),
    "one id": (array(IDS[0, :1]), "x.npy: shape [1], expected at least two ids"),
    "no ids": (array(IDS[:0]), "x.npy: shape [0, 6], expected no axis to be empty"),
    "a scalar": (array(np.array(3)), "x.npy: shape [], expected"),
    "three axes": (array(IDS.reshape(5, 2, 6)), "x.npy: shape [5, 2, 6], expected"),
    "float ids": (array(IDS / 1.0), "x.npy: dtype float64, expected integers"),
    "NaN": (array(np.full((4, 4), np.nan)), "x.npy: dtype float64, expected integers"),
    "booleans": (array(IDS > 2), "x.npy: dtype bool, expected integers"),
    "complex ids": (array(IDS * 1j), "x.npy: dtype complex128, expected integers"),
    "strings": (array(np.array(["a", "b"])), "x.npy: dtype <U1, expected integers"),
    "dates": (array(np.zeros(4, "M8[s]")), "x.npy: dtype datetime64[s], expected integers"),
    "records": (array(np.zeros(4, [("a", "i4")])), "expected integers"),
    "pickled objects": (array(np.array([print, 1], object)), "x.npy: holds pickled"),
    "a negative id": (array(np.where(IDS == 3, -1, IDS)), "x.npy: id -1 at [0, 3] is not in"),
    "a huge id": (array(np.where(IDS == 3, 10**12, IDS)), "x.npy: id 1000000000000 at [0, 3]"),
    "ids beyond the vocabulary": (array(IDS, "--num-ids", "6"), "id 6 at [1, 0] is not in [0, 6)"),
    "a rare id beyond the vocabulary": (
        array(np.where(np.arange(9000).reshape(1500, 6) == 4567, 9, 3), "--num-ids", "5"),
        "id 9 at [761, 1] is not in [0, 5)",
    ),
    "a vocabulary of a million million": (
        array(IDS, "--num-ids", str(10**12)),
        "num_ids: received",
    ),
    "sequences of another length": (array(IDS, "--length", "5"), "x.npy: tokens: shape [10, 6]"),
    "one sequence, none to set aside": (array(IDS[:1]), "fraction: 0.1 of 1 sequences"),
    "half an id": (raw("x.bin", b"abc"), "x.bin: 3 bytes, expected uint16"),
    "an empty .bin": (raw("x.bin", b""), "x.bin: 0 bytes"),
    # Archives.
    "no archive": (raw("x.npz", npy(IDS)), "x.npz: cannot be read as .npz"),
    "an empty archive": (archive(), "x.npz: holds nothing"),
    "half an archive": (
        lambda folder: raw("x.npz", archived(folder / "y", a=npy(IDS)).read_bytes()[:99])(folder),
        "x.npz: cannot be read as .npz",
    ),
    "arrays of many names": (archive(a=npy(IDS), b=npy(IDS)), "x.npz: holds a, b; expected"),
    "a bomb": (
        train(lambda path: archived(path, claimed=2**40, a=npy(IDS)), source="x.npz"),
        "x.npz: claims to inflate to 1,099,511,627,776 bytes",
    ),
    "objects in an archive": (archive(a=npy(np.array([print], object))), "a.npy: holds pickled"),
    "labels of another number": (
        archive(tokens=npy(IDS), labels=npy(IDS[:3, 0])),
        "labels: shape [3], expected [10]",
    ),
    "negative labels": (
        archive(tokens=npy(IDS), labels=npy(-np.arange(10))),
        "labels: class -1 at [1] is not in",
    ),
    "labels that are no integers": (
        archive(tokens=npy(IDS), labels=npy(np.arange(10) / 2)),
        "labels.npy: dtype float64, expected integers",
    ),
    # Pictures.
    "no image": (images(lambda path: write(path / "a.png", "no")), "a.png: is no PNG or JPEG"),
    "an image of another kind": (
        images(lambda path: picture(path / "a.gif", [[0]]).rename(path / "a.png")),
        "a.png: is no PNG or JPEG",
    ),
    "images of several sizes": (
        images(lambda path: png(path.parent, (3, 2), (2, 3))),
        "1.png: 3 x 2 pixels, expected 2 x 3",
    ),
    "half an image": (
        images(
            lambda path: write(
                path / "0.png", (png(path.parent, (9, 9)) / "0.png").read_bytes()[:45]
            )
        ),
        "0.png: cannot be read as an image",
    ),
    "an image that claims a hundred million pixels": (
        images(lambda path: claiming(png(path.parent, (1, 1)) / "0.png", 10_000, path / "0.png")),
        "0.png: cannot be read as an image",
    ),
    "transparent images": (
        images(lambda path: picture(path / "a.png", transparent(254))),
        "a.png: has transparent pixels",
    ),
    "images of 16 bits": (
        images(lambda path: picture(path / "a.png", [[0]], "I;16")),
        "a.png: mode I;16, expected 8 bits",
    ),
    "one image, none to set aside": (
        images(lambda path: png(path.parent, (2, 2))),
        "fraction: 0.1 of 1 sequences",
    ),
    # Options in a file.
    "no TOML": (toml("= 3"), "file: is no TOML"),
    "TOML in Latin-1": (toml("# Größe".encode("latin-1")), "file: is no TOML"),
    "TOML nested too deeply": (toml("a = " + "[" * NEST), "file: is no TOML"),
    "an option that there is not": (toml("num_step = 3"), "nearest: num_steps"),
    "an option of another type": (toml('warmup_steps = "3"'), "warmup_steps: received '3'"),
    "a table of options": (toml("[training]\nnum_steps = 3"), "config: 'training' is unknown"),
    "a date for a number": (toml("dropout = 2020-01-01"), "dropout: received"),
    "infinity for a number": (toml("learning_rate = inf"), "learning_rate: received inf"),
    "a number beyond all bounds": (toml(f"accumulate = {10**30}"), "accumulate: received"),
    "a folder of options": (
        with_file("--config", os.mkdir, "train", "text.txt", "--out", "out"),
        "file: is a folder",
    ),
    "a FIFO of options": (
        with_file("--config", fifo, "train", "text.txt", "--out", "out"),
        "file: is no regular file",
    ),
    # The folder of a run.
    "a run that is a file": (lambda folder: ["sample", "text.txt"], "text.txt"),
    "a run that is none": (lambda folder: ["evaluate", "."], "holds no run"),
    "an empty config": (damaged("text", "config.json", lambda _: b""), "config.json: is no JSON"),
    "half a config": (
        damaged("text", "config.json", lambda content: content[:99]),
        "config.json: is no JSON",
    ),
    "a config in Latin-1": (
        damaged("text", "config.json", lambda _: '{"ö": 1}'.encode("latin-1"), *SAMPLE),
        "config.json: is no JSON",
    ),
    "a config nested too deeply": (
        damaged("text", "config.json", lambda _: b"[" * NEST, *EVALUATE),
        "config.json: is no JSON",
    ),
    "a config that is a list": (
        damaged("text", "config.json", lambda _: b"[]", *SAMPLE),
        "is no marref-run-1",
    ),
    "a config that is a folder": (
        replaced("text", "config.json", os.mkdir, *SAMPLE),
        "config.json: is a folder",
    ),
    "a config that is a FIFO": (
        replaced("text", "config.json", fifo),
        "config.json: is no regular file",
    ),
    "options that are a list": (
        settings("text", lambda told: told.update(config=[])),
        "config.json: is damaged, expected config",
    ),
    "an unknown option in a config": (
        settings("text", lambda told: told["config"].update(num_step=3)),
        "nearest: num_steps",
    ),
    "a config without an option": (
        settings("text", lambda told: told["config"].update(num_steps=None)),
        "num_steps: received None",
    ),
    "a codec of no kind": (
        settings("text", lambda told: told["codec"].update(kind="runes"), *EVALUATE),
        "codec: kind: received 'runes'",
    ),
    "an alphabet in disorder": (
        settings("text", lambda told: told["codec"].update(alphabet="ba"), *EVALUATE),
        "codec: alphabet: received",
    ),
    "ids without number": (
        settings("ids", lambda told: told["codec"].update(count=10**12), "evaluate", "ids"),
        "codec: num_ids: received 1000000000000",
    ),
    "a length that is none": (
        settings("text", lambda told: told["data"].update(length=-3), *SAMPLE),
        "length: received -3",
    ),
    "a config of another format": (
        settings("text", lambda told: told.update(format=3), *EVALUATE),
        "config.json: is no marref-run-1",
    ),
    "a config without data": (
        settings("text", lambda told: told.pop("data"), *SAMPLE),
        "config.json: is damaged, expected data",
    ),
    "a config without source": (
        settings("text", lambda told: told.pop("source"), *EVALUATE),
        "text: does not say where its data lie",
    ),
    "a source that is gone": (
        lambda folder: ((folder / "text.txt").unlink(), ["train", "--out", "text", "--resume"])[1],
        "text.txt",
    ),
    "data that have changed": (
        damaged(
            ".",
            "text.txt",
            lambda content: content.replace(b"z", b"q"),
            *("train", "--out", "text", "--resume"),
        ),
        "dataset: its data is",
    ),
    "characters that the run has not": (
        damaged(".", "text.txt", lambda content: content.replace(b"q", b"Q"), *EVALUATE),
        "'Q' (U+0051) at 4 is not in the alphabet",
    ),
    "ids that the run has not": (
        damaged(".", "ids.npy", lambda _: npy(IDS + 7), "evaluate", "ids"),
        "is not in [0, 7)",
    ),
    "pictures of another size": (
        lambda folder: (png(folder, (8, 7)), ["evaluate", "digits", "images"])[1],
        "7 x 8 pixels, expected 8 x 8",
    ),
    # Checkpoints, the only one there is.
    "no checkpoint": (
        replaced("text", "checkpoints/*", lambda path: None, *SAMPLE),
        "no checkpoint",
    ),
    "an empty checkpoint": (only_checkpoint(lambda _: b""), "no checkpoint can be read"),
    "half a checkpoint": (
        only_checkpoint(lambda content: content[: len(content) // 2], *SAMPLE),
        "no checkpoint can be read",
    ),
    "a checkpoint with a flipped bit": (
        only_checkpoint(lambda content: content[:-5] + b"\xff" + content[-4:], *EVALUATE),
        "no checkpoint can be read",
    ),
    "a checkpoint that claims to be longer": (
        only_checkpoint(lambda content: b"\xff" * 8 + content[8:]),
        "no checkpoint can be read",
    ),
    "a checkpoint nested too deeply": (
        only_checkpoint(lambda _: NEST.to_bytes(8, "little") + b"[" * NEST),
        "no checkpoint can be read",
    ),
    "a vocabulary that does not fit the checkpoint": (
        rewritten(lambda arrays, metadata: metadata.update(vocab_size=99), *SAMPLE),
        "has shape [31], expected [99]",
    ),
    "a vocabulary of a million million in a checkpoint": (
        rewritten(lambda arrays, metadata: metadata.update(vocab_size=10**12)),
        "no checkpoint can be read",
    ),
    "a checkpoint without an array": (
        rewritten(lambda arrays, metadata: arrays.pop("params/head.bias"), *EVALUATE),
        "params: head.bias is missing",
    ),
    "a checkpoint of another step": (
        rewritten(lambda arrays, metadata: metadata.update(step=99)),
        "step: received 99",
    ),
    "a checkpoint with another codec": (
        rewritten(lambda arrays, metadata: metadata.update(codec={"kind": "ids"}), *SAMPLE),
        "codec: ids has the fields none, expected count",
    ),
    "a checkpoint whose codec has other ids": (
        rewritten(lambda arrays, metadata: metadata.update(codec={"kind": "bytes"}), *SAMPLE),
        "codec: bytes has 256 ids, expected 30 as the model",
    ),
    "checkpoints that are folders": (
        replaced("text", "checkpoints/*", os.mkdir, *SAMPLE),
        "is a folder, expected a file",
    ),
    "checkpoints that are FIFOs": (
        replaced("text", "checkpoints/*", fifo),
        "is no regular file, expected a file",
    ),
    "a history that is a FIFO": (
        replaced("text", "history.csv", fifo, *SAMPLE),
        "history.csv: is no regular file",
    ),
    "a history that is a folder": (
        replaced("text", "history.csv", os.mkdir),
        "history.csv: is a folder",
    ),
    # Prompts and what is written.
    "a prompt that is gone": (lambda folder: ["sample", "digits", "--prompt", "no.png"], "no.png"),
    "a prompt in text": (
        lambda folder: ["sample", "digits", "--prompt", "a_"],
        "--prompt: received 'a_', expected the name of a .png for pixels",
    ),
    "a picture that is none": (
        prompt("digits", "p.png", lambda path: write(path, "no")),
        "--prompt: p.png: is no PNG",
    ),
    "a picture of another size": (
        prompt("digits", "p.png", lambda path: picture(path, np.zeros((8, 7)))),
        "--prompt: p.png: 7 x 8 pixels",
    ),
    "a picture without a hole": (
        prompt("digits", "p.png", lambda path: picture(path, np.zeros((8, 8)))),
        "--prompt: p.png: has no transparent pixel",
    ),
    "a picture with half a hole": (
        prompt("digits", "p.png", lambda path: picture(path, transparent(128))),
        "--prompt: p.png: has pixels that are transparent in part",
    ),
    "a picture that is a FIFO": (prompt("digits", "p.png", fifo), "p.png: is no regular file"),
    "ids without a gap": (
        prompt("ids", "p.npy", lambda path: saved(path, IDS[0])),
        "--prompt: p.npy: holds no -1",
    ),
    "ids that are floats": (
        prompt("ids", "p.npy", lambda path: saved(path, [1.0, np.nan])),
        "--prompt: p.npy: dtype float64",
    ),
    "ids below -1": (
        prompt("ids", "p.npy", lambda path: saved(path, [1, -1, -2])),
        "--prompt: p.npy: id -2 at [2] is not in [0, 7)",
    ),
    "ids beyond the run's": (
        prompt("ids", "p.npy", lambda path: saved(path, [-1, 7])),
        "--prompt: p.npy: id 7 at [1] is not in [0, 7)",
    ),
    "several prompts": (
        prompt("ids", "p.npy", lambda path: saved(path, IDS - 1)),
        "--prompt: p.npy: shape [10, 6], expected [length]",
    ),
    "more ids than a sequence has": (
        prompt("ids", "p.npy", lambda path: saved(path, [-1] * 7)),
        "--prompt: has 7 tokens, expected at most 6",
    ),
    "samples into a folder": (
        lambda folder: (os.mkdir(folder / "s.npy"), [*SAMPLE, "--out", "s.npy"])[1],
        "s.npy: no regular file",
    ),
    "samples into a FIFO": (
        lambda folder: (fifo(folder / "s.txt"), [*SAMPLE, "--out", "s.txt"])[1],
        "s.txt: no regular file",
    ),
    "a run into a file": (
        lambda folder: ["train", "text.txt", "--out", "text.txt"],
        "text.txt",
    ),
    "a run below a file": (lambda folder: ["train", "text.txt", "--out", "ids.npy/a"], "ids.npy"),
    "a run over another": (lambda folder: ["train", "text.txt", "--out", "text"], "holds a run"),
}


def contents(folder):
    """Every file's bytes; of what is none, what it is."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else path.stat().st_mode
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_line_and_nothing_is_written(case, made, tmp_path, capsys, monkeypatch):
    make, message = BAD_FILES[case]
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    for run in ("text", "ids", "digits"):
        told = json.loads((tmp_path / run / "config.json").read_text())
        told["source"] = [path.replace(str(made), str(tmp_path)) for path in told["source"]]
        (tmp_path / run / "config.json").write_text(json.dumps(told))
    monkeypatch.chdir(tmp_path)
    command = make(tmp_path)
    if command[0] == "train" and "--resume" not in command:
        command += TINY
    before = contents(tmp_path)
    status = cli.main(command)
    errors = capsys.readouterr().err
    assert status == 2, errors
    if "images extra" in errors and importlib.util.find_spec("PIL") is None:
        pytest.skip("needs Pillow")
    assert message in errors.replace(f"{tmp_path}/", "")
    assert errors.startswith("marref: ")
    assert errors.count("\n") == 1
    assert contents(tmp_path) == before


def test_the_table_is_long_enough():
    assert len(BAD_FILES) >= 60


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_damaged_history_is_one_warning_and_the_run_goes_on(made, tmp_path, capsys, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    history = tmp_path / "text" / "history.csv"
    lines = history.read_text().splitlines(keepends=True)
    history.write_bytes("".join(lines[:2]).encode() + b"\xff\0,,\n" + lines[3].encode())
    assert cli.main(["train", "--out", str(tmp_path / "text"), "--resume"]) == 0
    assert capsys.readouterr().err == (
        f"marref: warning: {history}: cannot be read after step 1 of 4; the lines behind it are "
        "lost\n"
    )
    assert history.read_text() == "".join(lines[:2])


def full_disk(monkeypatch, allowed):
    """Let so many files be brought to the disk, then say that it is full."""
    original, count = os.fsync, 0

    def fsync(handle):
        nonlocal count
        count += 1
        if count > allowed:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("allowed", [0, 1, 2, 3, 4])
def test_a_full_disk_before_the_first_step_is_one_line_and_leaves_nothing(
    allowed, made, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    full_disk(monkeypatch, allowed)
    command = ["train", str(made / "text.txt"), "--out", "a/b", *TINY]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("marref: [Errno 28] No space left on device: ")
    assert error.count("\n") == 1
    if allowed < 4:
        assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_last_good_checkpoint_and_is_one_line(
    made, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = ["train", str(made / "text.txt"), "--out", "run", *TINY]
    with monkeypatch.context() as patch:
        full_disk(patch, 8)
        assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("marref: [Errno 28] No space left on device: ")
    assert error.count("\n") == 1
    assert max(checkpoints.found(tmp_path / "run" / "checkpoints")) == 2
    assert cli.main(["train", "--out", "run", "--resume"]) == 0
