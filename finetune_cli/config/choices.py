"""The options that are one of a few words."""

from __future__ import annotations

from enum import StrEnum


class Precision(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class DeviceName(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class OptimizerName(StrEnum):
    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    adam = "adam"
    nadam = "nadam"
    radam = "radam"
    adagrad = "adagrad"
    rmsprop = "rmsprop"
    sgd = "sgd"
    adafactor = "adafactor"


class Schedule(StrEnum):
    linear = "linear"
    cosine = "cosine"
    constant = "constant"
    polynomial = "polynomial"
    inverse_sqrt = "inverse_sqrt"


class Order(StrEnum):
    auto = "auto"
    buckets = "buckets"
    shuffled = "shuffled"


class Pooling(StrEnum):
    own = "own"
    first = "first"
    mean = "mean"


class DataFormat(StrEnum):
    auto = "auto"
    csv = "csv"
    tsv = "tsv"
    json = "json"
    jsonl = "jsonl"
    parquet = "parquet"
    arrow = "arrow"
    text = "text"
    conll = "conll"


class Quoting(StrEnum):
    auto = "auto"
    csv = "csv"
    plain = "plain"


class RowPolicy(StrEnum):
    error = "error"
    drop = "drop"


class ExtraFields(StrEnum):
    error = "error"
    ignore = "ignore"


class AdapterName(StrEnum):
    none = "none"
    lora = "lora"


class Quantised(StrEnum):
    none = "none"
    int8 = "int8"
    nf4 = "nf4"


class OnSpike(StrEnum):
    warn = "warn"
    stop = "stop"
    rewind = "rewind"


class Split(StrEnum):
    auto = "auto"
    train = "train"
    validation = "validation"
    test = "test"
