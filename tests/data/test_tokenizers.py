import json

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from illada_jax.data.preparing.settings import given_tokenizer
from illada_jax.data.tokenizers import (
    ByteTokenizer,
    load_tokenizer,
    lost_text,
    tokenizer_from_files,
    train_sentencepiece,
)
from illada_jax.errors import ConfigError, InputError
from tests.data import toy_tokenizers

CORPUS = ["The quick brown fox jumps over the lazy dog.\n\n    def f(x):\n\treturn x  # two  blanks\r\n" * 5,
          "Größe, 漢字, 🙂 and <[MASK]> or [MASK] </s>\n" * 5, "no newline at the end"]
TRAPS = [
    "", " ", "  ", "\n", "\n\n", "\t \t", " leading", "trailing ", "a  b   c", "\x00", "\x00a\x00", "\u2581",
    " \u2581 x\u2581", "\u2585 ⁇", "\ufeffbom", "\ufffd", "e\u0301 é ﬁ ½", "🙂\u200d🙂", "\r\n\r",
    "<mask><s></s><pad><unk>", "[MASK] <|endoftext|>", "<bos>", "<0x41>", "  \n  \n",
]


def byte_level_json() -> bytes:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=["<s>", "</s>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<[MASK]>"])  # as an ordinary added token, which the library would match in text
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def all_tokenizers():
    return {
        "bytes": ByteTokenizer(),
        "sentencepiece": train_sentencepiece(CORPUS, 320),
        "huggingface": tokenizer_from_files({"tokenizer.json": byte_level_json()}),
    }


KINDS = pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "huggingface"])


def check_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert set(ids).isdisjoint(tokenizer.special_ids.values())
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@KINDS
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\u2581 \n\t\x00<>|[]maskMASK/s")))
@settings(max_examples=150, deadline=None)
@example(text=CORPUS[1])
def test_text_survives(all_tokenizers, kind, text):
    check_round_trip(all_tokenizers[kind], text)


@KINDS
@pytest.mark.parametrize("text", TRAPS)
def test_traps_survive(all_tokenizers, kind, text):
    check_round_trip(all_tokenizers[kind], text)


@KINDS
def test_special_ids_are_distinct_and_yield_no_text(all_tokenizers, kind):
    tokenizer = all_tokenizers[kind]
    special_ids = list(tokenizer.special_ids.values())
    assert len(set(special_ids)) == 4
    ids = tokenizer.encode("one ")
    assert tokenizer.decode([*special_ids, *ids, *special_ids]) == "one "
    assert len({tokenizer.id_to_piece(i) for i in special_ids}) == 4


@KINDS
def test_any_ids_decode_and_have_a_piece(all_tokenizers, kind):
    tokenizer = all_tokenizers[kind]
    assert isinstance(tokenizer.decode(range(tokenizer.vocab_size)), str)
    assert all(isinstance(tokenizer.id_to_piece(i), str) for i in range(tokenizer.vocab_size))


@KINDS
def test_saved_files_load_as_the_same_tokenizer(all_tokenizers, kind, tmp_path):
    tokenizer = all_tokenizers[kind]
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.special_ids == tokenizer.special_ids
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode(CORPUS[1]) == tokenizer.encode(CORPUS[1])


def test_training_is_deterministic_and_depends_on_the_text():
    first, second = train_sentencepiece(CORPUS, 320), train_sentencepiece(iter(CORPUS), 320)
    assert first.files() == second.files()
    assert train_sentencepiece(CORPUS[:1], 320).fingerprint != first.fingerprint


def test_trained_pieces_are_longer_than_bytes():
    text = "the lazy dog jumps over the quick brown fox"
    assert len(train_sentencepiece(CORPUS, 400).encode(text)) < len(text) / 2


def test_a_long_line_is_learnt_from():
    tokenizer = train_sentencepiece(["abcdefgh" * 10_000 + "stuvwxyz" * 10_000], 340)
    assert len(tokenizer.encode("abcdefgh" * 8)) <= 16 and len(tokenizer.encode("stuvwxyz" * 8)) <= 16


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_to_train_on(texts):
    with pytest.raises(InputError, match="SentencePiece could not be trained"):
        train_sentencepiece(texts, 300)


def test_vocabulary_too_small_for_bytes():
    with pytest.raises(ConfigError, match=r"tokenizer_vocab_size = 100: must be at least 261"):
        train_sentencepiece(CORPUS, 100)


def test_foreign_sentencepiece_model_is_made_lossless(tmp_path):
    import sentencepiece

    (tmp_path / "text.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "foreign"), vocab_size=320, byte_fallback=True,
        minloglevel=2, model_type="bpe", hard_vocab_limit=False, normalization_rule_name="nmt_nfkc")
    tokenizer = load_tokenizer(tmp_path / "foreign.model")
    for text in [*TRAPS, *CORPUS]:
        check_round_trip(tokenizer, text)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.vocab_size == max(tokenizer.pad_id, tokenizer.mask_id) + 1


def test_hugging_face_ids_come_from_names_config_or_the_end():
    content = byte_level_json()
    table = tokenizers.Tokenizer.from_str(content.decode())
    by_name = tokenizer_from_files({"tokenizer.json": content})
    assert by_name.mask_id == table.token_to_id("<[MASK]>")
    assert (by_name.bos_id, by_name.eos_id) == (table.token_to_id("<s>"), table.token_to_id("</s>"))
    assert by_name.pad_id == table.get_vocab_size()
    config = json.dumps({"eos_token": {"content": "<|im_end|>"}}).encode()
    by_config = tokenizer_from_files({"tokenizer.json": content, "tokenizer_config.json": config})
    assert by_config.eos_id == table.token_to_id("<|im_end|>")
    chosen = tokenizer_from_files({"tokenizer.json": content, "special_ids.json": json.dumps(
        {"mask": 7, "eos": 1, "bos": 0, "pad": 2}).encode()})
    assert chosen.mask_id == 7


