"""Configurations: frozen, typed, validated.

An experiment is a file with `get_config()` that starts from `defaults()`, changes some fields and returns a locked
`ConfigDict`; flags may override it (`--config.train.steps=10`). `from_config_dict` converts it to the dataclasses below
once, and no other module sees a ConfigDict. A test checks that every field is used.

The file is long because every field of every section is documented and checked here, and nowhere else.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import ml_collections

from illada_jax.errors import ConfigError

_FLOAT32_MAX = 3.4e38
MAX_SIZE = 2**24  # of a model: a larger one is a mistake, and would overflow the sizes of arrays


class Rule(NamedTuple):
    """A condition on a value, and its wording in error messages."""

    allowed: str
    holds: Callable[[Any], bool]


_POSITIVE = Rule("must be greater than 0", lambda x: x > 0)
_NON_NEGATIVE = Rule("must be 0 or more", lambda x: x >= 0)
_AT_MOST_MAX_SIZE = Rule(f"must be at most {MAX_SIZE:,}", lambda x: x <= MAX_SIZE)
_NOT_EMPTY = Rule("must not be empty", bool)

PositiveInt = Annotated[int, _POSITIVE]
Size = Annotated[int, _POSITIVE, _AT_MOST_MAX_SIZE]
SizeOr0 = Annotated[int, _NON_NEGATIVE, _AT_MOST_MAX_SIZE]
PositiveFloat = Annotated[float, _POSITIVE]
NonNegativeInt = Annotated[int, _NON_NEGATIVE]
NonNegativeFloat = Annotated[float, _NON_NEGATIVE]
VocabSize = Annotated[int, _NON_NEGATIVE, Rule("must be at most 2**31", lambda x: x <= 2**31)]
IntOrMinus1 = Annotated[int, Rule("must be 0 or more, or -1", lambda x: x >= -1)]
AxisSize = Annotated[int, Rule("must be 1 or more, or -1 for all remaining devices", lambda x: x >= 1 or x == -1)]
MultipleOf128 = Annotated[int, Rule("must be a multiple of 128", lambda x: x > 0 and x % 128 == 0)]
NonEmptyTexts = Annotated[tuple[str, ...], _NOT_EMPTY]
Fraction = Annotated[float, Rule("must lie in [0, 1]", lambda x: 0 <= x <= 1)]
FractionBelow1 = Annotated[float, Rule("must lie in [0, 1)", lambda x: 0 <= x < 1)]
FractionAbove0 = Annotated[float, Rule("must lie in (0, 1]", lambda x: 0 < x <= 1)]


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"config.{key} = {value!r}: {allowed}")


class Section:
    """Base of the sections, which checks the rules of the fields. The section `train` is the class TrainConfig."""

    def __post_init__(self):
        for each in dataclasses.fields(self):
            for rule in getattr(each.type, "__metadata__", ()):
                self.require(each.name, rule.holds(getattr(self, each.name)), rule.allowed)

    def require(self, name: str, condition: bool, allowed: str, suggested: Any = None) -> None:
        """Raises a ConfigError that names the field and what is `allowed`, unless `condition` is True.

        `suggested` is a value that would be valid beside the other fields.
        """
        key = f"{type(self).__name__.removesuffix('Config').lower()}.{name}".lstrip(".")
        suffix = "" if suggested is None else f"; for example --config.{key}={suggested}"
        _require(condition, key, getattr(self, name), allowed + suffix)


@dataclass(frozen=True)
class ModelConfig(Section):
    """The transformer (iLLaDA paper, architecture table)."""

    vocab_size: VocabSize = 0  # rows of the embedding; 0 uses the size of the tokenizer
    d_model: Size = 128  # width of the residual stream (D)
    num_layers: Size = 4  # number of blocks
    num_heads: Size = 4  # query heads (N)
    num_kv_heads: Size = 2  # key/value heads (K); divides num_heads. Equal to it: MHA; fewer: GQA.
    head_dim: SizeOr0 = 0  # width of a head (H), even; 0 is d_model / num_heads
    d_ff: Size = 384  # width of the SwiGLU feed-forward (F)
    max_length: Size = 256  # the context length: the longest sequence to train on or decode, in tokens
    rope_theta: PositiveFloat = 500_000.0  # base of the rotary frequencies
    norm_eps: PositiveFloat = 1e-6  # epsilon of RMSNorm
    tied_head: bool = True  # the LM head is the transposed embedding
    # Standard deviation of initial projections; residual outputs are scaled by 1/sqrt(2·num_layers). 0 means
    # sqrt(2 / (5·D)), which gives the published 0.00988 at D = 4096.
    init_std: NonNegativeFloat = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of activations; params are float32 in training
    # Values that the backward pass recomputes: `none` (none), `dots` (all but the results of matrix products and
    # attention), `projections` (also the feed-forward), `attention` (all but attention), `full` (every layer).
    remat: Literal["none", "dots", "projections", "attention", "full"] = "none"
    # Back end, see `model/attention.py`; `auto` selects `splash` on TPU, `cudnn` on GPU, else `xla`. `splash_interpret`
    # runs the TPU kernel in an interpreter, on any platform, slowly.
    attention: Literal["auto", "xla", "cudnn", "splash", "splash_interpret"] = "auto"
    attention_block_q: MultipleOf128 = 1024  # most queries per block of the TPU kernel; a block divides the length
    attention_block_kv: MultipleOf128 = 2048  # keys per block that are loaded into on-chip memory
    attention_block_kv_compute: MultipleOf128 = 512  # keys per block that are computed at once
    scan_unroll: NonNegativeInt = 1  # layers per iteration of the scan over layers; 0: all of them

    def __post_init__(self):
        super().__post_init__()
        even = 2 * self.num_heads  # so that the width of a head, if it follows, is even
        self.require("d_model", self.d_model % self.num_heads == 0,
                     f"must be divisible by model.num_heads = {self.num_heads}", max(1, self.d_model // even) * even)
        if self.head_dim == 0:  # resolved here, once, so that all code and all records have the number
            object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        self.require("num_kv_heads", self.num_heads % self.num_kv_heads == 0,
                     f"must divide model.num_heads = {self.num_heads}", math.gcd(self.num_heads, self.num_kv_heads))
        self.require("head_dim", self.head_dim % 2 == 0, "must be even (rotary pairs)")
        self.require("attention_block_kv_compute", self.attention_block_kv_compute <= self.attention_block_kv,
                     f"must not exceed model.attention_block_kv = {self.attention_block_kv}")
        self.require("scan_unroll", self.scan_unroll == 0 or self.num_layers % self.scan_unroll == 0,
                     f"must divide model.num_layers = {self.num_layers}, or be 0 (all layers)", 0)


@dataclass(frozen=True)
class DataConfig(Section):
    """Text and how it becomes batches."""

    # Sources of the text, `KIND` or `KIND:PATH`; the package `illada_jax/data/sources` has the kinds. `prepared:DIR` is
    # a corpus prepared with `python -m illada_jax.prepare`. For fine-tuning: `chat:PATH` (`experiments/README.md` lists
    # the forms of a record) or `tasks:NAME:COUNT`.
    sources: NonEmptyTexts = ("python_docs",)
    # Shares of the rows for several prepared corpora, in the order of `sources`, with sum 1; empty: in proportion to
    # their tokens.
    weights: tuple[float, ...] = ()
    # `bytes`, `sentencepiece` (trained on the corpus), the path of a SentencePiece `.model` or a Hugging Face
    # `tokenizer.json`, or the directory of either; `checkpoint` for that of config.init.checkpoint. Prepared corpora
    # have their own tokenizer.
    tokenizer: str = "sentencepiece"
    tokenizer_vocab_size: PositiveInt = 4096  # ids of a tokenizer trained on the corpus, special ids included
    # Share of held-out documents, chosen by hash; training never sees them. Prepared corpora have their own split.
    heldout_fraction: FractionBelow1 = 0.02
    # The longest document or record of a source. A longer document of `jsonl` or `parquet` is an error, a longer record
    # of `chat` is left out; `text` is cut into short documents anyway.
    max_document_megabytes: PositiveFloat = 16.0
    cache_dir: str = ""  # of small corpora and examples, keyed by content; empty: `$XDG_CACHE_HOME/illada_jax`
    length: PositiveInt = 64  # tokens of a training window (L)
    batch_size: PositiveInt = 8  # rows of the global batch (B)
    isolate_documents: bool = False  # each document (or example) in a window is its own segment
    # Probability that a batch or row (see `random_length_of`) is cut to a length drawn from 1 … length and padded
    # (LLaDA: 0.01 of the batches). The rest is skipped in that epoch. With sft.format = llada, rows keep their prompt
    # and a random share of the padded answer. Then the model does not learn to infer an answer's length from the length
    # of the row, and decodes on any canvas.
    random_length_probability: Fraction = 0.0
    random_length_of: Literal["batch", "row"] = "batch"  # `batch` (one length for all rows) or `row`
    num_threads: PositiveInt = 4  # threads that read ahead

    def __post_init__(self):
        super().__post_init__()
        if self.weights:
            self.require("weights", len(self.weights) == len(self.sources),
                         f"needs a weight for each of the {len(self.sources)} sources")
            self.require("weights", min(self.weights) > 0 and abs(sum(self.weights) - 1) < 1e-6,
                         "must be greater than 0 and sum to 1")

    @property
    def max_document_bytes(self) -> int:
        """`max_document_megabytes` in bytes, at least 1."""
        return max(int(self.max_document_megabytes * 2**20), 1)


@dataclass(frozen=True)
class SftConfig(Section):
    """Supervised fine-tuning (iLLaDA and LLaDA papers, supervised fine-tuning), see `illada_jax/data/finetuning.py`."""

    # `none` is pre-training. `illada`: examples are concatenated and cut into windows of data.length, and everything
    # may be masked. `llada`: one example per row; the prompt is never masked, the answer is padded with EOS to the
    # longest row of the global batch, and the weights of each row sum to 1.
    format: Literal["none", "illada", "llada"] = "none"
    chat_template: str = ""  # name of one of the tokenizer's chat templates, where it has several
    mask_prompts: bool = True  # with `illada`, mask prompts too, as published; else only answers and end tokens
    # Treatment of examples longer than data.length: `split` (into several windows or rows), `truncate` (the end is
    # lost) or `drop`. All are counted and reported.
    over_length: Literal["split", "truncate", "drop"] = "split"
    bucket: PositiveInt = 64  # with `llada`, row lengths are multiples of it, which bounds the compiled shapes
    strict: bool = False  # raise an error for invalid, dropped or truncated examples instead of reporting them


@dataclass(frozen=True)
class DiffusionConfig(Section):
    """The corruption process and the objective (iLLaDA paper, objective)."""

    time_sampling: Literal["stratified", "uniform"] = "stratified"  # spread evenly over [0, 1), or independent
    eps: FractionBelow1 = 1e-3  # the masking probability is p = (1 - eps)·t + eps
    split_probability: Fraction = 0.0  # probability that a window is cut at random into two segments (iLLaDA: 0.3)
    mask_id: IntOrMinus1 = -1  # id of MASK; -1 takes the tokenizer's


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule: warm-up, constant, decay."""

    name: Literal["adamw", "muon"] = "adamw"  # `muon`: Muon on the matrices of the layers, NAdam on the rest
    learning_rate: PositiveFloat = 1e-3  # the constant rate after the warm-up
    adam_learning_rate: PositiveFloat = 1e-3  # with `muon`, the constant rate of the parameters that NAdam updates
    muon_momentum: Fraction = 0.95
    warmup_steps: NonNegativeInt = 0  # steps of the linear warm-up from 0
    change_steps: tuple[int, ...] = ()  # steps at which the constant rate changes (LLaDA's schedule), ascending
    changed_rates: tuple[float, ...] = ()  # the rates from those steps on
    decay_start: IntOrMinus1 = -1  # step at which the decay starts; -1 lets it end at train.steps
    decay_steps: NonNegativeInt = 0  # steps of the decay; 0 never decays
    decay_fraction: Fraction = 0.0  # the decaying share of the run, instead of decay_steps (iLLaDA's fine-tuning: 0.1)
    decay_shape: Literal["linear", "cosine"] = "linear"
    final_learning_rate: NonNegativeFloat = 0.0  # the rate at the end of the decay
    b1: Fraction = 0.9  # Adam's first decay rate
    b2: Fraction = 0.95  # Adam's second decay rate
    eps: PositiveFloat = 1e-8  # Adam's epsilon
    weight_decay: NonNegativeFloat = 0.1  # decoupled, of matrices (not norms); with `muon` of those of the layers only
    clip_norm: NonNegativeFloat = 1.0  # global norm that gradients are clipped to; 0 never clips
    # Decay of a moving average of the params, which is saved, evaluated, and preferred when a checkpoint is loaded; at
    # step t the decay is at most (1 + t) / (10 + t). 0 keeps no average and costs nothing.
    ema_decay: FractionBelow1 = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.require("decay_fraction", not (self.decay_fraction and self.decay_steps),
                     f"is given instead of optimizer.decay_steps = {self.decay_steps}: one of them must be 0", 0)
        self.require("changed_rates", len(self.change_steps) == len(self.changed_rates),
                     f"must give one rate for each of optimizer.change_steps = {self.change_steps}")
        self.require("changed_rates", all(rate > 0 for rate in self.changed_rates), "must be greater than 0")
        last = (self.learning_rate, *self.changed_rates)[-1]
        self.require("final_learning_rate", self.final_learning_rate <= last,
                     f"must not exceed the rate before the decay, {last}", f"{last / 10:g}")


