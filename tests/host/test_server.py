"""The pack in a real ComfyUI server: installed in every way people install packs, and every workflow run to its end."""

from __future__ import annotations

import copy
import json
import subprocess
import zipfile
from pathlib import Path
from urllib.parse import quote

import av
import host_comfy
import host_standins
import pytest
import torch
from host_server import HostServer, copy_pack
from install import ROOT
from safetensors.torch import load_file

from tools.workflows import FOLDER, graphs

pytest_plugins = ["host_fixtures"]

SAMPLE_FIRST, DECODE_LATER = (
    next(g.name for g in graphs() if g.name.endswith(end)) for end in ("1 sample", "2 decode")
)
NAMES = sorted(graph.name for graph in graphs())
AFTER_SAMPLING = {"T3VAEDecodeToVideo", "SaveVideo", "PreviewAny"}
# Nodes work there. Templates and help pages do not: no address of a folder with a space or an umlaut reaches ComfyUI's
# static files, whatever the pack (seen with aiohttp 3.14).
AWKWARD = "T3 für ComfyUI.v1 (copy)"


def twin(name: str) -> dict:
    """A workflow's API twin, made small."""
    return host_standins.fit(load(FOLDER / "api" / f"{name}.json"))


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def text_to_video() -> dict:
    return twin(next(name for name in NAMES if "text-to-video" in name))


def number_of(graph: dict, kind: str) -> str:
    return next(number for number, node in graph.items() if node["class_type"] == kind)


def problems(log: str) -> list[str]:
    """Lines of a server's log that report trouble."""
    words = ("[ERROR]", "[WARNING]", "Traceback", "IMPORT FAILED", "Cannot import")
    return [line for line in log.splitlines() if any(word in line for word in words)]


def run(host, graph: dict) -> dict:
    """Run a graph; gives its history. The server must have nothing to complain about."""
    start = len(host.log())
    history = host.run(graph)
    assert problems(host.log()[start:]) == []
    return history


def our_nodes(info: dict) -> dict:
    return {name: node for name, node in info.items() if name.startswith("T3")}


def committed(folder) -> None:
    """`git clone`, as people do from the pack's address."""
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder)], check=True)


def unzipped(folder) -> None:
    """The zip file that a release page offers."""
    archive = folder.with_suffix(".zip")
    subprocess.run(["git", "-C", str(ROOT), "archive", "--format=zip", "-o", str(archive), "HEAD"], check=True)
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    archive.unlink()


def test_the_pack_loads_by_a_symbolic_link(host):
    assert problems(host.log().partition("got prompt")[0]) == []
    assert our_nodes(host.object_info())


@pytest.mark.parametrize(
    ("name", "install"), [(AWKWARD, copy_pack), ("comfyui-t3", committed), ("comfyui-t3-main", unzipped)]
)
def test_the_pack_loads_however_it_is_installed(host, tmp_path, name, install):
    """A copy of the working tree has the nodes of the linked one; a clone and a zip file what is committed."""
    if install is not copy_pack and not (ROOT / ".git").exists():
        pytest.skip("this checkout is not a git repository")
    with HostServer(tmp_path, packs={name: install}) as server:
        nodes = our_nodes(server.object_info())
        assert problems(server.log()) == []
        listed = server.get("/workflow_templates").get(name, [])
    assert nodes
    assert {node["python_module"] for node in nodes.values()} == {f"custom_nodes.{name}"}
    if install is copy_pack:
        assert nodes.keys() == our_nodes(host.object_info()).keys()
        assert sorted(listed) == NAMES


def test_every_input_has_a_tooltip(host):
    for name, node in our_nodes(host.object_info()).items():
        assert node["description"], name
        for group in ("required", "optional"):
            for input_name, (_, *options) in node["input"].get(group, {}).items():
                assert options and options[0].get("tooltip"), f"{name}.{input_name}"
        assert all(node["output_tooltips"]), name


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_runs(host, name):
    """To the end: a video of the size and length asked for, or latents for the next one."""
    graph = twin(name)
    if name == DECODE_LATER:
        run(host, twin(SAMPLE_FIRST))
    (path,) = host.saved(run(host, graph))
    if name == SAMPLE_FIRST:
        state = load_file(path)
        assert state["latent_tensor"].shape == (1, 16, 2, 8, 8) and "latent_format_version_0" in state
        return
    with av.open(str(path)) as video:
        (stream,) = video.streams.video
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(stream)]
        assert stream.average_rate == graph[number_of(graph, "T3VAEDecodeToVideo")]["inputs"]["fps"]
    assert len(frames) == host_standins.FRAMES
    assert {frame.shape for frame in frames} == {(host_standins.HEIGHT, host_standins.WIDTH, 3)}
    assert all(frame.std() > 0 for frame in frames)


def test_the_report_can_be_read(host):
    graph = text_to_video()
    outputs = run(host, graph)["outputs"]
    texts = [outputs[number]["text"][0] for number, node in graph.items() if node["class_type"] == "PreviewAny"]
    assert any(text.startswith("T3 Attention on WanModel") and "noise" in text for text in texts)
    assert any("1 tile" in text and "Wan2.1 VAE" in text for text in texts)


def test_a_t3_lora_brings_its_plan(host):
    """The workflow without T3 Attention, as its report has it."""
    graph = twin(next(name for name in NAMES if "T3 LoRA" in name))
    outputs = run(host, graph)["outputs"]
    texts = [outputs[number]["text"][0] for number, node in graph.items() if node["class_type"] == "PreviewAny"]
    assert any("T3 attention with plan wan2.1-4k, from the file" in text for text in texts)
    assert all("WARNING" not in text for text in texts)


