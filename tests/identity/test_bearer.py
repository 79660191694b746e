"""Bearer tokens: what is proven, what is refused, and the usual ways to forge one."""

import base64
import hashlib
import hmac
import json
import sys
import time

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from structlog.testing import capture_logs

from llm_guard_mw import bearer
from llm_guard_mw.bearer import JWTRules, jwt_mistakes
from llm_guard_mw.errors import ConfigError, IdentityError
from llm_guard_mw.http import HttpRequest
from llm_guard_mw.identity import Identifier, IdentityRules
from llm_guard_mw.model import Principal

SECRET = "a secret of more than thirty-two bytes"
NOW = 1_795_219_200

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def public_pem(private) -> str:
    return (
        private.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def identifier(*more_users: str, clock=lambda: NOW, **jwt_fields) -> Identifier:
    fields = {"algorithms": ("HS256",), "key": SECRET, **jwt_fields}
    rules = IdentityRules(
        user=("jwt:sub", *more_users), tenant=("jwt:org",), tier=("jwt:plan",), jwt=JWTRules(**fields)
    )
    return Identifier(rules, clock=clock)


def bearing(token: str | bytes, *more: tuple[bytes, bytes], scheme: bytes = b"Bearer", **surroundings) -> HttpRequest:
    credential = token.encode() if isinstance(token, str) else token
    headers = ((b"authorization", scheme + b" " + credential), *more)
    return HttpRequest("POST", "/", headers=headers, peer=("203.0.113.7", 1), surroundings=surroundings)


def signed(claims: dict, key=SECRET, algorithm: str = "HS256", **header) -> str:
    return jwt.encode(claims, key, algorithm, headers=header)


def b64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def forged(header: dict, claims: dict, secret: bytes) -> bytes:
    """A token whose header says whatever the forger likes, signed with HMAC."""
    signing_input = b64(json.dumps(header).encode()) + b"." + b64(json.dumps(claims).encode())
    return signing_input + b"." + b64(hmac.digest(secret, signing_input, hashlib.sha256))


# ---------------------------------------------------------------- proven


def test_a_good_token_tells_user_tenant_and_tier():
    token = signed({"sub": "alice", "org": "acme", "plan": "free", "exp": NOW + 60})

    assert identifier().identify(bearing(token)) == Principal("alice", "acme", "free")


@pytest.mark.parametrize("scheme", [b"Bearer", b"bearer", b"BEARER", b"Bearer  "])
def test_the_scheme_is_read_in_any_case(scheme):
    assert identifier().identify(bearing(signed({"sub": "alice"}), scheme=scheme)).user == "alice"


@pytest.mark.parametrize(
    ("source", "claims"),
    [
        ("jwt:user.id", {"user": {"id": "alice"}}),
        ("jwt:https://example.com/user", {"https://example.com/user": "alice"}),
        ("jwt:https://example.com/user.id", {"https://example.com/user": {"id": "alice"}}),
    ],
)
def test_a_claim_may_be_nested_or_namespaced(source, claims):
    rules = IdentityRules((source,), (), (), jwt=JWTRules(("HS256",), SECRET))

    assert Identifier(rules).identify(bearing(signed(claims))).user == "alice"


def test_a_numeric_subject_is_an_id():
    assert identifier().identify(bearing(forged({"alg": "HS256"}, {"sub": 7}, SECRET.encode()))).user == "7"


@pytest.mark.parametrize(
    ("algorithm", "private"),
    [
        ("RS256", RSA_KEY),
        ("PS384", RSA_KEY),
        ("ES256", ec.generate_private_key(ec.SECP256R1())),
        ("EdDSA", ed25519.Ed25519PrivateKey.generate()),
    ],
)
def test_key_pairs_of_every_kind_verify(algorithm, private):
    guard = identifier(algorithms=(algorithm,), key=public_pem(private))

    assert guard.identify(bearing(signed({"sub": "alice"}, private, algorithm))).user == "alice"


def test_a_valid_token_without_the_claim_leaves_the_question_to_the_next_source():
    found = identifier("session:id").identify(bearing(signed({"org": "acme"}), session={"id": "bob"}))

    assert found == Principal("bob", "acme")


@pytest.mark.parametrize("credential", ["sk-live-abc", "a.b", "a.b.c.d.e", ""])
def test_a_bearer_credential_that_is_no_jwt_is_no_answer(credential):
    found = identifier("session:id").identify(bearing(credential, session={"id": "bob"}))

    assert found.user == "bob"


def test_another_scheme_is_no_answer():
    found = identifier("session:id").identify(bearing("YTpiLmMuZA==", scheme=b"Basic", session={"id": "bob"}))

    assert found.user == "bob"


# ---------------------------------------------------------------- refused


def refused(request: HttpRequest, guard: Identifier | None = None) -> str:
    """The reason of the refusal; the next source would have answered."""
    with pytest.raises(IdentityError) as caught:
        (guard or identifier("session:id")).identify(request)
    assert caught.value.retry_after_seconds is None
    return str(caught.value)


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (signed({"sub": "alice", "exp": NOW}), "the token has expired"),
        (signed({"sub": "alice", "nbf": NOW + 1}), "not valid yet"),
        (signed({"sub": "alice"}, "another secret of thirty-two bytes!"), "signature is not valid"),
        (signed({"sub": "alice"}, "a secret of thirty-two bytes or more" * 4, "HS512"), "algorithm"),
        (signed({"sub": ""}), "the id is empty"),
        (forged({"alg": "HS256"}, {"sub": "alice", "exp": "soon"}, SECRET.encode()), "exp is not a time"),
        (forged({"alg": "HS256"}, {"sub": "alice", "exp": True}, SECRET.encode()), "exp is not a time"),
        (forged({"alg": "HS256"}, ["alice"], SECRET.encode()), "not a JSON object"),
        (forged({"alg": "HS256"}, {"sub": ["alice"]}, SECRET.encode()), "is a list"),
        (forged({"alg": ["HS256"]}, {"sub": "alice"}, SECRET.encode()), "algorithm"),
        (forged({}, {"sub": "alice"}, SECRET.encode()), "algorithm"),
        (forged({"alg": "HS256", "kid": 7}, {"sub": "alice"}, SECRET.encode()), "malformed"),
        (forged({"alg": "HS256", "crit": ["exp"]}, {"sub": "alice"}, SECRET.encode()), "malformed|signature"),
        (b"..", "malformed"),
        (b"a.b.c", "malformed"),
        (b64(b"[" * 9000) + b".e30.x", "malformed"),
        (b"\xff.\xfe.\xfd", "malformed"),
        (b"a." + b"b" * 16_384 + b".c", "larger than 16384 bytes"),
    ],
)
def test_a_bad_token_is_refused_whatever_the_next_source_says(token, reason):
    told = refused(bearing(token, session={"id": "bob"}))

    assert told.startswith("jwt:")
    assert any(part in told for part in reason.split("|"))


