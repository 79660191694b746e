"""A configuration is checked as a whole: every mistake, with its line, its value and what would be right."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from llm_guard_mw.config import Config, load_config, sample_config
from llm_guard_mw.errors import ConfigError, Mistake
from llm_guard_mw.model import Principal, Tags
from llm_guard_mw.policy import CacheRule
from llm_guard_mw.pricing import ModelPrice

CONTRACT = """\
store  = "sqlite:///llm_guard.db"
ledger = "postgresql://books@db/llm"
timezone = "Europe/Berlin"
lease_seconds = 60
mode = "observe"
inspect_bytes = 1_000_000
default_output_tokens = 200
min_output_tokens = 100
strict = true
unbounded = "allow"
journal_max = 5000
retention_days = 30
new_scope_values = 10
on_store_failure = "allow"
limits = ["$500/day global"]

[identity]
user   = ["jwt:sub", "scope:user.id", "header:x-user-id"]
tenant = "jwt:org"
tier   = ["jwt:plan", "header:x-plan"]
trusted_proxies = ["10.0.0.0/8"]
anonymous = "ip"
[identity.jwt]
algorithms = ["RS256"]
jwks = "https://idp.example.com/jwks.json"
audience = "my-app"

[budgets]
warning = 0.60
critical = 0.80
hard = 1.10
overdraft = 0.20

[models]
"gpt-4o" = "gpt-4o-mini"

[prices]
unpriced = "deny"
[prices.models."my-finetune"]
input = 3.0
output = 12.0
cached_input = 0.1

[[routes]]
path = "/api/chat"
name = "chat"
feature = "chat"
api = "openai.chat"
model = "gpt-4o"
max_output_tokens = 1024
max_input_tokens = 9000
limits = ["20 requests/minute per user", "40k tokens/minute per user burst 80k", "$2/day per user",
          { limit = "5 requests/minute per user", when = { tier = "free" } }]
degrade = ["cache", "model"]
cache = { ttl = 60, stale = 120, scope = "tenant", version = "2" }
usage = "captured"
on_store_failure = "deny"

[tiers.free]
limits = ["$1/month per user", "2 concurrent per user"]

[[upstreams]]
prefix = "/openai"
url = "https://api.openai.com"
provider = "openai"
api_key = "env:OPENAI_API_KEY"
[[upstreams]]
prefix = "/"
url = "http://127.0.0.1:3000"

[[alerts]]
to = "https://hooks.example.com/x"
"""


#: What every key of a later version is warned of.
LATER = "does nothing in this version yet"


def lasting(config: Config) -> list[Mistake]:
    """The warnings that a later version will have as well."""
    return [warning for warning in config.warnings if LATER not in warning.problem]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a file called `g.toml` and loads it from its own folder."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, **environ: str) -> Config:
        Path("g.toml").write_text(text, encoding="utf-8")
        return load_config("g.toml", environ=environ)

    return load


def mistakes_of(source: str | Mapping[str, Any], environ: Mapping[str, str] | None = None) -> list[Mistake]:
    with pytest.raises(ConfigError) as caught:
        load_config(source, environ=environ or {})
    return list(caught.value.mistakes)


def said(source: str | Mapping[str, Any], environ: Mapping[str, str] | None = None) -> str:
    return "\n".join(str(mistake) for mistake in mistakes_of(source, environ))


# ---------------------------------------------------------------- what is read


def test_every_section_of_the_contract_is_read(write: Any) -> None:
    config: Config = write(CONTRACT, OPENAI_API_KEY="x")

    policy = config.policy
    (route,) = policy.routes
    assert (config.store, config.ledger) == ("sqlite:///llm_guard.db", "postgresql://books@db/llm")
    assert (policy.timezone, policy.lease_seconds, policy.mode) == ("Europe/Berlin", 60, "observe")
    assert (policy.inspect_bytes, policy.default_output_tokens, policy.min_output_tokens) == (1_000_000, 200, 100)
    assert (policy.strict, policy.unbounded, policy.unpriced) == (True, "allow", "deny")
    assert (policy.journal_max, policy.retention_days, policy.new_scope_values) == (5000, 30, 10)
    assert policy.on_store_failure == "allow"
    assert dict(policy.models) == {"gpt-4o": "gpt-4o-mini"}
    assert [limit.text for limit in policy.tiers["free"]] == ["$1/month per user", "2 concurrent per user"]
    assert (route.path, route.name, route.feature, route.api) == ("/api/chat", "chat", "chat", "openai.chat")
    assert (route.model, route.max_output_tokens, route.max_input_tokens) == ("gpt-4o", 1024, 9000)
    assert (route.degrade, route.usage, route.on_store_failure) == (("cache", "model"), "captured", "deny")
    assert route.cache == CacheRule(60, 120, "tenant", "2")
    assert [limit.place for limit in route.limits] == ["route chat"] * 4
    assert config.identity.tenant == ("jwt:org",)
    assert config.identity.anonymous == "ip"
    assert config.identity.jwt is not None
    assert config.identity.jwt.audience == ("my-app",)
    assert dict(config.prices.models) == {"my-finetune": ModelPrice(Decimal("3.0"), Decimal("12.0"), Decimal("0.1"))}
    assert [(up.prefix, up.provider, up.api_key) for up in config.upstreams] == [
        ("/openai", "openai", "env:OPENAI_API_KEY"),
        ("/", None, None),
    ]
    assert [alert.to for alert in config.alerts] == ["https://hooks.example.com/x"]
    assert lasting(config) == []


def test_budgets_are_the_exact_fractions_that_were_written(write: Any) -> None:
    limit = write(CONTRACT).policy.limits[0]

    assert (limit.warning, limit.critical) == (Fraction(6, 10), Fraction(8, 10))
    assert (limit.hard, limit.overdraft) == (Fraction(11, 10), Fraction(2, 10))
    assert (limit.ceiling(), limit.ceiling(degraded=True)) == (550 * 10**9, 650 * 10**9)
    assert limit.timezone == "Europe/Berlin"


def test_a_price_is_the_decimal_that_was_written_in_a_mapping_too() -> None:
    config = load_config({"prices": {"models": {"m": {"input": 0.1, "output": 3}}}}, environ={})

    assert config.prices.models["m"] == ModelPrice(Decimal("0.1"), Decimal(3))


def test_an_empty_file_is_a_configuration_of_defaults(write: Any) -> None:
    assert write("") == load_config({}, environ={}) == Config()


def test_a_file_with_a_byte_order_mark_and_windows_lines_is_read(tmp_path: Path) -> None:
    path = tmp_path / "g.toml"
    path.write_bytes(b"\xef\xbb\xbf" + b'timezone = "UTC"\r\nlease_seconds = 0\r\n')

    assert f"{path}:2 lease_seconds" in said(str(path))


def test_a_path_object_is_a_source(tmp_path: Path) -> None:
    path = tmp_path / "g.toml"
    path.write_text('limits = ["$5/day global"]')

    assert load_config(path, environ={}).source == str(path)


def test_a_single_text_stands_for_a_list_of_one() -> None:
    config = load_config({"limits": "$5/day global", "routes": [{"path": "/a", "methods": "GET"}]}, environ={})

    assert config.policy.limits[0].text == "$5/day global"
    assert config.policy.routes[0].methods == {"GET", "HEAD"}


def test_two_routes_of_one_path_guard_different_methods() -> None:
    routes = [{"path": "/a", "methods": ["GET"], "name": "read"}, {"path": "/a", "methods": ["POST"], "name": "write"}]

    policy = load_config({"routes": routes}, environ={}).policy

    assert [policy.route(method, "/a").name for method in ("GET", "POST")] == ["read", "write"]  # type: ignore[union-attr]


# ---------------------------------------------------------------- the digest


def test_a_file_and_a_mapping_of_the_same_content_have_one_digest(write: Any) -> None:
    text = 'limits = ["$5/day global"]\n[budgets]\nhard = 1.10 # the same\n[models]\nb = "c"\na = "b"\n'
    mapping = {"models": {"a": "b", "b": "c"}, "budgets": {"hard": 1.1}, "limits": ("$5/day global",)}

    assert write(text).digest == load_config(mapping, environ={}).digest


@pytest.mark.parametrize(
    "other",
    [
        {"limits": ["$6/day global"]},
        {"limits": ["$5/day global"], "strict": True},
        {"limits": ["$5/day global"], "ledger": "sqlite:///other.db"},
        {"limits": ["$5/day global"], "alerts": [{"to": "log"}]},
        {"limits": ["$5/day global"], "identity": {"anonymous": "ip"}},
    ],
)
def test_any_difference_is_another_digest(other: dict[str, Any]) -> None:
    assert load_config(other, environ={}).digest != load_config({"limits": ["$5/day global"]}, environ={}).digest


# ---------------------------------------------------------------- the environment


def test_the_environment_wins_over_the_file(write: Any) -> None:
    config: Config = write(
        CONTRACT,
        LLM_GUARD_BUDGETS__HARD="1.2",
        LLM_GUARD_TIMEZONE="UTC",
        LLM_GUARD_STRICT="false",
        LLM_GUARD_STORE="sqlite:////var/lib/guard.db",
        LLM_GUARD_LIMITS='["$7/day global"]',
        LLM_GUARD_TIERS__FREE__LIMITS="$3/month per user",
        LLM_GUARD_ROUTES__0__MAX_OUTPUT_TOKENS="7",
        LLM_GUARD_IDENTITY__USER="header:x-id",
    )

    assert config.policy.limits[0].text == "$7/day global"
    assert config.policy.limits[0].hard == Fraction(12, 10)
    assert (config.policy.timezone, config.policy.strict) == ("UTC", False)
    assert config.store == "sqlite:////var/lib/guard.db"
    assert config.policy.tiers["free"][0].text == "$3/month per user"
    assert config.policy.routes[0].max_output_tokens == 7
    assert config.identity.user == ("header:x-id",)


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_GUARD_TIMEZONE", "Europe/Rome")

    assert load_config({}).policy.timezone == "Europe/Rome"


def test_a_given_mapping_is_not_changed_by_the_environment() -> None:
    given: dict[str, Any] = {"budgets": {"hard": 1.1}}

    load_config(given, environ={"LLM_GUARD_BUDGETS__HARD": "1.2", "LLM_GUARD_STRICT": "true"})

    assert given == {"budgets": {"hard": 1.1}}


def test_variables_that_are_no_part_of_the_configuration_are_left_alone() -> None:
    others = ["CONFIG", "KEY_SECRET", "CORPUS", "VOCAB", "HYPOTHESIS"]

    assert load_config({}, environ={f"LLM_GUARD_{name}": "x" for name in others}) == Config()


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("LLM_GUARD_BUDGTS__HARD", "1", 'did you mean "budgets"?'),
        ("LLM_GUARD_BUDGETS__HRD", "1", 'did you mean "hard"?'),
        ("LLM_GUARD_LEASE_SECONDS", "soon", 'lease_seconds = "soon"'),
        ("LLM_GUARD_ROUTES__9__MODEL", "m", '"9" is no item of routes'),
        ("LLM_GUARD_STORE__X", "1", "set LLM_GUARD_STORE instead"),
        ("LLM_GUARD_LIMITS", "$5/dy global", 'unknown period "dy"'),
        ("LLM_GUARD_IDENTITY__USER", "heder-x:y", "heder-x"),
        ("LLM_GUARD_STORE", "7", """'"7"'"""),
    ],
)
def test_a_mistake_of_the_environment_names_the_variable(write: Any, variable: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        write('store = "sqlite:///x.db"\n[[routes]]\npath = "/a"\n', **{variable: value})

    (mistake,) = caught.value.mistakes
    assert mistake.where == variable
    assert says in str(mistake)


# ---------------------------------------------------------------- mistakes


def test_all_mistakes_are_reported_together_with_their_lines(write: Any) -> None:
    text = """\
