"""Which wire format an outgoing request has, and whose it is: told from its method, host and path.

The path decides the format, its end first, since proxies put things in front. The host decides only the provider.
Endpoints that cost nothing (model lists, token counting) and those without a bound (batches, realtime, videos) have
names of their own, so that a caller can tell them from those that are metered. docs/reference/api-names.md
lists them all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

#: What a path ends with. The first that matches counts, so the more telling ones stand first.
_ANY, _POST, _GET = "", "POST", "GET"
_PATHS: Final[Sequence[tuple[str, re.Pattern[str], str]]] = tuple(
    (method, re.compile(pattern), api)
    for method, pattern, api in (
        # Gemini: the verb stands behind a colon
        (_POST, r":(?:stream)?[gG]enerateContent$", "gemini.generate"),
        (_POST, r":(?:countTokens|computeTokens)$", "gemini.count_tokens"),
        (_POST, r":(?:batchE|asyncBatchE|e)mbedContents?$", "gemini.embed"),
        (_POST, r":batchGenerateContent$", "gemini.batches"),
        (_POST, r":predictLongRunning$", "gemini.videos"),
        (_POST, r":fetchPredictOperation$", "gemini.operations"),
        (_POST, r":predict$", "vertex.predict"),
        (_ANY, r"\.BidiGenerateContent(?:Constrained)?$", "gemini.live"),
        (_POST, r"/v1(?:beta|alpha)\d*/(?:[^:]+/)?interactions$", "gemini.interactions"),
        (_GET, r"/v1(?:beta|alpha)\d*/(?:[^:]+/)?interactions/[^/]+$", "gemini.interactions.retrieve"),
        (_ANY, r"/v1(?:beta|alpha)\d*/(?:[^:]+/)?interactions/[^/]+/cancel$", "gemini.interactions.cancel"),
        ("DELETE", r"/v1(?:beta|alpha)\d*/(?:[^:]+/)?interactions/[^/]+$", "gemini.interactions.delete"),
        (_ANY, r"/cachedContents(?:/|$)", "gemini.caches"),
        (_ANY, r"/tunedModels(?:/[^/:]+)?$", "gemini.fine_tuning"),
        (_ANY, r"/batchPredictionJobs(?:/|$)", "gemini.batches"),
        # Anthropic, and Anthropic on Vertex
        (_POST, r"/publishers/anthropic/models/count-tokens:rawPredict$", "anthropic.count_tokens"),
        (_POST, r"/publishers/anthropic/models/[^/]+:(?:streamR|r)awPredict$", "anthropic.messages"),
        (_POST, r"/publishers/mistralai/models/[^/]+:(?:streamR|r)awPredict$", "openai.chat"),
        (_ANY, r"/messages/batches(?:/|$)", "anthropic.batches"),
        (_POST, r"/messages/count_tokens$", "anthropic.count_tokens"),
        # Bedrock: the model stands in the middle, and an ARN has slashes of its own
        (_POST, r"/model/.+/converse(?:-stream)?$", "bedrock.converse"),
        (_POST, r"/model/.+/invoke(?:-with-response-stream)?$", "bedrock.invoke"),
        (_POST, r"/model/.+/count-tokens$", "bedrock.count_tokens"),
        (_ANY, r"/model/.+/invoke-with-bidirectional-stream$", "bedrock.realtime"),
        (_ANY, r"/(?:async-invoke|model-invocation-jobs?)(?:/|$)", "bedrock.batches"),
        # IBM's watsonx
        (_POST, r"/ml/v\d[^/]*/(?:.+/)?generation(?:/text)?(?:_stream)?$", "watsonx.generation"),
        (_POST, r"/ml/v\d[^/]*/(?:.+/)?text/chat(?:_stream)?$", "openai.chat"),
        (_POST, r"/ml/v\d[^/]*/(?:.+/)?text/tokenization$", "openai.count_tokens"),
        # Others who have chat's format under a name of their own
        (_POST, r"/serving-endpoints/[^/]+/invocations$", "openai.chat"),  # Databricks
        (_POST, r"/cortex/inference:complete$", "openai.chat"),  # Snowflake
        (_POST, r"/agents/completions$", "openai.chat"),  # Mistral
        # OpenAI and all who speak like it
        (_ANY, r"/threads/runs$", "openai.runs"),
        (_ANY, r"/threads/[^/]+/runs(?:/|$)", "openai.runs"),
        (_ANY, r"/threads(?:/|$)", "openai.threads"),
        (_ANY, r"/assistants(?:/[^/]+)?$", "openai.assistants"),
        (_ANY, r"/conversations(?:/|$)", "openai.conversations"),
        (_POST, r"/chat/completions$", "openai.chat"),
        (_ANY, r"/chat/completions(?:/[^/]+(?:/messages)?)?$", "openai.chat.stored"),
        (_POST, r"/responses$", "openai.responses"),
        (_POST, r"/responses/compact$", "openai.responses.compact"),
        (_POST, r"/responses/input_tokens$", "openai.count_tokens"),
        (_POST, r"/responses/[^/]+/cancel$", "openai.responses.cancel"),
        (_GET, r"/responses/[^/]+/input_items$", "openai.responses.input_items"),
        (_GET, r"/responses/[^/]+$", "openai.responses.retrieve"),
        ("DELETE", r"/responses/[^/]+$", "openai.responses.delete"),
        (_POST, r"/completions$", "openai.completions"),
        (_POST, r"/(?:multimodal|contextualized)?embeddings$", "openai.embeddings"),
        (_POST, r"/moderations$", "openai.moderations"),
        (_POST, r"/images/(?:generations|edits|variations)$", "openai.images"),
        (_POST, r"/audio/(?:transcriptions|translations)$", "openai.audio"),
        (_POST, r"/audio/speech$", "openai.speech"),
        (_ANY, r"/realtime(?:/|$)", "openai.realtime"),
        (_ANY, r"/videos(?:/|$)", "openai.videos"),
        (_ANY, r"/fine_tuning(?:/|$)", "openai.fine_tuning"),
        (_ANY, r"/vector_stores(?:/|$)", "openai.vector_stores"),
        (_ANY, r"/containers(?:/|$)", "openai.containers"),
        (_ANY, r"/evals(?:/|$)", "openai.evals"),
        # Anthropic's plain names, after the threads, which have messages as well
        (_POST, r"/messages$", "anthropic.messages"),
        (_POST, r"/v1/complete$", "anthropic.complete"),
    )
)

_COHERE = (
    (r"/v1/chat$", "cohere.chat.v1"),
    (r"/v2/chat$", "cohere.chat.v2"),
    (r"/(?:v\d/)?generate$", "cohere.generate"),
    (r"/(?:v\d/)?embed$", "cohere.embed"),
    (r"/(?:v\d/)?classify$", "cohere.classify"),
    (r"/(?:v\d/)?summarize$", "cohere.summarize"),
    (r"/(?:v\d/)?(?:de)?tokenize$", "cohere.tokenize"),
    (r"/(?:v\d/)?embed-jobs$", "cohere.batches"),
)
_OLLAMA = (
    (r"/api/chat$", "ollama.chat"),
    (r"/api/generate$", "ollama.generate"),
    (r"/api/embed(?:dings)?$", "ollama.embed"),
)

#: What several providers have under one name. `*` is filled with the family of the host.
_SHARED: Final[Sequence[tuple[re.Pattern[str], str]]] = (
    (re.compile(r"/batches(?:/|$)"), "*.batches"),
    (re.compile(r"/files(?:/|$)|/files:[a-z]+$"), "*.files"),
    (re.compile(r"/uploads(?:/|$)"), "*.uploads"),
    (re.compile(r"/operations(?:/|$)"), "*.operations"),
    (re.compile(r"/models(?:/|$)"), "*.models"),
    # Cohere's, and whoever has taken it over.
    (re.compile(r"/rerank$"), "cohere.rerank"),
)
#: What only a few providers have. On any other host such a path may be an app's own.
_OF_PROVIDERS: Final[Mapping[str, Sequence[tuple[re.Pattern[str], str]]]] = {
    provider: tuple((re.compile(pattern), api) for pattern, api in paths)
    for provider, paths in (
        ("cohere", _COHERE),
        ("azure", _COHERE),
        ("ollama", _OLLAMA),
        (
            "huggingface",
            (
                (r"/(?:generate|generate_stream)$", "huggingface.generate"),
                (r"^/(?:hf-inference/)?models/[^/]+(?:/[^/]+)?$", "huggingface.generate"),
                (r"^/$", "huggingface.generate"),
            ),
        ),
        (
            "mistral",
            (
                (r"/ocr$", "mistral.ocr"),
                (r"/conversations(?:/[^/]+(?:/restart)?)?$", "mistral.conversation"),
                (r"/(?:chat/)?(?:moderations|classifications)$", "openai.moderations"),
            ),
        ),
        ("aleph-alpha", ((r"^/complete$", "aleph-alpha.complete"),)),
        ("xai", ((r"/tokenize-text$", "openai.count_tokens"),)),
    )
}
#: A path like these may be anything on a host that nobody knows, unless it stands below an API's usual root.
_API_ROOT = re.compile(r"/(?:v\d+(?:beta|alpha)?\d*|openai)/")

#: Hosts, whole or by their end (with a leading dot), and whose they are.
_HOSTS: Final[Sequence[tuple[str, str]]] = (
    ("api.openai.com", "openai"),
    (".api.openai.com", "openai"),
    (".openai.azure.com", "azure"),
    (".cognitiveservices.azure.com", "azure"),
    (".api.cognitive.microsoft.com", "azure"),
    (".services.ai.azure.com", "azure"),
    (".models.ai.azure.com", "azure"),
    (".inference.ai.azure.com", "azure"),
    (".inference.ml.azure.com", "azure"),
    ("models.inference.ai.azure.com", "azure"),
    ("api.anthropic.com", "anthropic"),
    ("generativelanguage.googleapis.com", "google"),
    ("aiplatform.googleapis.com", "vertex"),
    ("-aiplatform.googleapis.com", "vertex"),
    (".aiplatform.googleapis.com", "vertex"),
    (".rep.googleapis.com", "vertex"),
    ("api.mistral.ai", "mistral"),
    ("codestral.mistral.ai", "mistral"),
    ("api.groq.com", "groq"),
    ("api.x.ai", "xai"),
    (".api.x.ai", "xai"),
    ("api.deepseek.com", "deepseek"),
    ("openrouter.ai", "openrouter"),
    (".openrouter.ai", "openrouter"),
    ("api.together.xyz", "together"),
    ("api.together.ai", "together"),
    ("api.perplexity.ai", "perplexity"),
    ("api.cerebras.ai", "cerebras"),
    ("api.fireworks.ai", "fireworks"),
    ("api.voyageai.com", "voyage"),
    ("api.cohere.com", "cohere"),
    ("api.cohere.ai", "cohere"),
    ("ollama.com", "ollama"),
    ("router.huggingface.co", "huggingface"),
    ("api-inference.huggingface.co", "huggingface"),
    (".endpoints.huggingface.cloud", "huggingface"),
    ("ai-gateway.vercel.sh", "vercel-gateway"),
    ("api.portkey.ai", "portkey"),
    ("gateway.pydantic.dev", "pydantic-gateway"),
    ("api.avian.io", "avian"),
    ("api.inference.crusoecloud.com", "crusoe"),
    (".snowflakecomputing.com", "snowflake"),
    ("api.z.ai", "zai"),
    ("api.moonshot.ai", "moonshot"),
    (".ml.cloud.ibm.com", "watsonx"),
    ("api.aleph-alpha.com", "aleph-alpha"),
    ("api.deepinfra.com", "deepinfra"),
    ("api.sambanova.ai", "sambanova"),
    ("api.novita.ai", "novita"),
    ("api.jina.ai", "jina"),
    ("api.ai21.com", "ai21"),
    ("api.minimax.io", "minimax"),
    ("api.hyperbolic.xyz", "hyperbolic"),
    ("api.studio.nebius.com", "nebius"),
    ("integrate.api.nvidia.com", "nvidia"),
    ("models.github.ai", "github"),
    (".cloud.databricks.com", "databricks"),
    (".azuredatabricks.net", "databricks"),
    ("dashscope-intl.aliyuncs.com", "dashscope"),
    ("dashscope.aliyuncs.com", "dashscope"),
)
_BEDROCK_HOST = re.compile(
    r"(?:[^.]+\.)?bedrock(-mantle|-runtime)?(?:-fips)?\.[^.]+\.(?:vpce\.)?(?:amazonaws\.com|api\.aws)(?:\.cn)?\Z"
)
_OLLAMA_PORT = ":11434"

#: Whoever is known by a host.
PROVIDER_NAMES: Final = (*dict.fromkeys(provider for _, provider in _HOSTS), "bedrock", "bedrock-mantle")

_FAMILIES = {"anthropic": "anthropic", "google": "gemini", "vertex": "gemini"}


def identify_api(method: str, host: str, path: str, body: bytes | None = None) -> tuple[str | None, str | None]:
    """The `api` and the `provider` of a request; None for what is not known.

    `host` may have a port, `path` a query. The body is looked at only where the path leaves the format open.
    """
    provider = _provider_of(host.strip().lower())
    path = re.sub(r"/{2,}", "/", "/" + path.partition("?")[0].partition("#")[0]).rstrip("/")
    return _api_of(method.upper(), path, provider, body or b""), provider


def _provider_of(host: str) -> str | None:
    if host.endswith(_OLLAMA_PORT):
        return "ollama"
    host = host.partition(":")[0].rstrip(".")
    for name, provider in _HOSTS:
        if host == name or (name[0] in ".-" and host.endswith(name)):
            return provider
    bedrock = _BEDROCK_HOST.match(host)
    if bedrock:
        return "bedrock-mantle" if bedrock[1] == "-mantle" else "bedrock"
    return None


def _api_of(method: str, path: str, provider: str | None, body: bytes) -> str | None:
    if method == "POST":
        for pattern, api in _OF_PROVIDERS.get(provider or "", ()):
            if pattern.search(path or "/"):
                return api
    for wanted, pattern, api in _PATHS:
        if wanted in ("", method) and pattern.search(path):
            return api
    if method == "POST" and path.endswith(("rawPredict", "RawPredict")):
        return "anthropic.messages" if b'"anthropic_version"' in body else "openai.chat"
    for pattern, api in _SHARED:
        if pattern.search(path) and (provider is not None or _API_ROOT.search(path)):
            return api.replace("*", _FAMILIES.get(provider or "", "openai"))
    return None
