"""Memory and time that data take which are more than memory: loaded, checked, and evaluated once, for growing numbers.

    python benchmarks/data_memory.py [--counts 2000,10000,50000] [--forms folder,npz,compressed,batches]

The evaluation split has so many images of 224x224, a thousand calibration and a thousand selection images stand beside
it. They come from a folder of JPEG files (a hundred different ones under many names), from an `.npz` of uint8 arrays,
compressed or not, or from batches that can be read only once. The network is one of numpy, which reads each image and
does little else. Each row is a process of its own; its memory is the most that was resident (VmHWM).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

OTHERS = 1000  # images of calibration and of selection
FILES, SIZE, CLASSES, BATCH = 100, 224, 10, 100
FORMS = ("folder", "npz", "compressed", "batches")


def picture(number: int) -> np.ndarray:
    """Blurred colours and a little noise, uint8 (224, 224, 3)."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype="uint8"))
    smooth = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return (smooth // 2 + random.integers(0, 8, smooth.shape)).astype("uint8")


def pictures(start: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of images and labels; those of one split are not those of another."""
    known = np.stack([picture(start + i) for i in range(min(count, FILES))])
    for first in range(0, count, BATCH):
        numbers = np.arange(first, min(first + BATCH, count))
        yield known[numbers % FILES], numbers % CLASSES


def write_folder(root: Path, count: int) -> None:
    """A folder of JPEG files of which each has many names."""
    for split, (start, own) in splits(count).items():
        for i in range(own):
            folder = root / split / str(i % CLASSES)
            folder.mkdir(parents=True, exist_ok=True)
            if i < FILES:
                Image.fromarray(picture(start + i)).save(folder / f"{i}.jpg", quality=90)
            else:
                os.link(root / split / str(i % FILES % CLASSES) / f"{i % FILES}.jpg", folder / f"{i}.jpg")


def write_npz(path: Path, count: int, *, compressed: bool) -> None:
    """The arrays of all splits, none of them ever in memory."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind, compresslevel=1) as archive:
        for split, (start, own) in splits(count).items():
            header = {"descr": "|u1", "fortran_order": False, "shape": (own, SIZE, SIZE, 3)}
            with archive.open(f"{split}_x.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for x, _ in pictures(start, own):
                    member.write(x.tobytes())
            with archive.open(f"{split}_y.npy", "w") as member:
                np.lib.format.write_array(member, np.arange(own) % CLASSES)


def splits(count: int) -> dict[str, tuple[int, int]]:
    """The number of the first picture of each split, and how many there are."""
    return {"calibration": (0, OTHERS), "selection": (FILES, OTHERS), "evaluation": (2 * FILES, count)}


def measured(form: str, folder: Path, count: int) -> None:
    """Load, check and evaluate in this process, and print the seconds of both and the peak of memory in MB."""
    from tvm_lowrank.data.metric import evaluate, load_metric
    from tvm_lowrank.data.splits import load_data, overlaps

    source = folder / ("images" if form == "folder" else "data.npz")
    data = {split: pictures(*own) for split, own in splits(count).items()} if form == "batches" else source
    start = time.monotonic()
    loaded = load_data(data, input_shape=(3, SIZE, SIZE), mean=[0.5], std=[0.25], classes=CLASSES, folder=folder)
    assert not overlaps(loaded)
    between = time.monotonic()
    weights = np.random.default_rng(0).normal(size=(3, CLASSES)).astype("float32")
    scores = evaluate(lambda x: x.mean(axis=(2, 3)) @ weights, *loaded.evaluation, load_metric("top1"))
    assert len(scores) == count
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) // 1000 for line in status if line.startswith("VmHWM"))
    print(f"{between - start:.1f} {time.monotonic() - between:.1f} {peak}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="2000,10000,50000")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--folder", type=Path, help="where the images are written; the default is a temporary folder")
    parser.add_argument("--measure", nargs=2, metavar=("FORM", "COUNT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measured(args.measure[0], args.folder, int(args.measure[1]))
        return

    print("| form | evaluation images | as float32, GB | peak, MB | load and check, s | evaluate, s |")
    print("|---|---|---|---|---|---|", flush=True)
    for form in args.forms.split(","):
        for count in map(int, args.counts.split(",")):
            with tempfile.TemporaryDirectory(dir=args.folder) as name:
                folder = Path(name)
                if form == "folder":
                    write_folder(folder / "images", count)
                elif form != "batches":
                    write_npz(folder / "data.npz", count, compressed=form == "compressed")
                command = [sys.executable, __file__, "--folder", name, "--measure", form, str(count)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
            load, judge, peak = done.stdout.split()
            print(f"| {form} | {count} | {count * 12 * SIZE**2 / 1e9:.1f} | {peak} | {load} | {judge} |", flush=True)


if __name__ == "__main__":
    main()
