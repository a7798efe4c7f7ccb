import contextlib
import errno
import io
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest

import marref
from marref import files, trees

from . import strategies


@pytest.fixture
def trained():
    model = marref.build(
        vocab_size=5, embed_dim=4, num_layers=2, num_heads=2, seq_len=3, gelu="tanh"
    )
    return model, strategies.random_params(model, np.random.default_rng(0), np.float32)


def test_a_model_comes_back_as_it_was(trained, tmp_path):
    model, params = trained
    marref.save_model(tmp_path / "model.npz", model, params)
    loaded_model, loaded = marref.load_model(tmp_path / "model.npz")
    assert loaded_model == model
    np.testing.assert_array_equal(loaded_model(loaded, [[1, 2]]), model(params, [[1, 2]]))
    assert list(trees.flatten(loaded)) == list(trees.flatten(params))


def test_the_same_model_is_the_same_bytes(trained, tmp_path):
    for name in ("a", "b"):
        marref.save_model(tmp_path / name, *trained)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("name", ["__metadata__", "file", "allow_pickle"])
def test_reserved_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"the name '{name}' is reserved"):
        files.save(tmp_path / "x.npz", {name: np.ones(1)}, {})
    assert not list(tmp_path.iterdir())


def test_a_file_holds_the_arrays_and_the_metadata_and_nothing_else(tmp_path):
    """NumPy 2.1 takes every argument of savez_compressed for an array."""
    files.save(tmp_path / "x.npz", {"a": np.ones(1)}, {})
    with np.load(tmp_path / "x.npz") as archive:
        assert sorted(archive.files) == ["__metadata__", "a"]


def test_a_file_with_the_stray_array_of_numpy_2_1_loads(trained, tmp_path):
    path = tmp_path / "model.npz"
    marref.save_model(path, *trained)
    with zipfile.ZipFile(path, "a") as archive, archive.open("allow_pickle.npy", "w") as member:
        np.lib.format.write_array(member, np.array(False))
    model, params = marref.load_model(path)
    assert model == trained[0]
    assert trees.flatten(params).keys() == trees.flatten(trained[1]).keys()


def test_a_file_is_written_whole_or_not_at_all(trained, tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    marref.save_model(path, *trained)
    before = path.read_bytes()

    def fails(file, **_):
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fails)
    with pytest.raises(OSError, match="No space left"):
        marref.save_model(path, *trained)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.npz"]


@pytest.mark.parametrize("name", ["x.npz", "x" * 255, "x" + "." + "y" * 253])
def test_every_name_that_the_system_takes_can_be_written(tmp_path, name):
    files.save(tmp_path / name, {"a": np.ones(1)}, {})
    assert os.listdir(tmp_path) == [name]


def test_threads_that_write_one_path_never_leave_half_a_file(tmp_path):
    path = tmp_path / "x.npz"
    contents = [{"a": np.full(2000, float(value))} for value in range(4)]
    files.save(path, contents[0], {})
    unreadable, done = [], threading.Event()

    def writes(content):
        for _ in range(15):
            files.save(path, content, {})

    def reads():
        while not done.is_set():
            try:
                array = files.load(path)[0]["a"]
                assert (array == array[0]).all()
            except Exception as error:
                unreadable.append(error)

    reader = threading.Thread(target=reads)
    writers = [threading.Thread(target=writes, args=[content]) for content in contents]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert unreadable == []
    assert os.listdir(tmp_path) == ["x.npz"]


def test_a_symbolic_link_is_written_through(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "target.npz", tmp_path / "link.npz"
    link.symlink_to(target)
    for value in (1.0, 2.0):  # The link leads nowhere at first.
        files.save(link, {"a": np.array([value])}, {})
        assert link.is_symlink()
        assert files.load(target)[0]["a"] == [value]
    assert os.listdir(tmp_path / "there") == ["target.npz"]


def test_a_replaced_file_keeps_its_mode_and_a_new_one_has_the_usual_one(tmp_path):
    path, usual = tmp_path / "x.npz", tmp_path / "usual"
    usual.write_text("")
    files.save(path, {"a": np.ones(1)}, {})
    assert path.stat().st_mode == usual.stat().st_mode
    for mode in (0o640, 0o604):
        path.chmod(mode)
        files.save(path, {"a": np.zeros(1)}, {})
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_what_is_no_regular_file_is_refused_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "folder", "link"):
        with pytest.raises(ValueError, match=f"{name}: no regular file, expected one or nothing"):
            files.save(tmp_path / name, {"a": np.ones(1)}, {})
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe"]


