-- Prolong the leases of open holds, and of the places that open calls have.
--
-- KEYS  1 due index   2 places index   3.. the places of each call, and the members of their concurrency balances
-- ARGV  1 now, ms ('' = Redis' clock)
--       2 lease, ms
--       3 msgpack {exchanges, calls}
--         call {call, key index of its places, {{key index of the members, balance's name}, ...}}
-- Reply msgpack {lease end (ms), exchanges that are no longer held}
local lease = tonumber(ARGV[2])
local lease_end = time_of(ARGV[1]) + lease
local message = cmsgpack.unpack(ARGV[3])

local gone = {}
for _, exchange in ipairs(message[1]) do
  if redis.call('ZSCORE', KEYS[1], exchange) then
    redis.call('ZADD', KEYS[1], lease_end, exchange)
  else
    gone[#gone + 1] = exchange
  end
end
for _, each in ipairs(message[2]) do
  for _, members in ipairs(each[3]) do
    redis.call('ZADD', KEYS[members[1]], 'XX', lease_end, each[1])
    redis.call('ZADD', KEYS[2], 'LT', lease_end, members[2]) -- a clock that was set back makes it earlier
  end
  if redis.call('PTTL', KEYS[each[2]]) < lease + DAY then redis.call('PEXPIRE', KEYS[each[2]], lease + DAY) end
end
return cmsgpack.pack({lease_end, gone})