@pytest.mark.parametrize("none", ["none", "None", "NONE", "nOnE"])
def test_an_unsigned_token_is_refused_in_every_spelling(none):
    unsigned = b64(json.dumps({"alg": none}).encode()) + b"." + b64(b'{"sub":"alice"}') + b"."

    assert "algorithm" in refused(bearing(unsigned))


def test_a_public_key_cannot_be_used_as_a_secret():
    pem = public_pem(RSA_KEY)
    token = forged({"alg": "HS256"}, {"sub": "alice"}, pem.encode())

    assert "algorithm" in refused(bearing(token), identifier(algorithms=("RS256",), key=pem))


@pytest.mark.parametrize("kid", ["../../../../dev/null", "' OR 1=1 --", "", "\u0000", "x" * 9000])
def test_a_kid_chooses_nothing_but_a_known_key(kid):
    empty_secret = forged({"alg": "HS256", "kid": kid}, {"sub": "alice"}, b"")
    mine = forged({"alg": "HS256", "kid": kid}, {"sub": "alice"}, SECRET.encode())

    refused(bearing(empty_secret))
    assert identifier().identify(bearing(mine)).user == "alice"


def test_a_key_inside_the_token_is_not_looked_at():
    mallory = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    inside = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(mallory.public_key()))
    token = signed({"sub": "alice"}, mallory, "RS256", jwk=inside, jku="https://mallory.example/jwks.json")

    assert "signature" in refused(bearing(token), identifier(algorithms=("RS256",), key=public_pem(RSA_KEY)))


def test_two_authorization_headers_that_differ_are_refused():
    good = signed({"sub": "alice"})

    told = refused(bearing(good, (b"authorization", b"Bearer " + signed({"sub": "bob"}).encode())))

    assert "two different Authorization headers" in told


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"aud": "app", "iss": "idp", "exp": NOW + 1}, None),
        ({"aud": ["other", "app"], "iss": "idp", "exp": NOW + 1}, None),
        ({"aud": "other", "iss": "idp", "exp": NOW + 1}, "audience"),
        ({"aud": [["app"]], "iss": "idp", "exp": NOW + 1}, "audience"),
        ({"iss": "idp", "exp": NOW + 1}, "audience"),
        ({"aud": "app", "iss": "idp2", "exp": NOW + 1}, "issuer"),
        ({"aud": "app", "exp": NOW + 1}, "issuer"),
        ({"aud": "app", "iss": "idp"}, "has no claim exp"),
    ],
)
def test_audience_issuer_and_required_claims_are_checked(claims, reason):
    guard = identifier(audience=("app",), issuer="idp", require=("exp",))
    request = bearing(signed({"sub": "alice", **claims}))

    if reason is None:
        assert guard.identify(request).user == "alice"
    else:
        assert reason in refused(request, guard)