def test_the_bytes_and_then_the_name_are_brought_to_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    events = []
    fsync, replace = os.fsync, os.replace

    def syncs(handle):
        mode = os.fstat(handle).st_mode
        events.append("folder" if stat.S_ISDIR(mode) else os.fstat(handle).st_size > 0)
        fsync(handle)

    def replaces(*paths):
        events.append("replace")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", syncs)
    monkeypatch.setattr(os, "replace", replaces)
    files.save(path, {"a": np.ones(1)}, {})
    assert events == [True, "replace", "folder"]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    files.save(path, {"a": np.ones(1)}, {})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*x\.npz'"):
        files.save(path, {"a": np.zeros(1)}, {})
    assert files.load(path)[0]["a"] == [1.0]
    assert os.listdir(tmp_path) == ["x.npz"]


KILLED_WRITER = """
import sys, time
from marref import files
with files.replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_leaves_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    command = [sys.executable, "-c", KILLED_WRITER, str(tmp_path / "x.npz")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        assert files.remove_stale(tmp_path) == []
        (temporary,) = tmp_path.iterdir()
        assert temporary.name.startswith(files.TEMPORARY_PREFIX)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert files.remove_stale(tmp_path) == [temporary]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_held_by_one_and_let_go_at_the_end(tmp_path):
    with files.locked(tmp_path), pytest.raises(BlockingIOError), files.locked(tmp_path):
        pass
    with files.locked(tmp_path):
        pass


def test_a_truncated_or_garbled_file_is_one_clear_error(trained, tmp_path):
    path = tmp_path / "model.npz"
    marref.save_model(path, *trained)
    whole = path.read_bytes()
    for size in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model.npz: "):
            marref.load_model(path)
    rng = np.random.default_rng(0)
    for _ in range(300):
        garbled = bytearray(whole)
        for place in rng.integers(len(whole), size=3):
            garbled[place] ^= 1 << rng.integers(8)
        path.write_bytes(garbled)
        with contextlib.suppress(ValueError):
            marref.load_model(path)


def test_a_model_that_would_inflate_beyond_its_parameters_is_not_read(trained, tmp_path):
    path = tmp_path / "model.npz"
    marref.save_model(path, *trained)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.npy", bytes(20 * 2**20))
    assert path.stat().st_size < 2**17
    with pytest.raises(ValueError, match=r"holds 2\d,\d{3},\d{3} bytes, expected at most"):
        marref.load_model(path)


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    raw = tmp_path / "raw.npz"
    raw.write_bytes(pickle.dumps(Bomb()))
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        buffer = io.BytesIO()
        np.save(buffer, np.array([Bomb()], object), allow_pickle=True)
        archive.writestr("head.bias.npy", buffer.getvalue())
        archive.writestr("__metadata__.npy", buffer.getvalue())
    for path in (raw, tmp_path / "zip.npz"):
        with pytest.raises(ValueError, match="cannot be read as arrays"):
            files.load(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "hold no model"),
        ({"model": {"vocab_size": 5, "colour": 1}}, "colour"),
        ({"model": {"vocab_size": 1}}, "vocab_size: received 1"),
        ({"model": {"vocab_size": 5, "embed_dim": 4, "num_heads": 2}}, "is missing"),
    ],
)
def test_a_file_that_holds_no_model_is_rejected(tmp_path, metadata, message):
    files.save(tmp_path / "x.npz", {"a": np.ones(1)}, metadata)
    with pytest.raises(ValueError, match=message):
        marref.load_model(tmp_path / "x.npz")


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        marref.load_model(tmp_path / "nowhere.npz")


def test_parameters_of_another_model_are_not_written(trained, tmp_path):
    _, params = trained
    other = marref.build(vocab_size=6, embed_dim=4, num_layers=2, num_heads=2, seq_len=3)
    with pytest.raises(ValueError, match=r"params: embedding.table has shape \[5, 4\]"):
        marref.save_model(tmp_path / "model.npz", other, params)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_unpickled_either(tmp_path):
    np.save(tmp_path / "a.npy", np.array([print], object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read as arrays"):
        files.load(tmp_path)


def test_arrays_of_objects_are_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="arrays: bad has dtype object"):
        files.save(tmp_path / "x.npz", {"bad": np.array([print], object)}, {})


def test_a_lone_npy_file_is_one_clear_error(tmp_path):
    np.save(tmp_path / "lone.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"a single .npy array, which has no name"):
        files.load(tmp_path / "lone.npy")


def test_a_file_of_pytorch_is_one_clear_error(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.ones(3)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"is no array; a PyTorch file"):
        files.load(tmp_path / "model.pt")