@dataclass(frozen=True)
class TrainConfig(Section):
    """The training loop."""

    # Optimizer steps of the whole run; 0 if `epochs` is given. On the command line either one replaces the other. A run
    # that is too short for the warm-up and decay of `optimizer` scales them down and says so.
    steps: NonNegativeInt = 1000
    epochs: NonNegativeInt = 0  # for fine-tuning: passes over the examples, which determine the steps, if not 0
    stop_step: NonNegativeInt = 0  # save and stop at this step without changing the schedule; 0 runs to the end
    microbatches: PositiveInt = 1  # gradient accumulation: number of parts in which the global batch is computed
    compiler_options: tuple[str, ...] = ()  # for the step, on TPUs only, as `NAME=VALUE`
    logits_chunk: NonNegativeInt = 0  # positions per row whose logits exist at once in the loss; 0: the whole row
    log_every: PositiveInt = 50  # steps between lines of metrics
    plateau_window: NonNegativeInt = 10_000  # steps of the loss slope's report (`training/plateau.py`); 0: no report
    plateau_tolerance: PositiveFloat = 0.005  # the loss is flat if it falls by less than this fraction over the window
    tensorboard: bool = True  # write TensorBoard events into the workdir
    wandb: bool = False  # copy them to Weights & Biases, which its environment variables configure (WANDB_PROJECT, …)
    # A process in which no step ends for this long prints its stacks and exits with code 75, to be restarted; start-up,
    # evaluations and checkpoints may take ten times as long; 0 disables the watchdog.
    watchdog_seconds: NonNegativeFloat = 600.0

    def __post_init__(self):
        super().__post_init__()
        self.require("compiler_options", all("=" in option for option in self.compiler_options),
                     "each must have the form NAME=VALUE")
        self.require("wandb", self.tensorboard or not self.wandb, "needs train.tensorboard")
        self.require("steps", self.steps > 0 or self.epochs > 0, "must be greater than 0, or train.epochs must be")
        self.require("plateau_window", self.plateau_window == 0 or self.plateau_window >= 20 * self.log_every,
                     f"must be at least 20 × train.log_every = {20 * self.log_every}, or 0", 20 * self.log_every)


