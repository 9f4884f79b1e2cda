"""Reads the run files that `wandb` 0.31 writes offline, so that tests can check what was logged.

`offline-run-<time>-<id>/run-<id>.wandb` holds one protobuf `Record` after another in LevelDB's log framing: 7 bytes of
file header, then blocks of 32 KiB (the header counts into the first) with chunks of
`crc32 (4 bytes) | length (2) | type (1) | payload`, little-endian. A record that does not fit into what is left of a
block is cut into first, middle and last chunks; less than 7 bytes at the end of a block are zeros. The checksum is the
zip one over the type byte and the payload, not LevelDB's own masked crc32c.

`run.finish()` returns a little before wandb's service has written the end of the file. In the process that logged,
call `wandb.teardown()` before reading; it waits for the service.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768
FILE_HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
CHUNK_HEADER = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(data: bytes) -> Iterator[bytes]:
    """Yields the records of a run file, as serialized protobuf.

    Args:
        data (`bytes`): the whole file.

    Raises:
        `ValueError`: if the file is not one, is damaged, or ends in the middle of a record.
    """
    if data[: len(FILE_HEADER)] != FILE_HEADER:
        raise ValueError(f"not a wandb run file: it starts with {data[:7]!r}, expected {FILE_HEADER!r}")
    position, record, inside = len(FILE_HEADER), b"", False
    while position < len(data):
        left = BLOCK - position % BLOCK
        if left < CHUNK_HEADER.size:
            position += left
            continue
        if position + CHUNK_HEADER.size > len(data):
            raise ValueError(
                f"cut off in a chunk header at byte {position}: was wandb.teardown() called after finish()?"
            )
        checksum, length, kind = CHUNK_HEADER.unpack_from(data, position)
        payload = data[position + CHUNK_HEADER.size : position + CHUNK_HEADER.size + length]
        if len(payload) < length:
            raise ValueError(f"cut off in the chunk at byte {position}: was wandb.teardown() called after finish()?")
        if zlib.crc32(payload, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"the checksum of the chunk at byte {position} does not match: the file is damaged")
        if kind not in (FULL, FIRST, MIDDLE, LAST) or inside != (kind in (MIDDLE, LAST)):
            raise ValueError(f"chunk type {kind} at byte {position} is out of order: the file is damaged")
        record = record + payload if inside else payload
        inside = kind in (FIRST, MIDDLE)
        if not inside:
            yield record
        position += CHUNK_HEADER.size + length
    if inside:
        raise ValueError("cut off in the middle of a record: was wandb.teardown() called after finish()?")


def read_run(path: str | Path) -> dict:
    """Reads one offline run.

    Args:
        path (`str` or `Path`): the `.wandb` file, or the `offline-run-*` directory that holds it.

    Returns:
        `dict`: `"config"` (`dict`) and `"summary"` (`dict`), as they were at the end and without W&B's own `_wandb`
        entry; `"history"` (`list[dict]`), one per step, with `_step`, `_runtime` and `_timestamp`; `"files"`
        (`list[str]`), relative to the run's `files` directory; `"artifacts"` (`dict[str, dict]`), name to
        `{"type": str, "files": list[str]}`. A logged image is a dict with `"_type": "image-file"` and `"path"`, its
        place under `files`, in history and summary alike; a logged Table one with `"_type": "table-file"`, `"path"`,
        `"ncols"` and `"nrows"`, and also an artifact `run-<id>-<key>`.

    Raises:
        `ValueError`: if there is not exactly one run file, it cannot be read, or it is not complete.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.wandb"))
        if len(found) != 1:
            raise ValueError(f"expected one .wandb file in {path}, found {len(found)}")
        path = found[0]

    config, summary, history, files, artifacts, ended = {}, {}, [], [], {}, False
    for data in read_records(path.read_bytes()):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            _apply(config, record.run.config)
            _apply(summary, record.run.summary)
        elif kind == "config":
            _apply(config, record.config)
        elif kind == "summary":
            _apply(summary, record.summary)
        elif kind == "history":
            row = {}
            for item in record.history.item:
                _set(row, item)
            history.append(row)
        elif kind == "files":
            files.extend(file.path for file in record.files.files)
        elif kind == "artifact":
            contents = [entry.path for entry in record.artifact.manifest.contents]
            artifacts[record.artifact.name] = {"type": record.artifact.type, "files": contents}
        ended = ended or kind == "exit"
    if not ended:
        raise ValueError(f"{path} has no exit record: was wandb.teardown() called after finish()?")
    config.pop("_wandb", None)
    summary.pop("_wandb", None)
    return {"config": config, "history": history, "summary": summary, "files": files, "artifacts": artifacts}


def _key(item) -> list[str]:
    return list(item.nested_key) or [item.key]


def _set(target: dict, item) -> None:
    *parents, last = _key(item)
    for parent in parents:
        if not isinstance(target.get(parent), dict):
            target[parent] = {}
        target = target[parent]
    target[last] = json.loads(item.value_json)


def _apply(target: dict, record) -> None:
    for item in record.update:
        _set(target, item)
    for item in record.remove:
        *parents, last = _key(item)
        place = target
        for parent in parents:
            place = place.get(parent, {})
        place.pop(last, None)
