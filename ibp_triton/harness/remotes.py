"""Where the public image sets can be fetched from, with the SHA-256 of every file."""

from __future__ import annotations

from dataclasses import dataclass

from ibp_triton.harness.files import Remote


@dataclass(frozen=True)
class PublicSet:
    """Where a public set's files lie, and what each is downloaded as: the file, or an archive that has it."""

    folder: str
    files: dict[str, Remote]


_MNIST = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
_FASHION = (
    "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
_CIFAR = (
    "https://www.cs.toronto.edu/~kriz/",
    "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
)

IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR_NAMES = (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin")
CIFAR_ARCHIVE = Remote(
    _CIFAR, "cifar-10-binary.tar.gz", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
)


def _idx(folder: str, mirrors: tuple[str, ...], digests: tuple[str, ...]) -> PublicSet:
    pairs = zip(IDX_NAMES, digests, strict=True)
    return PublicSet(folder, {name: Remote(mirrors, f"{name}.gz", sha) for name, sha in pairs})


PUBLIC = {  # by data.source; the files in the order in which they are read
    "mnist": _idx(
        "mnist",
        _MNIST,
        (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "fashion_mnist": _idx(
        "fashion_mnist",
        _FASHION,
        (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    "cifar10": PublicSet("cifar-10-batches-bin", dict.fromkeys(CIFAR_NAMES, CIFAR_ARCHIVE)),
}
