"""CIFAR-10 in its three forms, made here, and the real JPEG set."""

import io
import pathlib
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from dynjax.config import DataConfig, UserError
from dynjax.data import cifar10, make_source, unpickle
from dynjax.data.source import size_of, target_of
from dynjax.data.unpickle import read_data

REAL = pathlib.Path(__file__).parents[1] / ".." / "shared" / "data" / "cifar10_jpeg"
COUNT = 10  # pictures in a batch file


def batch(number):
    """Pictures (N, 32, 32, 3) and labels of a batch file."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (COUNT, 32, 32, 3), np.uint8), rng.integers(0, 10, COUNT)


def rows(images):
    """As the official files have them: red, green, blue planes."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def python2(images, labels):
    """The opcodes that Python 2 and its NumPy write for {"data": array, "labels": list}: all text is bytes."""

    def text(value):
        return b"U" + bytes([len(value)]) + value  # SHORT_BINSTRING

    def whole(value):
        return b"J" + struct.pack("<i", value)  # BININT

    content = np.ascontiguousarray(images).tobytes()
    array = b"".join(
        [
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR",
            b"(K\x01(" + whole(len(images)) + whole(images.shape[1]) + b"t",
            b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNN",
            whole(-1) * 2 + b"K\x00tb",
            b"\x89T" + struct.pack("<i", len(content)) + content + b"tb",  # C order, BINSTRING, BUILD
        ]
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def python3(protocol):
    return lambda images, labels: pickle.dumps({"data": images, "labels": labels.tolist()}, protocol)


def binary(images, labels):
    return np.concatenate([labels[:, None].astype(np.uint8), images], axis=1).tobytes()


def write(folder, form=python2, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate((cifar10.TEST, *cifar10.TRAIN)):
        images, labels = batch(number)
        (folder / f"{name}{suffix}").write_bytes(form(rows(images), labels))
    return folder


def write_npz(file, quality=75, **changes):
    """Pictures that share all bytes of their JPEGs up to the scan, as all of one size and quality do."""
    arrays = {"class_names": np.array(cifar10.CLASSES)}
    for split, numbers in (("train", range(1, 6)), ("test", (0,))):
        scans, labels = [], []
        for number in numbers:
            for image, label in zip(*batch(number), strict=True):
                stream = io.BytesIO()
                Image.fromarray(image).save(stream, "JPEG", quality=quality)
                content = stream.getvalue()
                start = content.index(b"\xff\xda")
                start += 2 + int.from_bytes(content[start + 2 : start + 4], "big")
                arrays["header"] = np.frombuffer(content[:start], np.uint8)
                scans.append(content[start:])
                labels.append(label)
        arrays[f"{split}_scans"] = np.frombuffer(b"".join(scans), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, scans)]).astype(np.int32)
        arrays[f"{split}_labels"] = np.array(labels, np.uint8)
    arrays |= {key: change(arrays[key]) for key, change in changes.items()}
    np.savez(file, **arrays)
    return file


def read(path, split="train", **options):
    return make_source(DataConfig(name="cifar10", path=str(path), **options), split)


FORMS = {
    "python 2": (python2, "", ""),
    "protocol 2": (python3(2), "", "cifar-10-batches-py"),
    "protocol 5": (python3(5), "", ""),
    "binary": (binary, ".bin", ""),
    "binary inside": (binary, ".bin", "cifar-10-batches-bin"),
}


@pytest.mark.parametrize("form", FORMS)
def test_raw_forms_give_the_same_pictures(tmp_path, form):
    make, suffix, inner = FORMS[form]
    write(tmp_path / inner, make, suffix)
    images, labels = (np.concatenate(a) for a in zip(*[batch(n) for n in range(1, 6)], strict=True))
    for split, first, count in (("train", 0, 45), ("val", 45, 5)):
        source = read(tmp_path, split)
        assert source.describe() == f"cifar10 {split}: {count} pictures 32x32, 10 classes"
        for index in range(count):
            np.testing.assert_array_equal(source[index]["image"], images[first + index])
            assert source[index]["label"] == labels[first + index]
    test = read(tmp_path, "test")
    assert len(test) == COUNT and target_of(test.spec) == "label" and not test.handed and test.classes[3] == "cat"
    np.testing.assert_array_equal(test[7]["image"], batch(0)[0][7])
    few = read(tmp_path, examples=9, size=(16, 16))
    assert len(few) == 9 and size_of(few) == (16, 16)


