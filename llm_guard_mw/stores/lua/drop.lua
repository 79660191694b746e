-- Forget entries that the ledger has committed. Each goes by its own id, so that nothing goes with it that was
-- delivered and not committed.
--
-- KEYS  1 journal
-- ARGV  1 group   2.. ids of entries
-- Reply how many were there
local ids = {unpack(ARGV, 2)}
redis.call('XACK', KEYS[1], ARGV[1], unpack(ids))
return redis.call('XDEL', KEYS[1], unpack(ids))
