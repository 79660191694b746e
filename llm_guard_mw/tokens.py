"""How many tokens a text is: a cheap bound from above, and a count where a verified vocabulary is at hand.

Rule 1: Nothing here ever touches the network. Rank files are found on this machine, in the `vocab` extra's
        package (which is not imported) or in the folder LLM_GUARD_VOCAB, and used only if their SHA-256 is right.
Rule 2: The bound needs nothing but the bytes. It holds for both OpenAI vocabularies on every kind of text it was
        fitted on: prose in sixty languages, code, JSON, numbers, base64, random letters, emoji, runs of spaces.
        What it cannot promise is text of rare characters strung together at random; there only the number of
        bytes is a bound.
Rule 3: A vocabulary takes a fifth of a second to load, so it is loaded in a thread, or by `load_vocabularies` at
        the start. Until then the bound answers in its place.

docs/explanation/estimates.md has the margins and how they were measured.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import importlib.util
import os
import re
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from zlib import adler32

if TYPE_CHECKING:
    import tiktoken

#: `tiktoken` panics on a megabyte of spaces, so it gets text in slices. A cut costs a token at the most or so.
SLICE_CHARS = 32_000

#: Longer texts are not counted, only bounded: counting them takes 10 ms and more.
COUNT_CHARS_MAX = 256_000

_VOCABULARY_FOLDER = "LLM_GUARD_VOCAB"
_RANK_FILE_BYTES_MAX = 16_000_000

# ---------------------------------------------------------------- the bound

# What a byte costs at the most, in 1/64 of a token, given the corrections in `upper_tokens`. The numbers are the
# solution of a linear program: the cheapest that are an upper bound on each of 23,000 samples, with 2 % and a
# token and a half to spare. A letter costs what it does in text that is no language (random letters, base64),
# which is what makes `e` cheap and `q` dear.
_OFFSET = 32  # half a token, so that the cheapest letters (which are below 0) fit into a byte
_UNIT = 64


_LETTER_COSTS = (
    *(0.50, 0.17, -0.22, 0.29, -0.17, 0.29, 0.52, 1.03, 0.26, 2.00, 0.99, 0.06, 0.32),
    *(0.21, 0.23, -0.05, 1.68, 0.18, 0.30, 0.26, 0.70, 1.09, 1.27, 0.56, 0.91, 1.53),
)
_ASCII_COSTS = (
    (b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", 0.61),
    (b"0123456789", 0.34),
    (b" ", 1.14),
    (b"\n\r\t\x0b\x0c", 1.78),
    (bytes(byte for byte in range(33, 127) if not chr(byte).isalnum()), 0.17),
    (bytes((*range(9), *range(14, 32), 127)), 1.00),
)
# A character beyond ASCII is paid for by its first byte, by the block that this byte opens.
_LEAD_COSTS = (
    (0xC0, 0xCA, 2.00),  # Latin with marks
    (0xCB, 0xD3, 1.08),  # Greek, Cyrillic
    (0xD4, 0xDF, 2.00),  # Armenian, Hebrew, Arabic: each byte may be a token
    (0xE0, 0xE0, 2.14),  # the scripts of India, Thai
    (0xE1, 0xE1, 2.88),  # Georgian, Burmese, Ethiopic, Khmer
    (0xE2, 0xE2, 1.83),  # typography
    (0xE3, 0xE3, 1.17),  # kana
    (0xE4, 0xE9, 1.88),  # Chinese characters
    (0xEA, 0xED, 1.36),  # Hangul
    (0xEE, 0xEF, 1.08),  # full-width forms
    (0xF0, 0xFF, 3.15),  # emoji, and all the rest
)


def _cost_table() -> bytes:
    """Of each byte the cost in units, with _OFFSET added."""
    costs = [0.0] * 256
    costs[ord("a") : ord("z") + 1] = _LETTER_COSTS
    for letters, cost in _ASCII_COSTS:
        for byte in letters:
            costs[byte] = cost
    for first, last, cost in _LEAD_COSTS:
        costs[first : last + 1] = [cost] * (last + 1 - first)
    return bytes(min(255, round(cost * _UNIT) + _OFFSET) for cost in costs)


def _classes(**classes: bytes) -> bytes:
    """A table that maps the bytes of each class to the class's letter, and all others to `x`."""
    table = bytearray(b"x" * 256)
    for letter, members in classes.items():
        for byte in members:
            table[byte] = ord(letter)
    return bytes(table)


