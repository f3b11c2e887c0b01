"""Everything that knows ComfyUI: the list of nodes this pack offers."""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension, io

from . import host_version

log = logging.getLogger("T3")


class T3Extension(ComfyExtension):
    """The pack's nodes, in the order ComfyUI lists them."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        try:
            from .attention import T3Attention
            from .extract import T3Extract
            from .latent import T3EmptyLatent
            from .load_latent import T3LoadLatent
            from .plan import T3Plan
            from .preview import T3PlanPreview
            from .retrofit_loader import T3RetrofitLoader
            from .vae_decode import T3VAEDecode, T3VAEDecodeToVideo
            from .vae_encode import T3VAEEncode
        except ImportError as error:
            log.error("T3 has no nodes here: it needs ComfyUI %s or newer (%s).", host_version.TESTED, error)
            return []
        return [
            T3Attention,
            T3RetrofitLoader,
            T3Plan,
            T3PlanPreview,
            T3EmptyLatent,
            T3LoadLatent,
            T3VAEDecode,
            T3VAEDecodeToVideo,
            T3VAEEncode,
            T3Extract,
        ]


async def comfy_entrypoint() -> T3Extension:
    """Called once by ComfyUI when it loads the pack."""
    if remark := host_version.remark(host_version.running()):
        log.warning(remark)
    return T3Extension()
