"""Checkpoints to import: the goldens, with a tokenizer added."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from illada_jax.config import ModelConfig
from illada_jax.model import make_logits_fn

GOLDENS = pathlib.Path(__file__).parent.parent / "fixtures" / "checkpoints"
CASES = ("illada-gqa-tied", "illada-mha-untied", "llada-mha-untied", "llada-gqa-tied")
SPECIALS = {"illada": ("<s>", "<pad>", "</s>", "<unk>", "<0>", "<[MASK]>"),
            "llada": ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|eot_id|>")}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"


def tokenizer_json(family: str) -> str:
    """A byte-level tokenizer: iLLaDA's special tokens come first, with MASK as 5; LLaDA's come last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = list(SPECIALS[family])
    pieces = specials + alphabet if family == "illada" else alphabet + specials
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in specials])
    return tokenizer.to_str()


def checkpoint(directory: pathlib.Path, case: str, **config) -> pathlib.Path:
    """A modifiable copy of a golden, with a tokenizer; keywords change config.json (... removes a key)."""
    target = directory / case
    shutil.copytree(GOLDENS / case, target)
    (target / "tokenizer.json").write_text(tokenizer_json(case.partition("-")[0]))
    names = {"chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (target / "tokenizer_config.json").write_text(json.dumps(names))
    values = json.loads((target / "config.json").read_text())
    values = {key: value for key, value in {**values, **config}.items() if value is not ...}
    (target / "config.json").write_text(json.dumps(values))
    return target


@jax.jit
def all_logits(logits_fn, tokens_BL, segments_BL):
    positions_BL = jax.lax.broadcasted_iota(jnp.int32, tokens_BL.shape, 1)
    return logits_fn(tokens_BL, positions_BL, segments_BL, positions_BL, None)[0]


def run(config: ModelConfig, params, tokens_BL, real_BL) -> np.ndarray:
    """Logits of all positions, padding hidden from the others."""
    return np.asarray(all_logits(make_logits_fn(config, params), jnp.asarray(tokens_BL, jnp.int32),
                                 jnp.asarray(real_BL, jnp.int32)))


def golden(case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens_BL, real_BL, logits_BLV by PyTorch)."""
    content = np.load(GOLDENS / "logits.npz")
    return content["tokens"], content["real"], content[case]
