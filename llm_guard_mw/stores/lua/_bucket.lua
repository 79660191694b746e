-- Shared by the scripts: it stands in front of each of them when they are loaded (redis_scripts.py), behind the
-- constants TOMBSTONE_MS, ABANDONED_TOMBSTONE_MS, LATE_SETTLE_MS and FOREVER of the protocol.
--
-- Rule 1. Read all, check all, write all: nothing is written before the last reason to refuse has been looked at.
-- Rule 2. Amounts are integers below 2^53, which is where a double stays exact. They come and go as msgpack, or as
--         arguments and replies of Redis; never through cjson, tostring or `..`, which keep 14 digits.
-- Rule 3. A product of two amounts is never formed; what `drain` multiplies is bounded by the configuration.
--
-- A balance is this array, kept as msgpack in one field of its subject's hash. START, STAMP and UNTIL are times
-- (ms since the epoch; STAMP in ticks of TICK ms), SPENT, HELD and RATE are units, REM is a unit's fraction in
-- 1/PERIOD. From UNTIL on it says nothing any more.
local KIND, START, SPENT, HELD, REM, STAMP, RATE, PERIOD, TICK, CHANGES, UNTIL = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11
-- A message lists its balances flat, since nested msgpack costs thrice the time: a count, and for each of them where
-- it is kept (an index of KEYS, a field) and what it is (its name, and its kind as a word).
local KEY, FIELD, NAME, SORT = 1, 2, 3, 4
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
  local ticks = divide(now, balance[TICK])
  if ticks <= balance[STAMP] then return end
  local rate, period = balance[RATE], balance[PERIOD]
  if rate > 0 then
    local periods, elapsed = divide(ticks - balance[STAMP], period)
    local enough = divide(balance[SPENT], rate) + 1 -- more of them would only drain an empty bucket
    if periods > enough then periods = enough end
    local per_tick, fraction = divide(rate, period)
    local whole, rest = divide(elapsed * fraction + balance[REM], period)
    local left = balance[SPENT] - periods * rate - elapsed * per_tick - whole
    if left > 0 then
      balance[SPENT], balance[REM] = left, rest
    else
      balance[SPENT], balance[REM] = 0, 0
    end
  end
  balance[STAMP] = ticks
end

-- ------------------------------------------------------------ reading and writing balances

local function balance_of(bytes, kind)
  return bytes and cmsgpack.unpack(bytes) or {string.sub(kind, 1, 1), 0, 0, 0, 0, 0, 0, 0, 1, 0, 0}
end

-- What `message`, whose balances are counted at `at`, says of its balance `i`.
local message, at

local function said(i, what)
  return message[at + 4 * i - 4 + what]
end

