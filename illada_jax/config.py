"""Configurations: frozen, typed, validated.

An experiment is a file with `get_config()` that starts from `defaults()`, changes some fields and returns a locked
`ConfigDict`; flags may override it (`--config.train.steps=10`). `from_config_dict` converts it to the dataclasses below
once, and no other module sees a ConfigDict. A test checks that every field is used.

The file is long because every field of every section is documented and checked here, and nowhere else.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_collections

from illada_jax.errors import ConfigError

Dtype = Literal["float32", "bfloat16"]
_FLOAT32_MAX = 3.4e38


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"config.{key} = {value!r}: {allowed}")


def _positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{section}.{name}", value, "must be greater than 0")


def _not_negative(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= 0, f"{section}.{name}", value, "must be 0 or more")


def _unit_interval(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value <= 1, f"{section}.{name}", value, "must lie in [0, 1]")


@dataclass(frozen=True)
class ModelConfig:
    """The transformer (iLLaDA paper, architecture table).

    Attributes:
      vocab_size: rows of the embedding; 0 uses the size of the tokenizer.
      d_model: width of the residual stream (D).
      num_layers: number of blocks.
      num_heads: query heads (N).
      num_kv_heads: key/value heads (K); divides num_heads. Equal to it: MHA; fewer: GQA.
      head_dim: width of a head (H), even.
      d_ff: width of the SwiGLU feed-forward (F).
      max_length: the context length: the longest sequence that is trained on or decoded, in tokens.
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon of RMSNorm.
      tied_head: the LM head is the transposed embedding.
      init_std: standard deviation of initial projections; residual outputs are scaled by 1/sqrt(2·num_layers).
        0 means sqrt(2 / (5·D)), which gives the published 0.00988 at D = 4096.
      dtype: dtype of activations; params are float32 in training.
      remat: values that the backward pass recomputes: `none` (none), `dots` (all but the results of matrix products
        and attention), `projections` (also the feed-forward), `attention` (all but attention), `full` (every layer).
      attention: back end, see `model/attention.py`; `auto` selects `splash` on TPU, `cudnn` on GPU, else `xla`.
        `splash_interpret` runs the TPU kernel in an interpreter, on any platform, slowly.
      attention_block_q: queries per block of the TPU kernel, a multiple of 128 (the largest that divides the length).
      attention_block_kv: keys per block that are loaded into on-chip memory.
      attention_block_kv_compute: keys per block that are computed at once; at most attention_block_kv.
      scan_unroll: layers per iteration of the scan over layers.
    """

    vocab_size: int = 0
    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    d_ff: int = 384
    max_length: int = 256
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-6
    tied_head: bool = True
    init_std: float = 0.0
    dtype: Dtype = "float32"
    remat: Literal["none", "dots", "projections", "attention", "full"] = "none"
    attention: Literal["auto", "xla", "cudnn", "splash", "splash_interpret"] = "auto"
    attention_block_q: int = 1024
    attention_block_kv: int = 2048
    attention_block_kv_compute: int = 512
    scan_unroll: int = 1

    def __post_init__(self):
        _positive("model", self, "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff",
                  "max_length", "rope_theta", "norm_eps", "scan_unroll")
        _not_negative("model", self, "vocab_size", "init_std")
        _require(self.d_model % self.num_heads == 0, "model.d_model", self.d_model,
                 f"must be divisible by model.num_heads = {self.num_heads}")
        _require(self.num_heads % self.num_kv_heads == 0, "model.num_kv_heads", self.num_kv_heads,
                 f"must divide model.num_heads = {self.num_heads}")
        _require(self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "must be even (rotary pairs)")
        for name in ("attention_block_q", "attention_block_kv", "attention_block_kv_compute"):
            value = getattr(self, name)
            _require(value > 0 and value % 128 == 0, f"model.{name}", value, "must be a multiple of 128")
        _require(self.attention_block_kv_compute <= self.attention_block_kv, "model.attention_block_kv_compute",
                 self.attention_block_kv_compute,
                 f"must not exceed model.attention_block_kv = {self.attention_block_kv}")
        _require(self.num_layers % self.scan_unroll == 0, "model.scan_unroll", self.scan_unroll,
                 f"must divide model.num_layers = {self.num_layers}")


@dataclass(frozen=True)
class DataConfig:
    """Text and how it becomes batches.

    Attributes:
      sources: sources of the text, `KIND` or `KIND:PATH`; the package `illada_jax/data/sources` has the kinds.
        `prepared:DIR` is a corpus prepared with `python -m illada_jax.prepare`. For fine-tuning: `chat:PATH` or
        `tasks:NAME:COUNT`, see `illada_jax/data/sources/examples.py`.
      weights: shares of the rows for several prepared corpora, in the order of `sources`, with sum 1; empty: in
        proportion to their tokens.
      tokenizer: `bytes`, `sentencepiece` (trained on the corpus), the path of a SentencePiece `.model` or a Hugging
        Face `tokenizer.json`, or the directory of either; `checkpoint` for that of config.init.checkpoint. Prepared
        corpora have their own tokenizer.
      tokenizer_vocab_size: ids of a tokenizer trained on the corpus, special ids included.
      heldout_fraction: share of held-out documents, chosen by hash; training never sees them. Prepared corpora have
        their own split.
      cache_dir: cache of small corpora and examples, keyed by content; empty: `$XDG_CACHE_HOME/illada_jax`.
      length: tokens of a training window (L).
      batch_size: rows of the global batch (B).
      isolate_documents: make each document (fine-tuning: example) in a window a segment of its own.
      random_length_probability: probability that a batch or row (see `random_length_of`) is cut to a length drawn from
        1 … length and padded (LLaDA: 0.01 of the batches). The rest is skipped in that epoch. With
        sft.format = llada, rows keep their prompt and a random share of the padded answer. Then the model does not
        learn to infer an answer's length from the length of the row, and decodes on any canvas.
      random_length_of: `batch` (one length for all rows) or `row`.
      num_threads: threads that read ahead.
    """

    sources: tuple[str, ...] = ("python_docs",)
    weights: tuple[float, ...] = ()
    tokenizer: str = "sentencepiece"
    tokenizer_vocab_size: int = 4096
    heldout_fraction: float = 0.02
    cache_dir: str = ""
    length: int = 64
    batch_size: int = 8
    isolate_documents: bool = False
    random_length_probability: float = 0.0
    random_length_of: Literal["batch", "row"] = "batch"
    num_threads: int = 4

    def __post_init__(self):
        _positive("data", self, "length", "batch_size", "tokenizer_vocab_size", "num_threads")
        _unit_interval("data", self, "heldout_fraction", "random_length_probability")
        _require(self.heldout_fraction < 1, "data.heldout_fraction", self.heldout_fraction, "must lie in [0, 1)")
        _require(bool(self.sources), "data.sources", self.sources, "name at least one source")
        if self.weights:
            _require(len(self.weights) == len(self.sources), "data.weights", self.weights,
                     f"needs a weight for each of the {len(self.sources)} sources")
            _require(min(self.weights) > 0 and abs(sum(self.weights) - 1) < 1e-6, "data.weights", self.weights,
                     "must be greater than 0 and sum to 1")


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning (iLLaDA and LLaDA papers, supervised fine-tuning), see `illada_jax/data/finetuning.py`.

    Attributes:
      format: `none` is pre-training. `illada`: examples are concatenated and cut into windows of data.length, and
        everything may be masked. `llada`: one example per row; the prompt is never masked, the answer is padded with
        EOS to the longest row of the global batch, and the weights of each row sum to 1.
      mask_prompts: with `illada`, mask prompts too, as published; otherwise only answers and their end tokens.
      over_length: treatment of examples longer than data.length: `split` (into several windows or rows), `truncate`
        (the end is lost) or `drop`. All are counted and reported.
      bucket: with `llada`, row lengths are multiples of it, which bounds the number of compiled shapes.
      strict: raise an error for invalid, dropped or truncated examples, which are otherwise only reported.
    """

    format: Literal["none", "illada", "llada"] = "none"
    mask_prompts: bool = True
    over_length: Literal["split", "truncate", "drop"] = "split"
    bucket: int = 64
    strict: bool = False

    def __post_init__(self):
        _positive("sft", self, "bucket")


