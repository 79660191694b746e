-- Drop balances that no longer say anything, and subjects that Redis has dropped by their TTL.
--
-- KEYS  1 subjects index   2.. the subjects' hashes
-- ARGV  1 now, ms ('' = Redis' clock)
--       2 how many balances at most
-- Reply how many balances were dropped
local now, most = time_of(ARGV[1]), tonumber(ARGV[2])
local dropped = 0
for k = 2, #KEYS do
  local kept = redis.call('HGETALL', KEYS[k])
  local left = 0
  for n = 1, #kept, 2 do
    if kept[n] ~= 'ttl' then
      local balance = balance_of(kept[n + 1])
      if dropped < most and balance[UNTIL] <= now and balance[HELD] == 0 then
        redis.call('HDEL', KEYS[k], kept[n])
        dropped = dropped + 1
      else
        left = left + 1
      end
    end
  end
  if left == 0 then
    redis.call('DEL', KEYS[k])
    redis.call('ZREM', KEYS[1], KEYS[k] .. '|')
  end
end
return dropped
