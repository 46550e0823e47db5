"""Compression of a run's held-out text by gzip, xz and a 5-gram model of the same tokens.

    python experiments/benchmarks/compressors.py --checkpoint=workdirs/demo

In bits per byte of the original text, seconds on one core. The 5-gram model (Witten-Bell interpolation of orders 5 to
0; Chen and Goodman, 1998) is trained on the run's training tokens and begins anew in each document, as the network's
bound does. xz compresses the held-out text alone, and after the training text, which its window holds.
"""

import collections
import gzip
import lzma
import math
from collections.abc import Iterable, Iterator

from absl import flags

from illada_jax import cli
from illada_jax.data.corpus import open_corpus
from illada_jax.data.shards import TokenStream
from illada_jax.errors import InputError
from illada_jax.interop import open_model

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "the workdir of a pre-training run", required=True)
ORDER = flags.DEFINE_integer("order", 5, "order of the n-gram model", lower_bound=1)


class NGrams:
    """P(token | context) = (count + kinds · P(token | shorter context)) / (count of the context + kinds)."""

    def __init__(self, order: int, vocab_size: int):
        self._order = order
        self._vocab_size = vocab_size
        self._counts: dict[tuple[int, ...], collections.Counter[int]] = collections.defaultdict(collections.Counter)

    def learn(self, tokens: list[int]) -> None:
        """Counts the n-grams of a document."""
        for at, token in enumerate(tokens):
            for length in range(min(self._order, at + 1)):
                self._counts[tuple(tokens[at - length : at])][token] += 1

    def bits(self, tokens: list[int]) -> float:
        """-log2 of the probability of a document."""
        return -sum(math.log2(self._probability(tuple(tokens[max(0, at - self._order + 1) : at]), token))
                    for at, token in enumerate(tokens))

    def _probability(self, context: tuple[int, ...], token: int) -> float:
        probability = 1 / self._vocab_size
        for length in range(len(context) + 1):
            seen = self._counts.get(context[len(context) - length :])
            if seen:
                probability = (seen[token] + len(seen) * probability) / (seen.total() + len(seen))
        return probability


def documents(tokens: TokenStream) -> Iterator[list[int]]:
    """The ids of each document, its EOS included."""
    return (tokens.document(index).tolist() for index in range(tokens.num_documents))


def text_of(tokenizer, all_ids: Iterable[list[int]]) -> bytes:
    """Documents as UTF-8 text, with a newline between them."""
    return "\n".join(tokenizer.decode(ids) for ids in all_ids).encode()


def main(argv: list[str]) -> None:
    """Prints a table."""
    del argv
    config = open_model(CHECKPOINT.value).config
    if config.sft.format != "none":
        raise InputError(f"--checkpoint={CHECKPOINT.value}: is a fine-tuned model; give a pre-training run")
    corpus = open_corpus(config.data)
    train, heldout = list(documents(corpus.train)), list(documents(corpus.heldout))
    before, text = text_of(corpus.tokenizer, train), text_of(corpus.tokenizer, heldout)
    model = NGrams(ORDER.value, corpus.tokenizer.vocab_size)
    for ids in train:
        model.learn(ids)
    bits = {
        "gzip -9": 8 * len(gzip.compress(text, 9)),
        "xz -9": 8 * len(lzma.compress(text, preset=9)),
        "xz -9 behind the training text": 8 * (len(lzma.compress(before + text, preset=9))
                                               - len(lzma.compress(before, preset=9))),
        f"{ORDER.value}-gram model of the tokens": sum(model.bits(ids) for ids in heldout),
    }
    print(f"{len(heldout)} documents, {len(text):,} bytes held out; {len(before):,} bytes to train on\n")
    print("| | bits per byte |\n|---|---|")
    for name, count in bits.items():
        print(f"| {name} | {count / len(text):.3f} |")


if __name__ == "__main__":
    cli.run(main)
