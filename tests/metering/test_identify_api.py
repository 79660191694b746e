"""Which API an outgoing request is for: told from method, host and path."""

from pathlib import Path

import pytest

from llm_guard_mw.metering import identify_api, outgoing
from llm_guard_mw.metering.dialects import DIALECTS

OPENAI = "api.openai.com"
ANTHROPIC = "api.anthropic.com"
GOOGLE = "generativelanguage.googleapis.com"
BEDROCK = "bedrock-runtime.us-east-1.amazonaws.com"
VERTEX = "us-central1-aiplatform.googleapis.com"
VERTEX_ROOT = "/v1/projects/p/locations/us-central1/publishers"


@pytest.mark.parametrize(
    ("method", "host", "path", "api", "provider"),
    [
        ("POST", OPENAI, "/v1/chat/completions", "openai.chat", "openai"),
        ("post", "API.OpenAI.com:443", "/v1/chat/completions?x=1", "openai.chat", "openai"),
        ("POST", "eu.api.openai.com", "/v1/responses", "openai.responses", "openai"),
        ("GET", OPENAI, "/v1/responses/resp_1", "openai.responses.retrieve", "openai"),
        ("POST", OPENAI, "/v1/responses/resp_1/cancel", "openai.responses.cancel", "openai"),
        ("POST", OPENAI, "/v1/responses/compact", "openai.responses.compact", "openai"),
        ("POST", OPENAI, "/v1/responses/input_tokens", "openai.count_tokens", "openai"),
        ("GET", OPENAI, "/v1/responses/resp_1/input_items", "openai.responses.input_items", "openai"),
        ("POST", OPENAI, "/v1/completions", "openai.completions", "openai"),
        ("POST", OPENAI, "/v1/embeddings", "openai.embeddings", "openai"),
        ("POST", OPENAI, "/v1/moderations", "openai.moderations", "openai"),
        ("POST", OPENAI, "/v1/images/generations", "openai.images", "openai"),
        ("POST", OPENAI, "/v1/audio/transcriptions", "openai.audio", "openai"),
        ("POST", OPENAI, "/v1/audio/speech", "openai.speech", "openai"),
        ("POST", OPENAI, "/v1/batches", "openai.batches", "openai"),
        ("POST", OPENAI, "/v1/fine_tuning/jobs", "openai.fine_tuning", "openai"),
        ("GET", OPENAI, "/v1/realtime", "openai.realtime", "openai"),
        ("POST", OPENAI, "/v1/videos", "openai.videos", "openai"),
        ("POST", OPENAI, "/v1/files", "openai.files", "openai"),
        ("POST", OPENAI, "/v1/threads/t/messages", "openai.threads", "openai"),
        ("POST", OPENAI, "/v1/threads/t/runs", "openai.runs", "openai"),
        ("GET", OPENAI, "/v1/chat/completions/chatcmpl-1", "openai.chat.stored", "openai"),
        ("GET", OPENAI, "/v1/models", "openai.models", "openai"),
        ("GET", OPENAI, "/v1/models/gpt-4o", "openai.models", "openai"),
        ("POST", "x.openai.azure.com", "//openai/deployments/d/chat/completions", "openai.chat", "azure"),
        ("POST", "x.openai.azure.com", "/openai/v1/responses", "openai.responses", "azure"),
        ("POST", "x.services.ai.azure.com", "/models/chat/completions", "openai.chat", "azure"),
        ("POST", "x.services.ai.azure.com", "/anthropic/v1/messages", "anthropic.messages", "azure"),
        ("POST", ANTHROPIC, "/v1/messages?beta=true", "anthropic.messages", "anthropic"),
        ("POST", ANTHROPIC, "/v1/messages/count_tokens", "anthropic.count_tokens", "anthropic"),
        ("POST", ANTHROPIC, "/v1/messages/batches", "anthropic.batches", "anthropic"),
        ("GET", ANTHROPIC, "/v1/messages/batches/b/results", "anthropic.batches", "anthropic"),
        ("GET", ANTHROPIC, "/v1/models", "anthropic.models", "anthropic"),
        ("POST", ANTHROPIC, "/v1/files", "anthropic.files", "anthropic"),
        ("POST", GOOGLE, "/v1beta/models/gemini-2.5-flash:generateContent", "gemini.generate", "google"),
        ("POST", GOOGLE, "/v1/models/g:streamGenerateContent?alt=sse", "gemini.generate", "google"),
        ("POST", GOOGLE, "/v1beta/models/g:countTokens", "gemini.count_tokens", "google"),
        ("POST", GOOGLE, "/v1beta/models/g:embedContent", "gemini.embed", "google"),
        ("POST", GOOGLE, "/v1beta/models/g:batchEmbedContents", "gemini.embed", "google"),
        ("POST", GOOGLE, "/v1beta/models/g:batchGenerateContent", "gemini.batches", "google"),
        ("POST", GOOGLE, "/v1beta/models/veo:predictLongRunning", "gemini.videos", "google"),
        ("GET", GOOGLE, "/v1beta/models", "gemini.models", "google"),
        ("POST", GOOGLE, "/upload/v1beta/files", "gemini.files", "google"),
        ("POST", GOOGLE, "/v1beta/openai/chat/completions", "openai.chat", "google"),
        ("POST", VERTEX, f"{VERTEX_ROOT}/google/models/g:streamGenerateContent", "gemini.generate", "vertex"),
        ("POST", VERTEX, f"{VERTEX_ROOT}/anthropic/models/c@1:streamRawPredict", "anthropic.messages", "vertex"),
        ("POST", VERTEX, f"{VERTEX_ROOT}/anthropic/models/count-tokens:rawPredict", "anthropic.count_tokens", "vertex"),
        ("POST", VERTEX, f"{VERTEX_ROOT}/mistralai/models/m:rawPredict", "openai.chat", "vertex"),
        ("POST", "aiplatform.googleapis.com", f"{VERTEX_ROOT}/google/models/e:predict", "vertex.predict", "vertex"),
        ("POST", "api.mistral.ai", "/v1/chat/completions", "openai.chat", "mistral"),
        ("POST", "api.groq.com", "/openai/v1/chat/completions", "openai.chat", "groq"),
        ("POST", "api.x.ai", "/v1/responses", "openai.responses", "xai"),
        ("POST", "api.deepseek.com", "/chat/completions", "openai.chat", "deepseek"),
        ("POST", "openrouter.ai", "/api/v1/chat/completions", "openai.chat", "openrouter"),
        ("POST", "api.together.xyz", "/v1/completions", "openai.completions", "together"),
        ("POST", "api.perplexity.ai", "/chat/completions", "openai.chat", "perplexity"),
        ("POST", "bedrock-mantle.us-east-1.api.aws", "/v1/chat/completions", "openai.chat", "bedrock-mantle"),
        ("POST", "localhost:11434", "/v1/chat/completions", "openai.chat", "ollama"),
        ("POST", "llm.internal:8000", "/v1/chat/completions", "openai.chat", None),
        ("POST", "llm.internal", "/proxy/v1/messages", "anthropic.messages", None),
        ("GET", "llm.internal", "/v1/models", "openai.models", None),
    ],
)
def test_a_request_is_known_by_its_path_and_its_host(
    method: str, host: str, path: str, api: str, provider: str | None
) -> None:
    assert identify_api(method, host, path, None) == (api, provider)