store = "mysql://x/y"
lease_secnds = 3
journal_max = "many"
limits = ["$5/day",
    "20 reqests/minut per user"]
[budgets]
hard = 0.5
[models]
a = "b"
b = "a"
[[routes]]
path = "/x"
limits = [
    "$5/day per user",

    { limit = "$5/day per user", anchor = 3,
      when = { tir = "free" } },
]
[[routes]]
name = "nowhere"
"""
    text = text.replace(",\n      when", ", when")

    with pytest.raises(ConfigError) as caught:
        write(text)

    assert [mistake.where for mistake in caught.value.mistakes] == [
        "g.toml:1 store",
        "g.toml:2 lease_secnds",
        "g.toml:3 journal_max",
        "g.toml:4 limits[0]",
        "g.toml:5 limits[1]",
        "g.toml:5 limits[1]",
        "g.toml:7 budgets.hard",
        "g.toml:9 models.a",
        "g.toml:16 routes[0].limits[1].when",
        "g.toml:16 routes[0].limits[1].anchor",
        "g.toml:18 routes[1]",
    ]
    assert all(mistake.problem and mistake.fix for mistake in caught.value.mistakes)


JWT = {"algorithms": ["RS256"], "jwks": "https://idp.example.com/jwks.json"}
ROUTE = {"path": "/a"}


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        # keys and shapes
        ({"routs": []}, ['unknown key "routs"', 'did you mean "routes"?']),
        ({"routes": [{"path": "/a", "limts": []}]}, ["routes[0].limts", 'did you mean "limits"?']),
        ({"tiers": {"free": {"limit": []}}}, ["tiers.free.limit", 'did you mean "limits"?']),
        ({"mode": "enforc"}, ['mode = "enforc" is not known', 'did you mean "enforce"?']),
        ({"strict": "yes"}, ["write true or false"]),
        ({"strict": 1}, ["write true or false"]),
        ({"lease_seconds": 0}, ["lease_seconds = 0 is out of bounds", "write at least 1"]),
        ({"lease_seconds": 1.5}, ["write a whole number"]),
        ({"lease_seconds": True}, ["write a whole number"]),
        ({"routes": {"path": "/a"}}, ["routes = a table has the wrong type"]),
        ({"budgets": 3}, ["write a table"]),
        ({"store": ""}, ["store is empty"]),
        ({"identity": {"user": 7}}, ["identity.user", "write a list"]),
        # store and ledger
        ({"store": "redis+cluster://h"}, ["comes with Redis Cluster", "sqlite:///llm_guard.db"]),
        ({"store": "redis://h:port"}, ["port in the URL is not a number", "redis://user:password@host:6379/0"]),
        ({"store": "redis+sentinel://h"}, ["name the service"]),
        ({"store": "mongo://h"}, ['unknown scheme "mongo"', "write one of sqlite"]),
        ({"store": "guard.db"}, ["is not a URL"]),
        ({"store": "sqlite://guard.db"}, ['write three slashes: "sqlite:///guard.db"']),
        ({"store": "sqlite:///:memory:"}, ["would be lost"]),
        ({"ledger": "postgres://h/d"}, ['write "postgresql://…"']),
        ({"ledger": "mysql://h/d"}, ['unknown scheme "mysql"']),
        # contradictions
        ({"timezone": "Europe/Berln"}, ['did you mean "Europe/Berlin"?']),
        ({"budgets": {"hard": 0.8}}, ["budgets.hard", "hard = 0.8 is below critical = 0.9"]),
        ({"budgets": {"critical": 1.2}}, ["budgets.critical", "is below critical = 1.2"]),
        ({"budgets": {"warning": 0}}, ["before anything is spent"]),
        ({"budgets": {"hard": "110%"}}, ['"110%" is no part']),
        ({"budgets": {"overdraft": -0.1}}, ["-0.1 is no part"]),
        ({"models": {"a": "a"}}, ["goes in a circle: a → a"]),
        ({"models": {"a": "b", "b": "c", "c": "a", "d": "a"}}, ["goes in a circle: a → b → c → a"]),
        ({"prices": {"models": {"m": {"input": 1}}}}, ['price of "m" has no output']),
        ({"prices": {"models": {"m": {}}}}, ["has no input and no output"]),
        ({"prices": {"models": {"m": {"input": -1, "output": 1}}}}, ["-1 is no price"]),
        # routes
        ({"routes": [{}]}, ["the route has no path"]),
        ({"routes": [{"path": "chat"}]}, ['write "/chat"']),
        ({"routes": [{"path": "/<int:id>"}]}, ["angle brackets"]),
        ({"routes": [{"path": "/{id:integer}"}]}, ['unknown convertor "integer"', 'did you mean "int"?']),
        ({"routes": [{**ROUTE, "methods": ["PSOT"]}]}, ['did you mean "POST"?']),
        ({"routes": [{**ROUTE, "methods": ["OPTIONS"]}]}, ["OPTIONS is never guarded"]),
        ({"routes": [{**ROUTE, "methods": []}]}, ["methods is empty"]),
        ({"routes": [{**ROUTE, "api": "openai.chta"}]}, ['did you mean "openai.chat"?']),
        ({"routes": [{**ROUTE, "model": "body:modell"}]}, ['write "body:model"']),
        ({"routes": [{**ROUTE, "degrade": ["modl"]}]}, ['unknown rung "modl"', 'did you mean "model"?']),
        ({"routes": [{**ROUTE, "degrade": ["cache", "cache"], "cache": {}}]}, ["stands there twice"]),
        ({"routes": [{**ROUTE, "degrade": ["model"]}]}, ["there is no [models]"]),
        (
            {"routes": [{**ROUTE, "degrade": ["model"], "model": "x"}], "models": {"a": "b"}},
            ['names no cheaper one for "x"'],
        ),
        ({"routes": [{**ROUTE, "cache": {"scope": "world"}}]}, ["routes[0].cache.scope", '"shared"']),
        ({"routes": [ROUTE, ROUTE]}, ["routes[1].path", "is never reached", "remove one of them"]),
        ({"routes": [{"path": "/{x}"}, ROUTE]}, ["is never reached", "move it above routes[0]"]),
        ({"routes": [{**ROUTE, "name": "n"}, {"path": "/b", "name": "n"}]}, ["routes[1].name", "as well"]),
        # identity
        ({"identity": {"user": ["jwt:sub"]}}, ["identity.user[0]", "[identity.jwt]"]),
        ({"identity": {"user": ["jwt:sub", "scope:user.id", "header:x-user-id"]}}, ["there is no [identity.jwt]"]),
        ({"identity": {"jwt": {**JWT, "key": "env:K"}}}, ["names several keys: key, jwks"]),
        ({"identity": {"jwt": {}}}, ["names no key"]),
        ({"identity": {"jwt": {**JWT, "algorithms": []}}}, ["names no algorithm"]),
        ({"identity": {"jwt": {**JWT, "algorithms": ["none"]}}}, ["accepts unsigned tokens"]),
        ({"identity": {"jwt": {**JWT, "algorithms": ["HS256", "RS256"]}}}, ["mixes secrets"]),
        ({"identity": {"jwt": {**JWT, "algorithms": ["HS256"]}}}, ["takes no key set"]),
        ({"identity": {"jwt": {"key": "env:NOWHERE"}}}, ["the environment has no NOWHERE"]),
        ({"identity": {"jwt": {"key": "file:nowhere.pem"}}}, ["there is no file"]),
        ({"identity": {"jwt": {"jwks_file": "nowhere.json"}}}, ["there is no file"]),
        ({"identity": {"jwt": {"algorithms": ["HS256"], "key": "s3cret-text"}}}, ['write "env:NAME"']),
        ({"identity": {"trusted_proxies": ["10.0.0.1/8"]}}, ["identity.trusted_proxies[0]", "10.0.0.0/8"]),
        ({"identity": {"anonymous": "yes"}}, ['"reject"']),
        # the gateway, alerts
        ({"upstreams": [{}]}, ["has no prefix", "has no url"]),
        ({"upstreams": [{"prefix": "x", "url": "https://h"}]}, ['write "/x"']),
        ({"upstreams": [{"prefix": "/", "url": "h:80"}]}, ["not a web address"]),
        ({"upstreams": [{"prefix": "/", "url": "https://h", "provider": "opnai"}]}, ['did you mean "openai"?']),
        ({"upstreams": [{"prefix": "/", "url": "https://h", "api_key": "env:K"}]}, ["api_key is for a provider"]),
        (
            {"upstreams": [{"prefix": "/a", "url": "https://h"}, {"prefix": "/a/", "url": "https://i"}]},
            ["upstreams[1].prefix", "as well"],
        ),
        ({"alerts": [{}]}, ["goes nowhere"]),
        ({"alerts": [{"to": "sms:1"}]}, ["names no receiver"]),
    ],
)
def test_a_mistake_says_what_stands_there_and_what_would_be_right(mapping: dict[str, Any], says: list[str]) -> None:
    report = said(mapping, {"K": "k"})

    assert [words for words in says if words not in report] == []


@pytest.mark.parametrize(
    "mapping",
    [
        {"budgets": {"overdraft": 0.3}, "limits": ["$5/day global"]},  # no rung down yet
        {"limits": ["$5/day per tag:team+workflow"]},
        {"routes": [{"path": "/a", "usage": "captured", "api": "openai.chat"}]},
        {"routes": [{"path": "/a", "degrade": ["model"], "model": "body:model"}], "models": {"a": "b"}},
        {"routes": [{"path": "/{x:int}"}, {"path": "/{x}"}]},
        {"models": {"a": "b", "b": "c"}},
    ],
)
def test_what_only_looks_odd_is_no_mistake(mapping: dict[str, Any]) -> None:
    assert lasting(load_config(mapping, environ={})) == []


@pytest.mark.parametrize(
    ("mapping", "place"),
    [
        ({"routes": [{"path": "/a", "degrade": ["cache"], "cache": {"ttl": 9}}]}, "routes[0].degrade"),
        ({"routes": [{"path": "/a", "cache": {"ttl": 9}}]}, "routes[0].cache"),
        ({"upstreams": [{"prefix": "/", "url": "http://127.0.0.1:3000"}]}, "upstreams[0]"),
        ({"alerts": [{"to": "log"}]}, "alerts[0]"),
    ],
)
def test_what_does_nothing_yet_is_said(mapping: dict[str, Any], place: str) -> None:
    warnings = load_config(mapping, environ={}).warnings

    assert [w.where for w in warnings if LATER in w.problem and w.where.endswith(place)]


def test_no_secret_is_shown() -> None:
    report = said(
        {
            "store": "redis://user:SECRET/SECRET@host/0",
            "identity": {"jwt": {"algorithms": ["HS256"], "key": "SECRET"}},
            "upstreams": [{"prefix": "/", "url": "https://h", "provider": "openai", "api_key": "SECRET"}],
            "alerts": [{"to": "SECRET"}, {"to": ["SECRET"]}],
        }
    )

    assert "SECRET" not in report


def test_a_loaded_configuration_shows_no_secret(tmp_path: Path) -> None:
    config = load_config(
        {
            "ledger": "postgresql://user:SECRET@host/db",
            "identity": {"user": ["jwt:sub"], "jwt": {"algorithms": ["HS256"], "key": "env:K"}},
            "alerts": [{"to": "https://hooks.example.com/SECRET"}],
        },
        environ={"K": "SECRET"},
    )

    assert config.identity.jwt is not None
    assert config.identity.jwt.key == "SECRET"
    assert "SECRET" not in repr(config)


def test_a_key_file_is_found_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "key.txt").write_text("0123456789abcdef0123456789abcdef\n")
    path = tmp_path / "g.toml"
    path.write_text('[identity.jwt]\nalgorithms = ["HS256"]\nkey = "file:key.txt"\n')

    jwt = load_config(path, environ={}).identity.jwt

    assert jwt is not None
    assert jwt.key == "0123456789abcdef0123456789abcdef"


# ---------------------------------------------------------------- files that cannot be read


def test_a_missing_file_is_told_how_to_get_one(tmp_path: Path) -> None:
    assert "llm-guard-mw init" in said(str(tmp_path / "none.toml"))


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert "cannot be read" in said(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\nstore = \n", ["g.toml:2", "Invalid value"]),
        ("\n\nlimits = [\n", ["g.toml:3", "is not closed"]),
        ("\n\nlimits = [1\nx = 2\n", ["g.toml:4", "close the list"]),
        ("a = 1\na = 2\n", ["g.toml:2", "a second time"]),
        ('key = "SECRET\n', ["g.toml:1", "close the quotes"]),
        ("[routes\n", ["g.toml:1"]),
    ],
)
def test_a_file_that_is_no_toml_names_the_line(write: Any, text: str, says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        write(text)

    assert [words for words in says if words not in str(caught.value)] == []
    assert "SECRET" not in str(caught.value)


def test_a_file_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "g.toml"
    path.write_bytes(b"\n\nname = 'caf\xe9'\n")

    assert f"{path}:3" in said(str(path))


# ---------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ({"limits": ["$5/day global", "$7/day global"]}, "only the lower one applies"),
        ({"routes": [{"path": "/a", "degrade": ["cache"]}]}, "keeps no answers"),
        ({"identity": {"user": ["header:x-user"]}}, "nobody is trusted"),
        ({"identity": {"user": ["scope:id"], "tenant": [], "tier": [], "jwt": JWT}}, "no source reads tokens"),
        (
            {"upstreams": [{"prefix": "/o", "url": "https://h", "provider": "openai", "api_key": "env:NOWHERE"}]},
            "has no NOWHERE",
        ),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(mapping: dict[str, Any], says: str) -> None:
    (warning,) = lasting(load_config(mapping, environ={}))

    assert says in str(warning)


def test_a_check_warns_of_models_without_a_price(write: Any, tmp_path: Path) -> None:
    Path("p.toml").write_text(
        '[[routes]]\npath = "/a"\nmodel = "my-own"\n[models]\n"gpt-4o" = "nobodys"\nmine = "gpt-4o"\n'
        "[prices.models.mine]\ninput = 1\noutput = 2\n"
    )

    warnings = load_config("p.toml", environ={}, check=True).warnings

    assert [warning.where for warning in warnings] == ["p.toml:3 routes[0].model", "p.toml:5 models.gpt-4o"]
    assert load_config("p.toml", environ={}).warnings == ()


def test_the_sample_is_accepted_without_a_warning_and_guards_something(tmp_path: Path) -> None:
    path = tmp_path / "llm_guard.toml"
    path.write_text(sample_config(), encoding="utf-8")

    config = load_config(path, environ={}, check=True)

    route = config.policy.route("POST", "/api/chat")
    assert config.warnings == ()
    assert len(config.policy.limits_for(route, Principal("alice", tier="free"), Tags())) == 6