@pytest.mark.parametrize("quality", [75, 90])
def test_jpegs_say_so(tmp_path, quality):
    file = write_npz(tmp_path / "some.npz", quality)
    for path in (file, tmp_path):
        source = read(path, "test")
        assert source.describe() == f"cifar10 (JPEG quality {quality}) test: 10 pictures 32x32, 10 classes"
    stream = io.BytesIO()
    Image.fromarray(batch(0)[0][0]).save(stream, "JPEG", quality=quality)
    first = np.asarray(Image.open(stream))
    test = read(file, "test")
    place = [(test[index]["image"] == first).all() for index in range(COUNT)].index(True)
    assert place != 0 and test[place]["label"] == batch(0)[1][0]


def test_jpegs_hold_out_the_last_of_each_class(tmp_path):
    """Files may be sorted by class: of 25 pictures each of two, the last three are val, mixed."""
    file = write_npz(tmp_path / "some.npz", train_labels=lambda a: np.repeat([3, 5], 25))
    train, val = read(file), read(file, "val")

    def images(source):
        return {source[index]["image"].tobytes(): int(source[index]["label"]) for index in range(len(source))}

    assert (len(train), len(val)) == (44, 6) and not images(train).keys() & images(val).keys()
    assert np.bincount(val.memory[1]).tolist() == [0, 0, 0, 3, 0, 3]
    assert images(val) == images(read(file, "val"))
    assert (np.diff(train.memory[1]) != 0).sum() > 5  # not sorted any more
    stream = io.BytesIO()
    Image.fromarray(batch(5)[0][-1]).save(stream, "JPEG", quality=75)
    assert images(val)[np.asarray(Image.open(stream)).tobytes()] == 5


class Malicious:
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("touched"),))


@pytest.mark.parametrize(
    "content, text",
    [
        (b"no pickle", "data_batch_3 cannot be read: at position 0, opcode b'n' unknown"),
        (b"", "data_batch_3 cannot be read: pickle exhausted before seeing STOP"),
        (python2(*map(np.asarray, (rows(batch(3)[0]), batch(3)[1])))[:-4000], "data_batch_3 cannot be read"),
        (pickle.dumps({"data": Malicious()}), r"\._?.* does not belong in CIFAR-10 and was not run"),
        (pickle.dumps({"data": np.random.default_rng}), "does not belong in CIFAR-10 and was not run"),
        (pickle.dumps([1, 2]), "a list, it should be a dict with data and labels"),
        (pickle.dumps({"labels": [1]}), r"data should be an array of bytes \(N, 3072\)"),
        (pickle.dumps({"data": np.zeros((2, 3072)), "labels": [1, 2]}), "data should be an array of bytes"),
        (python3(4)(np.zeros((2, 3072), np.uint8), np.arange(3)), "2 images and 3 labels"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [300]}), "labels should be a list of numbers"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["x"]}), "labels should be a list of numbers"),
        (python3(4)(np.zeros((2, 3072), np.uint8), np.array([3, 10])), "train example 21: label 10, allowed are 0"),
    ],
)
def test_broken_pickles_are_one_line_and_run_nothing(tmp_path, monkeypatch, content, text):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(content)
    with pytest.raises(UserError, match=text) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "touched").exists()
    assert len(read(tmp_path, "test")) == COUNT


def test_other_codecs_are_not_called():
    content = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."
    with pytest.raises(ValueError, match="bytes that are not stored as latin1"):
        read_data(content)


