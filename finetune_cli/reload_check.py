"""The last act of training, run by path in a fresh process: plain transformers, no ftune, no network.

Reads ``{"model", "auto_class", "inputs", "most", "threads"}`` as JSON from standard input, loads the exported model as any stranger
would, and writes its fp32 logits of each input as JSON, at most ``most`` of them taken evenly. With ``texts`` (and ``pairs``), the exported
tokenizer must make the same tokens of them.
"""

from __future__ import annotations

import gc
import json
import os
import sys


def main() -> None:
    gc.disable()  # what is imported stays, and the rest is little
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    asked = json.load(sys.stdin)
    import numpy as np
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(asked["threads"])
    local = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked["model"], **local)
    model = getattr(transformers, asked["auto_class"]).from_pretrained(asked["model"], dtype=torch.float32, **local).eval()
    found = []
    for number, inputs in enumerate(asked["inputs"]):
        if "texts" in asked:
            pair = asked["pairs"] and asked["pairs"][number]
            tokens = tokenizer(asked["texts"][number], pair, truncation=True, max_length=asked["max_length"])["input_ids"]
            real = inputs.get("attention_mask", [[1] * len(inputs["input_ids"][0])])[0]
            if tokens != [token for token, counts in zip(inputs["input_ids"][0], real, strict=True) if counts]:
                sys.exit(f"the exported tokenizer makes other tokens of {asked['texts'][number][:60]!r}")
        with torch.inference_mode():
            logits = model(**{name: torch.tensor(value) for name, value in inputs.items()}).logits.double().reshape(-1).numpy()
        most = asked["most"]
        found.append((logits if len(logits) <= most else logits[np.linspace(0, len(logits) - 1, most).astype(np.int64)]).tolist())
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
