"""Files of weights: reading without trust, every published adapter format as one form, the table of known files.

Must not know: how networks are built or run.
"""

from .._lazy import public_names

__all__, __getattr__ = public_names(
    __name__,
    adapters="Adapter LoRAMerger LoRAWeights WeightDelta",
    checkpoints="DTYPES MODEL_FORMAT ModelFile OWN_TITLE embedded_path "
    "identify read_adapter read_model write_adapter write_model",
    download="download_file",
    formats="PEFT_PREFIX UNET_FOLDER",
    known_files="KNOWN_FILES known_file where_to_get",
    prediction="TELLTALE Prediction file_prediction prediction_of",
    tensor_files="CheckpointError SUFFIXES TensorFile check_finite open_safetensors read_file stream write_file",
)
