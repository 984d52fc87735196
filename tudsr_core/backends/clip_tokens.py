"""CLIP's tokens of a prompt, by the tokenizer of a folder, which is not trusted.

Knows no network but the number of words that its text tower has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from reprlib import repr as short
from types import ModuleType

import torch
from torch import Tensor

from ..untrusted import Fields, parse_json, read_text
from ..weights import CheckpointError

TOKENS, START, END = 77, 49406, 49407
PAD = 0  # "!", with which SD 2.x fills up; SD 1.5 does with END

Tokens = Callable[[str], Tensor]


def tokens_of(folder: Path | None, words: int, pad: int | None = None) -> Tokens:
    """Return `tokens(text)`, `1 77`, filled up with `pad`; None: with what the tokenizer's folder says.

    `words` is how many the text tower knows. Without a folder, only the empty text is known. Raises CheckpointError.
    """
    if folder is None:
        return _empty_prompt_tokens
    transformers = import_transformers()
    _check_files(folder, words)
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers and its Rust part make of files that cannot be
        raise _unusable(folder, error) from error
    pad = tokenizer.pad_token_id if pad is None else pad
    if pad is None or pad >= tokenizer.vocab_size:
        raise CheckpointError(
            f"{folder} fills prompts up with {short(tokenizer.pad_token)}, which is no word of its vocab.json; "
            "correct pad_token in its tokenizer_config.json, or download the folder again"
        )

    def tokens(text: str) -> Tensor:
        try:
            ids = tokenizer(text, truncation=True, max_length=TOKENS).input_ids
        except Exception as error:  # as above: some files are looked into only now
            raise _unusable(folder, error) from error
        if max(ids, default=0) >= words:
            raise CheckpointError(
                f"{folder} makes a word number {max(ids)}, but this text encoder has {words:,} words; "
                "use the tokenizer that belongs to it"
            )
        return torch.tensor([ids + [pad] * (TOKENS - len(ids))])

    return tokens


def _check_files(folder: Path, words: int) -> None:
    """Raise CheckpointError that names the file that is no table, or a word whose number is none of `words`."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"):
        path = folder / name
        if not path.is_file():
            continue
        values = parse_json(read_text(path, CheckpointError), str(path), CheckpointError)
        fields = Fields(values, str(path), CheckpointError)
        if name == "vocab.json":
            for word in fields.values:
                fields.whole(word, most=words - 1)


def _unusable(folder: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return CheckpointError(f"{folder} is not a CLIP tokenizer (vocab.json and merges.txt): {reason}")


def _empty_prompt_tokens(text: str) -> Tensor:
    if text:
        raise CheckpointError(
            "a single checkpoint file has no tokenizer, and this method or you give a prompt; add --tokenizer with "
            "CLIP's vocab.json and merges.txt (a diffusers folder's tokenizer/), or use a diffusers folder"
        )
    return torch.tensor([[START, END] + [PAD] * (TOKENS - 2)])


def import_transformers() -> ModuleType:
    """Return transformers without its progress bars; raises CheckpointError that says how to install it."""
    try:
        import transformers
    except ImportError:
        raise CheckpointError(
            "Stable Diffusion's text encoder needs transformers; run: pip install 'comfyui-tudsr[sd]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers
