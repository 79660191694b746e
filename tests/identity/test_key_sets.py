"""Key sets: read off the request path, refreshed, rotated, and kept when they cannot be had."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from structlog.testing import capture_logs

from llm_guard_mw.bearer import BearerReader, JWTRules, KeyReader, KeySetFile, KeySetURL, parse_key_set
from llm_guard_mw.errors import ConfigError, IdentityError
from llm_guard_mw.http import HttpRequest

OLD, NEW = (rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2))


def jwk(private, kid: str | None, **more) -> dict:
    kinds = {rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm, ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm}
    (algorithm,) = (algorithm for kind, algorithm in kinds.items() if isinstance(private, kind))
    named = {} if kid is None else {"kid": kid}
    return {**json.loads(algorithm.to_jwk(private.public_key())), **named, **more}


def key_set(*keys: dict) -> bytes:
    return json.dumps({"keys": keys}).encode()


def bearing(private, kid: str | None = None, algorithm: str = "RS256") -> HttpRequest:
    token = jwt.encode({"sub": "alice"}, private, algorithm, headers={} if kid is None else {"kid": kid})
    return HttpRequest("POST", "/", headers=((b"authorization", f"Bearer {token}".encode()),))


def eventually(claim: Callable[[], object]) -> None:
    """Waits for another thread, as short as it can."""
    deadline = time.monotonic() + 10
    while not claim():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.005)


class Issuer:
    """An identity provider on localhost."""

    def __init__(self) -> None:
        self.document, self.status, self.fetches = key_set(jwk(OLD, "old")), 200, 0
        self.open = threading.Event()
        self.open.set()
        issuer = self

        class Reply(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.fetches += 1
                issuer.open.wait(10)
                self.send_response(issuer.status)
                self.send_header("content-length", str(len(issuer.document)))
                self.send_header("location", "/elsewhere")
                self.end_headers()
                self.wfile.write(issuer.document)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Reply)
        self.url = f"http://127.0.0.1:{self.server.server_port}/jwks.json"


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    thread = threading.Thread(target=issuer.server.serve_forever, args=(0.01,))
    thread.start()
    yield issuer
    issuer.open.set()
    issuer.server.shutdown()
    issuer.server.server_close()
    thread.join()


@pytest.fixture
def open_reader() -> Iterator[Callable[..., BearerReader]]:
    opened = []

    def make(**fields) -> BearerReader:
        opened.append(BearerReader(JWTRules(**fields)))
        return opened[-1]

    yield make
    for reader in opened:
        reader.close()


# ---------------------------------------------------------------- URL


def test_until_the_keys_are_read_nobody_is_judged_and_nobody_waits(issuer, open_reader):
    issuer.open.clear()
    reader = open_reader(jwks=issuer.url)

    with pytest.raises(IdentityError, match="could not be read yet") as caught:
        reader.claims(bearing(OLD, "old"))
    issuer.open.set()

    assert caught.value.retry_after_seconds == 1
    eventually(lambda: reader._key_ring.keys)
    assert reader.claims(bearing(OLD, "old")) == {"sub": "alice"}


def test_warm_reads_the_keys_before_the_first_request(issuer, open_reader):
    reader = open_reader(jwks=issuer.url)

    reader.warm()

    eventually(lambda: reader._key_ring.keys)
    assert reader.claims(bearing(OLD, "old")) == {"sub": "alice"}
    assert issuer.fetches == 1


def test_an_unknown_key_has_the_set_read_again_but_not_at_every_request(issuer, open_reader):
    reader = open_reader(jwks=issuer.url)
    reader.warm()
    eventually(lambda: reader._key_ring.keys)
    issuer.document = key_set(jwk(OLD, "old"), jwk(NEW, "new"))

    with pytest.raises(IdentityError, match="not known here") as just_read:
        reader.claims(bearing(NEW, "new"))
    reader._key_ring._attempted_at -= 31
    with pytest.raises(IdentityError, match="not known yet") as under_way:
        reader.claims(bearing(NEW, "new"))

    assert just_read.value.retry_after_seconds is None
    assert under_way.value.retry_after_seconds == 1
    eventually(lambda: len(reader._key_ring.keys.keys) == 2)
    assert reader.claims(bearing(NEW, "new")) == {"sub": "alice"}
    assert issuer.fetches == 2


@pytest.mark.parametrize(
    ("status", "document", "problem"),
    [
        (500, b"", "answers 500"),
        (302, b"", "answers 302"),
        (200, b"<html>", "is not a JSON Web Key Set"),
        (200, b'{"keys":[]}', "holds no key"),
        (200, b"[" + b" " * 1_048_577, "is larger than"),
    ],
)
def test_old_keys_stay_in_use_while_new_ones_cannot_be_had(issuer, status, document, problem):
    reader = KeyReader(KeySetURL(issuer.url), every_seconds=600)
    reader.refresh()
    before = reader.keys
    issuer.status, issuer.document = status, document

    with capture_logs() as logs:
        told = reader.refresh()

    assert problem in told
    assert reader.keys is before is not None
    assert [(line["event"], line["old_keys_in_use"]) for line in logs] == [("jwks_unreadable", True)]


def test_a_failed_read_is_tried_again_soon_and_then_less_often():
    reader = KeyReader(KeySetURL("http://127.0.0.1:1/"), every_seconds=600)

    pauses = []
    with capture_logs():
        for _ in range(7):
            reader.refresh()
            pauses.append(reader._pause_seconds())

    assert pauses == [1, 2, 4, 8, 16, 30, 30]


def test_a_key_that_was_taken_out_of_the_set_proves_nothing_more(issuer, open_reader):
    reader = open_reader(jwks=issuer.url)
    reader.warm()
    eventually(lambda: reader._key_ring.keys)
    request = bearing(OLD, "old")
    reader.claims(request)
    issuer.document = key_set(jwk(NEW, "new"))

    reader._key_ring.refresh()

    with pytest.raises(IdentityError, match="not known here"):
        reader.claims(request)


def test_a_forked_process_reads_its_own_keys(issuer, open_reader):
    reader = open_reader(jwks=issuer.url)
    reader.warm()
    eventually(lambda: reader._key_ring.keys)
    parents = reader._key_ring._thread

    reader._key_ring._pid = -1  # what a child sees of its parent's
    reader.warm()

    assert reader._key_ring._thread is not parents
    eventually(lambda: issuer.fetches == 2)


def test_close_ends_the_thread(issuer, open_reader):
    reader = open_reader(jwks=issuer.url)
    reader.warm()
    eventually(lambda: reader._key_ring.keys)

    reader.close()

    eventually(lambda: not reader._key_ring._thread.is_alive())


def test_plain_http_to_another_host_is_warned_of():
    with capture_logs() as logs:
        KeySetURL("http://idp.example/jwks.json")
        KeySetURL("http://localhost:8080/jwks.json")
        KeySetURL("https://idp.example/jwks.json")

    assert [line["event"] for line in logs] == ["jwks_over_plain_http"]


# ---------------------------------------------------------------- file


def test_a_key_file_is_read_before_the_first_request(tmp_path, open_reader):
    file = tmp_path / "jwks.json"
    file.write_bytes(key_set(jwk(OLD, "old")))

    reader = open_reader(jwks_file=str(file))

    assert reader.claims(bearing(OLD, "old")) == {"sub": "alice"}


@pytest.mark.parametrize(("content", "problem"), [(None, "FileNotFoundError"), (b"{}", "is not a JSON Web Key Set")])
def test_a_key_file_that_cannot_be_used_is_a_mistake_at_once(tmp_path, content, problem):
    file = tmp_path / "jwks.json"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(ConfigError, match=problem), capture_logs():
        BearerReader(JWTRules(jwks_file=str(file)))


def test_a_key_file_that_was_replaced_is_read_again(tmp_path):
    file, next_file = tmp_path / "jwks.json", tmp_path / "next.json"
    file.write_bytes(key_set(jwk(OLD, "old")))
    reader = KeyReader(KeySetFile(str(file)), every_seconds=2)
    reader.refresh()
    first = reader.keys

    reader.refresh()
    unchanged = reader.keys
    next_file.write_bytes(key_set(jwk(NEW, "new")))
    os.replace(next_file, file)
    reader.refresh()

    assert unchanged is first
    assert reader.keys.candidates("new", "RS256")
    assert not reader.keys.candidates("old", "RS256")


# ---------------------------------------------------------------- the keys in it


def test_a_token_without_kid_is_tried_with_every_key_that_suits(tmp_path, open_reader):
    file = tmp_path / "jwks.json"
    file.write_bytes(key_set(jwk(OLD, "old"), jwk(NEW, "new")))

    assert open_reader(jwks_file=str(file)).claims(bearing(NEW)) == {"sub": "alice"}


def test_a_key_is_used_for_its_own_algorithm_only(tmp_path, open_reader):
    file = tmp_path / "jwks.json"
    file.write_bytes(key_set(jwk(OLD, "old", alg="RS512")))
    reader = open_reader(jwks_file=str(file), algorithms=("RS256", "RS512"))

    with pytest.raises(IdentityError, match="not known"):
        reader.claims(bearing(OLD, "old"))
    assert reader.claims(bearing(OLD, "old", "RS512")) == {"sub": "alice"}


def test_an_elliptic_key_verifies_next_to_an_rsa_one(tmp_path, open_reader):
    curve = ec.generate_private_key(ec.SECP256R1())
    file = tmp_path / "jwks.json"
    file.write_bytes(key_set(jwk(OLD, "k"), jwk(curve, "k")))

    reader = open_reader(jwks_file=str(file), algorithms=("RS256", "ES256"))

    assert reader.claims(bearing(curve, "k", "ES256")) == {"sub": "alice"}
    assert reader.claims(bearing(OLD, "k")) == {"sub": "alice"}


def test_secrets_encryption_keys_weak_keys_and_nonsense_are_left_out():
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    document = key_set(
        {"kty": "oct", "k": "c2VjcmV0", "kid": "secret"},
        jwk(OLD, "encryption", use="enc"),
        jwk(weak, "weak"),
        {"kty": "RSA", "kid": "half"},
        {"kty": "EC", "crv": "P-1", "x": "", "y": "", "kid": "odd"},
        {"kty": "RSA", "alg": ["RS256"], "kid": "list"},
        "nonsense",  # type: ignore[arg-type]
        jwk(NEW, "good"),
    )

    assert [key.kid for key in parse_key_set(document).keys] == ["good"]