@pytest.mark.parametrize(
    ("method", "host", "path"),
    [
        ("GET", "shop.example", "/models/42"),
        ("POST", "shop.example", "/files"),
        ("POST", "shop.example", "/cart"),
        ("GET", "shop.example", "/v1/embeddings"),
        ("POST", "shop.example", "/chat/completions.html"),
        ("GET", "", ""),
    ],
)
def test_a_request_of_another_kind_is_not_taken_for_one(method: str, host: str, path: str) -> None:
    assert identify_api(method, host, path, None) == (None, None)


@pytest.mark.parametrize(
    ("method", "host", "path", "api", "provider"),
    [
        ("POST", BEDROCK, "/model/anthropic.claude-sonnet-4-20250514-v1%3A0/converse", "bedrock.converse", "bedrock"),
        ("POST", BEDROCK, "/model/amazon.nova-lite-v1:0/converse-stream", "bedrock.converse", "bedrock"),
        ("POST", BEDROCK, "/model/arn:aws:bedrock:x:1:inference-profile/p/invoke", "bedrock.invoke", "bedrock"),
        ("POST", BEDROCK, "/model/m/invoke-with-response-stream", "bedrock.invoke", "bedrock"),
        ("POST", BEDROCK, "/model/m/count-tokens", "bedrock.count_tokens", "bedrock"),
        ("POST", BEDROCK, "/async-invoke", "bedrock.batches", "bedrock"),
        ("POST", BEDROCK, "/openai/v1/chat/completions", "openai.chat", "bedrock"),
        (
            "POST",
            "v-1.bedrock-runtime.eu-west-1.vpce.amazonaws.com",
            "/model/m/converse",
            "bedrock.converse",
            "bedrock",
        ),
        ("POST", "api.cohere.com", "/v1/chat", "cohere.chat.v1", "cohere"),
        ("POST", "api.cohere.com", "/v2/chat", "cohere.chat.v2", "cohere"),
        ("POST", "api.cohere.ai", "/v1/generate", "cohere.generate", "cohere"),
        ("POST", "api.cohere.com", "/v2/embed", "cohere.embed", "cohere"),
        ("POST", "api.cohere.com", "/v2/rerank", "cohere.rerank", "cohere"),
        ("POST", "api.cohere.com", "/v1/tokenize", "cohere.tokenize", "cohere"),
        ("POST", "api.cohere.com", "/compatibility/v1/chat/completions", "openai.chat", "cohere"),
        ("POST", "x.models.ai.azure.com", "/v2/chat", "cohere.chat.v2", "azure"),
        ("POST", "localhost:11434", "/api/chat", "ollama.chat", "ollama"),
        ("POST", "localhost:11434", "/api/generate", "ollama.generate", "ollama"),
        ("POST", "localhost:11434", "/api/embed", "ollama.embed", "ollama"),
        ("POST", "localhost:11434", "/v1/chat/completions", "openai.chat", "ollama"),
        ("POST", "api.mistral.ai", "/v1/ocr", "mistral.ocr", "mistral"),
        ("POST", "api.mistral.ai", "/v1/conversations", "mistral.conversation", "mistral"),
        ("GET", "api.mistral.ai", "/v1/conversations/c", "openai.conversations", "mistral"),
        ("POST", "api.mistral.ai", "/v1/agents/completions", "openai.chat", "mistral"),
        ("POST", "api-inference.huggingface.co", "/models/o/m", "huggingface.generate", "huggingface"),
        ("POST", "x.aws.endpoints.huggingface.cloud", "/", "huggingface.generate", "huggingface"),
        ("POST", "router.huggingface.co", "/hf-inference/models/o/m/v1/chat/completions", "openai.chat", "huggingface"),
        ("POST", "us-south.ml.cloud.ibm.com", "/ml/v1/text/generation?version=2", "watsonx.generation", "watsonx"),
        ("POST", "us-south.ml.cloud.ibm.com", "/ml/v1-beta/generation/text_stream", "watsonx.generation", "watsonx"),
        ("POST", "us-south.ml.cloud.ibm.com", "/ml/v1/text/chat_stream", "openai.chat", "watsonx"),
        ("POST", "api.aleph-alpha.com", "/complete", "aleph-alpha.complete", "aleph-alpha"),
        ("POST", "a.snowflakecomputing.com", "/api/v2/cortex/inference:complete", "openai.chat", "snowflake"),
        ("POST", "api.voyageai.com", "/v1/rerank", "cohere.rerank", "voyage"),
        ("POST", GOOGLE, "/v1beta/interactions", "gemini.interactions", "google"),
        ("GET", GOOGLE, "/v1beta/interactions/i1", "gemini.interactions.retrieve", "google"),
        # An app's own paths of these names are its own.
        ("POST", "shop.example", "/v1/chat", None, None),
        ("POST", "shop.example", "/api/chat", None, None),
        ("POST", "shop.example", "/api/generate", None, None),
        ("POST", "shop.example", "/rerank", None, None),
        ("POST", "shop.example", "/complete", None, None),
    ],
)
def test_other_makers_formats_are_told_from_host_and_path(
    method: str, host: str, path: str, api: str | None, provider: str | None
) -> None:
    assert identify_api(method, host, path, None) == (api, provider)