@dataclass(frozen=True)
class MeshConfig(Section):
    """Sizes of the mesh axes. One of them may be -1: all remaining devices."""

    data: AxisSize = 1  # data parallelism with replicated params
    fsdp: AxisSize = -1  # data parallelism with sharded params and optimizer state
    tensor: AxisSize = 1  # tensor parallelism within a layer

    def __post_init__(self):
        super().__post_init__()
        _require([self.data, self.fsdp, self.tensor].count(-1) <= 1, "mesh", to_dict(self), "only one axis may be -1")


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """The schedule of checkpoints, and their retention."""

    every: PositiveInt = 1000  # steps between checkpoints; the last step is always saved
    keep: PositiveInt = 2  # number of the newest checkpoints to keep
    keep_best: bool = True  # also keep the checkpoint with the lowest eval/bits_per_byte


@dataclass(frozen=True)
class FaultsConfig(Section):
    """Handling of bad steps, see `illada_jax/training/faults.py`.

    A step is bad if its loss or gradient norm is not finite, or its cross-entropy exceeds the limit. Its update is
    never applied. Steps are checked at every line of metrics (train.log_every) and before every save.
    """

    # `halt` stops with an error that says how to continue. `skip` continues without the update. `rollback` restores the
    # newest scheduled checkpoint (every checkpoint.every steps) after which a step was good, and continues with the
    # step after the bad one.
    action: Literal["halt", "skip", "rollback"] = "halt"
    # Limit of the mean cross-entropy of a step's masked tokens, in nats; 0 accepts every finite value. At the start of
    # a run it is about log(vocab_size).
    max_cross_entropy: NonNegativeFloat = 0.0
    rate_scale: FractionAbove0 = 1.0  # factor of the learning rate after each rollback
    max_times: NonNegativeInt = 10  # skipped steps and rollbacks of a run; one more halts it


