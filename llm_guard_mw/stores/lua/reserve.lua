-- Grant the first offer that all its balances can bear, or none. Idempotent by exchange.
--
-- KEYS  1 exchange   2 exchange that is taken over (1 again if none)   3 due index   4 journal
--       5 subjects index   6 places index   7 places of the call
--       8.. the subjects' hashes, and a sorted set of members for each concurrency balance
-- ARGV  1 now, ms ('' = Redis' clock)
--       2 msgpack {exchange, call, lease (ms), not after (ms, -1 = any time), force (bool),
--                  exchange that is taken over ('' = none), entries that may wait in the journal,
--                  balances (a count; key index, field, name, kind of each),
--                  offers (a count; cap, at least (output tokens), demands of each)}
--         demands  a count; for each: balance, unit, ceiling, fixed, per output (units), spent (bool), and
--                  bucket: rate (units), period (ticks), tick (ms), 0     calendar: start, end, start, end (ms)
--       3 draft of the event, bytes
-- Reply msgpack, first a word:
--       granted  {word, at, offer (from 0), cap, lease end, took (bool), short, lines taken over, standings}
--       again    {word, at, offer, cap, lease end, took, {}, all lines, standings}
--       refused  {word, at, anything due (bool), {standings of each offer}, {short of each offer}}
--       late, apart, full  {word, at}
--       keys     {word, at, names}   lines to be taken over whose balances are not in KEYS: ask again with them
--       standings {spent, held, rem, window start, ...} in the order of the demands; short: demands from 0
local EXCHANGE, CALL, LEASE, NOT_AFTER, FORCE, TAKES, ROOM = 1, 2, 3, 4, 5, 6, 7
local CAP, AT_LEAST, DEMANDS = 1, 2, 3
local PLACE, UNIT, CEILING, FIXED, PER_OUTPUT, AT_ONCE, MORE, WIDTH = 1, 2, 3, 4, 5, 6, 7, 10

local now = time_of(ARGV[1])
local wish = cmsgpack.unpack(ARGV[2])
message, at = wish, 8

local function reply(...)
  return cmsgpack.pack({...})
end

if wish[NOT_AFTER] >= 0 and now > wish[NOT_AFTER] then return reply('late', now) end
local kept = redis.call('GET', KEYS[1])
local again = hold_of(kept)
if kept and not again then return reply('late', now) end
if not again and redis.call('XLEN', KEYS[4]) >= wish[ROOM] then return reply('full', now) end

-- ------------------------------------------------------------ read all

local balances, subjects, bytes = read_balances()
local ready, inside, ends = {}, {}, {}

-- Where each offer begins, and its demands: demand d is at `first_demand(o) + d * WIDTH`.
local offers = {}
do
  local next_one = at + 4 * wish[at] + 1
  local count = wish[next_one]
  for o = 1, count do
    offers[o] = next_one
    next_one = next_one + DEMANDS + wish[next_one + DEMANDS] * WIDTH
  end
end

-- The positions in `wish` behind which the demands of an offer stand.
local function demands_of(offer)
  local first = offer + DEMANDS
  return first, first + (wish[first] - 1) * WIDTH
end

-- The balance that a demand speaks of, up to date; nil when none of its windows contains the present.
local function as_of_now(demand)
  local i = wish[demand + PLACE]
  local balance = balances[i]
  if ready[i] then return balance end
  local kind = said(i, SORT)
  local a, b, c, d = wish[demand + MORE], wish[demand + MORE + 1], wish[demand + MORE + 2], wish[demand + MORE + 3]
  if kind == 'concurrent' then
    local members = KEYS[said(i, KEY)]
    redis.call('ZREMRANGEBYSCORE', members, '-inf', now)
    balance = {'', 0, redis.call('ZCARD', members), 0, 0}
    inside[i] = redis.call('ZSCORE', members, wish[CALL]) and true
    balances[i] = balance
  elseif kind == 'calendar' then
    local start, over
    if a <= now and now < b then
      start, over = a, b
    elseif c <= now and now < d then
      start, over = c, d
    else
      return nil
    end
    if balance[START] < start then balance[START], balance[SPENT], balance[HELD], balance[UNTIL] = start, 0, 0, 0 end
    if balance[START] == start then ends[i] = over end
  elseif kind == 'bucket' then
    -- A booking may have opened it, in ms, before anybody said in which ticks it drains.
    balance[STAMP] = divide(balance[STAMP] * balance[TICK], c)
    balance[RATE], balance[PERIOD], balance[TICK] = a, b, c
    drain(balance, now)
  end
  ready[i] = true
  return balance
end

-- False when some window of an offer's demands is not that of now.
local function all_as_of_now(offer)
  local first, last = demands_of(offer)
  for demand = first, last, WIDTH do
    if not as_of_now(demand) then return false end
  end
  return true
end

local taken
if wish[TAKES] ~= '' and not again then taken = hold_of(redis.call('GET', KEYS[2])) end

-- What a taker is checked without, by balance index: {{window start, amount}, ...}.
local freed, moving = {}, {}
if taken then
  local places, unknown = {}, {}
  for i = 1, wish[at] do places[said(i, NAME)] = i end
  for l = LINES, #taken, 6 do
    local name = taken[l + L_NAME]
    if taken[l + L_SPENT] then
      for n = l, l + 5 do moving[#moving + 1] = taken[n] end
    elseif places[name] then
      local i = places[name]
      freed[i] = freed[i] or {}
      table.insert(freed[i], {taken[l + L_START], taken[l + L_AMOUNT]})
    else
      unknown[#unknown + 1] = name
    end
  end
  if #unknown > 0 then return reply('keys', now, unknown) end
end

local function own(i)
  if not freed[i] then return 0 end
  local sum = 0
  for _, each in ipairs(freed[i]) do
    if each[1] == balances[i][START] then sum = sum + each[2] end
  end
  return sum
end

local function standings_of(offer, without)
  local standings, n = {}, 0
  local first, last = demands_of(offer)
  for demand = first, last, WIDTH do
    local i = wish[demand + PLACE]
    local balance = balances[i]
    standings[n + 1] = balance[SPENT]
    standings[n + 2] = balance[HELD] - (without and own(i) or 0)
    standings[n + 3] = balance[REM]
    standings[n + 4] = balance[START]
    n = n + 4
  end
  return standings
end

if again then
  local offer = offers[again[2] + 1]
  if not all_as_of_now(offer) then return reply('apart', now) end
  local lease_end = tonumber(redis.call('ZSCORE', KEYS[3], wish[EXCHANGE]))
  local lines = {}
  for l = LINES, #again do lines[#lines + 1] = again[l] end
  return reply('again', now, again[2], again[3], lease_end, again[4], {}, lines, standings_of(offer))
end

-- ------------------------------------------------------------ check all

-- The largest output cap that every balance can bear, and the demands that cannot even bear the least.
local function fit(offer, at_least)
  local cap, short = wish[offer + CAP], {}
  local first, last = demands_of(offer)
  for demand = first, last, WIDTH do
    local i = wish[demand + PLACE]
    local balance, fixed, per_output = balances[i], wish[demand + FIXED], wish[demand + PER_OUTPUT]
    local room = wish[demand + CEILING] - balance[SPENT] - balance[HELD] + own(i)
    if not inside[i] and fixed + per_output * cap > room then
      local bearable = -1
      if per_output > 0 and room >= fixed then bearable = divide(room - fixed, per_output) end
      if bearable < at_least then
        short[#short + 1] = (demand - first) / WIDTH
      else
        cap = bearable
      end
    end
  end
  return cap, short
end

local chosen, cap, short
local all_standings, all_short = {}, {}
for o, offer in ipairs(offers) do
  if not all_as_of_now(offer) then return reply('apart', now) end
  -- What is forced keeps its cap, and hears what would have lowered or refused it.
  local bearable, lacking = fit(offer, wish[FORCE] and wish[offer + CAP] or wish[offer + AT_LEAST])
  if #lacking == 0 or wish[FORCE] then
    chosen, cap, short = o, wish[FORCE] and wish[offer + CAP] or bearable, lacking
    break
  end
  all_standings[o], all_short[o] = standings_of(offer, true), lacking
end
if not chosen then
  local due = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, 1)
  return reply('refused', now, #due > 0, all_standings, all_short)
end

-- ------------------------------------------------------------ write all

local lease_end = now + wish[LEASE]
local touched = {}
local hold = {wish[CALL], chosen - 1, cap, taken ~= nil}
local offer = offers[chosen]
local first, last = demands_of(offer)
if taken then
  local asked = {}
  for demand = first, last, WIDTH do asked[wish[demand + PLACE]] = true end
  for i, parts in pairs(freed) do
    touched[i] = true
    -- Another offer may have looked at it as of now; nobody asked to roll it on.
    if not asked[i] then balances[i] = balance_of(bytes[i], said(i, SORT)) end
    for _, part in ipairs(parts) do
      if balances[i][START] == part[1] then balances[i][HELD] = balances[i][HELD] - part[2] end
    end
  end
  for _, value in ipairs(moving) do hold[#hold + 1] = value end
  redis.call('ZREM', KEYS[3], wish[TAKES])
  bury(KEYS[2], 'taken', now, TOMBSTONE_MS)
end
for demand = first, last, WIDTH do
  local i = wish[demand + PLACE]
  local balance, kind, name = balances[i], said(i, SORT), said(i, NAME)
  if kind == 'concurrent' then
    redis.call('ZADD', KEYS[said(i, KEY)], lease_end, wish[CALL])
    redis.call('ZADD', KEYS[6], 'LT', lease_end, name)
    redis.call('SADD', KEYS[7], name)
    if not inside[i] then balance[SPENT] = balance[SPENT] + 1 end
    if redis.call('PTTL', KEYS[7]) < wish[LEASE] + DAY then redis.call('PEXPIRE', KEYS[7], wish[LEASE] + DAY) end
  else
    local amount, at_once = wish[demand + FIXED] + wish[demand + PER_OUTPUT] * cap, wish[demand + AT_ONCE]
    touched[i] = true
    if at_once then
      balance[SPENT] = balance[SPENT] + amount
    else
      balance[HELD] = balance[HELD] + amount
    end
    -- The hold has to find its balance when it ends, whatever else this balance has to say by then.
    balance[UNTIL] = math.max(balance[UNTIL], lease_end + DAY)
    if kind == 'total' then balance[UNTIL] = FOREVER end
    if kind == 'calendar' then balance[UNTIL] = math.max(balance[UNTIL], (ends[i] or now + 32 * DAY) + DAY) end
    add_line(hold, name, kind, wish[demand + UNIT], balance[START], amount, at_once)
  end
end
write_balances(balances, subjects, touched, now, 5)
redis.call('SET', KEYS[1], kept_hold(hold, ARGV[3]))
redis.call('ZADD', KEYS[3], lease_end, wish[EXCHANGE])
return reply('granted', now, chosen - 1, cap, lease_end, taken ~= nil, short, moving, standings_of(offer))
