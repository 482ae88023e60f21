from __future__ import annotations

import json
import pickle
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiktoken
import tokenizers

from nanofed.errors import ConfigError, DataError
from nanofed.tokenizer import storage
from nanofed.tokenizer.bpe import Tokenizer, load_tokenizer
from nanofed.tokenizer.training import train_tokenizer
from nanofed.tokenizer.vocabulary import SPECIAL_TOKENS, SPLIT_PATTERN, Vocabulary

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's what it does; it doesn't stop.",
    "hello world, hello tokenizer, hello hello hello\n\n    def f(x):\n\treturn x + 1\r\n",
    "Numbers like 12345 and 2024 beside naïve café, 你好世界, Привет мир, 🙂🙃 and ½²³.",
] * 8
NASTY = [
    "",
    " ",
    "a",
    "\n",
    "\x00\x01\x7f\x85\u00a0\u2028\u3000\ufeff\ufffd",
    " " * 1000 + "x" + "\t \n" * 300 + "\r\n\r\n   ",
    "0123456789" * 30 + " 1 12 123 1234 ١٢٣ Ⅷ ½",
    "I'LL I'll DON'T we'Ve '\u017f '' ' s",
    "🙂 \U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1e9\U0001f1ea e\u0301\u0327",
    "\u202eabc\u202c \ufdfd \U0001d573\U0001d58a\U0001d591 \U0010ffff \U000e0001",
    "你好世界。안녕하세요 สวัสดี नमस्ते שלום مرحبا",
    "<|bos|> text of <|user_start|> special <|endoftext|> tokens <|output_end|><|bos|>",
    "!!!???...---___###\n\n\n!!!\n$$$ ^^^ ~~~ ``` {{}} [[]] << >> \\n",
    "a" * 5000 + "é" * 700 + "!" * 3000,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS, vocab_size=400)


@pytest.fixture(scope="module")
def documents(shared_data: Path) -> list[str]:
    shards = sorted((shared_data / "cpp-docs").glob("*.parquet"))[:2]
    return [text for shard in shards for text in pq.read_table(shard, columns=["text"]).column(0).to_pylist()]


def hugging_face(folder: Path) -> Any:
    twin = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    twin.encode_special_tokens = True  # as ours does it: their texts are ordinary text
    return twin


def nanochat_pickle(folder: Path, source: Tokenizer, name: str = "rustbpe") -> Path:
    """Write what nanochat writes: a pickled tiktoken Encoding."""
    encoding = tiktoken.Encoding(
        name,
        pat_str=source.vocabulary.split_pattern,
        mergeable_ranks=source.vocabulary.ranks,
        special_tokens=source.special_tokens,
    )
    path = folder / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(encoding))
    return path