def test_leeway_forgives_a_clock_that_is_a_little_off():
    guard = identifier(leeway_seconds=30)

    assert guard.identify(bearing(signed({"sub": "alice", "exp": NOW - 29, "nbf": NOW + 30}))).user == "alice"
    assert "expired" in refused(bearing(signed({"sub": "alice", "exp": NOW - 30})), guard)


# ---------------------------------------------------------------- remembered


def test_a_remembered_token_still_expires():
    now = [NOW]
    guard = identifier(clock=lambda: now[0])
    request = bearing(signed({"sub": "alice", "exp": NOW + 60}))
    guard.identify(request)

    now[0] = NOW + 60

    assert "expired" in refused(request, guard)


def test_a_token_is_verified_once_and_no_token_is_kept():
    reader = bearer.BearerReader(JWTRules(("HS256",), SECRET))
    token = signed({"sub": "alice"})
    first = reader.claims(bearing(token))

    assert reader.claims(bearing(token)) is first
    assert token not in repr(vars(reader))


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(bearer, "VERIFIED_MAX", 3)
    reader = bearer.BearerReader(JWTRules(("HS256",), SECRET))

    for number in range(10):
        reader.claims(bearing(signed({"sub": str(number)})))

    assert len(reader._verified) == 3


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("fields", "where", "problem"),
    [
        ({"algorithms": ()}, "identity.jwt.algorithms", "names no algorithm"),
        ({"algorithms": ("none",)}, "identity.jwt.algorithms", "accepts unsigned tokens"),
        ({"algorithms": ("RS257",)}, "identity.jwt.algorithms", "is not an algorithm"),
        ({"algorithms": ("HS256", "RS256")}, "identity.jwt.algorithms", "mixes secrets"),
        ({"key": None}, "identity.jwt", "names no key"),
        ({"jwks_file": "keys.json", "algorithms": ("RS256",)}, "identity.jwt", "names several keys"),
        ({"key": None, "jwks": "https://idp/x"}, "identity.jwt.algorithms", "takes no key set"),
        ({"key": None, "jwks": "file:///etc/x", "algorithms": ("RS256",)}, "identity.jwt.jwks", "not a URL"),
        ({"key": None, "jwks": "https://[", "algorithms": ("RS256",)}, "identity.jwt.jwks", "not a URL"),
        ({"leeway_seconds": -1}, "identity.jwt.leeway_seconds", "negative"),
    ],
)
def test_rules_that_could_let_anybody_in_are_mistakes(fields, where, problem):
    rules = JWTRules(**{"algorithms": ("HS256",), "key": SECRET, **fields})

    (mistake,) = [mistake for mistake in jwt_mistakes(rules) if mistake.where == where and problem in mistake.problem]
    assert mistake.fix
    with pytest.raises(ConfigError):
        identifier(**{"algorithms": ("HS256",), "key": SECRET, **fields})


@pytest.mark.parametrize(
    ("algorithm", "key"),
    [("RS256", "not a PEM"), ("HS256", public_pem(RSA_KEY)), ("ES256", public_pem(RSA_KEY))],
)
def test_a_key_that_does_not_suit_its_algorithm_is_a_mistake_and_stays_secret(algorithm, key):
    with pytest.raises(ConfigError, match=f"is no key for {algorithm}") as caught:
        identifier(algorithms=(algorithm,), key=key)

    assert key not in str(caught.value)


def test_a_small_rsa_key_is_a_mistake():
    small = rsa.generate_private_key(public_exponent=65537, key_size=1024)

    with pytest.raises(ConfigError, match="1024 bits"):
        identifier(algorithms=("RS256",), key=public_pem(small))


def test_a_short_secret_works_and_is_warned_of_once():
    with capture_logs() as logs:
        guard = identifier(key="secret")
        token = forged({"alg": "HS256"}, {"sub": "alice"}, b"secret")
        found = [guard.identify(bearing(token)).user for _ in range(2)]

    assert found == ["alice", "alice"]
    assert [line["event"] for line in logs] == ["jwt_key_is_short"]


def test_the_rules_do_not_show_their_key():
    assert SECRET not in repr(JWTRules(("HS256",), SECRET))


def test_without_pyjwt_the_mistake_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jwt", None)

    with pytest.raises(ConfigError, match="PyJWT is not installed") as caught:
        identifier()

    assert "llm_guard_mw[jwt]" in str(caught.value)


def test_the_clock_is_the_systems_unless_told_otherwise():
    guard = Identifier(IdentityRules(("jwt:sub",), (), (), jwt=JWTRules(("HS256",), SECRET)))

    assert guard.identify(bearing(signed({"sub": "alice", "exp": int(time.time()) + 600}))).user == "alice"
    assert "expired" in refused(bearing(signed({"sub": "alice", "exp": int(time.time()) - 600})), guard)
