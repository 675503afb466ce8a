from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pooch
import pytest
import torch
from PIL import Image

from ibp_triton.errors import DataError
from ibp_triton.harness import data, files, remotes, sources
from ibp_triton.harness.config import Data
from ibp_triton.harness.files import Remote


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """Forty training and eight test images in the official layout, half of the files gzipped."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 8)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        folder = tmp_path / "mnist"
        folder.mkdir(exist_ok=True)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def refusal(choice: Data) -> str:
    with pytest.raises(DataError) as caught:
        data.load(choice, 0)
    return str(caught.value)


def test_mnist_files_plain_and_gzipped(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBP_TRITON_DATA", str(mnist))
    loaded = data.load(Data(source="mnist", subset=20, validation=15, mean="channel"), 3)
    assert (len(loaded.train.labels), len(loaded.validation.labels), len(loaded.test.labels)) == (20, 15, 8)
    assert loaded.shape == (1, 28, 28)
    assert loaded.mean.shape == (1, 1, 1)
    assert loaded.mean.item() == pytest.approx(loaded.train.images.mean().item(), abs=1e-6)
    assert 0 <= loaded.train.images.min() < loaded.train.images.max() <= 1


@pytest.mark.parametrize(("source", "other"), [("mnist", "fashion_mnist"), ("fashion_mnist", "mnist")])
@pytest.mark.parametrize("part", ["train", "t10k"])
def test_one_set_under_the_names_of_another_is_refused(mnist: Path, source: str, other: str, part: str) -> None:
    """Both are four files of the same names, and a folder is looked into itself where it has no subfolder."""
    folder = mnist / "mnist"
    first = sources._FIRST_LABELS[other][part == "t10k"]
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.array([*map(int, first), 0, 0], np.uint8)))
    (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((12, 28, 28), np.uint8))))
    message = refusal(Data(source=source, dir=str(folder)))
    assert f"{part}-labels-idx1-ubyte: holds the labels of {other}" in message
    assert f"name the folder of {source} by data.dir" in message
    assert data.load(Data(source=other, dir=str(folder)), 0).classes == 10


def test_subset_and_validation_are_disjoint_and_follow_the_seed(mnist: Path) -> None:
    choice = Data(source="mnist", dir=str(mnist), subset=25, validation=15)
    first, again, other = (data.load(choice, seed) for seed in (0, 0, 1))
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.train.labels, other.train.labels)
    every = torch.cat([first.train.images, first.validation.images]).flatten(1)
    assert len(every.unique(dim=0)) == 40
    whole = data.load(choice.model_copy(update={"subset": None}), 0)
    assert len(whole.train.labels) == 25


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda raw: raw[:-5], "the file is truncated or damaged"),
        (lambda raw: gzip.compress(raw)[:-9], "cannot be read (Compressed file ended"),
        (lambda raw: b"\x00\x00\x09" + raw[3:], "expected an IDX file of unsigned bytes with 1 axes"),
        (lambda raw: b"", "got an empty file"),
        (lambda raw: idx(np.zeros(39, np.uint8)), "39 labels for the 40 images"),
        (lambda raw: idx(np.full(40, 10, np.uint8)), "label 10 found, expected 0 to 9"),
    ],
)
def test_damaged_files_are_named(mnist: Path, damage: object, expected: str) -> None:
    path = mnist / "mnist" / "train-labels-idx1-ubyte"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    message = refusal(Data(source="mnist", dir=str(mnist)))
    assert message.startswith(str(path))
    assert expected in message


def test_missing_files_and_too_large_splits_are_named(mnist: Path) -> None:
    assert "do not fit into the 40 training examples" in refusal(Data(source="mnist", dir=str(mnist), subset=41))
    held = refusal(Data(source="mnist", dir=str(mnist), validation=40))
    assert "one example to train on and data.validation 40 do not fit into the 40 training examples" in held
    assert "the test set has 8" in refusal(Data(source="mnist", dir=str(mnist), test=9))
    assert "30 is larger than the images (28×28)" in refusal(Data(source="mnist", dir=str(mnist), crop=30))
    (mnist / "mnist" / "t10k-images-idx3-ubyte.gz").unlink()
    message = refusal(Data(source="mnist", dir=str(mnist)))
    assert message.startswith(f"{mnist}/mnist/t10k-images-idx3-ubyte: no such file, plain or .gz")
    assert "data.dir" in message


def test_crop_takes_the_centre(mnist: Path) -> None:
    whole, cropped = (data.load(Data(source="mnist", dir=str(mnist), crop=crop), 0) for crop in (None, 24))
    assert torch.equal(cropped.test.images, whole.test.images[..., 2:26, 2:26])
    assert cropped.mean.shape == (1, 24, 24)


@pytest.fixture
def two_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two images instead of 10 000."""
    monkeypatch.setattr(sources, "CIFAR_BATCH", 2)


