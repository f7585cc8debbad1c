"""Measure the memory and the time that a folder of generated JPEGs takes.

python scripts/folder_memory.py                        100,000 images of 640x480
python scripts/folder_memory.py --images 2000          fewer images
python scripts/folder_memory.py --keep photos          keep the images for the next call

It writes the images, loads them as a dataset in a new process, first from the files and then from
the cache, and prints the largest amount of memory that the process and its workers held together.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

LOAD = """
import json, sys, time
from era_s10 import MyDataSet
from era_s10.provenance import describe_dataset
start = time.perf_counter()
dataset = MyDataSet(sys.argv[1], size=int(sys.argv[2]))
loaded = time.perf_counter() - start
next(iter(dataset.train_loader))
print(json.dumps({"dataset": str(dataset), "seconds": round(loaded, 1)}))
"""


def write_jpegs(folder: Path, images: int, size: tuple[int, int]) -> None:
    """Write JPEGs of smooth noise in ten classes; a fifth of them is for testing."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (64, 36, 48, 3), dtype=np.uint8)
    pictures = [
        Image.fromarray(n).resize(size, Image.Resampling.BICUBIC) for n in noise
    ]
    for i in range(images):
        place = folder / ("test" if i % 5 == 0 else "train") / str(i // 5 % 10)
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"{i:06}.jpg"
        if path.exists():
            continue
        shifted = ImageChops.offset(pictures[i % 64], 7 * i, i // 90)
        shifted.save(path, quality=75)


def memory_of(pid: int) -> tuple[int, int]:
    """Return the memory of a process and its children in bytes: PSS, and largest RSS."""
    pids, waiting = [], [pid]
    while waiting:
        pids.append(waiting.pop())
        try:
            tasks = Path(f"/proc/{pids[-1]}/task").iterdir()
            children = [(task / "children").read_text() for task in tasks]
        except OSError:
            continue
        waiting += [int(child) for line in children for child in line.split()]
    shares, largest = 0, 0
    for one in pids:
        try:
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        fields = {line.split(":")[0]: line.split()[1] for line in rollup[1:]}
        shares += int(fields["Pss"]) * 1024
        largest = max(largest, int(fields["Rss"]) * 1024)
    return shares, largest


def measure(folder: Path, size: int, cache: Path) -> dict:
    """Load the dataset in a new process; return time and memory."""
    variables = {**os.environ, "ERA_S10_CACHE": str(cache), "TQDM_DISABLE": "1"}
    program = subprocess.Popen(
        [sys.executable, "-c", LOAD, str(folder), str(size)],
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
    )
    peak, rss = 0, 0
    while program.poll() is None:
        shares, largest = memory_of(program.pid)
        peak, rss = max(peak, shares), max(rss, largest)
        time.sleep(0.05)
    found = json.loads(program.stdout.read().splitlines()[-1])
    return {**found, "peak_mb": peak // 10**6, "largest_rss_mb": rss // 10**6}


def main() -> None:
    """Write the images, measure both starts, and print one line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--keep", help="folder for the images; removed if not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or Path(temporary) / "photos")
        start = time.perf_counter()
        write_jpegs(folder, options.images, (640, 480))
        print(f"written in {time.perf_counter() - start:.0f} s", flush=True)
        for what in ("from the files", "from the cache"):
            found = measure(folder, options.size, Path(temporary) / "cache")
            print(json.dumps({"start": what, **found}), flush=True)


if __name__ == "__main__":
    main()