-- `balances[i]`, and `bytes[i]` as it was kept; concurrency is not kept here. One HMGET a subject.
local function read_balances()
  local subjects, balances, bytes = {}, {}, {}
  for i = 1, message[at] do
    if said(i, SORT) ~= 'concurrent' then
      local key = said(i, KEY)
      local subject = subjects[key]
      if not subject then
        subject = {fields = {'ttl'}, places = {}}
        subjects[key] = subject
      end
      subject.fields[#subject.fields + 1] = said(i, FIELD)
      subject.places[#subject.places + 1] = i
    end
  end
  for key, subject in pairs(subjects) do
    local values = redis.call('HMGET', KEYS[key], unpack(subject.fields))
    subject.ttl = tonumber(values[1] or 0)
    for n, i in ipairs(subject.places) do
      bytes[i] = values[n + 1]
      balances[i] = balance_of(bytes[i], said(i, SORT))
    end
  end
  return balances, subjects, bytes
end

-- When a bucket that nobody adds to has been empty for a day. Whole periods, so that no product grows too large.
local function empty_for_a_day(balance, now)
  if balance[KIND] ~= 'b' or balance[RATE] == 0 then return 0 end
  local fill = (math.floor((balance[SPENT] + balance[HELD]) / balance[RATE]) + 1) * balance[PERIOD] * balance[TICK]
  return fill > LONGEST and FOREVER or now + fill + DAY
end

-- Write the balances that `touched` names. A subject lives as long as the longest of its balances, and a day more,
-- so that its TTL is set once a day and not at each write. A new subject enters the index `KEYS[index]`.
local function write_balances(balances, subjects, touched, now, index)
  for key, subject in pairs(subjects) do
    local sets, longest = {}, subject.ttl
    for n, i in ipairs(subject.places) do
      if touched[i] then
        local balance = balances[i]
        balance[CHANGES] = balance[CHANGES] + 1
        balance[UNTIL] = math.max(balance[UNTIL], empty_for_a_day(balance, now))
        if balance[UNTIL] > longest then longest = balance[UNTIL] end
        sets[#sets + 1] = subject.fields[n + 1]
        sets[#sets + 1] = cmsgpack.pack(balance)
      end
    end
    if #sets > 0 then
      local ttl = longest
      if ttl > subject.ttl then
        if ttl ~= FOREVER then ttl = ttl + DAY end
        sets[#sets + 1] = 'ttl'
        sets[#sets + 1] = ttl
      end
      redis.call('HSET', KEYS[key], unpack(sets))
      if subject.ttl == 0 then redis.call('ZADD', KEYS[index], 0, KEYS[key] .. '|') end
      if ttl > subject.ttl then
        if ttl == FOREVER then
          redis.call('PERSIST', KEYS[key])
        else
          redis.call('PEXPIRE', KEYS[key], ttl - now)
        end
      end
    end
  end
end

-- ------------------------------------------------------------ holds, endings, the journal

-- A hold is '+', the length of what follows (4 bytes), msgpack {call, offer, cap, took, line, ...}, and the
-- draft; a line is six values: balance's name, kind, unit, window start, amount, spent. Its lease end is its score in
-- the due index.
-- An ending is '-', its name, and when it may be forgotten.
local LINES, L_NAME, L_KIND, L_UNIT, L_START, L_AMOUNT, L_SPENT = 5, 0, 1, 2, 3, 4, 5

local function kept_hold(hold, draft)
  local packed = cmsgpack.pack(hold)
  return '+' .. struct.pack('>I4', #packed) .. packed .. draft
end

-- The hold and its draft; nil for an ending, or for nothing at all.
local function hold_of(kept)
  if not kept or string.byte(kept) ~= 43 then return nil end
  local length = struct.unpack('>I4', kept, 2)
  return cmsgpack.unpack(string.sub(kept, 6, 5 + length)), string.sub(kept, 6 + length)
end

local function bury(key, ending, now, keep_ms)
  redis.call('SET', key, string.format('-%s %.0f', ending, now + keep_ms), 'PX', keep_ms)
end

-- Six values behind those that are there.
local function add_line(lines, name, kind, unit, start, amount, spent)
  local n = #lines
  lines[n + 1], lines[n + 2], lines[n + 3] = name, kind, unit
  lines[n + 4], lines[n + 5], lines[n + 6] = start, amount, spent
end

local function enter(journal, id, kind, now, lines, payload, offer, cap)
  redis.call('XADD', journal, '*', 'id', id, 'kind', kind, 'at', now, 'lines', cmsgpack.pack(lines),
    'payload', payload, 'offer', offer or -1, 'cap', cap or -1)
end

-- Take `give_back` off what is held and add `book` to what is spent, if the balance is still in the line's window;
-- the ledger has a total of each window. What was spent at reserve is part of `spent` already, so that only the
-- difference is booked. A balance that is new has forgotten what it held.
local function move(balance, now, start, spent, give_back, book)
  if balance[KIND] == 'b' then drain(balance, now) end
  if balance[START] ~= start then return end
  if spent then
    book = book - give_back
  elseif balance[CHANGES] > 0 then
    balance[HELD] = balance[HELD] - give_back
  end
  balance[SPENT] = math.max(0, balance[SPENT] + book)
end
