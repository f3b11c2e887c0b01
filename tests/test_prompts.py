"""Prompt files: every form, every error, names for every file system, shares and resuming."""

import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t3.errors import T3Error
from t3.prompts import NAME_BYTES, Prompt, output_path, pending, read_prompts, safe_name, shard

BENCH = Path(__file__).resolve().parents[2] / "shared" / "data" / "4K-VBench-prompts.json"


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        file = tmp_path / "prömpt lists" / name
        file.parent.mkdir(exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        file.write_bytes(data)
        return file

    return write


def test_text(write):
    file = write("a.txt", "# a comment\r\n\r\n  A red kite, high up!  \n\t# another\n猫が\u2028走る\n")
    assert read_prompts(file) == [
        Prompt("A red kite, high up!", "0001-a-red-kite-high-up"),
        Prompt("猫が\u2028走る", "0002-猫が-走る"),
    ]


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl"])
def test_byte_order_mark(write, name):
    content = {"a.txt": "kite", "a.json": '["kite"]', "a.jsonl": '"kite"\n{"text": "kite"}'}[name]
    assert read_prompts(write(name, b"\xef\xbb\xbf" + content.encode()))[0].text == "kite"


def test_json_forms(write):
    first, last = write("first frame.png", b""), write("last.png", b"")
    entries = [
        "a kite",
        {"data_file": "vids/x.y-z.mp4", "prompt_en": "a leopard"},
        {"prompt": "a", "text": "b", "name": "Take 1", "negative_prompt": "blur", "seed": 2**64 - 1, "fps": 24},
        {"text": "b", "negative": "", "seed": 0, "image": "first frame.png", "last_image": "last.png", "name": None},
    ]
    expected = [
        Prompt("a kite", "0001-a-kite"),
        Prompt("a leopard", "x-y-z"),
        Prompt("a", "Take 1", "blur", 2**64 - 1),
    ]
    for file in (
        write("a.json", json.dumps(entries)),
        write("a.jsonl", "\n\n".join(json.dumps(entry) for entry in entries)),
    ):
        assert read_prompts(file) == [*expected, Prompt("b", "0004-b", "", 0, first, last)]


def test_same_names_are_numbered_in_order(write):
    names = ["Kite", "kite", "kite-2", "KITE", "a/b", "a:b"]
    file = write("a.json", json.dumps([{"prompt": "x", "name": name} for name in names]))
    assert [prompt.name for prompt in read_prompts(file)] == ["Kite", "kite-2", "kite-2-2", "KITE-3", "a-b", "a-b-2"]


def test_slug_is_cut_between_words(write):
    file = write("a.txt", "the quick brown fox jumps over the extraordinarily lazy dog\n" + "龍" * 99 + "\n!!!\n")
    names = [prompt.name for prompt in read_prompts(file)]
    assert names == ["0001-the-quick-brown-fox-jumps-over-the", "0002-" + "龍" * 38, "0003"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "no prompt"),
        ("a.txt", "# only\n\n", "no prompt"),
        ("a.json", " ", "no prompt"),
        ("a.json", "[]", "no prompt"),
        ("a.jsonl", "\n", "no prompt"),
        ("a.txt", "kite".encode("utf-16"), "not UTF-8"),
        ("a.json", '["a",\n "b"\n "c"]', "line 3, column 2"),
        ("a.jsonl", '"a"\n\n{"prompt": }', "line 3, column 12"),
        ("a.json", '{"prompt": "a"}', "holds an object.*list"),
        ("a.json", '"a"', "holds a string.*list"),
        ("a.json", "[" * 100_000, "JSON"),
        ("a.json", '["a", 7]', "entry 2 is the number 7"),
        ("a.json", '["a", null]', "entry 2 is null"),
        ("a.json", '["a", "  "]', "entry 2 has no prompt"),
        ("a.json", '["a", {"name": "x"}]', "entry 2 has no prompt"),
        ("a.json", '[{"prompt": ["a"]}]', 'entry 1 has a list under "prompt"'),
        ("a.json", '[{"prompt": "a", "name": 3}]', 'the number 3 under "name"'),
        ("a.json", '[{"prompt": "a", "negative_prompt": false}]', "negative_prompt"),
        ("a.json", '[{"prompt": "a", "seed": "3"}]', "\"seed\" '3'"),
        ("a.json", '[{"prompt": "a", "seed": true}]', "seed"),
        ("a.json", '[{"prompt": "a", "seed": 1.0}]', "seed"),
        ("a.json", '[{"prompt": "a", "seed": -1}]', "seed"),
        ("a.json", f'[{{"prompt": "a", "seed": {2**64}}}]', "seed"),
        ("a.jsonl", '"a"\n{"prompt": "a", "image": "none.png"}', "line 2 .*none.png.* does not exist"),
        ("a.jsonl", '{"prompt": "a", "last_image": "none.png"}', 'line 1 has the "last_image" .* does not exist'),
    ],
)
def test_errors(write, name, content, message):
    with pytest.raises(T3Error, match=message):
        read_prompts(write(name, content))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(T3Error, match=r"none\.txt does not exist"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(T3Error, match="is a folder"):
        read_prompts(tmp_path)


@pytest.mark.skipif(not BENCH.is_file(), reason="the benchmark's prompts are not here")
def test_benchmark_prompts():
    prompts = read_prompts(BENCH)
    entries = json.loads(BENCH.read_text(encoding="utf-8"))
    assert [prompt.name for prompt in prompts] == [Path(entry["data_file"]).stem for entry in entries]
    assert [prompt.text for prompt in prompts] == [entry["prompt_en"].strip() for entry in entries]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Kite 7", "Kite 7"),
        ('a/b\\c:d*e?f"g<h>i|j', "a-b-c-d-e-f-g-h-i-j"),
        ("../../etc/passwd", "etc-passwd"),
        ("-rf", "rf"),
        ("CON", "_CON"),
        ("com1", "_com1"),
        ("nul.txt", "nul-txt"),
        ("console", "console"),
        ("trailing. ", "trailing"),
        ("e\u0301", "é"),
        ("a\u202eb\x00c\ud800", "a-b-c"),
        ("...", "unnamed"),
        ("", "unnamed"),
        ("影" * 100, "影" * 40),
    ],
)
def test_safe_name(text, name):
    assert safe_name(text) == name