@dataclass(frozen=True)
class EvalConfig(Section):
    """Evaluation during training, see `illada_jax/evaluation/evaluators.py`."""

    every: PositiveInt = 1000  # steps between evaluations; the last step is always evaluated
    every_epochs: NonNegativeFloat = 0.0  # with train.epochs: epochs between evaluations; 0 uses `every`
    evaluators: tuple[str, ...] = ("bits_per_byte",)  # names of the evaluators that run at every evaluation
    final: tuple[str, ...] = ()  # names of the evaluators that run once after the last step, for the final report
    batch_size: PositiveInt = 32  # rows per evaluation batch
    windows: NonNegativeInt = 0  # held-out windows for the bound; 0 takes all
    draws: PositiveInt = 1  # random masks per held-out window
    rows: PositiveInt = 3  # number of held-out examples (exact_match, infill) or texts (samples) to decode
    gaps: PositiveInt = 3  # gaps per held-out passage in `infill`
    gap_length: PositiveInt = 3  # tokens per gap
    prompts: NonEmptyTexts = ("",)  # prompts of `samples`, which take turns; an empty string is the empty prompt
    # Splits a held-out document for `exact_match`: the prompt ends with it, the rest is the answer. Unused for
    # fine-tuning examples.
    separator: Annotated[str, _NOT_EMPTY] = "="
    # Metric of `exact_match`, see `illada_jax/evaluation/answer_metrics.py`: `exact`, `numeric` (the last number) or
    # `package.module:function`, called as function(prompt, answer, reference).
    answer_metric: str = "exact"


