"""Which route guards a request, and which limits count for a call."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import compile_path as starlette_compile_path

from llm_guard_mw.model import Principal, Tags
from llm_guard_mw.notation import CONDITIONS
from llm_guard_mw.policy import Limit, Policy, Route, compile_path, parse_limit

ALICE = Principal(user="alice", tenant="acme")
NO_TAGS = Tags()


def at_route(name: str, *limits: object) -> Route:
    return Route(
        path=f"/{name}",
        name=name,
        limits=tuple(parse_limit(limit, place=f"route {name}") for limit in limits),  # type: ignore[arg-type]
    )


def under_tier(tier: str, *texts: str) -> tuple[Limit, ...]:
    return tuple(parse_limit(text, tier=tier) for text in texts)


def texts(limits: tuple[Limit, ...]) -> list[str]:
    return [limit.text for limit in limits]


# ---------------------------------------------------------------- paths

PATHS = [
    "/", "/api/chat", "/api/chat/", "/users/{id}", "/users/{id:int}/files/{name:path}", "/f/{x:float}", "/u/{key:uuid}",
    "/a.b/{x}-{y}", "/{everything:path}", "/über/{x}",
]  # fmt: skip
REQUESTED = [
    "/", "/api/chat", "/api/chat\n", "/api/chat/", "/api/chatx", "/api", "/users/7", "/users/x", "/users/",
    "/users/a/b",
    "/users/7/files/a/b.txt", "/users/7/files/", "/users/-7/files/x", "/f/1.5", "/f/1.", "/f/1", "/u/x",
    "/u/9b1deb4d-3b7d-4bad-9bdd-2b0d7b3dcb6d", "/u/9b1deb4d3b7d4bad9bdd2b0d7b3dcb6d", "/a.b/1-2", "/axb/1-2", "/über/x",
    "/users/7\n", "//", "/users/%2F", "",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_means_what_it_means_to_starlette(path: str) -> None:
    theirs, _, _ = starlette_compile_path(path)
    ours = compile_path(path)

    assert [bool(ours.match(requested)) for requested in REQUESTED] == [
        bool(theirs.match(requested)) for requested in REQUESTED
    ]


@given(st.sampled_from(PATHS), st.text(alphabet="/ab7.-\n{}é", max_size=12))
def test_any_request_matches_where_it_matches_in_starlette(path: str, requested: str) -> None:
    theirs, _, _ = starlette_compile_path(path)

    assert bool(compile_path(path).match("/" + requested)) == bool(theirs.match("/" + requested))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("api/chat", 'write "/api/chat"'),
        ("/users/{id:integer}", 'unknown convertor "integer"'),
        ("/users/{id}/{id}", "two parameters"),
        ("/users/{id", "brace"),
        ("/users/<int:id>", '"{name:int}"'),
    ],
)
def test_a_path_that_starlette_would_not_serve_like_that_is_refused(path: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        compile_path(path)


def test_the_first_route_in_file_order_guards_the_request() -> None:
    wide = Route("/chat/{model}", name="wide")
    narrow = Route("/chat/gpt", name="narrow")

    def guard_of(*routes: Route) -> str | None:
        found = Policy(routes=routes).route("POST", "/chat/gpt")
        return found.name if found else None

    assert guard_of(wide, narrow) == "wide"
    assert guard_of(narrow, wide) == "narrow"


def test_a_route_guards_its_methods_only_and_a_get_route_its_head_requests() -> None:
    policy = Policy(routes=(Route("/chat"), Route("/list", frozenset({"GET"}))))

    assert policy.route("POST", "/chat") is not None
    assert policy.route("GET", "/chat") is None
    assert policy.route("HEAD", "/list") is not None


def test_a_path_with_a_final_newline_is_guarded_since_starlette_serves_it() -> None:
    assert Policy(routes=(Route("/chat"),)).route("POST", "/chat\n") is not None


@given(
    paths=st.lists(st.sampled_from(["/a", "/b", "/a/b", "/{x}", "/a/{x}", "/{x:path}", "/{x:int}"]), max_size=6),
    methods=st.lists(
        st.sampled_from([frozenset({"GET"}), frozenset({"POST"}), frozenset({"GET", "POST"})]), min_size=6
    ),
    method=st.sampled_from(["GET", "POST", "HEAD", "PUT"]),
    requested=st.sampled_from(["/a", "/b", "/a/b", "/7", "/a/7", "/x/y/z", "/", "/a\n"]),
)
def test_the_table_finds_what_a_walk_through_the_file_finds(
    paths: list[str], methods: list[frozenset[str]], method: str, requested: str
) -> None:
    routes = tuple(Route(path, methods[i], name=str(i)) for i, path in enumerate(paths))

    walked = next((route.name for route in routes if route.matches(method, requested)), None)
    found = Policy(routes=routes).route(method, requested)

    assert (found.name if found else None) == walked


@pytest.mark.parametrize(
    ("earlier", "later", "covered"),
    [
        ("/a", "/a", True),
        ("/{x}", "/a", True),
        ("/{x}", "/{y:int}", True),
        ("/{y:int}", "/{x}", False),
        ("/{x:path}", "/a/{y}/{z:path}", True),
        ("/a/{x}", "/a/{y:path}", False),
        ("/a/7", "/a/{x:int}", False),
        ("/{x:float}", "/{y:int}", True),
        ("/{x:int}", "/{y:float}", False),
    ],
)
def test_a_route_covers_another_whose_every_path_it_matches(earlier: str, later: str, covered: bool) -> None:
    assert Route(earlier).covers(Route(later)) is covered


# ---------------------------------------------------------------- limits of a call


def test_limits_of_route_top_level_and_tier_all_count() -> None:
    route = at_route("chat", "20 requests/minute per user")
    policy = Policy(
        routes=(route, at_route("other", "1 request/minute per user")),
        limits=(parse_limit("$500/day global"),),
        tiers={"free": under_tier("free", "$1/month per user"), "pro": under_tier("pro", "$9/month per user")},
    )

    free = policy.limits_for(route, Principal("alice", tier="free"), NO_TAGS)
    unknown = policy.limits_for(route, ALICE, NO_TAGS)
    outside = policy.limits_for(None, ALICE, NO_TAGS)

    assert texts(free) == ["20 requests/minute per user", "$500/day global", "$1/month per user"]
    assert texts(unknown) == ["20 requests/minute per user", "$500/day global"]
    assert texts(outside) == ["$500/day global"]


@pytest.mark.parametrize("tier", ["free", None])
def test_of_one_balance_the_conditional_limit_comes_before_the_plain_one(tier: str | None) -> None:
    route = at_route(
        "chat",
        "5 requests/minute per user",
        {"limit": "20 requests/minute per user", "when": {"tier": "free"}},
        {"limit": "30 requests/minute per user", "when": {"tier": "free"}},
    )

    limits = Policy(routes=(route,)).limits_for(route, Principal("alice", tier=tier), NO_TAGS)

    assert texts(limits) == ["20 requests/minute per user" if tier else "5 requests/minute per user"]


def test_of_one_balance_the_lowest_plain_limit_counts() -> None:
    policy = Policy(limits=(parse_limit("$9/day per user"), parse_limit("$2/day per user")))

    assert texts(policy.limits_for(None, ALICE, NO_TAGS)) == ["$2/day per user"]


def test_a_tier_limit_replaces_the_plain_one_even_if_it_allows_more() -> None:
    policy = Policy(limits=(parse_limit("$2/day per user"),), tiers={"pro": under_tier("pro", "$9/day per user")})

    assert texts(policy.limits_for(None, Principal("alice", tier="pro"), NO_TAGS)) == ["$9/day per user"]


def test_limits_in_two_places_are_two_balances_and_both_count() -> None:
    route = at_route("chat", "$2/day per user")
    policy = Policy(routes=(route,), limits=(parse_limit("$3/day per user"),))

    assert texts(policy.limits_for(route, ALICE, NO_TAGS)) == ["$2/day per user", "$3/day per user"]


@pytest.mark.parametrize(
    ("when", "principal", "tags"),
    [
        ({"tier": "free"}, Principal(tier="free"), Tags()),
        ({"tier": ["trial", "free"]}, Principal(), Tags(tier="free", trusted=True)),
        ({"feature": "chat"}, Principal(), Tags(feature="chat", trusted=True)),
        ({"tenant": "acme"}, Principal(tenant="acme"), Tags()),
        ({"user": "alice"}, Principal("alice"), Tags()),
        ({"experiment": "e"}, Principal(), Tags(experiment="e", trusted=True)),
        ({"variant": "b"}, Principal(), Tags(variant="b", trusted=True)),
        ({"tag:team": "x"}, Principal(), Tags(free=(("team", "x"),), trusted=True)),
        ({"user": "alice", "tier": "free"}, Principal("alice", tier="free"), Tags()),
    ],
)
def test_a_condition_holds_for_whom_it_names_and_for_nobody_else(
    when: dict[str, object], principal: Principal, tags: Tags
) -> None:
    policy = Policy(limits=(parse_limit({"limit": "$1/day per user", "when": when}),))

    assert len(policy.limits_for(None, principal, tags)) == 1
    assert policy.limits_for(None, Principal("bob", "other", "pro"), Tags(feature="other", trusted=True)) == ()


_WORD = st.none() | st.sampled_from(["a", "b"])


@given(
    key=st.sampled_from([*CONDITIONS, "tag:team", "tag:experiment"]),
    principal=st.builds(Principal, user=_WORD, tenant=_WORD, tier=_WORD),
    tags=st.builds(
        Tags,
        feature=_WORD,
        tier=_WORD,
        experiment=_WORD,
        variant=_WORD,
        free=st.sampled_from([(), (("team", "a"),), (("team", "b"),)]),
        trusted=st.booleans(),
    ),
    feature=_WORD,
    model=_WORD,
)
def test_conditions_and_balances_see_the_same_values(
    key: str, principal: Principal, tags: Tags, feature: str | None, model: str | None
) -> None:
    policy = Policy(limits=(parse_limit({"limit": "$1/day per user", "when": {key: "a"}}),))

    chosen = policy.limits_for(None, principal, tags, feature=feature, model=model)
    values = policy.scope_values(None, principal, tags, feature=feature, model=model)

    said = values.tags.get(key) if key in ("experiment", "variant") else values.value(key)
    assert bool(chosen) == (said == "a")


def test_untrusted_tags_never_choose_a_limit() -> None:
    policy = Policy(
        limits=(parse_limit({"limit": "$1/day per user", "when": {"experiment": "e"}}),),
        tiers={"pro": under_tier("pro", "$9/day per user")},
    )

    assert policy.limits_for(None, ALICE, Tags(tier="pro", experiment="e")) == ()


def test_a_condition_on_the_model_looks_at_the_model_asked_for() -> None:
    policy = Policy(limits=(parse_limit({"limit": "$1/day per user", "when": {"model": "gpt-4o"}}),))

    assert policy.limits_for(None, ALICE, NO_TAGS) == ()
    assert len(policy.limits_for(None, ALICE, NO_TAGS, model="gpt-4o")) == 1


def test_the_feature_of_the_route_wins_over_a_tag() -> None:
    route = Route("/chat", feature="chat")
    policy = Policy(routes=(route,))
    tagged = Tags(feature="cheap", trusted=True)

    assert policy.scope_values(route, ALICE, tagged).feature == "chat"
    assert policy.scope_values(None, ALICE, tagged).feature == "cheap"
    assert policy.scope_values(route, ALICE, tagged, feature="job").feature == "job"


def test_the_limits_of_a_key_count_beside_all_others() -> None:
    policy = Policy(limits=(parse_limit("$3/day global"),))
    of_key = (parse_limit("$5/month per key", place="key k1"), parse_limit("$4/month per key", place="key k1"))

    limits = policy.limits_for(None, ALICE, NO_TAGS, key_limits=of_key)

    assert texts(limits) == ["$3/day global", "$4/month per key"]


def test_limits_that_count_together_have_different_slugs() -> None:
    route = at_route("chat", "$2/day per user", "$2/day per user", {"limit": "$2/month per user", "anchor": 15})
    policy = Policy(
        routes=(route,),
        limits=(parse_limit("$3/day per user"), parse_limit("$3/month per user")),
        tiers={"free": under_tier("free", "$1/day per user", "$1/month per tag:ü", "$1/month per tag:ö")},
    )

    everything = [*policy.limits, *policy.tiers["free"], *policy.routes[0].limits]
    slugs = [limit.slug for limit in everything]

    assert len(set(slugs)) == len(slugs)
    assert slugs[:2] == ["usd-day-user", "usd-month-user"]
    assert all(slug.replace("-", "").isalnum() and slug.isascii() and slug == slug.lower() for slug in slugs)
