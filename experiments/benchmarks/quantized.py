"""Savings and cost of int8 weights on a trained model: bytes, bits per byte, task score, agreement of greedy tokens.

Examples:
  python experiments/benchmarks/quantized.py --checkpoint=workdirs/quickstart --rows=64
  python experiments/benchmarks/quantized.py --checkpoint=workdirs/sudoku --rows=256

Everything but the weights is equal: the masks of the bound, the prompts, greedy decoding of one token per step. The
score is exact match (documents with the separator of `config.eval`) or the share of gap tokens filled in exactly;
`agreement` is the share of equal tokens. Computes in float32, so that only the rounding of the matrices differs.
"""

import dataclasses
import math

import decode
import jax
import numpy as np
from absl import flags

from illada_jax import api, cli, model
from illada_jax.decoding import Decoder, SpecialIds
from illada_jax.errors import InputError
from illada_jax.evaluation.evaluators import EvaluatorContext, bits_per_byte
from illada_jax.parallel.mesh import make_mesh
from illada_jax.training.run import open_data

flags.adopt_module_key_flags(decode)


def num_bytes(path: str, dtype: str, quantize: str) -> int:
    """Bytes of a model's params, measured on the loaded arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(api.load(path, dtype, quantize=quantize).params))


def main(_: list[str]) -> None:
    """Prints the comparison."""
    path = decode.CHECKPOINT.value
    if not path:
        raise InputError("--checkpoint is required, for example --checkpoint=workdirs/quickstart")
    models = {name: api.load(path, quantize=name) for name in ("none", "int8")}
    lm = models["none"]
    sizes = [num_bytes(path, *arguments) for arguments in (("float32", "none"), ("bfloat16", "none"),
                                                           ("bfloat16", "int8"))]
    print("bytes: float32 {:,}, bfloat16 {:,}, bfloat16 with matrices in int8 {:,}".format(*sizes)
          + f" = {sizes[2] / sizes[1]:.3f} x bfloat16")
    config, corpus, batches = open_data(lm.config)
    bound = bits_per_byte(EvaluatorContext(config, corpus, batches, make_mesh(config.mesh)))
    prompts, score, infill = decode.held_out_task(lm, corpus)
    settings = dataclasses.replace(config.decode, temperature=0.0, reveal="schedule", confidence="low_confidence",
                                   steps_per_block=config.decode.block_length)
    bits, scores, written = {}, {}, {}
    for name, each in models.items():
        found = bound(each.params, 0)
        bits[name] = found["eval/bits_per_byte"]
        decoder = Decoder(each.logits_fn, settings, SpecialIds.of(lm.tokenizer), config.model.max_length,
                          model.make_init_cache(config.model))
        written[name] = (decoder.infill if infill else decoder.generate)(prompts)
        scores[name] = score(written[name])
        error = math.sqrt(scores[name] * (1 - scores[name]) / len(prompts))
        print(f"{'float32' if name == 'none' else name:8} {bits[name]:.4f} ± {found['eval/bits_per_byte_stderr']:.4f} "
              f"bits per byte, {'share of gap tokens' if infill else 'exact match'} {scores[name]:.4f} ± {error:.4f} "
              f"({len(prompts)} rows)")
    print(f"bits per byte {100 * (bits['int8'] / bits['none'] - 1):+.3f} %, score "
          f"{scores['int8'] - scores['none']:+.4f}, agreement of greedy tokens "
          f"{decode.agreement(written['int8'], written['none']):.4f} of "
          f"{sum(int(np.sum(np.array(r.reveal_step) >= 0)) for r in written['none'])}")


if __name__ == "__main__":
    cli.run(main)
