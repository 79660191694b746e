"""What the sample and the reference say about keys and defaults is what the code does."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from llm_guard_mw.config import known_keys, load_config, sample_config

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def test_the_defaults_that_the_sample_states_are_the_real_ones(tmp_path: Path) -> None:
    path = tmp_path / "llm_guard.toml"
    path.write_text(sample_config(), encoding="utf-8")
    plain = load_config(path, environ={})

    said = [line for line in sample_config().splitlines() if re.match(r"#[a-z_]+ = ", line)]
    path.write_text(re.sub(r"(?m)^#([a-z_]+ = )", r"\1", _with_jwt(sample_config())), encoding="utf-8")
    spelled_out = load_config(path, environ={})

    assert len(said) > 20
    path.write_text(_with_jwt(sample_config()), encoding="utf-8")
    assert spelled_out.digest == load_config(path, environ={}).digest
    assert spelled_out.policy == plain.policy


def _with_jwt(sample: str) -> str:
    """The default sources name `jwt:`, which only means something beside [identity.jwt]."""
    return re.sub(r"(?m)^#   (\[identity\.jwt\]|algorithms|jwks|audience)", r"\1", sample)


def test_the_examples_in_the_sample_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "llm_guard.toml"
    path.write_text(re.sub(r"(?m)^#   ", "", sample_config()), encoding="utf-8")

    config = load_config(path, environ={})

    assert config.policy.routes[0].cache is not None
    assert [alert.to for alert in config.alerts] == ["log"]


def _written(default: object) -> str:
    """A default as the reference writes it."""
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, Fraction):
        return f"{Decimal(default.numerator) / default.denominator:.2f}"
    if isinstance(default, tuple):
        return "[" + ", ".join(_written(item) for item in default) + "]"
    if isinstance(default, dict):
        return "none"
    return f'"{default}"' if isinstance(default, str) else str(default)


def _rows(page: str) -> dict[str, str]:
    """The key and the default of each row of the reference's tables."""
    text = (REFERENCE / page).read_text(encoding="utf-8")
    return dict(re.findall(r"(?m)^\| `([^`]+)` \| `([^`]+)` \|", text))


def test_the_reference_lists_each_key_with_its_default() -> None:
    assert _rows("config.md") == {key: _written(default) for key, default in known_keys().items()}


@pytest.mark.parametrize("page", ["config.md", "limits.md"])
def test_every_toml_snippet_of_the_reference_is_accepted(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"(?s)```toml\n(.*?)```", (REFERENCE / page).read_text(encoding="utf-8"))

    assert snippets
    for snippet in snippets:
        Path("snippet.toml").write_text(snippet, encoding="utf-8")
        load_config("snippet.toml", environ={"OPENAI_API_KEY": "x", "JWT_KEY": "x" * 32})


def test_every_limit_that_the_reference_shows_is_read() -> None:
    text = (REFERENCE / "limits.md").read_text(encoding="utf-8")
    limits = re.findall(r'(?m)^\| `"([^"]+)"` \|', text)

    assert len(limits) > 10
    load_config({"limits": limits}, environ={})