_COSTS = _cost_table()
_LOWER = b"abcdefghijklmnopqrstuvwxyz"
_SIGNS = bytes(byte for byte in range(33, 127) if not chr(byte).isalnum())
_RUNS = _classes(l=_LOWER, U=_LOWER.upper(), P=_SIGNS, S=b" ", N=b"\n\r\t\x0b\x0c")
_WORDS = _classes(L=_LOWER + _LOWER.upper(), P=_SIGNS, S=b" ")
_NUMBERS = _classes(D=b"0123456789")


def upper_tokens(text: bytes) -> int:
    """At least as many tokens as `text` is, and never more than its bytes. About 10 ns a byte."""
    size = len(text)
    if not size:
        return 0
    words = text.translate(_WORDS).count
    after_space, after_sign = words(b"SL"), words(b"PL")
    runs = text.translate(_RUNS).count
    units = (
        _sum(text.translate(_COSTS))
        - _OFFSET * size
        + 6 * _UNIT
        + 25 * (after_space + after_sign + words(b"xL"))
        - 64 * after_space  # a word takes the space before it along
        + 8 * after_sign
        + 25 * runs(b"lU")
        + 69 * runs(b"PP")
        - 128 * (runs(b"SS") + runs(b"NN"))  # a run of spaces is one token
        + 91 * text.translate(_NUMBERS).count(b"xD")
    )
    return max(1, min(size, -(-units // _UNIT)))


def _sum(data: bytes) -> int:
    """`sum(data)`, without a Python number for each byte.

    The lower half of an Adler-32 checksum is 1 + the sum of the bytes, modulo 65521 (RFC 1950, section 8.2), which
    256 bytes cannot reach.
    """
    sums = [adler32(data[start : start + 256]) & 0xFFFF for start in range(0, len(data), 256)]
    return sum(sums) - len(sums)


# ---------------------------------------------------------------- vocabularies

VocabularyName = Literal["o200k_base", "cl100k_base"]

_RANKS_SHA256: dict[VocabularyName, str] = {
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
}

# The name that `tiktoken` keeps a downloaded file under.
_CACHE_NAMES: dict[VocabularyName, str] = {
    "o200k_base": "fb374d419588a4632f3f557e76b4b70aebbca790",
    "cl100k_base": "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
}

# How the vocabularies split text before they merge: a part of their definition, like the ranks.
_MARK = r"\p{Lm}\p{Lo}\p{M}"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SPLITS: dict[VocabularyName, str] = {
    "cl100k_base": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
        r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k_base": (
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_MARK}]*[\p{{Ll}}{_MARK}]+{_SUFFIX}|"
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_MARK}]+[\p{{Ll}}{_MARK}]*{_SUFFIX}|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

