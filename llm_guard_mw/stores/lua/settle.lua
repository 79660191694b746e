-- Close an exchange, once, whatever has become of its hold: settle, release, correction, orphan, a booking that
-- never had a hold, and the entry of a refusal, which moves nothing. What moves money enters the journal here.
--
-- KEYS  1 exchange (or what stands for the entry of a refusal)   2 due index   3 journal   4 subjects index
--       5.. the subjects' hashes; behind them, where this is a replay, the marks of replays
-- ARGV  1 the layout, msgpack: subjects (see read_subjects), moves (a count; balance (its number), kind, spent at
--         reserve (bool) of each)
--       2 now, ms ('' = Redis' clock)
--       3 the settlement, msgpack: exchange, kind, lease end (ms), fresh (bool), learnt (bool), entry id
--         ('' = exchange/kind); for each move: window start (ms), held (units), actual (units)
--       4 which lines these are, msgpack array: balance's name, kind, unit, spent of each move
--       5 payload of the entry, bytes
--       6 and 7, where this is a replay: the spool, and the position in it. It is done once: the mark of its spool
--         moves in this step, and what stands before the mark is done
--       `learnt` says that the moves were read from the hold, by somebody who was never told the grant: without a
--       hold there is nothing to do.
-- Reply 1 done   2 it had been done before   3 corrected   4 orphan   5 too late
--
-- The entry is what was said, and what became of it. The lines that it moved follow from that: `actual` of each
-- move, of a correction what it is more than `held`, and none that is 0.
local EXCHANGE, ENDING, LEASE_END, FRESH, LEARNT, MOVES = 1, 2, 3, 4, 5, 7
local DONE, AGAIN, CORRECTED, ORPHAN, TOO_LATE = 1, 2, 3, 4, 5

local now = time_of(ARGV[2])
local said = {cmsgpack.unpack(ARGV[3])}
local kind, keep_ms, outcome = said[ENDING], TOMBSTONE_MS, DONE
local correcting, booking = false, false

local marks, spool, position = ARGV[6] and KEYS[#KEYS], ARGV[6], tonumber(ARGV[7])
if marks and tonumber(redis.call('HGET', marks, spool) or 0) >= position then return AGAIN end

local function done(result)
  if marks then redis.call('HSET', marks, spool, position) end
  return result
end

local kept = redis.call('GETRANGE', KEYS[1], 0, 15)
if kept == '' then
  if said[LEARNT] then return done(AGAIN) end
  if not said[FRESH] then
    if now > said[LEASE_END] + LATE_SETTLE_MS then return done(TOO_LATE) end
    kind, outcome = 'orphan', ORPHAN
  end
  booking = true
elseif string.byte(kept) == 45 then
  if string.match(kept, '^%-(%a+)') ~= 'abandoned' or said[LEARNT] then return done(AGAIN) end
  if now > said[LEASE_END] + LATE_SETTLE_MS then return done(TOO_LATE) end
  correcting, kind, keep_ms, outcome = true, 'correction', ABANDONED_TOMBSTONE_MS, CORRECTED
end

layout = {cmsgpack.unpack(ARGV[1])}
local l = read_subjects()
local w = MOVES
for _ = 1, layout[l] do
  local i, sort, spent = layout[l + 1], layout[l + 2], layout[l + 3]
  local start, held, amount = said[w], said[w + 1], said[w + 2]
  local balance = balances[i]
  if not balance then
    balance = new_balance(sort)
    balances[i] = balance
  end
  if booking then
    held = 0
    if sort ~= 'bucket' and start > balance[START] then
      balance[START], balance[SPENT], balance[HELD], balance[UNTIL] = start, 0, 0, 0
    end
  elseif correcting then
    amount, held = amount - held, 0
  end
  if not correcting or amount ~= 0 then
    -- Nobody said when this window ends; no window is longer than a month.
    if sort == 'total' then
      balance[UNTIL] = FOREVER
    elseif balance[UNTIL] == 0 then
      balance[UNTIL] = now + 33 * DAY
    end
    move(balance, now, start, spent, held, amount)
    touch(balance)
  end
  l, w = l + 3, w + 3
end

write_subjects(now, KEYS[4])
if not correcting and not booking then redis.call('ZREM', KEYS[2], said[EXCHANGE]) end
bury(KEYS[1], correcting and 'corrected' or kind, now, keep_ms)
redis.call('XADD', KEYS[3], '*', 'kind', kind, 'at', now, 'said', ARGV[3], 'lines', ARGV[4], 'payload', ARGV[5])
return done(outcome)
