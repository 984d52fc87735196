"""ComfyUI node pack for diffusion super-resolution; importing it does nothing until ComfyUI asks."""

WEB_DIRECTORY = "./nodes/web"
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint():
    """Return the extension; ComfyUI's own modules are first imported here."""
    from .nodes import load_extension

    return load_extension()
