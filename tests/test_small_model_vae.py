"""The small model's VAE: the whole-clip form equals diffusers' chunks, and its training learns."""

from functools import partial

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample

from tools.small_model.clip_vae import CONVOLUTIONS, ClipVae
from tools.small_model.render import LOW, render
from tools.small_model.scenes import scenes
from tools.small_model.train_vae import Phase, crops, loss_of, start_as_images


def random_vae(base: int = 4, dtype=torch.float64) -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=base, z_dim=16).to(dtype).eval()
    for parameter in vae.parameters():
        # Gains other than 1 and biases other than 0, so that a forgotten one shows.
        parameter.data += 0.1 * torch.randn_like(parameter)
    for module in vae.modules():
        # diffusers upsamples in float32, whatever comes in.
        if isinstance(module, WanUpsample):
            module.forward = partial(torch.nn.Upsample.forward, module)
    return vae


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("frames", [1, 9])
def test_whole_clip_equals_chunks(frames, convolution):
    vae = random_vae()
    ours = ClipVae(vae, convolution)
    video = torch.rand(2, 3, frames, 16, 24, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(video).latent_dist
        mean, log_variance = ours.encode(video)
        decoded = vae.decode(posterior.mean).sample
        whole = ours.decode(posterior.mean)
    assert mean.shape == (2, 16, 1 + (frames - 1) // 4, 2, 3)
    # Some 30 layers of sums of up to 432 products in float64.
    torch.testing.assert_close(mean, posterior.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_variance, posterior.logvar, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole.clamp(-1, 1), decoded, rtol=1e-9, atol=1e-9)


def test_a_new_network_takes_each_frame_by_itself():
    torch.manual_seed(3)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16)
    start_as_images(vae)
    model = ClipVae(vae)
    video = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    with torch.no_grad():
        moving = model.encode(video)[0]
        still = torch.cat([model.encode(video[:, :, t : t + 1])[0] for t in (0, 4, 8)], 2)
        decoded = model.decode(still)
        frames = [model.decode(still[:, :, t : t + 1]) for t in range(3)]
    torch.testing.assert_close(moving, still, rtol=1e-4, atol=1e-5)
    expected = torch.cat([frames[0], *[frames[1]] * 4, *[frames[2]] * 4], 2)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)


def test_crops_are_cut_from_the_whole_frame():
    pool = scenes("train", 0, 20)
    whole = render(pool[:3], LOW, 2, first=[0, 4, 9])
    corners = torch.tensor([[0, 0], [50, 131], [160, 256]])
    cut = render(pool[:3], LOW, 2, first=[0, 4, 9], corners=corners, crop=(64, 64))
    for clip, part, (top, left) in zip(whole, cut, corners.tolist(), strict=True):
        torch.testing.assert_close(part, clip[..., top : top + 64, left : left + 64], rtol=0, atol=1e-3)
    drawn = crops(pool, Phase(3, 5, 48), torch.Generator().manual_seed(0), torch.device("cpu"))
    assert drawn.shape == (3, 3, 5, 48, 48) and drawn.abs().max() <= 1


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(1)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16)
    start_as_images(vae)
    model = ClipVae(vae, "3d")
    video = crops(scenes("train", 0, 20), Phase(2, 5, 32), torch.Generator().manual_seed(0), torch.device("cpu"))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = loss_of(model, video, torch.float32, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    unused = [name for name, p in vae.named_parameters() if p.grad is None]
    assert not unused
    assert losses[-1] < 0.6 * losses[0]
