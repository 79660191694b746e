-- Give a consumer of the journal's group entries to bring to the ledger: what it has in hand already (its last batch
-- met with no commit, or the reply was lost), else what another one left alone, else what nobody had yet.
--
-- KEYS  1 journal
-- ARGV  1 consumer   2 how many at most   3 how long others must have left them alone, ms
--       4 how long a consumer with empty hands must have been silent to be forgotten, ms
-- Reply {id, {field, value, ...}} of each entry, oldest first
local GROUP, CONSUMER, COUNT, IDLE = 'ledger', ARGV[1], ARGV[2], ARGV[3]
local FORGOTTEN = tonumber(ARGV[4])

if redis.call('XLEN', KEYS[1]) == 0 then return {} end

local function read(after)
  local reply = redis.call('XREADGROUP', 'GROUP', GROUP, CONSUMER, 'COUNT', COUNT, 'STREAMS', KEYS[1], after)
  return reply and reply[1][2] or {}
end

-- What somebody removed from the stream is still in hand: without fields, or (6.2, of another's hands) without an id.
local function still_there(entries)
  local there = {}
  for _, entry in ipairs(entries) do
    if entry and entry[2] then
      there[#there + 1] = entry
    elseif entry then
      redis.call('XACK', KEYS[1], GROUP, entry[1])
    end
  end
  return there
end

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

local made = redis.pcall('XGROUP', 'CREATECONSUMER', KEYS[1], GROUP, CONSUMER)
if type(made) == 'table' and made.err then
  -- From the beginning: what the stream still has is what the ledger may not have.
  redis.call('XGROUP', 'CREATE', KEYS[1], GROUP, '0')
elseif made == 1 then
  sweep_consumers()
end

local entries = still_there(read('0'))
if #entries > 0 then return entries end
entries = still_there(redis.call('XAUTOCLAIM', KEYS[1], GROUP, CONSUMER, IDLE, '0-0', 'COUNT', COUNT)[2])
if #entries > 0 then return entries end
entries = read('>')
if #entries > 0 then return entries end

-- There are entries, none of them new, and nobody has one in hand: somebody has tampered with the group.
if redis.call('XPENDING', KEYS[1], GROUP)[1] == 0 then
  redis.call('XGROUP', 'SETID', KEYS[1], GROUP, '0')
  return read('>')
end
return {}
