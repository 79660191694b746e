-- Shared by the scripts: it stands in front of each of them when they are loaded (redis_scripts.py), behind the
-- constants TOMBSTONE_MS, ABANDONED_TOMBSTONE_MS, LATE_SETTLE_MS and FOREVER of the protocol.
--
-- Rule 1. Read all, check all, write all: nothing is written before the last reason to refuse has been looked at.
-- Rule 2. Amounts are integers below 2^53, which is where a double stays exact. They come and go as msgpack, are kept
--         by `struct`, or are arguments and replies of Redis; never cjson, tostring or `..`, which keep 14 digits.
-- Rule 3. A product of two amounts is never formed; what `drain` multiplies is bounded by the configuration.
-- Rule 4. A list in msgpack is its values one behind the other, without a head: unpacked onto the stack and caught
--         by a constructor, it costs half of what an array does, which grows while it is filled. Each function and
--         each table here is made anew by each run, so that there are few.
--
-- A balance is this list, kept in one field of its subject's hash: signed integers, short enough for a hash that
-- Redis packs tightly. START, STAMP and UNTIL are times (ms since the epoch; STAMP in ticks of TICK ms), SPENT, HELD
-- and RATE are units, REM is a unit's fraction in 1/PERIOD. From UNTIL on it says nothing any more.
local KIND, START, SPENT, HELD, REM, STAMP, RATE, PERIOD, TICK, CHANGES, UNTIL = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11
local KEPT, KEPT_BYTES = '>c1i6i7i7i7i6i7i5i3i5i7', 61
local DAY = 86400000
-- Longer than this is for ever: the sum still has to be an exact integer.
local LONGEST = 100000000000000

-- The time in ms: that of Redis, or the one a test holds in its hand.
local function time_of(given)
  if given ~= '' then return tonumber(given) end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Quotient and remainder of integers, a >= 0. Exact up to 2^53, where floor(a / b) and % may be one off.
local function divide(a, b)
  local rest = math.fmod(a, b)
  return (a - rest) / b, rest
end

-- Bring a bucket up to date; one that no reserve has described yet has no rate, and waits. See arithmetic.drain.
local function drain(balance, now)
  local ticks = now
  if balance[TICK] ~= 1 then ticks = divide(now, balance[TICK]) end
  local elapsed = ticks - balance[STAMP]
  if elapsed <= 0 then return end
  balance[STAMP] = ticks
  local left, rate, period = balance[SPENT], balance[RATE], balance[PERIOD]
  if rate == 0 then return end
  if elapsed >= period then
    local enough, periods = divide(left, rate) + 1, 0 -- more of them would only drain an empty bucket
    periods, elapsed = divide(elapsed, period)
    left = left - math.min(periods, enough) * rate
  end
  local per_tick, fraction = 0, rate
  if rate >= period then per_tick, fraction = divide(rate, period) end
  local whole, rest = divide(elapsed * fraction + balance[REM], period)
  left = left - elapsed * per_tick - whole
  if left > 0 then
    balance[SPENT], balance[REM] = left, rest
  else
    balance[SPENT], balance[REM] = 0, 0
  end
end

-- ------------------------------------------------------------ reading and writing balances

-- A layout is what stays the same from message to message. It begins with the subjects: a count; for each of them
-- its hash (an index of KEYS), how many fields are read, and these: `ttl`, then a field for each balance. Balances
-- are numbered through.
local layout
-- The balances by number; nil for one that is not kept. What is to be written has its CHANGES below zero.
local balances = {}

local function new_balance(kind)
  return {string.sub(kind, 1, 1), 0, 0, 0, 0, 0, 0, 0, 1, 0, 0}
end

local function balance_of(kept)
  if #kept ~= KEPT_BYTES then return cmsgpack.unpack(kept) end -- an earlier version kept msgpack
  return {struct.unpack(KEPT, kept)}
end

-- One HMGET a subject, whose TTL then stands in the layout in the place of the field's name. Says where the layout
-- goes on.
local function read_subjects()
  local at, n = 1, 0
  for _ = 1, layout[1] do
    local count = layout[at + 2]
    local values = redis.call('HMGET', KEYS[layout[at + 1]], unpack(layout, at + 3, at + 2 + count))
    layout[at + 3] = tonumber(values[1] or 0)
    for v = 2, count do
      n = n + 1
      if values[v] then balances[n] = balance_of(values[v]) end
    end
    at = at + 2 + count
  end
  return at + 1
end

local function touch(balance)
  if balance[CHANGES] >= 0 then balance[CHANGES] = -1 - balance[CHANGES] end
end

-- Write what was touched. A subject lives as long as the longest of its balances, and a day more, so that its TTL is
-- set once a day and not at each write. A bucket says something until it has been empty for a day. A new subject
-- enters the index `subjects`.
local function write_subjects(now, subjects)
  local at, n = 1, 0
  for _ = 1, layout[1] do
    local count, ttl = layout[at + 2], layout[at + 3]
    local sets, m, longest = {}, 0, ttl
    for field = at + 4, at + 2 + count do
      n = n + 1
      local balance = balances[n]
      if balance and balance[CHANGES] < 0 then
        local rate, over = balance[RATE], balance[UNTIL]
        balance[CHANGES] = -balance[CHANGES]
        if rate > 0 then
          -- Whole periods, so that no product grows too large.
          local periods = math.floor((balance[SPENT] + balance[HELD]) / rate) + 1
          local fill = periods * balance[PERIOD] * balance[TICK]
          local empty = fill > LONGEST and FOREVER or now + fill + DAY
          if empty > over then
            over = empty
            balance[UNTIL] = over
          end
        end
        if over > longest then longest = over end
        sets[m + 1], sets[m + 2] = layout[field], struct.pack(KEPT, unpack(balance))
        m = m + 2
      end
    end
    if m > 0 then
      local key = KEYS[layout[at + 1]]
      if longest > ttl then
        if longest ~= FOREVER then longest = longest + DAY end
        sets[m + 1], sets[m + 2] = 'ttl', longest
      end
      redis.call('HSET', key, unpack(sets))
      if ttl == 0 then redis.call('ZADD', subjects, 0, key .. '|') end
      if longest == FOREVER and ttl ~= FOREVER then
        redis.call('PERSIST', key)
      elseif longest > ttl then
        redis.call('PEXPIRE', key, longest - now)
      end
    end
    at = at + 2 + count
  end
end

-- ------------------------------------------------------------ endings

-- An ending is '-', its name, and when it may be forgotten.
local function bury(key, ending, now, keep_ms)
  redis.call('SET', key, string.format('-%s %.0f', ending, now + keep_ms), 'PX', keep_ms)
end

-- Take `give_back` off what is held and add `book` to what is spent, if the balance is still in the line's window;
-- the ledger has a total of each window. What was spent at reserve is part of `spent` already, so that only the
-- difference is booked. A balance that is new has forgotten what it held.
local function move(balance, now, start, spent, give_back, book)
  if balance[KIND] == 'b' then drain(balance, now) end
  if balance[START] ~= start then return end
  if spent then
    book = book - give_back
  elseif balance[CHANGES] > 0 or balance[CHANGES] < -1 then
    balance[HELD] = balance[HELD] - give_back
  end
  balance[SPENT] = math.max(0, balance[SPENT] + book)
end
