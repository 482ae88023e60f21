"""The tokenizer: text to ids and back with tiktoken, and where it is loaded from."""

from __future__ import annotations

import logging
import pickle
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken

from nanofed.errors import DataError
from nanofed.tokenizer import storage
from nanofed.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

GPT2_TIMEOUT_SECONDS = 10.0  # tiktoken itself waits for the network without an end
# tiktoken's regular expressions overflow their stack in a run of 499,999 blanks (GPT-2's pattern) or 999,999 (ours).
_LONGEST_BLANK = 400_000
_BLANKS = re.compile(rf"\s{{{_LONGEST_BLANK}}}")


class Tokenizer:
    """Encode text with a byte-level BPE.

    Attributes:
        vocabulary: tokens, special tokens and split pattern.
        vocab_size: number of ids, special tokens included.
        special_tokens: the id of each special token.
        bos_token_id: the special token that starts every document, the first of them.
        token_bytes: `(vocab_size,)` int32, the bytes of text that a token stands for; 0 for special tokens. Read-only.
        fingerprint: sha256 over tokens, special tokens and split pattern: equal when all ids mean the same.

    Raises:
        ValueError: the split pattern is not a regular expression that tiktoken takes.

    Example:
        >>> tokenizer = nanofed.load("runs/tiny").tokenizer
        >>> ids = tokenizer.encode("import nanofed")
        >>> tokenizer.decode(ids)
        'import nanofed'
        >>> tokenizer.encode_document("import nanofed").tolist() == [tokenizer.bos_token_id, *ids]
        True
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.special_tokens = {text: len(vocabulary.tokens) + n for n, text in enumerate(vocabulary.special_tokens)}
        self.vocab_size = len(vocabulary.tokens) + len(self.special_tokens)
        self.bos_token_id = len(vocabulary.tokens)
        lengths = [*map(len, vocabulary.tokens), *(0 for _ in self.special_tokens)]
        self.token_bytes: NDArray[np.int32] = np.array(lengths, np.int32)
        self.token_bytes.flags.writeable = False
        self._encoding = tiktoken.Encoding(
            "rustbpe",  # as nanochat calls it, for its pickle
            pat_str=vocabulary.split_pattern,
            mergeable_ranks=vocabulary.ranks,
            special_tokens=self.special_tokens,
        )

    @property
    def fingerprint(self) -> str:
        """The sha256 over tokens, special tokens and split pattern, in hexadecimal."""
        return self.vocabulary.fingerprint

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text as a list; see `encode_array`."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_document(self, text: str) -> NDArray[np.int32]:
        """Return what a model is trained on: the begin-of-sequence token, then the ids of the text, shape (n + 1,)."""
        ids = self.encode_array(text)
        document = np.empty(len(ids) + 1, np.int32)
        document[0] = self.bos_token_id
        document[1:] = ids
        return document

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """Return the ids of a text, shape (n,); the text of a special token in it is ordinary text.

        A lone surrogate, which UTF-8 cannot express, is encoded as U+FFFD. Blanks beyond 400,000 in a row are encoded
        in pieces of that length.

        Raises:
            DataError: the split pattern fails on the text.
        """
        if len(text) <= _LONGEST_BLANK:
            return self._encode_piece(text)
        ends = [*(match.end() for match in _BLANKS.finditer(text)), len(text)]
        starts = [0, *ends[:-1]]
        return np.concatenate([self._encode_piece(text[start:end]) for start, end in zip(starts, ends, strict=True)])

    def _encode_piece(self, text: str) -> NDArray[np.uint32]:
        try:
            # tiktoken's own array: no Python integer is made for any token.
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self._encode_piece(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except BaseException as error:
            # Rust's panics are no Exception, and not every version of tiktoken makes a ValueError of them.
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise
            raise DataError(f"the split pattern fails on a text of {len(text):,} characters: {error}") from None

    def bytes_per_token(self, texts: Iterable[str]) -> float:
        """Return the bytes of text that a token stands for on average, without any special token; 0 where there is no text.

        Bytes are counted in the tokens, so that text which a split pattern leaves out does not look like compression.
        """
        num_bytes = num_tokens = 0
        for text in texts:
            ids = self.encode_array(text)
            num_bytes += int(self.token_bytes[ids].sum())
            num_tokens += len(ids)
        return num_bytes / num_tokens if num_tokens else 0.0

    def to_nanochat(self) -> bytes:
        """Return the content of nanochat's `tokenizer.pkl`, a pickled tiktoken Encoding."""
        return pickle.dumps(self._encoding)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes that ids stand for, special tokens as their text.

        Raises:
            KeyError: an id is not below `vocab_size`.
        """
        text: bytes = self._encoding.decode_bytes(ids)
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that ids stand for; bytes that are not UTF-8 (half a character, say) become U+FFFD.

        Raises:
            KeyError: an id is not below `vocab_size`.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: Path, *, force: bool = False) -> None:
        """Write `tokenizer.json` into a folder, from which Hugging Face `tokenizers` makes the same ids.

        With `force` our own file is replaced; nanochat's files stay, and ours is the one that is loaded from then on.

        Raises:
            ConfigError: the folder has a tokenizer, ours or nanochat's, and `force` is false.
            DataError: the folder cannot be written.
        """
        storage.check_writable(folder, force=force)
        storage.write_json(self.vocabulary, folder)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Load the tokenizer that a folder has: our `tokenizer.json`, else nanochat's `tokenizer.pkl`.

        Raises:
            DataError: there is none, or it is damaged.
        """
        if (path := folder / storage.TOKENIZER_JSON).exists():
            vocabulary = storage.read_json(path)
        elif (path := folder / storage.NANOCHAT_PICKLE).exists():
            vocabulary = storage.read_nanochat(path)
        else:
            raise DataError(f"there is no tokenizer in {folder}; train one with `nanofed tokenizer train`")
        try:
            return cls(vocabulary)
        except ValueError as error:
            raise DataError(f"{path} has a split pattern that is no regular expression: {error}") from error

    @classmethod
    def gpt2(cls) -> Tokenizer:
        """Return GPT-2's tokenizer, which tiktoken keeps in its cache or downloads; `<|endoftext|>` starts a document.

        Raises:
            DataError: it is not in the cache and cannot be had from the network within 10 seconds.
        """
        loaded: list[tiktoken.Encoding] = []
        failed: list[str] = []

        def load() -> None:
            try:
                loaded.append(tiktoken.get_encoding("gpt2"))
            except Exception as error:  # requests, urllib3 and the file system each have their own
                failed.append(type(error).__name__)

        # A daemon, so that a network that swallows packets keeps neither this call nor the end of the process waiting.
        thread = threading.Thread(target=load, name="tiktoken-gpt2", daemon=True)
        thread.start()
        thread.join(GPT2_TIMEOUT_SECONDS)
        if not loaded:
            reason = failed[0] if failed else f"no answer within {GPT2_TIMEOUT_SECONDS:g} seconds"
            raise DataError(
                f"GPT-2's tokenizer is neither in tiktoken's cache nor to be had from the network ({reason})"
            )
        encoding = loaded[0]
        special = encoding.decode_bytes([encoding.eot_token]).decode()
        tokens = tuple(encoding.decode_single_token_bytes(token) for token in range(encoding.eot_token))
        return cls(Vocabulary(tokens, (special,), encoding._pat_str))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer that a folder has, ours or nanochat's; where there is none, GPT-2's.

    Raises:
        DataError: a tokenizer is there but damaged, or there is none and GPT-2's cannot be had.
    """
    if storage.has_tokenizer(folder):
        return Tokenizer.load(folder)
    try:
        tokenizer = Tokenizer.gpt2()
    except DataError as error:
        raise DataError(
            f"there is no tokenizer in {folder}, and {error}; "
            "train one in seconds with `nanofed tokenizer train --data demo` (offline too)"
        ) from error
    logger.warning("there is no tokenizer in %s: GPT-2's takes its place", folder)
    return tokenizer
