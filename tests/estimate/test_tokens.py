"""The bound on tokens, against both OpenAI vocabularies, and the count by a verified one."""

from __future__ import annotations

import base64
import gzip
import json
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_guard_mw import tokens
from llm_guard_mw.tokens import count_text, tokenizer_of, upper_tokens, vocab_status, vocabulary

ROOT = Path(__file__).parents[2]
NEEDS_VOCABULARY = "no verified vocabulary here: install the vocab extra"


@pytest.fixture
def vocabularies() -> None:
    tokens.load_vocabularies()
    if any(encoding is None for encoding in tokens._encodings.values()):
        pytest.skip(NEEDS_VOCABULARY)


def _samples() -> dict[str, str]:
    chance = random.Random(1)
    letters, printable = string.ascii_letters, string.printable
    words = (ROOT / "LICENSE").read_text()
    code = (ROOT / "llm_guard_mw" / "pricing.py").read_text()
    emoji = [chr(number) for number in (*range(0x1F600, 0x1F650), *range(0x1F300, 0x1F600))]
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": words[:900]}], "tools": [{"n": [1, 2.5]}] * 9}
    return {
        "english": words,
        "capitals": words.upper(),
        "python": code,
        "json": json.dumps(body),
        "pretty json": json.dumps(body, indent=4),
        "german": "Die Würde des Menschen ist unantastbar. Größere Änderungen bedürfen überörtlicher Prüfung. " * 9,
        "finnish": "Äänestäjien järjestäytymiskysymyksiä käsiteltiin yhdenvertaisuussuunnitelmassa. " * 9,
        "russian": "Все люди рождаются свободными и равными в своём достоинстве и правах. " * 9,
        "greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια. " * 9,
        "chinese": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。" * 9,
        "japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。" * 9,
        "korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. " * 9,
        "arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. " * 9,
        "hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। " * 9,
        "thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ " * 9,
        "georgian": "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით. " * 9,
        "base64": base64.b64encode(chance.randbytes(3_000)).decode(),
        "hex": chance.randbytes(3_000).hex(),
        "digits": "".join(chance.choice(string.digits) for _ in range(3_000)),
        "single digits": " ".join(chance.choice(string.digits) for _ in range(3_000)),
        "numbers": json.dumps([chance.random() for _ in range(300)]),
        "emoji": "".join(chance.choice(emoji) for _ in range(900)),
        "joined emoji": "👩‍👩‍👧‍👦🏳️‍🌈👍🏽" * 90,
        "spaces": " " * 5_000,
        "newlines": "\n" * 5_000,
        "tabs and spaces": "\t  \n    " * 900,
        "rules": "----====****....\n" * 300,
        "signs": "".join(chance.choice(string.punctuation) for _ in range(3_000)),
        "random letters": "".join(chance.choice(letters) for _ in range(3_000)),
        "random words": " ".join("".join(chance.choices(letters.lower(), k=5)) for _ in range(600)),
        "random printable": "".join(chance.choice(printable) for _ in range(3_000)),
    }


SAMPLES = _samples()


@pytest.mark.parametrize("kind", SAMPLES)
def test_the_bound_holds_for_both_vocabularies_on(kind: str, vocabularies: None) -> None:
    text = SAMPLES[kind]
    chance = random.Random(kind)

    pieces = [text[:4_000]]
    for length in (40, 200, 1_000):
        pieces += [text[at : at + length] for at in (chance.randrange(max(1, len(text) - length)) for _ in range(6))]

    for piece in pieces:
        bound = upper_tokens(piece.encode())
        for name in ("o200k_base", "cl100k_base"):
            assert bound >= (tokens._count(piece, name) or 0), (name, piece[:60])  # type: ignore[arg-type]


def test_the_margin_on_prose_and_code_is_what_the_docs_say(vocabularies: None) -> None:
    for kind, margin in (("english", 1.8), ("python", 1.7), ("json", 1.8), ("german", 2.0), ("chinese", 2.3)):
        text = SAMPLES[kind][:4_000]
        assert upper_tokens(text.encode()) <= margin * count_text(text, "gpt-4o"), kind


