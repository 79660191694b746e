-- Book the holds whose lease has run out, and free the places of calls that nobody renews. The caller has read
-- which ones are due; here each is looked at again.
--
-- KEYS  1 due index   2 journal   3 subjects index   4 places index
--       5.. exchanges, the subjects' hashes, and members of concurrency balances
-- ARGV  1 now, ms ('' = Redis' clock)
--       2 msgpack array {exchanges, places, names of the balances by number, layout (see read_subjects)}
--         exchange {key index, exchange}, oldest lease first
--         place    {key index, name}
-- Reply {booked, skipped}: how many were booked; how many were no longer due, or gone
local now = time_of(ARGV[1])
local message = cmsgpack.unpack(ARGV[2])
local exchanges, places = message[1], message[2]
layout = message[4] -- an array within: many holds have more balances than Lua's stack has places

local numbers = {}
for i, name in ipairs(message[3]) do numbers[name] = i end
read_subjects()

local function all_declared(hold)
  for l = LINES, #hold, 6 do
    if not numbers[hold[l + L_NAME]] then return false end
  end
  return true
end

local due, skipped = {}, 0
for _, each in ipairs(exchanges) do
  local lease_end = redis.call('ZSCORE', KEYS[1], each[2])
  local kept = redis.call('GET', KEYS[each[1]])
  local hold = hold_of(kept)
  if not hold then
    redis.call('ZREM', KEYS[1], each[2])
    skipped = skipped + 1
  elseif not lease_end or tonumber(lease_end) > now or not all_declared(hold) then
    skipped = skipped + 1
  else
    due[#due + 1] = {each, hold, kept}
  end
end

for _, each in ipairs(due) do
  local hold = each[2]
  for l = LINES, #hold, 6 do
    local i, kind, amount = numbers[hold[l + L_NAME]], hold[l + L_KIND], hold[l + L_AMOUNT]
    local balance = balances[i] or new_balance(kind)
    balances[i] = balance
    if balance[UNTIL] == 0 then balance[UNTIL] = kind == 'total' and FOREVER or now + 33 * DAY end
    move(balance, now, hold[l + L_START], hold[l + L_SPENT], amount, amount)
    touch(balance)
  end
end

write_subjects(now, KEYS[3])
for _, each in ipairs(due) do
  local exchange = each[1]
  redis.call('ZREM', KEYS[1], exchange[2])
  bury(KEYS[exchange[1]], 'abandoned', now, ABANDONED_TOMBSTONE_MS)
  redis.call('XADD', KEYS[2], '*', 'kind', 'abandoned', 'at', now, 'exchange', exchange[2], 'hold', each[3])
end

for _, place in ipairs(places) do
  local members = KEYS[place[1]]
  redis.call('ZREMRANGEBYSCORE', members, '-inf', now)
  local first = redis.call('ZRANGE', members, 0, 0, 'WITHSCORES')
  if #first == 0 then
    redis.call('ZREM', KEYS[4], place[2])
  else
    redis.call('ZADD', KEYS[4], first[2], place[2])
  end
end
return {#due, skipped}