@dataclass(frozen=True)
class DiffusionConfig:
    """The corruption process and the objective (iLLaDA paper, objective).

    Attributes:
      time_sampling: `stratified` (times of a batch are spread evenly over [0, 1)) or `uniform` (independent).
      eps: the masking probability is p = (1 - eps)·t + eps.
      split_probability: probability that a window becomes two segments, cut at a random place (iLLaDA: 0.3).
      mask_id: id of MASK; -1 takes the tokenizer's.
    """

    time_sampling: Literal["stratified", "uniform"] = "stratified"
    eps: float = 1e-3
    split_probability: float = 0.0
    mask_id: int = -1

    def __post_init__(self):
        _require(0 <= self.eps < 1, "diffusion.eps", self.eps, "must lie in [0, 1)")
        _unit_interval("diffusion", self, "split_probability")
        _require(self.mask_id >= -1, "diffusion.mask_id", self.mask_id, "must be an id, or -1 for the tokenizer's")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule: warm-up, constant, decay.

    Attributes:
      name: `adamw`, or `muon` (Muon on the matrices of the layers, Adam on everything else).
      learning_rate: the constant rate after the warm-up.
      adam_learning_rate: with `muon`, the constant rate of the parameters that Adam updates.
      muon_momentum: Muon's momentum.
      warmup_steps: steps of the linear warm-up from 0.
      change_steps: steps at which the constant rate changes (LLaDA's piecewise schedule), ascending.
      changed_rates: the rates from those steps on.
      decay_start: step at which the decay starts; -1 lets it end at train.steps.
      decay_steps: steps of the decay; 0 never decays.
      decay_fraction: the decaying share of the run, instead of decay_steps (iLLaDA's fine-tuning: 0.1).
      decay_shape: `linear` or `cosine`.
      final_learning_rate: the rate at the end of the decay.
      b1: Adam's first decay rate.
      b2: Adam's second decay rate.
      eps: Adam's epsilon.
      weight_decay: decoupled weight decay of matrices (not of norms); with `muon` of those of the layers only.
      clip_norm: global norm that gradients are clipped to; 0 never clips.
      ema_decay: decay of a moving average of the params, which is saved, evaluated, and used by all who load the
        checkpoint; at step t the decay is at most (1 + t) / (10 + t). 0 keeps no average and costs nothing.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    adam_learning_rate: float = 1e-3
    muon_momentum: float = 0.95
    warmup_steps: int = 0
    change_steps: tuple[int, ...] = ()
    changed_rates: tuple[float, ...] = ()
    decay_start: int = -1
    decay_steps: int = 0
    decay_fraction: float = 0.0
    decay_shape: Literal["linear", "cosine"] = "linear"
    final_learning_rate: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.0

    def __post_init__(self):
        _positive("optimizer", self, "learning_rate", "adam_learning_rate", "eps")
        _not_negative("optimizer", self, "warmup_steps", "decay_steps", "final_learning_rate", "weight_decay",
                      "clip_norm")
        _unit_interval("optimizer", self, "b1", "b2", "muon_momentum", "decay_fraction")
        _require(0 <= self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "must lie in [0, 1)")
        _require(not (self.decay_fraction and self.decay_steps), "optimizer.decay_fraction", self.decay_fraction,
                 f"is given instead of optimizer.decay_steps = {self.decay_steps}: one of them must be 0")
        _require(self.decay_start >= -1, "optimizer.decay_start", self.decay_start, "must be a step, or -1")
        _require(len(self.change_steps) == len(self.changed_rates), "optimizer.changed_rates", self.changed_rates,
                 f"must give one rate for each of optimizer.change_steps = {self.change_steps}")
        _require(all(rate > 0 for rate in self.changed_rates), "optimizer.changed_rates", self.changed_rates,
                 "must be greater than 0")
        last = (self.learning_rate, *self.changed_rates)[-1]
        _require(self.final_learning_rate <= last, "optimizer.final_learning_rate", self.final_learning_rate,
                 f"must not exceed the rate before the decay, {last}")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Attributes:
      steps: optimizer steps of the whole run; 0 if `epochs` is given.
      epochs: for fine-tuning: passes over the examples, which determine the steps; 0 if `steps` is given.
      stop_step: save and stop at this step without changing the schedule; 0 runs to the end.
      microbatches: gradient accumulation: number of parts in which the global batch is computed.
      compiler_options: options of the TPU compiler for the step, as `NAME=VALUE`; ignored on other platforms.
      logits_chunk: positions per row whose logits exist at the same time in the loss; 0: the whole row.
      log_every: steps between lines of metrics.
      plateau_window: steps over which the slope of the loss is reported, see `training/plateau.py`; 0: no report.
      plateau_tolerance: the loss counts as flat if it falls by less than this fraction over the window.
      tensorboard: write TensorBoard events into the workdir.
      watchdog_seconds: a process in which no step ends for this long prints its stacks and exits with code 75, to be
        restarted; start-up, evaluations and checkpoints may take ten times as long; 0 disables the watchdog.
    """

    steps: int = 1000
    epochs: int = 0
    stop_step: int = 0
    microbatches: int = 1
    compiler_options: tuple[str, ...] = ()
    logits_chunk: int = 0
    log_every: int = 50
    plateau_window: int = 10_000
    plateau_tolerance: float = 0.005
    tensorboard: bool = True
    watchdog_seconds: float = 600.0

    def __post_init__(self):
        _positive("train", self, "microbatches", "log_every", "plateau_tolerance")
        for option in self.compiler_options:
            _require("=" in option, "train.compiler_options", option, "must have the form NAME=VALUE")
        _not_negative("train", self, "steps", "epochs", "stop_step", "logits_chunk", "plateau_window",
                      "watchdog_seconds")
        _require(self.steps > 0 or self.epochs > 0, "train.steps", self.steps,
                 "must be greater than 0, or train.epochs must be")
        _require(self.plateau_window == 0 or self.plateau_window >= 20 * self.log_every, "train.plateau_window",
                 self.plateau_window, f"must be at least 20 × train.log_every = {20 * self.log_every}, or 0")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. One of them may be -1: all remaining devices.

    Attributes:
      data: data parallelism with replicated params.
      fsdp: data parallelism with sharded params and optimizer state.
      tensor: tensor parallelism within a layer.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self):
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            _require(size >= 1 or size == -1, f"mesh.{name}", size, "must be 1 or more, or -1 for what remains")
        _require(list(sizes.values()).count(-1) <= 1, "mesh", sizes, "only one axis may be -1")


@dataclass(frozen=True)
class CheckpointConfig:
    """The schedule of checkpoints, and their retention.

    Attributes:
      every: steps between checkpoints; the last step is always saved.
      keep: number of the newest checkpoints to keep.
      keep_best: also keep the checkpoint with the lowest eval/bits_per_byte.
    """

    every: int = 1000
    keep: int = 2
    keep_best: bool = True

    def __post_init__(self):
        _positive("checkpoint", self, "every", "keep")


@dataclass(frozen=True)
class FaultConfig:
    """Handling of bad steps, see `illada_jax/training/faults.py`.

    A step is bad if its loss or gradient norm is not finite, or its cross-entropy exceeds the limit. Its update is
    never applied. Steps are checked at every line of metrics (train.log_every) and before every save.

    Attributes:
      action: `halt` stops with an error that says what to type. `skip` continues without the update. `rollback`
        restores the newest scheduled checkpoint (every checkpoint.every steps) after which a step was good, and
        continues with the step after the bad one.
      max_cross_entropy: limit of the mean cross-entropy of a step's masked tokens, in nats; 0 accepts every finite
        value. At the start of a run it is about log(vocab_size).
      rate_scale: factor of the learning rate after each rollback.
      max_times: skipped steps and rollbacks allowed in a run; one more halts it.
    """

    action: Literal["halt", "skip", "rollback"] = "halt"
    max_cross_entropy: float = 0.0
    rate_scale: float = 1.0
    max_times: int = 10

    def __post_init__(self):
        _not_negative("faults", self, "max_cross_entropy", "max_times")
        _require(0 < self.rate_scale <= 1, "faults.rate_scale", self.rate_scale, "must lie in (0, 1]")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training, see `illada_jax/evaluation/evaluators.py`.

    Attributes:
      every: steps between evaluations; the last step is always evaluated.
      every_epochs: epochs between evaluations, if train.epochs sets the number of steps; 0 leaves it to `every`.
      evaluators: names of the evaluators that run at every evaluation.
      final: names of the evaluators that run once after the last step, for the final report.
      batch_size: rows per evaluation batch.
      windows: held-out windows for the bound; 0 takes all.
      draws: random masks per held-out window.
      rows: number of held-out examples (exact_match, infill) or texts (samples) to decode.
      gaps: gaps per held-out passage in `infill`.
      gap_length: tokens per gap.
      prompts: prompts of `samples`, which take turns; an empty string is the empty prompt.
      separator: splits a held-out document for `exact_match`: the prompt ends with it, the rest is the answer. Unused
        for fine-tuning examples.
      answer_metric: metric of `exact_match`, see `illada_jax/evaluation/answer_metrics.py`: `exact`, `numeric` (the
        last number) or `package.module:function`, called as function(prompt, answer, reference).
    """

    every: int = 1000
    every_epochs: float = 0.0
    evaluators: tuple[str, ...] = ("bits_per_byte",)
    final: tuple[str, ...] = ()
    batch_size: int = 32
    windows: int = 0
    draws: int = 1
    rows: int = 3
    gaps: int = 3
    gap_length: int = 3
    prompts: tuple[str, ...] = ("",)
    separator: str = "="
    answer_metric: str = "exact"

    def __post_init__(self):
        _positive("eval", self, "every", "batch_size", "draws", "rows", "gaps", "gap_length")
        _not_negative("eval", self, "windows", "every_epochs")
        _require(bool(self.prompts), "eval.prompts", self.prompts, "give at least one, which may be empty")
        _require(bool(self.separator), "eval.separator", self.separator, "must not be empty")


@dataclass(frozen=True)
class DecodeConfig:
    """The sampler (iLLaDA paper, generation; LLaDA paper, appendix on inference). Frozen and hashable.

    Attributes:
      max_new_tokens: budget of new tokens; the last block may be shorter.
      over_budget: if prompt and budget exceed the context: `cut` the budget to whole blocks that fit, with a warning,
        or `error`.
      length: `variable` (iLLaDA: blocks are appended until EOS) or `fixed` (LLaDA: all masks are there from the start).
      block_length: tokens of a block.
      steps_per_block: steps per block with reveal = schedule; block_length writes one token per step.
      reveal: number of positions that a step reveals: `schedule`, `threshold`, `factor` or `entropy_bound`.
      threshold: of the reveal strategy of that name, in (0, 1].
      factor: of the reveal strategy of that name.
      entropy_bound: of the reveal strategy of that name, in nats.
      confidence: order in which positions are revealed: by `low_confidence`, `margin`, `entropy` or `random`.
      temperature: of the Gumbel noise on the logits; 0 is greedy.
      top_p: nucleus sampling: sample from the most probable tokens with at least this total probability; 1 is off.
      cfg_scale: classifier-free guidance w: logits_u + (w + 1)·(logits_c - logits_u); 0 is none.
      suppressed_ids: ids that are never written, besides MASK and ids beyond the tokenizer.
      stop_ids: ids that end an answer, besides EOS.
      logits_eos_inf: EOS is never written (LLaDA's option of that name).
      confidence_eos_eot_inf: EOS and EoT are the last to be written (LLaDA's option of that name). As in LLaDA's public
        code, at a temperature above 0 this holds for EoT only.
      eot_id: id of EoT (end of turn); -1 where there is none.
      end_of_thinking_boost: push towards `</think>` (iLLaDA), see `decoding/thinking.py`; 0 is off. The paper uses 100.
      end_of_thinking_power: 3 in the paper, 1 for HumanEval.
      end_of_thinking_ids: ids of the end-of-thinking string; empty takes the tokenizer's for `</think>`.
      cache: keys and values kept within a block: `none` (exact), `prefix` (of all columns that hold tokens), `dual` (of
        all columns outside of the block, masks included). Approximations, as of the last refresh.
      cache_refresh: steps between refreshes of the cache within a block; 0 refreshes at its start only.
      batch_size: rows decoded at the same time; results do not depend on it.
      seed: seed of the sampler; row i draws from fold_in(seed, i).
    """

    max_new_tokens: int = 128
    over_budget: Literal["cut", "error"] = "cut"
    length: Literal["variable", "fixed"] = "variable"
    block_length: int = 32
    steps_per_block: int = 32
    reveal: str = "schedule"
    threshold: float = 0.9
    factor: float = 1.0
    entropy_bound: float = 0.1
    confidence: str = "low_confidence"
    temperature: float = 0.0
    top_p: float = 1.0
    cfg_scale: float = 0.0
    suppressed_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    eot_id: int = -1
    end_of_thinking_boost: float = 0.0
    end_of_thinking_power: float = 3.0
    end_of_thinking_ids: tuple[int, ...] = ()
    cache: Literal["none", "prefix", "dual"] = "none"
    cache_refresh: int = 0
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self):
        _positive("decode", self, "max_new_tokens", "block_length", "steps_per_block", "factor", "batch_size")
        _not_negative("decode", self, "temperature", "entropy_bound", "cfg_scale", "end_of_thinking_boost",
                      "end_of_thinking_power", "cache_refresh", "seed")
        for name in ("temperature", "cfg_scale", "end_of_thinking_boost", "end_of_thinking_power"):
            _require(math.isfinite(getattr(self, name)), f"decode.{name}", getattr(self, name), "must be finite")
        _require(self.seed < 2**32, "decode.seed", self.seed, "must be less than 2**32")
        _require(self.eot_id >= -1, "decode.eot_id", self.eot_id, "must be an id, or -1 where there is none")
        _require(self.steps_per_block <= self.block_length, "decode.steps_per_block", self.steps_per_block,
                 f"must not exceed decode.block_length = {self.block_length}: a step reveals at least one token")
        _require(0 < self.threshold <= 1, "decode.threshold", self.threshold, "must lie in (0, 1]")
        _require(0 < self.top_p <= 1, "decode.top_p", self.top_p, "must lie in (0, 1]")
        _require(self.length != "fixed" or self.max_new_tokens % self.block_length == 0, "decode.block_length",
                 self.block_length, f"must divide a fixed length (decode.max_new_tokens = {self.max_new_tokens})")


@dataclass(frozen=True)
class InitConfig:
    """The initial parameters of a run.

    Attributes:
      checkpoint: a workdir, one checkpoint in it, a Hugging Face directory or a Hub id, whose params (not optimizer or
        step) the run starts from; empty for random params.
    """

    checkpoint: str = ""


@dataclass(frozen=True)
class Config:
    """A whole experiment; each section has a class of its own.

    Attributes:
      seed: seed of all randomness in training: parameters, order of the data, times, masks.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    init: InitConfig = field(default_factory=InitConfig)
    seed: int = 0

    def __post_init__(self):
        _require(self.seed >= 0, "seed", self.seed, "must be 0 or more")
        _require(self.data.length <= self.model.max_length, "data.length", self.data.length,
                 f"must not exceed model.max_length = {self.model.max_length}")
        _require(self.data.batch_size % self.train.microbatches == 0, "train.microbatches", self.train.microbatches,
                 f"must divide data.batch_size = {self.data.batch_size}")
        chunk = self.train.logits_chunk
        _require(chunk == 0 or self.data.length % chunk == 0, "train.logits_chunk", chunk,
                 f"must divide data.length = {self.data.length}, or be 0")
        _require(chunk == 0 or self.sft.format != "llada" or self.sft.bucket % chunk == 0, "train.logits_chunk", chunk,
                 f"must divide sft.bucket = {self.sft.bucket}, or be 0")
        _require(not self.train.epochs or self.sft.format != "none", "train.epochs", self.train.epochs,
                 "is for fine-tuning (sft.format); otherwise give train.steps")
        _require(not self.eval.every_epochs or self.train.epochs > 0, "eval.every_epochs", self.eval.every_epochs,
                 "needs train.epochs")
        _require(self.data.tokenizer != "checkpoint" or bool(self.init.checkpoint), "data.tokenizer", "checkpoint",
                 "needs init.checkpoint")
        if self.train.steps:  # otherwise the number of examples decides
            self._check_schedule()
        if self.model.vocab_size:
            _require(self.diffusion.mask_id < self.model.vocab_size, "diffusion.mask_id", self.diffusion.mask_id,
                     f"lies outside the vocabulary (model.vocab_size = {self.model.vocab_size})")

    def _check_schedule(self) -> None:
        _require(self.train.stop_step <= self.train.steps, "train.stop_step", self.train.stop_step,
                 f"must not exceed train.steps = {self.train.steps}")
        _require(self.optimizer.warmup_steps <= self.decay_start, "optimizer.warmup_steps", self.optimizer.warmup_steps,
                 f"must not exceed the step at which the decay starts, {self.decay_start}")
        changes = (self.optimizer.warmup_steps, *self.optimizer.change_steps, self.decay_start)
        _require(list(changes) == sorted(changes), "optimizer.change_steps", self.optimizer.change_steps,
                 f"must ascend from the end of the warm-up, {changes[0]}, to the start of the decay, {changes[-1]}")

    @property
    def decay_steps(self) -> int:
        """Steps of the decay; 0 if the rate never decays."""
        return self.optimizer.decay_steps or round(self.optimizer.decay_fraction * self.train.steps)

    @property
    def decay_start(self) -> int:
        """Step at which the learning rate starts to decay; train.steps if it never does."""
        if self.optimizer.decay_start >= 0:
            return self.optimizer.decay_start
        return self.train.steps - self.decay_steps


def defaults() -> ml_collections.ConfigDict:
    """Default experiment as a ConfigDict, for experiment files to change and return."""
    return ml_collections.ConfigDict(to_dict(Config())).lock()


def to_dict(config: Any) -> dict[str, Any]:
    """Config, or a section, as plain dicts. Tuples stay tuples; JSON makes lists of them, and `from_dict` tuples."""
    return dataclasses.asdict(config)


def override(section: Any, key: str, changes: dict[str, Any]) -> Any:
    """Section with some fields changed and checked. `key` names it in error messages.

    >>> override(DecodeConfig(), "decode", {"temperature": 0.5}).temperature
    0.5
    >>> override(DecodeConfig(), "decode", {"temperature": -1.0})
    Traceback (most recent call last):
    illada_jax.errors.ConfigError: config.decode.temperature = -1.0: must be 0 or more
    """
    return _build(type(section), {**to_dict(section), **changes}, f"{key}.")


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
    """Typed, validated config. Raises ConfigError with the key, its value and what is allowed."""
    return from_dict(config.to_dict())


def from_dict(values: dict[str, Any]) -> Config:
    """Like `from_config_dict`, from plain dicts, as read from JSON, with exactly the known keys."""
    return _build(Config, values, "")


def from_saved(values: dict[str, Any]) -> Config:
    """Like `from_dict` for the config of a saved run: fields added since then take their defaults."""
    _require(isinstance(values, dict), "", values, "must be an object with the sections of a config")
    complete = to_dict(Config())
    for key, value in values.items():
        both = isinstance(complete.get(key), dict) and isinstance(value, dict)
        complete[key] = {**complete[key], **value} if both else value
    return from_dict(complete)


# Fields that do not affect the parameters of a model, only the computation.
_COMPUTE_FIELDS = ("dtype", "remat", "attention", "attention_block_q", "attention_block_kv",
                   "attention_block_kv_compute", "scan_unroll", "init_std", "max_length")

# Fields that may differ on resume: how far, where or how observably a run goes, or a schedule still to come.
RESUMABLE = (
    "train.steps", "train.epochs", "train.stop_step", "train.log_every", "train.plateau_window",
    "train.plateau_tolerance", "train.tensorboard", "train.watchdog_seconds", "train.microbatches",
    "train.compiler_options", "train.logits_chunk", "mesh", "checkpoint",
    "faults", "eval", "decode", "data.cache_dir", "data.num_threads", "model.remat", "model.attention",
    "model.attention_block_q", "model.attention_block_kv", "model.attention_block_kv_compute", "model.scan_unroll",
    "optimizer.decay_start", "optimizer.decay_steps", "optimizer.decay_fraction", "optimizer.decay_shape",
    "optimizer.final_learning_rate",
)


def architecture(model: ModelConfig) -> dict[str, Any]:
    """Fields of the model on which its parameters depend, by name."""
    return {name: value for name, value in to_dict(model).items() if name not in _COMPUTE_FIELDS}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Differences between two nested dicts, as lines `key: old → new`."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} → {after!r}")
    return lines


def check_resumable(old: Config, new: Config, step: int, allowed: tuple[str, ...] = ()) -> None:
    """Checks that a run made with `old`, now at `step`, may continue with `new`.

    Args:
      old: the config in the workdir.
      new: the requested config.
      step: steps taken.
      allowed: further keys (sections or fields) that may differ.

    Raises:
      ConfigError: listing every difference that is not allowed.
    """
    may_differ = RESUMABLE + allowed
    refused = [
        line for line in differences(to_dict(old), to_dict(new))
        if not any(line.startswith((f"{name}:", f"{name}.")) for name in may_differ)
    ]
    if refused:
        raise ConfigError(f"the workdir belongs to another config: {'; '.join(refused)} (use another workdir, or "
                          f"--allow_config_change=KEY)")
    starts = old.decay_start, new.decay_start
    if starts[0] != starts[1] and min(starts) < step:
        raise ConfigError(f"config.optimizer.decay_start: {starts[0]} → {starts[1]}: the run is at step {step}, where "
                          "the learning rate has already begun to decay or should have")


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            shown = key if str(key).isprintable() else repr(key)
            raise ConfigError(f"config.{prefix}{shown}: unknown key; known here: {', '.join(names)}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name in names:
        if name not in values:
            raise ConfigError(f"config.{prefix}{name}: missing; start from illada_jax.config.defaults()")
        arguments[name] = _convert(hints[name], values[name], f"{prefix}{name}")
    return cls(**arguments)


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"config.{key} = {value!r}: must be a section with keys of its own")
        return _build(hint, value, f"{key}.")
    if origin is Literal:
        choices = typing.get_args(hint)
        _require(value in choices, key, value, f"must be one of {', '.join(map(repr, choices))}")
        return value
    if origin is tuple:
        item = typing.get_args(hint)[0]
        _require(isinstance(value, (tuple, list)), key, value, f"must be a tuple of {item.__name__}")
        return tuple(_convert(item, v, f"{key}[{i}]") for i, v in enumerate(value))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and is_number:
        # What holds for them also has to hold in float32.
        _require(math.isfinite(value) and abs(value) < _FLOAT32_MAX, key, value, "must be a finite float32")
        return float(value)
    if hint is int and is_number:
        _require(abs(value) < 2**53, key, value, "must be less than 2**53")
    _require(isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), key, value,
             f"must be of type {hint.__name__}")
    return value