def test_a_host_that_only_looks_like_a_providers_is_not_the_providers() -> None:
    for host in ("api.openai.com.evil.example", "evilapi.openai.com", "openrouter.ai.example", "xapi.x.ai"):
        assert identify_api("POST", host, "/v1/chat/completions", None) == ("openai.chat", None)


def test_a_raw_prediction_is_known_by_its_body() -> None:
    path = "/v1/projects/p/locations/l/endpoints/e:rawPredict"

    assert identify_api("POST", VERTEX, path, b'{"anthropic_version":"vertex-2023-10-16"}')[0] == "anthropic.messages"
    assert identify_api("POST", VERTEX, path, b'{"messages":[]}')[0] == "openai.chat"


def test_every_name_is_in_the_documented_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "api-names.md").read_text()
    names = {api for _, _, api in outgoing._PATHS}
    names |= {api for paths in outgoing._OF_PROVIDERS.values() for _, api in paths} | set(DIALECTS)
    names |= {name.replace("*", family) for _, name in outgoing._SHARED for family in ("openai", "anthropic", "gemini")}
    # Names that no provider has: only OpenAI takes uploads in pieces, only Google has operations.
    names -= {"anthropic.uploads", "gemini.uploads", "anthropic.operations", "openai.operations"}

    assert {name for name in names if f"`{name}`" not in page} == set()


def test_every_provider_of_a_host_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "api-names.md").read_text()
    providers = {provider for _, provider in outgoing._HOSTS} | {"bedrock", "bedrock-mantle", "ollama"}

    assert {name for name in providers if f"`{name}`" not in page} == set()
