"""A small model that chats, trained from scratch on 2,535 conversations between people, in iLLaDA's format.

    pip install --no-deps chitchat-dataset && python experiments/chitchat.py
    python -m illada_jax.main --config=experiments/chitchat.py
    python -m illada_jax.generate --checkpoint=workdirs/chitchat --chat

The first command writes the conversations to chitchat.jsonl, each up to its first long turn. Measured: training takes 3
min 16 s on one core, and all held-out answers end by themselves (experiments/RESULTS.md).
"""

import json
import pathlib

import ml_collections

from illada_jax import config

DATA = pathlib.Path("chitchat.jsonl")
MOST_TURNS, MOST_CHARACTERS = 6, 80


def get_config() -> ml_collections.ConfigDict:
    """0.5 M parameters, 12 epochs: three to four minutes on one core."""
    c = config.defaults()
    c.data.sources = (f"chat:{DATA}",)
    c.data.tokenizer = "sentencepiece"
    c.data.tokenizer_vocab_size = 1024
    c.data.heldout_fraction = 0.01
    c.data.length = 64
    c.data.batch_size = 16
    c.sft.format = "illada"
    c.diffusion.split_probability = 0.3
    c.diffusion.eps = 0.1

    c.model.d_model = 96
    c.model.num_layers = 3
    c.model.num_heads = 4
    c.model.num_kv_heads = 4
    c.model.d_ff = 288
    c.model.max_length = 256
    c.model.rope_theta = 200.0
    c.model.scan_unroll = 0

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 0.005
    c.optimizer.adam_learning_rate = 0.01
    c.optimizer.b2 = 0.99
    c.optimizer.weight_decay = 0.0
    c.optimizer.warmup_steps = 50
    c.optimizer.decay_fraction = 0.3
    c.train.steps = 0
    c.train.epochs = 12
    c.checkpoint.every = 500

    # Short blocks and some temperature: small models repeat themselves when decoded greedily.
    c.decode.max_new_tokens = 32
    c.decode.block_length = 8
    c.decode.steps_per_block = 8
    c.decode.temperature = 0.5
    c.eval.every_epochs = 4.0
    c.eval.rows = 64
    c.eval.evaluators = ("bits_per_byte", "exact_match")
    return c


def conversations() -> list[dict]:
    """Conversations as messages, the first speaker as the user, each cut before its first long turn."""
    import chitchat_dataset

    records = []
    for turns in chitchat_dataset.ConversationDataset():
        messages = []
        for number, turn in enumerate(turns):
            text = " ".join(turn.split())
            if not 0 < len(text) <= MOST_CHARACTERS or number == MOST_TURNS:
                break
            messages.append({"role": "assistant" if number % 2 else "user", "content": text})
        messages = messages[: len(messages) // 2 * 2]
        if messages:
            records.append({"messages": messages})
    return records


if __name__ == "__main__":
    found = conversations()
    DATA.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found), encoding="utf-8")
    print(f"{len(found):,} conversations in {DATA}")