def cifar_record(label: int, value: int) -> bytes:
    return bytes([label]) + bytes([value]) * 3072


def write_cifar(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(remotes.CIFAR_NAMES):
        (folder / name).write_bytes(cifar_record(number, 10 * number) + cifar_record(9, 255))


@pytest.mark.usefixtures("two_a_batch")
def test_cifar_binary_batches(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-bin")
    loaded = data.load(Data(source="cifar10", dir=str(tmp_path), mean="none"), 0)
    assert sorted(loaded.train.labels.tolist()) == [0, 1, 2, 3, 4, 9, 9, 9, 9, 9]
    assert loaded.test.labels.tolist() == [5, 9]
    assert loaded.test.images[0].unique().item() == pytest.approx(50 / 255)
    assert loaded.shape == (3, 32, 32)
    assert not loaded.mean.any()


@pytest.mark.usefixtures("two_a_batch")
def test_cifar_faults(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-bin")
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(cifar_record(1, 1)[:-1])
    assert "expected records of 3073 bytes" in refusal(Data(source="cifar10", dir=str(tmp_path)))
    path.write_bytes(cifar_record(10, 1))
    assert "label 10 found, expected 0 to 9" in refusal(Data(source="cifar10", dir=str(tmp_path)))
    path.write_bytes(cifar_record(1, 1))
    assert "data_batch_3.bin: expected 2 images, got 1" in refusal(Data(source="cifar10", dir=str(tmp_path)))


@pytest.mark.usefixtures("two_a_batch")
def test_the_official_archive_may_lie_in_the_data_folder(tmp_path: Path) -> None:
    choice = Data(source="cifar10", dir=str(tmp_path / "data"), mean="none")
    message = refusal(choice)
    assert "data_batch_1.bin: no such file, plain or .gz" in message
    assert "nor cifar-10-binary.tar.gz" in message
    write_cifar(tmp_path / "cifar-10-batches-bin")
    archive = tmp_path / "data" / "cifar-10-binary.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-30])
    assert refusal(choice).startswith(f"{archive}: cannot be unpacked")
    archive.write_bytes(whole)
    assert data.load(choice, 0).test.labels.tolist() == [5, 9]
    with tarfile.open(archive, "w:gz"):
        pass
    (tmp_path / "data" / "cifar-10-batches-bin" / "test_batch.bin").unlink()
    assert refusal(choice) == f"{archive}: holds no test_batch.bin; delete it and fetch it again"


def test_archive_is_unpacked_by_name_only(tmp_path: Path) -> None:
    write_cifar(tmp_path / "made")
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as tar:
        for name in remotes.CIFAR_NAMES:
            tar.add(tmp_path / "made" / name, f"../outside/{name}")
        tar.addfile(tarfile.TarInfo("../evil.bin"), io.BytesIO())
    files.unpack(tmp_path / "archive.tar.gz", set(remotes.CIFAR_NAMES), tmp_path / "target")
    assert {path.name for path in (tmp_path / "target").iterdir()} == set(remotes.CIFAR_NAMES)
    for name in remotes.CIFAR_NAMES:
        assert (tmp_path / "target" / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
    assert not (tmp_path / "outside").exists()


@pytest.mark.usefixtures("two_a_batch")
def test_a_file_that_changed_since_it_was_unpacked_is_unpacked_again(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-bin")
    root = tmp_path / "data"
    root.mkdir()
    with tarfile.open(root / "cifar-10-binary.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
    choice = Data(source="cifar10", dir=str(root), mean="none")
    whole = data.load(choice, 0)
    path = root / "cifar-10-batches-bin" / "test_batch.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:100] + b"\x07" + raw[101:])
    assert torch.equal(data.load(choice, 0).test.images, whole.test.images)
    assert path.read_bytes() == raw
    path.write_bytes(raw[:100] + b"\x07" + raw[101:])
    (root / "cifar-10-binary.tar.gz").unlink()
    assert "test_batch.bin: not as it was unpacked from cifar-10-binary.tar.gz" in refusal(choice)


def test_a_damaged_download_in_the_cache_is_seen(mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IBP_TRITON_DATA", raising=False)
    monkeypatch.setattr(files, "cache_folder", lambda: mnist)
    asked = []

    def fetch(remote: Remote, target: Path) -> Path:
        asked.append(remote.name)
        return target / remote.name

    monkeypatch.setattr(files, "fetch", fetch)
    data.load(Data(source="mnist"), 0)
    assert asked == ["train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"], "fetch compares the SHA-256"


@pytest.mark.parametrize("bomb", [True, False])
def test_files_that_unpack_to_too_much_are_refused(mnist: Path, monkeypatch: pytest.MonkeyPatch, bomb: bool) -> None:
    monkeypatch.setattr(files, "LARGE", 1 << 20)
    path = mnist / "mnist" / "train-labels-idx1-ubyte"
    content = bytes(3 << 20)
    path.write_bytes(gzip.compress(content) if bomb else content)
    assert "train-labels-idx1-ubyte: holds more than 1 MB" in refusal(Data(source="mnist", dir=str(mnist)))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file").write_bytes(b"content")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/"
        http.shutdown()


def test_download_takes_the_first_mirror_that_answers_and_checks_the_digest(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pooch.get_logger().disabled = True
    digest = pooch.file_hash(str(tmp_path / "served" / "file"))
    mirrors = (f"{server}nowhere/", server)
    assert files.fetch(Remote(mirrors, "file", digest), tmp_path / "target").read_bytes() == b"content"
    assert "7.00/7.00" in capsys.readouterr().err, "a progress bar"
    refused = (
        r"other/file: not there, and no mirror gave it .*another SHA-256 than 0+\); .* data.dir or IBP_TRITON_DATA"
    )
    with pytest.raises(DataError, match=refused):
        files.fetch(Remote(mirrors, "file", "0" * 64), tmp_path / "other")
    assert not (tmp_path / "other" / "file").exists()


def test_arrays(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).random((12, 8, 8), np.float32), np.arange(12) % 3
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    loaded = data.load(Data(source="arrays", path=str(tmp_path / "a.npz")), 0)
    assert (loaded.shape, loaded.classes) == ((1, 8, 8), 3)
    assert torch.equal(loaded.test.images[:, 0], torch.from_numpy(x[:4]))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"x_train": np.zeros((12, 8))}, "expected x_train [N, C, H, W] or [N, H, W]"),
        ({"y_train": np.zeros(12)}, "integer y_train"),
        ({"y_train": np.arange(12) - 1}, "holds the label -1"),
        ({"x_train": np.full((12, 8, 8), 2.0)}, "must be uint8, or float in [0, 1]"),
        ({"x_test": np.zeros((4, 9, 9))}, "images of different shapes"),
        ({"x_test": np.array([{}, {}])}, "plain arrays"),
        ({"x_train": np.zeros((12, 8, 8, 3))}, "its channels last; write x_train.transpose(0, 3, 1, 2)"),
        ({"y_train": np.arange(12) * 2}, "label 22 is there and 3 is not; number the classes from 0 on"),
        ({"y_train": np.full(12, 2**64 - 1, np.uint64)}, "holds the label 18446744073709551615"),
        ({"y_train": np.full(12, 2**40)}, "holds the label 1099511627776"),
        ({"x_test": np.zeros((0, 8, 8)), "y_test": np.zeros(0, np.int64)}, "none of them empty"),
        ({"x_test": np.zeros((4, 0, 8))}, "none of them empty"),
        ({"x_train": np.full((12, 8, 8), np.nan)}, "must be uint8, or float in [0, 1]; got float64, from nan"),
        ({"x_train": np.zeros((12, 8, 8), np.uint16)}, "must be uint8, or float in [0, 1]; got uint16, from 0 to 0"),
        ({"x_train": np.zeros((12, 8, 8), complex)}, "must be uint8, or float in [0, 1]; got complex128"),
    ],
)
def test_faults_of_arrays(tmp_path: Path, change: dict[str, np.ndarray], expected: str) -> None:
    x, y = np.zeros((12, 8, 8)), np.arange(12) % 3
    arrays = {"x_train": x, "y_train": y, "x_test": x[:4], "y_test": y[:4], **change}
    np.savez(tmp_path / "a.npz", **arrays)
    assert expected in refusal(Data(source="arrays", path=str(tmp_path / "a.npz")))


@pytest.mark.parametrize("kind", [">f4", ">f8", np.float16, np.longdouble])
def test_arrays_of_any_float(tmp_path: Path, kind: object) -> None:
    x, y = np.linspace(0, 1, 12 * 64).reshape(12, 8, 8).astype(kind), (np.arange(12) % 3).astype(">u8")  # type: ignore[call-overload]
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    loaded = data.load(Data(source="arrays", path=str(tmp_path / "a.npz")), 0)
    assert torch.equal(loaded.test.images[:, 0], torch.from_numpy(x.astype(np.float32)))


def test_an_npz_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGE", 1 << 20)
    x, y = np.zeros((4000, 32, 32), np.uint8), np.zeros(4000, np.int64)
    np.savez_compressed(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    monkeypatch.setattr(np, "load", None)
    assert "a.npz: would unpack to 7 MB, far more than it holds" in refusal(
        Data(source="arrays", path=str(tmp_path / "a.npz"))
    )


def test_an_array_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**13, 8, 8)})
    with zipfile.ZipFile(path, "w") as archive:
        for name in sources.NAMES:
            archive.writestr(f"{name}.npy", header.getvalue())
    assert refusal(Data(source="arrays", path=str(path))).startswith(f"{path}: expected an .npz file")


@pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[:-40], lambda raw: raw[:80] + raw[120:]])
def test_damaged_arrays_are_named(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "a.npz"
    x, y = np.random.default_rng(0).random((12, 8, 8)), np.arange(12) % 3
    np.savez_compressed(path, x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert refusal(Data(source="arrays", path=str(path))).startswith(f"{path}: expected an .npz file")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    assert "this is no .npz file; write one with numpy.savez" in refusal(
        Data(source="arrays", path=str(tmp_path / "a.npy"))
    )
    assert "this is no .npz file" in refusal(Data(source="arrays", path=str(tmp_path)))
    assert "a.npy: a file; data.path must name the folder" in refusal(
        Data(source="image_folder", path=str(tmp_path / "a.npy"))
    )


def test_image_folder(tmp_path: Path) -> None:
    for name, value in (("cat", 40), ("dog", 200)):
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.new("RGB", (20, 10), (value, 0, number)).save(tmp_path / name / f"{number}.png")
    choice = Data(source="image_folder", path=str(tmp_path), size=8, holdout=4)
    loaded = data.load(choice, 0)
    assert (loaded.shape, loaded.classes) == ((3, 8, 8), 2)
    assert sorted(loaded.test.labels.tolist()) == [0, 0, 1, 1]
    assert {round(float(v) * 255) for v in loaded.test.images[:, 0, 0, 0]} == {40, 200}
    (tmp_path / "dog" / "broken.jpg").write_bytes(b"no picture")
    assert "broken.jpg: cannot be read as an image" in refusal(choice)
    assert "no such file or folder" in refusal(choice.model_copy(update={"path": str(tmp_path / "none")}))
    assert "needs data.path" in refusal(choice.model_copy(update={"path": None}))
    (tmp_path / "empty").mkdir()
    assert "no PNG or JPEG files" in refusal(choice.model_copy(update={"path": str(tmp_path / "empty")}))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of two pictures, left half white, 8×8."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, :4] = 200
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    return tmp_path


def greys(folder: Path) -> Data:
    return Data(source="image_folder", path=str(folder), size=8, channels=1, holdout=2, mean="none")


def test_hidden_and_empty_folders_are_no_classes(pictures: Path) -> None:
    for name in (".git", "empty", ".ipynb_checkpoints"):
        (pictures / name).mkdir()
    (pictures / ".git" / "a.png").write_bytes(b"no picture")
    (pictures / "empty" / "notes.txt").write_text("nothing", encoding="utf-8")
    (pictures / "cat" / "._0.png").write_bytes(b"no picture")
    (pictures / "cat" / "folder.png").mkdir()
    loaded = data.load(greys(pictures), 0)
    assert (loaded.classes, len(loaded.train.labels)) == (2, 2)


def test_sixteen_bits_a_pixel_are_greys_and_not_white(pictures: Path) -> None:
    for path in pictures.glob("*/*.png"):
        with Image.open(path) as image:
            pixels = np.asarray(image)
        Image.fromarray(pixels.astype(np.uint16) * 257).save(path)
        with Image.open(path) as image:
            assert image.mode.startswith("I")
    for channels in (1, 3):
        images = data.load(greys(pictures).model_copy(update={"channels": channels}), 0).train.images
        assert {round(255 * value) for value in images.unique().tolist()} == {0, 200}


def test_pictures_stand_upright_as_the_camera_says(pictures: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90°
    for path in pictures.glob("*/*.png"):
        with Image.open(path) as image:
            image.copy().save(path, exif=turned)
    upright = data.load(greys(pictures), 0).train.images[0, 0]
    assert upright[:4].min() > 0.7
    assert upright[4:].max() == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-12],
        lambda raw: raw[:40],
        lambda raw: raw[:45] + bytes([raw[45] ^ 255]) + raw[46:],
        lambda raw: raw[:16] + struct.pack(">II", 60_000, 60_000) + raw[24:],
        lambda raw: raw[:16] + struct.pack(">II", 13_000, 13_000) + raw[24:],
        lambda raw: raw[:8] + struct.pack(">I", 2**31) + raw[12:],
        lambda raw: b"",
    ],
)
def test_truncated_and_hostile_pictures_are_named(pictures: Path, damage: object) -> None:
    path = pictures / "dog" / "1.png"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert refusal(greys(pictures)).startswith(f"{path}: cannot be read as an image")


def test_an_empty_test_set_is_refused(mnist: Path) -> None:
    for name, shape in (("images-idx3", (0, 28, 28)), ("labels-idx1", (0,))):
        for path in (mnist / "mnist").glob(f"t10k-{name}-ubyte*"):
            path.write_bytes(idx(np.zeros(shape, np.uint8)))
    assert "mnist: the test set is empty" in refusal(Data(source="mnist", dir=str(mnist)))


def test_mnist5k_is_split_by_class_with_a_fixed_seed() -> None:
    loaded = data.load(Data(source="mnist5k"), 0)
    assert (len(loaded.train.labels), len(loaded.test.labels)) == (4000, 1000)
    assert loaded.test.labels.bincount().tolist() == [100] * 10
    other = data.load(Data(source="mnist5k"), 1)
    assert torch.equal(loaded.test.images, other.test.images)
    assert not torch.equal(loaded.train.labels, other.train.labels)


def test_hold_out_refuses_the_whole_set() -> None:
    every = sources.Examples(torch.zeros(5, 1, 2, 2), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(DataError, match="5 test examples asked for, the set has 5 in all"):
        sources.hold_out(every, 5, 0)
