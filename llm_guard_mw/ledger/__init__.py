"""The books: rows of what every exchange did, kept for good, and the proof that they add up."""

from llm_guard_mw.ledger.books import Ledger, Verification, verify

__all__ = ["Ledger", "Verification", "verify"]