def test_ids_of_special_tokens_follow_the_others(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 400
    assert tokenizer.bos_token_id == 391
    assert tokenizer.special_tokens == {text: 391 + n for n, text in enumerate(SPECIAL_TOKENS)}
    assert tokenizer.decode([391, *tokenizer.encode("hello"), 399]) == "<|bos|>hello<|output_end|>"


@pytest.mark.parametrize("text", NASTY)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert max(ids, default=0) < tokenizer.bos_token_id  # "<|bos|>" in a text is text


def test_random_unicode_comes_back_and_has_the_ids_of_hugging_face(
    tokenizer: Tokenizer, tmp_path: Path, count: Callable[[int, int], int]
) -> None:
    tokenizer.save(tmp_path)
    twin = hugging_face(tmp_path)
    chance = random.Random(0)
    planes = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    for _ in range(count(300, 30_000)):
        text = "".join(chr(chance.randrange(*chance.choice(planes))) for _ in range(chance.randrange(60)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert twin.encode(text, add_special_tokens=False).ids == ids, ascii(text)


def test_every_character_is_split_as_hugging_face_splits_it(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    # Every pair of bytes is a token, so that an id tells whether a split fell between two bytes.
    singles = [bytes([byte]) for byte in range(256)]
    tokens = (*singles, *(left + right for left in singles for right in singles))
    every_pair = Tokenizer(Vocabulary(tokens, SPECIAL_TOKENS, SPLIT_PATTERN))
    every_pair.save(tmp_path)
    twin = hugging_face(tmp_path)
    for code in range(0, 0x110000, count(101, 1)):
        if not 0xD800 <= code < 0xE000:
            c = chr(code)
            text = f"a{c}b {c}{c}1{c}!{c} '{c}x\n{c} \n '{c}{c}e'l{c} "
            assert twin.encode(text, add_special_tokens=False).ids == every_pair.encode(text), hex(code)


@pytest.mark.parametrize("vocab_size", [1024, 16_384])
def test_real_text_has_the_ids_of_hugging_face(vocab_size: int, documents: list[str], tmp_path: Path) -> None:
    trained = train_tokenizer(documents, vocab_size=vocab_size)
    assert trained.vocab_size == vocab_size
    trained.save(tmp_path)
    loaded, twin = Tokenizer.load(tmp_path), hugging_face(tmp_path)
    assert twin.get_vocab_size() == vocab_size
    assert [twin.token_to_id(text) for text in SPECIAL_TOKENS] == list(range(vocab_size - 9, vocab_size))
    for text in [*documents[:100], *NASTY]:
        ids = loaded.encode(text)
        assert twin.encode(text, add_special_tokens=False).ids == ids == trained.encode(text)
        assert twin.decode(ids, skip_special_tokens=False) == text
    twin.encode_special_tokens = False  # how Hugging Face tools come: a prompt may name special tokens
    assert twin.encode("<|bos|>hello").ids == [loaded.bos_token_id, *loaded.encode("hello")]


def test_lone_surrogates_become_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert tokenizer.encode("\ud83d\ude42") == tokenizer.encode("\U0001f642")  # a pair is the character it stands for


def test_a_run_of_blanks_beyond_the_limit_of_the_regular_expressions(tokenizer: Tokenizer) -> None:
    for text in (" " * 1_200_000 + "end", "x" + "\u3000 " * 700_000, "start" + " " * 400_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_pattern_that_fails_on_a_text_is_a_data_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="split pattern fails on a text of 1,200,000"):
        tokenizer._encode_piece(" " * 1_200_000)
    with pytest.raises(DataError, match="lower doc_cap"):
        train_tokenizer([" " * 1_200_000 + "x"], vocab_size=300, doc_cap=2_000_000)


def test_a_document_is_an_array_of_its_ids_behind_bos(tokenizer: Tokenizer) -> None:
    long = "x" + "\u3000 " * 700_000
    longer_than_a_piece = ("hello  world " * 10 + "\n") * 4_000
    for text in [*NASTY, *CORPUS, long, longer_than_a_piece, "a\ud800b", *SPECIAL_TOKENS]:
        document = tokenizer.encode_document(text)
        assert document.dtype == np.int32 and document.tolist() == [tokenizer.bos_token_id, *tokenizer.encode(text)]
        if text != long:
            assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)


def test_encoding_lets_other_threads_run(tokenizer: Tokenizer) -> None:
    text = "hello  world 123\n" * 100_000  # one call into tiktoken for all of it
    spans: list[tuple[float, float]] = []

    def encode() -> None:
        began = time.perf_counter()
        tokenizer._encoding.encode_to_numpy(text, disallowed_special=())
        spans.append((began, time.perf_counter()))

    thread = threading.Thread(target=encode)
    thread.start()
    ticks = []
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    began, ended = spans[0]
    assert sum(began < tick < ended for tick in ticks) >= 3, "batches could not be made ahead by a thread"


def test_ids_may_be_an_array_and_have_to_be_known(tokenizer: Tokenizer) -> None:
    ids = np.array(tokenizer.encode("hello world"), np.int64)
    assert tokenizer.decode(ids.tolist()) == "hello world"
    assert tokenizer.decode([*ids]) == "hello world"
    with pytest.raises(KeyError):
        tokenizer.decode([400])


def test_token_bytes_counts_raw_bytes_and_nothing_for_special_tokens(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.token_bytes
    assert lengths.shape == (400,)
    assert lengths.dtype == np.int32
    assert lengths[391:].tolist() == [0] * 9
    # Half a character is one byte; as text it would be U+FFFD, which has three.
    half = tokenizer.vocabulary.ranks[b"\xe4"]
    assert lengths[half] == 1
    assert len(tokenizer.decode([half]).encode()) == 3
    tokens = zip(tokenizer.vocabulary.tokens, lengths, strict=False)
    assert any(length > 1 and not _is_text(token) for token, length in tokens)
    for text in (*NASTY, *CORPUS):
        assert lengths[np.array(tokenizer.encode(text), np.int64)].sum() == len(text.encode())
    with pytest.raises(ValueError, match="read-only"):
        lengths[0] = 7


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_training_is_deterministic_and_the_fingerprint_tells_tokenizers_apart(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(iter(CORPUS), vocab_size=400).fingerprint == tokenizer.fingerprint
    others = [
        train_tokenizer(CORPUS, vocab_size=399),
        train_tokenizer(CORPUS, vocab_size=400, special_tokens=SPECIAL_TOKENS[::-1]),
        train_tokenizer(CORPUS, vocab_size=400, split_pattern=SPLIT_PATTERN.replace("{1,2}", "{1,3}")),
        train_tokenizer(CORPUS[:1], vocab_size=400),
    ]
    prints = {other.fingerprint for other in others} | {tokenizer.fingerprint}
    assert len(prints) == 5
    assert all(len(value) == 64 for value in prints)


def test_merges_are_those_that_training_made(tokenizer: Tokenizer) -> None:
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(CORPUS), 391, pattern=SPLIT_PATTERN)
    for text in CORPUS[:3]:
        assert trainer.encode(text) == tokenizer.encode(text)
    known = set(tokenizer.vocabulary.tokens[:256])
    for (left, right), token in zip(tokenizer.vocabulary.merges(), tokenizer.vocabulary.tokens[256:], strict=True):
        assert left + right == token
        assert {left, right} <= known
        known.add(token)


def test_a_small_text_gives_fewer_tokens_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    small = train_tokenizer(["hello hello hello world"], vocab_size=1000)
    assert 265 < small.vocab_size < 300
    assert f"a vocabulary of {small.vocab_size} tokens, not the 1,000 asked for" in caplog.text
    caplog.clear()
    assert train_tokenizer(CORPUS, vocab_size=300).vocab_size == 300
    assert not caplog.text


def test_doc_cap_and_max_chars_bound_what_is_used() -> None:
    read: list[int] = []

    def texts() -> Any:
        for n in range(100):
            read.append(n)
            yield "abcdefghij" + "zq" * 500

    capped = train_tokenizer(texts(), vocab_size=1000, doc_cap=10, max_chars=49)
    assert read == [0, 1, 2, 3, 4]
    assert not any(b"z" in token for token in capped.vocabulary.tokens[256:])
    assert b"abcdefghij" in capped.vocabulary.tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 264}, "256 bytes and 9 special tokens are 265"),
        ({"doc_cap": 0}, "doc_cap is 0"),
        ({"max_chars": -1}, "max_chars is -1"),
        ({"special_tokens": ()}, "at least one special token"),
        ({"special_tokens": ("<|bos|>", "<|bos|>")}, "none may occur twice"),
        ({"special_tokens": ("",)}, "a special token is empty"),
        ({"split_pattern": "("}, "Invalid regex"),
        ({"split_pattern": r"\w+"}, "does not match every character"),
        ({"split_pattern": r"(?s:.)"}, "Hugging Face tools take"),
        ({"split_pattern": r"(?m:.+)|\s"}, "means something else"),  # in Oniguruma this . takes newlines too
    ],
)
def test_unusable_options_are_refused_before_any_text_is_read(options: dict[str, Any], message: str) -> None:
    texts = iter(CORPUS)
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(texts, **{"vocab_size": 300, **options})
    assert next(texts) == CORPUS[0]


