"""The weights of a GGUF file as a folder of bf16 safetensors, for servers that read no GGUF.

`python bench/export.py FILE.gguf FOLDER`: dequantised by transformers, with config.json and tokenizer. Its
generation config names no end of text, so that servers that cannot ignore it do not stop early.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def export(gguf: Path, folder: Path) -> None:
    """Write the folder."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    stored = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # A model that came from a GGUF file refuses to be saved, so a plain one takes its weights.
    config = type(stored.config)(**{**stored.config.to_dict(), "quantization_config": None})
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(stored.state_dict())
    plain.generation_config = GenerationConfig(bos_token_id=config.bos_token_id)
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