def test_broken_binary_files_and_missing_ones(tmp_path):
    write(tmp_path, binary, ".bin")
    file = tmp_path / "data_batch_2.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"data_batch_2\.bin: 30729 bytes are no whole number of pictures of 3073"):
        read(tmp_path)
    file.write_bytes(b"\x0a" + content[1:])
    with pytest.raises(UserError, match="train example 10: label 10, allowed are 0 to 9"):
        read(tmp_path)
    assert len(read(tmp_path, on_error="skip")) == 44
    file.unlink()
    with pytest.raises(UserError, match=r"data_batch_2\.bin cannot be read: No such file"):
        read(tmp_path)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"train_labels": lambda a: a[:-1]}, "50 train images and 49 labels"),
        ({"train_labels": lambda a: np.where(np.arange(50) < 5, 11, a)}, "4 bad files: .*label 11, allowed are 0 to 9"),
        ({"train_scans": lambda a: a[:-5]}, r"train_offsets do not cut the \d+ bytes of train_scans into pictures"),
        ({"train_offsets": lambda a: a[::-1]}, "train_offsets do not cut"),
        ({"train_offsets": lambda a: a.astype(float)}, "train_offsets is float64 .* whole numbers"),
        ({"header": lambda a: a[None]}, r"header is uint8 \(1, \d+\)"),
        ({"header": lambda a: a.astype(np.uint16)}, "header and scans should be bytes, they are uint16"),
        ({"header": lambda a: a[5:]}, r"bad files: .*train example \d+: not a picture"),
    ],
)
def test_broken_archives(tmp_path, changes, text):
    file = write_npz(tmp_path / "some.npz", **changes)
    with pytest.raises(UserError, match=text) as caught:
        read(file)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_archive_of_this_kind(tmp_path):
    with pytest.raises(UserError, match=r"give --data\.path"):
        read("")
    with pytest.raises(UserError, match=r"no folder and no \.npz file .*nowhere; cifar10 is data_batch_1 to 5"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"not found in .*: data_batch_1 to 5 and test_batch"):
        read(tmp_path)
    file = tmp_path / "some.npz"
    file.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match=r"some\.npz cannot be read: BadZipFile"):
        read(file)
    np.savez(file, header=np.zeros(3, np.uint8))
    with pytest.raises(UserError, match="no array train_scans, train_offsets, train_labels, class_names; it"):
        read(tmp_path)
    np.savez(file, **{key: np.array([None]) for key in ("header", "train_scans", "class_names")})
    with pytest.raises(UserError, match=r"some\.npz cannot be read: ValueError: .*allow_pickle"):
        read(tmp_path)
    write_npz(tmp_path / "other.npz")
    with pytest.raises(UserError, match=r"2 \.npz files \(other\.npz, \.\.\.\): name one of them"):
        read(tmp_path)
    assert len(read(tmp_path / "other.npz", "test")) == COUNT


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real CIFAR-10 is not in {REAL}")
def test_the_real_set():
    source = read(REAL, "val")
    assert source.describe() == "cifar10 (JPEG quality 75) val: 5000 pictures 32x32, 10 classes"
    counts = np.bincount(source.memory[1])
    assert counts.tolist() == [500] * 10
    ship, frog = (source.memory[0][source.memory[1] == source.classes.index(name)] for name in ("ship", "frog"))
    assert ship[..., 2].mean() > ship[..., 0].mean() and frog[..., 2].mean() < frog[..., 0].mean()  # blue water


def overlaid():
    """A pickle that gives the type of its bytes, once made, fields of another type: NumPy then takes them for those."""
    content = python2(rows(batch(3)[0]), batch(3)[1])
    plain = b"(K\x03U\x01|NNN"
    fields = b"(K\x03U\x01|N(U\x01ot}U\x01o(cnumpy\ndtype\n(U\x02O8K\x00K\x01tRK\x00ts"
    assert plain in content
    return content.replace(plain, fields, 1)


