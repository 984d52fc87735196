"""The LoRA configuration that peft writes: its values by type, and what of it is not implemented, refused by name."""

from __future__ import annotations

from pathlib import Path

from ..untrusted import Fields, parse_json, shown
from .tensor_files import CheckpointError

# Settings that change the result; unless they are empty, false or null, the adapter is another than its tensors say.
NOT_IMPLEMENTED = (
    *("use_dora", "fan_in_fan_out", "alpha_pattern", "modules_to_save", "lora_bias", "layer_replication"),
    *("target_parameters", "trainable_token_indices"),
)
# Kinds of initial values that also change the base model's weights.
CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
MODULES = ("target_modules", "exclude_modules")


def read_lora_config(text: str, path: Path) -> Fields:
    """Return the configuration that peft or diffusers wrote; the latter puts `unet.` before each name.

    Raises CheckpointError for values of wrong types, and for what would give another result than intended.
    """
    where = f"the LoRA configuration of {path}"
    fields = Fields(parse_json(text, where, CheckpointError), where, CheckpointError)
    fields.values = {key.removeprefix("unet."): value for key, value in fields.values.items()}
    values = fields.values
    for name in MODULES:
        if not isinstance(values.get(name), str | None):
            fields.texts(name)
    if not isinstance(values.get("use_rslora"), bool | None):
        raise CheckpointError(f"{where}: 'use_rslora' is {shown(values['use_rslora'])}, it must be true or false")
    if (kind := fields.text("peft_type", "LORA")) != "LORA":
        raise CheckpointError(f"{path} is of the kind {shown(kind)}, which this pack does not support; it reads LORA")
    if (bias := fields.text("bias", "none")) != "none":
        raise CheckpointError(f"{path} trains biases ({shown(bias)}), which this pack does not support")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGING_THE_BASE):
        raise CheckpointError(
            f"{path} begins with {shown(start)}, which also changes the base model and is not supported; "
            "convert it to a plain LoRA with peft"
        )
    for name in NOT_IMPLEMENTED:
        if values.get(name):
            raise CheckpointError(f"{path} uses {name}, which this pack does not support")
    return fields
