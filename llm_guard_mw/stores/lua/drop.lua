-- Forget entries that the ledger has committed. Each goes by its own id, so that nothing goes with it that was
-- delivered and not committed.
--
-- KEYS  1 journal
-- ARGV  1.. ids of entries
-- Reply how many were there
redis.call('XACK', KEYS[1], 'ledger', unpack(ARGV))
return redis.call('XDEL', KEYS[1], unpack(ARGV))
