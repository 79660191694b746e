"""The text of a request without its media, and what that media may cost at the most.

Media is recognised only in the places where providers take it. The same bytes in a message's text, in a tool's
arguments or in a schema are text to the provider, so they are text here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

_DEPTH_MAX = 200

#: Where one of these stands, a body may carry media, and is looked at piece by piece.
_MEDIA = re.compile(
    rb'"(?:image|video|audio|document|file|inlineData|inline_data|fileData|file_data|source|images|input_image|'
    rb"input_file|input_audio|image_url|video_url|file_url|document_url|file_id|fileUri|file_uri|container_upload|"
    rb"media|bytes|b64_json|image_file|input_video|mask)\""
)
_DATA_URL = re.compile(r"data:([a-z]+)/[^,]{0,128};base64,", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]*")


class Media:
    """What was found besides text, so far."""

    __slots__ = ("kinds", "opaque", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.opaque: list[str] = []
        self.kinds: set[str] = set()


def image_tokens(model: str | None) -> int:
    """The most that one image can cost, whatever its size, by the providers' rules for resizing."""
    name = (model or "").lower()
    return next((most for pattern, most in _IMAGE_TOKENS if pattern.search(name)), _IMAGE_TOKENS_MOST)


# OpenAI: 8 tiles of 512 pixels after resizing, or at most so many patches times the model's factor. Anthropic: the
# long edge is at most 1568 pixels, 2576 from Opus 4.7 on. Google: 16 tiles of 258, or a fixed price by resolution.
_IMAGE_TOKENS_MOST = 16_200
_IMAGE_TOKENS = tuple(
    (re.compile(pattern), most)
    for pattern, most in (
        (r"gpt-4o-mini", 48_169),
        (r"gpt-4\.1-(mini|nano)|gpt-5(\.\d)?-(mini|nano)|o4-mini", 6_200),
        (r"gpt-5\.[4-9]|gpt-[6-9]", 16_200),
        (r"gpt-4|gpt-5|\bo[13]|chatgpt-4o", 1_445),
        (r"claude-(3|(opus|sonnet|haiku)-4(?![-.][7-9])|4-)", 1_700),
        (r"claude", 4_784),
        (r"gemini|gemma", 4_200),
        (r"grok", 3_000),
        (r"pixtral|mistral|llama|nova", 6_200),
    )
)

#: Estimated tokens of other media by their decoded bytes: the densest that codecs and providers' rules allow.
BYTES_PER_AUDIO_TOKEN = 20  # 32 tokens a second, at 5 kbit/s
_BYTES_PER_VIDEO_TOKEN = 8  # 300 tokens a second, at 20 kbit/s
_BYTES_PER_DOCUMENT_TOKEN = 4
_DOCUMENT_TOKENS_LEAST = 8_000


