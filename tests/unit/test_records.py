"""The records in benchmarks/results: what ran, where, and nothing of the machine's own folders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from benchmarks.language_model import text, without_folders
from benchmarks.record import kept_runs, origins, parser, write_record

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
RECORDS = sorted(RESULTS.glob("*/record.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_record_says_what_ran_and_where(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert re.fullmatch("[0-9a-f]{7,40}", record["commit"])
    assert record["environment"]["cpu"] and record["environment"]["torch"] and record["results"]
    assert record["arguments"]["name"] == path.parent.name
    assert (path.parent / "summary.md").read_text(encoding="utf-8").startswith(f"# {path.parent.name}\n")


def test_published_configs_name_no_folder_of_a_text() -> None:
    found = [*RESULTS.glob("*/*.yaml"), *RESULTS.glob("*/report.html")]
    assert found
    for path in found:
        paths = re.findall(r"^ *paths:\n((?: *- .*\n)+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not any("/" in lines for lines in paths), path


def test_a_language_models_config_keeps_the_names_of_its_texts_alone(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    sources = {name: text(tmp_path / "a folder of mine" / f"{name}.txt.xz", "\0") for name in ("source", "validation")}
    run = {"data": sources | {"seq_len": 512}, "optimizer": {"args": {"eps": 1e-8}}, "clip_norm": 1.0}
    config.write_text(yaml.safe_dump(run), encoding="utf-8")
    without_folders(config)
    for name, source in sources.items():
        source["init_args"]["paths"] = [f"{name}.txt.xz"]
    assert yaml.safe_load(config.read_text(encoding="utf-8")) == run


def test_a_record_goes_on_where_only_free_flags_differ_and_says_where_each_run_was_made(tmp_path: Path) -> None:
    flags = parser(None, "some")
    flags.add_argument("--size", default="1m")
    flags.add_argument("--jobs", type=int, default=1)
    common = ["--out", str(tmp_path), "--commit", "1234567890"]
    given = flags.parse_args(common)
    assert kept_runs(given, ()) == {}
    write_record(given, {"old": {"loss": 1.0}, "known": {"loss": 2.0, "commit": "abc"}}, "text")

    found = kept_runs(flags.parse_args([*common, "--jobs", "2"]), ("jobs",))
    assert found["known"] == {"loss": 2.0, "commit": "abc"}
    assert found["old"]["commit"] == "1234567890" and found["old"]["hardware"]
    assert origins(found) == f"Runs: 1 at 1234567 on {found['old']['hardware']}; 1 at abc."
    assert origins({"one": {"commit": None}}) == "Runs: 1 at unknown."
    with pytest.raises(ValueError, match=r"other \['size', 'jobs'\]"):
        kept_runs(flags.parse_args([*common, "--jobs", "2", "--size", "2m"]), ())
