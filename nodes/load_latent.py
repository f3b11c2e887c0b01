"""The T3 Load Latent node: latents that ComfyUI's SaveLatent wrote, from where it wrote them."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..t3.errors import T3Error
from ..t3.latents import load_latents
from .families import video_of_latents
from .verdict import verdict

NEWEST = "newest"


class T3LoadLatent(io.ComfyNode):
    """Decode later: SaveLatent in one graph, this node in the next, no file moved by hand."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="T3LoadLatent",
            display_name="T3 Load Latent",
            category="T3",
            description="Loads latents that SaveLatent wrote, to decode hours of sampling whenever you like.",
            search_aliases=["load latent", "open latent", "decode later", "resume"],
            inputs=[
                io.Combo.Input(
                    "latent",
                    options=[NEWEST, *saved()],
                    default=NEWEST,
                    tooltip="A .latent file under ComfyUI's output or input folder. newest: the one saved last.",
                ),
            ],
            outputs=[
                io.Latent.Output("LATENT", display_name="latent", tooltip="The latents, for a VAE decode."),
                io.String.Output("REPORT", display_name="report", tooltip="Which file this is, and what it holds."),
            ],
        )

    @classmethod
    def validate_inputs(cls, latent=NEWEST) -> bool | str:
        """What can be refused before the graph runs; a string is the reason."""
        return latent is None or verdict(find, latent)  # None comes over a link

    @classmethod
    def fingerprint_inputs(cls, latent) -> str:
        """Changes when the file does, or when `newest` is another; over a link, when any file does."""
        if latent is None:
            return repr(_dated())
        path = find(latent)
        return f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}"

    @classmethod
    def execute(cls, latent) -> io.NodeOutput:
        path = find(latent)
        samples, _ = load_latents(path)
        clip = video_of_latents(samples.shape)
        shape = " x ".join(map(str, samples.shape))
        return io.NodeOutput({"samples": samples}, f"{path}\n{clip}; latents {shape}, for {clip.family.name}")


def _folders() -> dict[str, Path]:
    import folder_paths

    return {
        "output": Path(folder_paths.get_output_directory()).resolve(),
        "input": Path(folder_paths.get_input_directory()).resolve(),
    }


def _is_ours(path: Path, folder: Path) -> bool:
    """Whether a path without links in it is that of a latent file in this folder."""
    return path.is_relative_to(folder) and path.suffix == ".latent"


def _dated() -> list[tuple[int, str]]:
    """Time in nanoseconds and entry of all latent files, the one saved last first."""
    found = []
    for name, folder in _folders().items():
        for path in folder.rglob("*.latent"):
            try:
                if path.is_file() and _is_ours(path.resolve(), folder):
                    found.append((path.stat().st_mtime_ns, f"{name}/{path.relative_to(folder).as_posix()}"))
            except OSError:  # removed meanwhile, or not ours to see
                continue
    return sorted(found, reverse=True)


def saved() -> list[str]:
    """Every `.latent` under the output and input folders, as `output/latents/name.latent`, the one saved last first."""
    return [entry for _, entry in _dated()]


def find(entry: str) -> Path:
    """The file that `entry` (one of `saved()`, or "newest") names.

    Raises `T3Error` where there is none, and for a path that leads out of those folders.
    """
    if entry == NEWEST:
        entries = saved()
        if not entries:
            raise T3Error(
                "there is no .latent file in ComfyUI's output or input folder yet: run a graph that ends in a "
                "SaveLatent node first."
            )
        entry = entries[0]
    name, _, rest = str(entry).partition("/")
    folder = _folders().get(name)
    not_one = T3Error(f"{entry!r} is no .latent file under ComfyUI's output or input folder; choose one of the list.")
    if folder is None:
        raise not_one
    try:
        path = (folder / rest).resolve()
        there = path.is_file()
    except (OSError, ValueError):  # a name no file can have
        raise not_one from None
    if not _is_ours(path, folder):
        raise not_one
    if not there:
        raise T3Error(f"{entry!r} does not exist (any more). Choose another of the list, or {NEWEST!r}.")
    return path
