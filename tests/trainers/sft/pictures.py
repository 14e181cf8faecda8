"""Real pictures without Pillow: a PNG of one color."""

import struct
import zlib


def png(color=(255, 0, 0), size=(2, 2)):
    """The bytes of a PNG, `size` = (width, height)."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    rows = (b"\0" + bytes(color) * size[0]) * size[1]
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
