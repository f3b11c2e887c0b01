"""Who may write to a data set, and text that no encoding can hold."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from retrofit_fixtures import SHAPE

from t3.claims import claim_path
from t3.errors import T3Error
from t3.retrofit.shards import ShardWriter, open_shards, read_shards

ROOT = Path(__file__).resolve().parent.parent
OTHER = """
import sys
import torch
from t3.retrofit.shards import ShardWriter
writer = ShardWriter(sys.argv[1])
facts = {"caption": "", "frames": 5, "height": 48, "width": 64, "fps": 16}
writer.add(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2), source="other", **facts)
writer.flush()
print("open", flush=True)
sys.stdin.read()
"""


def test_a_full_disk_is_told_and_what_was_written_counts(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = ShardWriter(tmp_path / "set")
    add(writer, "0")
    writer.flush()
    add(writer, "1", 1.0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
        with pytest.raises(T3Error, match="clips-00001.safetensors could not be written .*run the same command again"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [clip.facts.source for clip in open_shards(tmp_path / "set").clips] == ["0"]
    assert not list((tmp_path / "set").glob(".*"))


def add(writer, source, value=0.0, caption="a dot"):
    writer.add(
        torch.full(SHAPE, value),
        torch.zeros(3, 8),
        caption=caption,
        source=source,
        frames=5,
        height=48,
        width=64,
        fps=16,
    )


def test_two_writers_of_one_folder_are_refused(tmp_path):
    first = ShardWriter(tmp_path / "set")
    add(first, "a", 1.0)
    with pytest.raises(T3Error, match=r"set is open for writing by process \d+ on .* would mix up their clips"):
        ShardWriter(tmp_path / "set")
    first.flush()
    with pytest.raises(T3Error, match="open for writing"):
        ShardWriter(tmp_path / "set", facts={"fps": 24})
    ShardWriter(tmp_path / "another").close()
    first.close()
    with ShardWriter(tmp_path / "set") as second:
        assert second.done == {"a"}
        add(second, "b", 2.0)
    found = [(clip.facts.source, float(clip.latents.flatten()[0])) for clip in read_shards(tmp_path / "set")]
    assert found == [("a", 1.0), ("b", 2.0)]
    assert not [file.name for file in (tmp_path / "set").iterdir() if file.name.startswith(".")]


def test_a_folder_is_free_when_the_process_that_wrote_it_is_gone(tmp_path, capsys):
    arguments = [sys.executable, "-c", OTHER, str(tmp_path / "set")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        try:
            assert other.stdout.readline() == "open\n"
            with pytest.raises(T3Error, match=f"open for writing by process {other.pid} on"):
                ShardWriter(tmp_path / "set")
        finally:
            other.kill()
    assert claim_path(tmp_path / "set" / "index.json").exists()
    with ShardWriter(tmp_path / "set") as writer:
        assert writer.done == {"other"}
    assert f"was claimed by process {other.pid} on" in capsys.readouterr().err


def test_a_process_that_ends_without_closing_leaves_no_lock(tmp_path):
    subprocess.run([sys.executable, "-c", OTHER, str(tmp_path / "set")], input="", text=True, check=True, cwd=ROOT)
    assert not claim_path(tmp_path / "set" / "index.json").exists()
    assert [clip.facts.source for clip in open_shards(tmp_path / "set").clips] == ["other"]


def test_a_writer_that_is_forgotten_or_fails_to_open_leaves_no_lock(tmp_path):
    writer = ShardWriter(tmp_path / "set", facts={"fps": 16})
    writer.flush()
    del writer
    gc.collect()
    for _ in range(2):
        with pytest.raises(T3Error, match="was encoded otherwise"):
            ShardWriter(tmp_path / "set", facts={"fps": 24})
    (tmp_path / "set" / "index.json").write_text("{")
    for _ in range(2):
        with pytest.raises(T3Error, match="is damaged"):
            ShardWriter(tmp_path / "set")


def test_a_closed_writer_takes_no_more(tmp_path):
    writer = ShardWriter(tmp_path / "set")
    add(writer, "a")
    writer.close()
    writer.close()
    for attempt in (
        lambda: add(writer, "b"),
        lambda: writer.skip("b", "damaged"),
        lambda: writer.empty_text(torch.ones(1, 8)),
        lambda: writer.grey(torch.zeros(SHAPE)),
        writer.flush,
    ):
        with pytest.raises(T3Error, match="is closed. Open another"):
            attempt()
    assert [clip.facts.source for clip in open_shards(tmp_path / "set").clips] == ["a"]


def test_a_writer_whose_folder_was_taken_over_writes_nothing(tmp_path):
    """As after a machine slept, and another found that nobody had touched the claim for long."""
    writer = ShardWriter(tmp_path / "set")
    add(writer, "a")
    path = claim_path(tmp_path / "set" / "index.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "host": "elsewhere", "token": "0"}))
    with pytest.raises(T3Error, match="was taken over by process .* on elsewhere"):
        add(writer, "b")
    with pytest.raises(T3Error, match="was taken over"):
        writer.close()
    assert [file.name for file in (tmp_path / "set").iterdir()] == [path.name]


def test_halves_of_characters_lose_no_clips(tmp_path):
    with ShardWriter(tmp_path / "set") as writer:
        add(writer, "caf\udce9.mp4", caption="a cat \ud83d, ein Würfel")
        writer.skip("b\udce9.mp4", "it cannot be opened (b\udce9.mp4)")
    with ShardWriter(tmp_path / "set") as writer:
        assert writer.done == {"caf\udce9.mp4", "b\udce9.mp4"}
    assert [clip.facts.caption for clip in read_shards(tmp_path / "set")] == ["a cat \ud83d, ein Würfel"]
    assert "a cat \\ud83d, ein Würfel" in (tmp_path / "set" / "index.json").read_text(encoding="utf-8")