def text_and_media(body: bytes, model: str | None) -> tuple[bytes, Media]:
    media = Media()
    if b"\\u" in body or _MEDIA.search(body):
        try:
            document = msgspec.json.decode(body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return body, media
        text = msgspec.json.encode(_without_media(document, media, model, 0))
    else:
        text = body
    if b"\\" in text:
        text = text.replace(b"\\n", b"\n").replace(b'\\"', b'"').replace(b"\\t", b"\t")
    return text, media


def _without_media(value: Any, media: Media, model: str | None, depth: int) -> Any:  # Any: parsed JSON
    """The value with its media taken out and counted. Below _DEPTH_MAX nothing is media any more."""
    if depth > _DEPTH_MAX:
        return value
    if isinstance(value, list):
        return [_without_media(item, media, model, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    kept: dict[str, Any] = {}
    for key, item in value.items():
        if key in _TEXT_ONLY and not (key == "input" and depth == 0):
            kept[key] = item
        elif isinstance(item, str):
            if not _took(key, item, value, media, model):
                kept[key] = item
        elif isinstance(item, dict) and item.keys() == {"bytes"} and isinstance(item["bytes"], str):
            # Bedrock's source. Its kind is in the format that stands beside it.
            if not _count_media(_kind_of_format(value.get("format")), item["bytes"], 0, media, model):
                kept[key] = item
        elif key == "images" and isinstance(item, list):
            kept[key] = [image for image in item if not _took("data", image, {"type": "image"}, media, model)]
        else:
            kept[key] = _without_media(item, media, model, depth + 1)
    return kept


_URL_KEYS = frozenset({"url", "image_url", "video_url", "document_url", "file_data", "file_url", "data", "uri"})
_REMOTE = ("http://", "https://", "gs://", "s3://")

#: Below these keys everything is text to a provider: arguments of tools, schemas, what a caller made up.
_TEXT_ONLY = frozenset(
    {
        "arguments",
        "args",
        "functionCall",
        "function_call",
        "functions",
        "input",
        "input_schema",
        "metadata",
        "parameters",
        "text",
        "tool_calls",
        "tools",
        "toolUse",
    }
)
_REFERENCE_KEYS = {
    "file_id": "file_id",
    "file_url": "file_url",
    "fileUri": "file_uri",
    "file_uri": "file_uri",
    "image_url": "image_url",
    "document_url": "document_url",
    "video_url": "video_url",
}


def _took(key: str, item: object, around: Mapping[str, Any], media: Media, model: str | None) -> bool:
    """Whether `item`, a string at `key`, is media or a reference to it, which is then counted."""
    if not isinstance(item, str):
        return False
    if key in _URL_KEYS and (found := _DATA_URL.match(item, 0, 256)):
        return _count_media(found[1].lower(), item, found.end(), media, model)
    if key in ("data", "bytes", "b64_json", "file_data"):
        kind = _kind_of(around)
        if kind is not None:
            return _count_media(kind, item, 0, media, model)
        return False
    if key in _REFERENCE_KEYS:
        media.opaque.append(_REFERENCE_KEYS[key])
        if key == "image_url":
            _add_image(media, model)
        return False
    if key == "url" and item.startswith(_REMOTE) and _is_source(around):
        media.opaque.append("image_url")
        _add_image(media, model)
    return False


def _is_source(around: Mapping[str, Any]) -> bool:
    """Whether the object around a `url` is what media is fetched from; a citation, say, is not."""
    return around.get("type") in (None, "url", "image") and not {"title", "query", "snippet"} & around.keys()


def _kind_of(around: Mapping[str, Any]) -> str | None:
    """What the object around a payload says it is; None where it does not look like a payload's place."""
    for key in ("mimeType", "mime_type", "media_type", "mediaType"):
        said = around.get(key)
        if isinstance(said, str):
            kind = said.partition("/")[0].lower()
            return None if kind == "text" else kind
    if around.get("type") == "image":
        return "image"
    if isinstance(around.get("format"), str) and _kind_of_format(around["format"]) == "audio":
        return "audio"
    return None


def _kind_of_format(said: object) -> str:
    """The kind of a file by its usual ending. What is not known is a document, which costs most."""
    if said in ("png", "jpeg", "jpg", "gif", "webp"):
        return "image"
    if said in ("wav", "mp3", "flac", "opus", "pcm16", "m4a", "ogg", "aac"):
        return "audio"
    if said in ("mp4", "mov", "mkv", "webm", "flv", "mpeg", "mpg", "wmv", "three_gp"):
        return "video"
    return "application"


def _count_media(kind: str, payload: str, start: int, media: Media, model: str | None) -> bool:
    """Count a base64 payload by its kind. Anything that is not base64 is text after all."""
    if not _BASE64.fullmatch(payload, start):
        return False
    size = (len(payload) - start) * 3 // 4 + 1
    if kind == "image":
        _add_image(media, model)
    elif kind == "audio":
        media.tokens += size // BYTES_PER_AUDIO_TOKEN + 32
        media.kinds.add("audio")
    elif kind == "video":
        media.tokens += size // _BYTES_PER_VIDEO_TOKEN + 300
        media.kinds |= {"image", "audio"}
    elif kind == "text":
        media.tokens += size
    else:
        # Pages may be dense beyond any bound by bytes, so a document is opaque as well.
        media.tokens += max(size // _BYTES_PER_DOCUMENT_TOKEN, _DOCUMENT_TOKENS_LEAST)
        media.opaque.append("document")
        media.kinds.add("image")
    return True


def _add_image(media: Media, model: str | None) -> None:
    media.tokens += image_tokens(model)
    media.kinds.add("image")
