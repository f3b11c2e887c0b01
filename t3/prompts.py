"""Files of prompts: read, give every prompt an output name, split over processes, skip what is done."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .errors import T3Error

NAME_BYTES = 120  # leaves room for suffixes and temporary names within the 143 bytes of encrypted file systems
_SLUG_CHARACTERS = 40
_TEXT_KEYS = ("prompt", "text", "prompt_en")
_NEGATIVE_KEYS = ("negative_prompt", "negative")
SEED_LIMIT = 2**64  # torch's generators and ComfyUI take 0 to 2^64 - 1
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])", re.IGNORECASE)
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Prompt:
    """One clip to make. `name` is the stem of its output files, unique in its list; None means "the usual"."""

    text: str
    name: str
    negative: str | None = None
    seed: int | None = None
    image: Path | None = None
    last_image: Path | None = None


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Read prompts from a `.json`, `.jsonl` or text file (UTF-8, with or without a byte order mark).

    Text: one prompt a line; blank lines and lines that start with '#' are skipped. JSON: a list; JSON lines: one
    entry a line. An entry is a string, or an object with the prompt under "prompt", "text" or "prompt_en" (the
    first found) and, if wanted, "name", "negative_prompt", "seed", "image" and "last_image" (paths from the prompt
    file's folder). Without a "name" the stem of "data_file" is used. Other keys are ignored, so that the prompt lists
    of data sets can be used as they are.

    Names are made safe for all file systems (`safe_name`). A prompt without one is named after its number, counted
    from 1, and its first words: `0007-a-red-kite`. If a name is taken, "-2", "-3", ... is added: a prompt's name never
    depends on those after it, so a list can be extended and resumed.

    Raises:
        T3Error: a missing or empty file, another encoding, broken JSON (with line and column), an entry without a
            prompt or with a value of the wrong type (with its number), an image that does not exist.
    """
    file = Path(path).absolute()
    entries = list(_entries(file, _read(file)))
    if not entries:
        raise T3Error(
            f"{file} holds no prompt. Write one a line; blank lines and lines that start with '#' are skipped."
        )
    prompts: list[Prompt] = []
    taken: set[str] = set()
    for number, (where, entry) in enumerate(entries, 1):
        fields = _fields(where, entry, file.parent)
        name = fields.pop("name") or f"{number:04}-{_slug(fields['text'])}"
        prompts.append(Prompt(name=_unique(safe_name(name), taken), **fields))
    return prompts


def safe_name(text: str) -> str:
    """`text` as a file stem that every file system takes: never empty, at most `NAME_BYTES` bytes of UTF-8.

    Separators, dots, control and other characters that Windows refuses or nobody can see become "-"; Windows'
    device names (con, nul, com1, ...) get "_" in front.
    """
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    # Dots too: a name may become a folder, where ".5" of "take 1.5" would read as a suffix.
    text = "".join(
        "-" if character in '<>:"/\\|?*.' or not character.isprintable() else character for character in text
    )
    # Not in front: "-" reads as an option, a space gets lost. Not behind: Windows drops a space.
    text = _shorten(text.strip(" -"), NAME_BYTES).rstrip(" -")
    if _RESERVED.fullmatch(text):
        return f"_{text}"
    return text or "unnamed"


def shard(prompts: Sequence[_Item], index: int, count: int) -> list[_Item]:
    """The share of process `index` of `count`: every `count`-th prompt, so that shares differ by at most one.

    Raises T3Error unless 0 <= index < count.
    """
    if count < 1:
        raise T3Error(f"Prompts cannot be split over {count} processes. Use at least 1.")
    if not 0 <= index < count:
        nearest = min(max(index, 0), count - 1)
        raise T3Error(f"There is no share {index} of {count}: shares count from 0 to {count - 1}. Use {nearest}.")
    return list(prompts[index::count])


def output_path(prompt: Prompt, folder: str | os.PathLike[str], suffix: str) -> Path:
    """Where the output of `prompt` goes: `suffix` is ".mp4", ".latent", ..., or "" for a folder of frames."""
    return Path(folder) / f"{prompt.name}{suffix}"


def pending(prompts: Iterable[Prompt], folder: str | os.PathLike[str], *suffixes: str) -> list[Prompt]:
    """The prompts that lack an output with one of the `suffixes` (as in `output_path`), in order.

    An output under its final name is complete (see `files`), so one that is there need not be looked into. An empty
    folder is no output.
    """
    if not suffixes:
        raise TypeError("pending() needs the suffixes of the outputs that make a prompt done")
    return [
        prompt for prompt in prompts if not all(is_output(output_path(prompt, folder, suffix)) for suffix in suffixes)
    ]


