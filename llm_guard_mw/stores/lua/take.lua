-- Say what a consumer of the journal's group is to read: what is in its hands already (its last batch met with no
-- commit, or the reply was lost), else what another one left alone, which is put into its hands here, else what
-- nobody had yet. The entries themselves are read by XREADGROUP: through Lua each would be copied twice.
--
-- KEYS  1 journal
-- ARGV  1 group   2 consumer   3 how many at most   4 how long others must have left them alone, ms
--       5 how long a consumer with empty hands must have been silent to be forgotten, ms
-- Reply where to read from: '0' its hands, '>' what is new, '' nothing is there
local GROUP, CONSUMER, COUNT, IDLE, FORGOTTEN = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])

-- Every process is a consumer of its own: the names of dead ones go when there is nothing left in their hands.
local function sweep_consumers()
  for _, facts in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], GROUP)) do
    local consumer = {}
    for n = 1, #facts, 2 do consumer[facts[n]] = facts[n + 1] end
    if consumer.pending == 0 and consumer.idle > FORGOTTEN and consumer.name ~= CONSUMER then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[1], GROUP, consumer.name)
    end
  end
end

local function last_delivered()
  for _, facts in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local group = {}
    for n = 1, #facts, 2 do group[facts[n]] = facts[n + 1] end
    if group.name == GROUP then return group['last-delivered-id'] end
  end
end

if redis.call('XLEN', KEYS[1]) == 0 then return '' end

local made = redis.pcall('XGROUP', 'CREATECONSUMER', KEYS[1], GROUP, CONSUMER)
if type(made) == 'table' and made.err then
  -- From the beginning: what the stream still has is what the ledger may not have.
  redis.call('XGROUP', 'CREATE', KEYS[1], GROUP, '0')
elseif made == 1 then
  sweep_consumers()
end

if #redis.call('XPENDING', KEYS[1], GROUP, '-', '+', 1, CONSUMER) > 0 then return '0' end

-- The oldest entry in anybody's hands tells: those of the living are dropped within moments, so that what a dead one
-- had is soon the oldest there is.
local oldest = redis.call('XPENDING', KEYS[1], GROUP, '-', '+', 1)[1]
if oldest then
  if oldest[3] < IDLE then return '>' end
  redis.call('XAUTOCLAIM', KEYS[1], GROUP, CONSUMER, IDLE, '0-0', 'COUNT', COUNT, 'JUSTID')
  return '0'
end

-- There are entries, and nobody has one in hand. If none of them is new, somebody has tampered with the group.
if #redis.call('XRANGE', KEYS[1], '(' .. last_delivered(), '+', 'COUNT', 1) == 0 then
  redis.call('XGROUP', 'SETID', KEYS[1], GROUP, '0')
end
return '>'
