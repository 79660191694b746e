-- Shared by the scripts that look into holds: it stands behind _bucket.lua.

-- ------------------------------------------------------------ holds

-- A hold is '#', the lengths of the first three of its strings (4 bytes each), and these:
--   what was granted    the reply, as reserve.lua has it
--   what was asked for  the wish, as reserve.lua has it
--   of which lines      msgpack array, of each offer {balance's name, kind, unit, spent of each demand}
--   the draft of the event
-- Its lease end is its score in the due index. An ending is '-', its name, and when it may be forgotten.
local LINES, L_NAME, L_KIND, L_UNIT, L_START, L_AMOUNT, L_SPENT = 5, 0, 1, 2, 3, 4, 5

-- {call, offer, cap, took, line, ...}, a line being six values: balance's name, kind, unit, window start, amount,
-- spent; those taken over come first. nil for an ending, or for nothing at all.
local function hold_of(kept)
  local mark = kept and string.byte(kept)
  if mark == 43 then return cmsgpack.unpack(string.sub(kept, 6, 5 + struct.unpack('>I4', kept, 2))) end -- '+', once
  if mark ~= 35 then return nil end
  local first, second, third, from = struct.unpack('>I4I4I4', kept, 2)
  local granted = cmsgpack.unpack(string.sub(kept, from, from + first - 1))
  from = from + first
  local asked = {cmsgpack.unpack(string.sub(kept, from, from + second - 1))}
  from = from + second
  local lines = cmsgpack.unpack(string.sub(kept, from, from + third - 1))
  local offer, cap = granted[3], granted[4]
  local hold = {asked[2], offer, cap, granted[6]}
  for _, value in ipairs(granted[8] or {}) do hold[#hold + 1] = value end
  local at = 8
  for o = 1, offer do at = at + 2 + 7 * #lines[o] / 4 end
  lines = lines[offer + 1]
  for d = 0, #lines / 4 - 1 do
    local h, line, demand = #hold, 4 * d, at + 2 + 7 * d
    if lines[line + 2] ~= 'concurrent' then
      hold[h + 1], hold[h + 2], hold[h + 3] = lines[line + 1], lines[line + 2], lines[line + 3]
      hold[h + 4], hold[h + 5] = granted[12 + 4 * d], asked[demand + 1] + asked[demand + 2] * cap
      hold[h + 6] = lines[line + 4]
    end
  end
  return hold
end
