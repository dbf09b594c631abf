"""What of a pretrained model may be new: a head and a pooler, in every family; nothing of its body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_cli.errors import UserError
from finetune_cli.models.loading import _refuse_torn

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
LABELS, MASK = "AutoModelForSequenceClassification", "AutoModelForMaskedLM"
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    **{name: ({}, [LABELS, MASK, "AutoModelForTokenClassification"]) for name in ("bert", "roberta", "electra", "albert", "mpnet")},
    "deberta-v2": ({}, [LABELS, MASK]),
    "modernbert": ({"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}, [LABELS, MASK]),
    "distilbert": ({"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}, [LABELS, MASK]),
    "gpt2": ({"n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 0}, [LABELS, "AutoModelForCausalLM"]),
    "llama": ({"pad_token_id": 0}, [LABELS, "AutoModelForCausalLM"]),
    "t5": ({"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}, ["AutoModelForSeq2SeqLM"]),
    "bart": (
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
        ["AutoModelForSeq2SeqLM"],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_may_be_new_and_no_tensor_of_the_body(family: str, tmp_path: Path) -> None:
    import transformers
    from safetensors.torch import load_file, save_file

    more, kinds = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **more})
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    torn = next(name for name, tensor in whole.items() if tensor.ndim == 2 and "0" in name and "pool" not in name)
    for kind in kinds:
        for lacks in (False, True):
            save_file({k: t for k, t in whole.items() if not (lacks and k == torn)}, tmp_path / "model.safetensors", {"format": "pt"})
            model, info = getattr(transformers, kind).from_pretrained(
                tmp_path, output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32
            )
            new = sorted(info["missing_keys"])
            if lacks:
                with pytest.raises(UserError, match="missing"):
                    _refuse_torn(model, new, {}, str(tmp_path))
            else:
                _refuse_torn(model, new, {}, str(tmp_path))