@dataclass(frozen=True)
class DecodeConfig(Section):
    """The sampler (iLLaDA paper, generation; LLaDA paper, appendix on inference). Frozen and hashable."""

    max_new_tokens: PositiveInt = 128  # budget of new tokens; the last block may be shorter
    # If prompt and budget exceed the context: `cut` the budget to whole blocks that fit, with a warning, or `error`.
    over_budget: Literal["cut", "error"] = "cut"
    length: Literal["variable", "fixed"] = "variable"  # append blocks until EOS (iLLaDA), or mask all at first (LLaDA)
    block_length: PositiveInt = 32  # tokens of a block
    steps_per_block: PositiveInt = 32  # steps per block with reveal = schedule; block_length writes one token per step
    reveal: str = "schedule"  # positions per step: by `schedule`, `threshold`, `factor` or `entropy_bound`
    threshold: FractionAbove0 = 0.9  # with reveal = threshold: confidence from which positions are revealed
    factor: PositiveFloat = 1.0  # with reveal = factor: its bound on (n + 1)·(1 - confidence)
    entropy_bound: NonNegativeFloat = 0.1  # with reveal = entropy_bound: its bound on the sum of entropies, in nats
    confidence: str = "low_confidence"  # order of positions: `low_confidence`, `margin`, `entropy` or `random`
    temperature: NonNegativeFloat = 0.0  # sampling temperature; 0 is greedy
    top_k: NonNegativeInt = 0  # number of the most probable tokens to sample from; 0 is off
    top_p: FractionAbove0 = 1.0  # nucleus sampling, after top_k: total probability of the tokens to sample from; 1: off
    cfg_scale: NonNegativeFloat = 0.0  # classifier-free guidance w: logits_u + (w + 1)·(logits_c - logits_u); 0 is none
    suppressed_ids: tuple[int, ...] = ()  # ids that are never written, besides MASK and ids beyond the tokenizer
    stop_ids: tuple[int, ...] = ()  # ids that end an answer, besides EOS
    logits_eos_inf: bool = False  # EOS is never written (LLaDA's option of that name)
    # EOS and EoT are the last to be written (LLaDA's option of that name). As in LLaDA's public code, at a temperature
    # above 0 this holds for EoT only.
    confidence_eos_eot_inf: bool = False
    eot_id: IntOrMinus1 = -1  # id of EoT (end of turn); -1 if there is none
    end_of_thinking_boost: NonNegativeFloat = 0.0  # push towards `</think>` (`decoding/thinking.py`); iLLaDA: 100
    end_of_thinking_power: NonNegativeFloat = 3.0  # 3 in the paper, 1 for HumanEval
    end_of_thinking_ids: tuple[int, ...] = ()  # empty takes the tokenizer's for `</think>`
    # Cached keys and values: `none` (exact); within a block `prefix` (of all columns that hold tokens) or `dual` (of
    # all columns outside the block, masks included); for good `append` (of the prompt and of finished blocks, each
    # computed once; with a fixed length, too, nothing behind the block exists yet). Cached values are approximate:
    # those of the last refresh.
    cache: Literal["none", "prefix", "dual", "append"] = "none"
    # Steps between refreshes of the cache within a block; 0: at its start only. With `append`: blocks; 0: never.
    cache_refresh: NonNegativeInt = 0
    batch_size: PositiveInt = 8  # rows decoded at the same time; results do not depend on it
    seed: NonNegativeInt = 0  # seed of the sampler; row i draws from fold_in(seed, i)

    def __post_init__(self):
        super().__post_init__()
        self.require("seed", self.seed < 2**32, "must be less than 2**32")
        self.require("steps_per_block", self.steps_per_block <= self.block_length,
                     f"must not exceed decode.block_length = {self.block_length}: a step reveals at least one token; "
                     f"set it to {self.block_length} or less")