@given(st.binary(max_size=2_000))
def test_the_bound_is_between_one_token_and_the_bytes(data: bytes) -> None:
    assert (1 if data else 0) <= upper_tokens(data) <= len(data)


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_the_bound_of_two_texts_together_is_hardly_below_the_sum(one: bytes, two: bytes) -> None:
    # A seam may merge a run of spaces or a word with its space, which saves a token or two, and the constant.
    assert upper_tokens(one + two) >= upper_tokens(one) + upper_tokens(two) - 12


# ---------------------------------------------------------------- counting


def test_a_text_is_counted_by_the_models_vocabulary(vocabularies: None) -> None:
    assert count_text("hello world", "gpt-4o") == 2
    assert vocabulary("gpt-4o-mini") == "o200k_base"
    assert vocabulary("gpt-4-0613") == "cl100k_base"
    assert count_text("<|endoftext|>", "gpt-4o") > 1  # text, never the special token


def test_a_model_without_a_public_vocabulary_has_a_margin(vocabularies: None) -> None:
    text = SAMPLES["english"][:2_000]

    assert count_text(text, "claude-opus-5-5") > count_text(text, "claude-sonnet-4-5") > count_text(text, "gpt-4o")
    assert count_text("1234567890" * 9, "gemini-2.5-pro") == 90


@pytest.mark.parametrize(
    ("model", "exact", "percent"),
    [
        ("gpt-4o-2024-08-06", True, 100),
        ("o3-mini", True, 100),
        ("gpt-6-sol", True, 100),
        ("claude-sonnet-4-20250514", False, 125),
        ("claude-sonnet-4-6", False, 125),
        ("claude-opus-4-7", False, 170),
        ("claude-haiku-5-5", False, 170),
        ("some-model", False, 125),
        (None, True, 100),
    ],
)
def test_the_tokenizer_of(model: str | None, exact: bool, percent: int) -> None:
    assert (tokenizer_of(model).exact, tokenizer_of(model).percent) == (exact, percent)


def test_megabytes_of_spaces_neither_panic_nor_take_long(vocabularies: None) -> None:
    assert 0 < count_text(" " * 250_000, "gpt-4o") < 10_000
    assert 0 < count_text(" " * 3_000_000, "gpt-4o") <= 3_000_000


def test_lone_surrogates_are_counted(vocabularies: None) -> None:
    assert count_text("a\ud800b", "gpt-4o") >= 1


def test_a_wrong_rank_file_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "o200k_base.tiktoken").write_bytes(b"YQ== 0\n")
    (tmp_path / "cl100k_base.tiktoken.gz").write_bytes(gzip.compress(b"YQ== 0\n")[:-3])
    monkeypatch.setenv("LLM_GUARD_VOCAB", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tokens.forget_vocabularies()

    try:
        status = vocab_status()

        assert "SHA-256" in status["o200k_base"]
        assert "no rank file" in status["cl100k_base"]
        assert vocabulary("gpt-4o") is None
        assert count_text("hello world", "gpt-4o") == upper_tokens(b"hello world")
    finally:
        tokens.forget_vocabularies()


def test_the_first_count_does_not_wait_for_the_vocabulary() -> None:
    code = (
        "import sys; from llm_guard_mw.tokens import count_text, upper_tokens; "
        "first = count_text('hello world', 'gpt-4o'); "
        "sys.exit(first != upper_tokens(b'hello world') or 'bpe_openai' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_counting_imports_nothing_that_can_reach_a_network() -> None:
    code = (
        "import sys; from llm_guard_mw import tokens; tokens.load_vocabularies(); tokens.count_text('a', 'gpt-4o'); "
        "sys.exit(bool({'requests', 'httpx', 'httpx2', 'tiktoken.load'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.binary(max_size=2000))
def test_the_bound_sums_its_costs_exactly(data: bytes) -> None:
    assert tokens._sum(data) == sum(data)