_encodings: dict[VocabularyName, tiktoken.Encoding | None] = {}
_findings: dict[VocabularyName, str] = {}
_loading = threading.Lock()
_started = threading.Event()


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What stands in for a model's tokenizer: a vocabulary, and how far the model's own may exceed it.

    `percent` is 100 for the models that use the vocabulary itself. `digits` says that the model spends a token on
    every digit.
    """

    vocabulary: VocabularyName = "o200k_base"
    percent: int = 100
    digits: bool = False

    @property
    def exact(self) -> bool:
        return self.percent == 100 and not self.digits

    def margin(self, tokens: int, text: bytes) -> int:
        """`tokens` of the vocabulary as a bound in the model's own tokens, never above the bytes."""
        if self.exact:
            return tokens
        more = -(-tokens * self.percent // 100)
        if self.digits:
            more += sum(text.count(digit) for digit in _DIGITS)
        return min(more, len(text))


_DIGITS = tuple(str(number).encode() for number in range(10))
_TOKENIZERS = tuple(
    (re.compile(pattern), tokenizer)
    for pattern, tokenizer in (
        (r"gpt-4o|gpt-4\.|gpt-[5-9]|gpt-oss|gpt-audio|gpt-realtime|\bo[1345](-|$)|codex", Tokenizer()),
        (r"gpt-4|gpt-3\.?5|davinci-002|babbage-002|text-embedding", Tokenizer("cl100k_base")),
        # Anthropic publishes no vocabulary. The third generation needs up to a quarter more tokens than OpenAI's,
        # the one since Opus 4.7 up to 35 % more than that.
        (r"claude-(instant|v?[123]|(opus|sonnet|haiku)-4(?![-.][7-9])|4-)", Tokenizer(percent=125)),
        (r"claude", Tokenizer(percent=170)),
        (r"gemini|gemma|qwen|glm", Tokenizer(percent=115, digits=True)),
    )
)
_OTHER_TOKENIZER = Tokenizer(percent=125, digits=True)
_OPENAIS = Tokenizer()


def tokenizer_of(model: str | None) -> Tokenizer:
    """The tokenizer to count a model's text by. Without a model it is OpenAI's."""
    return _tokenizer_of(model.lower()) if model and len(model) <= 128 else _OPENAIS


@lru_cache(maxsize=1024)
def _tokenizer_of(model: str) -> Tokenizer:
    return next((tokenizer for pattern, tokenizer in _TOKENIZERS if pattern.search(model)), _OTHER_TOKENIZER)


def count_text(text: str, model: str | None) -> int:
    """The tokens of `text`, counted with the model's vocabulary, else bounded from above. Never raises.

    Where the model's own vocabulary is not public, OpenAI's count carries that model's margin.
    """
    if not text:
        return 0
    data = text.encode("utf-8", "replace")
    tokenizer = tokenizer_of(model)
    tokens = _count(text, tokenizer.vocabulary) if len(text) <= COUNT_CHARS_MAX else None
    return tokenizer.margin(upper_tokens(data) if tokens is None else tokens, data)


def vocabulary(model: str | None) -> VocabularyName | None:
    """The verified vocabulary that `count_text` uses for a model now, if there is one."""
    name = tokenizer_of(model).vocabulary
    return name if _encodings.get(name) is not None else None


def vocab_status() -> dict[VocabularyName, str]:
    """For `check` and the logs: what is known of each vocabulary, after a look for those not loaded yet."""
    load_vocabularies()
    return dict(_findings)


def load_vocabularies() -> None:
    """Find, verify and load the vocabularies now. It takes up to half a second: at the start, or in a thread."""
    _started.set()
    with _loading:
        for name in _RANKS_SHA256:
            if name not in _encodings:
                _encodings[name], _findings[name] = _load(name)


def forget_vocabularies() -> None:
    """Look again at the next question: after an import of rank files, and between tests."""
    with _loading:
        _encodings.clear()
        _findings.clear()
        _started.clear()


def _count(text: str, name: VocabularyName) -> int | None:
    if name not in _encodings:
        if not _started.is_set():
            _started.set()
            threading.Thread(target=load_vocabularies, name="llm-guard-vocabulary", daemon=True).start()
        return None
    encoding = _encodings.get(name)
    if encoding is None:
        return None
    try:
        if len(text) <= SLICE_CHARS:
            return len(encoding.encode_ordinary(text))
        slices = range(0, len(text), SLICE_CHARS)
        return sum([len(encoding.encode_ordinary(text[start : start + SLICE_CHARS])) for start in slices])
    except Exception:
        return None
    except BaseException as panic:
        # The Rust side panics with a BaseException of its own; what asks us to stop must get through.
        if type(panic).__name__ != "PanicException":
            raise
        return None


def _load(name: VocabularyName) -> tuple[tiktoken.Encoding | None, str]:
    finding = "no rank file: install the vocab extra, or set LLM_GUARD_VOCAB to a folder that has one"
    for path in _candidates(name):
        data = _read(path)
        if data is None:
            continue
        if hashlib.sha256(data).hexdigest() != _RANKS_SHA256[name]:
            finding = f"{path.name} does not have the right SHA-256 and is not used"
            continue
        import tiktoken

        ranks = {base64.b64decode(token): int(rank) for token, _, rank in _lines(data)}
        encoding = tiktoken.Encoding(name, pat_str=_SPLITS[name], mergeable_ranks=ranks, special_tokens={})
        return encoding, f"verified, from {path.name}"
    return None, finding


def _lines(data: bytes) -> list[tuple[bytes, bytes, bytes]]:
    return [line.partition(b" ") for line in data.splitlines() if line]


def _candidates(name: VocabularyName) -> list[Path]:
    folders: list[Path] = []
    if folder := os.environ.get(_VOCABULARY_FOLDER):
        folders.append(Path(folder))
    with contextlib.suppress(ImportError, ValueError):
        # Finding a top-level package does not import it, which matters: its extension module is 74 MB.
        spec = importlib.util.find_spec("bpe_openai")
        if spec is not None and spec.submodule_search_locations:
            folders += [Path(place) / "data" for place in spec.submodule_search_locations]
    files = (f"{name}.tiktoken", f"{name}.tiktoken.gz", _CACHE_NAMES[name])
    return [folder / file for folder in folders for file in files]


def _read(path: Path) -> bytes | None:
    try:
        if path.suffix != ".gz":
            return path.read_bytes() if path.stat().st_size <= _RANK_FILE_BYTES_MAX else None
        with gzip.open(path) as file:
            return file.read(_RANK_FILE_BYTES_MAX)
    except (OSError, EOFError):
        return None