HOSTILE = {
    "fields laid over bytes": (overlaid(), "data should be an array of bytes"),
    "an index of 2 GB": (b"\x80\x02Nr\x00\x00\x00\x80.", "a NoneType, it should be a dict"),
    "a length of 2 GB": (b"\x80\x02T\xff\xff\xff\x7fab.", "expected 2147483647 bytes in a string4, but only 3 remain"),
    "a length of 8 EB": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fab.", "but only 3 remain"),
    "a state for a type": (b"\x80\x02cnumpy\ndtype\n}b.", "a state for what has none"),
    "a call of an array": (b"\x80\x02cnumpy\nndarray\n(K\x05tR.", "a call of something that is no function"),
    "another opcode": (b"\x80\x02K\x012.", "the opcode DUP does not belong in CIFAR-10 and was not run"),
    "no mark": (b"\x80\x02NNt.", "not a whole pickle"),
    "no memo": (b"\x80\x02h\x05.", "not a whole pickle"),
    "two lines": (b"\x80\x04\x8c\x03a\nb\x8c\x03c\nd\x93.", r"a\.b\.c\.d does not belong in CIFAR-10"),
    "a shape past the bytes": (
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [1]}, 4).replace(b"M\x00\x0c", b"M\xff\x0b"),
        "an array of 3072 bytes whose shape says otherwise",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_one_line(tmp_path, name):
    content, text = HOSTILE[name]
    file = tmp_path / "test_batch"
    file.write_bytes(content)
    with pytest.raises(UserError, match=text) as caught:
        cifar10.read_pickle(file)
    assert "\n" not in str(caught.value)


def test_pickles_take_no_more_than_they_have(tmp_path, monkeypatch):
    text = "a" * 1000
    encoded = b"\x80\x02(c_codecs\nencode\nq\x00X" + struct.pack("<I", 1000) + text.encode() + b"q\x01"
    again = b"h\x00h\x01X\x06\x00\x00\x00latin1\x86R"
    with pytest.raises(ValueError, match="more bytes than the file has"):
        read_data(encoded + 100 * again + b"t.")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="more than 50 opcodes"):
        patch.setattr(unpickle, "MOST_OPCODES", 50)
        read_data(b"\x80\x02(" + 60 * b"N" + b"t.")
    monkeypatch.setattr(cifar10, "MOST_BYTES", 2_000_000)
    write(tmp_path)
    with (tmp_path / "data_batch_2").open("ab") as stream:
        stream.truncate(3_000_000)
    with pytest.raises(UserError, match=r"data_batch_2: 3 MB; a batch of CIFAR-10 has 31, no more than 2 are read"):
        read(tmp_path)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_written_again_by_python_3(protocol):
    images = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)
    kept = {b"data": images, b"labels": [3, 255], b"batch_label": b"batch 1 of 5", b"filenames": [b"a.png", "b\n.png"]}
    found = read_data(pickle.dumps(kept, protocol))
    np.testing.assert_array_equal(found[b"data"], images)
    assert {key: value for key, value in found.items() if key != b"data"} == {k: kept[k] for k in kept if k != b"data"}
    columns = read_data(pickle.dumps({"data": np.asfortranarray(images)}, protocol))["data"]
    np.testing.assert_array_equal(columns, images)


def test_archives_are_measured_before_they_are_unpacked(tmp_path, monkeypatch):
    file = write_npz(tmp_path / "some.npz")
    monkeypatch.setattr(cifar10, "MOST_UNPACKED", 20_000)
    with pytest.raises(UserError, match=r"some\.npz cannot be read: .*unpacked it has 0 MB, no more than 0 are read"):
        read(file)


@pytest.mark.parametrize("names", [np.array(3), np.array(["a", "b"])[None], np.arange(10)])
def test_names_of_classes_that_are_none(tmp_path, names):
    file = write_npz(tmp_path / "some.npz", class_names=lambda a: names)
    with pytest.raises(UserError, match=r"class_names is .* it should be a row of text"):
        read(file)
