import dataclasses
import importlib.util
import json
import zipfile

import numpy as np
import pytest

from marref import files, trees
from marref.training import checkpoints, loop
from marref.training.checkpoints import Checkpoint
from marref.training.config import Config

CONFIG = Config(
    embed_dim=4,
    num_layers=2,
    num_heads=2,
    seq_len=3,
    num_steps=40,
    learning_rate=0.1,
    warmup_steps=0,
    average_decay=0.9,
    validate_every=10,
    checkpoint_every=10,
    num_threads=1,
)
CODEC = {"kind": "characters", "alphabet": "aä…\n"}
FORMATS = ["safetensors", "npz"]


@pytest.fixture(params=FORMATS)
def suffix(request, monkeypatch):
    """Both formats, the second as if safetensors were not installed."""
    if request.param == "npz":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        pytest.importorskip("safetensors")
    return f".{request.param}"


def checkpoint(step=20, config=CONFIG):
    """A checkpoint in which no two arrays are alike."""
    rng = np.random.default_rng(step)
    state = loop.init(config, config.model(5))

    def drawn(tree):
        return trees.map_leaves(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), tree)

    optimiser = {"step": np.array(step, np.int64)}
    optimiser |= {name: drawn(state.params) for name in ("first_moment", "second_moment")}
    average = state.average and drawn(state.average)
    return Checkpoint(step, loop.State(drawn(state.params), optimiser, average), config, 5, CODEC)


def assert_same(found, expected):
    assert found[:1] + found[2:] == expected[:1] + expected[2:]
    found_leaves, leaves = (
        trees.flatten({"params": s.params, "optimiser": s.optimiser, "average": s.average})
        for s in (found.state, expected.state)
    )
    assert found_leaves.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert found_leaves[name].dtype == leaf.dtype
        np.testing.assert_array_equal(found_leaves[name], leaf)
        assert found_leaves[name].flags.writeable


@pytest.mark.parametrize("changes", [{}, {"average_decay": 0.0}, {"dtype": "float64"}])
def test_a_checkpoint_comes_back_to_the_bit(tmp_path, suffix, changes):
    written = checkpoint(config=dataclasses.replace(CONFIG, **changes))
    path = checkpoints.save(tmp_path, written)
    assert path == tmp_path / f"00000020{suffix}"
    assert_same(checkpoints.load(path), written)


def test_a_checkpoint_is_the_same_bytes_each_time(tmp_path, suffix):
    first = checkpoints.save(tmp_path, checkpoint()).read_bytes()
    assert checkpoints.save(tmp_path, checkpoint()).read_bytes() == first


@pytest.mark.parametrize("place", np.linspace(0, 0.999, 20))
def test_every_flipped_bit_is_noticed(tmp_path, suffix, place):
    path = checkpoints.save(tmp_path, checkpoint())
    written = bytearray(path.read_bytes())
    written[int(place * len(written))] ^= 4
    path.write_bytes(written)
    try:
        found = checkpoints.load(path)
    except ValueError:
        return
    # A bit of the archive that says nothing about its content, such as a date.
    assert suffix == ".npz"
    assert_same(found, checkpoint())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_checkpoint_is_one_clear_error(tmp_path, suffix, share):
    path = checkpoints.save(tmp_path, checkpoint())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"00000020\{suffix}: "):
        checkpoints.load(path)


def rewritten(path, change_metadata=lambda metadata: None, change_arrays=lambda arrays: None):
    """Write a checkpoint again with a change and the checksum that belongs to it."""
    arrays, metadata = files.load(path)
    change_metadata(metadata)
    change_arrays(arrays)
    metadata["checksum"] = checkpoints.checksum(arrays, metadata)
    files.save(path, arrays, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda metadata: metadata.update(format="other"), "is no checkpoint .format 'other'"),
        (lambda metadata: metadata.pop("config"), "is no checkpoint .'config'"),
        (lambda metadata: metadata.update(step=41), "step: received 41"),
        (lambda metadata: metadata.update(vocab_size=6), r"embedding.table has shape \[5, 4\]"),
        (lambda metadata: metadata["config"].update(embed_dims=4), "nearest: embed_dim"),
        (lambda metadata: metadata["config"].update(average_decay=0.0), "expected first_moment"),
        (lambda metadata: metadata["config"].update(dtype="float64"), "dtype float32, expected"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(tmp_path, suffix, change, message):
    path = checkpoints.save(tmp_path, checkpoint())
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(path)


def test_content_that_was_changed_by_hand_does_not_pass_for_whole(tmp_path, suffix):
    path = checkpoints.save(tmp_path, checkpoint())
    arrays, metadata = files.load(path)
    for changed in ({**metadata, "step": 10}, {**metadata, "codec": {}}):
        files.save(path, arrays, changed)
        with pytest.raises(ValueError, match=r"is damaged .its checksum"):
            checkpoints.load(path)


def test_a_bomb_is_refused_before_it_is_inflated(tmp_path, monkeypatch):
    path = tmp_path / "00000020.npz"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    checkpoints.save(tmp_path, checkpoint())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.npy", bytes(100 * 2**20))
    assert path.stat().st_size < 2**20
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("inflated"))
    with pytest.raises(ValueError, match=r"holds 1\d\d,\d{3},\d{3} bytes, expected at most"):
        checkpoints.load(path)


def test_metadata_are_not_inflated_without_bound(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    # safetensors 0.4 writes no JSON where there are no arrays.
    files.save(path, {"x": np.zeros(1)}, {"long": "x" * 10**6})
    assert files.load_metadata(path, max_bytes=2 * 10**6) == {"long": "x" * 10**6}
    with pytest.raises(ValueError, match="expected at most 1,000"):
        files.load_metadata(path, max_bytes=1000)


def test_the_newest_is_used_or_where_it_is_damaged_the_one_before(tmp_path, suffix):
    assert checkpoints.latest(tmp_path) is None
    for step in (10, 20, 30):
        newest = checkpoints.save(tmp_path, checkpoint(step))
    assert_same(checkpoints.latest(tmp_path), checkpoint(30))
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match=r"00000030\..*; using the one before it") as warned:
        assert_same(checkpoints.latest(tmp_path), checkpoint(20))
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    checkpoints.remove_after(tmp_path, 20)
    assert sorted(checkpoints.found(tmp_path)) == [10, 20]


def test_where_all_are_damaged_nothing_is_made_up(tmp_path):
    (tmp_path / "00000010.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no checkpoint can be read, the oldest: .*00000010\.npz"):
        checkpoints.latest(tmp_path)


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(0, 60, 10):
        (tmp_path / f"{step:08d}.npz").write_bytes(b"")
    (tmp_path / "notes.npz").write_bytes(b"")
    checkpoints.clean(tmp_path, 2, best=10)
    assert sorted(checkpoints.found(tmp_path)) == [10, 40, 50]
    checkpoints.clean(tmp_path, 4)
    assert sorted(checkpoints.found(tmp_path)) == [10, 40, 50]
    checkpoints.clean(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000050.npz", "notes.npz"]


def test_the_config_in_a_checkpoint_is_plain_json(tmp_path):
    path = checkpoints.save(tmp_path, checkpoint())
    config = files.load_metadata(path, max_bytes=10**6)["config"]
    assert Config.from_dict(json.loads(json.dumps(config))) == CONFIG
