"""ComfyUI entry point."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
