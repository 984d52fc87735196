"""Rename diffusers weights to the layout of the original Stable Diffusion checkpoints."""


def to_ldm(unet, vae):
    """Rename diffusers weights to the layout of the original Stable Diffusion checkpoints."""
    tensors = {}
    for key, value in unet.state_dict().items():
        tensors["model.diffusion_model." + ldm_unet_name(key)] = value.contiguous()
    weights = vae.state_dict()
    levels = len({key.split(".")[2] for key in weights if key.startswith("decoder.up_blocks.")})
    for key, value in weights.items():
        name = ldm_vae_name(key, levels)
        if ".mid.attn_1." in name and name.endswith("weight") and "norm" not in name:
            value = value[..., None, None]
        tensors["first_stage_model." + name] = value.contiguous()
    return tensors


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_unet_name(key):
    parts = key.split(".")
    whole = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for old, new in whole.items():
        if key.startswith(old + "."):
            return new + key.removeprefix(old)
    if parts[0] == "mid_block":
        place = 1 if parts[1] == "attentions" else 2 * int(parts[2])
        head, rest = f"middle_block.{place}", parts[3:]
    else:
        block, kind, index, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
        if parts[0] == "down_blocks":
            number = 1 + 3 * block + (2 if kind == "downsamplers" else index)
            head = f"input_blocks.{number}.{1 if kind == 'attentions' else 0}"
            if kind == "downsamplers":
                return f"{head}.op.{rest[-1]}"
        else:
            number = 3 * block + (2 if kind == "upsamplers" else index)
            place = {"resnets": 0, "attentions": 1, "upsamplers": 1 if block == 0 else 2}[kind]
            head = f"output_blocks.{number}.{place}"
    if rest[0] in RESNET:
        rest = [RESNET[rest[0]], *rest[1:]]
    return ".".join([head, *rest])


def ldm_vae_name(key, levels):
    for old, new in (
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
        ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
        ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("resnets", "block"),
    ):
        key = key.replace(old, new)
    for i in range(levels):
        key = key.replace(f"down_blocks.{i}", f"down.{i}").replace(f"up_blocks.{i}", f"up.{levels - 1 - i}")
    return key
