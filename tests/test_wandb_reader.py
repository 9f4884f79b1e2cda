import json
import struct
import zlib

import numpy as np
import pytest
import wandb
from PIL import Image

from wandb_reader import FILE_HEADER, read_records, read_run


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wandb_run")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(variable, str(directory / variable.lower()))
        run = wandb.init(
            mode="offline",
            dir=str(directory),
            project="test",
            config={"lr": 1e-3, "nested": {"list": [1, 2]}},
            settings=wandb.Settings(silent=True),
        )
        for step in range(5):
            run.log({"loss": 1 / (step + 1), "grades/frozen_fraction": step / 4})
        run.config.update({"late": "value"})
        pixels = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
        table = wandb.Table(columns=["matrix", "step"], data=[["a", 3], ["b", None]])
        run.log({"image": wandb.Image(pixels, caption="caption"), "events": table})
        run.log({"large": "x" * 100_000})
        run.log({"after": 1})
        run.summary["grades"] = {"stop_reason": "all matrices frozen", "steps": 5}
        report = directory / "report.html"
        report.write_text("report")
        artifact = wandb.Artifact("grades-report", type="report")
        artifact.add_file(str(report))
        run.log_artifact(artifact)
        run.finish()
        wandb.teardown()
    (run_directory,) = directory.rglob("offline-run-*")
    return run_directory


def test_config_and_summary(run_directory):
    run = read_run(run_directory)
    assert run["config"] == {"lr": 1e-3, "nested": {"list": [1, 2]}, "late": "value"}
    assert run["summary"]["loss"] == 0.2
    assert run["summary"]["grades"] == {"stop_reason": "all matrices frozen", "steps": 5}


def test_history(run_directory):
    history = read_run(run_directory)["history"]
    assert [row["_step"] for row in history] == list(range(8))
    assert [row["loss"] for row in history[:5]] == [1 / (step + 1) for step in range(5)]
    assert [row["grades/frozen_fraction"] for row in history[:5]] == [0, 0.25, 0.5, 0.75, 1]


def test_a_record_over_several_blocks(run_directory):
    (file,) = run_directory.glob("*.wandb")
    history = read_run(file)["history"]
    assert history[6]["large"] == "x" * 100_000
    assert history[7]["after"] == 1


def test_image_and_table(run_directory):
    run = read_run(run_directory)
    image, table = run["history"][5]["image"], run["history"][5]["events"]
    assert image["_type"] == "image-file" and image["caption"] == "caption"
    assert (image["width"], image["height"]) == (6, 8)
    assert image["path"] in run["files"] and table["path"] in run["files"]
    assert run["summary"]["image"]["path"] == image["path"]
    pixels = np.asarray(Image.open(run_directory / "files" / image["path"]).convert("RGB"))
    assert np.array_equal(pixels, np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3))
    assert table["_type"] == "table-file" and (table["ncols"], table["nrows"]) == (2, 2)
    content = json.loads((run_directory / "files" / table["path"]).read_text())
    assert content["columns"] == ["matrix", "step"] and content["data"] == [["a", 3], ["b", None]]


def test_artifacts(run_directory):
    artifacts = read_run(run_directory)["artifacts"]
    assert artifacts["grades-report"] == {"type": "report", "files": ["report.html"]}
    assert [name for name, artifact in artifacts.items() if artifact["type"] == "run_table"]


def chunk(kind, payload):
    return struct.pack("<IHB", zlib.crc32(bytes([kind]) + payload), len(payload), kind) + payload


def test_framing_by_hand():
    first = chunk(1, b"a" * 10)
    # Leaves 5 bytes of the first block, too few for a chunk header: they are padding.
    filler = b"b" * (32768 - len(FILE_HEADER) - len(first) - 7 - 5)
    data = FILE_HEADER + first + chunk(1, filler) + bytes(5) + chunk(2, b"c" * (32768 - 7)) + chunk(4, b"d")
    assert list(read_records(data)) == [b"a" * 10, filler, b"c" * (32768 - 7) + b"d"]


def test_an_incomplete_run_is_reported(run_directory, tmp_path):
    (file,) = run_directory.glob("*.wandb")
    data = file.read_bytes()
    cut = tmp_path / "run-cut.wandb"
    cut.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="cut off"):
        read_run(tmp_path)
    # Cut between two records: the framing is whole, the run is not.
    *_, last = read_records(data)
    cut.write_bytes(data[: -7 - len(last)])
    with pytest.raises(ValueError, match="exit record"):
        read_run(tmp_path)


def test_damage_is_reported():
    data = FILE_HEADER + chunk(1, b"abc") + chunk(2, b"def")
    with pytest.raises(ValueError, match="middle of a record"):
        list(read_records(data))
    with pytest.raises(ValueError, match="cut off in the chunk"):
        list(read_records(data[:-1]))
    with pytest.raises(ValueError, match="checksum"):
        list(read_records(FILE_HEADER + chunk(1, b"abc").replace(b"abc", b"abd")))
    with pytest.raises(ValueError, match="out of order"):
        list(read_records(FILE_HEADER + chunk(3, b"abc")))
    with pytest.raises(ValueError, match="not a wandb run file"):
        list(read_records(b"something else"))
