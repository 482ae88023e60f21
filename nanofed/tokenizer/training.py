"""Train a byte-level BPE with rustbpe, as nanochat does."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from nanofed.errors import ConfigError, DataError
from nanofed.tokenizer.bpe import Tokenizer
from nanofed.tokenizer.vocabulary import DOC_CAP, MAX_CHARS, SPECIAL_TOKENS, SPLIT_PATTERN, VOCAB_SIZE, Vocabulary

logger = logging.getLogger(__name__)

# One of everything that a split pattern may forget: it has to match all of a text, for the rest is lost.
_PROBE = (
    "It's HE'LL A1b23.\t456,  7-8_9\r\n\n x\u00e9\u00df\u4f60\u597d \u0663\u00b2 \U0001f642\u200d\u0301"
    " \x00\x7f\u00a0\u3000!?\x85 \u017f\n "
)


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int = VOCAB_SIZE,
    max_chars: int = MAX_CHARS,
    doc_cap: int = DOC_CAP,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    split_pattern: str = SPLIT_PATTERN,
) -> Tokenizer:
    """Train a tokenizer on documents, consumed once and only as far as they are needed.

    A text that cannot give as many merges makes a smaller vocabulary, which is logged as a warning: take the vocabulary
    from the tokenizer. The same documents give the same tokenizer.

    Args:
        texts: the documents.
        vocab_size: ids wanted, special tokens included.
        max_chars: stop after the document that exceeds so many characters in all.
        doc_cap: characters used of one document.
        special_tokens: the texts of the special tokens; the first starts every document.
        split_pattern: the regular expression whose matches are merged one by one.

    Raises:
        ConfigError: a number is out of range, or special tokens or pattern are not usable.
        DataError: there is no text, or the pattern fails on it.
    """
    specials = tuple(special_tokens)
    if vocab_size < 256 + len(specials):
        least = f"256 bytes and {len(specials)} special tokens are {256 + len(specials)}"
        raise ConfigError(f"vocab_size is {vocab_size:,}, but {least}")
    for name, value in (("max_chars", max_chars), ("doc_cap", doc_cap)):
        if value < 1:
            raise ConfigError(f"{name} is {value:,}; it has to be at least 1")
    _check_pattern(split_pattern, specials)
    documents = _cropped(texts, max_chars, doc_cap)
    first = next(documents, None)
    if first is None:
        raise DataError("there is no text to train a tokenizer on")
    tokens = _merged_tokens(chain([first], documents), vocab_size - len(specials), split_pattern)
    tokenizer = Tokenizer(Vocabulary(tokens, specials, split_pattern))
    if tokenizer.vocab_size < vocab_size:
        logger.warning(
            "the text gives a vocabulary of %s tokens, not the %s asked for: train on more text for more",
            f"{tokenizer.vocab_size:,}",
            f"{vocab_size:,}",
        )
    return tokenizer


def _cropped(texts: Iterable[str], max_chars: int, doc_cap: int) -> Iterator[str]:
    characters = 0
    for text in texts:
        if document := text[:doc_cap]:
            yield document
            characters += len(document)
            if characters > max_chars:
                return


def _merged_tokens(documents: Iterator[str], count: int, split_pattern: str) -> tuple[bytes, ...]:
    import rustbpe

    trainer = rustbpe.Tokenizer()
    try:
        trainer.train_from_iterator(documents, count, pattern=split_pattern)
    except UnicodeEncodeError as error:
        raise DataError(f"a document has a character that UTF-8 cannot express: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what Rust raises; it is no Exception
            raise
        raise DataError(f"the split pattern fails on a document, try a lower doc_cap: {error}") from None
    return tuple(bytes(token) for token, _ in trainer.get_mergeable_ranks())


def _check_pattern(split_pattern: str, special_tokens: tuple[str, ...]) -> None:
    """Refuse a pattern before the training: it has to match all of a text, and Hugging Face tools to split alike."""
    from tokenizers import Regex, pre_tokenizers

    try:
        # Enough merges to make one token of every piece, so that the tokens tell where the text was split.
        tokens = _merged_tokens(iter([_PROBE]), 256 + len(_PROBE.encode()), split_pattern)
        tokenizer = Tokenizer(Vocabulary(tokens, special_tokens, split_pattern))
    except ValueError as error:
        raise ConfigError(f"special_tokens or split_pattern cannot be used: {error}") from error
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(_PROBE)]
    if "".join(pieces) != _PROBE:
        raise ConfigError(
            "split_pattern does not match every character, and what it leaves out of a text would be lost"
        )
    try:
        split = pre_tokenizers.Split(Regex(split_pattern), "isolated")
    except Exception as error:  # tokenizers raises no narrower type
        raise ConfigError(f"split_pattern is not a regular expression that Hugging Face tools take: {error}") from error
    if [piece for piece, _ in split.pre_tokenize_str(_PROBE)] != pieces:
        raise ConfigError("split_pattern means something else to Hugging Face tools, whose ids would differ")
