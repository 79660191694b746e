-- Whether a value may have a balance of its own: known since before, or one of the first new ones today.
--
-- KEYS  1 the values of a scope under a parent
-- ARGV  1 value   2 day (a number)   3 how many new ones a day
-- Reply 1 yes, 0 no
if redis.call('HEXISTS', KEYS[1], 'v' .. ARGV[1]) == 1 then return 1 end
local today = tonumber(redis.call('HGET', KEYS[1], 'n' .. ARGV[2]) or 0)
if today >= tonumber(ARGV[3]) then return 0 end
redis.call('HSET', KEYS[1], 'v' .. ARGV[1], ARGV[2])
redis.call('HINCRBY', KEYS[1], 'n' .. ARGV[2], 1)
return 1
