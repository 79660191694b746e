"""Moments as people write them: `2026-11-01`, `2026-11-01T09:30:00Z`, `7d`. Inside they are microseconds, UTC."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_AGO = re.compile(r"(\d{1,6})\s*([smhdw])")
_AGO_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


def parse_moment(written: str, zone: ZoneInfo, now: int) -> int:
    """A moment in µs. A date is its local midnight, a time without an offset is local, `7d` is that long ago."""
    text = written.strip()
    ago = _AGO.fullmatch(text)
    if ago:
        return now - int(ago[1]) * _AGO_SECONDS[ago[2]] * 1_000_000
    try:
        if _DATE.fullmatch(text):
            return midnight(date.fromisoformat(text), zone)
        moment = datetime.fromisoformat(text)
        return micros(moment if moment.tzinfo else moment.replace(tzinfo=zone))
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{written!r} is no moment: write a date (2026-11-01), an RFC 3339 time (2026-11-01T09:30:00Z),"
            " or how long ago (30m, 24h, 7d)"
        ) from error


def midnight(day: date, zone: ZoneInfo) -> int:
    return micros(datetime.combine(day, time(0), zone))


def local_day(at: int, zone: ZoneInfo) -> date:
    return datetime.fromtimestamp(at // 1_000_000, zone).date()


def micros(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)


def rfc3339(at: int) -> str:
    """A moment as RFC 3339, in UTC and with its microseconds."""
    moment = _EPOCH + timedelta(microseconds=at)
    return moment.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