def is_output(path: Path) -> bool:
    """Whether there is a finished output at this path: a file, or a folder that is not empty."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _read(file: Path) -> str:
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise T3Error(f"The prompt file {file} {what}. Give a .txt, .json or .jsonl file.")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise T3Error(f"{file} is not UTF-8 (byte {error.start}). Save it as UTF-8 in your editor.") from error
    except OSError as error:
        raise T3Error(f"{file} cannot be read: {error.strerror}. Check its permissions.") from error


def _entries(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Pairs of where an entry stands, for messages, and the entry."""
    kind = file.suffix.lower()
    if kind == ".json":
        content = _parse(file, text, 1) if text.strip() else []
        if not isinstance(content, list):
            raise T3Error(f"{file} holds {_kind(content)}. The prompts must be in a list: [...].")
        for number, entry in enumerate(content, 1):
            yield f"{file}, entry {number}", entry
        return
    # Not splitlines(), which also cuts at characters that occur inside of prompts.
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        stripped = line.strip()
        if kind in (".jsonl", ".ndjson"):
            if stripped:
                yield f"{file}, line {number}", _parse(file, line, number)
        elif stripped and not stripped.startswith("#"):
            yield f"{file}, line {number}", stripped


def _parse(file: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise T3Error(f"{file} is broken JSON at {place}: {error.msg}. Correct it there.") from error
    except (RecursionError, ValueError) as error:
        raise T3Error(f"{file} cannot be read as JSON: {error}. Correct it, or write one prompt a line.") from error


def _fields(where: str, entry: Any, folder: Path) -> dict[str, Any]:
    """One entry as `Prompt`'s arguments; "name" is None or what the entry says, not yet made safe."""
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        raise T3Error(f'{where} is {_kind(entry)}. A prompt is a string or an object with a "prompt".')
    text = _string(where, entry, *_TEXT_KEYS)
    if not text or not text.strip():
        raise T3Error(f'{where} has no prompt. Put it under "prompt", "text" or "prompt_en".')
    name = _string(where, entry, "name")
    if not name:
        # Either separator, whatever system the list was made on.
        base = re.split(r"[/\\]", _string(where, entry, "data_file") or "")[-1]
        name = base.rpartition(".")[0] or base
    seed = entry.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEED_LIMIT):
        raise T3Error(f'{where} has the "seed" {seed!r}. Use a whole number from 0 to 2^64 - 1, without quotes.')
    return {
        "text": text.strip(),
        "name": name or None,
        "negative": _string(where, entry, *_NEGATIVE_KEYS),
        "seed": seed,
        "image": _file(where, entry, "image", folder),
        "last_image": _file(where, entry, "last_image", folder),
    }


def _file(where: str, entry: dict[str, Any], key: str, folder: Path) -> Path | None:
    name = _string(where, entry, key)
    if name and not (folder / name).is_file():
        raise T3Error(f'{where} has the "{key}" {name!r}, and {folder / name} does not exist. Correct the path.')
    return folder / name if name else None


def _string(where: str, entry: dict[str, Any], *keys: str) -> str | None:
    """The first of `keys` that the entry has; null is the same as absent."""
    for key in keys:
        value = entry.get(key)
        if value is not None:
            if not isinstance(value, str):
                raise T3Error(f'{where} has {_kind(value)} under "{key}". It must be a string in quotes.')
            return value
    return None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"the number {value!r}")


def _slug(text: str) -> str:
    """The first words in lower case, joined by '-'. Cut inside a word only if that is the first (as in Chinese)."""
    slug = ""
    for word in re.findall(r"\w+", text.lower()):
        if slug and len(slug) + 1 + len(word) > _SLUG_CHARACTERS:
            break
        slug = f"{slug}-{word}" if slug else word[:_SLUG_CHARACTERS]
    return slug


def _unique(name: str, taken: set[str]) -> str:
    """`name`, or `name-2`, `name-3`, ... if it is taken; adds the result to `taken`."""
    candidate, number = name, 1
    # Windows and macOS ignore case.
    while (key := unicodedata.normalize("NFC", candidate.casefold())) in taken:
        number += 1
        ending = f"-{number}"
        candidate = _shorten(name, NAME_BYTES - len(ending)) + ending
    taken.add(key)
    return candidate


def _shorten(text: str, count: int) -> str:
    return text.encode("utf-8")[:count].decode("utf-8", "ignore")
