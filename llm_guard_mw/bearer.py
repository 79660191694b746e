"""What a bearer JWT proves: its claims, once the signature and the times are good.

Rule 1: the operator says which algorithms count, never the token. Secrets (HS*) and key pairs cannot be mixed, so
no public key can be used as a secret, and `none` is not an algorithm.
Rule 2: keys come from the configuration only. Of the token's header `alg` and `kid` are read, and `kid` does
nothing but choose among keys that are already here: `jku`, `jwk` and `x5u` are not looked at.
Rule 3: no request waits for a key. A daemon thread reads the key set; until its first success nobody can be
judged (503, try again), and after that old keys stay in use while new ones cannot be had.

PyJWT verifies signatures. The claims are checked here, by a clock that tests may choose, and on one path for
fresh tokens and remembered ones.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson

from llm_guard_mw.errors import ConfigError, IdentityError, Mistake
from llm_guard_mw.http import HttpRequest
from llm_guard_mw.logs import log

if TYPE_CHECKING:
    from jwt import PyJWS

#: Larger ones are refused unread. Real tokens are below 4 kB; most servers end a header line at 8 kB.
TOKEN_BYTES_MAX = 16_384

#: How many verified tokens are remembered.
VERIFIED_MAX = 1024

KEY_SET_BYTES_MAX = 1_048_576
KEYS_TRIED_MAX = 8

REFRESH_SECONDS = 600.0
FILE_LOOK_SECONDS = 2.0
#: How often a key that is not known may make us read the key set again: kids are the caller's to invent.
UNKNOWN_KEY_SECONDS = 30.0
FETCH_TIMEOUT_SECONDS = 5.0

#: Which kind of key an algorithm takes (`kty` of a JWK).
KEY_TYPES = {
    **dict.fromkeys(("HS256", "HS384", "HS512"), "oct"),
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), "RSA"),
    **dict.fromkeys(("ES256", "ES256K", "ES384", "ES512"), "EC"),
    "EdDSA": "OKP",
}


@dataclass(frozen=True, slots=True)
class JWTRules:
    """How bearer tokens are judged: `[identity.jwt]`. Exactly one of `key`, `jwks`, `jwks_file` is set."""

    algorithms: tuple[str, ...] = ("RS256",)
    key: str | None = field(default=None, repr=False)  # a secret for HS*, else a PEM
    jwks: str | None = None  # URL
    jwks_file: str | None = None
    audience: tuple[str, ...] = ()  # one of them must be in `aud`; (): `aud` is not looked at
    issuer: str | None = None
    leeway_seconds: float = 0
    require: tuple[str, ...] = ()  # claims that must be there, "exp" for instance


def jwt_mistakes(rules: JWTRules, where: str = "identity.jwt") -> list[Mistake]:
    """What is wrong with the rules, as far as it can be told without reading a key."""
    mistakes = []
    if not rules.algorithms:
        mistakes.append(Mistake(f"{where}.algorithms", "names no algorithm", 'algorithms = ["RS256"]'))
    for algorithm in rules.algorithms:
        if algorithm.lower() == "none":
            mistakes.append(Mistake(f"{where}.algorithms", f'"{algorithm}" accepts unsigned tokens', "leave it out"))
        elif algorithm not in KEY_TYPES:
            known = ", ".join(KEY_TYPES)
            mistakes.append(Mistake(f"{where}.algorithms", f'"{algorithm}" is not an algorithm', f"one of {known}"))
    kinds = {KEY_TYPES.get(algorithm) for algorithm in rules.algorithms}
    if "oct" in kinds and len(kinds) > 1:
        problem = "mixes secrets (HS*) with key pairs, so a public key could sign tokens"
        mistakes.append(Mistake(f"{where}.algorithms", problem, "name those that your issuer really uses"))
    named = [name for name in ("key", "jwks", "jwks_file") if getattr(rules, name)]
    if len(named) != 1:
        problem = "names no key to judge tokens by" if not named else f"names several keys: {', '.join(named)}"
        mistakes.append(Mistake(where, problem, "set exactly one of key, jwks, jwks_file"))
    if "oct" in kinds and (rules.jwks or rules.jwks_file):
        mistakes.append(Mistake(f"{where}.algorithms", "HS* takes no key set", 'key = "env:JWT_KEY"'))
    if rules.jwks and not _fetchable(rules.jwks):
        problem = f'"{rules.jwks}" is not a URL that can be fetched'
        mistakes.append(Mistake(f"{where}.jwks", problem, "https://idp.example.com/jwks.json"))
    if rules.leeway_seconds < 0:
        mistakes.append(Mistake(f"{where}.leeway_seconds", f"{rules.leeway_seconds} is negative", "0 or more"))
    return mistakes


def _fetchable(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("https", "http") and bool(parts.hostname)


class BearerReader:
    """Reads the claims off `Authorization: Bearer`, and keeps the keys to judge them by."""

    def __init__(self, rules: JWTRules, *, clock: Callable[[], float] = time.time) -> None:
        mistakes = jwt_mistakes(rules)
        if mistakes:
            raise ConfigError(mistakes)
        self._rules = rules
        self._clock = clock
        self._signatures = _signatures(rules.algorithms)
        self._key_ring = self._open_key_ring()
        self._verified: dict[bytes, tuple[Mapping[str, Any], KeySet]] = {}
        self._verified_lock = threading.Lock()

    def warm(self) -> None:
        """Begin to read the keys, so that the first request finds them."""
        if isinstance(self._key_ring, KeyReader):
            self._key_ring.start()

    def close(self) -> None:
        """Stop reading keys."""
        if isinstance(self._key_ring, KeyReader):
            self._key_ring.close()

    def claims(self, request: HttpRequest) -> Mapping[str, Any] | None:
        """The proven claims; None where the request carries no JWT; IdentityError where it carries a bad one.

        A bearer credential without the two dots of a JWT (an API key, an opaque session) is somebody else's
        business and no answer. One with them that fails any check is refused.
        """
        token = _bearer_token(request)
        if token is None:
            return None
        if len(token) > TOKEN_BYTES_MAX:
            raise IdentityError(f"the token is larger than {TOKEN_BYTES_MAX} bytes")
        keys = self._keys()
        # The digest stands for the token, so that no credential stays in memory.
        digest = hashlib.sha256(token).digest()
        known = self._verified.get(digest)
        # Other keys, other truth: a token is proven by the very key set that is in use.
        claims = known[0] if known is not None and known[1] is keys else None
        if claims is None:
            claims = self._verify(token, keys)
            self._remember(digest, claims, keys)
        self._check_times(claims)
        return claims

    def _keys(self) -> KeySet:
        if isinstance(self._key_ring, KeySet):
            return self._key_ring
        self._key_ring.start()
        if self._key_ring.keys is None:
            raise IdentityError("the keys to judge tokens by could not be read yet", retry_after_seconds=1)
        return self._key_ring.keys

    def _verify(self, token: bytes, keys: KeySet) -> Mapping[str, Any]:
        header = self._header(token)
        algorithm, kid = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or algorithm not in self._rules.algorithms:
            raise IdentityError("the token is not signed with an algorithm that is accepted here")
        if kid is not None and not isinstance(kid, str):
            raise IdentityError("the token is malformed (kid)")
        candidates = keys.candidates(kid, algorithm)
        if not candidates:
            if isinstance(self._key_ring, KeyReader) and self._key_ring.ask():
                raise IdentityError("the token's key is not known yet", retry_after_seconds=1)
            raise IdentityError("the token is signed with a key that is not known here")
        return self._check_claims(_claims_object(self._payload(token, algorithm, candidates)))

    def _header(self, token: bytes) -> Mapping[str, Any]:
        try:
            header: dict[str, Any] = self._signatures.get_unverified_header(token)
        except Exception as error:  # a hostile header can also end in RecursionError and ValueError
            raise IdentityError(f"the token is malformed ({type(error).__name__})") from None
        return header

    def _payload(self, token: bytes, algorithm: str, candidates: tuple[Any, ...]) -> bytes:
        reason = ""
        for key in candidates:
            try:
                payload: bytes = self._signatures.decode(token, key, algorithms=[algorithm])
            except Exception as error:  # as above; whatever it is, this key did not prove the token
                reason = type(error).__name__
            else:
                return payload
        raise IdentityError(f"the token's signature is not valid ({reason})")

    def _check_claims(self, claims: Mapping[str, Any]) -> Mapping[str, Any]:
        """What can be said of a token once and for all."""
        for name in self._rules.require:
            if claims.get(name) is None:
                raise IdentityError(f"the token has no claim {name}")
        if self._rules.audience:
            said = claims.get("aud")
            audiences = said if isinstance(said, list) else [said]
            if not any(isinstance(one, str) and one in self._rules.audience for one in audiences):
                raise IdentityError("the token is meant for another audience")
        if self._rules.issuer is not None and claims.get("iss") != self._rules.issuer:
            raise IdentityError("the token comes from another issuer")
        return claims

    def _check_times(self, claims: Mapping[str, Any]) -> None:
        now, leeway = self._clock(), self._rules.leeway_seconds
        expires, begins = _moment(claims, "exp"), _moment(claims, "nbf")
        if expires is not None and expires <= now - leeway:
            raise IdentityError("the token has expired")
        if begins is not None and begins > now + leeway:
            raise IdentityError("the token is not valid yet")

    def _remember(self, digest: bytes, claims: Mapping[str, Any], keys: KeySet) -> None:
        with self._verified_lock:
            self._verified.pop(digest, None)
            if len(self._verified) >= VERIFIED_MAX:
                del self._verified[next(iter(self._verified))]
            self._verified[digest] = claims, keys

    def _open_key_ring(self) -> KeySet | KeyReader:
        rules = self._rules
        if rules.key is not None:
            return _configured_keys(rules.key, rules.algorithms, self._signatures)
        if rules.jwks is not None:
            return KeyReader(KeySetURL(rules.jwks), every_seconds=REFRESH_SECONDS)
        source = KeySetFile(rules.jwks_file or "")
        reader = KeyReader(source, every_seconds=FILE_LOOK_SECONDS, unknown_key_seconds=FILE_LOOK_SECONDS)
        # A file is there or it is not: that is known before the first request.
        problem = reader.refresh()
        if problem is not None:
            fix = "a file that holds a JSON Web Key Set"
            raise ConfigError([Mistake("identity.jwt.jwks_file", f"{rules.jwks_file}: {problem}", fix)])
        return reader


def _bearer_token(request: HttpRequest) -> bytes | None:
    values = request.header_values(b"authorization")
    if len(set(values)) > 1:
        raise IdentityError("the request carries two different Authorization headers")
    if not values:
        return None
    scheme, _, credential = values[0].strip().partition(b" ")
    credential = credential.strip()
    return credential if scheme.lower() == b"bearer" and credential.count(b".") == 2 else None


def _claims_object(payload: bytes) -> Mapping[str, Any]:
    try:
        claims = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise IdentityError("the token's claims are not JSON") from None
    if not isinstance(claims, dict):
        raise IdentityError("the token's claims are not a JSON object")
    return claims


def _moment(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise IdentityError(f"the token's {name} is not a time")
    return value


# ---------------------------------------------------------------- keys


@dataclass(frozen=True, slots=True, eq=False)
class _Key:
    kid: str | None
    kind: str  # kty
    algorithm: str | None  # None: any of its kind
    material: Any = field(repr=False)  # whatever PyJWT's algorithm takes


@dataclass(frozen=True, slots=True, eq=False)
class KeySet:
    """The keys of one moment. Compared by identity: what one set has proven, another has not."""

    keys: tuple[_Key, ...]
    kids_matter: bool = True  # False: one configured key, whatever the token calls it

    def candidates(self, kid: str | None, algorithm: str) -> tuple[Any, ...]:
        """The keys that may have signed such a token."""
        return tuple(
            key.material
            for key in self.keys
            if key.kind == KEY_TYPES[algorithm]
            and key.algorithm in (None, algorithm)
            and (kid is None or not self.kids_matter or key.kid == kid)
        )[:KEYS_TRIED_MAX]


def _signatures(algorithms: tuple[str, ...]) -> PyJWS:
    """PyJWT's verifier, with no other algorithms than these."""
    try:
        from jwt import PyJWS
        from jwt.algorithms import HMACAlgorithm, has_crypto
    except ImportError:
        raise _not_installed("PyJWT") from None
    if not has_crypto and any(KEY_TYPES[algorithm] != "oct" for algorithm in algorithms):
        raise _not_installed("cryptography")

    class Hmac(HMACAlgorithm):
        def check_key_length(self, key: bytes) -> str | None:
            return None  # told once, at the start, and not at every request

    signatures = PyJWS(algorithms=list(algorithms))
    hashes = {"HS256": HMACAlgorithm.SHA256, "HS384": HMACAlgorithm.SHA384, "HS512": HMACAlgorithm.SHA512}
    for algorithm in algorithms:
        if algorithm in hashes:
            signatures.unregister_algorithm(algorithm)
            signatures.register_algorithm(algorithm, Hmac(hashes[algorithm]))
    return signatures


