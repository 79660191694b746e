-- Grant the first offer that all its balances can bear, or none. Idempotent by exchange.
--
-- KEYS  1 exchange   2 exchange that is taken over (1 again if none)   3 due index   4 journal
--       5 subjects index   6 places index   7 places of the call
--       8.. the subjects' hashes, and a sorted set of members for each concurrency balance
-- ARGV  1 now, ms ('' = Redis' clock)
--       2 msgpack {exchange, call, lease (ms), not after (ms, -1 = any time), force (bool),
--                  exchange that is taken over ('' = none), entries that may wait in the journal, balances, offers}
--         balance {key index, field, name, kind}
--         offer   {cap, at least (output tokens), demands}
--         demand  {balance index, unit, ceiling, fixed, per output (units), spent (bool),
--                  rate (units), period (ticks), tick (ms), windows {start, end, ...} (ms)}
--       3 draft of the event, bytes
-- Reply msgpack, first a word:
--       granted  {word, at, offer (from 0), cap, lease end, took (bool), short, lines taken over, standings}
--       again    {word, at, offer, cap, lease end, took, {}, all lines, standings}
--       refused  {word, at, anything due (bool), {standings of each offer}, {short of each offer}}
--       late, apart, full  {word, at}
--       keys     {word, at, names}   lines to be taken over whose balances are not in KEYS: ask again with them
--       standings {spent, held, rem, window start, ...} in the order of the demands; short: demands from 0
local EXCHANGE, CALL, LEASE, NOT_AFTER, FORCE, TAKES, ROOM, BALANCES, OFFERS = 1, 2, 3, 4, 5, 6, 7, 8, 9
local CAP, AT_LEAST, DEMANDS = 1, 2, 3
local PLACE, UNIT, CEILING, FIXED, PER_OUTPUT, AT_ONCE, D_RATE, D_PERIOD, D_TICK, WINDOWS = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10

local now = time_of(ARGV[1])
local wish = cmsgpack.unpack(ARGV[2])
local wanted = wish[BALANCES]

local function reply(...)
  return cmsgpack.pack({...})
end

if wish[NOT_AFTER] >= 0 and now > wish[NOT_AFTER] then return reply('late', now) end
local kept = redis.call('GET', KEYS[1])
local again = hold_of(kept)
if kept and not again then return reply('late', now) end
if not again and redis.call('XLEN', KEYS[4]) >= wish[ROOM] then return reply('full', now) end

-- ------------------------------------------------------------ read all

local balances, subjects, bytes = read_balances(wanted)
local ready, inside, ends = {}, {}, {}

-- The balance that a demand speaks of, up to date; nil when none of its windows contains the present.
local function as_of_now(demand)
  local i = demand[PLACE]
  local balance = balances[i]
  if ready[i] then return balance end
  local kind = wanted[i][SORT]
  if kind == 'concurrent' then
    local members = KEYS[wanted[i][KEY]]
    redis.call('ZREMRANGEBYSCORE', members, '-inf', now)
    balance = {'', 0, redis.call('ZCARD', members), 0, 0}
    inside[i] = redis.call('ZSCORE', members, wish[CALL]) and true
    balances[i] = balance
  elseif kind == 'calendar' then
    local windows = demand[WINDOWS]
    local start, over
    for w = 1, #windows, 2 do
      if windows[w] <= now and now < windows[w + 1] and not start then start, over = windows[w], windows[w + 1] end
    end
    if not start then return nil end
    if balance[START] < start then balance[START], balance[SPENT], balance[HELD], balance[UNTIL] = start, 0, 0, 0 end
    if balance[START] == start then ends[i] = over end
  elseif kind == 'bucket' then
    -- A booking may have opened it, in ms, before anybody said in which ticks it drains.
    balance[STAMP] = divide(balance[STAMP] * balance[TICK], demand[D_TICK])
    balance[RATE], balance[PERIOD], balance[TICK] = demand[D_RATE], demand[D_PERIOD], demand[D_TICK]
    drain(balance, now)
  end
  ready[i] = true
  return balance
end

local taken
if wish[TAKES] ~= '' and not again then taken = hold_of(redis.call('GET', KEYS[2])) end

-- What a taker is checked without, by balance index: {{window start, amount}, ...}.
local freed, moving = {}, {}
if taken then
  local places, unknown = {}, {}
  for i = 1, #wanted do places[wanted[i][NAME]] = i end
  for _, line in ipairs(taken[LINES]) do
    if not line[6] then
      local i = places[line[1]]
      if not i then
        unknown[#unknown + 1] = line[1]
      else
        freed[i] = freed[i] or {}
        table.insert(freed[i], {line[4], line[5]})
      end
    else
      moving[#moving + 1] = line
    end
  end
  if #unknown > 0 then return reply('keys', now, unknown) end
end

local function own(i)
  local sum = 0
  for _, each in ipairs(freed[i] or {}) do
    if each[1] == balances[i][START] then sum = sum + each[2] end
  end
  return sum
end

local function standings_of(demands, without)
  local standings = {}
  for _, demand in ipairs(demands) do
    local i = demand[PLACE]
    local balance = balances[i]
    local n = #standings
    standings[n + 1] = balance[SPENT]
    standings[n + 2] = balance[HELD] - (without and own(i) or 0)
    standings[n + 3] = balance[REM]
    standings[n + 4] = balance[START]
  end
  return standings
end

if again then
  local demands = wish[OFFERS][again[2] + 1][DEMANDS]
  for _, demand in ipairs(demands) do
    if not as_of_now(demand) then return reply('apart', now) end
  end
  local lease_end = tonumber(redis.call('ZSCORE', KEYS[3], wish[EXCHANGE]))
  return reply('again', now, again[2], again[3], lease_end, again[4], {}, again[LINES], standings_of(demands))
end

-- ------------------------------------------------------------ check all

-- The largest output cap that every balance can bear, and the demands that cannot even bear the least.
local function fit(offer, at_least)
  local cap, short = offer[CAP], {}
  for n, demand in ipairs(offer[DEMANDS]) do
    local i = demand[PLACE]
    local balance = balances[i]
    local room = demand[CEILING] - balance[SPENT] - balance[HELD] + own(i)
    if not inside[i] and demand[FIXED] + demand[PER_OUTPUT] * cap > room then
      local bearable = -1
      if demand[PER_OUTPUT] > 0 and room >= demand[FIXED] then
        bearable = divide(room - demand[FIXED], demand[PER_OUTPUT])
      end
      if bearable < at_least then
        short[#short + 1] = n - 1
      else
        cap = bearable
      end
    end
  end
  return cap, short
end

local chosen, cap, short
local all_standings, all_short = {}, {}
for o, offer in ipairs(wish[OFFERS]) do
  for _, demand in ipairs(offer[DEMANDS]) do
    if not as_of_now(demand) then return reply('apart', now) end
  end
  -- What is forced keeps its cap, and hears what would have lowered or refused it.
  local bearable, lacking = fit(offer, wish[FORCE] and offer[CAP] or offer[AT_LEAST])
  if #lacking == 0 or wish[FORCE] then
    chosen, cap, short = o, wish[FORCE] and offer[CAP] or bearable, lacking
    break
  end
  all_standings[o], all_short[o] = standings_of(offer[DEMANDS], true), lacking
end
if not chosen then
  local due = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, 1)
  return reply('refused', now, #due > 0, all_standings, all_short)
end

-- ------------------------------------------------------------ write all

local lease_end = now + wish[LEASE]
local touched, lines = {}, {}
local demands = wish[OFFERS][chosen][DEMANDS]
if taken then
  local asked = {}
  for _, demand in ipairs(demands) do asked[demand[PLACE]] = true end
  for i, parts in pairs(freed) do
    touched[i] = true
    -- Another offer may have looked at it as of now; nobody asked to roll it on.
    if not asked[i] then balances[i] = balance_of(bytes[i], wanted[i][SORT]) end
    for _, part in ipairs(parts) do
      if balances[i][START] == part[1] then balances[i][HELD] = balances[i][HELD] - part[2] end
    end
  end
  for _, line in ipairs(moving) do lines[#lines + 1] = line end
  redis.call('ZREM', KEYS[3], wish[TAKES])
  bury(KEYS[2], 'taken', now, TOMBSTONE_MS)
end
for _, demand in ipairs(demands) do
  local i = demand[PLACE]
  local balance, want = balances[i], wanted[i]
  local amount = demand[FIXED] + demand[PER_OUTPUT] * cap
  if want[SORT] == 'concurrent' then
    local members = KEYS[want[KEY]]
    redis.call('ZADD', members, lease_end, wish[CALL])
    redis.call('ZADD', KEYS[6], 'LT', lease_end, want[NAME])
    redis.call('SADD', KEYS[7], want[NAME])
    if not inside[i] then balance[SPENT] = balance[SPENT] + 1 end
    if redis.call('PTTL', KEYS[7]) < wish[LEASE] + DAY then redis.call('PEXPIRE', KEYS[7], wish[LEASE] + DAY) end
  else
    touched[i] = true
    if demand[AT_ONCE] then
      balance[SPENT] = balance[SPENT] + amount
    else
      balance[HELD] = balance[HELD] + amount
    end
    -- The hold has to find its balance when it ends, whatever else this balance has to say by then.
    balance[UNTIL] = math.max(balance[UNTIL], lease_end + DAY)
    if want[SORT] == 'total' then balance[UNTIL] = FOREVER end
    if want[SORT] == 'calendar' then balance[UNTIL] = math.max(balance[UNTIL], (ends[i] or now + 32 * DAY) + DAY) end
    lines[#lines + 1] = {want[NAME], want[SORT], demand[UNIT], balance[START], amount, demand[AT_ONCE]}
  end
end
write_balances(wanted, balances, subjects, touched, now, 5)
redis.call('SET', KEYS[1], kept_hold({wish[CALL], chosen - 1, cap, taken ~= nil, lines}, ARGV[3]))
redis.call('ZADD', KEYS[3], lease_end, wish[EXCHANGE])
return reply('granted', now, chosen - 1, cap, lease_end, taken ~= nil, short, moving, standings_of(demands))
