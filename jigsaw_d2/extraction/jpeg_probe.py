"""The commonest kind of JPEG, recognised from its first bytes without a library."""

import contextlib
import os

# Frame headers of 8-bit Huffman coding, and segments that say nothing of interest here. Others are
# left to Pillow, above all EXIF and XMP, which may turn the image.
FRAME_MARKERS = (0xC0, 0xC1, 0xC2)
DHT, SOS, DQT, DRI, COM = 0xC4, 0xDA, 0xDB, 0xDD, 0xFE
APP0, APP1, APP2, APP13 = 0xE0, 0xE1, 0xE2, 0xED
# Bytes that Pillow must find in those that may be skipped, their length field included.
SHORTEST = {DHT: 2, DRI: 2, COM: 2, APP0: 9, APP1: 2, APP2: 16, APP13: 2}
TURNING_STARTS = (b"Exif", b"http:")
PROFILE_START = b"ICC_PROFILE\0"  # of a colour profile, which Detectron2's reader ignores
RESOURCE_START = b"8BIM"  # of one of Photoshop's image resources
HEAD_BYTES = (1 << 12, 1 << 16)  # the second where the first do not reach to the scan
# Larger images are left to Pillow, too, which refuses decompression bombs.
COMMON_PIXELS = 50_000_000

Common = tuple[tuple[int, int], str]


def probe_common_jpeg(path: str) -> Common | None:
    """What Pillow finds, in a third of its time.

    Returns:
        ((height, width), "RGB" or "L") of a whole JPEG that is upright and has nothing unusual
        about it; None for anything else.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(-2, os.SEEK_END)
            if file.read(2) != b"\xff\xd9":
                return None
            for size in HEAD_BYTES:
                head = os.pread(file.fileno(), size, 0)
                with contextlib.suppress(IndexError):
                    return _parse_head(head) if head[:2] == b"\xff\xd8" else None
    except OSError:
        pass
    return None


def _parse_head(head: bytes) -> Common | None:
    """As ``probe_common_jpeg``, of the first bytes of a whole file.

    Raises:
        IndexError: they end before the scan begins.
    """
    position, found = 2, None
    while head[position] == 0xFF:
        marker, length = head[position + 1], (head[position + 2] << 8) | head[position + 3]
        body, position = position + 4, position + 2 + length
        if marker in FRAME_MARKERS and length in (11, 17) and found is None:
            bits, top, low, left, right, components = head[body : body + 6]
            height, width = (top << 8) | low, (left << 8) | right
            usual = bits == 8 and length == 8 + 3 * components
            if not usual or not 0 < height * width < COMMON_PIXELS:
                return None
            found = (height, width), "L" if components == 1 else "RGB"
        elif marker == DQT:
            # 8-bit tables: a byte of precision and number, and 64 values.
            if length % 65 != 2 or any(number > 15 for number in head[body:position:65]):
                return None
        elif marker in SHORTEST:
            if length < SHORTEST[marker] or not _is_harmless(marker, head[body:position]):
                return None
        elif marker == SOS:
            # As long as its number of components says, and there: Pillow reads all of it.
            scan = head[body:position]
            return found if scan and len(scan) == length - 2 == 4 + 2 * scan[0] else None
        else:
            return None
    return None


def _is_harmless(marker: int, content: bytes) -> bool:
    """Whether Pillow would find nothing in an application segment that changes the image."""
    if marker == APP1:
        return not content.startswith(TURNING_STARTS)
    if marker == APP2:
        return content.startswith(PROFILE_START)
    # Pillow refuses the image if the last resource ends behind its number.
    return marker != APP13 or content[-6:-2] != RESOURCE_START
