"""Stores: where balances, holds and the journal live. `protocol` says what one has to do."""
