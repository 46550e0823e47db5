"""SentencePiece models, made lossless, and their training."""
# ruff: noqa: D102

import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping

import sentencepiece

from illada_jax.data.tokenizers.tokenizer import Tokenizer
from illada_jax.errors import ConfigError, InputError

SENTENCEPIECE_FILE = "sentencepiece.model"
_SPACE = "\u2581"  # a space in SentencePiece pieces
_MASK_NAME = re.compile(r"[<\[|]*mask[>\]|]*", re.IGNORECASE)
# A serialised NormalizerSpec (field 3 of ModelProto); appended to a model, protobuf merges it over the model's own. Its
# content: name "identity", no character map, no dummy prefix, no white-space collapse, spaces escaped. SentencePiece's
# generated protobuf classes would be clearer, but conflict with the older protobuf that Apache Beam requires.
_LOSSLESS_NORMALIZER = b"\x1a\x12" + b"\x0a\x08identity" + b"\x12\x00" + b"\x18\x00" + b"\x20\x00" + b"\x28\x01"
_MIN_TRAINED_VOCAB_SIZE = 5 + 256
_MAX_TRAINING_CHUNK = 2048


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, made lossless.

    The model's own normalisation is replaced: text is not normalised, gets no dummy prefix and keeps its white space.
    SentencePiece cannot tell U+2581 from a space, so that character is encoded as its three bytes. Special ids that the
    model lacks are numbered after its vocabulary.
    """

    def __init__(self, model: bytes, special_ids: Mapping[str, int] | None = None):
        """Loads a serialised ModelProto.

        Raises:
          InputError: the model cannot be parsed or lacks byte fallback.
        """
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model + _LOSSLESS_NORMALIZER)
            num_pieces = processor.get_piece_size()
            self._bytes_of_id = [_bytes_of_piece(processor, i) for i in range(num_pieces)]
            byte_ids = {processor.id_to_piece(i): i for i in range(num_pieces) if processor.is_byte(i)}
        except (RuntimeError, ValueError) as error:  # ValueError: a piece is not UTF-8 or not a byte
            raise InputError("not a SentencePiece model") from error
        if not num_pieces:
            raise InputError("not a SentencePiece model: it has no pieces")
        self._model = model
        self._processor = processor
        if len(byte_ids) != 256:
            raise InputError("the SentencePiece model has no byte fallback, so it cannot encode every text")
        self._space_ids = [byte_ids[f"<0x{byte:02X}>"] for byte in _SPACE.encode()]
        special_ids = dict(special_ids or _special_ids_of_model(processor))
        super().__init__(max(num_pieces, 1 + max(special_ids.values())), special_ids)
        for token_id in special_ids.values():
            if token_id < num_pieces:
                self._bytes_of_id[token_id] = b""

    @property
    def special_tokens(self) -> dict[str, int]:
        pieces = range(self._processor.get_piece_size())
        controls = {self._processor.id_to_piece(i): i for i in pieces if self._processor.is_control(i)}
        return {**controls, **super().special_tokens}

    def encode(self, text: str) -> list[int]:
        if _SPACE not in text:
            return self._processor.encode(text)
        ids = self._processor.encode(text.split(_SPACE))
        return [i for n, part in enumerate(ids) for i in (self._space_ids + part if n else part)]

    def id_to_piece(self, token_id: int) -> str:
        if token_id in self.special_ids.values():
            return super().id_to_piece(token_id)
        return self._processor.id_to_piece(token_id)

    def vocabulary_files(self) -> dict[str, bytes]:
        return {SENTENCEPIECE_FILE: self._model, **self._special_ids_file("sentencepiece")}


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Trains a byte-pair SentencePiece model. The same texts give the same model, byte for byte.

    Args:
      texts: the training documents.
      vocab_size: number of ids, special ids and the 256 byte pieces included. A small corpus may yield fewer.

    Raises:
      InputError: vocab_size is too small, the texts are empty, or training fails.
    """
    if vocab_size < _MIN_TRAINED_VOCAB_SIZE:
        raise ConfigError(f"config.data.tokenizer_vocab_size = {vocab_size}: must be at least "
                          f"{_MIN_TRAINED_VOCAB_SIZE} (special ids and bytes)")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_chunks(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.9995,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * _MAX_TRAINING_CHUNK,
            num_threads=2,
            bos_id=0, pad_id=1, eos_id=2, unk_id=3,
            control_symbols=["<mask>"],
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition("] ")[2]  # without its source location
        raise InputError(f"SentencePiece could not be trained with {vocab_size} ids: {reason}") from error
    return SentencePieceTokenizer(model.getvalue(), {"bos": 0, "pad": 1, "eos": 2, "mask": 4})


def _bytes_of_piece(processor: sentencepiece.SentencePieceProcessor, token_id: int) -> bytes:
    piece = processor.id_to_piece(token_id)
    if processor.is_byte(token_id):
        return bytes([int(piece[3:-1], 16)])
    if processor.is_control(token_id) or processor.is_unknown(token_id):
        return b""
    return piece.replace(_SPACE, " ").encode()


def _special_ids_of_model(processor: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """The special ids that a model declares; those that it lacks are numbered after its vocabulary."""
    num_pieces = processor.get_piece_size()
    masks = [i for i in range(num_pieces) if processor.is_control(i) and _MASK_NAME.fullmatch(processor.id_to_piece(i))]
    ids = {"bos": processor.bos_id(), "pad": processor.pad_id(), "eos": processor.eos_id(), "mask": [-1, *masks][-1]}
    free = itertools.count(num_pieces)
    return {name: next(free) if token_id < 0 else token_id for name, token_id in ids.items()}


def _training_chunks(texts: Iterable[str]) -> Iterator[str]:
    """Cuts texts after blank lines and at a maximum length, since the trainer skips sentences that are too long."""
    for text in texts:
        for piece in text.split(_SPACE):
            for paragraph in re.findall(r"(?s:.+?)(?:\n\n+|\Z)", piece):
                for start in range(0, len(paragraph), _MAX_TRAINING_CHUNK):
                    yield paragraph[start : start + _MAX_TRAINING_CHUNK]
