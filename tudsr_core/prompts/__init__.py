"""A text for every tile: what a prompt is, who describes tiles, and edits that find their tiles again.

Must not know: text encoders and samplers; prompters get the networks they use from outside.
"""

from .._lazy import public_names

__all__, __getattr__ = public_names(
    __name__,
    captions="CaptionPrompter caption_kind",
    edits="Edits read_edits write_header",
    prompters="ClipTagPrompter StaticPrompter TagChoice TaggerPrompter "
    "check_tag_space check_tags prompts_from_strings read_tags",
    tile_prompts="CountProgress Style TilePrompt TilePrompter TilePrompts content_key cut_tiles describe picture_mark",
)
