"""The last act of training, run by path in a fresh process: plain transformers, no ftune, no network.

Reads ``{"model", "auto_class", "texts", "pairs", "max_length", "threads"}`` as JSON from standard input, loads the exported model as any
stranger would, and writes its fp32 logits as JSON.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    asked = json.load(sys.stdin)
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(asked["threads"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked["model"], local_files_only=True)
    model = getattr(transformers, asked["auto_class"]).from_pretrained(asked["model"], local_files_only=True, dtype=torch.float32).eval()
    inputs = tokenizer(asked["texts"], asked["pairs"], truncation=True, max_length=asked["max_length"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits
    json.dump(logits.double().tolist(), sys.stdout)


if __name__ == "__main__":
    main()