def test_names_of_added_tokens_in_text_are_encoded_as_ordinary_text():
    content = byte_level_json()
    plain = tokenizers.Tokenizer.from_str(json.dumps({**json.loads(content), "added_tokens": []}))
    text = "The <[MASK]> quick</s> brown<|im_end|>"
    assert tokenizer_from_files({"tokenizer.json": content}).encode(text) == plain.encode(text).ids


def test_pieces_of_the_plain_vocabulary_are_not_matched_as_special():
    vocab = {c: i for i, c in enumerate("[MASK] helo")} | {"[MASK]": 11, "hello": 12}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(
        [(piece, -1.0 if len(piece) > 1 else -9.0) for piece in vocab], unk_id=0))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["[MASK]"])
    ours = tokenizer_from_files({"tokenizer.json": tokenizer.to_str().encode()})
    ids = ours.encode("hello [MASK] hello")
    assert ours.mask_id == 11 and 11 not in ids and 12 in ids
    assert ours.decode(ids) == "hello [MASK] hello"


def test_lossy_tokenizer_is_refused_for_preparing(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "[UNK]": 1}, merges=[], unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"tokenizer .*/tokenizer\.json: not lossless"):
        given_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("make", [toy_tokenizers.byte_level, toy_tokenizers.llama, toy_tokenizers.unigram])
def test_settings_of_a_run_are_not_obeyed(make):
    """They cut, pad or draw. The saved file stays as it was found: its hash identifies the tokenizer."""
    table = make()
    text = "the cat is the cat " * 50
    want = table.encode(text, add_special_tokens=False).ids
    table.enable_truncation(16)
    table.enable_padding(length=64)
    description = json.loads(table.to_str())
    if "dropout" in description["model"]:
        description["model"]["dropout"] = 0.9
    files = {"tokenizer.json": json.dumps(description).encode()}
    tokenizer = tokenizer_from_files(files)
    assert tokenizer.encode(text) == want and tokenizer.decode(want) == text
    assert len(tokenizer.encode("the")) < 4
    assert tokenizer.files()["tokenizer.json"] == files["tokenizer.json"]


def lowercase():
    tokenizer = toy_tokenizers.byte_level()
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    return tokenizer


def collapses_white_space():
    tokenizer = toy_tokenizers.llama()
    tokenizer.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex(" +"), toy_tokenizers.BLANK)
    return tokenizer


def without_byte_fallback():
    tokenizer = toy_tokenizers.llama()
    tokenizer.model = tokenizers.models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>")
    return tokenizer


def loses_long_words():
    tokenizer = toy_tokenizers.byte_level()
    pattern = tokenizers.Regex(".{500,}")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(pattern, "removed"), tokenizer.pre_tokenizer])
    return tokenizer


LOSSY = (toy_tokenizers.word_piece, lowercase, collapses_white_space, without_byte_fallback, loses_long_words)


@pytest.mark.parametrize("make", LOSSY)
def test_what_cannot_hold_every_text_is_refused_for_preparing(make, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(toy_tokenizers.files_of(make())["tokenizer.json"])
    with pytest.raises(InputError, match=r"tokenizer .*/tokenizer\.json: not lossless: ") as caught:
        given_tokenizer(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", toy_tokenizers.KINDS)
def test_what_holds_every_text_is_not_refused(kind):
    assert lost_text(toy_tokenizers.ours(kind)) == ""


def test_word_piece_continues_a_text():
    """Lossy, but usable: the blanks between words are kept where an answer begins."""
    tokenizer = tokenizer_from_files(toy_tokenizers.files_of(toy_tokenizers.word_piece()))
    ids = tokenizer.encode("the cats.")
    assert tokenizer.decode(ids) == toy_tokenizers.word_piece().decode(ids)
    assert tokenizer.decode(ids[:1]) + tokenizer.decode(ids[1:], after=ids[:1]) == tokenizer.decode(ids)


def test_a_sentencepiece_model_by_its_name_in_hugging_face_directories(tmp_path):
    trained = train_sentencepiece(CORPUS, 320)
    (tmp_path / "tokenizer.model").write_bytes(trained.files()["sentencepiece.model"])
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(CORPUS[1]) == trained.encode(CORPUS[1])
    loaded.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == loaded.fingerprint
    (tmp_path / "tokenizer.json").write_bytes(byte_level_json())  # takes precedence there
    assert type(load_tokenizer(tmp_path)) is not type(loaded)


@KINDS
def test_lossless_tokenizers_are_accepted_for_preparing(all_tokenizers, kind, tmp_path):
    all_tokenizers[kind].save(tmp_path)
    assert given_tokenizer(str(tmp_path)).fingerprint == all_tokenizers[kind].fingerprint


@pytest.mark.parametrize(("name", "content", "message"), [
    ("missing.model", None, "No such file"),
    ("broken.model", b"\x00\x01nonsense", "not a SentencePiece model"),
    ("tokenizer.json", b"{", "not a tokenizer.json"),
    ("tokenizer.json", b'{"model": 3}', "not a tokenizer.json"),
])
def test_broken_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_directory_without_tokenizer(tmp_path):
    with pytest.raises(InputError, match="no tokenizer among"):
        load_tokenizer(tmp_path)