def _not_installed(package: str) -> ConfigError:
    return ConfigError(
        [Mistake("identity.jwt", f"{package} is not installed", 'pip install "llm_guard_mw[jwt]"')],
    )


def _configured_keys(text: str, algorithms: tuple[str, ...], signatures: PyJWS) -> KeySet:
    """One key for all algorithms, parsed once; a PEM that does not suit them is the operator's mistake."""
    keys = []
    for algorithm in dict.fromkeys(algorithms):
        try:
            material = signatures.get_algorithm_by_name(algorithm).prepare_key(text)
        except Exception as error:  # PyJWT and cryptography have many; the key itself must not show
            fix = "a PEM public key, or a secret if algorithms are HS*"
            raise ConfigError(
                [Mistake("identity.jwt.key", f"is no key for {algorithm} ({type(error).__name__})", fix)]
            ) from None
        _refuse_small_rsa(material)
        keys.append(_Key(None, KEY_TYPES[algorithm], algorithm, material))
    if KEY_TYPES[algorithms[0]] == "oct" and len(text.encode()) < 32:
        log.warning("jwt_key_is_short", fix="use a random secret of at least 32 bytes")
    return KeySet(tuple(keys), kids_matter=False)


def _refuse_small_rsa(material: Any) -> None:  # Any: a key of cryptography, which is imported lazily
    if getattr(material, "key_size", 2048) < 2048 and hasattr(material, "public_numbers") and _is_rsa(material):
        problem = f"an RSA key of {material.key_size} bits can be broken"
        raise ConfigError([Mistake("identity.jwt.key", problem, "2048 bits or more")])