@dataclass(frozen=True)
class InitConfig(Section):
    """The initial parameters of a run."""

    # A workdir, one checkpoint in it, a Hugging Face directory or a Hub id, whose params (not optimizer or step) the
    # run starts from; empty for random params.
    checkpoint: str = ""


@dataclass(frozen=True)
class Config(Section):
    """A whole experiment; each section has its own class."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    init: InitConfig = field(default_factory=InitConfig)
    seed: NonNegativeInt = 0  # seed of all randomness in training: parameters, order of the data, times, masks

    def __post_init__(self):
        super().__post_init__()
        chunk = self.train.logits_chunk
        common = math.gcd(self.data.length, chunk, self.sft.bucket if self.sft.format == "llada" else 0)
        self.data.require("length", self.data.length <= self.model.max_length,
                          f"must not exceed model.max_length = {self.model.max_length}; for example "
                          f"--config.model.max_length={self.data.length}")
        self.data.require("tokenizer", self.data.tokenizer != "checkpoint" or bool(self.init.checkpoint),
                          "needs init.checkpoint")
        self.data.require("tokenizer", self.data.tokenizer != "checkpoint" or self.sft.format != "none",
                          "for fine-tuning only (sft.format); a corpus is prepared with its own tokenizer")
        self.train.require("microbatches", self.data.batch_size % self.train.microbatches == 0,
                           f"must divide data.batch_size = {self.data.batch_size}",
                           math.gcd(self.data.batch_size, self.train.microbatches))
        self.train.require("logits_chunk", chunk == 0 or self.data.length % chunk == 0,
                           f"must divide data.length = {self.data.length}, or be 0", common)
        self.train.require("logits_chunk", chunk == 0 or self.sft.format != "llada" or self.sft.bucket % chunk == 0,
                           f"must divide sft.bucket = {self.sft.bucket}, or be 0", common)
        self.train.require("epochs", not self.train.epochs or self.sft.format != "none",
                           "is for fine-tuning (sft.format); otherwise give train.steps, for example "
                           "--config.train.epochs=0 --config.train.steps=1000")
        self.eval.require("every_epochs", not self.eval.every_epochs or self.train.epochs > 0, "needs train.epochs", 0)
        if self.train.steps:  # otherwise the number of examples decides
            self._check_schedule()
        if self.model.vocab_size:
            self.diffusion.require("mask_id", self.diffusion.mask_id < self.model.vocab_size,
                                   f"is outside the vocabulary (model.vocab_size = {self.model.vocab_size})")

    def _check_schedule(self) -> None:
        self.train.require("stop_step", self.train.stop_step <= self.train.steps,
                           f"must not exceed train.steps = {self.train.steps}", 0)
        warmup, changes, decay = self.warmup_steps, self.change_steps, self.decay_start
        self.optimizer.require("warmup_steps", warmup <= decay,
                               f"must not exceed the step at which the decay starts, {decay}", decay)
        self.optimizer.require("change_steps", sorted([warmup, *changes, decay]) == [warmup, *changes, decay],
                               f"must ascend from the end of the warm-up, {warmup}, to the start of the decay, {decay}")

    @property
    def schedule_scale(self) -> float:
        """Factor of the schedule's steps: 1, or less if they do not fit into train.steps."""
        c, steps = self.optimizer, self.train.steps
        given = max(c.warmup_steps, *c.change_steps, 0) + c.decay_steps
        available = steps - round(c.decay_fraction * steps)
        return available / given if c.decay_start < 0 and given > available else 1.0

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up, scaled to the run."""
        return int(self.schedule_scale * self.optimizer.warmup_steps)

    @property
    def change_steps(self) -> tuple[int, ...]:
        """Steps at which the constant rate changes, scaled to the run."""
        return tuple(int(self.schedule_scale * step) for step in self.optimizer.change_steps)

    @property
    def decay_steps(self) -> int:
        """Steps of the decay, scaled to the run; 0 if the rate never decays."""
        scaled = int(self.schedule_scale * self.optimizer.decay_steps)
        return scaled or round(self.optimizer.decay_fraction * self.train.steps)

    @property
    def decay_start(self) -> int:
        """Step at which the learning rate starts to decay; train.steps if it never does."""
        if self.optimizer.decay_start >= 0:
            return self.optimizer.decay_start
        return self.train.steps - self.decay_steps


class UnknownKeyError(ConfigError, AttributeError, KeyError):
    """A key that no config has. A ConfigDict must raise the other two types."""

    __str__ = Exception.__str__


def _unknown_key(key: str, known: Iterable[str]) -> UnknownKeyError:
    """The error for a key such as `train.step`, with the nearest key, or else those `known` in its section."""
    sections = {name: fields for name, fields in to_dict(Config()).items() if isinstance(fields, dict)}
    everything = [*sections, "seed", *(f"{name}.{each}" for name, fields in sections.items() for each in fields)]
    key = key[:100]
    section, _, field = key.rpartition(".")
    if section in ("score", "lm_eval"):  # of scorers and evaluations, not of a config
        everything = [f"{section}.{each}" for each in known]
    near = [name for name in everything if name.endswith("." + field)]
    near = near or difflib.get_close_matches(key, everything, n=1, cutoff=0.75)
    hint = f"did you mean config.{near[0]}?" if near else f"known here: {', '.join(known)}"
    return UnknownKeyError(f"config.{key if key.isprintable() else repr(key)}: unknown key; {hint}")


class Experiment(ml_collections.ConfigDict):
    """A config for experiment files to change. Errors name the full key, the value and the nearest key."""

    _section = ""  # with a dot at its end

    def __getitem__(self, key: str) -> Any:
        """The value of a field. Raises UnknownKeyError."""
        if "." not in key and key not in self:
            raise _unknown_key(self._section + key, self.keys())
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        """Sets a field. Raises UnknownKeyError, or ConfigError for a value of another type."""
        if self.is_locked and key not in self:
            raise _unknown_key(self._section + key, self.keys())
        try:
            super().__setitem__(key, value)
        except TypeError as error:
            kind = self.get_type(key)
            allowed = "a section with its own keys" if kind is Experiment else f"of type {kind.__name__}"
            raise ConfigError(f"config.{self._section}{key} = {value!r}: must be {allowed}") from error
        if isinstance(self[key], Experiment):
            object.__setattr__(self[key], "_section", f"{key}.")


def defaults() -> Experiment:
    """Default experiment, a ConfigDict for experiment files to change and return."""
    experiment = Experiment()
    for name, value in to_dict(Config()).items():
        experiment[name] = Experiment(value) if isinstance(value, dict) else value
    experiment.model.head_dim = 0  # follows from what the file and the command line give
    return experiment.lock()


def to_dict(config: Any) -> dict[str, Any]:
    """Config, or a section, as plain dicts. Tuples stay tuples; `from_dict` also accepts the lists of JSON."""
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


# Fields of the model that only select how it is computed, and all fields on which no param's shape depends.
_KERNEL_FIELDS = ("remat", "attention", "attention_block_q", "attention_block_kv", "attention_block_kv_compute",
                  "scan_unroll")
_COMPUTE_FIELDS = (*_KERNEL_FIELDS, "dtype", "init_std", "max_length")

# Sections and fields that may differ on resume: length, devices, reports and outputs of a run, and its future decay.
RESUMABLE = (
    "train", "mesh", "checkpoint", "faults", "eval", "decode", "data.cache_dir", "data.num_threads",
    *(f"model.{name}" for name in _KERNEL_FIELDS), "optimizer.decay_start", "optimizer.decay_steps",
    "optimizer.decay_fraction", "optimizer.decay_shape", "optimizer.final_learning_rate",
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
    may_differ = tuple(f"{name}{end}" for name in RESUMABLE + allowed for end in ":.")
    refused = [line for line in differences(to_dict(old), to_dict(new)) if not line.startswith(may_differ)]
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
            raise _unknown_key(f"{prefix}{key}", names)
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
        _require(isinstance(value, dict), key, value, "must be a section with its own keys")
        return _build(hint, value, f"{key}.")
    if origin is Literal:
        choices = typing.get_args(hint)
        _require(value in choices, key, value, f"must be one of {', '.join(map(repr, choices))}")
        return value
    if origin is tuple:
        item = typing.get_args(hint)[0]
        _require(isinstance(value, (tuple, list)), key, value, f"must be a tuple of {item.__name__}")
        return tuple(_convert(item, v, f"{key}[{i}]") for i, v in enumerate(value))
    accepted = (int, float) if hint is float else hint
    _require(isinstance(value, accepted) and isinstance(value, bool) == (hint is bool), key, value,
             f"must be of type {hint.__name__}")
    if hint is int:
        _require(abs(value) < 2**53, key, value, "must be less than 2**53")
    if hint is float:
        # The rules of a field must hold in float32, too.
        _require(abs(value) < _FLOAT32_MAX, key, value, "must be a finite float32")
        return float(value)
    return value
