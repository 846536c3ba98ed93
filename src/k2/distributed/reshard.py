"""Reading a checkpoint into whatever layout asks: every piece takes its rows from the objects that have them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod

import torch

from k2.distributed.index import Index, Part
from k2.distributed.objects import Objects
from k2.distributed.pieces import Piece, values

Target = tuple[Piece, str, Part]


def read(objects: Objects, index: Index, pieces: Iterable[Piece], connections: int) -> None:
    """Overwrite pieces with what a checkpoint has for them; each object is fetched once and verified.

    Raises:
        StageError: the checkpoint lacks rows, or stored bytes are missing or corrupt. Pieces may be half written.
    """
    wanted: dict[str, list[Target]] = defaultdict(list)
    for piece in pieces:
        for dtype, part in index.parts(piece.key, piece.shape, piece.start, piece.stop):
            wanted[part.digest].append((piece, dtype, part))
    with ThreadPoolExecutor(connections) as pool:
        list(pool.map(lambda digest: _fill(objects.get(digest), wanted[digest]), sorted(wanted)))


def _fill(data: bytes, targets: Sequence[Target]) -> None:
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    for piece, name, part in targets:
        dtype, columns = getattr(torch, name), piece.shape[1:]
        low, high = max(piece.start, part.start), min(piece.stop, part.stop)
        offset = part.offset + (low - part.start) * prod(columns) * dtype.itemsize
        piece.rows(low, high).tensor.copy_(values(buffer, offset, dtype, (high - low, *columns)))
