import io
import json
import os
import pickle
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marref import data

PANGRAM = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich."


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return path


def saved(path, array):
    np.save(path, array)
    return path


def word_tokenizer(path, **settings):
    """A tokenizer of whole words: the smallest file that the package reads."""
    words = ["[UNK]", "the", "cat", "sat"]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(words)},
            "unk_token": "[UNK]",
        },
        **settings,
    }
    return write(path, json.dumps(content))


def picture(path, values, mode=None, **options):
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = image.fromarray(np.asarray(values, np.uint8))
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def archived(path, claimed=None, **members):
    """An .npz of raw members, which may claim any size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
            archive.filelist[-1].file_size = claimed or len(content)
    return path


def npy(array=None, **header):
    """The bytes of an .npy file, with another header if asked."""
    file = io.BytesIO()
    if header:
        fields = {"descr": "<i8", "fortran_order": False, "shape": (4,), **header}
        np.lib.format.write_array_header_1_0(file, fields)
        return file.getvalue()
    np.lib.format.write_array(file, np.asarray(array))
    return file.getvalue()


def fifo(path):
    os.mkfifo(path)
    return path


def claiming(path, size, target):
    """A copy of a PNG whose header claims ``size`` times ``size`` pixels."""
    content = path.read_bytes()
    header = b"IHDR" + size.to_bytes(4) * 2 + content[24:29]
    return write(target, content[:12] + header + zlib.crc32(header).to_bytes(4) + content[33:])


def png(folder, *shapes):
    for i, shape in enumerate(shapes):
        picture(folder / "images" / f"{i}.png", np.zeros(shape))
    return folder / "images"


# --- Text


def test_a_text_file_is_its_bytes(tmp_path):
    path = write(tmp_path / "a.txt", PANGRAM * 100)
    dataset = data.load(path)
    assert (dataset.codec, dataset.vocab_size) == (data.Bytes(), 257)
    assert dataset.tokens.tobytes() == path.read_bytes()
    assert isinstance(dataset.tokens, np.memmap)


def test_several_texts_are_joined_with_nothing_between(tmp_path):
    paths = [write(tmp_path / f"{i}.md", text) for i, text in enumerate(("abc\r\n", "", "déf"))]
    assert data.load(paths, length=2).tokens.tobytes() == "abc\r\ndéf".encode()
    dataset = data.load(paths, kind="characters", length=2)
    assert dataset.codec.decode(dataset.tokens.astype(int) + 1) == "abc\r\ndéf"


def test_characters_are_numbered_in_order_of_code_point(tmp_path):
    dataset = data.load(write(tmp_path / "a.txt", "zäa😀a\nz"), kind="characters", length=3)
    assert dataset.codec == data.Characters("\nazä😀")
    assert dataset.tokens.tolist() == [2, 3, 1, 4, 1, 0, 2]
    assert dataset.rows([1]).tolist() == [[4, 2, 5]]
    assert dataset.tokens.dtype == np.uint8


def test_a_text_is_read_with_the_codec_of_another(tmp_path):
    codec = data.load(write(tmp_path / "a.txt", "abcd" * 9), kind="characters").codec
    dataset = data.load(write(tmp_path / "b.txt", "ddd"), codec=codec, length=1)
    assert dataset.codec is codec
    assert dataset.tokens.tolist() == [3, 3, 3]


def test_a_tokenizer_file_encodes_and_travels_with_the_codec(tmp_path):
    pytest.importorskip("tokenizers")
    text = write(tmp_path / "a.txt", "the cat sat the dog")
    dataset = data.load(text, tokenizer=word_tokenizer(tmp_path / "t.json"), length=2)
    assert dataset.tokens.tolist() == [1, 2, 3, 1, 0]
    assert dataset.vocab_size == 5
    os.remove(tmp_path / "t.json")
    codec = data.codec_from_dict(json.loads(json.dumps(dataset.codec.as_dict())))
    assert codec.encode("cat the").tolist() == [3, 2]
    assert codec.decode([[2, 3], [0, 4]]) == ["the cat", "_sat"]


def test_a_tokenizers_truncation_padding_and_frame_are_not_used(tmp_path):
    pytest.importorskip("tokenizers")
    path = word_tokenizer(
        tmp_path / "t.json",
        truncation={
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        padding={
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[UNK]",
        },
        post_processor={
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "[UNK]", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"[UNK]": {"id": "[UNK]", "ids": [0], "tokens": ["[UNK]"]}},
        },
    )
    dataset = data.load(write(tmp_path / "a.txt", "the cat sat"), tokenizer=path, length=1)
    assert dataset.tokens.tolist() == [1, 2, 3]


# --- Codecs

CODECS = [
    data.Bytes(),
    data.Characters("".join(sorted(set(PANGRAM)))),
    data.Ids(50257),
    data.Pixels(2, 3, channels=1, levels=16),
    data.Pixels(2, 3, channels=3, levels=256),
]


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_a_codec_survives_json(codec):
    assert data.codec_from_dict(json.loads(json.dumps(codec.as_dict()))) == codec


@given(st.text())
def test_text_comes_back_from_bytes_and_characters(text):
    assert data.Bytes().decode(data.Bytes().encode(text)) == text
    codec = data.Characters("".join(sorted({*text, "a"})))
    assert codec.decode(codec.encode(text)) == text


@given(st.binary(min_size=1))
def test_bytes_that_are_no_text_are_shown_all_the_same(content):
    shown = data.Bytes().decode(data.Bytes().encode(content))
    assert shown == content.decode(errors="replace")


def test_masked_tokens_are_shown():
    assert data.Bytes().decode([[98, 0, 99], [0, 0, 0]]) == ["a_b", "___"]
    assert data.Characters("ab").decode([1, 0, 2]) == "a_b"
    assert data.Ids(9).decode([[9, 0]]).tolist() == [[8, -1]]
    assert data.Pixels(1, 3, 1, 2).decode([1, 0, 2]).tolist() == [[0, 128, 255]]


def test_decoded_batches_keep_their_axes():
    tokens = np.full((2, 3, 12), 5)
    assert data.Bytes().decode(tokens[..., :2]) == [["\4\4"] * 3] * 2
    assert data.Pixels(2, 6, 1, 9).decode(tokens).shape == (2, 3, 2, 6)
    assert data.Pixels(2, 2, 3, 9).decode(tokens).shape == (2, 3, 2, 2, 3)


def test_pixels_are_the_nearest_level_and_levels_come_back():
    values = np.arange(256, dtype=np.uint8)
    for levels in range(2, 257):
        codec = data.Pixels(1, 256, 1, levels)
        shown = codec.decode(codec.encode(values[np.newaxis])).astype(int)
        exact = np.arange(levels) * 255 / (levels - 1)
        nearest = abs(values[:, np.newaxis] - exact).min(axis=1)
        assert (abs(shown[0] - values) <= nearest + 0.5).all()
        codec = data.Pixels(1, levels, 1, levels)
        tokens = np.arange(levels) + 1
        np.testing.assert_array_equal(codec.encode(codec.decode(tokens)), tokens)
    np.testing.assert_array_equal(shown[0], values)


# --- Arrays

DTYPES = ["u1", "i1", "<u2", ">u2", "<i4", ">i4", "<u4", "<i8", ">i8", "<u8"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", "CF")
def test_integers_of_any_dtype_and_order_are_read(tmp_path, dtype, order):
    ids = np.random.default_rng(0).integers(0, 100, (7, 5))
    path = saved(tmp_path / "a.npy", np.array(ids, dtype, order=order))
    dataset = data.load(path)
    assert (dataset.codec, dataset.length, len(dataset)) == (data.Ids(ids.max() + 1), 5, 7)
    assert isinstance(dataset.tokens, np.memmap)
    rows = dataset.rows([3, 0, 3])
    assert (type(rows), rows.dtype) == (np.ndarray, np.int64)
    np.testing.assert_array_equal(rows, ids[[3, 0, 3]] + 1)
    np.savez(tmp_path / "a.npz", np.array(ids, dtype, order=order))
    np.testing.assert_array_equal(data.load(tmp_path / "a.npz").rows([6, 1]), ids[[6, 1]] + 1)


def test_an_npz_may_hold_tokens_and_labels_beside_others(tmp_path):
    ids = np.arange(12).reshape(4, 3)
    np.savez_compressed(
        tmp_path / "a.npz", other=np.ones(2), tokens=ids, labels=np.array([3, 0, 0, 2], np.uint8)
    )
    dataset = data.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(dataset.tokens, ids)
    assert dataset.labels.tolist() == [3, 0, 0, 2]
    np.savez(tmp_path / "b.npz", labels=np.array([1, 2]), ids=ids[:2])
    assert data.load(tmp_path / "b.npz").labels.tolist() == [1, 2]


def test_a_bin_is_uint16_and_its_pickle_is_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    write(tmp_path / "meta.pkl", pickle.dumps(Bomb()))
    np.array([5, 40000, 7] * 10, "<u2").tofile(tmp_path / "train.bin")
    dataset = data.load(tmp_path / "train.bin", length=3)
    assert dataset.vocab_size == 40002
    assert dataset.rows([1]).tolist() == [[40001, 8, 6]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.pkl", "train.bin"]


def test_ids_are_checked_as_they_are_read(tmp_path):
    ids = np.zeros((4, 3), np.int16)
    ids[2, 1], ids[3, 0] = 9, -2
    dataset = data.load(saved(tmp_path / "a.npy", ids), num_ids=9)
    assert dataset.rows([0, 1]).tolist() == [[1, 1, 1]] * 2
    with pytest.raises(ValueError, match=r"id 9 at \[2, 1\] is not in \[0, 9\)"):
        dataset.rows([1, 2])
    with pytest.raises(ValueError, match=r"id -2 at \[3, 0\]"):
        dataset.rows([3])
    stream = data.load(saved(tmp_path / "b.npy", ids.ravel()), num_ids=9, length=3)
    with pytest.raises(ValueError, match=r"id 9 at \[7\]"):
        stream.rows([0, 6])


@pytest.fixture
def peak_memory():
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def test_a_large_file_is_read_in_pieces(tmp_path, peak_memory):
    ids = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", ">i4", (5_000_000,))
    ids[1000] = 6
    dataset = data.load(tmp_path / "a.npy")
    train, _ = dataset.split(0.1, 0)
    train.draw(np.random.default_rng(0), 8)
    assert dataset.vocab_size == 8
    ids[4_999_999] = -1
    with pytest.raises(ValueError, match=r"id -1 at \[4999999\]"):
        data.load(tmp_path / "a.npy")
    assert peak_memory() < 2**21


def labelled(path):
    return archived(path, tokens=npy(IDS), labels=npy(IDS[:, 0]))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.npy", lambda path: saved(path, IDS.astype(np.int16))),
        ("a.npz", labelled),
        ("images/a.png", lambda path: picture(path, np.arange(256).reshape(16, 16))),
    ],
)
def test_garbled_files_are_read_or_are_one_clear_error(name, make, tmp_path):
    path = make(tmp_path / name)
    source = path.parent if path.suffix == ".png" else path
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    said = []
    for _ in range(100):
        garbled = bytearray(whole[: rng.integers(1, len(whole)) if rng.random() < 0.2 else None])
        for place in rng.integers(len(garbled), size=3):
            garbled[place] ^= 1 << rng.integers(8)
        path.write_bytes(garbled)
        try:
            data.load(source)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 20
    assert [line for line in said if str(path) not in line or "\n" in line] == []


def test_a_file_whose_number_of_ids_is_given_is_not_read(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.npy", np.zeros(1000, np.int64))
    monkeypatch.setattr("marref.data.arrays.count_ids", None)
    assert data.load(path, num_ids=5).vocab_size == 6


# --- Images


def test_a_folder_of_images_is_read_row_by_row_in_order_of_path(tmp_path):
    picture(tmp_path / "b.png", [[0, 255, 128], [17, 34, 8]])
    picture(tmp_path / "a.PNG", [[255] * 3] * 2)
    write(tmp_path / "notes.txt", "no image")
    write(tmp_path / "._a.png", "no image")
    dataset = data.load(tmp_path)
    assert dataset.codec == data.Pixels(2, 3, 1, 16)
    assert dataset.tokens.tolist() == [[15] * 6, [0, 15, 8, 1, 2, 0]]
    assert dataset.labels is None
    assert dataset.codec.decode(dataset.rows([1])).tolist() == [[[0, 255, 136], [17, 34, 0]]]


def test_colours_lie_beside_each_other(tmp_path):
    picture(tmp_path / "a.png", [[[255, 0, 0], [0, 85, 170]]])
    picture(tmp_path / "b.png", [[[0, 0, 255], [255, 255, 255]]], "P")
    picture(tmp_path / "c.png", [[[0, 0, 0], [255, 255, 255]]], "RGBA")
    dataset = data.load(tmp_path, colour=True, levels=4)
    assert dataset.codec == data.Pixels(1, 2, 3, 4)
    assert dataset.tokens.tolist() == [
        [3, 0, 0, 0, 1, 2],
        [0, 0, 3, 3, 3, 3],
        [0, 0, 0, 3, 3, 3],
    ]
    assert dataset.codec.decode(dataset.rows([0])).tolist() == [[[[255, 0, 0], [0, 85, 170]]]]


def test_sub_folders_are_classes(tmp_path):
    for name in ("dog/z.png", "cat/deep/a.jpg", "cat/b.jpeg", "ant/c.png"):
        picture(tmp_path / name, np.zeros((2, 2)))
    dataset = data.load(tmp_path)
    assert dataset.labels.tolist() == [0, 1, 1, 2]
    assert dataset.class_names == ("ant", "cat", "dog")
    assert dataset.split(0.25, 0)[0].class_names == dataset.class_names
    labels = write(tmp_path / "labels.txt", "7\n5\n5\n10\n")
    assert data.load(tmp_path, labels=labels).labels.tolist() == [7, 5, 5, 10]


# --- Labels, the digits


@pytest.mark.parametrize(
    ("lines", "expected"),
    [("9\n10\n2\n", [9, 10, 2]), ("b\r\na \r\nb", [1, 0, 1]), ("10\nx\n9", [0, 2, 1])],
)
def test_a_label_file_has_a_class_a_line(tmp_path, lines, expected):
    path = saved(tmp_path / "a.npy", np.ones((3, 2), int))
    assert data.load(path, labels=write(tmp_path / "l", lines)).labels.tolist() == expected


def test_the_digits_come_with_their_labels():
    dataset = data.load("digits")
    train, held_out = data.digits()
    labels = data.digit_labels()
    assert [len(part) for part in labels] == [1500, 297]
    together = np.concatenate([train, held_out]), np.concatenate(labels)
    ours = dataset.rows(np.arange(1797)), dataset.labels

    def sums(tokens, labels):
        return [tokens[labels == digit].sum() for digit in range(10)]

    assert sums(*ours) == sums(*together)
    assert np.bincount(dataset.labels).tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]
    assert (dataset.vocab_size, dataset.length) == (data.DIGITS_VOCAB_SIZE, 64)
    assert dataset.codec.decode(dataset.rows([0])).shape == (1, *data.DIGITS_SHAPE)
    assert data.load("digits", codec=dataset.codec).codec == dataset.codec


# --- Windows and splits


def test_every_window_of_a_stream_is_drawn():
    dataset = data.Dataset(np.arange(20), data.Ids(20), 5)
    assert len(dataset) == 16
    drawn = dataset.draw(np.random.default_rng(0), 500)
    assert (np.diff(drawn) == 1).all()
    assert sorted(set(drawn[:, 0])) == list(range(1, 17))


def test_the_windows_of_a_stream_are_64_long_or_a_sixteenth(tmp_path):
    def length(total):
        return data.load(saved(tmp_path / "a.npy", np.zeros(total, np.uint8))).length

    assert [length(total) for total in (2, 16, 100, 1024, 9999)] == [1, 1, 6, 64, 64]
    for total in (16, 17, 31, 32, 38, 39, 47, 48, 95, 96, 255):
        data.load(saved(tmp_path / "a.npy", np.zeros(total, np.uint8))).split(0.1, 0)


@given(st.integers(2, 40), st.floats(0.05, 0.95), st.integers(0, 2**32))
def test_a_split_shares_out_every_sequence_once(n, fraction, seed):
    ids = np.arange(2 * n).reshape(n, 2)
    dataset = data.Dataset(ids, data.Ids(2 * n), 2, labels=np.arange(n))
    if round(n * fraction) in (0, n):
        with pytest.raises(ValueError, match="expected at least 1 in each part"):
            dataset.split(fraction, seed)
        return
    parts = dataset.split(fraction, seed)
    assert len(parts[1]) == round(n * fraction)
    rows = [part.rows(np.arange(len(part))) for part in parts]
    assert sorted(np.concatenate(rows)[:, 0]) == (ids[:, 0] + 1).tolist()
    for part, of_part in zip(parts, rows, strict=True):
        np.testing.assert_array_equal(part.labels, (of_part[:, 0] - 1) // 2)
        assert part.tokens is ids


def test_a_split_is_its_seeds_and_can_be_split_again():
    dataset = data.Dataset(np.arange(60).reshape(30, 2), data.Ids(60), 2)
    first, second = (dataset.split(0.3, 5)[1] for _ in range(2))
    np.testing.assert_array_equal(first.selection, second.selection)
    assert not np.array_equal(first.selection, dataset.split(0.3, 6)[1].selection)
    train, validation = first.split(0.5, 0)
    assert sorted([*train.selection, *validation.selection]) == first.selection.tolist()


def test_no_window_of_a_stream_crosses_its_split():
    train, validation = data.Dataset(np.arange(50), data.Ids(50), 4).split(0.2, 0)
    assert train.rows(np.arange(len(train))).max() == 40
    assert validation.rows(np.arange(len(validation))).min() == 41
    assert len(train) + len(validation) == 50 - 2 * 3


# --- Bad input: files and options, and what is said about them

IDS = np.arange(12).reshape(4, 3)
GARBLED_PNG = b"\x89PNG\r\n\x1a\n" + bytes(50)

BAD_DATA = {
    # Paths.
    "No such file or directory: ": lambda folder: (folder / "nowhere.txt", {}),
    "No such file": lambda folder: ([write(folder / "a.txt", "abc"), folder / "b.txt"], {}),
    "source: received int, expected a path or paths": lambda folder: (3, {}),
    "source: received bytes, expected a path": lambda folder: (b"a.txt", {}),
    "source: received NoneType": lambda folder: ([folder, None], {}),
    "source: received no paths": lambda folder: ([], {}),
    "source: received 2 paths, expected one; only text": lambda folder: (
        [saved(folder / "a.npy", IDS)] * 2,
        {},
    ),
    "a.txt: is no regular file, expected a file": lambda folder: (fifo(folder / "a.txt"), {}),
    "a.npy: is no regular file": lambda folder: (fifo(folder / "a.npy"), {}),
    "zero: is no regular file": lambda folder: (Path("/dev/zero"), {}),
    "is a folder, expected a file": lambda folder: (folder, {"kind": "bytes"}),
    # Options.
    "kind: received 'words', expected one of bytes, characters": lambda folder: (
        write(folder / "a.txt", PANGRAM),
        {"kind": "words"},
    ),
    "levels: received for bytes, expected for pixels": lambda folder: (
        write(folder / "a.txt", PANGRAM),
        {"levels": 4},
    ),
    "num_ids: received for digits, expected for ids": lambda folder: ("digits", {"num_ids": 18}),
    "tokenizer: received for characters": lambda folder: (
        write(folder / "a.txt", PANGRAM),
        {"kind": "characters", "tokenizer": "t.json"},
    ),
    "tokenizer: received None, expected a file": lambda folder: (
        write(folder / "a.txt", PANGRAM),
        {"kind": "tokenizer"},
    ),
    "num_ids: received 0, expected an integer in [1, ": lambda folder: (
        saved(folder / "a.npy", IDS),
        {"num_ids": 0},
    ),
    "num_ids: received 1000000000000": lambda folder: (
        saved(folder / "a.npy", IDS),
        {"num_ids": 10**12},
    ),
    "codec: received with num_ids, expected alone": lambda folder: (
        saved(folder / "a.npy", IDS),
        {"codec": data.Ids(12), "num_ids": 12},
    ),
    "codec: received with kind": lambda folder: ("digits", {"codec": data.Ids(1), "kind": "ids"}),
    "codec: received dict, expected a Codec": lambda folder: ("digits", {"codec": {"kind": "ids"}}),
    "codec: received Ids(count=17), expected Pixels(": lambda folder: (
        "digits",
        {"codec": data.Ids(17)},
    ),
    "length: received 0, expected an integer >= 1": lambda folder: (
        write(folder / "a.txt", PANGRAM),
        {"length": 0},
    ),
    "a.npy: tokens: shape [4, 3], expected [n, 2]": lambda folder: (
        saved(folder / "a.npy", IDS),
        {"length": 2},
    ),
    # Text.
    "a.txt: tokens: a stream of 0, expected at least 2, length + 1": lambda folder: (
        write(folder / "a.txt", ""),
        {},
    ),
    "a.txt: tokens: a stream of 1, expected": lambda folder: (write(folder / "a.txt", "a"), {}),
    "a.txt: tokens: a stream of 4, expected at least 5": lambda folder: (
        write(folder / "a.txt", "abcd"),
        {"length": 4},
    ),
    'alphabet: received "", expected characters': lambda folder: (
        write(folder / "a.txt", ""),
        {"kind": "characters"},
    ),
    "b.txt: byte 0xff at offset 3 is no UTF-8 (invalid start byte)": lambda folder: (
        [write(folder / "a.txt", "abc"), write(folder / "b.txt", b"abc\xff")],
        {"kind": "characters"},
    ),
    "a.txt: byte 0xc3 at offset 1 is no UTF-8 (unexpected end of data)": lambda folder: (
        write(folder / "a.txt", b"a\xc3"),
        {"kind": "characters"},
    ),
    "a.txt: byte 0xff at offset 0 is no UTF-8": lambda folder: (
        write(folder / "a.txt", PANGRAM.encode("utf-16")),
        {"kind": "characters"},
    ),
    "a.txt: byte 0 at offset 3, expected text": lambda folder: (
        write(folder / "a.txt", PANGRAM.encode("utf-16")),
        {},
    ),
    "model.pt: byte 0 at offset": lambda folder: (write(folder / "model.pt", b"PK\3\4\0"), {}),
    "a.txt: character 'ö' (U+00F6) at 2 is not in the alphabet of 3": lambda folder: (
        write(folder / "a.txt", "Zwöl"),
        {"codec": data.Characters("Zlw")},
    ),
    't.json: file: received "{}", expected the JSON of the tokenizers package': lambda folder: (
        write(folder / "a.txt", PANGRAM),
        {"tokenizer": write(folder / "t.json", "{}")},
    ),
    "t.json: byte 0x80 at offset 0 is no UTF-8": lambda folder: (
        write(folder / "a.txt", PANGRAM),
        {"tokenizer": write(folder / "t.json", b"\x80")},
    ),
    # Arrays.
    "a.npy: dtype float64, expected integers": lambda folder: (
        saved(folder / "a.npy", IDS / 2),
        {},
    ),
    "a.npy: dtype bool, expected integers": lambda folder: (
        saved(folder / "a.npy", IDS > 2),
        {},
    ),
    "a.npy: dtype <U1, expected integers": lambda folder: (
        saved(folder / "a.npy", np.array(["a", "b"])),
        {},
    ),
    "a.npy: holds pickled Python objects": lambda folder: (
        saved(folder / "a.npy", np.array([print, 1], object)),
        {},
    ),
    "a.npy: shape [], expected [n, length], or one stream [total]": lambda folder: (
        saved(folder / "a.npy", np.array(3)),
        {},
    ),
    "a.npy: shape [2, 2, 3], expected [n, length]": lambda folder: (
        saved(folder / "a.npy", IDS.reshape(2, 2, 3)),
        {},
    ),
    "a.npy: shape [0], expected no axis to be empty": lambda folder: (
        saved(folder / "a.npy", IDS[0, :0]),
        {},
    ),
    "a.npy: shape [4, 0], expected no axis": lambda folder: (
        saved(folder / "a.npy", IDS[:, :0]),
        {},
    ),
    "a.npy: shape [1], expected at least two ids": lambda folder: (
        saved(folder / "a.npy", IDS[0, :1]),
        {},
    ),
    "a.npy: id -1 at [2, 1] is not in [0, ": lambda folder: (
        saved(folder / "a.npy", np.where(IDS == 7, -1, IDS)),
        {},
    ),
    "a.npy: id -2 at [1, 2] is not in": lambda folder: (
        saved(folder / "a.npy", np.asfortranarray(np.where(IDS == 5, -2, IDS))),
        {},
    ),
    "a.npy: id 9223372036854775807 at [0, 1] is not in": lambda folder: (
        saved(folder / "a.npy", np.where(IDS == 1, 2**63 - 1, IDS)),
        {},
    ),
    "a.npy: truncated: shape [4, 3] of int64 takes 96 bytes, received 95": lambda folder: (
        write(folder / "a.npy", npy(IDS)[:-1]),
        {},
    ),
    "a.npy: truncated: shape [1000000000000]": lambda folder: (
        write(folder / "a.npy", npy(shape=(10**12,))),
        {},
    ),
    "a.npy: shape [-2, -3], expected no axis": lambda folder: (
        write(folder / "a.npy", npy(shape=(-2, -3)) + bytes(48)),
        {},
    ),
    "a.npy: cannot be read as .npy (": lambda folder: (write(folder / "a.npy", PANGRAM), {}),
    "a.npy: cannot be read as .npy (EOF": lambda folder: (write(folder / "a.npy", ""), {}),
    "a.npy: cannot be read as .npy (format version (3, 0))": lambda folder: (
        write(folder / "a.npy", b"\x93NUMPY\3\0" + npy(IDS)[8:]),
        {},
    ),
    "a.npy: cannot be read as .npy (Cannot parse header": lambda folder: (
        write(folder / "a.npy", npy(IDS).replace(b"{", b"(")),
        {},
    ),
    "a.npz: cannot be read as .npz (File is not a zip file)": lambda folder: (
        write(folder / "a.npz", npy(IDS)),
        {},
    ),
    "a.npz: holds a, b; expected one array, or one called tokens": lambda folder: (
        archived(folder / "a.npz", a=npy(IDS), b=npy(IDS)),
        {},
    ),
    "a.npz: holds nothing; expected": lambda folder: (archived(folder / "a.npz"), {}),
    "a.npz: holds labels; expected": lambda folder: (
        archived(folder / "a.npz", labels=npy(IDS[0])),
        {},
    ),
    "a.npz: a.npy: dtype float64, expected integers": lambda folder: (
        archived(folder / "a.npz", a=npy(IDS / 2)),
        {},
    ),
    "a.npz: a.npy: holds pickled": lambda folder: (
        archived(folder / "a.npz", a=npy(np.array([print, 1], object))),
        {},
    ),
    "a.npz: a.npy: truncated: shape [1000000000000]": lambda folder: (
        archived(folder / "a.npz", a=npy(shape=(10**12,))),
        {},
    ),
    "a.npz: claims to inflate to 2,147,483,648 bytes, expected at most 1,073": lambda folder: (
        archived(folder / "a.npz", claimed=2**31, a=npy(IDS)),
        {},
    ),
    "a.npz: a.npy: cannot be inflated (": lambda folder: (
        write(
            folder / "a.npz",
            archived(folder / "a.npz", a=npy(IDS)).read_bytes().replace(b"a.npy", b"b.npy", 1),
        ),
        {},
    ),
    "a.npz: labels: shape [4, 3], expected [n]": lambda folder: (
        archived(folder / "a.npz", tokens=npy(IDS), labels=npy(IDS)),
        {},
    ),
    "a.npz: labels: class -1 at [2] is not in [0, ": lambda folder: (
        archived(folder / "a.npz", tokens=npy(IDS), labels=npy([0, 0, -1, 2])),
        {},
    ),
    "a.npz: labels: shape [3], expected [4]": lambda folder: (
        archived(folder / "a.npz", tokens=npy(IDS), labels=npy([0, 0, 2])),
        {},
    ),
    "a.npz: labels: received for a stream": lambda folder: (
        archived(folder / "a.npz", tokens=npy(IDS[0]), labels=npy(IDS[0])),
        {},
    ),
    "a.bin: 3 bytes, expected uint16": lambda folder: (write(folder / "a.bin", b"abc"), {}),
    "a.bin: 0 bytes, expected uint16": lambda folder: (write(folder / "a.bin", b""), {}),
    # Labels.
    "l.txt: 3 lines, expected 4, one for each sequence": lambda folder: (
        saved(folder / "a.npy", IDS),
        {"labels": write(folder / "l.txt", "1\n2\n3\n")},
    ),
    "l.txt: line 2 is empty": lambda folder: (
        saved(folder / "a.npy", IDS),
        {"labels": write(folder / "l.txt", "1\n\n3\n4")},
    ),
    "l.txt: class 99999999999, expected at most": lambda folder: (
        saved(folder / "a.npy", IDS),
        {"labels": write(folder / "l.txt", "1\n99999999999\n3\n4")},
    ),
    "labels: received for a.txt, a stream": lambda folder: (
        write(folder / "a.txt", PANGRAM),
        {"labels": write(folder / "l.txt", "1")},
    ),
    # Images.
    "holds no PNG or JPEG images": lambda folder: (write(folder / "x" / "a.gif", "GIF").parent, {}),
    "a.png: is no folder, expected a folder of PNG": lambda folder: (
        picture(folder / "a.png", [[0]]),
        {"kind": "pixels"},
    ),
    "1.png: 3 x 2 pixels, expected 2 x 3, as all": lambda folder: (
        png(folder, (3, 2), (2, 3), (9, 9)),
        {},
    ),
    "0.png: 2 x 2 pixels, expected 3 x 2, as all": lambda folder: (
        png(folder, (2, 2)),
        {"codec": data.Pixels(2, 3, 1, 4)},
    ),
    "a.png: is no PNG or JPEG image": lambda folder: (
        write(folder / "images" / "a.png", PANGRAM).parent,
        {},
    ),
    "a.png: cannot be read as an image (": lambda folder: (
        write(
            folder / "images" / "a.png", png(folder, (9, 9)).joinpath("0.png").read_bytes()[:45]
        ).parent,
        {},
    ),
    "b.jpg: is no PNG or JPEG image": lambda folder: (
        write(folder / "images" / "b.jpg", b"GIF89a" + bytes(20)).parent,
        {},
    ),
    "a.png: has transparent pixels": lambda folder: (
        picture(folder / "images" / "a.png", np.full((2, 2, 4), 254)).parent,
        {},
    ),
    "a.png: mode I;16, expected 8 bits a channel": lambda folder: (
        picture(folder / "images" / "a.png", [[0]], "I;16").parent,
        {},
    ),
    "0.png: lies in no sub-folder, expected one, as others do": lambda folder: (
        picture(png(folder, (2, 2)) / "cat" / "a.png", np.zeros((2, 2))).parents[1],
        {},
    ),
    "b.png: has transparent pixels": lambda folder: (
        picture(folder / "images" / "b.png", [[0, 9]], "P", transparency=0).parent,
        {},
    ),
    "c.png: is no PNG or JPEG image": lambda folder: (
        picture(folder / "images" / "c.gif", [[0]]).rename(folder / "images" / "c.png").parent,
        {},
    ),
    "d.png: cannot be read as an image (Image size (100000000 pixels) exceeds": lambda folder: (
        claiming(png(folder, (1, 1)) / "0.png", 10_000, folder / "x" / "d.png").parent,
        {},
    ),
    "levels: received 1, expected an integer in [2, 256]": lambda folder: (
        png(folder, (2, 2)),
        {"levels": 1},
    ),
}


def contents(folder):
    return {
        path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
    }


def test_the_special_tokens_of_a_tokenizer_are_shown(tmp_path):
    pytest.importorskip("tokenizers")
    token = {"id": 4, "content": "[END]", "special": True}
    rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    path = word_tokenizer(tmp_path / "t.json", added_tokens=[{**token, **rules}])
    codec = data.load(write(tmp_path / "a.txt", "cat[END]the"), tokenizer=path, length=1).codec
    assert codec.num_ids == 5
    assert codec.encode("cat[END]the").tolist() == [3, 5, 2]
    assert codec.decode([3, 5, 2]) == "cat [END] the"


@pytest.mark.parametrize("message", BAD_DATA)
def test_bad_data(message, tmp_path, monkeypatch):
    if "t.json: file" in message:
        pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    source, options = BAD_DATA[message](tmp_path)
    if isinstance(source, Path) and source.is_dir():
        pytest.importorskip("PIL.Image")
    before = contents(tmp_path)
    with pytest.raises((OSError, TypeError, ValueError)) as caught:
        data.load(source, **options)
    said = str(caught.value).replace(f"{tmp_path}/", "")
    assert message in said
    assert "\n" not in said
    assert contents(tmp_path) == before


def test_the_table_of_bad_data_is_long_enough():
    assert len(BAD_DATA) >= 40


STREAM = data.Dataset(np.arange(9), data.Ids(9), 3)
SEQUENCES = data.Dataset(IDS, data.Ids(12), 3)

BAD_CALLS = {
    # Codecs.
    "codec: received list, expected a dict": lambda: data.codec_from_dict([]),
    "codec: kind: received None, expected one of bytes, characters": lambda: data.codec_from_dict(
        {}
    ),
    "codec: kind: received ['ids'], expected one of": lambda: data.codec_from_dict(
        {"kind": ["ids"]}
    ),
    "codec: bytes has the fields size, expected none": lambda: data.codec_from_dict(
        {"kind": "bytes", "size": 3}
    ),
    "codec: ids has the fields none, expected count": lambda: data.codec_from_dict({"kind": "ids"}),
    "codec: num_ids: received '9', expected an integer": lambda: data.codec_from_dict(
        {"kind": "ids", "count": "9"}
    ),
    'codec: alphabet: received "ba", expected characters in order': lambda: data.codec_from_dict(
        {"kind": "characters", "alphabet": "ba"}
    ),
    'alphabet: received "aab", expected': lambda: data.Characters("aab"),
    "alphabet: received list, expected a string": lambda: data.Characters(["a"]),
    "alphabet: half a surrogate pair at 1": lambda: data.Characters("a\ud800"),
    "content: received int, expected str or bytes": lambda: data.Bytes().encode(3),
    "content: half a surrogate pair at 0": lambda: data.Characters("a").encode("\ud800"),
    "character 'b' (U+0062) at 1 is not in the alphabet of 2": lambda: data.Characters("ac").encode(
        "ab"
    ),
    "channels: received 2, expected 1 (grey) or 3": lambda: data.Pixels(1, 1, 2, 4),
    "channels: received 4": lambda: data.Pixels(1, 1, 4, 4),
    "height: received 0": lambda: data.Pixels(0, 1, 1, 4),
    "levels: received 257, expected an integer in [2, 256]": lambda: data.Pixels(1, 1, 1, 257),
    "images: dtype float64, expected uint8": lambda: data.Pixels(1, 1, 1, 4).encode(
        np.ones((1, 1))
    ),
    "images: shape [3, 2], expected [..., 2, 3]": lambda: data.Pixels(2, 3, 1, 4).encode(
        np.zeros((3, 2), np.uint8)
    ),
    "tokens: id 257 at [1] is not in [0, 257)": lambda: data.Bytes().decode([1, 257]),
    "tokens: id -1 at [0] is not in [0, 3)": lambda: data.Characters("ab").decode([-1]),
    "tokens: shape [], expected [..., length]": lambda: data.Bytes().decode(3),
    "tokens: dtype float64, expected integers": lambda: data.Ids(3).decode([1.0]),
    "tokens: shape [1, 5], expected [..., 6]": lambda: data.Pixels(2, 3, 1, 4).decode([[1] * 5]),
    "ids: id 3 at [1] is not in [0, 3)": lambda: data.Ids(3).encode([0, 3]),
    # Datasets.
    "tokens: dtype float64, expected integers ": lambda: data.Dataset(
        np.ones((2, 2)), data.Bytes(), 2
    ),
    "tokens: shape [0, 3], expected [n, 3] with n >= 1": lambda: data.Dataset(
        IDS[:0], data.Bytes(), 3
    ),
    "tokens: shape [1, 4, 3], expected": lambda: data.Dataset(IDS[np.newaxis], data.Bytes(), 3),
    "tokens: received a masked array, expected one without a mask": lambda: data.Dataset(
        np.ma.masked_equal(IDS, 3), data.Ids(12), 3
    ),
    "ids: received a masked array": lambda: data.Ids(3).encode(np.ma.masked_equal([0, -1], -1)),
    "labels: shape [3], expected [4]": lambda: data.Dataset(IDS, data.Bytes(), 3, np.arange(3)),
    "index: 7, expected integers in [0, 6]": lambda: STREAM.rows([0, 7]),
    "index: -1, expected integers in [0, 3]": lambda: SEQUENCES.rows([-1]),
    "index: dtype float64 and shape [1], expected integers [k]": lambda: STREAM.rows([0.0]),
    "index: dtype int64 and shape [], expected integers [k]": lambda: STREAM.rows(0),
    "rng: received int, expected a numpy.random.Generator": lambda: STREAM.draw(0, 1),
    "count: received 0": lambda: STREAM.draw(np.random.default_rng(0), 0),
    "fraction: received 1, expected a number in (0, 1)": lambda: STREAM.split(1, 0),
    "seed: received -1": lambda: STREAM.split(0.5, -1),
    "fraction: 0.1 of 4 sequences leaves 4 and 0, expected at least 1 in each": lambda: (
        SEQUENCES.split(0.1, 0)
    ),
    "fraction: 0.3 of 9 tokens leaves 6 and 3, expected at least 4 in each": lambda: STREAM.split(
        0.3, 0
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_call(message):
    with pytest.raises((TypeError, ValueError)) as caught:
        BAD_CALLS[message]()
    assert message.strip() in str(caught.value)


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("tokenizers", 'tokenizer files need the tokens extra: pip install ".[tokens]"'),
        ("PIL.Image", 'images need the images extra: pip install ".[images]"'),
    ],
)
def test_a_missing_extra_is_asked_for_by_name(package, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    text = write(tmp_path / "a.txt", PANGRAM)
    tokenizer = word_tokenizer(tmp_path / "t.json") if package == "tokenizers" else None
    with pytest.raises(ImportError) as caught:
        data.load(text if tokenizer else tmp_path, tokenizer=tokenizer)
    assert message in str(caught.value)
