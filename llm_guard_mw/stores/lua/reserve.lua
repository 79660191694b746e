-- Grant the first offer that all its balances can bear, or none. Idempotent by exchange.
--
-- KEYS  1 exchange   2 exchange that is taken over (1 again if none)   3 places of the call   4 due index
--       5 journal   6 subjects index   7 places index
--       8.. the subjects' hashes, and a sorted set of members for each concurrency balance
-- ARGV  1 the layout, msgpack: subjects (see read_subjects), offers (a count; demands of each)
--         demands  a count; of each: balance (its number; of concurrency: minus the index of its members in KEYS),
--                  kind, spent at reserve (bool), name (of concurrency; else 0)
--       2 names of the balances, by number, msgpack; '' if nothing is taken over
--       3 now, ms ('' = Redis' clock)
--       4 the wish, msgpack: exchange, call, lease (ms), not after (ms, -1 = any time), force (bool),
--         exchange that is taken over ('' = none), entries that may wait in the journal; for each offer: cap,
--         at least (output tokens); for each of its demands: ceiling, fixed, per output (units), and
--                  bucket: rate (units), period (ticks), tick (ms), 0     calendar: start, end, start, end (ms)
--       5 which lines these are, msgpack array: of each offer {balance's name, kind, unit, spent of each demand}
--       6 draft of the event, bytes
-- Reply msgpack array, first a word:
--       granted  {word, at, offer (from 0), cap, lease end, took (bool), short, lines taken over, standings ...}
--       again    {word, at, offer, cap, lease end, took, false, all lines, standings ...}
--       refused  {word, at, anything due (bool), {standings of each offer}, {short of each offer}}
--       late, apart, full  {word, at}
--       keys     {word, at, names}   lines to be taken over whose balances are not in the layout: ask with them
--       standings  spent, held, rem, window start; and so on in the order of the demands
--       short      demands that stood in the way, from 0; this and `lines` are false where there are none
local CALL, LEASE, NOT_AFTER, FORCE, TAKES, ROOM, OFFERS = 2, 3, 4, 5, 6, 7, 8
local CAP, AT_LEAST, DEMANDS, WIDTH = 0, 1, 2, 7 -- an offer in the wish, and each of its demands ...
local CEILING, FIXED, PER_OUTPUT, MORE = 0, 1, 2, 3
local PLACE, SORT, AT_ONCE, NAME, LAID = 1, 2, 3, 4, 4 -- ... and a demand in the layout, behind their count
local INSIDE = 6 -- of what stands for a concurrency balance: whether the call has a place in it

local now = time_of(ARGV[3])
local wish = {cmsgpack.unpack(ARGV[4])}

if wish[NOT_AFTER] >= 0 and now > wish[NOT_AFTER] then return cmsgpack.pack({'late', now}) end
local kept = redis.call('GET', KEYS[1])
local again
if kept then
  again = hold_of(kept)
  if not again then return cmsgpack.pack({'late', now}) end
elseif redis.call('XLEN', KEYS[5]) >= wish[ROOM] then
  return cmsgpack.pack({'full', now})
end

-- ------------------------------------------------------------ read all

layout = {cmsgpack.unpack(ARGV[1])}
local first_offer = read_subjects()

-- The balance of the demand at `l` in the layout and `w` in the wish, as of now; nil when none of its windows
-- contains the present.
local function as_of_now(l, w)
  local i, kind = layout[l + PLACE], layout[l + SORT]
  local balance = balances[i]
  if not balance then
    if kind == 'concurrent' then
      local members = KEYS[-i]
      redis.call('ZREMRANGEBYSCORE', members, '-inf', now)
      local inside = redis.call('ZSCORE', members, wish[CALL]) and true
      balance = {'', 0, redis.call('ZCARD', members), 0, 0, inside}
    else
      balance = new_balance(kind)
    end
    balances[i] = balance
  end
  local a, b, c = wish[w + MORE], wish[w + MORE + 1], wish[w + MORE + 2]
  if kind == 'bucket' then
    -- A booking may have opened it, in ms, before anybody said in which ticks it drains.
    if c ~= balance[TICK] then balance[STAMP] = divide(balance[STAMP] * balance[TICK], c) end
    balance[RATE], balance[PERIOD], balance[TICK] = a, b, c
    drain(balance, now)
  elseif kind == 'calendar' then
    if now < a or now >= b then
      a, b = c, wish[w + MORE + 3]
      if now < a or now >= b then return nil end
    end
    if balance[START] < a then balance[START], balance[SPENT], balance[HELD], balance[UNTIL] = a, 0, 0, 0 end
  end
  return balance
end

-- What a taker is checked without, by the balance's number: {the balance as it was kept, window start, amount, ...}.
local freed, moving, taken = {}, false, nil
if wish[TAKES] ~= '' and not again then taken = hold_of(redis.call('GET', KEYS[2])) end
if taken then
  local numbers, unknown = {}, {}
  for i, name in ipairs({cmsgpack.unpack(ARGV[2])}) do numbers[name] = i end
  for l = LINES, #taken, 6 do
    local i = numbers[taken[l + L_NAME]]
    if taken[l + L_SPENT] then
      moving = moving or {}
      for n = l, l + 5 do moving[#moving + 1] = taken[n] end
    elseif i then
      freed[i] = freed[i] or {{unpack(balances[i] or new_balance(taken[l + L_KIND]))}}
      table.insert(freed[i], taken[l + L_START])
      table.insert(freed[i], taken[l + L_AMOUNT])
    else
      unknown[#unknown + 1] = taken[l + L_NAME]
    end
  end
  if #unknown > 0 then return cmsgpack.pack({'keys', now, unknown}) end
end

local function own(i, balance)
  local parts, sum = freed[i], 0
  for n = 2, parts and #parts or 0, 2 do
    if parts[n] == balance[START] then sum = sum + parts[n + 1] end
  end
  return sum
end

-- The standings of the offer at `l` in the layout, behind what `told` has.
local function tell(told, l)
  local n = #told
  for d = l, l + (layout[l] - 1) * LAID, LAID do
    local i = layout[d + PLACE]
    local balance = balances[i]
    told[n + 1], told[n + 2], told[n + 3], told[n + 4] = balance[SPENT], balance[HELD], balance[REM], balance[START]
    if taken then told[n + 2] = told[n + 2] - own(i, balance) end
    n = n + 4
  end
  return told
end

if again then
  local l, w = first_offer + 1, OFFERS
  for _ = 1, again[2] do l, w = l + 1 + layout[l] * LAID, w + DEMANDS + layout[l] * WIDTH end
  for d = 0, layout[l] - 1 do
    if not as_of_now(l + d * LAID, w + DEMANDS + d * WIDTH) then return cmsgpack.pack({'apart', now}) end
  end
  local lease_end = tonumber(redis.call('ZSCORE', KEYS[4], wish[1]))
  local lines = {}
  for n = LINES, #again do lines[#lines + 1] = again[n] end
  return cmsgpack.pack(tell({'again', now, again[2], again[3], lease_end, again[4], false, lines}, l))
end

-- ------------------------------------------------------------ check all

-- The first offer that fits, with the largest output cap that every balance can bear. `short` are the demands that
-- cannot even bear the least. What is forced keeps its cap, and hears what would have lowered or refused it.
local l, w, force = first_offer + 1, OFFERS, wish[FORCE]
local chosen, cap, count, short, all_standings, all_short
for o = 1, layout[first_offer] do
  cap, count, short = wish[w + CAP], layout[l], false
  local at_least = wish[w + AT_LEAST]
  if force then at_least = cap end
  for d = 0, count - 1 do
    local demand = w + DEMANDS + d * WIDTH
    local balance = as_of_now(l + d * LAID, demand)
    if not balance then return cmsgpack.pack({'apart', now}) end
    local fixed, per_output = wish[demand + FIXED], wish[demand + PER_OUTPUT]
    local room = wish[demand + CEILING] - balance[SPENT] - balance[HELD]
    if taken then room = room + own(layout[l + d * LAID + PLACE], balance) end
    if fixed + per_output * cap > room and not (balance[KIND] == '' and balance[INSIDE]) then
      local bearable = -1
      if per_output > 0 and room >= fixed then bearable = divide(room - fixed, per_output) end
      if bearable >= at_least then
        cap = bearable
      else
        short = short or {}
        short[#short + 1] = d
      end
    end
  end
  if not short or force then
    chosen = o - 1
    break
  end
  all_standings, all_short = all_standings or {}, all_short or {}
  all_standings[o], all_short[o] = tell({}, l), short
  l, w = l + 1 + count * LAID, w + DEMANDS + count * WIDTH
end
if not chosen then
  local due = redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now, 'LIMIT', 0, 1)
  return cmsgpack.pack({'refused', now, #due > 0, all_standings or {}, all_short or {}})
end

-- ------------------------------------------------------------ write all

local lease_end = now + wish[LEASE]
if taken then
  local asked = {}
  for d = l, l + (count - 1) * LAID, LAID do asked[layout[d + PLACE]] = true end
  for i, parts in pairs(freed) do
    -- Another offer may have looked at it as of now; nobody asked to roll it on.
    if not asked[i] then balances[i] = parts[1] end
    balances[i][HELD] = balances[i][HELD] - own(i, balances[i])
    touch(balances[i])
  end
  redis.call('ZREM', KEYS[4], wish[TAKES])
  bury(KEYS[2], 'taken', now, TOMBSTONE_MS)
end
local kept_until = lease_end + DAY -- a hold has to find its balances when it ends, whatever else they say by then
for d = 0, count - 1 do
  local demand, laid = w + DEMANDS + d * WIDTH, l + d * LAID
  local i, kind = layout[laid + PLACE], layout[laid + SORT]
  local balance = balances[i]
  if kind == 'concurrent' then
    local name, places = layout[laid + NAME], KEYS[3]
    redis.call('ZADD', KEYS[-i], lease_end, wish[CALL])
    redis.call('ZADD', KEYS[7], 'LT', lease_end, name)
    redis.call('SADD', places, name)
    if not balance[INSIDE] then balance[SPENT] = balance[SPENT] + 1 end
    if redis.call('PTTL', places) < wish[LEASE] + DAY then redis.call('PEXPIRE', places, wish[LEASE] + DAY) end
  else
    local amount, over = wish[demand + FIXED] + wish[demand + PER_OUTPUT] * cap, kept_until
    if layout[laid + AT_ONCE] then
      balance[SPENT] = balance[SPENT] + amount
    else
      balance[HELD] = balance[HELD] + amount
    end
    if kind == 'total' then
      over = FOREVER
    elseif kind == 'calendar' then
      local start, ends = balance[START], now + 32 * DAY
      if start == wish[demand + MORE] then
        ends = wish[demand + MORE + 1]
      elseif start == wish[demand + MORE + 2] then
        ends = wish[demand + MORE + 3]
      end
      if ends + DAY > over then over = ends + DAY end
    end
    if over > balance[UNTIL] then balance[UNTIL] = over end
    touch(balance)
  end
end
freed, taken = {}, taken ~= nil -- what was taken over is no longer held
write_subjects(now, KEYS[6])
local told = cmsgpack.pack(tell({'granted', now, chosen, cap, lease_end, taken, short, moving}, l))
local lengths = struct.pack('>I4I4I4', #told, #ARGV[4], #ARGV[5])
redis.call('SET', KEYS[1], '#' .. lengths .. told .. ARGV[4] .. ARGV[5] .. ARGV[6])
redis.call('ZADD', KEYS[4], lease_end, wish[1])
return told
