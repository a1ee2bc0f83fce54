"""Rate of extraction against a bare loop that decodes each image once and encodes the same crops.

Both use the same number of processes on the same images, taken in turns; medians are printed.

    python dev/bench_extraction.py --json A.json --images DIR [--workers 2] [--repeats 5]
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np

from jigsaw_d2.data.extraction import ExtractionOptions, extract_samples
from jigsaw_d2.data.sources import CocoSource
from jigsaw_d2.data.store import SampleStore


def repeat_set(source: CocoSource, folder: Path, times: int) -> CocoSource:
    """``times`` copies of a set, the images as links: spreads what starting up costs."""
    content = json.loads(source.json_file.read_bytes())
    images, annotations = content["images"], content["annotations"]
    content["images"], content["annotations"] = [], []
    step = 1 + max(entry["id"] for entry in images)
    (folder / "links").mkdir()
    for n in range(times):
        for entry in images:
            name = f"{n}_{Path(entry['file_name']).name}"
            (folder / "links" / name).symlink_to(
                (source.image_root / entry["file_name"]).absolute()
            )
            number = entry["id"] + n * step
            content["images"].append({**entry, "id": number, "file_name": name})
        for entry in annotations:
            number = entry["image_id"] + n * step
            entry = {**entry, "image_id": number, "id": len(content["annotations"])}
            content["annotations"].append(entry)
    (folder / "repeated.json").write_text(json.dumps(content))
    return CocoSource(folder / "repeated.json", folder / "links")


def bare_chunk(work: list[tuple[str, list]]) -> int:
    """Decode and encode, nothing else; returns the bytes made."""
    made = 0
    for path, boxes in work:
        with open(path, "rb") as file:
            image = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_COLOR)
        for x0, y0, x1, y1 in boxes:
            crop = image[y0:y1, x0:x1]
            made += len(cv2.imencode(".jpg", crop, [cv2.IMWRITE_JPEG_QUALITY, 95])[1])
    return made


def bare_loop(work: list, workers: int) -> float:
    """Seconds of the bare loop over all images, processes started included."""
    started = time.perf_counter()
    chunks = [work[n : n + 16] for n in range(0, len(work), 16)]
    with get_context("fork").Pool(workers) as pool:
        sum(pool.imap(bare_chunk, chunks))
    return time.perf_counter() - started


def crops_of(store: SampleStore, source: CocoSource) -> list[tuple[str, list]]:
    """[(image path, [XYXY ints])] of all that the store holds."""
    content = json.loads(source.json_file.read_bytes())
    files = {e["id"]: str(source.image_root / e["file_name"]) for e in content["images"]}
    crops: dict[int, list] = {}
    for image_id, box in zip(store.image_ids.tolist(), store.boxes.astype(int).tolist()):
        crops.setdefault(image_id, []).append(box)
    return [(files[image_id], boxes) for image_id, boxes in crops.items()]


def main() -> None:
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--times", type=int, default=4, help="copies of the set")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = repeat_set(CocoSource(args.json, args.images), folder, args.times)
        output, options = folder / "store", ExtractionOptions(workers=args.workers, encoding="jpeg")
        extract_samples(source, output, options)  # warms the page cache
        work = crops_of(SampleStore(output), source)
        ours, bare = [], []
        for _ in range(args.repeats):
            bare.append(bare_loop(work, args.workers))
            shutil.rmtree(output)
            ours.append(extract_samples(source, output, options)["seconds"])
        count, samples = len(work), sum(len(boxes) for _, boxes in work)
    ratio = statistics.median(b / o for b, o in zip(bare, ours))
    print(f"{count} images, {samples} samples, {args.workers} processes, {args.repeats} turns")
    print(f"bare decode + encode  {count / statistics.median(bare):8.1f} images/s")
    print(f"extraction            {count / statistics.median(ours):8.1f} images/s")
    print(f"ratio                 {ratio:8.2f}  (goal: 0.75)")


if __name__ == "__main__":
    main()