TEXT = st.text() | st.text(alphabet="aA-. /:2\\conulp1é\u0301", max_size=12)
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(10))}


def assert_legal(name):
    assert 0 < len(name.encode("utf-8")) <= NAME_BYTES
    assert not re.search(r'[<>:"/\\|?*.\x00-\x1f\x7f]', name)
    assert name == name.strip() and not name.startswith("-")
    assert name.lower() not in DEVICES


@given(TEXT)
def test_any_text_gives_a_legal_name(text):
    name = safe_name(text)
    assert_legal(name)
    assert safe_name(name) == name


def test_names_are_unique_and_do_not_depend_on_what_follows(tmp_path):
    file = tmp_path / "a.json"

    @given(st.lists(TEXT, min_size=1, max_size=12), st.data())
    def check(names, data):
        entries = [{"prompt": "x", "name": name} for name in names]
        file.write_text(json.dumps(entries), encoding="utf-8")
        result = [prompt.name for prompt in read_prompts(file)]
        for name in result:
            assert_legal(name)
        assert len({unicodedata.normalize("NFD", name).casefold() for name in result}) == len(result)
        count = data.draw(st.integers(1, len(names)))
        file.write_text(json.dumps(entries[:count]), encoding="utf-8")
        assert [prompt.name for prompt in read_prompts(file)] == result[:count]

    check()


@given(st.lists(st.integers(), max_size=50), st.integers(1, 9))
def test_shares_partition_the_list(items, count):
    shares = [shard(items, index, count) for index in range(count)]
    assert sorted(item for share in shares for item in share) == sorted(items)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for position, item in enumerate(items):
        assert shares[position % count][position // count] == item


@pytest.mark.parametrize(("index", "count", "message"), [(0, 0, "0 processes"), (2, 2, "Use 1"), (-1, 2, "Use 0")])
def test_shard_refuses(index, count, message):
    with pytest.raises(T3Error, match=message):
        shard([1, 2, 3], index, count)


def test_pending(tmp_path):
    prompts = [Prompt("x", name) for name in ("a", "b", "c", "d")]
    assert output_path(prompts[0], tmp_path, ".mp4") == tmp_path / "a.mp4"
    assert pending(prompts, tmp_path / "not there yet", ".mp4") == prompts
    (tmp_path / "b.mp4").write_bytes(b"")
    (tmp_path / ".c.partial-1-ab.mp4").write_bytes(b"")
    (tmp_path / "d.latent").write_bytes(b"")
    assert [prompt.name for prompt in pending(prompts, tmp_path, ".mp4")] == ["a", "c", "d"]
    assert [prompt.name for prompt in pending(prompts, tmp_path, ".mp4", ".latent")] == ["a", "b", "c", "d"]
    (tmp_path / "b.latent").write_bytes(b"")
    assert [prompt.name for prompt in pending(prompts, tmp_path, ".mp4", ".latent")] == ["a", "c", "d"]


def test_pending_folders_of_frames(tmp_path):
    prompts = [Prompt("x", "a"), Prompt("x", "b")]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "frame_00000.png").write_bytes(b"")
    assert pending(prompts, tmp_path, "") == prompts[:1]