def _is_rsa(material: Any) -> bool:  # Any: as above
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey

    return isinstance(material, RSAPublicKey | RSAPrivateKey)


def parse_key_set(document: bytes) -> KeySet:
    """The usable signature keys of a JSON Web Key Set. ValueError where there is none."""
    from jwt import PyJWK, PyJWTError

    try:
        listed = orjson.loads(document)["keys"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise ValueError("is not a JSON Web Key Set") from None
    keys = []
    for jwk in listed if isinstance(listed, list) else []:
        # Secrets have no place in a set that anybody may read, and an encryption key proves nothing.
        if not isinstance(jwk, dict) or jwk.get("kty") not in ("RSA", "EC", "OKP") or jwk.get("use") == "enc":
            continue
        try:
            material = PyJWK(jwk).key
        except (PyJWTError, ValueError, TypeError, AttributeError):
            continue
        kid = jwk.get("kid")
        if jwk["kty"] == "RSA" and material.key_size < 2048:
            continue
        keys.append(_Key(kid if isinstance(kid, str) else None, jwk["kty"], jwk.get("alg"), material))
    if not keys:
        raise ValueError("holds no key that can verify a signature")
    return KeySet(tuple(keys))


class KeySetURL:
    """Where a key set is fetched from."""

    def __init__(self, url: str) -> None:
        self._url = url
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            log.warning("jwks_over_plain_http", host=parts.hostname, fix="whoever is on the way can forge identities")

    def read(self) -> bytes:
        import httpx2  # here: its import takes longer than all of ours

        # Redirects are not followed: the operator named the issuer's address, nobody else does.
        with (
            httpx2.Client(timeout=FETCH_TIMEOUT_SECONDS) as client,
            client.stream("GET", self._url, headers={"accept": "application/json"}) as response,
        ):
            if response.status_code != 200:
                raise ValueError(f"answers {response.status_code}")
            document = b""
            for chunk in response.iter_bytes():
                document += chunk
                if len(document) > KEY_SET_BYTES_MAX:
                    raise ValueError(f"is larger than {KEY_SET_BYTES_MAX} bytes")
        return document


class KeySetFile:
    """A key set on disk, read again when it was written or replaced."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None

    def read(self) -> bytes | None:
        """Its bytes; None while it is the same as before."""
        state = os.stat(self._path)
        seen = state.st_mtime_ns, state.st_size, state.st_ino
        if seen == self._seen:
            return None
        if state.st_size > KEY_SET_BYTES_MAX:
            raise ValueError(f"is larger than {KEY_SET_BYTES_MAX} bytes")
        with open(self._path, "rb") as file:
            document = file.read()
        self._seen = seen
        return document


class KeyReader:
    """Keeps a key set fresh, on a daemon thread of its own.

    `keys` is None until the first success. A failed read changes nothing: the keys of before stay, and the next
    attempt comes sooner. The thread does not survive a fork; `start` is cheap, called with every request, and
    makes a new one where there is none.
    """

    def __init__(
        self,
        source: KeySetURL | KeySetFile,
        *,
        every_seconds: float,
        unknown_key_seconds: float = UNKNOWN_KEY_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keys: KeySet | None = None
        self._source = source
        self._every_seconds = every_seconds
        self._unknown_key_seconds = unknown_key_seconds
        self._monotonic = monotonic
        self._attempted_at = -math.inf
        self._failures = 0
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._stopping = threading.Event()
        self._wake = threading.Event()

    def start(self) -> None:
        """Have the thread run."""
        if self._thread is not None and self._thread.is_alive() and self._pid == os.getpid():
            return
        if self._pid != os.getpid():
            self._forget_parent()
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                self._stopping.clear()
                self._thread = threading.Thread(target=self._run, name="llm_guard-jwks", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """End the thread; one that hangs in a fetch ends with it."""
        self._stopping.set()
        self._wake.set()

    def ask(self) -> bool:
        """A token names a key that is not here. True while a read that may bring it is under way."""
        if self._monotonic() - self._attempted_at < self._unknown_key_seconds:
            return False
        self._wake.set()
        return True

    def refresh(self) -> str | None:
        """One read, here and now. What went wrong, or None."""
        problem: str | None = None
        try:
            document = self._source.read()
            if document is not None:
                self.keys = parse_key_set(document)
        except Exception as error:  # files, networks and foreign JSON fail in many ways; old keys stay in use
            self._failures += 1
            problem = str(error) if isinstance(error, ValueError) else type(error).__name__
            log.warning("jwks_unreadable", problem=problem, old_keys_in_use=self.keys is not None)
        else:
            self._failures = 0
        self._attempted_at = self._monotonic()
        return problem

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.refresh()
            self._wake.wait(self._pause_seconds())
            self._wake.clear()

    def _pause_seconds(self) -> float:
        if self._failures == 0:
            return self._every_seconds
        return min(2.0 ** (self._failures - 1), UNKNOWN_KEY_SECONDS)

    def _forget_parent(self) -> None:
        # A fork copies locks in whatever state another thread has them, so a child makes its own.
        self._pid = os.getpid()
        self._thread = None
        self._starting = threading.Lock()
        self._stopping = threading.Event()
        self._wake = threading.Event()
