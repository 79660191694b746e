-- Close an exchange, once, whatever has become of its hold: settle, release, correction, orphan, a booking that
-- never had a hold, and the entry of a refusal, which moves nothing. What moves money enters the journal here.
--
-- KEYS  1 exchange (or what stands for the entry of a refusal)   2 due index   3 journal   4 subjects index
--       5.. the subjects' hashes, and the marks of replays
-- ARGV  1 now, ms ('' = Redis' clock)
--       2 msgpack {exchange, kind, lease end (ms), fresh (bool), learnt (bool), entry id ('' = exchange/kind),
--                  key index of the marks (0 = no replay), spool, position in it,
--                  balances (a count; key index, field, name, kind of each),
--                  moves (a count; balance, unit, window start (ms), held (units), spent (bool), actual of each)}
--       3 payload of the entry, bytes
--       A replay is done once: the mark of its spool moves in this step, and what stands before the mark is done.
--       `learnt` says that the moves were read from the hold, by somebody who was never told the grant: without a
--       hold there is nothing to do.
-- Reply 1 done   2 it had been done before   3 corrected   4 orphan   5 too late
local EXCHANGE, ENDING, LEASE_END, FRESH, LEARNT, ENTRY, MARKS, SPOOL, POSITION = 1, 2, 3, 4, 5, 6, 7, 8, 9
local PLACE, UNIT, WINDOW, HELD_HERE, AT_ONCE, ACTUAL = 1, 2, 3, 4, 5, 6
local DONE, AGAIN, CORRECTED, ORPHAN, TOO_LATE = 1, 2, 3, 4, 5

local now = time_of(ARGV[1])
message, at = cmsgpack.unpack(ARGV[2]), 10
local kind, keep_ms, outcome = message[ENDING], TOMBSTONE_MS, DONE
local correcting, booking = false, false

local marks = message[MARKS] > 0 and KEYS[message[MARKS]]
if marks and tonumber(redis.call('HGET', marks, message[SPOOL]) or 0) >= message[POSITION] then return AGAIN end

local function done(outcome)
  if marks then redis.call('HSET', marks, message[SPOOL], message[POSITION]) end
  return outcome
end

local kept = redis.call('GETRANGE', KEYS[1], 0, 15)
if string.byte(kept) == 45 then
  if string.match(kept, '^%-(%a+)') ~= 'abandoned' or message[LEARNT] then return done(AGAIN) end
  if now > message[LEASE_END] + LATE_SETTLE_MS then return done(TOO_LATE) end
  correcting, kind, keep_ms, outcome = true, 'correction', ABANDONED_TOMBSTONE_MS, CORRECTED
elseif kept == '' then
  if message[LEARNT] then return done(AGAIN) end
  if not message[FRESH] then
    if now > message[LEASE_END] + LATE_SETTLE_MS then return done(TOO_LATE) end
    kind, outcome = 'orphan', ORPHAN
  end
  booking = true
end

local balances, subjects = read_balances()
local touched, lines = {}, {}
local moves = at + 4 * message[at] + 1
for n = 1, message[moves] do
  local each = moves + 6 * n - 6
  local i, start, amount = message[each + PLACE], message[each + WINDOW], message[each + ACTUAL]
  local balance, sort = balances[i], said(i, SORT)
  local held = booking and 0 or message[each + HELD_HERE]
  if correcting then amount, held = amount - held, 0 end
  if not correcting or amount ~= 0 then
    if booking and sort ~= 'bucket' and start > balance[START] then
      balance[START], balance[SPENT], balance[HELD], balance[UNTIL] = start, 0, 0, 0
    end
    -- Nobody said when this window ends; no window is longer than a month.
    if sort == 'total' then
      balance[UNTIL] = FOREVER
    elseif balance[UNTIL] == 0 then
      balance[UNTIL] = now + 33 * DAY
    end
    move(balance, now, start, message[each + AT_ONCE], held, amount)
    touched[i] = true
  end
  if amount ~= 0 then
    add_line(lines, said(i, NAME), sort, message[each + UNIT], start, amount, message[each + AT_ONCE])
  end
end

write_balances(balances, subjects, touched, now, 4)
if not correcting and not booking then redis.call('ZREM', KEYS[2], message[EXCHANGE]) end
bury(KEYS[1], correcting and 'corrected' or kind, now, keep_ms)
local id = message[ENTRY]
if id == '' then id = message[EXCHANGE] .. '/' .. kind end
enter(KEYS[3], id, kind, now, lines, ARGV[3])
return done(outcome)