def test_no_text_is_a_data_error_and_errors_of_the_source_come_through() -> None:
    def broken() -> Any:
        yield "hello"
        raise DataError("shard_00001.parquet is truncated")

    for texts in ([], ["", ""]):
        with pytest.raises(DataError, match="no text"):
            train_tokenizer(texts, vocab_size=300)
    with pytest.raises(DataError, match=r"shard_00001\.parquet is truncated"):
        train_tokenizer(broken(), vocab_size=300)
    with pytest.raises(DataError, match="UTF-8 cannot express"):
        train_tokenizer(["a\ud800"], vocab_size=300)


def test_what_is_saved_is_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "tokenizer"
    tokenizer.save(folder)
    loaded = Tokenizer.load(folder)
    assert loaded.vocabulary == tokenizer.vocabulary
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.bos_token_id == tokenizer.bos_token_id
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]


def test_it_travels_to_worker_processes(tokenizer: Tokenizer) -> None:
    twin = pickle.loads(pickle.dumps(tokenizer))
    assert twin.encode(CORPUS[2]) == tokenizer.encode(CORPUS[2])
    assert twin.fingerprint == tokenizer.fingerprint


def test_a_tokenizer_is_replaced_only_by_force(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = train_tokenizer(CORPUS, vocab_size=300)
    tokenizer.save(tmp_path)
    with pytest.raises(ConfigError, match="--force"):
        other.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    other.save(tmp_path, force=True)
    assert Tokenizer.load(tmp_path).fingerprint == other.fingerprint
    (before,) = (path for path in tmp_path.iterdir() if path.name != "tokenizer.json")
    assert storage.read_json(before).fingerprint == tokenizer.fingerprint, "models may have been trained with it"
    other.save(tmp_path, force=True)
    assert len(list(tmp_path.iterdir())) == 2, "the same tokenizer takes the place of nothing"


def test_a_failed_write_leaves_the_old_tokenizer_and_nothing_else(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(DataError, match="No space left on device"):
        train_tokenizer(CORPUS, vocab_size=300).save(tmp_path, force=True)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_folder_that_cannot_be_one_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match="is not a folder that can be written"):
            tokenizer.save(folder)


def damaged(text: str) -> dict[str, str]:
    content = json.loads(text)

    def changed(**model: Any) -> str:
        return json.dumps({**content, "model": {**content["model"], **model}})

    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    gap = {token: rank + (rank > 300) for token, rank in vocab.items()}
    return {
        "truncated": text[: len(text) // 2],
        "empty": "",
        "no object": "[]",
        "no model": json.dumps({**content, "model": None}),
        "another model": changed(type="WordPiece"),
        "a gap in the ids": changed(vocab=gap),
        "a byte missing": changed(vocab={token: rank for token, rank in vocab.items() if rank < 255}, merges=[]),
        "a merge missing": changed(merges=merges[:-1]),
        "merges swapped": changed(merges=merges[::-1]),
        "a character for no byte": changed(vocab={**dict(list(vocab.items())[:-1]), " ": 390}),
        "id is text": changed(vocab={**vocab, "A": "12"}),
        "no special tokens": json.dumps({**content, "added_tokens": []}),
        "a normalizer": json.dumps({**content, "normalizer": {"type": "NFC"}}),
        "another splitter": json.dumps({**content, "pre_tokenizer": {"type": "Whitespace"}}),
        "a broken pattern": text.replace(r"'(?i:[sdmt]", r"'((i:[sdmt]"),
    }


def test_a_damaged_tokenizer_is_named_and_never_replaced_by_another(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    intact = storage.to_json(tokenizer.vocabulary)
    path.write_text(intact)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    for damage, text in damaged(intact).items():
        path.write_text(text)
        try:
            load_tokenizer(tmp_path)
        except DataError as error:
            assert str(path) in str(error), damage
        else:
            pytest.fail(f"{damage}: the damage went unseen")


def test_nanochats_tokenizer_is_read_and_never_overwritten(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = nanochat_pickle(tmp_path, tokenizer)
    before = path.read_bytes()
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.token_bytes.tolist() == tokenizer.token_bytes.tolist()
    other = train_tokenizer(CORPUS, vocab_size=300)
    with pytest.raises(ConfigError, match="has a tokenizer already"):
        other.save(tmp_path)
    other.save(tmp_path, force=True)
    assert path.read_bytes() == before
    assert load_tokenizer(tmp_path).fingerprint == other.fingerprint


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_something_is_refused(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(_Runs(tmp_path / "ran"), protocol))
    with pytest.raises(DataError, match="which a tokenizer has no need of"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_other_pickles_are_refused(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nanochat_pickle(tmp_path, tokenizer)
    whole = path.read_bytes()
    encoding = pickle.loads(whole)
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "rustbpe", encoding)
    for content in (b"", whole[: len(whole) // 2], b"not a pickle", pickle.dumps({"a": 1}), pickle.dumps(encoding)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="damaged or not nanochat's tokenizer"):
            load_tokenizer(tmp_path)


def test_gpt2_starts_documents_with_endoftext(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The real one may not be to be had here: a small one stands where tiktoken would have put it.
    ranks = tokenizer.vocabulary.ranks
    special = {"<|endoftext|>": len(ranks)}
    stand_in = tiktoken.Encoding("gpt2", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", stand_in)
    gpt2 = load_tokenizer(tmp_path)
    assert "GPT-2's takes its place" in caplog.text
    assert gpt2.vocab_size == 392
    assert gpt2.decode([gpt2.bos_token_id]) == "<|endoftext|>"
    assert gpt2.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
    gpt2.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == gpt2.fingerprint


def test_without_a_tokenizer_and_a_network_the_error_says_how_to_train_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(DataError, match="nanofed tokenizer train --data demo") as caught:
        load_tokenizer(tmp_path / "none")
    assert str(tmp_path / "none") in str(caught.value)
    with pytest.raises(DataError, match="there is no tokenizer in"):
        Tokenizer.load(tmp_path)


def test_a_network_that_never_answers_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    forever = threading.Event()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: forever.wait())
    monkeypatch.setattr("nanofed.tokenizer.bpe.GPT2_TIMEOUT_SECONDS", 0.05)
    try:
        with pytest.raises(DataError, match=r"no answer within 0\.05 seconds"):
            Tokenizer.gpt2()
    finally:
        forever.set()


def test_bytes_per_token_is_of_all_texts_together(tokenizer: Tokenizer) -> None:
    tokens = sum(len(tokenizer.encode(text)) for text in CORPUS)
    assert tokenizer.bytes_per_token(CORPUS) == sum(len(text.encode()) for text in CORPUS) / tokens > 1.5
    assert tokenizer.bytes_per_token([""]) == 0