def latents(host, graph) -> dict[str, torch.Tensor]:
    """What the graph's SaveLatent nodes wrote, by the node's number."""
    outputs = run(host, graph)["outputs"]
    return {
        number: load_file(host.base / "output" / entry["subfolder"] / entry["filename"])["latent_tensor"]
        for number, output in outputs.items()
        for entry in output.get("latents", ())
    }


def sampling_only(*branches: str, seed: int = 3) -> dict:
    """A graph that saves latents of one or more samplers; a branch is "t3" or "plain". All T3 branches share a node."""
    graph = twin(SAMPLE_FIRST)
    sampler, saver, t3, shift = (
        number_of(graph, k) for k in ("KSampler", "SaveLatent", "T3Attention", "ModelSamplingSD3")
    )
    first, last = graph.pop(sampler), graph.pop(saver)
    if "t3" not in branches:
        del graph[number_of(graph, "PreviewAny")], graph[t3]
    for i, branch in enumerate(branches):
        node, save = copy.deepcopy(first), copy.deepcopy(last)
        node["inputs"].update(model=[t3 if branch == "t3" else shift, 0], seed=seed + i)
        save["inputs"].update(samples=[f"sampler{i}", 0], filename_prefix=f"latents/branch{i}")
        graph[f"sampler{i}"], graph[f"save{i}"] = node, save
    return graph


def test_two_samplers_behind_one_t3_node(host):
    both = latents(host, sampling_only("t3", "t3"))
    assert not torch.equal(both["save0"], both["save1"])
    # A seed of its own in between, so that ComfyUI cannot hand back what it has kept.
    latents(host, sampling_only("t3", seed=11))
    for i in range(2):
        (alone,) = latents(host, sampling_only("t3", seed=3 + i)).values()
        assert torch.equal(both[f"save{i}"], alone)


def test_a_branch_without_t3_is_untouched(host):
    """Bit for bit what a graph without any T3 node gives, whichever of the two is sampled first."""
    (plain,) = latents(host, sampling_only("plain", seed=3)).values()
    for order in (("t3", "plain"), ("plain", "t3")):
        seed = 3 - order.index("plain")
        both = latents(host, sampling_only(*order, seed=seed))
        assert torch.equal(both[f"save{order.index('plain')}"], plain), order
    (windowed,) = latents(host, sampling_only("t3", seed=3)).values()
    assert not torch.equal(windowed, plain), "windows must have run"


def test_image_to_video_samples_what_the_host_s_own_node_gives(host):
    """The workflow's latents, and those with Wan22ImageToVideoLatent in place of Upscale Image and T3 VAE Encode."""
    graph = twin(next(name for name in NAMES if "image-to-video" in name))
    sampler, encode, scale = (number_of(graph, k) for k in ("KSampler", "T3VAEEncode", "ImageScale"))
    for number in [number for number, node in graph.items() if node["class_type"] in AFTER_SAMPLING]:
        del graph[number]
    inputs = {"samples": [sampler, 0], "filename_prefix": "latents/begun"}
    graph["save"] = {"class_type": "SaveLatent", "inputs": inputs}
    (ours,) = latents(host, graph).values()
    theirs = {"width": host_standins.WIDTH, "height": host_standins.HEIGHT, "length": host_standins.FRAMES}
    theirs.update(batch_size=1, vae=graph[encode]["inputs"]["vae"], start_image=graph[scale]["inputs"]["image"])
    graph[encode] = {"class_type": "Wan22ImageToVideoLatent", "inputs": theirs}
    (expected,) = latents(host, graph).values()
    assert ours.shape == expected.shape == (1, 48, 2, 4, 4)
    assert (ours - expected).abs().max() < 1e-3 < expected.std()


BAD = [
    ("T3Attention", {"dense_blocks": "first"}, "write numbers and ranges"),
    ("T3Attention", {"start_percent": 0.8, "end_percent": 0.2}, "Start must be less than end"),
    ("T3EmptyLatent", {"width": 65}, None),
    ("T3LoadLatent", {"latent": "no such.latent"}, None),
    ("T3RetrofitLoader", {"file": "loras/../../secret.safetensors"}, "choose one of the list"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), BAD)
def test_bad_inputs_are_refused_in_one_sentence_before_sampling(host, kind, changes, words):
    graph = next(graph for graph in map(twin, NAMES) if kind in {node["class_type"] for node in graph.values()})
    number, saver = number_of(graph, kind), number_of(graph, "SaveVideo")
    graph[number]["inputs"].update(changes)
    status, answer = host.post_prompt(graph)
    refused = answer["node_errors"][number]
    details = [error["details"] for error in refused["errors"]]
    assert details and all("\n" not in detail and "Traceback" not in detail for detail in details)
    assert not words or any(words in detail for detail in details)
    assert saver in refused["dependent_outputs"]
    # What does not depend on the refused node, such as a report, ComfyUI still runs.
    assert status == 400 or saver not in host.wait_for(answer["prompt_id"])["outputs"]


def test_workflows_are_offered_once_and_served(host):
    """ComfyUI looks into five folder names; a workflow in a second one would appear twice."""
    listed = host.get("/workflow_templates")
    assert {name: sorted(workflows) for name, workflows in listed.items()} == {"T3": NAMES}
    for name in NAMES:
        assert host.get(f"/api/workflow_templates/T3/{quote(name)}.json") == load(FOLDER / f"{name}.json")


def test_no_server_is_left_behind(tmp_path):
    if not host_comfy.available():
        pytest.skip("ComfyUI is not installed")
    server = HostServer(tmp_path, packs={}, start_limit=0.1)
    with pytest.raises(TimeoutError), server:
        pass
    assert server.process is not None and server.process.poll() is not None
